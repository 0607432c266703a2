//! The planner's command line: words to a checked request. Reads nothing but its arguments.

use std::num::NonZeroU64;

use kvcache::dtype::{FormatClass, KvFormat};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::plan::{Budget, presets::Preset};

use crate::units::{parse_bytes, parse_ppm};

/// What `--help` prints.
pub const USAGE: &str = "\
usage: plan [MODEL] [options]          a preset (default llama-3-8b; --list names them all)
       plan --layers N ... [options]   explicit dimensions

geometry   --layers N --kv-heads N --head-dim N
             [--v-dim N]              value channels, where they differ from the keys'
             [--window TOKENS]        sliding window of the layers
             [--window-layers N]      only N of the layers have the window
           --layers N --latent N --rope N
                                      multi-head latent attention
cache      --dtype NAME               f32, f16, bf16 (default), fp8_e4m3, fp8_e5m2, int8_t,
                                      int4_t, nvfp4, kt8v8, kt4v4, kt3v3, kt4v2 or kt2v2
           --block-tokens N           16, 32, 64, 128 or 256 (default 16; 64 for sealed tiles,
                                      the kt formats, which have 32, 64 or 128)
budget     --memory SIZE              device memory (default 80GiB)
           --weights SIZE             what the weights take of it (default 0)
           --reserve FRACTION         left to activations and run time (default 0.1)
workload   --context TOKENS           tokens of a sequence (default 8192)
           --batch N                  sequences at a time (default 1)
output     --json                     one JSON object
           --list                     the presets
           --help                     this text

A SIZE is in bytes or has a unit: 80GiB is 80 * 2^30, 80GB is 80 * 10^9.";

/// Tokens of a sealed tile, where none were asked for.
pub const TILE_TOKENS: u32 = 64;

/// What the user asked for.
pub enum Request {
    /// The usage text.
    Help,
    /// The names of the presets.
    List,
    /// A plan.
    Plan(Args),
}

/// A request for a plan.
pub struct Args {
    /// The preset's name, or `custom`.
    pub model: String,
    /// The geometry, in `format`.
    pub spec: CacheSpec,
    /// The format asked for.
    pub format: KvFormat,
    /// The memory.
    pub budget: Budget,
    /// Tokens of a sequence.
    pub context_tokens: u64,
    /// Sequences at a time.
    pub batch: u64,
    /// Whether to print JSON.
    pub json: bool,
}

/// Geometry options, each at most once.
#[derive(Default)]
struct Dimensions {
    layers: Option<u32>,
    kv_heads: Option<u32>,
    head_dim: Option<u32>,
    v_dim: Option<u32>,
    window: Option<u32>,
    window_layers: Option<u32>,
    latent: Option<u32>,
    rope: Option<u32>,
}

