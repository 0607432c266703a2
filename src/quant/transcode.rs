//! Rows in the layouts of other projects, to import their caches and to export ours.
//!
//! Each function pair goes through f32 rows: what is lost is what either side's rounding loses.
//! Writers round as the other project's reference encoder does in f32; vLLM's int8 to nearest.
//!
//! * ggml `Q8_0`: 32 elements, f16 scale and 32 i8. `Q4_0`: 32 elements, f16 scale and 16 bytes,
//!   elements 0 to 15 in the low nibbles, offset by 8.
//! * vLLM per token and head: codes and an f32 scale behind them. `int8`: i8 codes. `int4`: the
//!   even element in the low nibble, an integer zero point in the lowest four bits of the scale;
//!   the rotation that precedes it is the caller's.
//! * KIVI: groups of equal size along a row, 32-bit words of 2, 4 or 8-bit codes from the lowest
//!   bits up, f16 scale and f16 minimum a group. Keys lie transposed, a row for each channel.

use half::f16;

use super::{abs_max, all_finite, min_max, read_f16, write_f16};
use crate::error::{Error, Result};

/// Elements of a ggml block.
const GGML_BLOCK: usize = 32;
/// Bytes of a `Q8_0` block.
const Q8_0_BYTES: usize = 34;
/// Bytes of a `Q4_0` block.
const Q4_0_BYTES: usize = 18;

/// Lengths that must belong together, elements that must be finite.
fn check(fits: bool, row: &[f32]) -> Result<()> {
    if !fits {
        return Err(Error::invalid("row, bytes", "must have lengths that belong together"));
    }
    if !all_finite(row) {
        return Err(Error::invalid("row", "must be finite"));
    }
    Ok(())
}

/// Whether `bytes` is as many blocks of `block_bytes` as `row` has blocks of 32.
fn blocks_fit(row: usize, bytes: usize, block_bytes: usize) -> bool {
    row.is_multiple_of(GGML_BLOCK)
        && (row / GGML_BLOCK).checked_mul(block_bytes).is_some_and(|needed| needed == bytes)
}

/// An inverse that is 0 where there is nothing to divide.
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// Writes a row as ggml `Q8_0`: 34 bytes for 32 elements.
///
/// # Errors
/// `InvalidArgument` for lengths that do not belong together or elements that are not finite.
pub fn to_q8_0(row: &[f32], bytes: &mut [u8]) -> Result<()> {
    check(blocks_fit(row.len(), bytes.len(), Q8_0_BYTES), row)?;
    for (row, block) in row.chunks_exact(GGML_BLOCK).zip(bytes.chunks_exact_mut(Q8_0_BYTES)) {
        let scale = abs_max(row) / 127.0;
        let inverse = inverse(scale);
        write_f16(block, 0, f16::from_f32(scale));
        for (slot, x) in block[2..].iter_mut().zip(row) {
            *slot = libm::roundf(x * inverse) as i8 as u8;
        }
    }
    Ok(())
}

/// Reads a row of ggml `Q8_0`.
///
/// # Errors
/// `InvalidArgument` for lengths that do not belong together.
pub fn from_q8_0(bytes: &[u8], row: &mut [f32]) -> Result<()> {
    check(blocks_fit(row.len(), bytes.len(), Q8_0_BYTES), &[])?;
    for (row, block) in row.chunks_exact_mut(GGML_BLOCK).zip(bytes.chunks_exact(Q8_0_BYTES)) {
        let scale = read_f16(block, 0);
        row.iter_mut().zip(&block[2..]).for_each(|(x, &code)| *x = f32::from(code as i8) * scale);
    }
    Ok(())
}

