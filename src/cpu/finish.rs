//! From softmax states to an output row: merge, sink, division, conversion.

use super::quant::{CodeVector, unrotate};
use crate::dtype::{DType, Element, bf16, f16};
use crate::layout::MAX_HEAD_DIM;

/// The state of a row over one split of its keys.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    /// Largest score; -inf for none.
    pub m: f32,
    /// Sum of `exp(score - m)`.
    pub l: f32,
    /// `[v_dim]` weighted values; not read where `m` is -inf.
    pub o: *const f32,
}

impl Part {
    /// No keys.
    pub const EMPTY: Part = Part { m: f32::NEG_INFINITY, l: 0.0, o: core::ptr::null() };
}

/// The most parts of a row.
pub(crate) const MAX_PARTS: usize = super::plan::MAX_SPLITS as usize + 1;
/// Channels that are merged at a time.
const CHUNK: usize = 64;

/// Merges `parts`, at most [`MAX_PARTS`], in their order, applies the sink's logit, writes `v_dim` channels of `dtype` to
/// `out` and returns the LSE.
///
/// # Safety
/// `out` must have room for `v_dim` elements; parts must be as documented.
#[inline(always)]
pub(crate) unsafe fn finish_row(
    parts: &[Part],
    sink: Option<f32>,
    dtype: DType,
    out: *mut u8,
    v_dim: usize,
) -> f32 {
    let none = f32::NEG_INFINITY;
    let seen = parts.iter().fold(none, |top, part| top.max(part.m));
    let top = if seen == none { none } else { sink.map_or(seen, |sink| sink.max(seen)) };
    let weight = |m: f32| if m == none { 0.0 } else { libm::expf(m - top) };
    let mut l = if seen == none { 0.0 } else { sink.map_or(0.0, |sink| libm::expf(sink - top)) };
    let mut weights = [0.0f32; MAX_PARTS];
    for (part, w) in parts.iter().zip(&mut weights) {
        *w = weight(part.m);
        l += part.l * *w;
    }
    let mut at = 0;
    while at < v_dim {
        let n = CHUNK.min(v_dim - at);
        let mut row = [0.0f32; CHUNK];
        for (part, w) in parts.iter().zip(weights).filter(|(part, _)| part.m != none) {
            let w = w / l;
            for (c, x) in row[..n].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *x += w * unsafe { part.o.add(at + c).read() };
            }
        }
        // SAFETY: the caller's promise.
        unsafe {
            match dtype {
                DType::F32 => write::<f32>(&row[..n], out, at),
                DType::F16 => write::<f16>(&row[..n], out, at),
                DType::Bf16 => write::<bf16>(&row[..n], out, at),
            }
        }
        at += n;
    }
    if seen == none { none } else { top + libm::logf(l) }
}

/// The same where the states are those of rotated values: the row is turned back once it is whole.
///
/// # Safety
/// As for [`finish_row`]; `v_dim` is a multiple of 16.
#[inline(always)]
pub(crate) unsafe fn finish_turned<V: CodeVector>(
    parts: &[Part],
    sink: Option<f32>,
    dtype: DType,
    out: *mut u8,
    v_dim: usize,
) -> f32 {
    let mut row = [0.0f32; MAX_HEAD_DIM as usize];
    // SAFETY: the caller's promise; the longest row fits.
    unsafe {
        let lse = finish_row(parts, sink, DType::F32, row.as_mut_ptr().cast(), v_dim);
        unrotate::<V>(row.as_mut_ptr(), v_dim);
        match dtype {
            DType::F32 => write::<f32>(&row[..v_dim], out, 0),
            DType::F16 => write::<f16>(&row[..v_dim], out, 0),
            DType::Bf16 => write::<bf16>(&row[..v_dim], out, 0),
        }
        lse
    }
}

/// Converts `row` and writes it from element `at` of `out` on.
#[inline(always)]
unsafe fn write<E: Element>(row: &[f32], out: *mut u8, at: usize) {
    for (c, &x) in row.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { out.cast::<E>().add(at + c).write(E::from_f32(x)) }
    }
}
