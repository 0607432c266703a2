//! A prefix index's copy on a device: kept up by uploads of what changed, and looked up in there, so
//! that an engine whose tokens are on the device need not bring them to the host.
//!
//! The copy knows its index by handle, so an index that was ended is an error and not a danger. One
//! index has one copy: what changed is told once. Nothing of a lookup is decided on the host.

use core::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use super::device::{kvc_device, opened};
use super::handle::{self, Noun};
use super::pointer::{self, Plain, Sized32, aligned};
use super::prefix::{kvc_prefix, read, write};
use super::status::{guard, kvc_status};
use crate::device::{Backend, DeviceMemory, Stream, launch};
use crate::error::{Error, Result};
use crate::kernels::params::{In, LookupPatch, Out};
use crate::kernels::{LookupBatch, LookupImage, LookupUpload};
use alloc::sync::Arc;

/// A device's copy of a prefix index. It is of the index as it was at its last
/// kvc_device_prefix_sync: a block that has been evicted since can still be found there, so whoever
/// acts on a result holds the evictions back, or takes references first.
pub struct kvc_device_prefix(());

/// What a copy's handle holds.
struct Copied {
    backend: Arc<dyn Backend>,
    /// The handle of the index: a number, checked whenever it is used.
    index: usize,
    image: LookupImage,
    memory: DeviceMemory,
    sync: Mutex<Upload>,
}

/// What an upload goes through, kept for the next.
struct Upload {
    host: LookupUpload,
    /// Runs, then words.
    device: DeviceMemory,
}

impl Noun for Copied {
    type Handle = kvc_device_prefix;
    const KIND: usize = 7;
    const NAME: &'static str = "device_prefix";
}

impl Copied {
    fn index(&self) -> *mut kvc_prefix {
        core::ptr::without_provenance_mut(self.index)
    }

    /// Uploads what changed in the index since the last call; the bytes that went up.
    fn upload(&self, stream: Stream) -> Result<u64> {
        // Whatever an interrupted call left is replaced.
        let mut upload = self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        let Upload { host, device } = &mut *upload;
        write(self.index(), |index| self.image.sync(index, host))?;
        let sent = self.send(host, device, stream);
        if sent.is_err() {
            // The copy missed something: the next upload is everything.
            write(self.index(), |index| {
                index.mark_all();
                Ok(())
            })?;
        }
        sent
    }

    fn send(&self, host: &LookupUpload, device: &mut DeviceMemory, stream: Stream) -> Result<u64> {
        // SAFETY: integers without padding: two words of `to`, then `from` and `words`.
        let (patches, words): (&[u8], &[u8]) =
            unsafe { (bytes(&host.patches), bytes(&host.words)) };
        let words_at = patches.len().next_multiple_of(256) as u64;
        device.grow(words_at + words.len() as u64)?;
        let at = device.address();
        let plan = self.image.patch_launch(
            self.memory.address(),
            host,
            In::at(at),
            In::at(at + words_at),
            Out::NULL,
        )?;
        let Some((plan, params)) = plan else { return Ok(0) };
        // SAFETY: the device memory has these bytes, and the lists are not page-locked, so they have
        // been read when the call returns; the kernel's addresses are of memory that is freed after
        // what is enqueued on it.
        unsafe {
            self.backend.upload(at, patches, stream)?;
            self.backend.upload(at + words_at, words, stream)?;
            launch(&*self.backend, &plan, &params, stream)?;
        }
        Ok((patches.len() + words.len()) as u64)
    }
}

/// The bytes of a list of numbers.
///
/// # Safety
/// `T` must have no padding.
unsafe fn bytes<T>(list: &[T]) -> &[u8] {
    const { assert!(size_of::<LookupPatch>() == 16) };
    // SAFETY: the list's own memory, all of which is set.
    unsafe { core::slice::from_raw_parts(list.as_ptr().cast(), size_of_val(list)) }
}

