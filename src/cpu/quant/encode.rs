//! Rows to codes, with the bits of `RowCodec::encode` at every level.
//!
//! Every step is one correctly rounded operation an element, and minima and maxima do not depend on
//! their order; so vectors give what the reference gives, and the shape of the loops is free.

use super::decode::rotate_parts;
use super::vector::CodeVector;
use crate::dtype::{KvFormat, f16};
use crate::quant::{RowCodec, Stored, f16_down, f16_up};

/// Encodes a row, whose channels are used up on the way; whether it can be. What cannot be changes
/// nothing.
///
/// # Safety
/// As for [`Vector`](crate::cpu::vector::Vector); the slices must have the codec's lengths.
#[inline(always)]
pub(in crate::cpu) unsafe fn encode<V: CodeVector>(
    codec: &RowCodec,
    row: &mut [f32],
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    if !matches!(
        codec.format(),
        KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 | KvFormat::Int8T | KvFormat::Int4T
    ) {
        // Two attempts at each block of NVFP4: the reference does it.
        return codec.encode(row, codes, scales) == Ok(Stored::Encoded);
    }
    let (dim, first) = (row.len(), codec.first());
    // SAFETY: the caller's promise; rows and parts are whole vectors.
    unsafe {
        if !finite::<V>(row) {
            return false;
        }
        if codec.is_rotated() {
            rotate_parts::<V>(row.as_mut_ptr(), first, dim);
            if !finite::<V>(row) {
                return false;
            }
        }
        let (codes, padding) = codes.split_at_mut(match codec.format() {
            KvFormat::Int4T => dim / 2,
            _ => dim,
        });
        let (head, tail) = row.split_at_mut(first);
        match codec.format() {
            KvFormat::Fp8E4m3 => float8(row, codec.scale(), codes, e4m3),
            KvFormat::Fp8E5m2 => float8(row, codec.scale(), codes, e5m2),
            KvFormat::Int8T => {
                let Some(a) = symmetric::<V>(head) else { return false };
                let Some(b) = symmetric::<V>(tail) else { return false };
                let (low, high) = codes.split_at_mut(first);
                round8::<V>(head, a.to_f32(), low);
                put(scales, 0, a);
                if !tail.is_empty() {
                    round8::<V>(tail, b.to_f32(), high);
                    put(scales, 2, b);
                }
            }
            _ => {
                let Some(a) = affine::<V>(head) else { return false };
                let b = if tail.is_empty() { Some(a) } else { affine::<V>(tail) };
                let Some(b) = b else { return false };
                let (low, high) = codes.split_at_mut(first / 2);
                round4::<V>(head, a, low);
                put(scales, 0, a.0);
                put(scales, 2, a.1);
                if !tail.is_empty() {
                    round4::<V>(tail, b, high);
                    put(scales, 4, b.0);
                    put(scales, 6, b.1);
                }
            }
        }
        padding.fill(0);
    }
    true
}

#[inline(always)]
fn put(scales: &mut [u8], at: usize, value: f16) {
    scales[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Whether no element is NaN or infinite: those times 0 are NaN.
#[inline(always)]
unsafe fn finite<V: CodeVector>(row: &[f32]) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = V::splat(0.0);
        for c in (0..row.len()).step_by(V::LANES) {
            sum = V::load(row.as_ptr().add(c)).fma(V::splat(0.0), sum);
        }
        sum.sum() == 0.0
    }
}

/// The scale of a symmetric part.
#[inline(always)]
unsafe fn symmetric<V: CodeVector>(part: &[f32]) -> Option<f16> {
    // SAFETY: the caller's promise.
    unsafe {
        let mut top = V::splat(0.0);
        for c in (0..part.len()).step_by(V::LANES) {
            let x = V::load(part.as_ptr().add(c));
            top = top.max(x).max(V::splat(0.0).sub(x));
        }
        f16_up(top.top() / 127.0)
    }
}

/// Scale and minimum of an asymmetric part.
#[inline(always)]
unsafe fn affine<V: CodeVector>(part: &[f32]) -> Option<(f16, f16)> {
    // SAFETY: the caller's promise.
    unsafe {
        // The largest of the negated elements is the smallest element, negated.
        let (mut high, mut low) = (V::splat(f32::NEG_INFINITY), V::splat(f32::NEG_INFINITY));
        for c in (0..part.len()).step_by(V::LANES) {
            let x = V::load(part.as_ptr().add(c));
            high = high.max(x);
            low = low.max(V::splat(0.0).sub(x));
        }
        let m = f16_down(0.0 - low.top())?;
        Some((f16_up((high.top() - m.to_f32()) / 15.0 + 0.0)?, m))
    }
}

