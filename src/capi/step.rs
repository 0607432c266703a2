//! The step noun: one forward pass over a batch. One crossing a layer serves the whole batch.

use alloc::vec::Vec;
use core::ffi::c_void;

use super::append::{kvc_rope, read_rope};
use super::attend::per_head;
use super::cache::{kvc_cache, open};
use super::handle::{self, Noun, Sharing};
use super::pointer::{self, Plain, Sized32, flag};
use super::seq::kvc_seq;
use super::status::{guard, kvc_status};
use crate::attention::{HeadShape, Scoring};
use crate::cache::{KvCache, LayerId, Step, Work};
use crate::dtype::{DType, Rows};
use crate::error::{Error, Result};
use crate::ids::{SeqId, TokenId};
use crate::layout::GroupSpec;

/// A step: begin with the new tokens of each sequence; for each layer append their keys and values
/// and attend; then commit, or cancel. Made once and reused: it keeps its buffers.
///
/// The rows of a step are the new tokens of all its sequences, in the order of the work.
pub struct kvc_step(());

/// What a step handle holds.
pub(super) struct OpenStep {
    pub(super) step: Step,
    /// The handle of the cache that has it open, to be cancelled with the step: a number, which is
    /// checked like any other handle.
    cache: usize,
    /// Empty between calls: room for the work of the next kvc_step_begin.
    room: Vec<Work<'static>>,
}

impl Noun for OpenStep {
    type Handle = kvc_step;
    const KIND: usize = 4;
    const NAME: &'static str = "step";
    const SHARING: Sharing = Sharing::Refuses;
}

/// New tokens of one sequence. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_work {
    /// A live sequence, at most once in a step.
    pub seq: kvc_seq,
    /// At least 1.
    pub token_count: u32,
    /// A chunk of the prompt, or what was sampled last.
    pub tokens: *const u32,
}

// SAFETY: integers, a pointer.
unsafe impl Plain for kvc_work {}

/// How scores are made from dot products.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_scoring {
    /// sizeof(kvc_scoring); kvc_scoring_init sets it.
    pub struct_size: u32,
    /// 1 (the default): a query sees no key after its own position.
    pub causal: u32,
    /// Keys that a query sees, its own included, counted back, no more than the group's window; 0 for
    /// that.
    pub window: u32,
    /// Factor of the dot product; 0 for 1 / sqrt(k_dim).
    pub scale: f32,
    /// Logit soft-cap; 0 for none.
    pub softcap: f32,
    /// 0.
    pub reserved: u32,
    /// NULL, or `[q_heads]`: a logit that joins each head's denominator and has no value.
    pub sinks: *const f32,
    /// NULL, or `[q_heads]`: ALiBi slopes.
    pub alibi: *const f32,
}

// SAFETY: integers, floats, pointers.
unsafe impl Plain for kvc_scoring {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_scoring {
    const NAME: &'static str = "kvc_scoring";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            causal: 1,
            window: 0,
            scale: 0.0,
            softcap: 0.0,
            reserved: 0,
            sinks: core::ptr::null(),
            alibi: core::ptr::null(),
        }
    }
}

impl kvc_scoring {
    /// # Safety
    /// `sinks` and `alibi` must be as documented.
    pub(super) unsafe fn scoring<'a>(&self, k_dim: u32, q_heads: u32) -> Result<Scoring<'a>> {
        if self.reserved != 0 {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        // SAFETY: the caller's promise.
        let list = |list, what| unsafe { per_head(list, q_heads, what) };
        let default = Scoring::causal(k_dim);
        Ok(Scoring {
            scale: if self.scale == 0.0 { default.scale } else { self.scale },
            causal: flag(self.causal, "causal")?,
            window: (self.window != 0).then_some(self.window),
            softcap: (self.softcap != 0.0).then_some(self.softcap),
            sinks: list(self.sinks, "sinks")?,
            alibi: list(self.alibi, "alibi")?,
        })
    }
}

/// The group that a layer is in.
pub(super) fn group_of(cache: &KvCache, group: u32) -> Result<&GroupSpec> {
    let found = cache.spec().groups.get(group as usize);
    found.ok_or(Error::invalid("group", "is not in the cache"))
}

/// Elements of `rows` rows of `heads` heads of `dim` channels.
pub(super) fn elements(rows: usize, heads: u32, dim: u32) -> Result<u64> {
    (rows as u64)
        .checked_mul(u64::from(heads))
        .and_then(|n| n.checked_mul(u64::from(dim)))
        .ok_or(Error::Overflow { what: "rows" })
}

/// Fills a kvc_scoring of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `scoring` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_scoring_init(
    scoring: *mut kvc_scoring,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(scoring, struct_size) })
}

