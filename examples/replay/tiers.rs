//! `--host-blocks` and `--disk-blocks`: the trace through a whole `KvCache` with a host tier below the
//! device, and a disk tier below that, in a directory that is removed afterwards.
//!
//! A block of the trace is a block of 16 tokens of a very small model here, whose bytes are really
//! copied, written and read; hits are whole blocks either way. Bytes and seconds are those of the model
//! that the command line describes, with the trace's own tokens a block. Requests are served one after
//! the other, each when what the one before demoted has been written; output tokens are not cached.

use std::error::Error;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache::cache::{CacheOptions, Demotion, KvCache, LowerTier, Progress, Step};
use kvcache::cache::{TierOptions, Work};
use kvcache::dtype::KvFormat;
use kvcache::ids::Namespace;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::object::object_bytes;
use kvcache::tier::{Configuration, TierKind, TierSettings};

use crate::expand::Prompts;
use crate::report::percent;
use crate::trace::Trace;

const BLOCK: usize = 16;
/// What no block of a trace begins with: the token that is left to compute.
const LAST: u32 = (1 << 31) - 1;
const MODEL: &str = "replay";
/// Blocks of host memory for what is on its way to the disk and back: more than any request has.
/// What is there of it serves hits of the host, too, until the room is needed.
const TRANSIT: usize = 512;
const LONG: Duration = Duration::from_secs(60);

/// Sizes, and the model that bytes and seconds are of.
#[derive(Debug, Clone, Copy)]
pub struct TierSetup {
    pub device_blocks: u32,
    pub host_blocks: usize,
    /// 0 for no disk tier.
    pub disk_blocks: usize,
    /// Bytes of K and V of a token.
    pub token_bytes: f64,
    /// Seconds to compute a token.
    pub prefill_seconds: f64,
    /// Bytes a second from the host to the device.
    pub bandwidth: f64,
    /// The same from the disk.
    pub disk_bandwidth: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TierOutcome {
    pub requested_blocks: u64,
    pub device_hits: u64,
    /// Of blocks that were in host memory.
    pub host_hits: u64,
    /// Of blocks that came from the disk.
    pub disk_hits: u64,
    /// Blocks copied to the host.
    pub demoted: u64,
    /// Evictions for which nothing was copied, because the host had the block.
    pub kept: u64,
    /// Blocks written to the disk.
    pub written: u64,
    /// Blocks that the disk was to have and has not: the queue was full, or it failed.
    pub dropped: u64,
    pub seconds: f64,
}

/// The directory of a disk tier; it ends with this.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> std::io::Result<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("kvcache-replay-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn disk(scratch: &Scratch, spec: &CacheSpec, blocks: usize) -> Result<LowerTier, Box<dyn Error>> {
    let config = Configuration::new(MODEL, spec, &Slice::whole(spec))?;
    let bytes = object_bytes(config.payload_bytes()).ok_or("too large a block")?;
    let options = DiskOptions::new(&scratch.0, bytes * blocks as u64);
    let settings =
        TierSettings { kind: TierKind::Disk, readers: 2, writers: 1, queued_blocks: TRANSIT };
    let store = Arc::new(DiskStore::open(&options, &config)?.0);
    Ok(LowerTier {
        store,
        settings,
        demotion: Demotion { least_priority: 0, ..Demotion::default() },
    })
}

