//! The record of one sealed tile: where codes, scales and header lie, checked once.
//!
//! One record holds the keys and values of `tokens` tokens of one layer and KV head. All numbers
//! are little-endian, every array starts on a multiple of 16 bytes, and so does the next record:
//!
//! ```text
//! k_codes   [token]  rows of 8, 4 or 2 bits, each padded to 16 bytes
//! k_plane   [token]  3-bit keys only: rows of third bits, each padded to 8 bytes
//! v_codes   [channel][token] 8, 4 or 2 bits
//! v_plane   [channel][token] 3-bit values only: third bits
//! k_steps   u8 [k_dim]
//! k_mids    i8 [k_dim]
//! v_scales  f16 [token]
//! header    16 bytes
//! ```
//!
//! Where values lie in keys (latents) there are no `v_` arrays, and the channels past `v_dim` are
//! a part of their own with its own pair of f16 units in the header. What the bits mean is
//! `quant`'s business.

use core::ops::Range;

use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};

use super::{MAX_HEAD_DIM, MAX_SPLIT_HEAD_DIM};

/// Tokens that a sealed tile may have.
pub const TILE_TOKENS: [u32; 3] = [32, 64, 128];
/// Bytes of a record's header, its last.
pub const TILE_HEADER_BYTES: usize = 16;

/// The dimensions of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileShape {
    /// Channels of a key: a multiple of 16, to 256 (576 where values lie in keys).
    pub k_dim: u32,
    /// Channels of a value: a multiple of 16.
    pub v_dim: u32,
    /// Values are the first `v_dim` channels of the keys and not stored.
    pub v_in_k: bool,
    /// 32, 64 or 128.
    pub tokens: u32,
}

/// Byte ranges within a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TileLayout {
    format: KvFormat,
    shape: TileShape,
    /// Codes of the keys: all bits but the third of 3-bit codes.
    pub k_codes: Range<usize>,
    /// Third bits of 3-bit keys, else empty.
    pub k_plane: Range<usize>,
    /// Codes of the values.
    pub v_codes: Range<usize>,
    /// Third bits of 3-bit values, else empty.
    pub v_plane: Range<usize>,
    /// The step of each key channel, in units.
    pub k_steps: Range<usize>,
    /// The middle of each key channel, in units.
    pub k_mids: Range<usize>,
    /// The scale of each value row.
    pub v_scales: Range<usize>,
    /// The header.
    pub header: Range<usize>,
}

/// Bits of a code that lie in the codes; the rest lies in the plane.
const fn main_bits(bits: u32) -> usize {
    if bits == 3 { 2 } else { bits as usize }
}

/// Bytes of a row of `count` codes outside its plane, not padded.
const fn main_bytes(bits: u32, count: usize) -> usize {
    count * main_bits(bits) / 8
}

/// Bytes of a row of `count` third bits in whole words, 0 where there are none.
const fn plane_bytes(bits: u32, count: usize) -> usize {
    if bits == 3 { count.div_ceil(32) * 4 } else { 0 }
}

impl TileLayout {
    /// Checks the shape and lays the record out.
    ///
    /// # Errors
    /// `InvalidArgument` where the format has no tiles, or a dimension is outside its range.
    pub fn new(format: KvFormat, shape: TileShape) -> Result<Self> {
        if format.class() != FormatClass::Tile {
            return Err(Error::invalid("format", "must be one of sealed tiles"));
        }
        if !TILE_TOKENS.contains(&shape.tokens) {
            return Err(Error::invalid("block_tokens", "must be 32, 64 or 128 for sealed tiles"));
        }
        check_quantized_dims(shape.k_dim, shape.v_dim, shape.v_in_k)?;
        let (k_dim, tokens) = (shape.k_dim as usize, shape.tokens as usize);
        let v_dim = if shape.v_in_k { 0 } else { shape.v_dim as usize };
        let mut end = 0;
        // At most 576 channels of 128 tokens: a few hundred kilobytes.
        let mut next = |bytes: usize| {
            let start = end;
            end += bytes;
            start..end
        };
        let layout = Self {
            format,
            shape,
            k_codes: next(tokens * main_bytes(format.k_bits(), k_dim).next_multiple_of(16)),
            k_plane: next(tokens * plane_bytes(format.k_bits(), k_dim).next_multiple_of(8)),
            v_codes: next(v_dim * main_bytes(format.v_bits(), tokens)),
            v_plane: next(v_dim * plane_bytes(format.v_bits(), tokens)),
            k_steps: next(k_dim),
            k_mids: next(k_dim),
            v_scales: next(if v_dim == 0 { 0 } else { 2 * tokens }),
            header: next(TILE_HEADER_BYTES),
        };
        debug_assert!(layout.bytes().is_multiple_of(KvFormat::ALIGN_BYTES as usize));
        Ok(layout)
    }

    /// The format.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// The shape.
    pub fn shape(&self) -> &TileShape {
        &self.shape
    }

    /// Bytes of a record.
    pub fn bytes(&self) -> usize {
        self.header.end
    }

    /// The channels of keys that share a pair of units: one part, or latent and rotary channels.
    pub fn k_parts(&self) -> [Range<usize>; 2] {
        let k_dim = self.shape.k_dim as usize;
        let first = if self.shape.v_in_k { self.shape.v_dim as usize } else { k_dim };
        [0..first, first..k_dim]
    }

