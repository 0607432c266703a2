//! The facade against the plainest model there is: sequences as token lists, and K and V as a
//! function of all tokens up to a position, as in a real network. Whatever is shared, copied,
//! evicted or merged, attention must read what that function says.

mod backends;

use std::sync::Arc;

use kvcache::Error;
use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::device::Backend;
use kvcache::dtype::{FormatClass, KvFormat, f16};
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::{Digest, Eviction, Hint, Retention};
use kvcache::quant::{RowCodec, Stored};

const LAYERS: u32 = 2;
const KV_HEADS: usize = 2;
const Q_HEADS: usize = 4;

/// Where the cache lives, and what its kernels can do.
#[derive(Clone)]
struct Setup {
    /// `None` for the CPU.
    backend: Option<Arc<dyn Backend>>,
    format: KvFormat,
    dim: usize,
    tolerance: f64,
    /// Of the two layer groups.
    windows: [Option<u32>; 2],
    /// Of the two layer groups, where they differ.
    group_blocks: Vec<u32>,
}

impl Setup {
    fn cpu() -> Self {
        let (windows, group_blocks) = ([None; 2], Vec::new());
        let (format, dim) = (KvFormat::F32, 16);
        Setup { backend: None, format, dim, tolerance: 1e-5, windows, group_blocks }
    }

    /// Formats stored token by token. Where queries are multiplied as 16-bit integers, a score is off
    /// by at most 2 / 65278 * 64 / 8.
    fn coded(format: KvFormat) -> Self {
        Setup { format, dim: 64, tolerance: 1e-3, ..Setup::cpu() }
    }

    /// What rows of all heads read as once they were stored.
    fn stored(&self, row: Vec<f32>, side: u64) -> Vec<f32> {
        if self.format.is_float() {
            return row;
        }
        let dim = self.dim as u32;
        let codec = match side {
            0 => RowCodec::key(self.format, dim),
            _ => RowCodec::value(self.format, dim),
        };
        let codec = codec.unwrap();
        let mut row = row;
        let (mut codes, mut scales) = (vec![0; codec.code_bytes()], vec![0; codec.scale_bytes()]);
        for head in row.chunks_exact_mut(self.dim) {
            assert_eq!(codec.encode(head, &mut codes, &mut scales).unwrap(), Stored::Encoded);
            codec.decode(&codes, &scales, head).unwrap();
        }
        row
    }

    /// Inputs are values of f16; softmax weights are rounded to it, each by half a step at most,
    /// and values are at most 1.
    fn device(backend: Arc<dyn Backend>) -> Self {
        let tolerance = 2f64.powi(-10);
        let (format, dim) = (KvFormat::F16, 64);
        Setup { backend: Some(backend), format, dim, tolerance, ..Setup::cpu() }
    }

    /// Formats stored token by token, of heads whose rows take the most. Queries are rotated and
    /// rounded to f16, and so are weights times scales.
    fn coded_device(backend: Arc<dyn Backend>, format: KvFormat) -> Self {
        Setup { format, dim: 256, tolerance: 4e-3, ..Setup::device(backend) }
    }

    fn windowed(self, windows: [Option<u32>; 2], group_blocks: [u32; 2]) -> Self {
        Setup { windows, group_blocks: group_blocks.to_vec(), ..self }
    }
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = mix(self.0.wrapping_add(0x9e37_79b9_7f4a_7c15));
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n.max(1)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// K (`side` 0) or V (1) of the last of `history`, one row of all heads.
fn kv_row(namespace: u64, history: &[u32], layer: u32, side: u64, dim: usize) -> Vec<f32> {
    let seed = history.iter().fold(mix(namespace ^ 77), |h, &t| mix(h ^ u64::from(t) ^ 0x5bd1));
    let mut rng = Rng(seed ^ u64::from(layer) << 32 ^ side << 48);
    let value = |bits: u64| f16::from_f32(bits as f32 / (1u64 << 23) as f32 - 1.0).to_f32();
    (0..KV_HEADS * dim).map(|_| value(rng.next() >> 40)).collect()
}

struct Harness {
    setup: Setup,
    cache: KvCache,
    step: Step,
    rng: Rng,
    /// Live sequences: id, namespace, tokens.
    live: Vec<(SeqId, u64, Vec<u32>)>,
    refused_truncations: u32,
}

impl Harness {
    fn new(seed: u64, blocks: u32, prefix_reuse: bool) -> Self {
        Self::with(Setup::cpu(), seed, blocks, prefix_reuse)
    }

