//! What a device must be able to do: have memory, move bytes, run a launch, wait.
//!
//! Small on purpose: everything that an operation needs beyond this is planned by `kernels`, alike
//! for all devices. Addresses are numbers; who calls answers for them.

use core::ffi::c_void;
use core::fmt;

use super::Device;
use crate::error::Result;
use crate::kernels::params::DeviceStruct;
use crate::kernels::{AttendParams, Launch};

/// A queue of work on a device: what is enqueued runs in order. For CUDA a `CUstream`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stream(usize);

impl Stream {
    /// The device's default stream.
    pub const DEFAULT: Stream = Stream(0);

    /// A stream of the device's driver.
    ///
    /// # Safety
    /// Null, or a stream of the device that it will be used with, which lives as long as this
    /// value is used.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        Stream(stream.expose_provenance())
    }

    /// The driver's handle; null for the default stream.
    pub fn as_raw(self) -> *mut c_void {
        core::ptr::with_exposed_provenance_mut(self.0)
    }
}

/// A device that runs the kernels of `cuda/`. Calls may come from any thread.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Which device it is.
    fn device(&self) -> Device;

    /// Its name, for people.
    fn name(&self) -> &str;

    /// How many multiprocessors it has: what work is divided by.
    fn multiprocessors(&self) -> u32;

    /// Shared memory of a multiprocessor, in bytes: how many blocks of a kernel it can hold.
    fn multiprocessor_shared_bytes(&self) -> u32;

    /// Allocates `bytes` bytes (at least 1 is), aligned to 256, of no particular content.
    ///
    /// # Errors
    /// `OutOfMemory`, `DeviceFailed`.
    fn alloc(&self, bytes: u64) -> Result<u64>;

    /// Gives an allocation back, after what is enqueued on it.
    ///
    /// # Safety
    /// `address` came from [`alloc`](Self::alloc), once, and nobody uses it any more.
    unsafe fn free(&self, address: u64);

    /// Enqueues a copy of `from` to the device.
    ///
    /// # Errors
    /// `DeviceFailed`.
    ///
    /// # Safety
    /// `to` has that many bytes on this device. Where `from` is page-locked memory it stays as it
    /// is until the copy has been made; other memory has been read when this returns.
    unsafe fn upload(&self, to: u64, from: &[u8], stream: Stream) -> Result<()>;

    /// Copies from the device into `to`, after what is enqueued, and waits for it.
    ///
    /// # Errors
    /// `DeviceFailed`, also where work that was enqueued before has failed.
    ///
    /// # Safety
    /// `from` has that many bytes on this device.
    unsafe fn download(&self, from: u64, to: &mut [u8], stream: Stream) -> Result<()>;

    /// Enqueues a copy within the device. The two ranges do not overlap, or are the same.
    ///
    /// # Errors
    /// `DeviceFailed`.
    ///
    /// # Safety
    /// Both have `bytes` bytes on this device.
    unsafe fn copy(&self, from: u64, to: u64, bytes: u64, stream: Stream) -> Result<()>;

    /// Enqueues the zeroing of `bytes` bytes.
    ///
    /// # Errors
    /// `DeviceFailed`.
    ///
    /// # Safety
    /// `at` has that many bytes on this device.
    unsafe fn zero(&self, at: u64, bytes: u64, stream: Stream) -> Result<()>;

    /// Enqueues a kernel with its parameter struct: `params_bytes` bytes at `params`.
    ///
    /// # Errors
    /// `NoKernels` where the kernel is not there, `DeviceFailed`.
    ///
    /// # Safety
    /// `params` is the struct that the kernel takes, and its addresses are, in device memory, what
    /// the struct's documentation says, until the kernel has run.
    unsafe fn launch(
        &self,
        launch: &Launch,
        params: *const c_void,
        params_bytes: usize,
        stream: Stream,
    ) -> Result<()>;

    /// A stream of its own, beside those of callers, that waits for none of them; the default stream
    /// where the device has no others.
    ///
    /// # Errors
    /// `DeviceFailed`.
    fn open_stream(&self) -> Result<Stream> {
        Ok(Stream::DEFAULT)
    }

    /// Ends a stream, after what is enqueued on it.
    ///
    /// # Safety
    /// It came from [`open_stream`](Self::open_stream), once, and nobody uses it any more.
    unsafe fn close_stream(&self, stream: Stream) {
        let _ = stream;
    }

    /// Has what is enqueued on `after` from here on wait for what is enqueued on `before` now. Waits
    /// for it itself where the device cannot.
    ///
    /// # Errors
    /// `DeviceFailed`.
    fn fence(&self, before: Stream, after: Stream) -> Result<()> {
        if before == after { Ok(()) } else { self.sync(before) }
    }

    /// Waits for everything that is enqueued on `stream`.
    ///
    /// # Errors
    /// `DeviceFailed` where some of it has failed.
    fn sync(&self, stream: Stream) -> Result<()>;
}

/// [`Backend::launch`] with a typed parameter struct.
///
/// # Errors
/// As for [`Backend::launch`].
///
/// # Safety
/// As for [`Backend::launch`].
pub(crate) unsafe fn launch<P: DeviceStruct>(
    backend: &dyn Backend,
    launch: &Launch,
    params: &P,
    stream: Stream,
) -> Result<()> {
    debug_assert_eq!(launch.kernel.params, P::C_NAME);
    // SAFETY: the caller's promise; the struct is as long as its type.
    unsafe { backend.launch(launch, core::ptr::from_ref(params).cast(), size_of::<P>(), stream) }
}

/// [`Backend::launch`] with the parameter struct of whichever kernel attends.
///
/// # Errors
/// As for [`Backend::launch`].
///
/// # Safety
/// As for [`Backend::launch`].
pub(crate) unsafe fn launch_attend(
    backend: &dyn Backend,
    plan: &Launch,
    params: &AttendParams,
    stream: Stream,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        match params {
            AttendParams::Decode(params) => launch(backend, plan, params, stream),
            AttendParams::DecodeToken(params) => launch(backend, plan, params, stream),
            AttendParams::PrefillToken(params) => launch(backend, plan, params, stream),
            AttendParams::Prefill(params) => launch(backend, plan, params, stream),
            AttendParams::Mla(params) => launch(backend, plan, params, stream),
        }
    }
}
