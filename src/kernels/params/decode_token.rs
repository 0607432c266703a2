//! What paged decode over rows of codes is given.

use alloc::string::String;

use super::{Any, CType, DecodeParams, DeviceStruct, In};

device_struct! {
    /// Paged decode over rows of codes, token by token: FP8, INT8_T, INT4_T, NVFP4.
    DecodeTokenParams, "kvc_decode_token_params" {
        /// The call. Strides of `k` and `v` are in bytes, multiples of 16. `bulk` is 1 where the rows
        /// of a head and their scales follow each other within a block of a multiple of 16 tokens (8
        /// where a row has more than 128 bytes), and scales begin at multiples of 16 bytes; `stages`,
        /// 2 to 4, is then of tiles of 128 (64) tokens.
        call: DecodeParams,
        /// Scales of the keys of block 0, head 0, token 0: `KvFormat::row_scale_bytes` bytes, of
        /// f16 at an even address; null where the format has none.
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
        /// 1 where keys are stored rotated: queries are then rotated too. Else 0.
        k_rotated: u32,
        /// 1 where values are stored rotated: outputs are then rotated back. Else 0.
        v_rotated: u32,
        /// Byte of shared memory from which the queries lie.
        query_at: u32,
        /// Stages of the pipeline without bulk copies, 2 to 4, in the same shared memory.
        copy_stages: u32,
    }
}

impl CType for DecodeParams {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}
