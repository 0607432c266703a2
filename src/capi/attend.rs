//! The attend noun: the CPU kernels on the caller's own pointers, no handle and no allocation.

use core::ffi::{c_char, c_void};
use core::sync::atomic::AtomicU32;

use super::pointer::{self, Plain, Sized32, flag};
use super::scales::{Given, kvc_scales};
use super::status::{guard, kvc_status};
use super::threads;
use super::tile::{self, kvc_tile_view};
use crate::attention::{HeadShape, Scoring, merge_states};
use crate::cpu::{
    AttendArgs, AttendMaxima, BlockTables, CpuLevel, KvView, RowsView, ScaleView, attend,
    attend_workspace_bytes,
};
use crate::dtype::{DType, FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::Strides;

/// One batched attention call over ragged sequences: decode, chunked prefill and multi-head latent
/// attention alike.
///
/// Sequence s has the query tokens `q_indptr[s]` to `q_indptr[s + 1]` of q, and `kv_lens[s]` cached
/// tokens, those of its queries included: its last query is its last cached token. Query head h
/// reads KV head h / (q_heads / kv_heads).
///
/// Element (block, head, token, channel) of K lies block * k_block_stride + head * k_head_stride +
/// token * k_token_stride + channel elements after k, so the library's own layout, NHD and HND are
/// all of this form.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_attend_desc {
    /// sizeof(kvc_attend_desc); kvc_attend_desc_init sets it.
    pub struct_size: u32,
    /// Query heads: a multiple of kv_heads.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Channels of query and key rows: a multiple of 8, to 256 (576 with v_in_k).
    pub k_dim: u32,
    /// Channels of value and output rows: a multiple of 8.
    pub v_dim: u32,
    /// 1: values are the first v_dim channels of the keys (latent attention; kv_heads is 1).
    pub v_in_k: u32,
    /// KVC_FORMAT_* of K and V.
    pub format: u32,
    /// KVC_DTYPE_* of q.
    pub q_dtype: u32,
    /// KVC_DTYPE_* of out.
    pub out_dtype: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Blocks that k and v have.
    pub num_blocks: u32,
    /// Sequences in the batch.
    pub seqs: u32,
    /// 1 (the default): a query sees no key after its own position.
    pub causal: u32,
    /// Keys that a query sees, its own included, counted back; 0 for all.
    pub window: u32,
    /// Factor of the dot product; 0 for 1 / sqrt(k_dim).
    pub scale: f32,
    /// Logit soft-cap; 0 for none.
    pub softcap: f32,
    /// 1 (the default): the calling thread does the work alone. 0: a thread a core, which the
    /// library keeps from the first such call on. The result does not depend on it.
    pub threads: u32,
    /// 0.
    pub reserved: u32,
    /// Keys.
    pub k: *const c_void,
    /// Elements from a block to the next. All three 0: `[block][kv_head][token][k_dim]`.
    pub k_block_stride: i64,
    /// Elements from a KV head to the next.
    pub k_head_stride: i64,
    /// Elements from a token to the next.
    pub k_token_stride: i64,
    /// Values. Ignored with v_in_k.
    pub v: *const c_void,
    /// Elements from a block to the next. All three 0: `[block][kv_head][token][v_dim]`.
    pub v_block_stride: i64,
    /// Elements from a KV head to the next.
    pub v_head_stride: i64,
    /// Elements from a token to the next.
    pub v_token_stride: i64,
    /// Block ids. Without table_indptr: `[seqs][table_stride]`; entry i of a sequence holds its
    /// tokens i * block_tokens and on. Entries past its length are never read.
    pub table: *const i32,
    /// Entries from one sequence's row to the next: kvc_attend refuses a kv_lens that needs more.
    /// 0 where all sequences read the same row. Ignored with table_indptr.
    pub table_stride: i64,
    /// NULL, or `[seqs + 1]` offsets into table: sequence s has the entries from `table_indptr[s]` to
    /// `table_indptr[s + 1]`.
    pub table_indptr: *const i32,
    /// `[seqs + 1]` offsets of query tokens, from 0, never decreasing.
    pub q_indptr: *const i32,
    /// `[seqs]` cached tokens.
    pub kv_lens: *const i32,
    /// Queries `[query token][q_head][k_dim]`.
    pub q: *const c_void,
    /// Elements from a token to the next. Both 0: contiguous.
    pub q_token_stride: i64,
    /// Elements from a head to the next.
    pub q_head_stride: i64,
    /// Outputs `[query token][q_head][v_dim]`. Must overlap nothing else.
    pub out: *mut c_void,
    /// Elements from a token to the next. Both 0: contiguous.
    pub out_token_stride: i64,
    /// Elements from a head to the next.
    pub out_head_stride: i64,
    /// NULL, or `[query token][q_head]`: natural logarithm of each softmax denominator. A row that
    /// sees no key has output 0 and -inf here.
    pub lse: *mut f32,
    /// NULL, or `[q_heads]`: a logit that joins each head's denominator and has no value.
    pub sinks: *const f32,
    /// NULL, or `[q_heads]`: ALiBi slopes.
    pub alibi: *const f32,
    /// NULL, or a word that is set to 1 where a block table has an entry that is not a block;
    /// the keys of such an entry are masked and never read.
    pub bad_block: *mut u32,
    /// Memory for the call, of no consequence before and after. kvc_attend_workspace_size says how
    /// much.
    pub workspace: *mut c_void,
    /// Its size.
    pub workspace_bytes: u64,
    /// NULL for the defaults, or where the scales of quantised K and V lie.
    pub scales: *const kvc_scales,
    /// The cache where the format is one of sealed tiles (KVC_FORMAT_KT*), in place of k and v,
    /// which are ignored then; else NULL. Not for devices.
    pub tiles: *const kvc_tile_view,
}

