//! A cache of sealed tiles: what a query gets depends on its tokens alone, not on chunks, hits,
//! forks, speculation or threads; and every raw slot is accounted for.

#[path = "random/mod.rs"]
mod random;

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::dtype::{FormatClass, KvFormat};
use kvcache::error::Error;
use kvcache::ids::{Namespace, SeqId, TokenId};
use kvcache::layout::{CacheSpec, GroupSpec};
use random::Rng;

const TOKENS: u32 = 32;
const LAYERS: u32 = 2;
const DIM: usize = 32;
const KV_HEADS: usize = 2;
const Q_HEADS: usize = 4;
/// A token whose keys in layer 1 are past what a scale can hold.
const LOUD: TokenId = 999_999;

fn formats() -> impl Iterator<Item = KvFormat> {
    KvFormat::ALL.iter().copied().filter(|format| format.class() == FormatClass::Tile)
}

fn options() -> CacheOptions {
    CacheOptions { blocks: 64, max_seqs: 8, threads: 1, ..CacheOptions::default() }
}

fn cache(format: KvFormat, options: &CacheOptions) -> KvCache {
    let group = GroupSpec::uniform(LAYERS, KV_HEADS as u32, DIM as u32, format);
    KvCache::new(&CacheSpec::uniform(TOKENS, group), options).unwrap()
}

/// Rows that follow from layer, position, token and what they are for.
fn rows(kind: u64, layer: u32, tokens: &[TokenId], first: usize, heads: usize) -> Vec<f32> {
    let mut rows = Vec::new();
    for (at, &token) in tokens.iter().enumerate() {
        let seed = u64::from(token) << 32 | (first + at) as u64;
        let mut rng = Rng::new(seed ^ kind << 20 ^ u64::from(layer) << 24);
        let loud = token == LOUD && kind == 1 && layer == 1;
        rows.extend((0..heads * DIM).map(|_| if loud { 1e9 } else { rng.normal() }));
    }
    rows
}

/// Appends and attends in every layer of an open step; the outputs of its rows, all layers.
fn attend(cache: &mut KvCache, step: &Step, work: &[(usize, Vec<TokenId>)]) -> Vec<Vec<f32>> {
    let mut outputs = vec![Vec::new(); work.len()];
    for layer in 0..LAYERS {
        let all = |kind: u64, heads: usize| -> Vec<f32> {
            work.iter().flat_map(|(from, new)| rows(kind, layer, new, *from, heads)).collect()
        };
        let (q, k, v) = (all(0, Q_HEADS), all(1, KV_HEADS), all(2, KV_HEADS));
        let id = LayerId::uniform(layer);
        cache.append(step, id, k[..].into(), v[..].into(), None).unwrap();
        let mut out = vec![f32::NAN; q.len()];
        let scoring = Scoring::causal(DIM as u32);
        cache.attend(step, id, q[..].into(), (&mut out[..]).into(), &scoring, None).unwrap();
        let mut at = 0;
        for (output, (_, new)) in outputs.iter_mut().zip(work) {
            let count = new.len() * Q_HEADS * DIM;
            // [token][layer] would be in order of tokens; a list a layer is enough to compare.
            output.extend_from_slice(&out[at..at + count]);
            at += count;
        }
    }
    outputs
}

/// Runs one step of one sequence and commits it; its outputs as `[layer][token]`.
fn run(cache: &mut KvCache, seq: SeqId, new: &[TokenId]) -> Vec<f32> {
    let mut step = Step::new();
    let from = cache.tokens(seq).unwrap().len();
    cache.begin(&mut step, &[Work { seq, tokens: new }]).unwrap();
    let out = attend(cache, &step, &[(from, new.to_vec())]).remove(0);
    cache.commit(&mut step).unwrap();
    cache.audit().unwrap();
    out
}

/// The last token's outputs of a step's, in all layers.
fn last(out: &[f32], new: usize) -> Vec<u32> {
    let row = Q_HEADS * DIM;
    (0..LAYERS as usize)
        .flat_map(|layer| out[(layer * new + new - 1) * row..][..row].iter().map(|x| x.to_bits()))
        .collect()
}

