//! Sealing against the reference to the bit, at every level.

use alloc::{vec, vec::Vec};

use core::sync::atomic::AtomicU32;

use super::*;
use crate::attention::HeadShape;
use crate::cpu::{
    AppendArgs, CpuLevel, Executor, KvView, Rope, RopeStyle, RowsView, Serial, append_at,
};
use crate::dtype::{DType, FormatClass, KvFormat, bf16};
use crate::layout::tile::{TILE_TOKENS, TileLayout, TileShape};
use crate::layout::{GroupLayout, GroupSpec};
use crate::quant::{self, Stored, Tile};

/// SplitMix64 to about normal values.
fn normal(state: &mut u64) -> f32 {
    (0..4)
        .map(|_| {
            *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut x = *state;
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((x ^ (x >> 31)) >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        })
        .sum::<f32>()
        * 1.7
}

fn rows(count: usize, dim: usize, scale: impl Fn(usize) -> f32, seed: u64) -> Vec<bf16> {
    let mut state = seed;
    (0..count * dim).map(|i| bf16::from_f32(normal(&mut state) * scale(i % dim))).collect()
}

fn wide(rows: &[bf16]) -> Vec<f32> {
    rows.iter().map(|x| x.to_f32()).collect()
}

/// Seals at a level; whether it could be, and the record.
fn seal_at(level: CpuLevel, layout: &TileLayout, k: &[bf16], v: &[bf16]) -> (bool, Vec<u8>) {
    let mut memory: Vec<u128> = vec![u128::MAX; layout.bytes() / 16 + 1];
    let record = memory.as_mut_ptr().cast::<u8>();
    let rows = |of: &[bf16], dim: u32| seal::HeadRows {
        start: of.as_ptr().cast(),
        bytes: 2 * dim as isize,
    };
    let job = SealJob {
        layout,
        k: rows(k, layout.shape().k_dim),
        v: rows(v, layout.shape().v_dim),
        record,
        ahead: [rows(v, 0), rows(k, 0)],
    };
    // SAFETY: the level is available, the rows and the record have the layout's sizes.
    let (sealed, bytes) = unsafe {
        let sealed = (SealedKernels::of(level).seal)(&job);
        (sealed, core::slice::from_raw_parts(record, layout.bytes() + 16).to_vec())
    };
    assert!(bytes[layout.bytes()..].iter().all(|&b| b == 0xff), "written past the record");
    (sealed, bytes[..layout.bytes()].to_vec())
}

fn check(layout: &TileLayout, k: &[bf16], v: &[bf16], what: &str) {
    let mut expected = vec![0xff; layout.bytes()];
    let v: &[bf16] = if layout.shape().v_in_k { &[] } else { v };
    let stored = quant::seal(layout, &wide(k), &wide(v), &mut expected).unwrap();
    for level in CpuLevel::available() {
        let (sealed, record) = seal_at(level, layout, k, v);
        assert_eq!(sealed, stored == Stored::Encoded, "{level:?} {layout:?} {what}");
        if sealed {
            assert!(record == expected, "{level:?} {layout:?} {what}");
            Tile::open(layout, &record).unwrap();
        } else {
            assert!(Tile::open(layout, &record).is_err(), "{level:?} {layout:?} {what}");
        }
    }
}

fn formats() -> impl Iterator<Item = KvFormat> {
    KvFormat::ALL.iter().copied().filter(|format| format.class() == FormatClass::Tile)
}

#[test]
fn records_have_the_bits_of_the_reference() {
    let dims = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (16, 48)];
    for format in formats() {
        for (k_dim, v_dim) in dims {
            for tokens in TILE_TOKENS {
                if cfg!(miri) && (k_dim != 80 || tokens != 32) {
                    continue;
                }
                let shape = TileShape { k_dim, v_dim, v_in_k: false, tokens };
                let layout = TileLayout::new(format, shape).unwrap();
                let scale = |c: usize| if c % 7 == 3 { 30.0 } else { 1.0 + c as f32 / 50.0 };
                let k = rows(tokens as usize, k_dim as usize, scale, 1);
                let v = rows(tokens as usize, v_dim as usize, |c| 1.0 + (c % 5) as f32, 2);
                check(&layout, &k, &v, "random");
            }
        }
        let shape = TileShape { k_dim: 576, v_dim: 512, v_in_k: true, tokens: 64 };
        let layout = TileLayout::new(format, shape).unwrap();
        check(&layout, &rows(64, 576, |c| if c < 512 { 1.0 } else { 9.0 }, 3), &[], "latent");
    }
}

