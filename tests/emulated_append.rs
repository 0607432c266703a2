//! The append kernel in the emulator, against a scatter and a rotation written out in f64.
#![cfg(feature = "emulate")]

mod device;

use device::{Rng, Values};
use kvcache::dtype::DType;
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::kernels::append_launch;
use kvcache::kernels::params::{AppendParams, In, Out};

#[derive(Debug, Clone, Copy)]
struct Case {
    rows: DType,
    cache: DType,
    tokens: usize,
    q_heads: usize,
    kv_heads: usize,
    k_dim: usize,
    v_dim: usize,
    block_tokens: usize,
    /// First channel, channels, interleaved.
    rope: Option<(usize, usize, bool)>,
    /// Heads before tokens in the cache.
    hnd: bool,
}

const BASE: Case = Case {
    rows: DType::F32,
    cache: DType::Bf16,
    tokens: 21,
    q_heads: 4,
    kv_heads: 2,
    k_dim: 64,
    v_dim: 64,
    block_tokens: 16,
    rope: None,
    hnd: true,
};

const BLOCKS: usize = 7;
const POSITIONS: usize = 50;

/// The row turned by the angles of `position`, as the paper has it.
fn turned(row: &[f64], rope: Option<(usize, usize, bool)>, position: usize) -> Vec<f64> {
    let mut out = row.to_vec();
    let Some((first, dim, interleaved)) = rope else { return out };
    for pair in 0..dim / 2 {
        let (a, b) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + dim / 2) };
        let (sin, cos) = angle(pair, dim, position).sin_cos();
        let (x, y) = (row[first + a], row[first + b]);
        out[first + a] = x * cos - y * sin;
        out[first + b] = x * sin + y * cos;
    }
    out
}

fn angle(pair: usize, dim: usize, position: usize) -> f64 {
    position as f64 * 10_000f64.powf(-2.0 * pair as f64 / dim as f64)
}

