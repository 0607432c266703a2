//! The append noun: new keys and values into the caller's own blocks, with optional rotary
//! embedding, which queries can have too.

use core::ffi::c_void;

use super::attend::rows;
use super::pointer::{self, Plain, Sized32, flag};
use super::scales::{Given, kvc_scales};
use super::status::{guard, kvc_status};
use super::threads;
use crate::attention::HeadShape;
use crate::cpu::{AppendArgs, Rope, RopeStyle, append};
use crate::dtype::{DType, KvFormat};
use crate::error::{Error, Result};

/// Pairs are channel i with i + rotary_dim / 2: Llama in Hugging Face's layout, GPT-NeoX, Qwen.
pub const KVC_ROPE_HALVES: u32 = 1;
/// Pairs are channel 2 i with 2 i + 1: the paper's layout, GPT-J, DeepSeek.
pub const KVC_ROPE_INTERLEAVED: u32 = 2;

const _: () = assert!(
    KVC_ROPE_HALVES == RopeStyle::Halves as u32
        && KVC_ROPE_INTERLEAVED == RopeStyle::Interleaved as u32
);

/// A rotary position embedding: pairs of channels turned by an angle that grows with the position.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_rope {
    /// sizeof(kvc_rope); kvc_rope_init sets it.
    pub struct_size: u32,
    /// KVC_ROPE_HALVES (the default) or KVC_ROPE_INTERLEAVED.
    pub style: u32,
    /// Channels that are rotated: even, 2 to 256.
    pub rotary_dim: u32,
    /// The first of them; 0 by default (512 for the latent rows of DeepSeek).
    pub first_channel: u32,
    /// Pair i turns by theta^(-2 i / rotary_dim) a token; 10000 by default.
    pub theta: f32,
    /// Factor of rotated channels (YaRN's attention factor); 1 by default.
    pub scale: f32,
    /// NULL, or `[rotary_dim / 2]` radians a token in place of theta: what long-context scalings
    /// come down to.
    pub frequencies: *const f32,
}

// SAFETY: integers, floats, a pointer.
unsafe impl Plain for kvc_rope {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_rope {
    const NAME: &'static str = "kvc_rope";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            style: KVC_ROPE_HALVES,
            rotary_dim: 0,
            first_channel: 0,
            theta: 10_000.0,
            scale: 1.0,
            frequencies: core::ptr::null(),
        }
    }
}

/// The embedding that a caller's struct describes.
///
/// # Safety
/// As for [`pointer::read`], and `frequencies` must be as documented.
pub(super) unsafe fn read_rope(rope: *const kvc_rope) -> Result<Rope> {
    // SAFETY: the caller's promise.
    let rope = unsafe { pointer::read(rope) }?;
    let style = match rope.style {
        KVC_ROPE_HALVES => RopeStyle::Halves,
        KVC_ROPE_INTERLEAVED => RopeStyle::Interleaved,
        _ => return Err(Error::invalid("style", "must be 1 (halves) or 2 (interleaved)")),
    };
    if !rope.scale.is_finite() {
        return Err(Error::invalid("scale", "must be finite"));
    }
    let made = if rope.frequencies.is_null() {
        Rope::new(style, rope.rotary_dim, rope.theta)?
    } else if rope.rotary_dim % 2 != 0 {
        return Err(Error::invalid("rotary_dim", "must be even, 2 to 256"));
    } else {
        let pairs = u64::from(rope.rotary_dim / 2);
        // SAFETY: the caller's promise.
        Rope::from_frequencies(style, unsafe {
            pointer::slice(rope.frequencies, pairs, "frequencies")
        }?)?
    };
    Ok(made.from_channel(rope.first_channel).scaled(rope.scale))
}

