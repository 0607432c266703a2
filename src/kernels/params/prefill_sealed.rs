//! What chunked prefill over sealed tiles is given.

use super::{Any, In, PrefillParams};

device_struct! {
    /// Chunked prefill over sealed tiles and the raw ones of the same sequences. Causal.
    PrefillSealedParams, "kvc_prefill_sealed_params" {
        /// The call. Its table and `num_blocks` are those of the records; `k`, `v` and their
        /// strides, in elements, those of the staged raw rows, bf16. `block_tokens` is
        /// `tile_tokens`.
        call: PrefillParams,
        /// Record of block 0, head 0.
        records: In<Any>,
        /// `[batch + 1]` offsets into `raw_blocks`, never decreasing.
        raw_indptr: In<i32>,
        /// Tile of the sequence and raw slot, a pair each, tiles ascending: every tile that holds a
        /// query, and every earlier one whose record is not sealed.
        raw_blocks: In<i32>,
        /// Keys of raw slot `staging_blocks`, head 0, token 0, bf16; null without scratch blocks.
        scratch_k: In<Any>,
        /// Values, likewise.
        scratch_v: In<Any>,
        /// Bytes from a block to the next in `records`.
        record_block: i64,
        /// Bytes from a KV head to the next in `records`.
        record_head: i64,
        /// Elements from a block to the next in `scratch_k`.
        scratch_k_block: i64,
        /// Elements from a head to the next in `scratch_k`.
        scratch_k_head: i64,
        /// Elements from a token to the next in `scratch_k`.
        scratch_k_token: i64,
        /// Elements from a block to the next in `scratch_v`.
        scratch_v_block: i64,
        /// Elements from a head to the next in `scratch_v`.
        scratch_v_head: i64,
        /// Elements from a token to the next in `scratch_v`.
        scratch_v_token: i64,
        /// Raw slots in staging; those behind are in scratch.
        staging_blocks: u32,
        /// Raw slots in scratch.
        scratch_blocks: u32,
        /// Tokens of a tile: 64 or 128.
        tile_tokens: u32,
        /// What the header of a sealed record says of its format and tokens: its third word.
        identity: u32,
        /// Bits of a key's code: 8, 4, 3 or 2.
        k_bits: u32,
        /// Bits of a value's code.
        v_bits: u32,
        /// Byte of a record from which the third bits of keys lie.
        k_plane_at: u32,
        /// The codes of values.
        v_codes_at: u32,
        /// The third bits of values.
        v_plane_at: u32,
        /// The steps of key channels.
        k_steps_at: u32,
        /// The middles of key channels.
        k_mids_at: u32,
        /// The scales of value rows.
        v_scales_at: u32,
        /// The header.
        header_at: u32,
        /// 1 where sealed values are rotated. Else 0.
        v_rotated: u32,
    }
}