/// A batch of lookups. Every pointer is a device address.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_lookup_desc {
    /// sizeof(kvc_device_lookup_desc); kvc_device_lookup_desc_init sets it.
    pub struct_size: u32,
    /// Requests.
    pub requests: u32,
    /// Tokens at the end of each request that are not looked up. 1 by default, which leaves the last
    /// one to be computed, whose logits sampling needs.
    pub leave: u32,
    /// The most blocks that a request matches.
    pub max_blocks: u32,
    /// Tokens of all requests.
    pub tokens: *const u32,
    /// `[requests + 1]` offsets into tokens, ascending.
    pub indptr: *const i32,
    /// NULL for 0, or the name space of each request.
    pub name_spaces: *const u64,
    /// `[requests]`: tokens that whole cached blocks cover.
    pub matched: *mut u32,
    /// Their ids `[request][block][group]`; what follows a request's own is not written.
    pub blocks: *mut i32,
    /// Ids from a request to the next; 0 for max_blocks times the index's groups.
    pub block_stride: i64,
    /// NULL, or `[requests]`: how many tokens after those agree with one more cached block.
    pub tail_tokens: *mut u32,
    /// NULL, or `[requests][group]`: the ids of that block, -1 where there is none.
    pub tail_blocks: *mut i32,
    /// NULL, or a word in which bit 1 is set where offsets do not ascend, and bit 4 where the copy
    /// is not whole (it was never uploaded); such requests match nothing more.
    pub error_flag: *mut u32,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_device_lookup_desc {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_device_lookup_desc {
    const NAME: &'static str = "kvc_device_lookup_desc";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self { struct_size: size_of::<Self>() as u32, leave: 1, ..zero }
    }
}

impl kvc_device_lookup_desc {
    fn batch(&self, groups: u32) -> Result<LookupBatch> {
        let dense = i64::from(self.max_blocks).saturating_mul(i64::from(groups));
        Ok(LookupBatch {
            requests: self.requests,
            tokens: In::at(aligned(self.tokens, 4, "tokens")?),
            indptr: In::at(aligned(self.indptr, 4, "indptr")?),
            namespaces: In::at(aligned(self.name_spaces, 8, "name_spaces")?),
            leave: self.leave,
            max_blocks: self.max_blocks,
            matched: Out::at(aligned(self.matched, 4, "matched")?),
            blocks: Out::at(aligned(self.blocks, 4, "blocks")?),
            block_stride: if self.block_stride == 0 { dense } else { self.block_stride },
            tail_tokens: Out::at(aligned(self.tail_tokens, 4, "tail_tokens")?),
            tail_blocks: Out::at(aligned(self.tail_blocks, 4, "tail_blocks")?),
            error_flag: Out::at(aligned(self.error_flag, 4, "error_flag")?),
        })
    }
}

/// Writes the bytes of device memory that a copy of the index takes to `out_bytes`, beside what its
/// uploads go through: room for the fullest that the index can become, so that addresses never change
/// and a captured graph sees what was uploaded since.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_bytes` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_prefix_size(
    prefix: *const kvc_prefix,
    out_bytes: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out_bytes, "out_bytes") }?;
        out.write(read(prefix, LookupImage::new)?.bytes());
        Ok(())
    })
}

