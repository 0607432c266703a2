//! Attention on a device, whatever kernel does it: the choice, the workspace, the launches.
//!
//! What a call is given ([`AttendArgs`]) is the same for all kernels, and the choice depends on
//! maxima alone ([`AttendBounds`]), so that a caller can ask beforehand what will run and how much
//! workspace it needs, and a captured graph stays right for other lengths.

use super::attend_params::{
    decode_params, mla_params, mla_token_params, prefill_params, token_scales,
};
use super::decode::{DecodeBounds, DecodePlan, Pieces};
use super::mla::{MLA_DIM, MLA_VALUES, MlaBounds, MlaPlan};
use super::params::{
    DecodeParams, DecodePlanParams, DecodeTokenParams, In, MlaParams, MlaTokenParams, Out,
    PrefillParams, PrefillTokenParams,
};
use super::prefill::{PrefillBounds, prefill_info, prefill_launch};
use super::prefill_token::prefill_token_launch;
use super::{Kernel, Launch};
use crate::attention::HeadShape;
use crate::dtype::{DType, FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::Strides;

/// The largest call that a plan serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttendBounds {
    /// Heads and channels.
    pub shape: HeadShape,
    /// How the cache stores K and V.
    pub format: KvFormat,
    /// Sequences.
    pub seqs: u32,
    /// Query tokens of one sequence.
    pub q_len: u32,
    /// Query tokens of all sequences together.
    pub q_tokens: u32,
    /// Cached tokens of one sequence.
    pub kv_len: u32,
    /// How contexts are cut.
    pub pieces: Pieces,
    /// Multiprocessors of the device.
    pub multiprocessors: u32,
    /// Shared memory of a multiprocessor, in bytes.
    pub multiprocessor_shared_bytes: u32,
}

/// Where the scales of quantised rows lie; strides in bytes.
#[derive(Debug, Clone, Copy)]
pub struct ScaleArgs {
    /// Scales of the keys of block 0, head 0, token 0, as `KvFormat::row_scale_bytes` has them; 0
    /// where the format has none.
    pub k: u64,
    /// Those of the values.
    pub v: u64,
    /// Strides of the former.
    pub k_strides: Strides,
    /// Strides of the latter.
    pub v_strides: Strides,
    /// `[kv_heads]` scales of all keys of a head, f32, in device memory; 0 for 1.
    pub k_heads: u64,
    /// The same of values.
    pub v_heads: u64,
    /// Keys are rotated where the format leaves that open.
    pub k_rotated: bool,
}

impl ScaleArgs {
    /// Of rows of floats.
    pub const NONE: ScaleArgs = ScaleArgs {
        k: 0,
        v: 0,
        k_strides: Strides { block: 0, head: 0, token: 0 },
        v_strides: Strides { block: 0, head: 0, token: 0 },
        k_heads: 0,
        v_heads: 0,
        k_rotated: true,
    };
}

/// One call: device addresses, strides in elements, and how scores are made.
#[derive(Debug, Clone, Copy)]
pub struct AttendArgs {
    /// Queries `[row][q_head][k_dim]`.
    pub q: u64,
    /// Their type.
    pub q_dtype: DType,
    /// Elements from a row of `q` to the next, and from a head to the next.
    pub q_strides: [i64; 2],
    /// Outputs `[row][q_head][v_dim]`.
    pub out: u64,
    /// Their type.
    pub out_dtype: DType,
    /// Elements from a row of `out` to the next, and from a head to the next.
    pub out_strides: [i64; 2],
    /// Natural logarithms of the denominators `[row][q_heads]`, f32, or 0.
    pub lse: u64,
    /// Keys of block 0, head 0, token 0, and their strides.
    pub k: u64,
    /// Strides of the keys.
    pub k_strides: Strides,
    /// Values, likewise; not read where they lie in keys.
    pub v: u64,
    /// Strides of the values; of quantised rows in bytes, as those of the keys.
    pub v_strides: Strides,
    /// Scales of quantised rows.
    pub scales: ScaleArgs,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Blocks that exist.
    pub num_blocks: u32,
    /// Block tables: `[seq][table_stride]`, or the indices of all sequences one after another.
    pub table: u64,
    /// Entries from a sequence to the next in a dense table.
    pub table_stride: i64,
    /// Where the indices of each sequence begin, `[seqs + 1]`; 0 for a dense table.
    pub table_indptr: u64,
    /// Sequences.
    pub seqs: u32,
    /// Rows of each sequence, `[seqs + 1]`; 0 where all have as many as the bounds say, for up to
    /// eight.
    pub q_indptr: u64,
    /// Cached tokens of each sequence, `[seqs]`, those of the queries included.
    pub kv_lens: u64,
    /// For each row the tokens of its sequence's tail that it sees, a bit each, in place of the
    /// causal mask; or 0. Up to eight query tokens a sequence.
    pub tail_mask: u64,
    /// Factor of the dot products.
    pub scale: f32,
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Keys a query sees, its own included, counted back.
    pub window: Option<u32>,
    /// Logit soft-cap.
    pub softcap: Option<f32>,
    /// A logit for each query head that joins the denominator, f32, or 0.
    pub sinks: u64,
    /// ALiBi slope of each query head, f32, or 0.
    pub slopes: u64,
    /// A word that is raised where a table has an entry that is not a block, or 0.
    pub error_flag: u64,
}

