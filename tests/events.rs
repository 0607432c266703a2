//! KV events against a plain consumer: whatever the cache does, what the consumer believes is what
//! the cache holds; and where it does not keep up, it believes too little, never too much.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvcache::Error;
use kvcache::cache::{CacheOptions, KvCache, Step, Work};
use kvcache::dtype::KvFormat;
use kvcache::events::{AttentionKind, Event, Medium, Message, Publisher, Queue, QueueStats};
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::{Digest, Keys};

mod random;

/// The group that sees everything; the other has a window.
const FULL: u32 = 0;

/// What a consumer knows of a block: its parent and its tokens.
type Known = BTreeMap<(u32, Digest), (Option<Digest>, Vec<u32>)>;

#[derive(Default)]
struct Consumer {
    known: Known,
    next_seq: u64,
    gaps: u64,
    events: usize,
    cleared: usize,
}

impl Consumer {
    /// Blocks of the group that sees everything.
    fn full_blocks(&self) -> usize {
        self.known.keys().filter(|(group, _)| *group == FULL).count()
    }

    fn take(&mut self, message: &Message) {
        assert!(message.seq >= self.next_seq, "numbers rise");
        self.gaps += message.seq - self.next_seq;
        self.next_seq = message.seq + 1;
        assert!(!message.is_empty() && message.time > 1e9);
        for event in message.events() {
            self.events += 1;
            self.apply(event, message.shape.block_tokens as usize);
        }
    }

    fn apply(&mut self, event: Event, block_tokens: usize) {
        match event {
            Event::Stored { medium, group, space, parent, digests, tokens, .. } => {
                assert_eq!((medium, tokens.len()), (Medium::Gpu, digests.len() * block_tokens));
                let mut above = parent;
                for (&digest, tokens) in digests.iter().zip(tokens.chunks(block_tokens)) {
                    // Where a window has left the parent behind it is named, and gone.
                    if let Some(above) = above.filter(|_| group == FULL) {
                        assert!(self.known.contains_key(&(group, above)), "a parent comes first");
                    }
                    let before = above.or(Digest::of_namespace(space));
                    assert_eq!(digest, Digest::of_block(before.as_ref(), tokens));
                    let old = self.known.insert((group, digest), (above, tokens.to_vec()));
                    assert!(old.is_none(), "stored twice");
                    above = Some(digest);
                }
            }
            Event::Removed { medium, group, digests } => {
                assert_eq!(medium, Medium::Gpu);
                for digest in digests {
                    assert!(self.known.remove(&(group, *digest)).is_some(), "removed unknown");
                }
            }
            Event::Cleared => {
                self.known.clear();
                self.cleared += 1;
            }
        }
    }
}

/// A cache with a publisher whose consumer is in reach.
struct Bed {
    cache: KvCache,
    queue: Arc<Queue>,
    publisher: Option<Publisher>,
    consumer: Arc<Mutex<Consumer>>,
    step: Step,
}

impl Bed {
    fn cache(blocks: u32) -> KvCache {
        let full = GroupSpec::uniform(1, 1, 8, KvFormat::F16);
        let window = GroupSpec { window: Some(64), ..full.clone() };
        let spec = CacheSpec { block_tokens: 16, groups: vec![full, window] };
        let options = CacheOptions {
            blocks,
            max_seqs: 8,
            threads: 1,
            prefix_reuse: true,
            ..CacheOptions::default()
        };
        KvCache::new(&spec, &options).unwrap()
    }

    fn new(mut cache: KvCache, capacity: usize) -> Self {
        let queue = cache.enable_events(capacity).unwrap();
        let consumer = Arc::new(Mutex::new(Consumer::default()));
        let sink = consumer.clone();
        let take = move |message: &Message| sink.lock().unwrap().take(message);
        let publisher = Publisher::start(queue.clone(), vec![Box::new(take)]).unwrap();
        Bed { cache, queue, publisher: Some(publisher), consumer, step: Step::new() }
    }

    /// Feeds tokens to a sequence; false where there are too few blocks.
    fn feed(&mut self, seq: SeqId, tokens: &[u32]) -> bool {
        feed(&mut self.cache, &mut self.step, seq, tokens)
    }

