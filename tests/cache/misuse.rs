//! Misuse is an error and changes nothing.

use kvcache::Error;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::dtype::KvFormat;
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::{CacheSpec, GroupSpec};

use crate::harness::Harness;
use crate::model::{KV_HEADS, LAYERS, Setup};

#[test]
fn misuse_is_an_error_and_changes_nothing() {
    let mut harness = Harness::new(1, 8, true);
    let cache = &mut harness.cache;
    assert!(cache.start(&[], Namespace(0)).is_err());
    let seq = cache.start(&[1, 2], Namespace(0)).unwrap().seq;
    let mut step = Step::new();
    let before = cache.stats();
    let work = |seq, tokens| Work { seq, tokens };
    assert!(cache.begin(&mut step, &[]).is_err());
    assert!(cache.begin(&mut step, &[work(seq, &[])]).is_err());
    assert!(cache.begin(&mut step, &[work(seq, &[1]), work(seq, &[2])]).is_err());
    assert!(cache.begin(&mut step, &[work(seq, &[1]), work(SeqId(0), &[2])]).is_err());
    assert!(matches!(
        cache.begin(&mut step, &[work(seq, &[1; 8 * 16 + 1])]),
        Err(Error::OutOfBlocks { needed: 9, missing: 1 })
    ));
    assert_eq!(cache.stats(), before);
    assert!(!step.is_open());

    cache.begin(&mut step, &[work(seq, &[1, 2])]).unwrap();
    let layer = LayerId::uniform(0);
    let row = vec![0.0f32; 2 * KV_HEADS * Setup::cpu().dim];
    let append = |cache: &mut KvCache, step: &Step, layer, k: &[f32]| {
        cache.append(step, layer, k.into(), row.as_slice().into(), None)
    };
    assert!(append(cache, &step, layer, &row[1..]).is_err());
    assert!(append(cache, &step, LayerId { group: 2, layer: 0 }, &row).is_err());
    assert!(append(cache, &step, LayerId { group: 0, layer: LAYERS }, &row).is_err());
    assert!(append(cache, &Step::new(), layer, &row).is_err());
    assert!(cache.begin(&mut step, &[work(seq, &[1])]).is_err());
    assert!(cache.begin(&mut Step::new(), &[work(seq, &[1])]).is_err());
    assert!(
        cache.release(seq).is_err() && cache.fork(seq).is_err() && cache.truncate(seq, 0).is_err()
    );
    let mut other = Harness::new(2, 8, true).cache;
    assert!(append(&mut other, &step, layer, &row).is_err() && other.commit(&mut step).is_err());
    append(cache, &step, layer, &row).unwrap();
    cache.commit(&mut step).unwrap();
    assert!(cache.commit(&mut step).is_err() && cache.cancel(&mut step).is_err());
    assert!(cache.truncate(seq, 3).is_err());
    cache.audit().unwrap();
}

#[test]
fn impossible_options_are_refused() {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 64, KvFormat::F16));
    let refuse =
        |spec: &CacheSpec, options: CacheOptions| KvCache::new(spec, &options).unwrap_err();
    let options = CacheOptions::default();
    refuse(&spec, CacheOptions { blocks: 0, ..options.clone() });
    refuse(&spec, CacheOptions { max_seqs: 0, ..options.clone() });
    refuse(&spec, CacheOptions { max_seqs: u32::MAX, ..options.clone() });
    refuse(&spec, CacheOptions { threads: u32::MAX, ..options.clone() });
    refuse(&CacheSpec { groups: Vec::new(), ..spec.clone() }, options.clone());
    let huge = CacheSpec::uniform(256, GroupSpec::uniform(1 << 20, 1 << 10, 256, KvFormat::F32));
    let blocks = i32::MAX as u32;
    let past = CacheOptions { blocks, ..options.clone() };
    assert!(matches!(refuse(&huge, past), Error::Overflow { .. }));
    // Sealed tiles that the format cannot have.
    for (tokens, dim) in [(16, 64), (256, 64), (64, 72), (64, 8)] {
        let spec = CacheSpec::uniform(tokens, GroupSpec::uniform(1, 1, dim, KvFormat::Kt4v4));
        let error = refuse(&spec, options.clone());
        assert!(matches!(error, Error::InvalidArgument { .. }), "{tokens} {dim}: {error}");
    }
}
