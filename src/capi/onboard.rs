//! The onboard noun: sequences that start before what tiers have of them is on the device.

use core::time::Duration;

use super::cache::{kvc_cache, open};
use super::handle;
use super::pointer::{self, Plain};
use super::seq::{kvc_media, kvc_seq, start};
use super::status::{guard, kvc_status};
use super::step::{OpenStep, kvc_step};
use crate::cache::LayerId;
use crate::ids::SeqId;
use crate::tier::Missed;

/// A load: nothing is loaded, or all of it is there.
pub const KVC_ONBOARD_COMPLETE: u32 = 1;
/// A load: layers are on their way.
pub const KVC_ONBOARD_LOADING: u32 = 2;
/// A load: it failed; kvc_onboard_cancel before the sequence's next step.
pub const KVC_ONBOARD_FAILED: u32 = 3;

/// Why a load failed: the tier does not have a block of it any more.
pub const KVC_MISSED_ABSENT: u32 = 1;
/// Why a load failed: a block of it was damaged, or another block. It was removed from the tier.
pub const KVC_MISSED_BAD: u32 = 2;
/// Why a load failed: the tier or the device failed, or the tier is being left alone since it did.
pub const KVC_MISSED_DOWN: u32 = 3;
/// Why a load failed: it was cancelled.
pub const KVC_MISSED_CANCELLED: u32 = 4;

/// How the load of a sequence stands.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_onboard_progress {
    /// KVC_ONBOARD_*. Where it is KVC_ONBOARD_COMPLETE all else is 0.
    pub state: u32,
    /// Layers that are there, in all groups.
    pub ready_layers: u32,
    /// Tokens that the sequence held on the device before.
    pub device_tokens: u64,
    /// Tokens that come.
    pub loading_tokens: u64,
    /// The layer group of the first layer, in the order in which they come, that is not there.
    pub missing_group: u32,
    /// That layer, counted within the group.
    pub missing_layer: u32,
    /// KVC_MISSED_*: why it never will be; 0 while it is on its way.
    pub why: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_onboard_progress {}

/// Size of [`kvc_onboard_progress`] in ABI 0.1.
const PROGRESS_FIRST_BYTES: usize = 40;
const _: () = assert!(size_of::<kvc_onboard_progress>() == PROGRESS_FIRST_BYTES);

/// Starts a sequence as kvc_seq_start_media does (`media_in` may be NULL for 0 media), for an engine
/// that begins before all of its blocks are on the device: what tiers have of the prompt, as far as
/// loading is worth it, is counted in `out_cached_tokens`, and comes layer by layer. Before a layer is
/// attended it must be there (kvc_onboard_wait_step, kvc_onboard_wait; kvc_step_attend refuses it with
/// KVC_ERR_INVALID_STATE before), and all of them before the step is committed; other sequences find
/// these blocks only then. Till then the sequence can be neither forked nor truncated. Waits for
/// nothing. KVC_ERR_INVALID_STATE for a cache without tiers.
///
/// Of a store that has to be asked (a remote one, or the engine's own) only blocks are counted that it
/// was seen to have, and all layers of a block come at once: kvc_prefetch_create fetches the others.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; inputs are readable, outputs are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_onboard_start(
    cache: *mut kvc_cache,
    prompt: *const u32,
    prompt_tokens: u64,
    media_in: *const kvc_media,
    media_count: u32,
    name_space: u64,
    out_seq: *mut kvc_seq,
    out_cached_tokens: *mut u32,
) -> kvc_status {
    let (prompt, media) = ((prompt, prompt_tokens), (media_in, media_count));
    // SAFETY: the caller's promise.
    guard(|| unsafe { start(cache, prompt, media, name_space, true, out_seq, out_cached_tokens) })
}

