//! How paged decode is planned and launched.
//!
//! The host knows only maxima: it sizes the workspace and the grids (split.rs), and a kernel cuts
//! the contexts into pieces from the lengths that stand on the device. So nothing is read back, and
//! a captured graph can be replayed with other lengths. What is particular to rows of codes is in
//! decode_token.rs.

use super::decode_tile::{tile_kernel, tile_residence};
use super::decode_token::{token_kernel, token_residence};
use super::params::{DecodeParams, DecodePlanParams, In, Out};
use super::residence::{RESERVED_BYTES, Residence};
use super::split::{Split, SplitBounds};
use super::{Kernel, Launch};
use crate::dtype::{DType, FormatClass, KvFormat};
use crate::error::{Error, Result};

kernels! {
    DECODE_PLAN = "kvc_decode_plan", "kvc_decode_plan_params", 256;
    F16_D64 = "kvc_decode_f16_d64", "kvc_decode_params", THREADS;
    F16_D80 = "kvc_decode_f16_d80", "kvc_decode_params", THREADS;
    F16_D96 = "kvc_decode_f16_d96", "kvc_decode_params", THREADS;
    F16_D128 = "kvc_decode_f16_d128", "kvc_decode_params", THREADS;
    F16_D192 = "kvc_decode_f16_d192", "kvc_decode_params", THREADS;
    F16_D256 = "kvc_decode_f16_d256", "kvc_decode_params", THREADS;
    BF16_D64 = "kvc_decode_bf16_d64", "kvc_decode_params", THREADS;
    BF16_D80 = "kvc_decode_bf16_d80", "kvc_decode_params", THREADS;
    BF16_D96 = "kvc_decode_bf16_d96", "kvc_decode_params", THREADS;
    BF16_D128 = "kvc_decode_bf16_d128", "kvc_decode_params", THREADS;
    BF16_D192 = "kvc_decode_bf16_d192", "kvc_decode_params", THREADS;
    BF16_D256 = "kvc_decode_bf16_d256", "kvc_decode_params", THREADS;
}

/// The decode kernel for a cache of this format and head dimension.
///
/// # Errors
/// `Unsupported` where the library has no instance.
pub fn decode_kernel(format: KvFormat, head_dim: u32) -> Result<&'static Kernel> {
    match (format, head_dim) {
        (KvFormat::F16, 64) => Ok(&F16_D64),
        (KvFormat::F16, 80) => Ok(&F16_D80),
        (KvFormat::F16, 96) => Ok(&F16_D96),
        (KvFormat::F16, 128) => Ok(&F16_D128),
        (KvFormat::F16, 192) => Ok(&F16_D192),
        (KvFormat::F16, 256) => Ok(&F16_D256),
        (KvFormat::Bf16, 64) => Ok(&BF16_D64),
        (KvFormat::Bf16, 80) => Ok(&BF16_D80),
        (KvFormat::Bf16, 96) => Ok(&BF16_D96),
        (KvFormat::Bf16, 128) => Ok(&BF16_D128),
        (KvFormat::Bf16, 192) => Ok(&BF16_D192),
        (KvFormat::Bf16, 256) => Ok(&BF16_D256),
        _ => token_kernel(format, head_dim)
            .or_else(|| tile_kernel(format, head_dim))
            .ok_or(Error::Unsupported { what: "decode with this KV format and head_dim" }),
    }
}

/// Blocks of a multiprocessor that the registers of a kernel leave room for: what its source asks
/// the compiler for.
fn blocks_by_registers(head_dim: u32) -> u32 {
    match head_dim {
        0..=80 => 3,
        81..=192 => 2,
        _ => 1,
    }
}

/// Threads of a block.
pub(super) const THREADS: u32 = 128;
/// Query columns of a unit: the columns of the matrix instruction.
pub(super) const COLUMNS: u32 = 8;
/// Tokens that a block works on at a time.
pub(super) const TILE_TOKENS: u32 = 64;
/// The most stages of a pipeline.
const MAX_STAGES: u32 = 3;
/// Shared memory behind the stages: two barriers of 8 bytes for each.
const BARRIER_BYTES: u32 = 64;
/// Tokens of a run, which a bulk copy brings.
const RUN_TOKENS: u32 = 8;
/// Bytes that rows of codes begin at multiples of.
pub(super) const CHUNK_BYTES: i64 = 16;
/// The same for rows of 16-bit elements.
pub(super) const CHUNK_ELEMENTS: i64 = 8;
/// The most query tokens of a sequence.
const MAX_Q_LEN: u32 = 8;

