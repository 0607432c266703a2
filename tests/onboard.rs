//! Onboarding by layers: an engine starts before its blocks are there, never attends over what is not
//! there or not what it should be, and gets what it would have computed.

#![cfg(unix)]

mod tier_case;

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kvcache::Error;
use kvcache::attention::Scoring;
use kvcache::cache::{KvCache, LayerId, Started, Step, TierOptions, Work};
use kvcache::dtype::KvFormat;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{
    Configuration, Get, GetPart, Missed, ObjectKey, Outcome, Put, Store, TierKind, Watcher,
};
use tier_case::{
    BLOCK, DIM, HEADS, LONG, SPACE, below, cache_of, prefetch, prompt, report, rows, serve_part,
};

const LAYERS: u32 = 6;
const MODEL: &str = "m";

fn deep() -> CacheSpec {
    let group = GroupSpec::uniform(LAYERS, HEADS, DIM as u32, KvFormat::F16);
    CacheSpec::uniform(BLOCK as u32, group)
}

fn served(cache: &mut KvCache, prompt: &[u32]) -> (usize, Vec<f32>) {
    serve_part(cache, prompt, 0..LAYERS, 0..HEADS)
}

fn expected(prompt: &[u32]) -> Vec<f32> {
    served(&mut cache_of(&deep(), 64), prompt).1
}

fn start(cache: &mut KvCache, prompt: &[u32]) -> Started {
    cache.start_onboarding(prompt, &[], SPACE).unwrap()
}

/// One layer of a step for `tokens` at `first`; what it attends to.
fn layer(
    cache: &mut KvCache,
    step: &Step,
    layer: u32,
    first: usize,
    tokens: &[u32],
) -> Result<Vec<f32>, Error> {
    let row = |kind| rows(kind, layer, first, tokens, 0..HEADS);
    let (at, q, k, v) = (LayerId::uniform(layer), row(0), row(1), row(2));
    cache.append(step, at, k[..].into(), v[..].into(), None)?;
    let mut out = vec![0f32; q.len()];
    let scoring = Scoring::causal(DIM as u32);
    cache.attend(step, at, q[..].into(), (&mut out[..]).into(), &scoring, None)?;
    Ok(out)
}

/// Serves a prompt as an engine does that waits for each layer; how much of it came from tiers or the
/// device, the attention of its last token, and how the load ended.
fn onboarded(cache: &mut KvCache, prompt: &[u32]) -> (usize, Vec<f32>, Result<(), Error>) {
    let started = start(cache, prompt);
    let (mut cached, last) = (started.cached_tokens as usize, prompt.len() - 1);
    let (mut out, mut ended) = (Vec::new(), Ok(()));
    let mut step = Step::new();
    let mut from = cached;
    while from < prompt.len() {
        // The last token alone, as in the other tests.
        let to = if from < last { last } else { prompt.len() };
        let tokens = &prompt[from..to];
        cache.begin(&mut step, &[Work { seq: started.seq, tokens }]).unwrap();
        let mut result = Ok(());
        let mut attended = Vec::new();
        for n in 0..LAYERS {
            cache.step_layer_wait(&step, LayerId::uniform(n)).unwrap().wait(LONG);
            result = cache.poll_step_layer(&step, LayerId::uniform(n)).map(|there| assert!(there));
            if result.is_err() {
                assert!(layer(cache, &step, n, from, tokens).is_err(), "attended all the same");
                break;
            }
            attended.extend(layer(cache, &step, n, from, tokens).unwrap());
        }
        match result {
            Ok(()) => {
                cache.commit(&mut step).unwrap();
                out = attended;
                from = to;
            }
            Err(error) => {
                assert_eq!(cache.commit(&mut step), Err(error));
                cache.cancel(&mut step).unwrap();
                assert_eq!(
                    cache.begin(&mut step, &[Work { seq: started.seq, tokens }]),
                    Err(error)
                );
                cached = cache.cancel_load(started.seq).unwrap();
                (ended, from) = (Err(error), cached);
            }
        }
        cache.audit().unwrap();
    }
    cache.release(started.seq).unwrap();
    cache.audit().unwrap();
    (cached, out, ended)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// One bit of the part is another.
    Flip,
    /// The file is too short.
    Short,
    Fails,
    Panics,
}