// SAFETY: integers, floats, pointers.
unsafe impl Plain for kvc_attend_desc {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_attend_desc {
    const NAME: &'static str = "kvc_attend_desc";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self { struct_size: size_of::<Self>() as u32, causal: 1, threads: 1, ..zero }
    }
}

impl kvc_attend_desc {
    pub(super) fn shape(&self) -> Result<HeadShape> {
        let v_in_k = flag(self.v_in_k, "v_in_k")?;
        let Self { q_heads, kv_heads, k_dim, v_dim, .. } = *self;
        let shape = HeadShape { q_heads, kv_heads, k_dim, v_dim, v_in_k };
        shape.check()?;
        Ok(shape)
    }

    /// # Safety
    /// `sinks` and `alibi` must be as documented.
    unsafe fn scoring<'a>(&self) -> Result<Scoring<'a>> {
        // SAFETY: the caller's promise.
        let list = |list, what| unsafe { per_head(list, self.q_heads, what) };
        let (sinks, alibi) = (list(self.sinks, "sinks")?, list(self.alibi, "alibi")?);
        Ok(Scoring { sinks, alibi, ..self.scoring_values()? })
    }

    /// The scoring without its lists.
    pub(super) fn scoring_values(&self) -> Result<Scoring<'static>> {
        Ok(Scoring {
            scale: if self.scale == 0.0 { Scoring::causal(self.k_dim).scale } else { self.scale },
            causal: flag(self.causal, "causal")?,
            window: (self.window != 0).then_some(self.window),
            softcap: (self.softcap != 0.0).then_some(self.softcap),
            sinks: None,
            alibi: None,
        })
    }

    /// Whether K and V are sealed tiles.
    fn is_tiled(&self) -> Result<bool> {
        Ok(self.cache()?.class() == FormatClass::Tile)
    }

    pub(super) fn cache(&self) -> Result<KvFormat> {
        KvFormat::from_id(self.format)
    }

    /// Queries and outputs.
    pub(super) fn rows(&self, shape: &HeadShape) -> Result<(RowsView, RowsView)> {
        if self.reserved != 0 {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        let q_dtype = DType::from_id(self.q_dtype)?;
        let out_dtype = DType::from_id(self.out_dtype)?;
        let q = (self.q.cast_mut().cast(), q_dtype, self.q_token_stride, self.q_head_stride);
        let out = (self.out.cast(), out_dtype, self.out_token_stride, self.out_head_stride);
        Ok((rows(q, shape.q_heads, shape.k_dim), rows(out, shape.q_heads, shape.v_dim)))
    }

    /// K and V with their scales.
    ///
    /// # Safety
    /// `scales` must be as documented.
    pub(super) unsafe fn kv(&self, shape: &HeadShape) -> Result<KvView> {
        let given = Given {
            k: self.k.cast_mut(),
            v: self.v.cast_mut(),
            format: self.cache()?,
            k_strides: [self.k_block_stride, self.k_head_stride, self.k_token_stride],
            v_strides: [self.v_block_stride, self.v_head_stride, self.v_token_stride],
            num_blocks: self.num_blocks,
            block_tokens: self.block_tokens,
            scales: self.scales,
        };
        // SAFETY: the caller's promise.
        unsafe { given.view(shape) }
    }

    /// Everything a call needs but its workspace.
    ///
    /// # Safety
    /// The pointers must be as documented.
    unsafe fn args<'a>(&self) -> Result<AttendArgs<'a>> {
        let shape = self.shape()?;
        let (q, out) = self.rows(&shape)?;
        let bad_block = if self.bad_block.is_null() {
            None
        } else {
            // SAFETY: the caller's promise; alignment is checked first.
            let flag = unsafe { pointer::out(self.bad_block, "bad_block") }?;
            // SAFETY: as above; the word is only written, atomically, during the call.
            Some(unsafe { AtomicU32::from_ptr(flag.as_mut_ptr()) })
        };
        Ok(AttendArgs {
            shape,
            // SAFETY: the caller's promise.
            scoring: unsafe { self.scoring() }?,
            kv: if self.is_tiled()? {
                NO_KV
            } else {
                // SAFETY: the caller's promise.
                unsafe { self.kv(&shape) }?
            },
            tables: if self.table_indptr.is_null() {
                BlockTables::Dense { table: self.table, stride: self.table_stride }
            } else {
                BlockTables::Csr { indptr: self.table_indptr, indices: self.table }
            },
            seqs: self.seqs,
            q_indptr: self.q_indptr,
            kv_lens: self.kv_lens,
            q,
            out,
            lse: self.lse,
            bad_block,
        })
    }
}

