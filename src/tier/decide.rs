//! Load or compute: up to where in a prompt loading blocks beats computing them.
//!
//! Loading the first `k` of the found blocks takes, for each tier that has some of them, its latency
//! and their bytes at its bandwidth; computing them takes what the engine says prefill costs. The
//! answer is the `k` that saves most, and why.

use alloc::sync::Arc;
use core::fmt;

use super::rate::Rate;

/// What prefill costs the engine.
#[derive(Clone, Default)]
pub enum PrefillCost {
    /// Not known: whatever is found is loaded.
    #[default]
    Unknown,
    /// Seconds a token.
    PerToken(f64),
    /// Seconds for tokens `first..end` of a prompt, given those before.
    Of(Arc<dyn Fn(u64, u64) -> f64 + Send + Sync>),
}

impl PrefillCost {
    /// Seconds for tokens `first..end`; `None` where it is not known, or the engine says what
    /// cannot be.
    pub fn seconds(&self, first: u64, end: u64) -> Option<f64> {
        let seconds = match self {
            PrefillCost::Unknown => return None,
            PrefillCost::PerToken(seconds) => seconds * end.saturating_sub(first) as f64,
            PrefillCost::Of(cost) => cost(first, end),
        };
        (seconds >= 0.0 && seconds.is_finite()).then_some(seconds)
    }
}

impl fmt::Debug for PrefillCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PrefillCost::Unknown => f.write_str("Unknown"),
            PrefillCost::PerToken(seconds) => f.debug_tuple("PerToken").field(seconds).finish(),
            PrefillCost::Of(_) => f.write_str("Of(..)"),
        }
    }
}

/// Blocks that follow each other and are in one tier.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    /// How many.
    pub blocks: usize,
    /// How fast the tier gives them.
    pub rate: Rate,
}

/// Why so much is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// No tier has the next block.
    NothingFound,
    /// What prefill costs is not known.
    CostUnknown,
    /// No load from this tier was timed yet: this one will be.
    RateUnknown,
    /// Loading all that was found is faster than computing it.
    LoadIsFaster,
    /// Loading is faster up to a point, and computing from there on.
    LoadIsFasterAtFirst,
    /// Computing is faster.
    ComputeIsFaster,
}

impl Why {
    /// In words.
    pub const fn text(self) -> &'static str {
        match self {
            Why::NothingFound => "no tier has the next block",
            Why::CostUnknown => "the cost of prefill is not known",
            Why::RateUnknown => "no load from this tier was timed yet",
            Why::LoadIsFaster => "loading is faster than computing",
            Why::LoadIsFasterAtFirst => "loading is faster up to here, computing from here on",
            Why::ComputeIsFaster => "computing is faster than loading",
        }
    }
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// Leading blocks to load.
    pub blocks: usize,
    /// Blocks that were found.
    pub found: usize,
    /// What loading those takes, in seconds; 0 where it is not known.
    pub load_seconds: f64,
    /// What computing the same takes, in seconds; 0 where it is not known.
    pub compute_seconds: f64,
    /// Why.
    pub why: Why,
}

/// Decides for blocks found behind `first_token` tokens that are there already.
pub fn decide(
    found: &[Found],
    first_token: u64,
    block_tokens: u64,
    block_bytes: u64,
    cost: &PrefillCost,
) -> Decision {
    decide_by(found, |blocks| blocks as u64 * block_tokens, first_token, block_bytes, cost)
}