/// A disk that gives a part only when it is let, and then perhaps not as it was.
#[derive(Debug)]
struct Gated {
    disk: DiskStore,
    /// Calls that may be made yet.
    allowed: Mutex<u32>,
    more: Condvar,
    /// (bytes of the object before the part, the call of these that goes wrong)
    fault: Mutex<Option<(Fault, u64)>>,
}

impl Gated {
    fn allow(&self, calls: u32) {
        let mut allowed = self.allowed.lock().unwrap();
        *allowed = allowed.saturating_add(calls);
        self.more.notify_all();
    }
}

impl Store for Gated {
    fn knows(&self, key: &ObjectKey) -> Option<bool> {
        self.disk.knows(key)
    }
    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        self.disk.exists(keys, found)
    }
    fn put(&self, objects: &[Put], outcomes: &mut [Outcome]) {
        self.disk.put(objects, outcomes)
    }
    fn get(&self, objects: &mut [Get], outcomes: &mut [Outcome]) {
        self.disk.get(objects, outcomes)
    }
    fn gives_parts(&self) -> bool {
        true
    }
    fn hold(&self, keys: &[ObjectKey], held: &mut [bool]) {
        self.disk.hold(keys, held)
    }
    fn unhold(&self, keys: &[ObjectKey]) {
        self.disk.unhold(keys)
    }
    fn get_parts(&self, parts: &mut [GetPart], outcomes: &mut [Outcome]) {
        let allowed = self.allowed.lock().unwrap();
        // Not for ever: a test that fails ends.
        let waited = self.more.wait_timeout_while(allowed, LONG / 3, |allowed| *allowed == 0);
        let mut allowed = waited.unwrap().0;
        *allowed = allowed.saturating_sub(1);
        drop(allowed);
        self.disk.get_parts(parts, outcomes);
        if let Some((fault, at)) = *self.fault.lock().unwrap() {
            for (part, outcome) in parts.iter_mut().zip(outcomes) {
                if !(part.offset..part.offset + part.bytes.len() as u64).contains(&at) {
                    continue;
                }
                match fault {
                    Fault::Flip => part.bytes[(at - part.offset) as usize] ^= 0x10,
                    Fault::Short => *outcome = Outcome::Absent,
                    Fault::Fails => *outcome = Outcome::Failed,
                    Fault::Panics => panic!("planted"),
                }
            }
        }
    }
    fn remove(&self, keys: &[ObjectKey]) {
        self.disk.remove(keys)
    }
    fn watch(&self, watcher: Arc<dyn Watcher>) -> bool {
        self.disk.watch(watcher)
    }
    fn used(&self) -> Option<(u64, u64)> {
        self.disk.used()
    }
}

/// A folder that goes when the test ends.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("kvcache-onboard-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&path);
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn disk(folder: &Folder, spec: &CacheSpec) -> DiskStore {
    let config = Configuration::new(MODEL, spec, &Slice::whole(spec)).unwrap();
    DiskStore::open(&DiskOptions::new(&folder.0, 64 << 20), &config).unwrap().0
}

fn gated(folder: &Folder) -> Arc<Gated> {
    Arc::new(Gated {
        disk: disk(folder, &deep()),
        allowed: Mutex::new(0),
        more: Condvar::new(),
        fault: Mutex::new(None),
    })
}

/// A cache over a store, nothing in its host, and `prompts` in the store.
fn over(store: Arc<dyn Store>, kind: TierKind, prompts: &[Vec<u32>], transit: usize) -> KvCache {
    let tiers = |cache: &mut KvCache, transit| {
        let mut lower = below(store.clone(), kind);
        lower.settings.readers = 1;
        let options = TierOptions {
            transit_blocks: transit,
            lower: vec![lower],
            ..TierOptions::host(MODEL, 0)
        };
        cache.attach_tiers(options).unwrap();
    };
    let mut cache = cache_of(&deep(), 64);
    tiers(&mut cache, 64);
    for prompt in prompts {
        served(&mut cache, prompt);
    }
    assert!(cache.flush_tiers(LONG));
    drop(cache);
    let mut cache = cache_of(&deep(), 64);
    tiers(&mut cache, transit);
    cache
}

