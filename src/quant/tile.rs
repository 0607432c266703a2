//! Reading a sealed record: its checks, and the keys and values it stands for.
//!
//! The header, the last 16 bytes, little-endian:
//!
//! ```text
//! 0   f16 S, f16 Z    units of steps and of middles
//! 4   f16 S, f16 Z    those of the rotary channels of a latent, else 0
//! 8   u16 format id
//! 10  u8  log2 of the tokens
//! 11  u8  0
//! 12  u32 CRC-32C of the dimensions (k_dim, v_dim, v_in_k as u16, and 0) and of all bytes before
//! ```

use super::pack::unpack;
use super::seal::{Channel, value_point};
use super::{crc32c, read_f16, unrotate};
use crate::dtype::KvFormat;
use crate::error::{Error, Result};
use crate::layout::tile::TileLayout;

/// Offset of the units in the header.
pub(crate) const HEADER_UNITS: usize = 0;
/// Offset of the format id in the header.
pub(crate) const HEADER_FORMAT: usize = 8;
/// Offset of the checksum in the header.
pub(crate) const HEADER_CRC: usize = 12;

/// A record that has been checked.
#[derive(Debug, Clone, Copy)]
pub struct Tile<'a> {
    layout: &'a TileLayout,
    record: &'a [u8],
}

/// What the header says of a layout, its units and checksum apart.
pub(crate) fn header_identity(layout: &TileLayout) -> [u8; 4] {
    let id = (layout.format().id() as u16).to_le_bytes();
    [id[0], id[1], layout.shape().tokens.ilog2() as u8, 0]
}

/// What the checksum covers before the record itself.
pub(crate) fn header_dims(layout: &TileLayout) -> [u8; 8] {
    let shape = layout.shape();
    let mut dims = [0; 8];
    dims[0..2].copy_from_slice(&(shape.k_dim as u16).to_le_bytes());
    dims[2..4].copy_from_slice(&(shape.v_dim as u16).to_le_bytes());
    dims[4] = u8::from(shape.v_in_k);
    dims
}

fn checksum(layout: &TileLayout, record: &[u8]) -> u32 {
    let before = crc32c(0, &header_dims(layout));
    crc32c(before, &record[..layout.header.start + HEADER_CRC])
}

/// Completes the header of a record whose units and arrays are written.
pub(super) fn seal_header(layout: &TileLayout, record: &mut [u8]) {
    let header = layout.header.start;
    record[header + HEADER_FORMAT..header + HEADER_CRC].copy_from_slice(&header_identity(layout));
    let crc = checksum(layout, record).to_le_bytes();
    record[header + HEADER_CRC..layout.header.end].copy_from_slice(&crc);
}

impl<'a> Tile<'a> {
    /// Checks length, format, tile size and checksum.
    ///
    /// # Errors
    /// `InvalidArgument`, with what does not fit.
    pub fn open(layout: &'a TileLayout, record: &'a [u8]) -> Result<Self> {
        if record.len() != layout.bytes() {
            return Err(Error::invalid("record", "must have the bytes of the layout"));
        }
        let header = &record[layout.header.clone()];
        if header[HEADER_FORMAT..HEADER_CRC] != header_identity(layout) {
            return Err(Error::invalid("record", "is of another format or tile size, or damaged"));
        }
        let stored = header[HEADER_CRC..].iter().rev().fold(0, |crc, &b| crc << 8 | u32::from(b));
        if stored != checksum(layout, record) {
            return Err(Error::invalid("record", "is damaged: its checksum does not match"));
        }
        Ok(Self { layout, record })
    }

    fn format(&self) -> KvFormat {
        self.layout.format()
    }

    /// The affine code of key channel `at`.
    fn channel(&self, at: usize) -> Channel {
        let part = usize::from(!self.layout.k_parts()[0].contains(&at));
        let units = self.layout.header.start + HEADER_UNITS + 4 * part;
        Channel::new(
            self.format().k_bits(),
            self.record[self.layout.k_steps.start + at],
            self.record[self.layout.k_mids.start + at] as i8,
            read_f16(self.record, units),
            read_f16(self.record, units + 2),
        )
    }

    /// The code of a key element; both indices must be within the tile.
    pub fn key_code(&self, token: usize, channel: usize) -> u8 {
        let (main, plane) = self.layout.k_row(token);
        unpack(self.format().k_bits(), channel, &self.record[main], &self.record[plane])
    }

    /// The code of a value element, i8 in its bits at 8 bits; both indices must be within the tile.
    pub fn value_code(&self, token: usize, channel: usize) -> u8 {
        let (main, plane) = self.layout.v_channel(channel);
        unpack(self.format().v_bits(), token, &self.record[main], &self.record[plane])
    }

    /// The keys, `[tokens][k_dim]`: `base + code * step` of each channel.
    ///
    /// # Errors
    /// `InvalidArgument` for another length of `keys`.
    pub fn keys(&self, keys: &mut [f32]) -> Result<()> {
        let k_dim = self.layout.shape().k_dim as usize;
        if keys.len() != self.layout.shape().tokens as usize * k_dim {
            return Err(Error::invalid("keys", "must hold one row for each token of the tile"));
        }
        for at in 0..k_dim {
            let channel = self.channel(at);
            for (token, row) in keys.chunks_exact_mut(k_dim).enumerate() {
                row[at] = channel.base + f32::from(self.key_code(token, at)) * channel.step;
            }
        }
        Ok(())
    }

    /// The values, `[tokens][v_dim]`, the rotation undone; the first channels of the keys where
    /// values lie in keys.
    ///
    /// # Errors
    /// `InvalidArgument` for another length of `values`.
    pub fn values(&self, values: &mut [f32]) -> Result<()> {
        self.values_rotated(values)?;
        if self.is_rotated() {
            values.chunks_exact_mut(self.layout.shape().v_dim as usize).for_each(unrotate);
        }
        Ok(())
    }

    /// Whether stored values are rotated: those below 8 bits are.
    pub fn is_rotated(&self) -> bool {
        !self.layout.shape().v_in_k && self.format().v_bits() < 8
    }

    /// The values as kernels read them, [rotated](Self::is_rotated): an output is rotated back once.
    ///
    /// # Errors
    /// As for [`values`](Self::values).
    pub fn values_rotated(&self, values: &mut [f32]) -> Result<()> {
        let shape = self.layout.shape();
        let v_dim = shape.v_dim as usize;
        if values.len() != shape.tokens as usize * v_dim {
            return Err(Error::invalid("values", "must hold one row for each token of the tile"));
        }
        let bits = self.format().v_bits();
        for (token, row) in values.chunks_exact_mut(v_dim).enumerate() {
            for (at, value) in row.iter_mut().enumerate() {
                *value = if shape.v_in_k {
                    let channel = self.channel(at);
                    channel.base + f32::from(self.key_code(token, at)) * channel.step
                } else {
                    let scale = read_f16(self.record, self.layout.v_scales.start + 2 * token);
                    match (bits, self.value_code(token, at)) {
                        (8, code) => f32::from(code as i8) * scale,
                        (_, code) => value_point(bits, code) * scale,
                    }
                };
            }
        }
        Ok(())
    }
}
