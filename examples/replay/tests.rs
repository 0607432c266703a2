//! Replays of small traces against a naive cache, the optimum against a search of all choices, and,
//! where `KVCACHE_TRACES` names a folder with them, the real traces against known figures.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::cache::{Policy, Setup, replay};
use crate::expand::{Prompts, block};
use crate::optimum::Future;
use crate::plot::{Line, svg};
use crate::report::Outcome;
use crate::tiers::{self, TierOutcome, TierSetup};
use crate::trace::{Ids, Trace};

fn run(trace: &Trace, policy: Policy, capacity_blocks: u32) -> Outcome {
    let setup = Setup { policy, capacity_blocks, block_tokens: trace.block_tokens, lies: 0.0 };
    replay(trace, setup, &mut |_| ()).unwrap()
}

/// The ids of each request, with their space.
fn paths(trace: &Trace) -> Vec<Vec<(u32, u32)>> {
    let path = |request: &crate::trace::Request| {
        let ids = trace.ids_of(request).iter();
        ids.flat_map(|run| (run.start..run.start + run.count).map(|id| (request.space, id)))
            .collect()
    };
    trace.requests.iter().map(path).collect()
}

/// Hits and evictions of LRU as vLLM orders it: the blocks of a request queue up at its end, the
/// last of them first.
fn naive_lru(trace: &Trace, capacity: usize) -> (u64, u64) {
    let (mut stamps, mut clock) = (BTreeMap::new(), 0u64);
    let (mut hits, mut evictions) = (0, 0);
    for path in paths(trace) {
        hits += path.iter().take_while(|id| stamps.contains_key(*id)).count() as u64;
        for id in path.iter().rev() {
            clock += 1;
            stamps.insert(*id, clock);
        }
        while stamps.len() > capacity {
            let oldest = *stamps.iter().min_by_key(|(_, stamp)| **stamp).unwrap().0;
            stamps.remove(&oldest);
            evictions += 1;
        }
    }
    (hits, evictions)
}

#[test]
fn lru_is_the_naive_cache() {
    let trace = Trace::synthetic();
    let references: u64 = trace.requests.iter().map(|r| trace.blocks_of(r)).sum();
    let distinct = Future::of(&trace).distinct_blocks;
    let longest = trace.requests.iter().map(|r| trace.blocks_of(r)).max().unwrap();
    for capacity in [longest, 400, 1000, distinct] {
        let outcome = run(&trace, Policy::Lru, capacity as u32);
        let (hits, evictions) = naive_lru(&trace, capacity as usize);
        assert_eq!((outcome.hit_blocks, outcome.evictions), (hits, evictions), "{capacity}");
        assert_eq!(outcome.requested_blocks, references);
        assert_eq!(outcome.peak_blocks, capacity.min(distinct));
        let wasted = references * 64 - trace.requests.iter().map(|r| r.tokens).sum::<u64>();
        let fraction = wasted as f64 / (references * 64) as f64;
        assert!((outcome.waste_fraction() - fraction).abs() <= 1e-12);
    }
}

#[test]
fn every_policy_lies_between_nothing_and_the_optimum() {
    let trace = Trace::synthetic();
    let future = Future::of(&trace);
    for capacity in [400, 1000] {
        let optimum = future.optimum(u64::from(capacity));
        assert!(optimum <= future.ideal_hit_blocks);
        for (policy, name) in Policy::ALL {
            let outcome = run(&trace, policy, capacity);
            assert!(0 < outcome.hit_blocks && outcome.hit_blocks <= optimum, "{name}");
        }
        // Knowing what ended is worth something.
        let hits = |policy| run(&trace, policy, capacity).hit_blocks;
        assert!(hits(Policy::Ended) > hits(Policy::Lru));
    }
    for (policy, name) in Policy::ALL {
        let all = run(&trace, policy, future.distinct_blocks as u32);
        assert_eq!((all.hit_blocks, all.evictions), (future.ideal_hit_blocks, 0), "{name}");
    }
}

#[test]
fn smaller_blocks_hit_the_same_tokens_where_nothing_is_evicted() {
    let trace = Trace::synthetic();
    let future = Future::of(&trace);
    let setup = Setup {
        policy: Policy::Lru,
        capacity_blocks: future.distinct_blocks as u32 * 4,
        block_tokens: 16,
        lies: 0.0,
    };
    let outcome = replay(&trace, setup, &mut |_| ()).unwrap();
    assert_eq!(outcome.hit_blocks, future.ideal_hit_blocks * 4);
}

/// A trace of some requests, given as ids.
fn small(requests: &[&[u32]]) -> Trace {
    let row = |ids: &&[u32]| {
        let length = ids.len() * 512;
        format!("{{\"timestamp\": 0, \"input_length\": {length}, \"hash_ids\": {ids:?}}}\n")
    };
    Trace::parse(&requests.iter().map(row).collect::<String>(), 1).unwrap()
}

