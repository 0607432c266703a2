//! The seq noun: the sequences of a cache, by id.

use super::cache::{kvc_cache, open};
use super::pointer::{self, Plain};
use super::retention::{hint, kvc_retention, ranges};
use super::status::{guard, kvc_status};
use crate::error::{Error, Result};
use crate::ids::{Namespace, SeqId};

/// A sequence of a cache. The id of a sequence that has ended is refused, not reused at once.
pub type kvc_seq = u32;

/// Starts a sequence for `prompt[prompt_tokens]` and writes its id to `out_seq`. It begins with
/// what the prefix index has of the prompt in `name_space`; how many tokens that is goes to
/// `out_cached_tokens`, and is less than `prompt_tokens`: the caller feeds the rest to its steps.
///
/// `name_space` separates what may share prefixes from what may not (tenant, adapter); the server
/// chooses it.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `prompt` is readable, outputs are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seq_start(
    cache: *mut kvc_cache,
    prompt: *const u32,
    prompt_tokens: u64,
    name_space: u64,
    out_seq: *mut kvc_seq,
    out_cached_tokens: *mut u32,
) -> kvc_status {
    guard(|| {
        let cache = open(cache)?;
        // SAFETY: the caller's promise.
        let (prompt, out_seq, out_cached) = unsafe {
            (
                pointer::slice(prompt, prompt_tokens, "prompt")?,
                pointer::out(out_seq, "out_seq")?,
                pointer::out(out_cached_tokens, "out_cached_tokens")?,
            )
        };
        let started = cache.lock()?.start(prompt, Namespace(name_space))?;
        out_seq.write(started.seq.0);
        out_cached.write(started.cached_tokens);
        Ok(())
    })
}

/// Makes a second sequence with the same tokens, sharing every block, and writes its id to
/// `out_seq`. Whichever of the two next writes to the last, partly full block gets a copy.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_seq` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seq_fork(
    cache: *mut kvc_cache,
    seq: kvc_seq,
    out_seq: *mut kvc_seq,
) -> kvc_status {
    guard(|| {
        let cache = open(cache)?;
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out_seq, "out_seq") }?;
        out.write(cache.lock()?.fork(SeqId(seq))?.0);
        Ok(())
    })
}

/// Forgets the tokens of a sequence from position `tokens` on (rejected speculation). With a sliding
/// window, to lengths that the window has not left behind (KVC_ERR_INVALID_STATE for others): those
/// since the sequence's last kvc_step_begin, and as many more as its blocks allow.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seq_truncate(
    cache: *mut kvc_cache,
    seq: kvc_seq,
    tokens: u32,
) -> kvc_status {
    guard(|| open(cache)?.lock()?.truncate(SeqId(seq), tokens))
}

/// Ends a sequence. Its full blocks stay in the prefix index until they are evicted.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seq_release(cache: *mut kvc_cache, seq: kvc_seq) -> kvc_status {
    guard(|| open(cache)?.lock()?.release(SeqId(seq)))
}

/// Gives priorities to the full blocks of a sequence in the prefix index: as kvc_prefix_prioritize.
/// A duration runs from the last step or kvc_seq_release: give it right before the latter. Nothing
/// happens to blocks that are not committed yet.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `ranges_in` is readable for `count` ranges.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seq_prioritize(
    cache: *mut kvc_cache,
    seq: kvc_seq,
    ranges_in: *const kvc_retention,
    count: u32,
) -> kvc_status {
    guard(|| {
        let cache = open(cache)?;
        // SAFETY: the caller's promise.
        let ranges = unsafe { ranges(ranges_in, count) }?;
        cache.lock()?.prioritize(SeqId(seq), &ranges)
    })
}

/// Says what is known of the next use of what a sequence holds, from its block `from_block` on: as
/// kvc_prefix_hint. Before kvc_seq_release.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seq_hint(
    cache: *mut kvc_cache,
    seq: kvc_seq,
    from_block: u64,
    hint_id: u32,
    when_ms: u64,
) -> kvc_status {
    guard(|| {
        let from = usize::try_from(from_block).unwrap_or(usize::MAX);
        open(cache)?.lock()?.hint(SeqId(seq), from, hint(hint_id, when_ms)?)
    })
}

/// Copies the tokens whose K and V the sequence holds to `out`, and writes how many there are to
/// `out_count`. KVC_ERR_BUFFER_TOO_SMALL where there are more than `capacity`. With an `out` of
/// NULL only the count is written.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `capacity` tokens.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seq_tokens(
    cache: *const kvc_cache,
    seq: kvc_seq,
    out: *mut u32,
    capacity: u64,
    out_count: *mut u64,
) -> kvc_status {
    guard(|| {
        let cache = open(cache)?;
        let cache = cache.lock()?;
        // SAFETY: the caller's promise.
        unsafe { copy_list(cache.tokens(SeqId(seq))?, out, capacity, out_count) }
    })
}

/// Copies the blocks that hold the sequence in layer group `group` to `out`, in order, and writes
/// how many there are to `out_count`; otherwise as kvc_seq_tokens.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `capacity` ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seq_blocks(
    cache: *const kvc_cache,
    seq: kvc_seq,
    group: u32,
    out: *mut i32,
    capacity: u64,
    out_count: *mut u64,
) -> kvc_status {
    guard(|| {
        let cache = open(cache)?;
        let cache = cache.lock()?;
        // SAFETY: the caller's promise; BlockId is transparent over u32.
        unsafe { copy_list(cache.blocks(SeqId(seq), group)?, out.cast(), capacity, out_count) }
    })
}

/// Copies a list and its length, or only the length.
///
/// # Safety
/// As for [`pointer::slice_out`].
unsafe fn copy_list<T: Plain>(
    list: &[T],
    out: *mut T,
    capacity: u64,
    out_count: *mut u64,
) -> Result<()> {
    let count = list.len() as u64;
    // SAFETY: the caller's promise.
    let out_count = unsafe { pointer::out(out_count, "out_count") }?;
    if !out.is_null() {
        if count > capacity {
            return Err(Error::BufferTooSmall { what: "out", needed: count });
        }
        // SAFETY: the caller's promise.
        unsafe { pointer::slice_out(out, count, "out") }?.copy_from_slice(list);
    }
    out_count.write(count);
    Ok(())
}
