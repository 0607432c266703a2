//! A batch of transfers: through io_uring where it is there, else one after the other.

use alloc::vec::Vec;
use std::io::Result;

use super::files::{DiskFile, read_all, write_all};
#[cfg(all(feature = "io-uring", target_os = "linux"))]
use super::uring::Ring;

/// Bytes to move.
#[derive(Debug)]
pub enum Bytes<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

/// One transfer.
#[derive(Debug)]
pub struct Transfer<'a> {
    pub file: &'a dyn DiskFile,
    pub offset: u64,
    pub bytes: Bytes<'a>,
}

impl Transfer<'_> {
    /// All of it from byte `done` on, by plain calls.
    pub fn finish(&mut self, done: usize) -> Result<()> {
        let offset = self.offset + done as u64;
        match &mut self.bytes {
            Bytes::Read(bytes) => read_all(self.file, &mut bytes[done..], offset),
            Bytes::Write(bytes) => write_all(self.file, &bytes[done..], offset),
        }
    }
}

/// What runs batches: belongs to one thread at a time.
#[derive(Debug, Default)]
pub struct Lane {
    #[cfg(all(feature = "io-uring", target_os = "linux"))]
    ring: Option<Ring>,
}

impl Lane {
    /// With a ring where `uring` asks for one and the system has it.
    pub fn new(uring: bool) -> Self {
        #[cfg(all(feature = "io-uring", target_os = "linux"))]
        return Lane { ring: uring.then(Ring::new).and_then(Result::ok) };
        #[cfg(not(all(feature = "io-uring", target_os = "linux")))]
        {
            let _ = uring;
            Lane {}
        }
    }

    /// Whether it goes through io_uring.
    pub fn is_uring(&self) -> bool {
        #[cfg(all(feature = "io-uring", target_os = "linux"))]
        return self.ring.is_some();
        #[cfg(not(all(feature = "io-uring", target_os = "linux")))]
        false
    }

    /// Makes all transfers; one result each.
    pub fn run(&mut self, transfers: &mut [Transfer]) -> Vec<Result<()>> {
        #[cfg(all(feature = "io-uring", target_os = "linux"))]
        if let Some(ring) = &mut self.ring
            && transfers.iter().all(|transfer| transfer.file.descriptor().is_some())
        {
            match ring.run(transfers) {
                Ok(results) => return results,
                // Nothing of the ring is in flight any more; plain calls do the whole batch.
                Err(_) => self.ring = None,
            }
        }
        transfers.iter_mut().map(|transfer| transfer.finish(0)).collect()
    }
}
