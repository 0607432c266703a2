//! What latent attention over rows of codes is given.

use alloc::string::String;

use super::{Any, CType, DeviceStruct, In, MlaParams};

device_struct! {
    /// Latent attention over rows of codes: FP8, INT8_T, INT4_T.
    MlaTokenParams, "kvc_mla_token_params" {
        /// The call. Strides of `k` are in bytes, multiples of 16; rows of `q` begin at multiples of
        /// 16 bytes. Queries are rounded to f16.
        call: MlaParams,
        /// Scales of the latents of block 0, token 0: `KvFormat::row_scale_bytes` bytes of f16 at an
        /// even address, those of the 512 channels first; null where the format has none.
        k_scales: In<Any>,
        /// One scale of all latents (FP8), or null for 1.
        k_heads: In<f32>,
        /// Bytes from a block to the next in `k_scales`.
        k_scale_block: i64,
        /// Bytes from a token to the next in `k_scales`.
        k_scale_token: i64,
        /// 1 where latents are stored rotated: queries are then rotated too, and outputs back. Else 0.
        k_rotated: u32,
        /// Keeps the size a multiple of 8. Zero.
        reserved: u32,
    }
}

impl CType for MlaParams {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}
