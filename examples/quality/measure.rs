//! Figures of one scheme: the model's predictions with stored K and V against those in f32.
//!
//! A sequence's first quarter only fills the cache: there a raw tile would flatter what is read
//! mostly from it. Error bars are standard errors over sequences, which are independent texts.

use std::error::Error;

use crate::attention::Through;
use crate::model::Model;
use crate::modes::{K_SPREAD, Mode};
use crate::schemes::Scheme;

/// A sequence with what the model says of it in f32.
pub struct Reference {
    pub tokens: Vec<u32>,
    /// Log probabilities `[scored row][vocab]`.
    log_probabilities: Vec<f32>,
    /// Negative log likelihood of each scored token.
    losses: Vec<f64>,
    /// Root mean square of the deviations of key channels.
    pub k_spread: f64,
}

/// What one scheme costs in one mode and context.
#[derive(Debug, Clone)]
pub struct Figure {
    pub scheme: String,
    pub own: bool,
    /// Decoded from a cache, not from rows that read as stored.
    pub cached: bool,
    pub bits: f64,
    pub mode: Mode,
    pub context: usize,
    pub sequences: usize,
    pub tail_policy: String,
    pub perplexity: f64,
    /// Relative to f32, and its standard error.
    pub perplexity_change: (f64, f64),
    /// KL(f32 || scheme) in nats a token, and its standard error.
    pub kl: (f64, f64),
    /// Share of tokens whose most probable successor is the same, and its standard error.
    pub top1: (f64, f64),
    /// Bytes of text that a token stands for: a token's loss and KL are the sum of its bytes'.
    pub token_bytes: f64,
}

impl Figure {
    /// KL in nats a byte of text, which does not depend on the tokenizer.
    pub fn byte_kl(&self) -> f64 {
        self.kl.0 / self.token_bytes
    }

    /// Relative change of the perplexity a byte.
    pub fn byte_perplexity_change(&self) -> f64 {
        (self.perplexity_change.0.ln_1p() / self.token_bytes).exp_m1()
    }
}

/// `count` windows of `tokens` tokens, evenly spread over the text.
pub fn sequences(
    text: &[u32],
    tokens: usize,
    count: usize,
) -> Result<Vec<Vec<u32>>, Box<dyn Error>> {
    if tokens < 128 || count == 0 || tokens.checked_mul(count).is_none_or(|all| all > text.len()) {
        let held = text.len();
        return Err(format!("--context must be 128 or more, {held} tokens together").into());
    }
    let stride = text.len() / count;
    Ok((0..count).map(|n| text[n * stride..n * stride + tokens].to_vec()).collect())
}

/// The rows whose next token is scored.
fn scored(tokens: usize) -> Vec<usize> {
    (tokens / 4..tokens - 1).collect()
}

/// Log probabilities of the scored rows, and the spread of the key channels.
fn predict(
    model: &Model,
    tokens: &[u32],
    scheme: Option<&Scheme>,
    mode: Mode,
) -> Result<(Vec<f32>, f64), Box<dyn Error>> {
    let mut attention = Through::new(&model.config, scheme, mode)?;
    let mut logits = model.forward(tokens, &scored(tokens.len()), &mut attention)?;
    for row in logits.chunks_exact_mut(model.config.vocab) {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
        let log_sum = f64::from(top) + sum.ln();
        row.iter_mut().for_each(|x| *x = (f64::from(*x) - log_sum) as f32);
    }
    let (variances, count) = attention.variances;
    Ok((logits, (variances / count as f64).sqrt()))
}

fn losses(model: &Model, tokens: &[u32], log_probabilities: &[f32]) -> Vec<f64> {
    let rows = log_probabilities.chunks_exact(model.config.vocab).zip(scored(tokens.len()));
    rows.map(|(row, at)| -f64::from(row[tokens[at + 1] as usize])).collect()
}

fn mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    values.clone().sum::<f64>() / values.count() as f64
}

/// Mean and its standard error; no error is known of a single value.
fn with_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let centre = mean(values.iter().copied());
    let squares: f64 = values.iter().map(|x| (x - centre).powi(2)).sum();
    (centre, if n > 1.0 { (squares / (n - 1.0) / n).sqrt() } else { f64::NAN })
}

impl Reference {
    pub fn new(model: &Model, tokens: Vec<u32>) -> Result<Self, Box<dyn Error>> {
        let (log_probabilities, k_spread) = predict(model, &tokens, None, Mode::Natural)?;
        let losses = losses(model, &tokens, &log_probabilities);
        Ok(Self { tokens, log_probabilities, losses, k_spread })
    }
}