impl AttendArgs {
    pub(super) fn check(&self, v_in_k: bool) -> Result<()> {
        let needed = [
            ("q", self.q),
            ("out", self.out),
            ("k", self.k),
            ("v", if v_in_k { self.k } else { self.v }),
            ("table", self.table),
            ("kv_lens", self.kv_lens),
        ];
        if let Some(&(what, _)) = needed.iter().find(|(_, address)| *address == 0) {
            return Err(Error::NullPointer { what });
        }
        let words = [
            ("table", self.table),
            ("table_indptr", self.table_indptr),
            ("q_indptr", self.q_indptr),
            ("tail_mask", self.tail_mask),
            ("kv_lens", self.kv_lens),
            ("lse", self.lse),
            ("sinks", self.sinks),
            ("alibi", self.slopes),
            ("error flag", self.error_flag),
        ];
        if let Some(&(what, _)) = words.iter().find(|(_, address)| address % 4 != 0) {
            return Err(Error::Misaligned { what, align_bytes: 4 });
        }
        let rows = [
            ("q", self.q, self.q_dtype, self.q_strides),
            ("out", self.out, self.out_dtype, self.out_strides),
        ];
        for (what, address, dtype, strides) in rows {
            let chunk = i64::from(16 / dtype.bytes());
            if address % 16 != 0 || strides.iter().any(|stride| stride % chunk != 0) {
                return Err(Error::invalid(what, "rows must begin at multiples of 16 bytes"));
            }
        }
        if self.window == Some(0) || !self.scale.is_finite() {
            return Err(Error::invalid("window, scale", "must be at least 1, finite"));
        }
        if self.block_tokens == 0 || self.num_blocks > i32::MAX as u32 {
            return Err(Error::invalid(
                "block_tokens, num_blocks",
                "must be at least 1, below 2^31",
            ));
        }
        Ok(())
    }
}

/// The kernel for some bounds, and what its calls need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttendPlan {
    /// Paged decode: up to eight query tokens a sequence.
    Decode(DecodePlan),
    /// Chunked prefill: any number of query tokens.
    Prefill(PrefillBounds),
    /// Latent attention of up to eight query tokens a sequence.
    Mla(MlaPlan),
}

/// The parameter struct of whichever kernel attends.
#[derive(Debug, Clone, Copy)]
pub enum AttendParams {
    /// Of paged decode.
    Decode(DecodeParams),
    /// Of paged decode over rows of codes.
    DecodeToken(DecodeTokenParams),
    /// Of chunked prefill.
    Prefill(PrefillParams),
    /// Of chunked prefill over rows of codes.
    PrefillToken(PrefillTokenParams),
    /// Of latent attention.
    Mla(MlaParams),
    /// Of latent attention over rows of codes.
    MlaToken(MlaTokenParams),
}

/// Bytes of workspace that are enough for every call of at most these maxima: which kernel serves a
/// call, and in how many pieces, depends on its own, and fewer query tokens may need more.
///
/// # Errors
/// Those of [`AttendPlan::new`].
pub fn most_workspace_bytes(bounds: &AttendBounds) -> Result<u64> {
    let mut most = AttendPlan::new(bounds)?.workspace_bytes();
    for q_len in 1..bounds.q_len.min(MAX_DECODE_TOKENS + 1) {
        most = most.max(AttendPlan::new(&AttendBounds { q_len, ..*bounds })?.workspace_bytes());
    }
    Ok(most)
}

