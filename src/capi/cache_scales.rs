//! The cache noun: the scales that the rows of a layer and head share.

use super::cache::{kvc_cache, open};
use super::pointer;
use super::status::{guard, kvc_status};
use crate::cache::LayerId;

/// Sets the scales by which the keys and values of a layer's heads are divided when they are stored
/// (fp8, nvfp4): `k[kv_heads]` and `v[kv_heads]`, positive and finite. Until then both are 1. `v` is
/// NULL for latents. Engines that calibrate take the largest magnitude over 448 (e4m3).
/// KVC_ERR_INVALID_STATE with a sequence alive or a block cached, which would be misread.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `k` and `v` are readable for `kv_heads` floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_set_scales(
    cache: *mut kvc_cache,
    group: u32,
    layer: u32,
    k: *const f32,
    v: *const f32,
    kv_heads: u32,
) -> kvc_status {
    guard(|| {
        let heads = u64::from(kv_heads);
        // SAFETY: the caller's promise.
        let k = unsafe { pointer::slice(k, heads, "k") }?;
        let count = if v.is_null() { 0 } else { heads };
        // SAFETY: the caller's promise.
        let v = unsafe { pointer::slice(v, count, "v") }?;
        open(cache)?.lock()?.set_scales(LayerId { group, layer }, k, v)
    })
}
