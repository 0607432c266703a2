//! The cache noun: `crate::cache::KvCache` behind a handle and a lock.

use alloc::vec::Vec;
use core::ffi::c_void;

use super::device::{KVC_DEVICE_CPU, named};
use super::handle::{self, Noun, Sharing, Waited};
use super::plan::{kvc_group_spec, read_spec};
use super::pointer::{self, Plain, Sized32, flag};
use super::retention::{KVC_EVICTION_LRU, eviction};
use super::status::{guard, kvc_status};
use crate::cache::{CacheOptions, KvCache};
use crate::device::Stream;
use crate::error::{Error, Result};

/// The whole cache: block pools, prefix index, storage of K and V, and kernels with threads of
/// their own. Calls on it are thread-safe: one runs at a time and the others wait.
pub struct kvc_cache(());

impl Noun for KvCache {
    type Handle = kvc_cache;
    const KIND: usize = 3;
    const NAME: &'static str = "cache";
    const SHARING: Sharing = Sharing::Waits;
}

/// A handle that was live when the call came.
pub(super) struct Open(*const kvc_cache);

impl Open {
    /// Waits for the calls of other threads.
    pub(super) fn lock(&self) -> Result<Waited<KvCache>> {
        handle::waited::<KvCache>(self.0)
    }
}

/// The cache of a handle, which is refused before anything else that the caller gave is looked at.
pub(super) fn open(cache: *const kvc_cache) -> Result<Open> {
    handle::live::<KvCache>(cache)?;
    Ok(Open(cache))
}

/// Sizes and policies of a cache.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_cache_options {
    /// sizeof(kvc_cache_options); kvc_cache_options_init sets it.
    pub struct_size: u32,
    /// Tokens of a block: a power of two, 16 to 256. 16 by default.
    pub block_tokens: u32,
    /// Blocks of each layer group. 1024 by default.
    pub blocks: u32,
    /// Sequences that may live at once, 1 to 65536. 256 by default.
    pub max_seqs: u32,
    /// Threads for kernels; 0 (the default) for one a core.
    pub threads: u32,
    /// 1 (the default): publish committed blocks to the prefix index and start sequences from it.
    pub prefix_reuse: u32,
    /// KVC_DEVICE_*: where blocks live and kernels run. KVC_DEVICE_CPU by default.
    pub device: u32,
    /// The device's number among those of its kind.
    pub device_ordinal: u32,
    /// The device's stream (a CUstream) that everything is enqueued on, for as long as the cache
    /// lives; NULL (the default) for its default stream.
    pub stream: *mut c_void,
    /// 1: on a device, a sequence gets the same bits whatever else is in the batch, for some speed,
    /// and with sealed tiles also however it was cut into steps and whatever was found of it; on the
    /// CPU it always does. 0 by default.
    pub deterministic: u32,
    /// KVC_EVICTION_*: which cached blocks go first. KVC_EVICTION_LRU by default.
    pub eviction: u32,
    /// Raw blocks of each layer group whose format has sealed tiles; 0 (the default) for two a
    /// sequence and its sinks, all that they can need unless tiles stay raw.
    pub staging_blocks: u32,
    /// 1: zero the K and V of every block that becomes free, before anybody else can have it. 0 by
    /// default. KVC_ERR_UNSUPPORTED with sealed tiles.
    pub scrub: u32,
    /// `[group_count]`: blocks of each layer group where they differ; NULL (the default) for
    /// `blocks` in each. A group with a window needs few: kvc_plan says how many.
    pub group_blocks: *const u32,
    /// 1: on a device, a prefix that sequences of a step share is read once for all of
    /// them (cascade attention) where the device's rates (kvc_device_rates_read) say that this is
    /// faster: in steps of up to 8 new tokens a sequence, of sequences that are neighbours in the step's
    /// work. Not where `deterministic`, in layer groups with a window or sealed tiles, with ALiBi, of
    /// latents, nor while the stream is captured. 0 by default, as it has not run on a GPU yet.
    pub cascade: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers, a pointer.