/// Query tokens of a sequence that the decode kernels take.
const MAX_DECODE_TOKENS: u32 = 8;

impl AttendPlan {
    /// Plans for calls within `bounds`.
    ///
    /// # Errors
    /// `InvalidArgument` for bounds outside their ranges, `Unsupported` where there is no kernel,
    /// `Overflow` for a workspace that cannot be.
    pub fn new(bounds: &AttendBounds) -> Result<Self> {
        let b = bounds;
        b.shape.check()?;
        if b.format.class() == FormatClass::Tile {
            // A cache has kernels for them; a call of the caller's own says nothing of raw rows.
            return Err(Error::Unsupported { what: "sealed tiles but in a cache on a device" });
        }
        if b.shape.v_in_k {
            return Self::latent(b);
        }
        if b.shape.k_dim != b.shape.v_dim {
            return Err(Error::Unsupported { what: "k_dim other than v_dim on a device" });
        }
        if b.q_len > MAX_DECODE_TOKENS {
            let bounds = PrefillBounds {
                format: b.format,
                head_dim: b.shape.k_dim,
                q_heads: b.shape.q_heads,
                kv_heads: b.shape.kv_heads,
                batch: b.seqs,
                q_tokens: b.q_tokens,
            };
            prefill_info(&bounds)?;
            return Ok(AttendPlan::Prefill(bounds));
        }
        DecodePlan::new(DecodeBounds {
            format: b.format,
            head_dim: b.shape.k_dim,
            // Sealed tiles have been refused.
            tile_tokens: 0,
            q_heads: b.shape.q_heads,
            kv_heads: b.shape.kv_heads,
            q_len: b.q_len,
            batch: b.seqs,
            max_tokens: b.kv_len,
            pieces: b.pieces,
            multiprocessors: b.multiprocessors,
            multiprocessor_shared_bytes: b.multiprocessor_shared_bytes,
        })
        .map(AttendPlan::Decode)
    }

    fn latent(b: &AttendBounds) -> Result<Self> {
        if (b.shape.k_dim, b.shape.v_dim) != (MLA_DIM, MLA_VALUES) {
            return Err(Error::Unsupported { what: "latents other than 576 and 512 on a device" });
        }
        if b.q_len > MAX_DECODE_TOKENS {
            return Err(Error::Unsupported {
                what: "latent attention of more than 8 query tokens a sequence on a device",
            });
        }
        MlaPlan::new(MlaBounds {
            format: b.format,
            q_heads: b.shape.q_heads,
            q_len: b.q_len,
            batch: b.seqs,
            max_tokens: b.kv_len,
            pieces: b.pieces,
            multiprocessors: b.multiprocessors,
        })
        .map(AttendPlan::Mla)
    }

    /// Bytes of workspace that any call within the bounds needs, from an address that is a multiple
    /// of 256.
    pub fn workspace_bytes(&self) -> u64 {
        match self {
            AttendPlan::Decode(plan) => plan.workspace_bytes(),
            AttendPlan::Prefill(_) => 0,
            AttendPlan::Mla(plan) => plan.workspace_bytes(),
        }
    }

    /// The launch that must precede the attention whenever lengths have changed: any number of
    /// calls (one a layer) may follow. `None` for a kernel that plans nothing.
    ///
    /// # Errors
    /// `InvalidArgument` where the call is past the bounds; those of
    /// [`attend_launch`](Self::attend_launch).
    pub fn plan_launch(
        &self,
        workspace: u64,
        args: &AttendArgs,
    ) -> Result<Option<(Launch, DecodePlanParams)>> {
        self.check(args)?;
        let (lens, flag) = (In::at(args.kv_lens), Out::at(args.error_flag));
        match self {
            AttendPlan::Decode(plan) => {
                plan.plan_launch(workspace, lens, args.seqs, args.window, flag).map(Some)
            }
            AttendPlan::Prefill(_) => Ok(None),
            AttendPlan::Mla(plan) => {
                plan.plan_launch(workspace, lens, args.seqs, args.window, flag).map(Some)
            }
        }
    }