/// The most hits that any choice of what to keep can have, by trying all.
fn best(paths: &[Vec<(u32, u32)>], kept: &BTreeSet<(u32, u32)>, capacity: usize) -> u64 {
    let Some((path, rest)) = paths.split_first() else { return 0 };
    let hits = path.iter().take_while(|id| kept.contains(*id)).count() as u64;
    let all: Vec<_> = kept.union(&path.iter().copied().collect()).copied().collect();
    let choices = (0u32..1 << all.len()).filter(|set| set.count_ones() as usize <= capacity);
    let chosen = |set: u32| (0..all.len()).filter(|i| set >> i & 1 == 1).map(|i| all[i]).collect();
    hits + choices.map(|set| best(rest, &chosen(set), capacity)).max().unwrap_or(0)
}

#[test]
fn the_optimum_is_the_best_of_all_choices() {
    for requests in [
        &[&[1, 2][..], &[1, 3], &[4], &[1, 2, 5], &[4, 6], &[1, 3]][..],
        &[&[1, 2, 3], &[4], &[1, 2, 3], &[4], &[1, 2]],
        &[&[7], &[8, 9], &[7, 1], &[8], &[7, 1], &[8, 9]],
    ] {
        let trace = small(requests);
        let (future, paths) = (Future::of(&trace), paths(&trace));
        for capacity in 0..4 {
            let best = best(&paths, &BTreeSet::new(), capacity);
            assert_eq!(future.optimum(capacity as u64), best, "{requests:?} {capacity}");
        }
        let distinct: BTreeSet<_> = paths.iter().flatten().collect();
        assert_eq!(future.distinct_blocks, distinct.len() as u64);
    }
}

#[test]
fn prompts_are_the_blocks_of_their_ids() {
    let trace = Trace::synthetic();
    let mut prompts = Prompts::of(&trace);
    let (mut before, mut shared) = (BTreeMap::<u32, Vec<u32>>::new(), 0);
    for (n, (request, path)) in trace.requests.iter().zip(paths(&trace)).enumerate() {
        let mut want = vec![0; path.len() * 64];
        for ((_, id), tokens) in path.iter().zip(want.chunks_exact_mut(64)) {
            block(*id, tokens);
        }
        let prompt = prompts.expand(&trace, n);
        assert!(prompt.tokens == want, "request {n}");
        let old = before.entry(request.stream).or_default();
        assert_eq!(old[..prompt.shared_tokens], want[..prompt.shared_tokens]);
        shared += prompt.shared_tokens;
        *old = want;
    }
    assert!(shared > 0);
}

#[test]
fn sessions_are_served_by_so_many_users() {
    let session = |start: u32| {
        format!(
            r#"{{"block_size": 64, "requests": [
                {{"t": 0.0, "type": "n", "in": 130, "stop": "tool_use", "api_time": 1.0,
                  "hash_runs": [[{start}, 2]]}},
                {{"t": 2.0, "type": "subagent", "requests": [
                  {{"t": 0.5, "type": "n", "in": 64, "stop": "", "hash_runs": [[90, 1]]}}]}},
                {{"t": 5.0, "type": "n", "in": 200, "stop": "end_turn", "api_time": 1.0,
                  "hash_runs": [[{start}, 2], [70, 1]]}}]}}"#
        )
        .replace('\n', " ")
    };
    let text = format!("{}\n{}\n{}\n", session(1), session(1), session(4));
    let trace = Trace::parse(&text, 2).unwrap();
    let times: Vec<_> = trace.requests.iter().map(|r| (r.time_ms, r.space)).collect();
    // The third session begins when the first of the users is free.
    let want = [
        (0, 0),
        (0, 1),
        (2500, 0),
        (2500, 1),
        (5000, 0),
        (5000, 1),
        (6000, 2),
        (8500, 2),
        (11000, 2),
    ];
    assert_eq!(times, want);
    assert_eq!((trace.block_tokens, trace.streams), (64, 6));
    let last = |r: &crate::trace::Request| (r.last, r.tool_call);
    let first: Vec<_> = trace.requests.iter().filter(|r| r.space == 0).map(last).collect();
    assert_eq!(first, [(false, true), (true, false), (true, false)]);
    // Equal ids of two sessions are not the same.
    assert_eq!(Future::of(&trace).ideal_hit_blocks, 3 * 2);
    assert_eq!(run(&trace, Policy::Lru, 100).hit_blocks, 3 * 2);
}

#[test]
fn bad_traces_are_errors() {
    for text in [
        "",
        "{}",
        "nonsense",
        r#"{"timestamp": 0, "input_length": 5, "hash_ids": [-1]}"#,
        r#"{"timestamp": 0, "hash_ids": [1]}"#,
        r#"{"block_size": 0, "requests": []}"#,
        r#"{"block_size": 64, "requests": [{"t": 0, "in": 1, "hash_runs": [[4294967295, 9]]}]}"#,
    ] {
        assert!(Trace::parse(text, 1).is_err(), "{text}");
    }
    assert!(Trace::open(Path::new("no/such/trace"), 1).is_err());
    for words in [&["t", "--users", "0"][..], &["t", "--lies", "2"], &["t", "u"], &[], &["-x"]] {
        assert!(crate::args::parse(words.iter().map(|w| w.to_string())).is_err(), "{words:?}");
    }
}

