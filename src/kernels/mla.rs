//! How multi-head latent attention decode is planned and launched: which width of kernel, its grid
//! and its workspace. Contexts are cut on the device, by the kernel that plans paged decode.

use super::decode::{Pieces, TILE_TOKENS};
use super::mla_token::{token_kernel, token_shared_bytes};
use super::params::{DecodePlanParams, In, MlaParams, Out};
use super::split::{Split, SplitBounds};
use super::{Kernel, Launch};
use crate::dtype::{DType, FormatClass, KvFormat};
use crate::error::{Error, Result};

kernels! {
    MLA_F16_C16 = "kvc_mla_f16_c16", "kvc_mla_params", 256;
    MLA_F16_C32 = "kvc_mla_f16_c32", "kvc_mla_params", 256;
    MLA_BF16_C16 = "kvc_mla_bf16_c16", "kvc_mla_params", 256;
    MLA_BF16_C32 = "kvc_mla_bf16_c32", "kvc_mla_params", 256;
}

/// Channels of a latent, and of them those that are values.
pub const MLA_DIM: u32 = 576;
/// Channels of an output row.
pub const MLA_VALUES: u32 = 512;
/// The most query heads, query tokens of a sequence.
const MAX_Q_HEADS: u32 = 128;
const MAX_Q_LEN: u32 = 8;
/// Tokens of a tile, tiles of 16-bit rows in shared memory at a time.
pub(super) const TOKENS: u32 = 32;
const STAGES: u32 = 2;
/// Bytes of shared memory between rows.
const ROW_PADDING: u32 = 16;

/// Shared memory of a kernel of this width and rows of so many bytes, but for what its rows have beside.
pub(super) const fn shared_bytes(columns: u32, row_bytes: u32, stages: u32) -> u32 {
    let tiles = stages * TOKENS * (row_bytes + ROW_PADDING);
    let scores = 2 * columns * (TOKENS + 4) * 4;
    let weights = columns * (TOKENS + 8) * 2;
    let (scales, readable, arrived) = (columns * 4, stages * TOKENS, 4);
    tiles + scores + weights + scales + readable + arrived
}

/// The largest call that a workspace must serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaBounds {
    /// How the cache stores latents: in f16 or bf16, FP8, INT8_T or INT4_T.
    pub format: KvFormat,
    /// Query heads, 1 to 128.
    pub q_heads: u32,
    /// Query tokens of each sequence, 1 to 8.
    pub q_len: u32,
    /// Most sequences, 1 to 2^20.
    pub batch: u32,
    /// Most tokens of a sequence; only fixed pieces depend on it.
    pub max_tokens: u32,
    /// How contexts are cut.
    pub pieces: Pieces,
    /// Multiprocessors of the device, at least 1.
    pub multiprocessors: u32,
}

/// Launches and workspace of latent attention decode within some bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaPlan {
    bounds: MlaBounds,
    kernel: &'static Kernel,
    units: u32,
    shared_bytes: u32,
    grid: u32,
    split: Split,
}

impl MlaPlan {
    /// Plans for calls within `bounds`.
    ///
    /// # Errors
    /// `InvalidArgument` for bounds outside their documented ranges, `Unsupported` for a cache type
    /// without a kernel, `Overflow` where the workspace does not fit the kernel's 32-bit counts.
    pub fn new(bounds: MlaBounds) -> Result<Self> {
        let b = bounds;
        if b.q_heads == 0 || b.q_heads > MAX_Q_HEADS {
            return Err(Error::invalid("q_heads", "must be 1 to 128"));
        }
        if b.q_len == 0 || b.q_len > MAX_Q_LEN {
            return Err(Error::invalid("q_len", "must be 1 to 8"));
        }
        if b.multiprocessors == 0 {
            return Err(Error::invalid("multiprocessors", "must be at least 1"));
        }
        // Narrow where one unit holds all columns: two blocks of it run on a multiprocessor.
        let narrow = b.q_heads * b.q_len <= 16;
        let (columns, resident) = if narrow { (16, 2) } else { (32, 1) };
        let (kernel, shared_bytes) = match (b.format, narrow) {
            (KvFormat::F16, true) => (&MLA_F16_C16, shared_bytes(columns, 2 * MLA_DIM, STAGES)),
            (KvFormat::F16, false) => (&MLA_F16_C32, shared_bytes(columns, 2 * MLA_DIM, STAGES)),
            (KvFormat::Bf16, true) => (&MLA_BF16_C16, shared_bytes(columns, 2 * MLA_DIM, STAGES)),
            (KvFormat::Bf16, false) => (&MLA_BF16_C32, shared_bytes(columns, 2 * MLA_DIM, STAGES)),
            (format, _) => match token_kernel(format, columns) {
                Some(kernel) => (kernel, token_shared_bytes(format, columns)),
                None => {
                    return Err(Error::Unsupported {
                        what: "latents on a device in a format other than f16, bf16, fp8, int8_t, int4_t",
                    });
                }
            },
        };
        let units = (b.q_heads * b.q_len).div_ceil(columns);
        let grid = b.multiprocessors.min(1 << 16) * resident;
        let split = Split::new(SplitBounds {
            q_len: b.q_len,
            batch: b.batch,
            max_tokens: b.max_tokens,
            pieces: b.pieces,
            units,
            columns,
            channels: MLA_VALUES,
            grid,
            granule: TILE_TOKENS,
            // Partial results are of 512 channels.
            shorts: 1,
        })?;
        Ok(Self { bounds, kernel, units, shared_bytes, grid, split })
    }