    fn with(setup: Setup, seed: u64, blocks: u32, prefix_reuse: bool) -> Self {
        let group = GroupSpec::uniform(LAYERS, KV_HEADS as u32, setup.dim as u32, setup.format);
        // Two groups, so that tables, pools and the index go through the general case.
        let groups = setup.windows.map(|window| GroupSpec { window, ..group.clone() }).to_vec();
        let spec = CacheSpec { block_tokens: 16, groups };
        let policies =
            [Eviction::Lru, Eviction::Lfu, Eviction::Fifo, Eviction::Slru, Eviction::S3Fifo];
        let eviction = policies[(seed >> 7) as usize % policies.len()];
        let options = CacheOptions {
            blocks,
            max_seqs: 6,
            threads: 1,
            prefix_reuse,
            eviction,
            group_blocks: setup.group_blocks.clone(),
            scrub: seed.is_multiple_of(2),
            ..CacheOptions::default()
        };
        let cache = match &setup.backend {
            None => KvCache::new(&spec, &options),
            Some(backend) => KvCache::on(backend, &spec, &options),
        };
        let (cache, step) = (cache.unwrap(), Step::new());
        Self { setup, cache, step, rng: Rng(seed), live: Vec::new(), refused_truncations: 0 }
    }

    /// A prompt that likely shares a beginning with another: few tokens, few namespaces.
    fn prompt(&mut self) -> Vec<u32> {
        let base = self.rng.below(3) as u32;
        let length = 1 + self.rng.below(90);
        let fork = self.rng.below(90);
        let tail = self.rng.below(4) as u32;
        (0..length).map(|at| if at < fork { base } else { 10 + tail }).collect()
    }

    fn start(&mut self) {
        let namespace = self.rng.below(2) as u64;
        let prompt = self.prompt();
        match self.cache.start(&prompt, Namespace(namespace)) {
            Ok(started) => {
                let held = &prompt[..started.cached_tokens as usize];
                assert!(held.len() < prompt.len());
                self.live.push((started.seq, namespace, held.to_vec()));
                let rest = prompt[held.len()..].to_vec();
                let last = self.live.len() - 1;
                self.step(&[(last, rest)]);
            }
            Err(Error::OutOfSequences { limit }) => assert_eq!(self.live.len(), limit as usize),
            Err(error) => panic!("{error}"),
        }
    }

    /// Runs one step over some live sequences and checks what attention reads.
    fn step(&mut self, work: &[(usize, Vec<u32>)]) {
        let items: Vec<Work> =
            work.iter().map(|(at, tokens)| Work { seq: self.live[*at].0, tokens }).collect();
        let before = self.cache.stats();
        match self.cache.begin(&mut self.step, &items) {
            Ok(()) => {}
            Err(Error::OutOfBlocks { needed, missing }) => {
                assert!(missing > 0 && missing <= needed);
                if self.setup.windows == [None; 2] {
                    assert_eq!(missing, needed - before.free_blocks - before.cached_blocks);
                    assert_eq!(self.cache.stats(), before);
                }
                return;
            }
            Err(error) => panic!("{error}"),
        }
        let histories: Vec<(u64, Vec<u32>, usize)> = work
            .iter()
            .map(|(at, tokens)| {
                let (_, namespace, held) = &self.live[*at];
                (*namespace, [held.as_slice(), tokens].concat(), held.len())
            })
            .collect();
        for group in 0..2 {
            for layer in 0..LAYERS {
                self.layer(&histories, LayerId { group, layer });
            }
        }
        if self.rng.below(8) == 0 {
            self.cache.cancel(&mut self.step).unwrap();
        } else {
            self.cache.commit(&mut self.step).unwrap();
            for ((at, tokens), (_, history, _)) in work.iter().zip(&histories) {
                assert!(!tokens.is_empty());
                self.live[*at].2 = history.clone();
            }
        }
        self.cache.audit().unwrap();
    }

