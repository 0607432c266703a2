//! Sealed tiles with raw sinks: the first tiles of a sequence are read raw by everybody, whether they
//! were computed, forked or found, and their raw rows are accounted for. And layers in a format of
//! their own.

#[path = "random/mod.rs"]
mod random;

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, TierOptions, Work};
use kvcache::dtype::KvFormat;
use kvcache::error::Error;
use kvcache::ids::{Namespace, SeqId, TokenId};
use kvcache::layout::{CacheSpec, GroupSpec};
use random::Rng;

const TOKENS: u32 = 32;
const DIM: usize = 32;
const KV_HEADS: usize = 2;
const Q_HEADS: usize = 4;
const LONG: std::time::Duration = std::time::Duration::from_secs(30);

fn group(format: KvFormat, sink_tokens: u32) -> GroupSpec {
    GroupSpec { sink_tokens, ..GroupSpec::uniform(1, KV_HEADS as u32, DIM as u32, format) }
}

fn options() -> CacheOptions {
    CacheOptions { blocks: 64, max_seqs: 6, threads: 1, ..CacheOptions::default() }
}

fn cache(format: KvFormat, sink_tokens: u32, options: &CacheOptions) -> KvCache {
    let spec = CacheSpec::uniform(TOKENS, group(format, sink_tokens));
    KvCache::new(&spec, options).unwrap()
}

/// Rows that follow from the position, the token and what they are for. The first tokens are loud:
/// sealed tiles read them coarsely.
fn rows(kind: u64, tokens: &[TokenId], first: usize, heads: usize) -> Vec<f32> {
    let mut rows = Vec::new();
    for (at, &token) in tokens.iter().enumerate() {
        let mut rng = Rng::new((u64::from(token) << 32 | (first + at) as u64) ^ kind << 24);
        let scale = if first + at == 1 && kind == 1 { 8.0 } else { 1.0 };
        rows.extend((0..heads * DIM).map(|_| scale * rng.normal()));
    }
    rows
}

/// Appends and attends in an open step of one sequence; its outputs, all groups.
fn attend(cache: &mut KvCache, step: &Step, from: usize, new: &[TokenId]) -> Vec<f32> {
    let mut outputs = Vec::new();
    for group in 0..cache.spec().groups.len() as u32 {
        let layer = LayerId { group, layer: 0 };
        let (q, k) = (rows(0, new, from, Q_HEADS), rows(1, new, from, KV_HEADS));
        let v = rows(2, new, from, KV_HEADS);
        cache.append(step, layer, k[..].into(), v[..].into(), None).unwrap();
        let mut out = vec![f32::NAN; q.len()];
        let scoring = Scoring::causal(DIM as u32);
        cache.attend(step, layer, q[..].into(), (&mut out[..]).into(), &scoring, None).unwrap();
        outputs.extend(out);
    }
    outputs
}

/// Runs one step of one sequence and commits it.
fn run(cache: &mut KvCache, seq: SeqId, new: &[TokenId]) -> Vec<f32> {
    let mut step = Step::new();
    let from = cache.tokens(seq).unwrap().len();
    cache.begin(&mut step, &[Work { seq, tokens: new }]).unwrap();
    let out = attend(cache, &step, from, new);
    cache.commit(&mut step).unwrap();
    cache.audit().unwrap();
    out
}

/// The last token's outputs in a cache of one group.
fn last(out: &[f32]) -> Vec<u32> {
    out[out.len() - Q_HEADS * DIM..].iter().map(|x| x.to_bits()).collect()
}

/// What the last of `tokens` gets when all are computed in one step by a cache of their own.
fn expected(format: KvFormat, sink_tokens: u32, tokens: &[TokenId]) -> Vec<u32> {
    let mut cache = cache(format, sink_tokens, &options());
    let seq = cache.start(tokens, Namespace(0)).unwrap().seq;
    last(&run(&mut cache, seq, tokens))
}

fn prompt(len: usize) -> Vec<TokenId> {
    (0..len as u32).map(|at| at * 7 + 1).collect()
}

#[test]
fn sinks_are_read_raw_and_the_rest_as_sealed() {
    for (format, sinks) in [(KvFormat::Kt2v2, 1), (KvFormat::Kt4v4, 2), (KvFormat::Kt3v3, 3)] {
        let tokens = prompt(150);
        let raw = expected(KvFormat::Bf16, 0, &tokens);
        let error = |bits: &[u32]| -> f64 {
            let pairs =
                bits.iter().zip(&raw).map(|(&a, &b)| (f32::from_bits(a), f32::from_bits(b)));
            pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
        };
        let sealed = error(&expected(format, 0, &tokens));
        let sunk = error(&expected(format, sinks * TOKENS, &tokens));
        assert!(sunk > 0.0 && sunk < 0.9 * sealed, "{format:?}: {sunk} of {sealed}");
        // All raw where the sinks are as long as the sequence.
        let all = error(&expected(format, 5 * TOKENS, &tokens));
        assert!(!(all > 1e-3 * sealed), "{format:?}: {all} of {sealed}");
    }
}

