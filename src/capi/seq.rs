//! The seq noun: the sequences of a cache, by id.

use alloc::vec::Vec;

use super::cache::{kvc_cache, open};
use super::pointer::{self, Plain};
use super::retention::{hint, kvc_retention, ranges};
use super::status::{guard, kvc_status};
use crate::cache::Media;
use crate::error::{Error, Result};
use crate::ids::{Namespace, SeqId};
use crate::prefix::Digest;

/// A sequence of a cache. The id of a sequence that has ended is refused, not reused at once.
pub type kvc_seq = u32;

/// Something in a prompt that its tokens do not name: an image, a clip, an embedding. This struct
/// never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_media {
    /// The position in the prompt of the first token that stands for it.
    pub position: u64,
    /// SHA-256, or another 32 bytes, of its content, and of how it is processed where that may
    /// differ. The server computes it: equal digests are taken for equal content.
    pub digest: [u8; 32],
}

// SAFETY: integers.
unsafe impl Plain for kvc_media {}

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
    let (prompt, media) = ((prompt, prompt_tokens), (core::ptr::null(), 0));
    // SAFETY: the caller's promise.
    guard(|| unsafe { start(cache, prompt, media, name_space, false, out_seq, out_cached_tokens) })
}

/// Starts a sequence as kvc_seq_start does, for a prompt in which tokens stand for
/// `media_in[media_count]`, in the order of their positions: images, clips, embeddings, whose
/// placeholder tokens do not say which they are. What is before the first of them is shared with all
/// prompts of the name space; what comes from then on only with those that have the same digests at
/// the same positions. What of them the sequence holds cannot be truncated, and a later turn that
/// brings new media is a new sequence, whose prompt begins with this one.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; inputs are readable, outputs are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_seq_start_media(
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
    guard(|| unsafe { start(cache, prompt, media, name_space, false, out_seq, out_cached_tokens) })
}

/// # Safety
/// As for [`kvc_seq_start_media`].
pub(super) unsafe fn start(
    cache: *mut kvc_cache,
    (prompt, prompt_tokens): (*const u32, u64),
    (media_in, media_count): (*const kvc_media, u32),
    name_space: u64,
    by_layers: bool,
    out_seq: *mut kvc_seq,
    out_cached_tokens: *mut u32,
) -> Result<()> {
    let cache = open(cache)?;
    // SAFETY: the caller's promise.
    let (prompt, media, out_seq, out_cached) = unsafe {
        (
            pointer::slice(prompt, prompt_tokens, "prompt")?,
            media(media_in, media_count)?,
            pointer::out(out_seq, "out_seq")?,
            pointer::out(out_cached_tokens, "out_cached_tokens")?,
        )
    };
    let (mut cache, space) = (cache.lock()?, Namespace(name_space));
    let started = match by_layers {
        true => cache.start_onboarding(prompt, &media, space)?,
        false => cache.start_with_media(prompt, &media, space)?,
    };
    out_seq.write(started.seq.0);
    out_cached.write(started.cached_tokens);
    Ok(())
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

/// The media of a call.
///
/// # Safety
/// As for [`pointer::slice`].
pub(super) unsafe fn media(media: *const kvc_media, count: u32) -> Result<Vec<Media>> {
    // SAFETY: the caller's promise.
    let given = unsafe { pointer::slice(media, count.into(), "media_in") }?;
    let mut list = Vec::new();
    let bytes = size_of_val(given) as u64;
    list.try_reserve_exact(given.len()).map_err(|_| Error::OutOfMemory { bytes })?;
    for medium in given {
        let position = u32::try_from(medium.position)
            .map_err(|_| Error::invalid("media_in", "must be within the prompt"))?;
        list.push(Media { position, digest: Digest(medium.digest) });
    }
    Ok(list)
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