#[test]
fn from_the_host_layer_by_layer() {
    // Room for one of them.
    let mut cache = cache_of(&deep(), 7);
    cache.attach_tiers(TierOptions::host(MODEL, 64)).unwrap();
    let (one, other) = (prompt(1, 6), prompt(2, 6));
    served(&mut cache, &one);
    served(&mut cache, &other);
    let hits = cache.stats().hit_tokens;
    let started = start(&mut cache, &one);
    let cached = started.cached_tokens as usize;
    assert_eq!(cached, 6 * BLOCK);
    let state = cache.load_state(started.seq).unwrap().unwrap();
    assert_eq!((state.device_tokens, state.loading_tokens), (0, cached));
    assert_eq!((state.ready_layers, state.first_missing), (0, LayerId::uniform(0)));
    let mut step = Step::new();
    let tokens = &one[cached..];
    cache.begin(&mut step, &[Work { seq: started.seq, tokens }]).unwrap();
    for n in 0..LAYERS {
        assert!(matches!(
            layer(&mut cache, &step, n, cached, tokens),
            Err(Error::InvalidState { .. })
        ));
        assert!(matches!(cache.commit(&mut step), Err(Error::InvalidState { .. })));
        assert!(cache.poll_step_layer(&step, LayerId::uniform(n)).unwrap());
        layer(&mut cache, &step, n, cached, tokens).unwrap();
        let state = cache.load_state(started.seq).unwrap();
        assert_eq!(state.map(|state| state.ready_layers), (n < LAYERS - 1).then_some(n + 1));
    }
    assert_eq!(cache.stats().hit_tokens - hits, cached as u64);
    cache.commit(&mut step).unwrap();
    cache.release(started.seq).unwrap();
    cache.audit().unwrap();
    assert_eq!(report(&cache, TierKind::Host).counters.loaded, 6);
    // Now for everybody, and right.
    assert_eq!(served(&mut cache, &one), (cached, expected(&one)));
    assert_eq!(onboarded(&mut cache, &other), (cached, expected(&other), Ok(())));
}

#[test]
fn from_disk_while_later_layers_are_still_read() {
    let folder = Folder::new("disk");
    let store = gated(&folder);
    let text = prompt(1, 12);
    let mut cache = over(store.clone(), TierKind::Disk, std::slice::from_ref(&text), 64);
    let started = start(&mut cache, &text);
    assert_eq!(started.cached_tokens as usize, 12 * BLOCK);
    let all = |cache: &mut KvCache| -> Vec<bool> {
        (0..LAYERS).map(|n| cache.poll_layer(started.seq, LayerId::uniform(n)).unwrap()).collect()
    };
    assert_eq!(all(&mut cache), [false; LAYERS as usize]);
    // Another sequence finds nothing of it, and is not held up.
    let other = cache.start(&text, SPACE).unwrap();
    assert_eq!(other.cached_tokens, 0);
    cache.release(other.seq).unwrap();
    let mut there = 0;
    while there < LAYERS as usize {
        store.allow(1);
        let begin = std::time::Instant::now();
        let before = there;
        while there == before && begin.elapsed() < Duration::from_millis(100) {
            let polled = all_if_loading(&mut cache, started.seq);
            there = polled.iter().take_while(|there| **there).count();
            assert!(!polled[there..].contains(&true), "{polled:?} is out of order");
        }
        let state = cache.load_state(started.seq).unwrap();
        assert_eq!(state.is_none(), there == LAYERS as usize);
    }
    assert_eq!(cache.load_state(started.seq).unwrap(), None);
    cache.release(started.seq).unwrap();
    cache.audit().unwrap();
    assert_eq!(served(&mut cache, &text), (12 * BLOCK, expected(&text)));
    let counters = report(&cache, TierKind::Disk).counters;
    assert_eq!((counters.loaded, counters.bad, counters.missed), (12, 0, 0));
}