/// What the last of `tokens` gets when all are computed in one step by a cache of their own.
fn expected(format: KvFormat, tokens: &[TokenId]) -> Vec<u32> {
    let mut cache = cache(format, &options());
    let seq = cache.start(tokens, Namespace(0)).unwrap().seq;
    last(&run(&mut cache, seq, tokens), tokens.len())
}

fn prompt(len: usize) -> Vec<TokenId> {
    (0..len as u32).map(|at| at * 7 + 1).collect()
}

#[test]
fn chunks_hits_and_threads_do_not_change_a_bit() {
    let tokens = prompt(210);
    let mut rng = Rng::new(1);
    for format in formats() {
        let mut at_length = std::collections::BTreeMap::new();
        for round in 0..4 {
            let threads = 1 + round % 2;
            let mut cache = cache(format, &CacheOptions { threads, ..options() });
            let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
            let mut at = 0;
            while at < tokens.len() {
                let count = rng.pick(&[1, 2, 31, 32, 33, 100, 210]).min(tokens.len() - at);
                let out = run(&mut cache, seq, &tokens[at..at + count]);
                at += count;
                let bits = last(&out, count);
                let known = at_length.entry(at).or_insert_with(|| expected(format, &tokens[..at]));
                assert!(*known == bits, "{format:?} at {at}");
            }
            // Another sequence with the same beginning finds whole tiles, and goes on the same.
            let mut other = tokens[..100].to_vec();
            other.push(5);
            let started = cache.start(&other, Namespace(0)).unwrap();
            assert_eq!(started.cached_tokens, 96);
            let out = run(&mut cache, started.seq, &other[96..]);
            let known = at_length.entry(1000).or_insert_with(|| expected(format, &other));
            assert!(*known == last(&out, 5), "{format:?} after a hit");
            cache.release(seq).unwrap();
            cache.release(started.seq).unwrap();
            cache.audit().unwrap();
            assert_eq!(cache.stats().staged_blocks, 0);
        }
    }
}

#[test]
fn forks_at_every_position_of_a_tile() {
    let tokens = prompt(2 * TOKENS as usize + 2);
    for format in [KvFormat::Kt4v4, KvFormat::Kt3v3] {
        for at in TOKENS as usize - 1..=2 * TOKENS as usize {
            let mut cache = cache(format, &options());
            let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
            run(&mut cache, seq, &tokens[..at]);
            let fork = cache.fork(seq).unwrap();
            cache.audit().unwrap();
            let mut left = tokens[..at].to_vec();
            left.extend([7777, 7778]);
            let out = run(&mut cache, fork, &left[at..]);
            assert!(last(&out, 2) == expected(format, &left), "{format:?} fork at {at}");
            let out = run(&mut cache, seq, &tokens[at..]);
            let known = expected(format, &tokens);
            assert!(last(&out, tokens.len() - at) == known, "{format:?} origin at {at}");
            // Both in one step, past the end of the tile.
            let (a, b) = (prompt(40), prompt(37));
            let works = [Work { seq, tokens: &a }, Work { seq: fork, tokens: &b }];
            let mut step = Step::new();
            cache.begin(&mut step, &works).unwrap();
            let work = [(tokens.len(), a.clone()), (left.len(), b.clone())];
            let out = attend(&mut cache, &step, &work);
            cache.commit(&mut step).unwrap();
            cache.audit().unwrap();
            left.extend(&b);
            assert!(last(&out[1], b.len()) == expected(format, &left), "{format:?} at {at}");
        }
    }
}

#[test]
fn rejected_tokens_leave_no_trace() {
    let format = KvFormat::Kt4v4;
    let tokens = prompt(100);
    for at in [61, 62, 63, 64, 65] {
        let mut cache = cache(format, &options());
        let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
        run(&mut cache, seq, &tokens[..at]);
        // Four guesses, across the end of a tile; one is right.
        let guess = [tokens[at], 1, 2, 3];
        run(&mut cache, seq, &guess);
        cache.truncate(seq, at as u32 + 1).unwrap();
        cache.audit().unwrap();
        let out = run(&mut cache, seq, &tokens[at + 1..]);
        assert!(last(&out, tokens.len() - at - 1) == expected(format, &tokens), "{at}");
        // A step that is cancelled, too.
        let mut step = Step::new();
        cache.begin(&mut step, &[Work { seq, tokens: &[4; 90] }]).unwrap();
        attend(&mut cache, &step, &[(100, vec![4; 90])]);
        cache.cancel(&mut step).unwrap();
        cache.audit().unwrap();
        let mut more = tokens.clone();
        more.push(11);
        assert!(last(&run(&mut cache, seq, &[11]), 1) == expected(format, &more), "{at}");
        // Far back only whole tiles can be kept.
        let before = cache.tokens(seq).unwrap().len();
        let refused = cache.truncate(seq, 40).unwrap_err();
        assert!(matches!(refused, Error::InvalidArgument { .. }), "{refused:?}");
        assert_eq!(cache.tokens(seq).unwrap().len(), before);
        cache.truncate(seq, 32).unwrap();
        cache.audit().unwrap();
        let out = run(&mut cache, seq, &tokens[32..]);
        assert!(last(&out, tokens.len() - 32) == expected(format, &tokens), "{at}");
    }
}

