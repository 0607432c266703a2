//! Paged decode over rows of codes: which kernel, how much shared memory, and what a call says of
//! scales. Work is cut as for any decode (decode.rs).

use super::Launch;
use super::decode::{COLUMNS, DecodePlan, THREADS, TILE_TOKENS};
use super::params::DecodeTokenParams;
use super::residence::{RESERVED_BYTES, Residence};
use super::{Kernel, decode};
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};

kernels! {
    E4M3_D64 = "kvc_decode_fp8_e4m3_d64", "kvc_decode_token_params", THREADS;
    E4M3_D80 = "kvc_decode_fp8_e4m3_d80", "kvc_decode_token_params", THREADS;
    E4M3_D96 = "kvc_decode_fp8_e4m3_d96", "kvc_decode_token_params", THREADS;
    E4M3_D128 = "kvc_decode_fp8_e4m3_d128", "kvc_decode_token_params", THREADS;
    E4M3_D192 = "kvc_decode_fp8_e4m3_d192", "kvc_decode_token_params", THREADS;
    E4M3_D256 = "kvc_decode_fp8_e4m3_d256", "kvc_decode_token_params", THREADS;
    E5M2_D64 = "kvc_decode_fp8_e5m2_d64", "kvc_decode_token_params", THREADS;
    E5M2_D80 = "kvc_decode_fp8_e5m2_d80", "kvc_decode_token_params", THREADS;
    E5M2_D96 = "kvc_decode_fp8_e5m2_d96", "kvc_decode_token_params", THREADS;
    E5M2_D128 = "kvc_decode_fp8_e5m2_d128", "kvc_decode_token_params", THREADS;
    E5M2_D192 = "kvc_decode_fp8_e5m2_d192", "kvc_decode_token_params", THREADS;
    E5M2_D256 = "kvc_decode_fp8_e5m2_d256", "kvc_decode_token_params", THREADS;
    INT8_D64 = "kvc_decode_int8_t_d64", "kvc_decode_token_params", THREADS;
    INT8_D80 = "kvc_decode_int8_t_d80", "kvc_decode_token_params", THREADS;
    INT8_D96 = "kvc_decode_int8_t_d96", "kvc_decode_token_params", THREADS;
    INT8_D128 = "kvc_decode_int8_t_d128", "kvc_decode_token_params", THREADS;
    INT8_D192 = "kvc_decode_int8_t_d192", "kvc_decode_token_params", THREADS;
    INT8_D256 = "kvc_decode_int8_t_d256", "kvc_decode_token_params", THREADS;
    INT4_D64 = "kvc_decode_int4_t_d64", "kvc_decode_token_params", THREADS;
    INT4_D80 = "kvc_decode_int4_t_d80", "kvc_decode_token_params", THREADS;
    INT4_D96 = "kvc_decode_int4_t_d96", "kvc_decode_token_params", THREADS;
    INT4_D128 = "kvc_decode_int4_t_d128", "kvc_decode_token_params", THREADS;
    INT4_D192 = "kvc_decode_int4_t_d192", "kvc_decode_token_params", THREADS;
    INT4_D256 = "kvc_decode_int4_t_d256", "kvc_decode_token_params", THREADS;
    NVFP4_D64 = "kvc_decode_nvfp4_d64", "kvc_decode_token_params", THREADS;
    NVFP4_D80 = "kvc_decode_nvfp4_d80", "kvc_decode_token_params", THREADS;
    NVFP4_D96 = "kvc_decode_nvfp4_d96", "kvc_decode_token_params", THREADS;
    NVFP4_D128 = "kvc_decode_nvfp4_d128", "kvc_decode_token_params", THREADS;
    NVFP4_D192 = "kvc_decode_nvfp4_d192", "kvc_decode_token_params", THREADS;
    NVFP4_D256 = "kvc_decode_nvfp4_d256", "kvc_decode_token_params", THREADS;
}

