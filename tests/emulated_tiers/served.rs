//! Prompts served from a small cache over tiers, what a cache with room for all computes, and lives of many
//! prompts.

use std::sync::{Arc, OnceLock};

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, LowerTier, Step, TierOptions, Work};
use kvcache::device::{self, Backend, Device};
use kvcache::dtype::KvFormat;
use kvcache::error::Result;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Configuration, Store, TierCounters, TierKind};

use crate::late_device::{Late, Pace};
use crate::tier_case::{BLOCK, Folder, LONG, SPACE, below, noise, report};

pub const LAYERS: u32 = 2;
pub const DIM: usize = 64;

pub fn spec() -> CacheSpec {
    CacheSpec::uniform(BLOCK as u32, GroupSpec::uniform(LAYERS, 1, DIM as u32, KvFormat::F16))
}

fn rows(kind: u32, layer: u32, first: usize, tokens: &[u32]) -> Vec<f32> {
    let mut rows = Vec::new();
    for (n, &token) in tokens.iter().enumerate() {
        let at = (first + n) as u32;
        rows.extend((0..DIM as u32).map(|c| noise([kind * 64 + layer, at, token, 0, c])));
    }
    rows
}

/// Serves a prompt: how much of it was cached, and the attention of its last token in all layers.
pub fn serve(cache: &mut KvCache, prompt: &[u32], by_layers: bool) -> Result<(usize, Vec<f32>)> {
    let started = match by_layers {
        true => cache.start_onboarding(prompt, &[], SPACE)?,
        false => cache.start(prompt, SPACE)?,
    };
    let (cached, last) = (started.cached_tokens as usize, prompt.len() - 1);
    let (mut step, mut out) = (Step::new(), Vec::new());
    // The last token alone, so that its attention depends on nothing but what is stored.
    for part in [cached..last, last..prompt.len()] {
        if part.is_empty() {
            continue;
        }
        let tokens = &prompt[part.clone()];
        cache.begin(&mut step, &[Work { seq: started.seq, tokens }])?;
        for layer in 0..LAYERS {
            let at = LayerId::uniform(layer);
            assert!(cache.wait_layer(started.seq, at, LONG)?);
            let row = |kind| rows(kind, layer, part.start, tokens);
            let (q, k, v) = (row(0), row(1), row(2));
            cache.append(&step, at, k[..].into(), v[..].into(), None)?;
            let mut attended = vec![0f32; q.len()];
            let scoring = Scoring::causal(DIM as u32);
            cache.attend(&step, at, q[..].into(), (&mut attended[..]).into(), &scoring, None)?;
            if part.start == last {
                out.extend(attended);
            }
        }
        cache.commit(&mut step)?;
    }
    cache.release(started.seq)?;
    cache.audit().unwrap();
    Ok((cached, out))
}

pub fn on(backend: &Arc<dyn Backend>, blocks: u32) -> KvCache {
    let options = CacheOptions {
        blocks,
        max_seqs: 4,
        threads: 1,
        deterministic: true,
        ..CacheOptions::default()
    };
    KvCache::on(backend, &spec(), &options).unwrap()
}

pub fn emulated() -> Arc<dyn Backend> {
    device::open(Device::Emu).unwrap()
}

/// Prompts, some of which begin alike, and what a cache computes that has room for everything.
pub struct Prompts(pub Vec<(Vec<u32>, Vec<f32>)>);

impl Prompts {
    /// The first so many of six.
    pub fn new(count: usize) -> Self {
        static ALL: OnceLock<Vec<(Vec<u32>, Vec<f32>)>> = OnceLock::new();
        Prompts(ALL.get_or_init(|| Self::serve(6))[..count].to_vec())
    }

    fn serve(count: u32) -> Vec<(Vec<u32>, Vec<f32>)> {
        let mut cache = on(&emulated(), 64);
        let prompt = |n: u32| -> Vec<u32> {
            let tokens = (2 + n % 3) * BLOCK as u32 + 3;
            (0..tokens)
                .map(|t| if t < BLOCK as u32 { n % 2 * 500 + t } else { n * 1000 + t })
                .collect()
        };
        let served = |n| {
            let prompt = prompt(n);
            let out = serve(&mut cache, &prompt, false).unwrap().1;
            (prompt, out)
        };
        (0..count).map(served).collect()
    }
}

/// A disk tier in a folder.
pub fn disk(folder: &Folder) -> LowerTier {
    let config = Configuration::new("m", &spec(), &Slice::whole(&spec())).unwrap();
    let store = DiskStore::open(&DiskOptions::new(&folder.0, 16 << 20), &config).unwrap();
    let store: Arc<dyn Store> = Arc::new(store.0);
    below(store, TierKind::Disk)
}

pub fn late(pace: Pace) -> (Arc<Late>, Arc<dyn Backend>) {
    let late = Late::new(emulated(), pace);
    (late.clone(), late)
}

pub fn host(cache: &KvCache) -> TierCounters {
    report(cache, TierKind::Host).counters
}

/// A life of `turns` prompts in a cache that has room for two of them, over a host that has room for
/// some, and perhaps a disk; how often the attention was another than it should be.
pub fn live(
    late: &Arc<Late>,
    prompts: &Prompts,
    folder: Option<&Folder>,
    turns: u32,
    seed: u32,
) -> u32 {
    let backend: Arc<dyn Backend> = late.clone();
    let mut cache = on(&backend, 8);
    let mut options = TierOptions::host("m", if folder.is_some() { 4 } else { 24 });
    options.transit_blocks = 16;
    options.ahead_blocks = seed % 3;
    if let Some(folder) = folder {
        let mut tier = disk(folder);
        tier.demotion.on_commit = seed % 2 == 1;
        options.lower.push(tier);
    }
    cache.attach_tiers(options).unwrap();
    assert!(report(&cache, TierKind::Host).page_locked);
    let (mut wrong, mut hits, mut state) = (0, 0, seed);
    let mut random = |below: u32| {
        state = state.wrapping_mul(747796405).wrapping_add(2891336453);
        (state >> 16) % below
    };
    for _ in 0..turns {
        let (prompt, expected) = &prompts.0[random(prompts.0.len() as u32) as usize];
        if folder.is_some() && random(2) == 0 {
            let mut prefetch = cache.prefetch(prompt, SPACE).unwrap();
            cache.wait_prefetch(&mut prefetch, LONG);
        }
        let (cached, out) = serve(&mut cache, prompt, random(2) == 0).unwrap();
        hits += cached / BLOCK;
        wrong += u32::from(out != *expected);
    }
    assert!(cache.flush_tiers(LONG));
    let counters = host(&cache);
    assert!(hits > 0 && counters.failures == 0, "{counters:?}");
    assert!(counters.loaded > 0 || folder.is_some(), "{counters:?}");
    wrong
}
