//! The device noun: where kernels run beside the CPU. Opening one, what it is, its memory.

use alloc::sync::Arc;
use core::ffi::{c_char, c_void};

use super::handle::{self, Noun, Shared};
use super::pointer::{self, Plain};
use super::status::{guard, kvc_status};
use crate::device::{Backend, Device, Stream, open};
use crate::error::{Error, Result};

/// The CPU: no device to open; a cache's default.
pub const KVC_DEVICE_CPU: u32 = 0;
/// An NVIDIA GPU.
pub const KVC_DEVICE_CUDA: u32 = 1;
/// The CUDA kernels on the host, under an emulator: for tests of builds that have it.
pub const KVC_DEVICE_EMU: u32 = 2;

/// A device that is open: its driver's primary context, with the library's kernels loaded. Calls
/// on it are thread-safe. Addresses and streams of other libraries in the process are valid with it
/// where they are of the primary context, as those of the CUDA runtime and PyTorch are.
pub struct kvc_device(());

/// What a device handle holds.
pub(super) struct OpenDevice(pub(super) Arc<dyn Backend>);

impl Noun for OpenDevice {
    type Handle = kvc_device;
    const KIND: usize = 5;
    const NAME: &'static str = "device";
}

/// The device of a handle.
pub(super) fn opened(device: *const kvc_device) -> Result<Shared<OpenDevice>> {
    handle::shared::<OpenDevice>(device)
}

/// The device that a kind and a number name.
pub(super) fn named(kind: u32, ordinal: u32) -> Result<Device> {
    match kind {
        KVC_DEVICE_CUDA => Ok(Device::Cuda { ordinal }),
        KVC_DEVICE_CPU | KVC_DEVICE_EMU if ordinal != 0 => {
            Err(Error::invalid("ordinal", "must be 0 for this kind of device"))
        }
        KVC_DEVICE_CPU => Ok(Device::Cpu),
        KVC_DEVICE_EMU => Ok(Device::Emu),
        _ => Err(Error::invalid("device", "must be 0 (CPU), 1 (CUDA) or 2 (emulator)")),
    }
}

/// What a device is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_facts {
    /// KVC_DEVICE_*.
    pub kind: u32,
    /// Its number among those of its kind.
    pub ordinal: u32,
    /// Multiprocessors: what work is divided by.
    pub multiprocessors: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_device_facts {}

/// Size of [`kvc_device_facts`] in ABI 0.1.
const FACTS_FIRST_BYTES: usize = 16;

/// Opens the device `ordinal` (from 0) of the kind KVC_DEVICE_CUDA or KVC_DEVICE_EMU.
/// KVC_ERR_NO_KERNELS where the library was built without kernels for it, KVC_ERR_NO_DEVICE where
/// it is not there.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_open(
    kind: u32,
    ordinal: u32,
    out: *mut *mut kvc_device,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        out.write(handle::publish(OpenDevice(open(named(kind, ordinal)?)?))?);
        Ok(())
    })
}

/// Closes a device. NULL is accepted. What was allocated on it stays until it is freed through
/// another handle of the device; an emulator's memory goes with its last handle and cache.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_close(device: *mut kvc_device) -> kvc_status {
    guard(|| handle::destroy::<OpenDevice>(device))
}

/// Writes what the device is to `out`, `out_bytes` (its sizeof) at most.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_info(
    device: *const kvc_device,
    out: *mut kvc_device_facts,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        let device = opened(device)?;
        let (kind, ordinal) = match device.0.device() {
            Device::Cpu => (KVC_DEVICE_CPU, 0),
            Device::Cuda { ordinal } => (KVC_DEVICE_CUDA, ordinal),
            Device::Emu => (KVC_DEVICE_EMU, 0),
        };
        let multiprocessors = device.0.multiprocessors();
        let facts = kvc_device_facts { kind, ordinal, multiprocessors, reserved: 0 };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, facts, "out", FACTS_FIRST_BYTES) }
    })
}

