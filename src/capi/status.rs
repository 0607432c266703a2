//! Status codes in C, the boundary that every call passes, and the text of the last error.
//!
//! `guard` turns errors into codes, keeps their text for the thread, and stops panics. The text
//! lies in a fixed buffer: reporting an error never allocates.

use core::ffi::c_char;

use super::pointer;
#[cfg(feature = "std")]
use crate::error::Error;
use crate::error::{Result, Status};

/// What a call answers: KVC_OK, or a negative code. Numbers are never reused.
pub type kvc_status = i32;

/// The call did what it says.
pub const KVC_OK: kvc_status = 0;
/// An argument has a value that the function does not accept.
pub const KVC_ERR_INVALID_ARGUMENT: kvc_status = -1;
/// A required pointer is NULL.
pub const KVC_ERR_NULL_POINTER: kvc_status = -2;
/// A pointer is not aligned for its element type.
pub const KVC_ERR_MISALIGNED: kvc_status = -3;
/// struct_size is too small, or bytes past the known fields are not zero.
pub const KVC_ERR_STRUCT_SIZE: kvc_status = -4;
/// A size or an address does not fit.
pub const KVC_ERR_OVERFLOW: kvc_status = -5;
/// Valid, but this build cannot do it.
pub const KVC_ERR_UNSUPPORTED: kvc_status = -6;
/// A handle or sequence id is not live, or belongs to another object.
pub const KVC_ERR_STALE_HANDLE: kvc_status = -7;
/// A buffer that the caller gave is smaller than the call needs.
pub const KVC_ERR_BUFFER_TOO_SMALL: kvc_status = -8;
/// A block id is outside the pool, or the block is not allocated.
pub const KVC_ERR_BAD_BLOCK: kvc_status = -9;
/// Not enough free or evictable blocks; nothing was taken. An ordinary answer.
pub const KVC_ERR_OUT_OF_BLOCKS: kvc_status = -100;
/// Every sequence slot is in use.
pub const KVC_ERR_OUT_OF_SEQUENCES: kvc_status = -101;
/// The system refused memory.
pub const KVC_ERR_OUT_OF_MEMORY: kvc_status = -102;
/// Every handle slot of the process is in use.
pub const KVC_ERR_TOO_MANY_HANDLES: kvc_status = -103;
/// The library was built without kernels for this device.
pub const KVC_ERR_NO_KERNELS: kvc_status = -200;
/// The device is not present.
pub const KVC_ERR_NO_DEVICE: kvc_status = -201;
/// The device or its driver reported an error.
pub const KVC_ERR_DEVICE_FAILED: kvc_status = -202;
/// A tier's files or store failed; the cache works on without it.
pub const KVC_ERR_TIER_FAILED: kvc_status = -203;
/// The object is not in a state in which the call is allowed, or another call is using it.
pub const KVC_ERR_INVALID_STATE: kvc_status = -300;
/// A layer of a sequence was to be loaded from a tier, and never will be: kvc_onboard_cancel, and its
/// tokens are to be computed.
pub const KVC_ERR_LAYER_MISSING: kvc_status = -301;
/// The library panicked; the object involved is poisoned.
pub const KVC_ERR_PANIC: kvc_status = -900;
/// An earlier panic left the object unusable; only destroying it is allowed.
pub const KVC_ERR_POISONED: kvc_status = -901;

/// Every code with its status: the one list that turns numbers into texts.
const CODES: [(kvc_status, Status); 22] = [
    (KVC_OK, Status::Ok),
    (KVC_ERR_INVALID_ARGUMENT, Status::InvalidArgument),
    (KVC_ERR_NULL_POINTER, Status::NullPointer),
    (KVC_ERR_MISALIGNED, Status::Misaligned),
    (KVC_ERR_STRUCT_SIZE, Status::StructSize),
    (KVC_ERR_OVERFLOW, Status::Overflow),
    (KVC_ERR_UNSUPPORTED, Status::Unsupported),
    (KVC_ERR_STALE_HANDLE, Status::StaleHandle),
    (KVC_ERR_BUFFER_TOO_SMALL, Status::BufferTooSmall),
    (KVC_ERR_BAD_BLOCK, Status::BadBlock),
    (KVC_ERR_OUT_OF_BLOCKS, Status::OutOfBlocks),
    (KVC_ERR_OUT_OF_SEQUENCES, Status::OutOfSequences),
    (KVC_ERR_OUT_OF_MEMORY, Status::OutOfMemory),
    (KVC_ERR_TOO_MANY_HANDLES, Status::TooManyHandles),
    (KVC_ERR_NO_KERNELS, Status::NoKernels),
    (KVC_ERR_NO_DEVICE, Status::NoDevice),
    (KVC_ERR_DEVICE_FAILED, Status::DeviceFailed),
    (KVC_ERR_TIER_FAILED, Status::TierFailed),
    (KVC_ERR_INVALID_STATE, Status::InvalidState),
    (KVC_ERR_LAYER_MISSING, Status::LayerMissing),
    (KVC_ERR_PANIC, Status::Panic),
    (KVC_ERR_POISONED, Status::Poisoned),
];

