//! The replay: each request goes through pool and index as an engine's would, by the public API.
//!
//! Requests are served one after the other. A request's blocks are pinned while it is served, what
//! is missing is allocated (and evicted for), then stored below the hit; at its end all is released,
//! the tail to be evicted first. Output tokens are not cached. Nothing is looked up by hash id: the
//! index gets the tokens that the ids stand for, and compares them.

use std::error::Error;
use std::time::Instant;

use kvcache::ids::{BlockId, Namespace};
use kvcache::pool::BlockPool;
use kvcache::prefix::{Eviction, Hint, Hit, Position, PrefixIndex, Retention};

use crate::expand::Prompts;
use crate::report::Outcome;
use crate::trace::{Request, Trace};

/// How the replay evicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    Lru,
    Lfu,
    Fifo,
    Slru,
    S3Fifo,
    /// LRU, told when a conversation ends or leaves a branch behind.
    Ended,
    /// The same, and priorities: for what waits for a tool, and for what was cached first.
    Hints,
}

impl Policy {
    pub const ALL: [(Policy, &str); 7] = [
        (Policy::Lru, "lru"),
        (Policy::Lfu, "lfu"),
        (Policy::Fifo, "fifo"),
        (Policy::Slru, "slru"),
        (Policy::S3Fifo, "s3fifo"),
        (Policy::Ended, "ended"),
        (Policy::Hints, "hints"),
    ];

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(policy, _)| *policy == self).map_or("", |(_, name)| name)
    }

    pub fn from_name(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text);
        let names = Self::ALL.map(|(_, name)| name).join(", ");
        found.map(|(policy, _)| *policy).ok_or_else(|| format!("`{text}` is none of {names}"))
    }

    fn eviction(self) -> Eviction {
        match self {
            Policy::Lru | Policy::Ended | Policy::Hints => Eviction::Lru,
            Policy::Lfu => Eviction::Lfu,
            Policy::Fifo => Eviction::Fifo,
            Policy::Slru => Eviction::Slru,
            Policy::S3Fifo => Eviction::S3Fifo,
        }
    }
}

/// What the replay is asked to do.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub policy: Policy,
    pub capacity_blocks: u32,
    pub block_tokens: usize,
    pub lies: f64,
}

/// A pool, the index over it, and what was done with them.
struct Cache {
    pool: BlockPool,
    index: PrefixIndex,
    setup: Setup,
    hit: Hit,
    same: Vec<BlockId>,
    table: Vec<BlockId>,
    gone: Vec<BlockId>,
    /// Where the last request of each stream ended.
    ends: Vec<Position>,
    outcome: Outcome,
}

/// Nanoseconds since `then`, which becomes now.
fn lap(then: &mut Instant) -> u32 {
    let before = std::mem::replace(then, Instant::now());
    u32::try_from((*then - before).as_nanos()).unwrap_or(u32::MAX)
}

/// Replays a whole trace; `tick` is told how many requests are done.
pub fn replay(
    trace: &Trace,
    setup: Setup,
    tick: &mut dyn FnMut(usize),
) -> Result<Outcome, Box<dyn Error>> {
    let Setup { policy, capacity_blocks, block_tokens, .. } = setup;
    let eviction = policy.eviction();
    let mut cache = Cache {
        pool: BlockPool::new(capacity_blocks)?,
        index: PrefixIndex::with_eviction(block_tokens, 1, capacity_blocks, eviction)?,
        setup,
        hit: Hit::default(),
        same: Vec::new(),
        table: Vec::new(),
        gone: Vec::new(),
        ends: vec![Position::default(); trace.streams as usize],
        outcome: Outcome::default(),
    };
    let mut prompts = Prompts::of(trace);
    let begin = Instant::now();
    for (n, request) in trace.requests.iter().enumerate() {
        let expanding = Instant::now();
        let prompt = prompts.expand(trace, n);
        cache.outcome.expand_seconds += expanding.elapsed().as_secs_f64();
        let whole = prompt.tokens.len() / block_tokens;
        let most = whole.min(capacity_blocks as usize) * block_tokens;
        cache.outcome.requested_blocks += whole as u64;
        cache.outcome.requested_tokens += request.tokens;
        cache.outcome.slot_tokens += (whole * block_tokens) as u64;
        let shared = prompt.shared_tokens / block_tokens;
        let at = cache.serve(request, &prompt.tokens[..most])?;
        cache.tell(request, n, at, shared)?;
        if n % 64 == 0 {
            tick(n);
        }
    }
    cache.outcome.seconds = begin.elapsed().as_secs_f64();
    cache.outcome.requests = trace.requests.len() as u64;
    cache.index.audit()?;
    cache.pool.audit()?;
    Ok(cache.outcome)
}

