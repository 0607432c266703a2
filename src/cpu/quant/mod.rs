//! Rows of codes on the CPU: FP8, INT8_T, INT4_T and NVFP4, stored token by token.
//!
//! What codes mean is `crate::quant`'s to say; encoding here gives its bits, at every level. Kernels
//! read codes as they are stored: keys and values stay rotated, queries are rotated once a job and
//! outputs turned back once a row.
//!
//! | file | job |
//! |---|---|
//! | `vector.rs` | what codes ask of a vector beyond `cpu::vector` |
//! | `turn.rs` | the Hadamard rotation |
//! | `encode.rs` | rows to codes |
//! | `expand.rs` | codes to rows of f32 |
//! | `decode.rs` | attention of few query rows: keys and values expanded as they are read |
//! | `pairs.rs` | FP8 as pairs of bf16, where the machine multiplies those |
//! | `operand.rs` | what the tile kernel reads instead of floats |
//!
//! Products of integers, where the machine has them, are in the leaf files.

mod decode;
mod encode;
mod expand;
mod operand;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod turn;
mod vector;

pub(super) use decode::decode;
#[cfg(target_arch = "x86_64")]
pub(super) use decode::{expect_scales, query};
pub(super) use encode::encode;
pub(super) use operand::Coded;
#[cfg(target_arch = "x86_64")]
pub(super) use pairs::{CodePairs, E4m3, E5m2, Halves, LookUp};
pub(super) use turn::unrotate;
pub(super) use vector::CodeVector;
#[cfg(target_arch = "x86_64")]
pub(super) use vector::Nibbles;

use crate::dtype::KvFormat;

/// How the codes of one job's rows become rows; the two parts of a latent key have scales of their
/// own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Coding {
    /// The format.
    pub format: KvFormat,
    /// Channels of a key's first part: those of a latent, or all.
    pub k_first: usize,
    /// Keys were rotated before they were encoded, so queries must be.
    pub k_rotated: bool,
    /// The same of values, so outputs must be turned back.
    pub v_rotated: bool,
    /// `[kv_heads]` scales of the job's heads; NULL for 1.
    pub k_heads: *const f32,
    /// The same of values.
    pub v_heads: *const f32,
}

impl Coding {
    /// The codes of keys of the job's head `head`.
    ///
    /// # Safety
    /// Head scales must be readable.
    #[inline(always)]
    pub unsafe fn keys(&self, head: usize) -> RowCode {
        // SAFETY: the caller's promise.
        let scale = unsafe { head_scale(self.k_heads, head) };
        RowCode { format: self.format, first: self.k_first, scale }
    }

    /// The same of values that are rows of their own.
    ///
    /// # Safety
    /// Head scales must be readable.
    #[inline(always)]
    pub unsafe fn values(&self, head: usize) -> RowCode {
        // SAFETY: the caller's promise.
        let scale = unsafe { head_scale(self.v_heads, head) };
        RowCode { format: self.format, first: usize::MAX, scale }
    }
}

#[inline(always)]
unsafe fn head_scale(heads: *const f32, head: usize) -> f32 {
    // SAFETY: the caller's promise.
    if heads.is_null() { 1.0 } else { unsafe { heads.add(head).read() } }
}

/// The codes of one side of a head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowCode {
    pub format: KvFormat,
    /// Channels of the first part; past the row's end for one part.
    pub first: usize,
    /// What all its rows are multiplied with.
    pub scale: f32,
}
