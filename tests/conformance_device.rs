//! The conformance table on devices: the emulator where it is built in, a GPU where there is one
//! (`KVCACHE_REQUIRE_GPU=1` makes a missing one a failure). Contexts are short: what they must
//! cover is every rule and shape, not time.
#![cfg(any(feature = "emulate", feature = "cuda"))]

#[allow(dead_code)]
mod attention_case;
mod backends;

use std::sync::Arc;

use attention_case::{Buffer, Case, Layout, Rng, Tables};
use kvcache::Error;
use kvcache::attention::HeadShape;
use kvcache::cpu::{Rope, RopeStyle};
use kvcache::device::{
    Backend, BatchTables, DeviceBatch, DeviceStore, GroupTables, StoreOptions, Stream,
};
use kvcache::dtype::{DType, KvFormat, bf16, f16};
use kvcache::layout::{GroupLayout, GroupSpec};

const FORMATS: [KvFormat; 2] = [KvFormat::F16, KvFormat::Bf16];

fn shape(q_heads: u32, kv_heads: u32, dim: u32) -> HeadShape {
    HeadShape { q_heads, kv_heads, k_dim: dim, v_dim: dim, v_in_k: false }
}

fn base() -> Case {
    Case {
        format: KvFormat::Bf16,
        lengths: vec![(1, 100), (1, 1), (5, 5), (1, 0), (0, 9), (2, 64), (8, 83), (0, 0)],
        ..Case::default()
    }
}

fn check_as_it_is(case: &Case) {
    let instance = case.build();
    for backend in backends::all() {
        assert!(!instance.check_on(&backend), "no entry is bad: {case:?}");
    }
}

/// Runs a case of few query tokens, which is decoded, and again beside sequences of many, which is
/// prefilled.
fn check(case: &Case) {
    check_as_it_is(case);
    check_as_it_is(&prefilled(case));
}

fn prefilled(case: &Case) -> Case {
    let long = [(19, 83), (33, 33), (9, 140)];
    Case { lengths: [&case.lengths[..], &long].concat(), ..case.clone() }
}

#[test]
fn every_format_and_row_type() {
    for format in FORMATS {
        for (q_dtype, out_dtype) in [
            (DType::F32, DType::F32),
            (DType::F16, DType::F16),
            (DType::Bf16, DType::Bf16),
            (DType::Bf16, DType::F32),
        ] {
            check(&Case { format, q_dtype, out_dtype, ..base() });
        }
    }
}

#[test]
fn every_layout_and_block_size() {
    for layout in [Layout::Native, Layout::Nhd, Layout::Hnd] {
        for tables in [Tables::Dense, Tables::Csr] {
            for block_tokens in [1, 5, 16, 32, 64, 256] {
                check(&Case { layout, tables, block_tokens, ..base() });
            }
        }
    }
}

#[test]
fn every_group_and_head_dim() {
    for (q_heads, kv_heads) in [(2, 2), (8, 1), (14, 2), (3, 1), (64, 1), (9, 3)] {
        for format in FORMATS {
            for dim in [64, 128] {
                let lengths = vec![(1, 70), (3, 21), (1, 0)];
                check(&Case { shape: shape(q_heads, kv_heads, dim), format, lengths, ..base() });
            }
        }
    }
}

#[test]
fn every_head_dim() {
    // The emulator has every head dimension; a build for GPUs those that it was asked for.
    let dims: &[u32] =
        if cfg!(feature = "emulate") { &[64, 80, 96, 128, 192, 256] } else { &[256] };
    for &dim in dims {
        for format in FORMATS {
            check(&Case { shape: shape(6, 2, dim), format, ..base() });
        }
    }
}

#[test]
fn latent_attention() {
    let latent = HeadShape { q_heads: 16, kv_heads: 1, k_dim: 576, v_dim: 512, v_in_k: true };
    let lengths = vec![(1, 130), (3, 40), (1, 0), (8, 20)];
    for format in FORMATS {
        for block_tokens in [16, 64] {
            let lengths = lengths.clone();
            check_as_it_is(&Case { shape: latent, format, lengths, block_tokens, ..base() });
        }
    }
    let lengths = vec![(1, 40), (2, 9)];
    let wide = HeadShape { q_heads: 128, ..latent };
    check_as_it_is(&Case { shape: wide, lengths, window: Some(20), ..base() });
}

