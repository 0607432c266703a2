//! Cascade attention: a prefix that several sequences share is attended once for all their queries,
//! then each sequence's own part, then the two are merged.
//!
//! Attention over either half is an ordinary attention call on a view of the batch ([`Half`]): the
//! shared half has a sequence for each [`CascadeSegment`], whose rows are all rows of its members
//! and which needs no causal mask; the own half has the caller's sequences without the prefix. Both
//! write f32 partial results into the workspace. Which prefixes are shared is the host's knowledge;
//! the views are made on the device, once for each change of lengths, so a captured graph can be
//! replayed with other lengths and another list of segments. A host that knows tables and lengths
//! too makes them itself (`cascade_views`), and may cut the shared prefixes into chunks: each is one
//! more partial result, by blocks that the device runs at the same time, of a copy of the queries.
//!
//! Sinks join in the merge, not in the halves. A sliding window or ALiBi needs the distance between
//! a query and a key of the prefix, which the shared half does not have: use plain attention there.
//! Whether a cascade pays is for [`super::cascade_choice`] to say.

use super::params::{CascadeSegment, CascadeSplitParams, In, MergeParams, Out};
use super::{Launch, merge_launch};
use crate::dtype::DType;
use crate::error::{Error, Result};

kernels! {
    SPLIT = "kvc_cascade_split", "kvc_cascade_split_params", 512;
}

/// The largest call that a workspace must serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CascadeBounds {
    /// Query heads, 1 to 65,536.
    pub q_heads: u32,
    /// Channels of a head's output, a multiple of 8.
    pub head_dim: u32,
    /// Most sequences, 1 to 2^20.
    pub batch: u32,
    /// Most query rows of all sequences.
    pub rows: u32,
    /// Entries of the list of segments, fillers included, 1 to 2^20.
    pub segments: u32,
    /// Tokens of a cache block.
    pub block_tokens: u32,
    /// Chunks of a shared prefix, 1 to 64; 1 where the device makes the views.
    pub chunks: u32,
}

/// One half of a cascade as an attention call: device addresses within the workspace. The table is
/// the caller's, read through `table_indptr` whether the caller's is dense or not.
#[derive(Debug, Clone, Copy)]
pub struct Half {
    /// Sequences of the half.
    pub batch: u32,
    /// Tokens of each.
    pub seq_lens: In<i32>,
    /// Where the blocks of each begin in the table.
    pub table_indptr: In<i32>,
    /// First row of each; null in the own half, where it is the caller's.
    pub q_indptr: In<i32>,
    /// Output of the half, f32, `[rows][q_heads][head_dim]`.
    pub out: Out<f32>,
    /// LSE of the half, `[rows][q_heads]`.
    pub lse: Out<f32>,
}

/// What a batch has on the device.
#[derive(Debug, Clone, Copy)]
pub struct CascadeInput {
    /// As many as the bounds say, which cover the sequences in order, as [`super::cascade_choice`]
    /// lists them.
    pub segments: In<CascadeSegment>,
    /// Sequences, at most as many as the bounds have.
    pub batch: u32,
    /// Tokens of each sequence, those of the queries included.
    pub seq_lens: In<i32>,
    /// First row of each sequence, `[batch + 1]`; null for `q_len` each.
    pub q_indptr: In<i32>,
    /// Query tokens of each sequence, where `q_indptr` is null.
    pub q_len: u32,
    /// Block tables, dense or CSR.
    pub table: In<i32>,
    /// Where the indices of each sequence begin; null for a dense table.
    pub table_indptr: In<i32>,
    /// Entries from a sequence to the next in a dense table.
    pub table_stride: i64,
    /// Raised as the kernel's parameters say, or null.
    pub error_flag: Out<u32>,
}

/// Where the merged result goes.
#[derive(Debug, Clone, Copy)]
pub struct CascadeOutput<T> {
    /// Output of row 0, head 0.
    pub out: Out<T>,
    /// Its type.
    pub dtype: DType,
    /// Elements from a row to the next.
    pub row: i64,
    /// Elements from a head to the next.
    pub head: i64,
    /// LSE `[rows][q_heads]`, or null.
    pub lse: Out<f32>,
    /// A logit for each query head that joins the denominator, or null.
    pub sinks: In<f32>,
}

