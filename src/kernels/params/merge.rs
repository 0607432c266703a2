//! What the kernel that merges partial attention results is given.

use super::{Any, In, Out};

device_struct! {
    /// Merges attention over disjoint sets of keys: the outputs of each set, normalised, with the
    /// logarithms of their denominators.
    MergeParams, "kvc_merge_params" {
        /// Output of part 0, row 0, head 0.
        parts: In<Any>,
        /// Its LSE (natural logarithm); a part that saw no key has -inf, and is not read.
        lse: In<f32>,
        /// Merged output of row 0, head 0; must not overlap `parts`.
        out: Out<Any>,
        /// Its LSE, or null; must not overlap `lse`.
        out_lse: Out<f32>,
        /// A logit for each head that joins the denominator, or null.
        sinks: In<f32>,
        /// Elements from a part to the next in `parts`. Of two parts that were allocated apart it is
        /// the difference of their addresses.
        part: i64,
        /// Elements from a row to the next in `parts`.
        row: i64,
        /// Elements from a head to the next in `parts`.
        head: i64,
        /// Elements from a part to the next in `lse`.
        lse_part: i64,
        /// Elements from a row to the next in `lse`.
        lse_row: i64,
        /// Elements from a head to the next in `lse`.
        lse_head: i64,
        /// Elements from a row to the next in `out`.
        out_row: i64,
        /// Elements from a head to the next in `out`.
        out_head: i64,
        /// Elements from a row to the next in `out_lse`.
        out_lse_row: i64,
        /// Elements from a head to the next in `out_lse`.
        out_lse_head: i64,
        /// How many parts.
        count: u32,
        /// Rows.
        rows: u32,
        /// Heads of a row.
        heads: u32,
        /// Channels of a head, a multiple of 8.
        dim: u32,
        /// Type id of `parts`.
        part_dtype: u32,
        /// Type id of `out`.
        out_dtype: u32,
    }
}
