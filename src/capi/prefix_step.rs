//! The prefix noun in batches: what a step releases, commits and looks up, in one crossing and
//! under one lock.

use super::pointer::{self, Plain, Sized32, flag};
use super::prefix::{
    insert, kvc_prefix, kvc_prefix_hit, kvc_prefix_inserted, kvc_prefix_position, look_up, write,
};
use super::status::{guard, kvc_status, report};
use crate::error::{Error, Result};
use crate::prefix::{PinId, Position, PrefixIndex};

/// A sequence to look up: the arguments of kvc_prefix_lookup, and whether to pin what is found. This
/// struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_query {
    /// The name space.
    pub name_space: u64,
    /// Token ids.
    pub tokens: *const u32,
    /// How many.
    pub token_count: u64,
    /// At most so many of them are matched.
    pub max_tokens: u64,
    /// `[capacity]`: receives the ids of the whole blocks, `[block][group]`.
    pub out_blocks: *mut i32,
    /// Room in out_blocks.
    pub capacity: u64,
    /// NULL, or room for one id a group: the block that agrees for a part of its tokens.
    pub out_tail_blocks: *mut i32,
    /// 1: pin the whole blocks that are found, as kvc_prefix_lock does.
    pub pin: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_prefix_query {}

/// What became of a query. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_answer {
    /// KVC_OK, or why this query failed; the rest is 0 then.
    pub status: kvc_status,
    /// 0.
    pub reserved: u32,
    /// What was found.
    pub hit: kvc_prefix_hit,
    /// The pin that was asked for, else 0.
    pub pin: u64,
}

// SAFETY: integers.
unsafe impl Plain for kvc_prefix_answer {}

/// Blocks to cache: the arguments of kvc_prefix_insert, and where they hang. This struct never
/// grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_commit {
    /// The name space. Read only where `above` is all 0.
    pub name_space: u64,
    /// All 0, or the position of an earlier hit or insertion: tokens and blocks are what follows
    /// it, and it is not walked again.
    pub above: kvc_prefix_position,
    /// Token ids, whole blocks.
    pub tokens: *const u32,
    /// How many.
    pub token_count: u64,
    /// Block ids `[block][group]`.
    pub blocks: *const i32,
    /// How many.
    pub block_ids: u64,
    /// NULL, or `[capacity]`: receives the ids of the leading blocks that were cached already.
    pub out_present: *mut i32,
    /// Room in out_present: block_ids, or 0 with NULL.
    pub capacity: u64,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_prefix_commit {}

/// What became of a commit. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_committed {
    /// KVC_OK, or why this commit failed; the rest is 0 then.
    pub status: kvc_status,
    /// 0.
    pub reserved: u32,
    /// What was done.
    pub inserted: kvc_prefix_inserted,
}

// SAFETY: integers.
unsafe impl Plain for kvc_prefix_committed {}

/// All that a step wants of an index.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_batch {
    /// sizeof(kvc_prefix_batch); kvc_prefix_batch_init sets it.
    pub struct_size: u32,
    /// Pins to end, first of all.
    pub unlock_count: u32,
    /// `[unlock_count]`
    pub unlocks: *const u64,
    /// NULL, or `[unlock_count]`: a status each.
    pub out_unlocked: *mut kvc_status,
    /// Blocks to cache, second.
    pub commit_count: u32,
    /// Sequences to look up, last.
    pub query_count: u32,
    /// `[commit_count]`
    pub commits: *const kvc_prefix_commit,
    /// `[commit_count]`
    pub out_committed: *mut kvc_prefix_committed,
    /// `[query_count]`
    pub queries: *const kvc_prefix_query,
    /// `[query_count]`
    pub out_answers: *mut kvc_prefix_answer,
}

