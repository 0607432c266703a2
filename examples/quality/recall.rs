//! Long-range recall: a text of nothing but key-value pairs, and an induction head that is asked for
//! the value of a key far back. Which format still finds the right one, and how alike keys may be.
//!
//! The head is built, not trained. A text is `key value key value ...`, and each token's K is the
//! code of the token before it, its V its own code: what the first half of an induction circuit (a
//! head that looks one token back) leaves for the second, which is stored here. A query is the code
//! of a key, and whatever value's code the output is nearest to is the answer. There is no position
//! in it: a head that finds by content alone uses channels without rotation, or such as turn slowly.
//!
//! Codes are normal; all keys of a group of pairs share a part, so that two of them differ by the
//! share `gap` of their energy: their cosine is `1 - gap`. The query is as strong as it must be to
//! tell them apart, the right key `MARGIN` nats above the others of its group: in f32 it has 99 % of
//! the weight or more, at every gap and length. What a format adds to scores grows with the query
//! though, as `1 / gap`, and the longer the text, the more keys there are that an error may lift.
//! So the smallest gap that is answered says how fine a format is, in the unit that matters: how
//! alike two things may be that attention still tells apart.
//!
//! It says nothing of what trained heads need, nor of errors that add up over layers. Everything goes
//! through a `KvCache`: append, seal, and decode, one token at a time, with all heads' queries.

use std::error::Error;

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::dtype::{FormatClass, KvFormat};
use kvcache::ids::Namespace;
use kvcache::layout::{CacheSpec, GroupSpec};
use rayon::prelude::*;

use crate::modes::{Change, K_SPREAD, Mode};

const DIM: usize = 128;
const KV_HEADS: usize = 2;
const Q_HEADS: usize = 16;
/// Tokens that ask, one after the other, each head for a key of its own.
const ASKED: usize = 16;
const ROW: usize = KV_HEADS * DIM;
/// Tokens of a block: of a tile, where the format has them.
const BLOCK: u32 = 64;
/// Tokens appended at once.
const CHUNK: usize = 1024;
/// Groups of alike keys: at 64k tokens each key has a thousand others in its own.
const GROUPS: usize = 32;
/// Different values.
const VALUES: usize = 256;
/// By how many nats the right key is above the others of its group.
const MARGIN: f32 = 12.0;
/// Share of the queries that must be answered.
pub const PASS: f64 = 0.99;
/// Gaps are `2^(-n/2)` for these `n`.
const STEPS: std::ops::RangeInclusive<i32> = 1..=24;

/// How many of the queries one format answered at one gap.
#[derive(Debug, Clone)]
pub struct Answers {
    pub format: KvFormat,
    pub bits: f64,
    pub mode: Mode,
    pub context: usize,
    pub gap: f64,
    pub recall: f64,
}

impl Answers {
    pub fn passed(&self) -> bool {
        self.recall >= PASS
    }

    pub fn tail_policy(&self) -> String {
        tail_policy(self.format)
    }
}

pub fn tail_policy(format: KvFormat) -> String {
    match format.class() {
        FormatClass::Tile => format!("own tile of {BLOCK} raw in {}", format.dtype().name()),
        _ => "none: all tokens as stored".into(),
    }
}

/// The queries of a run.
pub const fn queries() -> usize {
    ASKED * Q_HEADS
}

/// A text before its keys are made alike: independent codes, `[token][kv_head][channel]`.
pub struct Text {
    tokens: usize,
    seed: u64,
    codes: Vec<f32>,
    /// What the keys of a group share, `[group][kv_head][channel]`.
    groups: Vec<f32>,
    /// `[value][kv_head][channel]`.
    values: Vec<f32>,
}

impl Text {
    /// # Errors
    /// Refuses a length that is too short to plant anything, or not whole blocks.
    pub fn new(tokens: usize, seed: u64) -> Result<Self, Box<dyn Error>> {
        if tokens < CHUNK || !tokens.is_multiple_of(CHUNK) || tokens > 1 << 20 {
            return Err(format!("--recall must be a multiple of {CHUNK}, to {}", 1 << 20).into());
        }
        let normals = |kind: u64, rows: usize| {
            let mut codes = vec![0.0; rows * ROW];
            codes.par_chunks_exact_mut(ROW).enumerate().for_each(|(n, row)| {
                let mut random = Random(seed ^ (kind << 60) ^ ((n as u64) << 20));
                row.chunks_exact_mut(2).for_each(|pair| pair.copy_from_slice(&random.normals()));
            });
            codes
        };
        let (codes, groups) = (normals(1, tokens), normals(2, GROUPS));
        Ok(Self { tokens, seed, codes, groups, values: normals(3, VALUES) })
    }

