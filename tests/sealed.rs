//! Attention over sealed tiles against the reference, at every level: what a query reads sealed and
//! what raw, every format and scoring rule, and bits that do not depend on how the work was cut.

#[path = "random/mod.rs"]
mod random;

use std::sync::atomic::{AtomicU32, Ordering};

use kvcache::attention::{HeadShape, KvSource, Scoring, reference_attention};
use kvcache::cpu::{
    AttendMaxima, BlockTables, CpuLevel, Executor, KvView, RawBlock, RawTables, RowsView, SealArgs,
    SealTile, Serial, TileAttendArgs, TileView, attend_tiles, attend_tiles_workspace_bytes,
    seal_tiles,
};
use kvcache::dtype::{DType, FormatClass, KvFormat, Rows, bf16};
use kvcache::layout::tile::{TileLayout, TileShape};
use kvcache::layout::{GroupLayout, GroupSpec, Strides};
use kvcache::quant::Tile;
use random::Rng;

/// Two workers that take turns, in reverse: results must not depend on who runs what when.
struct Reversed;

// SAFETY: one thread, each index once, workers below two.
unsafe impl Executor for Reversed {
    fn workers(&self) -> usize {
        2
    }
    fn run(&self, units: usize, unit: &(dyn Fn(usize, usize) + Sync)) {
        for index in (0..units).rev() {
            unit(index % 2, index);
        }
    }
}

fn formats() -> impl Iterator<Item = KvFormat> {
    KvFormat::ALL.iter().copied().filter(|format| format.class() == FormatClass::Tile)
}

/// Whole 16-byte words, for aligned memory.
fn aligned(bytes: usize) -> Vec<u128> {
    vec![u128::MAX; bytes.div_ceil(16)]
}

/// Sequences in a cache of sealed tiles, every row raw and every whole tile sealed too.
struct Cache {
    shape: HeadShape,
    layout: TileLayout,
    group: GroupLayout,
    raw: GroupLayout,
    records: Vec<u128>,
    rows: Vec<u128>,
    /// `[seq]` tokens, first block (of records and raw rows alike).
    seqs: Vec<(usize, usize)>,
    blocks: usize,
    /// `[seq][tile][head]` keys and values as sealed.
    sealed: Vec<Vec<Vec<TileRows>>>,
}

/// Keys and values of a tile's tokens.
type TileRows = (Vec<f32>, Vec<f32>);

impl Cache {
    fn new(format: KvFormat, shape: HeadShape, tokens: u32, lens: &[usize], seed: u64) -> Self {
        let group = GroupSpec {
            layers: 1,
            kv_heads: shape.kv_heads,
            k_dim: shape.k_dim,
            v_dim: shape.v_dim,
            v_in_k: shape.v_in_k,
            format,
            window: None,
            sink_tokens: 0,
        };
        let raw_spec = GroupSpec { format: KvFormat::Bf16, ..group.clone() };
        let group = GroupLayout::new(group, tokens).unwrap();
        let raw = GroupLayout::new(raw_spec, tokens).unwrap();
        let HeadShape { k_dim, v_dim, v_in_k, .. } = shape;
        let layout = TileLayout::new(format, TileShape { k_dim, v_dim, v_in_k, tokens }).unwrap();
        let mut seqs = Vec::new();
        let mut blocks = 0;
        for &len in lens {
            seqs.push((len, blocks));
            blocks += len.div_ceil(tokens as usize);
        }
        let mut cache = Cache {
            shape,
            records: aligned(blocks * group.block_bytes() as usize),
            rows: aligned(blocks * raw.block_bytes() as usize),
            layout,
            group,
            raw,
            seqs,
            blocks,
            sealed: Vec::new(),
        };
        let mut rng = Rng::new(seed);
        let elements = cache.rows.len() * 8;
        // SAFETY: bf16 has no invalid bits, and the memory is whole words of it.
        let rows = unsafe {
            std::slice::from_raw_parts_mut(cache.rows.as_mut_ptr().cast::<bf16>(), elements)
        };
        rows.fill_with(|| bf16::from_f32(rng.normal()));
        cache.seal();
        cache
    }

