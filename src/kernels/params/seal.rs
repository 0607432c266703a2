//! What the sealing of tiles is given.

use super::{Any, In, Out};

device_struct! {
    /// Seals full raw tiles: a block for each of the list and each KV head.
    SealParams, "kvc_seal_params" {
        /// Keys of raw slot 0, head 0, token 0, bf16. Written in spare slots alone.
        k: Out<Any>,
        /// Values, likewise.
        v: Out<Any>,
        /// Keys of raw slot `staging_blocks`; null without scratch blocks.
        scratch_k: In<Any>,
        /// Values, likewise.
        scratch_v: In<Any>,
        /// Record of block 0, head 0.
        records: Out<Any>,
        /// Raw slot and block of the record, a pair for each tile; blocks are distinct.
        list: In<i32>,
        /// For each tile, 0 before its first layer; else left as it is where all heads are sealed.
        /// Where some head is not: 1; with bit 31, for a tile in scratch where there are spares, 2
        /// and the number of the spare that keeps its rows, or 1 where none was left.
        refused: Out<u32>,
        /// Raw slots below `staging_blocks` for rows of scratch that cannot be sealed, or null.
        spares: In<i32>,
        /// How many of them were asked for, 0 before the first layer; null without spares.
        spares_taken: Out<u32>,
        /// Raised (bit 0: a slot or a block that does not exist), or null.
        error_flag: Out<u32>,
        /// Elements from a block to the next in `k`.
        k_block: i64,
        /// Elements from a head to the next in `k`.
        k_head: i64,
        /// Elements from a token to the next in `k`.
        k_token: i64,
        /// Elements from a block to the next in `v`.
        v_block: i64,
        /// Elements from a head to the next in `v`.
        v_head: i64,
        /// Elements from a token to the next in `v`.
        v_token: i64,
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
        /// Bytes from a block to the next in `records`.
        record_block: i64,
        /// Bytes from a KV head to the next in `records`.
        record_head: i64,
        /// Raw slots in staging; those behind are in scratch.
        staging_blocks: u32,
        /// Raw slots in scratch.
        scratch_blocks: u32,
        /// Blocks of records.
        num_blocks: u32,
        /// KV heads.
        kv_heads: u32,
        /// Tokens of a tile.
        tile_tokens: u32,
        /// Bits of a key's code.
        k_bits: u32,
        /// Bits of a value's code.
        v_bits: u32,
        /// The third word of the header of a sealed record.
        identity: u32,
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
        /// Entries of `spares`.
        spare_count: u32,
    }
}
