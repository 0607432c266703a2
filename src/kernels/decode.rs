//! How paged decode is planned and launched.
//!
//! The host knows only maxima: it sizes the workspace and the grids, and a kernel cuts the contexts
//! into pieces from the lengths that stand on the device. So nothing is read back, and a captured
//! graph can be replayed with other lengths. The bounds hold for any lengths: with pieces of at
//! least `total / target` tokens, a batch has at most `batch + target` of them, and the sequences
//! cut at all have fewer than `2 * target`.

use super::params::{DecodeParams, DecodePlanParams, In, Out};
use super::{Kernel, Launch};
use crate::dtype::DType;
use crate::error::{Error, Result};

kernels! {
    DECODE_PLAN = "kvc_decode_plan", "kvc_decode_plan_params", 256;
    DECODE_F16_D64 = "kvc_decode_f16_d64", "kvc_decode_params", 128;
    DECODE_F16_D128 = "kvc_decode_f16_d128", "kvc_decode_params", 128;
    DECODE_BF16_D64 = "kvc_decode_bf16_d64", "kvc_decode_params", 128;
    DECODE_BF16_D128 = "kvc_decode_bf16_d128", "kvc_decode_params", 128;
}

/// The decode kernel for a cache of this type and head dimension.
///
/// # Errors
/// `Unsupported` where the library has no instance.
pub fn decode_kernel(cache: DType, head_dim: u32) -> Result<&'static Kernel> {
    match (cache, head_dim) {
        (DType::F16, 64) => Ok(&DECODE_F16_D64),
        (DType::F16, 128) => Ok(&DECODE_F16_D128),
        (DType::Bf16, 64) => Ok(&DECODE_BF16_D64),
        (DType::Bf16, 128) => Ok(&DECODE_BF16_D128),
        _ => Err(Error::Unsupported { what: "decode with this cache type and head_dim" }),
    }
}

/// Query columns of a unit: the columns of the matrix instruction.
const COLUMNS: u32 = 8;
/// Tokens that a block works on at a time.
const TILE_TOKENS: u32 = 64;
/// Stages of the pipeline, warps of a block.
const STAGES: u32 = 3;
const WARPS: u32 = 4;
/// The most query tokens of a sequence.
const MAX_Q_LEN: u32 = 8;

/// How contexts are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pieces {
    /// So that all blocks of the device have work.
    Balanced,
    /// In pieces of this many tokens (a multiple of 64): a sequence gets the same bits whatever
    /// else is in the batch.
    Fixed(u32),
}

/// The largest call that a workspace must serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeBounds {
    /// Type of the cache.
    pub cache: DType,
    /// Channels of a head.
    pub head_dim: u32,
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Query tokens of each sequence, 1 to 8.
    pub q_len: u32,
    /// Most sequences.
    pub batch: u32,
    /// Most tokens of a sequence; only fixed pieces depend on it.
    pub max_tokens: u32,
    /// How contexts are cut.
    pub pieces: Pieces,
    /// Multiprocessors of the device.
    pub multiprocessors: u32,
}

/// Launches and workspace of paged decode within some bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodePlan {
    bounds: DecodeBounds,
    units: u32,
    target: u32,
    max_items: u32,
    max_slots: u32,
    max_tickets: u32,
    offsets: [u64; 4],
    workspace_bytes: u64,
    shared_bytes: u32,
    grid: u32,
}

impl DecodePlan {
    /// Plans for calls within `bounds`.
    ///
    /// # Errors
    /// `InvalidArgument` for bounds outside their documented ranges, `Unsupported` where there is
    /// no kernel, `Overflow` where the workspace would not fit in the kernel's 32-bit counts.
    pub fn new(bounds: DecodeBounds) -> Result<Self> {
        let b = bounds;
        decode_kernel(b.cache, b.head_dim)?;
        if b.kv_heads == 0
            || b.q_heads == 0
            || !b.q_heads.is_multiple_of(b.kv_heads)
            || b.q_heads > 1 << 16
        {
            return Err(Error::invalid("q_heads", "must be a positive multiple of kv_heads"));
        }
        if b.q_len == 0 || b.q_len > MAX_Q_LEN {
            return Err(Error::invalid("q_len", "must be 1 to 8"));
        }
        if b.batch == 0 || b.batch > 1 << 20 || b.multiprocessors == 0 {
            return Err(Error::invalid("batch, multiprocessors", "must be 1 to 2^20, at least 1"));
        }
        let fixed = match b.pieces {
            Pieces::Balanced => None,
            Pieces::Fixed(tokens) if tokens != 0 && tokens.is_multiple_of(TILE_TOKENS) => {
                Some(tokens)
            }
            Pieces::Fixed(_) => {
                return Err(Error::invalid("pieces", "must be a positive multiple of 64 tokens"));
            }
        };
        let overflow = Error::Overflow { what: "decode workspace" };
        let units = b.kv_heads * (b.q_heads / b.kv_heads * b.q_len).div_ceil(COLUMNS);
        let row_bytes = (b.head_dim + 8) * 2;
        let shared_bytes = WARPS * STAGES * 2 * 16 * row_bytes;
        // As many blocks as the shared memory of a multiprocessor holds, at most four.
        let resident = (200 * 1024 / shared_bytes).clamp(1, 4);
        let grid = b.multiprocessors.min(1 << 16) * resident;
        let (target, pieces) = match fixed {
            None => {
                let target = grid.div_ceil(units);
                (target, u64::from(2 * target))
            }
            Some(tokens) => {
                let pieces = u64::from(b.batch) * u64::from(b.max_tokens.div_ceil(tokens));
                (1, pieces.max(2))
            }
        };
        let max_slots = u32::try_from(pieces).map_err(|_| overflow)?;
        let max_items = max_slots.checked_add(b.batch).ok_or(overflow)?;
        let max_tickets = max_slots.min(b.batch);
        // Items, their count, tickets, partial results: each from a multiple of 256 bytes.
        let mut offsets = [0; 4];
        let mut at: u64 = 0;
        let slots = u64::from(max_slots) * u64::from(units);
        let parts = [
            u64::from(max_items) * 32,
            4,
            u64::from(max_tickets) * u64::from(units) * 4,
            slots
                .checked_mul(u64::from(COLUMNS) * (u64::from(b.head_dim) + 1) * 4)
                .ok_or(overflow)?,
        ];
        for (offset, bytes) in offsets.iter_mut().zip(parts) {
            *offset = at;
            at = at
                .checked_add(bytes)
                .and_then(|end| end.checked_next_multiple_of(256))
                .ok_or(overflow)?;
        }
        let workspace_bytes = at;
        Ok(Self {
            bounds,
            units,
            target,
            max_items,
            max_slots,
            max_tickets,
            offsets,
            workspace_bytes,
            shared_bytes,
            grid,
        })
    }