    fn view(&self) -> TileView<'_> {
        let rows = self.rows.as_ptr().cast_mut().cast();
        let staging = KvView::native(&self.raw, rows, self.blocks as u32, 0).unwrap();
        TileView {
            layout: &self.layout,
            records: self.records.as_ptr().cast_mut().cast(),
            block_bytes: self.group.block_bytes() as i64,
            head_bytes: self.layout.bytes() as i64,
            num_blocks: self.blocks as u32,
            staging,
            scratch: KvView { num_blocks: 0, ..staging },
        }
    }

    /// Seals every whole tile with the best level, and reads it back with the reference.
    fn seal(&mut self) {
        let tokens = self.layout.shape().tokens as usize;
        let list: Vec<_> = self
            .seqs
            .iter()
            .flat_map(|&(len, first)| first..first + len / tokens)
            .map(|block| SealTile { slot: block as i32, block: block as i32 })
            .collect();
        let refused: Vec<_> = list.iter().map(|_| AtomicU32::new(0)).collect();
        let args =
            SealArgs { shape: self.shape, tiles: self.view(), list: &list, refused: &refused };
        // SAFETY: every slot and block is in the memory.
        unsafe { seal_tiles(&args, CpuLevel::detected(), &Serial) }.unwrap();
        assert!(refused.iter().all(|r| r.load(Ordering::Relaxed) == 0));
        let bytes = self.layout.bytes();
        // SAFETY: the records were written.
        let memory = unsafe {
            std::slice::from_raw_parts(self.records.as_ptr().cast::<u8>(), self.records.len() * 16)
        };
        let (k_dim, v_dim) = (self.shape.k_dim as usize, self.shape.v_dim as usize);
        self.sealed = self
            .seqs
            .iter()
            .map(|&(len, first)| {
                (first..first + len / tokens)
                    .map(|block| {
                        (0..self.shape.kv_heads as usize)
                            .map(|head| {
                                let at = block * self.group.block_bytes() as usize + head * bytes;
                                let tile =
                                    Tile::open(&self.layout, &memory[at..at + bytes]).unwrap();
                                let mut k = vec![0.0; tokens * k_dim];
                                let mut v = vec![0.0; tokens * v_dim];
                                tile.keys(&mut k).unwrap();
                                tile.values(&mut v).unwrap();
                                (k, v)
                            })
                            .collect()
                    })
                    .collect()
            })
            .collect();
    }

    fn raw_element(&self, block: usize, head: usize, slot: usize, c: usize, value: bool) -> f64 {
        let value = value && !self.shape.v_in_k;
        let strides = if value { self.raw.v_strides() } else { self.raw.k_strides() };
        let start = if value { self.raw.v_offset(0) / 2 } else { 0 };
        let at =
            block as i64 * strides.block + head as i64 * strides.head + slot as i64 * strides.token;
        // SAFETY: within the rows.
        unsafe { self.rows.as_ptr().cast::<bf16>().add(start as usize + at as usize + c).read() }
            .to_f64()
    }
}

/// What one query of a sequence sees: its own tile raw, those before sealed.
struct Seen<'a> {
    cache: &'a Cache,
    seq: usize,
    own: usize,
    /// Tiles that are not sealed.
    open: &'a [usize],
}

impl KvSource for Seen<'_> {
    fn key(&self, _: usize, head: usize, position: usize, channel: usize) -> Option<f64> {
        let tokens = self.cache.layout.shape().tokens as usize;
        let (tile, slot) = (position / tokens, position % tokens);
        if tile == self.own || self.open.contains(&tile) {
            let block = self.cache.seqs[self.seq].1 + tile;
            return Some(self.cache.raw_element(block, head, slot, channel, false));
        }
        let k_dim = self.cache.shape.k_dim as usize;
        Some(f64::from(self.cache.sealed[self.seq][tile][head].0[slot * k_dim + channel]))
    }
    fn value(&self, _: usize, head: usize, position: usize, channel: usize) -> f64 {
        let tokens = self.cache.layout.shape().tokens as usize;
        let (tile, slot) = (position / tokens, position % tokens);
        if tile == self.own || self.open.contains(&tile) {
            let block = self.cache.seqs[self.seq].1 + tile;
            return self.cache.raw_element(block, head, slot, channel, true);
        }
        let v_dim = self.cache.shape.v_dim as usize;
        f64::from(self.cache.sealed[self.seq][tile][head].1[slot * v_dim + channel])
    }
}

