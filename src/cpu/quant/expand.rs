//! Codes to rows of f32, still rotated: what kernels without integer products multiply.

use core::slice;

use super::RowCode;
use super::vector::{CodeVector, E2M1, INT4, Nibbles};
use crate::dtype::KvFormat;
use crate::layout::MAX_HEAD_DIM;

/// The values of E4M3, halved: the scales of blocks of elements that are doubled.
static HALF_E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = (code >> 3 & 15, code & 7);
        let magnitude = if exponent == 0 {
            mantissa as f32 / 1024.0
        } else {
            f32::from_bits(((exponent + 119) << 23 | mantissa << 20) as u32)
        };
        let magnitude = if code & 0x7f == 0x7f { f32::NAN } else { magnitude };
        values[code] = if code >> 7 == 1 { -magnitude } else { magnitude };
        code += 1;
    }
    values
};

/// Writes `dim` channels of the row with these codes and scales.
///
/// # Safety
/// As for [`Vector`](crate::cpu::vector::Vector): `codes` has the format's `row_bytes` of the whole
/// row, `scales` its `row_scale_bytes`, `to` room for `dim` f32.
#[inline(always)]
pub(super) unsafe fn expand<V: CodeVector>(
    code: &RowCode,
    codes: *const u8,
    scales: *const u8,
    dim: usize,
    to: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let to = slice::from_raw_parts_mut(to, dim);
        match code.format {
            KvFormat::Fp8E4m3 => {
                let codes = slice::from_raw_parts(codes, dim);
                V::e4m3(codes, code.scale, to);
                // What vectors may read as a number; hardly ever there.
                if codes.iter().fold(0, |top, &code| (code & 0x7f).max(top)) == 0x7f {
                    e4m3_nans(codes, to);
                }
            }
            KvFormat::Fp8E5m2 => V::e5m2(slice::from_raw_parts(codes, dim), code.scale, to),
            KvFormat::Int8T => {
                let codes = slice::from_raw_parts(codes.cast::<i8>(), dim);
                scaled::<V>(code, codes, scales, 2, to);
            }
            KvFormat::Int4T => {
                let mut wide = [0; MAX_HEAD_DIM as usize];
                scaled::<V>(code, narrow::<V>(codes, dim, &INT4, &mut wide), scales, 4, to);
            }
            _ => {
                let mut wide = [0; MAX_HEAD_DIM as usize];
                let codes = narrow::<V>(codes, dim, &E2M1, &mut wide);
                for (block, (to, codes)) in
                    to.chunks_exact_mut(16).zip(codes.chunks_exact(16)).enumerate()
                {
                    let step = HALF_E4M3[usize::from(scales.add(block).read())] * code.scale;
                    to.iter_mut().zip(codes).for_each(|(x, &code)| *x = f32::from(code) * step);
                }
            }
        }
    }
}

/// Puts NaN where the codes say so.
#[cold]
fn e4m3_nans(codes: &[u8], to: &mut [f32]) {
    for (x, &code) in to.iter_mut().zip(codes) {
        if code & 0x7f == 0x7f {
            *x = f32::NAN;
        }
    }
}

/// Unpacks nibbles.
#[inline(always)]
unsafe fn narrow<'a, V: CodeVector>(
    codes: *const u8,
    dim: usize,
    how: &Nibbles,
    wide: &'a mut [i8; MAX_HEAD_DIM as usize],
) -> &'a [i8] {
    // SAFETY: the caller's promise.
    unsafe { V::nibbles(slice::from_raw_parts(codes, dim / 2), how, &mut wide[..dim]) };
    &wide[..dim]
}

/// Each part times its scale and, where that has four bytes, plus its minimum.
#[inline(always)]
unsafe fn scaled<V: CodeVector>(
    code: &RowCode,
    codes: &[i8],
    scales: *const u8,
    bytes: usize,
    to: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let first = code.first.min(codes.len());
        part::<V>(&codes[..first], scales, bytes, &mut to[..first]);
        if first < codes.len() {
            part::<V>(&codes[first..], scales.add(bytes), bytes, &mut to[first..]);
        }
    }
}

#[inline(always)]
unsafe fn part<V: CodeVector>(codes: &[i8], scales: *const u8, bytes: usize, to: &mut [f32]) {
    for (x, &code) in to.iter_mut().zip(codes) {
        *x = f32::from(code);
    }
    // SAFETY: the caller's promise; parts are whole vectors.
    unsafe {
        let s = V::splat_f16(scales);
        let m = if bytes == 4 { V::splat_f16(scales.add(2)) } else { V::splat(0.0) };
        for c in (0..to.len()).step_by(V::LANES) {
            let x = to.as_mut_ptr().add(c);
            V::load(x).fma(s, m).store(x);
        }
    }
}