    fn layer(&mut self, histories: &[(u64, Vec<u32>, usize)], id: LayerId) {
        let salt = id.layer + 100 * id.group;
        let dim = self.setup.dim;
        let rows = |side: u64| -> Vec<f32> {
            let row = |(ns, tokens, held): &(u64, Vec<u32>, usize)| -> Vec<f32> {
                (*held..tokens.len())
                    .flat_map(|at| kv_row(*ns, &tokens[..=at], salt, side, dim))
                    .collect()
            };
            histories.iter().flat_map(row).collect()
        };
        let (k, v) = (rows(0), rows(1));
        self.cache.append(&self.step, id, k.as_slice().into(), v.as_slice().into(), None).unwrap();
        let count = self.step.rows() * Q_HEADS * dim;
        let value = |n: usize| n as f32 / 256.0 - 2.0;
        let q: Vec<f32> = (0..count).map(|_| value(self.rng.below(1024))).collect();
        let mut out = vec![f32::NAN; count];
        let scoring = Scoring::causal(dim as u32);
        let out_rows = out.as_mut_slice().into();
        self.cache.attend(&self.step, id, q.as_slice().into(), out_rows, &scoring, None).unwrap();
        let mut at = 0;
        let window = self.setup.windows[id.group as usize].map_or(usize::MAX, |w| w as usize);
        for (namespace, tokens, held) in histories {
            let rows = |side| -> Vec<_> {
                let row =
                    |n| self.setup.stored(kv_row(*namespace, &tokens[..n], salt, side, dim), side);
                (1..=tokens.len()).map(row).collect()
            };
            let (keys, values) = (rows(0), rows(1));
            for position in *held..tokens.len() {
                for head in 0..Q_HEADS {
                    let row = at..at + dim;
                    let kv = head / (Q_HEADS / KV_HEADS) * dim;
                    check_row(
                        &q[row.clone()],
                        &out[row],
                        &keys[(position + 1).saturating_sub(window)..=position],
                        &values[(position + 1).saturating_sub(window)..=position],
                        kv,
                        self.setup.tolerance,
                    );
                    at += dim;
                }
            }
        }
    }

