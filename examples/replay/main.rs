//! Replays a trace of real requests through block pool, prefix index and eviction.
//!
//! ```text
//! cargo run --release --example replay -- TRACE --capacity-blocks 10000 --policy lru
//! ```
//!
//! The trace's hash ids become tokens, a full block each; what is found is found by comparing them.
//! Beside the replay stand the ideal (a cache without bounds) and Belady's optimum for the capacity.

mod args;
mod cache;
mod expand;
mod optimum;
mod plot;
mod report;
#[cfg(test)]
mod tests;
mod tiers;
mod trace;

use std::error::Error;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Instant;

use args::Args;
use cache::{Policy, Setup, replay};
use optimum::Future;
use plot::Line;
use report::{Bounds, percent};
use tiers::TierSetup;
use trace::Trace;

fn main() -> ExitCode {
    let args = match args::parse(std::env::args().skip(1)) {
        Ok(Some(args)) => args,
        Ok(None) => {
            println!("{}", args::USAGE);
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("error: {error}\n\n{}", args::USAGE);
            return ExitCode::from(2);
        }
    };
    let shown = run(&args).and_then(|text| match std::io::stdout().write_all(text.as_bytes()) {
        // A reader that has seen enough is no failure.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    });
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<String, Box<dyn Error>> {
    let begin = Instant::now();
    let mut trace = Trace::open(&args.trace, args.users)?;
    if let Some(requests) = args.requests {
        trace.requests.truncate(requests);
    }
    if let Some(host_blocks) = args.host_blocks {
        return run_tiers(args, &trace, host_blocks);
    }
    let parse_seconds = begin.elapsed().as_secs_f64();
    let block_tokens = args.block_tokens.unwrap_or(trace.block_tokens);
    if !trace.block_tokens.is_multiple_of(block_tokens) {
        let whole = trace.block_tokens;
        return Err(format!("--block-tokens: must divide the trace's {whole}").into());
    }
    // Blocks of the cache in one of the trace.
    let parts = (trace.block_tokens / block_tokens) as u64;
    let future = Future::of(&trace);
    let distinct = future.distinct_blocks * parts;
    let needed = trace.requests.iter().map(|r| trace.blocks_of(r) * parts).max().unwrap_or(1);
    let whole =
        u32::try_from(distinct.max(needed)).map_err(|_| "more blocks than a pool can have")?;
    if let Some(path) = &args.plot {
        let svg = draw(args, &trace, &future, block_tokens, whole)?;
        std::fs::write(path, svg).map_err(|error| format!("{}: {error}", path.display()))?;
        return Ok(format!("{}\n", path.display()));
    }
    let capacity_blocks = args.capacity_blocks.unwrap_or(whole);
    let setup = Setup { policy: args.policy, capacity_blocks, block_tokens, lies: args.lies };
    let mut bar = Bar::new(args, trace.requests.len());
    let outcome = replay(&trace, setup, &mut |done| bar.show(args.policy.name(), done))?;
    bar.clear();
    let bounds = Bounds {
        ideal_hit_blocks: future.ideal_hit_blocks * parts,
        optimum_hit_blocks: future.optimum(u64::from(capacity_blocks) / parts) * parts,
        distinct_blocks: distinct,
        parse_seconds,
    };
    if args.json {
        let value = outcome.to_json(&bounds, args.policy.name(), capacity_blocks, block_tokens);
        return Ok(format!("{value:#}\n"));
    }
    Ok(outcome.to_text(&bounds))
}

/// The replay with tiers; with `--plot` from a host tier of a 32nd of `host_blocks` to one of all.
fn run_tiers(args: &Args, trace: &Trace, host_blocks: usize) -> Result<String, Box<dyn Error>> {
    let device_blocks = args.capacity_blocks.ok_or("--host-blocks needs --capacity-blocks")?;
    if device_blocks < 2 {
        return Err("--capacity-blocks: at least 2 with --host-blocks".into());
    }
    let setup = |host_blocks| TierSetup {
        device_blocks,
        host_blocks,
        disk_blocks: args.disk_blocks,
        token_bytes: args.token_bytes,
        prefill_seconds: args.prefill_us / 1e6,
        bandwidth: args.load_gbps * 1e9,
        disk_bandwidth: args.disk_gbps * 1e9,
    };
    let mut bar = Bar::new(args, trace.requests.len());
    let mut serve = |host_blocks| {
        let label = format!("host {host_blocks}");
        tiers::replay(trace, &setup(host_blocks), &mut |done| bar.show(&label, done))
    };
    let Some(path) = &args.plot else {
        let outcome = serve(host_blocks)?;
        bar.clear();
        return Ok(outcome.text(&setup(host_blocks), trace.block_tokens));
    };
    let sizes: Vec<usize> = (0..=5).rev().map(|halvings| host_blocks >> halvings).collect();
    // From the device down: what each tier serves with those above it.
    let mut rates = [const { Vec::new() }; 3];
    let mut requested = 0;
    for &size in &sizes {
        let outcome = serve(size)?;
        requested = outcome.requested_blocks;
        let mut hits = 0;
        let tiers = [outcome.device_hits, outcome.host_hits, outcome.disk_hits];
        for (rates, tier) in rates.iter_mut().zip(tiers) {
            hits += tier;
            rates.push(percent(hits, requested));
        }
    }
    bar.clear();
    let ideal = percent(Future::of(trace).ideal_hit_blocks, requested);
    let [device, host, disk] = rates;
    let mut lines = vec![
        Line { name: "on the device".into(), rates: device },
        Line { name: "or in the host".into(), rates: host },
        Line { name: "or on the disk".into(), rates: disk },
        Line { name: "without bounds".into(), rates: vec![ideal; sizes.len()] },
    ];
    if args.disk_blocks == 0 {
        lines.remove(2);
    }
    let title = match args.disk_blocks {
        0 => format!("blocks hit, {device_blocks} on the device, against blocks of the host"),
        disk => format!(
            "blocks hit, {device_blocks} on the device and {disk} on disk, against the host's"
        ),
    };
    let sizes: Vec<u32> = sizes.iter().map(|&size| size as u32).collect();
    let svg = plot::svg(&title, &sizes, &lines);
    std::fs::write(path, svg).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(format!("{}\n", path.display()))
}

/// The plot: every policy at capacities from a 256th of the trace's blocks to all of them.
fn draw(
    args: &Args,
    trace: &Trace,
    future: &Future,
    block_tokens: usize,
    whole: u32,
) -> Result<String, Box<dyn Error>> {
    let parts = (trace.block_tokens / block_tokens) as u64;
    let needed = trace.requests.iter().map(|r| trace.blocks_of(r) * parts).max().unwrap_or(1);
    let largest = args.capacity_blocks.unwrap_or(whole);
    let mut capacities: Vec<u32> = (0..=8).map(|halvings| largest >> halvings).collect();
    capacities.retain(|&capacity| u64::from(capacity) >= needed);
    capacities.reverse();
    if capacities.is_empty() {
        return Err("--capacity-blocks: less than the longest request has".into());
    }
    let references = trace.requests.iter().map(|r| trace.blocks_of(r) * parts).sum();
    let mut bar = Bar::new(args, trace.requests.len());
    let mut lines = Vec::new();
    for (policy, name) in Policy::ALL {
        let mut rates = Vec::new();
        for &capacity_blocks in &capacities {
            let setup = Setup { policy, capacity_blocks, block_tokens, lies: args.lies };
            let label = format!("{name} {capacity_blocks}");
            let outcome = replay(trace, setup, &mut |done| bar.show(&label, done))?;
            rates.push(percent(outcome.hit_blocks, references));
        }
        lines.push(Line { name: name.to_string(), rates });
    }
    bar.clear();
    let optimum =
        |&capacity: &u32| percent(future.optimum(u64::from(capacity) / parts) * parts, references);
    lines.push(Line { name: "optimum".into(), rates: capacities.iter().map(optimum).collect() });
    let name = args.trace.file_name().map_or("trace".into(), |name| name.to_string_lossy());
    let title = format!("{name}: blocks hit, {block_tokens} tokens a block");
    Ok(plot::svg(&title, &capacities, &lines))
}

/// A progress bar, on a terminal only.
struct Bar {
    shown: bool,
    requests: usize,
    percent: usize,
}

impl Bar {
    fn new(args: &Args, requests: usize) -> Self {
        let shown = !args.quiet && std::io::stderr().is_terminal();
        Bar { shown, requests: requests.max(1), percent: usize::MAX }
    }

    fn show(&mut self, label: &str, done: usize) {
        let percent = done * 100 / self.requests;
        if self.shown && percent != self.percent {
            self.percent = percent;
            let full = percent * 40 / 100;
            eprint!("\r{label:<20} [{}{}] {percent:>3} %", "#".repeat(full), " ".repeat(40 - full));
        }
    }

    fn clear(&mut self) {
        if self.shown {
            eprint!("\r{:<72}\r", "");
        }
    }
}
