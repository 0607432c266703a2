//! Dequantisation on a device, in registers, against `quant`: every code of every format.
#![cfg(feature = "emulate")]

#[path = "device/probe.rs"]
mod probe;

use half::f16;
use kvcache::emu::Options;
use kvcache::quant::{e2m1_to_f32, e4m3_to_f32, e5m2_to_f32};
use probe::run;

/// What the device makes of words: two values a pair, `pairs` pairs a word.
fn device(mode: u32, input: &[u32], words: usize, pairs: usize) -> Vec<f32> {
    let room = vec![0; words * pairs + 1];
    let options = Options::default();
    let out = run("kvc_probe_quant", 1, 32, 0, input, &room, (mode, words as u32), options);
    let mut out = out.unwrap();
    let factor = f32::from_bits(out.pop().unwrap());
    let half = |bits: u32| f16::from_bits(bits as u16).to_f32() * factor;
    out.into_iter().flat_map(|pair| [half(pair), half(pair >> 16)]).collect()
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// All bytes, each in every place of a word.
fn bytes() -> Vec<u8> {
    (0..4).flat_map(|turn| (0..=255u8).map(move |b| b.rotate_left(2 * turn) ^ turn as u8)).collect()
}

fn same(got: f32, want: f32, what: &str) {
    assert!(got == want || (got.is_nan() && want.is_nan()), "{what}: {got}, not {want}");
}

#[test]
fn every_byte() {
    type Decode = fn(u8) -> f32;
    // By its bits a NaN of e4m3 is 480, which no encoder here writes.
    let e4m3: Decode =
        |b| if b & 0x7f == 0x7f { 480f32.copysign(b as i8 as f32) } else { e4m3_to_f32(b) };
    let int8: Decode = |b| f32::from(b as i8);
    let plain: [(u32, Decode); 6] =
        [(0, e4m3), (1, e4m3), (2, e5m2_to_f32), (3, int8), (8, |b| f32::from(b)), (14, int8)];
    let codes = bytes();
    for (mode, decode) in plain {
        let got = device(mode, &words(&codes), codes.len() / 4, 2);
        for (at, (&code, &got)) in codes.iter().zip(&got).enumerate() {
            same(got, decode(code), &format!("mode {mode}, byte {at}"));
        }
    }
    // Two rows of two channels a word: pairs are of a channel.
    let rows: [(u32, Decode); 4] = [(9, e4m3), (10, e5m2_to_f32), (11, int8), (12, e4m3)];
    for (mode, decode) in rows {
        let got = device(mode, &words(&codes), codes.len() / 4, 2);
        for (word, (codes, got)) in codes.chunks_exact(4).zip(got.chunks_exact(4)).enumerate() {
            for (got, code) in got.iter().zip([0, 2, 1, 3]) {
                same(*got, decode(codes[code]), &format!("mode {mode}, word {word}"));
            }
        }
    }
}

/// Quotients are those of a division to the last bit, where codes tell: also next to whole numbers of the
/// divisor, and for divisors next to powers of two.
#[test]
fn quotients() {
    let mut state = 7u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    const COUNT: usize = 200_000;
    // Modes of divisors of 19 bits at most and of any; the exponents of theirs.
    for (mode, kept, exponents) in [(15, 0xffff_ffe0, 103..152), (16, u32::MAX, 88..139)] {
        let mut pairs = Vec::with_capacity(2 * COUNT);
        for _ in 0..COUNT {
            let (r, s) = (next(), next());
            let mantissa = match r >> 60 {
                0 => (r & 7) as u32,
                1 => 0x7f_ffff - (r & 7) as u32,
                _ => r as u32 & 0x7f_ffff,
            };
            let exponent = exponents.start + (r >> 32) as u32 % (exponents.end - exponents.start);
            let by = f32::from_bits((exponent << 23 | mantissa) & kept);
            let x = match s >> 62 {
                // A few last places from a multiple.
                0 | 1 => {
                    let near = ((s >> 40) % 255 + 1) as f32 * by;
                    f32::from_bits(near.to_bits().saturating_add_signed((s & 7) as i32 - 3))
                }
                2 => f32::from_bits(
                    (exponent - 6 + (s >> 40) as u32 % 16) << 23 | s as u32 & 0x7f_ffff,
                ),
                // As small as a rotated row of bf16 can have.
                _ => f32::from_bits(((s >> 40) as u32).max(1 << 12)),
            };
            let x = if s >> 32 & 1 == 0 { x } else { -x };
            pairs.extend([x.to_bits(), by.to_bits()]);
        }
        let options = Options::default();
        let room = vec![0; COUNT];
        let got =
            run("kvc_probe_quant", 1, 32, 0, &pairs, &room, (mode, COUNT as u32), options).unwrap();
        for (pair, got) in pairs.chunks_exact(2).zip(got) {
            let (x, by, got) =
                (f32::from_bits(pair[0]), f32::from_bits(pair[1]), f32::from_bits(got));
            let want = x / by;
            let what = format!("{x:e} / {by:e}: {got:e}, not {want:e}");
            if x.abs() > 2f32.powi(-100) && want.abs() > 2f32.powi(-100) {
                assert!(got == want, "{what}");
            } else if mode == 16 {
                assert!(got.floor() == want.floor(), "{what}");
            } else {
                assert!(got.round_ties_even() == want.round_ties_even(), "{what}");
            }
        }
    }
}

#[test]
fn every_nibble() {
    // Each nibble in each place, its neighbours different.
    let input: Vec<u32> =
        (0..16u32).map(|n| (0..8).map(|i| ((n + 5 * i) % 16) << (4 * i)).sum()).collect();
    let nibble = |word: u32, n: usize| (word >> (4 * n) & 15) as u8;
    let (ints, floats) = (device(4, &input, 16, 4), device(5, &input, 16, 4));
    assert_eq!(ints, device(13, &input, 16, 4));
    for (w, &word) in input.iter().enumerate() {
        for i in 0..4 {
            for e in 0..2 {
                // Nibbles i and i + 4: neighbouring elements of INT4 and KT, elements of NVFP4.
                let at = 8 * w + 2 * i + e;
                same(ints[at], f32::from(nibble(word, i + 4 * e)), "u4");
                same(floats[at], e2m1_to_f32(nibble(word, i + 4 * e)), "e2m1");
            }
        }
    }
}

#[test]
fn every_code_of_two_and_three_bits() {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state ^ state >> 13
    };
    let input: Vec<u32> = (0..96).map(|_| next()).collect();
    let two = |word: u32, at: usize| word >> (2 * at) & 3;
    let got = device(6, &input, 96, 8);
    for (w, &word) in input.iter().enumerate() {
        for i in 0..8 {
            for e in 0..2 {
                same(got[16 * w + 2 * i + e], two(word, i + 8 * e) as f32, "u2");
            }
        }
    }
    let got = device(7, &input, 64, 8);
    for w in 0..64 {
        let (word, plane) = (input[w / 2 * 3 + w % 2], input[w / 2 * 3 + 2]);
        for i in 0..8 {
            for e in 0..2 {
                // Bits of elements 0..8, 16..24, 8..16, 24..32.
                let third = plane >> (8 * (w % 2) + i + 16 * e) & 1;
                let want = two(word, i + 8 * e) | third << 2;
                same(got[16 * w + 2 * i + e], want as f32, "u3");
            }
        }
    }
}
