//! The tier noun: places below the device where a cache's blocks go and come back from.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ffi::c_char;
use core::ptr;
use core::time::Duration;
use std::path::Path;

use super::cache::{kvc_cache, open};
use super::pointer::{self, Plain, Sized32, flag};
use super::status::{guard, kvc_status};
use super::tier_store::{Foreign, kvc_tier_store};
use crate::cache::{Demotion, LowerTier, TierOptions};
use crate::error::{Error, Result};
use crate::layout::slice::{GroupSlice, Slice};
use crate::layout::{CacheSpec, GroupSpec};
use crate::tier::disk::{DiskOptions, DiskStore};
use crate::tier::{Configuration, PrefillCost, Store, TierKind, TierSettings};

/// Tier: memory of the host.
pub const KVC_TIER_HOST: u32 = 1;
/// Tier: files on a local disk.
pub const KVC_TIER_DISK: u32 = 2;
/// Tier: the engine's own store, or a remote one.
pub const KVC_TIER_STORE: u32 = 3;

/// The part of a layer group that a cache holds. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_tier_slice {
    /// The first of its layers, counted within the group of the whole model.
    pub first_layer: u32,
    /// The first of its KV heads.
    pub first_head: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_tier_slice {}

/// The tiers of a cache.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_tier_options {
    /// sizeof(kvc_tier_options); kvc_tier_options_init sets it.
    pub struct_size: u32,
    /// Blocks of a lower priority (0 to 100, 35 where none was given) are not demoted. 30 by default.
    pub least_priority: u32,
    /// What the model is called, at most 1024 bytes; changes whenever its weights do. Not NULL.
    pub model: *const c_char,
    /// Blocks of host memory that stay there after they were evicted from the device. 0 by default. A block
    /// with raw rows (sink_tokens) takes several: as many as hold those, 8 at most. So do counts of blocks.
    pub host_blocks: u64,
    /// Blocks of host memory for what is on its way, and is not kept. 64 by default.
    pub transit_blocks: u64,
    /// A directory for the disk tier; NULL (the default) for none.
    pub disk_dir: *const c_char,
    /// The most bytes of the disk tier's objects. 64 GiB by default.
    pub disk_bytes: u64,
    /// The engine's own store, below host and disk; NULL (the default) for none.
    pub store: *const kvc_tier_store,
    /// Where in the model the cache's layer groups lie, one for each; NULL (the default) for a cache
    /// of the whole model.
    pub slices: *const kvc_tier_slice,
    /// How many those are: the cache's layer groups, or 0 for NULL.
    pub slice_count: u32,
    /// Blocks that fewer prompts have found are not demoted. 0 by default.
    pub least_uses: u32,
    /// 1: blocks go to disk and store when they are committed, not only when they are evicted. 0 by
    /// default.
    pub on_commit: u32,
    /// 1 (the default): the disk is read and written past the page cache, where it can be.
    pub direct: u32,
    /// Threads that read, of each lower tier. 2 by default.
    pub readers: u32,
    /// Demotions that may wait, of each lower tier; more are dropped. 256 by default.
    pub queued_blocks: u32,
    /// Seconds that the engine takes to compute a token of a prompt. Loading that takes longer than
    /// computing is left; 0 (the default): not known, everything is loaded.
    pub prefill_seconds: f64,
    /// The address of a remote store, below host and disk, at most 4096 bytes; NULL (the default) for
    /// none. `redis://[[USER:]PASSWORD@]HOST[:PORT][/DB]`, `rediss://...` over TLS, `redis+unix:///PATH`,
    /// `s3+http://HOST[:PORT]/BUCKET`, `s3+https://HOST[:PORT]/BUCKET` or `s3://BUCKET`, with the
    /// environment's AWS_* credentials; through NIXL `nixl+posix:/DIR`, a directory that machines share, or
    /// `nixl+` before one of the last three. Nothing is connected to yet: a store that is down is found to
    /// be when it is used. KVC_ERR_UNSUPPORTED in a build without the feature remote, or remote-tls
    /// for TLS (certificates of Mozilla's authorities, or of those that SSL_CERT_FILE in the environment
    /// names); KVC_ERR_TIER_FAILED where the system does not find NIXL's libnixl_capi.so, and
    /// KVCACHE_NIXL in the environment does not name it.
    pub remote: *const c_char,
    /// How many milliseconds a call of the remote store may take, connecting included: 1 to 3,600,000.
    /// 5,000 by default.
    pub remote_timeout_ms: u32,
    /// For a cache on a GPU, whose blocks of host memory are page-locked, so that they are copied without
    /// a detour and beside the kernels; all of that memory is taken by kvc_tier_attach. 1: plain memory
    /// instead, where the system refuses so much page-locked memory (KVC_ERR_OUT_OF_MEMORY); copies are
    /// slower then, and calls may wait for them. 0 by default; without a GPU all memory is plain.
    pub plain_memory: u32,
    /// For a cache on a GPU: so many blocks are left free when a step has begun, so that what the next
    /// one takes was copied beside the kernels of this one; about as many as a step takes. 0 by default:
    /// a step evicts what it needs, and its kernels wait until that was copied.
    pub ahead_blocks: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: numbers and pointers.
