//! What chunked prefill is given.

use super::{Any, In, Out};

device_struct! {
    /// Chunked prefill: attention of the query tokens of each sequence over its cached context,
    /// their own keys and values included.
    PrefillParams, "kvc_prefill_params" {
        /// Queries: row, then head, then `head_dim` channels; rounded to the cache's type. Rows
        /// of a head begin at multiples of 16 bytes.
        q: In<Any>,
        /// Keys of block 0, head 0, token 0.
        k: In<Any>,
        /// Values of block 0, head 0, token 0.
        v: In<Any>,
        /// Outputs, rows as in `q`.
        out: Out<Any>,
        /// Natural logarithms of the denominators `[row][q_heads]`, or null.
        lse: Out<f32>,
        /// First row of each sequence and the end of the last, `[batch + 1]`, ascending from 0.
        q_indptr: In<i32>,
        /// Block tables: `[seq][table_stride]`, or the indices of all sequences one after another.
        table: In<i32>,
        /// Where the indices of each sequence begin, `[batch + 1]`; null for a dense table.
        table_indptr: In<i32>,
        /// Tokens of each sequence, those of the queries included; below 1 is empty.
        seq_lens: In<i32>,
        /// A logit for each query head that joins the denominator, or null.
        sinks: In<f32>,
        /// ALiBi slope of each query head, or null.
        slopes: In<f32>,
        /// Raised (bit 0: a block id outside the pool or a table too short, bit 1: row offsets
        /// that do not ascend or end past `q_tokens`), or null.
        error_flag: Out<u32>,
        /// Elements from a row to the next in `q`.
        q_row: i64,
        /// Elements from a head to the next in `q`.
        q_head: i64,
        /// Elements from a row to the next in `out`.
        out_row: i64,
        /// Elements from a head to the next in `out`.
        out_head: i64,
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
        /// Entries from a sequence to the next in a dense table.
        table_stride: i64,
        /// Sequences.
        batch: u32,
        /// Rows of all sequences, at most.
        q_tokens: u32,
        /// 1 where a query sees no key after its own position, else 0.
        causal: u32,
        /// Query heads.
        q_heads: u32,
        /// KV heads.
        kv_heads: u32,
        /// Tokens of a cache block.
        block_tokens: u32,
        /// Blocks that exist.
        num_blocks: u32,
        /// Sliding window in tokens; 0 for none, which the kernel gets as 2^31 - 1.
        window: u32,
        /// Type id of `q`.
        q_dtype: u32,
        /// Type id of `out`.
        out_dtype: u32,
        /// Factor of the dot products.
        scale: f32,
        /// Logit soft-cap; 0 for none.
        softcap: f32,
        /// What turns `scores` into powers of two. Set by the launch.
        factor: f32,
        /// 1 where scores are more than dot products times a positive factor, else 0. Set by the
        /// launch.
        transform: u32,
    }
}
