//! Chunked prefill over rows of codes: which kernel, and what a call says of scales. The grid is that
//! of any prefill (prefill.rs).

use super::decode_token::{Scales, check_scales};
use super::params::PrefillTokenParams;
use super::prefill::{PrefillBounds, prefill_launch_with};
use super::{Kernel, Launch};
use crate::dtype::KvFormat;
use crate::error::Result;

kernels! {
    E4M3_D64 = "kvc_prefill_fp8_e4m3_d64", "kvc_prefill_token_params", 128;
    E4M3_D80 = "kvc_prefill_fp8_e4m3_d80", "kvc_prefill_token_params", 128;
    E4M3_D96 = "kvc_prefill_fp8_e4m3_d96", "kvc_prefill_token_params", 128;
    E4M3_D128 = "kvc_prefill_fp8_e4m3_d128", "kvc_prefill_token_params", 128;
    E4M3_D192 = "kvc_prefill_fp8_e4m3_d192", "kvc_prefill_token_params", 128;
    E4M3_D256 = "kvc_prefill_fp8_e4m3_d256", "kvc_prefill_token_params", 128;
    E5M2_D64 = "kvc_prefill_fp8_e5m2_d64", "kvc_prefill_token_params", 128;
    E5M2_D80 = "kvc_prefill_fp8_e5m2_d80", "kvc_prefill_token_params", 128;
    E5M2_D96 = "kvc_prefill_fp8_e5m2_d96", "kvc_prefill_token_params", 128;
    E5M2_D128 = "kvc_prefill_fp8_e5m2_d128", "kvc_prefill_token_params", 128;
    E5M2_D192 = "kvc_prefill_fp8_e5m2_d192", "kvc_prefill_token_params", 128;
    E5M2_D256 = "kvc_prefill_fp8_e5m2_d256", "kvc_prefill_token_params", 128;
    INT8_D64 = "kvc_prefill_int8_t_d64", "kvc_prefill_token_params", 128;
    INT8_D80 = "kvc_prefill_int8_t_d80", "kvc_prefill_token_params", 128;
    INT8_D96 = "kvc_prefill_int8_t_d96", "kvc_prefill_token_params", 128;
    INT8_D128 = "kvc_prefill_int8_t_d128", "kvc_prefill_token_params", 128;
    INT8_D192 = "kvc_prefill_int8_t_d192", "kvc_prefill_token_params", 128;
    INT8_D256 = "kvc_prefill_int8_t_d256", "kvc_prefill_token_params", 128;
    INT4_D64 = "kvc_prefill_int4_t_d64", "kvc_prefill_token_params", 128;
    INT4_D80 = "kvc_prefill_int4_t_d80", "kvc_prefill_token_params", 128;
    INT4_D96 = "kvc_prefill_int4_t_d96", "kvc_prefill_token_params", 128;
    INT4_D128 = "kvc_prefill_int4_t_d128", "kvc_prefill_token_params", 128;
    INT4_D192 = "kvc_prefill_int4_t_d192", "kvc_prefill_token_params", 128;
    INT4_D256 = "kvc_prefill_int4_t_d256", "kvc_prefill_token_params", 128;
    NVFP4_D64 = "kvc_prefill_nvfp4_d64", "kvc_prefill_token_params", 128;
    NVFP4_D80 = "kvc_prefill_nvfp4_d80", "kvc_prefill_token_params", 128;
    NVFP4_D96 = "kvc_prefill_nvfp4_d96", "kvc_prefill_token_params", 128;
    NVFP4_D128 = "kvc_prefill_nvfp4_d128", "kvc_prefill_token_params", 128;
    NVFP4_D192 = "kvc_prefill_nvfp4_d192", "kvc_prefill_token_params", 128;
    NVFP4_D256 = "kvc_prefill_nvfp4_d256", "kvc_prefill_token_params", 128;
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

/// [`prefill_launch`](super::prefill_launch) for rows of codes.
///
/// # Errors
/// As there, and for scales that are misaligned or not given.
pub fn prefill_token_launch(
    bounds: &PrefillBounds,
    params: &mut PrefillTokenParams,
) -> Result<Launch> {
    let p = &*params;
    check_scales(
        bounds.format,
        &Scales {
            addresses: [p.k_scales.0, p.v_scales.0],
            strides: [
                [p.k_scale_block, p.k_scale_head, p.k_scale_token],
                [p.v_scale_block, p.v_scale_head, p.v_scale_token],
            ],
            heads: [p.k_heads.0, p.v_heads.0],
        },
    )?;
    prefill_launch_with(bounds, &mut params.call, 16)
}
