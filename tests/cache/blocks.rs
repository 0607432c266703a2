//! Which blocks sequences share, what a window leaves, what stays when room is short, and what is left in
//! a block that is free.

use std::sync::Arc;

use kvcache::Error;
use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::device::Backend;
use kvcache::dtype::KvFormat;
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::{Hint, Retention};

use crate::backends;
use crate::harness::Harness;
use crate::model::Rng;

/// Runs tokens through a cache without writing or reading anything.
fn feed(cache: &mut KvCache, seq: SeqId, tokens: &[u32]) -> Result<(), Error> {
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens }])?;
    cache.commit(&mut step)
}

#[test]
fn a_window_holds_what_the_planner_says_and_shares_what_it_has() {
    let full = GroupSpec::uniform(1, 1, 8, KvFormat::F16);
    let window = GroupSpec { window: Some(32), ..full.clone() };
    let spec = CacheSpec { block_tokens: 16, groups: vec![full, window] };
    // Three blocks are the most that a window of 32 touches; the fourth is being left.
    let group_blocks = vec![80, 4];
    let options = CacheOptions { group_blocks, max_seqs: 3, threads: 1, ..CacheOptions::default() };
    let mut cache = KvCache::new(&spec, &options).unwrap();
    let prompt: Vec<u32> = (0..640).collect();
    let serve = |cache: &mut KvCache, prompt: &[u32]| -> u32 {
        let started = cache.start(prompt, Namespace(0)).unwrap();
        for chunk in prompt[started.cached_tokens as usize..].chunks(16) {
            feed(cache, started.seq, chunk).unwrap();
            cache.audit().unwrap();
        }
        let held = cache.blocks(started.seq, 1).unwrap().iter();
        assert!(held.filter(|&&block| block != kvcache::ids::BlockId::NONE).count() <= 4);
        cache.release(started.seq).unwrap();
        started.cached_tokens
    };
    assert_eq!(serve(&mut cache, &prompt), 0);
    // The end is there in both groups; all but the last token is a hit.
    let longer: Vec<u32> = (0..641).collect();
    assert_eq!(serve(&mut cache, &longer), 640);
    // In the middle the window has nothing; who computes it anew makes it whole again.
    let other: Vec<u32> = (0..320).chain([7000]).collect();
    assert_eq!(serve(&mut cache, &other), 0);
    assert_eq!(cache.stats().cached_blocks, 40, "entries of the other group were kept");
    assert_eq!(serve(&mut cache, &other), 320);
    // A wider window than the group's would see what is gone.
    let seq = cache.start(&longer, Namespace(0)).unwrap().seq;
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &[1] }]).unwrap();
    let (q, mut out) = ([0f32; 8], [0f32; 8]);
    let layer = LayerId { group: 1, layer: 0 };
    let wide = Scoring { window: Some(33), ..Scoring::causal(8) };
    let wide = cache.attend(&step, layer, q[..].into(), (&mut out[..]).into(), &wide, None);
    assert!(matches!(wide, Err(Error::InvalidArgument { .. })));
    cache.commit(&mut step).unwrap();
    for bad in [vec![1], vec![1, 0], vec![1, 1, 1]] {
        assert!(
            KvCache::new(&spec, &CacheOptions { group_blocks: bad, ..options.clone() }).is_err()
        );
    }
}

/// What a new sequence sees in blocks that another has given back.
fn remains(backend: Option<&Arc<dyn Backend>>, scrub: bool) -> f32 {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 64, KvFormat::F16));
    let options = CacheOptions { blocks: 3, max_seqs: 2, threads: 1, scrub, ..Default::default() };
    let mut cache = match backend {
        None => KvCache::new(&spec, &options),
        Some(backend) => KvCache::on(backend, &spec, &options),
    }
    .unwrap();
    let layer = LayerId::uniform(0);
    let (ones, mut out) = ([1f32; 40 * 64], [0f32; 40 * 64]);
    let mut step = Step::new();
    let seq = cache.start(&[1], Namespace(1)).unwrap().seq;
    cache.begin(&mut step, &[Work { seq, tokens: &[5; 40] }]).unwrap();
    cache.append(&step, layer, ones[..].into(), ones[..].into(), None).unwrap();
    cache.commit(&mut step).unwrap();
    cache.release(seq).unwrap();
    // Another tenant, with no room but what the first had: two of its blocks are evicted for it.
    let seq = cache.start(&[1], Namespace(2)).unwrap().seq;
    cache.begin(&mut step, &[Work { seq, tokens: &[6; 40] }]).unwrap();
    let scoring = Scoring::causal(64);
    cache.attend(&step, layer, ones[..].into(), (&mut out[..]).into(), &scoring, None).unwrap();
    cache.cancel(&mut step).unwrap();
    out.iter().fold(0.0, |most, value| most.max(value.abs()))
}