/// Symmetric codes.
#[inline(always)]
unsafe fn round8<V: CodeVector>(part: &mut [f32], s: f32, codes: &mut [u8]) {
    if s == 0.0 {
        return codes.fill(0);
    }
    // SAFETY: the caller's promise; what is rounded and clamped fits an integer.
    unsafe {
        for c in (0..part.len()).step_by(V::LANES) {
            let x = part.as_mut_ptr().add(c);
            let code = V::load(x).div(V::splat(s)).round();
            code.max(V::splat(-127.0)).min(V::splat(127.0)).store(x);
        }
        for (code, x) in codes.iter_mut().zip(&*part) {
            *code = x.to_int_unchecked::<i32>() as u8;
        }
    }
}

/// Asymmetric codes, packed.
#[inline(always)]
unsafe fn round4<V: CodeVector>(part: &mut [f32], (s, m): (f16, f16), codes: &mut [u8]) {
    let (s, m) = (s.to_f32(), m.to_f32());
    if s == 0.0 {
        return codes.fill(0);
    }
    // SAFETY: as in `round8`.
    unsafe {
        for c in (0..part.len()).step_by(V::LANES) {
            let x = part.as_mut_ptr().add(c);
            let code = V::load(x).sub(V::splat(m)).div(V::splat(s)).round();
            code.max(V::splat(0.0)).min(V::splat(15.0)).store(x);
        }
        for (word, part) in codes.chunks_exact_mut(4).zip(part.chunks_exact(8)) {
            let mut bytes = [0; 8];
            for (byte, x) in bytes.iter_mut().zip(part) {
                *byte = x.to_int_unchecked::<i32>() as u8;
            }
            // A byte and the one two places on, a nibble each: channels 0 and 2, 1 and 3, ...
            let pairs = u64::from_le_bytes(bytes);
            let pairs = (pairs | pairs >> 12).to_le_bytes();
            word.copy_from_slice(&[pairs[0], pairs[4], pairs[1], pairs[5]]);
        }
    }
}

#[inline(always)]
fn float8(row: &[f32], scale: f32, codes: &mut [u8], encode: impl Fn(f32) -> u32) {
    for (code, x) in codes.iter_mut().zip(row) {
        *code = encode(x / scale) as u8;
    }
}

/// Saturating E4M3 of what is not NaN, without a branch.
#[inline(always)]
fn e4m3(x: f32) -> u32 {
    // Subnormals count in units of 2^-9, the last place of 2^14.
    small_float(x, 448.0, 20, 120 << 3, 16384.0, 1.0 / 64.0)
}

/// Saturating E5M2 of what is not NaN, without a branch.
#[inline(always)]
fn e5m2(x: f32) -> u32 {
    small_float(x, 57344.0, 21, 112 << 2, 128.0, 1.0 / 16384.0)
}

/// The code of a float whose mantissa is `cut` bits shorter than that of f32 and whose exponents are
/// `bias` units of the code lower; `unit` has the last place of its subnormals, which are below
/// `normal`.
#[inline(always)]
fn small_float(x: f32, largest: f32, cut: u32, bias: u32, unit: f32, normal: f32) -> u32 {
    let sign = x.to_bits() >> 24 & 0x80;
    let magnitude = x.abs().min(largest);
    let bits = magnitude.to_bits();
    // To nearest even: half a last place less one, and one more where the last bit is set.
    let rounded = bits + (1 << (cut - 1)) - 1 + (bits >> cut & 1);
    let tiny = (magnitude + unit).to_bits().wrapping_sub(unit.to_bits());
    sign | if magnitude < normal { tiny } else { (rounded >> cut).wrapping_sub(bias) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{e4m3_from_f32, e5m2_from_f32};

    #[test]
    fn floats_round_like_the_reference() {
        let mut bits = 0u32;
        loop {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                if !x.is_nan() {
                    assert_eq!(e4m3(x), u32::from(e4m3_from_f32(x)), "{x:e}");
                    assert_eq!(e5m2(x), u32::from(e5m2_from_f32(x)), "{x:e}");
                }
            }
            // Odd steps meet every rounding; ties are met by the second pass.
            let Some(next) = bits.checked_add(4099) else { break };
            bits = next;
        }
        for upper in 0..=0x7f8u32 << 6 {
            for x in [f32::from_bits(upper << 14), -f32::from_bits(upper << 14)] {
                if !x.is_nan() {
                    assert_eq!(e4m3(x), u32::from(e4m3_from_f32(x)), "{x:e}");
                    assert_eq!(e5m2(x), u32::from(e5m2_from_f32(x)), "{x:e}");
                }
            }
        }
    }
}
