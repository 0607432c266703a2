//! The private memory of a job over sealed tiles, and the dimensions that it is cut up by.

use super::codes::whole;
use crate::layout::tile::TileLayout;

/// The most query rows of a job.
pub(super) const JOB_ROWS: usize = 64;
/// Rows that are worked on together.
pub(super) const GROUP: usize = 4;
/// The parts of a job's scratch; f32s and words.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Scratch {
    /// Packed keys and their third bits in lanes.
    pub k: *mut u32,
    pub k_plane: *mut u32,
    /// Packed values and their third bits in lanes; `[token][v_dim]` f32 where values lie in keys.
    pub v: *mut u32,
    pub v_plane: *mut u32,
    /// `[k_dim]` step and middle of each key channel.
    pub step: *mut f32,
    pub mid: *mut f32,
    /// `[tokens]` scales of the values.
    pub v_scale: *mut f32,
    /// `[tokens]` 0, 1, 2, ...
    pub count: *mut f32,
    /// `[row][k_dim]` queries.
    pub q: *mut f32,
    /// `[row][v_dim]` weighted values, in the order of lanes.
    pub o: *mut f32,
    /// `[row]` largest score, sum of probabilities.
    pub m: *mut f32,
    pub l: *mut f32,
    /// `[group row][high, low][channels]` queries as bytes.
    pub q_bytes: *mut u32,
    /// `[group row][tokens]` scores, then probabilities.
    pub s: *mut f32,
    /// `[group row][high, low][tokens]` probabilities as bytes.
    pub p_bytes: *mut u32,
    /// `[group row][v_dim]` whole sums of values.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub sums: *mut i32,
    /// Bytes on their way into order.
    pub buffer: *mut u8,
}

/// The dimensions of a job, as indices.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Dims {
    pub k_dim: usize,
    pub v_dim: usize,
    pub tokens: usize,
    pub k_bits: u32,
    pub v_bits: u32,
    pub v_in_k: bool,
    /// Words of a stored key row, padding included, and of its third bits.
    pub k_row: usize,
    pub k_plane_row: usize,
    /// Words of a value channel and of its third bits.
    pub v_words: usize,
    pub v_plane_words: usize,
}

impl Dims {
    pub fn new(layout: &TileLayout) -> Self {
        let shape = layout.shape();
        let (tokens, v_dim) = (shape.tokens as usize, shape.v_dim as usize);
        let words = |bytes: usize, rows: usize| bytes / rows / 4;
        Self {
            k_dim: shape.k_dim as usize,
            v_dim,
            tokens,
            k_bits: layout.format().k_bits(),
            v_bits: layout.format().v_bits(),
            v_in_k: shape.v_in_k,
            k_row: words(layout.k_codes.len(), tokens),
            k_plane_row: words(layout.k_plane.len(), tokens),
            v_words: words(layout.v_codes.len(), v_dim),
            v_plane_words: words(layout.v_plane.len(), v_dim),
        }
    }

    /// Words of a key row without padding.
    pub fn k_words(&self) -> usize {
        let bits = if self.k_bits == 3 { 2 } else { self.k_bits as usize };
        self.k_dim * bits / 32
    }
}

impl Scratch {
    /// Cuts `base` up; the bytes that takes.
    pub fn new(base: *mut u8, dims: &Dims) -> (Self, usize) {
        let Dims { k_dim, v_dim, tokens, .. } = *dims;
        let base = base.cast::<u32>();
        let mut at = 0;
        let mut next = |words: usize| {
            let start = base.wrapping_add(at);
            at += words.next_multiple_of(16);
            start
        };
        let value_words = if dims.v_in_k { tokens * v_dim } else { dims.v_words * v_dim };
        let scratch = Self {
            k: next(tokens * whole(dims.k_words())),
            k_plane: next(tokens * whole(dims.k_plane_row)),
            v: next(value_words),
            v_plane: next(dims.v_plane_words * v_dim),
            step: next(k_dim).cast(),
            mid: next(k_dim).cast(),
            v_scale: next(tokens).cast(),
            count: next(tokens).cast(),
            q: next(JOB_ROWS * k_dim).cast(),
            o: next(JOB_ROWS * v_dim).cast(),
            m: next(JOB_ROWS).cast(),
            l: next(JOB_ROWS).cast(),
            q_bytes: next(GROUP * 2 * k_dim / 4),
            s: next(GROUP * tokens).cast(),
            p_bytes: next(GROUP * 2 * tokens / 4),
            sums: next(GROUP * v_dim).cast(),
            buffer: next(2 * k_dim.max(tokens) / 4).cast(),
        };
        (scratch, at * 4)
    }
}

/// Bytes of scratch that a job needs.
pub(super) fn scratch_bytes(layout: &TileLayout) -> usize {
    Scratch::new(core::ptr::null_mut(), &Dims::new(layout)).1
}
