//! Remote tiers on real servers: Redis, started here where `redis-server` is installed, and the
//! S3-compatible store that `KVCACHE_S3` names (`s3+http://HOST:PORT/BUCKET`), both also through NIXL
//! where `KVCACHE_NIXL` names its library. `KVCACHE_REQUIRE_REMOTE=1` makes a server that is lacking a
//! failure, `KVCACHE_REQUIRE_NIXL=1` NIXL. Here is what holds for every store; beside it a file for
//! each.
#![cfg(all(unix, feature = "remote"))]

mod nixl;
mod redis;
mod s3;
#[path = "../tier_case/mod.rs"]
mod tier_case;

use std::sync::Arc;
use std::time::Duration;

use kvcache::cache::{Demotion, KvCache, LowerTier, TierOptions};
use kvcache::tier::remote::RemoteOptions;
use kvcache::tier::{Get, ObjectKey, Outcome, Put, Store, TierCounters, TierKind};
use tier_case::*;

fn lacking(what: &str) {
    lacking_unless("KVCACHE_REQUIRE_REMOTE", what);
}

fn lacking_unless(required: &str, what: &str) {
    assert!(std::env::var_os(required).is_none(), "{what}");
    println!("skipped: {what}");
}

fn options() -> RemoteOptions {
    RemoteOptions { timeout: Duration::from_secs(1), ..RemoteOptions::default() }
}

/// The address of the S3-compatible store, if there is one.
fn s3() -> Option<String> {
    let address = std::env::var("KVCACHE_S3").ok();
    if address.is_none() {
        lacking("KVCACHE_S3 names no S3-compatible store");
    }
    address
}

fn with_store(store: Arc<dyn Store>) -> KvCache {
    let mut cache = cache_of(&spec(), 12);
    let mut options = TierOptions::host("m", 0);
    let demotion = Demotion { on_commit: true, ..Demotion::default() };
    options.lower.push(LowerTier { store, settings: settings(TierKind::Remote), demotion });
    cache.attach_tiers(options).unwrap();
    cache
}

fn counters(cache: &KvCache) -> TierCounters {
    report(cache, TierKind::Remote).counters
}

fn object(seed: u8) -> Vec<u8> {
    (0..20_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect()
}

fn get(store: &dyn Store, key: ObjectKey, bytes: usize) -> (Outcome, Vec<u8>) {
    let (mut bytes, mut outcomes) = (vec![0; bytes], [Outcome::None]);
    store.get(&mut [Get { key, object: &mut bytes }], &mut outcomes);
    (outcomes[0], bytes)
}

/// What every store does.
fn keeps_what_it_is_given(store: &dyn Store) {
    keeps_objects(store);
    // Of another length than what is there.
    let key = ObjectKey([4; 32]);
    let object = object(4);
    let mut outcomes = [Outcome::None];
    store.put(&[Put { key, object: &object, label: None }], &mut outcomes);
    assert_eq!(get(store, key, 19_999).0, Outcome::Bad);
    assert_eq!(get(store, key, 20_001).0, Outcome::Bad);
    assert_eq!(get(store, key, 20_000), (Outcome::Done, object));
    store.remove(&[key]);
}

fn keeps_objects(store: &dyn Store) {
    let keys = [1, 2, 3].map(|n| ObjectKey([n; 32]));
    let objects = [1, 2].map(object);
    store.remove(&keys);
    let mut outcomes = [Outcome::None; 2];
    let puts: Vec<Put> =
        keys.iter().zip(&objects).map(|(&key, object)| Put { key, object, label: None }).collect();
    store.put(&puts, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Done; 2], "{store:?}");
    let mut found = [false; 3];
    assert!(store.exists(&keys, &mut found));
    assert_eq!(found, [true, true, false]);
    let mut buffers = [1, 2, 3].map(|_| vec![0; 20_000]);
    let mut gets: Vec<Get> =
        keys.iter().zip(&mut buffers).map(|(&key, object)| Get { key, object }).collect();
    let mut outcomes = [Outcome::None; 3];
    store.get(&mut gets, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Done, Outcome::Done, Outcome::Absent]);
    assert_eq!(buffers[..2], objects);
    store.remove(&keys);
    assert!(store.exists(&keys, &mut found));
    assert_eq!(found, [false; 3]);
}

/// One cache after the other over a store: the second finds what the first computed, and bytes that
/// changed in the store meanwhile are computed, and removed there.
fn serves_the_next_process(open: &dyn Fn() -> Arc<dyn Store>) {
    let (first, second) = (prompt(1, 8), prompt(2, 8));
    let mut cache = with_store(open());
    for prompt in [&first, &second] {
        assert_eq!(serve(&mut cache, prompt), (0, expected(prompt)));
    }
    assert!(cache.flush_tiers(LONG));
    assert_eq!(counters(&cache).stored, 16);
    drop(cache);

    let mut cache = with_store(open());
    prefetch(&mut cache, &first);
    assert_eq!(serve(&mut cache, &first), (8 * BLOCK, expected(&first)));
    let counted = counters(&cache);
    assert_eq!((counted.loaded, counted.bad, counted.failures), (8, 0, 0));

    // Another length, and other bytes of the same.
    let store = open();
    let parent: [_; 2] = core::array::from_fn(|at| key_of(&cache, &second, at));
    let bytes = kvcache::tier::object::object_bytes(cache.configuration().unwrap().payload_bytes());
    let (outcome, mut changed) = get(&*store, parent[1], bytes.unwrap() as usize);
    assert_eq!(outcome, Outcome::Done);
    changed[5000] ^= 1;
    let puts = [
        Put { key: parent[0], object: b"garbage", label: None },
        Put { key: parent[1], object: &changed, label: None },
    ];
    store.put(&puts, &mut [Outcome::None; 2]);
    drop(cache);
    let mut cache = with_store(open());
    prefetch(&mut cache, &second);
    assert_eq!(serve(&mut cache, &second), (0, expected(&second)));
    assert_eq!(counters(&cache).bad, 2);
    assert!(cache.flush_tiers(LONG));
    drop(cache);
    // What was computed was put there again.
    let mut cache = with_store(open());
    prefetch(&mut cache, &second);
    assert_eq!(serve(&mut cache, &second), (8 * BLOCK, expected(&second)));
    assert_eq!(counters(&cache).bad, 0);
}

/// The key of block `at` of a prompt.
fn key_of(cache: &KvCache, prompt: &[u32], at: usize) -> ObjectKey {
    use kvcache::prefix::Digest;
    let blocks = prompt.chunks_exact(BLOCK).take(at + 1);
    let digest =
        blocks.fold(None, |parent, tokens| Some(Digest::of_block(parent.as_ref(), tokens)));
    cache.configuration().unwrap().key(&digest.unwrap())
}