impl Cache {
    /// One request, from its lookup to its release; returns where its prompt ends in the index.
    fn serve(&mut self, request: &Request, tokens: &[u32]) -> Result<Position, Box<dyn Error>> {
        let Cache { pool, index, hit, same, table, gone, outcome, .. } = self;
        let (space, block_tokens) = (Namespace(request.space.into()), self.setup.block_tokens);
        let mut then = Instant::now();
        index.advance(request.time_ms)?;
        index.lookup(space, tokens, tokens.len(), hit);
        outcome.lookup.push(lap(&mut then));

        let held = index.lock(hit.at)?;
        table.clear();
        table.extend_from_slice(&hit.blocks);
        pool.retain_n(table)?;
        let (hits, blocks) = (hit.blocks.len(), tokens.len() / block_tokens);
        let missing = blocks - hits;
        let lacking = missing.saturating_sub(pool.free_blocks() as usize);
        if lacking > 0 {
            gone.clear();
            index.evict(lacking, &mut |_| true, &mut |ids| gone.extend_from_slice(ids));
            for &id in gone.iter() {
                pool.uncache(id)?;
            }
            outcome.evictions += gone.len() as u64;
        }
        table.resize(blocks, BlockId::NONE);
        pool.allocate_n(&mut table[hits..])?;
        outcome.allocate.push(lap(&mut then));

        let rest = &tokens[hits * block_tokens..];
        // Not below the hit's own position: eviction may have taken what followed in its edge.
        let stored = index.insert_below(space, index.pinned(held)?, rest, &table[hits..], same)?;
        if stored.stored != missing {
            return Err(format!("{} of {missing} blocks were stored", stored.stored).into());
        }
        for &id in &table[hits..] {
            pool.cache(id)?;
        }
        outcome.insert.push(lap(&mut then));

        pool.free_n(table)?;
        index.release(held)?;
        outcome.release.push(lap(&mut then));
        outcome.hit_blocks += hits as u64;
        outcome.hit_tokens += ((hits * block_tokens) as u64).min(request.tokens);
        outcome.peak_blocks =
            outcome.peak_blocks.max(u64::from(pool.blocks() - pool.free_blocks()));
        Ok(stored.at)
    }

    /// Tells the index what an engine knows at the end of a request. `shared`: blocks that it has
    /// in common with the request before in its stream.
    fn tell(
        &mut self,
        request: &Request,
        n: usize,
        at: Position,
        shared: usize,
    ) -> Result<(), Box<dyn Error>> {
        if !matches!(self.setup.policy, Policy::Ended | Policy::Hints) {
            return Ok(());
        }
        let mut then = Instant::now();
        let left = std::mem::replace(&mut self.ends[request.stream as usize], at);
        let lie = ((n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / (1 << 24) as f64;
        let lie = lie < self.setup.lies;
        if shared < left.blocks() {
            // The conversation went on from before that end. Stale where it was evicted since.
            let _ = self.index.hint(left, shared, Hint::SessionEnded);
        }
        if request.last != lie {
            self.index.hint(at, 0, Hint::SessionEnded)?;
        } else if self.setup.policy == Policy::Hints {
            let soon = request.tool_call != lie;
            let priority = if soon { 50 } else { 35 };
            let duration_ms = soon.then_some(120_000);
            self.index
                .prioritize(at, &[Retention { start: 0, end: None, priority, duration_ms }])?;
        }
        self.outcome.hint.push(lap(&mut then));
        Ok(())
    }
}