/// The last layer is asked for first: more may arrive between two answers.
fn all_if_loading(cache: &mut KvCache, seq: kvcache::ids::SeqId) -> Vec<bool> {
    let poll = |n| cache.poll_layer(seq, LayerId::uniform(n)).unwrap();
    let mut there: Vec<bool> = (0..LAYERS).rev().map(poll).collect();
    there.reverse();
    there
}

#[test]
fn what_goes_wrong_midway_names_the_layer_and_costs_a_recompute() {
    let text = prompt(3, 10);
    let layer_bytes = deep().layouts().unwrap()[0].layer_bytes();
    let faults = [Fault::Flip, Fault::Short, Fault::Fails, Fault::Panics];
    for (n, fault) in faults.into_iter().enumerate() {
        let folder = Folder::new(&format!("fault-{n}"));
        let store = gated(&folder);
        let mut cache = over(store.clone(), TierKind::Disk, std::slice::from_ref(&text), 64);
        // In the middle of layer 4.
        *store.fault.lock().unwrap() = Some((fault, 4096 + 4 * layer_bytes + layer_bytes / 2));
        store.allow(u32::MAX);
        let (cached, out, ended) = onboarded(&mut cache, &text);
        assert_eq!(cached, 0);
        assert_eq!(out, expected(&text));
        let Err(Error::LayerMissing { group: 0, layer, .. }) = ended else { panic!("{ended:?}") };
        // The load fails as soon as it is known to, with as much as was there by then.
        assert!(layer <= 4, "{fault:?}: layer {layer}");
        let counters = report(&cache, TierKind::Disk).counters;
        assert_eq!(counters.bad, u64::from(fault == Fault::Flip), "{fault:?}");
        assert_eq!(counters.missed, u64::from(fault != Fault::Flip), "{fault:?}");
        assert_eq!(counters.loaded, 0);
        // What was bad is gone; what was computed instead is there for everybody.
        assert_eq!(served(&mut cache, &text), (10 * BLOCK, expected(&text)));
    }
}

#[test]
fn a_load_is_as_long_as_there_are_buffers_and_gives_them_back() {
    let folder = Folder::new("buffers");
    let store = gated(&folder);
    store.allow(u32::MAX);
    let texts: Vec<Vec<u32>> = (0..3).map(|n| prompt(n, 12)).collect();
    let mut cache = over(store.clone(), TierKind::Disk, &texts, 16);
    let started = [start(&mut cache, &texts[0]), start(&mut cache, &texts[1])];
    assert_eq!(started[0].cached_tokens as usize, 12 * BLOCK);
    let second = started[1].cached_tokens as usize;
    assert!(second < 12 * BLOCK, "{second}");
    for started in started {
        for n in 0..LAYERS {
            assert!(cache.wait_layer(started.seq, LayerId::uniform(n), LONG).unwrap());
        }
        cache.release(started.seq).unwrap();
    }
    for text in &texts {
        assert_eq!(onboarded(&mut cache, text), (12 * BLOCK, expected(text), Ok(())));
    }
}

