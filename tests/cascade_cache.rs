//! A cache on a device that reads shared prefixes once, beside one that does not: the same calls on
//! both, over random trees of sequences, answer the same; and a cascade is taken where there is
//! something to share and the rules allow it, and nowhere else.
#![cfg(any(feature = "emulate", feature = "cuda"))]

mod backends;
#[path = "random/mod.rs"]
mod random;

use core::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::device::{Backend, Device, Stream};
use kvcache::dtype::KvFormat;
use kvcache::error::Result;
use kvcache::ids::{Namespace, SeqId};
use kvcache::kernels::params::CascadeSegment;
use kvcache::kernels::{
    CascadeShape, DeviceRates, HostBatch, Launch, SharedPrefixes, Words, cascade_within,
};
use kvcache::layout::{CacheSpec, GroupSpec};
use random::Rng;

const BLOCK: usize = 16;
const LAYERS: u32 = 2;
const Q_HEADS: usize = 4;
const DIM: usize = 64;
/// Tokens below which a prefix is never split off.
const LEAST: usize = 256;

/// A device that has nothing to do but to read memory.
const SLOW_MEMORY: DeviceRates = DeviceRates {
    memory_bytes: 1e3,
    cache_bytes: 1e3,
    cache_size: 0,
    operations: 1e9,
    launch: 0.0,
    multiprocessors: 2,
};
/// One whose multiprocessors are many and slow: what is shared is cut into chunks.
const MANY_SLOW: DeviceRates =
    DeviceRates { memory_bytes: 1e2, cache_bytes: 1e2, multiprocessors: 400_000, ..SLOW_MEMORY };

/// The same calls to a cache that may share and to one that may not.
struct Pair {
    caches: [KvCache; 2],
    steps: [Step; 2],
    spec: CacheSpec,
    rng: Rng,
    /// Live sequences, the same in both.
    live: Vec<SeqId>,
}

fn spec(format: KvFormat, kv_heads: u32, window: Option<u32>) -> CacheSpec {
    let group = GroupSpec::uniform(LAYERS, kv_heads, DIM as u32, format);
    CacheSpec::uniform(BLOCK as u32, GroupSpec { window, ..group })
}

impl Pair {
    fn new(
        backend: &Arc<dyn Backend>,
        spec: CacheSpec,
        rates: DeviceRates,
        options: CacheOptions,
    ) -> Self {
        let options = CacheOptions { blocks: 512, max_seqs: 16, threads: 1, ..options };
        let caches = [true, false].map(|cascade| {
            let options = CacheOptions { cascade, ..options.clone() };
            let mut cache = KvCache::on(backend, &spec, &options).unwrap();
            cache.set_device_rates(rates).unwrap();
            cache
        });
        let seed = rates.multiprocessors.into();
        let (steps, rng) = ([Step::new(), Step::new()], Rng::new(seed));
        Pair { caches, steps, spec, rng, live: Vec::new() }
    }