/// Writes the device's name to `buf`, with a NUL. `len` is the size of `buf`;
/// KVC_ERR_BUFFER_TOO_SMALL where it does not fit (128 bytes are enough).
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `buf` is writable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_name(
    device: *const kvc_device,
    buf: *mut c_char,
    len: u64,
) -> kvc_status {
    guard(|| {
        let device = opened(device)?;
        // SAFETY: the caller's promise.
        unsafe { whole_text(device.0.name(), buf, len) }
    })
}

/// Copies a text with a NUL, or says how much room it needs.
///
/// # Safety
/// Unless NULL, `buf` must be writable for `len` bytes.
pub(super) unsafe fn whole_text(text: &str, buf: *mut c_char, len: u64) -> Result<()> {
    if text.len() as u64 >= len {
        return Err(Error::BufferTooSmall { what: "buf", needed: text.len() as u64 + 1 });
    }
    if buf.is_null() {
        return Err(Error::NullPointer { what: "buf" });
    }
    // SAFETY: the caller's promise.
    unsafe { pointer::copy_text(text, buf, len) };
    Ok(())
}

/// Allocates `bytes` bytes of device memory, aligned to 256, of no particular content.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_alloc(
    device: *const kvc_device,
    bytes: u64,
    out: *mut *mut c_void,
) -> kvc_status {
    guard(|| {
        let device = opened(device)?;
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        let address = device.0.alloc(bytes.max(1))?;
        out.write(core::ptr::with_exposed_provenance_mut(address as usize));
        Ok(())
    })
}

/// Frees memory of kvc_device_alloc, after everything that is enqueued. NULL is accepted.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `address` came from kvc_device_alloc of this device, and is freed once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_free(
    device: *const kvc_device,
    address: *mut c_void,
) -> kvc_status {
    guard(|| {
        let device = opened(device)?;
        if !address.is_null() {
            // SAFETY: the caller's promise.
            unsafe { device.0.free(address.expose_provenance() as u64) };
        }
        Ok(())
    })
}

/// Copies `bytes` bytes from host memory to the device on `stream` (a CUstream; NULL for the default
/// stream), and waits.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `to` has the bytes on the device, `from` in host memory; `stream` is one of
/// the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_upload(
    device: *const kvc_device,
    to: *mut c_void,
    from: *const c_void,
    bytes: u64,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        let device = opened(device)?;
        let to = address(to, bytes, "to")?;
        // SAFETY: the caller's promise.
        unsafe {
            let (from, stream) =
                (pointer::slice(from.cast::<u8>(), bytes, "from")?, Stream::from_raw(stream));
            device.0.upload(to, from, stream).and(device.0.sync(stream))
        }
    })
}

/// Copies `bytes` bytes from the device to host memory, after what is enqueued on `stream`, and
/// waits.
///
/// Threads: thread-safe.
///
/// # Safety
/// As for kvc_device_upload, the other way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_download(
    device: *const kvc_device,
    to: *mut c_void,
    from: *const c_void,
    bytes: u64,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        let device = opened(device)?;
        let from = address(from.cast_mut(), bytes, "from")?;
        // SAFETY: the caller's promise.
        unsafe {
            let to = pointer::slice_out(to.cast::<u8>(), bytes, "to")?;
            device.0.download(from, to, Stream::from_raw(stream))
        }
    })
}

/// An address on the device that `bytes` bytes lie at.
fn address(at: *mut c_void, bytes: u64, what: &'static str) -> Result<u64> {
    if at.is_null() && bytes != 0 {
        return Err(Error::NullPointer { what });
    }
    Ok(at.expose_provenance() as u64)
}

/// Enqueues the zeroing of `bytes` bytes on `stream`.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `at` has the bytes on the device; `stream` is one of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_zero(
    device: *const kvc_device,
    at: *mut c_void,
    bytes: u64,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        let device = opened(device)?;
        let at = address(at, bytes, "at")?;
        // SAFETY: the caller's promise.
        unsafe { device.0.zero(at, bytes, Stream::from_raw(stream)) }
    })
}

/// Waits for everything that is enqueued on `stream`. KVC_ERR_DEVICE_FAILED where some of it has
/// failed.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `stream` is one of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_sync(
    device: *const kvc_device,
    stream: *mut c_void,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        opened(device)?.0.sync(unsafe { Stream::from_raw(stream) })
    })
}
