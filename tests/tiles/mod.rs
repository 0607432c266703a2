//! A cache of sealed tiles on a device: what the tests under the emulator and on a GPU share. Outputs
//! are held against the reference in f64 over rows as a query is to read them, records against those of
//! a cache on the CPU, byte for byte.
#![allow(dead_code)]

#[path = "../random/mod.rs"]
mod random;

use std::sync::Arc;

use kvcache::attention::{HeadShape, KvSource, Scoring, reference_attention};
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::device::Backend;
use kvcache::dtype::{KvFormat, Rows, bf16};
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
}

impl Setup {
    pub fn new(backend: &Arc<dyn Backend>, format: KvFormat, dim: usize, tokens: usize) -> Self {
        let backend = backend.clone();
        let (window, deterministic, staging_blocks) = (None, true, 0);
        Setup { backend, format, dim, tokens, window, deterministic, staging_blocks }
    }

    fn spec(&self) -> CacheSpec {
        let group = GroupSpec::uniform(LAYERS, KV_HEADS as u32, self.dim as u32, self.format);
        let group = GroupSpec { window: self.window, ..group };
        CacheSpec::uniform(self.tokens as u32, group)
    }

    fn options(&self) -> CacheOptions {
        CacheOptions {
            blocks: 24,
            max_seqs: 4,
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
            let scoring = Scoring::causal(self.dim as u32);
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
            for tile in 0..own {
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
        let scoring = Scoring { window: self.window, ..Scoring::causal(d as u32) };
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
