//! The kernels that run on a device: their names, parameters, and how a call is cut into launches.
//!
//! Pure and testable: no driver, no memory. What is planned here is launched alike by the emulator
//! and by a GPU. A kernel is found by its name; an instance for one format and head dimension is a
//! kernel of its own.

mod append;
mod decode;
#[cfg(all(test, feature = "std"))]
mod header;
pub mod image;
pub mod params;

pub use append::append_launch;
pub use decode::{DecodeBounds, DecodePlan, Pieces};

use crate::dtype::DType;
use crate::error::{Error, Result};

/// A kernel of `cuda/`.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its symbol.
    pub name: &'static str,
    /// The C name of its parameter struct.
    pub params: &'static str,
    /// Threads of a block: always these.
    pub threads: u32,
}

/// The grid and the memory of one launch. Blocks are one-dimensional.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

macro_rules! kernels {
    ($($id:ident = $name:literal, $params:literal, $threads:expr;)+) => {
        $(const $id: Kernel = Kernel { name: $name, params: $params, threads: $threads };)+
        /// Every kernel.
        pub static KERNELS: &[Kernel] = &[$($id),+];
    };
}

kernels! {
    APPEND = "kvc_append", "kvc_append_params", 256;
    DECODE_PLAN = "kvc_decode_plan", "kvc_decode_plan_params", 256;
    DECODE_F16_D64 = "kvc_decode_f16_d64", "kvc_decode_params", 128;
    DECODE_F16_D128 = "kvc_decode_f16_d128", "kvc_decode_params", 128;
    DECODE_BF16_D64 = "kvc_decode_bf16_d64", "kvc_decode_params", 128;
    DECODE_BF16_D128 = "kvc_decode_bf16_d128", "kvc_decode_params", 128;
}

/// The kernel of this name.
fn kernel(name: &str) -> &'static Kernel {
    KERNELS.iter().find(|kernel| kernel.name == name).expect("a name of the list above")
}

/// The decode kernel for a cache of this type and head dimension.
///
/// # Errors
/// `Unsupported` where the library has no instance.
pub fn decode_kernel(cache: DType, head_dim: u32) -> Result<&'static Kernel> {
    match (cache, head_dim) {
        (DType::F16, 64) => Ok(kernel(DECODE_F16_D64.name)),
        (DType::F16, 128) => Ok(kernel(DECODE_F16_D128.name)),
        (DType::Bf16, 64) => Ok(kernel(DECODE_BF16_D64.name)),
        (DType::Bf16, 128) => Ok(kernel(DECODE_BF16_D128.name)),
        _ => Err(Error::Unsupported { what: "decode with this cache type and head_dim" }),
    }
}
