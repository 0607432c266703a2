//! The ragged batch of one step on a device: lengths, block tables and slots, uploaded once and
//! read by every layer.
//!
//! One allocation and one copy a step, whatever the number of layer groups. A serial number tells
//! apart what was made from different batches. Knows block ids, not who holds them.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use super::memory::DeviceMemory;
use super::{Backend, Stream};
use crate::cpu::RawRows;
use crate::error::{Error, Result};
use crate::kernels::{HostBatch, TILE_ROWS, Words};

/// A batch in host memory, as [`crate::cpu::AttendArgs`] describes it.
#[derive(Debug, Clone, Copy)]
pub struct BatchTables<'a> {
    /// `[seqs + 1]` offsets of query tokens, from 0.
    pub q_indptr: &'a [i32],
    /// `[seqs]` cached tokens.
    pub kv_lens: &'a [i32],
}

/// Block tables and slots of one layer group in host memory.
#[derive(Debug, Clone, Copy)]
pub struct GroupTables<'a> {
    /// `[seqs + 1]` offsets into `indices`, from 0.
    pub indptr: &'a [i32],
    /// Block ids.
    pub indices: &'a [i32],
    /// Slot of each query token: `block * block_tokens + offset`, or -1.
    pub slots: &'a [i64],
}

/// Byte offsets of a group's tables.
#[derive(Debug, Clone, Copy)]
struct GroupAt {
    indptr: u64,
    indices: u64,
    slots: u64,
    raw: Option<RawView>,
}

/// A batch in device memory. Reused from step to step, it keeps its memory.
#[derive(Debug, Default)]
pub struct DeviceBatch {
    memory: Option<DeviceMemory>,
    staging: Vec<u8>,
    serial: u64,
    seqs: u32,
    rows: u32,
    max_q: u32,
    max_kv: u32,
    q_indptr: u64,
    kv_lens: u64,
    row_numbers: u64,
    parts: Parts,
    runs: Vec<Run>,
    groups: Vec<GroupAt>,
}

/// Serial numbers are those of the process: two batches never have the same.
static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