#[test]
fn every_scoring_rule() {
    check(&Case { causal: false, ..base() });
    check(&Case { causal: false, lengths: vec![(7, 3), (8, 2), (3, 0)], ..base() });
    for window in [1, 2, 16, 100, 5000] {
        check(&Case { window: Some(window), ..base() });
        check(&Case { window: Some(window), causal: false, ..base() });
    }
    check(&Case { softcap: Some(5.0), ..base() });
    check(&Case { sinks: true, ..base() });
    check(&Case { alibi: true, ..base() });
    check(&Case { scale: Some(3.0), ..base() });
    check(&Case { scale: Some(0.0), ..base() });
    check(&Case {
        window: Some(33),
        softcap: Some(2.0),
        sinks: true,
        alibi: true,
        scale: Some(0.5),
        ..base()
    });
}

#[test]
fn long_contexts_are_split() {
    let lengths = vec![(1, 1500), (2, 900), (1, 70), (1, 0)];
    check(&Case { shape: shape(4, 1, 64), lengths: lengths.clone(), ..base() });
    check(&Case { window: Some(700), sinks: true, lengths, ..base() });
}

#[test]
fn bad_table_entries_are_masked_and_reported() {
    let mut rng = Rng::new(77);
    for bad in [-1, i32::MIN, i32::MAX, 10_000] {
        for block_tokens in [1, 16] {
            let case = Case { block_tokens, ..base() };
            for case in [prefilled(&case), case] {
                let mut instance = case.build();
                instance.spoil(&mut rng, bad);
                for backend in backends::all() {
                    assert!(instance.check_on(&backend), "a bad entry must raise the flag");
                }
            }
        }
    }
}

#[test]
fn what_a_window_hides_is_not_looked_up() {
    let lengths = vec![(1, 100), (4, 90)];
    let mut instance = Case { window: Some(16), lengths, ..base() }.build();
    instance.set_entries(&[(0, 0..5), (1, 0..4)], -1);
    for backend in backends::all() {
        assert!(!instance.check_on(&backend), "blocks behind the window may be gone");
    }
}

#[test]
fn fixed_pieces_give_the_same_bits_in_any_batch() {
    let lengths = vec![(1, 400), (1, 17), (3, 300), (8, 100), (1, 0)];
    for format in FORMATS {
        let instance = Case { format, lengths: lengths.clone(), ..base() }.build();
        for backend in backends::all() {
            let (want, want_lse) = instance.run_on(&backend, 0..lengths.len());
            for s in 0..lengths.len() {
                let (got, lse) = instance.run_on(&backend, s..s + 1);
                let (rows, row) = instance.rows_of(s);
                assert!(got == want[rows] && lse == want_lse[row], "sequence {s} alone");
            }
        }
    }
}

