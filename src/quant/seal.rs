//! Sealing: the raw rows of a full tile become a record.
//!
//! Keys, for each channel over the tile's tokens (`n = 2^bits - 1`, all in f32):
//!
//! ```text
//! mid  = (min + max) / 2          Z = f16 up(largest |mid| / 127)
//! zi   = rne(mid / Z)             the middle, i8
//! half = max(max - zi * Z, zi * Z - min)                       at 8 bits
//!        max(clip * (max - min) / 2, |mid - zi * Z|)           below
//! step = 2 * half / n             S = f16 up(largest step / 255)
//! us   = clamp(ceil(step / S), 1, 255)    the step, u8
//! code = clamp(rne((x - base) / (us * S)), 0, n)    base = zi * Z - us * S * (n / 2)
//! ```
//!
//! The middle is stored to half of Z. 8-bit codes cover the range as seen from there: beside a
//! channel far from 0 the ends of all others would be cut off by many steps. Coarser codes lose
//! less by cutting them off than by a wider step, unless the channel is narrower than the shift.
//!
//! S and Z are those of all channels (of a latent: of each of its two parts). Values, for each
//! token over the channels: at 8 bits symmetric i8 with `r = f16 up(largest |v| / 127)`; below that
//!
//! ```text
//! y    = rotate(v)                       w = sqrt(sum y^2 / dim) * value_step
//! code = clamp(floor(y / w) + 2^(bits-1), 0, n)     q = (code + 1/2 - 2^(bits-1)) * value_step
//! r    = f16(sum y^2 / sum y * q)        so that <v, r q> = <v, v>: unbiased
//! ```
//!
//! Softmax averages the noise of values out, but not a shrinkage, hence the unbiased scale.

use alloc::vec;

use half::f16;

use super::pack::{key_clip, pack, value_step};
use super::tile::{HEADER_FORMAT, HEADER_UNITS, seal_header};
use super::{
    Refusal, Stored, abs_max, all_finite, code, f16_up, min_max, rotate, tree_sum, write_f16,
};
use crate::error::{Error, Result};
use crate::layout::MAX_HEAD_DIM;
use crate::layout::tile::TileLayout;

/// The affine code of one key channel.
#[derive(Clone, Copy, Default)]
pub(crate) struct Channel {
    /// The element of code 0.
    pub base: f32,
    /// From a code's element to the next.
    pub step: f32,
}

impl Channel {
    /// From what the record stores: step and middle in units.
    pub(super) fn new(bits: u32, us: u8, zi: i8, unit: f32, mid_unit: f32) -> Self {
        let half = ((1u32 << bits) - 1) as f32 * 0.5;
        let step = f32::from(us) * unit;
        Self { base: f32::from(zi) * mid_unit - step * half, step }
    }
}

