//! How an append to rows of codes is launched: a warp for two, four or eight rows at a time. What turns
//! keys or takes queries along is one kernel a head dimension, else each encoding has its own. Latents have
//! one, with a warp for a row.

use super::append::check_append;
use super::decode_token::{Scales, check_scales};
use super::mla::MLA_DIM;
use super::params::{AppendParams, AppendTokenParams, In, Out};
use super::{Kernel, Launch, ScaleArgs};
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};

kernels! {
    D64 = "kvc_append_token_d64", "kvc_append_token_params", THREADS;
    D80 = "kvc_append_token_d80", "kvc_append_token_params", THREADS;
    D96 = "kvc_append_token_d96", "kvc_append_token_params", THREADS;
    D128 = "kvc_append_token_d128", "kvc_append_token_params", THREADS;
    D192 = "kvc_append_token_d192", "kvc_append_token_params", THREADS;
    D256 = "kvc_append_token_d256", "kvc_append_token_params", THREADS;
    FP8_D64 = "kvc_append_fp8_d64", "kvc_append_token_params", THREADS;
    FP8_D80 = "kvc_append_fp8_d80", "kvc_append_token_params", THREADS;
    FP8_D96 = "kvc_append_fp8_d96", "kvc_append_token_params", THREADS;
    FP8_D128 = "kvc_append_fp8_d128", "kvc_append_token_params", THREADS;
    FP8_D192 = "kvc_append_fp8_d192", "kvc_append_token_params", THREADS;
    FP8_D256 = "kvc_append_fp8_d256", "kvc_append_token_params", THREADS;
    INT8_D64 = "kvc_append_int8_d64", "kvc_append_token_params", THREADS;
    INT8_D80 = "kvc_append_int8_d80", "kvc_append_token_params", THREADS;
    INT8_D96 = "kvc_append_int8_d96", "kvc_append_token_params", THREADS;
    INT8_D128 = "kvc_append_int8_d128", "kvc_append_token_params", THREADS;
    INT8_D192 = "kvc_append_int8_d192", "kvc_append_token_params", THREADS;
    INT8_D256 = "kvc_append_int8_d256", "kvc_append_token_params", THREADS;
    INT4_D64 = "kvc_append_int4_d64", "kvc_append_token_params", THREADS;
    INT4_D80 = "kvc_append_int4_d80", "kvc_append_token_params", THREADS;
    INT4_D96 = "kvc_append_int4_d96", "kvc_append_token_params", THREADS;
    INT4_D128 = "kvc_append_int4_d128", "kvc_append_token_params", THREADS;
    INT4_D192 = "kvc_append_int4_d192", "kvc_append_token_params", THREADS;
    INT4_D256 = "kvc_append_int4_d256", "kvc_append_token_params", THREADS;
    NVFP4_D64 = "kvc_append_nvfp4_d64", "kvc_append_token_params", THREADS;
    NVFP4_D80 = "kvc_append_nvfp4_d80", "kvc_append_token_params", THREADS;
    NVFP4_D96 = "kvc_append_nvfp4_d96", "kvc_append_token_params", THREADS;
    NVFP4_D128 = "kvc_append_nvfp4_d128", "kvc_append_token_params", THREADS;
    NVFP4_D192 = "kvc_append_nvfp4_d192", "kvc_append_token_params", THREADS;
    NVFP4_D256 = "kvc_append_nvfp4_d256", "kvc_append_token_params", THREADS;
    LATENT = "kvc_append_latent", "kvc_append_token_params", THREADS;
}

/// The parameters of an append of floats, for rows of codes.
pub fn append_token_params(
    call: AppendParams,
    format: KvFormat,
    scales: &ScaleArgs,
) -> AppendTokenParams {
    let (s, int4) = (scales, format == KvFormat::Int4T);
    AppendTokenParams {
        call,
        k_scales: Out::at(s.k),
        v_scales: Out::at(s.v),
        k_heads: In::at(s.k_heads),
        v_heads: In::at(s.v_heads),
        k_scale_block: s.k_strides.block,
        k_scale_head: s.k_strides.head,
        k_scale_token: s.k_strides.token,
        v_scale_block: s.v_strides.block,
        v_scale_head: s.v_strides.head,
        v_scale_token: s.v_strides.token,
        format: format.id(),
        k_rotated: u32::from(int4 || (format == KvFormat::Int8T && s.k_rotated)),
    }
}

fn kernel_of(p: &AppendTokenParams, format: KvFormat) -> Option<&'static Kernel> {
    if p.call.v_dim == 0 {
        return (p.call.k_dim == MLA_DIM && p.call.kv_heads == 1).then_some(&LATENT);
    }
    let of_dims: [&'static Kernel; 6] = match format {
        _ if p.call.cosines.0 != 0 || p.call.q_heads != 0 => {
            [&D64, &D80, &D96, &D128, &D192, &D256]
        }
        KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 => {
            [&FP8_D64, &FP8_D80, &FP8_D96, &FP8_D128, &FP8_D192, &FP8_D256]
        }
        KvFormat::Int8T => [&INT8_D64, &INT8_D80, &INT8_D96, &INT8_D128, &INT8_D192, &INT8_D256],
        KvFormat::Int4T => [&INT4_D64, &INT4_D80, &INT4_D96, &INT4_D128, &INT4_D192, &INT4_D256],
        KvFormat::Nvfp4 => {
            [&NVFP4_D64, &NVFP4_D80, &NVFP4_D96, &NVFP4_D128, &NVFP4_D192, &NVFP4_D256]
        }
        _ => return None,
    };
    let dims = [64, 80, 96, 128, 192, 256];
    dims.iter().position(|&dim| dim == p.call.k_dim).map(|at| of_dims[at])
}