#[test]
fn a_sequence_that_is_loading_can_be_given_up_at_any_time() {
    let folder = Folder::new("cancel");
    let store = gated(&folder);
    let texts: Vec<Vec<u32>> = (0..4).map(|n| prompt(n, 8)).collect();
    let mut cache = over(store.clone(), TierKind::Disk, &texts, 64);
    let loading = start(&mut cache, &texts[0]);
    for refused in [cache.fork(loading.seq).map(drop), cache.truncate(loading.seq, 1)] {
        assert!(matches!(refused, Err(Error::InvalidState { .. })), "{refused:?}");
    }
    cache.release(loading.seq).unwrap();
    let loading = start(&mut cache, &texts[1]);
    let mut step = Step::new();
    let tokens = &texts[1][loading.cached_tokens as usize..];
    cache.begin(&mut step, &[Work { seq: loading.seq, tokens }]).unwrap();
    assert!(matches!(cache.cancel_load(loading.seq), Err(Error::InvalidState { .. })));
    assert!(matches!(cache.release(loading.seq), Err(Error::InvalidState { .. })));
    cache.cancel(&mut step).unwrap();
    assert_eq!(cache.cancel_load(loading.seq), Ok(0));
    assert_eq!(cache.cancel_load(loading.seq), Ok(0));
    assert_eq!(cache.load_state(loading.seq), Ok(None));
    cache.release(loading.seq).unwrap();
    cache.audit().unwrap();
    // A cache that goes while it loads does not wait for the disk for ever.
    let _loading = start(&mut cache, &texts[2]);
    store.allow(u32::MAX);
    assert_eq!(onboarded(&mut cache, &texts[3]), (8 * BLOCK, expected(&texts[3]), Ok(())));
    let stranger = start(&mut cache_with_host(), &texts[0]);
    assert_eq!(stranger.cached_tokens, 0);
}

fn cache_with_host() -> KvCache {
    let mut cache = cache_of(&deep(), 8);
    cache.attach_tiers(TierOptions::host(MODEL, 8)).unwrap();
    cache
}

#[test]
fn calls_that_cannot_be_are_refused() {
    let mut bare = cache_of(&deep(), 8);
    let text = prompt(1, 2);
    let none = bare.start_onboarding(&text, &[], SPACE);
    assert!(matches!(none, Err(Error::InvalidState { .. })));
    let mut cache = cache_with_host();
    assert!(cache.start_onboarding(&[], &[], SPACE).is_err());
    let started = start(&mut cache, &text);
    assert_eq!(cache.poll_layer(started.seq, LayerId::uniform(5)), Ok(true));
    for layer in [LayerId::uniform(LAYERS), LayerId { group: 1, layer: 0 }] {
        assert!(cache.poll_layer(started.seq, layer).is_err());
        assert!(cache.layer_wait(started.seq, layer).is_err());
    }
    cache.release(started.seq).unwrap();
    assert!(cache.poll_layer(started.seq, LayerId::uniform(0)).is_err());
    assert!(cache.load_state(started.seq).is_err() && cache.cancel_load(started.seq).is_err());
    assert!(cache.poll_step_layer(&Step::new(), LayerId::uniform(0)).is_err());
}

/// A store that has to be asked, and gives objects whole.
#[derive(Debug, Default)]
struct Remote(Mutex<std::collections::BTreeMap<ObjectKey, Vec<u8>>>);

impl Store for Remote {
    fn knows(&self, _: &ObjectKey) -> Option<bool> {
        None
    }
    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        let objects = self.0.lock().unwrap();
        keys.iter().zip(found).for_each(|(key, found)| *found = objects.contains_key(key));
        true
    }
    fn put(&self, puts: &[Put], outcomes: &mut [Outcome]) {
        outcomes.fill(Outcome::Done);
        self.0.lock().unwrap().extend(puts.iter().map(|put| (put.key, put.object.to_vec())));
    }
    fn get(&self, gets: &mut [Get], outcomes: &mut [Outcome]) {
        let objects = self.0.lock().unwrap();
        for (get, outcome) in gets.iter_mut().zip(outcomes) {
            *outcome = Outcome::Absent;
            if let Some(object) = objects.get(&get.key) {
                get.object.copy_from_slice(object);
                *outcome = Outcome::Done;
            }
        }
    }
    fn remove(&self, keys: &[ObjectKey]) {
        let mut objects = self.0.lock().unwrap();
        keys.iter().for_each(|key| drop(objects.remove(key)));
    }
}

