//! The kernels that run on a device: their names, parameters, and how a call is cut into launches.
//!
//! Pure and testable: no driver, no memory. What is planned here is launched alike by the emulator
//! and by a GPU. A kernel is found by its name; an instance for one format and head dimension is a
//! kernel of its own.

/// The kernels of one family: `IDENT = symbol, C name of the parameters, threads`.
macro_rules! kernels {
    ($($id:ident = $name:literal, $params:literal, $threads:expr;)+) => {
        $(pub(super) const $id: $crate::kernels::Kernel =
            $crate::kernels::Kernel { name: $name, params: $params, threads: $threads };)+
        /// The kernels of this family.
        pub(super) static KERNELS: &[&$crate::kernels::Kernel] = &[$(&$id),+];
    };
}

mod append;
mod append_token;
mod attend;
mod attend_params;
mod cascade;
mod cascade_attend;
mod cascade_choice;
mod cascade_model;
mod cascade_views;
mod copy;
mod decode;
mod decode_tile;
mod decode_token;
#[cfg(all(test, feature = "std"))]
mod header;
pub mod image;
mod lookup;
mod merge;
mod mla;
mod mla_token;
pub mod params;
mod prefill;
mod prefill_sealed;
mod prefill_token;
mod records;
mod residence;
mod seal;
mod shared_prefix;
mod split;

pub use append::append_launch;
pub use append_token::{append_token_launch, append_token_params};
pub use attend::{
    AttendArgs, AttendBounds, AttendParams, AttendPlan, ScaleArgs, most_workspace_bytes,
};
pub use cascade::{CascadeBounds, CascadeInput, CascadeOutput, CascadePlan, Half};
pub use cascade_attend::{CascadeAttendPlan, CascadeLaunches};
pub use cascade_choice::{Choice, Chunked, cascade_choice, cascade_within};
pub use cascade_model::{CascadeShape, DeviceRates, Estimate, SharedPrefix};
pub use copy::{check_copies, copy_launch, zero_launch};
pub use decode::{DecodeBounds, DecodePlan, Pieces};
pub use decode_tile::{TILE_ROWS, decode_tile_params};
pub use lookup::{LookupBatch, LookupImage, LookupUpload};
pub use merge::merge_launch;
pub use mla::{MLA_DIM, MLA_VALUES, MlaBounds, MlaPlan};
pub use prefill::{PrefillBounds, prefill_info, prefill_kernel, prefill_launch};
pub use prefill_sealed::{prefill_sealed_launch, prefill_sealed_params, prefill_sealed_pays};
pub use prefill_token::prefill_token_launch;
pub use residence::SM90_SHARED_BYTES;
pub use seal::{FIRST_SPARE, SPARE_TAKEN, seal_launch};
pub use shared_prefix::{HostBatch, SharedPrefixes, Words};

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

/// Every kernel, family by family.
pub fn kernels() -> impl Iterator<Item = &'static Kernel> {
    let families = [
        append::KERNELS,
        append_token::KERNELS,
        cascade::KERNELS,
        copy::KERNELS,
        decode::KERNELS,
        decode_tile::KERNELS,
        decode_token::KERNELS,
        lookup::KERNELS,
        merge::KERNELS,
        mla::KERNELS,
        mla_token::KERNELS,
        prefill::KERNELS,
        prefill_sealed::KERNELS,
        prefill_token::KERNELS,
        seal::KERNELS,
    ];
    families.into_iter().flatten().copied()
}
