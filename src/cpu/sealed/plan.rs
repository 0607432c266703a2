//! How a call over sealed tiles is cut into units of work, and the memory that takes.
//!
//! A cell is a few query rows of one tile and one KV head; its tiles before are read in ranges,
//! whose states are folded one after the other. Where ranges begin and end follows from the tile
//! of the query alone; whether they run one after the other or side by side changes no bit.

use core::ops::Range;

use super::scratch::{self, JOB_ROWS};
use crate::attention::HeadShape;
use crate::cpu::decode;
use crate::cpu::plan::AttendMaxima;
use crate::error::{Error, Result};
use crate::layout::tile::TileLayout;

/// Tiles of the shortest range.
const RANGE_TILES: u32 = 16;
/// The most ranges of a row.
const MAX_RANGES: u32 = 32;
/// The most query tokens of a sequence whose ranges run side by side.
const SPLIT_TOKENS: u32 = 8;
/// Alignment of everything in the workspace.
const ALIGN: usize = 64;

/// An upper bound of the workspace, in bytes, for every call of
/// [`attend_tiles`](super::attend_tiles) with this shape and layout within the maxima, whatever its
/// scoring and at every level.
///
/// # Errors
/// `InvalidArgument` for an impossible shape, `Overflow` where the bound leaves 63 bits.
pub fn attend_tiles_workspace_bytes(
    shape: &HeadShape,
    layout: &TileLayout,
    maxima: &AttendMaxima,
) -> Result<u64> {
    shape.check()?;
    let tiles = maxima.kv_len.div_ceil(layout.shape().tokens);
    let ranges = tiles.div_ceil(RANGE_TILES).min(MAX_RANGES);
    let tokens = u64::from(SPLIT_TOKENS) * u64::from(maxima.seqs);
    let floats = tokens
        .min(u64::from(maxima.q_tokens))
        .checked_mul(u64::from(ranges) * u64::from(shape.q_heads) * state_floats(shape));
    total_bytes(shape, layout, maxima.seqs, maxima.workers, floats)
}

/// f32s of the state of one row.
fn state_floats(shape: &HeadShape) -> u64 {
    u64::from(shape.v_dim) + 2
}

fn total_bytes(
    shape: &HeadShape,
    layout: &TileLayout,
    seqs: u32,
    workers: usize,
    floats: Option<u64>,
) -> Result<u64> {
    let workers = (worker_bytes(shape, layout) as u64).checked_mul(workers as u64);
    workers
        .zip(floats.and_then(|floats| floats.checked_mul(4)))
        .and_then(|(workers, states)| workers.checked_add(states))
        .and_then(|bytes| bytes.checked_add(index_bytes(seqs) as u64 + ALIGN as u64))
        .filter(|&bytes| bytes <= i64::MAX as u64)
        .ok_or(Error::Overflow { what: "attention workspace" })
}

fn index_bytes(seqs: u32) -> usize {
    ((seqs as usize + 1) * size_of::<Start>()).next_multiple_of(ALIGN)
}

/// Scratch of the kernels, which do not run at the same time.
fn kernel_bytes(shape: &HeadShape, layout: &TileLayout) -> usize {
    let raw = decode::scratch_bytes(shape.k_dim as usize, shape.v_dim as usize);
    scratch::scratch_bytes(layout).max(raw).next_multiple_of(ALIGN)
}

/// Scratch of one worker: that of the kernels, then a cell's totals and the part at hand.
fn worker_bytes(shape: &HeadShape, layout: &TileLayout) -> usize {
    let states = JOB_ROWS * state_floats(shape) as usize * 4;
    kernel_bytes(shape, layout) + 2 * states.next_multiple_of(ALIGN)
}

/// What precedes a sequence in the batch.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Start {
    /// Units of the first pass.
    pub units: u64,
    /// Cells whose ranges run side by side.
    pub folds: u64,
    /// f32s of their states.
    pub floats: u64,
}

/// How query rows of one shape are put into cells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    group: u32,
    kv_heads: u32,
    cell_heads: u32,
    head_cells: u32,
    cell_tokens: u32,
    tile_tokens: u32,
}