    fn act(&mut self) {
        let live = self.live.len();
        match self.rng.below(10) {
            0..=2 => self.start(),
            3..=5 if live > 0 => {
                let mut work = Vec::new();
                for at in 0..live {
                    if self.rng.below(2) == 0 {
                        let count = 1 + self.rng.below(20);
                        let token = self.rng.below(3) as u32;
                        work.push((at, vec![token; count]));
                    }
                }
                if !work.is_empty() {
                    self.step(&work);
                }
            }
            6 if live > 0 => {
                let at = self.rng.below(live);
                let (seq, namespace, tokens) = self.live[at].clone();
                match self.cache.fork(seq) {
                    Ok(child) => self.live.push((child, namespace, tokens)),
                    Err(error) => assert!(matches!(error, Error::OutOfSequences { .. })),
                }
            }
            7 if live > 0 => {
                let at = self.rng.below(live);
                let keep = self.rng.below(self.live[at].2.len() + 1);
                match self.cache.truncate(self.live[at].0, keep as u32) {
                    Ok(()) => self.live[at].2.truncate(keep),
                    Err(Error::InvalidState { .. }) => {
                        assert_ne!(self.setup.windows, [None; 2]);
                        self.refused_truncations += 1;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            8 if live > 0 => {
                let at = self.rng.below(live);
                let (seq, ..) = self.live.swap_remove(at);
                self.cache.release(seq).unwrap();
                assert_eq!(self.cache.release(seq), Err(Error::StaleHandle { what: "sequence" }));
            }
            9 if self.rng.below(10) == 0 => self.cache.clear_prefix().unwrap(),
            9 if !self.live.is_empty() => self.steer(),
            _ => {}
        }
        self.cache.audit().unwrap();
        for (seq, _, tokens) in &self.live {
            assert_eq!(self.cache.tokens(*seq).unwrap(), tokens);
        }
    }
}

impl Harness {
    /// Says something about what stays.
    fn steer(&mut self) {
        let seq = self.live[self.rng.below(self.live.len())].0;
        let (now, priority) = (self.rng.below(5000) as u64, self.rng.below(101) as u8);
        self.cache.advance(now).unwrap();
        let duration_ms = (now % 2 == 0).then_some(500);
        let range = Retention { start: self.rng.below(40), end: None, priority, duration_ms };
        self.cache.prioritize(seq, &[range]).unwrap();
        let hints =
            [Hint::None, Hint::SessionEnded, Hint::ExpectedAt { ms: now + 900 }, Hint::Waited];
        if self.rng.below(2) == 0 {
            let from = self.rng.below(3);
            self.cache.hint(seq, from, hints[self.rng.below(4)]).unwrap();
        }
    }
}

fn check_row(
    q: &[f32],
    out: &[f32],
    keys: &[Vec<f32>],
    values: &[Vec<f32>],
    kv: usize,
    tolerance: f64,
) {
    let dot = |key: &Vec<f32>| -> f64 {
        q.iter().zip(&key[kv..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let scores: Vec<f64> = keys.iter().map(|key| dot(key) / (q.len() as f64).sqrt()).collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (channel, &out) in out.iter().enumerate() {
        let sum =
            weights.iter().zip(values).map(|(w, v)| w * f64::from(v[kv + channel])).sum::<f64>();
        let error = (f64::from(out) - sum / total).abs();
        assert!(error <= tolerance, "channel {channel}: {out} for {}", sum / total);
    }
}

#[test]
fn random_lives_read_what_they_wrote() {
    for seed in 0..24 {
        random_life(Setup::cpu(), seed);
    }
}

#[test]
fn random_lives_of_formats_stored_token_by_token() {
    let formats = KvFormat::ALL.iter().filter(|format| format.class() == FormatClass::Token);
    for (n, &format) in formats.enumerate() {
        for seed in 4 * n as u64..4 * n as u64 + 4 {
            random_life(Setup::coded(format), seed);
        }
    }
}

fn random_life(setup: Setup, seed: u64) {
    {
        // Tight, so that eviction and running out happen; ample, so that hits do.
        let blocks = [9, 14, 30, 120][seed as usize % 4];
        let mut harness = Harness::with(setup, mix(seed), blocks, seed % 6 != 5);
        for _ in 0..120 {
            harness.act();
        }
        let stats = harness.cache.stats();
        if blocks == 30 && seed % 6 != 5 {
            assert!(
                stats.hit_tokens > 0 && stats.evicted_blocks > 0 && stats.copied_blocks > 0,
                "{stats:?}"
            );
        }
        for (seq, ..) in harness.live.drain(..) {
            harness.cache.release(seq).unwrap();
        }
        harness.cache.clear_prefix().unwrap();
        assert_eq!(harness.cache.stats().free_blocks, blocks);
    }
}

#[test]
fn random_lives_with_windows_read_what_they_wrote() {
    let (mut refused, mut hits, mut alone) = (0, 0, 0);
    for seed in 0..24 {
        // Wide and narrow windows, one beside full attention and two of different widths; pools in
        // which the group with a window is the tight one, and others.
        let windows = [
            [None, Some(40)],
            [Some(17), None],
            [Some(24), Some(50)],
            [Some(1), Some(16)],
            [None, Some(1000)],
        ][seed as usize % 5];
        let blocks = [[40, 12], [14, 40], [30, 30]][seed as usize % 3];
        let setup = Setup::cpu().windowed(windows, blocks);
        let mut harness = Harness::with(setup, mix(1000 + seed), 0, true);
        for _ in 0..120 {
            harness.act();
        }
        let metrics = harness.cache.metrics();
        alone += metrics.counters.evicted_blocks[2];
        refused += harness.refused_truncations;
        hits += metrics.hits_tokens;
        for (seq, ..) in harness.live.drain(..) {
            harness.cache.release(seq).unwrap();
        }
        harness.cache.clear_prefix().unwrap();
        harness.cache.audit().unwrap();
        assert_eq!(harness.cache.stats().free_blocks, blocks[0]);
    }
    assert!(refused > 0 && hits > 0 && alone > 0, "{refused} {hits} {alone}");
}

/// Runs tokens through a cache without writing or reading anything.
fn feed(cache: &mut KvCache, seq: SeqId, tokens: &[u32]) -> Result<(), Error> {
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens }])?;
    cache.commit(&mut step)
}

#[test]
fn a_window_holds_what_the_planner_says_and_shares_what_it_has() {
    let full = GroupSpec::uniform(1, 1, 8, KvFormat::F16);
    let window = GroupSpec { window: Some(32), ..full.clone() };
    let spec = CacheSpec { block_tokens: 16, groups: vec![full, window] };
    // Three blocks are the most that a window of 32 touches; the fourth is being left.
    let group_blocks = vec![80, 4];
    let options = CacheOptions { group_blocks, max_seqs: 3, threads: 1, ..CacheOptions::default() };
    let mut cache = KvCache::new(&spec, &options).unwrap();
    let prompt: Vec<u32> = (0..640).collect();
    let serve = |cache: &mut KvCache, prompt: &[u32]| -> u32 {
        let started = cache.start(prompt, Namespace(0)).unwrap();
        for chunk in prompt[started.cached_tokens as usize..].chunks(16) {
            feed(cache, started.seq, chunk).unwrap();
            cache.audit().unwrap();
        }
        let held = cache.blocks(started.seq, 1).unwrap().iter();
        assert!(held.filter(|&&block| block != kvcache::ids::BlockId::NONE).count() <= 4);
        cache.release(started.seq).unwrap();
        started.cached_tokens
    };
    assert_eq!(serve(&mut cache, &prompt), 0);
    // The end is there in both groups; all but the last token is a hit.
    let longer: Vec<u32> = (0..641).collect();
    assert_eq!(serve(&mut cache, &longer), 640);
    // In the middle the window has nothing; who computes it anew makes it whole again.
    let other: Vec<u32> = (0..320).chain([7000]).collect();
    assert_eq!(serve(&mut cache, &other), 0);
    assert_eq!(cache.stats().cached_blocks, 40, "entries of the other group were kept");
    assert_eq!(serve(&mut cache, &other), 320);
    // A wider window than the group's would see what is gone.
    let seq = cache.start(&longer, Namespace(0)).unwrap().seq;
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &[1] }]).unwrap();
    let (q, mut out) = ([0f32; 8], [0f32; 8]);
    let layer = LayerId { group: 1, layer: 0 };
    let wide = Scoring { window: Some(33), ..Scoring::causal(8) };
    let wide = cache.attend(&step, layer, q[..].into(), (&mut out[..]).into(), &wide, None);
    assert!(matches!(wide, Err(Error::InvalidArgument { .. })));
    cache.commit(&mut step).unwrap();
    for bad in [vec![1], vec![1, 0], vec![1, 1, 1]] {
        assert!(
            KvCache::new(&spec, &CacheOptions { group_blocks: bad, ..options.clone() }).is_err()
        );
    }
}

/// What a new sequence sees in blocks that another has given back.
fn remains(backend: Option<&Arc<dyn Backend>>, scrub: bool) -> f32 {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 64, KvFormat::F16));
    let options = CacheOptions { blocks: 3, max_seqs: 2, threads: 1, scrub, ..Default::default() };
    let mut cache = match backend {
        None => KvCache::new(&spec, &options),
        Some(backend) => KvCache::on(backend, &spec, &options),
    }
    .unwrap();
    let layer = LayerId::uniform(0);
    let (ones, mut out) = ([1f32; 40 * 64], [0f32; 40 * 64]);
    let mut step = Step::new();
    let seq = cache.start(&[1], Namespace(1)).unwrap().seq;
    cache.begin(&mut step, &[Work { seq, tokens: &[5; 40] }]).unwrap();
    cache.append(&step, layer, ones[..].into(), ones[..].into(), None).unwrap();
    cache.commit(&mut step).unwrap();
    cache.release(seq).unwrap();
    // Another tenant, with no room but what the first had: two of its blocks are evicted for it.
    let seq = cache.start(&[1], Namespace(2)).unwrap().seq;
    cache.begin(&mut step, &[Work { seq, tokens: &[6; 40] }]).unwrap();
    let scoring = Scoring::causal(64);
    cache.attend(&step, layer, ones[..].into(), (&mut out[..]).into(), &scoring, None).unwrap();
    cache.cancel(&mut step).unwrap();
    out.iter().fold(0.0, |most, value| most.max(value.abs()))
}