#[test]
fn odd_rows_seal_as_in_the_reference_or_not_at_all() {
    for format in formats().skip(if cfg!(miri) { 4 } else { 0 }) {
        let shape = TileShape { k_dim: 64, v_dim: 32, v_in_k: false, tokens: 32 };
        let layout = TileLayout::new(format, shape).unwrap();
        let k = rows(32, 64, |_| 1.0, 4);
        let v = rows(32, 32, |_| 1.0, 5);
        for (what, x) in [
            ("zero", 0.0),
            ("negative zero", -0.0),
            ("one", 1.0),
            ("denormal", 1e-40),
            ("tiny", 2e-23),
            ("large", 60_000.0),
            ("past f16", 1e10),
            ("past a sum of squares", 3e38),
            ("infinite", f32::INFINITY),
            ("negative infinite", f32::NEG_INFINITY),
            ("not a number", f32::NAN),
        ] {
            let x = bf16::from_f32(x);
            check(&layout, &vec![x; k.len()], &v, what);
            check(&layout, &k, &vec![x; v.len()], what);
            check(&layout, &vec![x; k.len()], &vec![x; v.len()], what);
            for at in [0, 17, 31 * 32 + 31].into_iter().skip(if cfg!(miri) { 2 } else { 0 }) {
                let (mut one_k, mut one_v) = (k.clone(), v.clone());
                one_k[at] = x;
                check(&layout, &one_k, &v, what);
                one_v[at] = x;
                check(&layout, &k, &one_v, what);
            }
        }
        // A channel and a row of one value among others.
        let (mut flat_k, mut flat_v) = (k.clone(), v.clone());
        for token in 0..32 {
            flat_k[token * 64 + 5] = bf16::from_f32(700.0);
        }
        flat_v[64..96].fill(bf16::from_f32(0.25));
        check(&layout, &flat_k, &flat_v, "flat");
    }
}

#[cfg(feature = "std")]
#[test]
fn records_that_come_from_outside_are_checked() {
    use crate::ids::BlockId;

    let spec = |format| GroupSpec::uniform(2, 2, 32, format);
    let store = |format| {
        let layout = GroupLayout::new(spec(format), 32).unwrap();
        TileStore::new(layout, 2, 1).unwrap()
    };
    let mut tiles = store(KvFormat::Kt4v4);
    let mut raw = RawRows { staging: (0..32).collect(), ..RawRows::default() };
    raw.scratch = vec![-1; 32];
    raw.seals.push(SealTile { slot: 0, block: 1 });
    raw.own.push(0..32);
    raw.refused.push(Default::default());
    let values: Vec<f32> = wide(&rows(32 * 2, 32, |_| 1.0, 8));
    for layer in 0..2 {
        tiles.append(layer, &raw, values[..].into(), values[..].into(), None, &Serial).unwrap();
    }
    let mut block = vec![0; tiles.layout().block_bytes() as usize];
    tiles.read_block(BlockId(1), &mut block).unwrap();
    tiles.write_block(BlockId(0), &block).unwrap();
    assert!(store(KvFormat::Kt2v2).write_block(BlockId(0), &block).is_err());
    assert!(tiles.write_block(BlockId(0), &block[16..]).is_err());
    assert!(tiles.write_block(BlockId(2), &block).is_err());
    for bit in (0..8 * block.len()).step_by(if cfg!(miri) { 4001 } else { 37 }) {
        block[bit / 8] ^= 1 << (bit % 8);
        assert!(tiles.write_block(BlockId(0), &block).is_err(), "bit {bit}");
        block[bit / 8] ^= 1 << (bit % 8);
    }
    // Blocks that were never sealed are no records.
    let empty = vec![0; block.len()];
    assert!(tiles.write_block(BlockId(0), &empty).is_err());
}

/// Runs units in order, and says that it has many workers.
#[derive(Debug)]
struct Many;

// SAFETY: as of `Serial`.
unsafe impl Executor for Many {
    fn workers(&self) -> usize {
        64
    }

    fn run(&self, units: usize, unit: &(dyn Fn(usize, usize) + Sync)) {
        Serial.run(units, unit);
    }
}

