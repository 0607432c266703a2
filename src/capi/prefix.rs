//! The prefix noun: `crate::prefix::PrefixIndex` behind a handle.

use super::handle::{self, Noun};
use super::pointer::{self, Plain};
use super::prefix_step::{kvc_prefix_commit, kvc_prefix_query};
use super::status::{guard, kvc_status};
use crate::error::{Error, Result};
use crate::ids::{BlockId, Namespace};
use crate::prefix::{Hit, PinId, Position, PrefixIndex};

/// An exact radix index over token ids: which token sequences are cached, in which blocks of the
/// engine's own pools. Blocks are stored and evicted whole; matching is by token. It holds no
/// blocks: the engine retains what it inserts and frees what is reported as evicted.
pub struct kvc_prefix(());

/// What a prefix handle holds.
pub(super) struct Index(Lock);

impl Index {
    pub(super) fn new(index: PrefixIndex) -> Self {
        Index(Lock::new(index))
    }
}

impl Noun for Index {
    type Handle = kvc_prefix;
    const KIND: usize = 2;
    const NAME: &'static str = "prefix";
}

/// Readers beside each other: each has a lock of its own to take, and a writer takes all.
#[cfg(feature = "std")]
mod lock {
    use super::{Index, kvc_prefix};
    use crate::capi::handle;
    use crate::error::Result;
    use crate::prefix::PrefixIndex;

    pub(super) type Lock = crate::capi::shard::lock::ShardedLock<PrefixIndex>;

    pub(in crate::capi) fn read<R>(
        prefix: *const kvc_prefix,
        work: impl FnOnce(&PrefixIndex) -> Result<R>,
    ) -> Result<R> {
        handle::shared::<Index>(prefix)?.0.read(work)
    }

    pub(in crate::capi) fn write<R>(
        prefix: *const kvc_prefix,
        work: impl FnOnce(&mut PrefixIndex) -> Result<R>,
    ) -> Result<R> {
        handle::shared::<Index>(prefix)?.0.write(work)
    }
}

/// Without threads the handle itself keeps calls apart.
#[cfg(not(feature = "std"))]
mod lock {
    use super::{Index, kvc_prefix};
    use crate::capi::handle;
    use crate::error::Result;
    use crate::prefix::PrefixIndex;

    pub(super) type Lock = core::cell::Cell<PrefixIndex>;

    pub(in crate::capi) fn read<R>(
        prefix: *const kvc_prefix,
        work: impl FnOnce(&PrefixIndex) -> Result<R>,
    ) -> Result<R> {
        work(handle::exclusive::<Index>(prefix)?.0.get_mut())
    }

    pub(in crate::capi) fn write<R>(
        prefix: *const kvc_prefix,
        work: impl FnOnce(&mut PrefixIndex) -> Result<R>,
    ) -> Result<R> {
        work(handle::exclusive::<Index>(prefix)?.0.get_mut())
    }
}

use lock::Lock;
pub(super) use lock::{read, write};

/// Lends a hit, whose buffers the thread keeps for its next call.
fn with_hit<R>(work: impl FnOnce(&mut Hit) -> R) -> R {
    #[cfg(feature = "std")]
    {
        std::thread_local! {
            static HIT: core::cell::RefCell<Hit> = core::cell::RefCell::new(Hit::default());
        }
        HIT.with_borrow_mut(work)
    }
    #[cfg(not(feature = "std"))]
    work(&mut Hit::default())
}

/// The end of a matched or inserted prefix, to lock it. Good until blocks at its end are evicted,
/// then refused. Its fields mean nothing to the caller. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_position {
    /// Private.
    pub parts: [u32; 3],
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_prefix_position {}

impl From<Position> for kvc_prefix_position {
    fn from(position: Position) -> Self {
        Self { parts: position.to_parts(), reserved: 0 }
    }
}

/// What a lookup found.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_hit {
    /// Tokens covered by whole blocks.
    pub tokens: u64,
    /// Ids of those blocks, written to out_blocks as `[block][group]`: blocks times groups.
    pub block_ids: u64,
    /// How many tokens after those agree with one more cached block, for copying from: fewer than
    /// a block has. Its ids, one a group, are in out_tail_blocks.
    pub tail_tokens: u64,
    /// The end of the whole blocks.
    pub at: kvc_prefix_position,
}

// SAFETY: integers.
unsafe impl Plain for kvc_prefix_hit {}

/// What an insertion did.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_inserted {
    /// Leading blocks that were cached already, under the ids in out_present: use those, and give
    /// the duplicates up.
    pub present_blocks: u64,
    /// Blocks after those that are cached now: retain their ids for the index. Fewer than the rest
    /// where the index is full.
    pub stored_blocks: u64,
    /// The end of both.
    pub at: kvc_prefix_position,
}

// SAFETY: integers.
unsafe impl Plain for kvc_prefix_inserted {}