/// Queries of all positions of all sequences: `[seq][position][q_heads][k_dim]`.
fn queries(cache: &Cache, seed: u64) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(seed);
    let row = (cache.shape.q_heads * cache.shape.k_dim) as usize;
    cache.seqs.iter().map(|&(len, _)| (0..len * row).map(|_| rng.normal()).collect()).collect()
}

/// Which queries of each sequence a call has: those before `len`, `tokens` of them.
type Chunk = (usize, usize);

/// Runs one call: `chunks[seq]` is (length, query tokens). Outputs and LSE, `[row][head]`.
#[allow(clippy::too_many_arguments)]
fn call(
    cache: &Cache,
    scoring: &Scoring,
    q: &[Vec<f32>],
    chunks: &[Chunk],
    open: &[usize],
    level: CpuLevel,
    executor: &dyn Executor,
) -> (Vec<f32>, Vec<f32>, bool) {
    let shape = cache.shape;
    let (heads, k_dim, v_dim) =
        (shape.q_heads as usize, shape.k_dim as usize, shape.v_dim as usize);
    let tokens = cache.layout.shape().tokens as usize;
    let (mut q_indptr, mut kv_lens, mut rows) = (vec![0i32], Vec::new(), Vec::new());
    let (mut indptr, mut indices) = (vec![0i32], Vec::new());
    let (mut raw_indptr, mut raw) = (vec![0i32], Vec::new());
    for (seq, &(len, count)) in chunks.iter().enumerate() {
        rows.extend_from_slice(&q[seq][(len - count) * heads * k_dim..len * heads * k_dim]);
        q_indptr.push(q_indptr[seq] + count as i32);
        kv_lens.push(len as i32);
        let first = cache.seqs[seq].1;
        indices.extend((first..first + len.div_ceil(tokens)).map(|block| block as i32));
        indptr.push(indices.len() as i32);
        let own = (len - count) / tokens;
        raw.extend(
            (0..len.div_ceil(tokens))
                .filter(|tile| *tile >= own || open.contains(tile))
                .map(|tile| RawBlock { tile: tile as i32, slot: (first + tile) as i32 }),
        );
        raw_indptr.push(raw.len() as i32);
    }
    let total = *q_indptr.last().unwrap() as usize;
    let mut out = vec![f32::NAN; total * heads * v_dim];
    let mut lse = vec![f32::NAN; total * heads];
    let bad = AtomicU32::new(0);
    let args = TileAttendArgs {
        shape,
        scoring: *scoring,
        tiles: cache.view(),
        tables: BlockTables::Csr { indptr: indptr.as_ptr(), indices: indices.as_ptr() },
        raw: RawTables { indptr: raw_indptr.as_ptr(), blocks: raw.as_ptr() },
        seqs: chunks.len() as u32,
        q_indptr: q_indptr.as_ptr(),
        kv_lens: kv_lens.as_ptr(),
        q: RowsView::contiguous(rows.as_mut_ptr().cast(), DType::F32, shape.q_heads, shape.k_dim),
        out: RowsView::contiguous(out.as_mut_ptr().cast(), DType::F32, shape.q_heads, shape.v_dim),
        lse: lse.as_mut_ptr(),
        bad_block: Some(&bad),
    };
    let maxima = AttendMaxima {
        seqs: args.seqs,
        q_tokens: total as u32,
        kv_len: kv_lens.iter().copied().max().unwrap() as u32,
        workers: executor.workers(),
    };
    let bytes = attend_tiles_workspace_bytes(&shape, &cache.layout, &maxima).unwrap();
    let mut workspace = vec![0xff; bytes as usize];
    // SAFETY: all tables and rows were made for these sizes.
    unsafe { attend_tiles(&args, level, executor, &mut workspace) }.unwrap();
    (out, lse, bad.into_inner() != 0)
}

