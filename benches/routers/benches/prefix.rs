//! The prefix index beside `dynamo-kv-router` 1.6.1, on the same prompts in the same run.
//!
//! 10,000 sequences of 4,096 tokens in blocks of 16: 40 system prompts of 247 blocks, each with 250
//! continuations of 9 blocks, 99,880 blocks in all; `--blocks N` has as many systems more as make
//! about N. Both sides begin with tokens. The router hashes them, block by block, and looks the
//! hashes up in an index that is told by events what is stored; of its three indexes the fastest
//! counts. Ours compares tokens. Events are made before the clock runs, with their hashes, so that
//! the router's insertion is the index alone.
//!
//! Times are medians of rounds that take turns, with the quartiles beside them. Bytes are what an
//! allocator that counts was asked for.
//!
//! ```text
//! cargo bench --manifest-path benches/routers/Cargo.toml [-- --blocks 10000000]
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

use dynamo_kv_router::indexer::{SyncIndexer, ThreadPoolIndexer};
use dynamo_kv_router::protocols::{
    BlockHashOptions, ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData,
    KvCacheStoreData, KvCacheStoredBlockData, LocalBlockHash, RouterEvent,
    compute_block_hash_for_seq, compute_seq_hash_for_block,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, PositionalIndexer, RadixTree};
use kvcache::ids::{BlockId, Namespace, TokenId};
use kvcache::prefix::{Hit, PrefixIndex};

const BLOCK: usize = 16;
const SHARED: usize = 247;
const OWN: usize = 9;
const EACH: usize = 250;
const SPACE: Namespace = Namespace(1);
const ROUNDS: usize = 9;
/// Prompts that are looked up in turn, so that they are in the processor's caches, as one that was
/// just tokenized is.
const ASKED: usize = 64;

struct Counting;

static BYTES: AtomicI64 = AtomicI64::new(0);

// SAFETY: passes everything on.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The prompts: every one is a system's tokens and its own.
struct Prompts {
    systems: Vec<Vec<TokenId>>,
    own: Vec<TokenId>,
    count: usize,
}

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

impl Prompts {
    fn new(systems: usize, random: &mut Random) -> Self {
        let count = systems * EACH;
        let systems = (0..systems).map(|_| random.tokens(SHARED)).collect();
        Prompts { systems, own: random.tokens(count * OWN), count }
    }

    fn blocks(&self) -> usize {
        self.systems.len() * SHARED + self.count * OWN
    }

    fn own(&self, n: usize) -> &[TokenId] {
        &self.own[n * OWN * BLOCK..(n + 1) * OWN * BLOCK]
    }

    /// The sequences of one system are apart from each other, as requests are.
    fn write(&self, n: usize, prompt: &mut Vec<TokenId>) {
        prompt.clear();
        prompt.extend_from_slice(&self.systems[n % self.systems.len()]);
        prompt.extend_from_slice(self.own(n));
    }
}

fn hashes(tokens: &[TokenId]) -> Vec<LocalBlockHash> {
    compute_block_hash_for_seq(tokens, BLOCK as u32, BlockHashOptions::default())
}

/// Events that store every prompt in turn, the system's blocks with its first, under the hashes of
/// their sequences.
fn events(prompts: &Prompts) -> Vec<RouterEvent> {
    let mut list = Vec::with_capacity(prompts.count + prompts.systems.len());
    let mut store = |from: usize, local: &[LocalBlockHash], sequence: &[u64]| {
        let stored = |n: usize| KvCacheStoredBlockData {
            block_hash: ExternalSequenceBlockHash(sequence[n]),
            tokens_hash: local[n],
            mm_extra_info: None,
        };
        let parent_hash = from.checked_sub(1).map(|n| ExternalSequenceBlockHash(sequence[n]));
        let blocks = (from..local.len()).map(stored).collect();
        let start_position = Some(from as u32);
        let data = KvCacheStoreData { parent_hash, start_position, blocks };
        list.push(event(list.len() as u64, KvCacheEventData::Stored(data)));
    };
    let mut prompt = Vec::new();
    for n in 0..prompts.count {
        prompts.write(n, &mut prompt);
        let local = hashes(&prompt);
        let sequence = compute_seq_hash_for_block(&local);
        if n < prompts.systems.len() {
            store(0, &local[..SHARED], &sequence);
        }
        store(SHARED, &local, &sequence);
    }
    list
}

