//! Three threads at once in every function that the header calls thread-safe, on the same handles
//! where there are any: all that the ABI promises must hold, and under the thread sanitizer
//! (`scripts/tsan.sh`) nothing may race. Which functions those are is read from the header, so that
//! one that is added and not called here fails.

#[macro_use]
mod caller;
mod device;
mod engine;
mod kernels;
mod tiers;

use std::collections::BTreeSet;
use std::ptr::null_mut;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvcache::capi::*;

use caller::{Caller, Shared, THREADS, count, groups, size, zeroed};

const ROUNDS: usize = 40;

/// The functions that the header calls thread-safe, as far as handles or the process go.
fn promised() -> BTreeSet<String> {
    let (mut names, mut safe) = (BTreeSet::new(), false);
    for line in include_str!("../../include/kvcache.h").lines() {
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
