//! Host memory that a device copies from and to by itself, in parts that know whether it is at them.
//!
//! A copy that is enqueued goes on when its caller has returned. So each part carries the [`Flight`] of
//! the copies that it last took part in: who reads a part that the device writes, or writes or frees one
//! that it is at, waits for that here. Nothing else keeps the two apart.

use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Deref, DerefMut, Range};
use core::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Backend, Flight};
use crate::error::{Error, Result};

const ALIGN: usize = 4096;

/// Plain memory: zeroed, at least a byte, at a page.
pub(super) fn alloc_plain(bytes: usize) -> Result<NonNull<u8>> {
    let refused = Error::OutOfMemory { bytes: bytes as u64 };
    let layout = Layout::from_size_align(bytes.max(1), ALIGN).map_err(|_| refused)?;
    // SAFETY: the size is not zero.
    NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(refused)
}

/// Gives it back.
///
/// # Safety
/// From [`alloc_plain`] with this size, once; nobody uses it any more.
pub(super) unsafe fn free_plain(at: NonNull<u8>, bytes: usize) {
    if let Ok(layout) = Layout::from_size_align(bytes.max(1), ALIGN) {
        // SAFETY: the caller's promise: allocated with this layout.
        unsafe { dealloc(at.as_ptr(), layout) }
    }
}

/// An allocation.
struct HostMemory {
    backend: Arc<dyn Backend>,
    at: NonNull<u8>,
    bytes: usize,
    /// Of the backend; else plain.
    locked: bool,
}

// SAFETY: plain bytes; the parts, which do not overlap, say who is at them.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated by `allocate`, freed once; every part is gone, and waited for what copied
        // it.
        unsafe {
            match self.locked {
                true => self.backend.free_host(self.at, self.bytes),
                false => free_plain(self.at, self.bytes),
            }
        }
    }
}

/// A range of host memory that has one owner.
pub struct HostPart {
    memory: Arc<HostMemory>,
    at: usize,
    bytes: usize,
    loan: Mutex<Loan>,
}

/// What the device does with a part.
#[derive(Debug, Default)]
struct Loan {
    writing: Option<Arc<Flight>>,
    reading: Vec<Arc<Flight>>,
    /// What it was to write last failed.
    spoiled: Option<Error>,
}

impl Loan {
    /// Notes what has ended.
    fn settle(&mut self) {
        if let Some(result) = self.writing.as_ref().and_then(|flight| flight.poll()) {
            self.writing = None;
            self.spoiled = result.err();
        }
        self.reading.retain(|flight| flight.poll().is_none());
    }
}

