//! Page-locked host memory, copies between it and the device, and the events that tell how far they are.
//!
//! Several copies are one call of the driver where it has `cuMemcpyBatchAsync` (CUDA 12.8): it is looked
//! for by name at run time, since older drivers are served too, and they then take a call each.

use std::ffi::c_void;
use std::ptr::{self, NonNull};

use cudarc::driver::sys::{self, CUresult};

use super::Cuda;
use super::driver::{Current, check};
use crate::error::{Error, Result};

/// `cuMemcpyBatchAsync` as CUDA 12.8 has it, which later drivers give under that version, too.
type CopyBatch = unsafe extern "C" fn(
    to: *mut sys::CUdeviceptr,
    from: *mut sys::CUdeviceptr,
    bytes: *mut usize,
    count: usize,
    attributes: *mut CopyAttributes,
    attribute_starts: *mut usize,
    attribute_count: usize,
    failed: *mut usize,
    stream: sys::CUstream,
) -> CUresult;

/// `CUmemcpyAttributes`.
#[repr(C)]
struct CopyAttributes {
    source_order: u32,
    source: Location,
    destination: Location,
    flags: u32,
}

/// `CUmemLocation`; a hint, which is not given.
#[repr(C)]
#[derive(Clone, Copy)]
struct Location {
    kind: u32,
    id: i32,
}

