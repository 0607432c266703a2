//! A cache of sealed tiles on a device: what the tests under the emulator and on a GPU share. Outputs
//! are held against the reference in f64 over rows as a query is to read them, records against those of
//! a cache on the CPU, byte for byte.
#![allow(dead_code)]

#[path = "../random/mod.rs"]
mod random;
pub mod sinks;

use std::sync::Arc;

use kvcache::attention::{HeadShape, KvSource, Scoring, reference_attention};
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::device::Backend;
use kvcache::dtype::{KvFormat, Rows, bf16};
use kvcache::error::Error;
use kvcache::ids::{Namespace, SeqId, TokenId};
use kvcache::layout::tile::{TileLayout, TileShape};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::quant::{Stored, Tile, seal};
pub use random::Rng;

pub const LAYERS: u32 = 2;
pub const KV_HEADS: usize = 2;
pub const Q_HEADS: usize = 4;
/// A token whose keys in layer 1, head 1 are past what a scale can hold.
pub const LOUD: TokenId = 999_999;
pub const FORMATS: [KvFormat; 5] =
    [KvFormat::Kt8v8, KvFormat::Kt4v4, KvFormat::Kt3v3, KvFormat::Kt4v2, KvFormat::Kt2v2];

/// The rows of one call in each layer, one layer after the other.
pub type Outputs = Vec<f32>;

#[derive(Clone)]
pub struct Setup {
    pub backend: Arc<dyn Backend>,
    pub format: KvFormat,
    pub dim: usize,
    pub tokens: usize,
    pub window: Option<u32>,
    pub deterministic: bool,
    pub staging_blocks: u32,
    pub max_seqs: u32,
    pub blocks: u32,
    /// Tokens of each sequence that stay raw.
    pub sink_tokens: u32,
    /// Scores with a soft-cap, sinks and ALiBi.
    pub rules: bool,
}

impl Setup {
    pub fn new(backend: &Arc<dyn Backend>, format: KvFormat, dim: usize, tokens: usize) -> Self {
        let backend = backend.clone();
        let (window, deterministic, staging_blocks, rules) = (None, true, 0, false);
        let (max_seqs, blocks, sink_tokens) = (4, 24, 0);
        Setup {
            backend,
            format,
            dim,
            tokens,
            window,
            deterministic,
            staging_blocks,
            max_seqs,
            blocks,
            sink_tokens,
            rules,
        }
    }