fn event(event_id: u64, data: KvCacheEventData) -> RouterEvent {
    RouterEvent::new(7, KvCacheEvent { event_id, data, dp_rank: 0 })
}

/// Events that remove what others stored, children before parents, in one event a request.
fn removals(stored: &[RouterEvent]) -> Vec<RouterEvent> {
    let removal = |(n, stored): (usize, &RouterEvent)| {
        let KvCacheEventData::Stored(data) = &stored.event.data else { unreachable!() };
        let block_hashes = data.blocks.iter().rev().map(|block| block.block_hash).collect();
        event((1 << 40) + n as u64, KvCacheEventData::Removed(KvCacheRemoveData { block_hashes }))
    };
    // Leaves first; the roots are the events without a parent.
    let is_root = |event: &RouterEvent| matches!(&event.event.data, KvCacheEventData::Stored(data) if data.parent_hash.is_none());
    let (roots, leaves): (Vec<_>, Vec<_>) = stored.iter().partition(|event| is_root(event));
    leaves.into_iter().chain(roots).enumerate().map(removal).collect()
}

/// Median and quartiles of one measurement.
struct Times {
    name: String,
    ns: Vec<f64>,
}

impl Times {
    fn new(name: impl Into<String>) -> Self {
        Times { name: name.into(), ns: Vec::new() }
    }

    /// Times `work`, for each of `count` things.
    fn take(&mut self, count: usize, work: impl FnOnce()) {
        let start = Instant::now();
        work();
        self.ns.push(start.elapsed().as_nanos() as f64 / count as f64);
    }

    fn median(&mut self) -> f64 {
        self.ns.sort_by(f64::total_cmp);
        self.ns[self.ns.len() / 2]
    }
}

/// Prints a group: ours first, then the peers, and how many times as long they take.
fn print(title: &str, unit: &str, times: &mut [Times]) {
    println!("{title} (ns {unit}; quartiles)");
    let ours = times[0].median();
    for time in times.iter_mut() {
        let (median, n) = (time.median(), time.ns.len());
        let (low, high) = (time.ns[n / 4], time.ns[n * 3 / 4]);
        let name = &time.name;
        println!("  {name:<44} {median:>9.1}  {low:>9.1} {high:>9.1}  {:>6.2}x", median / ours);
    }
}

fn index(capacity: usize) -> PrefixIndex {
    PrefixIndex::new(BLOCK, 1, capacity as u32).unwrap()
}

/// Inserts every prompt below what its lookup finds, as an engine does at the end of a prefill; the
/// time of the insertions alone, or of both.
fn build(index: &mut PrefixIndex, prompts: &Prompts, ids: &[BlockId]) -> (f64, f64) {
    let (mut prompt, mut same, mut hit) = (Vec::new(), Vec::new(), Hit::default());
    let (mut inserting, mut both) = (0.0, 0.0);
    for n in 0..prompts.count {
        prompts.write(n, &mut prompt);
        let start = Instant::now();
        index.lookup(SPACE, &prompt, usize::MAX, &mut hit);
        let found = Instant::now();
        let rest = &prompt[hit.tokens..];
        let ids = &ids[n % 1000..][..rest.len() / BLOCK];
        index.insert_below(SPACE, hit.at, rest, ids, &mut same).unwrap();
        inserting += found.elapsed().as_nanos() as f64;
        both += start.elapsed().as_nanos() as f64;
    }
    (inserting / prompts.blocks() as f64, both / prompts.blocks() as f64)
}