// A status without a code here, or with another number, does not compile.
const _: () = {
    const fn code(status: Status) -> kvc_status {
        match status {
            Status::Ok => KVC_OK,
            Status::InvalidArgument => KVC_ERR_INVALID_ARGUMENT,
            Status::NullPointer => KVC_ERR_NULL_POINTER,
            Status::Misaligned => KVC_ERR_MISALIGNED,
            Status::StructSize => KVC_ERR_STRUCT_SIZE,
            Status::Overflow => KVC_ERR_OVERFLOW,
            Status::Unsupported => KVC_ERR_UNSUPPORTED,
            Status::StaleHandle => KVC_ERR_STALE_HANDLE,
            Status::BufferTooSmall => KVC_ERR_BUFFER_TOO_SMALL,
            Status::BadBlock => KVC_ERR_BAD_BLOCK,
            Status::OutOfBlocks => KVC_ERR_OUT_OF_BLOCKS,
            Status::OutOfSequences => KVC_ERR_OUT_OF_SEQUENCES,
            Status::OutOfMemory => KVC_ERR_OUT_OF_MEMORY,
            Status::TooManyHandles => KVC_ERR_TOO_MANY_HANDLES,
            Status::NoKernels => KVC_ERR_NO_KERNELS,
            Status::NoDevice => KVC_ERR_NO_DEVICE,
            Status::DeviceFailed => KVC_ERR_DEVICE_FAILED,
            Status::TierFailed => KVC_ERR_TIER_FAILED,
            Status::InvalidState => KVC_ERR_INVALID_STATE,
            Status::LayerMissing => KVC_ERR_LAYER_MISSING,
            Status::Panic => KVC_ERR_PANIC,
            Status::Poisoned => KVC_ERR_POISONED,
        }
    }
    let mut i = 0;
    while i < CODES.len() {
        assert!(CODES[i].0 == CODES[i].1 as kvc_status && code(CODES[i].1) == CODES[i].0);
        i += 1;
    }
};

/// Copies a short English text of `status` as snprintf would, and returns the length of the whole
/// text in bytes, the NUL not counted. `buf` may be NULL with a `len` of 0.
///
/// Threads: thread-safe.
///
/// # Safety
/// `buf` must be writable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_status_text(status: kvc_status, buf: *mut c_char, len: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { pointer::copy_text(text_of(status), buf, len) }
}

/// Copies the text of the last error of a call on this thread, as snprintf would, and returns the
/// length of the whole text in bytes, the NUL not counted: it names the argument or the limit that
/// was hit. `buf` may be NULL with a `len` of 0. A call that succeeds leaves the text as it was;
/// before the first error it is empty.
///
/// Threads: thread-safe; each thread has its own text.
///
/// # Safety
/// `buf` must be writable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_last_error(buf: *mut c_char, len: u64) -> u64 {
    // SAFETY: the caller's promise.
    last::with(|text| unsafe { pointer::copy_text(text, buf, len) })
}

/// The blocks that were missing at the last KVC_ERR_OUT_OF_BLOCKS of this thread: how many must be
/// freed before the same call can succeed. 0 before the first.
///
/// Threads: thread-safe; each thread has its own number.
#[unsafe(no_mangle)]
pub extern "C" fn kvc_last_missing_blocks() -> u32 {
    last::missing()
}

fn text_of(code: kvc_status) -> &'static str {
    match CODES.iter().find(|(known, _)| *known == code) {
        Some((_, status)) => status.text(),
        None => "unknown status",
    }
}

/// Runs the body of a call: its error becomes the call's status and the thread's last error.
#[cfg(feature = "std")]
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> kvc_status {
    // A panic leaves half-changed state only in objects that were borrowed, and those it poisons.
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
    report(caught.unwrap_or_else(|payload| {
        // What a payload's own drop does is not ours to catch again.
        core::mem::forget(payload);
        Err(Error::Panic)
    }))
}