    /// The window is the layer group's.
    fn scoring(&self) -> Scoring<'static> {
        let plain = Scoring::causal(self.dim as u32);
        if !self.rules {
            return plain;
        }
        let (sinks, alibi) = (Some(&[0.5, -1.0, 2.0, 0.0][..]), Some(&[0.1, 0.02, 0.0, 0.3][..]));
        Scoring { softcap: Some(9.0), sinks, alibi, ..plain }
    }

    fn spec(&self) -> CacheSpec {
        let group = GroupSpec::uniform(LAYERS, KV_HEADS as u32, self.dim as u32, self.format);
        let group = GroupSpec { window: self.window, sink_tokens: self.sink_tokens, ..group };
        CacheSpec::uniform(self.tokens as u32, group)
    }

    fn options(&self) -> CacheOptions {
        CacheOptions {
            blocks: self.blocks,
            max_seqs: self.max_seqs,
            threads: 1,
            deterministic: self.deterministic,
            staging_blocks: self.staging_blocks,
            ..CacheOptions::default()
        }
    }

    pub fn cache(&self) -> KvCache {
        KvCache::on(&self.backend, &self.spec(), &self.options()).unwrap()
    }

    pub fn cpu(&self) -> KvCache {
        KvCache::new(&self.spec(), &self.options()).unwrap()
    }

    /// Rows that follow from layer, position, token and what they are for.
    pub fn rows(
        &self,
        kind: u64,
        layer: u32,
        tokens: &[TokenId],
        first: usize,
        heads: usize,
    ) -> Vec<f32> {
        let mut rows = Vec::new();
        for (at, &token) in tokens.iter().enumerate() {
            let seed = u64::from(token) << 32 | (first + at) as u64;
            let mut rng = Rng::new(seed ^ kind << 20 ^ u64::from(layer) << 24);
            for head in 0..heads {
                let loud = token == LOUD && (kind, layer, head) == (1, 1, 1);
                rows.extend((0..self.dim).map(|_| if loud { 1e9 } else { rng.normal() }));
            }
        }
        rows
    }

    /// Appends and attends in every layer of an open step.
    pub fn layers(
        &self,
        cache: &mut KvCache,
        step: &Step,
        work: &[(usize, &[TokenId])],
    ) -> Outputs {
        let mut outputs = Vec::new();
        for layer in 0..LAYERS {
            let all = |kind: u64, heads: usize| -> Vec<f32> {
                work.iter()
                    .flat_map(|&(from, new)| self.rows(kind, layer, new, from, heads))
                    .collect()
            };
            let (q, k, v) = (all(0, Q_HEADS), all(1, KV_HEADS), all(2, KV_HEADS));
            let id = LayerId::uniform(layer);
            cache.append(step, id, k[..].into(), v[..].into(), None).unwrap();
            let mut out = vec![f32::NAN; q.len()];
            let scoring = self.scoring();
            cache.attend(step, id, q[..].into(), (&mut out[..]).into(), &scoring, None).unwrap();
            outputs.extend(out);
        }
        outputs
    }

    /// Appends tokens that nothing asks for.
    pub fn fill(&self, cache: &mut KvCache, seq: SeqId, new: &[TokenId]) {
        let (mut step, from) = (Step::new(), cache.tokens(seq).unwrap().len());
        cache.begin(&mut step, &[Work { seq, tokens: new }]).unwrap();
        for layer in 0..LAYERS {
            let rows = |kind| self.rows(kind, layer, new, from, KV_HEADS);
            let (k, v) = (rows(1), rows(2));
            cache.append(&step, LayerId::uniform(layer), k[..].into(), v[..].into(), None).unwrap();
        }
        cache.commit(&mut step).unwrap();
    }

    /// One step of some sequences, committed.
    pub fn run_all(&self, cache: &mut KvCache, work: &[(SeqId, &[TokenId])]) -> Outputs {
        let mut step = Step::new();
        let works: Vec<_> = work.iter().map(|&(seq, tokens)| Work { seq, tokens }).collect();
        let rows: Vec<_> =
            work.iter().map(|&(seq, new)| (cache.tokens(seq).unwrap().len(), new)).collect();
        cache.begin(&mut step, &works).unwrap();
        let out = self.layers(cache, &step, &rows);
        cache.audit().unwrap();
        cache.commit(&mut step).unwrap();
        cache.audit().unwrap();
        out
    }

    pub fn run(&self, cache: &mut KvCache, seq: SeqId, new: &[TokenId]) -> Outputs {
        self.run_all(cache, &[(seq, new)])
    }

    pub fn start(&self, cache: &mut KvCache, tokens: &[TokenId]) -> SeqId {
        cache.start(tokens, Namespace(0)).unwrap().seq
    }

    /// All rows of a sequence in one step of a cache of its own.
    pub fn at_once(&self, tokens: &[TokenId]) -> Outputs {
        let mut cache = self.cache();
        let seq = self.start(&mut cache, tokens);
        self.run(&mut cache, seq, tokens)
    }

    fn row(&self) -> usize {
        Q_HEADS * self.dim
    }

    /// Rows `range` of all layers, as `all`, which has those of `count` tokens, says.
    pub fn part(&self, all: &Outputs, count: usize, range: std::ops::Range<usize>) -> Outputs {
        let row = self.row();
        let layer = |n: usize| &all[n * count * row..(n + 1) * count * row];
        let part = |n: usize| layer(n)[range.start * row..range.end * row].iter().copied();
        (0..LAYERS as usize).flat_map(part).collect()
    }

    /// What row `at` of a sequence is to be in each layer.
    pub fn expected(&self, tokens: &[TokenId], at: usize) -> Vec<f64> {
        (0..LAYERS).flat_map(|layer| self.expected_in(layer, tokens, at)).collect()
    }

    fn expected_in(&self, layer: u32, tokens: &[TokenId], at: usize) -> Vec<f64> {
        let (d, t) = (self.dim, self.tokens);
        let shape = TileShape { k_dim: d as u32, v_dim: d as u32, v_in_k: false, tokens: t as u32 };
        let layout = TileLayout::new(self.format, shape).unwrap();
        let own = at / t;
        let mut heads = vec![[Vec::new(), Vec::new()]; KV_HEADS];
        let stored: [Vec<f32>; 2] = [1, 2].map(|kind| {
            let rows = self.rows(kind, layer, &tokens[..at + 1], 0, KV_HEADS);
            rows.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
        });
        for (h, head) in heads.iter_mut().enumerate() {
            for (side, rows) in stored.iter().enumerate() {
                head[side] =
                    rows.chunks_exact(d).skip(h).step_by(KV_HEADS).flatten().copied().collect();
            }
            for tile in self.sink_tokens as usize / t..own {
                let part = tile * t * d..(tile + 1) * t * d;
                let [k, v] = &mut *head;
                let (k, v) = (&mut k[part.clone()], &mut v[part]);
                let mut record = vec![0; layout.bytes()];
                if seal(&layout, k, v, &mut record).unwrap() == Stored::Encoded {
                    let record = Tile::open(&layout, &record).unwrap();
                    record.keys(k).unwrap();
                    record.values(v).unwrap();
                }
            }
        }
        let shape = HeadShape {
            q_heads: Q_HEADS as u32,
            kv_heads: KV_HEADS as u32,
            k_dim: d as u32,
            v_dim: d as u32,
            v_in_k: false,
        };
        let scoring = Scoring { window: self.window, ..self.scoring() };
        let q = self.rows(0, layer, &tokens[at..at + 1], at, Q_HEADS);
        let seen = Seen { heads: &heads, dim: d };
        reference_attention(&shape, &scoring, &seen, Rows::F32(&q), &[0, 1], &[at + 1]).unwrap().out
    }

    /// Holds rows of a sequence, all of its last step, against the reference: every `every`-th.
    pub fn check(&self, out: &Outputs, tokens: &[TokenId], new: usize, every: usize) {
        for row in (0..new).rev().step_by(every) {
            let at = tokens.len() - new + row;
            let got = self.part(out, new, row..row + 1);
            for (i, (&got, want)) in got.iter().zip(self.expected(tokens, at)).enumerate() {
                let off = (f64::from(got) - want).abs();
                // Queries and raw rows are of bf16; values are at most 4 or so.
                let most = 2e-2 * want.abs().max(1.0);
                assert!(off <= most, "{:?} row {at} [{i}]: {got}, not {want}", self.format);
            }
        }
    }

    /// Goes on with a sequence by a step that is cancelled once in five, its rows held against the
    /// reference; not where blocks lack.
    pub fn go_on(
        &self,
        cache: &mut KvCache,
        rng: &mut Rng,
        (seq, tokens): (SeqId, &mut Vec<TokenId>),
        new: &[TokenId],
    ) {
        let mut step = Step::new();
        match cache.begin(&mut step, &[Work { seq, tokens: new }]) {
            Err(Error::OutOfBlocks { .. }) => {}
            Err(error) => panic!("{error:?}"),
            Ok(()) => {
                let out = self.layers(cache, &step, &[(tokens.len(), new)]);
                if rng.below(5) == 0 || cache.commit(&mut step).is_err() {
                    cache.cancel(&mut step).unwrap();
                } else {
                    tokens.extend(new);
                    self.check(&out, tokens, new.len(), new.len());
                }
            }
        }
    }

    /// The records of a sequence are those of a cache on the CPU.
    pub fn check_records(&self, cache: &mut KvCache, seq: SeqId) {
        let tokens = cache.tokens(seq).unwrap().to_vec();
        let mut cpu = self.cpu();
        let other = self.start(&mut cpu, &tokens);
        self.run(&mut cpu, other, &tokens);
        let [mut got, mut want] = [Vec::new(), Vec::new()];
        let count = cache.export_blocks(seq, "m", None, &mut got).unwrap();
        assert_eq!(cpu.export_blocks(other, "m", None, &mut want).unwrap(), count);
        assert!(count >= self.tokens, "no tile was sealed");
        assert!(got == want, "{:?}: records differ from those of the CPU", self.format);
    }
}

