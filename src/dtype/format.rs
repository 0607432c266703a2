//! The formats in which K and V are stored: ids, sizes, names.
//!
//! Ids are pinned: they cross the C ABI and enter cache keys. Sizes are those of one row; what a
//! block or a tile takes is `layout`'s to say, what the bits mean is `quant`'s.

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
    /// 8-bit floats of 4 exponent and 3 mantissa bits, one f32 scale a layer and KV head.
    Fp8E4m3 = 4,
    /// 8-bit floats of 5 exponent and 2 mantissa bits, one f32 scale a layer and KV head.
    Fp8E5m2 = 5,
    /// Symmetric 8-bit integers, one f16 scale a token and head; keys rotated.
    Int8T = 6,
    /// 4-bit integers, f16 scale and minimum a token and head; keys and values rotated.
    Int4T = 7,
    /// 4-bit floats, one 8-bit float scale for 16 channels, one f32 scale a layer and KV head.
    Nvfp4 = 8,
    /// Sealed tiles: 8-bit keys per channel, 8-bit values per token.
    Kt8v8 = 16,
    /// Sealed tiles: 4-bit keys per channel, 4-bit rotated values per token.
    Kt4v4 = 17,
    /// Sealed tiles: 3-bit keys, 3-bit values.
    Kt3v3 = 18,
    /// Sealed tiles: 4-bit keys, 2-bit values.
    Kt4v2 = 19,
    /// Sealed tiles: 2-bit keys, 2-bit values.
    Kt2v2 = 20,
}

/// What a format needs to know of a token before it can store it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FormatClass {
    /// Floats: a row is its elements.
    Float,
    /// Codes with scales of their own: a token is stored alone, blocks have any size.
    Token,
    /// Tiles with statistics over all their tokens: raw until full, then sealed and immutable.
    Tile,
}

