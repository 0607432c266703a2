//! Raw sinks of sealed tiles on a device: read raw by everybody, whether they were computed, forked or
//! found.

use kvcache::Error;
use kvcache::cache::{Step, Work};
use kvcache::ids::{Namespace, SeqId, TokenId};

use super::{LOUD, Rng, Setup, chunks, prompt, same};

/// Rows have the same bits in one step, in chunks, behind a prefix that was found, and in a fork; and
/// are those of the reference.
pub fn chunks_hits_and_forks(setup: &Setup, cut: &[usize]) {
    let (tokens, sinks) = (setup.tokens, setup.sink_tokens as usize);
    let text = prompt(sinks + tokens + 21);
    let all = setup.at_once(&text);
    setup.check(&all, &text, text.len(), 31);
    let mut cache = setup.cache();
    let seq = setup.start(&mut cache, &text);
    chunks(setup, &mut cache, seq, &text, &all, cut);
    // Found in part of the sinks, by all of them, and past them; after the first is gone, too.
    for len in (1..=(sinks / tokens + 1)).map(|tiles| tiles * tokens + 9) {
        let other = [&text[..len], &[5]].concat();
        let started = cache.start(&other, Namespace(0)).unwrap();
        assert_eq!(started.cached_tokens as usize, len / tokens * tokens);
        let fork = cache.fork(started.seq).unwrap();
        let new = &other[started.cached_tokens as usize..];
        let want = setup.at_once(&other);
        let want = setup.part(&want, other.len(), other.len() - new.len()..other.len());
        for seq in [started.seq, fork] {
            assert!(same(&setup.run(&mut cache, seq, new), &want), "{:?} at {len}", setup.format);
            cache.release(seq).unwrap();
        }
        if len < 2 * tokens {
            cache.release(seq).unwrap();
        }
    }
    // The sinks of what is cached are all that is left in the staging pool.
    assert_eq!(cache.stats().staged_blocks as usize, sinks / tokens);
    cache.clear_prefix().unwrap();
    cache.audit().unwrap();
    assert_eq!(cache.stats().staged_blocks, 0);
}

/// Guesses that are taken back on both sides of the end of the sinks, and a sink that is cut and written
/// anew while others have it.
pub fn cuts(setup: &Setup) {
    let sinks = setup.sink_tokens as usize;
    let text = prompt(sinks + 10);
    let all = setup.at_once(&text);
    for at in [sinks - 1, sinks, sinks + 1] {
        let mut cache = setup.cache();
        let seq = setup.start(&mut cache, &text);
        setup.run(&mut cache, seq, &text[..at - 3]);
        // Four guesses, three of them right; then a cancelled step.
        setup.run(&mut cache, seq, &[&text[at - 3..at], &[LOUD][..]].concat());
        cache.truncate(seq, at as u32).unwrap();
        let mut step = Step::new();
        cache.begin(&mut step, &[Work { seq, tokens: &prompt(setup.tokens + 9) }]).unwrap();
        setup.layers(&mut cache, &step, &[(at, &prompt(setup.tokens + 9))]);
        cache.cancel(&mut step).unwrap();
        cache.audit().unwrap();
        // Both go on from there, in one step.
        let fork = cache.fork(seq).unwrap();
        let own = [7777, 7778];
        let both = setup.run_all(&mut cache, &[(seq, &text[at..]), (fork, &own)]);
        let (new, rows) = (text.len() - at, text.len() - at + own.len());
        let want = setup.part(&all, text.len(), at..text.len());
        assert!(same(&setup.part(&both, rows, 0..new), &want), "{at}");
        let left = [&text[..at], &own].concat();
        setup.check(&setup.part(&both, rows, new..rows), &left, 2, 1);
        // The first sink is cut, and written anew with other tokens: the index's is as it was.
        cache.truncate(seq, 20).unwrap();
        let other = [&text[..20], &prompt(sinks + 5)[..]].concat();
        let out = setup.run(&mut cache, seq, &other[20..]);
        setup.check(&out, &other, other.len() - 20, other.len() - 21);
        let third = cache.start(&text, Namespace(0)).unwrap();
        assert_eq!(third.cached_tokens as usize, text.len() / setup.tokens * setup.tokens);
        let out = setup.run(&mut cache, third.seq, &text[third.cached_tokens as usize..]);
        let want = setup.part(&all, text.len(), third.cached_tokens as usize..text.len());
        assert!(same(&out, &want), "{at}: the sink of others");
    }
}