/// The cells of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct SeqCut {
    cut: Cut,
    q_tokens: u32,
    kv_len: u32,
    /// Cells over the tokens.
    token_cells: u32,
    /// All cells.
    pub cells: u64,
    /// Units of a cell: its ranges, or 1 where they run one after the other.
    pub ranges: u32,
}

/// Query rows of one tile and one KV head: row `r` is token `r / heads` and head `r % heads`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cell {
    pub kv_head: u32,
    /// First query head.
    pub head: u32,
    /// Its place among the heads of the KV head.
    pub heads: u32,
    /// First query token, counted in the sequence's queries.
    pub token: u32,
    pub tokens: u32,
    /// Position of the first query.
    pub position: u32,
    /// Rows of the sequence in cells before, for the states.
    pub first_row: u64,
}

impl Cell {
    pub fn rows(&self) -> usize {
        (self.heads * self.tokens) as usize
    }
}

impl Cut {
    pub fn new(shape: &HeadShape, layout: &TileLayout) -> Self {
        let group = shape.group();
        let cell_heads = group.min(JOB_ROWS as u32);
        Self {
            group,
            kv_heads: shape.kv_heads,
            cell_heads,
            head_cells: group.div_ceil(cell_heads),
            cell_tokens: JOB_ROWS as u32 / cell_heads,
            tile_tokens: layout.shape().tokens,
        }
    }

    pub fn sequence(&self, q_tokens: u32, kv_len: u32) -> SeqCut {
        let mut cut = SeqCut { cut: *self, q_tokens, kv_len, token_cells: 0, cells: 0, ranges: 1 };
        let (first, full, last) = cut.spans();
        let cells = |tokens: u32| tokens.div_ceil(self.cell_tokens);
        cut.token_cells = cells(first) + full * cells(self.tile_tokens) + cells(last);
        cut.cells =
            u64::from(cut.token_cells) * u64::from(self.head_cells) * u64::from(self.kv_heads);
        if q_tokens <= SPLIT_TOKENS && q_tokens != 0 && kv_len != 0 {
            let tile = |position: u32| position / self.tile_tokens;
            let ranges = |tile: u32| tile.div_ceil(range_tiles(tile)).max(1);
            cut.ranges = ranges(tile(kv_len - q_tokens)).max(ranges(tile(kv_len - 1)));
        }
        cut
    }
}

/// Tiles of a range of a query in `tile`.
fn range_tiles(tile: u32) -> u32 {
    RANGE_TILES.max(tile.div_ceil(MAX_RANGES).next_power_of_two())
}

impl SeqCut {
    /// Position of the first query.
    fn position(&self) -> u32 {
        self.kv_len.saturating_sub(self.q_tokens)
    }

    /// Query tokens in the first tile, whole tiles after it, tokens in the last.
    fn spans(&self) -> (u32, u32, u32) {
        let tokens = self.cut.tile_tokens;
        let first = (tokens - self.position() % tokens).min(self.q_tokens);
        let rest = self.q_tokens - first;
        (first, rest / tokens, rest % tokens)
    }

    /// Cell `index`, below `cells`. Later tokens come first: they take longest.
    pub fn cell(&self, index: u64) -> Cell {
        let cut = &self.cut;
        let at = self.token_cells - 1 - (index % u64::from(self.token_cells)) as u32;
        let heads = (index / u64::from(self.token_cells)) as u32;
        let (kv_head, in_group) = (heads / cut.head_cells, heads % cut.head_cells * cut.cell_heads);
        let (first, _, _) = self.spans();
        let (first_cells, tile_cells) =
            (first.div_ceil(cut.cell_tokens), cut.tile_tokens.div_ceil(cut.cell_tokens));
        let (tile_from, tile_to, at) = if at < first_cells {
            (0, first, at)
        } else {
            let (tile, at) = ((at - first_cells) / tile_cells, (at - first_cells) % tile_cells);
            let from = first + tile * cut.tile_tokens;
            (from, self.q_tokens.min(from + cut.tile_tokens), at)
        };
        let token = tile_from + at * cut.cell_tokens;
        let count = cut.cell_heads.min(cut.group - in_group);
        Cell {
            kv_head,
            head: kv_head * cut.group + in_group,
            heads: count,
            token,
            tokens: cut.cell_tokens.min(tile_to - token),
            position: self.position() + token,
            first_row: u64::from(kv_head * cut.group + in_group) * u64::from(self.q_tokens)
                + u64::from(token) * u64::from(count),
        }
    }

