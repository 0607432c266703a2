//! Advanced SIMD: four lanes.

use core::arch::aarch64::*;

use crate::cpu::quant::CodeVector;
use crate::cpu::vector::Vector;
use crate::cpu::words::{ByteDot, Words};

/// Four f32 lanes.
#[derive(Clone, Copy)]
pub(crate) struct F32x4(float32x4_t);

/// `n < 4` elements through a buffer.
#[inline(always)]
unsafe fn part<T: Copy + Default>(p: *const T, n: usize) -> [T; 4] {
    let mut buffer = [T::default(); 4];
    // SAFETY: the caller's promise, and `n` fits the buffer.
    unsafe { core::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n) };
    buffer
}

/// f16 to f32. The intrinsic for it is not stable, the instruction is part of every AArch64.
#[inline(always)]
unsafe fn widen_f16(bits: uint16x4_t) -> F32x4 {
    let wide: float32x4_t;
    // SAFETY: reads and writes registers only.
    unsafe {
        core::arch::asm!("fcvtl {w:v}.4s, {h:v}.4h", w = out(vreg) wide, h = in(vreg) bits,
            options(pure, nomem, nostack, preserves_flags))
    };
    F32x4(wide)
}

/// bf16 to f32: the sixteen bits become the upper half.
#[inline(always)]
unsafe fn widen_bf16(bits: uint16x4_t) -> F32x4 {
    // SAFETY: the caller's promise.
    F32x4(unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(bits)) })
}

