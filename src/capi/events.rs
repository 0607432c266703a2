//! The events noun: KV events of a cache to a callback and to ZeroMQ sockets.

mod callback;
mod sockets;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ffi::{c_char, c_void};
use core::ptr;

use super::cache::{kvc_cache, open};
use super::handle::{self, Noun};
use super::pointer::{self, Plain, Sized32, flag};
use super::status::{guard, kvc_status};
use crate::error::Error;
use crate::events::{Publisher, Queue, Sink};
use crate::ids::Namespace;
use crate::prefix::Keys;
use callback::Callback;
use sockets::Sockets;

/// Event: blocks that follow each other are cached now.
pub const KVC_EVENT_STORED: u32 = 1;
/// Event: blocks are not cached there any more.
pub const KVC_EVENT_REMOVED: u32 = 2;
/// Event: nothing is cached; whatever was said before is to be forgotten.
pub const KVC_EVENT_CLEARED: u32 = 3;

/// Medium: the pool that attention reads.
pub const KVC_MEDIUM_GPU: u32 = 1;
/// Medium: host memory behind it, KVC_TIER_HOST.
pub const KVC_MEDIUM_CPU: u32 = 2;
/// Medium: local files or devices, KVC_TIER_DISK.
pub const KVC_MEDIUM_STORAGE: u32 = 3;
/// Medium: another machine or the engine's own store, KVC_TIER_STORE.
pub const KVC_MEDIUM_EXTERNAL: u32 = 4;

/// Encoding of messages: events as maps, what current routers read.
pub const KVC_ENCODING_MAP: u32 = 0;
/// Encoding of messages: events as arrays, what older ones read.
pub const KVC_ENCODING_ARRAY: u32 = 1;

/// The publishing of a cache's events: a thread of its own.
pub struct kvc_events(());

/// One event. Digests are SHA-256 of the digest before and of the block's tokens, 32 bytes each;
/// KV routers know a block by the last 8 bytes, big-endian. What it points to is gone when the
/// callback returns.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_event {
    /// sizeof(kvc_event) of the library, which may be more than the caller knows.
    pub struct_size: u32,
    /// KVC_EVENT_*. Of a KVC_EVENT_CLEARED the rest is 0.
    pub kind: u32,
    /// KVC_MEDIUM_*.
    pub medium: u32,
    /// The layer group.
    pub group: u32,
    /// Number of the message: events that are published together have the same, and a number that
    /// never comes says that events were lost there.
    pub seq: u64,
    /// Stored: the name space. Else 0.
    pub name_space: u64,
    /// The block before the first: 32 bytes; NULL where there is none or for other events.
    pub parent: *const u8,
    /// 32 bytes for each block.
    pub digests: *const u8,
    /// Blocks.
    pub block_count: u64,
    /// Stored: the tokens of all blocks. Else NULL.
    pub tokens: *const u32,
    /// How many those are.
    pub token_count: u64,
}

/// Takes an event. Called from the publishing thread, one event at a time; it may call the cache,
/// but not end the kvc_events, and what it takes long for delays further events and nothing else.
pub type kvc_events_fn = Option<unsafe extern "C" fn(user: *mut c_void, event: *const kvc_event)>;

/// Where the events go: to a callback, to ZeroMQ sockets, or both.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_events_options {
    /// sizeof(kvc_events_options); kvc_events_options_init sets it.
    pub struct_size: u32,
    /// KVC_ENCODING_*, for ZeroMQ. KVC_ENCODING_MAP by default.
    pub encoding: u32,
    /// Blocks of events that may wait, at least the device's blocks of all layer groups; 0 (the
    /// default) for twice those, and no less than 65536. Where more wait, all are dropped, and the
    /// stream begins anew. The blocks of tiers need no room of their own: they are told in turn.
    pub capacity_blocks: u64,
    /// NULL (the default) for none.
    pub callback: kvc_events_fn,
    /// Handed to the callback.
    pub user: *mut c_void,
    /// Where a PUB socket binds, as "tcp://127.0.0.1:5557" or "ipc:///path"; NULL (the default) for
    /// none. Needs a library with the feature zmq: KVC_ERR_UNSUPPORTED.
    pub endpoint: *const c_char,
    /// Where a ROUTER socket binds that repeats messages; NULL (the default) for none.
    pub replay_endpoint: *const c_char,
    /// The topic of all messages; NULL (the default) for the empty one.
    pub topic: *const c_char,
    /// Messages that are kept for replay and for slow subscribers. 10000 by default.
    pub keep_messages: u64,
    /// Bytes of those, at most. 64 MiB by default.
    pub keep_bytes: u64,
    /// The data-parallel rank that messages carry. 0 by default.
    pub rank: u32,
    /// 1: addresses that other machines can reach are allowed. Events carry the tokens of all
    /// prompts, to whoever connects. 0 by default.
    pub remote: u32,
}