/// Waits at most `wait_ms` milliseconds (0: not at all), during which other threads may use the cache,
/// for layer `layer` of group `group` of all blocks of a sequence; writes 1 to `out_there` where it is
/// there, else 0. What has arrived is copied to the blocks in this call; on a device the cache's stream
/// waits for the copy. 1 for a sequence that loads nothing.
///
/// KVC_ERR_LAYER_MISSING where it never will be there; kvc_last_error names the first layer that is not,
/// and why. Cancel the step that the sequence is in, then kvc_onboard_cancel, and compute its tokens.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_there` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_onboard_wait(
    cache: *mut kvc_cache,
    seq: kvc_seq,
    group: u32,
    layer: u32,
    wait_ms: u32,
    out_there: *mut u32,
) -> kvc_status {
    guard(|| {
        let cache = open(cache)?;
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out_there, "out_there") }?;
        let (seq, layer) = (SeqId(seq), LayerId { group, layer });
        if wait_ms > 0 {
            let wait = cache.lock()?.layer_wait(seq, layer)?;
            wait.wait(Duration::from_millis(wait_ms.into()));
        }
        out.write(u32::from(cache.lock()?.poll_layer(seq, layer)?));
        Ok(())
    })
}

/// The same for all sequences of an open step at once: 1 where the layer of all of them is there. One
/// call a layer, between kvc_step_append and kvc_step_attend.
///
/// Threads: per-handle for the step, thread-safe for the cache.
///
/// # Safety
/// The module's rules; `out_there` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_onboard_wait_step(
    cache: *mut kvc_cache,
    step: *mut kvc_step,
    group: u32,
    layer: u32,
    wait_ms: u32,
    out_there: *mut u32,
) -> kvc_status {
    guard(|| {
        let cache = open(cache)?;
        let step = handle::exclusive::<OpenStep>(step)?;
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out_there, "out_there") }?;
        let layer = LayerId { group, layer };
        if wait_ms > 0 {
            let wait = cache.lock()?.step_layer_wait(&step.step, layer)?;
            wait.wait(Duration::from_millis(wait_ms.into()));
        }
        out.write(u32::from(cache.lock()?.poll_step_layer(&step.step, layer)?));
        Ok(())
    })
}

/// Writes how the load of a sequence stands to `out`, `out_bytes` (its sizeof) at most. Copies nothing
/// and waits for nothing.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_onboard_state(
    cache: *const kvc_cache,
    seq: kvc_seq,
    out: *mut kvc_onboard_progress,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        let state = open(cache)?.lock()?.load_state(SeqId(seq))?;
        let progress = match state {
            None => kvc_onboard_progress {
                state: KVC_ONBOARD_COMPLETE,
                ready_layers: 0,
                device_tokens: 0,
                loading_tokens: 0,
                missing_group: 0,
                missing_layer: 0,
                why: 0,
                reserved: 0,
            },
            Some(load) => kvc_onboard_progress {
                state: load.failed.map_or(KVC_ONBOARD_LOADING, |_| KVC_ONBOARD_FAILED),
                ready_layers: load.ready_layers,
                device_tokens: load.device_tokens as u64,
                loading_tokens: load.loading_tokens as u64,
                missing_group: load.first_missing.group,
                missing_layer: load.first_missing.layer,
                why: load.failed.map_or(0, |why| match why {
                    Missed::Absent => KVC_MISSED_ABSENT,
                    Missed::Bad => KVC_MISSED_BAD,
                    Missed::Down => KVC_MISSED_DOWN,
                    Missed::Cancelled => KVC_MISSED_CANCELLED,
                }),
                reserved: 0,
            },
        };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, progress, "out", PROGRESS_FIRST_BYTES) }
    })
}

/// Gives up what has not come of a sequence, and writes how many tokens it holds then to `out_tokens`:
/// those that were on the device before, or all where the load is complete. The tokens after those are
/// to be computed. KVC_ERR_INVALID_STATE while a step holds the sequence.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_tokens` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_onboard_cancel(
    cache: *mut kvc_cache,
    seq: kvc_seq,
    out_tokens: *mut u32,
) -> kvc_status {
    guard(|| {
        let cache = open(cache)?;
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out_tokens, "out_tokens") }?;
        // Sequences are shorter than 2^31 tokens.
        let tokens = cache.lock()?.cancel_load(SeqId(seq))? as u32;
        out.write(tokens);
        Ok(())
    })
}