unsafe impl Plain for kvc_cache_options {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_cache_options {
    const NAME: &'static str = "kvc_cache_options";
    const FIRST_BYTES: usize = 24;
    fn initial() -> Self {
        let CacheOptions { blocks, max_seqs, threads, prefix_reuse, .. } = CacheOptions::default();
        Self {
            struct_size: size_of::<Self>() as u32,
            block_tokens: 16,
            blocks,
            max_seqs,
            threads,
            prefix_reuse: u32::from(prefix_reuse),
            device: KVC_DEVICE_CPU,
            device_ordinal: 0,
            stream: core::ptr::null_mut(),
            deterministic: 0,
            eviction: KVC_EVICTION_LRU,
            staging_blocks: 0,
            scrub: 0,
            group_blocks: core::ptr::null(),
            cascade: 0,
            reserved: 0,
        }
    }
}

/// What a cache holds now, and what happened since it was created. Block counts are of the first
/// layer group; blocks = free_blocks + cached_blocks + referenced_blocks.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_cache_counts {
    /// Blocks of the pool.
    pub blocks: u32,
    /// Blocks that hold nothing.
    pub free_blocks: u32,
    /// Blocks that only the prefix index holds: reusable, and evictable.
    pub cached_blocks: u32,
    /// Blocks that sequences use.
    pub referenced_blocks: u32,
    /// Live sequences.
    pub sequences: u32,
    /// 0.
    pub reserved: u32,
    /// Tokens that the live sequences hold, shared ones counted for each.
    pub sequence_tokens: u64,
    /// Unused slots in the last blocks of live sequences, in tokens.
    pub waste_tokens: u64,
    /// Bytes of one block in all groups.
    pub block_bytes: u64,
    /// Bytes of the whole pool in all groups.
    pub pool_bytes: u64,
    /// Prompt tokens given to kvc_seq_start.
    pub looked_up_tokens: u64,
    /// Those of them that were found.
    pub hit_tokens: u64,
    /// Entries taken out of the prefix index to make room.
    pub evicted_blocks: u64,
    /// Blocks copied on write or for a partial hit.
    pub copied_blocks: u64,
    /// Blocks given back because the index had their tokens already.
    pub merged_blocks: u64,
    /// Blocks of the staging pools, for raw rows of formats with sealed tiles; 0 without.
    pub staging_blocks: u32,
    /// Those of them that are in use.
    pub staged_blocks: u32,
    /// Bytes of the staging pools and of the scratch beside them, in all groups.
    pub staging_bytes: u64,
    /// Full tiles that stay raw because their rows cannot be sealed (NaN, infinity, out of range).
    pub unsealed_blocks: u64,
    /// Attention calls (one a layer and step) on a device that read a shared prefix once for all
    /// sequences that have it.
    pub cascades: u64,
}

// SAFETY: integers.
unsafe impl Plain for kvc_cache_counts {}

/// Size of [`kvc_cache_counts`] in ABI 0.1.
const COUNTS_FIRST_BYTES: usize = 96;

/// Fills a kvc_cache_options of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_options_init(
    options: *mut kvc_cache_options,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(options, struct_size) })
}