#[test]
fn runs_of_ids_are_joined() {
    let trace = small(&[&[5, 6, 7, 9, 10]]);
    assert_eq!(trace.ids, [Ids { start: 5, count: 3 }, Ids { start: 9, count: 2 }]);
}

#[test]
fn a_plot_has_a_line_for_each_policy() {
    let lines = [("a < b", [1.0, 20.0]), ("c", [5.0, 35.0])];
    let lines = lines.map(|(name, rates)| Line { name: name.into(), rates: rates.to_vec() });
    let text = svg("hits & misses", &[10, 20], &lines);
    assert_eq!(text.matches("<polyline").count(), 2);
    assert!(text.contains("a &lt; b") && text.contains("hits &amp; misses"));
    assert!(!text.contains("NaN") && text.ends_with("</svg>\n"));
}

/// A real trace, where there is one.
fn real(name: &str) -> Option<Trace> {
    let found = std::env::var_os("KVCACHE_TRACES").map(|dir| PathBuf::from(dir).join(name));
    match found.filter(|path| path.exists()) {
        Some(path) => Some(Trace::open(&path, 64).unwrap()),
        None => {
            println!("skipped: KVCACHE_TRACES names no folder with {name}");
            None
        }
    }
}

#[test]
fn the_conversation_trace_has_the_known_hits() {
    let Some(trace) = real("mooncake_conversation_trace.jsonl") else { return };
    let future = Future::of(&trace);
    assert_eq!((future.ideal_hit_blocks, future.distinct_blocks), (105_710, 182_790));
    for (capacity, hits, evictions, optimum) in [
        (1_000, 12_847, 274_653, 55_019),
        (3_000, 18_850, 266_650, 84_953),
        (10_000, 61_046, 217_454, 105_710),
        (30_000, 93_978, 164_522, 105_710),
        (50_000, 102_290, 136_210, 105_710),
    ] {
        let outcome = run(&trace, Policy::Lru, capacity);
        assert_eq!((outcome.hit_blocks, outcome.evictions), (hits, evictions));
        assert_eq!(future.optimum(capacity.into()), optimum);
    }
}

#[test]
fn hints_close_a_third_of_the_gap_to_the_optimum() {
    let Some(trace) = real("claude_code_sessions.jsonl.gz") else { return };
    let future = Future::of(&trace);
    assert_eq!(future.distinct_blocks, 3_450_959);
    let lru = run(&trace, Policy::Lru, 131_072).hit_blocks;
    let optimum = future.optimum(131_072);
    for policy in [Policy::Ended, Policy::Hints] {
        let hits = run(&trace, policy, 131_072).hit_blocks;
        assert!((hits - lru) * 3 >= optimum - lru, "{lru} {hits} {optimum}");
    }
}

fn tiered(
    trace: &Trace,
    device_blocks: u32,
    host_blocks: usize,
    disk_blocks: usize,
) -> TierOutcome {
    let setup = TierSetup {
        device_blocks,
        host_blocks,
        disk_blocks,
        token_bytes: 1e5,
        prefill_seconds: 5e-5,
        bandwidth: 2e10,
        disk_bandwidth: 5e9,
    };
    tiers::replay(trace, &setup, &mut |_| {}).unwrap()
}

#[test]
fn a_host_tier_gives_back_what_the_device_evicts() {
    let trace = Trace::synthetic();
    let needed = trace.requests.iter().map(|r| trace.blocks_of(r)).max().unwrap() as u32;
    let alone = tiered(&trace, needed + 1, 0, 0);
    let with_host = tiered(&trace, needed + 1, 100_000, 0);
    assert!(alone.host_hits == 0 && with_host.host_hits > 0);
    // Nothing that was computed once is computed again.
    assert_eq!(with_host.hits(), Future::of(&trace).ideal_hit_blocks);
    assert!(with_host.hits() > alone.hits());
    assert!(with_host.kept > 0 && with_host.demoted > 0);
}

#[test]
fn the_conversation_trace_reaches_its_rate_with_a_host_tier() {
    let Some(trace) = real("mooncake_conversation_trace.jsonl") else { return };
    let outcome = tiered(&trace, 10_000, 50_000, 0);
    assert!(outcome.hits() * 1000 >= outcome.requested_blocks * 353, "{outcome:?}");
}

#[test]
fn a_disk_tier_gives_back_what_host_and_device_evict() {
    let mut trace = Trace::synthetic();
    trace.requests.truncate(300);
    let needed = trace.requests.iter().map(|r| trace.blocks_of(r)).max().unwrap() as u32;
    let ideal = Future::of(&trace).ideal_hit_blocks;
    // A prefetch brings no more than the host has room for.
    for host_blocks in [0, needed as usize] {
        let outcome = tiered(&trace, needed + 1, host_blocks, 100_000);
        assert_eq!((outcome.hits(), outcome.dropped), (ideal, 0), "{outcome:?}");
        assert!(outcome.disk_hits > 0 && outcome.written > 0);
    }
}
