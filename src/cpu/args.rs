//! What the caller of the kernels hands over: raw pointers, strides, tables, and their checks.
//!
//! Everything that can be checked without reading the cache is checked here, before any kernel
//! runs; what cannot (that pointers point at what they say) is the contract of the `unsafe` entry
//! points. No kernel code here.

use core::sync::atomic::AtomicU32;

use super::scales::{ScaleView, stride_bytes};
use crate::attention::{HeadShape, Scoring};
use crate::dtype::{DType, FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::{GroupLayout, Strides, check_quantized_dims};

/// The K and V of one layer: `num_blocks` blocks of `block_tokens` rows for each KV head.
///
/// Element `(block, head, token, channel)` of K lies at
/// `k + block * strides.block + head * strides.head + token * strides.token + channel`, in
/// elements of `format`; channels are contiguous. Native layout, NHD and HND are all of this form.
/// Strides of a quantised format are in bytes, and a row is the `KvFormat::row_bytes` bytes of its
/// codes; [`ScaleView`] says where its scales are.
#[derive(Debug, Clone, Copy)]
pub struct KvView {
    /// Keys.
    pub k: *mut u8,
    /// Values. Not read where values lie in keys.
    pub v: *mut u8,
    /// How both are stored.
    pub format: KvFormat,
    /// Strides of the keys, in elements (bytes of codes).
    pub k_strides: Strides,
    /// Strides of the values, in elements (bytes of codes). Not read where values lie in keys.
    pub v_strides: Strides,
    /// Blocks that exist.
    pub num_blocks: u32,
    /// Tokens of a block: any number from 1.
    pub block_tokens: u32,
    /// Scales of a quantised format; [`ScaleView::NONE`] for floats.
    pub scales: ScaleView,
}

/// Which blocks hold each sequence. Entry `i` of a sequence is the block of its tokens
/// `i * block_tokens ..`; entries past the sequence's length are never read.
#[derive(Debug, Clone, Copy)]
pub enum BlockTables {
    /// A matrix: row `s` starts at `table + s * stride`.
    Dense {
        /// `[seqs][stride]` block ids.
        table: *const i32,
        /// Entries from one sequence's row to the next, and so the most that one may have; 0 where
        /// all read the same row.
        stride: i64,
    },
    /// Compressed rows: sequence `s` has `indices[indptr[s] .. indptr[s + 1]]`.
    Csr {
        /// `[seqs + 1]` offsets, never decreasing, the first at least 0.
        indptr: *const i32,
        /// Block ids.
        indices: *const i32,
    },
}

/// Dense rows of `[token][head][channel]`, channels contiguous.
#[derive(Debug, Clone, Copy)]
pub struct RowsView {
    /// Row of token 0, head 0.
    pub ptr: *mut u8,
    /// Element type.
    pub dtype: DType,
    /// Elements from a token to the next.
    pub token_stride: i64,
    /// Elements from a head to the next.
    pub head_stride: i64,
}

impl RowsView {
    /// Contiguous rows: `heads` heads of `dim` channels a token.
    pub fn contiguous(ptr: *mut u8, dtype: DType, heads: u32, dim: u32) -> Self {
        Self {
            ptr,
            dtype,
            token_stride: i64::from(heads) * i64::from(dim),
            head_stride: i64::from(dim),
        }
    }
}

/// One batched attention call over ragged sequences.
///
/// Sequence `s` has the query tokens `q_indptr[s] .. q_indptr[s + 1]` of `q` and `kv_lens[s]`
/// cached tokens, those of its queries included.
#[derive(Debug, Clone, Copy)]
pub struct AttendArgs<'a> {
    /// Heads and channels.
    pub shape: HeadShape,
    /// How scores are made.
    pub scoring: Scoring<'a>,
    /// The cache.
    pub kv: KvView,
    /// Where each sequence lies in it.
    pub tables: BlockTables,
    /// Sequences in the batch.
    pub seqs: u32,
    /// `[seqs + 1]` offsets of query tokens, the first at least 0, never decreasing.
    pub q_indptr: *const i32,
    /// `[seqs]` cached tokens, at least 0.
    pub kv_lens: *const i32,
    /// Queries, `q_heads` rows of `k_dim` a token. Only read.
    pub q: RowsView,
    /// Outputs, `q_heads` rows of `v_dim` a token. Must overlap nothing that the call reads.
    pub out: RowsView,
    /// `[query tokens][q_heads]` natural logarithms of the softmax denominators, or NULL.
    pub lse: *mut f32,
    /// Raised (set to 1) where a block table held an entry below 0 or not below `num_blocks`;
    /// the keys of such a block are masked and never read.
    pub bad_block: Option<&'a AtomicU32>,
}

// SAFETY: the pointers are only followed inside `unsafe` entry points, whose contract makes what
// they point at readable (outputs: writable, disjoint per unit) from every worker of the call.
unsafe impl Send for AttendArgs<'_> {}
// SAFETY: as above.
unsafe impl Sync for AttendArgs<'_> {}