    /// The launch of the attention itself.
    ///
    /// # Errors
    /// `NullPointer` for what is not optional, `Misaligned` for numbers that are not aligned to their
    /// size, `InvalidArgument` for rows that do not begin at multiples of 16 bytes or more sequences
    /// than the bounds, `Unsupported` for scoring rules that the kernel does not have.
    pub fn attend_launch(
        &self,
        workspace: u64,
        args: &AttendArgs,
    ) -> Result<(Launch, AttendParams)> {
        self.check(args)?;
        match self {
            AttendPlan::Decode(plan) if !plan.format().is_float() => {
                let scales = token_scales(plan.format(), &args.scales);
                let mut params = DecodeTokenParams { call: decode_params(args), ..scales };
                let launch = plan.decode_token_launch(workspace, &mut params)?;
                Ok((launch, AttendParams::DecodeToken(params)))
            }
            AttendPlan::Decode(plan) => {
                let mut params = decode_params(args);
                let launch = plan.decode_launch(workspace, &mut params)?;
                Ok((launch, AttendParams::Decode(params)))
            }
            AttendPlan::Prefill(bounds) => {
                // Fewer sequences make a smaller grid, which a captured graph keeps.
                let bounds = PrefillBounds { batch: args.seqs, ..*bounds };
                if !bounds.format.is_float() {
                    let s = token_scales(bounds.format, &args.scales);
                    let mut params = PrefillTokenParams {
                        call: prefill_params(args),
                        k_scales: s.k_scales,
                        v_scales: s.v_scales,
                        k_heads: s.k_heads,
                        v_heads: s.v_heads,
                        k_scale_block: s.k_scale_block,
                        k_scale_head: s.k_scale_head,
                        k_scale_token: s.k_scale_token,
                        v_scale_block: s.v_scale_block,
                        v_scale_head: s.v_scale_head,
                        v_scale_token: s.v_scale_token,
                        k_rotated: s.k_rotated,
                        v_rotated: s.v_rotated,
                    };
                    let launch = prefill_token_launch(&bounds, &mut params)?;
                    return Ok((launch, AttendParams::PrefillToken(params)));
                }
                let mut params = prefill_params(args);
                let launch = prefill_launch(&bounds, &mut params)?;
                Ok((launch, AttendParams::Prefill(params)))
            }
            AttendPlan::Mla(plan) if !plan.format().is_float() => {
                let mut params = mla_token_params(plan.format(), args);
                let launch = plan.decode_token_launch(workspace, &mut params)?;
                Ok((launch, AttendParams::MlaToken(params)))
            }
            AttendPlan::Mla(plan) => {
                let mut params = mla_params(args);
                let launch = plan.decode_launch(workspace, &mut params)?;
                Ok((launch, AttendParams::Mla(params)))
            }
        }
    }

    fn check(&self, args: &AttendArgs) -> Result<()> {
        args.check(matches!(self, AttendPlan::Mla(_)))?;
        if args.tail_mask != 0 && !matches!(self, AttendPlan::Decode(_)) {
            return Err(Error::Unsupported { what: "a tail mask but for decode on a device" });
        }
        match self {
            AttendPlan::Decode(_) => Ok(()),
            AttendPlan::Prefill(_) if args.q_indptr == 0 => {
                Err(Error::NullPointer { what: "q_indptr" })
            }
            AttendPlan::Prefill(bounds) if args.seqs > bounds.batch => {
                Err(Error::invalid("seqs", "must be at most what the plan was made for"))
            }
            AttendPlan::Prefill(_) => Ok(()),
            AttendPlan::Mla(_) => {
                let plain = args.softcap.is_none() && args.sinks == 0 && args.slopes == 0;
                if plain {
                    Ok(())
                } else {
                    Err(Error::Unsupported {
                        what: "a soft-cap, sinks or ALiBi with latent attention on a device",
                    })
                }
            }
        }
    }

    /// The kernel that attends.
    ///
    /// # Errors
    /// None in practice: a plan has a kernel.
    pub fn kernel(&self) -> Result<&'static Kernel> {
        match self {
            AttendPlan::Decode(plan) => Ok(plan.kernel().kernel),
            AttendPlan::Prefill(bounds) => Ok(prefill_info(bounds)?.kernel),
            AttendPlan::Mla(plan) => Ok(plan.kernel()),
        }
    }
}
