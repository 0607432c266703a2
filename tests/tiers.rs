//! A cache with tiers against one that has room for everything: the same hits or more, and the same
//! attention to the bit, whatever the stores below do.

mod tier_case;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use kvcache::cache::{Demotion, KvCache, Progress, Step, TierOptions, Work};
use kvcache::ids::Namespace;
use kvcache::layout::slice::Slice;
use kvcache::prefix::{Keys, Retention};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Get, ObjectKey, Outcome, PrefillCost, Put, Store, TierKind, Why};
use tier_case::*;

#[test]
fn what_the_device_evicts_comes_back_from_the_host_to_the_bit() {
    let mut cache = cache_of(&spec(), 12);
    cache.attach_tiers(TierOptions::host("m", 64)).unwrap();
    let prompts: Vec<_> = (1..=3).map(|n| prompt(n, 8)).collect();
    for round in 0..4 {
        for prompt in &prompts {
            let (cached, out) = serve(&mut cache, prompt);
            assert_eq!(cached, if round == 0 { 0 } else { 8 * BLOCK });
            assert_eq!(out, expected(prompt));
        }
    }
    let host = report(&cache, TierKind::Host).counters;
    // Each block was copied down once: when it went again its copy was still there.
    assert_eq!(host.stored, 24);
    assert!(host.present > 24 && host.loaded > 40, "{host:?}");
    assert_eq!((host.objects, host.bytes), (24, 24 * 8192));
    assert_eq!(host.loaded_bytes, host.loaded * 8192);
}

#[test]
fn a_namespace_never_gets_the_blocks_of_another() {
    let mut cache = cache_of(&spec(), 12);
    cache.describe_namespace(Namespace(7), &Keys { salt: "t", ..Keys::default() }).unwrap();
    cache.attach_tiers(TierOptions::host("m", 64)).unwrap();
    let prompt = prompt(1, 8);
    serve(&mut cache, &prompt);
    serve(&mut cache, &self::prompt(2, 10));
    for space in [7, 8] {
        let started = cache.start(&prompt, Namespace(space)).unwrap();
        assert_eq!(started.cached_tokens, 0);
        cache.release(started.seq).unwrap();
    }
    assert_eq!(serve(&mut cache, &prompt).0, 8 * BLOCK);
}

#[test]
fn only_what_the_policy_admits_is_demoted() {
    let mut cache = cache_of(&spec(), 12);
    let mut options = TierOptions::host("m", 64);
    options.host_demotion = Demotion { least_priority: 40, ..Demotion::default() };
    cache.attach_tiers(options).unwrap();
    let (plain, dear) = (prompt(1, 4), prompt(2, 4));
    serve(&mut cache, &plain);
    let started = cache.start(&dear, SPACE).unwrap();
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq: started.seq, tokens: &dear }]).unwrap();
    cache.commit(&mut step).unwrap();
    let range = Retention { start: 0, end: Some(40), priority: 80, duration_ms: None };
    cache.prioritize(started.seq, &[range]).unwrap();
    cache.release(started.seq).unwrap();
    serve(&mut cache, &prompt(3, 11));
    // Forty tokens reach into the third block.
    assert_eq!(report(&cache, TierKind::Host).counters.stored, 3);

    let mut cache = cache_of(&spec(), 12);
    let mut options = TierOptions::host("m", 64);
    options.host_demotion.least_uses = 1;
    cache.attach_tiers(options).unwrap();
    serve(&mut cache, &plain);
    serve(&mut cache, &plain[..3 * BLOCK + 1]);
    serve(&mut cache, &prompt(3, 11));
    assert_eq!(report(&cache, TierKind::Host).counters.stored, 3);
}

