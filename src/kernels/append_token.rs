//! How an append to rows of codes is launched: a warp for two, four or eight rows at a time, or for a latent.

use super::append::check_append;
use super::decode_token::{Scales, check_scales};
use super::mla::MLA_DIM;
use super::params::{AppendParams, AppendTokenParams, In, Out};
use super::{Launch, ScaleArgs};
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};

kernels! {
    D64 = "kvc_append_token_d64", "kvc_append_token_params", THREADS;
    D80 = "kvc_append_token_d80", "kvc_append_token_params", THREADS;
    D96 = "kvc_append_token_d96", "kvc_append_token_params", THREADS;
    D128 = "kvc_append_token_d128", "kvc_append_token_params", THREADS;
    D192 = "kvc_append_token_d192", "kvc_append_token_params", THREADS;
    D256 = "kvc_append_token_d256", "kvc_append_token_params", THREADS;
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

/// Threads of a block and of a warp, and the channels of a row that one has.
const THREADS: u32 = 256;
const WARP: u32 = 32;
const CHANNELS: u32 = 16;

/// Fills `tokens_per_block` and gives the launch; `None` where there is nothing to do.
///
/// # Errors
/// `InvalidArgument` where a dimension of `params` is outside what its field documents;
/// `Unsupported` where there is no kernel for the format and head dimension.
pub fn append_token_launch(params: &mut AppendTokenParams) -> Result<Option<Launch>> {
    let p = params;
    let format = KvFormat::from_id(p.format)?;
    let unsupported = Error::Unsupported { what: "append of this KV format and head_dim" };
    if format.class() != FormatClass::Token {
        return Err(unsupported);
    }
    // Where values lie in keys they have no channels, nor scales, of their own.
    let latent = p.call.v_dim == 0;
    let kernel = match (p.call.k_dim, p.call.v_dim) {
        (64, 64) => &D64,
        (80, 80) => &D80,
        (96, 96) => &D96,
        (128, 128) => &D128,
        (192, 192) => &D192,
        (256, 256) => &D256,
        (MLA_DIM, 0) if p.call.kv_heads == 1 => &LATENT,
        _ => return Err(unsupported),
    };
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
    p.call.tokens_per_block = if latent {
        // A warp each; but a token's queries take a thread for every column of a row.
        let columns = (p.call.k_dim / 8).next_power_of_two();
        if p.call.q_heads == 0 { THREADS / WARP } else { THREADS / columns }
    } else {
        // As many tokens as have a row for all threads at once. Lanes of a row are a power of two.
        let rows = THREADS * CHANNELS / p.call.k_dim.next_power_of_two();
        1 << (rows / (2 * p.call.kv_heads)).max(1).ilog2()
    };
    let blocks = p.call.tokens.div_ceil(p.call.tokens_per_block);
    if blocks > i32::MAX as u32 {
        return Err(Error::Overflow { what: "blocks of an append" });
    }
    Ok(Some(Launch { kernel, grid: [blocks, 1, 1], shared_bytes: 0 }))
}
