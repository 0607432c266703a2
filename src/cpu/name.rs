//! Names of kernels: what a call would run, told before it runs.

use super::level::CpuLevel;
use super::plan::Cut;
use crate::attention::HeadShape;
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::tile::{TILE_TOKENS, TileLayout, TileShape};

/// The kernel that [`attend`](super::attend) runs for a sequence with `q_tokens` query tokens, in
/// parts to be joined: `attend_decode_cpu_avx2_bf16`.
///
/// # Errors
/// As for a call: an impossible shape, a format without kernels, or a level that this CPU lacks.
pub fn kernel_name(
    shape: &HeadShape,
    format: KvFormat,
    level: CpuLevel,
    q_tokens: u32,
) -> Result<[&'static str; 4]> {
    shape.check()?;
    if !level.is_available() {
        return Err(Error::Unsupported { what: "the CPU level" });
    }
    if format.class() == FormatClass::Tile {
        // One kernel for any number of queries; its dimensions do not depend on the tile's tokens.
        let HeadShape { k_dim, v_dim, v_in_k, .. } = *shape;
        TileLayout::new(format, TileShape { k_dim, v_dim, v_in_k, tokens: TILE_TOKENS[0] })?;
        return Ok(["attend_sealed_cpu_", level.name(), "_", format.name()]);
    }
    super::args::check_format(format)?;
    let decode = Cut::new(shape).sequence(q_tokens, 0, q_tokens).decode;
    let kernel = if decode { "attend_decode_cpu_" } else { "attend_tile_cpu_" };
    Ok([kernel, level.name(), "_", format.name()])
}