#[test]
fn what_is_freed_is_zeroed_where_asked_for() {
    for backend in std::iter::once(None).chain(backends::all().iter().map(Some)) {
        assert_eq!(remains(backend, true), 0.0);
        assert_eq!(remains(backend, false), 1.0, "the test would see what remains");
    }
}

#[test]
fn random_lives_on_a_device_read_what_they_wrote() {
    for backend in backends::all() {
        let (mut copied, mut hits) = (0, 0);
        for seed in 0..3 {
            let mut setup = Setup::device(backend.clone());
            if seed == 1 {
                setup = setup.windowed([None, Some(40)], [120, 20]);
            }
            let mut harness =
                Harness::with(setup, mix(100 + seed), [30, 120, 14][seed as usize], true);
            for _ in 0..40 {
                harness.act();
            }
            harness.cache.sync().unwrap();
            let stats = harness.cache.stats();
            (copied, hits) = (copied + stats.copied_blocks, hits + stats.hit_tokens);
        }
        assert!(copied > 0 && hits > 0, "{backend:?}: {copied} copies, {hits} hits");
        let (mut copied, mut hits) = (0, 0);
        for (seed, format) in [(200, KvFormat::Fp8E4m3), (201, KvFormat::Int8T)] {
            let setup = Setup::coded_device(backend.clone(), format);
            let mut harness = Harness::with(setup, mix(seed), 30, true);
            for _ in 0..30 {
                harness.act();
            }
            harness.cache.sync().unwrap();
            let stats = harness.cache.stats();
            (copied, hits) = (copied + stats.copied_blocks, hits + stats.hit_tokens);
        }
        assert!(copied > 0 && hits > 0, "{backend:?}: {copied} copies of codes, {hits} hits");
    }
}