/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`: sources are read in the stream's order.
const STREAM_ORDER: u32 = 1;
/// The version whose signature [`CopyBatch`] is.
const BATCH_VERSION: i32 = 12080;

/// The driver's function for many copies at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch(CopyBatch);

impl Batch {
    /// `None` where the driver has none.
    pub fn find() -> Option<Self> {
        let mut version = 0;
        // SAFETY: the driver was started; the pointer is to a live integer.
        let known = unsafe { sys::cuDriverGetVersion(&mut version) };
        if known != CUresult::CUDA_SUCCESS || version < BATCH_VERSION {
            return None;
        }
        let (mut found, mut status) = (
            ptr::null_mut(),
            sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND,
        );
        let name = c"cuMemcpyBatchAsync".as_ptr();
        // SAFETY: the driver was started; the name ends with a zero, the pointers are to live variables.
        let asked =
            unsafe { sys::cuGetProcAddress_v2(name, &mut found, BATCH_VERSION, 0, &mut status) };
        let have = asked == CUresult::CUDA_SUCCESS
            && status == sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SUCCESS
            && !found.is_null();
        // SAFETY: the function of this name in this version, which has this signature.
        have.then(|| Batch(unsafe { std::mem::transmute::<*mut c_void, CopyBatch>(found) }))
    }
}

/// What a copy is between: address to, address from, bytes.
pub(crate) type Ranges = (u64, u64, usize);

impl Cuda {
    /// Whether many copies are one call of this driver.
    pub fn copies_in_batches(&self) -> bool {
        self.batch.is_some()
    }

    /// Allocates page-locked host memory, at a page.
    ///
    /// # Errors
    /// `OutOfMemory`, `DeviceFailed`.
    pub(crate) fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>> {
        let refused = Error::OutOfMemory { bytes: bytes as u64 };
        let _current = Current::enter(&self.context)?;
        let mut at = ptr::null_mut();
        // SAFETY: the context is current; the pointer is to a live variable. Portable: page-locked for
        // every context of the process.
        let result =
            unsafe { sys::cuMemHostAlloc(&mut at, bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) };
        match result {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(refused),
            result => {
                check("cuMemHostAlloc", result)?;
                NonNull::new(at.cast()).ok_or(refused)
            }
        }
    }

    /// Gives it back.
    ///
    /// # Safety
    /// `at` came from [`alloc_host`](Self::alloc_host), once; nobody uses it any more.
    pub(crate) unsafe fn free_host(&self, at: NonNull<u8>) {
        if let Ok(_current) = Current::enter(&self.context) {
            // SAFETY: the context is current; the caller's promise.
            let _ = unsafe { sys::cuMemFreeHost(at.as_ptr().cast()) };
        }
    }

    /// Enqueues copies to the device (`up`) or from it, in any order among themselves.
    ///
    /// # Errors
    /// `DeviceFailed`; some may be under way then.
    ///
    /// # Safety
    /// As for `device::Backend::copy_host`.
    pub(crate) unsafe fn copy_host(
        &self,
        up: bool,
        copies: impl ExactSizeIterator<Item = Ranges>,
        locked: bool,
        stream: *mut c_void,
    ) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        let stream: sys::CUstream = stream.cast();
        // The call takes no default stream.
        match self.batch.filter(|_| locked && copies.len() > 1 && !stream.is_null()) {
            Some(batch) => {
                let (mut to, mut from, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
                for copy in copies {
                    to.push(copy.0);
                    from.push(copy.1);
                    bytes.push(copy.2);
                }
                let nowhere = Location { kind: 0, id: 0 };
                let mut how = CopyAttributes {
                    source_order: STREAM_ORDER,
                    source: nowhere,
                    destination: nowhere,
                    flags: 0,
                };
                let (mut first, mut failed) = (0, 0);
                // SAFETY: the context is current; three lists of as many elements, one attribute that
                // begins at the first of them; the caller's promise for the ranges.
                check("cuMemcpyBatchAsync", unsafe {
                    batch.0(
                        to.as_mut_ptr(),
                        from.as_mut_ptr(),
                        bytes.as_mut_ptr(),
                        to.len(),
                        &mut how,
                        &mut first,
                        1,
                        &mut failed,
                        stream,
                    )
                })
            }
            None => {
                for (to, from, bytes) in copies {
                    // SAFETY: the context is current; the caller's promise.
                    unsafe {
                        if up {
                            let from = ptr::with_exposed_provenance(from as usize);
                            let copied = sys::cuMemcpyHtoDAsync_v2(to, from, bytes, stream);
                            check("cuMemcpyHtoDAsync", copied)?;
                        } else {
                            let to = ptr::with_exposed_provenance_mut(to as usize);
                            let copied = sys::cuMemcpyDtoHAsync_v2(to, from, bytes, stream);
                            check("cuMemcpyDtoHAsync", copied)?;
                        }
                    }
                }
                Ok(())
            }
        }
    }

    /// An event that is recorded on a stream now. Threads that wait for it sleep.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub(crate) fn mark(&self, stream: *mut c_void) -> Result<*mut c_void> {
        let _current = Current::enter(&self.context)?;
        let mut event: sys::CUevent = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        // SAFETY: the context is current; the pointer is to a live handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flags) })?;
        // SAFETY: live handles of one context.
        let recorded = check("cuEventRecord", unsafe { sys::cuEventRecord(event, stream.cast()) });
        if let Err(error) = recorded {
            // SAFETY: created above, destroyed once.
            let _ = unsafe { sys::cuEventDestroy_v2(event) };
            return Err(error);
        }
        Ok(event.cast())
    }

    /// Has what is enqueued on a stream from here on wait for an event.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub(crate) fn hold(&self, stream: *mut c_void, event: *mut c_void) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        // SAFETY: live handles of one context.
        check("cuStreamWaitEvent", unsafe {
            sys::cuStreamWaitEvent(stream.cast(), event.cast(), 0)
        })
    }

    /// Whether a stream has come past an event.
    ///
    /// # Errors
    /// `DeviceFailed` where something before it failed.
    pub(crate) fn has_passed(&self, event: *mut c_void) -> Result<bool> {
        let _current = Current::enter(&self.context)?;
        // SAFETY: a live event.
        match unsafe { sys::cuEventQuery(event.cast()) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    /// Waits until a stream has come past an event.
    ///
    /// # Errors
    /// `DeviceFailed` where something before it failed.
    pub(crate) fn wait(&self, event: *mut c_void) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        // SAFETY: a live event.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(event.cast()) })
    }

    /// Seconds between two events, where both have been passed.
    pub(crate) fn seconds_between(&self, from: *mut c_void, to: *mut c_void) -> Option<f64> {
        let _current = Current::enter(&self.context).ok()?;
        let mut milliseconds = 0.0;
        // SAFETY: live events of one context; the pointer is to a live float.
        let result = unsafe { sys::cuEventElapsedTime(&mut milliseconds, from.cast(), to.cast()) };
        (result == CUresult::CUDA_SUCCESS).then(|| f64::from(milliseconds) / 1e3)
    }

    /// Ends an event.
    ///
    /// # Safety
    /// From [`mark`](Self::mark), once; nobody uses it any more.
    pub(crate) unsafe fn end_mark(&self, event: *mut c_void) {
        if let Ok(_current) = Current::enter(&self.context) {
            // SAFETY: the caller's promise.
            let _ = unsafe { sys::cuEventDestroy_v2(event.cast()) };
        }
    }
}