    fn rows(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.rng.normal()).collect()
    }

    fn begin(&mut self, work: &[(SeqId, Vec<u32>)]) {
        let work: Vec<_> = work.iter().map(|(seq, tokens)| Work { seq: *seq, tokens }).collect();
        for (cache, step) in self.caches.iter_mut().zip(&mut self.steps) {
            cache.begin(step, &work).unwrap();
        }
    }

    fn append(&mut self, layer: u32) {
        let row = self.spec.groups[0].kv_heads as usize * DIM;
        let count = self.steps[0].rows() * row;
        let (k, v) = (self.rows(count), self.rows(count));
        for (cache, step) in self.caches.iter_mut().zip(&self.steps) {
            let at = LayerId::uniform(layer);
            cache.append(step, at, k[..].into(), v[..].into(), None).unwrap();
        }
    }

    fn commit(&mut self, cancel: bool) {
        for (cache, step) in self.caches.iter_mut().zip(&mut self.steps) {
            if cancel { cache.cancel(step) } else { cache.commit(step) }.unwrap();
            cache.audit().unwrap();
        }
    }

    /// A sequence with a prompt, all but what the caches hold of it computed.
    fn start(&mut self, prompt: &[u32], space: u64) -> SeqId {
        let started = [0, 1].map(|c| self.caches[c].start(prompt, Namespace(space)).unwrap());
        assert_eq!(started[0], started[1]);
        let (seq, held) = (started[0].seq, started[0].cached_tokens as usize);
        self.begin(&[(seq, prompt[held..].to_vec())]);
        (0..LAYERS).for_each(|layer| self.append(layer));
        self.commit(false);
        self.live.push(seq);
        seq
    }

    fn fork(&mut self, seq: SeqId) -> SeqId {
        let [child, other] = [0, 1].map(|c| self.caches[c].fork(seq).unwrap());
        assert_eq!(child, other);
        self.live.push(child);
        child
    }

    /// Attention of the open step in one layer, the same from both; whether it was a cascade.
    fn attend(&mut self, layer: u32, scoring: &Scoring, what: &str) -> bool {
        let rows = self.steps[0].rows();
        let q = self.rows(rows * Q_HEADS * DIM);
        let before = self.caches[0].stats().cascades;
        let answers = [0, 1].map(|c| {
            let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; rows * Q_HEADS]);
            let at = LayerId::uniform(layer);
            let (q, rows) = (q[..].into(), (&mut out[..]).into());
            let cache = &mut self.caches[c];
            cache.attend(&self.steps[c], at, q, rows, scoring, Some(&mut lse)).unwrap();
            (out, lse)
        });
        let [(out, lse), (plain_out, plain_lse)] = answers;
        // Weights are rounded to 16 bits by either, values are normal.
        let coarse = self.spec.groups[0].format != KvFormat::F16;
        let tolerance = if coarse { 0.04 } else { 0.005 };
        for (name, got, want, tolerance) in
            [("out", &out, &plain_out, tolerance), ("lse", &lse, &plain_lse, tolerance / 5.0)]
        {
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                let good = (got - want).abs() <= tolerance;
                assert!(good, "{what}: {name} [{i}] is {got}, not {want}");
            }
        }
        assert_eq!(self.caches[1].stats().cascades, 0, "{what}: refused");
        let calls = self.caches[0].stats().cascades - before;
        assert!(calls <= 1);
        calls == 1
    }

    /// Blocks that each sequence has in common with the next, whole ones before their queries.
    fn common(&self, work: &[(SeqId, Vec<u32>)]) -> Vec<usize> {
        let cache = &self.caches[0];
        let before = |seq: SeqId| cache.tokens(seq).unwrap().len() / BLOCK;
        let table = |seq: SeqId| &cache.blocks(seq, 0).unwrap()[..before(seq)];
        let equal =
            |a: SeqId, b: SeqId| table(a).iter().zip(table(b)).take_while(|(a, b)| a == b).count();
        work.windows(2).map(|pair| equal(pair[0].0, pair[1].0)).collect()
    }
}

/// Prompts that share beginnings: with one another, and across namespaces only their tokens.
fn prompt(rng: &mut Rng) -> Vec<u32> {
    let shared = [LEAST + 20, LEAST + 100, 2 * LEAST + 7][rng.below(3)];
    let own = 1 + rng.below(40);
    let tail = 1000 * (1 + rng.below(500)) as u32;
    (0..shared as u32).chain((0..own as u32).map(|t| tail + t)).collect()
}

