//! The attention call: check, cut, run the jobs, merge what was split.
//!
//! Two passes over an executor: one runs the jobs, of which those of unsplit sequences write their
//! outputs at once; the other merges the states of split ones, always in the order of the keys.

use super::args::{AttendArgs, Sequence};
use super::executor::Executor;
use super::finish::{MAX_PARTS, Part};
use super::job::{Blocks, Coming, Job, States};
use super::kernels::Kernels;
use super::level::CpuLevel;
use super::order::Start;
use super::plan::{Cell, Cut, SeqCut, Workspace};
use super::prefetch::Prefetch;
use super::scales::stride_bytes;
use super::vector::prefetch;
use crate::error::{Error, Result};
use crate::layout::Strides;

/// Attention over a paged cache for a ragged batch: decode, chunked prefill and latent attention
/// in one call.
///
/// Row by row it computes what [`crate::attention`] defines. A row's bits depend on its own
/// sequence, the shape and the level alone. `workspace` needs
/// [`attend_workspace_bytes`](super::attend_workspace_bytes) for maxima that cover the call; its
/// contents are of no consequence before and after. Nothing is allocated.
///
/// Outputs over parts of the keys (other calls with the same queries) combine with
/// [`merge_states`](crate::attention::merge_states); a sink must then be given to one call only.
///
/// # Errors
/// `InvalidArgument`, `NullPointer`, `Misaligned` or `Overflow` for arguments outside their
/// documented ranges, `Unsupported` for sealed tiles and for a level this CPU lacks, `BufferTooSmall` with the bytes
/// needed. Nothing has been written then.
///
/// # Safety
/// `q_indptr`, `kv_lens` and the block tables must be readable to the lengths that `seqs` and
/// `kv_lens` imply (a dense table has an entry for each block of a sequence's length); K, V and Q
/// must be readable, and `out` and `lse` writable, at every row that sizes, strides and valid
/// table entries lead to, and head scales to their length. Nobody may write the former or touch the latter during the call, rows of
/// `out` must not overlap each other, and `out`, `lse` and `workspace` must not overlap anything
/// else the call uses.
pub unsafe fn attend(
    args: &AttendArgs<'_>,
    level: CpuLevel,
    executor: &(impl Executor + ?Sized),
    workspace: &mut [u8],
) -> Result<()> {
    if !level.is_available() {
        return Err(Error::Unsupported { what: "the CPU level" });
    }
    // SAFETY: the caller's promise.
    unsafe { args.check() }?;
    let call = Call {
        args,
        cut: Cut::new(&args.shape),
        kernels: Kernels::of(level, args.kv.format),
        v_rotated: args.kv.coding(&args.shape, 0).v_rotated,
    };
    let mut totals = Start::FIRST;
    for s in 0..args.seqs {
        // SAFETY: the caller's promise, and `s < seqs`.
        totals = call.after(totals, unsafe { args.sequence(s) }?)?;
    }
    let workers = executor.workers().max(1);
    let memory = Workspace::new(workspace, &args.shape, args.seqs, workers, totals.floats)?;
    let (mut start, mut first) = (Start::FIRST, 0);
    while first < args.seqs {
        // SAFETY: `first < seqs`, and so are those that it leads.
        unsafe {
            let (count, together) = call.together(first)?;
            for s in first..first + count {
                let seq = args.sequence(s)?;
                let lead = if s == first { count } else { 0 };
                start = Start { lead, together, ..start };
                memory.set_start(s, start);
                let units = start.units + start.units_here(&call.seq_cut(&seq));
                start = Start { units, ..call.after(start, seq)? };
            }
            first += count;
        }
    }
    // Consecutive units share a worker, which can then prefetch from one into the next. The totals
    // fit in usize: `after` checks.
    let total = totals.units;
    let run = (total / (workers as u64 * RUNS_A_WORKER)).clamp(1, MAX_RUN);
    executor.run(total.div_ceil(run) as usize, &|worker, index| {
        let first = index as u64 * run;
        let end = total.min(first + run);
        for unit in first..end {
            let next = (unit + 1 < if workers == 1 { total } else { end }).then_some(unit + 1);
            // SAFETY: units are below the total and run once each; workers do not overlap.
            unsafe { call.run_unit(&memory, worker, unit, next) }
        }
    });
    if totals.merges != 0 {
        executor.run(totals.merges as usize, &|_, unit| {
            // SAFETY: as above; every state has been written.
            unsafe { call.run_merge(&memory, unit as u64) }
        });
    }
    Ok(())
}

/// Runs of units that a worker should get, so that workers end at about the same time.
const RUNS_A_WORKER: u64 = 8;
/// The most units of a run.
const MAX_RUN: u64 = 16;

