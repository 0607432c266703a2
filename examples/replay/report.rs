//! What a replay came to, as text and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// How long one operation took in each request, in ns.
#[derive(Debug, Clone, Default)]
pub struct Latency(Vec<u32>);

impl Latency {
    pub fn push(&mut self, ns: u32) {
        self.0.push(ns);
    }

    /// The value that a `share` of all is at or below, in us; 0 where there is none.
    pub fn quantile_us(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let at = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
        sorted.get(at).map_or(0.0, |&ns| f64::from(ns) / 1000.0)
    }
}

#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub requests: u64,
    pub requested_blocks: u64,
    pub requested_tokens: u64,
    /// Tokens that the requested blocks have room for.
    pub slot_tokens: u64,
    pub hit_blocks: u64,
    pub hit_tokens: u64,
    pub evictions: u64,
    pub peak_blocks: u64,
    /// The whole replay, with the making of tokens and without parsing.
    pub seconds: f64,
    /// The part of it in which tokens were made from hash ids.
    pub expand_seconds: f64,
    pub lookup: Latency,
    pub allocate: Latency,
    pub insert: Latency,
    pub release: Latency,
    pub hint: Latency,
}

/// What is known of the trace apart from the replay.
pub struct Bounds {
    pub ideal_hit_blocks: u64,
    pub optimum_hit_blocks: u64,
    pub distinct_blocks: u64,
    pub parse_seconds: f64,
}

pub fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

impl Outcome {
    pub fn waste_fraction(&self) -> f64 {
        let wasted = self.slot_tokens.saturating_sub(self.requested_tokens);
        wasted as f64 / self.slot_tokens.max(1) as f64
    }

    fn operations(&self) -> [(&'static str, &Latency); 5] {
        [
            ("lookup", &self.lookup),
            ("allocate", &self.allocate),
            ("insert", &self.insert),
            ("release", &self.release),
            ("hint", &self.hint),
        ]
    }

    pub fn to_json(&self, bounds: &Bounds, policy: &str, capacity: u32, tokens: usize) -> Value {
        let mut value = json!({
            "policy": policy,
            "capacity_blocks": capacity,
            "block_tokens": tokens,
            "requests": self.requests,
            "requested_blocks": self.requested_blocks,
            "requested_tokens": self.requested_tokens,
            "distinct_blocks": bounds.distinct_blocks,
            "hit_blocks": self.hit_blocks,
            "ideal_hit_blocks": bounds.ideal_hit_blocks,
            "optimum_hit_blocks": bounds.optimum_hit_blocks,
            "hit_tokens": self.hit_tokens,
            "evictions": self.evictions,
            "peak_blocks": self.peak_blocks,
            "waste_fraction": self.waste_fraction(),
            "parse_seconds": bounds.parse_seconds,
            "expand_seconds": self.expand_seconds,
            "seconds": self.seconds,
        });
        for (name, latency) in self.operations() {
            value[format!("{name}_us")] = json!({
                "median": latency.quantile_us(0.5),
                "p99": latency.quantile_us(0.99),
            });
        }
        value
    }

    pub fn to_text(&self, bounds: &Bounds) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<28}{value:>24}");
        };
        let share = |part, whole| format!("{part} ({:.2} %)", percent(part, whole));
        row("requests", self.requests.to_string());
        row("blocks requested", self.requested_blocks.to_string());
        row("different blocks", bounds.distinct_blocks.to_string());
        row("blocks hit", share(self.hit_blocks, self.requested_blocks));
        row("ideal, without bounds", share(bounds.ideal_hit_blocks, self.requested_blocks));
        row("optimum, with the capacity", share(bounds.optimum_hit_blocks, self.requested_blocks));
        row("tokens hit", share(self.hit_tokens, self.requested_tokens));
        row("blocks evicted", self.evictions.to_string());
        row("peak blocks", self.peak_blocks.to_string());
        row("wasted in last blocks", format!("{:.3} %", 100.0 * self.waste_fraction()));
        row("parsing", format!("{:.3} s", bounds.parse_seconds));
        row("replay", format!("{:.3} s", self.seconds));
        row("  of it making tokens", format!("{:.3} s", self.expand_seconds));
        let _ = writeln!(text, "\n{:<28}{:>12}{:>12}", "us a request", "median", "p99");
        for (name, latency) in self.operations() {
            let (median, p99) = (latency.quantile_us(0.5), latency.quantile_us(0.99));
            if p99 > 0.0 {
                let _ = writeln!(text, "{name:<28}{median:>12.2}{p99:>12.2}");
            }
        }
        text
    }
}