unsafe impl Plain for kvc_tier_options {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_tier_options {
    const NAME: &'static str = "kvc_tier_options";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            least_priority: Demotion::default().least_priority.into(),
            model: ptr::null(),
            host_blocks: 0,
            transit_blocks: 64,
            disk_dir: ptr::null(),
            disk_bytes: 64 << 30,
            store: ptr::null(),
            slices: ptr::null(),
            slice_count: 0,
            least_uses: 0,
            on_commit: 0,
            direct: 1,
            readers: 2,
            queued_blocks: 256,
            prefill_seconds: 0.0,
            remote: ptr::null(),
            remote_timeout_ms: 5000,
            plain_memory: 0,
            ahead_blocks: 0,
            reserved: 0,
        }
    }
}

/// What a tier counted since kvc_tier_attach, in blocks where it says nothing else.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_tier_counts {
    /// KVC_TIER_*.
    pub kind: u32,
    /// 1: the store failed, and is being left alone for a while.
    pub down: u32,
    /// Demoted to it.
    pub stored: u64,
    /// Bytes of those.
    pub stored_bytes: u64,
    /// Demotions for which nothing was copied, since it had the block.
    pub present: u64,
    /// Demotions dropped, since too many waited or the store was being left alone.
    pub dropped: u64,
    /// Demotions that it had no room for.
    pub full: u64,
    /// Loaded from it.
    pub loaded: u64,
    /// Bytes of those.
    pub loaded_bytes: u64,
    /// Asked for, and not there.
    pub missed: u64,
    /// Damaged, or another block's; removed, and missed.
    pub bad: u64,
    /// Calls of the store that failed; of the host, copies that a device could not make.
    pub failures: u64,
    /// Loads that somebody stopped waiting for.
    pub timeouts: u64,
    /// Evicted from it.
    pub evicted: u64,
    /// Waiting to be stored or loaded.
    pub queued: u64,
    /// Held, where that is known.
    pub objects: u64,
    /// Bytes held, where that is known.
    pub bytes: u64,
    /// Seconds before the first byte of a load comes; 0 before the first load.
    pub load_latency: f64,
    /// Bytes a second of loads; 0 before the first load.
    pub load_bandwidth: f64,
    /// 1: its memory is page-locked, so that a GPU copies from and to it by itself. Of the host alone.
    pub page_locked: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: numbers.
unsafe impl Plain for kvc_tier_counts {}

/// Size of [`kvc_tier_counts`] in ABI 0.1.
const COUNTS_FIRST_BYTES: usize = 144;
const _: () = assert!(size_of::<kvc_tier_counts>() == COUNTS_FIRST_BYTES + 8);

