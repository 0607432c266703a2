//! `--host-blocks`: the trace through a whole `KvCache` with a host tier below the device.
//!
//! A block of the trace is a block of 16 tokens of a very small model here, whose bytes are really
//! copied; hits are whole blocks either way. Bytes and seconds are those of the model that the
//! command line describes, with the trace's own tokens a block. Requests are served one after the
//! other, output tokens are not cached.

use std::error::Error;
use std::fmt::Write as _;
use std::time::Instant;

use kvcache::cache::{CacheOptions, KvCache, Step, TierOptions, Work};
use kvcache::dtype::KvFormat;
use kvcache::ids::Namespace;
use kvcache::layout::{CacheSpec, GroupSpec};

use crate::expand::Prompts;
use crate::report::percent;
use crate::trace::Trace;

const BLOCK: usize = 16;
/// What no block of a trace begins with: the token that is left to compute.
const LAST: u32 = (1 << 31) - 1;

/// Sizes, and the model that bytes and seconds are of.
#[derive(Debug, Clone, Copy)]
pub struct TierSetup {
    pub device_blocks: u32,
    pub host_blocks: usize,
    /// Bytes of K and V of a token.
    pub token_bytes: f64,
    /// Seconds to compute a token.
    pub prefill_seconds: f64,
    /// Bytes a second from the host to the device.
    pub bandwidth: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TierOutcome {
    pub requested_blocks: u64,
    pub device_hits: u64,
    pub host_hits: u64,
    /// Blocks copied to the host.
    pub demoted: u64,
    /// Evictions for which nothing was copied, because the host had the block.
    pub kept: u64,
    pub seconds: f64,
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
    if setup.host_blocks > 0 {
        cache.attach_tiers(TierOptions::host("replay", setup.host_blocks))?;
    }
    let small = Trace { block_tokens: BLOCK, ..trace.clone() };
    let mut prompts = Prompts::of(&small);
    let (mut outcome, mut step, mut tokens) = (TierOutcome::default(), Step::new(), Vec::new());
    let begin = Instant::now();
    let loaded = |cache: &KvCache| cache.tier_reports().first().map_or(0, |r| r.counters.loaded);
    for n in 0..small.requests.len() {
        let request = &small.requests[n];
        let prompt = prompts.expand(&small, n);
        outcome.requested_blocks += (prompt.tokens.len() / BLOCK) as u64;
        // One block is for the last token; what the device has no room for is not served.
        let most = prompt.tokens.len().min((setup.device_blocks as usize - 1) * BLOCK);
        tokens.clear();
        tokens.extend_from_slice(&prompt.tokens[..most]);
        tokens.push(LAST);
        let before = loaded(&cache);
        let started = cache.start(&tokens, Namespace(request.space.into()))?;
        let from_host = loaded(&cache) - before;
        let cached = started.cached_tokens as usize;
        outcome.host_hits += from_host;
        outcome.device_hits += (cached / BLOCK) as u64 - from_host;
        cache.begin(&mut step, &[Work { seq: started.seq, tokens: &tokens[cached..] }])?;
        cache.commit(&mut step)?;
        cache.release(started.seq)?;
        if n % 64 == 0 {
            tick(n);
        }
    }
    outcome.seconds = begin.elapsed().as_secs_f64();
    if let Some(host) = cache.tier_reports().first() {
        (outcome.demoted, outcome.kept) = (host.counters.stored, host.counters.present);
    }
    cache.audit()?;
    Ok(outcome)
}

impl TierOutcome {
    pub fn hits(&self) -> u64 {
        self.device_hits + self.host_hits
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
        row("hit in all", share(self.hits()));
        row("copied to the host", gigabytes(self.demoted));
        row("not copied: it had them", gigabytes(self.kept));
        row("loaded from the host", gigabytes(self.host_hits));
        let computing = tokens(self.host_hits) * setup.prefill_seconds;
        let loading = tokens(self.host_hits) * setup.token_bytes / setup.bandwidth;
        row("computing those would take", format!("{computing:.0} s"));
        row("loading them takes", format!("{loading:.0} s"));
        row("saved", format!("{:.0} s", computing - loading));
        row("replay", format!("{:.2} s", self.seconds));
        text
    }
}
