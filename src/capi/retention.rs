//! What an engine says about what stays in a prefix index and what goes: the policy at its creation,
//! priorities and hints. One index or the one inside a cache, the same words.

use alloc::vec::Vec;

use super::handle;
use super::pointer::{self, Plain, Sized32};
use super::prefix::{Index, kvc_prefix, kvc_prefix_position, write};
use super::status::{guard, kvc_status};
use crate::error::{Error, Result};
use crate::prefix::{Eviction, Hint, PinId, Position, PrefixIndex, Retention};

/// Order of eviction: the least recently used first.
pub const KVC_EVICTION_LRU: u32 = 0;
/// Order of eviction: the least often used first.
pub const KVC_EVICTION_LFU: u32 = 1;
/// Order of eviction: the first stored first.
pub const KVC_EVICTION_FIFO: u32 = 2;
/// Order of eviction: segmented LRU; what was used again outlives what was not.
pub const KVC_EVICTION_SLRU: u32 = 3;
/// Order of eviction: S3-FIFO; what is new waits in a small queue and has to prove itself.
pub const KVC_EVICTION_S3FIFO: u32 = 4;

/// Nothing is known of the next use: takes an earlier hint back.
pub const KVC_HINT_NONE: u32 = 0;
/// There will be no next use: the session ended, the branch was given up.
pub const KVC_HINT_ENDED: u32 = 1;
/// The next use is expected at a time.
pub const KVC_HINT_EXPECTED: u32 = 2;
/// A request that waits in the queue will make the next use.
pub const KVC_HINT_WAITED: u32 = 3;

/// Sizes and policy of a prefix index.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_prefix_options {
    /// sizeof(kvc_prefix_options); kvc_prefix_options_init sets it.
    pub struct_size: u32,
    /// Tokens of a block, 1 to 65536. 16 by default.
    pub block_tokens: u32,
    /// Layer groups, each with an id for every block: 1 to 65536. 1 by default.
    pub groups: u32,
    /// Room for so many entries, 1 to 2^30. 1024 by default.
    pub capacity_blocks: u32,
    /// KVC_EVICTION_*; KVC_EVICTION_LRU by default.
    pub eviction: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_prefix_options {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_prefix_options {
    const NAME: &'static str = "kvc_prefix_options";
    const FIRST_BYTES: usize = 24;
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            block_tokens: 16,
            groups: 1,
            capacity_blocks: 1024,
            eviction: KVC_EVICTION_LRU,
            reserved: 0,
        }
    }
}

/// A priority for the tokens from `start` to before `end`, UINT64_MAX for all to the end of the
/// prefix. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_retention {
    /// The first token.
    pub start: u64,
    /// The token after the last.
    pub end: u64,
    /// 0 to 100. Blocks that were given none have 35.
    pub priority: u32,
    /// For how many ms after the last release the priority holds; then it is 35 again. 0: until
    /// another is given.
    pub duration_ms: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_retention {}

/// The policy with an id.
pub(super) fn eviction(id: u32) -> Result<Eviction> {
    Ok(match id {
        KVC_EVICTION_LRU => Eviction::Lru,
        KVC_EVICTION_LFU => Eviction::Lfu,
        KVC_EVICTION_FIFO => Eviction::Fifo,
        KVC_EVICTION_SLRU => Eviction::Slru,
        KVC_EVICTION_S3FIFO => Eviction::S3Fifo,
        _ => return Err(Error::invalid("eviction", "must be a KVC_EVICTION_* value")),
    })
}

/// The hint with an id; `when_ms` counts for KVC_HINT_EXPECTED alone.
pub(super) fn hint(id: u32, when_ms: u64) -> Result<Hint> {
    Ok(match id {
        KVC_HINT_NONE => Hint::None,
        KVC_HINT_ENDED => Hint::SessionEnded,
        KVC_HINT_EXPECTED => Hint::ExpectedAt { ms: when_ms },
        KVC_HINT_WAITED => Hint::Waited,
        _ => return Err(Error::invalid("hint", "must be a KVC_HINT_* value")),
    })
}

