//! The command line.

use std::error::Error;
use std::str::FromStr;

use kvcache::device::Device;
use kvcache::dtype::{FormatClass, KvFormat};

use crate::tier::TierArg;

pub const USAGE: &str = "\
usage: cargo run --release --example generate -- [options]
  --prompt TEXT        a prompt after the system prompt; repeat for more (default: 8 built-in ones)
  --batch N            sequences that run at once (default 4)
  --max-tokens N       tokens to generate for each prompt (default 32)
  --block-tokens N     tokens of a cache block: 16, 32, 64, 128 or 256 (default 16; 64 for sealed
                       tiles, which take 32, 64 or 128)
  --kv-format NAME     how K and V are stored: f32, f16, bf16 (the default), fp8_e4m3, fp8_e5m2,
                       int8_t, int4_t, nvfp4, or sealed tiles: kt8v8, kt4v4, kt3v3, kt4v2, kt2v2;
                       --dtype is the same
  --device cpu|cuda|emu  where K and V live and kernels run (default cpu; cuda needs the feature
                       cuda, emu the feature emulate; both want f16 or bf16)
  --tier host:BLOCKS   keep evicted blocks in host memory, so many
  --tier disk:DIR      keep blocks on disk: the next run finds them
  --tier remote:URL    keep blocks in a store that other machines share (feature remote):
                       redis://HOST:PORT, redis+unix:///PATH, s3://BUCKET, s3+http://HOST:PORT/BUCKET,
                       nixl+posix:/DIR, nixl+s3+http://HOST:PORT/BUCKET
  --threads N          threads (default: one a core)
  --temperature T      0 is greedy (default 0)
  --seed N             seed of the draw where the temperature is not 0 (default 0)
  --check              compare with a plain forward pass without a cache
  --json               print the figures as one JSON object";

pub struct Args {
    pub prompts: Vec<String>,
    pub batch: usize,
    pub max_tokens: usize,
    pub block_tokens: u32,
    pub format: KvFormat,
    pub device: Device,
    pub tier: Option<TierArg>,
    pub threads: u32,
    pub temperature: f32,
    pub seed: u64,
    pub check: bool,
    pub json: bool,
}

impl Args {
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Box<dyn Error>> {
        let mut args = Self {
            prompts: Vec::new(),
            batch: 4,
            max_tokens: 32,
            block_tokens: 0,
            format: KvFormat::Bf16,
            device: Device::Cpu,
            tier: None,
            threads: 0,
            temperature: 0.0,
            seed: 0,
            check: false,
            json: false,
        };
        while let Some(flag) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{flag} needs a value"));
            match flag.as_str() {
                "--prompt" => args.prompts.push(value()?),
                "--batch" => args.batch = number(&flag, &value()?)?,
                "--max-tokens" => args.max_tokens = number(&flag, &value()?)?,
                "--block-tokens" => args.block_tokens = number(&flag, &value()?)?,
                "--kv-format" | "--dtype" => args.format = KvFormat::from_name(&value()?)?,
                "--device" => args.device = Device::from_name(&value()?)?,
                "--tier" => args.tier = Some(TierArg::parse(&value()?)?),
                "--threads" => args.threads = number(&flag, &value()?)?,
                "--temperature" => args.temperature = number(&flag, &value()?)?,
                "--seed" => args.seed = number(&flag, &value()?)?,
                "--check" => args.check = true,
                "--json" => args.json = true,
                _ => return Err(format!("unknown option {flag}").into()),
            }
        }
        if args.block_tokens == 0 {
            let tiled = args.format.class() == FormatClass::Tile;
            args.block_tokens = if tiled { 64 } else { 16 };
        }
        if args.batch == 0 || args.max_tokens == 0 {
            return Err("--batch and --max-tokens must be at least 1".into());
        }
        if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
            return Err("--temperature must be 0 or more".into());
        }
        Ok(args)
    }
}

fn number<T: FromStr>(flag: &str, text: &str) -> Result<T, Box<dyn Error>> {
    text.parse().map_err(|_| format!("{flag} cannot be {text}").into())
}
