//! The scales of quantised K and V in the caller's own memory: what kvc_attend_desc and
//! kvc_append_desc point to beside the codes.

use core::ffi::c_void;

use super::pointer::{self, Plain, Sized32, flag};
use super::status::{guard, kvc_status};
use crate::attention::HeadShape;
use crate::cpu::{KvView, ScaleView};
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::Strides;

/// Where the scales of quantised rows lie. All strides are in bytes.
///
/// Without this struct they lie as the library's own blocks have them: behind the codes of each
/// block and head, a row's scales after those of the row before; and every head has the scale 1.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_scales {
    /// sizeof(kvc_scales); kvc_scales_init sets it.
    pub struct_size: u32,
    /// 1: keys of int8_t are not rotated. 0, the default: they are (kvc_append rotates them,
    /// kvc_attend the queries).
    pub k_unrotated: u32,
    /// Scales of key rows (f16 of int8_t, f16 scale and minimum of int4_t, an e4m3 for 16 channels
    /// of nvfp4). NULL: behind the codes.
    pub k: *const c_void,
    /// Bytes from a block to the next. Ignored, as those below, where k is NULL.
    pub k_block_stride: i64,
    /// Bytes from a KV head to the next.
    pub k_head_stride: i64,
    /// Bytes from a token to the next.
    pub k_token_stride: i64,
    /// Scales of value rows. NULL: behind the codes. Ignored with v_in_k.
    pub v: *const c_void,
    /// Bytes from a block to the next. Ignored, as those below, where v is NULL.
    pub v_block_stride: i64,
    /// Bytes from a KV head to the next.
    pub v_head_stride: i64,
    /// Bytes from a token to the next.
    pub v_token_stride: i64,
    /// NULL for 1, or `[kv_heads]`: the scale of all keys of a head (fp8, nvfp4), positive and
    /// finite.
    pub k_heads: *const f32,
    /// The same of values. Ignored with v_in_k.
    pub v_heads: *const f32,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_scales {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_scales {
    const NAME: &'static str = "kvc_scales";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self { struct_size: size_of::<Self>() as u32, ..zero }
    }
}

/// K and V as a desc gives them.
pub(super) struct Given {
    pub k: *mut c_void,
    pub v: *mut c_void,
    pub format: KvFormat,
    /// Block, head, token; all 0 for `[block][kv_head]` runs.
    pub k_strides: [i64; 3],
    pub v_strides: [i64; 3],
    pub num_blocks: u32,
    pub block_tokens: u32,
    /// NULL for all defaults.
    pub scales: *const kvc_scales,
}

impl Given {
    /// What the kernels take.
    ///
    /// # Safety
    /// As for [`pointer::read`] of `scales`.
    pub(super) unsafe fn view(&self, shape: &HeadShape) -> Result<KvView> {
        let mut kv = KvView {
            k: self.k.cast(),
            v: self.v.cast(),
            format: self.format,
            k_strides: self.strides(self.k_strides, shape, shape.k_dim, k_parts(shape))?,
            v_strides: self.strides(self.v_strides, shape, shape.v_dim, 1)?,
            num_blocks: self.num_blocks,
            block_tokens: self.block_tokens,
            scales: ScaleView::NONE,
        };
        if kv.format.class() == FormatClass::Token || !self.scales.is_null() {
            // SAFETY: the caller's promise.
            kv.scales = unsafe { read_scales(self.scales, &kv, shape) }?;
        }
        Ok(kv)
    }

    /// The strides given, or those of `[block][kv_head]` runs of rows with their scales behind them.
    fn strides(&self, given: [i64; 3], shape: &HeadShape, dim: u32, parts: u32) -> Result<Strides> {
        let [block, head, token] = given;
        if given != [0, 0, 0] {
            return Ok(Strides { block, head, token });
        }
        let (row, scales) = match self.format.class() {
            FormatClass::Float => (u64::from(dim), 0),
            _ => (self.format.row_bytes(dim), self.format.row_scale_bytes(dim, parts)),
        };
        let overflow = Error::Overflow { what: "K, V" };
        // Two factors fit in 64 bits; the third may not.
        let head = (row + scales) * u64::from(self.block_tokens);
        let block = head.checked_mul(u64::from(shape.kv_heads)).ok_or(overflow)?;
        let signed = |bytes: u64| i64::try_from(bytes).map_err(|_| overflow);
        Ok(Strides { block: signed(block)?, head: signed(head)?, token: signed(row)? })
    }
}

/// Parts of a key that have scales of their own.
fn k_parts(shape: &HeadShape) -> u32 {
    if shape.v_in_k && shape.v_dim < shape.k_dim { 2 } else { 1 }
}

/// The scales of `kv`, whose own are not looked at, as `scales` says.
///
/// # Safety
/// As for [`pointer::read`].
unsafe fn read_scales(
    scales: *const kvc_scales,
    kv: &KvView,
    shape: &HeadShape,
) -> Result<ScaleView> {
    let given = if scales.is_null() {
        kvc_scales::initial()
    } else {
        // SAFETY: the caller's promise.
        unsafe { pointer::read(scales) }?
    };
    let k = (given.k, [given.k_block_stride, given.k_head_stride, given.k_token_stride]);
    let v = (given.v, [given.v_block_stride, given.v_head_stride, given.v_token_stride]);
    let (k, k_strides) = side(k, (kv.k, kv.k_strides), kv, shape.k_dim, k_parts(shape))?;
    let (v, v_strides) = if shape.v_in_k {
        (k, k_strides)
    } else {
        side(v, (kv.v, kv.v_strides), kv, shape.v_dim, 1)?
    };
    Ok(ScaleView {
        k,
        v,
        k_strides,
        v_strides,
        k_heads: given.k_heads,
        v_heads: if shape.v_in_k { core::ptr::null() } else { given.v_heads },
        k_rotated: !flag(given.k_unrotated, "k_unrotated")?,
    })
}

/// Scales as given, or behind the codes that lie at `codes`.
fn side(
    (given, strides): (*const c_void, [i64; 3]),
    (codes, code_strides): (*mut u8, Strides),
    kv: &KvView,
    dim: u32,
    parts: u32,
) -> Result<(*mut u8, Strides)> {
    let [block, head, token] = strides;
    if !given.is_null() {
        return Ok((given.cast_mut().cast(), Strides { block, head, token }));
    }
    let bytes = kv.format.row_scale_bytes(dim, parts);
    let row = kv.format.row_bytes(dim);
    if bytes != 0 && code_strides.token != row as i64 {
        return Err(Error::invalid(
            "scales",
            "must be given where rows of codes are not contiguous",
        ));
    }
    let run =
        row.checked_mul(u64::from(kv.block_tokens)).ok_or(Error::Overflow { what: "K, V" })?;
    Ok((codes.wrapping_add(run as usize), Strides { token: bytes as i64, ..code_strides }))
}

/// Fills a kvc_scales of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `scales` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_scales_init(scales: *mut kvc_scales, struct_size: u32) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(scales, struct_size) })
}
