//! What an append to rows of codes is given.

use alloc::string::String;

use super::{Any, AppendParams, CType, DeviceStruct, In, Out};

device_struct! {
    /// Appends rows of K and V as codes: FP8, INT8_T, INT4_T, NVFP4.
    AppendTokenParams, "kvc_append_token_params" {
        /// The call. Strides of the caches are in bytes; `k_dim` is `v_dim`, or 576 with one head and
        /// `v_dim` 0 (latents of 512 channels and 64 rotary ones); `cache_dtype` means nothing. The
        /// error flag's bit 5 says that a row was not finite or outside its format's range, and not
        /// written.
        call: AppendParams,
        /// Scales of the keys of block 0, head 0, token 0; null where the format has none.
        k_scales: Out<Any>,
        /// The same of values.
        v_scales: Out<Any>,
        /// A scale of all keys of each KV head (FP8, NVFP4), or null for 1.
        k_heads: In<f32>,
        /// A scale of all values of each KV head, or null.
        v_heads: In<f32>,
        /// Bytes from a block to the next in `k_scales`.
        k_scale_block: i64,
        /// Bytes from a head to the next in `k_scales`.
        k_scale_head: i64,
        /// Bytes from a token to the next in `k_scales`.
        k_scale_token: i64,
        /// Bytes from a block to the next in `v_scales`.
        v_scale_block: i64,
        /// Bytes from a head to the next in `v_scales`.
        v_scale_head: i64,
        /// Bytes from a token to the next in `v_scales`.
        v_scale_token: i64,
        /// Format id.
        format: u32,
        /// 1 where keys are stored rotated (INT4_T rows always are). Else 0.
        k_rotated: u32,
    }
}

impl CType for AppendParams {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}
