//! What the kernel that splits a batch for cascade attention is given.

use alloc::string::String;

use super::{CType, DeviceStruct, In, Out};

device_struct! {
    /// Neighbouring sequences of a batch that share a prefix, or none of whose prefixes is used.
    CascadeSegment, "kvc_cascade_segment" {
        /// The first sequence.
        first_seq: u32,
        /// How many; 0 in an entry that only fills the list up, whose `first_seq` is the batch.
        seqs: u32,
        /// Blocks at the start of their tables that all of them share; 0 for none.
        shared_blocks: u32,
        /// Keeps the size a power of two. Zero.
        reserved: u32,
    }
}

device_struct! {
    /// Splits a batch for cascade attention: the shared prefix of each segment becomes a sequence
    /// whose queries are those of the whole segment, and what follows it stays a sequence each.
    CascadeSplitParams, "kvc_cascade_split_params" {
        /// `[segments]`, which cover the sequences in order.
        segments: In<CascadeSegment>,
        /// Tokens of each sequence, those of the queries included; below 1 is empty.
        seq_lens: In<i32>,
        /// First row of each sequence and the end of the last, `[batch + 1]`; null for `q_len` each.
        q_indptr: In<i32>,
        /// Block tables: `[seq][table_stride]`, or the indices of all sequences one after another.
        table: In<i32>,
        /// Where the indices of each sequence begin, `[batch + 1]`; null for a dense table.
        table_indptr: In<i32>,
        /// Tokens of each sequence past the shared prefix, `[batch]`.
        own_lens: Out<i32>,
        /// Where their blocks begin in `table`, `[batch + 1]`.
        own_indptr: Out<i32>,
        /// Tokens of each segment's shared prefix, `[segments]`.
        shared_lens: Out<i32>,
        /// Where its blocks begin in `table`, `[segments + 1]`.
        shared_indptr: Out<i32>,
        /// First row of each segment, `[segments + 1]`.
        shared_rows: Out<i32>,
        /// Raised (bit 0: a table too short, bit 3: tables or lengths do not allow a prefix as long
        /// as its segment says, and it was made shorter), or null.
        error_flag: Out<u32>,
        /// Entries from a sequence to the next in a dense table.
        table_stride: i64,
        /// Entries of `segments`.
        count: u32,
        /// Sequences.
        batch: u32,
        /// Query tokens of a sequence where `q_indptr` is null.
        q_len: u32,
        /// Tokens of a cache block.
        block_tokens: u32,
    }
}

impl CType for CascadeSegment {
    fn declare(field: &str) -> String {
        alloc::format!("{} {field}", Self::C_NAME)
    }
}
