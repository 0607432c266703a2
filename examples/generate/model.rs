//! A Llama model in plain Rust: weights from safetensors, forward pass without attention, which
//! the caller supplies. It knows nothing of caches.

use std::error::Error;
use std::fs;
use std::path::Path;

use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

/// The dimensions, as `config.json` names them.
pub struct Config {
    pub layers: usize,
    pub hidden: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub mlp: usize,
    pub vocab: usize,
    pub norm_eps: f32,
    pub rope_theta: f32,
    pub max_tokens: usize,
}

/// The one thing that differs between a cached and a plain forward pass.
pub trait Attention {
    /// Rotates q and k, remembers k and v of the new rows, and writes attention's output.
    /// Rows are `[token][head][head_dim]`.
    fn attend(
        &mut self,
        layer: usize,
        q: &mut [f32],
        k: &mut [f32],
        v: &[f32],
        out: &mut [f32],
    ) -> Result<(), Box<dyn Error>>;
}

/// A matrix kept as `[input][output]`, so that rows of outputs add up in vector registers.
struct Linear {
    weight: Vec<f32>,
    outputs: usize,
}

struct Layer {
    attention_norm: Vec<f32>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

pub struct Model {
    pub config: Config,
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Linear,
}

impl Model {
    /// Reads `config.json` and `model.safetensors` of `folder`.
    pub fn load(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let config = Config::parse(&fs::read_to_string(folder.join("config.json"))?)?;
        let bytes = fs::read(folder.join("model.safetensors"))?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let vector = |name: &str| floats(&tensors, name);
        let linear = |name: &str| Linear::load(&tensors, name);
        let layers = (0..config.layers)
            .map(|n| {
                let layer = |part: &str| format!("model.layers.{n}.{part}.weight");
                Ok(Layer {
                    attention_norm: vector(&layer("input_layernorm"))?,
                    q: linear(&layer("self_attn.q_proj"))?,
                    k: linear(&layer("self_attn.k_proj"))?,
                    v: linear(&layer("self_attn.v_proj"))?,
                    o: linear(&layer("self_attn.o_proj"))?,
                    mlp_norm: vector(&layer("post_attention_layernorm"))?,
                    gate: linear(&layer("mlp.gate_proj"))?,
                    up: linear(&layer("mlp.up_proj"))?,
                    down: linear(&layer("mlp.down_proj"))?,
                })
            })
            .collect::<Result<_, Box<dyn Error>>>()?;
        Ok(Self {
            embedding: vector("model.embed_tokens.weight")?,
            layers,
            norm: vector("model.norm.weight")?,
            // The head is tied to the embedding.
            head: linear("model.embed_tokens.weight")?,
            config,
        })
    }

    /// Logits `[row][vocab]` of the rows that `wanted` names, after running all `tokens`.
    pub fn forward(
        &self,
        tokens: &[u32],
        wanted: &[usize],
        attention: &mut dyn Attention,
    ) -> Result<Vec<f32>, Box<dyn Error>> {
        let c = &self.config;
        let mut x: Vec<f32> = Vec::with_capacity(tokens.len() * c.hidden);
        for &token in tokens {
            let row = token as usize * c.hidden;
            x.extend(
                self.embedding.get(row..row + c.hidden).ok_or("a token is past the vocabulary")?,
            );
        }
        let mut attended = vec![0.0; tokens.len() * c.q_heads * c.head_dim];
        for (n, layer) in self.layers.iter().enumerate() {
            let h = rms_norm(&x, &layer.attention_norm, c.norm_eps);
            let (mut q, mut k, v) = (layer.q.apply(&h), layer.k.apply(&h), layer.v.apply(&h));
            attention.attend(n, &mut q, &mut k, &v, &mut attended)?;
            add(&mut x, &layer.o.apply(&attended));

            let h = rms_norm(&x, &layer.mlp_norm, c.norm_eps);
            let mut gated = layer.gate.apply(&h);
            let up = layer.up.apply(&h);
            gated.iter_mut().zip(&up).for_each(|(g, u)| *g = *g / (1.0 + (-*g).exp()) * u);
            add(&mut x, &layer.down.apply(&gated));
        }
        let rows: Vec<f32> = wanted
            .iter()
            .flat_map(|&row| x[row * c.hidden..(row + 1) * c.hidden].iter().copied())
            .collect();
        Ok(self.head.apply(&rms_norm(&rows, &self.norm, c.norm_eps)))
    }
}

impl Config {
    fn parse(text: &str) -> Result<Self, Box<dyn Error>> {
        let json: serde_json::Value = serde_json::from_str(text)?;
        let int = |name: &str| {
            json[name].as_u64().map(|n| n as usize).ok_or_else(|| format!("config.json: no {name}"))
        };
        let float = |name: &str| {
            json[name].as_f64().map(|x| x as f32).ok_or_else(|| format!("config.json: no {name}"))
        };
        Ok(Self {
            layers: int("num_hidden_layers")?,
            hidden: int("hidden_size")?,
            q_heads: int("num_attention_heads")?,
            kv_heads: int("num_key_value_heads")?,
            head_dim: int("head_dim")?,
            mlp: int("intermediate_size")?,
            vocab: int("vocab_size")?,
            norm_eps: float("rms_norm_eps")?,
            rope_theta: float("rope_theta")?,
            max_tokens: int("max_position_embeddings")?,
        })
    }

    /// Parameters, the tied embedding counted once.
    pub fn parameters(&self) -> usize {
        let attention = self.hidden * self.head_dim * 2 * (self.q_heads + self.kv_heads);
        let layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden;
        self.vocab * self.hidden + self.layers * layer + self.hidden
    }
}

impl Linear {
    fn load(tensors: &SafeTensors, name: &str) -> Result<Self, Box<dyn Error>> {
        let stored = floats(tensors, name)?;
        let shape = tensors.tensor(name)?.shape().to_vec();
        let &[outputs, inputs] = shape.as_slice() else {
            return Err("a matrix has two dims".into());
        };
        let mut weight = vec![0.0; stored.len()];
        for (o, row) in stored.chunks_exact(inputs).enumerate() {
            row.iter().enumerate().for_each(|(i, &w)| weight[i * outputs + o] = w);
        }
        Ok(Self { weight, outputs })
    }

    /// `[rows][inputs]` to `[rows][outputs]`. Each row adds its inputs in order, whatever stands
    /// beside it: a row's bits do not depend on the batch.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        const ROWS: usize = 8;
        let inputs = self.weight.len() / self.outputs;
        let mut y = vec![0.0; x.len() / inputs * self.outputs];
        y.par_chunks_mut(ROWS * self.outputs).zip(x.par_chunks(ROWS * inputs)).for_each(
            |(y, x)| {
                for (i, weights) in self.weight.chunks_exact(self.outputs).enumerate() {
                    for (y, x) in y.chunks_exact_mut(self.outputs).zip(x.chunks_exact(inputs)) {
                        let x = x[i];
                        y.iter_mut().zip(weights).for_each(|(y, w)| *y += x * w);
                    }
                }
            },
        );
        y
    }
}

fn floats(tensors: &SafeTensors, name: &str) -> Result<Vec<f32>, Box<dyn Error>> {
    let tensor = tensors.tensor(name)?;
    if tensor.dtype() != Dtype::F16 {
        return Err(format!("{name} is not f16").into());
    }
    let pairs = tensor.data().chunks_exact(2);
    Ok(pairs.map(|p| kvcache::dtype::f16::from_le_bytes([p[0], p[1]]).to_f32()).collect())
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let mean = row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        out.extend(row.iter().zip(weight).map(|(v, w)| v * scale * w));
    }
    out
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
