//! Which layer is stored how: all in one format, or the first and the last in another. Layers of one
//! format are a layer group.

use kvcache::cache::LayerId;
use kvcache::dtype::{FormatClass, KvFormat};
use kvcache::layout::{CacheSpec, GroupSpec};

use crate::model::Config;

/// The formats of a model's layers.
#[derive(Clone, Copy)]
pub struct Layers {
    pub format: KvFormat,
    /// Of the first and the last layer.
    pub edges: Option<KvFormat>,
    pub layers: usize,
    pub block_tokens: u32,
    /// First tokens that stay raw in layers with sealed tiles.
    pub sink_tokens: u32,
}

impl Layers {
    /// All layers alike.
    #[cfg(test)]
    pub fn uniform(format: KvFormat, block_tokens: u32, layers: usize) -> Self {
        Self { format, edges: None, layers, block_tokens, sink_tokens: 0 }
    }

    fn is_edge(&self, layer: usize) -> bool {
        self.edges.is_some() && (layer == 0 || layer + 1 == self.layers)
    }

    pub fn format_of(&self, layer: usize) -> KvFormat {
        self.edges.filter(|_| self.is_edge(layer)).unwrap_or(self.format)
    }

    /// Tokens that stay raw in a layer.
    pub fn sinks_of(&self, layer: usize) -> u32 {
        let tiled = self.format_of(layer).class() == FormatClass::Tile;
        if tiled { self.sink_tokens } else { 0 }
    }

    /// The group of the inner layers, and behind it that of the edges.
    pub fn spec(&self, c: &Config) -> CacheSpec {
        let group = |count: usize, example: usize| {
            let format = self.format_of(example);
            let (heads, dim) = (c.kv_heads as u32, c.head_dim as u32);
            let sink_tokens = self.sinks_of(example);
            GroupSpec { sink_tokens, ..GroupSpec::uniform(count as u32, heads, dim, format) }
        };
        let edges = (0..self.layers).filter(|&layer| self.is_edge(layer)).count();
        let mut groups = Vec::new();
        if edges < self.layers {
            groups.push(group(self.layers - edges, if edges > 0 { 1 } else { 0 }));
        }
        if edges > 0 {
            groups.push(group(edges, 0));
        }
        CacheSpec { block_tokens: self.block_tokens, groups }
    }

    pub fn id(&self, layer: usize) -> LayerId {
        let before = (0..layer).filter(|&other| self.is_edge(other) == self.is_edge(layer)).count();
        let inner = (0..self.layers).any(|other| !self.is_edge(other));
        let group = u32::from(self.is_edge(layer) && inner);
        LayerId { group, layer: before as u32 }
    }
}