#[test]
fn a_second_prompt_shares_whole_blocks_and_copies_the_tail() {
    let mut harness = Harness::new(1, 64, true);
    let prompt: Vec<u32> = (0..50).collect();
    let first = harness.cache.start(&prompt, Namespace(3)).unwrap();
    assert_eq!(first.cached_tokens, 0);
    harness.live.push((first.seq, 3, Vec::new()));
    harness.rng = Rng(4);
    let work = [Work { seq: first.seq, tokens: &prompt }];
    harness.cache.begin(&mut harness.step, &work).unwrap();
    harness.cache.commit(&mut harness.step).unwrap();
    // 50 tokens are 3 whole blocks and 2 tokens; only whole blocks are published.
    let mut other = prompt.clone();
    other[40] = 1000;
    let second = harness.cache.start(&other, Namespace(3)).unwrap();
    assert_eq!(second.cached_tokens, 40);
    let shared = |group| {
        let (a, b) =
            (harness.cache.blocks(first.seq, group), harness.cache.blocks(second.seq, group));
        a.unwrap().iter().zip(b.unwrap()).take_while(|(a, b)| a == b).count()
    };
    assert_eq!((shared(0), shared(1)), (2, 2));
    // Nothing is shared across namespaces, nor all of a prompt.
    assert_eq!(harness.cache.start(&prompt, Namespace(4)).unwrap().cached_tokens, 0);
    assert_eq!(harness.cache.start(&prompt[..48], Namespace(3)).unwrap().cached_tokens, 47);
    harness.cache.audit().unwrap();
}

#[test]
fn what_the_engine_says_decides_what_stays() {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 16, KvFormat::F32));
    let options = CacheOptions { blocks: 4, max_seqs: 2, threads: 1, ..CacheOptions::default() };
    let mut cache = KvCache::new(&spec, &options).unwrap();
    let mut step = Step::new();
    // Serves a prompt of one block and one token, and says something about it before its end.
    let mut serve = |cache: &mut KvCache, first: u32, tell: &dyn Fn(&mut KvCache, SeqId)| -> u32 {
        let prompt: Vec<u32> = (first..first + 17).collect();
        let started = cache.start(&prompt, Namespace(0)).unwrap();
        let tokens = &prompt[started.cached_tokens as usize..];
        cache.begin(&mut step, &[Work { seq: started.seq, tokens }]).unwrap();
        cache.commit(&mut step).unwrap();
        tell(cache, started.seq);
        cache.release(started.seq).unwrap();
        cache.audit().unwrap();
        started.cached_tokens
    };
    let nothing = |_: &mut KvCache, _| ();
    let ended = |cache: &mut KvCache, seq| cache.hint(seq, 0, Hint::SessionEnded).unwrap();
    let kept = |cache: &mut KvCache, seq| {
        let range = Retention { start: 0, end: None, priority: 90, duration_ms: Some(1000) };
        cache.prioritize(seq, &[range]).unwrap();
    };
    cache.advance(1).unwrap();
    // Three prompts leave a block each in the index; a fourth needs two.
    assert_eq!((serve(&mut cache, 100, &kept), serve(&mut cache, 200, &nothing)), (0, 0));
    assert_eq!(serve(&mut cache, 300, &ended), 0);
    // The one that ended goes, though it is the last one used.
    assert_eq!((serve(&mut cache, 400, &nothing), serve(&mut cache, 200, &nothing)), (0, 16));
    // Then the least recently used one without a priority.
    assert_eq!((serve(&mut cache, 500, &nothing), serve(&mut cache, 600, &nothing)), (0, 0));
    assert_eq!((serve(&mut cache, 100, &kept), serve(&mut cache, 400, &nothing)), (16, 0));
    // Its time from its release on: until then it stays, after it it goes.
    cache.advance(1000).unwrap();
    assert_eq!((serve(&mut cache, 700, &nothing), serve(&mut cache, 800, &nothing)), (0, 0));
    cache.advance(1001).unwrap();
    assert_eq!((serve(&mut cache, 700, &nothing), serve(&mut cache, 800, &nothing)), (16, 16));
    assert_eq!((serve(&mut cache, 900, &nothing), serve(&mut cache, 100, &nothing)), (0, 0));
    let range = Retention { start: 0, end: None, priority: 101, duration_ms: None };
    assert!(
        cache.prioritize(SeqId(0), &[]).is_err() && cache.hint(SeqId(0), 0, Hint::None).is_err()
    );
    let seq = cache.start(&[1], Namespace(0)).unwrap().seq;
    assert!(cache.prioritize(seq, &[range]).is_err() && cache.advance(u64::MAX).is_err());
}