/// The kernel for a format and head dimension; `None` where there is no instance.
pub(super) fn token_kernel(format: KvFormat, head_dim: u32) -> Option<&'static Kernel> {
    match (format, head_dim) {
        (KvFormat::Fp8E4m3, 64) => Some(&E4M3_D64),
        (KvFormat::Fp8E4m3, 80) => Some(&E4M3_D80),
        (KvFormat::Fp8E4m3, 96) => Some(&E4M3_D96),
        (KvFormat::Fp8E4m3, 128) => Some(&E4M3_D128),
        (KvFormat::Fp8E4m3, 192) => Some(&E4M3_D192),
        (KvFormat::Fp8E4m3, 256) => Some(&E4M3_D256),
        (KvFormat::Fp8E5m2, 64) => Some(&E5M2_D64),
        (KvFormat::Fp8E5m2, 80) => Some(&E5M2_D80),
        (KvFormat::Fp8E5m2, 96) => Some(&E5M2_D96),
        (KvFormat::Fp8E5m2, 128) => Some(&E5M2_D128),
        (KvFormat::Fp8E5m2, 192) => Some(&E5M2_D192),
        (KvFormat::Fp8E5m2, 256) => Some(&E5M2_D256),
        (KvFormat::Int8T, 64) => Some(&INT8_D64),
        (KvFormat::Int8T, 80) => Some(&INT8_D80),
        (KvFormat::Int8T, 96) => Some(&INT8_D96),
        (KvFormat::Int8T, 128) => Some(&INT8_D128),
        (KvFormat::Int8T, 192) => Some(&INT8_D192),
        (KvFormat::Int8T, 256) => Some(&INT8_D256),
        (KvFormat::Int4T, 64) => Some(&INT4_D64),
        (KvFormat::Int4T, 80) => Some(&INT4_D80),
        (KvFormat::Int4T, 96) => Some(&INT4_D96),
        (KvFormat::Int4T, 128) => Some(&INT4_D128),
        (KvFormat::Int4T, 192) => Some(&INT4_D192),
        (KvFormat::Int4T, 256) => Some(&INT4_D256),
        (KvFormat::Nvfp4, 64) => Some(&NVFP4_D64),
        (KvFormat::Nvfp4, 80) => Some(&NVFP4_D80),
        (KvFormat::Nvfp4, 96) => Some(&NVFP4_D96),
        (KvFormat::Nvfp4, 128) => Some(&NVFP4_D128),
        (KvFormat::Nvfp4, 192) => Some(&NVFP4_D192),
        (KvFormat::Nvfp4, 256) => Some(&NVFP4_D256),
        _ => None,
    }
}

/// Blocks of a multiprocessor that the registers of a kernel leave room for: what its source asks
/// the compiler for.
fn blocks_by_registers(head_dim: u32) -> u32 {
    if head_dim <= 128 { 3 } else { 2 }
}

/// The most stages of a pipeline.
const MAX_STAGES: u32 = 4;
/// Runs of a tile.
const RUNS: u32 = 8;
/// Bytes that a multiprocessor of sm_90 wants under way to run at the speed of its memory, with room
/// for what does not come evenly.
const ENOUGH_BYTES: u32 = 64 * 1024;

/// What rows of codes and their scales take of shared memory.
#[derive(Debug, Clone, Copy)]
struct Stage {
    row: u32,
    scales: u32,
}

impl Stage {
    fn of(format: KvFormat, head_dim: u32) -> Self {
        let scales = format.row_scale_bytes(head_dim, 1) as u32;
        Self { row: format.row_bytes(head_dim) as u32, scales }
    }

    /// Tokens of a run, which a bulk copy brings.
    fn run(self) -> u32 {
        if self.row > 128 { 8 } else { 16 }
    }

    /// A tile of runs, padded: all of codes, those of scales of 8 bytes and more.
    fn bulk(self) -> u32 {
        let scale_pad = if self.scales >= 8 { 16 } else { 0 };
        2 * RUNS * (self.run() * (self.row + self.scales) + 16 + scale_pad)
    }