// SAFETY: integers, pointers, and a function pointer that may be NULL.
unsafe impl Plain for kvc_events_options {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_events_options {
    const NAME: &'static str = "kvc_events_options";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            encoding: KVC_ENCODING_MAP,
            capacity_blocks: 0,
            callback: None,
            user: ptr::null_mut(),
            endpoint: ptr::null(),
            replay_endpoint: ptr::null(),
            topic: ptr::null(),
            keep_messages: 10_000,
            keep_bytes: 64 << 20,
            rank: 0,
            remote: 0,
        }
    }
}

/// What a publisher has done.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_events_counts {
    /// Number of the next message.
    pub next_seq: u64,
    /// Events that wait.
    pub queued_events: u64,
    /// Their blocks.
    pub queued_blocks: u64,
    /// The most blocks that may wait.
    pub capacity_blocks: u64,
    /// Events that were dropped because too many waited.
    pub dropped_events: u64,
    /// How often events began to be dropped.
    pub losses: u64,
    /// Subscribers of the PUB socket.
    pub subscribers: u32,
    /// 1 while events that were taken from the queue are being published.
    pub publishing: u32,
}

// SAFETY: integers.
unsafe impl Plain for kvc_events_counts {}

/// Size of [`kvc_events_counts`] in ABI 0.1.
const COUNTS_FIRST_BYTES: usize = 56;

/// What an events handle holds.
struct Published {
    /// The cache's handle, a number.
    cache: usize,
    queue: Arc<Queue>,
    publisher: Publisher,
    sockets: Sockets,
}

impl Noun for Published {
    type Handle = kvc_events;
    const KIND: usize = 6;
    const NAME: &'static str = "events";
}

impl Published {
    fn cache(&self) -> *mut kvc_cache {
        ptr::without_provenance_mut(self.cache)
    }
}

/// Fills a kvc_events_options of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_events_options_init(
    options: *mut kvc_events_options,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(options, struct_size) })
}

/// Says what a name space is in the server's words, before anything is cached in it
/// (KVC_ERR_INVALID_STATE): its digests are then the same in every process that says the same, and
/// events carry salt and adapter, so that routers tell its blocks from those of others. Texts of at
/// most 255 bytes; NULL for none. Without this call a name space is its number.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; the texts are readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_events_describe(
    cache: *mut kvc_cache,
    name_space: u64,
    salt: *const c_char,
    lora: *const c_char,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let text = |text, what| unsafe { pointer::text(text, 255, what) };
        let (salt, lora) = (text(salt, "salt")?, text(lora, "lora")?);
        let keys = Keys {
            salt: salt.unwrap_or_default(),
            lora: lora.unwrap_or_default(),
            ..Keys::default()
        };
        open(cache)?.lock()?.describe_namespace(Namespace(name_space), &keys)
    })
}

