//! The oracle: attention in f64, two passes over the scores, one row at a time.
//!
//! Written to be read, not to be fast. Kernels of every backend are held against it.

use alloc::vec::Vec;

use super::{HeadShape, Scoring};
use crate::dtype::Rows;
use crate::error::{Error, Result};
use crate::layout::Strides;

/// Where the reference reads keys and values: a function of sequence, KV head, position, channel.
pub trait KvSource {
    /// Channel `channel` of a key; `None` where the position cannot be read and must be masked.
    fn key(&self, seq: usize, head: usize, position: usize, channel: usize) -> Option<f64>;
    /// Channel `channel` of a value; only called for positions whose keys could be read.
    fn value(&self, seq: usize, head: usize, position: usize, channel: usize) -> f64;
}

/// K and V in blocks behind tables, over slices.
#[derive(Debug, Clone)]
pub struct PagedKv<'a> {
    /// The memory of the keys.
    pub k: Rows<'a>,
    /// The memory of the values; that of the keys where values lie in keys.
    pub v: Rows<'a>,
    /// Element of block 0, head 0, token 0 in `k`.
    pub k_offset: usize,
    /// The same in `v`.
    pub v_offset: usize,
    /// Strides of the keys, in elements.
    pub k_strides: Strides,
    /// Strides of the values, in elements.
    pub v_strides: Strides,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Blocks that exist; an entry outside `0..num_blocks` masks its tokens.
    pub num_blocks: usize,
    /// The block table of each sequence.
    pub tables: Vec<&'a [i32]>,
}

impl PagedKv<'_> {
    fn at(&self, s: Strides, seq: usize, head: usize, position: usize) -> Option<i64> {
        let entry = self.tables[seq][position / self.block_tokens];
        let known = usize::try_from(entry).is_ok_and(|block| block < self.num_blocks);
        known.then(|| {
            let slot = (position % self.block_tokens) as i64;
            i64::from(entry) * s.block + head as i64 * s.head + slot * s.token
        })
    }
}

/// Element `index` of `rows`, widened.
fn element(rows: &Rows<'_>, index: usize) -> f64 {
    match rows {
        Rows::F32(rows) => f64::from(rows[index]),
        Rows::F16(rows) => rows[index].to_f64(),
        Rows::Bf16(rows) => rows[index].to_f64(),
    }
}

impl KvSource for PagedKv<'_> {
    fn key(&self, seq: usize, head: usize, position: usize, channel: usize) -> Option<f64> {
        let row = self.at(self.k_strides, seq, head, position)?;
        Some(element(&self.k, (self.k_offset as i64 + row) as usize + channel))
    }

    fn value(&self, seq: usize, head: usize, position: usize, channel: usize) -> f64 {
        match self.at(self.v_strides, seq, head, position) {
            Some(row) => element(&self.v, (self.v_offset as i64 + row) as usize + channel),
            None => 0.0,
        }
    }
}

/// What [`reference_attention`] computed: outputs `[token][q_heads][v_dim]` and LSE
/// `[token][q_heads]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ReferenceOutput {
    /// Outputs.
    pub out: Vec<f64>,
    /// Natural logarithms of the denominators; -inf where no key was visible.
    pub lse: Vec<f64>,
}

/// Attention of a ragged batch, as the module's text defines it. Sequence `s` has the query tokens
/// `q_indptr[s]..q_indptr[s + 1]` of `q` (`[token][q_heads][k_dim]`) and `kv_lens[s]` cached
/// tokens.
///
/// # Errors
/// `InvalidArgument` where shape, scoring or lengths do not fit together.
///
/// # Panics
/// Where `kv` has fewer tokens than `kv_lens` says.
pub fn reference_attention(
    shape: &HeadShape,
    scoring: &Scoring<'_>,
    kv: &dyn KvSource,
    q: Rows<'_>,
    q_indptr: &[usize],
    kv_lens: &[usize],
) -> Result<ReferenceOutput> {
    shape.check()?;
    scoring.check(shape.q_heads)?;
    let (heads, k_dim) = (shape.q_heads as usize, shape.k_dim as usize);
    let v_dim = shape.v_dim as usize;
    let ordered = q_indptr.windows(2).all(|pair| pair[0] <= pair[1]);
    if q_indptr.len() != kv_lens.len() + 1 || !ordered {
        return Err(Error::invalid("q_indptr", "must have one entry more than kv_lens, ascending"));
    }
    let total = q_indptr[kv_lens.len()];
    if q.elements() < total * heads * k_dim {
        return Err(Error::invalid("q", "must hold q_heads rows of k_dim for each token"));
    }
    let mut output = ReferenceOutput {
        out: alloc::vec![0.0; total * heads * v_dim],
        lse: alloc::vec![f64::NEG_INFINITY; total * heads],
    };
    for (seq, &len) in kv_lens.iter().enumerate() {
        let tokens = q_indptr[seq]..q_indptr[seq + 1];
        for token in tokens.clone() {
            let position = len as i64 - tokens.len() as i64 + (token - tokens.start) as i64;
            for head in 0..heads {
                let row = token * heads + head;
                let query: Vec<f64> = (0..k_dim).map(|c| element(&q, row * k_dim + c)).collect();
                let out = &mut output.out[row * v_dim..(row + 1) * v_dim];
                output.lse[row] =
                    attend_row(shape, scoring, kv, seq, head, position, len, &query, out);
            }
        }
    }
    Ok(output)
}

/// One row: writes its output, returns its LSE.
#[allow(clippy::too_many_arguments)]
fn attend_row(
    shape: &HeadShape,
    scoring: &Scoring<'_>,
    kv: &dyn KvSource,
    seq: usize,
    head: usize,
    position: i64,
    len: usize,
    query: &[f64],
    out: &mut [f64],
) -> f64 {
    let kv_head = head / shape.group() as usize;
    let mut scores: Vec<(usize, f64)> = Vec::new();
    'keys: for j in 0..len {
        let distance = position - j as i64;
        let hidden = (scoring.causal && distance < 0)
            || scoring.window.is_some_and(|window| distance >= i64::from(window));
        if hidden {
            continue;
        }
        let mut dot = 0.0;
        for (c, q) in query.iter().enumerate() {
            match kv.key(seq, kv_head, j, c) {
                Some(k) => dot += q * k,
                None => continue 'keys,
            }
        }
        let mut score = f64::from(scoring.scale) * dot;
        if let Some(cap) = scoring.softcap {
            score = f64::from(cap) * libm::tanh(score / f64::from(cap));
        }
        if let Some(slopes) = scoring.alibi {
            score -= f64::from(slopes[head]) * distance as f64;
        }
        scores.push((j, score));
    }
    if scores.is_empty() {
        return f64::NEG_INFINITY;
    }
    let sink = scoring.sinks.map(|sinks| f64::from(sinks[head]));
    let seen = scores.iter().map(|&(_, score)| score);
    let top = seen.chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let mut sum = sink.map_or(0.0, |sink| libm::exp(sink - top));
    for &(j, score) in &scores {
        let p = libm::exp(score - top);
        sum += p;
        for (c, o) in out.iter_mut().enumerate() {
            *o += p * kv.value(seq, kv_head, j, c);
        }
    }
    out.iter_mut().for_each(|o| *o /= sum);
    top + libm::log(sum)
}