/// The stages of the pipelines of 16-bit rows with the most tiles under way, then the most blocks;
/// `None` where not even one stage fits.
fn row_residence(head_dim: u32, multiprocessor_shared_bytes: u32) -> Option<Residence> {
    let with = |stages: u32| {
        // K and V, rows of eight elements more than they hold.
        let shared_bytes = stages * 2 * TILE_TOKENS * (head_dim + 8) * 2 + BARRIER_BYTES;
        let fit = multiprocessor_shared_bytes / (shared_bytes + RESERVED_BYTES);
        let blocks = fit.min(blocks_by_registers(head_dim));
        Residence { stages, blocks, shared_bytes, query_at: 0 }
    };
    Residence::most_under_way((1..=MAX_STAGES).map(with))
}

/// How contexts are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pieces {
    /// So that all blocks of the device have work.
    Balanced,
    /// In pieces of this many tokens (a multiple of 64): a sequence gets the same bits whatever
    /// else is in the batch and wherever it stands there, from a cache of the same layout and, with
    /// a window, within bounds of the same `q_len`.
    Fixed(u32),
}

/// The largest call that a workspace must serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeBounds {
    /// How the cache stores K and V.
    pub format: KvFormat,
    /// Channels of a head.
    pub head_dim: u32,
    /// Tokens of a sealed tile, 64 or 128; of no meaning for other formats.
    pub tile_tokens: u32,
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
    /// Shared memory of a multiprocessor, in bytes: [`SM90_SHARED_BYTES`](super::SM90_SHARED_BYTES), 167936 on sm_80, 102400
    /// on sm_86 and sm_89.
    pub multiprocessor_shared_bytes: u32,
}

/// Launches and workspace of paged decode within some bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodePlan {
    pub(super) bounds: DecodeBounds,
    units: u32,
    pub(super) residence: Residence,
    launch: Launch,
    split: Split,
}

impl DecodePlan {
    /// Plans for calls within `bounds`.
    ///
    /// # Errors
    /// `InvalidArgument` for bounds outside their documented ranges, `Unsupported` where there is
    /// no kernel, `Overflow` where the workspace would not fit in the kernel's 32-bit counts.
    pub fn new(bounds: DecodeBounds) -> Result<Self> {
        let b = bounds;
        let kernel = decode_kernel(b.format, b.head_dim)?;
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
        if b.multiprocessors == 0 {
            return Err(Error::invalid("multiprocessors", "must be at least 1"));
        }
        let units = b.kv_heads * (b.q_heads / b.kv_heads * b.q_len).div_ceil(COLUMNS);
        let residence = match b.format.class() {
            FormatClass::Float => row_residence(b.head_dim, b.multiprocessor_shared_bytes),
            FormatClass::Token => {
                token_residence(b.format, b.head_dim, b.multiprocessor_shared_bytes)
            }
            // The kernel's strips are of 64 tokens.
            FormatClass::Tile if ![64, 128].contains(&b.tile_tokens) => {
                return Err(Error::Unsupported { what: "tiles but of 64 or 128 on a device" });
            }
            FormatClass::Tile => {
                let (dim, tokens) = (b.head_dim, b.tile_tokens);
                tile_residence(b.format, dim, tokens, b.multiprocessor_shared_bytes)
            }
        };
        let residence = residence
            .ok_or(Error::Unsupported { what: "decode with this little shared memory" })?;
        let grid = b.multiprocessors.min(1 << 16) * residence.blocks;
        let split = Split::new(SplitBounds {
            q_len: b.q_len,
            batch: b.batch,
            max_tokens: b.max_tokens,
            pieces: b.pieces,
            units,
            columns: COLUMNS,
            channels: b.head_dim,
            grid,
            // A warp works on whole sealed tiles.
            granule: match b.format.class() {
                FormatClass::Tile => THREADS / 32 * b.tile_tokens,
                _ => TILE_TOKENS,
            },
            shorts: 4,
        })?;
        let launch = Launch { kernel, grid: [grid, 1, 1], shared_bytes: residence.shared_bytes };
        Ok(Self { bounds, units, residence, launch, split })
    }

