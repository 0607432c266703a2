//! The driver's library, its errors, and the context that calls run in.

use std::ffi::{CStr, c_char};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, Result};

/// Loads and starts the driver, once.
///
/// # Errors
/// `NoDevice` where there is no libcuda, or it finds no device; `DeviceFailed`.
pub(super) fn start() -> Result<()> {
    static STARTED: OnceLock<Result<()>> = OnceLock::new();
    *STARTED.get_or_init(|| {
        // SAFETY: only looks whether the library can be loaded. The other functions of the bindings
        // panic where it cannot, and none is called before this.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDevice { why: "libcuda is not installed" });
        }
        // SAFETY: the library is there.
        match unsafe { sys::cuInit(0) } {
            CUresult::CUDA_ERROR_NO_DEVICE => {
                Err(Error::NoDevice { why: "the driver finds no device" })
            }
            CUresult::CUDA_ERROR_STUB_LIBRARY => {
                Err(Error::NoDevice { why: "libcuda is a stub for linking" })
            }
            result => check("cuInit", result),
        }
    })
}

/// The error that a driver's call reports, with the driver's text.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const c_char = ptr::null();
    // SAFETY: the library is there, or it could not have answered; the texts live for ever.
    let known = unsafe { sys::cuGetErrorString(result, &mut text) };
    let why = if known == CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: a text of the driver, which ends with a zero.
        unsafe { CStr::from_ptr(text) }.to_str().unwrap_or("an error without a text")
    } else {
        "an error that the driver has no text for"
    };
    Err(Error::DeviceFailed { call, why })
}

/// The primary context of a device, kept for as long as the process lives.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: handles of the driver, whose functions may be called from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub fn primary(ordinal: u32) -> Result<Self> {
        let (mut device, mut context) = (0, ptr::null_mut());
        // SAFETY: the driver was started; the pointers are to live variables. The context is never
        // released: it is shared with whoever else in the process uses the device.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as i32))?;
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        Ok(Self { device, context })
    }

    /// An attribute that is a count.
    pub fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<u32> {
        let mut value = 0;
        // SAFETY: the pointer is to a live integer.
        check("cuDeviceGetAttribute", unsafe {
            sys::cuDeviceGetAttribute(&mut value, attribute, self.device)
        })?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// The driver's name of the device.
    pub fn name(&self) -> Result<String> {
        let mut name = [0 as c_char; 128];
        // SAFETY: the buffer has the size that is given, and the driver ends the name with a zero.
        unsafe {
            check(
                "cuDeviceGetName",
                sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, self.device),
            )?;
            Ok(CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned())
        }
    }
}

/// Makes a context the thread's own while it lives; the one before returns after it.
pub(super) struct Current(());

impl Current {
    pub fn enter(context: &Context) -> Result<Self> {
        // SAFETY: a live context.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(context.context) })?;
        Ok(Self(()))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        // SAFETY: undoes the push. It can only fail where the driver is already gone.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
    }
}
