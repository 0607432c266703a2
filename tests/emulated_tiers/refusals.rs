//! What a system or a device refuses, fails in or has no room for costs what it says, and nothing else.

use kvcache::cache::{Step, TierOptions, Work};
use kvcache::error::Error;
use kvcache::layout::slice::Slice;
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Configuration, Store, TierKind};

use crate::late_device::{Pace, Trouble};
use crate::served::{Prompts, disk, emulated, host, late, on, serve, spec};
use crate::tier_case::{BLOCK, Folder, LONG, SPACE, report};

#[test]
fn host_memory_that_is_refused_is_an_answer_and_plain_memory_a_choice() {
    let (late, backend) = late(Pace::Lazy);
    *late.no_host_memory.lock().unwrap() = true;
    let mut cache = on(&backend, 8);
    let refused = cache.attach_tiers(TierOptions::host("m", 24));
    assert!(matches!(refused, Err(Error::OutOfMemory { .. })), "{refused:?}");
    assert!(cache.tier_reports().is_empty());
    let left = late.left();
    assert_eq!((left[0], left[1]), (0, 0));
    cache.attach_tiers(TierOptions { plain_memory: true, ..TierOptions::host("m", 24) }).unwrap();
    assert!(!report(&cache, TierKind::Host).page_locked);
    let prompts = Prompts::new(4);
    for (prompt, expected) in prompts.0.iter().chain(&prompts.0) {
        assert_eq!(serve(&mut cache, prompt, false).unwrap().1, *expected);
    }
    assert!(host(&cache).loaded > 0);
    // A device whose host memory is plain says so.
    let mut plain = on(&emulated(), 8);
    plain.attach_tiers(TierOptions::host("m", 24)).unwrap();
    assert!(!report(&plain, TierKind::Host).page_locked);
}

#[test]
fn copies_that_are_refused_cost_demotions_and_nothing_else() {
    let (late, backend) = late(Pace::Lazy);
    let mut cache = on(&backend, 8);
    cache.attach_tiers(TierOptions::host("m", 24)).unwrap();
    let prompts = Prompts::new(4);
    *late.trouble.lock().unwrap() = Trouble::Refused;
    for (prompt, expected) in &prompts.0 {
        assert_eq!(serve(&mut cache, prompt, false).unwrap().1, *expected);
    }
    let counters = host(&cache);
    assert_eq!((counters.stored, counters.objects), (0, 0), "{counters:?}");
    assert!(counters.dropped > 0 && counters.failures > 0);
    *late.trouble.lock().unwrap() = Trouble::None;
    for (prompt, expected) in prompts.0.iter().chain(&prompts.0) {
        assert_eq!(serve(&mut cache, prompt, true).unwrap().1, *expected);
    }
    assert!(host(&cache).loaded > 0);
    drop(cache);
    assert_eq!(late.left()[..3], [0; 3]);
}

#[test]
fn a_device_that_fails_in_a_copy_says_so_and_nothing_of_it_is_kept() {
    for pace in [Pace::Lazy, Pace::EagerSides] {
        let (late, backend) = late(pace);
        let folder = Folder::new("lift-failing");
        let mut cache = on(&backend, 8);
        let mut options = TierOptions::host("m", 4);
        options.lower.push(disk(&folder));
        cache.attach_tiers(options).unwrap();
        let prompts = Prompts::new(4);
        *late.trouble.lock().unwrap() = Trouble::Failing;
        let mut failed = None;
        for (prompt, _) in &prompts.0 {
            failed = failed.or(serve(&mut cache, prompt, false).err());
        }
        assert!(matches!(failed, Some(Error::DeviceFailed { .. })), "{failed:?}");
        // What was on its way is in no tier.
        let _ = cache.prefetch(&prompts.0[0].0, SPACE);
        assert_eq!((host(&cache).objects, host(&cache).stored), (0, 0), "{:?}", host(&cache));
        assert!(cache.flush_tiers(LONG) || host(&cache).failures > 0);
        drop(cache);
        assert_eq!(late.left()[..3], [0; 3], "{pace:?}");
        let config = Configuration::new("m", &spec(), &Slice::whole(&spec())).unwrap();
        let store = DiskStore::open(&DiskOptions::new(&folder.0, 16 << 20), &config).unwrap().0;
        assert_eq!(store.used().unwrap().1, 0, "{pace:?}");
    }
}

#[test]
fn demotions_are_dropped_where_buffers_are_still_being_copied() {
    let (late, backend) = late(Pace::Lazy);
    let mut cache = on(&backend, 8);
    let options = TierOptions { transit_blocks: 1, ..TierOptions::host("m", 2) };
    cache.attach_tiers(options).unwrap();
    let prompts = Prompts::new(3);
    serve(&mut cache, &prompts.0[2].0, false).unwrap();
    let seq = cache.start(&[1], SPACE).unwrap().seq;
    let tokens: Vec<u32> = (0..8 * BLOCK as u32).map(|t| 90_000 + t).collect();
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    // Three buffers for four blocks, all of which the device is at.
    assert_eq!(host(&cache).dropped, prompts.0[2].0.len() as u64 / BLOCK as u64 - 3);
    assert_eq!(late.waits(), 3);
    cache.cancel(&mut step).unwrap();
    cache.release(seq).unwrap();
    for (prompt, expected) in prompts.0.iter().chain(&prompts.0) {
        assert_eq!(serve(&mut cache, prompt, false).unwrap().1, *expected);
    }
}
