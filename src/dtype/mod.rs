//! Number formats: the element types of rows that callers hold, and the formats of stored KV.
//!
//! Conversions are those of the `half` crate (round to nearest even); this module gives them one
//! name each and pins the ids that cross the C ABI. It knows nothing of shapes.

mod format;
mod rows;

pub use format::{FormatClass, KvFormat};
pub use half::{bf16, f16};
pub use rows::{Rows, RowsMut};

use crate::error::{Error, Result};

/// The element type of dense rows: queries, new keys and values, outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum DType {
    /// IEEE binary32.
    F32 = 1,
    /// IEEE binary16.
    F16 = 2,
    /// bfloat16: the upper half of a binary32.
    Bf16 = 3,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> u32 {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// The type with this pinned id.
    pub const fn from_id(id: u32) -> Result<Self> {
        match id {
            1 => Ok(DType::F32),
            2 => Ok(DType::F16),
            3 => Ok(DType::Bf16),
            _ => Err(Error::invalid("dtype", "must be 1 (f32), 2 (f16) or 3 (bf16)")),
        }
    }

    /// The pinned id.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The name in lower case, as command lines spell it.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        }
    }
}

/// An element that dense rows can hold; the conversions round to nearest even.
pub trait Element: Copy + Send + Sync + 'static {
    /// Its type id.
    const DTYPE: DType;
    /// Widens exactly.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}
