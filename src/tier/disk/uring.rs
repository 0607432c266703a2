//! Batches of reads and writes through io_uring: all of a batch is in flight at once.

use alloc::vec::Vec;
use std::io::{Error, Result};

use io_uring::{IoUring, opcode, types};

use super::io::{Bytes, Transfer};

/// Transfers in flight.
const DEPTH: u32 = 32;

/// A ring.
pub struct Ring(IoUring);

impl core::fmt::Debug for Ring {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Ring")
    }
}

impl Ring {
    /// A ring, where the system has them and lets this process have one.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new() -> Result<Self> {
        IoUring::new(DEPTH).map(Ring)
    }

    /// Makes all transfers; one result each. Every file has a descriptor.
    ///
    /// # Errors
    /// Where the ring itself fails. Nothing is in flight then.
    pub fn run(&mut self, transfers: &mut [Transfer]) -> Result<Vec<Result<()>>> {
        let mut results = Vec::with_capacity(transfers.len());
        for part in transfers.chunks_mut(DEPTH as usize) {
            let done = self.run_part(part)?;
            for (transfer, done) in part.iter_mut().zip(done) {
                results.push(match done {
                    // Short, or at the end of the file: plain calls finish it, or say why not.
                    done if done >= 0 => transfer.finish(done as usize),
                    code if -code == libc::EINTR || -code == libc::EAGAIN => transfer.finish(0),
                    code => Err(Error::from_raw_os_error(-code)),
                });
            }
        }
        Ok(results)
    }

    /// The kernel's answers to at most [`DEPTH`] transfers.
    fn run_part(&mut self, part: &mut [Transfer]) -> Result<Vec<i32>> {
        let mut answers = alloc::vec![0; part.len()];
        let mut queue = self.0.submission();
        for (n, transfer) in part.iter_mut().enumerate() {
            let file = types::Fd(transfer.file.descriptor().unwrap_or(-1));
            // A longer transfer comes back short and is finished by plain calls.
            let length = |bytes: usize| bytes.min(1 << 30) as u32;
            let entry = match &mut transfer.bytes {
                Bytes::Read(bytes) => {
                    opcode::Read::new(file, bytes.as_mut_ptr(), length(bytes.len()))
                        .offset(transfer.offset)
                        .build()
                }
                Bytes::Write(bytes) => {
                    opcode::Write::new(file, bytes.as_ptr(), length(bytes.len()))
                        .offset(transfer.offset)
                        .build()
                }
            };
            // SAFETY: files and bytes are borrowed by `part` until this function returns, which it
            // does only when every entry has been answered, or was never given to the kernel.
            let pushed = unsafe { queue.push(&entry.user_data(n as u64)) };
            if pushed.is_err() {
                // Impossible: the queue is empty between calls and as long as a part.
                std::process::abort();
            }
        }
        drop(queue);
        let mut waiting = part.len();
        while waiting > 0 {
            let submitted = self.0.submit_and_wait(1);
            for answer in self.0.completion() {
                if let Some(place) = answers.get_mut(answer.user_data() as usize) {
                    *place = answer.result();
                    waiting -= 1;
                }
            }
            if let Err(error) = submitted {
                let again =
                    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY));
                if again {
                    continue;
                }
                // What the kernel has cannot be taken back; its memory must stay. Entries that it
                // has not stay in a ring that is dropped with them.
                if self.0.submission().len() == waiting {
                    return Err(error);
                }
                std::process::abort();
            }
        }
        Ok(answers)
    }
}