#[test]
fn rows_and_the_tiles_that_they_fill_are_the_same_in_one_call_and_in_two() {
    const TOKENS: usize = 32;
    let shape = HeadShape { q_heads: 2, kv_heads: 2, k_dim: 64, v_dim: 64, v_in_k: false };
    let tile = TileShape { k_dim: 64, v_dim: 64, v_in_k: false, tokens: TOKENS as u32 };
    let layout = TileLayout::new(KvFormat::Kt4v2, tile).unwrap();
    let spec = GroupSpec::uniform(1, 2, 64, KvFormat::Bf16);
    let group = GroupLayout::new(spec, TOKENS as u32).unwrap();
    // The end of a tile in slot 1, three tiles in scratch, a row that is skipped, a tile that stays
    // open in slot 0, and one in slot 2 that was full before.
    let places = [(1, 20..32, false), (0, 0..32, true), (2, 0..32, true), (1, 0..32, true)];
    let (mut staging, mut scratch, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for (slot, tokens, in_scratch) in places {
        let first = staging.len() as u32;
        for token in tokens {
            let at = (slot * TOKENS + token) as i64;
            staging.push(if in_scratch { -1 } else { at });
            scratch.push(if in_scratch { at } else { -1 });
        }
        own.push(first..staging.len() as u32);
    }
    staging.extend(core::iter::once(-1).chain(0..40 - 31));
    scratch.resize(staging.len(), -1);
    own.push(own[3].end..own[3].end);
    let list =
        [(1, 0), (3, 3), (5, 1), (4, 4), (2, 2)].map(|(slot, block)| SealTile { slot, block });
    let count = staging.len();
    let k = rows(count * 2, 64, |c| 1.0 + c as f32, 11);
    let mut v = rows(count * 2, 64, |_| 1.0, 12);
    v[70 * 128 + 3] = bf16::INFINITY;
    let positions: Vec<u32> = (100..100 + count as u32).collect();
    let rope = Rope::new(RopeStyle::Halves, 64, 10_000.0).unwrap();

    let block_bytes = 2 * layout.bytes();
    let run = |executor: &dyn Executor, one_call: bool, rope: Option<&Rope>, own: &[_]| {
        let mut raw = rows(6 * 4 * TOKENS, 64, |_| 1.0, 13);
        let mut records = vec![0u128; 5 * block_bytes / 16];
        let raw_rows = raw.as_mut_ptr();
        let view = |raw: *mut bf16| KvView::native(&group, raw.cast(), 3, 0).unwrap();
        let refused: Vec<_> = list.iter().map(|_| AtomicU32::new(0)).collect();
        let tiles = TileView {
            layout: &layout,
            records: records.as_mut_ptr().cast(),
            block_bytes: block_bytes as i64,
            head_bytes: layout.bytes() as i64,
            num_blocks: 5,
            staging: view(raw_rows),
            scratch: view(raw_rows.wrapping_add(3 * 4 * TOKENS * 64)),
        };
        let seals = SealArgs { shape, tiles, list: &list, refused: &refused };
        let [k, v] = [&k, &v]
            .map(|x| RowsView::contiguous(x.as_ptr().cast_mut().cast(), DType::Bf16, 2, 64));
        let rope = rope.map(|rope| (rope, positions.as_ptr()));
        let level = CpuLevel::detected();
        // SAFETY: the buffers have these sizes, and nobody else uses them.
        let done = unsafe {
            if one_call {
                let (staging, scratch, rows) = (staging.as_ptr(), scratch.as_ptr(), count as u32);
                let args = TileAppendArgs { seals, own, staging, scratch, rows, k, v, rope };
                append_tiles(&args, level, executor)
            } else {
                for (kv, slots) in [(tiles.staging, &staging), (tiles.scratch, &scratch)] {
                    let slots = slots.as_ptr();
                    let args = AppendArgs { shape, kv, slots, rows: count as u32, k, v, rope };
                    append_at(&args, level, executor).unwrap();
                }
                seal_tiles(&seals, level, executor)
            }
        };
        let refused: Vec<u32> = refused.into_iter().map(AtomicU32::into_inner).collect();
        (done, raw, records, refused)
    };
    for rope in [None, Some(&rope)] {
        let expected = run(&Serial, false, rope, &own);
        assert_eq!(expected.3, [0, 0, 1, 0, 0]);
        assert!(expected == run(&Serial, true, rope, &own), "a tile at a time");
        assert!(expected == run(&Many, true, rope, &own), "heads over workers");
    }
    // What is no partition of the rows is refused before anything is written.
    let untouched = run(&Serial, true, None, &own[1..]);
    for (at, start, end) in [(1, 30, 20), (1, 5, 13), (4, 110, count as u32 + 1)] {
        let mut own = own.clone();
        own[at] = start..end;
        let answer = run(&Serial, true, None, &own);
        assert!(answer.0.is_err());
        assert!((answer.1, answer.2) == (untouched.1.clone(), untouched.2.clone()), "nothing");
    }
}