#[test]
fn misuse_is_an_error_and_changes_nothing() {
    let mut harness = Harness::new(1, 8, true);
    let cache = &mut harness.cache;
    assert!(cache.start(&[], Namespace(0)).is_err());
    let seq = cache.start(&[1, 2], Namespace(0)).unwrap().seq;
    let mut step = Step::new();
    let before = cache.stats();
    let work = |seq, tokens| Work { seq, tokens };
    assert!(cache.begin(&mut step, &[]).is_err());
    assert!(cache.begin(&mut step, &[work(seq, &[])]).is_err());
    assert!(cache.begin(&mut step, &[work(seq, &[1]), work(seq, &[2])]).is_err());
    assert!(cache.begin(&mut step, &[work(seq, &[1]), work(SeqId(0), &[2])]).is_err());
    assert!(matches!(
        cache.begin(&mut step, &[work(seq, &[1; 8 * 16 + 1])]),
        Err(Error::OutOfBlocks { needed: 9, missing: 1 })
    ));
    assert_eq!(cache.stats(), before);
    assert!(!step.is_open());

    cache.begin(&mut step, &[work(seq, &[1, 2])]).unwrap();
    let layer = LayerId::uniform(0);
    let row = vec![0.0f32; 2 * KV_HEADS * Setup::cpu().dim];
    let append = |cache: &mut KvCache, step: &Step, layer, k: &[f32]| {
        cache.append(step, layer, k.into(), row.as_slice().into(), None)
    };
    assert!(append(cache, &step, layer, &row[1..]).is_err());
    assert!(append(cache, &step, LayerId { group: 2, layer: 0 }, &row).is_err());
    assert!(append(cache, &step, LayerId { group: 0, layer: LAYERS }, &row).is_err());
    assert!(append(cache, &Step::new(), layer, &row).is_err());
    assert!(cache.begin(&mut step, &[work(seq, &[1])]).is_err());
    assert!(cache.begin(&mut Step::new(), &[work(seq, &[1])]).is_err());
    assert!(
        cache.release(seq).is_err() && cache.fork(seq).is_err() && cache.truncate(seq, 0).is_err()
    );
    let mut other = Harness::new(2, 8, true).cache;
    assert!(append(&mut other, &step, layer, &row).is_err() && other.commit(&mut step).is_err());
    append(cache, &step, layer, &row).unwrap();
    cache.commit(&mut step).unwrap();
    assert!(cache.commit(&mut step).is_err() && cache.cancel(&mut step).is_err());
    assert!(cache.truncate(seq, 3).is_err());
    cache.audit().unwrap();
}

#[test]
fn impossible_options_are_refused() {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 64, KvFormat::F16));
    let refuse =
        |spec: &CacheSpec, options: CacheOptions| KvCache::new(spec, &options).unwrap_err();
    let options = CacheOptions::default();
    refuse(&spec, CacheOptions { blocks: 0, ..options.clone() });
    refuse(&spec, CacheOptions { max_seqs: 0, ..options.clone() });
    refuse(&spec, CacheOptions { max_seqs: u32::MAX, ..options.clone() });
    refuse(&spec, CacheOptions { threads: u32::MAX, ..options.clone() });
    refuse(&CacheSpec { groups: Vec::new(), ..spec.clone() }, options.clone());
    let huge = CacheSpec::uniform(256, GroupSpec::uniform(1 << 20, 1 << 10, 256, KvFormat::F32));
    let blocks = i32::MAX as u32;
    let past = CacheOptions { blocks, ..options.clone() };
    assert!(matches!(refuse(&huge, past), Error::Overflow { .. }));
    // Sealed tiles that the format cannot have.
    for (tokens, dim) in [(16, 64), (256, 64), (64, 72), (64, 8)] {
        let spec = CacheSpec::uniform(tokens, GroupSpec::uniform(1, 1, dim, KvFormat::Kt4v4));
        let error = refuse(&spec, options.clone());
        assert!(matches!(error, Error::InvalidArgument { .. }), "{tokens} {dim}: {error}");
    }
}

/// One layer of FP8, one head.
fn fp8_cache(format: KvFormat) -> (KvCache, Step) {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(2, 1, 16, format));
    let options = CacheOptions { blocks: 8, threads: 1, ..CacheOptions::default() };
    (KvCache::new(&spec, &options).unwrap(), Step::new())
}