/// Seals a tile: `k` is `[tokens][k_dim]`, `v` `[tokens][v_dim]` (empty where values lie in keys),
/// `record` has the layout's bytes. Non-finite rows, and rows past the range of f16 scales (a key
/// channel around 8 million, a value row with a root mean square above 65 thousand, or at 8 bits
/// a largest element above 8 million), stay raw: the record is unchanged then.
///
/// # Errors
/// `InvalidArgument` for slices of other lengths.
pub fn seal(layout: &TileLayout, k: &[f32], v: &[f32], record: &mut [u8]) -> Result<Stored> {
    let shape = layout.shape();
    let (tokens, k_dim) = (shape.tokens as usize, shape.k_dim as usize);
    let v_dim = if shape.v_in_k { 0 } else { shape.v_dim as usize };
    if k.len() != tokens * k_dim || v.len() != tokens * v_dim {
        return Err(Error::invalid("k, v", "must hold one row for each token of the tile"));
    }
    if record.len() != layout.bytes() {
        return Err(Error::invalid("record", "must have the bytes of the layout"));
    }
    if !all_finite(k) || !all_finite(v) {
        return Ok(Stored::Raw(Refusal::NonFinite));
    }

    // Everything that can refuse comes before the first byte is written.
    let mut keys = Keys::new(layout);
    let mut ranges = [(0.0, 0.0); MAX_HEAD_DIM as usize];
    for (at, range) in ranges.iter_mut().enumerate().take(k_dim) {
        *range = min_max(k.chunks_exact(k_dim).map(|row| row[at]));
    }
    let mut v_codes = vec![0; v.len()];
    let mut v_scales = [f16::ZERO; 128];
    let fits = layout.k_parts().into_iter().enumerate().all(|(part, channels)| {
        channels.is_empty() || keys.measure(part, channels, &ranges).is_some()
    }) && (0..v.len().checked_div(v_dim).unwrap_or(0)).all(|token| {
        let row = token * v_dim..(token + 1) * v_dim;
        let scale = value_row(layout.format().v_bits(), &v[row.clone()], &mut v_codes[row]);
        v_scales[token] = scale.unwrap_or_default();
        scale.is_some()
    });
    if !fits {
        return Ok(Stored::Raw(Refusal::OutOfRange));
    }

    keys.write(layout, k, record);
    let mut column = [0; 128];
    for channel in 0..v_dim {
        for (slot, row) in column.iter_mut().zip(v_codes.chunks_exact(v_dim)) {
            *slot = row[channel];
        }
        let (codes, plane) = layout.v_channel(channel);
        pack_at(layout.format().v_bits(), &column[..tokens], record, codes, plane);
    }
    for (token, scale) in v_scales.iter().enumerate().take(layout.v_scales.len() / 2) {
        write_f16(record, layout.v_scales.start + 2 * token, *scale);
    }
    seal_header(layout, record);
    Ok(Stored::Encoded)
}

/// [`pack`] into two ranges of a record, the first before the second.
fn pack_at(
    bits: u32,
    codes: &[u8],
    record: &mut [u8],
    main: core::ops::Range<usize>,
    plane: core::ops::Range<usize>,
) {
    let (before, after) = record.split_at_mut(main.end);
    let plane = plane.start.max(main.end) - main.end..plane.end.max(main.end) - main.end;
    pack(bits, codes, &mut before[main], &mut after[plane]);
}

/// What is stored of the key channels.
pub(crate) struct Keys {
    bits: u32,
    /// S and Z of each part.
    pub units: [(f16, f16); 2],
    /// The step of each channel, in units.
    pub steps: [u8; MAX_HEAD_DIM as usize],
    /// The middle of each channel, in units.
    pub mids: [i8; MAX_HEAD_DIM as usize],
    /// The codes of each channel.
    pub channels: [Channel; MAX_HEAD_DIM as usize],
}

/// The least and the largest element of each key channel.
pub(crate) type Ranges = [(f32, f32); MAX_HEAD_DIM as usize];

impl Keys {
    pub fn new(layout: &TileLayout) -> Self {
        Self {
            bits: layout.format().k_bits(),
            units: [(f16::ZERO, f16::ZERO); 2],
            steps: [0; MAX_HEAD_DIM as usize],
            mids: [0; MAX_HEAD_DIM as usize],
            channels: [Channel::default(); MAX_HEAD_DIM as usize],
        }
    }

