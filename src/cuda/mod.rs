//! The CUDA driver: presence, the primary context, the embedded kernels, memory, launches.
//!
//! libcuda is loaded at run time, so that one library serves machines with and without a GPU; the
//! CUDA runtime is not used at all. The context is the device's primary one, which is also that of
//! PyTorch and of everything built on the runtime: their pointers and streams are valid here. Every
//! call makes it current for its own time and leaves the thread's context as it was.
//!
//! This is the only user of cudarc. It knows kernels by name, and nothing of what they compute.

mod driver;
mod graph;
mod queue;
mod rates;
mod transfer;

pub use graph::Graph;
pub use queue::{Event, Queue};

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::error::{Error, Result};
use crate::kernels::{DeviceRates, Kernel, Launch, image, kernels};
use driver::{Current, check};

/// A GPU with the library's kernels loaded. All callers of the process share one for each device;
/// it lives as long as the process.
#[derive(Debug)]
pub struct Cuda {
    ordinal: u32,
    name: String,
    multiprocessors: u32,
    multiprocessor_shared_bytes: u32,
    rates: Option<DeviceRates>,
    context: driver::Context,
    functions: HashMap<&'static str, Function>,
    /// Many copies at once, where the driver can.
    batch: Option<transfer::Batch>,
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: a handle of the driver, whose functions may be called from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// What a device is, for reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The driver's name of it.
    pub name: String,
    /// Compute capability, times ten: 90 for an H100.
    pub capability: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of its memory, and how many of them are free now.
    pub memory_bytes: (u64, u64),
    /// Bytes of its level-2 cache.
    pub l2_bytes: u64,
    /// Highest clocks of multiprocessors and memory, in kHz.
    pub clocks_khz: (u32, u32),
    /// The CUDA version of the driver, as it counts: 13000 for 13.0.
    pub driver: u32,
}

impl Cuda {
    /// The device with this number, its kernels loaded at the first call.
    ///
    /// # Errors
    /// `NoKernels` where the build embedded none or none for this device; `NoDevice` without
    /// libcuda or without the device; `DeviceFailed` where the driver fails.
    pub fn open(ordinal: u32) -> Result<Arc<Cuda>> {
        static OPEN: Mutex<Vec<Arc<Cuda>>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = open.iter().find(|cuda| cuda.ordinal == ordinal) {
            return Ok(found.clone());
        }
        if image::images().is_empty() {
            return Err(Error::NoKernels { what: image::build_text() });
        }
        driver::start()?;
        let made = Arc::new(Self::load(ordinal)?);
        open.push(made.clone());
        Ok(made)
    }