/// The parts of the workspace, in order.
const OWN_LENS: usize = 0;
const OWN_INDPTR: usize = 1;
const SHARED_LENS: usize = 2;
const SHARED_INDPTR: usize = 3;
const SHARED_ROWS: usize = 4;
const LIST: usize = 5;
const OUT: usize = 6;
const LSE: usize = 7;
const QUERIES: usize = 8;
const PARTS: usize = 9;

/// Launches and workspace of a cascade within some bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CascadePlan {
    pub(super) bounds: CascadeBounds,
    offsets: [u64; PARTS],
    workspace_bytes: u64,
}

impl CascadeBounds {
    /// Sequences of the shared half. Between two chunks is an empty one, so that the tables of each
    /// chunk rise.
    pub(super) fn shared_seqs(&self) -> u32 {
        if self.chunks == 1 { self.segments } else { self.chunks * (self.segments + 1) }
    }
}

impl CascadePlan {
    /// Plans for calls within `bounds`.
    ///
    /// # Errors
    /// `InvalidArgument` for bounds outside their documented ranges, `Overflow` where the workspace
    /// does not fit in 64 bits or the rows in 31.
    pub fn new(bounds: CascadeBounds) -> Result<Self> {
        let b = bounds;
        if b.q_heads == 0 || b.q_heads > 1 << 16 || b.batch == 0 || b.batch > 1 << 20 {
            return Err(Error::invalid("q_heads, batch", "must be 1 to 2^16, 1 to 2^20"));
        }
        if b.head_dim == 0 || !b.head_dim.is_multiple_of(8) || b.head_dim > 1024 {
            return Err(Error::invalid("head_dim", "must be a multiple of 8, at most 1024"));
        }
        if b.rows == 0 || b.segments == 0 || b.segments > 1 << 20 || b.block_tokens == 0 {
            return Err(Error::invalid(
                "rows, segments, block_tokens",
                "must be at least 1 (segments at most 2^20)",
            ));
        }
        if b.chunks == 0 || b.chunks > 64 {
            return Err(Error::invalid("chunks", "must be 1 to 64"));
        }
        let overflow = Error::Overflow { what: "cascade workspace" };
        let (batch, chunks) = (u64::from(b.batch), u64::from(b.chunks));
        i32::try_from(u64::from(b.rows) * chunks).map_err(|_| overflow)?;
        let shared = u64::from(b.shared_seqs());
        let lines = u64::from(b.rows) * u64::from(b.q_heads);
        // A part: of f32, as the queries are at most.
        let part = lines.checked_mul(u64::from(b.head_dim) * 4).ok_or(overflow)?;
        let parts = [
            batch * 4,
            (batch + 1) * 4,
            shared * 4,
            (shared + 1) * 4,
            (shared + 1) * 4,
            8,
            part.checked_mul(chunks + 1).ok_or(overflow)?,
            lines * 4 * (chunks + 1),
            if chunks > 1 { part * chunks } else { 0 },
        ];
        let mut offsets = [0; PARTS];
        let mut at: u64 = 0;
        for (offset, bytes) in offsets.iter_mut().zip(parts) {
            *offset = at;
            let end = at.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(256));
            at = end.ok_or(overflow)?;
        }
        Ok(Self { bounds, offsets, workspace_bytes: at })
    }

    /// Bytes of workspace that any call within the bounds needs, from an address that is a multiple
    /// of 256.
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace_bytes
    }

    /// Where the views begin in the workspace, in the order that `cascade_views` writes them: tokens
    /// and tables of the own half, tokens, tables and rows of the shared one, and where they end.
    pub(super) fn view_offsets(&self) -> [u64; 6] {
        [OWN_LENS, OWN_INDPTR, SHARED_LENS, SHARED_INDPTR, SHARED_ROWS, OUT]
            .map(|part| self.offsets[part])
    }

    /// The list and the room for copies of the queries, one a chunk.
    pub(super) fn copies_at(&self, workspace: u64) -> [u64; 2] {
        [LIST, QUERIES].map(|part| workspace + self.offsets[part])
    }

    /// The launch that makes both halves; once for each change of lengths, tables or segments.
    ///
    /// # Errors
    /// `InvalidArgument` where the batch is 0 or past the bounds, `NullPointer` where segments, lengths
    /// or tables are missing, `Overflow` where a dense table has more than 2^31 - 1 entries.
    pub fn split_launch(
        &self,
        workspace: u64,
        input: &CascadeInput,
    ) -> Result<(Launch, CascadeSplitParams)> {
        let (b, i) = (&self.bounds, input);
        if i.batch == 0 || i.batch > b.batch {
            return Err(Error::invalid("batch", "must be 1 to what the plan was made for"));
        }
        if b.chunks != 1 {
            return Err(Error::invalid("chunks", "must be 1 where the device makes the views"));
        }
        if i.segments.0 == 0 || i.seq_lens.0 == 0 || i.table.0 == 0 {
            return Err(Error::NullPointer { what: "segments, seq_lens, table" });
        }
        let rows = u64::from(i.batch) * u64::from(i.q_len);
        if i.q_indptr.0 == 0 && (i.q_len == 0 || rows > u64::from(b.rows)) {
            return Err(Error::invalid("q_len", "must be at least 1, its rows within the bounds"));
        }
        if i.table_indptr.0 == 0 {
            if i.table_stride < 0 {
                return Err(Error::invalid("table_stride", "must not be negative"));
            }
            let entries = i.table_stride.checked_mul(i64::from(i.batch));
            if entries.is_none_or(|n| i32::try_from(n).is_err()) {
                return Err(Error::Overflow { what: "entries of the block table" });
            }
        }
        let at = |part: usize| workspace + self.offsets[part];
        let params = CascadeSplitParams {
            segments: i.segments,
            seq_lens: i.seq_lens,
            q_indptr: i.q_indptr,
            table: i.table,
            table_indptr: i.table_indptr,
            own_lens: Out::at(at(OWN_LENS)),
            own_indptr: Out::at(at(OWN_INDPTR)),
            shared_lens: Out::at(at(SHARED_LENS)),
            shared_indptr: Out::at(at(SHARED_INDPTR)),
            shared_rows: Out::at(at(SHARED_ROWS)),
            error_flag: i.error_flag,
            table_stride: i.table_stride,
            count: b.segments,
            batch: i.batch,
            q_len: i.q_len,
            block_tokens: b.block_tokens,
        };
        let grid = [b.segments, 1, 1];
        Ok((Launch { kernel: &SPLIT, grid, shared_bytes: SPLIT.threads / 32 * 4 }, params))
    }

    /// The shared half: attention without a causal mask, of all rows.
    pub fn shared(&self, workspace: u64) -> Half {
        let at = |part: usize| workspace + self.offsets[part];
        Half {
            batch: self.bounds.shared_seqs(),
            seq_lens: In::at(at(SHARED_LENS)),
            table_indptr: In::at(at(SHARED_INDPTR)),
            q_indptr: In::at(at(SHARED_ROWS)),
            out: Out::at(at(OUT)),
            lse: Out::at(at(LSE)),
        }
    }

    /// The own half of `batch` sequences: the caller's rows, causal where the caller's call is.
    pub fn own(&self, workspace: u64, batch: u32) -> Half {
        let at = |part: usize| workspace + self.offsets[part];
        let lines = u64::from(self.bounds.rows) * u64::from(self.bounds.q_heads);
        let lines = lines * u64::from(self.bounds.chunks);
        Half {
            batch,
            seq_lens: In::at(at(OWN_LENS)),
            table_indptr: In::at(at(OWN_INDPTR)),
            q_indptr: In::NULL,
            out: Out::at(at(OUT) + lines * u64::from(self.bounds.head_dim) * 4),
            lse: Out::at(at(LSE) + lines * 4),
        }
    }

    /// The launch that merges the halves of `rows` rows.
    ///
    /// # Errors
    /// `InvalidArgument` where `rows` is past the bounds, and those of [`merge_launch`].
    pub fn merge_launch<T>(
        &self,
        workspace: u64,
        rows: u32,
        to: &CascadeOutput<T>,
        multiprocessors: u32,
    ) -> Result<Option<(Launch, MergeParams)>> {
        let b = &self.bounds;
        if rows > b.rows {
            return Err(Error::invalid("rows", "must be at most what the plan was made for"));
        }
        let (heads, dim) = (i64::from(b.q_heads), i64::from(b.head_dim));
        let lines = i64::from(b.rows) * heads;
        let shared = self.shared(workspace);
        let params = MergeParams {
            parts: In::at(shared.out.0),
            lse: In::at(shared.lse.0),
            out: Out::at(to.out.0),
            out_lse: to.lse,
            sinks: to.sinks,
            part: lines * dim,
            row: heads * dim,
            head: dim,
            lse_part: lines,
            lse_row: heads,
            lse_head: 1,
            out_row: to.row,
            out_head: to.head,
            out_lse_row: heads,
            out_lse_head: 1,
            count: b.chunks + 1,
            rows,
            heads: b.q_heads,
            dim: b.head_dim,
            part_dtype: DType::F32.id(),
            out_dtype: to.dtype.id(),
        };
        Ok(merge_launch(&params, multiprocessors)?.map(|launch| (launch, params)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> CascadeBounds {
        CascadeBounds {
            q_heads: 32,
            head_dim: 128,
            batch: 64,
            rows: 64,
            segments: 9,
            block_tokens: 16,
            chunks: 1,
        }
    }

    fn input() -> CascadeInput {
        CascadeInput {
            segments: In::at(128),
            batch: 64,
            seq_lens: In::at(256),
            q_indptr: In::NULL,
            q_len: 1,
            table: In::at(512),
            table_indptr: In::NULL,
            table_stride: 100,
            error_flag: Out::NULL,
        }
    }

    #[test]
    fn the_parts_of_the_workspace_do_not_overlap() {
        let plan = CascadePlan::new(sound()).unwrap();
        let base = 1 << 20;
        let (shared, own) = (plan.shared(base), plan.own(base, 64));
        assert_eq!(own.out.0 - shared.out.0, 64 * 32 * 128 * 4);
        assert_eq!(own.lse.0 - shared.lse.0, 64 * 32 * 4);
        assert_eq!(shared.lse.0, own.out.0 + 64 * 32 * 128 * 4);
        assert_eq!(plan.workspace_bytes(), own.lse.0 + 64 * 32 * 4 - base);
        let (launch, p) = plan.split_launch(base, &input()).unwrap();
        assert_eq!(launch.grid, [9, 1, 1]);
        let mut ends = [
            (p.own_lens.0, 64 * 4),
            (p.own_indptr.0, 65 * 4),
            (p.shared_lens.0, 9 * 4),
            (p.shared_indptr.0, 10 * 4),
            (p.shared_rows.0, 10 * 4),
            (shared.out.0, 0),
        ];
        ends.sort_unstable();
        assert!(ends.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "{ends:?}");
    }

    #[test]
    fn bounds_outside_the_ranges_are_refused() {
        for bad in [
            CascadeBounds { q_heads: 0, ..sound() },
            CascadeBounds { q_heads: 1 << 17, ..sound() },
            CascadeBounds { head_dim: 12, ..sound() },
            CascadeBounds { batch: 0, ..sound() },
            CascadeBounds { rows: 0, ..sound() },
            CascadeBounds { rows: 1 << 31, ..sound() },
            CascadeBounds { segments: 0, ..sound() },
            CascadeBounds { block_tokens: 0, ..sound() },
            CascadeBounds { chunks: 0, ..sound() },
            CascadeBounds { chunks: 65, ..sound() },
            CascadeBounds { chunks: 64, rows: 1 << 25, ..sound() },
        ] {
            assert!(CascadePlan::new(bad).is_err(), "{bad:?}");
        }
        let plan = CascadePlan::new(sound()).unwrap();
        for bad in [
            CascadeInput { batch: 0, ..input() },
            CascadeInput { batch: 65, ..input() },
            CascadeInput { q_len: 0, ..input() },
            CascadeInput { q_len: 2, ..input() },
            CascadeInput { table: In::NULL, ..input() },
            CascadeInput { segments: In::NULL, ..input() },
            CascadeInput { seq_lens: In::NULL, ..input() },
            CascadeInput { table_stride: -1, ..input() },
            CascadeInput { table_stride: 1 << 26, ..input() },
        ] {
            assert!(plan.split_launch(0, &bad).is_err(), "{bad:?}");
        }
        let to = CascadeOutput::<f32> {
            out: Out::at(16),
            dtype: DType::F32,
            row: 32 * 128,
            head: 128,
            lse: Out::NULL,
            sinks: In::NULL,
        };
        assert!(plan.merge_launch(0, 65, &to, 1).is_err());
        assert!(plan.merge_launch(256, 64, &to, 1).unwrap().is_some());
    }
}
