//! Serves a small language model from libkvcache: eight prompts that share a system prompt, run
//! with continuous batching over a paged, prefix-shared cache. Prints what each sequence wrote and
//! what the cache saved.
//!
//! | file | job |
//! |---|---|
//! | `serve.rs` | the engine: continuous batching over one `KvCache` |
//! | `layers.rs` | which layer is stored in which format |
//! | `model.rs` | the Llama model without attention |
//! | `tier.rs` | `--tier`: blocks in host memory, on disk, or in a remote store |
//! | `check.rs` | `--check`: the same without a cache, in f64 |
//! | `tokenizer.rs`, `sample.rs`, `args.rs`, `report.rs` | text to tokens, tokens from logits, command line, output |
//! | `model/`, `train/` | the weights and their card, and the script that made them |

mod args;
mod check;
mod layers;
mod model;
mod report;
mod sample;
mod serve;
#[cfg(test)]
mod tests;
mod tier;
mod tokenizer;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use kvcache::cache::{CacheOptions, KvCache};

use args::{Args, USAGE};
use layers::Layers;
use model::Model;
use report::Progress;
use sample::Sampler;
use tokenizer::{END, Tokenizer};

fn main() -> ExitCode {
    if std::env::args().any(|word| word == "--help" || word == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("generate: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("generate: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the kernels ran on.
fn device_name(cache: &KvCache) -> String {
    cache.backend().map_or_else(|| "cpu".into(), |backend| backend.name().into())
}

/// Runs the prompts and prints the report; true unless the check failed.
fn run(args: &Args) -> Result<bool, Box<dyn Error>> {
    // Elsewhere than where it was built, the model's folder is named.
    let folder = std::env::var_os("KVCACHE_MODEL_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/generate/model"),
        PathBuf::from,
    );
    let model = Model::load(&folder)?;
    let tokenizer = Tokenizer::parse(&fs::read_to_string(folder.join("tokenizer.txt"))?)?;
    if args.threads > 0 {
        // The model's own matrix products.
        rayon::ThreadPoolBuilder::new().num_threads(args.threads as usize).build_global()?;
    }

    let system = include_str!("system.txt");
    let questions: Vec<String> = if args.prompts.is_empty() {
        include_str!("prompts.txt").lines().map(String::from).collect()
    } else {
        args.prompts.clone()
    };
    let prompts: Vec<Vec<u32>> = questions
        .iter()
        .map(|question| {
            let text = format!("{}\n\n{question}", system.trim_end());
            [vec![END], tokenizer.encode(&text)].concat()
        })
        .collect();
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + args.max_tokens;
    let c = &model.config;
    if longest > c.max_tokens {
        return Err(format!("{longest} tokens are past the model's {}", c.max_tokens).into());
    }

    let layers = Layers {
        format: args.format,
        edges: args.edges,
        layers: c.layers,
        block_tokens: args.block_tokens,
        sink_tokens: args.sink_tokens,
    };
    let spec = layers.spec(c);
    // Room for a full batch, and for every prompt to stay in the index.
    let blocks = (args.batch + prompts.len()) * longest.div_ceil(args.block_tokens as usize);
    let options = CacheOptions {
        blocks: u32::try_from(blocks)?,
        max_seqs: u32::try_from(args.batch)?,
        threads: args.threads,
        device: args.device,
        ..CacheOptions::default()
    };
    let mut cache = KvCache::new(&spec, &options)?;
    let mut found = None;
    if let Some(tier) = &args.tier {
        let name = tier::model_name(&fs::read(folder.join("model.safetensors"))?);
        found = tier::attach(&mut cache, tier, &name)?;
    }

    let limits = serve::Limits {
        batch: args.batch,
        max_tokens: args.max_tokens,
        keep_logits: args.check,
        layers,
    };
    let mut sampler = Sampler::new(args.temperature, args.seed);
    let mut progress = Progress::new(prompts.len() * args.max_tokens);
    let clock = Instant::now();
    let (outputs, figures) =
        serve::serve(&model, &mut cache, &prompts, &limits, &mut sampler, &mut |n| progress.at(n))?;
    progress.end();
    let served_time = clock.elapsed();
    tier::flush(&mut cache);
    let checked = if args.check {
        Some(check::check(&model, layers, &prompts, &outputs, args.temperature == 0.0)?)
    } else {
        None
    };

    let texts: Vec<String> =
        outputs.iter().map(|output| tokenizer.decode(&output.tokens)).collect();
    let report = report::Report {
        questions: &questions,
        texts: &texts,
        outputs: &outputs,
        figures: &figures,
        served_time,
        device: &device_name(&cache),
        stats: cache.stats(),
        block_tokens: args.block_tokens.into(),
        contiguous_bytes: report::contiguous_bytes(
            &cache,
            args.batch.min(prompts.len()),
            c.max_tokens,
        ),
        checked: checked.as_ref(),
    };
    if args.json {
        report.print_json()?
    } else {
        report.print(&model, args);
        tier::print(&cache, found);
    }
    Ok(checked.is_none_or(|check| check.passed()))
}
