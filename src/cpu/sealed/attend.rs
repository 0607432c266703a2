//! The attention call over sealed tiles: check, cut, run, fold the ranges, add the raw tiles.
//!
//! A row's result is folded in a fixed order: its ranges of sealed tiles from the first to the
//! last, rotated back, then its raw tiles, its own the last. The raw ones run through the decode
//! kernel for bf16, a few rows at a time, so that these bits do not depend on the call either.

use super::args::{TileAttendArgs, TileSequence};
use super::kernel::{self, Reads, SealedJob, is_sealed};
use super::plan::{Cell, Cut, SeqCut, Start, Workspace};
use super::{SealedKernels, args::RawBlock};
use crate::cpu::decode::DECODE_ROWS;
use crate::cpu::executor::Executor;
use crate::cpu::finish::Part;
use crate::cpu::job::{Blocks, Job, States};
use crate::cpu::kernels::Kernels;
use crate::cpu::level::CpuLevel;
use crate::cpu::prefetch::Prefetch;
use crate::dtype::KvFormat;
use crate::error::{Error, Result};
use crate::quant::unrotate;
use core::sync::atomic::{AtomicU32, Ordering};

/// Attention over sealed tiles for a ragged batch: decode and chunked prefill in one call.
///
/// Row by row it computes what [`crate::attention`] defines, over keys and values as they are
/// stored: raw in the query's own tile, sealed in those before. A row's bits depend on its own
/// sequence, the shape and the level alone, not on how its sequence was cut into calls. `workspace`
/// needs [`attend_tiles_workspace_bytes`](super::attend_tiles_workspace_bytes) for maxima that
/// cover the call. Nothing is allocated.
///
/// # Errors
/// As for [`attend`](crate::cpu::attend); `InvalidArgument` also without a causal mask.
///
/// # Safety
/// As for [`attend`](crate::cpu::attend), with the records of all valid table entries and the raw
/// rows of all valid slots in place of its K and V: those of a query's own tile up to its position,
/// and all of an earlier tile that is not sealed. The raw tables must be readable to the lengths
/// that their `indptr` implies.
pub unsafe fn attend_tiles(
    args: &TileAttendArgs<'_>,
    level: CpuLevel,
    executor: &(impl Executor + ?Sized),
    workspace: &mut [u8],
) -> Result<()> {
    if !level.is_available() {
        return Err(Error::Unsupported { what: "the CPU level" });
    }
    // SAFETY: the caller's promise.
    unsafe { args.check() }?;
    let bad = AtomicU32::new(0);
    let mut call = Call {
        args,
        cut: Cut::new(&args.shape, args.tiles.layout),
        sealed: SealedKernels::of(level),
        raw: Kernels::of(level, KvFormat::Bf16),
        bad: &bad,
        workers: executor.workers().max(1) as u64,
        units: 0,
    };
    let mut totals = Start::default();
    for s in 0..args.seqs {
        // SAFETY: the caller's promise, and `s < seqs`.
        let seq = unsafe { args.sequence(s)? };
        totals = call.after(totals, &seq)?;
    }
    call.units = totals.units;
    let (layout, workers) = (args.tiles.layout, executor.workers().max(1));
    let memory = Workspace::new(workspace, &args.shape, layout, args.seqs, workers, totals.floats)?;
    let mut start = Start::default();
    for s in 0..args.seqs {
        // SAFETY: `s < seqs`.
        unsafe {
            memory.set_start(s, start);
            start = call.after(start, &args.sequence(s)?)?;
        }
    }
    executor.run(totals.units as usize, &|worker, unit| {
        // SAFETY: units are below the total and run once each; workers do not overlap.
        unsafe { call.run_unit(&memory, worker, unit as u64) }
    });
    if totals.folds != 0 {
        executor.run(totals.folds as usize, &|worker, unit| {
            // SAFETY: as above; every state has been written.
            unsafe { call.run_fold(&memory, worker, unit as u64) }
        });
    }
    if let (Some(flag), 1) = (args.bad_block, bad.load(Ordering::Relaxed)) {
        flag.store(1, Ordering::Relaxed);
    }
    Ok(())
}

