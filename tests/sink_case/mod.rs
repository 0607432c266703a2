//! A small model whose cache has raw sinks in some of its layer groups, and of different length, so that a
//! block may be raw in one and sealed in the other; served from tiers, from streams, and computed. For
//! the tests on the CPU and under the emulator.

// Not every test uses all of it.
#![allow(dead_code)]

#[path = "../random/mod.rs"]
mod random;
#[path = "../tier_case/remote.rs"]
pub mod remote;

use std::sync::Arc;
use std::time::Duration;

use kvcache::attention::Scoring;
use kvcache::cache::{
    CacheOptions, Demotion, KvCache, LayerId, LowerTier, Step, TierOptions, Work,
};
use kvcache::device::Backend;
use kvcache::dtype::KvFormat;
use kvcache::ids::{Namespace, SeqId, TokenId};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::{Get, ObjectKey, Outcome, Put, Store, TierKind, TierSettings};
pub use random::Rng;

pub const SPACE: Namespace = Namespace(0);
pub const LONG: Duration = Duration::from_secs(60);
const Q_HEADS: usize = 2;

/// Caches of one kind.
#[derive(Clone)]
pub struct Setup {
    /// `None` for the CPU.
    pub backend: Option<Arc<dyn Backend>>,
    pub dim: usize,
    pub tokens: usize,
    pub groups: Vec<(KvFormat, usize)>,
    pub blocks: u32,
    pub staging_blocks: u32,
}

pub const LAYERS: u32 = 2;

impl Setup {
    /// Groups of a format and so many sinks each.
    pub fn new(backend: Option<Arc<dyn Backend>>, groups: &[(KvFormat, usize)]) -> Self {
        let (dim, tokens) = if backend.is_some() { (64, 64) } else { (32, 32) };
        let (groups, blocks, staging_blocks) = (groups.to_vec(), 40, 0);
        Self { backend, dim, tokens, groups, blocks, staging_blocks }
    }

    pub fn spec(&self) -> CacheSpec {
        let group = |&(format, sinks): &(KvFormat, usize)| {
            let group = GroupSpec::uniform(LAYERS, 1, self.dim as u32, format);
            GroupSpec { sink_tokens: (sinks * self.tokens) as u32, ..group }
        };
        let groups = self.groups.iter().map(group).collect();
        CacheSpec { block_tokens: self.tokens as u32, groups }
    }

    pub fn cache(&self) -> KvCache {
        let options = CacheOptions {
            blocks: self.blocks,
            max_seqs: 4,
            threads: 1,
            deterministic: true,
            staging_blocks: self.staging_blocks,
            ..CacheOptions::default()
        };
        match &self.backend {
            None => KvCache::new(&self.spec(), &options).unwrap(),
            Some(backend) => KvCache::on(backend, &self.spec(), &options).unwrap(),
        }
    }

    fn rows(
        &self,
        kind: u32,
        layer: LayerId,
        first: usize,
        tokens: &[TokenId],
        heads: usize,
    ) -> Vec<f32> {
        let mut rows = Vec::new();
        for (n, &token) in tokens.iter().enumerate() {
            let place = u64::from(kind) << 8 | u64::from(layer.group) << 4 | u64::from(layer.layer);
            let seed = u64::from(token) << 32 | (first + n) as u64;
            let mut rng = Rng::new(seed ^ place << 48);
            rows.extend((0..heads * self.dim).map(|_| rng.normal()));
        }
        rows
    }

    /// Computes tokens of a sequence: the attention of the last of them.
    pub fn run(&self, cache: &mut KvCache, seq: SeqId, new: &[TokenId]) -> Vec<u32> {
        let (mut step, mut out) = (Step::new(), Vec::new());
        let from = cache.tokens(seq).unwrap().len();
        let last = new.len() - 1;
        // The last token alone, so that its attention depends on nothing but what is stored.
        for part in [0..last, last..new.len()].into_iter().filter(|part| !part.is_empty()) {
            let tokens = &new[part.clone()];
            cache.begin(&mut step, &[Work { seq, tokens }]).unwrap();
            for group in 0..self.groups.len() as u32 {
                for layer in (0..LAYERS).map(|layer| LayerId { group, layer }) {
                    assert!(cache.wait_layer(seq, layer, LONG).unwrap());
                    let row =
                        |kind, heads| self.rows(kind, layer, from + part.start, tokens, heads);
                    let (q, k, v) = (row(0, Q_HEADS), row(1, 1), row(2, 1));
                    cache.append(&step, layer, k[..].into(), v[..].into(), None).unwrap();
                    let mut rows = vec![f32::NAN; q.len()];
                    let scoring = Scoring::causal(self.dim as u32);
                    cache
                        .attend(&step, layer, q[..].into(), (&mut rows[..]).into(), &scoring, None)
                        .unwrap();
                    if part.start == last {
                        out.extend(rows.iter().map(|x| x.to_bits()));
                    }
                }
            }
            cache.commit(&mut step).unwrap();
            cache.audit().unwrap();
        }
        out
    }

