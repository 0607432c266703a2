//! The command line.

use std::error::Error;
use std::path::PathBuf;

use crate::cache::Policy;

pub const USAGE: &str = "\
usage: cargo run --release --example replay -- TRACE [options]
  TRACE                 Mooncake's JSONL, or Claude Code sessions (JSONL, gzip or not), or
                        `synthetic` for a small generated one
  --capacity-blocks N   blocks of the pool (default: as many as the trace has)
  --block-tokens N      tokens of a block; divides the trace's (default: the trace's, 512 or 64)
  --policy NAME         lru, lfu, fifo, slru, s3fifo, ended or hints (default lru); `ended` is LRU
                        told when sessions and branches end, `hints` is also told which prefix is
                        likely to be needed soon
  --lies FRACTION       of the hints, say the contrary in this fraction (default 0)
  --users N             sessions at a time, where the trace has sessions (default 64)
  --requests N          only the first N requests
  --host-blocks N       a whole cache (LRU) with a host tier of N blocks, 0 for none, below its
                        --capacity-blocks; with --plot, hit rate against the size of the host tier
  --disk-blocks N       and below it a disk tier of N blocks, in the directory for temporary files;
                        the host then has 512 blocks more, for what comes and goes
  --token-bytes N       K and V of a token of the model, for bytes moved (default 131072)
  --prefill-us N        microseconds that it takes to compute a token (default 50)
  --load-gbps N         10^9 bytes a second from the host (default 20)
  --disk-gbps N         10^9 bytes a second from the disk (default 5)
  --plot FILE.svg       draw hit rate against capacity for every policy and for Belady's optimum
  --json                one JSON object
  --quiet               no progress bar
  --help                this text";

#[derive(Debug, Clone)]
pub struct Args {
    pub trace: PathBuf,
    pub capacity_blocks: Option<u32>,
    pub block_tokens: Option<usize>,
    pub policy: Policy,
    pub lies: f64,
    pub users: usize,
    pub requests: Option<usize>,
    pub host_blocks: Option<usize>,
    pub disk_blocks: usize,
    pub token_bytes: f64,
    pub prefill_us: f64,
    pub load_gbps: f64,
    pub disk_gbps: f64,
    pub plot: Option<PathBuf>,
    pub json: bool,
    pub quiet: bool,
}

/// The arguments, or `None` if only help was asked for.
pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Args>, Box<dyn Error>> {
    let mut trace = None;
    let mut args = Args {
        trace: PathBuf::new(),
        capacity_blocks: None,
        block_tokens: None,
        policy: Policy::Lru,
        lies: 0.0,
        users: 64,
        requests: None,
        host_blocks: None,
        disk_blocks: 0,
        token_bytes: 131_072.0,
        prefill_us: 50.0,
        load_gbps: 20.0,
        disk_gbps: 5.0,
        plot: None,
        json: false,
        quiet: false,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--capacity-blocks" => args.capacity_blocks = Some(number(&word, &value()?)?),
            "--block-tokens" => args.block_tokens = Some(number(&word, &value()?)? as usize),
            "--policy" => args.policy = Policy::from_name(&value()?)?,
            "--lies" => {
                let text = value()?;
                let fraction = text.parse().ok().filter(|f| (0.0..=1.0).contains(f));
                args.lies = fraction.ok_or_else(|| format!("--lies: `{text}` is not 0 to 1"))?;
            }
            "--users" => args.users = number(&word, &value()?)? as usize,
            "--requests" => args.requests = Some(number(&word, &value()?)? as usize),
            "--host-blocks" => {
                let text = value()?;
                let blocks = text.parse().map_err(|_| format!("--host-blocks: not `{text}`"))?;
                args.host_blocks = Some(blocks);
            }
            "--token-bytes" => args.token_bytes = positive(&word, &value()?)?,
            "--prefill-us" => args.prefill_us = positive(&word, &value()?)?,
            "--disk-blocks" => args.disk_blocks = number(&word, &value()?)? as usize,
            "--disk-gbps" => args.disk_gbps = positive(&word, &value()?)?,
            "--load-gbps" => args.load_gbps = positive(&word, &value()?)?,
            "--plot" => args.plot = Some(value()?.into()),
            "--json" => args.json = true,
            "--quiet" => args.quiet = true,
            "--help" | "-h" => return Ok(None),
            flag if flag.starts_with('-') => return Err(format!("unknown option {flag}").into()),
            path if trace.is_none() => trace = Some(path.into()),
            extra => return Err(format!("one trace, not also `{extra}`").into()),
        }
    }
    args.trace = trace.ok_or("no trace given")?;
    if args.disk_blocks > 0 && args.host_blocks.is_none() {
        return Err("--disk-blocks needs --host-blocks, which may be 0".into());
    }
    Ok(Some(args))
}

/// A count, at least 1.
fn number(flag: &str, text: &str) -> Result<u32, Box<dyn Error>> {
    let parsed = text.parse().ok().filter(|&n: &u32| n > 0);
    parsed.ok_or_else(|| format!("{flag}: `{text}` is not a count from 1 to 2^32 - 1").into())
}

fn positive(flag: &str, text: &str) -> Result<f64, Box<dyn Error>> {
    let parsed = text.parse().ok().filter(|n: &f64| n.is_finite() && *n > 0.0);
    parsed.ok_or_else(|| format!("{flag}: `{text}` is not a number above 0").into())
}
