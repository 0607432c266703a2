//! The workspace of kernels that share the planning kernel: a batch whose contexts are cut into
//! pieces, each worked on once for every unit (a tile of query columns).
//!
//! The host knows only maxima. The bounds hold for any lengths: with pieces of at least
//! `total / target` tokens, a batch has at most `batch + target` of them, and the sequences cut at
//! all have fewer than `2 * target`. This file knows nothing of heads, types or kernels.

use super::Launch;
use super::decode::{DECODE_PLAN, Pieces};
use super::params::{DecodeItem, DecodePlanParams, In, Out};
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
    /// Units of a piece, at least 1.
    pub units: u32,
    /// Query columns of a unit.
    pub columns: u32,
    /// Channels of an output row.
    pub channels: u32,
    /// Blocks of threads that the device runs at a time.
    pub grid: u32,
}

/// Where the plan and the partial results lie in a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    bounds: SplitBounds,
    target: u32,
    max_items: u32,
    max_slots: u32,
    max_tickets: u32,
    offsets: [u64; 4],
    workspace_bytes: u64,
}

/// The addresses of a workspace that an attention kernel is given.
#[derive(Debug, Clone, Copy)]
pub(super) struct SplitAddresses {
    pub items: In<DecodeItem>,
    pub item_count: In<u32>,
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
        let (target, pieces) = match b.pieces {
            Pieces::Balanced => {
                let target = b.grid.div_ceil(b.units);
                (target, 2 * u64::from(target))
            }
            Pieces::Fixed(tokens) if tokens != 0 && tokens.is_multiple_of(TILE_TOKENS) => {
                let pieces = u64::from(b.batch) * u64::from(b.max_tokens.div_ceil(tokens));
                (1, pieces.max(2))
            }
            Pieces::Fixed(_) => {
                return Err(Error::invalid("pieces", "must be a positive multiple of 64 tokens"));
            }
        };
        let max_slots = u32::try_from(pieces).map_err(|_| OVERFLOW)?;
        let max_items = max_slots.checked_add(b.batch).ok_or(OVERFLOW)?;
        let max_tickets = max_slots.min(b.batch);
        let units = u64::from(b.units);
        let row_bytes = (u64::from(b.channels) + 1) * 4;
        // Items, their count, tickets, partial results: each from a multiple of 256 bytes.
        let parts = [
            u64::from(max_items) * size_of::<DecodeItem>() as u64,
            4,
            u64::from(max_tickets) * units * 4,
            (u64::from(max_slots) * units)
                .checked_mul(u64::from(b.columns) * row_bytes)
                .ok_or(OVERFLOW)?,
        ];
        let mut offsets = [0; 4];
        let mut at: u64 = 0;
        for (offset, bytes) in offsets.iter_mut().zip(parts) {
            *offset = at;
            at = at
                .checked_add(bytes)
                .and_then(|end| end.checked_next_multiple_of(256))
                .ok_or(OVERFLOW)?;
        }
        let workspace_bytes = at;
        Ok(Self { bounds, target, max_items, max_slots, max_tickets, offsets, workspace_bytes })
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
        Ok(SplitAddresses {
            items: In::at(workspace + self.offsets[0]),
            item_count: In::at(workspace + self.offsets[1]),
            tickets: Out::at(workspace + self.offsets[2]),
            partial: Out::at(workspace + self.offsets[3]),
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
            items: Out::at(at.items.0),
            item_count: Out::at(at.item_count.0),
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
            min_piece: TILE_TOKENS,
            target_pieces: self.target,
            max_items: self.max_items,
            max_slots: self.max_slots,
            max_tickets: self.max_tickets,
        };
        Ok((Launch { kernel: &DECODE_PLAN, grid: [1, 1, 1], shared_bytes: 2048 }, params))
    }
}