#[test]
fn loading_that_does_not_pay_is_left_and_the_answer_says_why() {
    let mut cache = cache_of(&spec(), 12);
    let mut options = TierOptions::host("m", 64);
    options.prefill_cost = PrefillCost::PerToken(1e-15);
    cache.attach_tiers(options).unwrap();
    let (a, b) = (prompt(1, 8), prompt(2, 10));
    serve(&mut cache, &a);
    serve(&mut cache, &b);
    assert_eq!(cache.last_decision().unwrap().why, Why::NothingFound);
    // The first load is made to be timed.
    assert_eq!(serve(&mut cache, &a).0, 8 * BLOCK);
    assert_eq!(cache.last_decision().unwrap().why, Why::RateUnknown);
    serve(&mut cache, &b);
    let (cached, out) = serve(&mut cache, &a);
    let decision = cache.last_decision().unwrap();
    // The device still has the first of them.
    assert_eq!((cached, decision.why, decision.found), (BLOCK, Why::ComputeIsFaster, 7));
    assert_eq!(out, expected(&a));
}

/// A cache with a disk tier, as a new process would make it.
fn with_disk(scratch: &Folder, part: Option<&Slice>, host_blocks: usize) -> KvCache {
    let spec = part.map_or_else(spec, |part| spec().slice(part).unwrap());
    let slice = part.cloned().unwrap_or_else(|| Slice::whole(&spec));
    let config = kvcache::tier::Configuration::new("m", &spec, &slice).unwrap();
    let disk = DiskOptions::new(&scratch.0, 1 << 20);
    let (store, _) = DiskStore::open(&disk, &config).unwrap();
    let mut cache = cache_of(&spec, 12);
    let mut options = TierOptions::host("m", host_blocks);
    options.slice = Some(slice);
    options.lower.push(below(Arc::new(store), TierKind::Disk));
    cache.attach_tiers(options).unwrap();
    cache
}

#[test]
fn a_second_process_finds_on_disk_what_the_first_computed() {
    let scratch = Folder::new("tiers-restart");
    for host_blocks in [0, 4, 64] {
        let _ = std::fs::remove_dir_all(&scratch.0);
        let prompts: Vec<_> = (1..=3).map(|n| prompt(n, 8)).collect();
        {
            let mut cache = with_disk(&scratch, None, host_blocks);
            for prompt in &prompts {
                serve(&mut cache, prompt);
            }
            assert!(cache.flush_tiers(LONG));
            assert_eq!(report(&cache, TierKind::Disk).counters.objects, 24);
        }
        let mut cache = with_disk(&scratch, None, host_blocks);
        for prompt in &prompts {
            prefetch(&mut cache, prompt);
            let (cached, out) = serve(&mut cache, prompt);
            // A host of four blocks lets four through at a time.
            let most = if host_blocks == 4 { 4 } else { 8 };
            assert_eq!(cached, most * BLOCK, "host of {host_blocks}");
            assert_eq!(out, expected(prompt));
        }
        let disk = report(&cache, TierKind::Disk);
        assert!(disk.counters.loaded >= 12 && disk.counters.bad == 0 && disk.load_rate.is_some());
    }
}

#[test]
fn parts_of_a_model_give_what_the_whole_gives() {
    let prompts: Vec<_> = (1..=3).map(|n| prompt(n, 8)).collect();
    let dim = DIM * HEADS as usize;
    for parts in [2, 4] {
        let scratch = Folder::new(&format!("tiers-heads-{parts}"));
        let mut ranks: Vec<KvCache> = (0..parts)
            .map(|rank| {
                // All ranks keep their objects in one directory, each under its own configuration.
                let slice = Slice::tensor_parallel(&spec(), rank, parts).unwrap();
                with_disk(&scratch, Some(&slice), 8)
            })
            .collect();
        for round in 0..2 {
            for prompt in &prompts {
                let whole = expected(prompt);
                let mut together = vec![0f32; whole.len()];
                for (rank, cache) in ranks.iter_mut().enumerate() {
                    assert!(cache.flush_tiers(LONG));
                    prefetch(cache, prompt);
                    let each = HEADS / parts;
                    let heads = rank as u32 * each..(rank as u32 + 1) * each;
                    let (cached, out) = serve_part(cache, prompt, 0..LAYERS, heads.clone());
                    assert_eq!(cached, if round == 0 { 0 } else { 8 * BLOCK });
                    let width = DIM * each as usize;
                    for (layer, out) in out.chunks_exact(width).enumerate() {
                        let at = layer * dim + heads.start as usize * DIM;
                        together[at..at + width].copy_from_slice(out);
                    }
                }
                assert_eq!(together, whole);
            }
        }
    }
    for prompt in &prompts {
        let mut together = Vec::new();
        for stage in 0..2 {
            let slice = Slice::pipeline(&spec(), stage, 2).unwrap();
            let mut cache = cache_of(&spec().slice(&slice).unwrap(), 12);
            together.extend(serve_part(&mut cache, prompt, stage..stage + 1, 0..HEADS).1);
        }
        assert_eq!(together, expected(prompt));
    }
}