/// Random steps over random trees; how many calls were cascades and how many were not.
fn trees(backend: &Arc<dyn Backend>, format: KvFormat, rates: DeviceRates, steps: u32) -> [u32; 2] {
    let kv_heads = if format == KvFormat::Bf16 { 2 } else { 1 };
    let mut pair = Pair::new(backend, spec(format, kv_heads, None), rates, Default::default());
    let mut counts = [0; 2];
    let sinks: Vec<f32> = pair.rows(Q_HEADS);
    for n in 0..steps {
        while pair.live.len() < 4 + pair.rng.below(4) {
            let prompt = prompt(&mut pair.rng);
            let space = u64::from(pair.rng.below(4) == 0);
            let seq = pair.start(&prompt, space);
            if pair.rng.below(3) == 0 {
                pair.fork(seq);
            }
        }
        // Some of the live sequences, in the order of their births or in any.
        let mut seqs = pair.live.clone();
        if pair.rng.below(2) == 0 {
            for i in (1..seqs.len()).rev() {
                seqs.swap(i, pair.rng.below(i + 1));
            }
        }
        seqs.truncate(1 + pair.rng.below(seqs.len() + 3));
        let most = [1, 1, 4, 8, 9][pair.rng.below(5)];
        let mut work = Vec::new();
        for seq in seqs {
            let count = 1 + pair.rng.below(most);
            work.push((seq, (0..count).map(|_| pair.rng.below(5) as u32).collect::<Vec<u32>>()));
        }
        let common = pair.common(&work);
        pair.begin(&work);
        let scoring = Scoring {
            scale: [0.125, 0.5][pair.rng.below(2)],
            sinks: (pair.rng.below(2) == 0).then_some(&sinks[..]),
            softcap: (pair.rng.below(3) == 0).then_some(20.0),
            ..Scoring::causal(DIM as u32)
        };
        let what = format!("{format:?} step {n}");
        let rows: usize = work.iter().map(|item| item.1.len()).sum();
        let longest = work.iter().map(|item| item.1.len()).max().unwrap();
        let tokens: usize = work.iter().map(|w| pair.caches[0].tokens(w.0).unwrap().len()).sum();
        // What is saved by what all of the work shares, and what partial results cost, in bytes.
        let token_bytes = pair.caches[0].stats().block_bytes as usize / BLOCK / LAYERS as usize;
        let all = common.iter().min().copied().unwrap_or(0) * BLOCK;
        // Few rows are decoded, eight columns at a time, which read it again.
        let again = match (work.len() * longest <= 8, longest) {
            (true, 1) => work.len() * Q_HEADS / 8,
            (true, _) => work.len(),
            (false, _) => 0,
        };
        let saved = all * common.len().saturating_sub(again) * token_bytes;
        let cost = rows.max(work.len() * longest) * Q_HEADS * (DIM * 16 + 24);
        for layer in 0..LAYERS {
            pair.append(layer);
            let taken = pair.attend(layer, &scoring, &what);
            let can = longest <= 8 && common.iter().any(|&blocks| blocks * BLOCK >= LEAST);
            assert!(can || !taken, "{what}: {common:?} {longest}");
            let pays = all >= LEAST && saved > cost * 3 / 2 + tokens * token_bytes / 10;
            if can && pays && rates == SLOW_MEMORY {
                assert!(taken, "{what}: {common:?}, {rows} rows of {tokens}");
            }
            counts[usize::from(taken)] += 1;
        }
        let cancel = pair.rng.below(6) == 0;
        pair.commit(cancel);
        if pair.rng.below(2) == 0 {
            let gone = pair.rng.below(pair.live.len());
            let gone = pair.live.swap_remove(gone);
            pair.caches.iter_mut().for_each(|cache| cache.release(gone).unwrap());
        }
    }
    counts
}

#[test]
fn random_trees_read_the_same_with_and_without() {
    for backend in backends::all() {
        for (format, rates) in [(KvFormat::F16, MANY_SLOW), (KvFormat::Bf16, SLOW_MEMORY)] {
            let [plain, cascades] = trees(&backend, format, rates, 8);
            assert!(plain > 2 && cascades > 5, "{format:?}: {plain}, {cascades}");
        }
    }
}

#[test]
fn random_trees_of_codes_read_the_same() {
    for backend in backends::all() {
        for format in [KvFormat::Fp8E4m3, KvFormat::Int8T, KvFormat::Int4T, KvFormat::Nvfp4] {
            let [_, cascades] = trees(&backend, format, SLOW_MEMORY, 3);
            assert!(cascades > 0, "{format:?}");
        }
    }
}

/// A batch of `seqs` that share all but their last block, in the form that is uploaded.
#[test]
fn slow_multiprocessors_get_chunks() {
    let (seqs, blocks) = (4, 21);
    let table = |seq: i32| (0..blocks - 1).chain([100 + seq]).map(i32::to_ne_bytes);
    let list =
        |f: &dyn Fn(i32) -> i32, n: i32| (0..n).map(|i| f(i).to_ne_bytes()).collect::<Vec<_>>();
    let (q_indptr, indptr) = (list(&|i| 4 * i, seqs + 1), list(&|i| blocks * i, seqs + 1));
    let kv_lens = list(&|_| blocks * BLOCK as i32, seqs);
    let indices: Vec<_> = (0..seqs).flat_map(table).collect();
    let batch = HostBatch {
        q_indptr: Words(&q_indptr),
        kv_lens: Words(&kv_lens),
        indptr: Words(&indptr),
        indices: Words(&indices),
        block_tokens: BLOCK as u32,
    };
    let shape = CascadeShape {
        q_heads: Q_HEADS as u32,
        kv_heads: 1,
        head_dim: DIM as u32,
        block_tokens: BLOCK as u32,
        token_bytes: 256,
        q_len: 4,
        batch: seqs as u32,
        tokens: batch.tokens(),
    };
    let mut shared = SharedPrefixes::default();
    assert!(shared.find(&batch).unwrap());
    let mut segments: Vec<CascadeSegment> = Vec::new();
    let mut chunks = |rates| {
        cascade_within(&shape, &rates, &mut shared, &mut segments).unwrap().map(|c| c.chunks)
    };
    assert_eq!((chunks(SLOW_MEMORY), chunks(MANY_SLOW)), (Some(1), Some(2)));
    let one = &segments[0];
    assert_eq!((segments.len(), one.first_seq, one.seqs, one.shared_blocks), (1, 0, 4, 20));
}