/// Blocks that hold records of sealed tiles become sinks: their rows are read raw all the same.
pub fn blocks_that_held_records(setup: &Setup) {
    let tokens = setup.tokens;
    assert_eq!(setup.sink_tokens as usize, tokens);
    let setup = Setup { blocks: 6, ..setup.clone() };
    let mut cache = setup.cache();
    let long = prompt(6 * tokens);
    let seq = setup.start(&mut cache, &long);
    setup.fill(&mut cache, seq, &long);
    cache.release(seq).unwrap();
    cache.clear_prefix().unwrap();
    // One of these has the block that was a sink; the other two have sealed ones.
    let texts =
        [1, 2, 3].map(|n| prompt(tokens + 2).iter().map(|t| t + n * 5000).collect::<Vec<_>>());
    let mut used = Vec::new();
    for (text, space) in texts.iter().zip(0..) {
        let seq = cache.start(text, Namespace(space)).unwrap().seq;
        assert!(same(&setup.run(&mut cache, seq, text), &setup.at_once(text)));
        used.push(cache.blocks(seq, 0).unwrap()[0]);
    }
    used.dedup();
    assert_eq!(used.len(), 3);
}

/// Slots of unused sinks are had by eviction, those that are used are not.
pub fn slots(setup: &Setup) {
    let tokens = setup.tokens;
    assert_eq!(setup.sink_tokens as usize, tokens);
    let setup = Setup { staging_blocks: 4, blocks: 9, ..setup.clone() };
    let mut cache = setup.cache();
    let text = prompt(2 * tokens + 3);
    let all = setup.at_once(&text);
    let run = |cache: &mut kvcache::cache::KvCache, space: u64| -> SeqId {
        let started = cache.start(&text, Namespace(space)).unwrap();
        let from = started.cached_tokens as usize;
        let out = setup.run(cache, started.seq, &text[from..]);
        assert!(same(&out, &setup.part(&all, text.len(), from..text.len())), "{space}");
        started.seq
    };
    // Tenants that are gone; blocks go round.
    for space in 0..7 {
        let seq = run(&mut cache, space);
        cache.release(seq).unwrap();
    }
    // Where the last of them is found, it is as it was computed.
    let held = [run(&mut cache, 6), run(&mut cache, 9)];
    // A step takes two slots, for the sink and for the tile that is being filled.
    let third = cache.start(&text, Namespace(10)).unwrap().seq;
    let (mut step, before) = (Step::new(), cache.stats());
    let refused = cache.begin(&mut step, &[Work { seq: third, tokens: &text }]).unwrap_err();
    assert_eq!(refused, Error::OutOfBlocks { needed: 2, missing: 2 });
    assert_eq!(cache.stats().evicted_blocks, before.evicted_blocks);
    cache.audit().unwrap();
    // Nothing was lost: who goes on, goes on.
    let out = setup.run(&mut cache, held[0], &[4]);
    setup.check(&out, &[&text[..], &[4]].concat(), 1, 1);
    cache.release(held[1]).unwrap();
    let out = setup.run(&mut cache, third, &text);
    assert!(same(&out, &all));
}

/// Long random runs, a row of each step against the reference.
pub fn random_operations(setup: &Setup, rounds: usize, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut cache = setup.cache();
    let mut live: Vec<(SeqId, Vec<TokenId>)> = Vec::new();
    for round in 0..rounds {
        match rng.below(9) {
            0 | 1 if live.len() < 4 => {
                let text = prompt(1 + rng.below(200));
                let started = cache.start(&text, Namespace(rng.below(2) as u64)).unwrap();
                live.push((started.seq, text[..started.cached_tokens as usize].to_vec()));
            }
            2 if !live.is_empty() && live.len() < 4 => {
                let (seq, tokens) = live[rng.below(live.len())].clone();
                live.push((cache.fork(seq).unwrap(), tokens));
            }
            3 if !live.is_empty() => {
                let at = rng.below(live.len());
                cache.release(live.swap_remove(at).0).unwrap();
            }
            4 if !live.is_empty() => {
                let at = rng.below(live.len());
                let (seq, tokens) = &mut live[at];
                let to = tokens.len().saturating_sub(rng.below(100));
                match cache.truncate(*seq, to as u32) {
                    Ok(()) => tokens.truncate(to),
                    Err(error) => assert!(matches!(error, Error::InvalidArgument { .. })),
                }
            }
            5 if round % 5 == 0 => cache.clear_prefix().unwrap(),
            _ if !live.is_empty() => {
                let at = rng.below(live.len());
                let (seq, tokens) = &mut live[at];
                let count = rng.pick(&[1, 2, 5, 20, 70, 130]);
                let new: Vec<TokenId> = match rng.below(2) {
                    0 => prompt(tokens.len() + count)[tokens.len()..].to_vec(),
                    _ => (0..count).map(|_| rng.pick(&[1, 2, 3, 3, 2, 1, 2, LOUD])).collect(),
                };
                setup.go_on(&mut cache, &mut rng, (*seq, tokens), &new);
            }
            _ => {}
        }
        cache.audit().unwrap();
        for (seq, tokens) in &live {
            assert_eq!(cache.tokens(*seq).unwrap(), tokens);
        }
    }
    for (seq, _) in live {
        cache.release(seq).unwrap();
    }
    cache.clear_prefix().unwrap();
    cache.audit().unwrap();
    assert_eq!(cache.stats().staged_blocks, 0);
}
