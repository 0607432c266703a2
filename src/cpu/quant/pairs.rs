//! FP8 in the decode kernel where the machine looks bytes up and multiplies pairs of bf16: every
//! code is a bf16, exactly, NaN and infinities included. For calls whose queries are bf16.
//!
//! Scales of heads never meet codes: the kernel multiplies scores and sums with them.

use core::marker::PhantomData;

use crate::cpu::decode::{InPairs, Weigh};
use crate::cpu::dot::KeyDot;
use crate::cpu::vector::PairDot;

/// The bf16 of each magnitude of a minifloat of 8 bits: its low bytes and its high ones, without
/// the sign.
pub(in crate::cpu) struct Halves {
    pub low: [u8; 128],
    pub high: [u8; 128],
}

impl Halves {
    /// Of `mantissa` mantissa bits; the highest exponent is that of infinities and NaN, or the last
    /// code alone is NaN.
    const fn new(mantissa: u32, infinities: bool) -> Self {
        let mut halves = Halves { low: [0; 128], high: [0; 128] };
        let bias = (1u32 << (6 - mantissa)) - 1;
        let mut code = 0u32;
        while code < 128 {
            let (exponent, fraction) = (code >> mantissa, code & ((1 << mantissa) - 1));
            let top = exponent == (1 << (7 - mantissa)) - 1;
            let bits = if code == 0 {
                0
            } else if (infinities && top) || code == 0x7f {
                // Infinite, or NaN with its fraction not 0.
                0x7f80 | fraction << (7 - mantissa)
            } else if exponent == 0 {
                // Subnormal there, normal here: the highest bit becomes the implicit one.
                let highest = fraction.ilog2();
                let exponent = 127 + 1 + highest - bias - mantissa;
                exponent << 7 | (fraction << (7 - highest) & 0x7f)
            } else {
                (exponent + 127 - bias) << 7 | fraction << (7 - mantissa)
            };
            halves.low[code as usize] = bits as u8;
            halves.high[code as usize] = (bits >> 8) as u8;
            code += 1;
        }
        halves
    }
}

/// A minifloat of 8 bits.
pub(in crate::cpu) trait Minifloat {
    /// Its values.
    const HALVES: &'static Halves;
}

/// The format [`Fp8E4m3`](crate::dtype::KvFormat::Fp8E4m3).
pub(in crate::cpu) struct E4m3;
/// The format [`Fp8E5m2`](crate::dtype::KvFormat::Fp8E5m2).
pub(in crate::cpu) struct E5m2;

static E4M3_HALVES: Halves = Halves::new(3, false);
static E5M2_HALVES: Halves = Halves::new(2, true);

impl Minifloat for E4m3 {
    const HALVES: &'static Halves = &E4M3_HALVES;
}
impl Minifloat for E5m2 {
    const HALVES: &'static Halves = &E5M2_HALVES;
}

/// Vectors whose machine looks 64 bytes up in a table of 128 at once.
///
/// # Safety
/// As for [`Vector`](crate::cpu::vector::Vector).
pub(in crate::cpu) unsafe trait LookUp: PairDot {
    /// Reads `n <= 64` codes and nothing after them, the others 0: of each sixteen the first eight
    /// in the first vector.
    unsafe fn look_up(p: *const u8, n: usize, values: &Halves) -> [Self::Pairs; 2];
    /// Reads `n <= 32` codes at each pointer and nothing after them, the others 0: pairs of
    /// `(even[i], odd[i])`, in order.
    unsafe fn look_up_zip(
        even: *const u8,
        odd: *const u8,
        n: usize,
        values: &Halves,
    ) -> [Self::Pairs; 2];
}

/// FP8 keys times bf16 queries.
pub(in crate::cpu) struct CodePairs<M>(PhantomData<M>);

#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise, as the trait says
// SAFETY: only instructions of `V`.
unsafe impl<V: LookUp, M: Minifloat> KeyDot<V> for CodePairs<M> {
    type Key = [V::Pairs; 2];
    type Query = [V::Pairs; 2];
    const CHANNELS: usize = 64;
    const BYTES: usize = 1;
    // Half of it stays free, so that a row that ends within a step has room for all of it.
    const QUERY_BYTES: usize = 4;
    const CODED: bool = true;