/// New rows of one layer, and the blocks that they go to; the layouts are those of
/// kvc_attend_desc.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_append_desc {
    /// sizeof(kvc_append_desc); kvc_append_desc_init sets it.
    pub struct_size: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Channels of a key row.
    pub k_dim: u32,
    /// Channels of a value row.
    pub v_dim: u32,
    /// 1: values are the first v_dim channels of the keys; v and v_rows are ignored.
    pub v_in_k: u32,
    /// KVC_FORMAT_* of the blocks. Rows are rounded to it, to nearest even; for int8_t keys and
    /// int4_t keys and values are rotated first (kvc_attend does what that asks of queries).
    pub format: u32,
    /// KVC_DTYPE_* of k_rows and v_rows.
    pub dtype: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Blocks that k and v have.
    pub num_blocks: u32,
    /// New tokens.
    pub rows: u32,
    /// 1 (the default): the calling thread alone; 0: a thread a core.
    pub threads: u32,
    /// 0.
    pub reserved: u32,
    /// Keys of the cache. Written.
    pub k: *mut c_void,
    /// Elements from a block to the next. All three 0: `[block][kv_head][token][k_dim]`.
    pub k_block_stride: i64,
    /// Elements from a KV head to the next.
    pub k_head_stride: i64,
    /// Elements from a token to the next.
    pub k_token_stride: i64,
    /// Values of the cache. Written.
    pub v: *mut c_void,
    /// Elements from a block to the next. All three 0: `[block][kv_head][token][v_dim]`.
    pub v_block_stride: i64,
    /// Elements from a KV head to the next.
    pub v_head_stride: i64,
    /// Elements from a token to the next.
    pub v_token_stride: i64,
    /// `[rows]` slots, block * block_tokens + offset, no two alike; a row with slot -1 is skipped.
    pub slots: *const i64,
    /// New keys `[row][kv_head][k_dim]`.
    pub k_rows: *const c_void,
    /// Elements from a row to the next. Both 0: contiguous.
    pub k_rows_token_stride: i64,
    /// Elements from a head to the next.
    pub k_rows_head_stride: i64,
    /// New values `[row][kv_head][v_dim]`.
    pub v_rows: *const c_void,
    /// Elements from a row to the next. Both 0: contiguous.
    pub v_rows_token_stride: i64,
    /// Elements from a head to the next.
    pub v_rows_head_stride: i64,
    /// NULL, or how keys are rotated on the way.
    pub rope: *const kvc_rope,
    /// `[rows]` positions. Ignored without rope.
    pub positions: *const u32,
    /// NULL for the defaults, or where the scales of quantised K and V lie. Row scales are written.
    pub scales: *const kvc_scales,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_append_desc {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_append_desc {
    const NAME: &'static str = "kvc_append_desc";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self { struct_size: size_of::<Self>() as u32, threads: 1, ..zero }
    }
}

impl kvc_append_desc {
    /// Everything a call needs but its rotary embedding.
    ///
    /// # Safety
    /// `scales` must be as documented.
    pub(super) unsafe fn args(&self) -> Result<AppendArgs<'_>> {
        if self.reserved != 0 {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        let Self { kv_heads, k_dim, v_dim, .. } = *self;
        let v_in_k = flag(self.v_in_k, "v_in_k")?;
        let shape = HeadShape { q_heads: kv_heads, kv_heads, k_dim, v_dim, v_in_k };
        shape.check()?;
        let given = Given {
            k: self.k,
            v: self.v,
            format: KvFormat::from_id(self.format)?,
            k_strides: [self.k_block_stride, self.k_head_stride, self.k_token_stride],
            v_strides: [self.v_block_stride, self.v_head_stride, self.v_token_stride],
            num_blocks: self.num_blocks,
            block_tokens: self.block_tokens,
            scales: self.scales,
        };
        let dtype = DType::from_id(self.dtype)?;
        let k_rows = self.k_rows.cast_mut().cast();
        let v_rows = self.v_rows.cast_mut().cast();
        let k = (k_rows, dtype, self.k_rows_token_stride, self.k_rows_head_stride);
        let v = (v_rows, dtype, self.v_rows_token_stride, self.v_rows_head_stride);
        Ok(AppendArgs {
            shape,
            // SAFETY: the caller's promise.
            kv: unsafe { given.view(&shape) }?,
            slots: self.slots,
            rows: self.rows,
            k: rows(k, kv_heads, k_dim),
            v: rows(v, kv_heads, v_dim),
            rope: None,
        })
    }
}

/// Fills a kvc_rope of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `rope` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_rope_init(rope: *mut kvc_rope, struct_size: u32) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(rope, struct_size) })
}

/// Rotates `rows[position_count][heads][head_dim]` in place, each to its position: for queries,
/// where keys are rotated by the library.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; the arrays are as long as said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_rope_rotate(
    rope: *const kvc_rope,
    rows: *mut f32,
    heads: u32,
    head_dim: u32,
    positions: *const u32,
    position_count: u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let rope = unsafe { read_rope(rope) }?;
        let elements = position_count
            .checked_mul(u64::from(heads))
            .and_then(|n| n.checked_mul(u64::from(head_dim)))
            .ok_or(Error::Overflow { what: "rows" })?;
        // SAFETY: the caller's promise.
        let (rows, positions) = unsafe {
            (
                pointer::slice_out(rows, elements, "rows")?,
                pointer::slice(positions, position_count, "positions")?,
            )
        };
        rope.rotate(rows, head_dim, positions)
    })
}

/// Fills a kvc_append_desc of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `desc` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_append_desc_init(
    desc: *mut kvc_append_desc,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(desc, struct_size) })
}

/// Writes new keys and values to their slots. Allocates nothing. Bad arguments, slots outside the
/// blocks among them, are answered before anything is written.
///
/// Threads: thread-safe, where calls share no slots.
///
/// # Safety
/// The module's rules; `slots` and `positions` have `rows` entries; rows are readable, and the
/// cache writable at every named slot, wherever sizes and strides lead; slots are distinct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_append(desc: *const kvc_append_desc) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let desc = unsafe { pointer::read(desc) }?;
        // SAFETY: see above.
        let mut args = unsafe { desc.args() }?;
        let rope;
        if !desc.rope.is_null() {
            // SAFETY: see above.
            rope = unsafe { read_rope(desc.rope) }?;
            args.rope = Some((&rope, desc.positions));
        }
        // SAFETY: see above.
        threads::with(desc.threads, |threads| unsafe { append(&args, threads) })
    })
}