    /// Ranges of a cell, whether they run side by side or not.
    pub fn ranges_of(&self, cell: &Cell) -> u32 {
        let tile = cell.position / self.cut.tile_tokens;
        tile.div_ceil(range_tiles(tile))
    }

    /// The tiles of range `index` of a cell, cut to those that a window of `window` tokens shows.
    pub fn range(&self, cell: &Cell, index: u32, window: u32) -> Range<u32> {
        let tokens = self.cut.tile_tokens;
        let tile = cell.position / tokens;
        let size = range_tiles(tile);
        let first = (i64::from(cell.position) + 1 - i64::from(window)).max(0) as u32 / tokens;
        let from = index.saturating_mul(size).max(first).min(tile);
        let to = index.saturating_mul(size).saturating_add(size).min(tile);
        from..to.max(from)
    }

    /// f32s of the states that wait to be folded: `[range][m | l | o]` of all rows.
    pub fn state_floats(&self, shape: &HeadShape) -> u64 {
        if self.ranges < 2 {
            return 0;
        }
        u64::from(self.ranges) * self.rows(shape) * state_floats(shape)
    }

    /// Query rows of the sequence.
    pub fn rows(&self, shape: &HeadShape) -> u64 {
        u64::from(self.q_tokens) * u64::from(shape.q_heads)
    }
}

/// Where the parts of a workspace lie.
#[derive(Clone, Copy)]
pub(super) struct Workspace {
    starts: *mut Start,
    scratch: *mut u8,
    states: *mut f32,
    kernel_bytes: usize,
    worker_bytes: usize,
    row_floats: usize,
    seqs: u32,
}

// SAFETY: a set of addresses; who follows them answers for it.
unsafe impl Sync for Workspace {}

impl Workspace {
    /// Cuts `memory` up for a call whose states take `floats` f32s.
    ///
    /// # Errors
    /// `BufferTooSmall` with the bytes that such a call needs.
    pub fn new(
        memory: &mut [u8],
        shape: &HeadShape,
        layout: &TileLayout,
        seqs: u32,
        workers: usize,
        floats: u64,
    ) -> Result<Self> {
        let needed = total_bytes(shape, layout, seqs, workers, Some(floats))?;
        if (memory.len() as u64) < needed {
            return Err(Error::BufferTooSmall { what: "workspace", needed });
        }
        let base = memory.as_mut_ptr();
        let starts = base.wrapping_add(base.align_offset(ALIGN));
        let scratch = starts.wrapping_add(index_bytes(seqs));
        let worker_bytes = worker_bytes(shape, layout);
        let states = scratch.wrapping_add(workers * worker_bytes);
        Ok(Self {
            starts: starts.cast(),
            scratch,
            states: states.cast(),
            kernel_bytes: kernel_bytes(shape, layout),
            worker_bytes,
            row_floats: state_floats(shape) as usize,
            seqs,
        })
    }

    /// The kernels' scratch of a worker, its totals and its part at hand.
    pub fn worker(&self, worker: usize) -> (*mut u8, *mut f32, *mut f32) {
        let scratch = self.scratch.wrapping_add(worker * self.worker_bytes);
        let totals = scratch.wrapping_add(self.kernel_bytes);
        let bytes = (JOB_ROWS * self.row_floats * 4).next_multiple_of(ALIGN);
        (scratch, totals.cast(), totals.wrapping_add(bytes).cast())
    }

    /// The states that wait, from f32 `at` on.
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

    /// The sequence with the unit `unit`, counted by `of`.
    ///
    /// # Safety
    /// All starts must have been set, and `unit` must be below the total.
    pub unsafe fn find(&self, unit: u64, of: fn(&Start) -> u64) -> (u32, Start) {
        // SAFETY: the caller's promise.
        let start = |s: u32| unsafe { self.starts.add(s as usize).read() };
        let (mut low, mut high) = (0, self.seqs);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if of(&start(middle)) <= unit { low = middle } else { high = middle }
        }
        (low, start(low))
    }
}
