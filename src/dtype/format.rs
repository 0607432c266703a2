//! The formats in which K and V are stored: ids, sizes, names.
//!
//! Ids are pinned: they cross the C ABI and enter cache keys.

use super::DType;
use crate::error::{Error, Result};

/// How one layer group stores K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum KvFormat {
    /// 32-bit floats: exact, for reference and small models.
    F32 = 1,
    /// IEEE half precision.
    F16 = 2,
    /// bfloat16.
    Bf16 = 3,
}

impl KvFormat {
    /// Every format of this build, in the order of their ids.
    pub const ALL: &'static [KvFormat] = &[KvFormat::F32, KvFormat::F16, KvFormat::Bf16];

    /// The format with this pinned id.
    pub const fn from_id(id: u32) -> Result<Self> {
        match id {
            1 => Ok(KvFormat::F32),
            2 => Ok(KvFormat::F16),
            3 => Ok(KvFormat::Bf16),
            _ => Err(Error::invalid("format", "must be 1 (f32), 2 (f16) or 3 (bf16)")),
        }
    }

    /// The format that `name` spells (`f32`, `f16`, `bf16`).
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|format| format.name() == name)
            .ok_or(Error::invalid("format", "must be f32, f16 or bf16"))
    }

    /// The pinned id.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The name in lower case.
    pub const fn name(self) -> &'static str {
        self.dtype().name()
    }

    /// The type of one stored element.
    pub const fn dtype(self) -> DType {
        match self {
            KvFormat::F32 => DType::F32,
            KvFormat::F16 => DType::F16,
            KvFormat::Bf16 => DType::Bf16,
        }
    }

    /// Bytes of one stored row (one token of one head) of `dim` channels, or `None` past 64 bits.
    pub const fn row_bytes(self, dim: u32) -> u64 {
        dim as u64 * self.dtype().bytes() as u64
    }
}