/// Which part of a model a cache of `spec` holds.
///
/// # Safety
/// `slices` is NULL or readable for `count` elements.
pub(super) unsafe fn part(
    slices: *const kvc_tier_slice,
    count: u32,
    spec: &CacheSpec,
) -> Result<Slice> {
    if slices.is_null() {
        return Ok(Slice::whole(spec));
    }
    // SAFETY: the caller's promise.
    let parts = unsafe { pointer::slice(slices, count.into(), "slices") }?;
    if parts.len() != spec.groups.len() {
        return Err(Error::invalid("slice_count", "must be the cache's layer groups"));
    }
    let part = |(part, group): (&kvc_tier_slice, &GroupSpec)| GroupSlice {
        first_layer: part.first_layer,
        first_head: part.first_head,
        ..GroupSlice::whole(group)
    };
    Ok(Slice { groups: parts.iter().zip(&spec.groups).map(part).collect() })
}

/// Fills a kvc_tier_options of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_tier_options_init(
    options: *mut kvc_tier_options,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(options, struct_size) })
}

/// Gives a cache tiers, before anything is cached in it (KVC_ERR_INVALID_STATE); it must reuse
/// prefixes. KVC_ERR_TIER_FAILED where the disk's directory cannot be used, KVC_ERR_INVALID_STATE
/// where another process uses it or it is of another version: the cache works on without tiers.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` and what it points to are readable. Until the cache is destroyed,
/// the store's functions may be called with `user` from other threads; they must not unwind, nor
/// call the cache.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_tier_attach(
    cache: *mut kvc_cache,
    options: *const kvc_tier_options,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let given = unsafe { pointer::read(options) }?;
        // SAFETY: the caller's promise.
        let model = unsafe { pointer::text(given.model, 1024, "model") }?;
        // SAFETY: the caller's promise.
        let dir = unsafe { pointer::text(given.disk_dir, 4096, "disk_dir") }?;
        // SAFETY: the caller's promise.
        let remote = unsafe { pointer::text(given.remote, 4096, "remote") }?;
        let model = model.ok_or(Error::NullPointer { what: "model" })?;
        if given.reserved != 0 {
            return Err(Error::invalid("reserved", "must be 0"));
        }
        let cache = open(cache)?;
        let mut cache = cache.lock()?;
        // Before the disk's directory is opened or made, which this cache may be using.
        cache.check_can_attach()?;
        // SAFETY: the caller's promise.
        let slice = unsafe { part(given.slices, given.slice_count, cache.spec()) }?;
        let size = |value: u64, what| usize::try_from(value).map_err(|_| Error::Overflow { what });
        let demotion = Demotion {
            on_commit: flag(given.on_commit, "on_commit")?,
            least_priority: u8::try_from(given.least_priority)
                .ok()
                .filter(|&priority| priority <= crate::prefix::MAX_PRIORITY)
                .ok_or(Error::invalid("least_priority", "must be 0 to 100"))?,
            least_uses: given.least_uses,
        };
        if !(given.prefill_seconds >= 0.0 && given.prefill_seconds.is_finite()) {
            return Err(Error::invalid("prefill_seconds", "must be 0 or more"));
        }
        let settings = |kind| TierSettings {
            kind,
            readers: given.readers,
            writers: 1,
            queued_blocks: given.queued_blocks as usize,
        };
        let timeout = Duration::from_millis(given.remote_timeout_ms.into());
        // Before the disk's directory is made, which a bad address is not to leave behind.
        let remote = remote.map(|address| open_remote(address, timeout)).transpose()?;
        let mut lower = Vec::new();
        if let Some(dir) = dir {
            let config = Configuration::new(model, cache.spec(), &slice)?;
            let mut disk = DiskOptions::new(Path::new(dir), given.disk_bytes);
            disk.direct = flag(given.direct, "direct")?;
            let store: Arc<dyn Store> = Arc::new(DiskStore::open(&disk, &config)?.0);
            lower.push(LowerTier { store, settings: settings(TierKind::Disk), demotion });
        }
        if !given.store.is_null() {
            // SAFETY: the caller's promise.
            let store = Foreign::new(unsafe { pointer::read(given.store) }?)?;
            let settings = settings(TierKind::Remote);
            lower.push(LowerTier { store: Arc::new(store), settings, demotion });
        }
        if let Some(store) = remote {
            lower.push(LowerTier { store, settings: settings(TierKind::Remote), demotion });
        }
        cache.attach_tiers(TierOptions {
            model: String::from(model),
            slice: Some(slice),
            host_blocks: size(given.host_blocks, "host_blocks")?,
            host_demotion: Demotion { on_commit: false, ..demotion },
            transit_blocks: size(given.transit_blocks, "transit_blocks")?,
            lower,
            prefill_cost: match given.prefill_seconds {
                0.0 => PrefillCost::Unknown,
                seconds => PrefillCost::PerToken(seconds),
            },
            plain_memory: flag(given.plain_memory, "plain_memory")?,
            ahead_blocks: given.ahead_blocks,
        })
    })
}