/// The rows of one sequence of a batch, as validated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sequence {
    /// First query token.
    pub q_start: u32,
    /// Query tokens.
    pub q_tokens: u32,
    /// Cached tokens.
    pub kv_len: u32,
    /// Its block table.
    pub table: *const i32,
}

/// NULL and alignment of a pointer to `align`-byte elements.
pub(crate) fn check_ptr(what: &'static str, ptr: *const u8, align_bytes: u32) -> Result<()> {
    if ptr.is_null() {
        return Err(Error::NullPointer { what });
    }
    if !ptr.addr().is_multiple_of(align_bytes as usize) {
        return Err(Error::Misaligned { what, align_bytes });
    }
    Ok(())
}

/// Largest byte distance `|stride| * count * bytes`, so that no address computation overflows.
pub(super) fn check_span(what: &'static str, stride: i64, count: u32, bytes: u32) -> Result<i64> {
    stride
        .checked_abs()
        .and_then(|s| s.checked_mul(i64::from(count)))
        .and_then(|s| s.checked_mul(i64::from(bytes)))
        .filter(|&s| s <= i64::MAX >> 3)
        .ok_or(Error::Overflow { what })
}

/// The kernels of this module read and write rows: of floats, and of codes stored token by token.
pub(crate) fn check_format(format: KvFormat) -> Result<()> {
    match format.class() {
        FormatClass::Float | FormatClass::Token => Ok(()),
        FormatClass::Tile => Err(Error::Unsupported { what: "sealed tiles by the CPU kernels" }),
    }
}

impl KvView {
    /// The K and V of `layer` in `num_blocks` blocks of `layout` from `memory` on, every head with
    /// the scale 1.
    ///
    /// # Errors
    /// `InvalidArgument` for a layer that the layout does not have.
    pub fn native(
        layout: &GroupLayout,
        memory: *mut u8,
        num_blocks: u32,
        layer: u32,
    ) -> Result<Self> {
        let spec = layout.spec();
        if layer >= spec.layers {
            return Err(Error::invalid("layer", "is not in the group"));
        }
        // The offsets are below one block's bytes, which are there or are not read.
        let at = |bytes: u64| memory.wrapping_add(bytes as usize);
        Ok(Self {
            k: at(layout.k_offset(layer)),
            v: at(layout.v_offset(layer)),
            format: spec.format,
            k_strides: layout.k_strides(),
            v_strides: layout.v_strides(),
            num_blocks,
            block_tokens: layout.block_tokens(),
            scales: ScaleView {
                k: at(layout.k_scale_offset(layer)),
                v: at(layout.v_scale_offset(layer)),
                k_strides: layout.k_scale_strides(),
                v_strides: layout.v_scale_strides(),
                ..ScaleView::NONE
            },
        })
    }

    /// Checks pointers, sizes and strides for `shape`.
    ///
    /// # Safety
    /// Head scales that are not NULL or misaligned must be readable.
    pub(crate) unsafe fn check(&self, shape: &HeadShape) -> Result<()> {
        check_format(self.format)?;
        if self.block_tokens == 0 {
            return Err(Error::invalid("block_tokens", "must be at least 1"));
        }
        if self.num_blocks > i32::MAX as u32 {
            return Err(Error::invalid("num_blocks", "must fit in 31 bits"));
        }
        let bytes = stride_bytes(self.format);
        let side = |what, ptr: *mut u8, strides: Strides| {
            if self.num_blocks != 0 {
                check_ptr(what, ptr, bytes)?;
            }
            check_span("KV block stride", strides.block, self.num_blocks, bytes)?;
            check_span("KV head stride", strides.head, shape.kv_heads, bytes)?;
            check_span("KV token stride", strides.token, self.block_tokens, bytes).map(|_| ())
        };
        side("k", self.k, self.k_strides)?;
        if !shape.v_in_k {
            side("v", self.v, self.v_strides)?;
        }
        if self.format.is_float() {
            return Ok(());
        }
        check_quantized_dims(shape.k_dim, shape.v_dim, shape.v_in_k)?;
        // SAFETY: the caller's promise.
        unsafe { self.scales.check(self, shape) }
    }
}

impl RowsView {
    /// Checks pointer and strides for `tokens` tokens of `heads` heads.
    pub(crate) fn check(&self, what: &'static str, tokens: u32, heads: u32) -> Result<()> {
        let bytes = self.dtype.bytes();
        if tokens != 0 {
            check_ptr(what, self.ptr, bytes)?;
        }
        check_span(what, self.token_stride, tokens, bytes)?;
        check_span(what, self.head_stride, heads, bytes).map(|_| ())
    }

    /// Address of one row.
    #[inline(always)]
    pub(crate) fn row(&self, token: u32, head: u32) -> *mut u8 {
        let elements = i64::from(token) * self.token_stride + i64::from(head) * self.head_stride;
        self.ptr.wrapping_offset((elements * i64::from(self.dtype.bytes())) as isize)
    }
}

impl BlockTables {
    pub(crate) fn check(&self) -> Result<()> {
        match *self {
            BlockTables::Dense { table, .. } => check_ptr("table", table.cast(), 4),
            BlockTables::Csr { indptr, indices } => {
                check_ptr("table indptr", indptr.cast(), 4)?;
                check_ptr("table indices", indices.cast(), 4)
            }
        }
    }