    /// Whether runs of rows, and of their scales, are what bulk copies take.
    fn comes_in_runs(self, params: &DecodeTokenParams) -> bool {
        let p = &params.call;
        let (row, scales) = (i64::from(self.row), i64::from(self.scales));
        let rows =
            p.block_tokens.is_multiple_of(self.run()) && p.k_token == row && p.v_token == row;
        let of_scales =
            [params.k_scale_block, params.k_scale_head, params.v_scale_block, params.v_scale_head];
        let aligned = of_scales.iter().all(|stride| stride % 16 == 0)
            && (params.k_scales.0 | params.v_scales.0).is_multiple_of(16)
            && params.k_scale_token == scales
            && params.v_scale_token == scales;
        rows && (scales == 0 || aligned)
    }

    /// A tile that chunks are copied to, with a slot of 8 or 16 bytes for the scales of a row.
    fn copied(self) -> u32 {
        let slot = match self.scales {
            0 => 0,
            1..=8 => 8,
            _ => 16,
        };
        2 * TILE_TOKENS * (self.row + slot)
    }
}

/// Stages and blocks of a multiprocessor: at least two stages, the warps' sums in their place
/// afterwards, and the queries and barriers behind them. As many blocks as have enough under way;
/// where there is no room for tiles of runs, for those that are copied in chunks.
pub(super) fn token_residence(
    format: KvFormat,
    head_dim: u32,
    multiprocessor_shared_bytes: u32,
) -> Option<Residence> {
    let stage = Stage::of(format, head_dim);
    let sums = THREADS / 32 * COLUMNS * (head_dim + 4 + 2) * 4;
    // Of whole chunks of codes of 4 bits.
    let queries = COLUMNS * ((head_dim.next_multiple_of(32) + 8) * 2 + 8);
    let with = |stages: u32, bytes: u32| {
        // Two tiles that are copied in chunks too, of a call whose rows do not come in runs.
        let tiles = (stages * bytes).max(2 * stage.copied());
        let query_at = tiles.max(sums).next_multiple_of(16);
        // Two barriers and a word for each stage.
        let shared_bytes = query_at + queries + MAX_STAGES * 24;
        let fit = multiprocessor_shared_bytes / (shared_bytes + RESERVED_BYTES);
        Residence { stages, blocks: fit.min(blocks_by_registers(head_dim)), shared_bytes, query_at }
    };
    let under_way = |r: &Residence| (r.blocks * (r.stages - 1) * stage.bulk()).min(ENOUGH_BYTES);
    (2..=MAX_STAGES)
        .map(|stages| with(stages, stage.bulk()))
        .filter(|r| r.blocks > 0)
        .max_by_key(|r| (under_way(r), r.blocks, r.stages))
        .or_else(|| {
            let copied = (2..=MAX_STAGES).map(|stages| with(stages, stage.copied()));
            Residence::most_under_way(copied)
        })
}

impl DecodePlan {
    /// [`decode_launch`](Self::decode_launch) for rows of codes.
    ///
    /// # Errors
    /// As there, and for scales that are misaligned or not given.
    pub fn decode_token_launch(
        &self,
        workspace: u64,
        params: &mut DecodeTokenParams,
    ) -> Result<Launch> {
        let format = self.bounds.format;
        if format.class() != FormatClass::Token {
            return Err(Error::InvalidState { why: "the plan is not for rows of codes" });
        }
        let p = &*params;
        check_scales(
            format,
            &Scales {
                addresses: [p.k_scales.0, p.v_scales.0],
                strides: [
                    [p.k_scale_block, p.k_scale_head, p.k_scale_token],
                    [p.v_scale_block, p.v_scale_head, p.v_scale_token],
                ],
                heads: [p.k_heads.0, p.v_heads.0],
            },
        )?;
        self.fill(workspace, &mut params.call, decode::CHUNK_BYTES)?;
        params.query_at = self.residence.query_at;
        let stage = Stage::of(format, self.bounds.head_dim);
        params.copy_stages = (params.query_at / stage.copied()).clamp(2, MAX_STAGES);
        let room = params.query_at >= params.call.stages * stage.bulk();
        params.call.bulk = u32::from(room && stage.comes_in_runs(params));
        Ok(self.kernel())
    }
}

