//! Rows that are stored token by token: FP8, INT8_T, INT4_T and NVFP4.
//!
//! A row is its codes and, apart from them, its scales: in a block the codes of all tokens of a
//! head come first and the scales behind them, `KvFormat::row_bytes` and `row_scale_bytes` each.
//!
//! | format | codes | scales | element |
//! |---|---|---|---|
//! | `fp8_*` | a byte each | none; one f32 `s` a layer and head beside the pool | `fp8 * s` |
//! | `int8_t` | i8 | f16 `s` | `code * s`, symmetric |
//! | `int4_t` | u4, in the order of `pack.rs` | f16 `s`, f16 `m` | `m + code * s` |
//! | `nvfp4` | e2m1, the even element in the low nibble | e4m3 `b` for 16; one f32 `s` as above | `e2m1 * (b * s)` |
//!
//! `int4_t` rows and `int8_t` keys are rotated ([`rotate`]) before they are encoded. A latent has
//! two parts, latent and rotary channels, each rotated and scaled on its own.

use core::ops::Range;

use half::f16;

use super::{
    Refusal, Stored, abs_max, all_finite, code, e2m1_from_f32, e2m1_to_f32, e4m3_from_f32,
    e4m3_to_f32, e5m2_from_f32, e5m2_to_f32, f16_down, f16_up, min_max, pack, read_f16, rotate,
    unrotate, write_f16,
};
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::{MAX_HEAD_DIM, MAX_SPLIT_HEAD_DIM};

const MAX: usize = MAX_HEAD_DIM as usize;

/// Encodes and decodes the rows of one side (keys or values) of a layer and head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowCodec {
    format: KvFormat,
    dim: usize,
    /// Channels of the first part; the second has the rest.
    first: usize,
    rotated: bool,
    scale: f32,
}

impl RowCodec {
    /// The codec of keys of `dim` channels: a multiple of 16, to 256.
    ///
    /// # Errors
    /// `InvalidArgument` for a format that does not store token by token, or another `dim`.
    pub fn key(format: KvFormat, dim: u32) -> Result<Self> {
        Self::new(format, dim, dim, MAX_SPLIT_HEAD_DIM)
    }

    /// The codec of values of `dim` channels: a multiple of 16, to 256.
    ///
    /// # Errors
    /// As for [`key`](Self::key).
    pub fn value(format: KvFormat, dim: u32) -> Result<Self> {
        let codec = Self::key(format, dim)?;
        Ok(Self { rotated: format == KvFormat::Int4T, ..codec })
    }

    /// The codec of a latent row: `latent` channels, which are the values too, and `rope` more.
    ///
    /// # Errors
    /// As for [`key`](Self::key); both must be multiples of 16, 576 together at most.
    pub fn latent(format: KvFormat, latent: u32, rope: u32) -> Result<Self> {
        Self::new(format, latent.saturating_add(rope), latent, MAX_HEAD_DIM)
    }

    fn new(format: KvFormat, dim: u32, first: u32, max: u32) -> Result<Self> {
        if format.class() != FormatClass::Token {
            return Err(Error::invalid("format", "must be one that stores token by token"));
        }
        let group = KvFormat::CHANNEL_GROUP;
        let whole = dim.is_multiple_of(group) && first.is_multiple_of(group);
        if dim == 0 || first == 0 || !whole || dim > max {
            return Err(Error::invalid(
                "dim",
                "must be a multiple of 16 for quantised formats, to 256 (576 for latents)",
            ));
        }
        let rotated = matches!(format, KvFormat::Int8T | KvFormat::Int4T);
        Ok(Self { format, dim: dim as usize, first: first as usize, rotated, scale: 1.0 })
    }