    fn pairs(&self) -> usize {
        self.tokens / 2
    }

    /// The value that pair `pair` has: no pattern, but the same in each run.
    fn value(&self, pair: usize) -> usize {
        (Random(self.seed ^ (5 << 60) ^ pair as u64).next() % VALUES as u64) as usize
    }

    fn group(&self, pair: usize) -> usize {
        (Random(self.seed ^ (6 << 60) ^ pair as u64).next() % GROUPS as u64) as usize
    }

    /// The code of a pair's key, all heads: the group's part, and one of its own across it.
    fn key(&self, pair: usize, gap: f32, row: &mut [f32]) {
        let own = &self.codes[2 * pair * ROW..][..ROW];
        let shared = &self.groups[self.group(pair) * ROW..][..ROW];
        for head in (0..ROW).step_by(DIM).map(|at| at..at + DIM) {
            let (own, shared) = (&own[head.clone()], &shared[head.clone()]);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let along = dot(own, shared) / dot(shared, shared);
            for ((x, own), shared) in row[head].iter_mut().zip(own).zip(shared) {
                *x = (1.0 - gap).sqrt() * shared + gap.sqrt() * (own - along * shared);
            }
        }
    }

    /// K and V of the text: a value is behind its key, a key behind the value before.
    fn rows(&self, gap: f32, changes: &[Change]) -> [Vec<f32>; 2] {
        let (mut k, mut v) = (vec![0.0; self.tokens * ROW], vec![0.0; self.tokens * ROW]);
        let rows = k.par_chunks_exact_mut(2 * ROW).zip(v.par_chunks_exact_mut(2 * ROW));
        rows.enumerate().for_each(|(pair, (k, v))| {
            let value = &self.values[self.value(pair) * ROW..][..ROW];
            let other = &self.codes[(2 * pair + 1) * ROW..][..ROW];
            k[..ROW].copy_from_slice(other);
            self.key(pair, gap, &mut k[ROW..]);
            v[..ROW].copy_from_slice(other);
            v[ROW..].copy_from_slice(value);
            for (at, (k, v)) in k.iter_mut().zip(v).enumerate() {
                let (change, channel) = (&changes[at % ROW / DIM], at % DIM);
                *k = K_SPREAD * *k * change.k_scale[channel] + change.k_offset[channel];
                *v *= change.v_scale[channel];
            }
        });
        [k, v]
    }

    /// What a head's output says: the value whose code is nearest.
    fn read(&self, head: usize, out: &[f32]) -> usize {
        let score = |value: usize| {
            let code = &self.values[value * ROW + head * DIM..][..DIM];
            out.iter().zip(code).map(|(a, b)| a * b).sum::<f32>()
        };
        let scores: Vec<f32> = (0..VALUES).map(score).collect();
        (0..VALUES).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0)
    }
}

/// Asks a cache of one format for keys of the whole text but its last 256 tokens, which a raw tile
/// may hold.
pub fn ask(text: &Text, format: KvFormat, mode: Mode, gap: f32) -> Result<Answers, Box<dyn Error>> {
    let group = GroupSpec::uniform(1, KV_HEADS as u32, DIM as u32, format);
    let spec = CacheSpec::uniform(BLOCK, group);
    let layout = &spec.layouts()?[0];
    let options = CacheOptions {
        blocks: layout.blocks_for((text.tokens + ASKED) as u64) as u32,
        max_seqs: 1,
        threads: rayon::current_num_threads() as u32,
        prefix_reuse: false,
        ..CacheOptions::default()
    };
    let mut cache = KvCache::new(&spec, &options)?;
    let changes: Vec<Change> = (0..KV_HEADS).map(|head| mode.change(0, head, DIM)).collect();
    let [k, v] = text.rows(gap, &changes);
    let (layer, mut step) = (LayerId::uniform(0), Step::new());
    let seq = cache.start(&[0], Namespace::default())?.seq;
    for (k, v) in k.chunks(CHUNK * ROW).zip(v.chunks(CHUNK * ROW)) {
        cache.begin(&mut step, &[Work { seq, tokens: &vec![0; k.len() / ROW] }])?;
        cache.append(&step, layer, k.into(), v.into(), None)?;
        cache.commit(&mut step)?;
    }

    let (mut random, mut right) = (Random(text.seed ^ (7 << 60)), 0);
    let strength = MARGIN / (gap * (DIM as f32).sqrt() * K_SPREAD);
    for _ in 0..ASKED {
        let asked: Vec<usize> =
            (0..Q_HEADS).map(|_| (random.next() % (text.pairs() - 128) as u64) as usize).collect();
        let (mut q, mut out) = (vec![0.0; Q_HEADS * DIM], vec![0.0; Q_HEADS * DIM]);
        let mut key = [0.0; ROW];
        for (n, &pair) in asked.iter().enumerate() {
            let head = n / (Q_HEADS / KV_HEADS);
            text.key(pair, gap, &mut key);
            let of_head = key[head * DIM..][..DIM].iter().zip(&changes[head].k_scale);
            let q = q[n * DIM..][..DIM].iter_mut();
            q.zip(of_head).for_each(|(q, (key, scale))| *q = key * strength / scale);
        }
        // The asking tokens stand for nothing that is asked for.
        cache.begin(&mut step, &[Work { seq, tokens: &[0] }])?;
        cache.append(&step, layer, k[..ROW].into(), v[..ROW].into(), None)?;
        let scoring = Scoring::causal(DIM as u32);
        cache.attend(&step, layer, q[..].into(), (&mut out[..]).into(), &scoring, None)?;
        cache.commit(&mut step)?;
        for (n, &pair) in asked.iter().enumerate() {
            let head = n / (Q_HEADS / KV_HEADS);
            let out = &mut out[n * DIM..][..DIM];
            out.iter_mut().zip(&changes[head].v_scale).for_each(|(out, scale)| *out /= scale);
            right += usize::from(text.read(head, out) == text.value(pair));
        }
    }
    if cache.stats().unsealed_blocks != 0 {
        return Err("a tile stayed raw".into());
    }
    Ok(Answers {
        format,
        bits: layout.block_bytes() as f64 * 8.0 / (2 * ROW * BLOCK as usize) as f64,
        mode,
        context: text.tokens,
        gap: gap.into(),
        recall: right as f64 / queries() as f64,
    })
}