/// The same where what is found are objects, of `object_bytes` bytes each, and some of them are parts of a
/// block: `tokens` says how many tokens the first so many objects are all of. So far as it counts blocks, the
/// answer counts objects.
pub(crate) fn decide_by(
    found: &[Found],
    tokens: impl Fn(usize) -> u64,
    first_token: u64,
    object_bytes: u64,
    cost: &PrefillCost,
) -> Decision {
    let all: usize = found.iter().map(|part| part.blocks).sum();
    let everything =
        |why| Decision { blocks: all, found: all, load_seconds: 0.0, compute_seconds: 0.0, why };
    if all == 0 {
        return everything(Why::NothingFound);
    }
    if cost.seconds(first_token, first_token + tokens(all)).is_none() {
        return everything(Why::CostUnknown);
    }
    if found.iter().any(|part| part.blocks > 0 && part.rate.seconds(object_bytes).is_none()) {
        return everything(Why::RateUnknown);
    }
    let compute =
        |blocks: usize| cost.seconds(first_token, first_token + tokens(blocks)).unwrap_or(0.0);
    let (mut best, mut best_load, mut best_saved) = (0, 0.0, 0.0);
    let (mut before, mut before_seconds) = (0, 0.0);
    for part in found {
        let load = |blocks: u64| part.rate.seconds(blocks.saturating_mul(object_bytes));
        for blocks in 1..=part.blocks {
            let seconds = before_seconds + load(blocks as u64).unwrap_or(f64::INFINITY);
            let saved = compute(before + blocks) - seconds;
            if saved > best_saved {
                (best, best_load, best_saved) = (before + blocks, seconds, saved);
            }
        }
        if part.blocks > 0 {
            before_seconds += load(part.blocks as u64).unwrap_or(f64::INFINITY);
        }
        before += part.blocks;
    }
    let why = match best {
        0 => Why::ComputeIsFaster,
        _ if best == all => Why::LoadIsFaster,
        _ => Why::LoadIsFasterAtFirst,
    };
    Decision {
        blocks: best,
        found: all,
        load_seconds: best_load,
        compute_seconds: compute(best),
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::time::Duration;

    /// A tier of this latency and this many bytes a second.
    fn rate(latency: f64, bandwidth: f64) -> Rate {
        let mut rate = Rate::new();
        for n in 0..100u64 {
            let bytes = (n % 5 + 1) * 1_000_000;
            rate.observe(bytes, Duration::from_secs_f64(latency + bytes as f64 / bandwidth));
        }
        rate
    }

    const TOKENS: u64 = 64;
    const BYTES: u64 = 1_000_000;

    fn choose(found: &[Found], cost: PrefillCost) -> Decision {
        decide(found, 128, TOKENS, BYTES, &cost)
    }

    #[test]
    fn it_loads_where_bytes_take_less_than_tokens() {
        // 1 ms a block to load; 64 tokens at 100 us take 6.4 ms, at 1 us 64 us.
        let found = [Found { blocks: 10, rate: rate(0.0, 1e9) }];
        let slow = choose(&found, PrefillCost::PerToken(100e-6));
        assert_eq!((slow.blocks, slow.why), (10, Why::LoadIsFaster));
        assert!((slow.load_seconds - 0.01).abs() < 1e-5);
        assert!((slow.compute_seconds - 0.064).abs() < 1e-9);
        let fast = choose(&found, PrefillCost::PerToken(1e-6));
        assert_eq!((fast.blocks, fast.why), (0, Why::ComputeIsFaster));
    }

    #[test]
    fn latency_makes_short_hits_not_worth_it() {
        let cost = PrefillCost::PerToken(100e-6);
        for (blocks, expected) in [(1, 0), (9, 0), (10, 10), (40, 40)] {
            // 50 ms before the first byte are won back after 50 / 5.4 blocks.
            let found = [Found { blocks, rate: rate(0.05, 1e9) }];
            assert_eq!(choose(&found, cost.clone()).blocks, expected, "{blocks} blocks");
        }
    }

    #[test]
    fn a_slow_tier_behind_a_fast_one_is_left_alone() {
        let found =
            [Found { blocks: 4, rate: rate(0.0, 1e9) }, Found { blocks: 8, rate: rate(0.0, 1e7) }];
        let decision = choose(&found, PrefillCost::PerToken(100e-6));
        assert_eq!((decision.blocks, decision.found), (4, 12));
        assert_eq!(decision.why, Why::LoadIsFasterAtFirst);
        // A cost that grows with the position makes the rest worth it in the end.
        let grows =
            PrefillCost::Of(Arc::new(|first, end| (first..end).map(|t| t as f64 * 1e-5).sum()));
        assert_eq!(choose(&found, grows).why, Why::LoadIsFaster);
    }

    #[test]
    fn what_is_not_known_is_said() {
        let known = [Found { blocks: 3, rate: rate(0.0, 1e9) }];
        let cost = PrefillCost::PerToken(1e-9);
        assert_eq!(choose(&[], cost.clone()).why, Why::NothingFound);
        let decision = choose(&known, PrefillCost::Unknown);
        assert_eq!((decision.blocks, decision.why), (3, Why::CostUnknown));
        assert_eq!(choose(&known, PrefillCost::PerToken(f64::NAN)).why, Why::CostUnknown);
        assert_eq!(choose(&known, PrefillCost::PerToken(-1.0)).why, Why::CostUnknown);
        let new = [Found { blocks: 3, rate: Rate::new() }];
        let decision = choose(&new, cost);
        assert_eq!((decision.blocks, decision.why), (3, Why::RateUnknown));
    }
}