    /// Finds units, steps and middles of the channels of one part; `None` where a unit is past f16.
    pub fn measure(
        &mut self,
        part: usize,
        channels: core::ops::Range<usize>,
        ranges: &Ranges,
    ) -> Option<()> {
        let n = ((1u32 << self.bits) - 1) as f32;
        let mut farthest = 0.0f32;
        for at in channels.clone() {
            farthest = farthest.max(middle(ranges[at]).abs());
        }
        let mid_unit = f16_up(farthest / 127.0)?;
        // Widened once: it asks what the CPU has each time.
        let mids_unit = mid_unit.to_f32();
        let mut steps = [0.0f32; MAX_HEAD_DIM as usize];
        let mut widest = 0.0f32;
        for at in channels.clone() {
            let (low, high) = ranges[at];
            self.mids[at] = code(middle(ranges[at]), mids_unit, -127.0, 127.0) as i8;
            let stored = f32::from(self.mids[at]) * mids_unit;
            let half = if self.bits == 8 {
                (high - stored).max(stored - low)
            } else {
                let shift = (middle(ranges[at]) - stored).abs();
                ((high - low) * 0.5 * key_clip(self.bits)).max(shift)
            };
            steps[at] = 2.0 * half / n;
            widest = widest.max(steps[at]);
        }
        // Which zero the largest of zeros is must not reach the bits.
        let unit = f16_up(widest / 255.0 + 0.0)?;
        self.units[part] = (unit, mid_unit);
        let (unit, mid_unit) = (unit.to_f32(), mids_unit);
        for at in channels {
            // Every channel is constant and at its middle: no unit, and any step says the same.
            let units = if unit == 0.0 { 1.0 } else { libm::ceilf(steps[at] / unit) };
            self.steps[at] = units.clamp(1.0, 255.0) as u8;
            self.channels[at] =
                Channel::new(self.bits, self.steps[at], self.mids[at], unit, mid_unit);
        }
        Some(())
    }

    fn write(&self, layout: &TileLayout, k: &[f32], record: &mut [u8]) {
        let k_dim = layout.shape().k_dim as usize;
        let n = ((1u32 << self.bits) - 1) as f32;
        let mut codes = [0; MAX_HEAD_DIM as usize];
        for (token, row) in k.chunks_exact(k_dim).enumerate() {
            for ((slot, &x), channel) in codes.iter_mut().zip(row).zip(&self.channels) {
                *slot = code(x - channel.base, channel.step, 0.0, n) as u8;
            }
            let (main, plane) = layout.k_row(token);
            pack_at(self.bits, &codes[..k_dim], record, main, plane);
        }
        record[layout.k_steps.clone()].copy_from_slice(&self.steps[..k_dim]);
        for (slot, mid) in record[layout.k_mids.clone()].iter_mut().zip(self.mids) {
            *slot = mid as u8;
        }
        for (part, (unit, mid_unit)) in self.units.into_iter().enumerate() {
            write_f16(record, layout.header.start + HEADER_UNITS + 4 * part, unit);
            write_f16(record, layout.header.start + HEADER_UNITS + 4 * part + 2, mid_unit);
        }
        const { assert!(HEADER_UNITS + 8 <= HEADER_FORMAT) };
    }
}

fn middle((low, high): (f32, f32)) -> f32 {
    (low + high) * 0.5
}

/// Codes and scale of one value row; `None` where the scale is past f16.
fn value_row(bits: u32, v: &[f32], codes: &mut [u8]) -> Option<f16> {
    if bits == 8 {
        let scale = f16_up(abs_max(v) / 127.0)?;
        for (slot, &x) in codes.iter_mut().zip(v) {
            *slot = code(x, scale.to_f32(), -127.0, 127.0) as i8 as u8;
        }
        return Some(scale);
    }
    let mut buffer = [0.0; MAX_HEAD_DIM as usize];
    let y = &mut buffer[..v.len()];
    y.copy_from_slice(v);
    rotate(y);
    let squares = tree_sum(y.iter().map(|y| y * y));
    if !squares.is_finite() {
        return None;
    }
    let width = libm::sqrtf(squares / v.len() as f32) * value_step(bits);
    if width == 0.0 {
        codes.fill(0);
        return Some(f16::ZERO);
    }
    let (middle, n) = ((1u32 << (bits - 1)) as f32, ((1u32 << bits) - 1) as f32);
    for (slot, &y) in codes.iter_mut().zip(y.iter()) {
        *slot = (libm::floorf(y / width) + middle).clamp(0.0, n) as u8;
    }
    let aligned =
        tree_sum(y.iter().zip(codes.iter()).map(|(y, &code)| y * value_point(bits, code)));
    let scale = f16::from_f32(squares / aligned);
    scale.is_finite().then_some(scale)
}

/// The element that a value code below 8 bits stands for, for a scale of 1.
pub(super) fn value_point(bits: u32, code: u8) -> f32 {
    (f32::from(code) + 0.5 - (1u32 << (bits - 1)) as f32) * value_step(bits)
}