struct Seen<'a> {
    heads: &'a [[Vec<f32>; 2]],
    dim: usize,
}

impl KvSource for Seen<'_> {
    fn key(&self, _: usize, head: usize, position: usize, channel: usize) -> Option<f64> {
        Some(f64::from(self.heads[head][0][position * self.dim + channel]))
    }
    fn value(&self, _: usize, head: usize, position: usize, channel: usize) -> f64 {
        f64::from(self.heads[head][1][position * self.dim + channel])
    }
}

/// Whether both have the same bits.
pub fn same(a: &Outputs, b: &Outputs) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

pub fn prompt(len: usize) -> Vec<TokenId> {
    (0..len as u32).map(|at| at * 7 + 1).collect()
}

/// Rows on both sides of a tile's end, a guess of three tokens and one more, against the reference, and
/// the records.
pub fn against_the_reference(setup: &Setup) {
    let tokens = setup.tokens;
    let mut cache = setup.cache();
    let text = prompt(2 * tokens + 15);
    let seq = setup.start(&mut cache, &text);
    let mut at = 2 * tokens - 18;
    setup.fill(&mut cache, seq, &text[..at]);
    for count in [28, 4, 1] {
        let out = setup.run(&mut cache, seq, &text[at..at + count]);
        at += count;
        setup.check(&out, &text[..at], count, 13);
    }
    setup.check_records(&mut cache, seq);
}

