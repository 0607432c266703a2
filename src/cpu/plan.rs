//! How a call is cut into units of work, and the memory that takes.
//!
//! The cuts of a sequence depend on its own lengths and on the shape alone: query tiles and key
//! splits have fixed boundaries, so neither threads nor neighbours in the batch change a bit of a
//! result. Pure arithmetic; reads no memory of the caller. In which order units come is in `order`.

use super::decode::{self, DECODE_ROWS, JOB_ROWS, padded_rows};
use super::order::Start;
use super::prefill;
use crate::attention::HeadShape;
use crate::error::{Error, Result};

/// Keys of the shortest split for the decode kernel, whose jobs span heads.
const DECODE_SPLIT_KEYS: u32 = 512;
/// Keys of the shortest split for the tile kernel.
const TILE_SPLIT_KEYS: u32 = 2048;
/// The most splits of a sequence without a window; a window's edge may add one.
pub(crate) const MAX_SPLITS: u32 = 32;
/// A sequence with at least this many query tiles over all heads is not split along its keys.
const ENOUGH_CELLS: u64 = 32;
/// Alignment of everything in the workspace.
const ALIGN: u64 = 64;

/// The largest lengths of the calls that a workspace must serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttendMaxima {
    /// Sequences in one call.
    pub seqs: u32,
    /// Query tokens of all sequences of one call.
    pub q_tokens: u32,
    /// Cached tokens of one sequence.
    pub kv_len: u32,
    /// Workers of the executor.
    pub workers: usize,
}

/// An upper bound of the workspace, in bytes, for every call of this shape within the maxima,
/// whatever its scoring and at every level.
///
/// # Errors
/// `InvalidArgument` for an impossible shape, `Overflow` where the bound leaves 63 bits.
pub fn attend_workspace_bytes(shape: &HeadShape, maxima: &AttendMaxima) -> Result<u64> {
    shape.check()?;
    let cut = Cut::new(shape);
    let tiles = (ENOUGH_CELLS - 1) / (u64::from(shape.kv_heads) * u64::from(cut.head_tiles));
    // Tokens of all sequences that wait for a merge, times the splits of each.
    let waiting = |tokens: u64, split_keys: u32| {
        let splits = u64::from(maxima.kv_len.div_ceil(split_keys).min(MAX_SPLITS));
        // A window may start in the middle of a split.
        let splits = if splits == 0 { 0 } else { splits + 1 };
        let tokens = tokens.saturating_mul(u64::from(maxima.seqs));
        tokens.min(u64::from(maxima.q_tokens)) * splits
    };
    let states = waiting(tiles * u64::from(cut.tile_tokens), TILE_SPLIT_KEYS)
        .checked_add(waiting(u64::from(cut.decode_tokens), DECODE_SPLIT_KEYS))
        .and_then(|rows| rows.checked_mul(4 * u64::from(shape.q_heads) * state_floats(shape)));
    total_bytes(shape, maxima.seqs, maxima.workers, states)
}

/// f32s of the state of one row.
fn state_floats(shape: &HeadShape) -> u64 {
    u64::from(shape.v_dim) + 2
}

fn total_bytes(shape: &HeadShape, seqs: u32, workers: usize, states: Option<u64>) -> Result<u64> {
    let workers = u64::try_from(workers).ok();
    workers
        .and_then(|workers| workers.checked_mul(worker_bytes(shape)))
        .and_then(|bytes| bytes.checked_add(index_bytes(seqs)))
        .zip(states)
        .and_then(|(bytes, states)| bytes.checked_add(states)?.checked_add(ALIGN))
        .filter(|&bytes| bytes <= i64::MAX as u64)
        .ok_or(Error::Overflow { what: "attention workspace" })
}

fn index_bytes(seqs: u32) -> u64 {
    (u64::from(seqs) + 1) * size_of::<Start>() as u64 / ALIGN * ALIGN + ALIGN
}

/// Scratch of one worker: that of the kernels, then the states of a job that needs no merge.
fn worker_bytes(shape: &HeadShape) -> u64 {
    let rows = u64::from(tile_rows(shape).max(JOB_ROWS as u32));
    kernel_bytes(shape) + (rows * state_floats(shape) * 4).next_multiple_of(ALIGN)
}

