//! The workspace of kernels that share the planning kernel: a batch whose contexts, one after
//! another, are cut into ranges, each worked on once for every unit (a tile of query columns).
//!
//! Balanced ranges take no notice of where sequences begin. There is one for each group of blocks
//! that the device runs at a time, for three quarters of the work, and shorter ones for the rest,
//! which blocks take as they come to their end: multiprocessors are not equally fast. A range can
//! then hold the end of one sequence and the beginning of another, two partial results. Fixed
//! ranges are pieces of one sequence.
//!
//! The host knows only maxima; the bounds hold for any lengths. This file knows nothing of heads,
//! types or kernels.

use super::Launch;
use super::decode::{DECODE_PLAN, Pieces};
use super::params::{DecodeHead, DecodePlanParams, DecodeRange, DecodeSpan, In, Out};
use crate::error::{Error, Result};

/// Tokens that pieces are multiples of, as the planning kernel has it.
const TILE_TOKENS: u32 = 64;
/// The most sequences of a batch.
const MAX_BATCH: u32 = 1 << 20;
const OVERFLOW: Error = Error::Overflow { what: "attention workspace" };

/// What decides how much is cut, and how large a partial result is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SplitBounds {
    /// Query tokens of each sequence.
    pub q_len: u32,
    /// Most sequences.
    pub batch: u32,
    /// Most tokens of a sequence; only fixed pieces depend on it.
    pub max_tokens: u32,
    /// How contexts are cut.
    pub pieces: Pieces,
    /// Units of a range, at least 1.
    pub units: u32,
    /// Query columns of a unit.
    pub columns: u32,
    /// Channels of an output row.
    pub channels: u32,
    /// Blocks of threads that the device runs at a time.
    pub grid: u32,
    /// Tokens that balanced ranges are multiples of: what a block works on at a time.
    pub granule: u32,
    /// Short balanced ranges for each long one, at least 1.
    pub shorts: u32,
}

/// Where the plan and the partial results lie in a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    bounds: SplitBounds,
    longs: u32,
    max_ranges: u32,
    max_slots: u32,
    offsets: [u64; 5],
    workspace_bytes: u64,
}

/// The addresses of a workspace that an attention kernel is given.
#[derive(Debug, Clone, Copy)]
pub(super) struct SplitAddresses {
    pub head: Out<DecodeHead>,
    pub ranges: In<DecodeRange>,
    pub spans: In<DecodeSpan>,
    pub tickets: Out<u32>,
    pub partial: Out<f32>,
}

impl Split {
    /// Sizes the workspace for any batch within `bounds`.
    ///
    /// # Errors
    /// `InvalidArgument` for a batch or pieces outside their ranges, `Overflow` where counts do not
    /// fit in 32 bits or the workspace not in 64.
    pub fn new(bounds: SplitBounds) -> Result<Self> {
        let b = bounds;
        if b.batch == 0 || b.batch > MAX_BATCH {
            return Err(Error::invalid("batch", "must be 1 to 2^20"));
        }
        let longs = (b.grid / b.units).max(1);
        let (ranges, slots) = match b.pieces {
            Pieces::Balanced => (u64::from(longs) * (1 + u64::from(b.shorts)), 2),
            Pieces::Fixed(tokens) if tokens != 0 && tokens.is_multiple_of(TILE_TOKENS) => {
                let pieces = u64::from(b.max_tokens.div_ceil(tokens).max(1));
                (u64::from(b.batch) * pieces, 1)
            }
            Pieces::Fixed(_) => {
                return Err(Error::invalid("pieces", "must be a positive multiple of 64 tokens"));
            }
        };
        let max_ranges = u32::try_from(ranges).map_err(|_| OVERFLOW)?;
        let max_slots = max_ranges.checked_mul(slots).ok_or(OVERFLOW)?;
        // Every unit of every range is counted in 32 bits, and a block of the grid beyond.
        let units = u64::from(b.units);
        if u64::from(max_ranges) * units > u64::from(u32::MAX - b.grid) {
            return Err(OVERFLOW);
        }
        let row_bytes = (u64::from(b.channels) + 1) * 4;
        // Head, ranges, spans, tickets, partial results: each from a multiple of 256 bytes.
        let parts = [
            size_of::<DecodeHead>() as u64,
            (u64::from(max_ranges) + 1) * size_of::<DecodeRange>() as u64,
            u64::from(b.batch) * size_of::<DecodeSpan>() as u64,
            u64::from(max_ranges) * units * 4,
            (u64::from(max_slots) * units)
                .checked_mul(u64::from(b.columns) * row_bytes)
                .ok_or(OVERFLOW)?,
        ];
        let mut offsets = [0; 5];
        let mut at: u64 = 0;
        for (offset, bytes) in offsets.iter_mut().zip(parts) {
            *offset = at;
            at = at
                .checked_add(bytes)
                .and_then(|end| end.checked_next_multiple_of(256))
                .ok_or(OVERFLOW)?;
        }
        Ok(Self { bounds, longs, max_ranges, max_slots, offsets, workspace_bytes: at })
    }

    /// Bytes of workspace that any call within the bounds needs.
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace_bytes
    }

    /// Slots of partial results, which the attention kernel must know.
    pub fn max_slots(&self) -> u32 {
        self.max_slots
    }

    /// The parts of a workspace at this address.
    ///
    /// # Errors
    /// `InvalidArgument` where it is no multiple of 256 or reaches past the address space.
    pub fn addresses(&self, workspace: u64) -> Result<SplitAddresses> {
        let fits = workspace.checked_add(self.workspace_bytes).is_some();
        if !fits || !workspace.is_multiple_of(256) {
            return Err(Error::invalid("workspace", "must begin at a multiple of 256 bytes"));
        }
        let [head, ranges, spans, tickets, partial] = self.offsets.map(|offset| workspace + offset);
        Ok(SplitAddresses {
            head: Out::at(head),
            ranges: In::at(ranges),
            spans: In::at(spans),
            tickets: Out::at(tickets),
            partial: Out::at(partial),
        })
    }

    /// The planning kernel's parameters for `batch` sequences, and its launch.
    ///
    /// # Errors
    /// `InvalidArgument` where `batch` is 0 or past the bounds, or the workspace is misaligned.
    pub fn plan_launch(
        &self,
        workspace: u64,
        seq_lens: In<i32>,
        batch: u32,
        window: Option<u32>,
        error_flag: Out<u32>,
    ) -> Result<(Launch, DecodePlanParams)> {
        if batch == 0 || batch > self.bounds.batch {
            return Err(Error::invalid("batch", "must be 1 to what the plan was made for"));
        }
        if window == Some(0) {
            return Err(Error::invalid("window", "must be at least 1 token"));
        }
        let at = self.addresses(workspace)?;
        let params = DecodePlanParams {
            seq_lens,
            head: at.head,
            ranges: Out::at(at.ranges.0),
            spans: Out::at(at.spans.0),
            tickets: at.tickets,
            error_flag,
            batch,
            q_len: self.bounds.q_len,
            window: window.unwrap_or(0),
            units: self.bounds.units,
            fixed_piece: match self.bounds.pieces {
                Pieces::Balanced => 0,
                Pieces::Fixed(tokens) => tokens,
            },
            granule: self.bounds.granule,
            longs: self.longs,
            max_ranges: self.max_ranges,
            ..DecodePlanParams::default()
        };
        Ok((Launch { kernel: &DECODE_PLAN, grid: [1, 1, 1], shared_bytes: 2048 }, params))
    }
}
