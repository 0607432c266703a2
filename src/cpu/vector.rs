//! The small vector trait that the generic kernels are written in, and its one-lane form.
//!
//! Every kernel is one `#[inline(always)]` function over [`Vector`]; a leaf file per instruction
//! set implements the trait and instantiates the kernels inside `#[target_feature]` functions.
//! Closures must not appear in kernels: a closure's body does not get the enabled features.
//! Nothing here knows of attention.

use crate::dtype::{Element, bf16, f16};

/// A register of f32 lanes.
///
/// # Safety
/// Every function may only be called on a CPU that has the instructions of the implementing type,
/// and pointers must be valid for what the function says it reads or writes. No alignment beyond
/// the element's is needed.
pub(crate) unsafe trait Vector: Copy {
    /// Lanes: a power of two, at most 16.
    const LANES: usize;
    /// Whether the machine has 32 registers of this kind, and not 16.
    const MANY_REGISTERS: bool;

    /// `x` in every lane.
    unsafe fn splat(x: f32) -> Self;
    /// Reads `LANES` f32.
    unsafe fn load(p: *const f32) -> Self;
    /// Reads `n < LANES` f32 and nothing after them; the other lanes are 0.
    unsafe fn load_part(p: *const f32, n: usize) -> Self;
    /// Writes `LANES` f32.
    unsafe fn store(self, p: *mut f32);
    /// Reads and widens `LANES` f16.
    unsafe fn load_f16(p: *const u16) -> Self;
    /// Reads and widens `n < LANES` f16 and nothing after them; the other lanes are 0.
    unsafe fn load_f16_part(p: *const u16, n: usize) -> Self;
    /// Rounds to nearest even and writes `LANES` f16.
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        let mut lanes = [0.0f32; 16];
        // SAFETY: the caller's promise; a vector has at most 16 lanes.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (i, x) in lanes[..Self::LANES].iter().enumerate() {
                p.add(i).write(f16::from_f32(*x).to_bits());
            }
        }
    }
    /// Reads and widens `LANES` bf16.
    unsafe fn load_bf16(p: *const u16) -> Self;
    /// Reads and widens `n < LANES` bf16 and nothing after them; the other lanes are 0.
    unsafe fn load_bf16_part(p: *const u16, n: usize) -> Self;
    /// Reads and widens `2 * LANES` bf16: those at even places, then those at odd ones.
    unsafe fn load2_bf16(p: *const u16) -> [Self; 2];
    /// Reads and widens `n < 2 * LANES` bf16 and nothing after them, as
    /// [`load2_bf16`](Self::load2_bf16) does; the other lanes are 0.
    #[inline(always)]
    unsafe fn load2_bf16_part(p: *const u16, n: usize) -> [Self; 2] {
        let mut buffer = [0u16; 32];
        // SAFETY: the caller's promise, and `n` fits the buffer.
        unsafe {
            core::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
            Self::load2_bf16(buffer.as_ptr())
        }
    }
    /// `self + b`.
    unsafe fn add(self, b: Self) -> Self;
    /// `self - b`.
    unsafe fn sub(self, b: Self) -> Self;
    /// `self * b`.
    unsafe fn mul(self, b: Self) -> Self;
    /// `self / b`.
    unsafe fn div(self, b: Self) -> Self;
    /// `self * b + c` (rounded once where the machine can).
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// The larger of each lane; unspecified which operand where one is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// The smaller of each lane; unspecified which operand where one is NaN.
    unsafe fn min(self, b: Self) -> Self;
    /// `self` in the lanes where `x >= floor`, 0 in the others.
    unsafe fn above(self, x: Self, floor: Self) -> Self;
    /// Sum of the lanes, in an order fixed for the type.
    unsafe fn sum(self) -> f32;
    /// Largest lane.
    unsafe fn top(self) -> f32;
    /// Writes the lane sums of `v[0..4]` to `p[0..4]`.
    unsafe fn sum4(v: [Self; 4], p: *mut f32);
    /// `self` rounded to the nearest integer, ties to even; `|self| < 2^22`.
    unsafe fn round(self) -> Self;
    /// `self * 2^n` for integral `n` in -126..=127.
    unsafe fn scale2(self, n: Self) -> Self;
    /// Transposes `LANES` rows of `LANES` 32-bit elements: element `(i, j)` is read at
    /// `from + i * from_stride + j` and written at `to + j * to_stride + i`.
    #[inline(always)]
    unsafe fn transpose(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize) {
        for i in 0..Self::LANES {
            for j in 0..Self::LANES {
                // SAFETY: the caller's promise.
                unsafe { to.add(j * to_stride + i).write(from.add(i * from_stride + j).read()) };
            }
        }
    }
}