/// Writes a row as ggml `Q4_0`: 18 bytes for 32 elements.
///
/// # Errors
/// `InvalidArgument` for lengths that do not belong together or elements that are not finite.
pub fn to_q4_0(row: &[f32], bytes: &mut [u8]) -> Result<()> {
    check(blocks_fit(row.len(), bytes.len(), Q4_0_BYTES), row)?;
    for (row, block) in row.chunks_exact(GGML_BLOCK).zip(bytes.chunks_exact_mut(Q4_0_BYTES)) {
        // The element of the largest magnitude, the first of equals, becomes code 0.
        let farthest = row.iter().fold(0.0f32, |far, &x| if x.abs() > far.abs() { x } else { far });
        let scale = farthest / -8.0;
        let inverse = inverse(scale);
        write_f16(block, 0, f16::from_f32(scale));
        let code = |x: f32| ((x * inverse + 8.5) as u8).min(15);
        for (n, slot) in block[2..].iter_mut().enumerate() {
            *slot = code(row[n]) | code(row[n + 16]) << 4;
        }
    }
    Ok(())
}

/// Reads a row of ggml `Q4_0`.
///
/// # Errors
/// `InvalidArgument` for lengths that do not belong together.
pub fn from_q4_0(bytes: &[u8], row: &mut [f32]) -> Result<()> {
    check(blocks_fit(row.len(), bytes.len(), Q4_0_BYTES), &[])?;
    for (row, block) in row.chunks_exact_mut(GGML_BLOCK).zip(bytes.chunks_exact(Q4_0_BYTES)) {
        let scale = read_f16(block, 0);
        for (n, &pair) in block[2..].iter().enumerate() {
            row[n] = (f32::from(pair & 15) - 8.0) * scale;
            row[n + 16] = (f32::from(pair >> 4) - 8.0) * scale;
        }
    }
    Ok(())
}

/// The least scale that vLLM stores.
const VLLM_LEAST_SCALE: f32 = 1e-6;

fn read_f32(bytes: &[u8]) -> f32 {
    f32::from_bits(bytes.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte)))
}

/// Writes a row as vLLM's int8 per token and head: a byte an element, then an f32 scale.
///
/// # Errors
/// `InvalidArgument` for lengths that do not belong together or elements that are not finite.
pub fn to_vllm_int8(row: &[f32], bytes: &mut [u8]) -> Result<()> {
    check(row.len().checked_add(4) == Some(bytes.len()), row)?;
    let scale = (abs_max(row) / 127.0).max(VLLM_LEAST_SCALE);
    let (codes, tail) = bytes.split_at_mut(row.len());
    for (slot, x) in codes.iter_mut().zip(row) {
        *slot = libm::roundf(x * (1.0 / scale)).clamp(-128.0, 127.0) as i8 as u8;
    }
    tail.copy_from_slice(&scale.to_le_bytes());
    Ok(())
}

/// Reads a row of vLLM's int8 per token and head.
///
/// # Errors
/// `InvalidArgument` for lengths that do not belong together.
pub fn from_vllm_int8(bytes: &[u8], row: &mut [f32]) -> Result<()> {
    check(row.len().checked_add(4) == Some(bytes.len()), &[])?;
    let (codes, tail) = bytes.split_at(row.len());
    let scale = read_f32(tail);
    row.iter_mut().zip(codes).for_each(|(x, &code)| *x = f32::from(code as i8) * scale);
    Ok(())
}

/// Writes a row, rotated by the caller, as vLLM's int4 per token and head: a byte for two
/// elements, then an f32 scale with the zero point in its lowest four bits.
///
/// # Errors
/// `InvalidArgument` for lengths that do not belong together or elements that are not finite.
pub fn to_vllm_int4(row: &[f32], bytes: &mut [u8]) -> Result<()> {
    let fits = row.len().is_multiple_of(2) && (row.len() / 2).checked_add(4) == Some(bytes.len());
    check(fits && !row.is_empty(), row)?;
    let (low, high) = min_max(row.iter().copied());
    let scale = ((high - low) / 15.0).max(VLLM_LEAST_SCALE);
    let zero = libm::roundf(-low / scale).clamp(0.0, 15.0);
    let code = |x: f32| libm::roundf(x * (1.0 / scale) + zero).clamp(0.0, 15.0) as u8;
    let (codes, tail) = bytes.split_at_mut(row.len() / 2);
    for (slot, pair) in codes.iter_mut().zip(row.chunks_exact(2)) {
        *slot = code(pair[0]) | code(pair[1]) << 4;
    }
    tail.copy_from_slice(&(scale.to_bits() & !15 | zero as u32).to_le_bytes());
    Ok(())
}