/// The caller's ranges as Rust has them.
///
/// # Safety
/// As for [`pointer::slice`].
pub(super) unsafe fn ranges(ranges: *const kvc_retention, count: u32) -> Result<Vec<Retention>> {
    // SAFETY: the caller's promise.
    let given = unsafe { pointer::slice(ranges, u64::from(count), "ranges") }?;
    let mut list = Vec::new();
    let bytes = size_of_val(given) as u64;
    list.try_reserve_exact(given.len()).map_err(|_| Error::OutOfMemory { bytes })?;
    for range in given {
        // Past any prefix is past any prefix.
        let token = |n| usize::try_from(n).unwrap_or(usize::MAX);
        list.push(Retention {
            start: token(range.start),
            end: (range.end != u64::MAX).then(|| token(range.end)),
            // Out of range either way, and refused with the rest.
            priority: u8::try_from(range.priority).unwrap_or(u8::MAX),
            duration_ms: (range.duration_ms != 0).then_some(range.duration_ms),
        });
    }
    Ok(list)
}

/// Fills a kvc_prefix_options of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_options_init(
    options: *mut kvc_prefix_options,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(options, struct_size) })
}

/// kvc_prefix_create with a choice of policy. `options` may be NULL for the defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` is readable for its struct_size, `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_create_with(
    options: *const kvc_prefix_options,
    out: *mut *mut kvc_prefix,
) -> kvc_status {
    guard(|| {
        let options = if options.is_null() {
            kvc_prefix_options::initial()
        } else {
            // SAFETY: the caller's promise.
            unsafe { pointer::read(options) }?
        };
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        if options.reserved != 0 {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        let index = PrefixIndex::with_eviction(
            options.block_tokens as usize,
            options.groups as usize,
            options.capacity_blocks,
            eviction(options.eviction)?,
        )?;
        out.write(handle::publish(Index::new(index))?);
        Ok(())
    })
}

/// Sets the time, in ms since whenever the caller likes, below 2^42, and ends the priorities and
/// expectations that end by then. An earlier time than the last changes nothing.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_advance(prefix: *mut kvc_prefix, now_ms: u64) -> kvc_status {
    guard(|| write(prefix, |index| index.advance(now_ms)))
}

/// Marks the prefix that ends at `at` as used. KVC_ERR_STALE_HANDLE where it is no longer cached.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `at` is readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_touch(
    prefix: *mut kvc_prefix,
    at: *const kvc_prefix_position,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let at = unsafe { pointer::slice(at, 1, "at") }?[0];
        write(prefix, |index| index.touch(Position::from_parts(at.parts)))
    })
}

/// Ends a pin at the end of the request that used the prefix: as kvc_prefix_unlock, and the prefix
/// is the most recently used one. Durations of priorities run from here.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_release(prefix: *mut kvc_prefix, pin: u64) -> kvc_status {
    guard(|| write(prefix, |index| index.release(PinId(pin))))
}

/// Gives priorities to the blocks of the prefix that ends at `at`. A range covers each block that
/// it overlaps; of several the first in the list counts; blocks that none covers keep theirs. Of
/// all leaves those of the lowest priority are evicted first.
///
/// A later use of the prefix keeps the priority and ends its duration, unless it gives its own.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `at` is readable, `ranges_in` for `count` ranges.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_prioritize(
    prefix: *mut kvc_prefix,
    at: *const kvc_prefix_position,
    ranges_in: *const kvc_retention,
    count: u32,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (at, ranges) = unsafe { (pointer::slice(at, 1, "at")?[0], ranges(ranges_in, count)?) };
        write(prefix, |index| index.prioritize(Position::from_parts(at.parts), &ranges))
    })
}

/// Says what is known of the next use of the prefix that ends at `at`, for its blocks from
/// `from_block` on: KVC_HINT_*. The blocks before those may be others' too: hints for them are
/// taken back. `when_ms`, on the clock of kvc_prefix_advance and less than 2^31 ms ahead of it, is
/// read for KVC_HINT_EXPECTED alone. Any use ends the hint.
///
/// What has ended goes before all priorities, what is expected goes after priority 35 and the
/// latest first, what is waited for goes last.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `at` is readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_prefix_hint(
    prefix: *mut kvc_prefix,
    at: *const kvc_prefix_position,
    from_block: u64,
    hint_id: u32,
    when_ms: u64,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let at = unsafe { pointer::slice(at, 1, "at") }?[0];
        let from = usize::try_from(from_block).unwrap_or(usize::MAX);
        let hint = hint(hint_id, when_ms)?;
        write(prefix, |index| index.hint(Position::from_parts(at.parts), from, hint))
    })
}