// SAFETY: Advanced SIMD is part of every target this file is compiled for.
#[allow(clippy::undocumented_unsafe_blocks)] // one intrinsic each: the callers' promise
unsafe impl Vector for F32x4 {
    const LANES: usize = 4;
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { vdupq_n_f32(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { vld1q_f32(p) })
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        Self(unsafe { vld1q_f32(part(p, n).as_ptr()) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { vst1q_f32(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        unsafe { widen_f16(vld1_u16(p)) }
    }
    #[inline(always)]
    unsafe fn load_f16_part(p: *const u16, n: usize) -> Self {
        unsafe { widen_f16(vld1_u16(part(p, n).as_ptr())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        unsafe { widen_bf16(vld1_u16(p)) }
    }
    #[inline(always)]
    unsafe fn load_bf16_part(p: *const u16, n: usize) -> Self {
        unsafe { widen_bf16(vld1_u16(part(p, n).as_ptr())) }
    }
    #[inline(always)]
    unsafe fn load2_bf16(p: *const u16) -> [Self; 2] {
        unsafe {
            let bits = vreinterpretq_u32_u16(vld1q_u16(p));
            let high = vandq_u32(bits, vdupq_n_u32(0xffff_0000));
            [
                Self(vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits))),
                Self(vreinterpretq_f32_u32(high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Self(unsafe { vaddq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        Self(unsafe { vsubq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        Self(unsafe { vmulq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        Self(unsafe { vdivq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(unsafe { vfmaq_f32(c.0, self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        Self(unsafe { vmaxq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        Self(unsafe { vminq_f32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn above(self, x: Self, floor: Self) -> Self {
        unsafe {
            let keep = vcgeq_f32(x.0, floor.0);
            Self(vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(self.0), keep)))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { vaddvq_f32(self.0) }
    }
    #[inline(always)]
    unsafe fn top(self) -> f32 {
        unsafe { vmaxvq_f32(self.0) }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4], p: *mut f32) {
        unsafe {
            let ab = vpaddq_f32(v[0].0, v[1].0);
            let cd = vpaddq_f32(v[2].0, v[3].0);
            vst1q_f32(p, vpaddq_f32(ab, cd));
        }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(unsafe { vrndnq_f32(self.0) })
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        unsafe {
            let biased = vaddq_s32(vcvtq_s32_f32(n.0), vdupq_n_s32(127));
            Self(vmulq_f32(self.0, vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))))
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        unsafe {
            let (a, b) = (vld1q_u32(from), vld1q_u32(from.add(from_stride)));
            let (c, d) =
                (vld1q_u32(from.add(2 * from_stride)), vld1q_u32(from.add(3 * from_stride)));
            let (ac0, ac1) = (vzip1q_u32(a, c), vzip2q_u32(a, c));
            let (bd0, bd1) = (vzip1q_u32(b, d), vzip2q_u32(b, d));
            vst1q_u32(to, vzip1q_u32(ac0, bd0));
            vst1q_u32(to.add(to_stride), vzip2q_u32(ac0, bd0));
            vst1q_u32(to.add(2 * to_stride), vzip1q_u32(ac1, bd1));
            vst1q_u32(to.add(3 * to_stride), vzip2q_u32(ac1, bd1));
        }
    }
}

// SAFETY: Advanced SIMD is part of every target this file is compiled for.
#[allow(clippy::undocumented_unsafe_blocks)] // a few intrinsics each: the callers' promise
unsafe impl Words for F32x4 {
    type Word = uint32x4_t;

    #[inline(always)]
    unsafe fn load_words(p: *const u32) -> uint32x4_t {
        unsafe { vld1q_u32(p) }
    }
    #[inline(always)]
    unsafe fn splat_word(word: u32) -> uint32x4_t {
        unsafe { vdupq_n_u32(word) }
    }
    #[inline(always)]
    unsafe fn and(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        unsafe { vandq_u32(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        unsafe { vorrq_u32(a, b) }
    }
    #[inline(always)]
    unsafe fn shl(a: uint32x4_t, n: u32) -> uint32x4_t {
        unsafe { vshlq_u32(a, vdupq_n_s32(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shr(a: uint32x4_t, n: u32) -> uint32x4_t {
        unsafe { vshlq_u32(a, vdupq_n_s32(-(n as i32))) }
    }
    #[inline(always)]
    unsafe fn xor_high_bits(a: uint32x4_t) -> uint32x4_t {
        unsafe { veorq_u32(a, vdupq_n_u32(0x8080_8080)) }
    }
    #[inline(always)]
    unsafe fn dot_bytes<const SMALL: bool>(
        acc: uint32x4_t,
        codes: uint32x4_t,
        by: uint32x4_t,
    ) -> uint32x4_t {
        unsafe {
            let (codes, by) = (vreinterpretq_u8_u32(codes), vreinterpretq_s8_u32(by));
            let acc = vreinterpretq_s32_u32(acc);
            let sum = if SMALL {
                // 127 * 128 fits in 16 bits, two of them in 17: pairs widen as they are added.
                let codes = vreinterpretq_s8_u8(codes);
                let low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(by)));
                let high = vpaddlq_s16(vmull_high_s8(codes, by));
                vpaddq_s32(low, high)
            } else {
                let c0 = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
                let c1 = vreinterpretq_s16_u16(vmovl_high_u8(codes));
                let (w0, w1) = (vmovl_s8(vget_low_s8(by)), vmovl_high_s8(by));
                let low = vpaddq_s32(
                    vmull_s16(vget_low_s16(c0), vget_low_s16(w0)),
                    vmull_high_s16(c0, w0),
                );
                let high = vpaddq_s32(
                    vmull_s16(vget_low_s16(c1), vget_low_s16(w1)),
                    vmull_high_s16(c1, w1),
                );
                vpaddq_s32(low, high)
            };
            vreinterpretq_u32_s32(vaddq_s32(acc, sum))
        }
    }
    #[inline(always)]
    unsafe fn words_to_f32(words: uint32x4_t) -> Self {
        Self(unsafe { vcvtq_f32_s32(vreinterpretq_s32_u32(words)) })
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        unsafe {
            let bytes = vcreate_u8(u64::from(p.cast::<u32>().read_unaligned()));
            Self(vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes)))))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        unsafe {
            let bytes = vcreate_s8(u64::from(p.cast::<u32>().read_unaligned()));
            Self(vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes)))))
        }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8) {
        unsafe {
            let halves = vmovn_u32(vreinterpretq_u32_s32(vcvtq_s32_f32(self.0)));
            let bytes = vmovn_u16(vcombine_u16(halves, halves));
            p.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_u8(bytes)));
        }
    }
    #[inline(always)]
    unsafe fn permute16(from: *const u8, pattern: &[u8; 16], to: *mut u8) {
        unsafe { vst1q_u8(to, vqtbl1q_u8(vld1q_u8(from), vld1q_u8(pattern.as_ptr()))) }
    }
}

// SAFETY: as above.
unsafe impl CodeVector for F32x4 {
    #[inline(always)]
    unsafe fn swap<const HALF: usize>(self) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe {
            match HALF {
                1 => vrev64q_f32(self.0),
                _ => vextq_f32::<2>(self.0, self.0),
            }
        })
    }
}

crate::cpu::kernels::instantiate!(kernels, F32x4, "neon");
crate::cpu::sealed::instantiate_sealed!(sealed, F32x4, Plain, "neon");

/// Byte products by SDOT, four to a lane at a time.
struct Dotprod;

impl Dotprod {
    /// `acc + sum of a[j] * b[j]` over the four signed bytes of each lane. The intrinsic is not in
    /// stable Rust.
    #[inline(always)]
    unsafe fn sdot(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        let mut sum = acc;
        // SAFETY: one instruction over registers, which the caller's CPU has.
        unsafe {
            core::arch::asm!(
                "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
                sum = inout(vreg) sum,
                a = in(vreg) a,
                b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sum
    }
}

// SAFETY: only called where the dot products of Armv8.2 are enabled too.
unsafe impl ByteDot<F32x4> for Dotprod {
    #[inline(always)]
    unsafe fn dot<const SMALL: bool>(
        acc: uint32x4_t,
        codes: uint32x4_t,
        by: uint32x4_t,
    ) -> uint32x4_t {
        // SAFETY: the caller's promise.
        unsafe {
            let (acc, by) = (vreinterpretq_s32_u32(acc), vreinterpretq_s8_u32(by));
            let sum = if SMALL {
                Self::sdot(acc, vreinterpretq_s8_u32(codes), by)
            } else {
                // code * w = (code - 128) * w + 64 * w + 64 * w, whose factors have signs.
                let less = veorq_u32(codes, vdupq_n_u32(0x8080_8080));
                let half = vdupq_n_s8(64);
                let sum = Self::sdot(acc, vreinterpretq_s8_u32(less), by);
                Self::sdot(Self::sdot(sum, half, by), half, by)
            };
            vreinterpretq_u32_s32(sum)
        }
    }
}

crate::cpu::sealed::instantiate_sealed!(sealed_dotprod, F32x4, Dotprod, "neon,dotprod");