/// Runs the case; `spoil` may change slots and positions. Returns the error flag.
fn check(case: Case, schedule: Schedule, spoil: fn(&mut [i64], &mut [u32])) -> u32 {
    let Case { tokens, q_heads, kv_heads, k_dim, v_dim, block_tokens, .. } = case;
    let mut rng = Rng::new(tokens as u64 * 31 + k_dim as u64);
    let mut normal = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
    let k = Values::new(case.rows, &normal(tokens * kv_heads * k_dim));
    let v = Values::new(case.rows, &normal(tokens * kv_heads * v_dim));
    let q = Values::new(case.rows, &normal(tokens * q_heads * k_dim));
    let q_out = Values::new(case.rows, &vec![f32::NAN; tokens * q_heads * k_dim]);
    let cache_len = |dim: usize| BLOCKS * kv_heads * block_tokens * dim;
    let k_cache = Values::new(case.cache, &vec![f32::NAN; cache_len(k_dim)]);
    let v_cache = Values::new(case.cache, &vec![f32::NAN; cache_len(v_dim)]);
    // Distinct slots in a scattered order, every fifth token skipped.
    let slot_count = BLOCKS * block_tokens;
    let step = (1..slot_count).rev().find(|s| gcd(*s, slot_count) == 1).unwrap_or(1);
    let mut slots: Vec<i64> = (0..tokens)
        .map(|t| if t % 5 == 3 { -1 } else { ((t * step + 3) % slot_count) as i64 })
        .collect();
    let mut positions: Vec<u32> = (0..tokens).map(|t| (t * 7 % POSITIONS) as u32).collect();
    spoil(&mut slots, &mut positions);

    let (first, dim, interleaved) = case.rope.unwrap_or((0, 0, false));
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = (0..POSITIONS * dim / 2)
            .map(|i| f(angle(i % (dim / 2), dim, i / (dim / 2))) as f32)
            .collect();
        Buffer::of(&values).unwrap()
    };
    let (cosines, sines) = (table(f64::cos), table(f64::sin));
    let (slots_at, positions_at) = (Buffer::of(&slots).unwrap(), Buffer::of(&positions).unwrap());
    let flag = Buffer::of(&[0u32]).unwrap();
    let strides = |dim: usize| {
        let (d, bt, h) = (dim as i64, block_tokens as i64, kv_heads as i64);
        if case.hnd { (h * bt * d, bt * d, d) } else { (h * bt * d, d, h * d) }
    };
    let ((kb, kh, kt), (vb, vh, vt)) = (strides(k_dim), strides(v_dim));
    let mut params = AppendParams {
        k: In::at(k.address()),
        v: if v_dim == 0 { In::NULL } else { In::at(v.address()) },
        q: if q_heads == 0 { In::NULL } else { In::at(q.address()) },
        q_out: Out::at(q_out.address()),
        k_cache: Out::at(k_cache.address()),
        v_cache: Out::at(v_cache.address()),
        slots: In::at(slots_at.address()),
        positions: In::at(positions_at.address()),
        cosines: if dim == 0 { In::NULL } else { In::at(cosines.address()) },
        sines: In::at(sines.address()),
        error_flag: Out::at(flag.address()),
        k_token: (kv_heads * k_dim) as i64,
        k_head: k_dim as i64,
        v_token: (kv_heads * v_dim) as i64,
        v_head: v_dim as i64,
        q_token: (q_heads * k_dim) as i64,
        q_head: k_dim as i64,
        q_out_token: (q_heads * k_dim) as i64,
        q_out_head: k_dim as i64,
        k_cache_block: kb,
        k_cache_head: kh,
        k_cache_token: kt,
        v_cache_block: vb,
        v_cache_head: vh,
        v_cache_token: vt,
        tokens: tokens as u32,
        q_heads: q_heads as u32,
        kv_heads: kv_heads as u32,
        k_dim: k_dim as u32,
        v_dim: v_dim as u32,
        block_tokens: block_tokens as u32,
        num_blocks: BLOCKS as u32,
        rope_first: first as u32,
        rope_dim: dim as u32,
        rope_positions: POSITIONS as u32,
        rope_interleaved: u32::from(interleaved),
        row_dtype: case.rows.id(),
        cache_dtype: case.cache.id(),
        tokens_per_block: 0,
    };
    let plan = append_launch(&mut params).unwrap().unwrap();
    let options = Options { schedule, ..Options::default() };
    // SAFETY: every address is that of a buffer that lives to the end of this function.
    unsafe { launch(plan.kernel.name, plan.grid, plan.kernel.threads, 0, &params, options) }
        .unwrap();

    let mut want_k = vec![f64::NAN; cache_len(k_dim)];
    let mut want_v = vec![f64::NAN; cache_len(v_dim)];
    let mut want_q = vec![f64::NAN; tokens * q_heads * k_dim];
    for t in 0..tokens {
        let position = positions[t] as usize;
        if case.rope.is_some() && position >= POSITIONS {
            continue;
        }
        for h in 0..q_heads {
            let at = (t * q_heads + h) * k_dim;
            let row = turned(&q.values[at..at + k_dim], case.rope, position);
            want_q[at..at + k_dim].copy_from_slice(&row);
        }
        let Ok(slot) = usize::try_from(slots[t]) else { continue };
        if slot >= slot_count {
            continue;
        }
        for h in 0..kv_heads {
            let place = |(block, head, token): (i64, i64, i64)| {
                (slot / block_tokens) * block as usize
                    + h * head as usize
                    + slot % block_tokens * token as usize
            };
            let at = (t * kv_heads + h) * k_dim;
            let row = turned(&k.values[at..at + k_dim], case.rope, position);
            want_k[place((kb, kh, kt))..][..k_dim].copy_from_slice(&row);
            let at = (t * kv_heads + h) * v_dim;
            want_v[place((vb, vh, vt))..][..v_dim].copy_from_slice(&v.values[at..at + v_dim]);
        }
    }
    k_cache.must_be(&want_k, 1e-6, &format!("{case:?} {schedule:?} k"));
    v_cache.must_be(&want_v, 1e-6, &format!("{case:?} {schedule:?} v"));
    q_out.must_be(&want_q, 1e-6, &format!("{case:?} {schedule:?} q"));
    flag.read::<u32>()[0]
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn nothing(_: &mut [i64], _: &mut [u32]) {}