/// What the reference gives for every row of a call: outputs and LSE.
fn expected(
    cache: &Cache,
    scoring: &Scoring,
    q: &[Vec<f32>],
    chunks: &[Chunk],
    open: &[usize],
) -> (Vec<f64>, Vec<f64>) {
    let row = (cache.shape.q_heads * cache.shape.k_dim) as usize;
    let tokens = cache.layout.shape().tokens as usize;
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (seq, &(len, count)) in chunks.iter().enumerate() {
        for position in len - count..len {
            let seen = Seen { cache, seq, own: position / tokens, open };
            let query = Rows::F32(&q[seq][position * row..(position + 1) * row]);
            let lens = [position + 1];
            let reference =
                reference_attention(&cache.shape, scoring, &seen, query, &[0, 1], &lens).unwrap();
            out.extend(reference.out);
            lse.extend(reference.lse);
        }
    }
    (out, lse)
}

/// The largest difference; NaN where there is one.
fn largest(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let errors = got.iter().zip(expected).map(|(&got, want)| (f64::from(got) - want).abs());
    errors.fold(0.0, |worst: f64, error| if error <= worst { worst } else { error })
}

fn small() -> bool {
    std::env::var_os("KVCACHE_CONFORMANCE").is_some_and(|value| value == "small")
}

fn shape(q_heads: u32, kv_heads: u32, k_dim: u32, v_dim: u32) -> HeadShape {
    HeadShape { q_heads, kv_heads, k_dim, v_dim, v_in_k: false }
}

/// Rounding of queries to 8 bits in front of codes of 4 and fewer; f32 and 15 bits else.
fn tolerance(format: KvFormat) -> f64 {
    if format.k_bits() == 8 { 1e-3 } else { 4e-2 }
}

fn check(cache: &Cache, scoring: &Scoring, chunks: &[Chunk], open: &[usize], what: &str) {
    let q = queries(cache, 9);
    let (out, lse) = expected(cache, scoring, &q, chunks, open);
    for level in CpuLevel::available() {
        let got = call(cache, scoring, &q, chunks, open, level, &Serial);
        let errors = (largest(&got.0, &out), largest(&got.1, &lse));
        let limit = tolerance(cache.layout.format());
        let holds = errors.0 <= limit && errors.1 <= limit && !got.2;
        assert!(holds, "{:?} {level:?} {what}: {errors:?}", cache.layout);
    }
}

#[test]
fn every_format_dimension_and_tile() {
    for format in formats() {
        for (shape, tokens) in [
            (shape(8, 2, 128, 128), 64),
            (shape(4, 2, 64, 64), 32),
            (shape(2, 2, 80, 80), 64),
            (shape(2, 1, 96, 96), 128),
            (shape(5, 1, 128, 80), 128),
            (shape(6, 2, 192, 128), 64),
            (shape(3, 1, 256, 256), 32),
            (shape(40, 2, 64, 64), 64),
            (shape(150, 1, 16, 16), 32),
        ] {
            if small() && (shape.k_dim > 80 || format == KvFormat::Kt4v2) {
                continue;
            }
            let t = tokens as usize;
            let cache = Cache::new(format, shape, tokens, &[3 * t + 5, t, 2 * t - 1, 1], 1);
            let scoring = Scoring::causal(shape.k_dim);
            let chunks = [(3 * t + 5, 1), (t, 1), (2 * t - 1, 2), (1, 1)];
            check(&cache, &scoring, &chunks, &[], "decode");
            // Across the end of a tile, more rows than a job has.
            check(&cache, &scoring, &[(2 * t + 9, 20), (t, 3)], &[], "prefill");
        }
    }
}

#[test]
fn latents() {
    let shape = HeadShape { q_heads: 16, kv_heads: 1, k_dim: 576, v_dim: 512, v_in_k: true };
    for format in formats() {
        let cache = Cache::new(format, shape, 64, &[200], 2);
        check(&cache, &Scoring::causal(192), &[(200, 1)], &[], "latent decode");
        if small() {
            break;
        }
        check(&cache, &Scoring::causal(192), &[(140, 5)], &[], "latent prefill");
    }
}

