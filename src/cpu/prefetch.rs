//! Into which cache, and how far ahead, decode asks for memory: what suits one core holds another back.
//! Changes no result. Which is faster was measured; see `benches/results/attention-decode.txt`.

use core::sync::atomic::{AtomicU8, Ordering};

use crate::dtype::KvFormat;

/// The family of Zen 5.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const ZEN_5: u32 = 0x1a;

/// A way to ask for rows ahead of their use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Prefetch {
    /// Tens of KiB ahead into the second-level cache, twice, then 2 to 4 KiB ahead into the first:
    /// for a first-level cache of 32 KiB, whose few buffers for misses memory would hold (Zen 4).
    Levels,
    /// Into the first-level cache alone, twice: 16 and 8 KiB ahead. For one of 48 KiB with more
    /// buffers (Zen 5), where hints to the second level cost up to a fifth.
    First,
}

impl Prefetch {
    /// What suits rows of `format` on this CPU. Rows of codes keep to both levels: with hints to the
    /// first alone FP8 was 0.88 times as fast on Zen 5.
    pub(crate) fn of(format: KvFormat) -> Self {
        if format.is_float() { Self::of_cpu() } else { Self::Levels }
    }

    /// What suits sealed tiles of `format` on this CPU. Fewer than 8 bits are bound by instructions: a
    /// branch at each line made two bits 0.88 times as fast.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) fn of_tiles(format: KvFormat) -> Self {
        let wide = format.k_bits() == 8 && format.v_bits() == 8;
        if wide { Self::of_cpu() } else { Self::Levels }
    }

    /// What suits floats on this CPU: [`Levels`](Self::Levels) where nothing else was measured.
    pub(crate) fn of_cpu() -> Self {
        static KNOWN: AtomicU8 = AtomicU8::new(0);
        match KNOWN.load(Ordering::Relaxed) {
            0 => {
                let found = Self::found();
                KNOWN.store(1 + found as u8, Ordering::Relaxed);
                found
            }
            1 => Self::Levels,
            _ => Self::First,
        }
    }

    #[cfg(all(target_arch = "x86_64", not(miri)))]
    fn found() -> Self {
        use core::arch::x86_64::__cpuid;
        let vendor = __cpuid(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        let amd = name.as_flattened() == b"AuthenticAMD";
        let version = __cpuid(1).eax;
        let family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
        if amd && family >= ZEN_5 { Self::First } else { Self::Levels }
    }

    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    fn found() -> Self {
        Self::Levels
    }
}