/// One call, its arguments checked.
struct Call<'a> {
    args: &'a TileAttendArgs<'a>,
    cut: Cut,
    sealed: SealedKernels,
    raw: Kernels,
    bad: &'a AtomicU32,
    workers: u64,
    /// Units of the first pass.
    units: u64,
}

/// A cell of a sequence.
struct Place<'a> {
    seq: TileSequence<'a>,
    cut: SeqCut,
    cell: Cell,
    start: Start,
}

impl Call<'_> {
    /// What precedes the sequence after `seq`.
    fn after(&self, start: Start, seq: &TileSequence) -> Result<Start> {
        let cut = self.cut.sequence(seq.q_tokens, seq.kv_len);
        let overflow = Error::Overflow { what: "units of work" };
        let units = cut.cells.checked_mul(u64::from(cut.ranges)).ok_or(overflow)?;
        let units = start.units.checked_add(units).ok_or(overflow)?;
        usize::try_from(units).map_err(|_| overflow)?;
        let floats = cut.state_floats(&self.args.shape);
        Ok(Start {
            units,
            folds: start.folds + if cut.ranges > 1 { cut.cells } else { 0 },
            floats: start.floats.checked_add(floats).ok_or(overflow)?,
        })
    }

    /// # Safety
    /// The promise of [`attend_tiles`]; `s` below `seqs`.
    unsafe fn place(
        &self,
        s: u32,
        start: Start,
        index: impl Fn(&SeqCut) -> u64,
    ) -> Option<Place<'_>> {
        // SAFETY: the caller's promise; the sequence has been checked.
        let seq = unsafe { self.args.sequence(s).ok()? };
        let cut = self.cut.sequence(seq.q_tokens, seq.kv_len);
        Some(Place { seq, cut, cell: cut.cell(index(&cut)), start })
    }

    /// Runs one unit: a range of a cell whose ranges run side by side, or all of a cell.
    ///
    /// # Safety
    /// The promise of [`attend_tiles`]; units must be below the total, and `worker` not in use.
    unsafe fn run_unit(&self, memory: &Workspace, worker: usize, unit: u64) {
        // SAFETY: the caller's promise.
        unsafe {
            let Some((place, range)) = self.unit(memory, unit) else { return };
            let (scratch, totals, part) = memory.worker(worker);
            let rows = place.cell.rows();
            if place.cut.ranges > 1 {
                // Workers take units in turn: what this one takes next is a guess.
                let after = unit + self.workers;
                let after = if after < self.units { self.unit(memory, after) } else { None };
                let after = after.map(|(place, range)| self.reads(&place, range));
                let states = self.waiting(memory, &place, range);
                return self.range(&place, range, after, states, scratch);
            }
            let totals = self.own(totals, rows);
            clear(&totals, rows, self.v_dim());
            for range in 0..place.cut.ranges_of(&place.cell) {
                let (part, after) = (self.own(part, rows), self.reads(&place, range + 1));
                self.range(&place, range, Some(after), part, scratch);
                fold(&totals, &part, rows, self.v_dim());
            }
            self.complete(&place, totals, self.own(part, rows), scratch);
        }
    }

    /// The cell of a unit, and which of its ranges.
    ///
    /// # Safety
    /// As for [`run_unit`](Self::run_unit).
    unsafe fn unit(&self, memory: &Workspace, unit: u64) -> Option<(Place<'_>, u32)> {
        // SAFETY: the caller's promise.
        unsafe {
            let (s, start) = memory.find(unit, |start| start.units);
            let unit = unit - start.units;
            let place = self.place(s, start, |cut| unit / u64::from(cut.ranges))?;
            let range = (unit % u64::from(place.cut.ranges)) as u32;
            Some((place, range))
        }
    }

    /// Folds the ranges of one cell and completes it.
    ///
    /// # Safety
    /// As for [`run_unit`](Self::run_unit); the states have been written.
    unsafe fn run_fold(&self, memory: &Workspace, worker: usize, unit: u64) {
        // SAFETY: the caller's promise.
        unsafe {
            let (s, start) = memory.find(unit, |start| start.folds);
            let Some(place) = self.place(s, start, |_| unit - start.folds) else { return };
            let (scratch, totals, part) = memory.worker(worker);
            let rows = place.cell.rows();
            let totals = self.own(totals, rows);
            clear(&totals, rows, self.v_dim());
            for range in 0..place.cut.ranges_of(&place.cell) {
                fold(&totals, &self.waiting(memory, &place, range), rows, self.v_dim());
            }
            self.complete(&place, totals, self.own(part, rows), scratch);
        }
    }

    fn v_dim(&self) -> usize {
        self.args.shape.v_dim as usize
    }

    /// The states of `rows` rows in a worker's own memory.
    fn own(&self, at: *mut f32, rows: usize) -> States {
        States { m: at, l: at.wrapping_add(rows), o: at.wrapping_add(2 * rows) }
    }

    /// The states of one cell and range among those that wait.
    fn waiting(&self, memory: &Workspace, place: &Place, range: u32) -> States {
        let (rows, v_dim) = (place.cut.rows(&self.args.shape), self.v_dim() as u64);
        let first = place.cell.first_row;
        let base = place.start.floats + u64::from(range) * rows * (v_dim + 2);
        States {
            m: memory.states(base + first),
            l: memory.states(base + rows + first),
            o: memory.states(base + 2 * rows + first * v_dim),
        }
    }

    /// What a range of a cell reads.
    fn reads(&self, place: &Place, range: u32) -> Reads {
        let tiles = &self.args.tiles;
        let head_bytes = (i64::from(place.cell.kv_head) * tiles.head_bytes) as isize;
        let window = self.args.scoring.window.unwrap_or(u32::MAX);
        Reads {
            records: tiles.records.wrapping_offset(head_bytes),
            table: place.seq.table,
            tiles: place.cut.range(&place.cell, range, window),
        }
    }

    /// Runs a range of sealed tiles of a cell; `after` is what may come next.
    ///
    /// # Safety
    /// As for [`run_unit`](Self::run_unit).
    unsafe fn range(
        &self,
        place: &Place,
        range: u32,
        after: Option<Reads>,
        states: States,
        scratch: *mut u8,
    ) {
        let (args, cell, seq) = (self.args, &place.cell, &place.seq);
        let now = self.reads(place, range);
        if now.tiles.is_empty() || seq.kv_len == 0 {
            // SAFETY: the caller's promise.
            return unsafe { clear(&states, cell.rows(), self.v_dim()) };
        }
        let q_bytes = args.q.dtype.bytes() as isize;
        let heads = cell.head as usize..(cell.head + cell.heads) as usize;
        let job = SealedJob {
            layout: args.tiles.layout,
            now,
            after,
            block_bytes: args.tiles.block_bytes as isize,
            num_blocks: args.tiles.num_blocks,
            raw: seq.raw,
            q: args.q.row(seq.q_start + cell.token, cell.head),
            q_dtype: args.q.dtype,
            q_token_bytes: args.q.token_stride as isize * q_bytes,
            q_head_bytes: args.q.head_stride as isize * q_bytes,
            heads: cell.heads as usize,
            tokens: cell.tokens as usize,
            q_pos: cell.position,
            scale: args.scoring.scale,
            window: args.scoring.window.unwrap_or(u32::MAX),
            softcap: args.scoring.softcap,
            alibi: args.scoring.alibi.map(|slopes| &slopes[heads]),
            states,
            scratch,
            bad: self.bad,
        };
        // SAFETY: the caller's promise; the level was checked, and scratch is the worker's own.
        unsafe { (self.sealed.attend)(&job) }
    }

    /// Rotates the totals back, adds the raw tiles and writes the rows.
    ///
    /// # Safety
    /// As for [`run_unit`](Self::run_unit).
    unsafe fn complete(&self, place: &Place, totals: States, part: States, scratch: *mut u8) {
        let (args, cell, v_dim) = (self.args, &place.cell, self.v_dim());
        let layout = args.tiles.layout;
        let own = cell.position / layout.shape().tokens;
        // SAFETY: the caller's promise.
        unsafe {
            if kernel::rotated(layout.format(), args.shape.v_in_k) {
                for row in 0..cell.rows() {
                    let o = totals.o.add(row * v_dim);
                    unrotate(core::slice::from_raw_parts_mut(o, v_dim));
                }
            }
            let mut found = place.seq.kv_len == 0;
            for raw in place.seq.raw {
                let tile = u32::try_from(raw.tile).unwrap_or(u32::MAX);
                if tile > own || (tile < own && self.tile_is_sealed(place, tile)) {
                    continue;
                }
                found |= tile == own;
                self.raw_tile(place, raw, &totals, &part, scratch);
            }
            if !found {
                self.bad.store(1, Ordering::Relaxed);
            }
            for row in 0..cell.rows() {
                self.write_row(place, row, &totals);
            }
        }
    }

    /// # Safety
    /// As for [`run_unit`](Self::run_unit), for a tile before the cell's own.
    unsafe fn tile_is_sealed(&self, place: &Place, tile: u32) -> bool {
        // SAFETY: the caller's promise; the tile is before the sequence's end.
        unsafe {
            let block = place.seq.table.add(tile as usize).read();
            let record = self.args.tiles.record(block, place.cell.kv_head);
            record.is_some_and(|record| is_sealed(self.args.tiles.layout, record))
        }
    }

    /// Adds one raw tile to the totals, a few rows at a time.
    ///
    /// # Safety
    /// As for [`run_unit`](Self::run_unit).
    unsafe fn raw_tile(
        &self,
        place: &Place,
        raw: &RawBlock,
        totals: &States,
        part: &States,
        scratch: *mut u8,
    ) {
        let (args, cell, seq) = (self.args, &place.cell, &place.seq);
        let tokens = args.tiles.layout.shape().tokens;
        let start = i64::from(raw.tile) * i64::from(tokens);
        let Some((view, block)) = args.tiles.raw(raw.slot) else {
            self.bad.store(1, Ordering::Relaxed);
            return;
        };
        let table = [block as i32];
        let bytes = KvFormat::Bf16.dtype().bytes() as isize;
        let v_in_k = args.shape.v_in_k;
        let v_strides = if v_in_k { &view.k_strides } else { &view.v_strides };
        let head = |base: *mut u8, stride: i64| {
            base.wrapping_offset(cell.kv_head as isize * stride as isize * bytes).cast_const()
        };
        let blocks = Blocks {
            table: table.as_ptr(),
            num_blocks: view.num_blocks,
            block_tokens: tokens,
            k: head(view.k, view.k_strides.head),
            v: head(if v_in_k { view.k } else { view.v }, v_strides.head),
            k_block_bytes: view.k_strides.block as isize * bytes,
            k_token_bytes: view.k_strides.token as isize * bytes,
            v_block_bytes: v_strides.block as isize * bytes,
            v_token_bytes: v_strides.token as isize * bytes,
            // Rows of floats have no scales.
            k_scales: core::ptr::null(),
            v_scales: core::ptr::null(),
            k_scale_bytes: [0; 2],
            v_scale_bytes: [0; 2],
            bad_block: None,
        };
        let job_heads = cell.heads.min(DECODE_ROWS as u32);
        let job_tokens = if job_heads < cell.heads { 1 } else { DECODE_ROWS as u32 / job_heads };
        let q_bytes = args.q.dtype.bytes() as isize;
        for token in (0..cell.tokens).step_by(job_tokens as usize) {
            for head in (0..cell.heads).step_by(job_heads as usize) {
                let heads = job_heads.min(cell.heads - head);
                let count = job_tokens.min(cell.tokens - token);
                let position = i64::from(cell.position + token) - start;
                let first = (cell.head + head) as usize;
                let job = Job {
                    kv_heads: 1,
                    group: heads as usize,
                    tokens: count as usize,
                    k_dim: args.shape.k_dim as usize,
                    v_dim: args.shape.v_dim as usize,
                    v_in_k,
                    q: args.q.row(seq.q_start + cell.token + token, cell.head + head),
                    q_dtype: args.q.dtype,
                    q_token_bytes: args.q.token_stride as isize * q_bytes,
                    q_head_bytes: args.q.head_stride as isize * q_bytes,
                    q_pos: position,
                    blocks,
                    k_head_bytes: 0,
                    v_head_bytes: 0,
                    k_scale_head_bytes: 0,
                    v_scale_head_bytes: 0,
                    coding: view.coding(&args.shape, cell.kv_head),
                    kv_start: 0,
                    kv_end: (position + i64::from(count)).min(i64::from(tokens)) as u32,
                    coming: None,
                    prefetch: Prefetch::of(view.format),
                    scale: args.scoring.scale,
                    causal: true,
                    window: args.scoring.window.unwrap_or(u32::MAX),
                    softcap: args.scoring.softcap,
                    alibi: args.scoring.alibi.map(|slopes| &slopes[first..first + heads as usize]),
                    states: *part,
                    scratch,
                };
                let rows = (heads * count) as usize;
                let at = (token * cell.heads + head) as usize;
                let v_dim = self.v_dim();
                // SAFETY: the caller's promise; the parts of rows lie one after the other.
                unsafe {
                    (self.raw.decode)(&job);
                    let totals = States {
                        m: totals.m.add(at),
                        l: totals.l.add(at),
                        o: totals.o.add(at * v_dim),
                    };
                    fold(&totals, part, rows, v_dim);
                }
            }
        }
    }

    /// Writes row `r` of a cell.
    ///
    /// # Safety
    /// As for [`run_unit`](Self::run_unit).
    unsafe fn write_row(&self, place: &Place, r: usize, totals: &States) {
        let (args, cell) = (self.args, &place.cell);
        let token = place.seq.q_start + cell.token + r as u32 / cell.heads;
        let head = cell.head + r as u32 % cell.heads;
        let sink = args.scoring.sinks.map(|sinks| sinks[head as usize]);
        // SAFETY: the caller's promise.
        unsafe {
            let part = Part {
                m: totals.m.add(r).read(),
                l: totals.l.add(r).read(),
                o: totals.o.add(r * self.v_dim()),
            };
            let out = args.out.row(token, head);
            let lse = (self.raw.finish)(&[part], sink, args.out.dtype, out, self.v_dim());
            if !args.lse.is_null() {
                let at = token as usize * args.shape.q_heads as usize + head as usize;
                args.lse.add(at).write(lse);
            }
        }
    }
}