/// Makes a step, for any number of passes over any caches.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_create(out: *mut *mut kvc_step) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        out.write(handle::publish(OpenStep { step: Step::new(), cache: 0, room: Vec::new() })?);
        Ok(())
    })
}

/// Ends a step. NULL is accepted. An open step is cancelled first, if its cache still lives.
///
/// Threads: per-handle.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_destroy(step: *mut kvc_step) -> kvc_status {
    guard(|| {
        // A step that an earlier panic poisoned is dropped as it is.
        match handle::exclusive::<OpenStep>(step) {
            Ok(mut open) => open.abandon()?,
            Err(Error::Poisoned | Error::NullPointer { .. }) => {}
            Err(error) => return Err(error),
        }
        handle::destroy::<OpenStep>(step)
    })
}

impl OpenStep {
    /// Cancels the step in its cache, unless that is gone.
    fn abandon(&mut self) -> Result<()> {
        if !self.step.is_open() {
            return Ok(());
        }
        match handle::waited::<KvCache>(core::ptr::without_provenance(self.cache)) {
            Ok(mut cache) => cache.cancel(&mut self.step),
            Err(Error::StaleHandle { .. } | Error::Poisoned) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Opens a step: reserves blocks in `cache` for the new tokens of the sequences that
/// `work[work_count]` names, copying a shared last block before it is written. All or nothing:
/// KVC_ERR_OUT_OF_BLOCKS says how many blocks were missing (kvc_last_missing_blocks).
///
/// Threads: thread-safe on the cache, per-handle on the step.
///
/// # Safety
/// The module's rules; `work` is readable, and the tokens that it points to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_begin(
    cache: *mut kvc_cache,
    step: *mut kvc_step,
    work: *const kvc_work,
    work_count: u32,
) -> kvc_status {
    guard(|| {
        let locked = open(cache)?;
        let mut step = handle::exclusive::<OpenStep>(step)?;
        // SAFETY: the caller's promise.
        let given = unsafe { pointer::slice(work, u64::from(work_count), "work") }?;
        let mut work: Vec<Work<'_>> = core::mem::take(&mut step.room);
        let bytes = (given.len() * size_of::<Work<'_>>()) as u64;
        work.try_reserve_exact(given.len()).map_err(|_| Error::OutOfMemory { bytes })?;
        for item in given {
            let count = u64::from(item.token_count);
            // SAFETY: the caller's promise.
            let tokens: &[TokenId] = unsafe { pointer::slice(item.tokens, count, "tokens") }?;
            work.push(Work { seq: SeqId(item.seq), tokens });
        }
        let begun = locked.lock()?.begin(&mut step.step, &work);
        work.clear();
        // Collected in place: the same memory, and nothing in it that the caller's tokens are.
        step.room = work.into_iter().map(|_| Work { seq: SeqId(0), tokens: &[] }).collect();
        begun?;
        step.cache = cache.addr();
        Ok(())
    })
}

/// Writes the rows of an open step to `out_rows`: the new tokens of all its sequences together. 0
/// where the step is not open. With `out_positions`, which may be NULL, the position of each row
/// in its sequence is written there; `capacity` is its length.
///
/// Threads: per-handle.
///
/// # Safety
/// The module's rules; outputs are writable to their sizes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_rows(
    step: *const kvc_step,
    out_positions: *mut u32,
    capacity: u64,
    out_rows: *mut u32,
) -> kvc_status {
    guard(|| {
        let step = handle::exclusive::<OpenStep>(step)?;
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out_rows, "out_rows") }?;
        let positions = if step.step.is_open() { step.step.positions() } else { &[] };
        if !out_positions.is_null() {
            let needed = positions.len() as u64;
            if needed > capacity {
                return Err(Error::BufferTooSmall { what: "out_positions", needed });
            }
            // SAFETY: the caller's promise.
            unsafe { pointer::slice_out(out_positions, needed, "out_positions") }?
                .copy_from_slice(positions);
        }
        // A step has fewer than 2^31 rows.
        out.write(positions.len() as u32);
        Ok(())
    })
}