/// What stands for K and V where they are sealed tiles.
const NO_KV: KvView = KvView {
    k: core::ptr::null_mut(),
    v: core::ptr::null_mut(),
    format: KvFormat::Bf16,
    k_strides: Strides { block: 0, head: 0, token: 0 },
    v_strides: Strides { block: 0, head: 0, token: 0 },
    num_blocks: 0,
    block_tokens: 1,
    scales: ScaleView::NONE,
};

/// A per-head list, or none.
///
/// # Safety
/// As for [`pointer::slice`].
pub(super) unsafe fn per_head<'a>(
    list: *const f32,
    q_heads: u32,
    what: &'static str,
) -> Result<Option<&'a [f32]>> {
    if list.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { pointer::slice(list, u64::from(q_heads), what) }.map(Some)
}

/// Rows with the strides given, or contiguous ones.
pub(super) fn rows(
    (ptr, dtype, token_stride, head_stride): (*mut u8, DType, i64, i64),
    heads: u32,
    dim: u32,
) -> RowsView {
    if (token_stride, head_stride) == (0, 0) {
        RowsView::contiguous(ptr, dtype, heads, dim)
    } else {
        RowsView { ptr, dtype, token_stride, head_stride }
    }
}

/// Fills a kvc_attend_desc of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `desc` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_attend_desc_init(
    desc: *mut kvc_attend_desc,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(desc, struct_size) })
}

/// Writes an upper bound of the workspace of kvc_attend to `out_bytes`, for every call with the
/// heads, dimensions and threads of `desc`, at most `desc->seqs` sequences, `max_q_tokens` query
/// tokens in all and `max_kv_tokens` cached tokens a sequence. No pointer of `desc` is followed.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_bytes` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_attend_workspace_size(
    desc: *const kvc_attend_desc,
    max_q_tokens: u32,
    max_kv_tokens: u32,
    out_bytes: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (desc, out) = unsafe { (pointer::read(desc)?, pointer::out(out_bytes, "out_bytes")?) };
        let maxima = AttendMaxima {
            seqs: desc.seqs,
            q_tokens: max_q_tokens,
            kv_len: max_kv_tokens,
            workers: threads::workers(desc.threads)?,
        };
        out.write(if desc.is_tiled()? {
            tile::workspace_bytes(&desc, &maxima)?
        } else {
            attend_workspace_bytes(&desc.shape()?, &maxima)?
        });
        Ok(())
    })
}

