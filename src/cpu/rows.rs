//! Rows of 16-bit floats to f32 and back, a vector at a time.
//!
//! The bits are those of the `half` crate at every level, NaNs included: signalling ones become
//! quiet. Knows nothing of where rows come from or go.

use super::vector::Vector;
use crate::dtype::{DType, f16};

/// Widens a row of `dtype` to f32.
///
/// # Safety
/// As for [`Vector`]; `from` must be aligned to its elements and have as many as `to`.
#[inline(always)]
pub(crate) unsafe fn widen<V: Vector>(dtype: DType, from: *const u8, to: &mut [f32]) {
    // SAFETY: the caller's promise; whole vectors, and then single elements, lie in the rows.
    unsafe {
        match dtype {
            DType::F32 => to.as_mut_ptr().copy_from_nonoverlapping(from.cast(), to.len()),
            DType::F16 => {
                let (from, whole) = (from.cast::<u16>(), to.len() - to.len() % V::LANES);
                for i in (0..whole).step_by(V::LANES) {
                    V::load_f16(from.add(i)).store(to.as_mut_ptr().add(i));
                }
                for (i, x) in to.iter_mut().enumerate().skip(whole) {
                    *x = f16::from_bits(from.add(i).read()).to_f32();
                }
            }
            // Arithmetic on bits without branches, which compilers turn into the level's vectors.
            DType::Bf16 => {
                let from = from.cast::<u16>();
                for (i, x) in to.iter_mut().enumerate() {
                    let bits = u32::from(from.add(i).read());
                    let quiet = if bits & 0x7fff > 0x7f80 { bits | 0x40 } else { bits };
                    *x = f32::from_bits(quiet << 16);
                }
            }
        }
    }
}

/// Rounds a row of f32 to `dtype`, to nearest even.
///
/// # Safety
/// As for [`Vector`]; `to` must be aligned to its elements and have room for as many as `from` has.
#[inline(always)]
pub(crate) unsafe fn narrow<V: Vector>(dtype: DType, from: &[f32], to: *mut u8) {
    // SAFETY: as above.
    unsafe {
        match dtype {
            DType::F32 => to.cast::<f32>().copy_from_nonoverlapping(from.as_ptr(), from.len()),
            DType::F16 => {
                let (to, whole) = (to.cast::<u16>(), from.len() - from.len() % V::LANES);
                for i in (0..whole).step_by(V::LANES) {
                    V::load(from.as_ptr().add(i)).store_f16(to.add(i));
                }
                for (i, x) in from.iter().enumerate().skip(whole) {
                    to.add(i).write(f16::from_f32(*x).to_bits());
                }
            }
            DType::Bf16 => {
                let to = to.cast::<u16>();
                for (i, x) in from.iter().enumerate() {
                    let bits = x.to_bits();
                    let even = bits >> 16 & 1;
                    let rounded = bits.wrapping_add(0x7fff + even) >> 16;
                    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
                    to.add(i).write(if nan { bits >> 16 | 0x40 } else { rounded } as u16);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;
    use crate::cpu::kernels::Kernels;
    use crate::cpu::level::CpuLevel;
    use crate::dtype::{KvFormat, bf16};

    /// Rows of no multiple of any vector, so that every remainder is met; few where that is slow.
    fn rows<T>(all: &[T]) -> impl Iterator<Item = &[T]> {
        all.chunks(61).step_by(if cfg!(miri) { 499 } else { 1 })
    }

    #[test]
    fn every_16_bit_number_widens_as_the_half_crate_does() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        for level in CpuLevel::available() {
            let kernels = Kernels::of(level, KvFormat::F32);
            for dtype in [DType::F16, DType::Bf16] {
                let want = |bits| match dtype {
                    DType::F16 => f16::from_bits(bits).to_f32(),
                    _ => bf16::from_bits(bits).to_f32(),
                };
                for row in rows(&all) {
                    let mut wide = vec![0.0; row.len()];
                    // SAFETY: rows of the same length; the level is there.
                    unsafe { (kernels.widen)(dtype, row.as_ptr().cast(), &mut wide) };
                    for (&bits, x) in row.iter().zip(wide) {
                        let want = want(bits).to_bits();
                        assert_eq!(x.to_bits(), want, "{} {dtype:?} {bits:#x}", level.name());
                    }
                }
            }
        }
    }

    #[test]
    fn numbers_between_round_as_the_half_crate_does() {
        // Ends and middles of every step of both formats, and random bits, NaNs among them.
        let mut state = 1u32;
        let random = core::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state ^ state >> 15
        });
        let ties = (0..=u16::MAX).flat_map(|high| {
            [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| u32::from(high) << 16 | low)
        });
        let steps = (0..0x7c00u16).flat_map(|bits| {
            let (a, b) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
            let middle = (a + (b - a) / 2.0).to_bits();
            [middle, middle.wrapping_sub(1), middle + 1, middle | 1 << 31]
        });
        let all: Vec<f32> =
            ties.chain(steps).chain(random.take(100_000)).map(f32::from_bits).collect();
        for level in CpuLevel::available() {
            let kernels = Kernels::of(level, KvFormat::F32);
            for dtype in [DType::F16, DType::Bf16] {
                for row in rows(&all) {
                    let mut bits = vec![0u16; row.len()];
                    // SAFETY: as above.
                    unsafe { (kernels.narrow)(dtype, row, bits.as_mut_ptr().cast()) };
                    for (x, bits) in row.iter().zip(bits) {
                        let want = match dtype {
                            DType::F16 => f16::from_f32(*x).to_bits(),
                            _ => bf16::from_f32(*x).to_bits(),
                        };
                        let name = level.name();
                        assert_eq!(bits, want, "{name} {dtype:?} {:#x}", x.to_bits());
                    }
                }
            }
        }
    }
}
