//! A call of the kernels on some queries of a cache, what the reference gives for them, and how far the two
//! may be apart.

use std::sync::atomic::AtomicU32;

use kvcache::attention::{Scoring, reference_attention};
use kvcache::cpu::{
    AttendMaxima, BlockTables, CpuLevel, Executor, RawBlock, RawTables, RowsView, Serial,
    TileAttendArgs, attend_tiles, attend_tiles_workspace_bytes,
};
use kvcache::dtype::{DType, KvFormat, Rows};

use crate::cache::{Cache, Seen};
use crate::random::Rng;

/// Two workers that take turns, in reverse: results must not depend on who runs what when.
pub struct Reversed;

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

/// Queries of all positions of all sequences: `[seq][position][q_heads][k_dim]`.
pub fn queries(cache: &Cache, seed: u64) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(seed);
    let row = (cache.shape.q_heads * cache.shape.k_dim) as usize;
    cache.seqs.iter().map(|&(len, _)| (0..len * row).map(|_| rng.normal()).collect()).collect()
}

/// Which queries of each sequence a call has: those before `len`, `tokens` of them.
pub type Chunk = (usize, usize);

/// Runs one call: `chunks[seq]` is (length, query tokens). Outputs and LSE, `[row][head]`.
#[allow(clippy::too_many_arguments)]
pub fn call(
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
pub fn expected(
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
pub fn largest(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let errors = got.iter().zip(expected).map(|(&got, want)| (f64::from(got) - want).abs());
    errors.fold(0.0, |worst: f64, error| if error <= worst { worst } else { error })
}

/// Rounding of queries to 8 bits in front of codes of 4 and fewer; f32 and 15 bits else.
fn tolerance(format: KvFormat) -> f64 {
    if format.k_bits() == 8 { 1e-3 } else { 4e-2 }
}

pub fn check(cache: &Cache, scoring: &Scoring, chunks: &[Chunk], open: &[usize], what: &str) {
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
