//! Copies in batches that nobody waits for but who takes the room, and what is under way when a cache ends.

use kvcache::cache::{Step, TierOptions, Work};
use kvcache::device::{Backend, Stream};
use kvcache::tier::TierKind;

use crate::late_device::Pace;
use crate::served::{Prompts, disk, emulated, host, late, on, serve};
use crate::tier_case::{BLOCK, Folder, SPACE, report};

#[test]
fn what_a_step_evicts_is_one_batch_that_nobody_waits_for() {
    let (late, backend) = late(Pace::Lazy);
    let mut cache = on(&backend, 8);
    cache.attach_tiers(TierOptions::host("m", 24)).unwrap();
    let prompts = Prompts::new(4);
    let (first, expected) = &prompts.0[2];
    serve(&mut cache, first, false).unwrap();
    let blocks = first.len() / BLOCK;
    let seq = cache.start(&[1], SPACE).unwrap().seq;
    let mut step = Step::new();
    let tokens: Vec<u32> = (0..8 * BLOCK as u32).map(|t| 90_000 + t).collect();
    let before = *late.copied.lock().unwrap();
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    let after = *late.copied.lock().unwrap();
    assert_eq!((after.0 - before.0, after.1 - before.1), (1, blocks));
    // They are on their way, and the host counts them when they have come.
    assert_eq!(
        (late.waits(), host(&cache).queued, host(&cache).stored),
        (blocks, blocks as u64, 0)
    );
    cache.cancel(&mut step).unwrap();
    cache.release(seq).unwrap();
    let (cached, out) = serve(&mut cache, first, false).unwrap();
    assert_eq!((cached, &out), (blocks * BLOCK, expected));
    let counters = host(&cache);
    assert_eq!(
        (counters.queued, counters.stored, counters.loaded),
        (0, blocks as u64, blocks as u64)
    );
    assert!(report(&cache, TierKind::Host).load_rate.is_some());
}

#[test]
fn what_is_evicted_ahead_is_waited_for_by_the_step_that_takes_its_room() {
    let (late, backend) = late(Pace::Lazy);
    let mut cache = on(&backend, 8);
    let options = TierOptions { ahead_blocks: 3, ..TierOptions::host("m", 24) };
    cache.attach_tiers(options).unwrap();
    let prompts = Prompts::new(3);
    // Four blocks are cached and four are free, of which the step takes two.
    serve(&mut cache, &prompts.0[2].0, false).unwrap();
    let seq = cache.start(&[1], SPACE).unwrap().seq;
    let tokens: Vec<u32> = (0..2 * BLOCK as u32).map(|t| 90_000 + t).collect();
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    assert_eq!(cache.stats().free_blocks, 3);
    late.sync(Stream::DEFAULT).unwrap();
    assert_eq!(late.waits(), 1, "the step does not wait for it");
    cache.commit(&mut step).unwrap();
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    late.sync(Stream::DEFAULT).unwrap();
    // The first, which the step could write, is copied; those that it evicted ahead are not.
    assert_eq!((late.waits(), cache.stats().free_blocks), (2, 3));
    cache.cancel(&mut step).unwrap();
    cache.release(seq).unwrap();
    let (prompt, expected) = &prompts.0[2];
    assert_eq!(serve(&mut cache, prompt, false).unwrap(), (4 * BLOCK, expected.clone()));
}

#[test]
fn a_cache_that_ends_with_copies_under_way_gives_everything_back() {
    for pace in Pace::ALL {
        let (late, backend) = late(pace);
        let folder = Folder::new("dropped");
        let mut cache = on(&backend, 8);
        let mut options = TierOptions::host("m", 2);
        options.lower.push(disk(&folder));
        cache.attach_tiers(options).unwrap();
        let prompts = Prompts::new(3);
        prompts.0.iter().for_each(|(prompt, _)| drop(serve(&mut cache, prompt, false).unwrap()));
        let seq = cache.start(&[1], SPACE).unwrap().seq;
        let tokens: Vec<u32> = (0..8 * BLOCK as u32).map(|t| 90_000 + t).collect();
        cache.begin(&mut Step::new(), &[Work { seq, tokens: &tokens }]).unwrap();
        drop(cache);
        assert_eq!(late.left()[..3], [0; 3], "{pace:?}");
        // What waited to be written was: the device went on until it was there.
        let mut other = on(&emulated(), 8);
        let mut options = TierOptions::host("m", 8);
        options.lower.push(disk(&folder));
        other.attach_tiers(options).unwrap();
        let found = report(&other, TierKind::Disk).counters;
        assert!(found.objects > 0, "{pace:?}: {found:?}");
    }
}