/// Hints that the cache line at `p` will be read soon. Any address is allowed.
#[inline(always)]
pub(crate) fn prefetch(p: *const u8) {
    hint::<true>(p);
}

/// Hints that the cache line at `p` will be read, but not so soon that it should take the place of
/// others in the first-level cache: it goes to the second. Any address is allowed.
#[inline(always)]
pub(crate) fn prefetch_far(p: *const u8) {
    hint::<false>(p);
}

#[inline(always)]
fn hint<const SOON: bool>(p: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch of any address is harmless, and SSE is part of x86-64.
        unsafe {
            if SOON {
                _mm_prefetch::<_MM_HINT_T0>(p.cast())
            } else {
                _mm_prefetch::<_MM_HINT_T1>(p.cast())
            }
        }
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        use core::arch::asm;
        if SOON {
            asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly))
        } else {
            asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly))
        }
    };
    #[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
    let _ = p;
}

/// A stored element type, as kernels read it.
pub(crate) trait Stored: Copy + 'static {
    /// Bytes of one element.
    const BYTES: usize;

    /// Reads and widens `V::LANES` elements.
    ///
    /// # Safety
    /// As for [`Vector`].
    unsafe fn load<V: Vector>(p: *const u8) -> V;

    /// Reads and widens `n < V::LANES` elements; the other lanes are 0.
    ///
    /// # Safety
    /// As for [`Vector`].
    unsafe fn load_part<V: Vector>(p: *const u8, n: usize) -> V;

    /// Whether [`load2`](Self::load2) gives elements at even places first, then those at odd ones.
    const EVEN_ODD: bool;

    /// Reads and widens `2 * V::LANES` elements.
    ///
    /// # Safety
    /// As for [`Vector`].
    unsafe fn load2<V: Vector>(p: *const u8) -> [V; 2];

    /// Reads and widens `n < 2 * V::LANES` elements in the order of [`load2`](Self::load2); the
    /// other lanes are 0.
    ///
    /// # Safety
    /// As for [`Vector`].
    unsafe fn load2_part<V: Vector>(p: *const u8, n: usize) -> [V; 2];
}

macro_rules! stored {
    ($element:ty, $format:ident, $bits:ty, $load:ident, $part:ident) => {
        impl Stored for $element {
            const BYTES: usize = size_of::<$element>();

            #[inline(always)]
            unsafe fn load<V: Vector>(p: *const u8) -> V {
                // SAFETY: the caller's promise.
                unsafe { V::$load(p.cast::<$bits>()) }
            }

            #[inline(always)]
            unsafe fn load_part<V: Vector>(p: *const u8, n: usize) -> V {
                // SAFETY: the caller's promise.
                unsafe { V::$part(p.cast::<$bits>(), n) }
            }

            stored!(@load2 $format);
        }
    };
    (@load2 Bf16) => {
        const EVEN_ODD: bool = true;

        #[inline(always)]
        unsafe fn load2<V: Vector>(p: *const u8) -> [V; 2] {
            // SAFETY: the caller's promise.
            unsafe { V::load2_bf16(p.cast()) }
        }

        #[inline(always)]
        unsafe fn load2_part<V: Vector>(p: *const u8, n: usize) -> [V; 2] {
            // SAFETY: the caller's promise.
            unsafe { V::load2_bf16_part(p.cast(), n) }
        }
    };
    (@load2 $format:ident) => {
        const EVEN_ODD: bool = false;

        #[inline(always)]
        unsafe fn load2<V: Vector>(p: *const u8) -> [V; 2] {
            // SAFETY: the caller's promise.
            unsafe { [Self::load(p), Self::load(p.add(V::LANES * Self::BYTES))] }
        }

        #[inline(always)]
        unsafe fn load2_part<V: Vector>(p: *const u8, n: usize) -> [V; 2] {
            // SAFETY: the caller's promise.
            unsafe {
                if n < V::LANES {
                    return [Self::load_part(p, n), V::splat(0.0)];
                }
                [Self::load(p), Self::load_part(p.add(V::LANES * Self::BYTES), n - V::LANES)]
            }
        }
    };
}
stored!(f32, F32, f32, load, load_part);
stored!(f16, F16, u16, load_f16, load_f16_part);
stored!(bf16, Bf16, u16, load_bf16, load_bf16_part);