/// Threads of a block and of a warp, and the channels of a row that one has.
const THREADS: u32 = 256;
const WARP: u32 = 32;
const CHANNELS: u32 = 16;
/// Blocks from which on threads take more tokens each: what an H100 has at least at once.
const MANY_BLOCKS: u32 = 3 * 132;
/// Rows that a thread takes part in at most.
const MOST_ROWS: u32 = 8;

/// Fills `tokens_per_block` and gives the launch; `None` where there is nothing to do.
///
/// # Errors
/// `InvalidArgument` where a dimension of `params` is outside what its field documents;
/// `Unsupported` where there is no kernel for the format and head dimension.
pub fn append_token_launch(params: &mut AppendTokenParams) -> Result<Option<Launch>> {
    let p = params;
    let format = KvFormat::from_id(p.format)?;
    let unsupported = Error::Unsupported { what: "append of this KV format and head_dim" };
    // Where values lie in keys they have no channels, nor scales, of their own.
    let latent = p.call.v_dim == 0;
    if format.class() != FormatClass::Token || (p.call.k_dim != p.call.v_dim && !latent) {
        return Err(unsupported);
    }
    let Some(kernel) = kernel_of(p, format) else { return Err(unsupported) };
    check_append(&p.call, 16)?;
    check_scales(
        format,
        &Scales {
            addresses: [p.k_scales.0, if latent { p.k_scales.0 } else { p.v_scales.0 }],
            strides: [
                [p.k_scale_block, p.k_scale_head, p.k_scale_token],
                [p.v_scale_block, p.v_scale_head, p.v_scale_token],
            ],
            heads: [p.k_heads.0, p.v_heads.0],
        },
    )?;
    if p.call.tokens == 0 {
        return Ok(None);
    }
    // As many tokens as have a row for all threads at once, times a power of two where they still fill a
    // device. Lanes of a row are a power of two.
    let rows = THREADS * CHANNELS / p.call.k_dim.next_power_of_two();
    let at_once = 1 << (rows / (2 * p.call.kv_heads)).max(1).ilog2();
    let times = (p.call.tokens / (at_once * MANY_BLOCKS)).clamp(1, MOST_ROWS);
    p.call.tokens_per_block = if latent {
        // A warp each; but a token's queries take a thread for every column of a row.
        let columns = (p.call.k_dim / 8).next_power_of_two();
        THREADS / if p.call.q_heads == 0 { WARP } else { columns }
    } else {
        at_once << times.ilog2()
    };
    let blocks = p.call.tokens.div_ceil(p.call.tokens_per_block);
    if blocks > i32::MAX as u32 {
        return Err(Error::Overflow { what: "blocks of an append" });
    }
    Ok(Some(Launch { kernel, grid: [blocks, 1, 1], shared_bytes: 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound(format: KvFormat) -> AppendTokenParams {
        AppendTokenParams {
            call: AppendParams {
                v: In::at(16),
                k_dim: 128,
                v_dim: 128,
                kv_heads: 8,
                block_tokens: 16,
                tokens: 64,
                ..AppendParams::default()
            },
            k_scales: Out::at(16),
            v_scales: Out::at(16),
            format: format.id(),
            ..AppendTokenParams::default()
        }
    }

    #[test]
    fn what_turns_or_has_queries_shares_a_kernel() {
        for (format, name) in [
            (KvFormat::Fp8E4m3, "kvc_append_fp8_d128"),
            (KvFormat::Fp8E5m2, "kvc_append_fp8_d128"),
            (KvFormat::Int8T, "kvc_append_int8_d128"),
            (KvFormat::Int4T, "kvc_append_int4_d128"),
            (KvFormat::Nvfp4, "kvc_append_nvfp4_d128"),
        ] {
            let of = |change: fn(&mut AppendParams)| {
                let mut p = sound(format);
                change(&mut p.call);
                append_token_launch(&mut p).unwrap().unwrap().kernel.name
            };
            assert_eq!(of(|_| ()), name);
            let turns = of(|p| {
                (p.cosines, p.sines, p.positions) = (In::at(16), In::at(16), In::at(16));
            });
            let queries = of(|p| (p.q, p.q_heads) = (In::at(16), 32));
            assert_eq!((turns, queries), ("kvc_append_token_d128", "kvc_append_token_d128"));
        }
    }

    #[test]
    fn every_token_has_a_block() {
        for (kv_heads, tokens, per_block) in
            [(8, 64, 2), (8, 4096, 8), (8, 1 << 20, 16), (1, 5, 16), (3, 7, 4), (40, 9, 1)]
        {
            let mut p = sound(KvFormat::Fp8E4m3);
            (p.call.kv_heads, p.call.tokens) = (kv_heads, tokens);
            let launch = append_token_launch(&mut p).unwrap().unwrap();
            assert_eq!(p.call.tokens_per_block, per_block, "{kv_heads} heads, {tokens} tokens");
            assert_eq!(launch.grid[0], tokens.div_ceil(per_block));
        }
    }
}