    /// Devices that the driver sees.
    ///
    /// # Errors
    /// `NoDevice` without libcuda, `DeviceFailed`.
    pub fn count() -> Result<u32> {
        driver::start()?;
        let mut count = 0;
        // SAFETY: the driver was started; the pointer is to a live integer.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    fn load(ordinal: u32) -> Result<Self> {
        if ordinal >= Self::count()? {
            return Err(Error::NoDevice { why: "the driver has no device with this number" });
        }
        let context = driver::Context::primary(ordinal)?;
        let current = Current::enter(&context)?;
        let functions = functions(
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        )?;
        let multiprocessors =
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let multiprocessor_shared_bytes = context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let name = context.name()?;
        let of = |attribute| context.attribute(attribute);
        let rates = rates::rates(rates::Hardware {
            capability: of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
                + of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            multiprocessors,
            clock_khz: of(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
            memory_clock_khz: of(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?,
            memory_bus_bits: of(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?,
            cache_bytes: of(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        });
        drop(current);
        let batch = transfer::Batch::find();
        Ok(Self {
            ordinal,
            name,
            multiprocessors,
            multiprocessor_shared_bytes,
            rates,
            context,
            functions,
            batch,
        })
    }

    /// Its number.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The driver's name of it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Shared memory of a multiprocessor, in bytes.
    pub fn multiprocessor_shared_bytes(&self) -> u32 {
        self.multiprocessor_shared_bytes
    }

    /// What it does in a microsecond, as far as the driver says what that follows from.
    pub fn rates(&self) -> Option<DeviceRates> {
        self.rates
    }

    /// What it is.
    ///
    /// # Errors
    /// `DeviceFailed`.
    pub fn facts(&self) -> Result<Facts> {
        let _current = Current::enter(&self.context)?;
        let (mut free, mut total, mut driver) = (0, 0, 0);
        // SAFETY: the context is current; the pointers are to live integers.
        unsafe {
            check("cuMemGetInfo", sys::cuMemGetInfo_v2(&mut free, &mut total))?;
            check("cuDriverGetVersion", sys::cuDriverGetVersion(&mut driver))?;
        }
        let of = |attribute| self.context.attribute(attribute);
        Ok(Facts {
            name: self.name.clone(),
            capability: of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
                + of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            multiprocessors: self.multiprocessors,
            memory_bytes: (total as u64, free as u64),
            l2_bytes: of(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
            clocks_khz: (
                of(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
                of(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?,
            ),
            driver: driver as u32,
        })
    }

    /// Allocates `bytes` bytes, aligned to 256 at least.
    ///
    /// # Errors
    /// `OutOfMemory`, `DeviceFailed`.
    pub fn alloc(&self, bytes: u64) -> Result<u64> {
        let refused = Error::OutOfMemory { bytes };
        let size = usize::try_from(bytes.max(1)).map_err(|_| refused)?;
        let _current = Current::enter(&self.context)?;
        let mut address = 0;
        // SAFETY: the context is current; the pointer is to a live integer.
        match unsafe { sys::cuMemAlloc_v2(&mut address, size) } {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(refused),
            result => check("cuMemAlloc", result).map(|()| address),
        }
    }

    /// Gives an allocation back, after everything that is enqueued on the device.
    ///
    /// # Safety
    /// `address` came from [`alloc`](Self::alloc), once, and nobody uses it any more.
    pub unsafe fn free(&self, address: u64) {
        // Without a context there is no memory either; a failure cannot be answered from here, and
        // the next call reports it.
        if let Ok(_current) = Current::enter(&self.context) {
            // SAFETY: the context is current; the caller's promise.
            unsafe {
                let _ = sys::cuCtxSynchronize();
                let _ = sys::cuMemFree_v2(address);
            }
        }
    }

    /// Enqueues a copy of `from` to the device.
    ///
    /// # Errors
    /// `DeviceFailed`.
    ///
    /// # Safety
    /// As for `device::Backend::upload`.
    pub unsafe fn upload(&self, to: u64, from: &[u8], stream: *mut c_void) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        let (at, bytes) = (from.as_ptr().cast(), from.len());
        // SAFETY: the context is current; the caller's promise.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, at, bytes, stream.cast())
        })
    }

    /// Copies from the device, after what is enqueued on `stream`, and waits.
    ///
    /// # Errors
    /// `DeviceFailed`.
    ///
    /// # Safety
    /// As for `device::Backend::download`.
    pub unsafe fn download(&self, from: u64, to: &mut [u8], stream: *mut c_void) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        let (at, bytes) = (to.as_mut_ptr().cast(), to.len());
        // SAFETY: the context is current; the caller's promise.
        let enqueued = check("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(at, from, bytes, stream.cast())
        });
        // Waited for in any case: `to` is the caller's again when this returns.
        enqueued.and(self.sync(stream))
    }

    /// Enqueues a copy within the device.
    ///
    /// # Errors
    /// `DeviceFailed`.
    ///
    /// # Safety
    /// As for `device::Backend::copy`.
    pub unsafe fn copy(&self, from: u64, to: u64, bytes: u64, stream: *mut c_void) -> Result<()> {
        if from == to {
            return Ok(());
        }
        let _current = Current::enter(&self.context)?;
        // SAFETY: the context is current; the caller's promise. Such ranges fit in `usize`.
        check("cuMemcpyDtoDAsync", unsafe {
            sys::cuMemcpyDtoDAsync_v2(to, from, bytes as usize, stream.cast())
        })
    }

    /// Enqueues the zeroing of a range.
    ///
    /// # Errors
    /// `DeviceFailed`.
    ///
    /// # Safety
    /// As for `device::Backend::zero`.
    pub unsafe fn zero(&self, at: u64, bytes: u64, stream: *mut c_void) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        // SAFETY: as above.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(at, 0, bytes as usize, stream.cast())
        })
    }

    /// Enqueues a kernel.
    ///
    /// # Errors
    /// `NoKernels` where the build has no such kernel, `DeviceFailed`.
    ///
    /// # Safety
    /// As for `device::Backend::launch`.
    pub unsafe fn launch(
        &self,
        launch: &Launch,
        params: *const c_void,
        stream: *mut c_void,
    ) -> Result<()> {
        let Kernel { name, threads, .. } = *launch.kernel;
        let function = self.functions.get(name).ok_or(Error::NoKernels { what: name })?;
        let _current = Current::enter(&self.context)?;
        let [x, y, z] = launch.grid;
        // One parameter, by value: the driver knows its size from the kernel and copies it.
        let mut list = [params.cast_mut()];
        // SAFETY: the context is current, the function is of a module of it; the caller's promise.
        check("cuLaunchKernel", unsafe {
            sys::cuLaunchKernel(
                function.0,
                x,
                y,
                z,
                threads,
                1,
                1,
                launch.shared_bytes,
                stream.cast(),
                list.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }

    /// Waits for everything that is enqueued on `stream`.
    ///
    /// # Errors
    /// `DeviceFailed` where some of it has failed.
    pub fn sync(&self, stream: *mut c_void) -> Result<()> {
        let _current = Current::enter(&self.context)?;
        // SAFETY: the context is current; a stream that work was enqueued on is one.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream.cast()) })
    }

    /// Which of the library's kernels this build lacks: those for head dimensions that it was not
    /// compiled for.
    pub fn missing(&self) -> impl Iterator<Item = &'static str> + '_ {
        kernels().map(|kernel| kernel.name).filter(|name| !self.functions.contains_key(name))
    }
}

/// Loads every image into the current context and finds the kernels in them.
fn functions(most_shared_bytes: u32) -> Result<HashMap<&'static str, Function>> {
    let mut functions = HashMap::new();
    for image in image::images() {
        let mut module = ptr::null_mut();
        // SAFETY: the context is current; the image is a whole fatbin and lives for ever.
        let loaded = unsafe { sys::cuModuleLoadData(&mut module, image.bytes.as_ptr().cast()) };
        if loaded == sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
            return Err(Error::NoKernels { what: "the build has no image for this GPU" });
        }
        check("cuModuleLoadData", loaded)?;
        for kernel in kernels() {
            let name = CString::new(kernel.name).map_err(|_| Error::Panic)?;
            let mut function = ptr::null_mut();
            // SAFETY: the module was just loaded; the name ends with a zero.
            match unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) } {
                sys::CUresult::CUDA_ERROR_NOT_FOUND => continue,
                result => check("cuModuleGetFunction", result)?,
            }
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // A limit only: a launch takes what it asks for. All shared memory is dynamic.
            // SAFETY: a function of a loaded module.
            check("cuFuncSetAttribute", unsafe {
                sys::cuFuncSetAttribute(function, attribute, most_shared_bytes as i32)
            })?;
            functions.insert(kernel.name, Function(function));
        }
    }
    Ok(functions)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without a GPU every way in says what is missing, and nothing panics.
    #[test]
    fn without_a_device_the_answer_is_an_error() {
        match Cuda::count() {
            Ok(count) if count > 0 => {
                assert!(Cuda::open(count).is_err());
                println!("{count} devices");
            }
            Ok(_) => assert!(Cuda::open(0).is_err()),
            Err(error) => {
                assert!(matches!(error, Error::NoDevice { .. }), "{error}");
                let opened = Cuda::open(0).unwrap_err();
                let expected = if image::images().is_empty() {
                    matches!(opened, Error::NoKernels { .. })
                } else {
                    opened == error
                };
                assert!(expected, "{opened}");
                println!("skipped: {error}");
            }
        }
    }
}
