//! A small model served from a cache whose blocks depend on their tokens alone, so that what a tier
//! gives back can be held against what is computed. For the tests of tiers.

// Not every test uses all of it.
#![allow(dead_code)]

mod folder;
pub mod remote;

use std::sync::Arc;
use std::time::Duration;

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, Demotion, KvCache, LayerId, LowerTier, Progress, Step, Work};
use kvcache::dtype::KvFormat;
use kvcache::ids::Namespace;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::{Get, ObjectKey, Outcome, Put, Store, TierKind, TierReport, TierSettings};

pub use folder::Folder;

pub const LAYERS: u32 = 2;
pub const HEADS: u32 = 4;
pub const DIM: usize = 16;
pub const BLOCK: usize = 16;
pub const SPACE: Namespace = Namespace(0);

pub fn spec() -> CacheSpec {
    let group = GroupSpec::uniform(LAYERS, HEADS, DIM as u32, KvFormat::F16);
    CacheSpec::uniform(BLOCK as u32, group)
}

pub fn cache_of(spec: &CacheSpec, blocks: u32) -> KvCache {
    let options = CacheOptions { blocks, max_seqs: 4, threads: 1, ..CacheOptions::default() };
    KvCache::new(spec, &options).unwrap()
}

/// A number between -1 and 1 that depends on everything it is given.
pub fn noise(parts: [u32; 5]) -> f32 {
    let mixed = parts
        .iter()
        .fold(0x9e37_79b9u32, |hash, part| (hash ^ part).wrapping_mul(0x85eb_ca6b).rotate_left(13));
    (mixed >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// Rows of `kind` for tokens from position `first` on, for a part of the heads.
pub fn rows(
    kind: u32,
    layer: u32,
    first: usize,
    tokens: &[u32],
    heads: std::ops::Range<u32>,
) -> Vec<f32> {
    let mut rows = Vec::new();
    for (n, &token) in tokens.iter().enumerate() {
        for head in heads.clone() {
            let at = (first + n) as u32;
            rows.extend((0..DIM as u32).map(|c| noise([kind * 64 + layer, at, token, head, c])));
        }
    }
    rows
}

/// Serves a prompt: how much of it was cached, and the attention of its last token in all layers.
pub fn serve_part(
    cache: &mut KvCache,
    prompt: &[u32],
    layers: std::ops::Range<u32>,
    heads: std::ops::Range<u32>,
) -> (usize, Vec<f32>) {
    let started = cache.start(prompt, SPACE).unwrap();
    let (cached, last) = (started.cached_tokens as usize, prompt.len() - 1);
    let (mut step, mut out) = (Step::new(), Vec::new());
    // The last token alone, so that its attention depends on nothing but what is stored.
    for part in [cached..last, last..prompt.len()] {
        if part.is_empty() {
            continue;
        }
        let tokens = &prompt[part.clone()];
        cache.begin(&mut step, &[Work { seq: started.seq, tokens }]).unwrap();
        for layer in layers.clone() {
            let row = |kind| rows(kind, layer, part.start, tokens, heads.clone());
            let at = LayerId::uniform(layer - layers.start);
            let (q, k, v) = (row(0), row(1), row(2));
            cache.append(&step, at, k[..].into(), v[..].into(), None).unwrap();
            let mut attended = vec![0f32; q.len()];
            let scoring = Scoring::causal(DIM as u32);
            cache
                .attend(&step, at, q[..].into(), (&mut attended[..]).into(), &scoring, None)
                .unwrap();
            if part.start == last {
                out.extend(attended);
            }
        }
        cache.commit(&mut step).unwrap();
    }
    cache.release(started.seq).unwrap();
    cache.audit().unwrap();
    (cached, out)
}

pub fn serve(cache: &mut KvCache, prompt: &[u32]) -> (usize, Vec<f32>) {
    serve_part(cache, prompt, 0..LAYERS, 0..HEADS)
}

/// What a cache that has everything computes.
pub fn expected(prompt: &[u32]) -> Vec<f32> {
    serve(&mut cache_of(&spec(), 64), prompt).1
}

pub fn prompt(n: u32, blocks: usize) -> Vec<u32> {
    (0..(blocks * BLOCK + 3) as u32).map(|t| n * 10_000 + t).collect()
}

pub fn report(cache: &KvCache, kind: TierKind) -> TierReport {
    cache.tier_reports().into_iter().find(|report| report.kind == kind).unwrap()
}

pub fn settings(kind: TierKind) -> TierSettings {
    TierSettings { kind, readers: 2, writers: 1, queued_blocks: 64 }
}

pub fn below(store: Arc<dyn Store>, kind: TierKind) -> LowerTier {
    LowerTier { store, settings: settings(kind), demotion: Demotion::default() }
}

pub const LONG: Duration = Duration::from_secs(60);

pub fn prefetch(cache: &mut KvCache, prompt: &[u32]) {
    let mut prefetch = cache.prefetch(prompt, SPACE).unwrap();
    assert_eq!(cache.wait_prefetch(&mut prefetch, LONG), Progress::Done);
}
