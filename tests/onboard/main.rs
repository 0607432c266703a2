//! Onboarding by layers: an engine starts before its blocks are there, never attends over what is not
//! there or not what it should be, and gets what it would have computed. Here is each case by itself; in
//! `random` all of them at once.

#![cfg(unix)]

mod random;
mod stores;
#[path = "../tier_case/mod.rs"]
mod tier_case;

use std::sync::Arc;
use std::time::Duration;

use kvcache::Error;
use kvcache::attention::Scoring;
use kvcache::cache::{KvCache, LayerId, Started, Step, TierOptions, Work};
use kvcache::dtype::KvFormat;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Configuration, Missed, Store, TierKind};
use stores::{Fault, Gated};
use tier_case::remote::Remote;
use tier_case::{
    BLOCK, DIM, Folder, HEADS, LONG, SPACE, below, cache_of, prefetch, prompt, report, rows,
    serve_part,
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

fn disk(folder: &Folder, spec: &CacheSpec, bytes: u64) -> DiskStore {
    let config = Configuration::new(MODEL, spec, &Slice::whole(spec)).unwrap();
    DiskStore::open(&DiskOptions::new(&folder.0, bytes), &config).unwrap().0
}

fn gated(folder: &Folder) -> Arc<Gated> {
    Gated::over(disk(folder, &deep(), 64 << 20))
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
    let folder = Folder::new("onboard-disk");
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
        let folder = Folder::new(&format!("onboard-fault-{n}"));
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
    let folder = Folder::new("onboard-buffers");
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
    let folder = Folder::new("onboard-cancel");
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