/// Appends rows to a store on a device and compares the whole pool with a scatter of the rows,
/// rotated and rounded on the host.
fn check_append(backend: &Arc<dyn Backend>, format: KvFormat, rows: DType, rope: Option<Rope>) {
    const LAYERS: u32 = 2;
    const HEADS: usize = 2;
    const DIM: usize = 64;
    const BLOCKS: u32 = 5;
    let mut rng = Rng::new(u64::from(format.id() * 8 + rows.id()));
    let group = GroupSpec::uniform(LAYERS, HEADS as u32, DIM as u32, format);
    let layout = GroupLayout::new(group, 16).unwrap();
    let mut store =
        DeviceStore::new(backend, layout.clone(), BLOCKS, StoreOptions::default()).unwrap();
    let poison = vec![0x3cu8; store.bytes() as usize];
    // SAFETY: the store has these bytes.
    unsafe { backend.upload(store.address(), &poison, Stream::DEFAULT) }.unwrap();

    // 37 tokens of two sequences at scattered, distinct slots, every sixth skipped.
    let slots: Vec<i64> =
        (0..37).map(|t| if t % 6 == 5 { -1 } else { (t * 29 + 7) % 80 }).collect();
    let positions: Vec<u32> = (0..37).map(|t| if t < 30 { t } else { t * 40_000 }).collect();
    let mut batch = DeviceBatch::default();
    let tables = GroupTables { indptr: &[0, 0, 0], indices: &[], slots: &slots };
    let lens = BatchTables { q_indptr: &[0, 30, 37], kv_lens: &[30, 7] };
    batch.upload(backend, Stream::DEFAULT, &lens, [tables].into_iter()).unwrap();
    let mut drawn = || -> Vec<f32> { (0..37 * HEADS * DIM).map(|_| rng.normal()).collect() };
    let (k, v) = (Buffer::of(rows, &drawn()), Buffer::of(rows, &drawn()));
    let turn = rope.as_ref().map(|rope| (rope, &positions[..]));
    store.append(1, &batch, 0, k.rows(), v.rows(), turn).unwrap();
    store.sync().unwrap();

    let mut keys: Vec<f32> = (0..37 * HEADS * DIM).map(|i| k.get(i)).collect();
    if let Some(rope) = &rope {
        rope.rotate(&mut keys, DIM as u32, &positions).unwrap();
    }
    let mut got = vec![0u8; poison.len()];
    // SAFETY: the store has these bytes.
    unsafe { backend.download(store.address(), &mut got, Stream::DEFAULT) }.unwrap();
    let element = |bytes: &[u8]| match format {
        KvFormat::F32 => f32::from_ne_bytes(bytes.try_into().unwrap()),
        KvFormat::F16 => f16::from_ne_bytes(bytes.try_into().unwrap()).to_f32(),
        _ => bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f32(),
    };
    let size = format.dtype().bytes() as usize;
    let mut touched = vec![false; got.len()];
    for (t, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
        let (block, place) = (slot as u64 / 16, slot as usize % 16);
        for (side, strides, offset) in [
            (0, layout.k_strides(), layout.k_offset(1)),
            (1, layout.v_strides(), layout.v_offset(1)),
        ] {
            for head in 0..HEADS {
                let row = (block * layout.block_bytes() + offset) as usize
                    + (head * strides.head as usize + place * strides.token as usize) * size;
                for c in 0..DIM {
                    let at = row + c * size;
                    let i = (t * HEADS + head) * DIM + c;
                    let (want, turned) =
                        if side == 0 { (keys[i], rope.is_some()) } else { (v.get(i), false) };
                    let want = Buffer::of(format.dtype(), &[want]).get(0);
                    let got = element(&got[at..at + size]);
                    touched[at..at + size].fill(true);
                    // A rotation's last bits may fall on the other side of a rounding.
                    let step = match format {
                        KvFormat::F32 => 4e-6,
                        KvFormat::F16 => 2f32.powi(-10),
                        _ => 2f32.powi(-7),
                    };
                    let room = if turned { step * want.abs().max(1.0) } else { 0.0 };
                    assert!((got - want).abs() <= room, "{format:?} {t} {head} {c}: {got}, {want}");
                }
            }
        }
    }
    for (at, touched) in touched.iter().enumerate() {
        assert!(*touched || got[at] == 0x3c, "byte {at} was no row's");
    }
    // A slot past the blocks is skipped and reported.
    let tables = GroupTables { indptr: &[0, 0], indices: &[], slots: &[80] };
    let lens = BatchTables { q_indptr: &[0, 1], kv_lens: &[1] };
    batch.upload(backend, Stream::DEFAULT, &lens, [tables].into_iter()).unwrap();
    let row = Buffer::of(rows, &vec![1.0; HEADS * DIM]);
    store.append(0, &batch, 0, row.rows(), row.rows(), None).unwrap();
    assert!(matches!(store.sync(), Err(Error::BadBlock { .. })));
    assert_eq!(store.sync(), Ok(()));
}

#[test]
fn appended_rows_are_where_their_slots_say() {
    let halves = Rope::new(RopeStyle::Halves, 64, 10_000.0).unwrap();
    let pairs = Rope::new(RopeStyle::Interleaved, 32, 1e6).unwrap().from_channel(16).scaled(1.5);
    for backend in backends::all() {
        for format in FORMATS {
            for rows in [DType::F32, DType::F16, DType::Bf16] {
                for rope in [None, Some(halves), Some(pairs)] {
                    check_append(&backend, format, rows, rope);
                }
            }
        }
    }
}
