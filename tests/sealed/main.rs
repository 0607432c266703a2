//! Attention over sealed tiles against the reference, at every level: what a query reads sealed and
//! what raw, every format and scoring rule, and bits that do not depend on how the work was cut.

mod cache;
mod call;
#[path = "../random/mod.rs"]
mod random;

use std::sync::atomic::{AtomicU32, Ordering};

use kvcache::attention::{HeadShape, Scoring};
use kvcache::cpu::{
    BlockTables, CpuLevel, Executor, RawBlock, RawTables, RowsView, Serial, TileAttendArgs,
    attend_tiles,
};
use kvcache::dtype::{DType, FormatClass, KvFormat, bf16};
use kvcache::layout::Strides;

use cache::Cache;
use call::{Reversed, call, check, expected, largest, queries};
use random::Rng;

fn formats() -> impl Iterator<Item = KvFormat> {
    KvFormat::ALL.iter().copied().filter(|format| format.class() == FormatClass::Tile)
}

fn small() -> bool {
    std::env::var_os("KVCACHE_CONFORMANCE").is_some_and(|value| value == "small")
}

fn shape(q_heads: u32, kv_heads: u32, k_dim: u32, v_dim: u32) -> HeadShape {
    HeadShape { q_heads, kv_heads, k_dim, v_dim, v_in_k: false }
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