/// Runs the body of a call: its error becomes the call's status.
#[cfg(not(feature = "std"))]
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> kvc_status {
    report(body())
}

/// The status of a result; an error becomes the thread's last error.
pub(super) fn report<T>(result: Result<T>) -> kvc_status {
    match result {
        Ok(_) => KVC_OK,
        Err(error) => {
            last::set(&error);
            error.status() as kvc_status
        }
    }
}

/// The last error of each thread, with its details.
#[cfg(feature = "std")]
mod last {
    use core::cell::{Cell, RefCell};
    use core::fmt::{self, Write};

    use crate::error::Error;

    /// Longer than any text that an error makes.
    const BYTES: usize = 256;

    struct Text {
        bytes: [u8; BYTES],
        len: usize,
    }

    impl Write for Text {
        fn write_str(&mut self, part: &str) -> fmt::Result {
            let mut fits = part.len().min(BYTES - self.len);
            while !part.is_char_boundary(fits) {
                fits -= 1;
            }
            self.bytes[self.len..self.len + fits].copy_from_slice(&part.as_bytes()[..fits]);
            self.len += fits;
            Ok(())
        }
    }

    std::thread_local! {
        static TEXT: RefCell<Text> = const { RefCell::new(Text { bytes: [0; BYTES], len: 0 }) };
        static MISSING: Cell<u32> = const { Cell::new(0) };
    }

    pub(super) fn missing() -> u32 {
        MISSING.get()
    }

    pub(super) fn set(error: &Error) {
        if let Error::OutOfBlocks { missing, .. } = error {
            MISSING.set(*missing);
        }
        TEXT.with_borrow_mut(|text| {
            text.len = 0;
            let _ = write!(text, "{}: {error}", error.status().text());
        });
    }

    pub(super) fn with<R>(read: impl FnOnce(&str) -> R) -> R {
        TEXT.with_borrow(|text| read(core::str::from_utf8(&text.bytes[..text.len]).unwrap_or("")))
    }
}

/// Without threads to tell apart: the text of the last code.
#[cfg(not(feature = "std"))]
mod last {
    use core::sync::atomic::{AtomicI32, AtomicU32, Ordering};

    use crate::error::Error;

    static CODE: AtomicI32 = AtomicI32::new(0);
    static MISSING: AtomicU32 = AtomicU32::new(0);

    pub(super) fn missing() -> u32 {
        MISSING.load(Ordering::Relaxed)
    }

    pub(super) fn set(error: &Error) {
        if let Error::OutOfBlocks { missing, .. } = error {
            MISSING.store(*missing, Ordering::Relaxed);
        }
        CODE.store(error.status() as i32, Ordering::Relaxed);
    }

    pub(super) fn with<R>(read: impl FnOnce(&str) -> R) -> R {
        match CODE.load(Ordering::Relaxed) {
            0 => read(""),
            code => read(super::text_of(code)),
        }
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use alloc::string::String;
    use core::ptr;

    use super::*;

    fn last_error() -> String {
        let mut buf = [0u8; 300];
        // SAFETY: the buffer is as long as it says.
        let len = unsafe { kvc_last_error(buf.as_mut_ptr().cast(), buf.len() as u64) } as usize;
        String::from_utf8(buf[..len].to_vec()).unwrap()
    }

    #[test]
    fn errors_leave_a_code_and_a_text_on_their_thread() {
        assert_eq!(guard(|| Err(Error::BadBlock { block: 9 })), KVC_ERR_BAD_BLOCK);
        assert_eq!(last_error(), "bad block id: block 9 is not an allocated block of this pool");
        assert_eq!(guard(|| Ok(())), KVC_OK);
        assert!(last_error().contains("block 9"), "success leaves the text");
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(last_error(), ""));
        });
    }

    #[test]
    fn a_panic_becomes_a_code() {
        let code = guard(|| std::panic::resume_unwind(alloc::boxed::Box::new(())));
        assert_eq!(code, KVC_ERR_PANIC);
        assert!(last_error().contains("panic"));
    }

    #[test]
    fn every_code_has_a_text() {
        for (code, status) in CODES {
            let mut buf = [0u8; 100];
            // SAFETY: the buffer is as long as it says; NULL is not written.
            unsafe {
                let len = kvc_status_text(code, buf.as_mut_ptr().cast(), 100) as usize;
                assert_eq!(&buf[..len], status.text().as_bytes());
                assert_eq!(kvc_status_text(code, ptr::null_mut(), 0) as usize, len);
            }
        }
        assert_eq!(text_of(-12345), "unknown status");
    }
}
