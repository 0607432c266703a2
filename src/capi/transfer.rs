//! The transfer noun: blocks of a sequence from one cache to another, over whatever has a descriptor.
//!
//! A descriptor is what every language has and what a file, a pipe, a socket and anonymous memory have
//! in common. A peer that has gone is an error here and no SIGPIPE, which an engine need not expect.

use alloc::vec::Vec;
use core::ffi::c_char;
use core::mem::{MaybeUninit, zeroed};
use std::io::{self, BufWriter, Read, Write};

use super::cache::{kvc_cache, open};
use super::pointer;
use super::seq::kvc_seq;
use super::status::{guard, kvc_status};
use super::tier::{kvc_tier_slice, part};
use crate::error::{Error, Result};
use crate::ids::{Namespace, SeqId};

/// The most streams of one import.
const MOST_STREAMS: u64 = 1024;

/// The caller's descriptor; not closed here.
struct Descriptor(i32);

impl Descriptor {
    fn new(fd: i32) -> Result<Self> {
        if fd < 0 { Err(Error::invalid("fd", "must be an open descriptor")) } else { Ok(Self(fd)) }
    }

    /// Repeats a system call that a signal interrupts.
    fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
        loop {
            match usize::try_from(call()) {
                Ok(bytes) => return Ok(bytes),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

impl Read for Descriptor {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the buffer is writable for its length.
        Self::retry(|| unsafe { libc::read(self.0, into.as_mut_ptr().cast(), into.len()) })
    }
}

impl Write for Descriptor {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the bytes are readable for their length.
        Self::retry(|| unsafe { libc::write(self.0, bytes.as_ptr().cast(), bytes.len()) })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs `write` with SIGPIPE held off this thread, and takes back the one that it caused.
fn without_sigpipe<T>(write: impl FnOnce() -> T) -> T {
    // SAFETY: sets and masks are this function's own; the calls cannot fail with them.
    unsafe {
        let (mut pipe, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        libc::sigemptyset(pipe.as_mut_ptr());
        let mut pipe = pipe.assume_init();
        libc::sigaddset(&mut pipe, libc::SIGPIPE);
        let waits = || {
            let mut pending: libc::sigset_t = zeroed();
            libc::sigpending(&mut pending);
            libc::sigismember(&pending, libc::SIGPIPE) == 1
        };
        let already = waits();
        libc::pthread_sigmask(libc::SIG_BLOCK, &pipe, before.as_mut_ptr());
        let result = write();
        if !already && waits() {
            let mut signal = 0;
            libc::sigwait(&pipe, &mut signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), core::ptr::null_mut());
        result
    }
}

/// Writes the full blocks of a sequence to the descriptor `fd`, which must block and is not closed; how
/// many tokens those are goes to `out_tokens`. `model` is what the reader calls the model too, at most
/// 1024 bytes; `slices[slice_count]` say where in it the cache's layer groups lie, NULL for a cache of
/// the whole model. The cache is in use until all is written: where the other side may be slow, write
/// to memory or a file first. KVC_ERR_TIER_FAILED where writing fails, also because nobody reads any
/// more (there is no SIGPIPE); what was written by then is no stream.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_tokens` is writable, `fd` is the caller's for the time of the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_transfer_export(
    cache: *mut kvc_cache,
    seq: kvc_seq,
    model: *const c_char,
    slices: *const kvc_tier_slice,
    slice_count: u32,
    fd: i32,
    out_tokens: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (model, out) = unsafe {
            (pointer::text(model, 1024, "model")?, pointer::out(out_tokens, "out_tokens")?)
        };
        let model = model.ok_or(Error::NullPointer { what: "model" })?;
        let mut to = BufWriter::new(Descriptor::new(fd)?);
        let cache = open(cache)?;
        let mut cache = cache.lock()?;
        // SAFETY: see above.
        let slice = unsafe { part(slices, slice_count, cache.spec()) }?;
        let tokens = without_sigpipe(|| {
            let tokens = cache.export_blocks(SeqId(seq), model, Some(&slice), &mut to);
            let flushed = to.flush();
            // What is left in the buffer is not to be tried again.
            let _ = to.into_parts();
            let tokens = tokens?;
            flushed.map_err(|error| Error::TierFailed {
                what: "the stream",
                os_code: error.raw_os_error().unwrap_or(0),
            })?;
            Ok(tokens)
        })?;
        out.write(tokens as u64);
        Ok(())
    })
}

/// Reads the blocks of a sequence from streams that kvc_transfer_export wrote, into the prefix index of
/// `name_space`, where sequences that are started find them; how many tokens are there then goes to
/// `out_tokens`. The `fd_count` descriptors block, are not closed, and are read to the ends of their
/// streams and no further. Several streams are parts of one: of the same tokens, and together with all
/// layers and heads that this cache holds. The cache is in use until all is read.
///
/// KVC_ERR_INVALID_ARGUMENT for streams that are damaged, of another model, namespace or format, or do
/// not cover the cache's part; KVC_ERR_TIER_FAILED where one fails or ends early; KVC_ERR_UNSUPPORTED
/// for sealed tiles that would have to be cut, or beside other sink_tokens. Nothing is cached then.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_tokens` is writable, the descriptors are the caller's for the time of the
/// call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_transfer_import(
    cache: *mut kvc_cache,
    name_space: u64,
    model: *const c_char,
    slices: *const kvc_tier_slice,
    slice_count: u32,
    fds: *const i32,
    fd_count: u32,
    out_tokens: *mut u64,
) -> kvc_status {
    guard(|| {
        if u64::from(fd_count) > MOST_STREAMS {
            return Err(Error::invalid("fd_count", "must be at most 1024"));
        }
        // SAFETY: the caller's promise, here and below.
        let (model, fds, out) = unsafe {
            (
                pointer::text(model, 1024, "model")?,
                pointer::slice(fds, fd_count.into(), "fds")?,
                pointer::out(out_tokens, "out_tokens")?,
            )
        };
        let model = model.ok_or(Error::NullPointer { what: "model" })?;
        let mut from: Vec<Descriptor> =
            fds.iter().map(|&fd| Descriptor::new(fd)).collect::<Result<_>>()?;
        let mut streams: Vec<&mut dyn Read> =
            from.iter_mut().map(|from| from as &mut dyn Read).collect();
        let cache = open(cache)?;
        let mut cache = cache.lock()?;
        // SAFETY: see above.
        let slice = unsafe { part(slices, slice_count, cache.spec()) }?;
        let tokens =
            cache.import_blocks(&mut streams, model, Some(&slice), Namespace(name_space))?;
        out.write(tokens as u64);
        Ok(())
    })
}