/// Runs a sequence in chunks; each row must be that of `all`, where the text was one chunk.
fn chunks(
    setup: &Setup,
    cache: &mut KvCache,
    seq: SeqId,
    text: &[u32],
    all: &[f32],
    cut: &[usize],
) {
    let mut at = cache.tokens(seq).unwrap().len();
    for &count in cut.iter().cycle() {
        let count = count.min(text.len() - at);
        if count == 0 {
            break;
        }
        let out = setup.run(cache, seq, &text[at..at + count]);
        let want = setup.part(&all.to_vec(), text.len(), at..at + count);
        assert!(same(&out, &want), "{:?}: {count} from {at}", setup.format);
        at += count;
    }
}

/// Rows have the same bits in one step, in chunks, and behind a prefix that was found.
pub fn chunks_and_hits(setup: &Setup, cut: &[usize]) {
    let text = prompt(2 * setup.tokens + 11);
    let all = setup.at_once(&text);
    setup.check(&all, &text, text.len(), 50);
    let mut cache = setup.cache();
    let seq = setup.start(&mut cache, &text);
    chunks(setup, &mut cache, seq, &text, &all, cut);
    // Another finds the two tiles.
    let other = cache.start(&text, Namespace(0)).unwrap();
    assert_eq!(other.cached_tokens as usize, 2 * setup.tokens);
    chunks(setup, &mut cache, other.seq, &text, &all, &[1, 6, 4]);
    // So does one in another cache that was given them.
    let (mut stream, mut another) = (Vec::new(), setup.cache());
    cache.export_blocks(seq, "m", None, &mut stream).unwrap();
    another.import_blocks(&mut [&mut &stream[..]], "m", None, Namespace(0)).unwrap();
    let given = another.start(&text, Namespace(0)).unwrap();
    assert_eq!(given.cached_tokens, other.cached_tokens);
    chunks(setup, &mut another, given.seq, &text, &all, &[11]);
    cache.release(seq).unwrap();
    cache.release(other.seq).unwrap();
    cache.audit().unwrap();
    assert_eq!(cache.stats().staged_blocks as usize, setup.sink_tokens as usize / setup.tokens);
}