/// One unit of attention: a cell of a sequence and a split of its keys.
struct Place {
    start: Start,
    seq: Sequence,
    cut: SeqCut,
    cell: Cell,
    split: u32,
}

/// One call, its arguments checked.
struct Call<'a> {
    args: &'a AttendArgs<'a>,
    cut: Cut,
    kernels: Kernels,
    /// Outputs are to be turned back.
    v_rotated: bool,
}

impl Call<'_> {
    /// What precedes the sequence after `seq`.
    fn after(&self, start: Start, seq: Sequence) -> Result<Start> {
        let cut = self.seq_cut(&seq);
        let overflow = Error::Overflow { what: "units of work" };
        let units = cut.cells.checked_mul(u64::from(cut.splits)).ok_or(overflow)?;
        let units = start.units.checked_add(units).ok_or(overflow)?;
        usize::try_from(units).map_err(|_| overflow)?;
        let merges = start.merges + if cut.splits > 1 { cut.cells } else { 0 };
        let floats =
            start.floats.checked_add(cut.state_floats(&self.args.shape)).ok_or(overflow)?;
        Ok(Start { units, merges, floats, ..start })
    }

    /// How many sequences from `first` on begin with the same blocks, and how many of their splits
    /// lie in those: they are attended by all of them one after another, while they are in the
    /// processor's caches. At least one sequence, of which nothing else shares with the one before.
    ///
    /// # Safety
    /// The promise of [`attend`]; `first < seqs`.
    unsafe fn together(&self, first: u32) -> Result<(u32, u32)> {
        let (args, mut count, mut together) = (self.args, 1, 0);
        // A window hides blocks whose table entries need not be there.
        if args.scoring.window.is_some() {
            return Ok((count, together));
        }
        // SAFETY: the caller's promise, here and below.
        let mut seq = unsafe { args.sequence(first) }?;
        while first + count < args.seqs {
            // SAFETY: see above.
            let next = unsafe { args.sequence(first + count) }?;
            let (cut, other) = (self.seq_cut(&seq), self.seq_cut(&next));
            let most = cut.common_splits(&other, u32::MAX);
            if most == 0 {
                break;
            }
            let blocks = seq.kv_len.min(next.kv_len) / args.kv.block_tokens;
            // SAFETY: see above; all keys are read, and so are all entries for them.
            let entry = |seq: &Sequence, at| unsafe { seq.table.add(at as usize).read() };
            let same = (0..blocks).take_while(|&at| entry(&seq, at) == entry(&next, at)).count();
            let splits = cut.common_splits(&other, same as u32 * args.kv.block_tokens);
            // One that shares less would take from the others what they share more.
            if splits == 0 || (count > 1 && splits < together) {
                break;
            }
            together = if count == 1 { splits } else { together.min(splits) };
            (count, seq) = (count + 1, next);
        }
        Ok((count, if count == 1 { 0 } else { together }))
    }

    /// First key that any row of the sequence sees.
    fn first_key(&self, seq: &Sequence) -> u32 {
        let window = self.args.scoring.window.map_or(i64::MAX, i64::from);
        let first = i64::from(seq.kv_len) - i64::from(seq.q_tokens) + 1;
        first.saturating_sub(window).clamp(0, i64::from(seq.kv_len)) as u32
    }

    fn seq_cut(&self, seq: &Sequence) -> SeqCut {
        self.cut.sequence(seq.q_tokens, self.first_key(seq), seq.kv_len)
    }

    /// The unit of attention `unit`.
    ///
    /// # Safety
    /// The promise of [`attend`]; `unit` must be below the total.
    unsafe fn place(&self, memory: &Workspace, unit: u64) -> Option<Place> {
        // SAFETY: the caller's promise; the sequence has been checked.
        unsafe {
            let (s, start) = memory.find(unit, |start| start.units);
            let cut = self.seq_cut(&self.args.sequence(s).ok()?);
            let (member, cell, split) = start.unit(&cut, unit - start.units);
            let (start, seq) = (memory.start(s + member), self.args.sequence(s + member).ok()?);
            let cut = self.seq_cut(&seq);
            Some(Place { start, seq, cut, cell: cut.cell(cell), split })
        }
    }

    /// Runs one unit of attention; writes the outputs where it has all keys of its rows.
    /// `next` is the unit that the worker will run after it.
    ///
    /// # Safety
    /// The promise of [`attend`]; units must be below the total, and `worker` not in use.
    unsafe fn run_unit(&self, memory: &Workspace, worker: usize, unit: u64, next: Option<u64>) {
        // SAFETY: the caller's promise.
        let Some(place) = (unsafe { self.place(memory, unit) }) else { return };
        let (scratch, private) = memory.worker(worker);
        let (v_dim, rows) = (self.args.shape.v_dim as usize, place.cell.rows());
        let alone = place.cut.splits == 1;
        let states = if alone {
            let (l, o) = (private.wrapping_add(rows), private.wrapping_add(2 * rows));
            States { m: private, l, o }
        } else {
            self.states(memory, &place.start, &place.cut, &place.cell, place.split)
        };
        let mut job = self.job(&place, states, scratch);
        // SAFETY: the caller's promise; the level was checked, and scratch is the worker's own.
        unsafe {
            if place.cut.decode {
                job.coming = next.and_then(|next| self.coming(&self.place(memory, next)?));
            }
            if job.kv_start >= job.kv_end {
                for r in 0..rows {
                    states.m.add(r).write(f32::NEG_INFINITY);
                    states.l.add(r).write(0.0);
                }
            } else if place.cut.decode {
                (self.kernels.decode)(&job)
            } else {
                (self.kernels.tile)(&job)
            }
            if alone {
                for r in 0..rows {
                    let ahead = (r + ROWS_AHEAD).min(rows - 1);
                    self.expect_row(&place.seq, &place.cell, ahead);
                    let part = Part {
                        m: states.m.add(r).read(),
                        l: states.l.add(r).read(),
                        o: states.o.add(r * v_dim),
                    };
                    self.write_row(&place.seq, &place.cell, r, &[part]);
                }
            }
        }
    }

    /// The states of one cell and split among those that wait for a merge.
    fn states(
        &self,
        memory: &Workspace,
        start: &Start,
        cut: &SeqCut,
        cell: &Cell,
        split: u32,
    ) -> States {
        let (rows, v_dim) = (cut.rows(&self.args.shape), u64::from(self.args.shape.v_dim));
        let base = start.floats + u64::from(split) * rows * (v_dim + 2);
        States {
            m: memory.states(base + cell.first_row),
            l: memory.states(base + rows + cell.first_row),
            o: memory.states(base + 2 * rows + cell.first_row * v_dim),
        }
    }

    /// The blocks of a sequence for one KV head.
    fn blocks(&self, seq: &Sequence, kv_head: u32) -> Blocks<'_> {
        let kv = &self.args.kv;
        let bytes = stride_bytes(kv.format) as isize;
        let at = |base: *mut u8, strides: &Strides| {
            base.wrapping_offset(kv_head as isize * strides.head as isize * bytes).cast_const()
        };
        let scales = &kv.scales;
        let scale_at = |base: *mut u8, strides: &Strides| {
            base.wrapping_offset(kv_head as isize * strides.head as isize).cast_const()
        };
        let (v_scales, v_scale_strides) = if self.args.shape.v_in_k {
            (scales.k, &scales.k_strides)
        } else {
            (scales.v, &scales.v_strides)
        };
        let scale_bytes =
            |strides: &Strides| [strides.block, strides.token].map(|bytes| bytes as isize);
        let (v, v_strides) =
            if self.args.shape.v_in_k { (kv.k, kv.k_strides) } else { (kv.v, kv.v_strides) };
        Blocks {
            table: seq.table,
            num_blocks: kv.num_blocks,
            block_tokens: kv.block_tokens,
            k: at(kv.k, &kv.k_strides),
            v: at(v, &v_strides),
            k_block_bytes: kv.k_strides.block as isize * bytes,
            k_token_bytes: kv.k_strides.token as isize * bytes,
            v_block_bytes: v_strides.block as isize * bytes,
            v_token_bytes: v_strides.token as isize * bytes,
            k_scales: scale_at(scales.k, &scales.k_strides),
            v_scales: scale_at(v_scales, v_scale_strides),
            k_scale_bytes: scale_bytes(&scales.k_strides),
            v_scale_bytes: scale_bytes(v_scale_strides),
            bad_block: self.args.bad_block,
        }
    }

    /// The keys of a place, for prefetching.
    fn coming(&self, place: &Place) -> Option<Coming<'_>> {
        let none = core::ptr::null_mut();
        let job = self.job(place, States { m: none, l: none, o: none }, none.cast());
        let Job { blocks, kv_start, kv_end, .. } = job;
        (kv_start < kv_end).then_some(Coming { blocks, kv_start, kv_end })
    }

    /// The job of a place, its keys cut to those that some row sees.
    fn job(&self, place: &Place, states: States, scratch: *mut u8) -> Job<'_> {
        let (args, seq, cell) = (self.args, &place.seq, &place.cell);
        let q_bytes = args.q.dtype.bytes() as isize;
        let heads = cell.head as usize..(cell.head + cell.kv_heads * cell.heads) as usize;
        let kv_bytes = stride_bytes(args.kv.format) as isize;
        let v_strides = if args.shape.v_in_k { &args.kv.k_strides } else { &args.kv.v_strides };
        let (from, to) = place.cut.split(place.split);
        let mut job = Job {
            kv_heads: cell.kv_heads as usize,
            group: cell.heads as usize,
            tokens: cell.tokens as usize,
            k_dim: args.shape.k_dim as usize,
            v_dim: args.shape.v_dim as usize,
            v_in_k: args.shape.v_in_k,
            q: args.q.row(seq.q_start + cell.token, cell.head),
            q_dtype: args.q.dtype,
            q_token_bytes: args.q.token_stride as isize * q_bytes,
            q_head_bytes: args.q.head_stride as isize * q_bytes,
            q_pos: i64::from(seq.kv_len) - i64::from(seq.q_tokens) + i64::from(cell.token),
            blocks: self.blocks(seq, cell.kv_head),
            k_head_bytes: args.kv.k_strides.head as isize * kv_bytes,
            v_head_bytes: v_strides.head as isize * kv_bytes,
            k_scale_head_bytes: args.kv.scales.k_strides.head as isize,
            v_scale_head_bytes: args.kv.scales.v_strides.head as isize,
            coding: args.kv.coding(&args.shape, cell.kv_head),
            kv_start: from,
            kv_end: to.min(seq.kv_len),
            coming: None,
            prefetch: Prefetch::of(args.kv.format),
            scale: args.scoring.scale,
            causal: args.scoring.causal,
            window: args.scoring.window.unwrap_or(u32::MAX),
            softcap: args.scoring.softcap,
            alibi: args.scoring.alibi.map(|slopes| &slopes[heads]),
            states,
            scratch,
        };
        (job.kv_start, job.kv_end) = (job.visible(0).0, job.visible(job.tokens - 1).1);
        job
    }

    /// Merges the splits of one cell.
    ///
    /// # Safety
    /// The promise of [`attend`]; `unit` must be below the total, and the states written.
    unsafe fn run_merge(&self, memory: &Workspace, unit: u64) {
        // SAFETY: the caller's promise; the sequence has been checked.
        unsafe {
            let (s, start) = memory.find(unit, |start| start.merges);
            let Ok(seq) = self.args.sequence(s) else { return };
            let cut = self.seq_cut(&seq);
            let cell = cut.cell(unit - start.merges);
            let v_dim = self.args.shape.v_dim as usize;
            let mut parts = [Part::EMPTY; MAX_PARTS];
            for r in 0..cell.rows() {
                for split in 0..cut.splits {
                    let states = self.states(memory, &start, &cut, &cell, split);
                    parts[split as usize] = Part {
                        m: states.m.add(r).read(),
                        l: states.l.add(r).read(),
                        o: states.o.add(r * v_dim),
                    };
                }
                self.write_row(&seq, &cell, r, &parts[..cut.splits as usize]);
            }
        }
    }

    /// Token and query head of row `r` of a cell.
    fn place_of(&self, seq: &Sequence, cell: &Cell, r: usize) -> (u32, u32) {
        let (token, head) = cell.row(r);
        (seq.q_start + token, head)
    }

    /// Prefetches the output of row `r` of a cell: outputs of different tokens lie pages apart.
    fn expect_row(&self, seq: &Sequence, cell: &Cell, r: usize) {
        let (token, head) = self.place_of(seq, cell, r);
        let out = self.args.out.row(token, head);
        let bytes = (self.args.shape.v_dim * self.args.out.dtype.bytes()) as usize;
        (0..bytes).step_by(64).for_each(|at| prefetch(out.wrapping_add(at)));
    }

    /// Merges the parts of row `r` of a cell and writes its output and LSE.
    unsafe fn write_row(&self, seq: &Sequence, cell: &Cell, r: usize, parts: &[Part]) {
        let args = self.args;
        let (token, head) = self.place_of(seq, cell, r);
        let sink = args.scoring.sinks.map(|sinks| sinks[head as usize]);
        // SAFETY: the caller's promise.
        unsafe {
            let out = args.out.row(token, head);
            let finish =
                if self.v_rotated { self.kernels.finish_rotated } else { self.kernels.finish };
            let lse = finish(parts, sink, args.out.dtype, out, args.shape.v_dim as usize);
            if !args.lse.is_null() {
                let row = token as usize * args.shape.q_heads as usize + head as usize;
                args.lse.add(row).write(lse);
            }
        }
    }
}

/// Rows between the one that is written and the one that is prefetched.
const ROWS_AHEAD: usize = 16;
