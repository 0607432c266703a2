//! The model's attention as an engine would have it: a cache of the library that the text goes through
//! token by token. So a figure has what append, seal and the kernels of this CPU do to stored keys and
//! values, the rounding of queries and probabilities included.

use std::error::Error;

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::dtype::KvFormat;
use kvcache::ids::Namespace;
use kvcache::layout::{CacheSpec, GroupSpec};

use crate::model::Config;

/// How a cache stores a layer.
#[derive(Clone, Copy)]
pub struct Cached {
    pub format: KvFormat,
    pub block_tokens: usize,
    /// First tokens that stay raw.
    pub sink_tokens: usize,
}

/// Decodes one layer of a text, rows `[token][head][head_dim]`.
pub fn attend(
    c: &Config,
    cached: &Cached,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
) -> Result<(), Box<dyn Error>> {
    let (kv_row, q_row) = (c.kv_heads * c.head_dim, c.q_heads * c.head_dim);
    let group = GroupSpec {
        sink_tokens: cached.sink_tokens as u32,
        ..GroupSpec::uniform(1, c.kv_heads as u32, c.head_dim as u32, cached.format)
    };
    let spec = CacheSpec::uniform(cached.block_tokens as u32, group);
    let options = CacheOptions {
        blocks: (k.len() / kv_row).div_ceil(cached.block_tokens) as u32,
        max_seqs: 1,
        threads: 1,
        prefix_reuse: false,
        ..CacheOptions::default()
    };
    let mut cache = KvCache::new(&spec, &options)?;
    let (layer, mut step) = (LayerId::uniform(0), Step::new());
    let scoring = Scoring::causal(c.head_dim as u32);
    // What the tokens are matters to no one: nothing is found by them.
    let seq = cache.start(&[0], Namespace::default())?.seq;
    let rows = k.chunks_exact(kv_row).zip(v.chunks_exact(kv_row));
    let queries = q.chunks_exact(q_row).zip(out.chunks_exact_mut(q_row));
    for ((k, v), (q, out)) in rows.zip(queries) {
        cache.begin(&mut step, &[Work { seq, tokens: &[0] }])?;
        cache.append(&step, layer, k.into(), v.into(), None)?;
        cache.attend(&step, layer, q.into(), out.into(), &scoring, None)?;
        cache.commit(&mut step)?;
    }
    if cache.stats().unsealed_blocks != 0 {
        return Err("a tile stayed raw".into());
    }
    Ok(())
}