/// One lane: the kernels in plain Rust.
#[derive(Debug, Clone, Copy)]
pub(crate) struct One(f32);

// SAFETY: needs no instructions beyond the target's own.
#[allow(clippy::undocumented_unsafe_blocks)] // pointers: the callers' promise, as the trait says
unsafe impl Vector for One {
    const LANES: usize = 1;
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        One(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        One(unsafe { p.read() })
    }
    #[inline(always)]
    unsafe fn load_part(_: *const f32, _: usize) -> Self {
        One(0.0)
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { p.write(self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        One(Element::to_f32(f16::from_bits(unsafe { p.read() })))
    }
    #[inline(always)]
    unsafe fn load_f16_part(_: *const u16, _: usize) -> Self {
        One(0.0)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        One(Element::to_f32(bf16::from_bits(unsafe { p.read() })))
    }
    #[inline(always)]
    unsafe fn load_bf16_part(_: *const u16, _: usize) -> Self {
        One(0.0)
    }
    #[inline(always)]
    unsafe fn load2_bf16(p: *const u16) -> [Self; 2] {
        unsafe { [Self::load_bf16(p), Self::load_bf16(p.add(1))] }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        One(self.0 + b.0)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        One(self.0 - b.0)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        One(self.0 * b.0)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        One(self.0 / b.0)
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        One(self.0 * b.0 + c.0)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        One(if self.0 > b.0 { self.0 } else { b.0 })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        One(if self.0 < b.0 { self.0 } else { b.0 })
    }
    #[inline(always)]
    unsafe fn above(self, x: Self, floor: Self) -> Self {
        One(if x.0 >= floor.0 { self.0 } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        self.0
    }
    #[inline(always)]
    unsafe fn top(self) -> f32 {
        self.0
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4], p: *mut f32) {
        unsafe { p.cast::<[f32; 4]>().write_unaligned([v[0].0, v[1].0, v[2].0, v[3].0]) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it drops the fraction
        One((self.0 + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        One(self.0 * f32::from_bits(((n.0 as i32 + 127) as u32) << 23))
    }
}

/// Vectors whose machine multiplies pairs of bf16 into f32 lanes.
///
/// # Safety
/// As for [`Vector`].
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // used where the machine has such products
pub(crate) unsafe trait PairDot: Vector {
    /// `2 * LANES` bf16: lane `i` holds elements `2i` (low half) and `2i + 1`.
    type Pairs: Copy;

    /// Reads `2 * LANES` bf16.
    unsafe fn load_pairs(p: *const u16) -> Self::Pairs;
    /// Reads `n < 2 * LANES` bf16 and nothing after them; the others are 0.
    unsafe fn load_pairs_part(p: *const u16, n: usize) -> Self::Pairs;
    /// The same pair in every lane: the low half of `bits` is the even element.
    unsafe fn splat_pair(bits: u32) -> Self::Pairs;
    /// `self[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]`.
    unsafe fn dot_pairs(self, a: Self::Pairs, b: Self::Pairs) -> Self;
    /// Writes `2 * LANES` bf16.
    unsafe fn store_pairs(pairs: Self::Pairs, p: *mut u16);
    /// `low` and then `high`, rounded to nearest even (subnormal values may become 0).
    unsafe fn round_pairs(low: Self, high: Self) -> Self::Pairs;
    /// Reads `LANES` bf16 at each pointer: lane `i` holds `even[i]` (low half) and `odd[i]`.
    unsafe fn zip(even: *const u16, odd: *const u16) -> Self::Pairs;
    /// `even` and `odd`, rounded as by [`round_pairs`](Self::round_pairs): lane `i` holds `even[i]`
    /// and `odd[i]`.
    unsafe fn pair_up(even: Self, odd: Self) -> Self::Pairs;
    /// Pairs of `(even[i], odd[i])` for each element `i`: of each eight elements the first four in
    /// the first vector, the others in the second.
    unsafe fn interleave(even: Self::Pairs, odd: Self::Pairs) -> [Self::Pairs; 2];
}