const STUCK: u32 = 6;
const PANICS: u32 = 7;

/// A store in memory that does what it is told to do wrong.
#[derive(Debug, Default)]
struct Remote {
    objects: std::sync::Mutex<std::collections::BTreeMap<ObjectKey, Vec<u8>>>,
    /// 0 nothing, 1 flips a bit, 2 gives another object, 3 fails, 4 gives late, 5 claims and has
    /// not, [`STUCK`] puts and does not come back, [`PANICS`].
    trouble: AtomicU32,
    asked: AtomicU64,
}

impl Remote {
    fn wrong(&self, trouble: u32) -> bool {
        self.trouble.load(Ordering::SeqCst) == trouble
    }

    fn asked(&self) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        assert!(!self.wrong(PANICS), "the store panics, as it was told");
    }
}

impl Store for Remote {
    fn knows(&self, _: &ObjectKey) -> Option<bool> {
        None
    }

    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        self.asked();
        let objects = self.objects.lock().unwrap();
        for (key, found) in keys.iter().zip(found) {
            *found = objects.contains_key(key);
        }
        !self.wrong(3)
    }

    fn put(&self, puts: &[Put], outcomes: &mut [Outcome]) {
        self.asked();
        while self.wrong(STUCK) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let failed = self.wrong(3);
        for (put, outcome) in puts.iter().zip(outcomes) {
            *outcome = if failed { Outcome::Failed } else { Outcome::Done };
            if !failed {
                self.objects.lock().unwrap().insert(put.key, put.object.to_vec());
            }
        }
    }

    fn get(&self, gets: &mut [Get], outcomes: &mut [Outcome]) {
        self.asked();
        if self.wrong(4) {
            std::thread::sleep(Duration::from_millis(500));
        }
        let objects = self.objects.lock().unwrap();
        for (get, outcome) in gets.iter_mut().zip(outcomes) {
            let Some(object) = objects.get(&get.key).filter(|_| !self.wrong(5)) else {
                *outcome = Outcome::Absent;
                continue;
            };
            get.object.copy_from_slice(object);
            if self.wrong(1) {
                get.object[5000] ^= 1;
            }
            if self.wrong(2) {
                let other = objects.iter().find(|(key, _)| **key != get.key).unwrap().1;
                get.object.copy_from_slice(other);
            }
            *outcome = if self.wrong(3) { Outcome::Failed } else { Outcome::Done };
        }
    }

    fn remove(&self, keys: &[ObjectKey]) {
        let mut objects = self.objects.lock().unwrap();
        keys.iter().for_each(|key| drop(objects.remove(key)));
    }
}

fn with_remote(remote: &Arc<Remote>) -> KvCache {
    let mut cache = cache_of(&spec(), 12);
    let mut options = TierOptions::host("m", 0);
    let mut tier = below(remote.clone(), TierKind::Remote);
    tier.demotion.on_commit = true;
    options.lower.push(tier);
    cache.attach_tiers(options).unwrap();
    cache
}