/// Reads the arguments after the program's name.
pub fn parse(words: impl Iterator<Item = String>) -> Result<Request, String> {
    let mut words = words;
    let mut model = None;
    let mut format = KvFormat::Bf16;
    let mut block_tokens = None;
    let mut budget = Budget { memory_bytes: 80 << 30, weight_bytes: 0, reserve_ppm: 100_000 };
    let (mut context_tokens, mut batch, mut json) = (8192, 1, false);
    let mut dims = Dimensions::default();

    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--help" | "-h" => return Ok(Request::Help),
            "--list" => return Ok(Request::List),
            "--json" => json = true,
            "--dtype" => format = KvFormat::from_name(&value()?).map_err(|e| e.to_string())?,
            "--block-tokens" => block_tokens = Some(number(&word, &value()?)?),
            "--memory" => budget.memory_bytes = parse_bytes(&value()?)?,
            "--weights" => budget.weight_bytes = parse_bytes(&value()?)?,
            "--reserve" => budget.reserve_ppm = parse_ppm(&value()?)?,
            "--context" => context_tokens = number::<NonZeroU64>(&word, &value()?)?.get(),
            "--batch" => batch = number::<NonZeroU64>(&word, &value()?)?.get(),
            "--layers" => dims.layers = Some(number(&word, &value()?)?),
            "--kv-heads" => dims.kv_heads = Some(number(&word, &value()?)?),
            "--head-dim" => dims.head_dim = Some(number(&word, &value()?)?),
            "--v-dim" => dims.v_dim = Some(number(&word, &value()?)?),
            "--window" => dims.window = Some(number(&word, &value()?)?),
            "--window-layers" => dims.window_layers = Some(number(&word, &value()?)?),
            "--latent" => dims.latent = Some(number(&word, &value()?)?),
            "--rope" => dims.rope = Some(number(&word, &value()?)?),
            flag if flag.starts_with('-') => return Err(format!("unknown option {flag}")),
            name if model.is_none() => model = Some(name.to_string()),
            extra => return Err(format!("unexpected argument {extra}")),
        }
    }

    let tiles = format.class() == FormatClass::Tile;
    let block_tokens = block_tokens.unwrap_or(if tiles { TILE_TOKENS } else { 16 });
    if model.is_some() && dims.any() {
        return Err("give a preset or dimensions, not both".to_string());
    }
    let (model, spec) = match (model, dims.groups(format)?) {
        (_, Some(groups)) => ("custom".to_string(), CacheSpec { block_tokens, groups }),
        (model, None) => {
            let name = model.unwrap_or_else(|| "llama-3-8b".to_string());
            let preset = Preset::find(&name)
                .ok_or_else(|| format!("no preset is called {name}; --list names them"))?;
            (preset.name.to_string(), preset.spec(format, block_tokens))
        }
    };
    Ok(Request::Plan(Args { model, spec, format, budget, context_tokens, batch, json }))
}

impl Dimensions {
    fn any(&self) -> bool {
        [
            self.layers,
            self.kv_heads,
            self.head_dim,
            self.v_dim,
            self.window,
            self.window_layers,
            self.latent,
            self.rope,
        ]
        .iter()
        .any(Option::is_some)
    }

    /// The layer groups, `None` where no dimension was given.
    fn groups(&self, format: KvFormat) -> Result<Option<Vec<GroupSpec>>, String> {
        if !self.any() {
            return Ok(None);
        }
        let need = |value: Option<u32>, name: &str| value.ok_or(format!("{name} is missing"));
        let layers = need(self.layers, "--layers")?;
        let mut group = if self.latent.is_some() || self.rope.is_some() {
            if self.kv_heads.or(self.head_dim).or(self.v_dim).is_some() {
                return Err("--latent and --rope replace --kv-heads, --head-dim, --v-dim".into());
            }
            let latent = need(self.latent, "--latent")?;
            let rope = need(self.rope, "--rope")?;
            latent.checked_add(rope).ok_or("--latent and --rope are too large")?;
            GroupSpec::latent(layers, latent, rope, format)
        } else {
            let kv_heads = need(self.kv_heads, "--kv-heads")?;
            let head_dim = need(self.head_dim, "--head-dim")?;
            GroupSpec::uniform(layers, kv_heads, head_dim, format)
        };
        group.v_dim = self.v_dim.unwrap_or(group.v_dim);
        let Some(window) = self.window else {
            return match self.window_layers {
                Some(_) => Err("--window-layers needs --window".into()),
                None => Ok(Some(vec![group])),
            };
        };
        let with_window = self.window_layers.unwrap_or(layers);
        let rest =
            layers.checked_sub(with_window).ok_or("--window-layers must not be above --layers")?;
        let windowed = GroupSpec { layers: with_window, window: Some(window), ..group.clone() };
        group.layers = rest;
        Ok(Some(if rest == 0 { vec![windowed] } else { vec![windowed, group] }))
    }
}

fn number<T: std::str::FromStr>(flag: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{flag}: `{text}` is not a number in range"))
}
