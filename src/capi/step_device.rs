//! The step noun for an engine whose rows are in the memory of the cache's device: nothing is
//! copied, nothing is waited for.

use core::ffi::c_void;

use super::append::{kvc_rope, read_rope};
use super::cache::{kvc_cache, open};
use super::handle;
use super::pointer::{self, Sized32};
use super::status::{guard, kvc_status};
use super::step::{OpenStep, elements, group_of, kvc_scoring, kvc_step};
use crate::attention::HeadShape;
use crate::cache::LayerId;
use crate::device::{DeviceRows, DeviceRowsMut};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::GroupSpec;

/// The address of rows on a device.
fn rows_at(pointer: *const c_void, what: &'static str) -> Result<u64> {
    match pointer.expose_provenance() as u64 {
        0 => Err(Error::NullPointer { what }),
        address if address % 16 != 0 => Err(Error::Misaligned { what, align_bytes: 16 }),
        address => Ok(address),
    }
}

/// kvc_step_append for rows in the memory of the cache's device, aligned to 16 bytes: enqueues the
/// work on the cache's stream. KVC_ERR_INVALID_STATE where the cache is on the CPU.
///
/// Threads: thread-safe on the cache, per-handle on the step.
///
/// # Safety
/// The module's rules; rows are on the device and readable to their sizes until the stream has done
/// the work.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_append_device(
    cache: *mut kvc_cache,
    step: *const kvc_step,
    group: u32,
    layer: u32,
    k: *const c_void,
    v: *const c_void,
    dtype: u32,
    rope: *const kvc_rope,
) -> kvc_status {
    guard(|| {
        let locked = open(cache)?;
        let step = handle::exclusive::<OpenStep>(step)?;
        // SAFETY: the caller's promise.
        let rope = if rope.is_null() { None } else { Some(unsafe { read_rope(rope) }?) };
        let mut cache = locked.lock()?;
        let spec = group_of(&cache, group)?;
        let (rows, dtype) = (step.step.rows(), DType::from_id(dtype)?);
        let k_elements = elements(rows, spec.kv_heads, spec.k_dim)?;
        let (v, v_elements) = if spec.v_in_k {
            (0, 0)
        } else {
            (rows_at(v, "v")?, elements(rows, spec.kv_heads, spec.v_dim)?)
        };
        // SAFETY: the caller's promise.
        let (k, v) = unsafe {
            (
                DeviceRows::new(rows_at(k, "k")?, dtype, k_elements),
                DeviceRows::new(v, dtype, v_elements),
            )
        };
        cache.append_device(&step.step, LayerId { group, layer }, k, v, rope.as_ref())
    })
}

/// kvc_step_attend for rows in the memory of the cache's device, aligned to 16 bytes (`lse` to 4):
/// enqueues the work on the cache's stream. The lists of `scoring` are host memory, and copied.
/// KVC_ERR_INVALID_STATE where the cache is on the CPU.
///
/// Threads: thread-safe on the cache, per-handle on the step.
///
/// # Safety
/// The module's rules; rows are on the device and readable or writable to their sizes until the
/// stream has done the work.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_attend_device(
    cache: *mut kvc_cache,
    step: *const kvc_step,
    group: u32,
    layer: u32,
    q_heads: u32,
    q: *const c_void,
    q_dtype: u32,
    out: *mut c_void,
    out_dtype: u32,
    scoring: *const kvc_scoring,
    lse: *mut f32,
) -> kvc_status {
    guard(|| {
        let locked = open(cache)?;
        let step = handle::exclusive::<OpenStep>(step)?;
        let scoring = if scoring.is_null() {
            kvc_scoring::initial()
        } else {
            // SAFETY: the caller's promise.
            unsafe { pointer::read(scoring) }?
        };
        let mut cache = locked.lock()?;
        let spec = group_of(&cache, group)?;
        let GroupSpec { kv_heads, k_dim, v_dim, v_in_k, .. } = *spec;
        HeadShape { q_heads, kv_heads, k_dim, v_dim, v_in_k }.check()?;
        let rows = step.step.rows();
        let (q_dtype, out_dtype) = (DType::from_id(q_dtype)?, DType::from_id(out_dtype)?);
        let lse_at = lse.expose_provenance() as u64;
        if !lse_at.is_multiple_of(4) {
            return Err(Error::Misaligned { what: "lse", align_bytes: 4 });
        }
        // SAFETY: the caller's promise.
        let (scoring, q, out, lse) = unsafe {
            (
                scoring.scoring(k_dim, q_heads)?,
                DeviceRows::new(rows_at(q, "q")?, q_dtype, elements(rows, q_heads, k_dim)?),
                DeviceRowsMut::new(
                    rows_at(out, "out")?,
                    out_dtype,
                    elements(rows, q_heads, v_dim)?,
                ),
                DeviceRowsMut::new(lse_at, DType::F32, elements(rows, q_heads, 1)?),
            )
        };
        let lse = (lse_at != 0).then_some(lse);
        cache.attend_device(&step.step, LayerId { group, layer }, q, out, &scoring, lse)
    })
}