/// Makes a cache of `groups[group_count]` (1 to 16) layer groups, and allocates its memory.
/// `options` may be NULL for the defaults. On a device: KVC_ERR_NO_KERNELS, KVC_ERR_NO_DEVICE, and
/// KVC_ERR_UNSUPPORTED for a group that it has no kernels for.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; inputs are readable to their sizes, `out` is writable; the stream is one of
/// the device while the cache lives.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_create(
    options: *const kvc_cache_options,
    groups: *const kvc_group_spec,
    group_count: u32,
    out: *mut *mut kvc_cache,
) -> kvc_status {
    guard(|| {
        let options = if options.is_null() {
            kvc_cache_options::initial()
        } else {
            // SAFETY: the caller's promise.
            unsafe { pointer::read(options) }?
        };
        if options.reserved != 0 {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        // SAFETY: the caller's promise.
        let spec = unsafe { read_spec(options.block_tokens, groups, group_count) }?;
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out, "out") }?;
        let mut group_blocks = Vec::new();
        if !options.group_blocks.is_null() {
            // SAFETY: the caller's promise.
            let given = unsafe {
                pointer::slice(options.group_blocks, group_count.into(), "group_blocks")
            }?;
            let bytes = size_of_val(given) as u64;
            let refused = Error::OutOfMemory { bytes };
            group_blocks.try_reserve_exact(given.len()).map_err(|_| refused)?;
            group_blocks.extend_from_slice(given);
        }
        let options = CacheOptions {
            blocks: options.blocks,
            group_blocks,
            max_seqs: options.max_seqs,
            staging_blocks: options.staging_blocks,
            threads: options.threads,
            prefix_reuse: flag(options.prefix_reuse, "prefix_reuse")?,
            device: named(options.device, options.device_ordinal)?,
            // SAFETY: the caller's promise.
            stream: unsafe { Stream::from_raw(options.stream) },
            deterministic: flag(options.deterministic, "deterministic")?,
            cascade: flag(options.cascade, "cascade")?,
            eviction: eviction(options.eviction)?,
            scrub: flag(options.scrub, "scrub")?,
        };
        let cache = KvCache::new(&spec, &options)?;
        out.write(handle::publish(cache)?);
        Ok(())
    })
}

/// Ends a cache with all its sequences and gives its memory back. NULL is accepted.
/// KVC_ERR_INVALID_STATE while another thread is inside it.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_destroy(cache: *mut kvc_cache) -> kvc_status {
    guard(|| handle::destroy::<KvCache>(cache))
}

/// Waits for everything that the cache has enqueued on its device. KVC_ERR_DEVICE_FAILED where some
/// of it has failed. Nothing is waited for on the CPU.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_sync(cache: *mut kvc_cache) -> kvc_status {
    guard(|| open(cache)?.lock()?.sync())
}

/// Sets the time of the prefix index: as kvc_prefix_advance.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_advance(cache: *mut kvc_cache, now_ms: u64) -> kvc_status {
    guard(|| open(cache)?.lock()?.advance(now_ms))
}

/// Drops everything from the prefix index that no sequence uses.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_clear_prefix(cache: *mut kvc_cache) -> kvc_status {
    guard(|| open(cache)?.lock()?.clear_prefix())
}

/// Checks that block pools, block tables and prefix index agree: every block is exactly one of free,
/// cached and referenced, all counts add up, and the index has the tokens of the sequences that use
/// its blocks. KVC_ERR_INVALID_STATE says, by its text, what does not hold; that is a bug in the
/// library. Takes time in proportion to the cache: some 10 ns a block, for debugging.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_audit(cache: *const kvc_cache) -> kvc_status {
    guard(|| open(cache)?.lock()?.audit())
}

/// Writes the cache's counts to `out`, `out_bytes` (its sizeof) at most.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_stats(
    cache: *const kvc_cache,
    out: *mut kvc_cache_counts,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        let stats = open(cache)?.lock()?.stats();
        let counts = kvc_cache_counts {
            blocks: stats.blocks,
            free_blocks: stats.free_blocks,
            cached_blocks: stats.cached_blocks,
            referenced_blocks: stats.referenced_blocks,
            sequences: stats.sequences,
            reserved: 0,
            sequence_tokens: stats.sequence_tokens,
            waste_tokens: stats.waste_tokens,
            block_bytes: stats.block_bytes,
            pool_bytes: stats.pool_bytes,
            looked_up_tokens: stats.looked_up_tokens,
            hit_tokens: stats.hit_tokens,
            evicted_blocks: stats.evicted_blocks,
            copied_blocks: stats.copied_blocks,
            merged_blocks: stats.merged_blocks,
            staging_blocks: stats.staging_blocks,
            staged_blocks: stats.staged_blocks,
            staging_bytes: stats.staging_bytes,
            unsealed_blocks: stats.unsealed_blocks,
            cascades: stats.cascades,
        };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, counts, "out", COUNTS_FIRST_BYTES) }
    })
}
