//! The attention geometry of well-known open models, as their published configurations state it.
//!
//! Only what decides the cache's size is here: layers, KV heads, head dimensions, windows. Layers
//! that alternate between a sliding window and full attention form two groups. Models whose layers
//! keep another kind of state (recurrent or linear attention) are not listed.

use crate::dtype::KvFormat;
use crate::layout::{CacheSpec, GroupSpec};

/// A model whose geometry is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// Name in lower case, as command lines spell it.
    pub name: &'static str,
    /// Its layer groups, stored as bf16.
    pub groups: &'static [GroupSpec],
}

impl Preset {
    /// The preset called `name`, upper and lower case alike.
    pub fn find(name: &str) -> Option<&'static Preset> {
        ALL.iter().find(|preset| preset.name.eq_ignore_ascii_case(name))
    }

    /// The cache of this model with every group stored as `format`. Whether `block_tokens` is in
    /// range is checked where the spec is used.
    pub fn spec(&self, format: KvFormat, block_tokens: u32) -> CacheSpec {
        let spec = CacheSpec { block_tokens, groups: self.groups.to_vec() };
        super::with_format(&spec, format)
    }
}

const fn full(layers: u32, kv_heads: u32, head_dim: u32) -> GroupSpec {
    GroupSpec::uniform(layers, kv_heads, head_dim, KvFormat::Bf16)
}

const fn windowed(layers: u32, kv_heads: u32, head_dim: u32, window: u32) -> GroupSpec {
    GroupSpec { window: Some(window), ..full(layers, kv_heads, head_dim) }
}

const fn latent(layers: u32) -> GroupSpec {
    GroupSpec::latent(layers, 512, 64, KvFormat::Bf16)
}

const fn preset(name: &'static str, groups: &'static [GroupSpec]) -> Preset {
    Preset { name, groups }
}

/// Every preset.
pub const ALL: &[Preset] = &[
    preset("llama-2-7b", &[full(32, 32, 128)]),
    preset("llama-2-13b", &[full(40, 40, 128)]),
    preset("llama-2-70b", &[full(80, 8, 128)]),
    preset("llama-3-8b", &[full(32, 8, 128)]),
    preset("llama-3-70b", &[full(80, 8, 128)]),
    preset("llama-3.1-8b", &[full(32, 8, 128)]),
    preset("llama-3.1-70b", &[full(80, 8, 128)]),
    preset("llama-3.1-405b", &[full(126, 8, 128)]),
    preset("llama-3.2-1b", &[full(16, 8, 64)]),
    preset("llama-3.2-3b", &[full(28, 8, 128)]),
    preset("llama-3.3-70b", &[full(80, 8, 128)]),
    // The first release alone has the window; later ones attend to everything.
    preset("mistral-7b-v0.1", &[windowed(32, 8, 128, 4096)]),
    preset("mistral-7b-v0.3", &[full(32, 8, 128)]),
    preset("mixtral-8x7b", &[full(32, 8, 128)]),
    preset("mixtral-8x22b", &[full(56, 8, 128)]),
    preset("qwen2.5-0.5b", &[full(24, 2, 64)]),
    preset("qwen2.5-1.5b", &[full(28, 2, 128)]),
    preset("qwen2.5-3b", &[full(36, 2, 128)]),
    preset("qwen2.5-7b", &[full(28, 4, 128)]),
    preset("qwen2.5-14b", &[full(48, 8, 128)]),
    preset("qwen2.5-32b", &[full(64, 8, 128)]),
    preset("qwen2.5-72b", &[full(80, 8, 128)]),
    preset("qwen3-0.6b", &[full(28, 8, 128)]),
    preset("qwen3-1.7b", &[full(28, 8, 128)]),
    preset("qwen3-4b", &[full(36, 8, 128)]),
    preset("qwen3-8b", &[full(36, 8, 128)]),
    preset("qwen3-14b", &[full(40, 8, 128)]),
    preset("qwen3-32b", &[full(64, 8, 128)]),
    preset("qwen3-30b-a3b", &[full(48, 4, 128)]),
    preset("qwen3-235b-a22b", &[full(94, 4, 128)]),
    // Gemma 2 alternates; Gemma 3 has one full layer after every five with a window.
    preset("gemma-2-2b", &[windowed(13, 4, 256, 4096), full(13, 4, 256)]),
    preset("gemma-2-9b", &[windowed(21, 8, 256, 4096), full(21, 8, 256)]),
    preset("gemma-2-27b", &[windowed(23, 16, 128, 4096), full(23, 16, 128)]),
    preset("gemma-3-1b", &[windowed(22, 1, 256, 512), full(4, 1, 256)]),
    preset("gemma-3-4b", &[windowed(29, 4, 256, 1024), full(5, 4, 256)]),
    preset("gemma-3-12b", &[windowed(40, 8, 256, 1024), full(8, 8, 256)]),
    preset("gemma-3-27b", &[windowed(52, 16, 128, 1024), full(10, 16, 128)]),
    preset("gpt-oss-20b", &[windowed(12, 8, 64, 128), full(12, 8, 64)]),
    preset("gpt-oss-120b", &[windowed(18, 8, 64, 128), full(18, 8, 64)]),
    preset("phi-4", &[full(40, 10, 128)]),
    preset("deepseek-v2-lite", &[latent(27)]),
    preset("deepseek-v2", &[latent(60)]),
    preset("deepseek-v3", &[latent(61)]),
    preset("deepseek-r1", &[latent(61)]),
    preset("kimi-k2", &[latent(61)]),
];