#[test]
fn every_scoring_rule_and_tiles_that_stay_raw() {
    let shape = shape(4, 2, 64, 64);
    let (sinks, slopes) = ([0.5, -1.0, 2.0, 0.0], [0.1, 0.05, 0.01, 0.5]);
    for format in [KvFormat::Kt8v8, KvFormat::Kt4v4, KvFormat::Kt2v2] {
        let cache = Cache::new(format, shape, 32, &[700, 40], 3);
        let base = Scoring::causal(64);
        for (scoring, what) in [
            (Scoring { window: Some(1), ..base }, "window 1"),
            (Scoring { window: Some(33), ..base }, "window 33"),
            (Scoring { window: Some(300), ..base }, "window 300"),
            (Scoring { softcap: Some(3.0), ..base }, "soft-cap"),
            (Scoring { sinks: Some(&sinks), ..base }, "sinks"),
            (Scoring { alibi: Some(&slopes), ..base }, "ALiBi"),
            (Scoring { scale: 0.0, ..base }, "no scale"),
        ] {
            check(&cache, &scoring, &[(700, 1), (40, 1)], &[], what);
            check(&cache, &scoring, &[(650, 20), (33, 9)], &[], what);
        }
        if small() {
            break;
        }
    }
    // Tiles whose records say that they are not sealed are read raw.
    let mut cache = Cache::new(KvFormat::Kt4v4, shape, 32, &[300], 4);
    let header = cache.layout.header.start + 8;
    for tile in [0, 5] {
        for head in 0..2 {
            let at = tile * cache.group.block_bytes() as usize + head * cache.layout.bytes();
            // SAFETY: within the records.
            unsafe {
                let bytes = cache.records.as_mut_ptr().cast::<u8>();
                bytes.add(at + header).write_bytes(0, 4);
            }
        }
    }
    check(&cache, &Scoring::causal(64), &[(300, 1)], &[0, 5], "raw tiles");
    check(&cache, &Scoring::causal(64), &[(210, 70)], &[0, 5], "raw tiles");
    let q = queries(&cache, 9);
    let (.., bad) =
        call(&cache, &Scoring::causal(64), &q, &[(300, 1)], &[0], CpuLevel::Scalar, &Serial);
    assert!(bad, "neither sealed nor raw");
}

#[test]
fn bits_depend_on_neither_chunks_nor_threads_nor_neighbours() {
    let shape = shape(4, 2, 64, 64);
    let mut rng = Rng::new(5);
    for format in formats() {
        let (len, row) = (if small() { 200 } else { 700 }, 4 * 64);
        let cache = Cache::new(format, shape, 32, &[len, 64], 6);
        let q = queries(&cache, 7);
        for scoring in [Scoring::causal(64), Scoring { window: Some(77), ..Scoring::causal(64) }] {
            for level in CpuLevel::available() {
                let whole = call(&cache, &scoring, &q, &[(len, len)], &[], level, &Serial);
                let (mut at, mut out, mut lse) = (0, Vec::new(), Vec::new());
                while at < len {
                    let count = rng.pick(&[1, 1, 1, 2, 5, 9, 31, 32, 64, 200]).min(len - at);
                    let alone = rng.below(2) == 0;
                    let mut chunks = vec![(at + count, count)];
                    if !alone {
                        chunks.push((64, 3));
                    }
                    let executor: &dyn Executor = if alone { &Serial } else { &Reversed };
                    let part = call(&cache, &scoring, &q, &chunks, &[], level, executor);
                    out.extend_from_slice(&part.0[..count * row]);
                    lse.extend_from_slice(&part.1[..count * 4]);
                    at += count;
                }
                let same =
                    |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same(&out, &whole.0) && same(&lse, &whole.1), "{format:?} {level:?}");
            }
        }
    }
}