/// Four sequences over one prompt, and a step with one new token each.
fn alike(pair: &mut Pair) {
    let prompt: Vec<u32> = (0..LEAST as u32 + 30).collect();
    let first = pair.start(&prompt, 0);
    for _ in 0..3 {
        pair.fork(first);
    }
    let work: Vec<_> = pair.live.iter().map(|&seq| (seq, vec![7])).collect();
    pair.begin(&work);
}

#[test]
fn plain_where_the_rules_want_it() {
    let slopes = [0.1f32; Q_HEADS];
    let plain = Scoring { scale: 0.3, ..Scoring::causal(DIM as u32) };
    for backend in backends::all() {
        let of = |spec, rates, options| Pair::new(&backend, spec, rates, options);
        let float = || spec(KvFormat::F16, 1, None);
        let mut pair = of(float(), SLOW_MEMORY, CacheOptions::default());
        alike(&mut pair);
        pair.append(0);
        pair.append(1);
        // Layers with rules of their own in one step, and back.
        assert!(pair.attend(0, &plain, "plain"));
        assert!(!pair.attend(1, &Scoring { alibi: Some(&slopes), ..plain }, "ALiBi"));
        assert!(!pair.attend(0, &Scoring { window: Some(40), ..plain }, "window"));
        assert!(pair.attend(1, &Scoring { causal: false, ..plain }, "not causal"));
        pair.commit(false);
        // One that shares with nobody beside it.
        let seq = pair.live[1];
        pair.begin(&[(seq, vec![1])]);
        pair.append(0);
        assert!(!pair.attend(0, &plain, "one sequence"));
        pair.commit(true);

        let fast = DeviceRates { memory_bytes: 1e9, cache_bytes: 1e9, launch: 2.5, ..SLOW_MEMORY };
        let deterministic = CacheOptions { deterministic: true, ..CacheOptions::default() };
        let own = CacheOptions::default;
        for (what, spec, rates, options) in [
            ("deterministic", float(), SLOW_MEMORY, deterministic),
            ("a group's window", spec(KvFormat::F16, 1, Some(400)), SLOW_MEMORY, own()),
            ("nothing is saved", float(), fast, own()),
        ] {
            let mut pair = of(spec, rates, options);
            alike(&mut pair);
            pair.append(0);
            assert!(!pair.attend(0, &plain, what), "{what}");
            pair.commit(false);
        }
    }
}

/// A device whose stream is captured, when it is told so.
#[derive(Debug)]
struct Captured(Arc<dyn Backend>, AtomicBool);

impl Backend for Captured {
    fn device(&self) -> Device {
        self.0.device()
    }
    fn name(&self) -> &str {
        self.0.name()
    }
    fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors()
    }
    fn multiprocessor_shared_bytes(&self) -> u32 {
        self.0.multiprocessor_shared_bytes()
    }
    fn is_capturing(&self, _: Stream) -> Result<bool> {
        Ok(self.1.load(Ordering::Relaxed))
    }
    fn alloc(&self, bytes: u64) -> Result<u64> {
        self.0.alloc(bytes)
    }
    unsafe fn free(&self, address: u64) {
        // SAFETY: the caller's promise, here and below.
        unsafe { self.0.free(address) }
    }
    unsafe fn upload(&self, to: u64, from: &[u8], stream: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.0.upload(to, from, stream) }
    }
    unsafe fn download(&self, from: u64, to: &mut [u8], stream: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.0.download(from, to, stream) }
    }
    unsafe fn copy(&self, from: u64, to: u64, bytes: u64, stream: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.0.copy(from, to, bytes, stream) }
    }
    unsafe fn zero(&self, at: u64, bytes: u64, stream: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.0.zero(at, bytes, stream) }
    }
    unsafe fn launch(
        &self,
        launch: &Launch,
        params: *const c_void,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.0.launch(launch, params, bytes, stream) }
    }
    fn sync(&self, stream: Stream) -> Result<()> {
        self.0.sync(stream)
    }
}