/// Sizes of an index.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_counts {
    /// Block entries cached.
    pub blocks: u64,
    /// Block entries that fit.
    pub capacity_blocks: u64,
    /// Name spaces that have an entry.
    pub name_spaces: u64,
    /// Nodes of the tree.
    pub nodes: u64,
    /// Pins not yet unlocked.
    pub pins: u64,
    /// Memory in use.
    pub bytes: u64,
}

// SAFETY: integers.
unsafe impl Plain for kvc_prefix_counts {}

/// Room for `count` ids, or how much is needed. NULL only where none are needed.
///
/// # Safety
/// As for [`pointer::slice_out`].
unsafe fn room<'a>(
    out: *mut i32,
    capacity: u64,
    count: usize,
    what: &'static str,
) -> Result<&'a mut [BlockId]> {
    if capacity < count as u64 {
        return Err(Error::BufferTooSmall { what, needed: count as u64 });
    }
    // SAFETY: the caller's promise; BlockId is transparent over u32.
    unsafe { pointer::slice_out(out.cast(), count as u64, what) }
}

/// Makes an empty index of blocks of `block_tokens` tokens (1 to 65536) with one block id for each
/// of `groups` layer groups (1 to 65536), and room for `capacity_blocks` entries (1 to 2^30).
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_create(
    block_tokens: u32,
    groups: u32,
    capacity_blocks: u32,
    out: *mut *mut kvc_prefix,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        let index = PrefixIndex::new(block_tokens as usize, groups as usize, capacity_blocks)?;
        out.write(handle::publish(Index::new(index))?);
        Ok(())
    })
}

/// Ends an index. NULL is accepted. KVC_ERR_INVALID_STATE while another thread is inside it.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_destroy(prefix: *mut kvc_prefix) -> kvc_status {
    guard(|| handle::destroy::<Index>(prefix))
}

/// Finds the longest cached prefix of the first `max_tokens` of `tokens[token_count]` in
/// `name_space`. Give token_count - 1 as the maximum to leave the last token to be computed, whose
/// logits sampling needs. Writes block ids to `out_blocks[capacity]`: groups for each whole block
/// of tokens is always enough, and KVC_ERR_BUFFER_TOO_SMALL says what is not. `out_tail_blocks`
/// takes one id a group, and may be NULL. Marks nothing as used: see kvc_prefix_lock. Where another
/// thread may evict between the two, look up and pin in one call: kvc_prefix_run.
///
/// Threads: thread-safe; lookups do not wait for each other.
///
/// # Safety
/// The module's rules; inputs are readable and outputs writable to their sizes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_lookup(
    prefix: *mut kvc_prefix,
    name_space: u64,
    tokens: *const u32,
    token_count: u64,
    max_tokens: u64,
    out_blocks: *mut i32,
    capacity: u64,
    out_tail_blocks: *mut i32,
    out: *mut kvc_prefix_hit,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        let query = kvc_prefix_query {
            name_space,
            tokens,
            token_count,
            max_tokens,
            out_blocks,
            capacity,
            out_tail_blocks,
            pin: 0,
            reserved: 0,
        };
        // SAFETY: the caller's promise.
        out.write(read(prefix, |index| unsafe { look_up(index, &query) })?);
        Ok(())
    })
}

/// # Safety
/// The pointers of `query` are as documented.
pub(super) unsafe fn look_up(
    index: &PrefixIndex,
    query: &kvc_prefix_query,
) -> Result<kvc_prefix_hit> {
    let &kvc_prefix_query { name_space, out_blocks, capacity, out_tail_blocks, .. } = query;
    // SAFETY: the caller's promise.
    let tokens = unsafe { pointer::slice(query.tokens, query.token_count, "tokens") }?;
    let max_tokens = usize::try_from(query.max_tokens).unwrap_or(usize::MAX);
    with_hit(|hit| {
        index.lookup(Namespace(name_space), tokens, max_tokens, hit);
        // SAFETY: the caller's promise.
        let blocks = unsafe { room(out_blocks, capacity, hit.blocks.len(), "out_blocks") }?;
        if !out_tail_blocks.is_null() {
            let count = hit.tail_blocks.len();
            // SAFETY: the caller's promise: it has room for one id a group.
            unsafe { room(out_tail_blocks, count as u64, count, "out_tail_blocks") }?
                .copy_from_slice(&hit.tail_blocks);
        }
        blocks.copy_from_slice(&hit.blocks);
        Ok(kvc_prefix_hit {
            tokens: hit.tokens as u64,
            block_ids: hit.blocks.len() as u64,
            tail_tokens: hit.tail_tokens as u64,
            at: hit.at.into(),
        })
    })
}

