//! What a level's kernels are, and the macro by which the leaf files fill the table.
//!
//! A leaf instantiates the generic kernels inside functions that enable its instructions; the
//! driver gets a table from `dispatch.rs` once a call and knows nothing of instruction sets.

use super::finish::Part;
use super::job::Job;
use crate::dtype::DType;
use crate::quant::RowCodec;

/// A kernel: reads the job's K, V and Q and writes its states.
///
/// # Safety
/// The CPU must have the level the kernel was compiled for, and every pointer of the job must be
/// valid as its field documents.
pub(crate) type Kernel = unsafe fn(&Job<'_>);

/// [`finish_row`](super::finish::finish_row), compiled for a level.
pub(crate) type Finish = unsafe fn(&[Part], Option<f32>, DType, *mut u8, usize) -> f32;

/// [`encode`](super::quant::encode), compiled for a level.
pub(crate) type Encode = unsafe fn(&RowCodec, &mut [f32], &mut [u8], &mut [u8]) -> bool;

/// [`widen`](super::rows::widen), compiled for a level.
pub(crate) type Widen = unsafe fn(DType, *const u8, &mut [f32]);

/// [`narrow`](super::rows::narrow), compiled for a level.
pub(crate) type Narrow = unsafe fn(DType, &[f32], *mut u8);

/// The kernels of one level and format.
#[derive(Clone, Copy)]
pub(crate) struct Kernels {
    /// For at most [`DECODE_ROWS`](super::decode::DECODE_ROWS) query rows.
    pub decode: Kernel,
    /// For any number of query rows up to [`tile_rows`](super::prefill::tile_rows).
    pub tile: Kernel,
    /// Turns the states of a row into its output.
    pub finish: Finish,
    /// The same where values are stored rotated.
    pub finish_rotated: Finish,
    /// Encodes a row of a quantised format.
    pub encode: Encode,
    /// Widens a row that a caller holds.
    pub widen: Widen,
    /// Rounds a row to what is stored.
    pub narrow: Narrow,
}

/// Instantiates the generic kernels at one level: `instantiate!(vector, "features")` makes a
/// function `kernels(format)`.
macro_rules! instantiate {
    ($name:ident, $vector:ty $(, $features:literal)?) => {
        /// The kernels of this level for `format`.
        pub(crate) fn $name(format: $crate::dtype::KvFormat) -> $crate::cpu::kernels::Kernels {
            use $crate::cpu::finish::{Part, finish_row, finish_turned};
            use $crate::cpu::{
                decode, dot::Widened, job::Job, kernels::{Kernel, Kernels}, prefill, quant,
                rows, vector::Stored,
            };
            use $crate::dtype::{DType, bf16, f16};
            use $crate::quant::RowCodec;

            $(#[target_feature(enable = $features)])?
            unsafe fn decode_rows<S: Stored, const R: usize>(job: &Job<'_>) {
                // SAFETY: the caller's promise; the features are enabled here.
                unsafe { decode::decode::<$vector, Widened<S>, decode::OneByOne<S>, R>(job) }
            }
            unsafe fn decode_kernel<S: Stored>(job: &Job<'_>) {
                let rows = [decode_rows::<S, 1> as Kernel, decode_rows::<S, 2>, decode_rows::<S, 4>];
                // SAFETY: the caller's promise.
                unsafe { decode::by_rows(job, rows) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn tile_kernel<S: Stored>(job: &Job<'_>) {
                // SAFETY: the caller's promise; the features are enabled here.
                unsafe { prefill::tile::<$vector, S>(job) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn finish(
                parts: &[Part],
                sink: Option<f32>,
                dtype: DType,
                out: *mut u8,
                v_dim: usize,
            ) -> f32 {
                // SAFETY: the caller's promise.
                unsafe { finish_row(parts, sink, dtype, out, v_dim) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn code_rows<const R: usize>(job: &Job<'_>) {
                // SAFETY: the caller's promise; the features are enabled here.
                unsafe { quant::decode::<$vector, R>(job) }
            }
            unsafe fn decode_codes(job: &Job<'_>) {
                // SAFETY: the caller's promise.
                unsafe { decode::by_rows(job, [code_rows::<1>, code_rows::<2>, code_rows::<4>]) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn tile_codes(job: &Job<'_>) {
                // SAFETY: the caller's promise; the features are enabled here.
                unsafe { prefill::tile_coded::<$vector>(job) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn finish_rotated(
                parts: &[Part],
                sink: Option<f32>,
                dtype: DType,
                out: *mut u8,
                v_dim: usize,
            ) -> f32 {
                // SAFETY: the caller's promise.
                unsafe { finish_turned::<$vector>(parts, sink, dtype, out, v_dim) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn encode(
                codec: &RowCodec,
                row: &mut [f32],
                codes: &mut [u8],
                scales: &mut [u8],
            ) -> bool {
                // SAFETY: the caller's promise.
                unsafe { quant::encode::<$vector>(codec, row, codes, scales) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn widen(dtype: DType, from: *const u8, to: &mut [f32]) {
                // SAFETY: the caller's promise.
                unsafe { rows::widen::<$vector>(dtype, from, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn narrow(dtype: DType, from: &[f32], to: *mut u8) {
                // SAFETY: the caller's promise.
                unsafe { rows::narrow::<$vector>(dtype, from, to) }
            }
            let with = |decode: Kernel, tile: Kernel| Kernels {
                decode, tile, finish, finish_rotated, encode, widen, narrow,
            };
            match (format.is_float(), format.dtype()) {
                // Of quantised formats those with tiles have been refused.
                (false, _) => with(decode_codes, tile_codes),
                (true, DType::F32) => with(decode_kernel::<f32>, tile_kernel::<f32>),
                (true, DType::F16) => with(decode_kernel::<f16>, tile_kernel::<f16>),
                (true, DType::Bf16) => with(decode_kernel::<bf16>, tile_kernel::<bf16>),
            }
        }
    };
}
pub(crate) use instantiate;