/// The most rows of one job of the tile kernel.
fn tile_rows(shape: &HeadShape) -> u32 {
    prefill::tile_rows(shape.k_dim as usize, shape.v_dim as usize) as u32
}

fn kernel_bytes(shape: &HeadShape) -> u64 {
    let (k, v) = (shape.k_dim as usize, shape.v_dim as usize);
    let bytes = decode::scratch_bytes(k, v).max(prefill::scratch_bytes(k, v));
    (bytes as u64).next_multiple_of(ALIGN)
}

/// How query rows are tiled for one shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    /// Query heads of a KV head.
    group: u32,
    kv_heads: u32,
    /// Tiles that a group with more heads than a tile has rows is cut into; else 1.
    pub head_tiles: u32,
    /// Heads of a head tile (of the last one perhaps fewer).
    tile_heads: u32,
    /// Query tokens of a tile of the tile kernel.
    tile_tokens: u32,
    /// The most query tokens that the decode kernel takes; 0 for wide groups.
    decode_tokens: u32,
}

impl Cut {
    pub fn new(shape: &HeadShape) -> Self {
        let group = shape.group();
        let rows = tile_rows(shape);
        let tile_heads = group.min(rows);
        Self {
            group,
            kv_heads: shape.kv_heads,
            head_tiles: group.div_ceil(tile_heads),
            tile_heads,
            tile_tokens: rows / tile_heads,
            decode_tokens: DECODE_ROWS as u32 / group,
        }
    }

    /// The cells and splits of a sequence whose `q_tokens` query tokens see the keys `first..kv_len`.
    pub fn sequence(&self, q_tokens: u32, first: u32, kv_len: u32) -> SeqCut {
        let decode = q_tokens <= self.decode_tokens;
        let tile_tokens = if decode { q_tokens.max(1) } else { self.tile_tokens };
        let tiles = q_tokens.div_ceil(tile_tokens);
        let rows = padded_rows((self.group * tile_tokens) as usize);
        let job_heads = if decode { (JOB_ROWS / rows).max(1) as u32 } else { 1 };
        let head_jobs = u64::from(self.kv_heads.div_ceil(job_heads));
        let cells = u64::from(tiles) * u64::from(self.head_tiles) * head_jobs;
        let span = kv_len.saturating_sub(first);
        let shortest = if decode { DECODE_SPLIT_KEYS } else { TILE_SPLIT_KEYS };
        let split_keys = if decode || cells < ENOUGH_CELLS {
            shortest.max(span.div_ceil(MAX_SPLITS).next_power_of_two())
        } else {
            u32::MAX
        };
        let first_split = first / split_keys;
        let splits = if span == 0 { 1 } else { (kv_len - 1) / split_keys - first_split + 1 };
        SeqCut {
            cut: *self,
            q_tokens,
            decode,
            job_heads,
            tile_tokens,
            tiles,
            cells,
            split_keys,
            first_split,
            splits,
        }
    }
}

/// The cells (tiles of query rows of one KV head, or of several in decode) of one sequence, and the splits of its keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SeqCut {
    cut: Cut,
    q_tokens: u32,
    /// Few rows: for the decode kernel.
    pub decode: bool,
    /// KV heads of a cell.
    job_heads: u32,
    tile_tokens: u32,
    tiles: u32,
    /// Tiles of query rows over all heads.
    pub cells: u64,
    split_keys: u32,
    first_split: u32,
    /// Key splits of each cell, at least 1.
    pub splits: u32,
}

/// One tile of query rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cell {
    /// First KV head.
    pub kv_head: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// First query head.
    pub head: u32,
    /// Query heads of each KV head.
    pub heads: u32,
    /// First query token, counted in the sequence.
    pub token: u32,
    /// Query tokens.
    pub tokens: u32,
    /// Rows of the sequence in the cells before.
    pub first_row: u64,
}

impl Cell {
    /// Query rows: `[kv_heads][tokens][heads]`.
    pub fn rows(&self) -> usize {
        self.kv_heads as usize * self.heads as usize * self.tokens as usize
    }

    /// Query token of the sequence and query head of row `r`.
    pub fn row(&self, r: usize) -> (u32, u32) {
        let (r, side) = (r as u32, self.tokens * self.heads);
        let (kv_head, token) = (r / side, r % side / self.heads);
        (self.token + token, self.head + kv_head * self.heads + r % self.heads)
    }
}