#[test]
fn chunks_hits_and_forks_do_not_change_a_bit() {
    let (format, tokens) = (KvFormat::Kt4v4, prompt(140));
    let mut rng = Rng::new(4);
    for sinks in [TOKENS, 2 * TOKENS] {
        for _ in 0..4 {
            let mut cache = cache(format, sinks, &options());
            let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
            let mut at = 0;
            while at < tokens.len() {
                let count = rng.pick(&[1, 5, 31, 32, 33, 100]).min(tokens.len() - at);
                let out = run(&mut cache, seq, &tokens[at..at + count]);
                at += count;
                assert!(last(&out) == expected(format, sinks, &tokens[..at]), "{sinks} at {at}");
            }
            // Found, with their raw rows, after the first sequence is gone too.
            for len in [40, 80, 120] {
                let mut other = tokens[..len].to_vec();
                other.push(5);
                let started = cache.start(&other, Namespace(0)).unwrap();
                assert_eq!(started.cached_tokens, len as u32 / TOKENS * TOKENS);
                let fork = cache.fork(started.seq).unwrap();
                let new = &other[started.cached_tokens as usize..];
                let out = run(&mut cache, started.seq, new);
                assert!(last(&out) == expected(format, sinks, &other), "{sinks} hit of {len}");
                let out = run(&mut cache, fork, new);
                assert!(last(&out) == expected(format, sinks, &other), "{sinks} fork at {len}");
                cache.release(fork).unwrap();
                cache.release(started.seq).unwrap();
                if len == 40 {
                    cache.release(seq).unwrap();
                }
                cache.audit().unwrap();
            }
            // The sinks of what is cached are all that is left in the staging pool.
            assert_eq!(cache.stats().staged_blocks, sinks / TOKENS);
            cache.clear_prefix().unwrap();
            cache.audit().unwrap();
            assert_eq!(cache.stats().staged_blocks, 0);
        }
    }
}

#[test]
fn a_sink_that_is_cut_and_written_again_leaves_that_of_others() {
    let (format, tokens) = (KvFormat::Kt4v4, prompt(100));
    let mut cache = cache(format, TOKENS, &options());
    let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
    run(&mut cache, seq, &tokens);
    let mut other = tokens[..20].to_vec();
    cache.truncate(seq, 20).unwrap();
    cache.audit().unwrap();
    other.extend(prompt(90).iter().map(|token| token + 1));
    let out = run(&mut cache, seq, &other[20..]);
    assert!(last(&out) == expected(format, TOKENS, &other));
    let started = cache.start(&tokens, Namespace(0)).unwrap();
    assert_eq!(started.cached_tokens, 96);
    let out = run(&mut cache, started.seq, &tokens[96..]);
    assert!(last(&out) == expected(format, TOKENS, &tokens));
    // The same after the index lost the block that the sequence goes on with.
    cache.release(started.seq).unwrap();
    cache.clear_prefix().unwrap();
    cache.truncate(seq, 10).unwrap();
    let out = run(&mut cache, seq, &tokens[10..]);
    let mut mixed = other[..10].to_vec();
    mixed.extend(&tokens[10..]);
    assert!(last(&out) == expected(format, TOKENS, &mixed));
}

#[test]
fn slots_of_unused_sinks_are_had_by_eviction_and_others_are_not() {
    let options = CacheOptions { staging_blocks: 4, ..options() };
    let mut cache = cache(KvFormat::Kt4v4, TOKENS, &options);
    let tokens = prompt(40);
    // Prefixes of tenants that are gone: a step takes two slots, for the sink and for the tile that is
    // being filled, the fourth's that of the first.
    for space in 0..4 {
        let seq = cache.start(&tokens, Namespace(space)).unwrap().seq;
        run(&mut cache, seq, &tokens);
        cache.release(seq).unwrap();
    }
    assert_eq!(cache.stats().staged_blocks, 3);
    let held = cache.start(&tokens, Namespace(9)).unwrap().seq;
    run(&mut cache, held, &tokens);
    assert_eq!(cache.start(&tokens, Namespace(0)).unwrap().cached_tokens, 0);
    let third = cache.start(&tokens, Namespace(3)).unwrap();
    assert_eq!(third.cached_tokens, 32);
    run(&mut cache, third.seq, &tokens[32..]);
    // Now every slot is used: an answer, and nothing is evicted.
    let fourth = cache.start(&tokens, Namespace(10)).unwrap().seq;
    let (mut step, before) = (Step::new(), cache.stats());
    let refused = cache.begin(&mut step, &[Work { seq: fourth, tokens: &tokens }]).unwrap_err();
    assert_eq!(refused, Error::OutOfBlocks { needed: 2, missing: 2 });
    assert_eq!(cache.stats().evicted_blocks, before.evicted_blocks);
    cache.audit().unwrap();
    cache.release(held).unwrap();
    run(&mut cache, fourth, &tokens);
}