#[test]
fn every_pair_of_types() {
    for rows in [DType::F32, DType::F16, DType::Bf16] {
        for cache in [DType::F32, DType::F16, DType::Bf16] {
            for rope in [None, Some((0, 64, false))] {
                for schedule in Schedule::ALL {
                    assert_eq!(check(Case { rows, cache, rope, ..BASE }, schedule, nothing), 0);
                }
            }
        }
    }
}

#[test]
fn every_rotation() {
    for (k_dim, first, dim) in [
        (64, 0, 64),
        (64, 0, 32),
        (128, 0, 128),
        (64, 16, 48),
        (64, 0, 20),
        (576, 512, 64),
        (8, 0, 8),
    ] {
        for interleaved in [false, true] {
            let rope = Some((first, dim, interleaved));
            for (rows, cache) in
                [(DType::Bf16, DType::F32), (DType::Bf16, DType::Bf16), (DType::F16, DType::F16)]
            {
                let case = Case { k_dim, rope, rows, cache, ..BASE };
                assert_eq!(check(case, Schedule::Reverse, nothing), 0);
            }
        }
    }
}

#[test]
fn every_shape() {
    for (kv_heads, q_heads, k_dim, v_dim) in
        [(1, 0, 8, 8), (1, 1, 576, 0), (3, 0, 80, 40), (8, 32, 128, 128), (1, 7, 256, 64)]
    {
        for (block_tokens, hnd, tokens) in
            [(1, true, 5), (16, false, 21), (5, true, 33), (64, false, 1)]
        {
            let case = Case { kv_heads, q_heads, k_dim, v_dim, block_tokens, hnd, tokens, ..BASE };
            assert_eq!(check(case, Schedule::Seeded(3), nothing), 0);
        }
    }
}

/// 16-bit rows that nothing changes have a kernel of their own.
#[test]
fn rows_that_are_copied() {
    let past = |slots: &mut [i64], _: &mut [u32]| slots[3] = i64::MAX;
    for dtype in [DType::F16, DType::Bf16] {
        let copied = Case { rows: dtype, cache: dtype, q_heads: 0, ..BASE };
        for schedule in Schedule::ALL {
            assert_eq!(check(copied, schedule, nothing), 0);
            assert_eq!(check(copied, schedule, past), 1);
        }
        for (kv_heads, k_dim, v_dim, block_tokens, tokens) in [
            (1, 8, 8, 1, 5),
            (1, 576, 0, 16, 21),
            (3, 80, 40, 5, 33),
            (8, 128, 128, 16, 21),
            (40, 64, 64, 16, 9),
            (2, 1024, 8, 16, 7),
            // So many tokens that a token's threads have no half for its values.
            (1, 576, 64, 128, 600),
        ] {
            let case = Case { kv_heads, k_dim, v_dim, block_tokens, tokens, ..copied };
            assert_eq!(check(case, Schedule::Seeded(5), nothing), 0);
        }
    }
}

#[test]
fn bad_slots_and_positions_are_skipped_and_flagged() {
    let past = |slots: &mut [i64], _: &mut [u32]| {
        slots[2] = (BLOCKS * 16) as i64;
        slots[7] = i64::MAX;
        slots[8] = i64::MIN;
    };
    assert_eq!(check(BASE, Schedule::Forward, past), 1);
    let far = |_: &mut [i64], positions: &mut [u32]| {
        positions[0] = POSITIONS as u32;
        positions[4] = u32::MAX;
    };
    let rotated = Case { rope: Some((0, 64, false)), ..BASE };
    assert_eq!(check(rotated, Schedule::Forward, far), 2);
    // Without a rotation positions are not read.
    assert_eq!(check(BASE, Schedule::Forward, far), 0);
}
