//! The one call that the standard library has not: taking room on a disk before it is written.

use std::io::{Error, Result};
use std::os::fd::RawFd;

/// Takes room for the bytes from `offset` on, and makes the file so long.
///
/// # Errors
/// `ENOSPC` where there is none, `EOPNOTSUPP` where the file system cannot.
pub fn allocate(file: RawFd, offset: u64, bytes: u64) -> Result<()> {
    let overflow = |_| Error::from_raw_os_error(libc::EFBIG);
    let (offset, bytes) =
        (offset.try_into().map_err(overflow)?, bytes.try_into().map_err(overflow)?);
    // SAFETY: a call with three numbers; `file` is open in the caller.
    match unsafe { libc::fallocate(file, 0, offset, bytes) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}
