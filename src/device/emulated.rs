//! The emulator as a device: its memory is host memory with guards, a launch has run when it
//! returns, and what a detector finds is the driver's error.
//!
//! Faults are for people who change kernels: their text is kept for ever, since errors do not
//! allocate.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use core::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Backend, Device, Stream};
use crate::emu::{self, Buffer};
use crate::error::{Error, Result};
use crate::kernels::{DeviceRates, Launch, SM90_SHARED_BYTES};

/// Multiprocessors that the emulated device says it has: few, so that work is cut into pieces
/// without a long grid.
const MULTIPROCESSORS: u32 = 2;

/// Rates of a device that has nothing to do but to read memory: what need not be read twice is not.
const RATES: DeviceRates = DeviceRates {
    memory_bytes: 1e3,
    cache_bytes: 1e3,
    cache_size: 0,
    operations: 1e9,
    launch: 0.0,
    multiprocessors: MULTIPROCESSORS,
};

/// An emulated device.
#[derive(Debug)]
pub struct Emulated {
    options: emu::Options,
    buffers: Mutex<BTreeMap<u64, Buffer>>,
}

impl Emulated {
    /// A device that runs its launches with these options.
    pub fn new(options: emu::Options) -> Self {
        Self { options, buffers: Mutex::new(BTreeMap::new()) }
    }

    fn buffers(&self) -> MutexGuard<'_, BTreeMap<u64, Buffer>> {
        // The map is whole whenever the lock is free.
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Host access to `bytes` bytes at `address`, where one allocation holds them.
    fn host(&self, address: u64, bytes: u64) -> Result<*mut u8> {
        let buffers = self.buffers();
        let held = buffers.range(..=address).next_back().is_some_and(|(&base, buffer)| {
            (address - base).checked_add(bytes).is_some_and(|end| end <= buffer.bytes() as u64)
        });
        if held || bytes == 0 {
            Ok(core::ptr::with_exposed_provenance_mut(address as usize))
        } else {
            Err(failed("copy", "an address that no allocation of the emulator holds"))
        }
    }
}

fn failed(call: &'static str, why: &'static str) -> Error {
    Error::DeviceFailed { call, why }
}

impl Backend for Emulated {
    fn device(&self) -> Device {
        Device::Emu
    }

    fn name(&self) -> &str {
        "emulator"
    }

    fn multiprocessors(&self) -> u32 {
        MULTIPROCESSORS
    }

    fn multiprocessor_shared_bytes(&self) -> u32 {
        SM90_SHARED_BYTES
    }

    fn rates(&self) -> Option<DeviceRates> {
        Some(RATES)
    }

    fn alloc(&self, bytes: u64) -> Result<u64> {
        let refused = Error::OutOfMemory { bytes };
        // A buffer ends at a page: with a multiple of 256 bytes it begins at one too.
        let size = bytes.max(1).checked_next_multiple_of(256).ok_or(refused)?;
        let buffer = Buffer::new(usize::try_from(size).map_err(|_| refused)?)?;
        let address = buffer.address();
        self.buffers().insert(address, buffer);
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        self.buffers().remove(&address);
    }

    unsafe fn upload(&self, to: u64, from: &[u8], _: Stream) -> Result<()> {
        let to = self.host(to, from.len() as u64)?;
        // SAFETY: the destination is in one of our buffers, which no host slice overlaps.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [u8], _: Stream) -> Result<()> {
        let from = self.host(from, to.len() as u64)?;
        // SAFETY: as above.
        unsafe { core::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: u64, _: Stream) -> Result<()> {
        let (from, to) = (self.host(from, bytes)?, self.host(to, bytes)?);
        // SAFETY: both are in our buffers; they may be the same.
        unsafe { core::ptr::copy(from, to, bytes as usize) };
        Ok(())
    }

    unsafe fn zero(&self, at: u64, bytes: u64, _: Stream) -> Result<()> {
        let at = self.host(at, bytes)?;
        // SAFETY: in one of our buffers.
        unsafe { core::ptr::write_bytes(at, 0, bytes as usize) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        launch: &Launch,
        params: *const c_void,
        params_bytes: usize,
        _: Stream,
    ) -> Result<()> {
        let (name, threads) = (launch.kernel.name, launch.kernel.threads);
        let (grid, shared) = (launch.grid, launch.shared_bytes);
        // SAFETY: the caller's promise.
        let ran = unsafe {
            emu::launch_raw(name, grid, threads, shared, params, params_bytes, self.options)
        };
        ran.map_err(|fault| failed("emulator", Box::leak(fault.text.into_boxed_str())))
    }

    fn sync(&self, _: Stream) -> Result<()> {
        Ok(())
    }
}
