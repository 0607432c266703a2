//! Sealing in the emulator: the records of `quant`, bit for bit.
#![cfg(feature = "emulate")]

mod device;

use device::Rng;
use kvcache::dtype::{KvFormat, bf16};
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::kernels::params::{In, Out, SealParams};
use kvcache::kernels::{FIRST_SPARE, SPARE_TAKEN, seal_launch};
use kvcache::layout::tile::{TileLayout, TileShape};
use kvcache::quant::{Stored, Tile, seal};

const FORMATS: [KvFormat; 5] =
    [KvFormat::Kt8v8, KvFormat::Kt4v4, KvFormat::Kt3v3, KvFormat::Kt4v2, KvFormat::Kt2v2];
const HEADS: usize = 2;
const UNTOUCHED: u8 = 0xa5;

/// Rows of a tile of one of many kinds, rounded to bf16.
fn rows(kind: usize, tokens: usize, dim: usize, rng: &mut Rng) -> Vec<f32> {
    (0..tokens * dim)
        .map(|i| {
            let (token, channel) = (i / dim, i % dim);
            let x = rng.normal();
            let x = match kind {
                0 => x,
                1 => 0.0,
                2 => -1.75,
                // Channels far from 0 and others that do not move.
                3 if channel % 9 == 2 => 300.0 + x,
                3 if channel % 9 == 5 => -0.125,
                4 => x * [1e-20, 1.0, 1e4][token % 3],
                5 if token % 7 == 3 => 0.0,
                6 => x * 1e-7,
                7 if channel == 3 => x * 5000.0,
                8 => f32::from_bits(1) * x.signum(),
                // Steps of values past the range of the quick quotient, on both sides.
                9 => x * 2e4,
                10 => f32::from_bits((i as u32 % 5) << 16) * x.signum(),
                _ => x,
            };
            bf16::from_f32(x).to_f32()
        })
        .collect()
}

