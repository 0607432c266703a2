//! Memory for cached blocks: zeroed, aligned to pages, in huge pages where the system has them.
//!
//! A cache is read by streaming through gigabytes of it; with 4 KiB pages the address translation
//! alone costs bandwidth. Knows nothing of blocks.

use alloc::alloc::{Layout, alloc_zeroed, dealloc};
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
        let start =
            NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(Error::OutOfMemory { bytes })?;
        #[cfg(all(feature = "std", target_os = "linux"))]
        if align == HUGE_PAGE_BYTES {
            // Advice only: where it is refused, the memory works as it is.
            // SAFETY: the range was just allocated.
            unsafe { libc::madvise(start.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        }
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