/// The states of rows that have seen nothing.
///
/// # Safety
/// The states must have room for `rows` rows.
unsafe fn clear(states: &States, rows: usize, v_dim: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        for row in 0..rows {
            states.m.add(row).write(f32::NEG_INFINITY);
            states.l.add(row).write(0.0);
        }
        states.o.write_bytes(0, rows * v_dim);
    }
}

/// Adds the states of further keys to those of the ones before.
///
/// # Safety
/// Both must have `rows` rows.
unsafe fn fold(totals: &States, part: &States, rows: usize, v_dim: usize) {
    for row in 0..rows {
        // SAFETY: the caller's promise.
        unsafe {
            let (old, new) = (totals.m.add(row).read(), part.m.add(row).read());
            if new == f32::NEG_INFINITY {
                continue;
            }
            let top = old.max(new);
            let older = if old == f32::NEG_INFINITY { 0.0 } else { libm::expf(old - top) };
            let newer = libm::expf(new - top);
            totals.m.add(row).write(top);
            let l = totals.l.add(row).read() * older + part.l.add(row).read() * newer;
            totals.l.add(row).write(l);
            let o = core::slice::from_raw_parts_mut(totals.o.add(row * v_dim), v_dim);
            let parts = core::slice::from_raw_parts(part.o.add(row * v_dim), v_dim);
            for (o, part) in o.iter_mut().zip(parts) {
                *o = *o * older + part * newer;
            }
        }
    }
}