    #[inline(always)]
    unsafe fn prepare(row: *const f32, dim: usize, to: *mut u8) {
        for first in (0..dim).step_by(64) {
            for c in 0..64 {
                // In the order of `look_up`.
                let at = c % 16 / 8 * 32 + c / 16 * 8 + c % 8;
                unsafe {
                    // The value is a bf16, so its upper half is all of it.
                    let known = first + c < dim;
                    let x = if known { row.add(first + c).read() } else { 0.0 };
                    to.cast::<u16>().add(2 * first + at).write((x.to_bits() >> 16) as u16);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn load_query(p: *const u8) -> [V::Pairs; 2] {
        unsafe { [V::load_pairs(p.cast()), V::load_pairs(p.cast::<u16>().add(32))] }
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> [V::Pairs; 2] {
        unsafe { V::look_up(p, 64, M::HALVES) }
    }
    #[inline(always)]
    unsafe fn load_part(p: *const u8, n: usize) -> [V::Pairs; 2] {
        unsafe { V::look_up(p, n, M::HALVES) }
    }
    #[inline(always)]
    unsafe fn dot(acc: V, query: [V::Pairs; 2], key: [V::Pairs; 2]) -> V {
        unsafe { acc.dot_pairs(query[0], key[0]).dot_pairs(query[1], key[1]) }
    }
}

/// FP8 values of two keys at a time, with weights rounded to bf16: the error of [`InPairs`].
#[allow(clippy::undocumented_unsafe_blocks)] // the callers' promise, as the trait says
// SAFETY: only instructions of `V`.
unsafe impl<V: LookUp, M: Minifloat> Weigh<V> for CodePairs<M> {
    type Step = [V::Pairs; 2];
    type Weight = V::Pairs;
    const KEYS: usize = 2;
    const IN_ORDER: bool = true;
    const BYTES: usize = 1;

    #[inline(always)]
    unsafe fn zeros() -> [V::Pairs; 2] {
        unsafe { [V::splat_pair(0); 2] }
    }
    #[inline(always)]
    unsafe fn load(rows: [*const u8; 2]) -> [V::Pairs; 2] {
        unsafe { V::look_up_zip(rows[0], rows[1], 32, M::HALVES) }
    }
    #[inline(always)]
    unsafe fn load_part(rows: [*const u8; 2], n: usize) -> [V::Pairs; 2] {
        unsafe { V::look_up_zip(rows[0], rows[1], n, M::HALVES) }
    }
    #[inline(always)]
    unsafe fn store_weights(first: V, last: V, to: *mut f32) {
        unsafe { <InPairs as Weigh<V>>::store_weights(first, last, to) }
    }
    #[inline(always)]
    unsafe fn weight(p: *const f32) -> V::Pairs {
        unsafe { <InPairs as Weigh<V>>::weight(p) }
    }
    #[inline(always)]
    unsafe fn add(sum: [V; 2], weight: V::Pairs, step: [V::Pairs; 2]) -> [V; 2] {
        unsafe { <InPairs as Weigh<V>>::add(sum, weight, step) }
    }
    #[inline(always)]
    fn place(i: usize) -> usize {
        i
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{e4m3_to_f32, e5m2_to_f32};

    #[test]
    fn every_code_is_its_value() {
        let check = |halves: &Halves, value: fn(u8) -> f32| {
            for code in 0..128u8 {
                let at = usize::from(code);
                let bits = [0, 0, halves.low[at], halves.high[at]];
                let (got, want) = (f32::from_le_bytes(bits), value(code));
                assert!(got == want || got.is_nan() && want.is_nan(), "{code}: {got}, want {want}");
            }
        };
        check(E4m3::HALVES, e4m3_to_f32);
        check(E5m2::HALVES, e5m2_to_f32);
    }
}