    /// The table of sequence `s`, checked to hold `blocks` entries where that can be told.
    ///
    /// # Safety
    /// `indptr` of a CSR table must have `s + 2` readable entries.
    pub(crate) unsafe fn of(&self, s: u32, blocks: u32) -> Result<*const i32> {
        match *self {
            BlockTables::Dense { table, stride } => {
                // Past it lies another sequence's row, or nothing.
                if stride != 0 && u64::from(blocks) > stride.unsigned_abs() {
                    return Err(Error::invalid(
                        "kv_lens",
                        "must not need more than table_stride blocks",
                    ));
                }
                let offset = check_span("table stride", stride, s, 4)? / 4;
                let offset = if stride < 0 { -offset } else { offset };
                Ok(table.wrapping_offset(offset as isize))
            }
            BlockTables::Csr { indptr, indices } => {
                // SAFETY: the caller's promise.
                let (from, to) = unsafe { (*indptr.add(s as usize), *indptr.add(s as usize + 1)) };
                if from < 0 || to < from {
                    return Err(Error::invalid("table indptr", "must never decrease from 0"));
                }
                if i64::from(to) - i64::from(from) < i64::from(blocks) {
                    return Err(Error::invalid("table indptr", "leaves too few blocks for kv_len"));
                }
                Ok(indices.wrapping_add(from as usize))
            }
        }
    }
}

impl AttendArgs<'_> {
    /// Checks all that can be checked without reading K, V and Q.
    ///
    /// # Safety
    /// `q_indptr`, `kv_lens`, a CSR `indptr` and head scales must be readable to their documented
    /// lengths (or NULL or misaligned, which is an error where they are needed).
    pub(crate) unsafe fn check(&self) -> Result<()> {
        self.shape.check()?;
        self.scoring.check(self.shape.q_heads)?;
        // SAFETY: the caller's promise.
        unsafe { self.kv.check(&self.shape) }?;
        check_ptr("q_indptr", self.q_indptr.cast(), 4)?;
        if self.seqs == 0 {
            return Ok(());
        }
        check_ptr("kv_lens", self.kv_lens.cast(), 4)?;
        self.tables.check()?;
        if !self.lse.is_null() {
            check_ptr("lse", self.lse.cast_const().cast(), 4)?;
        }
        // SAFETY: the caller's promise; `seqs` entries are read.
        let total = unsafe { *self.q_indptr.add(self.seqs as usize) };
        let total = u32::try_from(total)
            .map_err(|_| Error::invalid("q_indptr", "must never decrease from 0"))?;
        self.q.check("q", total, self.shape.q_heads)?;
        self.out.check("out", total, self.shape.q_heads)?;
        for s in 0..self.seqs {
            // SAFETY: the caller's promise.
            unsafe { self.sequence(s) }?;
        }
        Ok(())
    }

    /// The rows and the table of sequence `s`.
    ///
    /// # Safety
    /// As for [`check`](Self::check), and `s` must be below `seqs`.
    pub(crate) unsafe fn sequence(&self, s: u32) -> Result<Sequence> {
        let i = s as usize;
        // SAFETY: the caller's promise.
        let (from, to, kv_len) =
            unsafe { (*self.q_indptr.add(i), *self.q_indptr.add(i + 1), *self.kv_lens.add(i)) };
        if from < 0 || to < from {
            return Err(Error::invalid("q_indptr", "must never decrease from 0"));
        }
        if kv_len < 0 {
            return Err(Error::invalid("kv_lens", "must be at least 0"));
        }
        let (q_tokens, kv_len) = ((to - from) as u32, kv_len as u32);
        if q_tokens > kv_len && kv_len != 0 && self.scoring.causal {
            return Err(Error::invalid("kv_lens", "must count the sequence's query tokens"));
        }
        // SAFETY: the caller's promise.
        let table = unsafe { self.tables.of(s, kv_len.div_ceil(self.kv.block_tokens)) }?;
        Ok(Sequence { q_start: from as u32, q_tokens, kv_len, table })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_needs_no_more_blocks_than_its_row_of_the_table_has() {
        let table = [0; 12];
        let base = table.as_ptr();
        let dense = |stride| BlockTables::Dense { table: base, stride };
        // SAFETY: rows are computed, nothing is read.
        let of = |tables: BlockTables, s, blocks| unsafe { tables.of(s, blocks) };
        assert_eq!(of(dense(4), 2, 4), Ok(base.wrapping_add(8)));
        assert_eq!(of(dense(-4), 1, 4), Ok(base.wrapping_sub(4)));
        for stride in [4, -4] {
            let error = of(dense(stride), 0, 5).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
        }
        // One row for all: nobody says how long it is.
        assert_eq!(of(dense(0), 2, 5), Ok(base));
        let indptr = [0, 3, 4];
        let csr = BlockTables::Csr { indptr: indptr.as_ptr(), indices: base };
        assert_eq!(of(csr, 1, 1), Ok(base.wrapping_add(3)));
        assert!(matches!(of(csr, 1, 2), Err(Error::InvalidArgument { .. })));
    }
}