/// Publishes the events of a cache from now on: first KVC_EVENT_CLEARED and all that is resident,
/// then what happens. One kvc_events at a time on a cache (KVC_ERR_INVALID_STATE), which must reuse
/// prefixes. `options` names at least a callback or an endpoint.
///
/// Of a cache with tiers the blocks of each are told, with the medium that it is: one that moves from
/// the device to the host is stored there and then removed here. What the disk holds from before is
/// told at the beginning, but for name spaces that were not described yet: those when they are. Of
/// stores that say nothing by themselves (remote ones, a kvc_tier_store) is told what this cache put
/// or found there, until it misses it. Takes a few hundred bytes and the
/// tokens of each block in a tier.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `options` and its texts are readable, `out` is writable. Until
/// kvc_events_destroy returns, the callback may be called with `user` from another thread; it must
/// not unwind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_events_create(
    cache: *mut kvc_cache,
    options: *const kvc_events_options,
    out: *mut *mut kvc_events,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let (given, out) = unsafe { (pointer::read(options)?, pointer::out(out, "out")?) };
        let owner = open(cache)?;
        let capacity = usize::try_from(given.capacity_blocks)
            .map_err(|_| Error::Overflow { what: "capacity_blocks" })?;
        if given.callback.is_none() && given.endpoint.is_null() {
            return Err(Error::invalid("options", "must name a callback or an endpoint"));
        }
        if ![KVC_ENCODING_MAP, KVC_ENCODING_ARRAY].contains(&given.encoding) {
            return Err(Error::invalid("encoding", "must be KVC_ENCODING_*"));
        }
        flag(given.remote, "remote")?;
        let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
        // SAFETY: the caller's promise.
        let sockets = unsafe { Sockets::bind(&given, &mut sinks) }?;
        if let Some(call) = given.callback {
            sinks.push(Box::new(Callback { call, user: given.user }));
        }
        let queue = owner.lock()?.enable_events(capacity)?;
        let published = Publisher::start(queue.clone(), sinks).and_then(|publisher| {
            let queue = queue.clone();
            handle::publish(Published { cache: cache.addr(), queue, publisher, sockets })
        });
        match published {
            Ok(handle) => out.write(handle),
            Err(error) => {
                owner.lock()?.disable_events(&queue);
                return Err(error);
            }
        };
        Ok(())
    })
}

/// Publishes what still waits, then KVC_EVENT_CLEARED, and ends the thread and its sockets. NULL is
/// accepted. The cache may have ended before. KVC_ERR_INVALID_STATE from the callback.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_events_destroy(events: *mut kvc_events) -> kvc_status {
    guard(|| {
        if !events.is_null() {
            let published = handle::shared::<Published>(events)?;
            if published.publisher.is_current_thread() {
                return Err(Error::InvalidState { why: "a callback cannot end its publisher" });
            }
            // A cache that is gone has said so itself; a poisoned one says nothing more.
            if let Ok(cache) = open(published.cache())
                && let Ok(mut cache) = cache.lock()
            {
                cache.disable_events(&published.queue);
            }
        }
        handle::destroy::<Published>(events)
    })
}

/// Publishes KVC_EVENT_CLEARED and then everything resident as stored, in place of all that still
/// waits: for readers that come late or have lost track.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_events_snapshot(events: *mut kvc_events) -> kvc_status {
    guard(|| {
        let published = handle::shared::<Published>(events)?;
        open(published.cache())?.lock()?.snapshot_events()
    })
}

/// Writes what was published and what waits to `out`, `out_bytes` (its sizeof) at most.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_events_stats(
    events: *const kvc_events,
    out: *mut kvc_events_counts,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        let published = handle::shared::<Published>(events)?;
        let stats = published.queue.stats();
        let counts = kvc_events_counts {
            next_seq: published.publisher.next_seq(),
            queued_events: stats.queued_events as u64,
            queued_blocks: stats.queued_blocks as u64,
            capacity_blocks: stats.capacity_blocks as u64,
            dropped_events: stats.dropped_events,
            losses: stats.losses,
            subscribers: published.sockets.subscribers(),
            publishing: u32::from(stats.publishing),
        };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, counts, "out", COUNTS_FIRST_BYTES) }
    })
}

/// Copies the address of the PUB socket (`replay` 0) or of the ROUTER socket (1) to `buf` as
/// snprintf would, with the port that was taken where 0 was asked for, and the length of the whole
/// text in bytes, the NUL not counted, to `out_len`. Empty where there is no such socket.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `buf` is writable for `len` bytes, `out_len` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_events_endpoint(
    events: *const kvc_events,
    replay: u32,
    buf: *mut c_char,
    len: u64,
    out_len: *mut u64,
) -> kvc_status {
    guard(|| {
        let published = handle::shared::<Published>(events)?;
        let text = published.sockets.endpoint(flag(replay, "replay")?);
        // SAFETY: the caller's promise.
        unsafe {
            let out_len = pointer::out(out_len, "out_len")?;
            out_len.write(pointer::copy_text(text, buf, len));
        }
        Ok(())
    })
}
