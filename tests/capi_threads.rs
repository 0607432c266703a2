//! Three threads at once in every function that the header calls thread-safe, on the same handles
//! where there are any: all that the ABI promises must hold, and under the thread sanitizer
//! (`scripts/tsan.sh`) nothing may race. Which functions those are is read from the header, so that
//! one that is added and not called here fails.

use std::collections::BTreeSet;
use std::ffi::{CStr, c_void};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::{null, null_mut};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvcache::capi::*;

const THREADS: usize = 3;
const ROUNDS: usize = 40;
const DIM: usize = 8;

/// What a call that others get in the way of may answer.
const FAIR: &[kvc_status] = &[
    KVC_OK,
    KVC_ERR_STALE_HANDLE,
    KVC_ERR_INVALID_STATE,
    KVC_ERR_OUT_OF_BLOCKS,
    KVC_ERR_OUT_OF_SEQUENCES,
];

/// The functions that the header calls thread-safe, as far as handles or the process go.
fn promised() -> BTreeSet<String> {
    let (mut names, mut safe) = (BTreeSet::new(), false);
    for line in include_str!("../include/kvcache.h").lines() {
        if let Some(promise) = line.strip_prefix("// Threads: ") {
            safe = promise.starts_with("thread-safe");
        } else if !line.starts_with("//") {
            let name = line.split('(').next().and_then(|head| head.split([' ', '*']).next_back());
            if let Some(name) = name.filter(|name| safe && name.starts_with("kvc_")) {
                names.insert(name.to_string());
            }
            safe = false;
        }
    }
    assert!(names.len() > 80, "the header is read wrongly: {names:?}");
    names
}

/// Handles that all threads use.
struct Shared {
    prefix: usize,
    cache: usize,
    events: usize,
    device: usize,
    /// A sequence and a pin that one thread made and others may end.
    seq: AtomicU32,
    pin: AtomicU64,
    published: AtomicU32,
}

unsafe extern "C" fn count(user: *mut c_void, _: *const kvc_event) {
    // SAFETY: `published` outlives the publisher.
    unsafe { &*user.cast::<AtomicU32>() }.fetch_add(1, Ordering::Relaxed);
}

struct Caller<'a> {
    shared: &'a Shared,
    thread: usize,
    seen: BTreeSet<&'static str>,
}

/// Calls a function of the ABI, notes its name, and gives what it answers.
macro_rules! call {
    ($self:ident, $name:ident($($argument:expr),* $(,)?)) => {{
        $self.seen.insert(stringify!($name));
        // SAFETY: pointers are valid for what the call is told.
        #[allow(unused_unsafe)]
        let answer = unsafe { $name($($argument),*) };
        answer
    }};
}

/// The same for one that answers a status, which must be a fair one.
macro_rules! fair {
    ($self:ident, $name:ident($($argument:expr),* $(,)?)) => {{
        let status = call!($self, $name($($argument),*));
        assert!(FAIR.contains(&status), "{}: {status} {}", stringify!($name), last_error());
        status
    }};
}

/// The same for one that must succeed.
macro_rules! ok {
    ($self:ident, $name:ident($($argument:expr),* $(,)?)) => {{
        let status = call!($self, $name($($argument),*));
        assert_eq!(status, KVC_OK, "{}: {}", stringify!($name), last_error());
    }};
}

fn last_error() -> String {
    let mut text = [0u8; 200];
    // SAFETY: the buffer has its length.
    unsafe { kvc_last_error(text.as_mut_ptr().cast(), text.len() as u64) };
    CStr::from_bytes_until_nul(&text).unwrap().to_string_lossy().into_owned()
}

fn zeroed<T>() -> T {
    // SAFETY: for structs of the ABI, which are integers and pointers.
    unsafe { std::mem::zeroed() }
}

fn size<T>(_: &T) -> u32 {
    size_of::<T>() as u32
}

