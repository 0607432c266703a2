//! The prefetch noun: a prompt's blocks on their way from lower tiers to host memory.

use core::time::Duration;
use std::sync::{Mutex, PoisonError};

use super::cache::{kvc_cache, open};
use super::handle::{self, Noun};
use super::pointer;
use super::seq::{kvc_media, media};
use super::status::{guard, kvc_status};
use crate::cache::{Prefetch, Progress};
use crate::error::{Error, Result};
use crate::ids::Namespace;
use crate::tier::Why;

/// Why so much is loaded: no tier has the next block.
pub const KVC_WHY_NOTHING_FOUND: u32 = 1;
/// Why so much is loaded: what prefill costs is not known, so all of it is.
pub const KVC_WHY_COST_UNKNOWN: u32 = 2;
/// Why so much is loaded: no load from this tier was timed yet, so all of it is.
pub const KVC_WHY_RATE_UNKNOWN: u32 = 3;
/// Why so much is loaded: loading is faster than computing.
pub const KVC_WHY_LOAD_IS_FASTER: u32 = 4;
/// Why so much is loaded: loading is faster up to here, and computing from here on.
pub const KVC_WHY_LOAD_IS_FASTER_AT_FIRST: u32 = 5;
/// Why so much is loaded: computing is faster.
pub const KVC_WHY_COMPUTE_IS_FASTER: u32 = 6;

/// A prompt whose blocks are on their way from lower tiers.
pub struct kvc_prefetch(());

/// What tiers have of a prompt, and what was done about it. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_tier_decision {
    /// Leading tokens on the device.
    pub device_tokens: u64,
    /// Tokens after those that are in host memory.
    pub host_tokens: u64,
    /// Blocks after those on the device that tiers have; the engine's own store is asked later, and
    /// taken to have the rest.
    pub found_blocks: u64,
    /// Leading blocks of those that are worth loading.
    pub load_blocks: u64,
    /// Seconds that loading those takes; 0 where it is not known.
    pub load_seconds: f64,
    /// Seconds that computing the same takes; 0 where it is not known.
    pub compute_seconds: f64,
    /// KVC_WHY_*.
    pub why: u32,
    /// 0.
    pub reserved: u32,
}

/// What a prefetch handle holds; `None` once it was cancelled.
struct Held(Mutex<Option<Prefetch>>);

impl Noun for Held {
    type Handle = kvc_prefetch;
    const KIND: usize = 10;
    const NAME: &'static str = "prefetch";
}

/// Begins to load what lower tiers have of a prompt into host memory, from where kvc_seq_start takes
/// it; writes what was found and decided to `out_decision` where that is not NULL. Waits for
/// nothing. End it with kvc_prefetch_destroy.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `tokens` is readable for `token_count` tokens, outputs are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefetch_create(
    cache: *mut kvc_cache,
    tokens: *const u32,
    token_count: u32,
    name_space: u64,
    out: *mut *mut kvc_prefetch,
    out_decision: *mut kvc_tier_decision,
) -> kvc_status {
    let (prompt, media) = ((tokens, token_count), (core::ptr::null(), 0));
    // SAFETY: the caller's promise.
    guard(|| unsafe { create(cache, prompt, media, name_space, out, out_decision) })
}

/// The same for a prompt with media, which kvc_seq_start_media takes: see there.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; inputs are readable, outputs are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefetch_create_media(
    cache: *mut kvc_cache,
    tokens: *const u32,
    token_count: u32,
    media_in: *const kvc_media,
    media_count: u32,
    name_space: u64,
    out: *mut *mut kvc_prefetch,
    out_decision: *mut kvc_tier_decision,
) -> kvc_status {
    let (prompt, media) = ((tokens, token_count), (media_in, media_count));
    // SAFETY: the caller's promise.
    guard(|| unsafe { create(cache, prompt, media, name_space, out, out_decision) })
}

/// # Safety
/// As for [`kvc_prefetch_create_media`].
unsafe fn create(
    cache: *mut kvc_cache,
    (tokens, token_count): (*const u32, u32),
    (media_in, media_count): (*const kvc_media, u32),
    name_space: u64,
    out: *mut *mut kvc_prefetch,
    out_decision: *mut kvc_tier_decision,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let tokens = unsafe { pointer::slice(tokens, token_count.into(), "tokens") }?;
    // SAFETY: the caller's promise.
    let media = unsafe { media(media_in, media_count) }?;
    // SAFETY: the caller's promise.
    let out = unsafe { pointer::out(out, "out") }?;
    // SAFETY: the caller's promise.
    let out_decision = unsafe { pointer::maybe_out(out_decision, "out_decision") }?;
    let space = Namespace(name_space);
    let prefetch = open(cache)?.lock()?.prefetch_with_media(tokens, &media, space)?;
    let decision = prefetch.decision;
    let shown = kvc_tier_decision {
        device_tokens: prefetch.device_tokens as u64,
        host_tokens: prefetch.host_tokens as u64,
        found_blocks: decision.found as u64,
        load_blocks: decision.blocks as u64,
        load_seconds: decision.load_seconds,
        compute_seconds: decision.compute_seconds,
        why: match decision.why {
            Why::NothingFound => KVC_WHY_NOTHING_FOUND,
            Why::CostUnknown => KVC_WHY_COST_UNKNOWN,
            Why::RateUnknown => KVC_WHY_RATE_UNKNOWN,
            Why::LoadIsFaster => KVC_WHY_LOAD_IS_FASTER,
            Why::LoadIsFasterAtFirst => KVC_WHY_LOAD_IS_FASTER_AT_FIRST,
            Why::ComputeIsFaster => KVC_WHY_COMPUTE_IS_FASTER,
        },
        reserved: 0,
    };
    out.write(handle::publish(Held(Mutex::new(Some(prefetch))))?);
    if let Some(out_decision) = out_decision {
        out_decision.write(shown);
    }
    Ok(())
}

/// Takes what has arrived for `cache`, after at most `wait_ms` milliseconds of waiting for the rest
/// (0: none), during which other threads may use the cache; writes 1 to `out_done` where nothing
/// more comes, else 0. The cache is the one that the prefetch was made for.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_done` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefetch_wait(
    cache: *mut kvc_cache,
    prefetch: *mut kvc_prefetch,
    wait_ms: u32,
    out_done: *mut u32,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out_done, "out_done") }?;
        let held = handle::shared::<Held>(prefetch)?;
        let mut held = held.0.lock().unwrap_or_else(PoisonError::into_inner);
        let prefetch = held.as_mut().ok_or(Error::StaleHandle { what: "prefetch" })?;
        prefetch.wait(Duration::from_millis(wait_ms.into()));
        let progress = open(cache)?.lock()?.poll_prefetch(prefetch);
        out.write(u32::from(progress == Progress::Done));
        Ok(())
    })
}

/// Ends a prefetch; what has not arrived is given up. NULL is accepted.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefetch_destroy(prefetch: *mut kvc_prefetch) -> kvc_status {
    guard(|| handle::destroy::<Held>(prefetch))
}
