//! The instruction sets of x86-64.

pub(super) mod avx2;
pub(super) mod avx512;
mod codes;
mod tiles;
mod vnni;

use core::arch::x86_64::*;

/// [`Words::permute16`](super::words::Words::permute16) in one instruction.
///
/// # Safety
/// As there, where SSSE3 is enabled.
#[inline(always)]
unsafe fn permute16(from: *const u8, pattern: &[u8; 16], to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        let pattern = _mm_loadu_si128(pattern.as_ptr().cast());
        _mm_storeu_si128(to.cast(), _mm_shuffle_epi8(_mm_loadu_si128(from.cast()), pattern));
    }
}

/// [`Words::crc32c`](super::words::Words::crc32c) by the instruction of SSE4.2, where there is nobody
/// to ask whether the CPU has it.
///
/// # Safety
/// As there, where SSE4.2 is enabled.
#[cfg(not(feature = "std"))]
#[inline(always)]
unsafe fn crc32c(before: u32, p: *const u8, bytes: usize) -> u32 {
    let mut crc = u64::from(!before);
    let whole = bytes / 8;
    // SAFETY: the caller's promise.
    unsafe {
        for i in 0..whole {
            crc = _mm_crc32_u64(crc, p.cast::<u64>().add(i).read_unaligned());
        }
        for i in 8 * whole..bytes {
            crc = u64::from(_mm_crc32_u8(crc as u32, p.add(i).read()));
        }
    }
    !(crc as u32)
}
