//! The step noun: one forward pass over a batch. One crossing a layer serves the whole batch.

use core::ffi::c_void;

use super::attend::per_head;
use super::cache::{Locked, kvc_cache, open};
use super::handle::{self, Noun};
use super::pointer::{self, Plain, Sized32, flag};
use super::seq::kvc_seq;
use super::status::{guard, kvc_status};
use crate::attention::Scoring;
use crate::cache::{KvCache, LayerId, Step, Work};
use crate::cpu::Rope;
use crate::dtype::{DType, Rows};
use crate::error::{Error, Result};
use crate::ids::{SeqId, TokenId};
use crate::layout::GroupSpec;

/// A step: begin with the new tokens of each sequence; for each layer append their keys and values
/// and attend; then commit, or cancel. Made once and reused: it keeps its buffers.
///
/// The rows of a step are the new tokens of all its sequences, in the order of the work.
pub struct kvc_step(());

/// What a step handle holds.
struct OpenStep {
    step: Step,
    /// The handle of the cache that has it open, to be cancelled with the step: a number, which is
    /// checked like any other handle.
    cache: usize,
}

impl Noun for OpenStep {
    type Handle = kvc_step;
    const KIND: usize = 4;
    const NAME: &'static str = "step";
}

/// New tokens of one sequence. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_work {
    /// A live sequence, at most once in a step.
    pub seq: kvc_seq,
    /// At least 1.
    pub token_count: u32,
    /// A chunk of the prompt, or what was sampled last.
    pub tokens: *const u32,
}

// SAFETY: integers, a pointer.
unsafe impl Plain for kvc_work {}

/// Rotation of keys to their positions on the way into the cache.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_rope {
    /// sizeof(kvc_rope); kvc_rope_init sets it.
    pub struct_size: u32,
    /// Leading channels of each key row that are rotated: even.
    pub dim: u32,
    /// 1: channels 2i and 2i + 1 make a pair. 0 (the default): channels i and i + dim / 2.
    pub interleaved: u32,
    /// Frequency base. 10000 by default.
    pub theta: f32,
}

/// How scores are made from dot products.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_scoring {
    /// sizeof(kvc_scoring); kvc_scoring_init sets it.
    pub struct_size: u32,
    /// 1 (the default): a query sees no key after its own position.
    pub causal: u32,
    /// Keys that a query sees, its own included, counted back; 0 for the group's window.
    pub window: u32,
    /// Factor of the dot product; 0 for 1 / sqrt(k_dim).
    pub scale: f32,
    /// Logit soft-cap; 0 for none.
    pub softcap: f32,
    /// 0.
    pub reserved: u32,
    /// NULL, or [q_heads]: a logit that joins each head's denominator and has no value.
    pub sinks: *const f32,
    /// NULL, or [q_heads]: ALiBi slopes.
    pub alibi: *const f32,
}