/// Waits until nothing is on its way to a lower tier.
fn settle(cache: &KvCache) {
    while cache.tier_reports().iter().any(|report| report.counters.queued > 0) {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// What is loaded from the tiers so far: from the host, and by it from the disk.
fn loaded(cache: &KvCache) -> [u64; 2] {
    let reports = cache.tier_reports();
    [0, 1].map(|n| reports.get(n).map_or(0, |report| report.counters.loaded))
}

pub fn replay(
    trace: &Trace,
    setup: &TierSetup,
    tick: &mut dyn FnMut(usize),
) -> Result<TierOutcome, Box<dyn Error>> {
    let spec = CacheSpec::uniform(BLOCK as u32, GroupSpec::latent(1, 8, 0, KvFormat::F16));
    let options = CacheOptions {
        blocks: setup.device_blocks,
        max_seqs: 1,
        threads: 1,
        ..CacheOptions::default()
    };
    let mut cache = KvCache::new(&spec, &options)?;
    // Before the cache, which it outlives.
    let scratch = if setup.disk_blocks > 0 { Some(Scratch::new()?) } else { None };
    if setup.host_blocks > 0 || scratch.is_some() {
        let mut tiers = TierOptions::host(MODEL, setup.host_blocks);
        if let Some(scratch) = &scratch {
            tiers.transit_blocks = TRANSIT;
            tiers.lower.push(disk(scratch, &spec, setup.disk_blocks)?);
        }
        cache.attach_tiers(tiers)?;
    }
    let small = Trace { block_tokens: BLOCK, ..trace.clone() };
    let mut prompts = Prompts::of(&small);
    let (mut outcome, mut step, mut tokens) = (TierOutcome::default(), Step::new(), Vec::new());
    let begin = Instant::now();
    for n in 0..small.requests.len() {
        let request = &small.requests[n];
        let prompt = prompts.expand(&small, n);
        outcome.requested_blocks += (prompt.tokens.len() / BLOCK) as u64;
        // One block is for the last token; what the device has no room for is not served.
        let most = prompt.tokens.len().min((setup.device_blocks as usize - 1) * BLOCK);
        tokens.clear();
        tokens.extend_from_slice(&prompt.tokens[..most]);
        tokens.push(LAST);
        let space = Namespace(request.space.into());
        let before = loaded(&cache);
        if scratch.is_some() {
            settle(&cache);
            let mut load = cache.prefetch(&tokens, space)?;
            if cache.wait_prefetch(&mut load, LONG) != Progress::Done {
                return Err("the disk takes too long".into());
            }
        }
        let started = cache.start(&tokens, space)?;
        let after = loaded(&cache);
        let [brought, from_disk] = [after[0] - before[0], after[1] - before[1]];
        let cached = started.cached_tokens as usize;
        outcome.disk_hits += from_disk.min(brought);
        outcome.host_hits += brought.saturating_sub(from_disk);
        outcome.device_hits += (cached / BLOCK) as u64 - brought;
        cache.begin(&mut step, &[Work { seq: started.seq, tokens: &tokens[cached..] }])?;
        cache.commit(&mut step)?;
        cache.release(started.seq)?;
        if n % 64 == 0 {
            tick(n);
        }
    }
    outcome.seconds = begin.elapsed().as_secs_f64();
    settle(&cache);
    if let Some(host) = cache.tier_reports().first() {
        (outcome.demoted, outcome.kept) = (host.counters.stored, host.counters.present);
    }
    if let Some(disk) = cache.tier_reports().get(1) {
        let counted = disk.counters;
        outcome.written = counted.stored;
        outcome.dropped = counted.dropped + counted.full + counted.failures;
    }
    cache.audit()?;
    Ok(outcome)
}

impl TierOutcome {
    pub fn hits(&self) -> u64 {
        self.device_hits + self.host_hits + self.disk_hits
    }

    pub fn text(&self, setup: &TierSetup, block_tokens: usize) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<34}{value:>24}");
        };
        let share =
            |blocks: u64| format!("{blocks} ({:.2} %)", percent(blocks, self.requested_blocks));
        let tokens = |blocks: u64| blocks as f64 * block_tokens as f64;
        let gigabytes = |blocks: u64| format!("{:.1} GB", tokens(blocks) * setup.token_bytes / 1e9);
        row("blocks requested", self.requested_blocks.to_string());
        row("hit on the device", share(self.device_hits));
        row("hit in the host", share(self.host_hits));
        if setup.disk_blocks > 0 {
            row("hit on the disk", share(self.disk_hits));
        }
        row("hit in all", share(self.hits()));
        row("copied to the host", gigabytes(self.demoted));
        row("not copied: it had them", gigabytes(self.kept));
        row("loaded from the host", gigabytes(self.host_hits));
        if setup.disk_blocks > 0 {
            row("written to the disk", gigabytes(self.written));
            row("not written, nor held there", gigabytes(self.dropped));
            row("loaded from the disk", gigabytes(self.disk_hits));
        }
        let computing = tokens(self.host_hits + self.disk_hits) * setup.prefill_seconds;
        // From the disk to the host, and from there to the device.
        let loading = tokens(self.host_hits + self.disk_hits) * setup.token_bytes / setup.bandwidth
            + tokens(self.disk_hits) * setup.token_bytes / setup.disk_bandwidth;
        row("computing those would take", format!("{computing:.0} s"));
        row("loading them takes", format!("{loading:.0} s"));
        row("saved", format!("{:.0} s", computing - loading));
        row("replay", format!("{:.2} s", self.seconds));
        text
    }
}
