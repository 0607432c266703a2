//! Borrowed dense rows whose element type is known at run time.
//!
//! What safe callers pass as queries, new keys and values, and outputs. The rows are contiguous;
//! what they mean (tokens, heads, channels) is said by the function that takes them.

use super::{DType, Element, bf16, f16};

/// Rows to read.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Rows<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

/// Rows to write.
#[derive(Debug)]
#[non_exhaustive]
pub enum RowsMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// Half precision.
    F16(&'a mut [f16]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

impl<'a> Rows<'a> {
    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Rows::F32(_) => DType::F32,
            Rows::F16(_) => DType::F16,
            Rows::Bf16(_) => DType::Bf16,
        }
    }

    /// Elements in all rows together.
    pub fn elements(&self) -> usize {
        match self {
            Rows::F32(rows) => rows.len(),
            Rows::F16(rows) => rows.len(),
            Rows::Bf16(rows) => rows.len(),
        }
    }

    /// The first element's address.
    pub fn as_ptr(&self) -> *const u8 {
        match self {
            Rows::F32(rows) => rows.as_ptr().cast(),
            Rows::F16(rows) => rows.as_ptr().cast(),
            Rows::Bf16(rows) => rows.as_ptr().cast(),
        }
    }
}

impl RowsMut<'_> {
    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            RowsMut::F32(_) => DType::F32,
            RowsMut::F16(_) => DType::F16,
            RowsMut::Bf16(_) => DType::Bf16,
        }
    }

    /// Elements in all rows together.
    pub fn elements(&self) -> usize {
        match self {
            RowsMut::F32(rows) => rows.len(),
            RowsMut::F16(rows) => rows.len(),
            RowsMut::Bf16(rows) => rows.len(),
        }
    }

    /// The first element's address.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        match self {
            RowsMut::F32(rows) => rows.as_mut_ptr().cast(),
            RowsMut::F16(rows) => rows.as_mut_ptr().cast(),
            RowsMut::Bf16(rows) => rows.as_mut_ptr().cast(),
        }
    }
}

macro_rules! rows_from {
    ($element:ty, $variant:ident) => {
        impl<'a> From<&'a [$element]> for Rows<'a> {
            fn from(rows: &'a [$element]) -> Self {
                debug_assert_eq!(<$element>::DTYPE, Rows::$variant(rows).dtype());
                Rows::$variant(rows)
            }
        }
        impl<'a> From<&'a mut [$element]> for RowsMut<'a> {
            fn from(rows: &'a mut [$element]) -> Self {
                RowsMut::$variant(rows)
            }
        }
    };
}
rows_from!(f32, F32);
rows_from!(f16, F16);
rows_from!(bf16, Bf16);
