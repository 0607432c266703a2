//! A worker as a router sees it: a cache that publishes its KV events over a real socket, and
//! random requests that make blocks come and go.

use std::time::{Duration, Instant};

use kvcache::cache::{CacheOptions, KvCache, Media, Step, TierOptions, Work};
use kvcache::dtype::KvFormat;
use kvcache::events::{Encoding, Publisher, Subscribers, ZmqOptions, ZmqSink};
use kvcache::ids::Namespace;
use kvcache::layout::{CacheSpec, GroupSpec};

/// Tokens of a block.
pub const BLOCK_TOKENS: u32 = 16;

/// A cache and its publisher.
pub struct Worker {
    pub cache: KvCache,
    pub publisher: Publisher,
    pub subscribers: Subscribers,
    pub endpoint: String,
    pub replay: String,
    step: Step,
}

impl Worker {
    /// With a group of full attention and one of windows, of `blocks` blocks each.
    pub fn new(blocks: u32, encoding: Encoding, rank: u32) -> Self {
        let full = GroupSpec::uniform(1, 1, 8, KvFormat::F16);
        let window = GroupSpec { window: Some(64), ..full.clone() };
        Self::of(cache(vec![full, window], blocks), encoding, rank)
    }

    /// With one group, and tiers below it.
    pub fn with_tiers(blocks: u32, tiers: TierOptions, encoding: Encoding, rank: u32) -> Self {
        let mut cache = cache(vec![GroupSpec::uniform(1, 1, 8, KvFormat::F16)], blocks);
        cache.attach_tiers(tiers).unwrap();
        Self::of(cache, encoding, rank)
    }

    fn of(mut cache: KvCache, encoding: Encoding, rank: u32) -> Self {
        let queue = cache.enable_events(0).unwrap();
        let sink = ZmqSink::bind(&ZmqOptions {
            endpoint: "tcp://127.0.0.1:0".into(),
            replay_endpoint: Some("tcp://127.0.0.1:0".into()),
            topic: "kv-events".into(),
            encoding,
            rank,
            ..ZmqOptions::default()
        })
        .unwrap();
        let (endpoint, replay) = (sink.endpoint().into(), sink.replay_endpoint().unwrap().into());
        let subscribers = sink.subscribers();
        let publisher = Publisher::start(queue, vec![Box::new(sink)]).unwrap();
        let step = Step::new();
        let worker = Worker { cache, publisher, subscribers, endpoint, replay, step };
        // The first message says what is resident, nothing: it is out before anybody subscribes.
        assert_eq!(worker.settle(), 1);
        worker
    }

    /// Serves a prompt; returns how many of its tokens were cached.
    pub fn serve(&mut self, prompt: &[u32], space: Namespace) -> u32 {
        self.serve_with_media(prompt, &[], space)
    }

    /// The same for a prompt with media.
    pub fn serve_with_media(&mut self, prompt: &[u32], media: &[Media], space: Namespace) -> u32 {
        let started = self.cache.start_with_media(prompt, media, space).unwrap();
        let new = &prompt[started.cached_tokens as usize..];
        self.cache.begin(&mut self.step, &[Work { seq: started.seq, tokens: new }]).unwrap();
        self.cache.commit(&mut self.step).unwrap();
        self.cache.release(started.seq).unwrap();
        started.cached_tokens
    }

    /// How many leading blocks of a prompt are cached; changes nothing that is.
    pub fn cached_blocks(&mut self, prompt: &[u32], space: Namespace) -> u32 {
        // A token that no block has: the prompt is found whole, and no part of a block is copied.
        let longer = [prompt, &[i32::MAX as u32]].concat();
        let started = self.cache.start(&longer, space).unwrap();
        self.cache.release(started.seq).unwrap();
        assert!(started.cached_tokens.is_multiple_of(BLOCK_TOKENS));
        started.cached_tokens / BLOCK_TOKENS
    }

    /// Waits until all that happened is published; returns the number of the next message.
    pub fn settle(&self) -> u64 {
        wait(|| {
            let stats = self.cache.event_stats().unwrap();
            stats.queued_events == 0 && !stats.publishing
        });
        self.publisher.next_seq()
    }
}

fn cache(groups: Vec<GroupSpec>, blocks: u32) -> KvCache {
    let spec = CacheSpec { block_tokens: BLOCK_TOKENS, groups };
    let options = CacheOptions { blocks, max_seqs: 4, threads: 1, ..CacheOptions::default() };
    KvCache::new(&spec, &options).unwrap()
}

/// Prompts of whole blocks, each block one token over and over, that share beginnings.
pub fn prompts(count: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut state = seed;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    let mut prompts: Vec<Vec<u32>> = Vec::new();
    for n in 0..count {
        let shared =
            prompts.get(next(count as u64) as usize).map_or(0, |p| next(p.len() as u64 / 16 + 1));
        let base = prompts.get(next(n.max(1) as u64) as usize).cloned().unwrap_or_default();
        let mut prompt: Vec<u32> = base.iter().copied().take(shared as usize * 16).collect();
        for _ in 0..1 + next(8) {
            prompt.extend([next(1000) as u32; 16]);
        }
        prompts.push(prompt);
    }
    prompts
}

/// Waits until something is so, which must be soon.
pub fn wait(mut until: impl FnMut() -> bool) {
    let start = Instant::now();
    while !until() {
        assert!(start.elapsed() < Duration::from_secs(30), "nothing came of it");
        std::thread::sleep(Duration::from_millis(1));
    }
}
