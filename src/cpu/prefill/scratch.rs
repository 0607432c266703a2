//! The private memory of one job of the tile kernel: what lies where.

use core::mem::size_of;

use super::operand::TILE_HEIGHT;
use super::pack::STAGED;

/// Query rows that go through scores, softmax and values together, so that their scores stay in
/// the nearest cache. A multiple of [`TILE_HEIGHT`] and of every vector's lanes.
pub(super) const CHUNK_ROWS: usize = 48;
/// Tokens of a key tile per element of a step.
pub(super) const TILE_STEPS: usize = 128;
/// The most tokens of a key tile.
pub(super) const MAX_TILE_TOKENS: usize = 2 * TILE_STEPS;
/// The widest panel of packed keys or values, in steps.
const MAX_PANEL: usize = 64;

/// Pointers into the scratch. Sizes are in steps (or f32), 4 bytes each.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    /// Tokens of a key tile.
    pub tile_tokens: usize,
    /// Steps of a packed key, a multiple of 16.
    pub k_steps: usize,
    /// f32 from a row of `o` to the next, a multiple of 16.
    pub o_stride: usize,
    /// Packed queries.
    pub q: *mut u32,
    /// Packed keys of the tile.
    pub k: *mut u32,
    /// Packed values of the tile.
    pub v: *mut u32,
    /// `[CHUNK_ROWS][tile_tokens]` scores, in units of ln 2; their weights, in steps, replace them.
    pub scores: *mut f32,
    /// `[rows][o_stride]` weighted sums of values.
    pub o: *mut f32,
    /// `[rows]` largest score so far, in units of ln 2.
    pub m: *mut f32,
    /// `[rows]` sum of the weights.
    pub l: *mut f32,
    /// `[rows]` first key the row sees.
    pub from: *mut u32,
    /// `[rows]` end of the keys the row sees.
    pub to: *mut u32,
    /// `[CHUNK_ROWS]` largest score, this tile included.
    pub top: *mut f32,
    /// `[CHUNK_ROWS]` factor of what was summed up before this tile.
    pub fade: *mut f32,
    /// `[tile_tokens]` -inf for tokens in bad blocks, +inf for others.
    pub ceiling: *mut f32,
    /// `[STAGED][k_stage_stride]` staged keys, and one query row.
    pub stage: *mut u32,
    /// `[STAGED][v_stage_stride]` staged values.
    pub v_stage: *mut u32,
    /// Steps from a staged key to the next.
    pub k_stage_stride: usize,
    /// Steps from a staged value to the next; 0 where values lie in keys.
    pub v_stage_stride: usize,
}

impl Scratch {
    /// Lays out the scratch at `base`; the second result is its size in bytes.
    #[inline(always)]
    pub fn new(
        base: *mut u8,
        rows: usize,
        (k_dim, v_dim, v_in_k): (usize, usize, bool),
        per_step: usize,
    ) -> (Self, usize) {
        // Softmax goes over the rows by whole vectors.
        let rows = rows.next_multiple_of(TILE_HEIGHT) + 16;
        let tile_tokens = TILE_STEPS * per_step;
        let k_steps = (k_dim / per_step).next_multiple_of(16);
        let v_steps = (v_dim / per_step).next_multiple_of(16);
        let o_stride = v_dim.next_multiple_of(16);
        let v_stage_stride = if v_in_k { 0 } else { v_steps };
        let mut at = 0;
        // Every part starts at a cache line.
        let mut part = |steps: usize| {
            let start = at;
            at += (steps * size_of::<u32>()).next_multiple_of(64);
            base.wrapping_add(start)
        };
        let scratch = Self {
            tile_tokens,
            k_steps,
            o_stride,
            q: part(rows * k_steps).cast(),
            k: part(tile_tokens * k_steps).cast(),
            v: part(TILE_STEPS * v_dim.next_multiple_of(MAX_PANEL)).cast(),
            scores: part(CHUNK_ROWS * tile_tokens).cast(),
            o: part(rows * o_stride).cast(),
            m: part(rows).cast(),
            l: part(rows).cast(),
            from: part(rows).cast(),
            to: part(rows).cast(),
            top: part(CHUNK_ROWS).cast(),
            fade: part(CHUNK_ROWS).cast(),
            ceiling: part(tile_tokens).cast(),
            stage: part(STAGED * k_steps).cast(),
            v_stage: part(STAGED * v_stage_stride).cast(),
            k_stage_stride: k_steps,
            v_stage_stride,
        };
        (scratch, at)
    }
}