#[test]
fn heads_of_fp8_have_scales_of_their_own() {
    let (mut cache, mut step) = fp8_cache(KvFormat::Fp8E4m3);
    let (first, second) = (LayerId::uniform(0), LayerId::uniform(1));
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(cache.set_scales(first, &[bad], &[1.0]).is_err(), "{bad}");
        assert!(cache.set_scales(first, &[1.0], &[bad]).is_err(), "{bad}");
    }
    assert!(cache.set_scales(LayerId::uniform(2), &[1.0], &[1.0]).is_err());
    assert!(cache.set_scales(LayerId { group: 1, layer: 0 }, &[1.0], &[1.0]).is_err());
    assert!(cache.set_scales(first, &[1.0, 1.0], &[1.0]).is_err());
    assert!(cache.set_scales(first, &[1.0], &[]).is_err());
    cache.set_scales(second, &[8.0], &[4.0]).unwrap();
    let seq = cache.start(&[1], Namespace(0)).unwrap().seq;
    let held = cache.set_scales(second, &[8.0], &[4.0]);
    assert!(matches!(held, Err(Error::InvalidState { .. })), "a sequence lives");
    cache.begin(&mut step, &[Work { seq, tokens: &[1] }]).unwrap();
    // Past what e4m3 has without a scale: 448.
    let (k, v) = ([0.0f32; 16], [1536.0f32; 16]);
    let mut read = |layer| {
        let mut out = [f32::NAN; 16];
        cache.append(&step, layer, k[..].into(), v[..].into(), None).unwrap();
        let scoring = Scoring::causal(16);
        cache.attend(&step, layer, k[..].into(), (&mut out[..]).into(), &scoring, None).unwrap();
        out
    };
    assert_eq!((read(first), read(second)), ([448.0; 16], [1536.0; 16]));
    let (mut int8, _) = fp8_cache(KvFormat::Int8T);
    assert!(int8.set_scales(first, &[1.0], &[1.0]).is_err(), "int8_t has none");
}

#[test]
fn rows_that_are_not_finite_are_answered_and_lose_nothing() {
    for format in [KvFormat::Fp8E4m3, KvFormat::Int8T, KvFormat::Int4T, KvFormat::Nvfp4] {
        let (mut cache, mut step) = fp8_cache(format);
        let layer = LayerId::uniform(0);
        let seq = cache.start(&[1], Namespace(0)).unwrap().seq;
        cache.begin(&mut step, &[Work { seq, tokens: &[1, 2] }]).unwrap();
        let good = [0.5f32; 32];
        let mut bad = good;
        bad[20] = f32::NAN;
        let mut append =
            |k: &[f32], v: &[f32]| cache.append(&step, layer, k.into(), v.into(), None);
        assert!(matches!(append(&bad, &good), Err(Error::InvalidArgument { .. })));
        assert!(matches!(append(&good, &bad), Err(Error::InvalidArgument { .. })));
        append(&good, &good).unwrap();
        cache.commit(&mut step).unwrap();
        cache.audit().unwrap();
    }
}

/// The digest of a full block of one token, stored in some format.
fn digest(format: KvFormat, scale: Option<f32>) -> Digest {
    let (mut cache, mut step) = fp8_cache(format);
    cache.enable_digests().unwrap();
    if let Some(scale) = scale {
        cache.set_scales(LayerId::uniform(0), &[scale], &[1.0]).unwrap();
    }
    let tokens = [7; 16];
    let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    let rows = [0.0f32; 16 * 16];
    for layer in 0..2 {
        let layer = LayerId::uniform(layer);
        cache.append(&step, layer, rows[..].into(), rows[..].into(), None).unwrap();
    }
    cache.commit(&mut step).unwrap();
    let block = cache.blocks(seq, 0).unwrap()[0];
    cache.digest(0, block).unwrap()
}

/// Formats and scales are part of what names a block outside; floats have the names others know.
#[test]
fn a_digest_names_the_format_too() {
    let plain = Digest::of_block(None, &[7; 16]);
    assert_eq!(digest(KvFormat::Bf16, None), plain);
    assert_eq!(digest(KvFormat::F32, None), plain);
    let mut all = vec![plain, digest(KvFormat::Fp8E4m3, Some(2.0))];
    let formats = KvFormat::ALL.iter().filter(|format| format.class() == FormatClass::Token);
    all.extend(formats.map(|&format| digest(format, None)));
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count);
}