/// What a call says of scales: of keys, then of values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scales {
    /// Those of block 0, head 0, token 0.
    pub addresses: [u64; 2],
    /// Bytes from a block, head and token to the next.
    pub strides: [[i64; 3]; 2],
    /// Those of whole heads, or 0.
    pub heads: [u64; 2],
}

/// What every kernel over rows of codes takes for granted of scales.
pub(super) fn check_scales(format: KvFormat, scales: &Scales) -> Result<()> {
    if format.row_scale_bytes(16, 1) != 0 && scales.addresses.contains(&0) {
        return Err(Error::NullPointer { what: "scales" });
    }
    let halves = matches!(format, KvFormat::Int8T | KvFormat::Int4T);
    let odd = scales.addresses.iter().any(|a| a % 2 != 0)
        || scales.strides.iter().flatten().any(|s| s % 2 != 0);
    if halves && odd {
        return Err(Error::invalid("scales", "must be aligned to 2 bytes"));
    }
    if scales.heads.iter().any(|a| a % 4 != 0) {
        return Err(Error::invalid("head scales", "must be aligned to 4 bytes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::SM90_SHARED_BYTES;

    #[test]
    fn every_instance_has_room_for_its_pipeline() {
        for kernel in KERNELS {
            let (name, dim) = kernel.name.rsplit_once("_d").unwrap();
            let format = KvFormat::from_name(name.strip_prefix("kvc_decode_").unwrap()).unwrap();
            let head_dim = dim.parse().unwrap();
            assert_eq!(token_kernel(format, head_dim), Some(*kernel));
            for shared in [SM90_SHARED_BYTES, 164 * 1024, 100 * 1024] {
                let r = token_residence(format, head_dim, shared).unwrap();
                assert!(r.stages >= 2 && r.blocks >= 1 && r.shared_bytes <= shared, "{r:?}");
            }
        }
        let best = |format, head_dim| {
            token_residence(format, head_dim, SM90_SHARED_BYTES).map(|r| (r.stages, r.blocks))
        };
        assert_eq!(best(KvFormat::Fp8E4m3, 128), Some((2, 3)));
        assert_eq!(best(KvFormat::Int8T, 128), Some((2, 3)));
        assert_eq!(best(KvFormat::Int4T, 128), Some((4, 3)));
        assert_eq!(best(KvFormat::Nvfp4, 128), Some((3, 3)));
        // Rows of more than 128 bytes come in half as many, so that two blocks have some under way.
        assert_eq!(best(KvFormat::Fp8E4m3, 256), Some((3, 2)));
        assert_eq!(best(KvFormat::Int8T, 256), Some((3, 2)));
        assert_eq!(best(KvFormat::Int4T, 256), Some((3, 2)));
        assert_eq!(best(KvFormat::Nvfp4, 256), Some((2, 2)));
        assert_eq!(best(KvFormat::Fp8E4m3, 80), Some((3, 3)));
        assert_eq!(token_residence(KvFormat::Int8T, 128, 16 * 1024), None);
    }

    /// The sources say how many blocks a multiprocessor shall hold, and so does this file.
    #[test]
    fn the_sources_ask_for_as_many_blocks() {
        for (dim, source) in [
            (64, include_str!("../../cuda/decode_token_d64.cu")),
            (80, include_str!("../../cuda/decode_token_d80.cu")),
            (96, include_str!("../../cuda/decode_token_d96.cu")),
            (128, include_str!("../../cuda/decode_token_d128.cu")),
            (192, include_str!("../../cuda/decode_token_d192.cu")),
            (256, include_str!("../../cuda/decode_token_d256.cu")),
        ] {
            let lines: alloc::vec::Vec<_> =
                source.lines().filter(|l| l.starts_with("KVC_DECODE_TOKEN(")).collect();
            let ending = alloc::format!(", {dim}, {})", blocks_by_registers(dim));
            assert_eq!(lines.len(), 5);
            assert!(lines.iter().all(|line| line.ends_with(&ending)), "{source}");
        }
    }
}