#[test]
fn a_store_that_lies_fails_or_hangs_costs_a_counted_miss_and_nothing_else() {
    let prompt = prompt(1, 8);
    for trouble in 0..=5 {
        let remote = Arc::new(Remote::default());
        {
            let mut cache = with_remote(&remote);
            serve(&mut cache, &prompt);
            assert!(cache.flush_tiers(LONG));
        }
        assert_eq!(remote.objects.lock().unwrap().len(), 8);
        remote.trouble.store(trouble, Ordering::SeqCst);
        let mut cache = with_remote(&remote);
        let mut prefetch = cache.prefetch(&prompt, SPACE).unwrap();
        let limit = if trouble == 4 { Duration::from_millis(50) } else { LONG };
        let progress = cache.wait_prefetch(&mut prefetch, limit);
        let (cached, out) = serve(&mut cache, &prompt);
        assert_eq!(out, expected(&prompt), "trouble {trouble}");
        let counters = report(&cache, TierKind::Remote).counters;
        assert_eq!(cached, if trouble == 0 { 8 * BLOCK } else { 0 }, "trouble {trouble}");
        match trouble {
            0 => assert_eq!((counters.loaded, counters.missed), (8, 0)),
            1 | 2 => {
                assert_eq!((counters.loaded, counters.bad), (0, 8));
                remote.trouble.store(0, Ordering::SeqCst);
                assert!(cache.flush_tiers(LONG));
            }
            3 => {
                assert!(counters.failures > 0 && counters.down);
                // Left alone: not even asked.
                let asked = remote.asked.load(Ordering::SeqCst);
                let prefetch = cache.prefetch(&self::prompt(2, 8), SPACE).unwrap();
                assert_eq!(prefetch.decision.found, 0);
                assert_eq!(remote.asked.load(Ordering::SeqCst), asked);
            }
            4 => assert_eq!((progress, counters.timeouts), (Progress::Loading, 1)),
            _ => assert_eq!((counters.loaded, counters.missed), (0, 8)),
        }
    }
}

#[test]
fn what_a_store_has_is_not_sent_again_until_it_is_missed() {
    let remote = Arc::new(Remote::default());
    let mut cache = with_remote(&remote);
    let prompts = [prompt(1, 8), prompt(2, 8)];
    for _ in 0..3 {
        // Each pushes the other out of the device.
        prompts.iter().for_each(|prompt| drop(serve(&mut cache, prompt)));
        assert!(cache.flush_tiers(LONG));
    }
    assert_eq!(report(&cache, TierKind::Remote).counters.stored, 16);
    // What it lost behind our back it gets again, once that was noticed.
    remote.objects.lock().unwrap().clear();
    for prompt in &prompts {
        let mut load = cache.prefetch(prompt, SPACE).unwrap();
        cache.wait_prefetch(&mut load, LONG);
        serve(&mut cache, prompt);
    }
    assert!(cache.flush_tiers(LONG));
    let objects = remote.objects.lock().unwrap().len();
    assert!((8..=16).contains(&objects), "{objects}");
}