fn check(format: KvFormat, dim: usize, tokens: usize, schedule: Schedule, spoil: Option<f32>) {
    let shape =
        TileShape { k_dim: dim as u32, v_dim: dim as u32, v_in_k: false, tokens: tokens as u32 };
    let layout = TileLayout::new(format, shape).unwrap();
    let mut rng = Rng::new(11);
    let kinds = 11;
    // [slot][K, V][head][token][dim]
    let mut raw: Vec<f32> = Vec::new();
    for kind in 0..kinds {
        for side in 0..2 * HEADS {
            raw.extend(rows((kind + side * 2) % kinds, tokens, dim, &mut rng));
        }
    }
    let (side, slot) = (HEADS * tokens * dim, 2 * HEADS * tokens * dim);
    if let Some(bad) = spoil {
        // A key of slot 2, head 1; a value of slot 5, head 0.
        raw[2 * slot + tokens * dim + 77] = bad;
        raw[5 * slot + side + 3 * dim + 1] = bad;
    }
    let blocks = kinds + 2;
    let list: Vec<(usize, usize)> =
        (0..kinds).map(|slot| (slot, (slot * 4 + 1) % blocks)).collect();
    let bytes = layout.bytes();
    let mut want = vec![UNTOUCHED; blocks * HEADS * bytes];
    let mut refused = vec![0u32; kinds];
    for (i, &(from, block)) in list.iter().enumerate() {
        for head in 0..HEADS {
            let at = from * slot + head * tokens * dim;
            let record = &mut want[(block * HEADS + head) * bytes..][..bytes];
            let (k, v) = (&raw[at..at + tokens * dim], &raw[at + side..at + side + tokens * dim]);
            match seal(&layout, k, v, record).unwrap() {
                Stored::Encoded => {}
                Stored::Raw(_) => refused[i] = 1,
            }
        }
    }
    assert_eq!(refused.iter().sum::<u32>(), if spoil.is_some() { 2 } else { 0 });

    let halves: Vec<bf16> = raw.iter().map(|&x| bf16::from_f32(x)).collect();
    // The first slots are staged, and one more is spare; the others are in scratch.
    let staged = 4;
    let (staging, scratch) = halves.split_at(staged * slot);
    let kept = vec![bf16::from_f32(f32::NEG_INFINITY); slot];
    let staging = Buffer::of(&[staging, &kept].concat()).unwrap();
    let scratch = Buffer::of(scratch).unwrap();
    // Of the tiles that cannot be sealed the second is in scratch.
    if let Some(word) = refused[staged..].iter_mut().find(|word| **word != 0) {
        *word = SPARE_TAKEN | FIRST_SPARE;
    }
    let (spares, taken) = (Buffer::of(&[staged as i32]).unwrap(), Buffer::of(&[0u32]).unwrap());
    let records = Buffer::of(&vec![UNTOUCHED; want.len()]).unwrap();
    let id = |slot: usize| (slot + usize::from(slot >= staged)) as i32;
    let pairs: Vec<i32> = list.iter().flat_map(|&(slot, block)| [id(slot), block as i32]).collect();
    let (pairs, flag) = (Buffer::of(&pairs).unwrap(), Buffer::of(&[0u32]).unwrap());
    let answers = Buffer::of(&vec![0u32; kinds]).unwrap();
    let (block, head, token) = (slot as i64, (tokens * dim) as i64, dim as i64);
    let v_at = |buffer: &Buffer| buffer.address() + 2 * side as u64;
    let mut params = SealParams {
        k: Out::at(staging.address()),
        v: Out::at(v_at(&staging)),
        scratch_k: In::at(scratch.address()),
        scratch_v: In::at(v_at(&scratch)),
        records: Out::at(records.address()),
        list: In::at(pairs.address()),
        refused: Out::at(answers.address()),
        error_flag: Out::at(flag.address()),
        k_block: block,
        k_head: head,
        k_token: token,
        v_block: block,
        v_head: head,
        v_token: token,
        scratch_k_block: block,
        scratch_k_head: head,
        scratch_k_token: token,
        scratch_v_block: block,
        scratch_v_head: head,
        scratch_v_token: token,
        record_block: (HEADS * bytes) as i64,
        record_head: bytes as i64,
        staging_blocks: staged as u32 + 1,
        spares: In::at(spares.address()),
        spares_taken: Out::at(taken.address()),
        spare_count: 1,
        scratch_blocks: (kinds - staged) as u32,
        num_blocks: blocks as u32,
        kv_heads: HEADS as u32,
        ..SealParams::default()
    };
    let plan = seal_launch(&layout, kinds as u32, &mut params).unwrap().unwrap();
    let options = Options { schedule, ..Options::default() };
    // SAFETY: every address is that of a buffer that lives to the end of this function.
    unsafe {
        let (kernel, shared) = (plan.kernel, plan.shared_bytes);
        launch(kernel.name, plan.grid, kernel.threads, shared, &params, options).unwrap();
    }
    assert_eq!(answers.read::<u32>(), refused, "{format:?}");
    assert_eq!(flag.read::<u32>()[0], 0);
    // Of a tile in scratch the rows of the head that cannot be sealed are kept, and no others.
    let spare = &staging.read::<bf16>()[staged * slot..];
    let mut want_kept = kept.clone();
    if spoil.is_some() {
        for at in [0, side] {
            let rows = at..at + tokens * dim;
            want_kept[rows.clone()].copy_from_slice(&halves[5 * slot..6 * slot][rows]);
        }
    }
    let same = |(a, b): (&bf16, &bf16)| a.to_bits() == b.to_bits();
    assert!(spare.iter().zip(&want_kept).all(same), "{format:?}: the spare slot");
    let got = records.read::<u8>();
    for (i, (got, want)) in got.chunks_exact(bytes).zip(want.chunks_exact(bytes)).enumerate() {
        let what = format!("{format:?} d{dim} of {tokens}, block {} head {}", i / HEADS, i % HEADS);
        let written = list.iter().any(|&(_, block)| block == i / HEADS);
        if written && want[0] == UNTOUCHED && want.iter().all(|&b| b == UNTOUCHED) {
            assert!(Tile::open(&layout, got).is_err(), "{what}: refused, and yet a record");
            continue;
        }
        for (at, (got, want)) in got.iter().zip(want).enumerate() {
            assert_eq!(got, want, "{what}, byte {at} of {layout:?}");
        }
    }
}

#[test]
fn records_have_the_bits_of_the_reference() {
    for format in FORMATS {
        for (dim, tokens) in [(64, 32), (64, 64), (128, 64), (64, 128)] {
            check(format, dim, tokens, Schedule::Forward, None);
        }
    }
    // The most shared memory.
    check(KvFormat::Kt8v8, 128, 128, Schedule::Forward, None);
}

#[test]
fn under_every_schedule_and_with_rows_that_cannot_be_sealed() {
    for format in FORMATS {
        for schedule in Schedule::ALL {
            check(format, 64, 64, schedule, Some(f32::NAN));
        }
        check(format, 128, 64, Schedule::Forward, Some(f32::INFINITY));
    }
}
