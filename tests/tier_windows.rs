//! Tiers under a model whose layer groups have windows: blocks leave the device group by group, and
//! whatever comes back is what was there, to the bit.

use std::sync::Arc;
use std::time::Duration;

use kvcache::attention::Scoring;
use kvcache::cache::{
    CacheOptions, Demotion, KvCache, LayerId, LowerTier, Progress, Step, TierOptions, Work,
};
use kvcache::dtype::KvFormat;
use kvcache::error::Error;
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Configuration, TierKind, TierSettings};

const BLOCK: usize = 16;
const DIM: usize = 8;
const SPACE: Namespace = Namespace(0);

/// The first group has the window: notes and digests must not hang on its blocks.
fn spec(window: u32) -> CacheSpec {
    let full = GroupSpec::uniform(1, 1, DIM as u32, KvFormat::F32);
    let windowed = GroupSpec { window: Some(window), ..full.clone() };
    let mut spec = CacheSpec::uniform(BLOCK as u32, full);
    spec.groups.insert(0, windowed);
    spec
}

fn cache(spec: &CacheSpec, group_blocks: Vec<u32>, scrub: bool) -> KvCache {
    let blocks = *group_blocks.iter().max().unwrap();
    let options =
        CacheOptions { blocks, group_blocks, max_seqs: 4, threads: 1, scrub, ..Default::default() };
    KvCache::new(spec, &options).unwrap()
}

fn row(kind: u32, group: u32, at: usize, token: u32) -> impl Iterator<Item = f32> {
    (0..DIM as u32).map(move |channel| {
        let hash = [kind, group, at as u32, token, channel]
            .iter()
            .fold(7u32, |hash, part| (hash ^ part).wrapping_mul(0x85eb_ca6b).rotate_left(13));
        (hash >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// Feeds what is not cached, `chunk` tokens a step and the last alone; how much was cached, and the
/// attention of the last token in both groups.
fn feed(cache: &mut KvCache, prompt: &[u32], chunk: usize) -> (usize, Vec<f32>, SeqId) {
    let started = cache.start(prompt, SPACE).unwrap();
    let (cached, last) = (started.cached_tokens as usize, prompt.len() - 1);
    let (mut step, mut out) = (Step::new(), Vec::new());
    let mut at = cached;
    while at <= last {
        let end = if at == last { last + 1 } else { last.min(at + chunk) };
        let tokens = &prompt[at..end];
        cache.begin(&mut step, &[Work { seq: started.seq, tokens }]).unwrap();
        for group in 0..2 {
            let rows = |kind| -> Vec<f32> {
                tokens.iter().zip(at..).flat_map(|(&t, at)| row(kind, group, at, t)).collect()
            };
            let (q, k, v) = (rows(0), rows(1), rows(2));
            let layer = LayerId { group, layer: 0 };
            cache.append(&step, layer, k[..].into(), v[..].into(), None).unwrap();
            let mut attended = vec![0f32; q.len()];
            let (to, scoring) = ((&mut attended[..]).into(), Scoring::causal(DIM as u32));
            cache.attend(&step, layer, q[..].into(), to, &scoring, None).unwrap();
            if at == last {
                out.extend(attended);
            }
        }
        cache.commit(&mut step).unwrap();
        at = end;
    }
    cache.audit().unwrap();
    (cached, out, started.seq)
}

fn serve(cache: &mut KvCache, prompt: &[u32], chunk: usize) -> (usize, Vec<f32>) {
    let (cached, out, seq) = feed(cache, prompt, chunk);
    cache.release(seq).unwrap();
    cache.audit().unwrap();
    (cached, out)
}

/// Prompts that share beginnings of several lengths.
fn prompts() -> Vec<Vec<u32>> {
    (0..6u32)
        .map(|n| {
            let length = [140, 90, 122, 166, 74, 132][n as usize];
            let own = [0, 32, 48, 0, 16, 80][n as usize];
            (0..length).map(|t| if t < own { t } else { n * 1000 + t }).collect()
        })
        .collect()
}

fn options(dir: Option<&std::path::Path>, spec: &CacheSpec, host: usize) -> TierOptions {
    let mut options = TierOptions::host("m", host);
    if let Some(dir) = dir {
        let config = Configuration::new("m", spec, &Slice::whole(spec)).unwrap();
        let (store, _) = DiskStore::open(&DiskOptions::new(dir, 1 << 20), &config).unwrap();
        let settings =
            TierSettings { kind: TierKind::Disk, readers: 1, writers: 1, queued_blocks: 64 };
        let demotion = Demotion { on_commit: true, ..Demotion::default() };
        options.lower.push(LowerTier { store: Arc::new(store), settings, demotion });
    }
    options
}

#[test]
fn whatever_comes_back_is_what_was_there() {
    let (mut loaded, mut hits) = (0, 0);
    let dir = std::env::temp_dir().join(format!("kvcache-tier-windows-{}", std::process::id()));
    for (window, group_blocks) in
        [(3, vec![12, 14]), (16, vec![14, 12]), (40, vec![12, 12]), (40, vec![13, 30])]
    {
        for (with_disk, host) in [(false, 40), (true, 0), (true, 6)] {
            let _ = std::fs::remove_dir_all(&dir);
            let spec = spec(window);
            let mut cache = cache(&spec, group_blocks.clone(), true);
            let path = with_disk.then_some(dir.as_path());
            cache.attach_tiers(options(path, &spec, host)).unwrap();
            let prompts = prompts();
            let mut state = 1u32;
            for _ in 0..60 {
                state = state.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
                let prompt = &prompts[(state >> 16) as usize % prompts.len()];
                let chunk = [9, 16, 37, 128][(state >> 24) as usize % 4];
                if with_disk {
                    let mut prefetch = cache.prefetch(prompt, SPACE).unwrap();
                    let limit = Duration::from_secs(60);
                    assert_eq!(cache.wait_prefetch(&mut prefetch, limit), Progress::Done);
                }
                let (cached, out) = serve(&mut cache, prompt, chunk);
                let mut whole = self::cache(&spec, vec![16, 16], false);
                assert_eq!(out, serve(&mut whole, prompt, prompt.len()).1, "{cached} cached");
                hits += cached;
            }
            let reports = cache.tier_reports();
            loaded += reports.iter().map(|report| report.counters.loaded).sum::<u64>();
            assert!(reports.iter().all(|report| report.counters.bad == 0));
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
    println!("{loaded} blocks loaded, {hits} tokens found");
    assert!(loaded > 300 && hits > 5000, "{loaded} blocks loaded, {hits} tokens found");
}

#[test]
fn a_sequence_whose_window_left_blocks_is_not_exported() {
    let mut cache = cache(&spec(16), vec![16, 16], false);
    let prompt: Vec<u32> = (0..80).collect();
    let (_, _, seq) = feed(&mut cache, &prompt, 80);
    let mut stream = Vec::new();
    let refused = cache.export_blocks(seq, "m", None, &mut stream);
    assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
    assert!(stream.is_empty());
}