#[test]
fn a_store_that_must_be_asked_gives_whole_objects_that_it_was_seen_to_have() {
    let remote = Arc::new(Remote::default());
    let text = prompt(1, 6);
    let mut cache = over(remote.clone(), TierKind::Remote, std::slice::from_ref(&text), 64);
    // Nobody knows that they are there.
    let started = start(&mut cache, &text);
    assert_eq!(started.cached_tokens, 0);
    cache.release(started.seq).unwrap();
    // Once they were fetched, the host has them.
    prefetch(&mut cache, &text);
    assert_eq!(onboarded(&mut cache, &text), (6 * BLOCK, expected(&text), Ok(())));
    assert_eq!(report(&cache, TierKind::Remote).counters.loaded, 6);
    // What was written was seen to be there, and is in neither device nor host.
    let (kept, lost) = (prompt(2, 6), prompt(3, 6));
    served(&mut cache, &kept);
    served(&mut cache, &lost);
    assert!(cache.flush_tiers(LONG));
    cache.clear_prefix().unwrap();
    assert_eq!(onboarded(&mut cache, &kept), (6 * BLOCK, expected(&kept), Ok(())));
    assert_eq!(report(&cache, TierKind::Remote).counters.loaded, 12);
    // Until somebody removes it.
    remote.0.lock().unwrap().clear();
    let (cached, out, ended) = onboarded(&mut cache, &lost);
    assert_eq!((cached, out), (0, expected(&lost)));
    let why = Missed::Absent.text();
    assert_eq!(ended, Err(Error::LayerMissing { group: 0, layer: 0, why }));
}

/// A pseudo-random number below `n`.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }
}

/// A sequence of the random life: its prompt, and what the engine has of it.
struct Live {
    seq: kvcache::ids::SeqId,
    prompt: usize,
    held: usize,
    step: Step,
}

