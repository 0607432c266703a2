//! What quantised K and V mean, bit for bit: encode and decode of rows and of tiles, scalar and
//! exact. The reference that every kernel is held against.
//!
//! Encoding is a pure function of the raw rows: f32, round to nearest even, no contraction of a
//! product with a sum, sums in the order of [`tree_sum`], no result that depends on the order of a
//! minimum or maximum. So CPU levels, thread counts, an emulator and a GPU can agree on every bit.
//! Decoding here is exact in the same sense; fused kernels fold scales into queries and weights,
//! and are held to a tolerance.
//!
//! | file | job |
//! |---|---|
//! | `row.rs` | token-self-contained rows: FP8, INT8_T, INT4_T, NVFP4 |
//! | `seal.rs`, `tile.rs` | sealed tiles: from raw rows to a record, and back |
//! | `hadamard.rs`, `minifloat.rs`, `pack.rs`, `crc.rs` | what both are made of |
//! | `transcode.rs` | ggml, vLLM and KIVI layouts |
//!
//! No pointers, no threads, no knowledge of blocks or caches.

mod crc;
mod hadamard;
mod minifloat;
mod pack;
mod row;
mod seal;
mod tile;
pub mod transcode;

pub use crc::crc32c;
pub(crate) use hadamard::hadamard_scale;
pub use hadamard::{SIGNS, hadamard_block, rotate, tree_sum, unrotate};
pub use minifloat::{
    e2m1_from_f32, e2m1_to_f32, e4m3_from_f32, e4m3_to_f32, e5m2_from_f32, e5m2_to_f32,
};
pub(crate) use pack::{key_clip, value_step};
pub use row::RowCodec;
pub(crate) use seal::Keys;
pub use seal::seal;
pub use tile::Tile;
pub(crate) use tile::{HEADER_CRC, HEADER_FORMAT, HEADER_UNITS, header_dims, header_identity};

use half::f16;

/// What became of rows that were to be encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Stored {
    /// They were, and the output holds them.
    Encoded,
    /// They cannot be and stay raw; the output is unchanged. An ordinary answer, not an error.
    Raw(Refusal),
}

/// Why rows stay raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// An element is NaN or infinite.
    NonFinite,
    /// A scale would leave the range of f16, or a sum of squares that of f32.
    OutOfRange,
}

/// The smallest f16 that is not below `x`: at least 0 and finite, or `None`.
pub(crate) fn f16_up(x: f32) -> Option<f16> {
    let near = f16::from_f32(x);
    // Not negative, so the next value up has the next bits.
    let up = if near.to_f32() < x { f16::from_bits(near.to_bits() + 1) } else { near };
    (up.is_finite() && x >= 0.0).then_some(up)
}

/// The largest f16 that is not above `x`, finite, or `None`.
pub(crate) fn f16_down(x: f32) -> Option<f16> {
    if x < 0.0 {
        return f16_up(-x).map(|up| -up);
    }
    let near = f16::from_f32(x);
    let down = if near.to_f32() > x { f16::from_bits(near.to_bits() - 1) } else { near };
    down.is_finite().then_some(down)
}

/// Little-endian f16 at `at`.
fn read_f16(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn write_f16(bytes: &mut [u8], at: usize, value: f16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn all_finite(rows: &[f32]) -> bool {
    rows.iter().all(|x| x.is_finite())
}

/// The smallest and the largest of finite elements.
fn min_max(elements: impl Iterator<Item = f32>) -> (f32, f32) {
    elements.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
}

/// The largest magnitude; 0 for no elements.
fn abs_max(elements: &[f32]) -> f32 {
    elements.iter().fold(0.0, |max, x| max.max(x.abs()))
}

/// `x / step` rounded to nearest even and clamped to `low..=high`; 0 where the step is 0.
fn code(x: f32, step: f32, low: f32, high: f32) -> f32 {
    if step == 0.0 { 0.0 } else { libm::rintf(x / step).clamp(low, high) }
}
