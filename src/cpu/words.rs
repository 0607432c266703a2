//! Whole-number work over the lanes of a [`Vector`]: packed codes, and dot products of their bytes.
//!
//! Everything here is exact, so that a level changes the speed of a result and never its bits.
//! Nothing here knows of tiles.

use super::vector::{One, Vector};

/// Vectors whose lanes are also 32-bit words of packed codes.
///
/// # Safety
/// As for [`Vector`].
pub(crate) unsafe trait Words: Vector {
    /// `LANES` words.
    type Word: Copy;

    /// Reads `LANES` words.
    unsafe fn load_words(p: *const u32) -> Self::Word;
    /// `word` in every lane.
    unsafe fn splat_word(word: u32) -> Self::Word;
    /// Bits set in both.
    unsafe fn and(a: Self::Word, b: Self::Word) -> Self::Word;
    /// Bits set in one.
    unsafe fn or(a: Self::Word, b: Self::Word) -> Self::Word;
    /// Shifts left by `n < 32`.
    unsafe fn shl(a: Self::Word, n: u32) -> Self::Word;
    /// Shifts right by `n < 32`, zeros coming in.
    unsafe fn shr(a: Self::Word, n: u32) -> Self::Word;
    /// Flips the highest bit of every byte.
    unsafe fn xor_high_bits(a: Self::Word) -> Self::Word;
    /// `acc + sum of codes[j] * weights[j]` over the four bytes of each lane: codes unsigned,
    /// weights signed. With `SMALL` codes are at most 127.
    unsafe fn dot_bytes<const SMALL: bool>(
        acc: Self::Word,
        codes: Self::Word,
        weights: Self::Word,
    ) -> Self::Word;
    /// Signed words as f32, to nearest.
    unsafe fn words_to_f32(words: Self::Word) -> Self;
    /// Reads and widens `LANES` unsigned bytes.
    unsafe fn load_u8(p: *const u8) -> Self;
    /// Reads and widens `LANES` signed bytes.
    unsafe fn load_i8(p: *const i8) -> Self;
    /// Writes `LANES` bytes: the low eight bits of integral lanes in -128..=255.
    unsafe fn store_bytes(self, p: *mut u8);
    /// `to[i] = from[pattern[i]]` for sixteen bytes; patterns are below 16.
    #[inline(always)]
    unsafe fn permute16(from: *const u8, pattern: &[u8; 16], to: *mut u8) {
        for (i, &at) in pattern.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.add(i).write(from.add(usize::from(at)).read()) }
        }
    }
    /// CRC-32C of `bytes` bytes at `p` after those whose checksum is `before`.
    #[inline(always)]
    unsafe fn crc32c(before: u32, p: *const u8, bytes: usize) -> u32 {
        // SAFETY: the caller's promise.
        let bytes = unsafe { core::slice::from_raw_parts(p, bytes) };
        crate::quant::crc32c(before, bytes)
    }
}

/// How bytes are multiplied at a level: by the vector's own instructions, or better ones.
///
/// # Safety
/// As for [`Vector`].
pub(crate) unsafe trait ByteDot<V: Words> {
    /// As [`Words::dot_bytes`].
    unsafe fn dot<const SMALL: bool>(acc: V::Word, codes: V::Word, weights: V::Word) -> V::Word;
}

/// By the vector's own instructions.
pub(crate) struct Plain;

// SAFETY: only instructions of `V`.
unsafe impl<V: Words> ByteDot<V> for Plain {
    #[inline(always)]
    unsafe fn dot<const SMALL: bool>(acc: V::Word, codes: V::Word, weights: V::Word) -> V::Word {
        // SAFETY: the caller's promise.
        unsafe { V::dot_bytes::<SMALL>(acc, codes, weights) }
    }
}

// SAFETY: needs no instructions beyond the target's own.
#[allow(clippy::undocumented_unsafe_blocks)] // pointers: the callers' promise, as the trait says
unsafe impl Words for One {
    type Word = u32;

    #[inline(always)]
    unsafe fn load_words(p: *const u32) -> u32 {
        unsafe { p.read() }
    }
    #[inline(always)]
    unsafe fn splat_word(word: u32) -> u32 {
        word
    }
    #[inline(always)]
    unsafe fn and(a: u32, b: u32) -> u32 {
        a & b
    }
    #[inline(always)]
    unsafe fn or(a: u32, b: u32) -> u32 {
        a | b
    }
    #[inline(always)]
    unsafe fn shl(a: u32, n: u32) -> u32 {
        a << n
    }
    #[inline(always)]
    unsafe fn shr(a: u32, n: u32) -> u32 {
        a >> n
    }
    #[inline(always)]
    unsafe fn xor_high_bits(a: u32) -> u32 {
        a ^ 0x8080_8080
    }
    #[inline(always)]
    unsafe fn dot_bytes<const SMALL: bool>(acc: u32, codes: u32, weights: u32) -> u32 {
        let pairs = codes.to_le_bytes().into_iter().zip(weights.to_le_bytes());
        let sum =
            pairs.map(|(code, weight)| i32::from(code) * i32::from(weight as i8)).sum::<i32>();
        acc.wrapping_add(sum as u32)
    }
    #[inline(always)]
    unsafe fn words_to_f32(words: u32) -> Self {
        unsafe { Self::splat(words as i32 as f32) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self {
        unsafe { Self::splat(f32::from(p.read())) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        unsafe { Self::splat(f32::from(p.read())) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8) {
        unsafe { p.write(self.sum() as i32 as u8) }
    }
}