/// That a mode leaves the f32 model as it is, its loss on the first sequence to 1e-5, and that the
/// offsets are in units of this model's keys.
pub fn assert_unchanged(
    model: &Model,
    references: &[Reference],
    mode: Mode,
) -> Result<(), Box<dyn Error>> {
    let Some(reference) = references.first() else { return Ok(()) };
    if !(0.6..=1.6).contains(&(reference.k_spread / f64::from(K_SPREAD))) {
        return Err(format!("keys spread by {}, not by {K_SPREAD}", reference.k_spread).into());
    }
    let (log_probabilities, _) = predict(model, &reference.tokens, None, mode)?;
    let changed = mean(losses(model, &reference.tokens, &log_probabilities).into_iter());
    let change = (changed - mean(reference.losses.iter().copied())).abs();
    if !(change <= 1e-5) {
        return Err(format!("mode {} changes the f32 loss by {change:e}", mode.name()).into());
    }
    Ok(())
}

/// Runs a scheme over all sequences.
pub fn figure(
    model: &Model,
    references: &[Reference],
    scheme: &Scheme,
    mode: Mode,
    token_bytes: f64,
) -> Result<Figure, Box<dyn Error>> {
    let vocab = model.config.vocab;
    let (mut kl, mut top1, mut change) = (Vec::new(), Vec::new(), Vec::new());
    for reference in references {
        let (seen, _) = predict(model, &reference.tokens, Some(scheme), mode)?;
        let rows = || reference.log_probabilities.chunks_exact(vocab).zip(seen.chunks_exact(vocab));
        kl.push(mean(rows().map(|(p, q)| divergence(p, q))));
        top1.push(mean(rows().map(|(p, q)| f64::from(u8::from(best(p) == best(q))))));
        let losses = losses(model, &reference.tokens, &seen);
        change.push(mean(losses.iter().zip(&reference.losses).map(|(a, b)| a - b)));
    }
    let plain = mean(references.iter().flat_map(|r| r.losses.iter().copied()));
    let (change, change_error) = with_error(&change);
    Ok(Figure {
        scheme: scheme.name.clone(),
        own: scheme.own,
        cached: scheme.cached.is_some(),
        bits: scheme.bits,
        mode,
        context: references.first().map_or(0, |r| r.tokens.len()),
        sequences: references.len(),
        tail_policy: scheme.tail_policy(),
        perplexity: (plain + change).exp(),
        perplexity_change: (change.exp_m1(), change_error),
        kl: with_error(&kl),
        top1: with_error(&top1),
        token_bytes,
    })
}

/// KL(p || q) in nats, of log probabilities.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let terms = p.iter().zip(q);
    terms.map(|(&p, &q)| f64::from(p).exp() * (f64::from(p) - f64::from(q))).sum()
}

fn best(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0)
}

/// What `--check` holds: a scheme's KL and change of perplexity in some modes, both a byte of text.
/// The limits were found on a model of bytes, and a token of this one stands for several: figures a
/// token are larger by as much.
struct Threshold {
    scheme: &'static str,
    modes: &'static [Mode],
    kl: f64,
    perplexity_change: f64,
}

const THRESHOLDS: &[Threshold] = &[
    Threshold { scheme: "int8_t", modes: &[Mode::Natural], kl: 1e-4, perplexity_change: 5e-4 },
    Threshold { scheme: "fp8_e4m3", modes: &[Mode::Natural], kl: 1e-3, perplexity_change: 5e-3 },
    Threshold { scheme: "kt8v8", modes: &Mode::ALL, kl: 5e-5, perplexity_change: 5e-4 },
    Threshold { scheme: "kt4v4", modes: &Mode::ALL, kl: 0.8e-3, perplexity_change: 1e-3 },
    Threshold { scheme: "kt3v3", modes: &[Mode::Natural], kl: 3.5e-3, perplexity_change: 3e-3 },
    Threshold { scheme: "kt2v2", modes: &[Mode::Natural], kl: 12e-3, perplexity_change: 1e-2 },
];

/// The thresholds that do not hold, in words.
pub fn broken_thresholds(figures: &[Figure]) -> Vec<String> {
    let mut broken = Vec::new();
    for figure in figures {
        let limits = THRESHOLDS
            .iter()
            .filter(|limit| limit.scheme == figure.scheme && limit.modes.contains(&figure.mode));
        for limit in limits {
            let (kl, change) = (figure.byte_kl(), figure.byte_perplexity_change());
            let kl_holds = kl <= limit.kl;
            // Of few sequences the perplexity is mostly chance (KL is the sharp test): it breaks its
            // limit where it is past it by more than two standard errors, a gain like a loss.
            let chance = 2.0 * figure.perplexity_change.1 / figure.token_bytes;
            let change_holds = change.abs() <= limit.perplexity_change + chance;
            if !kl_holds || !change_holds {
                broken.push(format!(
                    "{} at {}, {}: a byte, KL {:.3e} for {:.1e}, perplexity {:+.3} % for {:.2} +- {:.2} %",
                    figure.scheme,
                    figure.context,
                    figure.mode.name(),
                    kl,
                    limit.kl,
                    100.0 * change,
                    100.0 * limit.perplexity_change,
                    100.0 * chance
                ));
            }
        }
    }
    broken
}
