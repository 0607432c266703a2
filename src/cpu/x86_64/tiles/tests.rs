//! Products of packed rows against sums of their codes, one by one.

use alloc::vec::Vec;
use core::arch::x86_64::*;

use super::ahead::Hints;
use super::rows::{
    MOST, Order, Rows, Weights, bytes as signed_bytes, bytes_unsigned, dots, lines, packed,
    packed_unsigned,
};
use super::softmax::thresholds;
use crate::cpu::CpuLevel;
use crate::cpu::prefetch::Prefetch;
use crate::cpu::sealed::{bytes, pattern};
use crate::cpu::vector::One;

fn next(state: &mut u64) -> u32 {
    *state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
    (*state >> 33) as u32
}

/// Sixteen rows of `COUNT` codes and four rows of whole-number weights, all random.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")]
unsafe fn check<const BITS: u32, const COUNT: usize, const WIDE: bool, const VALUES: bool>() {
    let mut state = u64::from(BITS) * 1000 + COUNT as u64;
    let words = if BITS == 3 { COUNT / 16 } else { COUNT * BITS as usize / 32 };
    let codes: Vec<u32> =
        (0..2 * 16 * words).map(|_| next(&mut state) << 16 ^ next(&mut state)).collect();
    let plane: Vec<u32> =
        (0..16 * words).map(|_| next(&mut state) << 16 ^ next(&mut state)).collect();
    let limit = match (WIDE, VALUES) {
        (false, false) => 127,
        (false, true) => 255,
        (true, false) => 32639,
        (true, true) => 65535,
    };
    let weights: Vec<Vec<i32>> = (0..4)
        .map(|row| {
            let mut weight = || match row {
                0 => limit,
                1 if !VALUES => -limit,
                _ if VALUES => (next(&mut state) % (limit as u32 + 1)) as i32,
                _ => (next(&mut state) % (2 * limit as u32 + 1)) as i32 - limit,
            };
            (0..COUNT).map(|_| weight()).collect()
        })
        .collect();
    // SAFETY: the level is available; rows and weights have these sizes.
    unsafe {
        let zero = _mm512_setzero_si512();
        let mut laid: Weights<4> = [[[zero; MOST]; 2]; 4];
        for (weights, laid) in weights.iter().zip(&mut laid) {
            let mut halves = [[zero; 4]; 2];
            for (i, part) in weights.chunks(64).enumerate() {
                let mut x = [zero; 4];
                for (x, part) in x.iter_mut().zip(part.chunks(16)) {
                    *x = _mm512_loadu_si512(part.as_ptr().cast());
                }
                [halves[0][i], halves[1][i]] = match (WIDE, VALUES) {
                    (false, false) => [signed_bytes(x), zero],
                    (false, true) => [bytes_unsigned(x), zero],
                    (true, false) => packed(x),
                    (true, true) => packed_unsigned(x),
                };
            }
            let order = Order::of(BITS, COUNT);
            order.lay_out(&halves[0], &mut laid[0]);
            order.lay_out(&halves[1], &mut laid[1]);
        }
        let rows = Rows { codes: codes.as_ptr().cast(), plane: plane.as_ptr().cast() };
        let prefetch = Prefetch::of_cpu();
        let hints = Hints { codes: rows.codes, then: rows.codes, far: rows.codes, prefetch };
        for group in 0..2 {
            let ahead = hints.group(group, 2, const { lines(BITS, COUNT) });
            let got = dots::<BITS, COUNT, WIDE, VALUES, 4>(&rows, group, &laid, ahead);
            for (r, weights) in weights.iter().enumerate() {
                let mut sums = [0i32; 16];
                _mm512_storeu_si512(sums.as_mut_ptr().cast(), got[r]);
                for (row, &sum) in sums.iter().enumerate() {
                    let first = (16 * group + row) * words;
                    let mut expected = 0;
                    for w in 0..words {
                        let third = if BITS == 3 { plane[(first + w) / 2] } else { 0 };
                        let parts = bytes::<One, BITS>(codes[first + w], third, w);
                        let count = 8 / if BITS == 3 { 2 } else { BITS as usize };
                        for byte in 0..4 * count {
                            // Of the sixteen codes that the pattern orders.
                            let at = w * count * 4 % 16 + byte;
                            let sixteen = w * count / 4 * 16;
                            let element = sixteen + usize::from(pattern(BITS)[at]);
                            let code = parts[byte / 4].to_le_bytes()[byte % 4];
                            let signed = VALUES && BITS == 8;
                            let code = if signed { i32::from(code as i8) } else { i32::from(code) };
                            expected += code * weights[element];
                        }
                    }
                    assert_eq!(sum, expected, "{BITS} bits, {COUNT}, row {row} of weights {r}");
                }
            }
        }
    }
}

#[test]
fn thresholds_are_spread_evenly() {
    for tokens in [32, 64, 128] {
        let mut all = thresholds(tokens)[..tokens].to_vec();
        // Any few neighbours have some of all sizes, so that their sum is about 0.
        for few in all.chunks(8) {
            assert!(few.iter().sum::<f32>().abs() < 0.5, "{few:?}");
        }
        all.sort_by(f32::total_cmp);
        for (at, threshold) in all.iter().enumerate() {
            assert_eq!(*threshold, (at as f32 + 0.5) / tokens as f32 - 0.5);
        }
    }
}

#[test]
fn products_are_exact() {
    if !CpuLevel::Avx512Bf16.is_available() {
        return;
    }
    macro_rules! keys {
        ($bits:literal, $wide:literal) => {
            check::<$bits, 64, $wide, false>();
            check::<$bits, 128, $wide, false>();
            check::<$bits, 256, $wide, false>();
        };
    }
    macro_rules! values {
        ($bits:literal, $wide:literal) => {
            check::<$bits, 32, $wide, true>();
            check::<$bits, 64, $wide, true>();
            check::<$bits, 128, $wide, true>();
        };
    }
    // SAFETY: the level is available.
    unsafe {
        keys!(8, true);
        keys!(4, false);
        keys!(3, false);
        keys!(2, false);
        values!(8, true);
        values!(4, false);
        values!(3, false);
        values!(2, false);
    }
}