#[test]
fn plain_while_the_stream_is_captured() {
    let plain = Scoring { scale: 0.3, ..Scoring::causal(DIM as u32) };
    for inner in backends::all() {
        let device = Arc::new(Captured(inner, AtomicBool::new(false)));
        let backend: Arc<dyn Backend> = device.clone();
        let spec = spec(KvFormat::F16, 1, None);
        let mut pair = Pair::new(&backend, spec, SLOW_MEMORY, CacheOptions::default());
        alike(&mut pair);
        pair.append(0);
        for captured in [false, true, false] {
            device.1.store(captured, Ordering::Relaxed);
            assert_eq!(pair.attend(0, &plain, "captured"), !captured);
        }
    }
}

/// What a server does: many sequences over one long system prompt, by the device's own rates. For a
/// GPU, which has rates and the time.
#[test]
fn a_long_system_prompt_pays_on_a_gpu() {
    let Some(backend) = backends::gpu() else { return };
    let group = GroupSpec::uniform(1, 8, 128, KvFormat::Bf16);
    let spec = CacheSpec::uniform(BLOCK as u32, group);
    let (shared, seqs, q_heads) = (8192u32, 128usize, 32usize);
    let mut rng = Rng::new(5);
    let blocks = shared / 16 + 8 * seqs as u32;
    let options = CacheOptions { blocks, max_seqs: 256, threads: 1, ..CacheOptions::default() };
    let mut outs = Vec::new();
    let noise: Vec<f32> = (0..1 << 20).map(|_| rng.normal()).collect();
    for cascade in [true, false] {
        let options = CacheOptions { cascade, ..options.clone() };
        let mut cache = KvCache::on(&backend, &spec, &options).unwrap();
        let (mut step, layer) = (Step::new(), LayerId::uniform(0));
        let prompt: Vec<u32> = (0..shared).collect();
        let first = cache.start(&prompt, Namespace(0)).unwrap().seq;
        for chunk in prompt.chunks(1024) {
            cache.begin(&mut step, &[Work { seq: first, tokens: chunk }]).unwrap();
            let (k, v) = (&noise[chunk[0] as usize..][..1 << 19], &noise[..1 << 19]);
            let row = |all: &[f32]| [all, all].concat();
            let (k, v) = (row(k), row(v));
            cache.append(&step, layer, k[..].into(), v[..].into(), None).unwrap();
            cache.commit(&mut step).unwrap();
        }
        let mut live = vec![first];
        live.extend((1..seqs).map(|_| cache.fork(first).unwrap()));
        for turn in 0..20usize {
            let work: Vec<_> = live.iter().map(|&seq| Work { seq, tokens: &[1] }).collect();
            cache.begin(&mut step, &work).unwrap();
            let (k, v) = (&noise[turn..][..seqs * 1024], &noise[turn + 9..][..seqs * 1024]);
            cache.append(&step, layer, k.into(), v.into(), None).unwrap();
            let q = &noise[3 * turn..][..seqs * q_heads * 128];
            let mut out = vec![f32::NAN; q.len()];
            let scoring = Scoring { scale: 0.2, ..Scoring::causal(128) };
            let rows = (&mut out[..]).into();
            cache.attend(&step, layer, q.into(), rows, &scoring, None).unwrap();
            cache.commit(&mut step).unwrap();
            outs.push(out);
        }
        let taken = cache.stats().cascades;
        println!("{taken} cascades in 20 steps by {:?}", backend.rates());
        assert_eq!(taken, if cascade { 20 } else { 0 });
    }
    let (with, without) = outs.split_at(20);
    for (with, without) in with.iter().zip(without) {
        for (i, (got, want)) in with.iter().zip(without).enumerate() {
            assert!((got - want).abs() <= 0.04, "[{i}]: {got}, not {want}");
        }
    }
}