#[cfg(feature = "remote")]
fn open_remote(address: &str, timeout: Duration) -> Result<Arc<dyn Store>> {
    use crate::tier::remote::{RemoteOptions, open};
    let defaults = RemoteOptions::default();
    let connect_timeout = defaults.connect_timeout.min(timeout);
    open(address, &RemoteOptions { timeout, connect_timeout, ..defaults })
}

#[cfg(not(feature = "remote"))]
fn open_remote(_: &str, _: Duration) -> Result<Arc<dyn Store>> {
    Err(Error::Unsupported { what: "a remote store" })
}

/// Copies everything that is cached to disk and store, as far as it is to be demoted, and waits at
/// most `wait_ms` milliseconds, during which the cache is in use; writes 1 to `out_done` where all
/// is there, else 0. What waits in queues is written in any case, before the cache ends.
/// KVC_ERR_TIER_FAILED while a remote store refuses the password, key or bucket, or has a certificate that
/// is not trusted; kvc_last_error says which, and names no secret.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out_done` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_tier_flush(
    cache: *mut kvc_cache,
    wait_ms: u32,
    out_done: *mut u32,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { pointer::out(out_done, "out_done") }?;
        let cache = open(cache)?;
        let mut cache = cache.lock()?;
        let done = cache.flush_tiers(Duration::from_millis(wait_ms.into()));
        if let Some(what) = cache.tier_reports().iter().find_map(|report| report.refusal) {
            return Err(Error::TierFailed { what, os_code: 0 });
        }
        out.write(u32::from(done));
        Ok(())
    })
}

/// Writes what tier `index` of a cache counted to `out`, `out_bytes` (its sizeof) at most: 0 is the
/// host, then disk, store and remote store as far as they are there. KVC_ERR_INVALID_ARGUMENT past the last.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_tier_stats(
    cache: *const kvc_cache,
    index: u32,
    out: *mut kvc_tier_counts,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        let reports = open(cache)?.lock()?.tier_reports();
        let report = reports.get(index as usize);
        let report = *report.ok_or(Error::invalid("index", "must be below the cache's tiers"))?;
        let (c, (load_latency, load_bandwidth)) =
            (report.counters, report.load_rate.unwrap_or_default());
        let counts = kvc_tier_counts {
            kind: match report.kind {
                TierKind::Host => KVC_TIER_HOST,
                TierKind::Disk => KVC_TIER_DISK,
                TierKind::Remote => KVC_TIER_STORE,
            },
            down: c.down.into(),
            stored: c.stored,
            stored_bytes: c.stored_bytes,
            present: c.present,
            dropped: c.dropped,
            full: c.full,
            loaded: c.loaded,
            loaded_bytes: c.loaded_bytes,
            missed: c.missed,
            bad: c.bad,
            failures: c.failures,
            timeouts: c.timeouts,
            evicted: c.evicted,
            queued: c.queued,
            objects: c.objects,
            bytes: c.bytes,
            load_latency,
            load_bandwidth,
            page_locked: report.page_locked.into(),
            reserved: 0,
        };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, counts, "out", COUNTS_FIRST_BYTES) }
    })
}
