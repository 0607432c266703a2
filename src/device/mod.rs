//! Where a cache's blocks live and its kernels run: the CPU, a GPU, or the emulator of one.
//!
//! A GPU and the emulator are the same to the layers above: a [`Backend`] that has memory and runs
//! the launches that `kernels` plans. [`DeviceStore`] is the storage of one layer group on such a
//! device, with the operations of the CPU's store; `tiles` has those of formats with sealed tiles. The CPU has no backend: its kernels are called
//! directly.
//!
//! `unsafe` is here because addresses of a device cannot be checked by the compiler: the functions
//! that take bare ones are `unsafe`, and what safe code holds are [`DeviceMemory`], which owns its
//! range, and [`DeviceRows`], whose maker answered for it. Copies that go on after their caller has
//! returned are a [`Flight`], which the host memory that they touch ([`HostPart`]) knows.

mod attend;
mod backend;
mod batch;
mod cascade;
mod copies;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "emulate")]
mod emulated;
mod flight;
mod host;
mod memory;
mod rotation;
mod rows;
mod side;
mod slots;
mod store;
#[cfg(all(test, feature = "emulate"))]
mod tests;
mod tiles;

pub use backend::{Backend, HostCopy, Mark, Stream, Way};
pub(crate) use backend::{launch, launch_attend};
pub use batch::{BatchTables, DeviceBatch, GroupTables};
pub use copies::{Copies, Span};
#[cfg(feature = "emulate")]
pub use emulated::Emulated;
pub use flight::{Flight, StreamMark};
pub use host::HostPart;
pub use memory::DeviceMemory;
pub use rows::{DeviceRows, DeviceRowsMut};
pub use side::SideStream;
pub use store::{DeviceStore, StoreOptions};
pub(crate) use tiles::Outcome;

use alloc::sync::Arc;

use crate::error::{Error, Result};

/// Where blocks live and kernels run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Device {
    /// Host memory and SIMD kernels.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda {
        /// Its number, as the driver counts them.
        ordinal: u32,
    },
    /// The CUDA kernels on the host, under the emulator (feature `emulate`): for tests.
    Emu,
}

impl Device {
    /// The device that `name` spells: `cpu`, `cuda`, `cuda:1`, `emu`.
    ///
    /// # Errors
    /// `InvalidArgument` for another text.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda { ordinal: 0 }),
            "emu" => Ok(Device::Emu),
            _ => name
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(|ordinal| Device::Cuda { ordinal })
                .ok_or(Error::invalid("device", "must be cpu, cuda, cuda:N or emu")),
        }
    }
}

/// The backend of a device. All callers of a process share one for each GPU; each emulator is a
/// device of its own.
///
/// # Errors
/// `InvalidArgument` for the CPU, which has none; `NoKernels` where this build has no kernels for
/// the device; `NoDevice` where it is not there; `DeviceFailed` where its driver fails.
pub fn open(device: Device) -> Result<Arc<dyn Backend>> {
    match device {
        Device::Cpu => Err(Error::invalid("device", "the CPU's kernels are called directly")),
        #[cfg(feature = "cuda")]
        Device::Cuda { ordinal } => Ok(crate::cuda::Cuda::open(ordinal)?),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda { .. } => {
            Err(Error::NoKernels { what: "this library was built without the feature cuda" })
        }
        #[cfg(feature = "emulate")]
        Device::Emu => Ok(Arc::new(Emulated::new(Default::default()))),
        #[cfg(not(feature = "emulate"))]
        Device::Emu => {
            Err(Error::NoKernels { what: "this library was built without the feature emulate" })
        }
    }
}