impl DeviceBatch {
    /// Puts a batch of this many groups into device memory.
    ///
    /// # Errors
    /// `InvalidArgument` for tables that do not fit together; `OutOfMemory`, `DeviceFailed`.
    pub fn upload<'a>(
        &mut self,
        backend: &Arc<dyn Backend>,
        stream: Stream,
        batch: &BatchTables,
        groups: impl Iterator<Item = GroupTables<'a>>,
    ) -> Result<()> {
        self.upload_raw(backend, stream, batch, groups.map(|group| (group, None)))
    }

    /// The same with the raw rows of groups whose format has sealed tiles.
    ///
    /// # Errors
    /// As for [`upload`](Self::upload).
    pub(crate) fn upload_raw<'a>(
        &mut self,
        backend: &Arc<dyn Backend>,
        stream: Stream,
        batch: &BatchTables,
        groups: impl Iterator<Item = (GroupTables<'a>, Option<&'a RawRows>)>,
    ) -> Result<()> {
        self.serial = 0;
        let seqs = batch.kv_lens.len();
        let rises = |list: &[i32]| list[0] == 0 && list.windows(2).all(|w| w[0] <= w[1]);
        if batch.q_indptr.len() != seqs + 1 || !rises(batch.q_indptr) {
            return Err(Error::invalid(
                "q_indptr",
                "must rise from 0, one entry more than kv_lens",
            ));
        }
        let rows = batch.q_indptr[seqs] as usize;
        self.staging.clear();
        self.groups.clear();
        self.q_indptr = self.put(batch.q_indptr.iter().map(|x| x.to_ne_bytes()))?;
        self.kv_lens = self.put(batch.kv_lens.iter().map(|x| x.to_ne_bytes()))?;
        self.row_numbers = self.put((0..rows).map(|row| (row as u32).to_ne_bytes()))?;
        self.parts = Parts::default();
        self.runs.clear();
        for (group, raw) in groups {
            if raw.is_some() && self.parts.count == 0 {
                self.put_parts(batch)?;
            }
            let fits = group.indptr.len() == seqs + 1 && group.slots.len() == rows;
            if !fits || !rises(group.indptr) || group.indptr[seqs] as usize > group.indices.len() {
                return Err(Error::invalid("indptr, slots", "do not fit the batch"));
            }
            let at = GroupAt {
                indptr: self.put(group.indptr.iter().map(|x| x.to_ne_bytes()))?,
                indices: self.put(group.indices.iter().map(|x| x.to_ne_bytes()))?,
                slots: self.put(group.slots.iter().map(|x| x.to_ne_bytes()))?,
                raw: raw.map(|raw| self.put_raw(raw, seqs, rows)).transpose()?,
            };
            self.groups.push(at);
        }
        let bytes = self.staging.len() as u64;
        let mut memory = match self.memory.take() {
            Some(memory) if memory.is_on(backend) => memory,
            _ => DeviceMemory::new(backend, bytes)?,
        };
        let grown = memory.grow(bytes);
        let to = memory.address();
        self.memory = Some(memory);
        grown?;
        // SAFETY: the memory has these bytes; the staging buffer is not page-locked.
        unsafe { backend.upload(to, &self.staging, stream) }?;
        let lengths = batch.q_indptr.windows(2).map(|w| (w[1] - w[0]) as u32);
        self.seqs = u32::try_from(seqs).map_err(|_| Error::Overflow { what: "seqs" })?;
        self.rows = rows as u32;
        self.max_q = lengths.max().unwrap_or(0);
        self.max_kv = batch.kv_lens.iter().map(|&n| n.max(0) as u32).max().unwrap_or(0);
        self.serial = NEXT_SERIAL.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Cuts the sequences into rows at positions between two multiples of `TILE_ROWS`: those are the
    /// sequences of attention calls over sealed tiles.
    fn put_parts(&mut self, batch: &BatchTables) -> Result<()> {
        let span = TILE_ROWS as i32;
        let mut lists = [const { Vec::new() }; 3];
        let rows = batch.q_indptr[batch.kv_lens.len()] as usize;
        for list in &mut lists {
            let refused = Error::OutOfMemory { bytes: 4 * rows as u64 };
            list.try_reserve(rows + 1).map_err(|_| refused)?;
        }
        let [q_indptr, lens, owners] = &mut lists;
        q_indptr.push(0);
        let mut most = 0;
        for (seq, (ends, &len)) in batch.q_indptr.windows(2).zip(batch.kv_lens).enumerate() {
            let (mut row, mut position) = (ends[0], len - (ends[1] - ends[0]));
            if position < 0 {
                return Err(Error::invalid("kv_lens", "must count the tokens of the rows"));
            }
            while row < ends[1] {
                let count = (span - position % span).min(ends[1] - row);
                (row, position) = (row + count, position + count);
                q_indptr.push(row);
                lens.push(position);
                owners.push(seq as i32);
                most = most.max(count as u32);
            }
            let (seq, part) = (seq as u32, owners.len() as u32);
            let rows = (ends[1] - ends[0]) as u32;
            let long = rows > TILE_ROWS;
            match self.runs.last_mut().filter(|run| run.long == long || rows == 0) {
                Some(run) => {
                    run.seqs.end = seq + 1;
                    run.parts.end = part;
                    run.rows += rows;
                    run.end_row = ends[1] as u32;
                }
                None => {
                    let refused = Error::OutOfMemory { bytes: size_of::<Run>() as u64 };
                    self.runs.try_reserve(1).map_err(|_| refused)?;
                    let first = self.runs.last().map_or(0, |run| run.parts.end);
                    let (seqs, parts, end_row) = (seq..seq + 1, first..part, ends[1] as u32);
                    self.runs.push(Run { long, seqs, parts, rows, end_row });
                }
            }
        }
        self.parts = Parts {
            count: owners.len() as u32,
            rows: most,
            q_indptr: self.put(q_indptr.iter().map(|x| x.to_ne_bytes()))?,
            lens: self.put(lens.iter().map(|x| x.to_ne_bytes()))?,
            owners: self.put(owners.iter().map(|x| x.to_ne_bytes()))?,
        };
        Ok(())
    }

    /// The sequences of a batch with raw rows in runs of those that have few rows and those that have
    /// many.
    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    fn put_raw(&mut self, raw: &RawRows, seqs: usize, rows: usize) -> Result<RawView> {
        let fits = raw.indptr.len() == seqs + 1
            && raw.indptr.last().is_some_and(|&end| end as usize == raw.blocks.len())
            && [raw.staging.len(), raw.scratch.len()] == [rows; 2];
        if !fits {
            return Err(Error::invalid("raw rows", "do not fit the batch"));
        }
        // Which tiles could not be sealed, and behind them how many spares were taken.
        let refused = self.put((0..raw.seals.len() + 1).map(|_| [0; 4]))?;
        let words = |pair: [i32; 2]| {
            let [a, b] = pair.map(|x| x.to_ne_bytes());
            [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
        };
        Ok(RawView {
            indptr: self.put(raw.indptr.iter().map(|x| x.to_ne_bytes()))?,
            blocks: self.put(raw.blocks.iter().map(|raw| words([raw.tile, raw.slot])))?,
            staging: self.put(raw.staging.iter().map(|x| x.to_ne_bytes()))?,
            scratch: self.put(raw.scratch.iter().map(|x| x.to_ne_bytes()))?,
            seals: self.put(raw.seals.iter().map(|seal| words([seal.slot, seal.block])))?,
            spares: self.put(raw.spares.iter().map(|x| x.to_ne_bytes()))?,
            refused,
            spares_taken: refused + 4 * raw.seals.len() as u64,
            seal_count: raw.seals.len() as u32,
            spare_count: raw.spares.len() as u32,
            scratch_blocks: raw.scratch_blocks,
        })
    }

    /// Appends a table to what will be uploaded, from a multiple of 16 bytes; where it is.
    fn put<const N: usize>(
        &mut self,
        entries: impl ExactSizeIterator<Item = [u8; N]>,
    ) -> Result<u64> {
        let at = self.staging.len().next_multiple_of(16);
        let bytes = entries.len() * N;
        let refused = Error::OutOfMemory { bytes: bytes as u64 };
        self.staging.try_reserve(bytes + 16).map_err(|_| refused)?;
        self.staging.resize(at, 0);
        entries.for_each(|entry| self.staging.extend_from_slice(&entry));
        Ok(at as u64)
    }

    /// The batch that it holds, as the host uploaded it.
    ///
    /// # Errors
    /// As for [`view`](Self::view).
    pub(super) fn host(&self, group: usize, block_tokens: u32) -> Result<HostBatch<'_>> {
        self.view(group)?;
        let (at, seqs) = (&self.groups[group], self.seqs as usize);
        let words = |from: u64, count: usize| {
            Words(self.staging[from as usize..][..4 * count].as_chunks::<4>().0)
        };
        let indptr = words(at.indptr, seqs + 1);
        Ok(HostBatch {
            q_indptr: words(self.q_indptr, seqs + 1),
            kv_lens: words(self.kv_lens, seqs),
            indptr,
            indices: words(at.indices, indptr.get(seqs) as usize),
            block_tokens,
        })
    }

    /// The batch that it holds.
    ///
    /// # Errors
    /// `InvalidState` where nothing was uploaded, `InvalidArgument` for a group it does not have.
    pub(super) fn view(&self, group: usize) -> Result<BatchView> {
        let empty = Error::InvalidState { why: "the batch is not on the device" };
        let memory = self.memory.as_ref().filter(|_| self.serial != 0).ok_or(empty)?;
        let at = self.groups.get(group).ok_or(Error::invalid("group", "is not in the batch"))?;
        let base = memory.address();
        Ok(BatchView {
            serial: self.serial,
            seqs: self.seqs,
            rows: self.rows,
            max_q: self.max_q,
            max_kv: self.max_kv,
            q_indptr: base + self.q_indptr,
            kv_lens: base + self.kv_lens,
            row_numbers: base + self.row_numbers,
            indptr: base + at.indptr,
            indices: base + at.indices,
            slots: base + at.slots,
            parts: Parts {
                q_indptr: base + self.parts.q_indptr,
                lens: base + self.parts.lens,
                owners: base + self.parts.owners,
                ..self.parts
            },
            raw: at.raw.map(|raw| raw.from(base)),
        })
    }
}

