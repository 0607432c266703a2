//! The C ABI on the devices of this build and machine, as a C program would call it: memory with numbers
//! in it.
#![allow(dead_code)]

use std::ffi::c_void;
use std::ptr;

use kvcache::capi::*;
use kvcache::device::Device;

#[path = "../backends/mod.rs"]
mod backends;

/// The status of a call that must succeed.
pub fn ok(status: kvc_status) {
    let mut text = [0u8; 256];
    // SAFETY: the buffer has its length.
    let len = unsafe { kvc_last_error(text.as_mut_ptr().cast(), 256) } as usize;
    assert_eq!(status, KVC_OK, "{}", String::from_utf8_lossy(&text[..len.min(255)]));
}

/// Device memory with numbers in it.
pub struct Memory {
    device: *mut kvc_device,
    pub at: *mut c_void,
    pub bytes: usize,
}

impl Memory {
    pub fn of<T: Copy>(device: *mut kvc_device, values: &[T]) -> Self {
        let (mut at, bytes) = (ptr::null_mut(), size_of_val(values));
        // SAFETY: the pointers are to live memory of these sizes.
        unsafe {
            ok(kvc_device_alloc(device, bytes as u64, &mut at));
            ok(kvc_device_upload(
                device,
                at,
                values.as_ptr().cast(),
                bytes as u64,
                ptr::null_mut(),
            ));
        }
        Memory { device, at, bytes }
    }

    pub fn read<T: Copy + Default>(&self) -> Vec<T> {
        let mut values = vec![T::default(); self.bytes / size_of::<T>()];
        let to = values.as_mut_ptr().cast();
        // SAFETY: the vector has these bytes, and any bytes are numbers.
        ok(unsafe {
            kvc_device_download(self.device, to, self.at, self.bytes as u64, ptr::null_mut())
        });
        values
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated on this device, freed once.
        ok(unsafe { kvc_device_free(self.device, self.at) });
    }
}

/// The kinds of device to test: that of the emulator where it is built in, and of a GPU where there is
/// one.
pub fn kinds() -> Vec<u32> {
    let kind = |device| if device == Device::Emu { KVC_DEVICE_EMU } else { KVC_DEVICE_CUDA };
    backends::all().iter().map(|backend| kind(backend.device())).collect()
}

/// A device of a kind.
pub fn open(kind: u32) -> *mut kvc_device {
    let mut device = ptr::null_mut();
    // SAFETY: the pointer is to a live handle.
    ok(unsafe { kvc_device_open(kind, 0, &mut device) });
    device
}

/// A struct of the ABI with its defaults, which `init` fills in.
pub fn made<T>(init: unsafe extern "C" fn(*mut T, u32) -> kvc_status) -> T {
    // SAFETY: for structs of the ABI, which are integers, floats and pointers.
    let mut made: T = unsafe { std::mem::zeroed() };
    // SAFETY: the struct is of the size given.
    ok(unsafe { init(&mut made, size_of::<T>() as u32) });
    made
}