impl SeqCut {
    /// Cell `index`, below `cells`. Later tokens come first: with a causal mask they take longest.
    pub fn cell(&self, index: u64) -> Cell {
        let (tiles, cut) = (u64::from(self.tiles), &self.cut);
        let tile = self.tiles - 1 - (index % tiles) as u32;
        let head_tile = (index / tiles % u64::from(cut.head_tiles)) as u32;
        let kv_head = (index / tiles / u64::from(cut.head_tiles)) as u32 * self.job_heads;
        let in_group = head_tile * cut.tile_heads;
        let heads = cut.tile_heads.min(cut.group - in_group);
        let head = kv_head * cut.group + in_group;
        let token = tile * self.tile_tokens;
        Cell {
            kv_head,
            kv_heads: self.job_heads.min(cut.kv_heads - kv_head),
            head,
            heads,
            token,
            tokens: self.tile_tokens.min(self.q_tokens - token),
            first_row: u64::from(head) * u64::from(self.q_tokens)
                + u64::from(token) * u64::from(heads),
        }
    }

    /// The keys of split `index`, not yet cut to what exists or is visible.
    pub fn split(&self, index: u32) -> (u32, u32) {
        let from = (self.first_split + index) * self.split_keys;
        (from, from.saturating_add(self.split_keys))
    }

    /// Splits that this sequence may attend together with `other`, where their first `tokens` tokens
    /// are the same: whole ones, but not its last.
    pub fn common_splits(&self, other: &SeqCut, tokens: u32) -> u32 {
        let alike = self.cells != 0
            && self.decode
            && other.decode
            && (self.cells, self.split_keys) == (other.cells, other.split_keys)
            && [self.first_split, other.first_split] == [0, 0];
        let whole = tokens / self.split_keys;
        if alike { whole.min(self.splits - 1).min(other.splits - 1) } else { 0 }
    }

    /// f32s of the states that wait for a merge: `[split][m | l | o]` of all rows.
    pub fn state_floats(&self, shape: &HeadShape) -> u64 {
        if self.splits < 2 {
            return 0;
        }
        u64::from(self.splits) * self.rows(shape) * state_floats(shape)
    }

    /// Query rows of the sequence.
    pub fn rows(&self, shape: &HeadShape) -> u64 {
        u64::from(self.q_tokens) * u64::from(shape.q_heads)
    }
}

/// Where the parts of a workspace lie.
#[derive(Clone, Copy)]
pub(crate) struct Workspace {
    starts: *mut Start,
    scratch: *mut u8,
    states: *mut f32,
    shape: HeadShape,
    seqs: u32,
}

// SAFETY: a set of addresses; who follows them answers for it.
unsafe impl Sync for Workspace {}

impl Workspace {
    /// Cuts `memory` up for a call whose states take `floats` f32s.
    ///
    /// # Errors
    /// `BufferTooSmall` with the bytes that such a call needs at most.
    pub fn new(
        memory: &mut [u8],
        shape: &HeadShape,
        seqs: u32,
        workers: usize,
        floats: u64,
    ) -> Result<Self> {
        let needed = total_bytes(shape, seqs, workers, floats.checked_mul(4))?;
        if (memory.len() as u64) < needed {
            return Err(Error::BufferTooSmall { what: "workspace", needed });
        }
        let base = memory.as_mut_ptr();
        let starts = base.wrapping_add(base.align_offset(ALIGN as usize));
        let scratch = starts.wrapping_add(index_bytes(seqs) as usize);
        let states = scratch.wrapping_add(workers * worker_bytes(shape) as usize);
        Ok(Self { starts: starts.cast(), scratch, states: states.cast(), shape: *shape, seqs })
    }

    /// The kernel's scratch and the states of worker `worker`.
    pub fn worker(&self, worker: usize) -> (*mut u8, *mut f32) {
        let scratch = self.scratch.wrapping_add(worker * worker_bytes(&self.shape) as usize);
        (scratch, scratch.wrapping_add(kernel_bytes(&self.shape) as usize).cast())
    }

    /// The states that wait for merges, from f32 `at` on.
    pub fn states(&self, at: u64) -> *mut f32 {
        self.states.wrapping_add(at as usize)
    }