    /// The launch of any decode call within the bounds, apart from the planning kernel that comes
    /// before it: which kernel, how many blocks, how much shared memory.
    pub fn kernel(&self) -> Launch {
        self.launch
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
    /// `InvalidArgument` where `batch` is 0 or past the bounds, the window 0 or the workspace
    /// misaligned.
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
    /// window must be that of the plan: layers with another have a plan of their own.
    ///
    /// # Errors
    /// `InvalidArgument` for a misaligned workspace, a null address that is not optional, rows that do not begin at a
    /// multiple of 16 bytes in `k` and `v` or of 4 bytes in `q` and `out`, types that are not
    /// those of `src/dtype`, a scale or soft-cap that is not finite, no block_tokens.
    pub fn decode_launch(&self, workspace: u64, params: &mut DecodeParams) -> Result<Launch> {
        if !self.bounds.format.is_float() {
            return Err(Error::InvalidState { why: "the plan is for rows of codes" });
        }
        self.fill(workspace, params, CHUNK_ELEMENTS)?;
        let p = params;
        let row = i64::from(self.bounds.head_dim);
        let runs = p.block_tokens.is_multiple_of(RUN_TOKENS);
        p.bulk = u32::from(runs && p.k_token == row && p.v_token == row);
        Ok(self.launch)
    }

    /// What every kernel of the family takes from the plan; `chunk` units of strides are 16 bytes.
    pub(super) fn fill(&self, workspace: u64, p: &mut DecodeParams, chunk: i64) -> Result<()> {
        let at = self.split.addresses(workspace)?;
        check_call(p, chunk)?;
        p.head = at.head;
        p.ranges = at.ranges;
        p.spans = at.spans;
        p.tickets = at.tickets;
        p.partial = at.partial;
        p.units = self.units;
        p.max_slots = self.split.max_slots();
        p.q_len = self.bounds.q_len;
        p.q_heads = self.bounds.q_heads;
        p.kv_heads = self.bounds.kv_heads;
        p.stages = self.residence.stages;
        Ok(())
    }

    /// The format of the cache.
    pub fn format(&self) -> KvFormat {
        self.bounds.format
    }
}

/// What the kernel takes for granted of a call.
fn check_call(p: &DecodeParams, chunk: i64) -> Result<()> {
    let null = [p.q.0, p.k.0, p.v.0, p.out.0, p.table.0, p.seq_lens.0].contains(&0);
    if null {
        return Err(Error::invalid("q, k, v, out, table, seq_lens", "must not be null"));
    }
    if p.block_tokens == 0 {
        return Err(Error::invalid("block_tokens", "must be at least 1"));
    }
    if !p.scale.is_finite() || !p.softcap.is_finite() || p.softcap < 0.0 {
        return Err(Error::invalid("scale, softcap", "must be finite, the soft-cap not negative"));
    }
    let strides = [p.k_block, p.k_head, p.k_token, p.v_block, p.v_head, p.v_token];
    if strides.iter().any(|s| s % chunk != 0) || !(p.k.0 | p.v.0).is_multiple_of(16) {
        return Err(Error::invalid("k, v", "rows must begin at multiples of 16 bytes"));
    }
    for (dtype, at, strides, what) in [
        (p.q_dtype, p.q.0, [p.q_row, p.q_head], "q"),
        (p.out_dtype, p.out.0, [p.out_row, p.out_head], "out"),
    ] {
        let even = match dtype {
            id if id == DType::F32.id() => 1,
            id if id == DType::F16.id() || id == DType::Bf16.id() => 2,
            _ => return Err(Error::invalid(what, "must be f32, f16 or bf16")),
        };
        if !at.is_multiple_of(4) || strides.iter().any(|s| s % even != 0) {
            return Err(Error::invalid(what, "rows must begin at multiples of 4 bytes"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::residence::SM90_SHARED_BYTES;
    use super::*;

    fn sound() -> DecodeBounds {
        DecodeBounds {
            format: KvFormat::Bf16,
            head_dim: 128,
            tile_tokens: 64,
            q_heads: 32,
            kv_heads: 8,
            q_len: 1,
            batch: 256,
            max_tokens: 1 << 17,
            pieces: Pieces::Balanced,
            multiprocessors: 132,
            multiprocessor_shared_bytes: SM90_SHARED_BYTES,
        }
    }

    #[test]
    fn the_workspace_of_balanced_pieces_does_not_grow_with_the_context() {
        let plan = DecodePlan::new(sound()).unwrap();
        let longer = DecodePlan::new(DecodeBounds { max_tokens: u32::MAX, ..sound() }).unwrap();
        assert_eq!(plan.workspace_bytes(), longer.workspace_bytes());
        assert!(plan.workspace_bytes() < 12 << 20, "{}", plan.workspace_bytes());
    }

    #[test]
    fn a_plan_names_the_kernel_it_will_run() {
        let plan = DecodePlan::new(sound()).unwrap();
        let kernel = plan.kernel();
        assert_eq!((kernel.kernel.name, kernel.kernel.threads), ("kvc_decode_bf16_d128", 128));
        assert_eq!((kernel.grid, kernel.shared_bytes), ([264, 1, 1], 104_512));
        let mut params = call();
        assert_eq!(plan.decode_launch(4096, &mut params), Ok(kernel));
    }

    #[test]
    fn the_pipeline_fits_the_device() {
        let best =
            |head_dim, kib: u32| row_residence(head_dim, kib * 1024).map(|r| (r.stages, r.blocks));
        assert_eq!(
            [64, 80, 96, 128].map(|d| best(d, 228)),
            [(3, 3), (3, 3), (3, 2), (3, 2)].map(Some)
        );
        assert_eq!([192, 256].map(|d| best(d, 228)), [(2, 2), (3, 1)].map(Some));
        assert_eq!(
            [64, 128, 192, 256].map(|d| best(d, 164)),
            [(3, 2), (2, 2), (3, 1), (2, 1)].map(Some)
        );
        assert_eq!(
            [64, 128, 192, 256].map(|d| best(d, 100)),
            [(2, 2), (2, 1), (1, 1), (1, 1)].map(Some)
        );
        assert_eq!(best(256, 48), None);
        let little = DecodeBounds { head_dim: 256, multiprocessor_shared_bytes: 49_152, ..sound() };
        assert!(matches!(DecodePlan::new(little), Err(Error::Unsupported { .. })));
    }

    fn call() -> DecodeParams {
        DecodeParams {
            q: In::at(256),
            k: In::at(256),
            v: In::at(256),
            out: Out::at(256),
            table: In::at(256),
            seq_lens: In::at(256),
            q_row: 4096,
            q_head: 128,
            out_row: 4096,
            out_head: 128,
            k_block: 16_384,
            k_head: 2048,
            k_token: 128,
            v_block: 16_384,
            v_head: 2048,
            v_token: 128,
            block_tokens: 16,
            q_dtype: DType::Bf16.id(),
            out_dtype: DType::F32.id(),
            scale: 1.0,
            ..DecodeParams::default()
        }
    }

    #[test]
    fn bulk_copies_are_for_runs_of_rows_in_one_block() {
        let plan = DecodePlan::new(sound()).unwrap();
        let bulk = |mut params: DecodeParams| {
            plan.decode_launch(4096, &mut params).unwrap();
            params.bulk
        };
        assert_eq!(bulk(call()), 1);
        assert_eq!(bulk(DecodeParams { block_tokens: 8, ..call() }), 1);
        assert_eq!(bulk(DecodeParams { block_tokens: 12, ..call() }), 0);
        assert_eq!(bulk(DecodeParams { k_token: 1024, ..call() }), 0);
        assert_eq!(bulk(DecodeParams { v_token: 136, ..call() }), 0);
    }

    #[test]
    fn calls_that_the_kernel_cannot_take_are_refused() {
        let plan = DecodePlan::new(sound()).unwrap();
        for bad in [
            DecodeParams { q: In::NULL, ..call() },
            DecodeParams { table: In::NULL, ..call() },
            DecodeParams { block_tokens: 0, ..call() },
            DecodeParams { k_token: 132, ..call() },
            DecodeParams { v: In::at(264), ..call() },
            DecodeParams { q: In::at(258), ..call() },
            DecodeParams { q_head: 127, ..call() },
            DecodeParams { out_dtype: 77, ..call() },
            DecodeParams { scale: f32::NAN, ..call() },
            DecodeParams { softcap: -1.0, ..call() },
        ] {
            let mut params = bad;
            let before = alloc::format!("{params:?}");
            assert!(plan.decode_launch(4096, &mut params).is_err(), "{bad:?}");
            assert_eq!(alloc::format!("{params:?}"), before, "a refused call is changed");
        }
        // An f32 output needs no even strides.
        let mut odd = DecodeParams { out_head: 129, ..call() };
        assert!(plan.decode_launch(4096, &mut odd).is_ok());
    }

    /// The sources say how many blocks a multiprocessor shall hold, and so does this file.
    #[test]
    fn the_sources_ask_for_as_many_blocks() {
        let sources = [
            (64, include_str!("../../cuda/decode_d64.cu")),
            (80, include_str!("../../cuda/decode_d80.cu")),
            (96, include_str!("../../cuda/decode_d96.cu")),
            (128, include_str!("../../cuda/decode_d128.cu")),
            (192, include_str!("../../cuda/decode_d192.cu")),
            (256, include_str!("../../cuda/decode_d256.cu")),
        ];
        for kernel in KERNELS.iter().filter(|kernel| **kernel != &DECODE_PLAN) {
            let (rest, dim) = kernel.name.rsplit_once("_d").unwrap();
            let (name, head_dim) = (rest.rsplit_once('_').unwrap().1, dim.parse().unwrap());
            let (_, source) = sources.iter().find(|(dim, _)| *dim == head_dim).unwrap();
            let upper = if name == "f16" { "F16" } else { "Bf16" };
            let blocks = blocks_by_registers(head_dim);
            let line = alloc::format!("KVC_DECODE({name}, {upper}, {dim}, {blocks})");
            assert!(source.lines().any(|l| l == line), "no `{line}` in decode_d{dim}.cu");
        }
    }

    #[test]
    fn bounds_outside_the_ranges_are_refused() {
        for bad in [
            DecodeBounds { head_dim: 72, ..sound() },
            DecodeBounds { format: KvFormat::F32, ..sound() },
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
        assert_eq!(DecodePlan::new(huge), Err(Error::Overflow { what: "attention workspace" }));
    }
}