/// Computes attention for the batch that `desc` describes, and writes its outputs. Allocates
/// nothing and keeps nothing. Bad arguments are answered before anything is written.
///
/// Threads: thread-safe, where calls share no outputs and no workspace.
///
/// # Safety
/// The module's rules; `q_indptr`, `kv_lens` and the block tables are readable to the lengths that
/// `seqs` and `kv_lens` imply; K, V and Q are readable, and outputs writable, wherever sizes,
/// strides and valid table entries lead; outputs and workspace overlap nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_attend(desc: *const kvc_attend_desc) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let desc = unsafe { pointer::read(desc) }?;
        // SAFETY: see above.
        let args = unsafe { desc.args() }?;
        let bytes = desc.workspace_bytes;
        // SAFETY: see above.
        let workspace = unsafe { pointer::slice_out(desc.workspace.cast(), bytes, "workspace") }?;
        let level = CpuLevel::chosen()?;
        let tiled = desc.is_tiled()?;
        // SAFETY: see above.
        threads::with(desc.threads, |threads| unsafe {
            if tiled {
                tile::attend(&desc, &args, level, threads, workspace)
            } else {
                attend(&args, level, threads, workspace)
            }
        })
    })
}

/// Writes the name of the kernel that kvc_attend would run for a sequence with `q_tokens` query
/// tokens to `buf`, with a NUL: operation, device, instruction set, storage format. `len` is the
/// size of `buf`; KVC_ERR_BUFFER_TOO_SMALL where the name does not fit (64 bytes are enough). No
/// pointer of `desc` is followed.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `buf` is writable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_attend_kernel(
    desc: *const kvc_attend_desc,
    q_tokens: u32,
    buf: *mut c_char,
    len: u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let desc = unsafe { pointer::read(desc) }?;
        let name = crate::cpu::kernel_name(
            &desc.shape()?,
            KvFormat::from_id(desc.format)?,
            CpuLevel::chosen()?,
            q_tokens,
        )?;
        let needed: usize = name.iter().map(|part| part.len()).sum();
        if (needed as u64) >= len {
            return Err(Error::BufferTooSmall { what: "buf", needed: needed as u64 + 1 });
        }
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::slice_out(buf.cast::<u8>(), len, "buf") }?;
        let mut at = 0;
        for part in name {
            out[at..at + part.len()].copy_from_slice(part.as_bytes());
            at += part.len();
        }
        out[at] = 0;
        Ok(())
    })
}

/// Merges attention over two disjoint sets of keys, row by row, into the first: `out` and `other`
/// hold `rows` rows of `v_dim` outputs, `lse` and `other_lse` one value a row. A row with an LSE of
/// -inf has seen no key. Sinks must have been given to one of the two only.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; the arrays are as long as said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_merge_states(
    out: *mut f32,
    lse: *mut f32,
    other: *const f32,
    other_lse: *const f32,
    rows: u64,
    v_dim: u32,
) -> kvc_status {
    guard(|| {
        if v_dim == 0 {
            return Err(Error::invalid("v_dim", "must be at least 1"));
        }
        let elements =
            rows.checked_mul(u64::from(v_dim)).ok_or(Error::Overflow { what: "rows * v_dim" })?;
        pointer::disjoint(&[
            (out.addr(), elements * 4),
            (lse.addr(), rows * 4),
            (other.addr(), elements * 4),
            (other_lse.addr(), rows * 4),
        ])?;
        // SAFETY: the caller's promise; the mutable two overlap nothing.
        unsafe {
            merge_states(
                pointer::slice_out(out, elements, "out")?,
                pointer::slice_out(lse, rows, "lse")?,
                pointer::slice(other, elements, "other")?,
                pointer::slice(other_lse, rows, "other_lse")?,
                v_dim as usize,
            )
        }
    })
}
