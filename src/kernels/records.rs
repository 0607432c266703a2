//! What every call over sealed tiles says of records and raw slots: checked once, and filled from the
//! layout of the record, for any struct of parameters that has it.

use super::decode::CHUNK_ELEMENTS;
use crate::dtype::KvFormat;
use crate::error::{Error, Result};
use crate::layout::tile::{TileLayout, TileShape};

/// The layout of a record of the shape that kernels have.
///
/// # Errors
/// `InvalidArgument` where the format has no such tiles.
pub(super) fn record(format: KvFormat, head_dim: u32, tile_tokens: u32) -> Result<TileLayout> {
    let (k_dim, v_dim) = (head_dim, head_dim);
    TileLayout::new(format, TileShape { k_dim, v_dim, v_in_k: false, tokens: tile_tokens })
}

/// The part of a call that is checked alike for all kernels.
pub(super) struct RecordArgs {
    /// Addresses that must be there.
    pub needed: [u64; 3],
    /// From a block and from a head to the next, in bytes.
    pub strides: [i64; 2],
    /// Keys and values of scratch.
    pub scratch: [u64; 2],
    /// Strides of both, in elements.
    pub scratch_strides: [i64; 6],
    pub staging_blocks: u32,
    pub scratch_blocks: u32,
}

/// What a struct of parameters has of [`RecordArgs`].
macro_rules! record_args {
    ($p:expr) => {
        $crate::kernels::records::RecordArgs {
            needed: [$p.records.0, $p.raw_indptr.0, $p.raw_blocks.0],
            strides: [$p.record_block, $p.record_head],
            scratch: [$p.scratch_k.0, $p.scratch_v.0],
            scratch_strides: [
                $p.scratch_k_block,
                $p.scratch_k_head,
                $p.scratch_k_token,
                $p.scratch_v_block,
                $p.scratch_v_head,
                $p.scratch_v_token,
            ],
            staging_blocks: $p.staging_blocks,
            scratch_blocks: $p.scratch_blocks,
        }
    };
}
pub(super) use record_args;

/// Fills what the layout of a record determines.
macro_rules! place_record {
    ($p:expr, $format:expr, $layout:expr) => {
        let (format, layout): (KvFormat, &TileLayout) = ($format, $layout);
        $p.tile_tokens = layout.shape().tokens;
        $p.identity = format.id() | layout.shape().tokens.ilog2() << 16;
        $p.k_plane_at = layout.k_plane.start as u32;
        $p.v_codes_at = layout.v_codes.start as u32;
        $p.v_plane_at = layout.v_plane.start as u32;
        $p.k_steps_at = layout.k_steps.start as u32;
        $p.k_mids_at = layout.k_mids.start as u32;
        $p.v_scales_at = layout.v_scales.start as u32;
        $p.header_at = layout.header.start as u32;
        $p.v_rotated = u32::from(format.v_bits() < 8);
    };
}
pub(super) use place_record;

impl RecordArgs {
    /// # Errors
    /// `NullPointer`; `InvalidArgument` for what does not begin at multiples of 16 bytes, or more raw
    /// slots than can be counted.
    pub fn check(&self) -> Result<()> {
        if self.needed.contains(&0) {
            return Err(Error::NullPointer { what: "records, raw tables" });
        }
        if !self.needed[0].is_multiple_of(16) || self.strides.iter().any(|s| s % 16 != 0) {
            return Err(Error::invalid("records", "must begin at multiples of 16 bytes"));
        }
        let aligned = (self.scratch[0] | self.scratch[1]).is_multiple_of(16);
        if !aligned || self.scratch_strides.iter().any(|s| s % CHUNK_ELEMENTS != 0) {
            return Err(Error::invalid("scratch", "rows must begin at multiples of 16 bytes"));
        }
        if self.scratch_blocks != 0 && self.scratch.contains(&0) {
            return Err(Error::NullPointer { what: "scratch" });
        }
        if self.staging_blocks.checked_add(self.scratch_blocks).is_none_or(|n| n > i32::MAX as u32)
        {
            return Err(Error::invalid("staging_blocks, scratch_blocks", "must fit in 31 bits"));
        }
        Ok(())
    }
}