/// Reads a row of vLLM's int4 per token and head, still rotated.
///
/// # Errors
/// `InvalidArgument` for lengths that do not belong together.
pub fn from_vllm_int4(bytes: &[u8], row: &mut [f32]) -> Result<()> {
    let fits = row.len().is_multiple_of(2) && (row.len() / 2).checked_add(4) == Some(bytes.len());
    check(fits && !row.is_empty(), &[])?;
    let (codes, tail) = bytes.split_at(row.len() / 2);
    let bits = read_f32(tail).to_bits();
    let (scale, zero) = (f32::from_bits(bits & !15), (bits & 15) as f32);
    for (pair, &byte) in row.chunks_exact_mut(2).zip(codes) {
        pair[0] = (f32::from(byte & 15) - zero) * scale;
        pair[1] = (f32::from(byte >> 4) - zero) * scale;
    }
    Ok(())
}

/// Rows of KIVI: bits of a code and elements of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kivi {
    bits: u32,
    group: usize,
}

impl Kivi {
    /// Codes of 2, 4 or 8 bits in groups of a multiple of 16 elements.
    ///
    /// # Errors
    /// `InvalidArgument` for other numbers.
    pub fn new(bits: u32, group: usize) -> Result<Self> {
        if !matches!(bits, 2 | 4 | 8) || group == 0 || !group.is_multiple_of(16) {
            return Err(Error::invalid("bits, group", "must be 2, 4 or 8, and a multiple of 16"));
        }
        Ok(Self { bits, group })
    }

    fn fits(&self, row: usize, words: usize, scales: usize, mins: usize) -> bool {
        let groups = row / self.group;
        row.is_multiple_of(self.group)
            && row / (32 / self.bits as usize) == words
            && (scales, mins) == (groups, groups)
    }

    /// Writes a row: a word for 32 bits of codes, a scale and a minimum a group.
    ///
    /// # Errors
    /// `InvalidArgument` for lengths that do not belong together or elements that are not finite.
    pub fn encode(
        &self,
        row: &[f32],
        words: &mut [u32],
        scales: &mut [f16],
        mins: &mut [f16],
    ) -> Result<()> {
        check(self.fits(row.len(), words.len(), scales.len(), mins.len()), row)?;
        let n = ((1u32 << self.bits) - 1) as f32;
        let per_word = 32 / self.bits as usize;
        words.fill(0);
        for (at, group) in row.chunks_exact(self.group).enumerate() {
            let (low, high) = min_max(group.iter().copied());
            let scale = (high - low) / n;
            (scales[at], mins[at]) = (f16::from_f32(scale), f16::from_f32(low));
            for (i, x) in group.iter().enumerate() {
                // Of equal elements any code says the same.
                let unit = if scale == 0.0 { 0.0 } else { (x - low) / scale };
                let code = libm::rintf(unit.clamp(0.0, n)) as u32;
                let element = at * self.group + i;
                words[element / per_word] |= code << (element % per_word * self.bits as usize);
            }
        }
        Ok(())
    }

    /// Reads a row.
    ///
    /// # Errors
    /// `InvalidArgument` for lengths that do not belong together.
    pub fn decode(
        &self,
        words: &[u32],
        scales: &[f16],
        mins: &[f16],
        row: &mut [f32],
    ) -> Result<()> {
        check(self.fits(row.len(), words.len(), scales.len(), mins.len()), &[])?;
        let per_word = 32 / self.bits as usize;
        for (element, x) in row.iter_mut().enumerate() {
            let code = words[element / per_word] >> (element % per_word * self.bits as usize)
                & ((1 << self.bits) - 1);
            let group = element / self.group;
            *x = code as f32 * scales[group].to_f32() + mins[group].to_f32();
        }
        Ok(())
    }
}