    /// Waits until the consumer has everything that was queued.
    fn settle(&self) {
        let start = Instant::now();
        let busy = |stats: QueueStats| stats.queued_events > 0 || stats.publishing;
        while busy(self.queue.stats()) {
            assert!(start.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the publisher: then everything queued has been published.
    fn end(&mut self) {
        drop(self.publisher.take());
    }
}

fn feed(cache: &mut KvCache, step: &mut Step, seq: SeqId, tokens: &[u32]) -> bool {
    match cache.begin(step, &[Work { seq, tokens }]) {
        Ok(()) => cache.commit(step).unwrap(),
        Err(Error::OutOfBlocks { .. }) => return false,
        Err(error) => panic!("{error}"),
    }
    true
}

/// A random life of a cache, `rounds` long; all sequences are released at its end.
fn live(bed: &mut Bed, seed: u64, rounds: usize) {
    let mut rng = random::Rng::new(seed);
    let mut seqs: Vec<SeqId> = Vec::new();
    for _ in 0..rounds {
        match rng.below(10) {
            0..=3 if seqs.len() < 8 => {
                let (base, fork) = (rng.below(3) as u32, rng.below(100));
                let tail = 10 + rng.below(5) as u32;
                let length = 1 + rng.below(150);
                let prompt: Vec<u32> =
                    (0..length).map(|at| if at < fork { base } else { tail }).collect();
                let space = Namespace(rng.below(2) as u64);
                let started = bed.cache.start(&prompt, space).unwrap();
                seqs.push(started.seq);
                bed.feed(started.seq, &prompt[started.cached_tokens as usize..]);
            }
            4..=6 if !seqs.is_empty() => {
                let tokens = vec![rng.below(3) as u32; 1 + rng.below(40)];
                let seq = seqs[rng.below(seqs.len())];
                bed.feed(seq, &tokens);
            }
            7..=8 if !seqs.is_empty() => {
                let seq = seqs.swap_remove(rng.below(seqs.len()));
                bed.cache.release(seq).unwrap();
            }
            9 if rng.below(20) == 0 => bed.cache.clear_prefix().unwrap(),
            9 if rng.below(20) == 0 => bed.cache.snapshot_events().unwrap(),
            _ => {}
        }
        bed.cache.audit().unwrap();
    }
    for seq in seqs {
        bed.cache.release(seq).unwrap();
    }
}

#[test]
fn a_consumer_knows_what_the_cache_holds() {
    let (mut stored, mut evicted, mut alone) = (0, 0, false);
    for seed in 0..8 {
        let mut bed = Bed::new(Bed::cache([12, 40, 200][seed as usize % 3]), 100_000);
        live(&mut bed, seed, 400);
        let cached = bed.cache.stats().cached_blocks as usize;
        evicted += bed.cache.stats().evicted_blocks;
        // What a snapshot says is what the stream said.
        bed.settle();
        assert_eq!(bed.consumer.lock().unwrap().full_blocks(), cached);
        let streamed = core::mem::take(&mut bed.consumer.lock().unwrap().known);
        alone |= streamed.len() < 2 * cached;
        bed.cache.snapshot_events().unwrap();
        bed.end();
        let consumer = bed.consumer.lock().unwrap();
        assert_eq!(consumer.known, streamed);
        assert_eq!((consumer.gaps, bed.queue.stats().losses), (0, 0));
        stored += consumer.events;
    }
    assert!(alone, "no window ever lacked what the other group has");
    assert!(stored > 500 && evicted > 500, "{stored} events, {evicted} evictions");
}

#[test]
fn a_chain_is_one_event_in_each_group() {
    let mut bed = Bed::new(Bed::cache(64), 0);
    bed.settle();
    let prompt: Vec<u32> = (0..160).collect();
    let seq = bed.cache.start(&prompt, Namespace(5)).unwrap().seq;
    let before = bed.consumer.lock().unwrap().events;
    assert!(bed.feed(seq, &prompt));
    bed.settle();
    assert_eq!(bed.consumer.lock().unwrap().events - before, 2);
    // The digests are those of the blocks, and of cached blocks only.
    let mut parent = Digest::of_namespace(Namespace(5));
    for (block, tokens) in prompt.chunks(16).enumerate() {
        let digest = Digest::of_block(parent.as_ref(), tokens);
        for group in 0..2 {
            let id = bed.cache.blocks(seq, group).unwrap()[block];
            assert_eq!(bed.cache.digest(group, id), Some(digest));
        }
        parent = Some(digest);
    }
    assert!(bed.feed(seq, &[1]));
    let tail = bed.cache.blocks(seq, 0).unwrap()[10];
    assert_eq!(bed.cache.digest(0, tail), None);
    assert_eq!(bed.cache.digest(2, tail), None);
    let shape = bed.queue.shape();
    assert_eq!(shape.groups, [AttentionKind::Full, AttentionKind::Window(64)]);
}

#[test]
fn events_can_begin_late_and_end_early() {
    let mut cache = Bed::cache(64);
    let mut step = Step::new();
    let prompt: Vec<u32> = (0..100).collect();
    let seq = cache.start(&prompt, Namespace(0)).unwrap().seq;
    assert!(feed(&mut cache, &mut step, seq, &prompt));
    assert!(matches!(cache.snapshot_events(), Err(Error::InvalidState { .. })));
    // Below the blocks of both groups a snapshot could not fit.
    assert!(matches!(cache.enable_events(127), Err(Error::InvalidArgument { .. })));
    let mut bed = Bed::new(cache, 128);
    assert!(matches!(bed.cache.enable_events(0), Err(Error::InvalidState { .. })));
    assert!(bed.feed(seq, &[7; 20]));
    bed.settle();
    assert_eq!(bed.consumer.lock().unwrap().known.len(), 2 * 7);
    bed.cache.disable_events(&Bed::cache(4).enable_events(0).unwrap()); // another's
    bed.cache.disable_events(&bed.queue);
    assert!(bed.feed(seq, &[8; 20]));
    bed.end();
    let consumer = bed.consumer.lock().unwrap();
    assert_eq!((consumer.known.len(), consumer.cleared), (0, 2));
    // Again, with another publisher; a cache that ends clears what it had.
    drop(consumer);
    let mut again = Bed::new(bed.cache, 0);
    again.settle();
    assert_eq!(again.consumer.lock().unwrap().known.len(), 2 * 8);
    drop(again.cache);
    drop(again.publisher.take());
    assert_eq!(again.consumer.lock().unwrap().known.len(), 0);

    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 8, KvFormat::F16));
    let options = CacheOptions { prefix_reuse: false, threads: 1, ..CacheOptions::default() };
    let mut cache = KvCache::new(&spec, &options).unwrap();
    assert!(matches!(cache.enable_events(0), Err(Error::InvalidState { .. })));
}

#[test]
fn a_namespace_is_described_before_it_is_used() {
    let mut bed = Bed::new(Bed::cache(64), 0);
    let keys = Keys { salt: "tenant", lora: "adapter", extra: &[b"image"] };
    bed.cache.describe_namespace(Namespace(5), &keys).unwrap();
    bed.settle();
    // This consumer knows numbers only, and would not believe the digests.
    bed.end();
    let prompt: Vec<u32> = (0..40).collect();
    for space in [5, 6] {
        let seq = bed.cache.start(&prompt, Namespace(space)).unwrap().seq;
        assert!(bed.feed(seq, &prompt));
        let seed =
            if space == 5 { Digest::of_keys(&keys) } else { Digest::of_namespace(Namespace(6)) };
        let first = bed.cache.blocks(seq, 0).unwrap()[0];
        assert_eq!(
            bed.cache.digest(0, first),
            Some(Digest::of_block(seed.as_ref(), &prompt[..16]))
        );
        let late = bed.cache.describe_namespace(Namespace(space), &keys);
        assert!(matches!(late, Err(Error::InvalidState { .. })));
        bed.cache.release(seq).unwrap();
    }
    let name = bed.queue.name(Namespace(5)).unwrap();
    assert_eq!((name.salt.as_str(), name.lora.as_str()), ("tenant", "adapter"));
    assert_eq!(bed.queue.name(Namespace(6)), None);
    let long = "x".repeat(256);
    let keys = Keys { lora: &long, ..Keys::default() };
    assert!(bed.cache.describe_namespace(Namespace(7), &keys).is_err());
    // Digests that begin late know the names as well.
    bed.cache.clear_prefix().unwrap();
    bed.cache.describe_namespace(Namespace(6), &Keys::default()).unwrap();
    let mut cache = Bed::cache(64);
    let keys = Keys { salt: "tenant", ..Keys::default() };
    cache.describe_namespace(Namespace(1), &keys).unwrap();
    let seq = cache.start(&prompt, Namespace(1)).unwrap().seq;
    assert!(feed(&mut cache, &mut Step::new(), seq, &prompt));
    cache.enable_digests().unwrap();
    let first = cache.blocks(seq, 1).unwrap()[0];
    let digest = Digest::of_block(Digest::of_keys(&keys).as_ref(), &prompt[..16]);
    assert_eq!(cache.digest(1, first), Some(digest));
}

/// A sink that hangs: the cache goes on at once, memory stays bounded, and when the sink comes back
/// it is told of the gap and then of what is resident.
#[test]
fn a_consumer_that_hangs_is_not_waited_for_and_recovers() {
    let mut cache = Bed::cache(64);
    let queue = cache.enable_events(128).unwrap();
    let consumer = Arc::new(Mutex::new(Consumer::default()));
    let hangs = Arc::new(AtomicBool::new(true));
    let (sink, hung) = (consumer.clone(), hangs.clone());
    let take = move |message: &Message| {
        while hung.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        sink.lock().unwrap().take(message);
    };
    let publisher = Some(Publisher::start(queue.clone(), vec![Box::new(take)]).unwrap());
    // It hangs with the first event in its hands, or that one could be lost with the others.
    while !queue.stats().publishing {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut bed = Bed { cache, queue, publisher, consumer, step: Step::new() };
    live(&mut bed, 3, 600);
    let stats = bed.queue.stats();
    assert!(stats.losses > 0 && stats.dropped_events > 0, "{stats:?}");
    assert!(stats.queued_blocks <= stats.capacity_blocks);
    assert_eq!(bed.consumer.lock().unwrap().events, 0);
    assert_eq!(bed.cache.metrics().dropped_events, stats.dropped_events);

    hangs.store(false, Ordering::Release);
    // The next step after the publisher noticed brings everything back.
    let start = Instant::now();
    let seq = bed.cache.start(&[1; 40], Namespace(9)).unwrap().seq;
    while bed.consumer.lock().unwrap().cleared < 3 {
        assert!(start.elapsed() < Duration::from_secs(20));
        assert!(bed.feed(seq, &[2]));
        bed.cache.truncate(seq, 0).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    bed.cache.release(seq).unwrap();
    bed.end();
    let consumer = bed.consumer.lock().unwrap();
    assert_eq!(consumer.full_blocks(), bed.cache.stats().cached_blocks as usize);
    assert!(consumer.gaps > 0);
}

/// A sink may call the cache, and a sink that panics takes nothing with it.
#[test]
fn sinks_are_called_without_locks() {
    let mut cache = Bed::cache(64);
    let queue = cache.enable_events(0).unwrap();
    let (shared, calls) = (queue.clone(), Arc::new(Mutex::new(0)));
    let counted = calls.clone();
    let ask = move |_: &Message| {
        *counted.lock().unwrap() += 1;
        drop(shared.lock());
    };
    let panics = |_: &Message| panic!("a sink that panics, as it should");
    let publisher = Publisher::start(queue, vec![Box::new(ask), Box::new(panics)]).unwrap();
    let mut step = Step::new();
    let seq = cache.start(&[3; 40], Namespace(0)).unwrap().seq;
    for _ in 0..20 {
        assert!(feed(&mut cache, &mut step, seq, &[3; 16]));
    }
    cache.audit().unwrap();
    assert!(!publisher.is_current_thread());
    drop(publisher);
    assert_eq!(*calls.lock().unwrap(), 1);
    cache.release(seq).unwrap();
}

/// Events and digests neither allocate in a steady state nor change what the cache does.
#[test]
fn the_life_of_a_cache_is_the_same_with_events() {
    let plain = |mut cache: KvCache| {
        let mut step = Step::new();
        for round in 0..30u32 {
            let prompt: Vec<u32> = (0..100 + round).map(|at| at.min(40 + round)).collect();
            let started = cache.start(&prompt, Namespace(round.into())).unwrap();
            assert!(feed(
                &mut cache,
                &mut step,
                started.seq,
                &prompt[started.cached_tokens as usize..]
            ));
            cache.release(started.seq).unwrap();
        }
        cache.stats()
    };
    let without = plain(Bed::cache(40));
    let mut cache = Bed::cache(40);
    let _queue = cache.enable_events(0).unwrap(); // nobody takes them
    assert_eq!(plain(cache), without);
}
