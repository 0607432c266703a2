//! What a device must be able to do: have memory, move bytes, run a launch, wait.
//!
//! Small on purpose: everything that an operation needs beyond this is planned by `kernels`, alike
//! for all devices. Addresses are numbers; who calls answers for them.

use core::ffi::c_void;
use core::fmt;
use core::ptr::NonNull;

use super::{Device, host};
use crate::error::Result;
use crate::kernels::params::DeviceStruct;
use crate::kernels::{AttendParams, DeviceRates, Launch};

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

/// A point in a stream: everything that was enqueued there before it. For CUDA a `CUevent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(usize);

impl Mark {
    /// A point that every stream has passed.
    pub const PASSED: Mark = Mark(0);

    /// A point that the backend knows by this value, which is not null.
    pub fn from_raw(mark: *mut c_void) -> Self {
        Mark(mark.expose_provenance())
    }

    /// The value.
    pub fn as_raw(self) -> *mut c_void {
        core::ptr::with_exposed_provenance_mut(self.0)
    }
}

/// Which way a copy between a device and host memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the device.
    Up,
    /// To the host.
    Down,
}

/// A range of device memory and one of host memory, of the same size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostCopy {
    /// On the device.
    pub device: u64,
    /// On the host.
    pub host: *mut u8,
    /// How long both are.
    pub bytes: usize,
}

/// A device that runs the kernels of `cuda/`. Calls may come from any thread.
///
/// Work that fails has the device fail: what waits for it is not done as if nothing had been, and calls
/// answer `DeviceFailed`.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Which device it is.
    fn device(&self) -> Device;

    /// Its name, for people.
    fn name(&self) -> &str;

    /// How many multiprocessors it has: what work is divided by.
    fn multiprocessors(&self) -> u32;

    /// Shared memory of a multiprocessor, in bytes: how many blocks of a kernel it can hold.
    fn multiprocessor_shared_bytes(&self) -> u32;

    /// What it does in a microsecond, by which ways to compute the same are chosen; `None` where that
    /// is not known, and nothing is chosen by it.
    fn rates(&self) -> Option<DeviceRates> {
        None
    }

    /// Whether what is enqueued on `stream` is captured, to run later and with other content of the
    /// same addresses.
    ///
    /// # Errors
    /// `DeviceFailed`.
    fn is_capturing(&self, stream: Stream) -> Result<bool> {
        let _ = stream;
        Ok(false)
    }

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

    /// Whether [`alloc_host`](Self::alloc_host) gives page-locked memory, which the device copies from
    /// and to by itself.
    fn locks_pages(&self) -> bool {
        false
    }

    /// Allocates `bytes` bytes (at least 1 is) of host memory for copies, aligned to 4,096, of some
    /// content. Plain memory on a device that needs no other.
    ///
    /// # Errors
    /// `OutOfMemory`, `DeviceFailed`.
    fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>> {
        host::alloc_plain(bytes)
    }

    /// Gives such memory back.
    ///
    /// # Safety
    /// `at` came from [`alloc_host`](Self::alloc_host) with this size, once, nobody uses it any more,
    /// and no copy of it is under way.
    unsafe fn free_host(&self, at: NonNull<u8>, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { host::free_plain(at, bytes) }
    }

    /// Enqueues copies between the device and host memory, in any order among themselves. Of memory
    /// that is not `locked` the device may have made them when this returns. By default as many copies
    /// one by one, which are waited for.
    ///
    /// # Errors
    /// `DeviceFailed`; some of them may be under way then.
    ///
    /// # Safety
    /// All ranges have their bytes and stay so until the copies are made; where bytes are written,
    /// nobody reads them before, and where they are read, nobody writes them. `locked` memory came from
    /// [`alloc_host`](Self::alloc_host) of a backend that locks pages.
    unsafe fn copy_host(
        &self,
        way: Way,
        copies: &[HostCopy],
        locked: bool,
        stream: Stream,
    ) -> Result<()> {
        let _ = locked;
        copies.iter().try_for_each(|&HostCopy { device, host, bytes }| {
            // SAFETY: the caller's promise.
            unsafe {
                match way {
                    Way::Up => {
                        self.upload(device, core::slice::from_raw_parts(host, bytes), stream)
                    }
                    Way::Down => {
                        let to = core::slice::from_raw_parts_mut(host, bytes);
                        self.download(device, to, stream)
                    }
                }
            }
        })?;
        self.sync(stream)
    }

    /// The point after all that is enqueued on `stream` now. A device that cannot say waits until it
    /// has passed it.
    ///
    /// # Errors
    /// `DeviceFailed`.
    fn mark(&self, stream: Stream) -> Result<Mark> {
        self.sync(stream)?;
        Ok(Mark::PASSED)
    }

    /// Has what is enqueued on `stream` from here on wait for a point.
    ///
    /// # Errors
    /// `DeviceFailed`.
    fn hold(&self, stream: Stream, mark: Mark) -> Result<()> {
        let _ = (stream, mark);
        Ok(())
    }

    /// Whether its stream has passed a point. Waits for nothing.
    ///
    /// # Errors
    /// `DeviceFailed` where work before it has failed: nothing of it is under way any more.
    fn has_passed(&self, mark: Mark) -> Result<bool> {
        let _ = mark;
        Ok(true)
    }

    /// Waits until its stream has passed a point.
    ///
    /// # Errors
    /// As for [`has_passed`](Self::has_passed).
    fn wait(&self, mark: Mark) -> Result<()> {
        let _ = mark;
        Ok(())
    }

    /// How long the device took from one point to another of one stream, in seconds. `None` where it
    /// does not note times, or has not passed both.
    fn seconds_between(&self, from: Mark, to: Mark) -> Option<f64> {
        let _ = (from, to);
        None
    }

    /// Ends a point.
    ///
    /// # Safety
    /// It came from [`mark`](Self::mark), once, and nobody uses it any more.
    unsafe fn end_mark(&self, mark: Mark) {
        let _ = mark;
    }
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
            AttendParams::MlaToken(params) => launch(backend, plan, params, stream),
        }
    }
}