#[test]
fn what_cannot_be_sealed_stays_raw_and_says_so() {
    let format = KvFormat::Kt4v4;
    let mut tokens = prompt(200);
    tokens[70] = LOUD;
    let known = expected(format, &tokens);
    for chunk in [1, 7, 200] {
        let mut cache = cache(format, &options());
        let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
        let mut bits = Vec::new();
        for new in tokens.chunks(chunk) {
            bits = last(&run(&mut cache, seq, new), new.len());
        }
        assert!(bits == known, "{chunk}");
        assert_eq!(cache.stats().unsealed_blocks, 1, "{chunk}");
        // Tile 2 is raw: only the two before it are found, and forks read it raw as well.
        let fork = cache.fork(seq).unwrap();
        let mut more = tokens.clone();
        more.push(3);
        assert!(last(&run(&mut cache, fork, &[3]), 1) == expected(format, &more));
        assert_eq!(cache.start(&more, Namespace(0)).unwrap().cached_tokens, 64);
        cache.release(seq).unwrap();
        cache.release(fork).unwrap();
        cache.audit().unwrap();
        assert_eq!(cache.stats().staged_blocks, 0);
    }
}

#[test]
fn a_full_staging_pool_is_an_answer() {
    let options = CacheOptions { staging_blocks: 2, ..options() };
    let mut cache = cache(KvFormat::Kt8v8, &options);
    let tokens = prompt(10);
    let seqs: Vec<_> = (0..3).map(|n| cache.start(&tokens, Namespace(n)).unwrap().seq).collect();
    run(&mut cache, seqs[0], &tokens);
    run(&mut cache, seqs[1], &tokens);
    let mut step = Step::new();
    let work = [Work { seq: seqs[2], tokens: &tokens }];
    let refused = cache.begin(&mut step, &work).unwrap_err();
    assert_eq!(refused, Error::OutOfBlocks { needed: 1, missing: 1 });
    cache.audit().unwrap();
    cache.release(seqs[0]).unwrap();
    run(&mut cache, seqs[2], &tokens);
    // Two tiles at a time are enough, whatever the length of a step.
    cache.release(seqs[2]).unwrap();
    run(&mut cache, seqs[1], &prompt(500));
    assert_eq!(cache.stats().staging_blocks, 2);
}

#[test]
fn layers_must_take_turns() {
    let mut cache = cache(KvFormat::Kt4v4, &options());
    let tokens = prompt(100);
    let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    for layer in 0..LAYERS {
        let (k, v) = (rows(1, layer, &tokens, 0, KV_HEADS), rows(2, layer, &tokens, 0, KV_HEADS));
        cache.append(&step, LayerId::uniform(layer), k[..].into(), v[..].into(), None).unwrap();
    }
    let q = rows(0, 0, &tokens, 0, Q_HEADS);
    let mut out = vec![0.0; q.len()];
    let scoring = Scoring::causal(DIM as u32);
    let refused = cache
        .attend(&step, LayerId::uniform(0), q[..].into(), (&mut out[..]).into(), &scoring, None)
        .unwrap_err();
    assert!(matches!(refused, Error::InvalidState { .. }));
}