    /// Bytes of workspace that any call within the bounds needs, from an address that is a multiple
    /// of 256.
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace_bytes
    }

    /// Fills the planning kernel's parameters for `batch` sequences and gives its launch. It runs
    /// once for each change of lengths; any number of decode launches (one a layer) may follow.
    ///
    /// # Errors
    /// `InvalidArgument` where `batch` is 0 or past the bounds.
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
        let params = DecodePlanParams {
            seq_lens,
            items: Out::at(workspace + self.offsets[0]),
            item_count: Out::at(workspace + self.offsets[1]),
            tickets: Out::at(workspace + self.offsets[2]),
            error_flag,
            batch,
            q_len: self.bounds.q_len,
            window: window.unwrap_or(0),
            units: self.units,
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

    /// Fills what the plan determines of `params` and gives the launch of the decode kernel.
    pub fn decode_launch(&self, workspace: u64, params: &mut DecodeParams) -> Result<Launch> {
        params.items = In::at(workspace + self.offsets[0]);
        params.item_count = In::at(workspace + self.offsets[1]);
        params.tickets = Out::at(workspace + self.offsets[2]);
        params.partial = Out::at(workspace + self.offsets[3]);
        params.units = self.units;
        params.max_slots = self.max_slots;
        params.q_len = self.bounds.q_len;
        params.q_heads = self.bounds.q_heads;
        params.kv_heads = self.bounds.kv_heads;
        if params.block_tokens == 0 {
            return Err(Error::invalid("block_tokens", "must be at least 1"));
        }
        let strides = [params.k_block, params.k_head, params.k_token];
        if strides
            .iter()
            .chain(&[params.v_block, params.v_head, params.v_token])
            .any(|s| s % 8 != 0)
            || !params.k.0.is_multiple_of(16)
            || !params.v.0.is_multiple_of(16)
        {
            return Err(Error::invalid("k, v", "rows must begin at multiples of 16 bytes"));
        }
        Ok(Launch {
            kernel: decode_kernel(self.bounds.cache, self.bounds.head_dim)?,
            grid: [self.grid, 1, 1],
            shared_bytes: self.shared_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> DecodeBounds {
        DecodeBounds {
            cache: DType::Bf16,
            head_dim: 128,
            q_heads: 32,
            kv_heads: 8,
            q_len: 1,
            batch: 256,
            max_tokens: 1 << 17,
            pieces: Pieces::Balanced,
            multiprocessors: 132,
        }
    }

    #[test]
    fn the_workspace_of_balanced_pieces_does_not_grow_with_the_context() {
        let plan = DecodePlan::new(sound()).unwrap();
        let longer = DecodePlan::new(DecodeBounds { max_tokens: u32::MAX, ..sound() }).unwrap();
        assert_eq!(plan.workspace_bytes(), longer.workspace_bytes());
        assert!(plan.workspace_bytes() < 4 << 20, "{}", plan.workspace_bytes());
        assert_eq!(plan.shared_bytes, 104_448);
        assert_eq!(plan.grid, 132);
    }

    #[test]
    fn bounds_outside_the_ranges_are_refused() {
        for bad in [
            DecodeBounds { head_dim: 72, ..sound() },
            DecodeBounds { cache: DType::F32, ..sound() },
            DecodeBounds { q_heads: 12, ..sound() },
            DecodeBounds { kv_heads: 0, ..sound() },
            DecodeBounds { q_len: 0, ..sound() },
            DecodeBounds { q_len: 9, ..sound() },
            DecodeBounds { batch: 0, ..sound() },
            DecodeBounds { pieces: Pieces::Fixed(0), ..sound() },
            DecodeBounds { pieces: Pieces::Fixed(100), ..sound() },
            DecodeBounds { multiprocessors: 0, ..sound() },
        ] {
            assert!(DecodePlan::new(bad).is_err(), "{bad:?}");
        }
        let huge = DecodeBounds {
            batch: 1 << 20,
            max_tokens: u32::MAX,
            pieces: Pieces::Fixed(64),
            ..sound()
        };
        assert_eq!(DecodePlan::new(huge), Err(Error::Overflow { what: "decode workspace" }));
    }
}