    /// The bytes of key row `token`: its codes, and its third bits (empty but for 3-bit keys).
    /// `token` must be below the tile's tokens.
    pub fn k_row(&self, token: usize) -> (Range<usize>, Range<usize>) {
        let tokens = self.shape.tokens as usize;
        (nth(&self.k_codes, tokens, token), nth(&self.k_plane, tokens, token))
    }

    /// The bytes of value channel `channel`. `channel` must be below `v_dim`, and values stored.
    pub fn v_channel(&self, channel: usize) -> (Range<usize>, Range<usize>) {
        let channels = self.shape.v_dim as usize;
        (nth(&self.v_codes, channels, channel), nth(&self.v_plane, channels, channel))
    }
}

/// The `index`-th of `count` equal parts of `range`.
fn nth(range: &Range<usize>, count: usize, index: usize) -> Range<usize> {
    let bytes = range.len() / count;
    range.start + index * bytes..range.start + (index + 1) * bytes
}

/// What every quantised format asks of head dimensions.
pub(crate) fn check_quantized_dims(k_dim: u32, v_dim: u32, v_in_k: bool) -> Result<()> {
    let ok =
        |dim: u32, max: u32| dim != 0 && dim.is_multiple_of(KvFormat::CHANNEL_GROUP) && dim <= max;
    let max = if v_in_k { MAX_HEAD_DIM } else { MAX_SPLIT_HEAD_DIM };
    if !ok(k_dim, max) || !ok(v_dim, max) || (v_in_k && v_dim > k_dim) {
        return Err(Error::invalid(
            "k_dim, v_dim",
            "must be multiples of 16 for quantised formats, to 256 (576 for latents, v_dim <= k_dim)",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(format: KvFormat, k_dim: u32, v_dim: u32, tokens: u32) -> TileLayout {
        let shape = TileShape { k_dim, v_dim, v_in_k: false, tokens };
        TileLayout::new(format, shape).unwrap()
    }

    #[test]
    fn records_have_the_published_sizes() {
        for (format, dim, tokens, bytes) in [
            (KvFormat::Kt8v8, 128, 64, 16_784),
            (KvFormat::Kt4v4, 128, 64, 8_592),
            (KvFormat::Kt3v3, 128, 64, 6_544),
            (KvFormat::Kt4v2, 128, 64, 6_544),
            (KvFormat::Kt2v2, 128, 64, 4_496),
            (KvFormat::Kt4v4, 64, 64, 4_368),
            (KvFormat::Kt3v3, 64, 32, 1_744),
            (KvFormat::Kt4v4, 80, 64, 5_936),
        ] {
            assert_eq!(
                layout(format, dim, dim, tokens).bytes(),
                bytes,
                "{format:?} {dim} {tokens}"
            );
        }
    }

    #[test]
    fn arrays_are_aligned_and_cover_the_record() {
        for &format in KvFormat::ALL.iter().filter(|f| f.class() == FormatClass::Tile) {
            for (k_dim, v_dim) in [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
            {
                for tokens in TILE_TOKENS {
                    let l = layout(format, k_dim, v_dim, tokens);
                    let ranges = [
                        &l.k_codes,
                        &l.k_plane,
                        &l.v_codes,
                        &l.v_plane,
                        &l.k_steps,
                        &l.k_mids,
                        &l.v_scales,
                        &l.header,
                    ];
                    let mut at = 0;
                    for range in ranges {
                        assert_eq!(range.start, at);
                        assert!(at.is_multiple_of(16), "{format:?} {k_dim} {tokens}");
                        at = range.end;
                    }
                    assert_eq!(at, l.bytes());
                    assert!(at.is_multiple_of(16));
                    assert_eq!(l.k_row(tokens as usize - 1).0.end, l.k_codes.end);
                    assert_eq!(l.v_channel(v_dim as usize - 1).1.end, l.v_plane.end);
                }
            }
        }
    }

    #[test]
    fn latents_have_two_parts_and_no_values() {
        let shape = TileShape { k_dim: 576, v_dim: 512, v_in_k: true, tokens: 64 };
        let l = TileLayout::new(KvFormat::Kt4v2, shape).unwrap();
        assert_eq!(l.bytes(), 64 * 288 + 2 * 576 + 16);
        assert_eq!(l.k_parts(), [0..512, 512..576]);
        assert!(l.v_codes.is_empty() && l.v_scales.is_empty());
    }

    #[test]
    fn impossible_tiles_are_refused() {
        let good = TileShape { k_dim: 64, v_dim: 64, v_in_k: false, tokens: 64 };
        let bad = |format, shape| TileLayout::new(format, shape).unwrap_err();
        for format in [KvFormat::Bf16, KvFormat::Int8T] {
            bad(format, good);
        }
        for tokens in [0, 1, 16, 48, 256, u32::MAX] {
            bad(KvFormat::Kt4v4, TileShape { tokens, ..good });
        }
        for dim in [0, 8, 72, 100, 272, u32::MAX] {
            bad(KvFormat::Kt4v4, TileShape { k_dim: dim, ..good });
            bad(KvFormat::Kt4v4, TileShape { v_dim: dim, ..good });
        }
        bad(KvFormat::Kt4v4, TileShape { k_dim: 512, v_dim: 528, v_in_k: true, tokens: 64 });
        bad(KvFormat::Kt4v4, TileShape { k_dim: 592, v_dim: 512, v_in_k: true, tokens: 64 });
    }
}