#[test]
fn what_is_freed_is_zeroed_where_asked_for() {
    for backend in std::iter::once(None).chain(backends::all().iter().map(Some)) {
        assert_eq!(remains(backend, true), 0.0);
        assert_eq!(remains(backend, false), 1.0, "the test would see what remains");
    }
}

#[test]
fn a_second_prompt_shares_whole_blocks_and_copies_the_tail() {
    let mut harness = Harness::new(1, 64, true);
    let prompt: Vec<u32> = (0..50).collect();
    let first = harness.cache.start(&prompt, Namespace(3)).unwrap();
    assert_eq!(first.cached_tokens, 0);
    harness.live.push((first.seq, 3, Vec::new()));
    harness.rng = Rng(4);
    let work = [Work { seq: first.seq, tokens: &prompt }];
    harness.cache.begin(&mut harness.step, &work).unwrap();
    harness.cache.commit(&mut harness.step).unwrap();
    // 50 tokens are 3 whole blocks and 2 tokens; only whole blocks are published.
    let mut other = prompt.clone();
    other[40] = 1000;
    let second = harness.cache.start(&other, Namespace(3)).unwrap();
    assert_eq!(second.cached_tokens, 40);
    let shared = |group| {
        let (a, b) =
            (harness.cache.blocks(first.seq, group), harness.cache.blocks(second.seq, group));
        a.unwrap().iter().zip(b.unwrap()).take_while(|(a, b)| a == b).count()
    };
    assert_eq!((shared(0), shared(1)), (2, 2));
    // Nothing is shared across namespaces, nor all of a prompt.
    assert_eq!(harness.cache.start(&prompt, Namespace(4)).unwrap().cached_tokens, 0);
    assert_eq!(harness.cache.start(&prompt[..48], Namespace(3)).unwrap().cached_tokens, 47);
    harness.cache.audit().unwrap();
}

#[test]
fn what_the_engine_says_decides_what_stays() {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 16, KvFormat::F32));
    let options = CacheOptions { blocks: 4, max_seqs: 2, threads: 1, ..CacheOptions::default() };
    let mut cache = KvCache::new(&spec, &options).unwrap();
    let mut step = Step::new();
    // Serves a prompt of one block and one token, and says something about it before its end.
    let mut serve = |cache: &mut KvCache, first: u32, tell: &dyn Fn(&mut KvCache, SeqId)| -> u32 {
        let prompt: Vec<u32> = (first..first + 17).collect();
        let started = cache.start(&prompt, Namespace(0)).unwrap();
        let tokens = &prompt[started.cached_tokens as usize..];
        cache.begin(&mut step, &[Work { seq: started.seq, tokens }]).unwrap();
        cache.commit(&mut step).unwrap();
        tell(cache, started.seq);
        cache.release(started.seq).unwrap();
        cache.audit().unwrap();
        started.cached_tokens
    };
    let nothing = |_: &mut KvCache, _| ();
    let ended = |cache: &mut KvCache, seq| cache.hint(seq, 0, Hint::SessionEnded).unwrap();
    let kept = |cache: &mut KvCache, seq| {
        let range = Retention { start: 0, end: None, priority: 90, duration_ms: Some(1000) };
        cache.prioritize(seq, &[range]).unwrap();
    };
    cache.advance(1).unwrap();
    // Three prompts leave a block each in the index; a fourth needs two.
    assert_eq!((serve(&mut cache, 100, &kept), serve(&mut cache, 200, &nothing)), (0, 0));
    assert_eq!(serve(&mut cache, 300, &ended), 0);
    // The one that ended goes, though it is the last one used.
    assert_eq!((serve(&mut cache, 400, &nothing), serve(&mut cache, 200, &nothing)), (0, 16));
    // Then the least recently used one without a priority.
    assert_eq!((serve(&mut cache, 500, &nothing), serve(&mut cache, 600, &nothing)), (0, 0));
    assert_eq!((serve(&mut cache, 100, &kept), serve(&mut cache, 400, &nothing)), (16, 0));
    // Its time from its release on: until then it stays, after it it goes.
    cache.advance(1000).unwrap();
    assert_eq!((serve(&mut cache, 700, &nothing), serve(&mut cache, 800, &nothing)), (0, 0));
    cache.advance(1001).unwrap();
    assert_eq!((serve(&mut cache, 700, &nothing), serve(&mut cache, 800, &nothing)), (16, 16));
    assert_eq!((serve(&mut cache, 900, &nothing), serve(&mut cache, 100, &nothing)), (0, 0));
    let range = Retention { start: 0, end: None, priority: 101, duration_ms: None };
    assert!(
        cache.prioritize(SeqId(0), &[]).is_err() && cache.hint(SeqId(0), 0, Hint::None).is_err()
    );
    let seq = cache.start(&[1], Namespace(0)).unwrap().seq;
    assert!(cache.prioritize(seq, &[range]).is_err() && cache.advance(u64::MAX).is_err());
}