/// Loads that interleave, with faults, cancels, evictions and steps in any order, on a device of few
/// blocks, few buffers and a disk that evicts. Whatever is attended, is what a cache that computes
/// everything attends; and all books agree after each call.
fn a_random_life(seed: u64, steps: usize) {
    let folder = Folder::new(&format!("random-{seed}"));
    let config = Configuration::new(MODEL, &deep(), &Slice::whole(&deep())).unwrap();
    let object = 4096 + u64::from(LAYERS) * 4096;
    let disk = DiskStore::open(&DiskOptions::new(&folder.0, 40 * object), &config).unwrap().0;
    let store = Arc::new(Gated {
        disk,
        allowed: Mutex::new(0),
        more: Condvar::new(),
        fault: Mutex::new(None),
    });
    let mut dice = Dice(seed);
    let mut cache = cache_of(&deep(), 24);
    let mut lower = below(store.clone(), TierKind::Disk);
    lower.demotion.on_commit = true;
    let host = dice.below(2) * 10;
    let lower = vec![lower];
    let options = TierOptions { transit_blocks: 24, lower, ..TierOptions::host(MODEL, host) };
    cache.attach_tiers(options).unwrap();
    // Prompts that share beginnings.
    let prompts: Vec<Vec<u32>> = (0..8u32)
        .map(|n| {
            let mut tokens = prompt(n / 3, 3 + n as usize % 4);
            for (at, token) in tokens.iter_mut().enumerate().skip(2 * BLOCK) {
                *token = n * 10_000 + 5_000 + at as u32;
            }
            tokens
        })
        .collect();
    let truth: Vec<Vec<f32>> = prompts.iter().map(|prompt| expected(prompt)).collect();
    let mut live: Vec<Live> = Vec::new();
    let (mut finished, mut failed, mut loaded) = (0, 0, 0);
    for _ in 0..steps {
        match dice.below(12) {
            0..=2 if live.len() < 4 => {
                let n = dice.below(prompts.len());
                let Ok(started) = cache.start_onboarding(&prompts[n], &[], SPACE) else { continue };
                let held = started.cached_tokens as usize;
                loaded += usize::from(cache.load_state(started.seq).unwrap().is_some());
                live.push(Live { seq: started.seq, prompt: n, held, step: Step::new() });
            }
            3 => {
                let layer_bytes = 4096u64;
                let at = 4096 + dice.below(LAYERS as usize) as u64 * layer_bytes + 77;
                let fault = [Fault::Flip, Fault::Short, Fault::Flip][dice.below(3)];
                *store.fault.lock().unwrap() = (dice.below(2) == 0).then_some((fault, at));
            }
            4 => store.allow(dice.below(6) as u32),
            5 => cache.clear_prefix().unwrap(),
            6 if !live.is_empty() => {
                let one = live.swap_remove(dice.below(live.len()));
                match dice.below(2) {
                    0 => cache.release(one.seq).unwrap(),
                    _ => {
                        let held = cache.cancel_load(one.seq).unwrap();
                        live.push(Live { held, ..one });
                    }
                }
            }
            _ if !live.is_empty() => {
                let at = dice.below(live.len());
                let one = &mut live[at];
                let text = &prompts[one.prompt];
                let last = text.len() - 1;
                let to = if one.held < last { last } else { text.len() };
                let tokens = &text[one.held..to];
                match cache.begin(&mut one.step, &[Work { seq: one.seq, tokens }]) {
                    Ok(()) => {}
                    Err(Error::LayerMissing { .. }) => {
                        one.held = cache.cancel_load(one.seq).unwrap();
                        failed += 1;
                        continue;
                    }
                    // No blocks: somebody has to go.
                    Err(Error::OutOfBlocks { .. }) => {
                        cache.release(live.swap_remove(at).seq).unwrap();
                        continue;
                    }
                    Err(error) => panic!("{error}"),
                }
                let mut attended = Vec::new();
                for n in 0..LAYERS {
                    store.allow(dice.below(3) as u32);
                    let wait = cache.step_layer_wait(&one.step, LayerId::uniform(n)).unwrap();
                    wait.wait(Duration::from_millis(dice.below(3) as u64));
                    let there = cache.poll_step_layer(&one.step, LayerId::uniform(n)) == Ok(true);
                    match layer(&mut cache, &one.step, n, one.held, tokens) {
                        Ok(out) => {
                            assert!(there, "attended what is not there");
                            attended.extend(out);
                        }
                        Err(error) => {
                            assert!(!there, "{error}");
                            break;
                        }
                    }
                    cache.audit().unwrap();
                }
                let all = attended.len() == LAYERS as usize * tokens.len() * HEADS as usize * DIM;
                if !all || dice.below(8) == 0 {
                    if !all {
                        assert!(cache.commit(&mut one.step).is_err());
                    }
                    cache.cancel(&mut one.step).unwrap();
                } else {
                    cache.commit(&mut one.step).unwrap();
                    one.held = to;
                    if to == text.len() {
                        assert_eq!(attended, truth[one.prompt], "seed {seed}");
                        finished += 1;
                        cache.release(live.swap_remove(at).seq).unwrap();
                    }
                }
            }
            _ => {}
        }
        cache.audit().unwrap();
    }
    store.allow(u32::MAX);
    for one in live {
        cache.release(one.seq).unwrap();
    }
    *store.fault.lock().unwrap() = None;
    cache.audit().unwrap();
    // Nothing was left behind that is wrong, nor a buffer that is missing.
    for (prompt, truth) in prompts.iter().zip(&truth) {
        // What a read of before, still under way, finds damaged goes: then it is computed once more.
        let ended = (0..2).map(|_| {
            let (_, out, ended) = onboarded(&mut cache, prompt);
            assert!(&out == truth, "seed {seed}: {ended:?}");
            ended
        });
        assert_eq!(ended.last(), Some(Ok(())), "seed {seed}");
    }
    assert!(finished > 0 && loaded > 0, "seed {seed}: {finished} {loaded} {failed}");
}

#[test]
fn random_lives_attend_what_a_cache_that_computes_attends() {
    // More of them: KVCACHE_ROUNDS=100.
    let rounds = std::env::var("KVCACHE_ROUNDS").map_or(8, |text| text.parse().unwrap());
    for seed in 0..rounds {
        a_random_life(seed, 300);
    }
}
