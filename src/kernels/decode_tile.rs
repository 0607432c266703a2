//! Paged decode over sealed tiles: which kernel, how much shared memory, and what a call says of the
//! record. Work is cut as for any decode (decode.rs).
//!
//! The same kernel serves any number of query tokens, in calls whose sequences are up to
//! [`TILE_ROWS`] rows each: a sequence of the call reads the tables of the one that owns it.

use super::attend::AttendArgs;
use super::attend_params::decode_params;
use super::decode::{COLUMNS, DecodePlan, THREADS};
use super::params::{DecodePlanParams, DecodeTileParams, In, Out};
use super::records::{place_record, record, record_args};
use super::residence::{RESERVED_BYTES, Residence};
use super::{Kernel, Launch, decode};
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::tile::TileLayout;

kernels! {
    KT8V8_D64 = "kvc_decode_kt8v8_d64", "kvc_decode_tile_params", THREADS;
    KT8V8_D128 = "kvc_decode_kt8v8_d128", "kvc_decode_tile_params", THREADS;
    KT4V4_D64 = "kvc_decode_kt4v4_d64", "kvc_decode_tile_params", THREADS;
    KT4V4_D128 = "kvc_decode_kt4v4_d128", "kvc_decode_tile_params", THREADS;
    KT3V3_D64 = "kvc_decode_kt3v3_d64", "kvc_decode_tile_params", THREADS;
    KT3V3_D128 = "kvc_decode_kt3v3_d128", "kvc_decode_tile_params", THREADS;
    KT4V2_D64 = "kvc_decode_kt4v2_d64", "kvc_decode_tile_params", THREADS;
    KT4V2_D128 = "kvc_decode_kt4v2_d128", "kvc_decode_tile_params", THREADS;
    KT2V2_D64 = "kvc_decode_kt2v2_d64", "kvc_decode_tile_params", THREADS;
    KT2V2_D128 = "kvc_decode_kt2v2_d128", "kvc_decode_tile_params", THREADS;
}

/// The kernel for a format and head dimension; `None` where there is no instance.
pub(super) fn tile_kernel(format: KvFormat, head_dim: u32) -> Option<&'static Kernel> {
    match (format, head_dim) {
        (KvFormat::Kt8v8, 64) => Some(&KT8V8_D64),
        (KvFormat::Kt8v8, 128) => Some(&KT8V8_D128),
        (KvFormat::Kt4v4, 64) => Some(&KT4V4_D64),
        (KvFormat::Kt4v4, 128) => Some(&KT4V4_D128),
        (KvFormat::Kt3v3, 64) => Some(&KT3V3_D64),
        (KvFormat::Kt3v3, 128) => Some(&KT3V3_D128),
        (KvFormat::Kt4v2, 64) => Some(&KT4V2_D64),
        (KvFormat::Kt4v2, 128) => Some(&KT4V2_D128),
        (KvFormat::Kt2v2, 64) => Some(&KT2V2_D64),
        (KvFormat::Kt2v2, 128) => Some(&KT2V2_D128),
        _ => None,
    }
}

/// Blocks of a multiprocessor that the sources ask the compiler for.
fn blocks_by_registers(format: KvFormat, head_dim: u32) -> u32 {
    match (format, head_dim) {
        (KvFormat::Kt8v8, 128) => 2,
        _ => 3,
    }
}
/// The most stages of a warp's ring.
const MAX_STAGES: u32 = 3;
/// Warps of a block.
const WARPS: u32 = THREADS / 32;
/// Raw tokens that a warp copies at a time.
const STRIP_TOKENS: u32 = 16;
/// Bytes under way that keep a multiprocessor's share of the memory busy: what comes in a microsecond
/// or so, and some.
const ENOUGH_UNDER_WAY: u32 = 64 * 1024;
/// Bytes that say what a block works on.
const WORK_BYTES: u32 = 128;
/// Bytes of the barriers: one a warp and stage.
const BARRIER_BYTES: u32 = WARPS * MAX_STAGES * 8;

/// Rows of a long call that are one sequence of it, at positions between two multiples of this. A
/// piece ends at none of them, so that a row's pieces are the same whatever comes with it.
pub const TILE_ROWS: u32 = 8;

/// The parameters of a call over sealed tiles, from the form that all calls have: tables and blocks
/// are those of the records, `k`, `v` and their strides those of the staged raw rows.
///
/// # Errors
/// `NullPointer`, `Misaligned`, `InvalidArgument`: what any attention call is refused for.
pub fn decode_tile_params(args: &AttendArgs) -> Result<DecodeTileParams> {
    args.check(false)?;
    Ok(DecodeTileParams { call: decode_params(args), ..DecodeTileParams::default() })
}

