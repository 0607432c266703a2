//! What chunked prefill over rows of codes is given.

use alloc::string::String;

use super::{Any, CType, DeviceStruct, In, PrefillParams};

device_struct! {
    /// Chunked prefill over rows of codes: FP8, INT8_T, INT4_T, NVFP4.
    PrefillTokenParams, "kvc_prefill_token_params" {
        /// The call. Strides of `k` and `v` are in bytes, multiples of 16.
        call: PrefillParams,
        /// Scales of the keys of block 0, head 0, token 0; null where the format has none.
        k_scales: In<Any>,
        /// The same of values.
        v_scales: In<Any>,
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
        /// 1 where keys are stored rotated. Else 0.
        k_rotated: u32,
        /// 1 where values are stored rotated. Else 0.
        v_rotated: u32,
    }
}

impl CType for PrefillParams {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}
