//! What paged decode and its planning kernel are given.

use alloc::string::String;

use super::{Any, CType, DeviceStruct, In, Out};

device_struct! {
    /// Where a range of work begins: what a thread block of the decode kernel works on at a time,
    /// once for each unit (a KV head and up to eight of its query columns). It ends where the next
    /// begins, perhaps several sequences later.
    DecodeRange, "kvc_decode_range" {
        /// The sequence.
        seq: u32,
        /// Tokens of its span before the range.
        offset: u32,
        /// The range's first token.
        begin: u32,
        /// One past the last token of the sequence.
        end: u32,
    }
}

device_struct! {
    /// What a plan says of a sequence.
    DecodeSpan, "kvc_decode_span" {
        /// First token that any of its queries can see.
        begin: u32,
        /// One past the last.
        end: u32,
        /// The range that its first token lies in.
        first: u32,
        /// The range that its last token lies in.
        last: u32,
    }
}

device_struct! {
    /// What a plan says of all.
    DecodeHead, "kvc_decode_head" {
        /// Ranges. One more is written: its sequence is the number of sequences.
        ranges: u32,
        /// Partial results that a range can have: 1, or 2 where it can hold the end of a sequence
        /// and the beginning of another.
        slots: u32,
        /// Ranges that blocks have taken after their first; zero before a call, and after it.
        taken: u32,
        /// Blocks that are done with a call; zero before it, and after it.
        done: u32,
    }
}

device_struct! {
    /// Plans paged decode on the device: cuts the contexts into ranges.
    DecodePlanParams, "kvc_decode_plan_params" {
        /// Tokens of each sequence, those of the queries included; below 1 is empty.
        seq_lens: In<i32>,
        /// Written whole.
        head: Out<DecodeHead>,
        /// `[max_ranges + 1]`, written from the first.
        ranges: Out<DecodeRange>,
        /// `[batch]`.
        spans: Out<DecodeSpan>,
        /// `[max_ranges][units]` counters, zeroed as far as there are ranges.
        tickets: Out<u32>,
        /// Raised (bit 2) where fixed pieces did not fit the bounds and were made longer, or null.
        error_flag: Out<u32>,
        /// Sequences.
        batch: u32,
        /// Query tokens of each sequence.
        q_len: u32,
        /// Sliding window in tokens; 0 for none.
        window: u32,
        /// Units of a range.
        units: u32,
        /// Tokens of a piece in the deterministic mode, a multiple of 64; 0 to balance.
        fixed_piece: u32,
        /// Tokens that ranges are multiples of when balancing, a multiple of 64.
        granule: u32,
        /// Ranges that are there at the beginning when balancing, at least 1.
        longs: u32,
        /// Sequences of rows at positions between two multiples of this: what their window hides
        /// follows from its first; 0 for that of the first of `q_len` rows.
        row_span: u32,
        /// Keeps the size a multiple of 8. Zero.
        reserved: u32,
        /// Room in `ranges`: at least `2 * longs` when balancing, whose rest is for short ones,
        /// else at least `batch`.
        max_ranges: u32,
    }
}

device_struct! {
    /// Paged decode: attention of 1 to 8 query tokens of each sequence over its cached context.
    DecodeParams, "kvc_decode_params" {
        /// Queries: row, then head, then `head_dim` channels; rounded to the cache's type.
        q: In<Any>,
        /// Keys of block 0, head 0, token 0.
        k: In<Any>,
        /// Values of block 0, head 0, token 0.
        v: In<Any>,
        /// Outputs, rows as in `q`.
        out: Out<Any>,
        /// Natural logarithms of the denominators `[row][q_heads]`, or null.
        lse: Out<f32>,
        /// Rows of each sequence, `[batch + 1]`, at most `q_len` each; null for `q_len` each.
        q_indptr: In<i32>,
        /// For each row of `q` the tokens of its sequence's tail that it sees, or null; with it
        /// `causal` means nothing. The tail is the last tokens of a sequence, those of its rows:
        /// bit `j` is the token of its row `j`, bits past its rows mean nothing. All tokens before
        /// the tail are seen. For a tree, a row has the bits of its path, its own included: its
        /// position, and that of its token, for window and ALiBi is then that in its path (as many
        /// places into the tail as it has bits, less one; the tail's first without any).
        tail_mask: In<u32>,
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
        /// The plan's summary.
        head: Out<DecodeHead>,
        /// The plan's ranges.
        ranges: In<DecodeRange>,
        /// The plan's spans.
        spans: In<DecodeSpan>,
        /// The plan's counters: zero before the call, and after it.
        tickets: Out<u32>,
        /// Partial results: `[slot][unit][8][head_dim]`, then `[slot][unit][8]` of their LSE.
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
        /// Query tokens of a sequence, at most.
        q_len: u32,
        /// 1 where a query sees no key after its own position, else 0.
        causal: u32,
        /// Query heads.
        q_heads: u32,
        /// KV heads.
        kv_heads: u32,
        /// Units of a range: `kv_heads` times the column tiles of a KV head.
        units: u32,
        /// Tokens of a cache block.
        block_tokens: u32,
        /// Blocks that exist.
        num_blocks: u32,
        /// Sliding window in tokens; 0 for none.
        window: u32,
        /// Slots that `partial` has room for.
        max_slots: u32,
        /// Stages of the pipeline, 1 to 3.
        stages: u32,
        /// 1 where the rows of a head follow each other within a block of a multiple of 8 tokens,
        /// so that eight are one run: devices that have bulk copies then use them. Else 0.
        bulk: u32,
        /// Keeps the size a multiple of 8. Zero.
        reserved: u32,
        /// Type id of `q`.
        q_dtype: u32,
        /// Type id of `out`.
        out_dtype: u32,
        /// Factor of the dot products.
        scale: f32,
        /// Logit soft-cap; 0 for none.
        softcap: f32,
    }
}

impl CType for DecodeRange {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}

impl CType for DecodeSpan {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}

impl CType for DecodeHead {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}
