//! What attention computes, independent of where: shapes, scoring rules, the softmax state and
//! the reference in f64 that every kernel is held against.
//!
//! For query row `i` of a sequence with `n` query rows and `L` cached tokens (the queries' own
//! included), the query stands at position `p = L - n + i`. It sees key `j` when `j < L`, when
//! `j <= p` (causal), and when `p - j < window` (with a window). The score of a visible key is
//!
//! ```text
//! s = scale * <q, k_j>
//! s = cap * tanh(s / cap)            with a soft-cap
//! s = s + slope[head] * (j - p)      with ALiBi
//! ```
//!
//! and the row's output is `sum exp(s_j) v_j / (exp(sink[head]) + sum exp(s_j))`, the sink term
//! only with attention sinks. LSE is the natural logarithm of that denominator. A row that sees no
//! key gives O = 0 and LSE = -inf, with or without a sink.
//!
//! No pointers here, no SIMD, no threads.

mod reference;
mod state;

pub use reference::{KvSource, PagedKv, ReferenceOutput, reference_attention};
pub use state::{SoftmaxState, merge_states};

use crate::error::{Error, Result};
use crate::layout::{MAX_HEAD_DIM, MAX_SPLIT_HEAD_DIM};

/// Heads and channels of one attention call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads: a multiple of `kv_heads`; query head `h` reads KV head `h / (q_heads / kv_heads)`.
    pub q_heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Channels of query and key rows: a multiple of 8, to 256 (576 where values lie in keys).
    pub k_dim: u32,
    /// Channels of value and output rows: a multiple of 8.
    pub v_dim: u32,
    /// Values are the first `v_dim` channels of the keys (multi-head latent attention).
    pub v_in_k: bool,
}

impl HeadShape {
    /// Checks the ranges that the fields document.
    pub fn check(&self) -> Result<()> {
        if self.kv_heads == 0 || self.q_heads == 0 || !self.q_heads.is_multiple_of(self.kv_heads) {
            return Err(Error::invalid("q_heads", "must be a positive multiple of kv_heads"));
        }
        if self.q_heads > 1 << 16 {
            return Err(Error::invalid("q_heads", "must be at most 65536"));
        }
        let max = if self.v_in_k { MAX_HEAD_DIM } else { MAX_SPLIT_HEAD_DIM };
        if self.k_dim == 0 || !self.k_dim.is_multiple_of(8) || self.k_dim > max {
            return Err(Error::invalid(
                "k_dim",
                "must be a multiple of 8, to 256 (576 for latents)",
            ));
        }
        if self.v_dim == 0 || !self.v_dim.is_multiple_of(8) || self.v_dim > max {
            return Err(Error::invalid(
                "v_dim",
                "must be a multiple of 8, to 256 (576 for latents)",
            ));
        }
        if self.v_in_k && (self.v_dim > self.k_dim || self.kv_heads != 1) {
            return Err(Error::invalid("v_dim", "latents need one KV head and v_dim <= k_dim"));
        }
        Ok(())
    }

    /// Query heads that share one KV head.
    pub fn group(&self) -> u32 {
        self.q_heads / self.kv_heads
    }
}

/// How scores are made from dot products. The module's text gives the formula.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring<'a> {
    /// Factor of the dot product, usually `1 / sqrt(k_dim)`. Finite.
    pub scale: f32,
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Keys a query sees, its own included, counted back from its position; `None` for all.
    pub window: Option<u32>,
    /// Logit soft-cap: positive and finite.
    pub softcap: Option<f32>,
    /// One logit a query head that joins the denominator and has no value.
    pub sinks: Option<&'a [f32]>,
    /// ALiBi slope of each query head.
    pub alibi: Option<&'a [f32]>,
}

impl<'a> Scoring<'a> {
    /// Causal attention with `1 / sqrt(k_dim)` and nothing else.
    pub fn causal(k_dim: u32) -> Self {
        Self {
            scale: 1.0 / libm::sqrtf(k_dim as f32),
            causal: true,
            window: None,
            softcap: None,
            sinks: None,
            alibi: None,
        }
    }

    /// Checks values and lengths against the number of query heads.
    pub fn check(&self, q_heads: u32) -> Result<()> {
        if !self.scale.is_finite() {
            return Err(Error::invalid("scale", "must be finite"));
        }
        if self.softcap.is_some_and(|cap| !(cap.is_finite() && cap > 0.0)) {
            return Err(Error::invalid("softcap", "must be positive and finite"));
        }
        if self.window == Some(0) {
            return Err(Error::invalid("window", "must be at least 1 token"));
        }
        let len_ok = |list: Option<&[f32]>| list.is_none_or(|l| l.len() == q_heads as usize);
        if !len_ok(self.sinks) || !len_ok(self.alibi) {
            return Err(Error::invalid("sinks, alibi", "must have one entry a query head"));
        }
        Ok(())
    }
}