    /// Notes what precedes sequence `s`; `s == seqs` gives the totals.
    ///
    /// # Safety
    /// The workspace's memory must still be borrowed, and `s` at most `seqs`.
    pub unsafe fn set_start(&self, s: u32, start: Start) {
        // SAFETY: the index has `seqs + 1` entries; its place is 64-byte aligned.
        unsafe { self.starts.add(s as usize).write(start) }
    }

    /// What precedes sequence `s`.
    ///
    /// # Safety
    /// As for [`set_start`](Self::set_start), which must have been called for `s`.
    pub unsafe fn start(&self, s: u32) -> Start {
        // SAFETY: as above.
        unsafe { self.starts.add(s as usize).read() }
    }

    /// The sequence with the unit `unit`, counted by `of`.
    ///
    /// # Safety
    /// All starts must have been set, and `unit` must be below the total.
    pub unsafe fn find(&self, unit: u64, of: fn(&Start) -> u64) -> (u32, Start) {
        let (mut low, mut high) = (0, self.seqs);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            // SAFETY: the caller's promise.
            let start = unsafe { self.start(middle) };
            if of(&start) <= unit { low = middle } else { high = middle }
        }
        // SAFETY: the caller's promise.
        (low, unsafe { self.start(low) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(q_heads: u32, kv_heads: u32) -> HeadShape {
        HeadShape { q_heads, kv_heads, k_dim: 64, v_dim: 64, v_in_k: false }
    }

    #[test]
    fn cells_cover_every_row_once() {
        for (q_heads, kv_heads) in [(32, 8), (7, 1), (300, 1), (8, 8), (128, 1)] {
            let (shape, cut) = (shape(q_heads, kv_heads), Cut::new(&shape(q_heads, kv_heads)));
            for tokens in [1u32, 2, 3, 9, 31, 32, 33, 200] {
                let seq = cut.sequence(tokens, 0, 5000);
                let rows = tile_rows(&shape) as usize;
                let mut seen = alloc::vec![0; (tokens * q_heads) as usize];
                let mut by_state = seen.clone();
                for index in 0..seq.cells {
                    let cell = seq.cell(index);
                    assert!(cell.rows() <= if seq.decode { JOB_ROWS } else { rows });
                    assert_eq!(cell.head / shape.group(), cell.kv_head);
                    for r in 0..cell.rows() {
                        by_state[cell.first_row as usize + r] += 1;
                        let (token, head) = cell.row(r);
                        seen[(token * q_heads + head) as usize] += 1;
                        let side = r / (cell.heads * cell.tokens) as usize;
                        assert_eq!(head / shape.group(), cell.kv_head + side as u32);
                    }
                }
                assert!(seen.iter().all(|&n| n == 1) && by_state.iter().all(|&n| n == 1));
            }
        }
    }

    #[test]
    fn splits_cover_the_keys_and_stay_few() {
        let cut = Cut::new(&shape(32, 8));
        for (first, len) in [(0, 0), (0, 1), (0, 2048), (0, 2049), (2047, 2049), (100, 1 << 20)] {
            let seq = cut.sequence(1, first, len);
            assert!((1..=MAX_SPLITS + 1).contains(&seq.splits));
            let (from, to) = (seq.split(0).0, seq.split(seq.splits - 1).1);
            assert!(from <= first && to >= len);
            for i in 1..seq.splits {
                assert_eq!(seq.split(i - 1).1, seq.split(i).0);
            }
        }
        assert_eq!(cut.sequence(4096, 0, 4096).splits, 1);
    }

    #[test]
    fn the_bound_covers_every_sequence_within_it() {
        for (q_heads, kv_heads) in [(32, 8), (8, 8), (128, 1), (300, 1)] {
            let shape = shape(q_heads, kv_heads);
            for tokens in [1, 2, 8, 33, 300] {
                for (first, len) in [(0, 300), (2000, 2100), (0, 2049), (1, 40_000)] {
                    let seq = Cut::new(&shape).sequence(tokens, first, len);
                    let maxima =
                        AttendMaxima { seqs: 1, q_tokens: tokens, kv_len: len, workers: 2 };
                    let bound = attend_workspace_bytes(&shape, &maxima).unwrap();
                    let floats = seq.state_floats(&shape);
                    assert!(total_bytes(&shape, 1, 2, Some(4 * floats)).unwrap() <= bound);
                }
            }
        }
    }
}
