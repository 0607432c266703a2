//! The prefix index with 100,000 blocks of 16 tokens from 10,000 sequences: 40 system prompts of
//! 247 blocks, each with 250 continuations of 9 blocks, so that a prompt has 4,096 tokens.
//!
//! Lookups ask for prompts that are in the processor's caches, as one that was just tokenized is
//! (64 in turn), and for prompts that are not (2,000 in turn). `hit`: all is cached; `half`: the
//! first 2,048 tokens are; `miss`: nothing is. Each writes the block ids it found and the tail.
//! `tenant` asks in a namespace of its own, which has something, for prompts that another has and
//! for prompts that nobody has: both miss, and must take the same time. Insertion and eviction are
//! given per block that is new or goes; `insert` walks down from the root and compares what is there
//! already, `insert below` resumes where the lookup of the prompt ended. `flat` is the same number of
//! blocks without anything shared: 10,000 sequences of 10 blocks. `a block at a time`: 64 sequences that grow to 256 blocks together, each inserted
//! from its first token whenever it has a block more.

use std::hint::black_box;
use std::ptr;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main,
};
use kvcache::capi::*;
use kvcache::ids::{BlockId, Namespace, TokenId};
use kvcache::prefix::{Hit, PrefixIndex};

const BLOCK: usize = 16;
const SYSTEMS: usize = 40;
const SHARED: usize = 247;
const EACH: usize = 250;
const SPACE: Namespace = Namespace(1);
/// Of another tenant.
const OTHER: Namespace = Namespace(2);

struct Random(u64);

impl Random {
    fn tokens(&mut self, blocks: usize) -> Vec<TokenId> {
        let step = |_| {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 33) as u32 % 128_000
        };
        (0..blocks * BLOCK).map(step).collect()
    }
}

/// Every prompt, the sequences of one system apart from each other as requests are.
fn prompts(random: &mut Random) -> Vec<Vec<TokenId>> {
    let systems: Vec<_> = (0..SYSTEMS).map(|_| random.tokens(SHARED)).collect();
    let with_own = |i: usize| [&systems[i % SYSTEMS][..], &random.tokens(256 - SHARED)].concat();
    (0..SYSTEMS * EACH).map(with_own).collect()
}

fn build(index: &mut PrefixIndex, prompts: &[Vec<TokenId>], ids: &[BlockId]) {
    let mut same = Vec::new();
    let mut next = 0;
    for prompt in prompts {
        let blocks = prompt.len() / BLOCK;
        let ids = &ids[next % (ids.len() - blocks)..][..blocks];
        next += index.insert(SPACE, prompt, ids, &mut same).unwrap().stored;
    }
}

fn empty() -> PrefixIndex {
    PrefixIndex::new(BLOCK, 1, 100_000).unwrap()
}

/// Full hits through the C ABI, from one and from several threads at once.
fn threads(group: &mut BenchmarkGroup<'_, WallTime>, prompts: &[Vec<TokenId>], ids: &[BlockId]) {
    let mut handle = ptr::null_mut();
    // SAFETY: `handle` is writable.
    unsafe { assert_eq!(kvc_prefix_create(BLOCK as u32, 1, 100_000, &mut handle), KVC_OK) };
    for (i, prompt) in prompts.iter().enumerate() {
        let ids = &ids[i * 9 % 1000..][..prompt.len() / BLOCK];
        let (tokens, count) = (prompt.as_ptr(), prompt.len() as u64);
        // SAFETY: the slices outlive the call, `done` is writable.
        unsafe {
            let mut done = std::mem::zeroed();
            let (ids, n) = (ids.as_ptr().cast(), ids.len() as u64);
            let none = ptr::null_mut();
            let status = kvc_prefix_insert(handle, 1, tokens, count, ids, n, none, 0, &mut done);
            assert_eq!(status, KVC_OK);
        }
    }
    let index = handle as usize; // a handle is a number, any thread may use it
    for threads in [1, 2, 4] {
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("hit, C ABI, {threads} threads"), |b| {
            b.iter_custom(|rounds| {
                let start = Instant::now();
                std::thread::scope(|scope| {
                    for thread in 0..threads {
                        scope.spawn(move || {
                            let mut blocks = [0i32; 256];
                            for round in 0..rounds / threads + 1 {
                                let prompt = &prompts[(round as usize + thread as usize * 16) % 64];
                                let (tokens, count) = (prompt.as_ptr(), prompt.len() as u64);
                                // SAFETY: the slices outlive the call, `hit` is writable.
                                unsafe {
                                    let mut hit: kvc_prefix_hit = std::mem::zeroed();
                                    let (out, none) = (blocks.as_mut_ptr(), ptr::null_mut());
                                    let handle = index as *mut kvc_prefix;
                                    let status = kvc_prefix_lookup(
                                        handle, 1, tokens, count, count, out, 256, none, &mut hit,
                                    );
                                    assert_eq!((status, hit.tokens), (KVC_OK, 4096));
                                }
                                black_box(&blocks);
                            }
                        });
                    }
                });
                start.elapsed()
            });
        });
    }
    // SAFETY: live, and no thread uses it any more.
    unsafe { assert_eq!(kvc_prefix_destroy(handle), KVC_OK) };
}

