//! Where the scales of quantised rows lie, and what the codec of a call's rows follows from them.
//!
//! A row's codes and its scales are found apart: natively the scales of a run stand behind its
//! codes, an engine may keep them in tensors of their own. Scales that a whole layer and head share
//! lie beside both. Knows formats and strides, no kernels.

use super::args::{KvView, check_ptr, check_span};
use super::quant::Coding;
use crate::attention::HeadShape;
use crate::dtype::{FormatClass, KvFormat};
use crate::error::{Error, Result};
use crate::layout::Strides;
use crate::quant::RowCodec;

/// Scales of the K and V of one layer. All strides are in bytes.
///
/// The scales of the row (block, head, token) of K are the `KvFormat::row_scale_bytes` bytes from
/// `k + block * k_strides.block + head * k_strides.head + token * k_strides.token`.
#[derive(Debug, Clone, Copy)]
pub struct ScaleView {
    /// Scales of keys. Not read for formats whose rows have none (floats, FP8).
    pub k: *mut u8,
    /// Scales of values. Not read where values lie in keys.
    pub v: *mut u8,
    /// Where those of a key lie.
    pub k_strides: Strides,
    /// Where those of a value lie.
    pub v_strides: Strides,
    /// `[kv_heads]` scales of all keys of a head (FP8 and NVFP4), positive and finite; NULL for 1.
    pub k_heads: *const f32,
    /// The same of values. Not read where values lie in keys.
    pub v_heads: *const f32,
    /// Keys are rotated where the format leaves that open (INT8_T).
    pub k_rotated: bool,
}

impl ScaleView {
    /// No scales: for float formats, and FP8 whose heads have the scale 1.
    pub const NONE: ScaleView = ScaleView {
        k: core::ptr::null_mut(),
        v: core::ptr::null_mut(),
        k_strides: Strides { block: 0, head: 0, token: 0 },
        v_strides: Strides { block: 0, head: 0, token: 0 },
        k_heads: core::ptr::null(),
        v_heads: core::ptr::null(),
        k_rotated: true,
    };

    /// Checks pointers, strides and head scales for a view of `shape`.
    ///
    /// # Safety
    /// Head scales that are not NULL or misaligned must be readable.
    pub(super) unsafe fn check(&self, kv: &KvView, shape: &HeadShape) -> Result<()> {
        let align = match kv.format {
            KvFormat::Int8T | KvFormat::Int4T => 2,
            _ => 1,
        };
        let side = |what, ptr: *mut u8, strides: Strides, dim: u32| {
            if kv.format.row_scale_bytes(dim, 1) == 0 {
                return Ok(());
            }
            if kv.num_blocks != 0 {
                check_ptr(what, ptr, align)?;
            }
            for stride in [strides.block, strides.head, strides.token] {
                if stride % i64::from(align) != 0 {
                    return Err(Error::invalid(what, "strides of scales must keep them aligned"));
                }
            }
            check_span("scale block stride", strides.block, kv.num_blocks, 1)?;
            check_span("scale head stride", strides.head, shape.kv_heads, 1)?;
            check_span("scale token stride", strides.token, kv.block_tokens, 1).map(|_| ())
        };
        side("k scales", self.k, self.k_strides, shape.k_dim)?;
        if !shape.v_in_k {
            side("v scales", self.v, self.v_strides, shape.v_dim)?;
        }
        for (what, heads) in [("k head scales", self.k_heads), ("v head scales", self.v_heads)] {
            if heads.is_null() {
                continue;
            }
            check_ptr(what, heads.cast(), 4)?;
            if !has_head_scales(kv.format) {
                return Err(Error::invalid(what, "must be NULL for this format"));
            }
            for head in 0..shape.kv_heads as usize {
                // SAFETY: the caller's promise.
                check_scale(what, unsafe { heads.add(head).read() })?;
            }
        }
        Ok(())
    }

    /// The codec of the keys of `head`; `kv` has been checked.
    ///
    /// # Safety
    /// As for [`check`](Self::check).
    pub(super) unsafe fn key_codec(
        &self,
        format: KvFormat,
        shape: &HeadShape,
        head: u32,
    ) -> Result<RowCodec> {
        let codec = if shape.v_in_k {
            RowCodec::latent(format, shape.v_dim, shape.k_dim - shape.v_dim)?
        } else {
            RowCodec::key(format, shape.k_dim)?
        };
        let codec = match format {
            KvFormat::Int8T => codec.with_rotation(self.k_rotated)?,
            _ => codec,
        };
        // SAFETY: the caller's promise.
        unsafe { scaled(codec, self.k_heads, head) }
    }

    /// The codec of the values of `head`, where they are rows of their own.
    ///
    /// # Safety
    /// As for [`check`](Self::check).
    pub(super) unsafe fn value_codec(
        &self,
        format: KvFormat,
        shape: &HeadShape,
        head: u32,
    ) -> Result<RowCodec> {
        // SAFETY: the caller's promise.
        unsafe { scaled(RowCodec::value(format, shape.v_dim)?, self.v_heads, head) }
    }
}

impl KvView {
    /// What the codes of the heads from `head` on are.
    pub(super) fn coding(&self, shape: &HeadShape, head: u32) -> Coding {
        let at = |heads: *const f32| {
            if heads.is_null() { heads } else { heads.wrapping_add(head as usize) }
        };
        let k_rotated = match self.format {
            KvFormat::Int8T => self.scales.k_rotated,
            format => format == KvFormat::Int4T,
        };
        let first = if shape.v_in_k { shape.v_dim } else { shape.k_dim };
        Coding {
            format: self.format,
            k_first: first as usize,
            k_rotated,
            // Values that lie in keys are what keys are.
            v_rotated: if shape.v_in_k { k_rotated } else { self.format == KvFormat::Int4T },
            k_heads: at(self.scales.k_heads),
            v_heads: at(self.scales.v_heads),
        }
    }
}

unsafe fn scaled(codec: RowCodec, heads: *const f32, head: u32) -> Result<RowCodec> {
    if heads.is_null() {
        return Ok(codec);
    }
    // SAFETY: the caller's promise.
    codec.with_scale(unsafe { heads.add(head as usize).read() })
}

/// Whether all rows of a layer and head share a scale in this format.
pub(crate) const fn has_head_scales(format: KvFormat) -> bool {
    matches!(format, KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 | KvFormat::Nvfp4)
}

/// That a head's scale is one.
pub(crate) fn check_scale(what: &'static str, scale: f32) -> Result<()> {
    if scale > 0.0 && scale.is_finite() {
        Ok(())
    } else {
        Err(Error::invalid(what, "must be positive and finite"))
    }
}

/// Bytes of one unit of the strides of codes: elements of float formats, bytes of others.
pub(crate) const fn stride_bytes(format: KvFormat) -> u32 {
    match format.class() {
        FormatClass::Float => format.dtype().bytes(),
        _ => 1,
    }
}
