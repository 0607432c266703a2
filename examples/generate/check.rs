//! The same texts through a plain forward pass with no cache: everything recomputed, attention in
//! f64, written without the library. Since attention is causal, one pass over a finished text gives
//! the logits of every step.
//!
//! K and V are rounded to the cache's format, by the library's scalar codec where that is codes,
//! since that is what the format means; every other difference is the cache's and the kernels'. Of a
//! format with sealed tiles a query reads its own tile and the sinks as bf16 and those before its own as
//! the reference seals them.

use std::error::Error;

use kvcache::dtype::{FormatClass, KvFormat, bf16, f16};
use kvcache::layout::tile::{TileLayout, TileShape};
use kvcache::quant::{self, RowCodec, Tile};

use crate::layers::Layers;
use crate::model::{Attention, Config, Model};
use crate::sample::argmax;
use crate::serve::Output;

pub struct Report {
    /// Largest difference of a logit, relative to the largest logit of its step.
    pub max_relative_error: f64,
    /// Whether each token is the plain pass's own choice; where its two best logits are closer
    /// than rounding may move them, either counts.
    pub tokens_equal: bool,
    /// Tokens that differed within that distance.
    pub ties: usize,
    /// What rounding alone may cause in this format.
    pub tolerance: f64,
}

impl Report {
    pub fn passed(&self) -> bool {
        // NaN must not pass.
        self.tokens_equal && self.max_relative_error <= self.tolerance
    }
}

struct Plain<'a> {
    config: &'a Config,
    stored: Layers,
}

/// How one layer is stored.
#[derive(Clone, Copy)]
struct Stored {
    format: KvFormat,
    block_tokens: usize,
    sink_tokens: usize,
}

pub fn check(
    model: &Model,
    stored: Layers,
    prompts: &[Vec<u32>],
    outputs: &[Output],
    greedy: bool,
) -> Result<Report, Box<dyn Error>> {
    // One part in 2^22 of f32 kernels and sums of a few hundred terms; and, where K and V are
    // rounded, a last place that falls the other way after such a difference: of a sealed tile, a
    // code. There the kernels also round queries to 8 bits in front of codes of 4 and fewer.
    let tolerance = |format: KvFormat| match format {
        KvFormat::F32 => 2e-5,
        KvFormat::F16 => 1e-3,
        KvFormat::Bf16 => 5e-3,
        KvFormat::Int8T | KvFormat::Kt8v8 => 1e-2,
        KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 => 2e-2,
        KvFormat::Kt4v4 | KvFormat::Kt3v3 => 5e-2,
        KvFormat::Kt4v2 | KvFormat::Kt2v2 => 1e-1,
        _ => 4e-2,
    };
    let all = (0..stored.layers).map(|layer| tolerance(stored.format_of(layer)));
    let tolerance = all.fold(0.0, f64::max);
    let mut report = Report { max_relative_error: 0.0, tokens_equal: true, ties: 0, tolerance };
    for (prompt, output) in prompts.iter().zip(outputs) {
        let text: Vec<u32> = prompt.iter().chain(&output.tokens).copied().collect();
        let steps: Vec<usize> = (prompt.len() - 1..text.len() - 1).collect();
        let attention = &mut Plain { config: &model.config, stored };
        let plain = model.forward(&text[..text.len() - 1], &steps, attention)?;
        for (step, plain) in plain.chunks_exact(model.config.vocab).enumerate() {
            let cached = &output.logits[step];
            let largest = plain.iter().fold(0.0f64, |max, &x| max.max(f64::from(x).abs()));
            for (&a, &b) in cached.iter().zip(plain) {
                let error = (f64::from(a) - f64::from(b)).abs() / largest;
                if !(error <= report.max_relative_error) {
                    report.max_relative_error = error;
                }
            }
            let (best, chosen) = (argmax(plain) as usize, output.tokens[step] as usize);
            if greedy && chosen != best {
                let tied = f64::from(plain[best] - plain[chosen]) <= tolerance * largest;
                report.ties += usize::from(tied);
                report.tokens_equal &= tied;
            }
        }
    }
    Ok(report)
}