/// Caches `tokens[token_count]`, whole blocks, under `blocks[block][group]`, `block_ids` in all,
/// and marks the sequence as used. Where a leading part was cached already, its ids go to
/// `out_present[capacity]`, which needs room for as many as were present; `block_ids` is always
/// enough. NULL with a capacity of 0 asks for none. -1 stands for a group that has no block.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; inputs are readable and outputs writable to their sizes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_insert(
    prefix: *mut kvc_prefix,
    name_space: u64,
    tokens: *const u32,
    token_count: u64,
    blocks: *const i32,
    block_ids: u64,
    out_present: *mut i32,
    capacity: u64,
    out: *mut kvc_prefix_inserted,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        let commit = kvc_prefix_commit {
            name_space,
            above: Position::default().into(),
            tokens,
            token_count,
            blocks,
            block_ids,
            out_present,
            capacity,
        };
        // SAFETY: the caller's promise.
        out.write(write(prefix, |index| unsafe { insert(index, &commit) })?);
        Ok(())
    })
}

/// # Safety
/// The pointers of `commit` are as documented.
pub(super) unsafe fn insert(
    index: &mut PrefixIndex,
    commit: &kvc_prefix_commit,
) -> Result<kvc_prefix_inserted> {
    let &kvc_prefix_commit { name_space, above, out_present, capacity, .. } = commit;
    // SAFETY: the caller's promise; BlockId is transparent over u32.
    let (tokens, blocks) = unsafe {
        (
            pointer::slice(commit.tokens, commit.token_count, "tokens")?,
            pointer::slice(commit.blocks.cast::<BlockId>(), commit.block_ids, "blocks")?,
        )
    };
    let wanted = !out_present.is_null() || capacity != 0;
    if wanted {
        // Asked for before anything changes: all of them may be present.
        // SAFETY: the caller's promise.
        unsafe { room(out_present, capacity, blocks.len(), "out_present") }?;
    }
    let above = Position::from_parts(above.parts);
    with_hit(|hit| {
        let present = &mut hit.blocks;
        let inserted = index.insert_below(Namespace(name_space), above, tokens, blocks, present)?;
        if wanted {
            // SAFETY: the caller's promise.
            unsafe { room(out_present, capacity, present.len(), "out_present") }?
                .copy_from_slice(present);
        }
        Ok(kvc_prefix_inserted {
            present_blocks: inserted.present as u64,
            stored_blocks: inserted.stored as u64,
            at: inserted.at.into(),
        })
    })
}

/// Pins the prefix that ends at `at`, so that no eviction takes it, marks it as used, and writes
/// the pin to `out_pin`. KVC_ERR_STALE_HANDLE where it is no longer cached.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `at` is readable, `out_pin` writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_lock(
    prefix: *mut kvc_prefix,
    at: *const kvc_prefix_position,
    out_pin: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (at, out) =
            unsafe { (pointer::slice(at, 1, "at")?[0], pointer::out(out_pin, "out_pin")?) };
        out.write(write(prefix, |index| index.lock(Position::from_parts(at.parts)))?.0);
        Ok(())
    })
}

/// Ends a pin, without marking the prefix as used (kvc_prefix_release does).
/// KVC_ERR_STALE_HANDLE for one that is not live.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_unlock(prefix: *mut kvc_prefix, pin: u64) -> kvc_status {
    guard(|| write(prefix, |index| index.unlock(PinId(pin))))
}

/// Evicts up to `want_blocks` entries, leaves first, by priority and then in the order of the
/// index's policy (least recently used by default), pinned prefixes excepted.
/// Writes their ids to `out_blocks[capacity]` as `[entry][group]`, for the caller to free, and how
/// many entries went to `out_evicted`. `capacity` must be at least want_blocks * groups, or the
/// ids of all that is cached.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; outputs are writable to their sizes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_evict(
    prefix: *mut kvc_prefix,
    want_blocks: u64,
    out_blocks: *mut i32,
    capacity: u64,
    out_evicted: *mut u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out_evicted, "out_evicted") }?;
        out.write(write(prefix, |index| {
            let want = usize::try_from(want_blocks).unwrap_or(usize::MAX).min(index.len_blocks());
            // What is cached fits in memory, so its ids can be counted.
            let count = want * index.groups();
            // SAFETY: the caller's promise.
            let ids = unsafe { room(out_blocks, capacity, count, "out_blocks") }?;
            let mut rest = ids.iter_mut();
            Ok(index.evict(want, &mut |_| true, &mut |gone| {
                for (&id, slot) in gone.iter().zip(rest.by_ref()) {
                    *slot = id;
                }
            }) as u64)
        })?);
        Ok(())
    })
}

/// Writes the index's sizes to `out`, `out_bytes` (its sizeof) at most.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_stats(
    prefix: *const kvc_prefix,
    out: *mut kvc_prefix_counts,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        let stats = read(prefix, |index| Ok(index.stats()))?;
        let counts = kvc_prefix_counts {
            blocks: stats.blocks as u64,
            capacity_blocks: stats.capacity_blocks as u64,
            name_spaces: stats.namespaces as u64,
            nodes: stats.nodes as u64,
            pins: stats.pins as u64,
            bytes: stats.bytes as u64,
        };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, counts, "out", 48) }
    })
}
