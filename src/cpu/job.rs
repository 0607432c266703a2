//! One unit of attention work, as kernels see it.
//!
//! A [`Job`] is one sequence, one KV head (or several, for decode), a run of query tokens and a
//! range of keys. The kernel
//! turns it into softmax states, one a query row; the driver merges the states of all key ranges,
//! applies sinks, normalises and writes. A kernel allocates nothing, and what it computes for a
//! row depends only on the job.

use core::sync::atomic::{AtomicU32, Ordering};

use super::prefetch::Prefetch;
use super::quant::Coding;
use crate::dtype::DType;

/// The blocks of one sequence, seen from one KV head. Addresses follow from `kv` and the table.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    /// The sequence's block table, an entry a block.
    pub table: *const i32,
    /// Blocks that exist; an entry outside `0..num_blocks` is bad.
    pub num_blocks: u32,
    /// Tokens a block.
    pub block_tokens: u32,
    /// Row of block 0, token 0 of this head in K.
    pub k: *const u8,
    /// The same in V; `k` where values lie in keys.
    pub v: *const u8,
    /// Bytes from a block to the next, and from a token to the next, in K.
    pub k_block_bytes: isize,
    /// As said above.
    pub k_token_bytes: isize,
    /// Bytes from a block to the next, and from a token to the next, in V.
    pub v_block_bytes: isize,
    /// As said above.
    pub v_token_bytes: isize,
    /// Where the scales of rows lie, in the same manner; not looked at for floats.
    pub k_scales: *const u8,
    /// As said above.
    pub v_scales: *const u8,
    /// As said above: `[block, token]` bytes.
    pub k_scale_bytes: [isize; 2],
    /// As said above.
    pub v_scale_bytes: [isize; 2],
    /// Raised at a bad entry.
    pub bad_block: Option<&'a AtomicU32>,
}

/// Consecutive tokens of one block.
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    /// Row of the first token in K; NULL where the table entry is bad: mask these tokens, read
    /// nothing.
    pub k: *const u8,
    /// The same in V.
    pub v: *const u8,
    /// Tokens, at least 1; the rows are `k_token_bytes` and `v_token_bytes` apart.
    pub tokens: usize,
}

impl Blocks<'_> {
    /// The scales of the rows as if they were the rows.
    #[inline(always)]
    pub fn scales(&self) -> Self {
        Self {
            k: self.k_scales,
            v: self.v_scales,
            k_block_bytes: self.k_scale_bytes[0],
            k_token_bytes: self.k_scale_bytes[1],
            v_block_bytes: self.v_scale_bytes[0],
            v_token_bytes: self.v_scale_bytes[1],
            ..*self
        }
    }

    /// The tokens from `at` to the end of its block or to `end`, whichever is first.
    ///
    /// # Safety
    /// `at < end`, and the table must have an entry for the token `at`.
    #[inline(always)]
    pub unsafe fn segment(&self, at: u32, end: u32) -> Segment {
        let (index, slot) = (at / self.block_tokens, at % self.block_tokens);
        let tokens = (self.block_tokens - slot).min(end - at) as usize;
        // SAFETY: the caller's promise.
        let entry = unsafe { *self.table.add(index as usize) };
        if entry < 0 || entry as u32 >= self.num_blocks {
            if let Some(flag) = self.bad_block {
                flag.store(1, Ordering::Relaxed);
            }
            return Segment { k: core::ptr::null(), v: core::ptr::null(), tokens };
        }
        let (block, slot) = (entry as isize, slot as isize);
        Segment {
            k: self.k.wrapping_offset(block * self.k_block_bytes + slot * self.k_token_bytes),
            v: self.v.wrapping_offset(block * self.v_block_bytes + slot * self.v_token_bytes),
            tokens,
        }
    }
}

/// The softmax states that a job writes, one a row: `out = o / l`, `lse = m + ln l`.
#[derive(Clone, Copy)]
pub(crate) struct States {
    /// `[rows]` largest score; -inf where no key was visible.
    pub m: *mut f32,
    /// `[rows]` sum of `exp(score - m)`; 0 where no key was visible.
    pub l: *mut f32,
    /// `[rows][v_dim]` sum of `exp(score - m) * v`; 0 where no key was visible.
    pub o: *mut f32,
}