impl KvFormat {
    /// Every format of this build, in the order of their ids.
    pub const ALL: &'static [KvFormat] = &[
        KvFormat::F32,
        KvFormat::F16,
        KvFormat::Bf16,
        KvFormat::Fp8E4m3,
        KvFormat::Fp8E5m2,
        KvFormat::Int8T,
        KvFormat::Int4T,
        KvFormat::Nvfp4,
        KvFormat::Kt8v8,
        KvFormat::Kt4v4,
        KvFormat::Kt3v3,
        KvFormat::Kt4v2,
        KvFormat::Kt2v2,
    ];

    /// The formats of class [`Float`](FormatClass::Float), in the order of their ids.
    pub const FLOATS: &'static [KvFormat] = &[KvFormat::F32, KvFormat::F16, KvFormat::Bf16];

    /// The channels of a quantised row come in groups of this many.
    pub const CHANNEL_GROUP: u32 = 16;

    /// Rows of codes, runs and records are padded to this many bytes.
    pub const ALIGN_BYTES: u32 = 16;

    /// The format with this pinned id.
    pub const fn from_id(id: u32) -> Result<Self> {
        let mut at = 0;
        while at < Self::ALL.len() {
            if Self::ALL[at].id() == id {
                return Ok(Self::ALL[at]);
            }
            at += 1;
        }
        Err(Error::invalid(
            "format",
            "must be 1 (f32), 2 (f16), 3 (bf16), 4 or 5 (fp8), 6 (int8_t), 7 (int4_t), 8 (nvfp4) \
             or 16 to 20 (sealed tiles)",
        ))
    }

    /// The format that `name` spells, as [`name`](Self::name) does.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|format| format.name() == name).ok_or(Error::invalid(
            "format",
            "must be f32, f16, bf16, fp8_e4m3, fp8_e5m2, int8_t, int4_t, nvfp4, kt8v8, kt4v4, \
             kt3v3, kt4v2 or kt2v2",
        ))
    }

    /// The pinned id.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The name in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            KvFormat::F32 => "f32",
            KvFormat::F16 => "f16",
            KvFormat::Bf16 => "bf16",
            KvFormat::Fp8E4m3 => "fp8_e4m3",
            KvFormat::Fp8E5m2 => "fp8_e5m2",
            KvFormat::Int8T => "int8_t",
            KvFormat::Int4T => "int4_t",
            KvFormat::Nvfp4 => "nvfp4",
            KvFormat::Kt8v8 => "kt8v8",
            KvFormat::Kt4v4 => "kt4v4",
            KvFormat::Kt3v3 => "kt3v3",
            KvFormat::Kt4v2 => "kt4v2",
            KvFormat::Kt2v2 => "kt2v2",
        }
    }

    /// Its class.
    pub const fn class(self) -> FormatClass {
        match self {
            KvFormat::F32 | KvFormat::F16 | KvFormat::Bf16 => FormatClass::Float,
            KvFormat::Fp8E4m3
            | KvFormat::Fp8E5m2
            | KvFormat::Int8T
            | KvFormat::Int4T
            | KvFormat::Nvfp4 => FormatClass::Token,
            KvFormat::Kt8v8
            | KvFormat::Kt4v4
            | KvFormat::Kt3v3
            | KvFormat::Kt4v2
            | KvFormat::Kt2v2 => FormatClass::Tile,
        }
    }

    /// Whether a row is its elements as floats: what kernels without dequantisation read.
    pub const fn is_float(self) -> bool {
        matches!(self.class(), FormatClass::Float)
    }

    /// The type of raw rows: the stored element of a float format, the elements of staged rows of
    /// a quantised one, whose codes have no element type.
    pub const fn dtype(self) -> DType {
        match self {
            KvFormat::F32 => DType::F32,
            KvFormat::F16 => DType::F16,
            _ => DType::Bf16,
        }
    }

    /// Bits of one key element, scales not counted.
    pub const fn k_bits(self) -> u32 {
        match self {
            KvFormat::F32 => 32,
            KvFormat::F16 | KvFormat::Bf16 => 16,
            KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 | KvFormat::Int8T | KvFormat::Kt8v8 => 8,
            KvFormat::Int4T | KvFormat::Nvfp4 | KvFormat::Kt4v4 | KvFormat::Kt4v2 => 4,
            KvFormat::Kt3v3 => 3,
            KvFormat::Kt2v2 => 2,
        }
    }

    /// Bits of one value element, scales not counted.
    pub const fn v_bits(self) -> u32 {
        match self {
            KvFormat::Kt4v2 => 2,
            _ => self.k_bits(),
        }
    }

    /// Bytes of the elements or codes of one row (one token of one head) of `dim` channels: of a
    /// quantised row, padded to 16. Of a sealed-tile format this is the raw row that is staged.
    pub const fn row_bytes(self, dim: u32) -> u64 {
        match self.class() {
            FormatClass::Float | FormatClass::Tile => dim as u64 * self.dtype().bytes() as u64,
            FormatClass::Token => {
                let bytes = (dim as u64 * self.k_bits() as u64).div_ceil(8);
                bytes.next_multiple_of(Self::ALIGN_BYTES as u64)
            }
        }
    }

    /// Bytes of the scales that stand beside the codes of one row of `dim` channels in `parts`
    /// parts (2 for a latent with its rotary channels, else 1). The scale of a whole layer and head
    /// (FP8, NVFP4) lies beside the pool and does not count.
    pub const fn row_scale_bytes(self, dim: u32, parts: u32) -> u64 {
        match self {
            KvFormat::Int8T => 2 * parts as u64,
            KvFormat::Int4T => 4 * parts as u64,
            KvFormat::Nvfp4 => (dim / Self::CHANNEL_GROUP) as u64,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_are_pinned_and_come_back() {
        let ids: [u32; 13] = [1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 18, 19, 20];
        assert_eq!(KvFormat::ALL.len(), ids.len());
        for (&format, id) in KvFormat::ALL.iter().zip(ids) {
            assert_eq!(format.id(), id);
            assert_eq!(KvFormat::from_id(id), Ok(format));
            assert_eq!(KvFormat::from_name(format.name()), Ok(format));
            assert_eq!(KvFormat::FLOATS.contains(&format), format.is_float());
        }
        for id in [0, 9, 15, 21, u32::MAX] {
            assert!(KvFormat::from_id(id).is_err());
        }
        assert!(KvFormat::from_name("KT4V4").is_err());
    }

    #[test]
    fn rows_have_the_documented_bytes() {
        for (format, dim, codes, scales) in [
            (KvFormat::Bf16, 128, 256, 0),
            (KvFormat::Fp8E4m3, 80, 80, 0),
            (KvFormat::Int8T, 128, 128, 2),
            (KvFormat::Int4T, 128, 64, 4),
            (KvFormat::Int4T, 80, 48, 4),
            (KvFormat::Nvfp4, 128, 64, 8),
            (KvFormat::Kt4v4, 128, 256, 0),
        ] {
            assert_eq!(format.row_bytes(dim), codes, "{format:?} {dim}");
            assert_eq!(format.row_scale_bytes(dim, 1), scales, "{format:?} {dim}");
        }
        assert_eq!(KvFormat::Int8T.row_scale_bytes(576, 2), 4);
    }
}