/// Makes a copy of the index on a device, of nothing yet: kvc_device_prefix_sync fills it. From then
/// on the index notes what changes in it. KVC_ERR_INVALID_STATE where it has a copy already,
/// KVC_ERR_UNSUPPORTED where it has sliding windows.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_prefix_create(
    device: *const kvc_device,
    prefix: *mut kvc_prefix,
    out: *mut *mut kvc_device_prefix,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        let backend = opened(device)?.0.clone();
        let image = read(prefix, LookupImage::new)?;
        let mut memory = DeviceMemory::new(&backend, image.bytes())?;
        // Of zeros nothing is found, until there is more.
        memory.zero(Stream::DEFAULT)?;
        backend.sync(Stream::DEFAULT)?;
        let sync =
            Upload { host: LookupUpload::default(), device: DeviceMemory::new(&backend, 1)? };
        write(prefix, |index| {
            if index.is_mirrored() {
                return Err(Error::InvalidState { why: "the prefix index has a copy already" });
            }
            index.start_mirror()
        })?;
        let index = prefix.addr();
        let made = Copied { backend, index, image, memory, sync: Mutex::new(sync) };
        let stop = |_: &Error| {
            // The index may be gone by now, which is as well.
            let _ = write(prefix, |index| {
                index.stop_mirror();
                Ok(())
            });
        };
        out.write(handle::publish(made).inspect_err(stop)?);
        Ok(())
    })
}

/// Ends a copy; its index notes changes no more. NULL is accepted. KVC_ERR_INVALID_STATE while
/// another thread is inside it.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_prefix_destroy(copy: *mut kvc_device_prefix) -> kvc_status {
    guard(|| {
        if copy.is_null() {
            return Ok(());
        }
        let index = handle::shared::<Copied>(copy)?.index();
        handle::destroy::<Copied>(copy)?;
        // An index that was ended before needs nothing.
        let _ = write(index, |index| {
            index.stop_mirror();
            Ok(())
        });
        Ok(())
    })
}

/// Brings the copy up to what its index is now: enqueues the upload of what changed since the last
/// call (of everything, the first time) on `stream` (a CUstream; NULL for the default stream), and
/// writes how many bytes that was to `out_bytes`, which may be NULL. Waits for calls that change the
/// index, and they for it; not for what it enqueues. The driver may wait for the stream while it takes
/// the bytes, and so does the memory that they go through where it must grow. KVC_ERR_STALE_HANDLE
/// where the index has been ended. Where the call fails the copy is as it was or in part newer, and
/// the next call uploads everything.
///
/// Syncs and lookups of one copy must be in one order on the device: on one stream, or by events. A
/// sync cannot be captured in a graph.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `stream` is one of the copy's device; `out_bytes` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_prefix_sync(
    copy: *mut kvc_device_prefix,
    stream: *mut c_void,
    out_bytes: *mut u64,
) -> kvc_status {
    guard(|| {
        let copy = handle::shared::<Copied>(copy)?;
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::maybe_out(out_bytes, "out_bytes") }?;
        // SAFETY: the caller's promise.
        let sent = copy.upload(unsafe { Stream::from_raw(stream) })?;
        if let Some(out) = out {
            out.write(sent);
        }
        Ok(())
    })
}

/// Fills a kvc_device_lookup_desc of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `desc` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_lookup_desc_init(
    desc: *mut kvc_device_lookup_desc,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(desc, struct_size) })
}

/// Enqueues lookups in the copy on `stream` (a CUstream; NULL for the default stream): each request's
/// longest cached prefix, by comparison of tokens, as kvc_prefix_lookup finds it. Allocates nothing
/// and waits for nothing, so it can be captured in a CUDA graph and replayed over other tokens and
/// later uploads. Marks nothing as used in the index.
///
/// Threads: thread-safe, where calls share no outputs.
///
/// # Safety
/// The module's rules; the addresses are of memory of the copy's device, as long as the sizes say,
/// until the stream has done the work; `stream` is one of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_prefix_lookup(
    copy: *const kvc_device_prefix,
    desc: *const kvc_device_lookup_desc,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        let copy = handle::shared::<Copied>(copy)?;
        // SAFETY: the caller's promise.
        let batch = unsafe { pointer::read(desc) }?.batch(copy.image.groups())?;
        let plan = copy.image.lookup_launch(copy.memory.address(), &batch)?;
        let Some((plan, params)) = plan else { return Ok(()) };
        // SAFETY: the caller's promise; the image is the copy's own.
        unsafe { launch(&*copy.backend, &plan, &params, Stream::from_raw(stream)) }
    })
}