    /// Serves a prompt: how much of it was cached, and the attention of its last token.
    pub fn serve(
        &self,
        cache: &mut KvCache,
        prompt: &[TokenId],
        by_layers: bool,
    ) -> (usize, Vec<u32>) {
        let started = match by_layers {
            true => cache.start_onboarding(prompt, &[], SPACE).unwrap(),
            false => cache.start(prompt, SPACE).unwrap(),
        };
        cache.audit().unwrap();
        let cached = started.cached_tokens as usize;
        let out = self.run(cache, started.seq, &prompt[cached..]);
        cache.release(started.seq).unwrap();
        cache.audit().unwrap();
        (cached, out)
    }

    /// What a cache computes that has everything.
    pub fn expected(&self, prompt: &[TokenId]) -> Vec<u32> {
        let roomy = Setup { blocks: 40, staging_blocks: 0, ..self.clone() };
        roomy.serve(&mut roomy.cache(), prompt, false).1
    }

    pub fn prompt(&self, n: u32, blocks: usize) -> Vec<TokenId> {
        (0..(blocks * self.tokens + 3) as u32).map(|t| n * 10_000 + t).collect()
    }

    /// Objects of the first so many blocks of a prompt.
    pub fn objects(&self, blocks: usize) -> usize {
        let layouts = self.spec().layouts().unwrap();
        let of = |block: usize| {
            let raw = layouts.iter().filter(|layout| block < layout.sink_blocks() as usize);
            raw.map(|layout| layout.staging_block_bytes().div_ceil(layout.block_bytes())).max()
        };
        (0..blocks).map(|block| of(block).unwrap_or(1) as usize).sum()
    }
}

pub fn below(store: Arc<dyn Store>, kind: TierKind, on_commit: bool) -> LowerTier {
    let settings = TierSettings { kind, readers: 2, writers: 1, queued_blocks: 64 };
    LowerTier { store, settings, demotion: Demotion { on_commit, ..Demotion::default() } }
}

/// A host tier of so many objects over others.
pub fn attach(cache: &mut KvCache, host: usize, lower: Vec<LowerTier>) {
    cache.attach_tiers(TierOptions { lower, ..TierOptions::host("m", host) }).unwrap();
}

pub fn prefetch(cache: &mut KvCache, prompt: &[TokenId]) {
    let mut prefetch = cache.prefetch(prompt, SPACE).unwrap();
    cache.wait_prefetch(&mut prefetch, LONG);
}

/// Prompts of which some begin alike, and what a cache computes of them.
pub fn known_prompts(setup: &Setup, count: u32) -> Vec<(Vec<TokenId>, Vec<u32>)> {
    let known = |n: u32| {
        let mut prompt = setup.prompt(n, 2 + n as usize % 3);
        if n.is_multiple_of(2) {
            prompt[..setup.tokens].copy_from_slice(&setup.prompt(0, 1)[..setup.tokens]);
        }
        let out = setup.expected(&prompt);
        (prompt, out)
    };
    (0..count).map(known).collect()
}

/// Prompts in a cache with room for little more than one of them, over tiers: what comes back is what was computed,
/// in sinks and behind them.
pub fn a_life(
    setup: &Setup,
    prompts: &[(Vec<TokenId>, Vec<u32>)],
    host: usize,
    lower: &dyn Fn() -> Vec<LowerTier>,
    turns: usize,
    seed: u64,
) {
    let small = Setup { blocks: 5, staging_blocks: 7, ..setup.clone() };
    let mut cache = small.cache();
    attach(&mut cache, host, lower());
    let (mut rng, mut hits) = (Rng::new(seed), 0);
    for turn in 0..turns {
        let n = (turn + rng.below(2)) % prompts.len();
        let (prompt, known) = &prompts[n];
        if rng.below(2) == 0 {
            prefetch(&mut cache, prompt);
        }
        let (cached, out) = small.serve(&mut cache, prompt, rng.below(2) == 0);
        assert!(out == *known, "turn {turn}: prompt {n}, of which {cached} tokens were cached");
        hits += cached / setup.tokens;
        if rng.below(10) == 0 {
            cache.clear_prefix().unwrap();
            assert_eq!(cache.stats().staged_blocks, 0);
        }
    }
    assert!(cache.flush_tiers(LONG));
    let loaded: u64 = cache.tier_reports().iter().map(|report| report.counters.loaded).sum();
    assert!(hits > 0 && loaded > 0, "{hits} blocks were found, {loaded} objects loaded");
}

/// What one cache exports another imports and reads as if it had computed it.
pub fn a_stream(from: &Setup, to: &Setup) {
    let prompt = from.prompt(1, 3);
    let mut cache = from.cache();
    let seq = cache.start(&prompt, SPACE).unwrap().seq;
    from.run(&mut cache, seq, &prompt);
    let mut stream = Vec::new();
    let tokens = cache.export_blocks(seq, "m", None, &mut stream).unwrap();
    assert_eq!(tokens, 3 * from.tokens);
    let mut other = to.cache();
    assert_eq!(other.import_blocks(&mut [&mut &stream[..]], "m", None, SPACE), Ok(tokens));
    other.audit().unwrap();
    let (cached, out) = to.serve(&mut other, &prompt, false);
    assert_eq!(cached, tokens);
    assert!(out == to.expected(&prompt));
    // Its own stream is the same.
    let again = other.start(&prompt, SPACE).unwrap().seq;
    let mut copy = Vec::new();
    other.export_blocks(again, "m", None, &mut copy).unwrap();
    assert!(copy == stream);
}