/// Keys that will be read after a job.
#[derive(Clone, Copy)]
pub(crate) struct Coming<'a> {
    /// Where they lie.
    pub blocks: Blocks<'a>,
    /// First key.
    pub kv_start: u32,
    /// End of the keys.
    pub kv_end: u32,
}

/// One unit of work. Row `r` of a KV head is query token `r / group` of the job and query head
/// `r % group` of the KV head's group; the rows of the states are those of one KV head after the
/// other.
pub(crate) struct Job<'a> {
    /// KV heads, side by side; 1 for the tile kernel.
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Query tokens, at least 1.
    pub tokens: usize,
    /// Channels of Q and K, a multiple of 8.
    pub k_dim: usize,
    /// Channels of V and O, a multiple of 8.
    pub v_dim: usize,
    /// Values are the first `v_dim` channels of the keys.
    pub v_in_k: bool,
    /// First token's row of the group's first head.
    pub q: *const u8,
    /// Element type of the queries.
    pub q_dtype: DType,
    /// Bytes from a query token to the next.
    pub q_token_bytes: isize,
    /// Bytes from a query head to the next.
    pub q_head_bytes: isize,
    /// Position of the first query token; may be negative without `causal`.
    pub q_pos: i64,
    /// Where K and V lie.
    pub blocks: Blocks<'a>,
    /// Bytes from a KV head to the next in K.
    pub k_head_bytes: isize,
    /// Bytes from a KV head to the next in V.
    pub v_head_bytes: isize,
    /// The same of the scales of keys.
    pub k_scale_head_bytes: isize,
    /// The same of the scales of values.
    pub v_scale_head_bytes: isize,
    /// What the codes of a quantised format are; not looked at for floats.
    pub coding: Coding,
    /// First key of the job. A multiple of the split size, so the same for every batch.
    pub kv_start: u32,
    /// End of the keys: at most the sequence's length. Larger than `kv_start`.
    pub kv_end: u32,
    /// The keys that this worker will read next, for prefetching; `None` where that is not known.
    pub coming: Option<Coming<'a>>,
    /// How rows are asked for ahead of their use.
    pub prefetch: Prefetch,
    /// Factor of the dot product.
    pub scale: f32,
    /// Keys after the query's position are masked.
    pub causal: bool,
    /// Keys a query sees, back from its position; `u32::MAX` for all.
    pub window: u32,
    /// Logit soft-cap.
    pub softcap: Option<f32>,
    /// `[kv_heads][group]` ALiBi slopes.
    pub alibi: Option<&'a [f32]>,
    /// Where the results go.
    pub states: States,
    /// Private memory of the worker, 64-byte aligned, `scratch_bytes` of the kernel long.
    pub scratch: *mut u8,
}

impl Job<'_> {
    /// Query rows of a KV head.
    #[inline(always)]
    pub fn rows(&self) -> usize {
        self.tokens * self.group
    }

    /// Address of query row `r` of the first KV head.
    #[inline(always)]
    pub fn q_row(&self, r: usize) -> *const u8 {
        let (token, head) = ((r / self.group) as isize, (r % self.group) as isize);
        self.q.wrapping_offset(token * self.q_token_bytes + head * self.q_head_bytes)
    }

    /// The keys of the job that the query token `t` sees, as a half-open range; empty as `(x, x)`.
    #[inline(always)]
    pub fn visible(&self, t: usize) -> (u32, u32) {
        let position = self.q_pos + t as i64;
        let (start, end) = (i64::from(self.kv_start), i64::from(self.kv_end));
        let to = if self.causal { end.min(position + 1) } else { end };
        let from = if self.window == u32::MAX {
            start
        } else {
            start.max(position + 1 - i64::from(self.window))
        };
        let from = from.min(end);
        (from as u32, to.max(from) as u32)
    }
}
