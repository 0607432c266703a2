//! How the sealing of tiles is launched: a block for each tile and KV head.

use super::Launch;
use super::params::SealParams;
use crate::dtype::KvFormat;
use crate::error::{Error, Result};
use crate::layout::tile::TileLayout;

kernels! {
    D64 = "kvc_seal_d64", "kvc_seal_params", THREADS;
    D128 = "kvc_seal_d128", "kvc_seal_params", THREADS;
}

/// Threads of a block.
const THREADS: u32 = 256;

/// Set in an entry of `SealParams::refused` beside the number of a spare slot.
pub const SPARE_TAKEN: u32 = 1 << 31;
/// The number of the first spare there.
pub const FIRST_SPARE: u32 = 2;

/// Fills what the layout determines of `params` and gives the launch for `count` tiles; `None` where
/// there are none.
///
/// # Errors
/// `Unsupported` where there is no kernel for the layout's dimensions; `NullPointer`;
/// `InvalidArgument` for records or rows that do not begin at multiples of 16 bytes, or no heads.
pub fn seal_launch(
    layout: &TileLayout,
    count: u32,
    params: &mut SealParams,
) -> Result<Option<Launch>> {
    let (p, shape, format) = (params, layout.shape(), layout.format());
    let kernel = match (shape.k_dim, shape.v_dim, shape.v_in_k) {
        (64, 64, false) => &D64,
        (128, 128, false) => &D128,
        _ => return Err(Error::Unsupported { what: "sealing with this head_dim" }),
    };
    if count == 0 {
        return Ok(None);
    }
    if [p.k.0, p.v.0, p.records.0, p.list.0, p.refused.0].contains(&0) {
        return Err(Error::NullPointer { what: "k, v, records, list, refused" });
    }
    if p.scratch_blocks != 0 && [p.scratch_k.0, p.scratch_v.0].contains(&0) {
        return Err(Error::NullPointer { what: "scratch" });
    }
    let aligned = p.records.0.is_multiple_of(16);
    if !aligned
        || [p.record_block, p.record_head].iter().any(|s| s % KvFormat::ALIGN_BYTES as i64 != 0)
    {
        return Err(Error::invalid("records", "must begin at multiples of 16 bytes"));
    }
    let rows = (p.k.0 | p.v.0 | p.scratch_k.0 | p.scratch_v.0) % 16 != 0;
    let strides = [p.k_block, p.k_head, p.k_token, p.v_block, p.v_head, p.v_token];
    let scratch = [p.scratch_k_block, p.scratch_k_head, p.scratch_k_token];
    let scratch =
        scratch.into_iter().chain([p.scratch_v_block, p.scratch_v_head, p.scratch_v_token]);
    if rows || strides.into_iter().chain(scratch).any(|s| s % 8 != 0) {
        return Err(Error::invalid("k, v, scratch", "rows must begin at multiples of 16 bytes"));
    }
    if p.spare_count != 0 && (p.spares.0 == 0 || p.spares_taken.0 == 0) {
        return Err(Error::NullPointer { what: "spares, spares_taken" });
    }
    if p.staging_blocks.checked_add(p.scratch_blocks).is_none_or(|n| n > i32::MAX as u32) {
        return Err(Error::invalid("staging_blocks, scratch_blocks", "must fit in 31 bits"));
    }
    if p.kv_heads == 0 {
        return Err(Error::invalid("kv_heads", "must be at least 1"));
    }
    let blocks = u64::from(count) * u64::from(p.kv_heads);
    let blocks = i32::try_from(blocks).map_err(|_| Error::Overflow { what: "tiles" })?;
    p.tile_tokens = shape.tokens;
    p.k_bits = format.k_bits();
    p.v_bits = format.v_bits();
    p.identity = format.id() | shape.tokens.ilog2() << 16;
    p.k_plane_at = layout.k_plane.start as u32;
    p.v_codes_at = layout.v_codes.start as u32;
    p.v_plane_at = layout.v_plane.start as u32;
    p.k_steps_at = layout.k_steps.start as u32;
    p.k_mids_at = layout.k_mids.start as u32;
    p.v_scales_at = layout.v_scales.start as u32;
    p.header_at = layout.header.start as u32;
    // The record, codes of values, of each key channel two bf16 a warp and three floats, of each warp
    // three words, a word for each thread.
    let warps = THREADS / 32;
    let shared_bytes = layout.bytes() as u32
        + shape.tokens * (shape.v_dim + 4)
        + (4 * warps + 12) * shape.k_dim
        + 12 * warps
        + 4 * THREADS;
    Ok(Some(Launch { kernel, grid: [blocks.unsigned_abs(), 1, 1], shared_bytes }))
}