/// The sequences of attention calls over sealed tiles, each of a few rows of one that owns it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Parts {
    pub count: u32,
    /// Most rows of one.
    pub rows: u32,
    /// `[count + 1]` offsets of their rows.
    pub q_indptr: u64,
    /// `[count]` tokens up to their last row.
    pub lens: u64,
    /// `[count]` sequences of the batch.
    pub owners: u64,
}

/// Neighbouring sequences of a batch, all of more than `TILE_ROWS` rows or all of no more.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub long: bool,
    pub seqs: Range<u32>,
    pub parts: Range<u32>,
    /// Rows of all of them.
    pub rows: u32,
    /// The row of the batch at which they end.
    pub end_row: u32,
}

/// Where the raw rows of one group go, and what becomes of them: `RawRows` on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawView {
    pub indptr: u64,
    pub blocks: u64,
    pub staging: u64,
    pub scratch: u64,
    pub seals: u64,
    pub spares: u64,
    /// A word for each of `seals`.
    pub refused: u64,
    pub spares_taken: u64,
    pub seal_count: u32,
    pub spare_count: u32,
    pub scratch_blocks: u32,
}

impl RawView {
    /// Addresses of what were offsets.
    fn from(self, base: u64) -> Self {
        Self {
            indptr: base + self.indptr,
            blocks: base + self.blocks,
            staging: base + self.staging,
            scratch: base + self.scratch,
            seals: base + self.seals,
            spares: base + self.spares,
            refused: base + self.refused,
            spares_taken: base + self.spares_taken,
            ..self
        }
    }
}

/// Device addresses of a batch and one group's tables, and the maxima that plans need.
#[derive(Debug, Clone, Copy)]
pub(super) struct BatchView {
    pub serial: u64,
    pub seqs: u32,
    pub rows: u32,
    /// Most query tokens of a sequence.
    pub max_q: u32,
    /// Most cached tokens of a sequence.
    pub max_kv: u32,
    pub q_indptr: u64,
    pub kv_lens: u64,
    /// `[rows]`: 0, 1, 2, ...
    pub row_numbers: u64,
    pub indptr: u64,
    pub indices: u64,
    pub slots: u64,
    pub parts: Parts,
    pub raw: Option<RawView>,
}
