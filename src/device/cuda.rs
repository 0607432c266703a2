//! The CUDA driver as a backend: each method is the driver module's own.

use core::ffi::c_void;
use core::ptr::NonNull;

use super::{Backend, Device, HostCopy, Mark, Stream, Way};
use crate::cuda::Cuda;
use crate::error::Result;
use crate::kernels::{DeviceRates, Launch};

impl Backend for Cuda {
    fn device(&self) -> Device {
        Device::Cuda { ordinal: self.ordinal() }
    }

    fn name(&self) -> &str {
        self.name()
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors()
    }

    fn multiprocessor_shared_bytes(&self) -> u32 {
        self.multiprocessor_shared_bytes()
    }

    fn rates(&self) -> Option<DeviceRates> {
        self.rates()
    }

    fn is_capturing(&self, stream: Stream) -> Result<bool> {
        self.is_capturing(stream.as_raw())
    }

    fn alloc(&self, bytes: u64) -> Result<u64> {
        self.alloc(bytes)
    }

    unsafe fn free(&self, address: u64) {
        // SAFETY: the caller's promise, here and below.
        unsafe { self.free(address) }
    }

    unsafe fn upload(&self, to: u64, from: &[u8], stream: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.upload(to, from, stream.as_raw()) }
    }

    unsafe fn download(&self, from: u64, to: &mut [u8], stream: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.download(from, to, stream.as_raw()) }
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: u64, stream: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.copy(from, to, bytes, stream.as_raw()) }
    }

    unsafe fn zero(&self, at: u64, bytes: u64, stream: Stream) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.zero(at, bytes, stream.as_raw()) }
    }

    unsafe fn launch(
        &self,
        launch: &Launch,
        params: *const c_void,
        _: usize,
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: see above.
        unsafe { self.launch(launch, params, stream.as_raw()) }
    }

    fn open_stream(&self) -> Result<Stream> {
        // SAFETY: a stream of this device, until it is closed.
        self.open_stream().map(|stream| unsafe { Stream::from_raw(stream) })
    }

    unsafe fn close_stream(&self, stream: Stream) {
        // SAFETY: see above.
        unsafe { self.close_stream(stream.as_raw()) }
    }

    fn fence(&self, before: Stream, after: Stream) -> Result<()> {
        if before == after { Ok(()) } else { self.fence(before.as_raw(), after.as_raw()) }
    }

    fn sync(&self, stream: Stream) -> Result<()> {
        self.sync(stream.as_raw())
    }
    fn locks_pages(&self) -> bool {
        true
    }

    fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.alloc_host(bytes)
    }

    unsafe fn free_host(&self, at: NonNull<u8>, _: usize) {
        // SAFETY: see above.
        unsafe { self.free_host(at) }
    }

    unsafe fn copy_host(
        &self,
        way: Way,
        copies: &[HostCopy],
        locked: bool,
        stream: Stream,
    ) -> Result<()> {
        let up = way == Way::Up;
        let addresses = copies.iter().map(|&HostCopy { device, host, bytes }| {
            let host = host.expose_provenance() as u64;
            if up { (device, host, bytes) } else { (host, device, bytes) }
        });
        // SAFETY: see above.
        unsafe { self.copy_host(up, addresses, locked, stream.as_raw()) }
    }

    fn mark(&self, stream: Stream) -> Result<Mark> {
        self.mark(stream.as_raw()).map(Mark::from_raw)
    }

    fn hold(&self, stream: Stream, mark: Mark) -> Result<()> {
        self.hold(stream.as_raw(), mark.as_raw())
    }

    fn has_passed(&self, mark: Mark) -> Result<bool> {
        self.has_passed(mark.as_raw())
    }

    fn wait(&self, mark: Mark) -> Result<()> {
        self.wait(mark.as_raw())
    }

    fn seconds_between(&self, from: Mark, to: Mark) -> Option<f64> {
        self.seconds_between(from.as_raw(), to.as_raw())
    }

    unsafe fn end_mark(&self, mark: Mark) {
        // SAFETY: see above.
        unsafe { self.end_mark(mark.as_raw()) }
    }
}
