//! Attention and append on the CPU: SIMD kernels over block tables.
//!
//! One call takes raw pointers, strides and tables ([`AttendArgs`]), cuts the work into jobs at
//! boundaries that depend on each sequence alone, and runs them on an [`Executor`]; so a sequence
//! gets the same bits whatever the number of threads and whatever else is in the batch. Kernels
//! are one generic algorithm over a small vector trait, instantiated a level ([`CpuLevel`]).
//!
//! Knows nothing of caches, pools or threads; allocates nothing.

mod append;
mod args;
mod attend;
mod decode;
mod dispatch;
mod dot;
mod executor;
mod finish;
mod job;
mod kernels;
mod level;
mod math;
#[cfg(feature = "std")]
mod memory;
mod name;
mod order;
mod plan;
mod prefetch;
mod prefill;
mod quant;
mod rope;
mod rows;
mod scalar;
mod scales;
mod sealed;
#[cfg(feature = "std")]
mod store;
#[cfg(feature = "std")]
mod threads;
mod vector;
mod words;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
#[cfg_attr(fuzzing, allow(dead_code))]
mod x86_64;

pub use append::{AppendArgs, append, append_at};
pub use args::{AttendArgs, BlockTables, KvView, RowsView};
pub use attend::attend;
pub use executor::{Executor, Serial};
pub use level::CpuLevel;
pub use name::kernel_name;
pub use plan::{AttendMaxima, attend_workspace_bytes};
pub use rope::{MAX_ROPE_PAIRS, Rope, RopeStyle};
pub use scales::ScaleView;
pub use sealed::{
    RawBlock, RawTables, SealArgs, SealTile, TileAppendArgs, TileAttendArgs, TileView,
    append_tiles, attend_tiles, attend_tiles_workspace_bytes, seal_tiles,
};
#[cfg(feature = "std")]
pub(crate) use sealed::{RawRows, TileStore};
#[cfg(feature = "std")]
pub(crate) use store::{AttendBatch, KvStore};
#[cfg(feature = "std")]
pub use threads::Threads;