/// Writes the keys and values of the step's rows in layer `layer` of layer group `group`, rounding
/// to the stored format. `k` is `[row][kv_head][k_dim]` and `v` `[row][kv_head][v_dim]`, both of
/// KVC_DTYPE_* `dtype`; `v` is ignored where values lie in keys. With `rope`, which may be NULL,
/// keys are rotated to their positions on the way.
///
/// Threads: thread-safe on the cache, per-handle on the step.
///
/// # Safety
/// The module's rules; rows are readable to their sizes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_append(
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
        let rows = step.step.rows();
        let k_elements = elements(rows, spec.kv_heads, spec.k_dim)?;
        let v_elements = if spec.v_in_k { 0 } else { elements(rows, spec.kv_heads, spec.v_dim)? };
        // SAFETY: the caller's promise.
        let (k, v): (Rows<'_>, Rows<'_>) = unsafe {
            (pointer::rows(k, dtype, k_elements, "k")?, pointer::rows(v, dtype, v_elements, "v")?)
        };
        cache.append(&step.step, LayerId { group, layer }, k, v, rope.as_ref())
    })
}

/// Computes attention of the step's rows over all that their sequences hold in a layer, the rows'
/// own tokens included. `q` is `[row][q_head][k_dim]` of `q_dtype`; `out`, of `out_dtype`, is
/// `[row][q_head][v_dim]` and must not overlap `q`. `scoring` may be NULL for its defaults. `lse`
/// may be NULL, or takes `[row][q_head]` natural logarithms of the softmax denominators.
///
/// Threads: thread-safe on the cache, per-handle on the step.
///
/// # Safety
/// The module's rules; rows are readable or writable to their sizes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_attend(
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
        // Before anything is measured by it.
        let GroupSpec { kv_heads, k_dim, v_dim, v_in_k, .. } = *spec;
        HeadShape { q_heads, kv_heads, k_dim, v_dim, v_in_k }.check()?;
        let rows = step.step.rows();
        let q_elements = elements(rows, q_heads, spec.k_dim)?;
        let out_elements = elements(rows, q_heads, spec.v_dim)?;
        let bytes = |dtype, count: u64| -> Result<u64> {
            Ok(count.saturating_mul(u64::from(DType::from_id(dtype)?.bytes())))
        };
        let lse_elements = if lse.is_null() { 0 } else { elements(rows, q_heads, 1)? };
        pointer::disjoint(&[
            (out.addr(), bytes(out_dtype, out_elements)?),
            (lse.addr(), lse_elements.saturating_mul(4)),
            (q.addr(), bytes(q_dtype, q_elements)?),
        ])?;
        // SAFETY: the caller's promise; what is written overlaps nothing.
        let (scoring, q, out, lse) = unsafe {
            (
                scoring.scoring(spec.k_dim, q_heads)?,
                pointer::rows(q, q_dtype, q_elements, "q")?,
                pointer::rows_out(out, out_dtype, out_elements, "out")?,
                pointer::slice_out(lse, lse_elements, "lse")?,
            )
        };
        let lse = if lse_elements == 0 { None } else { Some(lse) };
        cache.attend(&step.step, LayerId { group, layer }, q, out, &scoring, lse)
    })
}

/// Makes the step's tokens part of their sequences, publishes the blocks they filled to the prefix
/// index, and closes the step. On a device, a step that filled sealed tiles is waited for, to learn
/// which of them stay raw; KVC_ERR_OUT_OF_BLOCKS where one of those found no staging block: the step
/// can only be cancelled then.
///
/// Threads: thread-safe on the cache, per-handle on the step.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_commit(cache: *mut kvc_cache, step: *mut kvc_step) -> kvc_status {
    guard(|| {
        let locked = open(cache)?;
        let mut step = handle::exclusive::<OpenStep>(step)?;
        locked.lock()?.commit(&mut step.step)
    })
}

/// Closes the step without its tokens: the sequences are as before kvc_step_begin, and the blocks
/// that it took are free again.
///
/// Threads: thread-safe on the cache, per-handle on the step.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_step_cancel(cache: *mut kvc_cache, step: *mut kvc_step) -> kvc_status {
    guard(|| {
        let locked = open(cache)?;
        let mut step = handle::exclusive::<OpenStep>(step)?;
        locked.lock()?.cancel(&mut step.step)
    })
}
