//! What multi-head latent attention decode is given. Its plan is that of paged decode.

use super::{Any, DecodeHead, DecodeRange, DecodeSpan, In, Out};

device_struct! {
    /// Latent attention: 1 to 8 query tokens of each sequence over its cached latents of 576
    /// channels, whose first 512 are the values.
    MlaParams, "kvc_mla_params" {
        /// Queries: row, then head, then 576 channels; rounded to the cache's type.
        q: In<Any>,
        /// Latents of block 0, token 0.
        k: In<Any>,
        /// Outputs: row, then head, then 512 channels.
        out: Out<Any>,
        /// Natural logarithms of the denominators `[row][q_heads]`, or null.
        lse: Out<f32>,
        /// Rows of each sequence, `[batch + 1]`, at most `q_len` each; null for `q_len` each.
        q_indptr: In<i32>,
        /// Block tables: `[seq][table_stride]`, or the indices of all sequences one after another.
        table: In<i32>,
        /// Where the indices of each sequence begin, `[batch + 1]`; null for a dense table.
        table_indptr: In<i32>,
        /// Tokens of each sequence, those of the queries included; below 1 is empty.
        seq_lens: In<i32>,
        /// The plan's summary.
        head: Out<DecodeHead>,
        /// The plan's ranges.
        ranges: In<DecodeRange>,
        /// The plan's spans.
        spans: In<DecodeSpan>,
        /// The plan's counters: zero before the call, and after it.
        tickets: Out<u32>,
        /// Partial results: `[slot][unit][columns][512]`, then `[slot][unit][columns]` of their
        /// logarithms to base two, with the columns of the kernel.
        partial: Out<f32>,
        /// Raised (bit 0: a block id outside the pool or a table too short, bit 1: a sequence of
        /// more than `q_len` rows), or null.
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
        /// Elements from a token to the next in `k`.
        k_token: i64,
        /// Entries from a sequence to the next in a dense table.
        table_stride: i64,
        /// Query tokens of a sequence, at most.
        q_len: u32,
        /// 1 where a query sees no key after its own position, else 0.
        causal: u32,
        /// Query heads.
        q_heads: u32,
        /// Units of a range: query columns over the columns of the kernel, rounded up.
        units: u32,
        /// Tokens of a cache block.
        block_tokens: u32,
        /// Blocks that exist.
        num_blocks: u32,
        /// Sliding window in tokens; 0 for none.
        window: u32,
        /// Slots that `partial` has room for.
        max_slots: u32,
        /// Type id of `q`.
        q_dtype: u32,
        /// Type id of `out`.
        out_dtype: u32,
        /// Factor of the dot products.
        scale: f32,
        /// Keeps the size a multiple of 8. Zero.
        reserved: u32,
    }
}
