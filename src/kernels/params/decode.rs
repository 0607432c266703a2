//! What paged decode and its planning kernel are given.

use alloc::string::String;

use super::{Any, CType, DeviceStruct, In, Out};

device_struct! {
    /// A piece of one sequence's context: what a thread block of the decode kernel works on, once
    /// for each unit (a KV head and up to eight of its query columns).
    DecodeItem, "kvc_decode_item" {
        /// The sequence.
        seq: u32,
        /// First token of the piece.
        begin: u32,
        /// One past its last token.
        end: u32,
        /// Pieces that the sequence has.
        pieces: u32,
        /// Which of them this is.
        piece: u32,
        /// Partial result of the sequence's first piece; meaningless with one piece.
        first_slot: u32,
        /// Index among the sequences that have more than one piece; meaningless with one piece.
        ticket: u32,
        /// Keeps the size a power of two. Zero.
        reserved: u32,
    }
}

device_struct! {
    /// Plans paged decode on the device: cuts the contexts into pieces.
    DecodePlanParams, "kvc_decode_plan_params" {
        /// Tokens of each sequence, those of the queries included; below 1 is empty.
        seq_lens: In<i32>,
        /// `[max_items]`, written from the first.
        items: Out<DecodeItem>,
        /// How many items were written.
        item_count: Out<u32>,
        /// `[max_tickets][units]` counters, zeroed.
        tickets: Out<u32>,
        /// Raised (bit 2) where fixed pieces did not fit the bounds and were made longer, or null.
        error_flag: Out<u32>,
        /// Sequences.
        batch: u32,
        /// Query tokens of each sequence.
        q_len: u32,
        /// Sliding window in tokens; 0 for none.
        window: u32,
        /// Units of an item.
        units: u32,
        /// Tokens of a piece in the deterministic mode, a multiple of 64; 0 to balance.
        fixed_piece: u32,
        /// Fewest tokens of a piece when balancing, a multiple of 64.
        min_piece: u32,
        /// Pieces that balancing aims at, at least 1.
        target_pieces: u32,
        /// Room in `items`: at least `batch + target_pieces`.
        max_items: u32,
        /// Room for partial results: at least `2 * target_pieces`.
        max_slots: u32,
        /// Room for counters: at least `target_pieces`.
        max_tickets: u32,
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
        /// The plan's items.
        items: In<DecodeItem>,
        /// How many items there are.
        item_count: In<u32>,
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
        /// Units of an item: `kv_heads` times the column tiles of a KV head.
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

impl CType for DecodeItem {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}
