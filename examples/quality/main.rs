//! What each KV format costs a language model: perplexity, KL divergence to f32 and top-1 agreement
//! on held-out text, with every key and value read as token-by-token decode would read it.
//!
//! ```text
//! cargo run --release --example quality -- --plot quality.svg
//! ```
//!
//! | file | job |
//! |---|---|
//! | `schemes.rs`, `published.rs` | the library's formats, and published ones for comparison |
//! | `attention.rs` | the model's attention over what a scheme made of K and V |
//! | `decode.rs` | the same through a cache of the library, token by token |
//! | `modes.rs` | outliers and offsets that leave the f32 model unchanged |
//! | `recall.rs` | which keys a constructed induction head still tells apart, far back |
//! | `measure.rs` | text, sequences, figures with error bars, the thresholds of `--check` |
//! | `args.rs`, `report.rs`, `plot.rs` | command line, table and JSON, picture |
//!
//! The library's formats go through its cache: appended, sealed and read by the kernels of this CPU, whose
//! level (`KVCACHE_CPU`) is part of a figure. Published ones, and all with `--attend rows`, are attended
//! over in f32, on rows that went through a scalar codec: what storing alone costs.
//!
//! Model and tokenizer are those of the example `generate`.

mod args;
mod attention;
mod decode;
mod measure;
#[path = "../generate/model.rs"]
#[allow(dead_code)]
mod model;
mod modes;
mod plot;
mod published;
mod recall;
mod report;
mod schemes;
#[path = "../generate/tokenizer.rs"]
#[allow(dead_code)]
mod tokenizer;

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use args::{Args, USAGE};
use measure::{Figure, Reference};
use model::Model;
use recall::Answers;
use tokenizer::{END, Tokenizer};

/// The codes of the recall probe are the same in every run.
const RECALL_SEED: u64 = 2024;

fn main() -> ExitCode {
    if std::env::args().any(|word| word == "--help" || word == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("quality: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("quality: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures and prints; true unless a threshold of `--check` did not hold.
fn run(args: &Args) -> Result<bool, Box<dyn Error>> {
    let clock = Instant::now();
    let answers = recall(args)?;
    let figures = if args.contexts.is_empty() { Vec::new() } else { figures(args)? };
    eprintln!("\r{:.0} s{:<50}", clock.elapsed().as_secs_f64(), "");
    if args.json {
        println!("{:#}", report::json(&figures, &answers));
    } else {
        print!("{}{}", report::recall_tables(&answers), report::tables(&figures));
    }
    if let Some(path) = &args.plot {
        fs::write(path, plot::svg(&figures))?;
    }
    let mut failed = Vec::new();
    if args.check {
        failed.extend(measure::broken_thresholds(&figures));
        failed.extend(recall::broken_thresholds(&answers));
    }
    for line in &failed {
        eprintln!("does not hold: {line}");
    }
    Ok(failed.is_empty())
}

/// What an induction head recalls, one sweep a length, mode and format.
fn recall(args: &Args) -> Result<Vec<Vec<Answers>>, Box<dyn Error>> {
    let mut all = Vec::new();
    for &tokens in &args.recall {
        let text = recall::Text::new(tokens, RECALL_SEED)?;
        for &mode in &args.modes {
            for format in recall::formats(&args.formats)? {
                eprint!("\r{tokens} tokens, {}: {:<24}", mode.name(), format.name());
                all.push(recall::sweep(&text, format, mode)?);
            }
        }
    }
    Ok(all)
}

/// What each scheme costs the model.
fn figures(args: &Args) -> Result<Vec<Figure>, Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/generate/model");
    let model = Model::load(&folder)?;
    let (text, token_bytes) = held_out(&folder)?;
    let mut schemes = schemes::chosen(&args.formats, model.config.head_dim, args.staging)?;
    schemes.iter_mut().filter(|_| !args.cached).for_each(|scheme| scheme.cached = None);
    let mut figures: Vec<Figure> = Vec::new();
    for &(context, sequences) in &args.contexts {
        let references = measure::sequences(&text, context, sequences)?
            .into_iter()
            .map(|tokens| Reference::new(&model, tokens))
            .collect::<Result<Vec<_>, _>>()?;
        for &mode in &args.modes {
            measure::assert_unchanged(&model, &references, mode)?;
            for scheme in &schemes {
                eprint!("\r{context} tokens, {}: {:<24}", mode.name(), scheme.name);
                figures.push(measure::figure(&model, &references, scheme, mode, token_bytes)?);
            }
        }
    }
    Ok(figures)
}

/// The held-out documents as one stream, each followed by the end marker, and the bytes of text
/// that a token stands for on average.
fn held_out(folder: &Path) -> Result<(Vec<u32>, f64), Box<dyn Error>> {
    let tokenizer = Tokenizer::parse(&fs::read_to_string(folder.join("tokenizer.txt"))?)?;
    let text = fs::read_to_string(folder.join("heldout.txt"))?;
    let (mut tokens, mut bytes) = (vec![END], 0);
    for document in text.split("\n<|end|>\n").filter(|document| !document.is_empty()) {
        tokens.extend(tokenizer.encode(document));
        tokens.push(END);
        bytes += document.len();
    }
    let token_bytes = bytes as f64 / tokens.len() as f64;
    Ok((tokens, token_bytes))
}

#[cfg(test)]
mod tests;
