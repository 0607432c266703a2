//! Continuous batching over one `KvCache`: the engine that the example is.
//!
//! One prompt is admitted a step, so that every later one finds the shared system prompt in the
//! prefix index; running sequences decode beside it.

use std::collections::VecDeque;
use std::error::Error;
use std::time::{Duration, Instant};

use kvcache::attention::Scoring;
use kvcache::cache::{CacheStats, KvCache, Step, Work};
use kvcache::cpu::{Rope, RopeStyle};
use kvcache::ids::{Namespace, SeqId};

use crate::layers::Layers;
use crate::model::{Attention, Model};
use crate::sample::Sampler;
use crate::tier;
use crate::tokenizer::END;

/// A finished sequence, in the order of the prompts.
#[derive(Default, Clone)]
pub struct Output {
    pub tokens: Vec<u32>,
    /// Logits that each token was chosen from, kept where they will be checked.
    pub logits: Vec<Vec<f32>>,
}

#[derive(Default)]
pub struct Figures {
    pub prompt_tokens: usize,
    pub prefill_tokens: usize,
    pub prefill_time: Duration,
    pub decode_tokens: usize,
    pub decode_time: Duration,
    /// The cache when most blocks were in use.
    pub peak: Option<CacheStats>,
}

pub struct Limits {
    pub batch: usize,
    pub max_tokens: usize,
    pub keep_logits: bool,
    pub layers: Layers,
}

struct Running {
    prompt: usize,
    seq: SeqId,
    /// Tokens to feed in the next step.
    next: Vec<u32>,
}

/// Attention through the cache, for the rows of one step.
struct Cached<'a> {
    cache: &'a mut KvCache,
    step: &'a Step,
    rope: &'a Rope,
    head_dim: u32,
    layers: Layers,
    scoring: Scoring<'a>,
}

impl Attention for Cached<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &mut [f32],
        k: &mut [f32],
        v: &[f32],
        out: &mut [f32],
    ) -> Result<(), Box<dyn Error>> {
        let layer = self.layers.id(layer);
        self.rope.rotate(q, self.head_dim, self.step.positions())?;
        let (k, v) = ((&*k).into(), v.into());
        self.cache.append(self.step, layer, k, v, Some(self.rope))?;
        self.cache.attend(self.step, layer, (&*q).into(), out.into(), &self.scoring, None)?;
        Ok(())
    }
}

/// Runs all prompts to their end.
pub fn serve(
    model: &Model,
    cache: &mut KvCache,
    prompts: &[Vec<u32>],
    limits: &Limits,
    sampler: &mut Sampler,
    progress: &mut dyn FnMut(usize),
) -> Result<(Vec<Output>, Figures), Box<dyn Error>> {
    let head_dim = model.config.head_dim as u32;
    let rope = Rope::new(RopeStyle::Halves, head_dim, model.config.rope_theta)?;
    let scoring = Scoring::causal(head_dim);
    let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
    let mut running: Vec<Running> = Vec::new();
    let mut outputs = vec![Output::default(); prompts.len()];
    let mut figures = Figures::default();
    let mut step = Step::new();

    while !waiting.is_empty() || !running.is_empty() {
        let admitted = (running.len() < limits.batch).then(|| waiting.pop_front()).flatten();
        if let Some(prompt) = admitted {
            let tokens = &prompts[prompt];
            tier::load(cache, tokens)?;
            let started = cache.start(tokens, Namespace::default())?;
            let next = tokens[started.cached_tokens as usize..].to_vec();
            figures.prompt_tokens += tokens.len();
            figures.prefill_tokens += next.len();
            running.push(Running { prompt, seq: started.seq, next });
        }

        let work: Vec<Work> =
            running.iter().map(|run| Work { seq: run.seq, tokens: &run.next }).collect();
        cache.begin(&mut step, &work)?;
        let tokens: Vec<u32> = running.iter().flat_map(|run| run.next.iter().copied()).collect();
        let last: Vec<usize> = step.last_rows().collect();
        let clock = Instant::now();
        let attention = &mut Cached {
            cache,
            step: &step,
            rope: &rope,
            head_dim,
            layers: limits.layers,
            scoring,
        };
        let logits = model.forward(&tokens, &last, attention)?;
        // A step that prefills counts as prefill, the tokens decoded beside it included in its time.
        if admitted.is_some() {
            figures.prefill_time += clock.elapsed();
        } else {
            figures.decode_time += clock.elapsed();
            figures.decode_tokens += running.len();
        }
        let stats = cache.stats();
        if figures.peak.is_none_or(|peak| stats.referenced_blocks > peak.referenced_blocks) {
            figures.peak = Some(stats);
        }
        cache.commit(&mut step)?;

        let mut rows = logits.chunks_exact(model.config.vocab);
        for run in &mut running {
            let logits = rows.next().ok_or("one row of logits a sequence")?;
            let output = &mut outputs[run.prompt];
            let token = sampler.pick(logits);
            output.tokens.push(token);
            if limits.keep_logits {
                output.logits.push(logits.to_vec());
            }
            run.next = vec![token];
        }
        let (done, rest): (Vec<_>, Vec<_>) = running.into_iter().partition(|run| {
            run.next[0] == END || outputs[run.prompt].tokens.len() == limits.max_tokens
        });
        for run in done {
            cache.release(run.seq)?;
        }
        running = rest;
        progress(outputs.iter().map(|output| output.tokens.len()).sum());
    }
    Ok((outputs, figures))
}