    /// The same codec with the scale that FP8 and NVFP4 rows of a layer and head share; 1 without.
    ///
    /// # Errors
    /// `InvalidArgument` for a scale that is not positive and finite, or a format that has none.
    pub fn with_scale(self, scale: f32) -> Result<Self> {
        if !matches!(self.format, KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 | KvFormat::Nvfp4) {
            return Err(Error::invalid("scale", "only fp8 and nvfp4 share one"));
        }
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(Error::invalid("scale", "must be positive and finite"));
        }
        Ok(Self { scale, ..self })
    }

    /// The same codec with keys of `int8_t` rotated or not; the default is rotated.
    ///
    /// # Errors
    /// `InvalidArgument` for another format: their rows always are, or never.
    pub fn with_rotation(self, rotated: bool) -> Result<Self> {
        match self.format {
            KvFormat::Int8T => Ok(Self { rotated, ..self }),
            _ => Err(Error::invalid("rotation", "can be chosen for int8_t only")),
        }
    }

    /// Whether rows are rotated before they are encoded.
    pub fn is_rotated(&self) -> bool {
        self.rotated
    }

    /// The format.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Channels of a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Channels of a row's first part: all, but for latents.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// What all rows of the layer and head share; 1 without.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Bytes of a row's codes, padding included.
    pub fn code_bytes(&self) -> usize {
        self.format.row_bytes(self.dim as u32) as usize
    }

    /// Bytes of a row's scales.
    pub fn scale_bytes(&self) -> usize {
        let parts = if self.first < self.dim { 2 } else { 1 };
        self.format.row_scale_bytes(self.dim as u32, parts) as usize
    }

    fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        [0..self.first, self.first..self.dim].into_iter().filter(|part| !part.is_empty())
    }

    /// Encodes a row. FP8 and NVFP4 saturate at what their shared scale can hold.
    ///
    /// # Errors
    /// `InvalidArgument` for slices of other lengths than `dim`, [`code_bytes`](Self::code_bytes)
    /// and [`scale_bytes`](Self::scale_bytes).
    pub fn encode(&self, row: &[f32], codes: &mut [u8], scales: &mut [u8]) -> Result<Stored> {
        self.check(row.len(), codes.len(), scales.len())?;
        if !all_finite(row) {
            return Ok(Stored::Raw(Refusal::NonFinite));
        }
        let mut buffer = [0.0; MAX];
        let x = &mut buffer[..self.dim];
        x.copy_from_slice(row);
        if self.rotated {
            self.parts().for_each(|part| rotate(&mut x[part]));
            if !all_finite(x) {
                return Ok(Stored::Raw(Refusal::OutOfRange));
            }
        }
        // All scales before the first byte is written: a refused row changes nothing.
        let mut pairs = [(f16::ZERO, f16::ZERO); 2];
        for (pair, part) in pairs.iter_mut().zip(self.parts()) {
            let Some(scales) = self.part_scales(&x[part]) else {
                return Ok(Stored::Raw(Refusal::OutOfRange));
            };
            *pair = scales;
        }
        codes.fill(0);
        match self.format {
            KvFormat::Fp8E4m3 => self.bytes(x, codes, e4m3_from_f32),
            KvFormat::Fp8E5m2 => self.bytes(x, codes, e5m2_from_f32),
            KvFormat::Int8T => {
                for (n, (part, (s, _))) in self.parts().zip(pairs).enumerate() {
                    write_f16(scales, 2 * n, s);
                    for (slot, &x) in codes[part.clone()].iter_mut().zip(&x[part]) {
                        *slot = code(x, s.to_f32(), -127.0, 127.0) as i8 as u8;
                    }
                }
            }
            KvFormat::Int4T => {
                let mut elements = [0; MAX];
                for (n, (part, (s, m))) in self.parts().zip(pairs).enumerate() {
                    write_f16(scales, 4 * n, s);
                    write_f16(scales, 4 * n + 2, m);
                    for at in part {
                        elements[at] = code(x[at] - m.to_f32(), s.to_f32(), 0.0, 15.0) as u8;
                    }
                }
                pack::pack(4, &elements[..self.dim], codes, &mut []);
            }
            _ => self.encode_nvfp4(x, codes, scales),
        }
        Ok(Stored::Encoded)
    }

    /// Scale and minimum of one part; `None` where they leave the range of f16.
    fn part_scales(&self, x: &[f32]) -> Option<(f16, f16)> {
        match self.format {
            KvFormat::Int8T => Some((f16_up(abs_max(x) / 127.0)?, f16::ZERO)),
            KvFormat::Int4T => {
                let (low, high) = min_max(x.iter().copied());
                // Which zero a minimum of both is must not reach the bits.
                let m = f16_down(low + 0.0)?;
                // Nor which one a maximum is: less a minimum of 0 it may be -0.
                Some((f16_up((high - m.to_f32()) / 15.0 + 0.0)?, m))
            }
            _ => Some((f16::ZERO, f16::ZERO)),
        }
    }

    fn bytes(&self, x: &[f32], codes: &mut [u8], encode: fn(f32) -> u8) {
        codes.iter_mut().zip(x).for_each(|(slot, x)| *slot = encode(x / self.scale));
    }

    /// Of the scales that put the largest element of 16 at 6 and at 4, the one that loses less:
    /// e2m1 has no 5, so either may.
    fn encode_nvfp4(&self, x: &[f32], codes: &mut [u8], scales: &mut [u8]) {
        for ((x, codes), scale) in x.chunks_exact(16).zip(codes.chunks_exact_mut(8)).zip(scales) {
            let largest = abs_max(x);
            let attempt = |top: f32| {
                let block = e4m3_from_f32(largest / top / self.scale);
                let step = e4m3_to_f32(block) * self.scale;
                let mut elements = [0; 16];
                let mut loss = 0.0f32;
                for (slot, &x) in elements.iter_mut().zip(x) {
                    *slot = if step > 0.0 { e2m1_from_f32(x / step) } else { 0 };
                    let error = x - e2m1_to_f32(*slot) * step;
                    loss += error * error;
                }
                (loss, block, elements)
            };
            let (six, four) = (attempt(6.0), attempt(4.0));
            let (_, block, elements) = if four.0 < six.0 { four } else { six };
            *scale = block;
            for (slot, pair) in codes.iter_mut().zip(elements.chunks_exact(2)) {
                *slot = pair[0] | pair[1] << 4;
            }
        }
    }

    /// Decodes a row, the rotation undone.
    ///
    /// # Errors
    /// As for [`encode`](Self::encode).
    pub fn decode(&self, codes: &[u8], scales: &[u8], row: &mut [f32]) -> Result<()> {
        self.decode_rotated(codes, scales, row)?;
        if self.rotated {
            self.parts().for_each(|part| unrotate(&mut row[part]));
        }
        Ok(())
    }

    /// Decodes a row as it was encoded: still rotated, as kernels read it.
    ///
    /// # Errors
    /// As for [`encode`](Self::encode).
    pub fn decode_rotated(&self, codes: &[u8], scales: &[u8], row: &mut [f32]) -> Result<()> {
        self.check(row.len(), codes.len(), scales.len())?;
        match self.format {
            KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 => {
                let decode =
                    if self.format == KvFormat::Fp8E4m3 { e4m3_to_f32 } else { e5m2_to_f32 };
                row.iter_mut().zip(codes).for_each(|(x, &code)| *x = decode(code) * self.scale);
            }
            KvFormat::Int8T => {
                for (n, part) in self.parts().enumerate() {
                    let s = read_f16(scales, 2 * n);
                    for (x, &code) in row[part.clone()].iter_mut().zip(&codes[part]) {
                        *x = f32::from(code as i8) * s;
                    }
                }
            }
            KvFormat::Int4T => {
                for (n, part) in self.parts().enumerate() {
                    let (s, m) = (read_f16(scales, 4 * n), read_f16(scales, 4 * n + 2));
                    for at in part {
                        row[at] = m + f32::from(pack::unpack(4, at, codes, &[])) * s;
                    }
                }
            }
            _ => {
                for (at, x) in row.iter_mut().enumerate() {
                    let step = e4m3_to_f32(scales[at / 16]) * self.scale;
                    *x = e2m1_to_f32(codes[at / 2] >> (at % 2 * 4)) * step;
                }
            }
        }
        Ok(())
    }

    fn check(&self, row: usize, codes: usize, scales: usize) -> Result<()> {
        if row != self.dim {
            return Err(Error::invalid("row", "must have the codec's channels"));
        }
        if codes != self.code_bytes() || scales != self.scale_bytes() {
            return Err(Error::invalid("codes, scales", "must have the bytes of the format"));
        }
        Ok(())
    }
}