impl fmt::Debug for HostPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostPart").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl HostPart {
    /// Allocates `count` parts of `bytes` bytes, whole pages, in one piece: where `locked`, of the
    /// backend's own memory ([`Backend::alloc_host`]), else plain.
    ///
    /// # Errors
    /// `InvalidArgument` for parts that are not whole pages, `OutOfMemory`, `DeviceFailed`.
    pub fn allocate(
        backend: &Arc<dyn Backend>,
        bytes: usize,
        count: usize,
        locked: bool,
    ) -> Result<impl Iterator<Item = HostPart>> {
        if !bytes.is_multiple_of(ALIGN) || bytes == 0 {
            return Err(Error::invalid("bytes", "must be whole pages"));
        }
        let all = bytes.checked_mul(count).filter(|&all| isize::try_from(all).is_ok());
        let all = all.ok_or(Error::OutOfMemory { bytes: u64::MAX })?;
        let at = if locked { backend.alloc_host(all)? } else { alloc_plain(all)? };
        let memory = HostMemory { backend: backend.clone(), at, bytes: all, locked };
        let memory = Arc::new(memory);
        Ok((0..count).map(move |n| HostPart {
            memory: memory.clone(),
            at: n * bytes,
            bytes,
            loan: Mutex::default(),
        }))
    }

    /// Whether the device copies from and to it by itself.
    pub fn is_locked(&self) -> bool {
        self.memory.locked && self.memory.backend.locks_pages()
    }

    fn loan(&self) -> MutexGuard<'_, Loan> {
        // Whole after every assignment.
        self.loan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the device is at it still. Waits for nothing.
    pub fn is_lent(&self) -> bool {
        let mut loan = self.loan();
        loan.settle();
        loan.writing.is_some() || !loan.reading.is_empty()
    }

    /// Waits until what the device is to write is there.
    ///
    /// # Errors
    /// `DeviceFailed` where it never will be.
    pub fn arrived(&self) -> Result<()> {
        self.wait(false, None);
        self.loan().spoiled.map_or(Ok(()), Err)
    }

    /// Waits until the device has done with it: to read it, or to `write` it. For one flight nobody
    /// waits.
    fn wait(&self, write: bool, but: Option<&Arc<Flight>>) {
        let mut loan = self.loan();
        loop {
            loan.settle();
            let reading = loan.reading.iter().filter(|_| write);
            let mut others = loan.writing.iter().chain(reading);
            let next = others.find(|flight| but.is_none_or(|but| !Arc::ptr_eq(but, flight)));
            let Some(flight) = next.cloned() else { return };
            // Others look at the loan meanwhile, and do not wait.
            drop(loan);
            // How it ended is noted with the loan.
            let _ = flight.wait();
            loan = self.loan();
        }
    }

    /// The flight that writes it, while it is under way.
    pub(super) fn writing(&self) -> Option<Arc<Flight>> {
        let mut loan = self.loan();
        loan.settle();
        loan.writing.clone()
    }

    /// Hands a range of it to a flight that reads it: the address. Who writes it waits for the flight.
    ///
    /// # Errors
    /// `Overflow` past its end; `DeviceFailed` where what was to be written there failed; `OutOfMemory`.
    pub(super) fn lend(&self, range: Range<usize>, flight: &Arc<Flight>) -> Result<*mut u8> {
        let at = self.address(range)?;
        let mut loan = self.loan();
        loan.settle();
        if let Some(error) = loan.spoiled {
            return Err(error);
        }
        if !loan.reading.last().is_some_and(|last| Arc::ptr_eq(last, flight)) {
            let refused = Error::OutOfMemory { bytes: size_of::<Arc<Flight>>() as u64 };
            loan.reading.try_reserve(1).map_err(|_| refused)?;
            loan.reading.push(flight.clone());
        }
        Ok(at)
    }

    /// Hands a range of it to a flight that writes it: the address. Who reads it, or writes it, waits
    /// for the flight. Waits for what other flights do there.
    ///
    /// # Errors
    /// `Overflow` past its end.
    pub(super) fn give(&mut self, range: Range<usize>, flight: &Arc<Flight>) -> Result<*mut u8> {
        let at = self.address(range)?;
        self.wait(true, Some(flight));
        let mut loan = self.loan();
        (loan.writing, loan.spoiled) = (Some(flight.clone()), None);
        Ok(at)
    }

    fn address(&self, range: Range<usize>) -> Result<*mut u8> {
        if range.start > range.end || range.end > self.bytes {
            return Err(Error::Overflow { what: "a range of host memory" });
        }
        // SAFETY: within the allocation.
        Ok(unsafe { self.memory.at.as_ptr().add(self.at + range.start) })
    }
}

impl Deref for HostPart {
    type Target = [u8];

    /// Its bytes, when the device has written them.
    fn deref(&self) -> &[u8] {
        self.wait(false, None);
        // SAFETY: initialised bytes of the allocation, this part's own; nothing writes them, nor will
        // while they are borrowed: the device is handed a part to write by its only owner.
        unsafe {
            core::slice::from_raw_parts(
                self.memory.at.as_ptr().add(self.at).cast_const(),
                self.bytes,
            )
        }
    }
}

impl DerefMut for HostPart {
    /// Its bytes, when the device has done with them. What they are from here on is the owner's word.
    fn deref_mut(&mut self) -> &mut [u8] {
        self.wait(true, None);
        self.loan().spoiled = None;
        // SAFETY: as above, and borrowed alone.
        unsafe { core::slice::from_raw_parts_mut(self.memory.at.as_ptr().add(self.at), self.bytes) }
    }
}

impl Drop for HostPart {
    fn drop(&mut self) {
        self.wait(true, None);
    }
}
