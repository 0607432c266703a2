//! The command line.

use std::error::Error;
use std::str::FromStr;

use kvcache::dtype::DType;

use crate::modes::Mode;

pub const USAGE: &str = "\
usage: cargo run --release --example quality -- [options]
  --context N:S        S sequences of N tokens; repeat for more (default 1024:8 and 4096:2)
  --mode NAME          natural, outliers or offsets; repeat for more (default all three)
  --format NAME        a format or a published scheme; repeat for more (default all)
  --attend cache|rows  the library's formats through a cache, token by token with its kernels, or like
                       published ones in f32 over what stored rows read as (default cache)
  --staging f32|f16|bf16
                       raw rows of tiles that are not sealed yet (default bf16, which a cache has)
  --recall N,N,...     recall of planted pairs in texts of so many tokens, in place of the model (with
                       --context beside it); formats of the library alone
  --check              exit with an error where a threshold does not hold
  --json               print the figures as a JSON list
  --plot FILE.svg      KL against bits
  --threads N          threads (default: one a core)";

pub struct Args {
    pub contexts: Vec<(usize, usize)>,
    pub modes: Vec<Mode>,
    pub formats: Vec<String>,
    /// Lengths of the texts of the recall probe.
    pub recall: Vec<usize>,
    /// Whether the library's formats go through a cache.
    pub cached: bool,
    pub staging: DType,
    pub check: bool,
    pub json: bool,
    pub plot: Option<String>,
}

impl Args {
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Box<dyn Error>> {
        let mut args = Self {
            contexts: Vec::new(),
            modes: Vec::new(),
            formats: Vec::new(),
            recall: Vec::new(),
            cached: true,
            staging: DType::Bf16,
            check: false,
            json: false,
            plot: None,
        };
        while let Some(flag) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{flag} needs a value"));
            match flag.as_str() {
                "--context" => {
                    let word = value()?;
                    let (tokens, count) = word.split_once(':').unwrap_or((&word, "1"));
                    args.contexts.push((number(&flag, tokens)?, number(&flag, count)?));
                }
                "--mode" => args.modes.push(Mode::from_name(&value()?)?),
                "--format" => args.formats.push(value()?),
                "--recall" => {
                    let word = value()?;
                    for tokens in word.split(',') {
                        args.recall.push(number(&flag, tokens)?);
                    }
                }
                "--attend" => {
                    args.cached = match value()?.as_str() {
                        "cache" => true,
                        "rows" => false,
                        other => return Err(format!("--attend cannot be {other}").into()),
                    }
                }
                "--staging" => {
                    args.staging = match value()?.as_str() {
                        "f32" => DType::F32,
                        "f16" => DType::F16,
                        "bf16" => DType::Bf16,
                        other => return Err(format!("--staging cannot be {other}").into()),
                    }
                }
                "--check" => args.check = true,
                "--json" => args.json = true,
                "--plot" => args.plot = Some(value()?),
                "--threads" => {
                    let threads = number(&flag, &value()?)?;
                    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
                }
                _ => return Err(format!("unknown option {flag}").into()),
            }
        }
        if args.cached && args.staging != DType::Bf16 {
            return Err("--staging is of --attend rows: raw rows in a cache have bf16".into());
        }
        if args.contexts.is_empty() && args.recall.is_empty() {
            args.contexts = vec![(1024, 8), (4096, 2)];
        }
        if args.modes.is_empty() {
            args.modes = Mode::ALL.to_vec();
        }
        Ok(args)
    }
}

fn number<T: FromStr>(flag: &str, text: &str) -> Result<T, Box<dyn Error>> {
    text.parse().map_err(|_| format!("{flag} cannot be {text}").into())
}
