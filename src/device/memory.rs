//! Memory of a device that owns itself: allocated, checked against its size, freed.
//!
//! Safe code reaches device memory only through this type and the rows that callers vouch for.

use alloc::sync::Arc;

use super::{Backend, Stream};
use crate::error::{Error, Result};

/// An owned range of device memory, aligned to 256 bytes.
#[derive(Debug)]
pub struct DeviceMemory {
    backend: Arc<dyn Backend>,
    address: u64,
    bytes: u64,
}

impl DeviceMemory {
    /// Allocates `bytes` bytes of no particular content.
    ///
    /// # Errors
    /// `OutOfMemory`, `DeviceFailed`.
    pub fn new(backend: &Arc<dyn Backend>, bytes: u64) -> Result<Self> {
        let address = backend.alloc(bytes.max(1))?;
        Ok(Self { backend: backend.clone(), address, bytes })
    }

    /// The address of its first byte on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Whether it is memory of this very backend.
    pub fn is_on(&self, backend: &Arc<dyn Backend>) -> bool {
        Arc::ptr_eq(&self.backend, backend)
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The address of a part, checked to lie within.
    ///
    /// # Errors
    /// `Overflow` where it does not.
    pub fn part(&self, offset: u64, bytes: u64) -> Result<u64> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.address + offset),
            _ => Err(Error::Overflow { what: "a range of device memory" }),
        }
    }

    /// Makes it at least `bytes` long, at least doubled where it must grow. What it held is lost
    /// then.
    ///
    /// # Errors
    /// `OutOfMemory`, `DeviceFailed`; it is as before then.
    pub fn grow(&mut self, bytes: u64) -> Result<()> {
        if bytes > self.bytes {
            // The old range is freed after what is enqueued on it.
            *self = Self::new(&self.backend, bytes.max(self.bytes.saturating_mul(2)))?;
        }
        Ok(())
    }

    /// Copies `from` to the bytes from `offset` on, and waits for it.
    ///
    /// # Errors
    /// `Overflow` past the end, `DeviceFailed`.
    pub fn upload(&mut self, offset: u64, from: &[u8], stream: Stream) -> Result<()> {
        let to = self.part(offset, from.len() as u64)?;
        // SAFETY: the range is within this memory; `from` is borrowed until the copy is made.
        unsafe { self.backend.upload(to, from, stream) }?;
        self.backend.sync(stream)
    }

    /// Copies the bytes from `offset` on into `to`, after what is enqueued on `stream`.
    ///
    /// # Errors
    /// `Overflow` past the end, `DeviceFailed`.
    pub fn download(&self, offset: u64, to: &mut [u8], stream: Stream) -> Result<()> {
        let from = self.part(offset, to.len() as u64)?;
        // SAFETY: the range is within this memory. Bytes of a fresh allocation have some value.
        unsafe { self.backend.download(from, to, stream) }
    }

    /// Enqueues the zeroing of all of it.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn zero(&mut self, stream: Stream) -> Result<()> {
        // SAFETY: all of this memory.
        unsafe { self.backend.zero(self.address, self.bytes, stream) }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, freed once; `free` waits for what is enqueued.
        unsafe { self.backend.free(self.address) }
    }
}