/// From the widest gap on, until two in a row are not passed.
pub fn sweep(text: &Text, format: KvFormat, mode: Mode) -> Result<Vec<Answers>, Box<dyn Error>> {
    let mut all: Vec<Answers> = Vec::new();
    for n in STEPS {
        let failed = all.iter().rev().take_while(|answers| !answers.passed()).count();
        if failed == 2 {
            break;
        }
        all.push(ask(text, format, mode, 2f32.powf(-n as f32 / 2.0))?);
    }
    Ok(all)
}

/// The smallest gap of a sweep that is passed with all that are wider; none where not even the first is.
pub fn finest(answers: &[Answers]) -> Option<f64> {
    answers.iter().take_while(|answers| answers.passed()).last().map(|answers| answers.gap)
}

/// Gaps that must be recalled in every mode and at every length to 64k tokens, for `--check`: half an
/// octave or one above the widest that was measured.
const LIMITS: &[(KvFormat, f64)] = &[
    (KvFormat::F16, 1.0 / 512.0),
    (KvFormat::Bf16, 1.0 / 128.0),
    (KvFormat::Fp8E4m3, 1.0 / 8.0),
    (KvFormat::Int8T, 1.0 / 32.0),
    (KvFormat::Kt8v8, 1.0 / 64.0),
    (KvFormat::Kt4v4, 1.0 / 8.0),
    (KvFormat::Kt3v3, 0.1768),
    (KvFormat::Kt4v2, 1.0 / 8.0),
    (KvFormat::Kt2v2, 0.3536),
];

/// The sweeps that end too early, in words.
pub fn broken_thresholds(sweeps: &[Vec<Answers>]) -> Vec<String> {
    let mut broken = Vec::new();
    for (first, sweep) in sweeps.iter().filter_map(|sweep| Some((sweep.first()?, sweep))) {
        let limit = LIMITS.iter().find(|(format, _)| *format == first.format);
        let finest = finest(sweep).unwrap_or(f64::INFINITY);
        if let Some((_, limit)) = limit.filter(|(_, limit)| !(finest <= 1.001 * limit)) {
            let (name, mode, tokens) = (first.format.name(), first.mode.name(), first.context);
            broken.push(format!("{name} in {tokens} tokens, {mode}: recalls {finest} for {limit}"));
        }
    }
    broken
}

/// The formats that `names` ask for, all without a name.
pub fn formats(names: &[String]) -> Result<Vec<KvFormat>, Box<dyn Error>> {
    if names.is_empty() {
        return Ok(KvFormat::ALL.to_vec());
    }
    names.iter().map(|name| Ok(KvFormat::from_name(name)?)).collect()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Two independent normal numbers.
    fn normals(&mut self) -> [f32; 2] {
        let unit = |bits: u64| ((bits >> 40) + 1) as f32 / (1u64 << 24) as f32;
        let radius = (-2.0 * unit(self.next()).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * unit(self.next())).sin_cos();
        [radius * cos, radius * sin]
    }
}