impl Caller<'_> {
    fn prefix(&self) -> *mut kvc_prefix {
        self.shared.prefix as *mut _
    }

    fn cache(&self) -> *mut kvc_cache {
        self.shared.cache as *mut _
    }

    /// Tokens of which all threads have the first in common.
    fn tokens(&self, round: usize, count: usize) -> Vec<u32> {
        let own = (round * THREADS + self.thread) as u32 % 7;
        (0..count as u32).map(|at| if at < 24 { at } else { at + 100 * own }).collect()
    }

    fn process(&mut self) {
        let mut text = [0u8; 1024];
        let (at, room) = (text.as_mut_ptr().cast(), text.len() as u64);
        call!(self, kvc_status_text(KVC_ERR_OVERFLOW, at, room));
        call!(self, kvc_build_info(at, room));
        call!(self, kvc_abi_0_1());
        assert!(call!(self, kvc_abi_version()) > 0);
        assert!(!call!(self, kvc_version()).is_null());
        // Each thread has its own error.
        assert_eq!(call!(self, kvc_pool_create(4, null_mut())), KVC_ERR_NULL_POINTER);
        assert!(call!(self, kvc_last_error(at, room)) > 0);
        call!(self, kvc_last_missing_blocks());
        let mut pool = null_mut();
        ok!(self, kvc_pool_create(4, &mut pool));
        // SAFETY: this thread's own.
        unsafe { assert_eq!(kvc_pool_destroy(pool), KVC_OK) };
    }

    fn kernels(&mut self) {
        let (mut attend, mut append): (kvc_attend_desc, kvc_append_desc) = (zeroed(), zeroed());
        let (bytes, append_bytes) = (size(&attend), size(&append));
        ok!(self, kvc_attend_desc_init(&mut attend, bytes));
        ok!(self, kvc_append_desc_init(&mut append, append_bytes));
        // What they say to an empty description is not of interest here, only that they may be asked
        // at once; calls with work are in the steps below and in `cpu`'s own tests.
        let (mut needed, mut text) = (0, [0u8; 64]);
        call!(self, kvc_attend_workspace_size(&attend, 1, 1, &mut needed));
        call!(self, kvc_attend_kernel(&attend, 1, text.as_mut_ptr().cast(), text.len() as u64));
        call!(self, kvc_attend(&attend));
        call!(self, kvc_append(&append));
        let (mut out, mut lse) = ([1f32; DIM], [0f32]);
        let (other, other_lse) = ([2f32; DIM], [1f32]);
        ok!(
            self,
            kvc_merge_states(
                out.as_mut_ptr(),
                lse.as_mut_ptr(),
                other.as_ptr(),
                other_lse.as_ptr(),
                1,
                DIM as u32,
            )
        );
        let mut seal: kvc_seal_desc = zeroed();
        let bytes = size(&seal);
        ok!(self, kvc_seal_desc_init(&mut seal, bytes));
        call!(self, kvc_seal_record_size(&seal, &mut needed));
        call!(self, kvc_seal(&seal));
        let (mut scales, mut tiles): (kvc_scales, kvc_tile_view) = (zeroed(), zeroed());
        let (bytes, tile_bytes) = (size(&scales), size(&tiles));
        ok!(self, kvc_scales_init(&mut scales, bytes));
        ok!(self, kvc_tile_view_init(&mut tiles, tile_bytes));
        let mut rope: kvc_rope = zeroed();
        let bytes = size(&rope);
        ok!(self, kvc_rope_init(&mut rope, bytes));
        call!(self, kvc_rope_rotate(&rope, out.as_mut_ptr(), 1, DIM as u32, [3u32].as_ptr(), 1));
        let (mut options, mut group): (kvc_plan_options, kvc_group_spec) = (zeroed(), zeroed());
        let (bytes, group_bytes) = (size(&options), size(&group));
        ok!(self, kvc_plan_options_init(&mut options, bytes));
        ok!(self, kvc_group_spec_init(&mut group, group_bytes));
        let mut plan: kvc_plan_result = zeroed();
        let room = u64::from(size(&plan));
        call!(self, kvc_plan_compute(&options, &group, 1, &mut plan, room, null_mut()));
        let mut scoring: kvc_scoring = zeroed();
        let bytes = size(&scoring);
        ok!(self, kvc_scoring_init(&mut scoring, bytes));
    }

    fn index(&mut self, round: usize) {
        let mut own = null_mut();
        let mut options: kvc_prefix_options = zeroed();
        let bytes = size(&options);
        ok!(self, kvc_prefix_options_init(&mut options, bytes));
        ok!(self, kvc_prefix_create_with(&options, &mut own));
        ok!(self, kvc_prefix_destroy(own));
        ok!(self, kvc_prefix_create(4, 1, 8, &mut own));
        ok!(self, kvc_prefix_destroy(own));

        let (prefix, tokens) = (self.prefix(), self.tokens(round, 40));
        let (at, count) = (tokens.as_ptr(), tokens.len() as u64);
        let (mut hit, mut done): (kvc_prefix_hit, kvc_prefix_inserted) = (zeroed(), zeroed());
        let (mut found, mut tail) = ([0i32; 64], [0i32]);
        let (out, room) = (found.as_mut_ptr(), found.len() as u64);
        ok!(
            self,
            kvc_prefix_lookup(prefix, 1, at, count, count, out, room, tail.as_mut_ptr(), &mut hit)
        );
        let ids: Vec<i32> = (0..10).collect();
        ok!(
            self,
            kvc_prefix_insert(prefix, 1, at, count, ids.as_ptr(), 10, null_mut(), 0, &mut done)
        );
        let mut pin = 0;
        if fair!(self, kvc_prefix_lock(prefix, &hit.at, &mut pin)) == KVC_OK {
            // Another thread may end it, and this one what another left.
            let other = self.shared.pin.swap(pin, Ordering::AcqRel);
            if round.is_multiple_of(2) {
                fair!(self, kvc_prefix_unlock(prefix, other));
            } else {
                fair!(self, kvc_prefix_release(prefix, other));
            }
        }
        fair!(self, kvc_prefix_touch(prefix, &done.at));
        let range = kvc_retention { start: 0, end: u64::MAX, priority: 50, duration_ms: 3 };
        fair!(self, kvc_prefix_prioritize(prefix, &done.at, &range, 1));
        fair!(self, kvc_prefix_hint(prefix, &done.at, 0, KVC_HINT_WAITED, 0));
        ok!(self, kvc_prefix_advance(prefix, round as u64));
        let mut evicted = 0;
        let status = call!(self, kvc_prefix_set_windows(prefix, [0].as_ptr(), 1));
        assert!([KVC_OK, KVC_ERR_INVALID_STATE].contains(&status), "empty or not");
        let (mut ids, mut none) = ([1i32, 2, 3], 99);
        ok!(self, kvc_prefix_forget(prefix, 0, ids.as_mut_ptr(), 3, &mut none));
        assert_eq!(none, 0, "no group has a window");
        ok!(self, kvc_prefix_evict(prefix, 3, out, room, &mut evicted));
        let mut counts: kvc_prefix_counts = zeroed();
        ok!(self, kvc_prefix_stats(prefix, &mut counts, size_of::<kvc_prefix_counts>() as u64));
        assert!(counts.blocks <= counts.capacity_blocks);

        let mut batch: kvc_prefix_batch = zeroed();
        let bytes = size(&batch);
        ok!(self, kvc_prefix_batch_init(&mut batch, bytes));
        let query = kvc_prefix_query {
            name_space: 1,
            tokens: at,
            token_count: count,
            max_tokens: count,
            out_blocks: out,
            capacity: room,
            out_tail_blocks: null_mut(),
            pin: 1,
            reserved: 0,
        };
        let mut answer: kvc_prefix_answer = zeroed();
        (batch.queries, batch.query_count, batch.out_answers) = (&query, 1, &mut answer);
        ok!(self, kvc_prefix_run(prefix, &batch));
        assert_eq!(answer.status, KVC_OK);
        ok!(self, kvc_prefix_unlock(prefix, answer.pin));
    }

    fn serve(&mut self, round: usize) {
        let (cache, prompt) = (self.cache(), self.tokens(round, 50));
        let (mut seq, mut cached) = (0, 0);
        let (at, count) = (prompt.as_ptr(), prompt.len() as u64);
        let image = kvc_media { position: 20, digest: [round as u8; 32] };
        let (to, media) = (&mut seq, u32::from(round.is_multiple_of(2)));
        if fair!(self, kvc_seq_start_media(cache, at, count, &image, media, 0, to, &mut cached))
            != KVC_OK
        {
            return;
        }
        if round % 4 == 1 {
            // The same by the call without media.
            ok!(self, kvc_seq_release(cache, seq));
            if fair!(self, kvc_seq_start(cache, at, count, 0, &mut seq, &mut cached)) != KVC_OK {
                return;
            }
        }
        let (mut step, mut forked) = (null_mut(), 0);
        ok!(self, kvc_step_create(&mut step));
        let new = &prompt[cached as usize..];
        let work = kvc_work { seq, token_count: new.len() as u32, tokens: new.as_ptr() };
        if fair!(self, kvc_step_begin(cache, step, &work, 1)) == KVC_OK {
            let rows = [0.5f32; 50 * DIM];
            let mut out = [0f32; 50 * DIM];
            let (from, to) = (rows.as_ptr().cast(), out.as_mut_ptr().cast());
            let f32_ = KVC_DTYPE_F32;
            for group in 0..2 {
                ok!(self, kvc_step_append(cache, step, group, 0, from, from, f32_, null()));
                ok!(
                    self,
                    kvc_step_attend(
                        cache,
                        step,
                        group,
                        0,
                        1,
                        from,
                        f32_,
                        to,
                        f32_,
                        null(),
                        null_mut(),
                    )
                );
                let rows = new.len() * DIM;
                assert!(out[..rows].iter().all(|x| (x - 0.5).abs() <= 1e-3), "{out:?}");
                // There is no device: refused, whoever asks.
                call!(
                    self,
                    kvc_step_append_device(cache, step, group, 0, from, from, f32_, null())
                );
                call!(
                    self,
                    kvc_step_attend_device(
                        cache,
                        step,
                        group,
                        0,
                        1,
                        from,
                        f32_,
                        to,
                        f32_,
                        null(),
                        null_mut(),
                    )
                );
            }
            if round.is_multiple_of(3) {
                ok!(self, kvc_step_cancel(cache, step));
            } else {
                ok!(self, kvc_step_commit(cache, step));
            }
        }
        // SAFETY: this thread's own.
        unsafe { assert_eq!(kvc_step_destroy(step), KVC_OK) };
        let (mut words, mut ids, mut count, mut length) = ([0u32; 64], [0i32; 64], 0, 0);
        ok!(self, kvc_seq_tokens(cache, seq, words.as_mut_ptr(), 64, &mut length));
        ok!(self, kvc_seq_blocks(cache, seq, 1, ids.as_mut_ptr(), 64, &mut count));
        let range = kvc_retention { start: 0, end: 20, priority: 80, duration_ms: 0 };
        ok!(self, kvc_seq_prioritize(cache, seq, &range, 1));
        ok!(self, kvc_seq_hint(cache, seq, 0, KVC_HINT_ENDED, 0));
        if fair!(self, kvc_seq_fork(cache, seq, &mut forked)) == KVC_OK {
            // Not into its image.
            let cut = (length / 2).max(21).min(length) as u32;
            fair!(self, kvc_seq_truncate(cache, forked, cut));
            // Another thread ends it.
            forked = self.shared.seq.swap(forked, Ordering::AcqRel);
            fair!(self, kvc_seq_release(cache, forked));
        }
        ok!(self, kvc_seq_release(cache, seq));
    }

    fn watch(&mut self, round: usize) {
        let cache = self.cache();
        let mut own = null_mut();
        let mut options: kvc_cache_options = zeroed();
        let bytes = size(&options);
        ok!(self, kvc_cache_options_init(&mut options, bytes));
        (options.blocks, options.max_seqs, options.threads) = (2, 2, 1);
        ok!(self, kvc_cache_create(&options, groups().as_ptr(), 2, &mut own));
        let name = c"tenant".as_ptr();
        ok!(self, kvc_events_describe(own, 7, name, name));
        ok!(self, kvc_cache_destroy(own));

        // The cache's format has none: refused, whoever asks.
        call!(self, kvc_cache_set_scales(cache, 0, 0, null(), null(), 1));
        ok!(self, kvc_cache_sync(cache));
        ok!(self, kvc_cache_advance(cache, round as u64));
        ok!(self, kvc_cache_audit(cache));
        if round.is_multiple_of(8) {
            ok!(self, kvc_cache_clear_prefix(cache));
        }
        let mut counts: kvc_cache_counts = zeroed();
        ok!(self, kvc_cache_stats(cache, &mut counts, size_of::<kvc_cache_counts>() as u64));
        let mut metrics: kvc_metrics = zeroed();
        ok!(self, kvc_metrics_read(cache, &mut metrics, size_of::<kvc_metrics>() as u64));
        let (mut text, mut length) = ([0u8; 8192], 0);
        ok!(self, kvc_metrics_text(cache, text.as_mut_ptr().cast(), 8192, &mut length));
        ok!(self, kvc_metrics_watch(cache, 1 + round as u32 % 3));
        ok!(self, kvc_metrics_set_time(cache, round as u64));

        let events = self.shared.events as *mut kvc_events;
        let mut counts: kvc_events_counts = zeroed();
        ok!(self, kvc_events_stats(events, &mut counts, size_of::<kvc_events_counts>() as u64));
        ok!(self, kvc_events_snapshot(events));
        // A callback has no endpoint.
        call!(self, kvc_events_endpoint(events, 0, text.as_mut_ptr().cast(), 100, &mut length));
        let mut options: kvc_events_options = zeroed();
        let bytes = size(&options);
        ok!(self, kvc_events_options_init(&mut options, bytes));
        options.callback = Some(count);
        options.user = (&raw const self.shared.published).cast_mut().cast();
        // The shared cache has its publisher: one of a thread's own.
        let (mut own, mut published) = (null_mut(), null_mut());
        let mut sizes: kvc_cache_options = zeroed();
        let bytes = size(&sizes);
        ok!(self, kvc_cache_options_init(&mut sizes, bytes));
        (sizes.blocks, sizes.max_seqs, sizes.threads) = (2, 2, 1);
        ok!(self, kvc_cache_create(&sizes, groups().as_ptr(), 2, &mut own));
        ok!(self, kvc_events_create(own, &options, &mut published));
        ok!(self, kvc_events_destroy(published));
        ok!(self, kvc_cache_destroy(own));
    }

    /// The shared cache has a host tier; one of a thread's own shows what must come first.
    fn tiers(&mut self, round: usize) {
        let (mut store, mut options): (kvc_tier_store, kvc_tier_options) = (zeroed(), zeroed());
        let (store_bytes, bytes) = (size(&store), size(&options));
        ok!(self, kvc_tier_store_init(&mut store, store_bytes));
        ok!(self, kvc_tier_options_init(&mut options, bytes));
        (options.model, options.host_blocks) = (c"toy".as_ptr(), 8);
        let status = call!(self, kvc_tier_attach(self.cache(), &options));
        assert_eq!(status, KVC_ERR_INVALID_STATE, "it has tiers already");

        let cache = self.cache();
        let (tokens, mut done) = (self.tokens(round, 33), 0);
        let (mut prefetch, mut decision) = (null_mut(), zeroed());
        let at = &mut prefetch;
        ok!(self, kvc_prefetch_create(cache, tokens.as_ptr(), 33, 5, at, &mut decision));
        ok!(self, kvc_prefetch_wait(cache, prefetch, 1, &mut done));
        ok!(self, kvc_prefetch_destroy(prefetch));
        let (at, image) = (tokens.as_ptr(), kvc_media { position: 3, digest: [round as u8; 32] });
        let (begun, media) = (&mut prefetch, &image);
        ok!(self, kvc_prefetch_create_media(cache, at, 33, media, 1, 5, begun, &mut decision));
        ok!(self, kvc_prefetch_destroy(prefetch));
        // Whatever another thread made of the host's blocks: what is said to be there is.
        let (mut own, mut cached, mut kept) = (0, 0, 0);
        let none = std::ptr::null();
        ok!(self, kvc_onboard_start(cache, at, 33, none, 0, 5, &mut own, &mut cached));
        let mut progress: kvc_onboard_progress = zeroed();
        let bytes = size_of::<kvc_onboard_progress>() as u64;
        ok!(self, kvc_onboard_state(cache, own, &mut progress, bytes));
        assert!(progress.why == 0 && progress.loading_tokens <= u64::from(cached));
        ok!(self, kvc_onboard_wait(cache, own, 1, 0, 1, &mut done));
        assert_eq!(done, 1, "the host has all layers");
        let closed = null_mut::<kvc_step>();
        let status = call!(self, kvc_onboard_wait_step(cache, closed, 0, 0, 0, &mut done));
        assert_eq!(status, KVC_ERR_NULL_POINTER);
        ok!(self, kvc_onboard_cancel(cache, own, &mut kept));
        assert!(kept <= cached);
        ok!(self, kvc_seq_release(cache, own));
        ok!(self, kvc_tier_flush(cache, 1, &mut done));
        // What others do with the sequence meanwhile decides whether it can be had.
        let (seq, mut moved) = (self.shared.seq.load(Ordering::Relaxed), 0);
        let (model, none) = (c"toy".as_ptr(), std::ptr::null());
        let nowhere = File::options().read(true).write(true).open("/dev/null").unwrap();
        let fd = nowhere.as_raw_fd();
        call!(self, kvc_transfer_export(cache, seq, model, none, 0, fd, &mut moved));
        let status = call!(self, kvc_transfer_import(cache, 5, model, none, 0, &fd, 1, &mut moved));
        assert_eq!(status, KVC_ERR_TIER_FAILED, "nothing is no stream");
        let mut counts: kvc_tier_counts = zeroed();
        ok!(self, kvc_tier_stats(cache, 0, &mut counts, size_of::<kvc_tier_counts>() as u64));
    }

    /// On a machine without a device these are refused, from any thread.
    fn device(&mut self) {
        let device = self.shared.device as *mut kvc_device;
        let (mut own, mut facts, mut address) = (null_mut(), zeroed(), null_mut());
        let (mut text, mut needed) = ([0u8; 64], 0);
        call!(self, kvc_device_open(KVC_DEVICE_EMU, 0, &mut own));
        call!(self, kvc_device_close(own));
        call!(self, kvc_device_info(device, &mut facts, size_of::<kvc_device_facts>() as u64));
        call!(self, kvc_device_name(device, text.as_mut_ptr().cast(), text.len() as u64));
        if call!(self, kvc_device_alloc(device, 64, &mut address)) != KVC_OK {
            address = null_mut();
        }
        let stream = null_mut();
        let mut bytes = [7u8; 64];
        let (from, to) = (bytes.as_ptr().cast(), bytes.as_mut_ptr().cast());
        let room = if address.is_null() { 0 } else { 64 };
        call!(self, kvc_device_upload(device, address, from, room, stream));
        call!(self, kvc_device_zero(device, address, room, stream));
        call!(self, kvc_device_download(device, to, address, room, stream));
        call!(self, kvc_device_sync(device, stream));
        if !address.is_null() {
            assert_eq!(bytes, [0; 64]);
        }
        call!(self, kvc_device_free(device, address));
        let (mut attend, mut append): (kvc_attend_desc, kvc_append_desc) = (zeroed(), zeroed());
        let (mut how, mut write): (kvc_device_attend_options, kvc_device_append_options) =
            (zeroed(), zeroed());
        let mut copy: kvc_device_copy_desc = zeroed();
        let (bytes, write_bytes, copy_bytes) = (size(&how), size(&write), size(&copy));
        ok!(self, kvc_device_attend_options_init(&mut how, bytes));
        ok!(self, kvc_device_append_options_init(&mut write, write_bytes));
        ok!(self, kvc_device_copy_desc_init(&mut copy, copy_bytes));
        let (bytes, append_bytes) = (size(&attend), size(&append));
        ok!(self, kvc_attend_desc_init(&mut attend, bytes));
        ok!(self, kvc_append_desc_init(&mut append, append_bytes));
        call!(self, kvc_device_attend_workspace_size(device, &attend, &how, &mut needed));
        let (at, room) = (text.as_mut_ptr().cast(), text.len() as u64);
        call!(self, kvc_device_attend_kernel(device, &attend, &how, at, room));
        call!(self, kvc_device_attend(device, &attend, &how, stream));
        call!(self, kvc_device_append(device, &append, &write, stream));
        call!(self, kvc_device_copy(device, &copy, stream));
        self.shared_on_device(device, &attend, &how);
    }

    /// The same of what sequences share; the cost model needs no device.
    fn shared_on_device(
        &mut self,
        device: *mut kvc_device,
        attend: &kvc_attend_desc,
        how: &kvc_device_attend_options,
    ) {
        let (prefix, stream) = (self.shared.prefix as *mut kvc_prefix, null_mut());
        let (mut bytes, mut copied) = (0, null_mut());
        ok!(self, kvc_device_prefix_size(prefix, &mut bytes));
        // An index has one copy: another thread's may be there.
        call!(self, kvc_device_prefix_create(device, prefix, &mut copied));
        let (mut lookup, mut merge): (kvc_device_lookup_desc, kvc_device_merge_desc) =
            (zeroed(), zeroed());
        let mut query: kvc_device_cascade_query = zeroed();
        let (lookup_bytes, merge_bytes, query_bytes) = (size(&lookup), size(&merge), size(&query));
        ok!(self, kvc_device_lookup_desc_init(&mut lookup, lookup_bytes));
        ok!(self, kvc_device_merge_desc_init(&mut merge, merge_bytes));
        ok!(self, kvc_device_cascade_query_init(&mut query, query_bytes));
        call!(self, kvc_device_prefix_sync(copied, stream, null_mut()));
        call!(self, kvc_device_prefix_lookup(copied, &lookup, stream));
        call!(self, kvc_device_merge(device, &merge, stream));
        (query.q_heads, query.kv_heads, query.head_dim) = (8, 8, 64);
        (query.block_tokens, query.token_bytes, query.seqs) = (16, 2048, 4);
        (query.memory_bytes, query.cache_bytes, query.operations) = (3e6, 6e6, 3e8);
        query.multiprocessors = 132;
        let shared = kvc_device_cascade_prefix { first_seq: 0, seqs: 4, blocks: 9, reserved: 0 };
        let mut list = [zeroed::<kvc_device_cascade_segment>(); 2];
        let mut said: kvc_device_cascade_estimate = zeroed();
        let (out, said_bytes) = (list.as_mut_ptr(), size_of_val(&said) as u64);
        ok!(self, kvc_device_cascade_choose(&query, &shared, 1, out, 2, &mut said, said_bytes));
        assert_eq!((list[0].seqs, list[1].first_seq), (4, 4));
        let list = null();
        call!(self, kvc_device_cascade_workspace_size(device, attend, how, 2, &mut bytes));
        call!(self, kvc_device_cascade(device, attend, how, list, 2, stream));
        call!(self, kvc_device_prefix_destroy(copied));
    }
}