#[test]
fn what_cannot_have_sinks_refuses_them() {
    let new = |format, sinks| {
        KvCache::new(&CacheSpec::uniform(TOKENS, group(format, sinks)), &options()).unwrap_err()
    };
    for (format, sinks) in [(KvFormat::Kt4v4, 31), (KvFormat::Kt4v4, 33), (KvFormat::Bf16, 32)] {
        assert!(matches!(new(format, sinks), Error::InvalidArgument { .. }), "{format:?} {sinks}");
    }
}

#[test]
fn random_operations() {
    operate(8, None);
    // What is evicted comes back, now and then by layers.
    operate(9, Some(TierOptions::host("m", 200)));
}

fn operate(seed: u64, tiers: Option<TierOptions>) {
    let mut rng = Rng::new(seed);
    let blocks = if tiers.is_some() { 12 } else { 24 };
    let options = CacheOptions { blocks, max_seqs: 5, staging_blocks: 12, ..options() };
    let mut cache = cache(KvFormat::Kt4v4, 2 * TOKENS, &options);
    let tiered = tiers.is_some();
    tiers.into_iter().for_each(|tiers| cache.attach_tiers(tiers).unwrap());
    let mut live: Vec<(SeqId, Vec<TokenId>)> = Vec::new();
    for round in 0..400 {
        match rng.below(10) {
            0 | 1 if live.len() < 5 => {
                let tokens = prompt(1 + rng.below(120));
                let space = Namespace(rng.below(4) as u64);
                let started = match tiered && rng.below(2) == 0 {
                    true => cache.start_onboarding(&tokens, &[], space).unwrap(),
                    false => cache.start(&tokens, space).unwrap(),
                };
                assert!(cache.wait_layer(started.seq, LayerId::uniform(0), LONG).unwrap());
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
                let to = tokens.len().saturating_sub(rng.below(60));
                match cache.truncate(*seq, to as u32) {
                    Ok(()) => tokens.truncate(to),
                    Err(error) => assert!(matches!(error, Error::InvalidArgument { .. })),
                }
            }
            6 if round % 7 == 0 => cache.clear_prefix().unwrap(),
            _ if !live.is_empty() => {
                let at = rng.below(live.len());
                let (seq, tokens) = &mut live[at];
                let count = rng.pick(&[1, 1, 3, 20, 32, 70]);
                let new: Vec<_> = match rng.below(2) {
                    0 => prompt(tokens.len() + count)[tokens.len()..].to_vec(),
                    _ => (0..count).map(|_| 1 + rng.below(3) as u32).collect(),
                };
                let mut step = Step::new();
                match cache.begin(&mut step, &[Work { seq: *seq, tokens: &new }]) {
                    Err(Error::OutOfBlocks { .. }) => {}
                    Err(error) => panic!("{error:?}"),
                    Ok(()) => {
                        let out = attend(&mut cache, &step, tokens.len(), &new);
                        if rng.below(5) == 0 {
                            cache.cancel(&mut step).unwrap();
                        } else {
                            cache.commit(&mut step).unwrap();
                            tokens.extend(&new);
                            if round % 3 == 0 {
                                let known = expected(KvFormat::Kt4v4, 2 * TOKENS, tokens);
                                assert!(last(&out) == known, "{round}");
                            }
                        }
                    }
                }
            }
            _ => {}
        }
        cache.audit().unwrap();
    }
    let loaded = cache.tier_reports().first().map_or(0, |report| report.counters.loaded);
    assert_eq!(loaded > 0, tiered);
}

#[test]
fn a_layer_group_has_a_format_of_its_own() {
    // The first layer in f16, the second in tiles with a sink, the third without, the fourth in INT8_T.
    let formats = [KvFormat::F16, KvFormat::Kt2v2, KvFormat::Kt4v4, KvFormat::Int8T];
    let sinks = [0, TOKENS, 0, 0];
    let groups = formats.iter().zip(sinks).map(|(&format, sinks)| group(format, sinks)).collect();
    let mut cache = KvCache::new(&CacheSpec { block_tokens: TOKENS, groups }, &options()).unwrap();
    let tokens = prompt(110);
    let seq = cache.start(&tokens, Namespace(0)).unwrap().seq;
    run(&mut cache, seq, &tokens[..50]);
    let out = run(&mut cache, seq, &tokens[50..]);
    let same = |out: &[f32]| {
        for (n, part) in out.chunks_exact(out.len() / formats.len()).enumerate() {
            let known = expected(formats[n], sinks[n], &tokens);
            let known = known.iter().map(|&bits| f32::from_bits(bits));
            // Chunks change the order of sums where tiles do not fix it.
            let part = &part[part.len() - Q_HEADS * DIM..];
            assert!(part.iter().zip(known).all(|(a, b)| (a - b).abs() < 1e-5), "{:?}", formats[n]);
        }
    };
    same(&out);
    // And all are found by a prompt that begins so.
    let started = cache.start(&tokens, Namespace(0)).unwrap();
    assert_eq!(started.cached_tokens, 96);
    same(&run(&mut cache, started.seq, &tokens[96..]));
}
