//! A stream of our own, and events on it: for benchmarks, tests, and callers that have none.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::Cuda;
use super::driver::{Current, check};
use crate::error::Result;

/// A stream that does not wait for the default stream.
#[derive(Debug)]
pub struct Queue {
    pub(super) cuda: Arc<Cuda>,
    pub(super) stream: sys::CUstream,
}

// SAFETY: a handle of the driver, whose functions may be called from any thread.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

impl Cuda {
    /// A stream that does not wait for the default stream.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub(crate) fn open_stream(&self) -> Result<*mut c_void> {
        let _current = Current::enter(&self.context)?;
        let mut stream: sys::CUstream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the pointer is to a live handle.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        Ok(stream.cast())
    }

    /// Ends a stream; what is enqueued still runs to its end.
    ///
    /// # Safety
    /// It came from [`open_stream`](Self::open_stream), once, and nobody uses it any more.
    pub(crate) unsafe fn close_stream(&self, stream: *mut c_void) {
        if let Ok(_current) = Current::enter(&self.context) {
            // SAFETY: the caller's promise.
            let _ = unsafe { sys::cuStreamDestroy_v2(stream.cast()) };
        }
    }

    /// Has what is enqueued on `after` from here on wait for what is enqueued on `before` now.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub(crate) fn fence(&self, before: *mut c_void, after: *mut c_void) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is current; the pointer is to a live handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flags) })?;
        // SAFETY: live handles of one context; streams that work was enqueued on are such.
        let recorded = check("cuEventRecord", unsafe { sys::cuEventRecord(event, before.cast()) });
        let waited = recorded.and_then(|()| {
            // SAFETY: as above.
            check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(after.cast(), event, 0) })
        });
        // SAFETY: created above, destroyed once; who waits for it already still does.
        let _ = unsafe { sys::cuEventDestroy_v2(event) };
        waited
    }

    /// Whether what is enqueued on `stream` goes into a graph.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub(crate) fn is_capturing(&self, stream: *mut c_void) -> Result<bool> {
        let _current = Current::enter(&self.context)?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the context is current; the pointer is to a live value.
        match unsafe { sys::cuStreamIsCapturing(stream.cast(), &mut status) } {
            // The default stream while another one captures.
            sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT => Ok(true),
            result => check("cuStreamIsCapturing", result)
                .map(|()| status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE),
        }
    }
}

impl Queue {
    /// A new stream of the device.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn new(cuda: &Arc<Cuda>) -> Result<Self> {
        Ok(Self { stream: cuda.open_stream()?.cast(), cuda: cuda.clone() })
    }

    /// The driver's handle.
    pub fn as_raw(&self) -> *mut c_void {
        self.stream.cast()
    }

    /// Waits for everything that is enqueued.
    ///
    /// # Errors
    /// `DeviceFailed` where some of it has failed.
    pub fn sync(&self) -> Result<()> {
        self.cuda.sync(self.as_raw())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        unsafe { self.cuda.close_stream(self.as_raw()) }
    }
}

/// A point in a stream whose time the device notes.
#[derive(Debug)]
pub struct Event {
    cuda: Arc<Cuda>,
    event: sys::CUevent,
}

// SAFETY: a handle of the driver, whose functions may be called from any thread.
unsafe impl Send for Event {}

impl Event {
    /// An event that was not recorded yet.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn new(cuda: &Arc<Cuda>) -> Result<Self> {
        let _current = Current::enter(&cuda.context)?;
        let mut event = ptr::null_mut();
        // SAFETY: the context is current; the pointer is to a live handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, 0) })?;
        Ok(Self { cuda: cuda.clone(), event })
    }

    /// Notes the time when the stream comes to this point.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn record(&self, queue: &Queue) -> Result<()> {
        let _current = Current::enter(&self.cuda.context)?;
        // SAFETY: live handles of one context.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.event, queue.stream) })
    }

    /// Milliseconds from `earlier` to this; both have been recorded and reached.
    ///
    /// # Errors
    /// `DeviceFailed`, also where one has not been reached.
    pub fn milliseconds_since(&self, earlier: &Event) -> Result<f32> {
        let _current = Current::enter(&self.cuda.context)?;
        let mut milliseconds = 0.0;
        // SAFETY: live handles of one context; the pointer is to a live float.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime(&mut milliseconds, earlier.event, self.event)
        })?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_current) = Current::enter(&self.cuda.context) {
            // SAFETY: created by `new`, destroyed once.
            let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}