/// A group of full attention and one with a window.
fn groups() -> [kvc_group_spec; 2] {
    [0, 20].map(|window| {
        let mut group: kvc_group_spec = zeroed();
        // SAFETY: `group` is writable for its size.
        unsafe { assert_eq!(kvc_group_spec_init(&mut group, size_of_val(&group) as u32), KVC_OK) };
        (group.layers, group.kv_heads) = (1, 1);
        (group.k_dim, group.v_dim) = (DIM as u32, DIM as u32);
        (group.format, group.window) = (KVC_FORMAT_F32, window);
        group
    })
}

#[test]
fn every_thread_safe_function_is() {
    let (mut prefix, mut cache, mut events, mut device) =
        (null_mut(), null_mut(), null_mut(), null_mut());
    let published = AtomicU32::new(0);
    let mut shared = Shared {
        prefix: 0,
        cache: 0,
        events: 0,
        device: 0,
        seq: AtomicU32::new(0),
        pin: AtomicU64::new(0),
        published: AtomicU32::new(0),
    };
    // SAFETY: pointers are valid for what the calls are told; `published` outlives the publisher.
    unsafe {
        assert_eq!(kvc_prefix_create(4, 1, 64, &mut prefix), KVC_OK);
        let mut options: kvc_cache_options = zeroed();
        assert_eq!(
            kvc_cache_options_init(&mut options, size(&zeroed::<kvc_cache_options>())),
            KVC_OK
        );
        (options.blocks, options.max_seqs, options.threads, options.scrub) = (24, 12, 2, 1);
        assert_eq!(kvc_cache_create(&options, groups().as_ptr(), 2, &mut cache), KVC_OK);
        let mut options: kvc_tier_options = zeroed();
        assert_eq!(kvc_tier_options_init(&mut options, size_of_val(&options) as u32), KVC_OK);
        (options.model, options.host_blocks) = (c"toy".as_ptr(), 8);
        assert_eq!(kvc_tier_attach(cache, &options), KVC_OK);
        let mut options: kvc_events_options = zeroed();
        assert_eq!(kvc_events_options_init(&mut options, size_of_val(&options) as u32), KVC_OK);
        options.callback = Some(count);
        options.user = (&raw const published).cast_mut().cast();
        assert_eq!(kvc_events_create(cache, &options, &mut events), KVC_OK);
        kvc_device_open(KVC_DEVICE_EMU, 0, &mut device);
    }
    (shared.prefix, shared.cache) = (prefix as usize, cache as usize);
    (shared.events, shared.device) = (events as usize, device as usize);

    let barrier = Barrier::new(THREADS);
    let seen: BTreeSet<&str> = std::thread::scope(|scope| {
        let run = |thread| {
            let (shared, barrier) = (&shared, &barrier);
            move || {
                let mut caller = Caller { shared, thread, seen: BTreeSet::new() };
                for round in 0..ROUNDS {
                    barrier.wait();
                    // Each begins elsewhere, so that different functions meet too.
                    for part in 0..7 {
                        match (part + thread * (round % 3)) % 7 {
                            0 => caller.process(),
                            1 => caller.kernels(),
                            2 => caller.index(round),
                            3 => caller.serve(round),
                            4 => caller.watch(round),
                            5 => caller.tiers(round),
                            _ => caller.device(),
                        }
                    }
                }
                caller.seen
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(run(thread))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });

    // SAFETY: live handles.
    unsafe {
        assert_eq!(kvc_cache_audit(cache), KVC_OK);
        assert_eq!(kvc_events_destroy(events), KVC_OK);
        assert_eq!(kvc_cache_destroy(cache), KVC_OK);
        assert_eq!(kvc_prefix_destroy(prefix), KVC_OK);
        kvc_device_close(device);
    }
    assert!(published.load(Ordering::Relaxed) > 0);
    let promised = promised();
    let missed: Vec<_> = promised.iter().filter(|name| !seen.contains(name.as_str())).collect();
    assert!(missed.is_empty(), "thread-safe, and not called here: {missed:?}");
}
