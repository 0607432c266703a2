//! Memory for cached blocks: zeroed, aligned to pages, in huge pages where the system has them.
//!
//! A cache is read by streaming through gigabytes of it; with 4 KiB pages the address translation
//! alone costs bandwidth. Knows nothing of blocks.

use alloc::alloc::{Layout, alloc, dealloc};
use core::ptr::NonNull;

use crate::error::{Error, Result};

const PAGE_BYTES: usize = 4096;
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// An owned, zeroed range of memory.
#[derive(Debug)]
pub(super) struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain owned bytes; access goes through `&self` and `&mut self` of the owner.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `bytes` zeroed bytes.
    ///
    /// # Errors
    /// `OutOfMemory` where the system refuses, `Overflow` where the size is not one.
    pub(super) fn zeroed(bytes: u64) -> Result<Self> {
        let overflow = Error::Overflow { what: "pool bytes" };
        let size = usize::try_from(bytes).map_err(|_| overflow)?.max(1);
        let align = if size >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        let layout = Layout::from_size_align(size, align).map_err(|_| overflow)?;
        // SAFETY: the size is not zero.
        let start = NonNull::new(unsafe { alloc(layout) }).ok_or(Error::OutOfMemory { bytes })?;
        // Before the first byte is written: a page that is there already stays as small as it is.
        #[cfg(all(feature = "std", target_os = "linux"))]
        if align == HUGE_PAGE_BYTES {
            // Advice only: where it is refused, the memory works as it is.
            // SAFETY: the range was just allocated.
            unsafe { libc::madvise(start.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: as above. Written and not only asked for, so that no page is missing later, in the
        // middle of a step.
        unsafe { start.as_ptr().write_bytes(0, size) };
        Ok(Self { start, layout })
    }

    /// The first byte. Reads and writes through it must stay below [`bytes`](Self::bytes).
    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The size.
    pub(super) fn bytes(&self) -> u64 {
        self.layout.size() as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and owned.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(all(test, feature = "std", target_os = "linux", not(miri)))]
mod tests {
    use super::*;

    /// KiB of huge pages in the mapping that has `address`.
    fn huge_kib(address: usize) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let mut inside = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let ends =
                range.map(|(a, b)| (usize::from_str_radix(a, 16), usize::from_str_radix(b, 16)));
            if let Some((Ok(start), Ok(end))) = ends {
                inside = (start..end).contains(&address);
            } else if let Some(kib) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
                return kib.trim().trim_end_matches(" kB").parse().unwrap();
            }
        }
        0
    }

    const BYTES: usize = 64 << 20;

    /// Whether ours has all the huge pages that a mapping of its own gets which asks for them before it
    /// writes; on a system that gives it none, so does ours.
    fn as_huge_as_can_be() -> bool {
        let memory = Memory::zeroed(BYTES as u64).unwrap();
        // SAFETY: its own bytes.
        let bytes = unsafe { core::slice::from_raw_parts(memory.start(), BYTES) };
        assert!(bytes.iter().all(|&byte| byte == 0));
        let ours = huge_kib(memory.start().addr());
        // SAFETY: a new mapping, unmapped below; nothing outside it is written.
        let theirs = unsafe {
            let (read_write, private) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let start = libc::mmap(core::ptr::null_mut(), 2 * BYTES, read_write, private, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            libc::madvise(start, 2 * BYTES, libc::MADV_HUGEPAGE);
            start.cast::<u8>().write_bytes(0, 2 * BYTES);
            let kib = huge_kib(start.addr());
            libc::munmap(start, 2 * BYTES);
            kib
        };
        std::println!("{ours} KiB of {}, {theirs} KiB of {}", BYTES >> 10, BYTES >> 9);
        // Less a page or two: an allocator that checks what it gives may write to the ends.
        theirs < BYTES >> 9 || ours >= (BYTES - 2 * HUGE_PAGE_BYTES) >> 10
    }

    #[test]
    fn memory_is_zero_and_in_huge_pages_where_the_system_gives_them() {
        // The system may be out of huge pages for a moment.
        assert!((0..3).any(|_| as_huge_as_can_be()));
    }
}