#[test]
fn steps_must_take_turns_too() {
    let mut cache = cache(KvFormat::Kt4v4, &options());
    let prompts = [prompt(100), prompt(120)];
    let seqs = prompts.each_ref().map(|tokens| cache.start(tokens, Namespace(0)).unwrap().seq);
    let mut steps = [Step::new(), Step::new()];
    for ((step, seq), tokens) in steps.iter_mut().zip(seqs).zip(&prompts) {
        cache.begin(step, &[Work { seq, tokens }]).unwrap();
    }
    let layer = LayerId::uniform(0);
    let append = |cache: &mut KvCache, at: usize| {
        let tokens = &prompts[at];
        let (k, v) = (rows(1, 0, tokens, 0, KV_HEADS), rows(2, 0, tokens, 0, KV_HEADS));
        cache.append(&steps[at], layer, k[..].into(), v[..].into(), None).unwrap();
    };
    let attend = |cache: &mut KvCache, at: usize| {
        let q = rows(0, 0, &prompts[at], 0, Q_HEADS);
        let (mut out, scoring) = (vec![0.0; q.len()], Scoring::causal(DIM as u32));
        let (q, to) = (q[..].into(), (&mut out[..]).into());
        cache.attend(&steps[at], layer, q, to, &scoring, None).map(|()| out)
    };
    append(&mut cache, 0);
    let alone = attend(&mut cache, 0).unwrap();
    append(&mut cache, 1);
    // The raw rows in scratch are those of the other step.
    assert!(matches!(attend(&mut cache, 0), Err(Error::InvalidState { .. })));
    attend(&mut cache, 1).unwrap();
    append(&mut cache, 0);
    assert_eq!(attend(&mut cache, 0).unwrap(), alone);
}

/// Random operations beside a list of what each sequence holds.
#[test]
fn random_operations() {
    let mut rng = Rng::new(3);
    for format in [KvFormat::Kt4v4, KvFormat::Kt2v2] {
        let options = CacheOptions { blocks: 24, max_seqs: 5, ..options() };
        let mut cache = cache(format, &options);
        let mut live: Vec<(SeqId, Vec<TokenId>)> = Vec::new();
        for round in 0..150 {
            match rng.below(10) {
                0 | 1 if live.len() < 5 => {
                    let len = 1 + rng.below(90);
                    let tokens = prompt(len);
                    let started = cache.start(&tokens, Namespace(0)).unwrap();
                    assert!(started.cached_tokens.is_multiple_of(TOKENS));
                    live.push((started.seq, tokens[..started.cached_tokens as usize].to_vec()));
                }
                2 if !live.is_empty() && live.len() < 5 => {
                    let (seq, tokens) = live[rng.below(live.len())].clone();
                    live.push((cache.fork(seq).unwrap(), tokens));
                }
                3 if !live.is_empty() => {
                    let at = rng.below(live.len());
                    cache.release(live.swap_remove(at).0).unwrap();
                }
                4 | 5 if !live.is_empty() => {
                    let at = rng.below(live.len());
                    let (seq, tokens) = &mut live[at];
                    let to = tokens.len().saturating_sub(rng.below(40));
                    match cache.truncate(*seq, to as u32) {
                        Ok(()) => tokens.truncate(to),
                        Err(error) => {
                            assert!(matches!(error, Error::InvalidArgument { .. }));
                            assert!(!to.is_multiple_of(TOKENS as usize));
                        }
                    }
                }
                _ if !live.is_empty() => {
                    let at = rng.below(live.len());
                    let (seq, tokens) = &mut live[at];
                    let count = rng.pick(&[1, 1, 3, 20, 32, 70]);
                    let new: Vec<_> = (0..count as u32).map(|_| 1 + rng.below(3) as u32).collect();
                    let mut step = Step::new();
                    match cache.begin(&mut step, &[Work { seq: *seq, tokens: &new }]) {
                        Err(Error::OutOfBlocks { .. }) => {}
                        Err(error) => panic!("{error:?}"),
                        Ok(()) => {
                            let work = [(tokens.len(), new.clone())];
                            let out = attend(&mut cache, &step, &work).remove(0);
                            if rng.below(5) == 0 {
                                cache.cancel(&mut step).unwrap();
                            } else {
                                cache.commit(&mut step).unwrap();
                                tokens.extend(&new);
                                if round % 5 == 0 {
                                    let bits = last(&out, new.len());
                                    assert!(bits == expected(format, tokens), "{format:?} {round}");
                                }
                            }
                        }
                    }
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
        cache.audit().unwrap();
        assert_eq!(cache.stats().staged_blocks, 0);
    }
}