/// Sixty-three keys whose probabilities are a fraction of what the largest one's byte can tell apart
/// weigh a tenth together; rounded to the nearest they would be nothing.
#[test]
fn many_small_probabilities_beside_a_large_one_keep_their_sum() {
    for format in formats() {
        let mut cache = Cache::new(format, shape(4, 1, 64, 64), 64, &[65], 31);
        // SAFETY: bf16 has no invalid bits, and the memory is whole words of it.
        let rows = unsafe {
            let count = cache.rows.len() * 8;
            std::slice::from_raw_parts_mut(cache.rows.as_mut_ptr().cast::<bf16>(), count)
        };
        let (k, v) = (cache.raw.k_strides(), cache.raw.v_strides());
        let v_start = cache.raw.v_offset(0) / 2;
        for position in 0..65i64 {
            let (block, slot) = (position / 64, position % 64);
            for c in 0..64 {
                // One key that is met, many that are not, and the query's own, which is averse.
                let key = match position {
                    _ if c != 0 => 0.0,
                    0 => 1.0,
                    64 => -4.0,
                    _ => 0.0,
                };
                let value = if position == 0 && c % 2 == 1 { -1.0 } else { 1.0 };
                let at = |start: i64, s: &Strides| start + block * s.block + slot * s.token + c;
                rows[at(0, &k) as usize] = bf16::from_f32(key);
                rows[at(v_start as i64, &v) as usize] = bf16::from_f32(value);
            }
        }
        cache.seal();
        let mut q = vec![vec![0.0f32; 65 * 4 * 64]];
        for (head, logit) in [5.7, 6.0, 6.3, 7.0].into_iter().enumerate() {
            q[0][(64 * 4 + head) * 64] = logit;
        }
        let scoring = Scoring { scale: 1.0, ..Scoring::causal(64) };
        let (want, _) = expected(&cache, &scoring, &q, &[(65, 1)], &[]);
        for level in CpuLevel::available() {
            let got = call(&cache, &scoring, &q, &[(65, 1)], &[], level, &Serial);
            let error = largest(&got.0, &want);
            assert!(error <= 1.5e-2, "{format:?} {level:?}: {error}");
        }
    }
}

#[test]
fn long_contexts_are_split() {
    if small() {
        return;
    }
    let cache = Cache::new(KvFormat::Kt4v4, shape(2, 1, 64, 64), 32, &[9000, 300], 8);
    check(&cache, &Scoring::causal(64), &[(9000, 1), (300, 2)], &[], "long");
}

#[test]
fn bad_tables_are_masked_and_bad_calls_refused() {
    let cache = Cache::new(KvFormat::Kt4v4, shape(2, 1, 64, 64), 32, &[100], 8);
    let (q_indptr, kv_lens, raw_indptr) = ([0, 1], [100], [0, 1]);
    let raw = [RawBlock { tile: 3, slot: 3 }];
    let mut table = [0, -1, 77, 3];
    let (q, mut out) = (vec![0.5f32; 128], vec![f32::NAN; 128]);
    let bad = AtomicU32::new(0);
    let mut args = TileAttendArgs {
        shape: cache.shape,
        scoring: Scoring::causal(64),
        tiles: cache.view(),
        tables: BlockTables::Dense { table: table.as_mut_ptr(), stride: 4 },
        raw: RawTables { indptr: raw_indptr.as_ptr(), blocks: raw.as_ptr() },
        seqs: 1,
        q_indptr: q_indptr.as_ptr(),
        kv_lens: kv_lens.as_ptr(),
        q: RowsView::contiguous(q.as_ptr().cast_mut().cast(), DType::F32, 2, 64),
        out: RowsView::contiguous(out.as_mut_ptr().cast(), DType::F32, 2, 64),
        lse: std::ptr::null_mut(),
        bad_block: Some(&bad),
    };
    let mut workspace = vec![0; 1 << 20];
    let mut run = |args: &TileAttendArgs, bytes: usize| {
        // SAFETY: the tables and rows have these sizes.
        unsafe { attend_tiles(args, CpuLevel::Scalar, &Serial, &mut workspace[..bytes]) }
    };
    run(&args, 1 << 20).unwrap();
    assert_eq!(bad.load(Ordering::Relaxed), 1);
    assert!(out.iter().all(|x| x.is_finite()));
    assert!(run(&args, 100).is_err());
    args.scoring.causal = false;
    assert!(run(&args, 1 << 20).is_err());
    args.scoring.causal = true;
    args.shape.k_dim = 80;
    assert!(run(&args, 1 << 20).is_err());
    args.shape.k_dim = 64;
    args.tiles.records = args.tiles.records.wrapping_add(4);
    assert!(run(&args, 1 << 20).is_err());
    args.tiles = cache.view();
    args.tiles.staging.format = KvFormat::F16;
    assert!(run(&args, 1 << 20).is_err());
}