fn evict_all(index: &mut PrefixIndex) {
    let mut sum = 0u64;
    while index.evict(64, &mut |_| true, &mut |ids| sum += u64::from(ids[0].0)) > 0 {}
    black_box(sum);
}

fn main() {
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    let blocks = match (words.next().as_deref(), words.next()) {
        (None, _) => 100_000,
        (Some("--blocks"), Some(count)) => count.parse().expect("--blocks: a count"),
        _ => panic!("the only option is --blocks N"),
    };
    let systems = (blocks / (SHARED + EACH * OWN)).max(1);
    let systems = if blocks == 100_000 { 40 } else { systems };
    let mut random = Random(1);
    let prompts = Prompts::new(systems, &mut random);
    let ids: Vec<BlockId> = (0..2000).map(BlockId).collect();
    println!("{} blocks of {BLOCK} tokens, {} sequences", prompts.blocks(), prompts.count);
    // The large set is built once or twice, not nine times.
    let builds = if blocks > 1_000_000 { 2 } else { ROUNDS };

    let stored = events(&prompts);
    let removed = removals(&stored);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let [mut ours_insert, mut ours_both] =
        ["libkvcache, below the hit", "libkvcache, lookup and below the hit"].map(Times::new);
    let mut ours_root = Times::new("libkvcache, from the root");
    let mut radix_insert = Times::new("RadixTree");
    let mut compressed_insert = Times::new("ConcurrentRadixTreeCompressed, 1 writer");
    let [mut ours_evict, mut radix_evict] = ["libkvcache", "RadixTree"].map(Times::new);

    let (mut ours, mut radix) = (None, None);
    for round in 0..builds {
        // Into an index that has been used: its memory is there.
        let before = BYTES.load(Ordering::Relaxed);
        let mut fresh = index(prompts.blocks());
        build(&mut fresh, &prompts, &ids);
        if round == 0 {
            let asked = BYTES.load(Ordering::Relaxed) - before;
            let each = |bytes: f64| bytes / prompts.blocks() as f64;
            let (asked, used) = (each(asked as f64), each(fresh.stats().bytes as f64));
            println!("libkvcache: {asked:.1} bytes a block allocated, {used:.1} in use");
        }
        ours_evict.take(prompts.blocks(), || evict_all(&mut fresh));
        let (inserting, both) = build(&mut fresh, &prompts, &ids);
        ours_insert.ns.push(inserting);
        ours_both.ns.push(both);
        evict_all(&mut fresh);
        let mut same = Vec::new();
        let (mut prompt, mut spent) = (Vec::new(), 0);
        for n in 0..prompts.count {
            prompts.write(n, &mut prompt);
            let start = Instant::now();
            fresh
                .insert(SPACE, &prompt, &ids[n % 1000..][..prompt.len() / BLOCK], &mut same)
                .unwrap();
            spent += start.elapsed().as_nanos();
        }
        ours_root.ns.push(spent as f64 / prompts.blocks() as f64);
        ours = Some(fresh);

        let before = BYTES.load(Ordering::Relaxed);
        let list = stored.clone();
        let mut tree = RadixTree::new();
        radix_insert.take(prompts.blocks(), || {
            list.into_iter().for_each(|event| tree.apply_event(event).unwrap())
        });
        if round == 0 {
            // The events are gone: what is left is the tree's.
            let bytes = BYTES.load(Ordering::Relaxed) - before;
            let each = bytes as f64 / prompts.blocks() as f64;
            println!("RadixTree: {each:.1} bytes a block allocated, tokens not among them");
        }
        let list = removed.clone();
        radix_evict.take(prompts.blocks(), || {
            list.into_iter().for_each(|event| tree.apply_event(event).unwrap())
        });
        drop(tree);
        let mut tree = RadixTree::new();
        stored.iter().for_each(|event| tree.apply_event(event.clone()).unwrap());
        radix = Some(tree);

        let list = stored.clone();
        let pool = ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), 1, BLOCK as u32);
        compressed_insert.take(prompts.blocks(), || {
            list.into_iter().for_each(|event| pool.enqueue_event(event).unwrap());
            runtime.block_on(pool.flush_and_wait()).unwrap();
        });
    }
    let (ours, radix) = (ours.unwrap(), radix.unwrap());
    ours.audit().unwrap();
    let pool = ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), 1, BLOCK as u32);
    let before = BYTES.load(Ordering::Relaxed);
    stored.iter().for_each(|event| pool.enqueue_event(event.clone()).unwrap());
    runtime.block_on(pool.flush_and_wait()).unwrap();
    let each = (BYTES.load(Ordering::Relaxed) - before) as f64 / prompts.blocks() as f64;
    println!("ConcurrentRadixTreeCompressed: {each:.1} bytes a block allocated, likewise");
    // The positional index works beside its own pool's threads too, and finds the same.
    let positional = ThreadPoolIndexer::new(PositionalIndexer::new(32), 1, BLOCK as u32);
    stored.iter().for_each(|event| positional.enqueue_event(event.clone()).unwrap());
    runtime.block_on(positional.flush_and_wait()).unwrap();
    drop((stored, removed));

    print(
        "insert",
        "a new block",
        &mut [ours_insert, ours_both, ours_root, radix_insert, compressed_insert],
    );
    print("evict", "a block", &mut [ours_evict, radix_evict]);

    let mut asked = |shape: &str| -> Vec<Vec<TokenId>> {
        (0..ASKED)
            .map(|n| {
                let mut prompt = Vec::new();
                prompts.write(n * 7919 % prompts.count, &mut prompt);
                match shape {
                    "half" => {
                        prompt.truncate(2048);
                        prompt.extend(random.tokens(128));
                    }
                    "miss" => prompt = random.tokens(256),
                    _ => {}
                }
                prompt
            })
            .collect()
    };
    for (shape, found) in [("hit", 256), ("half", 128), ("miss", 0)] {
        let list = asked(shape);
        let mut times = [
            "libkvcache, tokens to block ids",
            "RadixTree, tokens to score",
            "ConcurrentRadixTreeCompressed, tokens to score",
            "PositionalIndexer, tokens to score",
            "RadixTree, hashes given",
            "ConcurrentRadixTreeCompressed, hashes given",
        ]
        .map(Times::new);
        let given: Vec<_> = list.iter().map(|prompt| hashes(prompt)).collect();
        let mut hit = Hit::default();
        let (compressed, jump) = (pool.backend(), positional.backend());
        for _ in 0..ROUNDS * 3 {
            let turns = 10;
            let count = turns * ASKED;
            let each = |work: &mut dyn FnMut(usize)| {
                for _ in 0..turns {
                    (0..ASKED).for_each(&mut *work);
                }
            };
            times[0].take(count, || {
                each(&mut |n| {
                    ours.lookup(SPACE, black_box(&list[n]), usize::MAX, &mut hit);
                    assert_eq!(hit.blocks.len(), found);
                })
            });
            let whole = |scores: &dynamo_kv_router::protocols::OverlapScores| {
                assert_eq!(scores.scores.values().copied().max().unwrap_or(0), found as u32);
            };
            times[1].take(count, || {
                each(&mut |n| whole(&radix.find_matches(hashes(black_box(&list[n])), false)))
            });
            times[2].take(count, || {
                each(&mut |n| {
                    whole(&compressed.find_matches_impl(&hashes(black_box(&list[n])), false))
                })
            });
            times[3].take(count, || {
                each(&mut |n| whole(&jump.find_matches(&hashes(black_box(&list[n])), false)))
            });
            times[4].take(count, || {
                each(&mut |n| whole(&radix.find_matches(black_box(&given[n]).clone(), false)))
            });
            times[5].take(count, || {
                each(&mut |n| whole(&compressed.find_matches_impl(black_box(&given[n]), false)))
            });
        }
        print(shape, "a prompt of 4,096 tokens", &mut times);
    }
}