impl Attention for Plain<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &mut [f32],
        k: &mut [f32],
        v: &[f32],
        out: &mut [f32],
    ) -> Result<(), Box<dyn Error>> {
        let (c, layers) = (self.config, &self.stored);
        let stored = Stored {
            format: layers.format_of(layer),
            block_tokens: layers.block_tokens as usize,
            sink_tokens: layers.sinks_of(layer) as usize,
        };
        let (q_row, kv_row) = (c.q_heads * c.head_dim, c.kv_heads * c.head_dim);
        rotate(q, q_row, c);
        rotate(k, kv_row, c);
        let (dim, mut v) = (c.head_dim as u32, v.to_vec());
        let codec = |made: fn(KvFormat, u32) -> kvcache::Result<RowCodec>| made(stored.format, dim);
        stored.store(k, codec(RowCodec::key), c)?;
        stored.store(&mut v, codec(RowCodec::value), c)?;
        let keys: Vec<f64> = k.iter().map(|&x| f64::from(x)).collect();
        let values: Vec<f64> = v.iter().map(|&x| f64::from(x)).collect();
        let (sealed_keys, sealed_values) = stored.sealed(&keys, &values, c)?;
        let tile = if sealed_keys.is_empty() { usize::MAX } else { stored.block_tokens };
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        for (token, (q, out)) in q.chunks_exact(q_row).zip(out.chunks_exact_mut(q_row)).enumerate()
        {
            let heads = q.chunks_exact(c.head_dim).zip(out.chunks_exact_mut(c.head_dim));
            for (head, (q, out)) in heads.enumerate() {
                let kv = head / (c.q_heads / c.kv_heads) * c.head_dim;
                let own = token / tile * tile;
                let side = |at: usize, raw: &'_ [f64], sealed: &'_ [f64]| {
                    row(
                        if (stored.sink_tokens..own).contains(&at) { sealed } else { raw },
                        at * kv_row + kv,
                        c,
                    )
                    .to_vec()
                };
                let scores: Vec<f64> = (0..=token)
                    .map(|at| {
                        side(at, &keys, &sealed_keys)
                            .iter()
                            .zip(q)
                            .map(|(k, &q)| k * f64::from(q))
                            .sum::<f64>()
                            * scale
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut sum = vec![0.0; c.head_dim];
                for (at, weight) in weights.iter().enumerate() {
                    sum.iter_mut()
                        .zip(side(at, &values, &sealed_values))
                        .for_each(|(s, v)| *s += weight * v);
                }
                out.iter_mut().zip(sum).for_each(|(o, s)| *o = (s / total) as f32);
            }
        }
        Ok(())
    }
}

impl Stored {
    /// Keys and values with every whole tile as its record stands for; nothing where the format has
    /// no tiles.
    fn sealed(
        &self,
        keys: &[f64],
        values: &[f64],
        c: &Config,
    ) -> Result<(Vec<f64>, Vec<f64>), Box<dyn Error>> {
        if self.format.class() != FormatClass::Tile {
            return Ok((Vec::new(), Vec::new()));
        }
        let (tokens, dim) = (self.block_tokens, c.head_dim as u32);
        let shape = TileShape { k_dim: dim, v_dim: dim, v_in_k: false, tokens: tokens as u32 };
        let layout = TileLayout::new(self.format, shape)?;
        let (mut sealed_keys, mut sealed_values) = (keys.to_vec(), values.to_vec());
        let kv_row = c.kv_heads * c.head_dim;
        let (mut record, mut rows) = (vec![0; layout.bytes()], vec![0.0; tokens * c.head_dim]);
        for tile in 0..keys.len() / kv_row / tokens {
            for head in 0..c.kv_heads {
                let at = |token: usize| (tile * tokens + token) * kv_row + head * c.head_dim;
                let gather = |from: &[f64]| -> Vec<f32> {
                    let rows = (0..tokens).flat_map(|token| &from[at(token)..][..c.head_dim]);
                    rows.map(|&x| x as f32).collect()
                };
                let stored = quant::seal(&layout, &gather(keys), &gather(values), &mut record)?;
                if stored != quant::Stored::Encoded {
                    return Err("a tile of the model cannot be sealed".into());
                }
                let sealed = Tile::open(&layout, &record)?;
                sealed.keys(&mut rows)?;
                let scatter = |to: &mut [f64], rows: &[f32]| {
                    for (token, row) in rows.chunks_exact(c.head_dim).enumerate() {
                        let row = row.iter().map(|&x| f64::from(x));
                        to[at(token)..][..c.head_dim].iter_mut().zip(row).for_each(|(t, x)| *t = x);
                    }
                };
                scatter(&mut sealed_keys, &rows);
                sealed.values(&mut rows)?;
                scatter(&mut sealed_values, &rows);
            }
        }
        Ok((sealed_keys, sealed_values))
    }

    /// What rows read as once they were stored; `codec` is that of formats that have one.
    fn store(
        &self,
        rows: &mut [f32],
        codec: kvcache::Result<RowCodec>,
        c: &Config,
    ) -> Result<(), Box<dyn Error>> {
        match self.format {
            KvFormat::F32 => {}
            KvFormat::F16 => rows.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
            KvFormat::Bf16 => to_bf16(rows),
            format if format.class() == FormatClass::Tile => to_bf16(rows),
            _ => {
                let codec = codec?;
                let mut codes = vec![0; codec.code_bytes()];
                let mut scales = vec![0; codec.scale_bytes()];
                for row in rows.chunks_exact_mut(c.head_dim) {
                    if codec.encode(row, &mut codes, &mut scales)? != quant::Stored::Encoded {
                        return Err("a row cannot be stored".into());
                    }
                    codec.decode(&codes, &scales, row)?;
                }
            }
        }
        Ok(())
    }
}

fn to_bf16(rows: &mut [f32]) {
    rows.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
}

fn row<'a>(rows: &'a [f64], at: usize, c: &Config) -> &'a [f64] {
    &rows[at..at + c.head_dim]
}

/// Rotary embedding of consecutive positions from 0, the two halves of a head as pairs.
fn rotate(rows: &mut [f32], row: usize, c: &Config) {
    let half = c.head_dim / 2;
    for (position, row) in rows.chunks_exact_mut(row).enumerate() {
        for head in row.chunks_exact_mut(c.head_dim) {
            for i in 0..half {
                let power = -2.0 * i as f64 / c.head_dim as f64;
                let (sin, cos) = (position as f64 * f64::from(c.rope_theta).powf(power)).sin_cos();
                let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
                head[i] = (a * cos - b * sin) as f32;
                head[i + half] = (b * cos + a * sin) as f32;
            }
        }
    }
}