#[test]
fn a_store_that_panics_has_failed_and_its_threads_go_on() {
    let (remote, first) = (Arc::new(Remote::default()), prompt(1, 8));
    let mut cache = with_remote(&remote);
    remote.trouble.store(PANICS, Ordering::SeqCst);
    assert_eq!(serve(&mut cache, &first), (0, expected(&first)));
    assert!(cache.flush_tiers(LONG));
    let counters = report(&cache, TierKind::Remote).counters;
    assert!(counters.failures > 0 && counters.down && counters.stored == 0, "{counters:?}");
    // What it has been told to do in the end, the same threads do: it is left alone for a second.
    remote.trouble.store(0, Ordering::SeqCst);
    while report(&cache, TierKind::Remote).counters.down {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(cache.flush_tiers(LONG));
    assert_eq!(remote.objects.lock().unwrap().len(), 8);
    // And a panic in a load.
    let mut cache = with_remote(&remote);
    remote.trouble.store(PANICS, Ordering::SeqCst);
    let mut prefetch = cache.prefetch(&first, SPACE).unwrap();
    assert_eq!(cache.wait_prefetch(&mut prefetch, LONG), Progress::Done);
    assert_eq!(serve(&mut cache, &first), (0, expected(&first)));
    assert!(report(&cache, TierKind::Remote).counters.failures > 0);
    remote.trouble.store(0, Ordering::SeqCst);
    while report(&cache, TierKind::Remote).counters.down {
        std::thread::sleep(Duration::from_millis(20));
    }
    let other = prompt(2, 8);
    serve(&mut cache, &other);
    assert!(cache.flush_tiers(LONG));
    assert_eq!(remote.objects.lock().unwrap().len(), 16);
    let mut cache = with_remote(&remote);
    let mut prefetch = cache.prefetch(&first, SPACE).unwrap();
    assert_eq!(cache.wait_prefetch(&mut prefetch, LONG), Progress::Done);
    assert_eq!(serve(&mut cache, &first), (8 * BLOCK, expected(&first)));
}

/// A cache over a store whose puts do not end before the test says so.
fn with_stuck_store(host_blocks: usize, queued_blocks: usize) -> (KvCache, Arc<Remote>) {
    let remote = Arc::new(Remote::default());
    remote.trouble.store(STUCK, Ordering::SeqCst);
    let mut cache = cache_of(&spec(), 12);
    let mut options = TierOptions::host("m", host_blocks);
    let mut tier = below(remote.clone(), TierKind::Remote);
    tier.settings.queued_blocks = queued_blocks;
    options.lower.push(tier);
    cache.attach_tiers(options).unwrap();
    (cache, remote)
}

#[test]
fn a_store_that_is_stuck_costs_demotions_and_never_the_caller() {
    let (mut cache, remote) = with_stuck_store(2, 2);
    // Would not end if it waited for the store.
    for n in 0..20 {
        serve(&mut cache, &prompt(n, 8));
    }
    let counters = report(&cache, TierKind::Remote).counters;
    assert!(counters.dropped > 50 && counters.stored == 0, "{counters:?}");
    remote.trouble.store(0, Ordering::SeqCst);
}

#[test]
fn what_waits_to_be_written_is_found_where_it_waits() {
    let (mut cache, remote) = with_stuck_store(8, 64);
    for n in 1..=3 {
        serve(&mut cache, &prompt(n, 8));
    }
    // The writer has some blocks of the first prompt and is stuck with them.
    while remote.asked.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    for n in 4..=6 {
        serve(&mut cache, &prompt(n, 8));
    }
    // Those of the second are neither on the device nor in the host any more.
    let second = prompt(2, 8);
    let prefetch = cache.prefetch(&second, SPACE).unwrap();
    assert_eq!((prefetch.device_tokens, prefetch.host_tokens), (0, 8 * BLOCK));
    drop(prefetch);
    assert_eq!(serve(&mut cache, &second), (8 * BLOCK, expected(&second)));
    remote.trouble.store(0, Ordering::SeqCst);
}

#[test]
fn options_that_cannot_be_are_refused_and_change_nothing() {
    let mut cache = cache_of(&spec(), 12);
    let bad = [
        TierOptions::host("", 4),
        TierOptions { transit_blocks: 0, ..TierOptions::host("m", 4) },
        TierOptions { slice: Some(Slice { groups: Vec::new() }), ..TierOptions::host("m", 4) },
    ];
    for options in bad {
        assert!(cache.attach_tiers(options).is_err());
    }
    assert!(cache.prefetch(&[1], SPACE).is_err() && cache.tier_reports().is_empty());
    cache.attach_tiers(TierOptions::host("m", 4)).unwrap();
    assert!(cache.attach_tiers(TierOptions::host("m", 4)).is_err());
    let mut late = cache_of(&spec(), 12);
    serve(&mut late, &prompt(1, 2));
    assert!(late.attach_tiers(TierOptions::host("m", 4)).is_err());
}