/// Stages and blocks of a multiprocessor for tiles of this many tokens: rings of records, in their
/// place before and afterwards raw rows and the warps' sums, and behind them queries and barriers.
pub(super) fn tile_residence(
    format: KvFormat,
    head_dim: u32,
    tile_tokens: u32,
    multiprocessor_shared_bytes: u32,
) -> Option<Residence> {
    let bytes = record(format, head_dim, tile_tokens).ok()?.bytes() as u32;
    let sums = WARPS * COLUMNS * (head_dim + 4 + 2) * 4;
    let raw = WARPS * STRIP_TOKENS * 2 * (head_dim + 8) * 2;
    // Queries in rows and in the order of a lane's codes, and what the block works on.
    let queries = COLUMNS * ((head_dim + 8) * 2 + 8) + head_dim * 16 + WORK_BYTES;
    let most = blocks_by_registers(format, head_dim);
    let all = (1..=MAX_STAGES).map(|stages: u32| {
        let query_at = (WARPS * stages * bytes).max(sums).max(raw).next_multiple_of(16);
        let shared_bytes = query_at + queries + BARRIER_BYTES;
        let fit = multiprocessor_shared_bytes / (shared_bytes + RESERVED_BYTES);
        Residence { stages, blocks: fit.min(most), shared_bytes, query_at }
    });
    // Warps hide each other's latencies, so blocks come before stages where enough is under way.
    let under_way = |r: &Residence| r.blocks * WARPS * (r.stages - 1) * bytes;
    all.filter(|r| r.blocks > 0)
        .max_by_key(|r| (under_way(r).min(ENOUGH_UNDER_WAY), r.blocks, r.stages))
}

impl DecodePlan {
    /// [`plan_launch`](Self::plan_launch) for sequences whose rows lie between two multiples of
    /// [`TILE_ROWS`].
    ///
    /// # Errors
    /// As there.
    pub fn plan_tile_launch(
        &self,
        workspace: u64,
        seq_lens: In<i32>,
        batch: u32,
        window: Option<u32>,
        error_flag: Out<u32>,
    ) -> Result<(Launch, DecodePlanParams)> {
        let (launch, params) = self.plan_launch(workspace, seq_lens, batch, window, error_flag)?;
        Ok((launch, DecodePlanParams { row_span: TILE_ROWS, ..params }))
    }

    /// [`decode_launch`](Self::decode_launch) for sealed tiles. Fills also what the layout of the
    /// record determines.
    ///
    /// # Errors
    /// As there; `InvalidArgument` for a call that is not causal, records that do not begin at
    /// multiples of 16 bytes, or tiles that the plan is not for; `NullPointer`.
    pub fn decode_tile_launch(
        &self,
        workspace: u64,
        params: &mut DecodeTileParams,
    ) -> Result<Launch> {
        let b = self.bounds;
        if b.format.class() != FormatClass::Tile {
            return Err(Error::InvalidState { why: "the plan is not for sealed tiles" });
        }
        let p = params;
        let layout = record(b.format, b.head_dim, b.tile_tokens)?;
        if p.call.block_tokens != b.tile_tokens {
            return Err(Error::invalid("block_tokens", "must be the tokens of the plan's tiles"));
        }
        if p.call.causal != 1 {
            return Err(Error::invalid("causal", "must be set for sealed tiles"));
        }
        record_args!(p).check()?;
        self.fill(workspace, &mut p.call, decode::CHUNK_ELEMENTS)?;
        p.call.bulk = 1;
        p.record_bytes = layout.bytes() as u32;
        place_record!(p, b.format, &layout);
        p.query_at = self.residence.query_at;
        p.barriers_at = self.residence.shared_bytes - BARRIER_BYTES;
        Ok(self.kernel())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::SM90_SHARED_BYTES;

    #[test]
    fn every_instance_has_room_for_its_records() {
        for kernel in KERNELS {
            let (name, dim) = kernel.name.rsplit_once("_d").unwrap();
            let format = KvFormat::from_name(name.strip_prefix("kvc_decode_").unwrap()).unwrap();
            let head_dim = dim.parse().unwrap();
            assert_eq!(tile_kernel(format, head_dim), Some(*kernel));
            for tokens in [64, 128] {
                for shared in [SM90_SHARED_BYTES, 164 * 1024] {
                    let r = tile_residence(format, head_dim, tokens, shared).unwrap();
                    assert!(r.blocks >= 1 && r.shared_bytes <= shared, "{kernel:?} {r:?}");
                }
            }
        }
        let best = |format| tile_residence(format, 128, 64, SM90_SHARED_BYTES).unwrap();
        assert_eq!((best(KvFormat::Kt4v4).stages, best(KvFormat::Kt4v4).blocks), (2, 3));
        assert_eq!((best(KvFormat::Kt2v2).stages, best(KvFormat::Kt2v2).blocks), (3, 3));
    }

    /// The sources say how many blocks a multiprocessor shall hold, and so does this file.
    #[test]
    fn the_sources_ask_for_as_many_blocks() {
        for (dim, source) in [
            (64, include_str!("../../cuda/decode_tile_d64.cu")),
            (128, include_str!("../../cuda/decode_tile_d128.cu")),
        ] {
            for format in KvFormat::ALL.iter().filter(|f| f.class() == FormatClass::Tile) {
                let blocks = blocks_by_registers(*format, dim);
                let start = alloc::format!("KVC_DECODE_TILE({}, ", format.name());
                let end = alloc::format!(", {dim}, {blocks})");
                assert!(source.lines().any(|l| l.starts_with(&start) && l.ends_with(&end)));
            }
        }
    }
}
