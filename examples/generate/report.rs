//! What the example prints: progress on stderr, texts and figures on stdout.

use std::error::Error;
use std::io::{IsTerminal, Write, stderr};
use std::time::Duration;

use kvcache::cache::{CacheStats, KvCache};
use serde_json::json;

use crate::args::Args;
use crate::check;
use crate::model::Model;
use crate::serve::{Figures, Output};

/// A bar on a terminal, a line every quarter in a pipe.
pub struct Progress {
    total: usize,
    terminal: bool,
    printed: usize,
}

impl Progress {
    pub fn new(total: usize) -> Self {
        Self { total, terminal: stderr().is_terminal(), printed: 0 }
    }

    pub fn at(&mut self, tokens: usize) {
        if self.terminal {
            let filled = tokens * 40 / self.total;
            eprint!(
                "\r[{}{}] {tokens}/{}",
                "#".repeat(filled),
                " ".repeat(40 - filled),
                self.total
            );
            // A bar that cannot be drawn is no reason to stop.
            let _ = stderr().flush();
        } else if tokens * 4 / self.total > self.printed {
            self.printed = tokens * 4 / self.total;
            eprintln!("generated {tokens} of {} tokens", self.total);
        }
    }

    pub fn end(&self) {
        if self.terminal {
            eprint!("\r{}\r", " ".repeat(64));
        }
    }
}

/// Bytes that `sequences` contiguous caches of the model's maximum length would take.
pub fn contiguous_bytes(cache: &KvCache, sequences: usize, max_tokens: usize) -> u64 {
    let token_bytes = cache.stats().block_bytes / u64::from(cache.spec().block_tokens);
    token_bytes * sequences as u64 * max_tokens as u64
}

pub struct Report<'a> {
    pub questions: &'a [String],
    pub texts: &'a [String],
    pub outputs: &'a [Output],
    pub figures: &'a Figures,
    pub served_time: Duration,
    pub device: &'a str,
    pub stats: CacheStats,
    pub block_tokens: u64,
    pub contiguous_bytes: u64,
    pub checked: Option<&'a check::Report>,
}

impl Report<'_> {
    /// Blocks and bytes at the peak, and the share of them that the last blocks waste.
    fn memory(&self) -> (u32, u64, f64) {
        let peak = self.figures.peak.unwrap_or(self.stats);
        let blocks = peak.referenced_blocks;
        let bytes = u64::from(blocks) * peak.block_bytes;
        let slots = u64::from(blocks) * self.block_tokens;
        (blocks, bytes, peak.waste_tokens as f64 / slots.max(1) as f64)
    }

    fn rates(&self) -> (f64, f64) {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let f = self.figures;
        (rate(f.prefill_tokens, f.prefill_time), rate(f.decode_tokens, f.decode_time))
    }

    pub fn print_json(&self) -> Result<(), Box<dyn Error>> {
        let (blocks, bytes, waste) = self.memory();
        let (prefill, decode) = self.rates();
        let sequences: Vec<_> = self
            .questions
            .iter()
            .zip(self.texts)
            .zip(self.outputs)
            .map(|((prompt, text), output)| json!({ "prompt": prompt, "text": text, "tokens": output.tokens }))
            .collect();
        let mut object = json!({
            "sequences": sequences,
            "device": self.device,
            "seconds": self.served_time.as_secs_f64(),
            "prompt_tokens": self.figures.prompt_tokens,
            "prefix_hit_tokens": self.stats.hit_tokens,
            "blocks_used": blocks,
            "cache_bytes": bytes,
            "contiguous_bytes": self.contiguous_bytes,
            "waste_fraction": waste,
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
        });
        if let Some(checked) = self.checked {
            object["max_relative_error"] = json!(checked.max_relative_error);
            object["tokens_equal"] = json!(checked.tokens_equal);
        }
        println!("{}", serde_json::to_string_pretty(&object)?);
        Ok(())
    }

    pub fn print(&self, model: &Model, args: &Args) {
        for (question, text) in self.questions.iter().zip(self.texts) {
            println!("> {question}{}\n", text.trim_end());
        }
        let (blocks, bytes, waste) = self.memory();
        let (prefill, decode) = self.rates();
        let parameters = model.config.parameters() as f64 / 1e6;
        let prompt_tokens = self.figures.prompt_tokens;
        let hits = self.stats.hit_tokens;
        let row = |name: &str, value: String| println!("{name:<34}{value}");
        let mut stored = args.format.name().to_string();
        if let Some(edges) = args.edges {
            stored += &format!(", {} in the first and last layer", edges.name());
        }
        if args.sink_tokens != 0 {
            stored += &format!(", the first {} tokens raw", args.sink_tokens);
        }
        row("model", format!("{parameters:.2} M parameters, KV in {stored}"));
        let seconds = self.served_time.as_secs_f64();
        row("device", format!("{}, {seconds:.1} s in all", self.device));
        row("prompt tokens", format!("{prompt_tokens}"));
        let share = 100.0 * hits as f64 / prompt_tokens as f64;
        row("found in the prefix index", format!("{hits} ({share:.1} %)"));
        row("blocks used at the peak", format!("{blocks} (of {} tokens each)", args.block_tokens));
        row("memory held at the peak", format!("{:.1} KiB", bytes as f64 / 1024.0));
        let contiguous = self.contiguous_bytes as f64;
        let ratio = contiguous / bytes as f64;
        row(
            "contiguous, at maximum length",
            format!("{:.1} KiB ({ratio:.1} times)", contiguous / 1024.0),
        );
        row("waste in the last blocks", format!("{:.2} %", 100.0 * waste));
        row("prefill", format!("{prefill:.0} tokens/s"));
        row("decode", format!("{decode:.0} tokens/s"));
        if let Some(checked) = self.checked {
            row("check: largest relative error", format!("{:.2e}", checked.max_relative_error));
            row("check: allowed", format!("{:.0e}", checked.tolerance));
            let ties = checked.ties;
            row("check: greedy tokens equal", format!("{} ({ties} ties)", checked.tokens_equal));
            row("check", String::from(if checked.passed() { "passed" } else { "FAILED" }));
        }
    }
}
