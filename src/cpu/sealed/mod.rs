//! Sealed tiles on the CPU: sealing raw rows, and attention that reads records as they are stored.
//!
//! A query at position `p` reads its own tile, `p / tokens`, from raw rows and every tile before it
//! from its record, whatever call brought it here. Scores and weighted values are dot products of
//! stored codes with queries and probabilities that are brought to whole numbers for each tile: the
//! channel scales of K go into the query, the token scales of V into the probabilities, and what is
//! left are sums of products of bytes. Those are exact, so a row's bits do not depend on how many
//! rows share its call, on threads, or on how the prompt was cut into calls.
//!
//! A query is rounded to 8 bits of its largest scaled channel before it meets codes of 4 bits and
//! fewer, to 16 bits before codes of 8. What that adds to a logit is at most
//! `scale * a / 2 * n / 2 * k_dim`, with `a` that largest channel over 127 or 32639 and `n` the
//! largest code: a tenth of what the rounding of the keys themselves has done, where the channels
//! are alike. Probabilities times token scales are rounded to 15 bits of the tile's largest, or to 16.
//!
//! With AVX512_VNNI most layouts have kernels of their own, `x86_64/tiles`: what they compute is the
//! same, but one multiplies records as they lie, and the other seals rows two channels at a time.
//!
//! | file | job |
//! |---|---|
//! | `args.rs` | what callers hand over, checked |
//! | `append.rs` | new rows, and the tiles that they fill |
//! | `attend.rs`, `plan.rs` | a call: cut, run, fold what was split, the raw tiles |
//! | `kernel.rs` | one range of sealed tiles for some rows of one KV head |
//! | `dots.rs`, `softmax.rs` | its products; its probabilities |
//! | `scratch.rs` | its private memory |
//! | `codes.rs` | packed words to bytes; words to lanes |
//! | `seal.rs`, `seal_values.rs` | raw rows to records: keys and the whole; values |
//! | `store.rs` | records, staging and scratch of one layer group, for the cache |

mod append;
mod args;
mod attend;
mod codes;
mod dots;
mod kernel;
mod plan;
mod scratch;
mod seal;
mod seal_values;
mod softmax;
#[cfg(feature = "std")]
mod store;
#[cfg(test)]
mod tests;

pub use append::{TileAppendArgs, append_tiles};
pub use args::{RawBlock, RawTables, SealArgs, SealTile, TileAttendArgs, TileView};
pub use attend::attend_tiles;
pub use plan::attend_tiles_workspace_bytes;
pub use seal::seal_tiles;
#[cfg(feature = "std")]
pub(crate) use store::{RawRows, TileStore};

#[cfg(all(test, target_arch = "x86_64"))]
pub(super) use codes::bytes;
pub(super) use kernel::{SealedJob, tiles};
// What the kernel of `x86_64/tiles` shares.
pub(super) use seal::{SealJob, seal_record};
#[cfg(target_arch = "x86_64")]
pub(super) use {
    codes::pattern,
    dots::WIDE,
    kernel::{Reads, begin, find, value_unit},
    scratch::{Dims, Scratch},
    seal::{HeadRows, begin_record, finish_record},
};

/// The kernels of one level.
#[derive(Clone, Copy)]
pub(crate) struct SealedKernels {
    /// Attention of some rows over a range of sealed tiles.
    pub attend: unsafe fn(&SealedJob<'_>),
    /// One record from raw rows; whether it could be sealed.
    pub seal: unsafe fn(&SealJob<'_>) -> bool,
}

/// Instantiates the generic kernels at one level: `instantiate_sealed!(name, vector, dot,
/// "features")` makes a function `name()`.
macro_rules! instantiate_sealed {
    ($name:ident, $vector:ty, $dot:ty $(, $features:literal)?) => {
        /// The kernels of this level for sealed tiles.
        pub(crate) fn $name() -> $crate::cpu::sealed::SealedKernels {
            #[allow(unused_imports)]
            use $crate::cpu::words::Plain;
            use $crate::cpu::sealed::{SealJob, SealedJob, SealedKernels, seal_record, tiles};

            $(#[target_feature(enable = $features)])?
            unsafe fn rows<const R: usize>(job: &SealedJob<'_>) {
                // SAFETY: the caller's promise; the features are enabled here.
                unsafe { tiles::<$vector, $dot, R>(job) }
            }
            unsafe fn attend(job: &SealedJob<'_>) {
                // SAFETY: the caller's promise.
                unsafe {
                    match job.heads * job.tokens {
                        0 => {}
                        1 => rows::<1>(job),
                        _ => rows::<4>(job),
                    }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn seal(job: &SealJob<'_>) -> bool {
                // SAFETY: as above.
                unsafe { seal_record::<$vector>(job) }
            }
            SealedKernels { attend, seal }
        }
    };
}
pub(super) use instantiate_sealed;