fn bench(c: &mut Criterion) {
    let mut random = Random(1);
    let tree = prompts(&mut random);
    let flat: Vec<_> = (0..10_000).map(|_| random.tokens(10)).collect();
    let ids: Vec<BlockId> = (0..200_000).map(BlockId).collect();
    let mut index = empty();
    build(&mut index, &tree, &ids);
    for _ in 0..25 {
        index.insert(OTHER, &random.tokens(4), &ids[..4], &mut Vec::new()).unwrap();
    }
    index.audit().unwrap();

    let mut group = c.benchmark_group("prefix");
    let chosen = |n: usize| (0..n).map(|i| tree[i * 7919 % tree.len()].clone());
    let half = |mut prompt: Vec<TokenId>| {
        prompt.truncate(2048);
        prompt.extend(random.tokens(128));
        prompt
    };
    let half: Vec<_> = chosen(64).map(half).collect();
    let miss: Vec<_> = (0..64).map(|_| random.tokens(256)).collect();
    let mut hit = Hit::default();
    let cases: [(&str, Namespace, Vec<Vec<TokenId>>, usize); 6] = [
        ("hit", SPACE, chosen(64).collect(), 4096),
        ("hit, cold", SPACE, chosen(2000).collect(), 4096),
        ("half", SPACE, half, 2048),
        ("miss", SPACE, miss.clone(), 0),
        ("tenant, another's prompt", OTHER, chosen(64).collect(), 0),
        ("tenant, nobody's prompt", OTHER, miss, 0),
    ];
    for (name, space, prompts, tokens) in cases {
        let mut turn = 0;
        group.bench_function(name, |b| {
            b.iter(|| {
                turn = (turn + 1) % prompts.len();
                index.lookup(space, black_box(&prompts[turn]), usize::MAX, &mut hit);
                assert_eq!(hit.tokens, tokens);
            });
        });
    }
    group.bench_function("hit, lock, unlock", |b| {
        let mut turn = 0;
        b.iter(|| {
            turn = (turn + 1) % 64;
            index.lookup(SPACE, black_box(&tree[turn]), usize::MAX, &mut hit);
            let pin = index.lock(hit.at).unwrap();
            index.unlock(pin).unwrap();
        });
    });

    threads(&mut group, &tree, &ids);

    group.sample_size(10);
    for (name, prompts) in [("", &tree), (", flat", &flat)] {
        let mut full = empty();
        build(&mut full, prompts, &ids);
        let stats = full.stats();
        let bytes = stats.bytes as f64 / stats.blocks as f64;
        println!("prefix{name}: {bytes:.1} bytes a block, {} nodes", stats.nodes);
        group.throughput(Throughput::Elements(stats.blocks as u64));
        group.bench_function(format!("insert{name}"), |b| {
            // Into an index that has been used: its memory is there.
            let fresh = || {
                let mut index = empty();
                build(&mut index, prompts, &ids);
                index.evict(usize::MAX, &mut |_| true, &mut |_| ());
                index
            };
            b.iter_batched_ref(fresh, |index| build(index, prompts, &ids), BatchSize::PerIteration);
        });
        // As an engine commits: below what the lookup of the prompt found, which is not timed.
        group.bench_function(format!("insert below{name}"), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                let (mut hit, mut same) = (Hit::default(), Vec::new());
                for _ in 0..rounds {
                    let mut index = empty();
                    build(&mut index, prompts, &ids);
                    index.evict(usize::MAX, &mut |_| true, &mut |_| ());
                    for prompt in prompts {
                        index.lookup(SPACE, prompt, usize::MAX, &mut hit);
                        let (rest, at) = (&prompt[hit.tokens..], hit.at);
                        let start = Instant::now();
                        let ids = &ids[..rest.len() / BLOCK];
                        black_box(index.insert_below(SPACE, at, rest, ids, &mut same)).unwrap();
                        spent += start.elapsed();
                    }
                }
                spent
            });
        });
        group.bench_function(format!("evict{name}"), |b| {
            let fresh = || {
                let mut index = empty();
                build(&mut index, prompts, &ids);
                index
            };
            let evict = |index: &mut PrefixIndex| {
                let mut sum = 0u64;
                while index.evict(64, &mut |_| true, &mut |ids| sum += u64::from(ids[0].0)) > 0 {}
                sum
            };
            b.iter_batched_ref(fresh, evict, BatchSize::PerIteration);
        });
    }
    // Sixty-four sequences decoded at once, each inserted anew whenever a block of it is full.
    let decoded: Vec<_> = (0..64).map(|_| random.tokens(256)).collect();
    let decode = |index: &mut PrefixIndex| {
        let mut same = Vec::new();
        for n in 1..=256 {
            for tokens in &decoded {
                index.insert(SPACE, &tokens[..n * BLOCK], &ids[..n], &mut same).unwrap();
            }
        }
    };
    group.throughput(Throughput::Elements(64 * 256));
    group.bench_function("insert, a block at a time", |b| {
        b.iter_batched_ref(empty, decode, BatchSize::PerIteration);
    });
    let mut index = empty();
    decode(&mut index);
    println!("prefix, a block at a time: {} nodes", index.stats().nodes);
    group.throughput(Throughput::Elements(1));
    let mut turn = 0;
    group.bench_function("hit, inserted a block at a time", |b| {
        b.iter(|| {
            turn = (turn + 1) % decoded.len();
            index.lookup(SPACE, black_box(&decoded[turn]), usize::MAX, &mut hit);
            assert_eq!(hit.tokens, 4096);
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(500));
    targets = bench
}
criterion_main!(benches);