    /// How the cache stores latents.
    pub fn format(&self) -> KvFormat {
        self.bounds.format
    }

    /// The kernel that calls within the bounds run.
    pub fn kernel(&self) -> &'static Kernel {
        self.kernel
    }

    /// Bytes of workspace that any call within the bounds needs, from an address that is a multiple
    /// of 256.
    pub fn workspace_bytes(&self) -> u64 {
        self.split.workspace_bytes()
    }

    /// Fills the planning kernel's parameters for `batch` sequences and gives its launch. It runs
    /// once for each change of lengths; any number of decode launches (one a layer) may follow.
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
        self.split.plan_launch(workspace, seq_lens, batch, window, error_flag)
    }

    /// Fills what the plan determines of `params` and gives the launch of the decode kernel. The
    /// window must be that of the plan.
    ///
    /// # Errors
    /// `InvalidArgument` where a stride, an address, a type id or a size of `params` is not what
    /// its field documents; nothing is filled then.
    pub fn decode_launch(&self, workspace: u64, params: &mut MlaParams) -> Result<Launch> {
        if self.bounds.format.class() != FormatClass::Float {
            return Err(Error::InvalidState { why: "the plan is for rows of codes" });
        }
        self.fill(workspace, params, 8)
    }

    /// The same for rows of any format, of which 16 bytes are `chunk` elements.
    pub(super) fn fill(
        &self,
        workspace: u64,
        params: &mut MlaParams,
        chunk: i64,
    ) -> Result<Launch> {
        if params.block_tokens == 0 {
            return Err(Error::invalid("block_tokens", "must be at least 1"));
        }
        if params.k_block % chunk != 0
            || params.k_token % chunk != 0
            || !params.k.0.is_multiple_of(16)
        {
            return Err(Error::invalid("k", "rows must begin at multiples of 16 bytes"));
        }
        DType::from_id(params.q_dtype)?;
        DType::from_id(params.out_dtype)?;
        let strides = [params.q_row, params.q_head, params.out_row, params.out_head];
        if strides.iter().any(|stride| stride % 2 != 0)
            || !params.q.0.is_multiple_of(4)
            || !params.out.0.is_multiple_of(4)
        {
            return Err(Error::invalid("q, out", "rows must begin at even elements, and 4 bytes"));
        }
        if !params.scale.is_finite() {
            return Err(Error::invalid("scale", "must be finite"));
        }
        let at = self.split.addresses(workspace)?;
        params.head = at.head;
        params.ranges = at.ranges;
        params.spans = at.spans;
        params.tickets = at.tickets;
        params.partial = at.partial;
        params.units = self.units;
        params.max_slots = self.split.max_slots();
        params.q_len = self.bounds.q_len;
        params.q_heads = self.bounds.q_heads;
        Ok(Launch { kernel: self.kernel, grid: [self.grid, 1, 1], shared_bytes: self.shared_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> MlaBounds {
        MlaBounds {
            format: KvFormat::Bf16,
            q_heads: 16,
            q_len: 1,
            batch: 128,
            max_tokens: 1 << 17,
            pieces: Pieces::Balanced,
            multiprocessors: 132,
        }
    }

    fn params() -> MlaParams {
        let (q_dtype, out_dtype) = (DType::Bf16.id(), DType::F32.id());
        MlaParams { block_tokens: 64, q_dtype, out_dtype, scale: 0.1, ..MlaParams::default() }
    }

    #[test]
    fn width_memory_and_grid_follow_the_columns() {
        for (q_heads, q_len, name, units, shared, grid) in [
            (1, 1, "kvc_mla_bf16_c16", 1, 80_772, 264),
            (16, 1, "kvc_mla_bf16_c16", 1, 80_772, 264),
            (8, 2, "kvc_mla_bf16_c16", 1, 80_772, 264),
            (17, 1, "kvc_mla_bf16_c32", 1, 86_724, 132),
            (128, 1, "kvc_mla_bf16_c32", 4, 86_724, 132),
            (128, 8, "kvc_mla_bf16_c32", 32, 86_724, 132),
        ] {
            let plan = MlaPlan::new(MlaBounds { q_heads, q_len, ..sound() }).unwrap();
            let launch = plan.decode_launch(256, &mut params()).unwrap();
            assert_eq!((plan.kernel().name, plan.units), (name, units));
            assert_eq!((launch.shared_bytes, launch.grid), (shared, [grid, 1, 1]));
            // Two narrow blocks fit the 164 KB of sm_80, a wide one the 99 KB of sm_86.
            assert!(if units == 1 && grid == 264 {
                2 * (shared + 1024) <= 164 << 10
            } else {
                shared <= 99 << 10
            });
            // Balanced partial results do not grow with the context.
            assert!(plan.workspace_bytes() < 48 << 20, "{}", plan.workspace_bytes());
        }
    }

    #[test]
    fn bounds_outside_the_ranges_are_refused() {
        for bad in [
            MlaBounds { format: KvFormat::F32, ..sound() },
            MlaBounds { format: KvFormat::Kt4v4, ..sound() },
            MlaBounds { q_heads: 0, ..sound() },
            MlaBounds { q_heads: 129, ..sound() },
            MlaBounds { q_len: 0, ..sound() },
            MlaBounds { q_len: 9, ..sound() },
            MlaBounds { batch: 0, ..sound() },
            MlaBounds { batch: (1 << 20) + 1, ..sound() },
            MlaBounds { pieces: Pieces::Fixed(0), ..sound() },
            MlaBounds { pieces: Pieces::Fixed(100), ..sound() },
            MlaBounds { multiprocessors: 0, ..sound() },
        ] {
            assert!(MlaPlan::new(bad).is_err(), "{bad:?}");
        }
        let huge = MlaBounds {
            batch: 1 << 20,
            max_tokens: u32::MAX,
            pieces: Pieces::Fixed(64),
            ..sound()
        };
        assert_eq!(MlaPlan::new(huge), Err(Error::Overflow { what: "attention workspace" }));
    }

    #[test]
    fn impossible_calls_are_refused() {
        let plan = MlaPlan::new(sound()).unwrap();
        for bad in [
            MlaParams { block_tokens: 0, ..params() },
            MlaParams { k_block: 4, ..params() },
            MlaParams { k_token: 577, ..params() },
            MlaParams { k: In::at(8), ..params() },
            MlaParams { q: In::at(2), ..params() },
            MlaParams { out: Out::at(2), ..params() },
            MlaParams { q_row: 1, ..params() },
            MlaParams { out_head: 513, ..params() },
            MlaParams { q_dtype: 0, ..params() },
            MlaParams { out_dtype: 9, ..params() },
            MlaParams { scale: f32::NAN, ..params() },
        ] {
            assert!(plan.decode_launch(256, &mut { bad }).is_err(), "{bad:?}");
        }
        assert!(plan.decode_launch(256, &mut params()).is_ok());
        assert!(plan.decode_launch(128, &mut params()).is_err());
        assert!(plan.decode_launch(u64::MAX - 255, &mut params()).is_err());
        for (batch, window, good) in [
            (1, None, true),
            (128, Some(1), true),
            (0, None, false),
            (129, None, false),
            (1, Some(0), false),
        ] {
            assert_eq!(plan.plan_launch(0, In::NULL, batch, window, Out::NULL).is_ok(), good);
        }
    }
}