// SAFETY: integers, pointers.
unsafe impl Plain for kvc_prefix_batch {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_prefix_batch {
    const NAME: &'static str = "kvc_prefix_batch";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            unlock_count: 0,
            unlocks: core::ptr::null(),
            out_unlocked: core::ptr::null_mut(),
            commit_count: 0,
            query_count: 0,
            commits: core::ptr::null(),
            out_committed: core::ptr::null_mut(),
            queries: core::ptr::null(),
            out_answers: core::ptr::null_mut(),
        }
    }
}

/// Fills `out` with nothing to do; `bytes` is its sizeof.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_batch_init(
    out: *mut kvc_prefix_batch,
    bytes: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(out, bytes) })
}

/// Ends pins, then caches blocks, then looks sequences up (and pins what was found where that is
/// asked for), in one call: a step of an engine. Each item has a status of its own, and a failed one
/// changes nothing and stops none of the others; the call fails only where the batch itself or an
/// array cannot be read or written, and then does nothing.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; arrays have the sizes that the batch names, and the pointers of their items
/// are as for the single calls.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_run(
    prefix: *mut kvc_prefix,
    batch: *const kvc_prefix_batch,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (b, unlocks, commits, queries) = unsafe {
            let b = pointer::read(batch)?;
            (
                b,
                pointer::slice(b.unlocks, b.unlock_count.into(), "unlocks")?,
                pointer::slice(b.commits, b.commit_count.into(), "commits")?,
                pointer::slice(b.queries, b.query_count.into(), "queries")?,
            )
        };
        let unlocked = if b.out_unlocked.is_null() { 0 } else { b.unlock_count };
        // SAFETY: the caller's promise.
        let (out_unlocked, out_committed, out_answers) = unsafe {
            (
                pointer::slice_out(b.out_unlocked, unlocked.into(), "out_unlocked")?,
                pointer::slice_out(b.out_committed, b.commit_count.into(), "out_committed")?,
                pointer::slice_out(b.out_answers, b.query_count.into(), "out_answers")?,
            )
        };
        write(prefix, |index| {
            for (i, &pin) in unlocks.iter().enumerate() {
                let status = report(index.unlock(PinId(pin)));
                if let Some(out) = out_unlocked.get_mut(i) {
                    *out = status;
                }
            }
            for (commit, out) in commits.iter().zip(out_committed) {
                // SAFETY: the caller's promise.
                let done = unsafe { insert(index, commit) };
                let inserted = *done.as_ref().unwrap_or(&NOT_INSERTED);
                *out = kvc_prefix_committed { status: report(done), reserved: 0, inserted };
            }
            for (query, out) in queries.iter().zip(out_answers) {
                // SAFETY: the caller's promise.
                let found = unsafe { answer(index, query) };
                let (hit, pin) = *found.as_ref().unwrap_or(&(NO_HIT, 0));
                *out = kvc_prefix_answer { status: report(found), reserved: 0, hit, pin };
            }
            Ok(())
        })
    })
}

const NOWHERE: kvc_prefix_position = kvc_prefix_position { parts: [0; 3], reserved: 0 };
const NO_HIT: kvc_prefix_hit =
    kvc_prefix_hit { tokens: 0, block_ids: 0, tail_tokens: 0, at: NOWHERE };
const NOT_INSERTED: kvc_prefix_inserted =
    kvc_prefix_inserted { present_blocks: 0, stored_blocks: 0, at: NOWHERE };

/// # Safety
/// The pointers of `query` are as documented.
unsafe fn answer(
    index: &mut PrefixIndex,
    query: &kvc_prefix_query,
) -> Result<(kvc_prefix_hit, u64)> {
    let pin = flag(query.pin, "pin")?;
    if query.reserved != 0 {
        return Err(Error::invalid("reserved", "must be 0"));
    }
    // SAFETY: the caller's promise.
    let hit = unsafe { look_up(index, query) }?;
    let pin = if pin { index.lock(Position::from_parts(hit.at.parts))?.0 } else { 0 };
    Ok((hit, pin))
}