/// The same where a context becomes one of two pieces, at whose end one chunk has rows of both.
pub fn chunks_at_the_end_of_a_piece(setup: &Setup) {
    let text = prompt(517);
    let mut cache = setup.cache();
    let seq = setup.start(&mut cache, &text);
    setup.fill(&mut cache, seq, &text[..509]);
    let fork = cache.fork(seq).unwrap();
    let all = setup.run(&mut cache, seq, &text[509..]);
    for (from, to) in [(0, 2), (2, 7), (7, 8)] {
        let out = setup.run(&mut cache, fork, &text[509 + from..509 + to]);
        assert!(same(&out, &setup.part(&all, 8, from..to)), "{from} to {to} at the end of a piece");
    }
}

/// A tile that cannot be sealed is read raw by whoever reads it, and says so.
pub fn a_raw_tile(setup: &Setup) {
    let mut text = prompt(140);
    text[70] = LOUD;
    let all = setup.at_once(&text);
    setup.check(&all, &text, 140, 35);
    // In the staging pool, in scratch of two kinds of chunks.
    for cut in [&[65, 20, 55][..], &[140], &[50, 90]] {
        let mut cache = setup.cache();
        let seq = setup.start(&mut cache, &text);
        chunks(setup, &mut cache, seq, &text, &all, cut);
        assert_eq!(cache.stats().unsealed_blocks, 1, "{cut:?}");
        // Tile 1 is raw: only the one before it is found, and a fork reads it raw as well.
        let fork = cache.fork(seq).unwrap();
        let more = [&text[..], &[3]].concat();
        let out = setup.run(&mut cache, fork, &[3]);
        setup.check(&out, &more, 1, 1);
        assert_eq!(cache.start(&more, Namespace(0)).unwrap().cached_tokens, 64);
        cache.release(seq).unwrap();
        cache.release(fork).unwrap();
        cache.audit().unwrap();
        assert_eq!(cache.stats().staged_blocks, 0);
    }
}

/// Without a promise of equal bits sequences of many rows have a kernel of their own, where there are
/// enough of them for the device: beside those of few rows in one step, over tiles that were found, raw
/// ones and a window's, against the reference. `copies` more have ten rows each.
pub fn many_rows_beside_few(setup: &Setup, copies: usize) {
    let seqs = 5 + copies as u32;
    let setup =
        Setup { deterministic: false, max_seqs: seqs, blocks: 24 + 4 * seqs, ..setup.clone() };
    let mut texts = [150, 72, 200, 131, 66].map(prompt).to_vec();
    texts[3][100] = LOUD;
    let mut cache = setup.cache();
    let mut work = Vec::new();
    for (text, at) in texts.iter().zip([149, 70, 60, 20, 64]) {
        let seq = setup.start(&mut cache, text);
        // They find each other's tiles.
        let found = cache.tokens(seq).unwrap().len();
        if found < at {
            setup.fill(&mut cache, seq, &text[found..at]);
        }
        work.push((seq, at.max(found)));
    }
    for copy in 0..copies as u32 {
        let own: Vec<_> = (0..10).map(|i| 5000 + 10 * copy + i).collect();
        let seq = cache.fork(work[0].0).unwrap();
        texts.push([&texts[0][..149], &own].concat());
        work.push((seq, 149));
    }
    let work: Vec<_> =
        work.iter().zip(&texts).map(|(&(seq, at), text)| (seq, &text[at..])).collect();
    let lengths: Vec<_> = work.iter().map(|w| w.1.len()).collect();
    if setup.tokens == 64 {
        assert_eq!(lengths[..5], [1, 2, 72, 67, 2]);
    }
    let all = setup.run_all(&mut cache, &work);
    let (rows, mut first) = (lengths.iter().sum(), 0);
    for (text, count) in texts.iter().zip(lengths) {
        let out = setup.part(&all, rows, first..first + count);
        setup.check(&out, text, count, 23);
        first += count;
    }
    cache.audit().unwrap();
}
