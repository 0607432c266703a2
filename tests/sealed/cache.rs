//! Sequences in memory of their own, raw and sealed, and what a query sees of them.

use std::sync::atomic::{AtomicU32, Ordering};

use kvcache::attention::{HeadShape, KvSource};
use kvcache::cpu::{CpuLevel, KvView, SealArgs, SealTile, Serial, TileView, seal_tiles};
use kvcache::dtype::{KvFormat, bf16};
use kvcache::layout::tile::{TileLayout, TileShape};
use kvcache::layout::{GroupLayout, GroupSpec};
use kvcache::quant::Tile;

use crate::random::Rng;

/// Whole 16-byte words, for aligned memory.
fn aligned(bytes: usize) -> Vec<u128> {
    vec![u128::MAX; bytes.div_ceil(16)]
}

/// Sequences in a cache of sealed tiles, every row raw and every whole tile sealed too.
pub struct Cache {
    pub shape: HeadShape,
    pub layout: TileLayout,
    pub group: GroupLayout,
    pub raw: GroupLayout,
    pub records: Vec<u128>,
    pub rows: Vec<u128>,
    /// `[seq]` tokens, first block (of records and raw rows alike).
    pub seqs: Vec<(usize, usize)>,
    blocks: usize,
    /// `[seq][tile][head]` keys and values as sealed.
    sealed: Vec<Vec<Vec<TileRows>>>,
}

/// Keys and values of a tile's tokens.
type TileRows = (Vec<f32>, Vec<f32>);

impl Cache {
    pub fn new(format: KvFormat, shape: HeadShape, tokens: u32, lens: &[usize], seed: u64) -> Self {
        let group = GroupSpec {
            layers: 1,
            kv_heads: shape.kv_heads,
            k_dim: shape.k_dim,
            v_dim: shape.v_dim,
            v_in_k: shape.v_in_k,
            format,
            window: None,
            sink_tokens: 0,
        };
        let raw_spec = GroupSpec { format: KvFormat::Bf16, ..group.clone() };
        let group = GroupLayout::new(group, tokens).unwrap();
        let raw = GroupLayout::new(raw_spec, tokens).unwrap();
        let HeadShape { k_dim, v_dim, v_in_k, .. } = shape;
        let layout = TileLayout::new(format, TileShape { k_dim, v_dim, v_in_k, tokens }).unwrap();
        let mut seqs = Vec::new();
        let mut blocks = 0;
        for &len in lens {
            seqs.push((len, blocks));
            blocks += len.div_ceil(tokens as usize);
        }
        let mut cache = Cache {
            shape,
            records: aligned(blocks * group.block_bytes() as usize),
            rows: aligned(blocks * raw.block_bytes() as usize),
            layout,
            group,
            raw,
            seqs,
            blocks,
            sealed: Vec::new(),
        };
        let mut rng = Rng::new(seed);
        let elements = cache.rows.len() * 8;
        // SAFETY: bf16 has no invalid bits, and the memory is whole words of it.
        let rows = unsafe {
            std::slice::from_raw_parts_mut(cache.rows.as_mut_ptr().cast::<bf16>(), elements)
        };
        rows.fill_with(|| bf16::from_f32(rng.normal()));
        cache.seal();
        cache
    }

    pub fn view(&self) -> TileView<'_> {
        let rows = self.rows.as_ptr().cast_mut().cast();
        let staging = KvView::native(&self.raw, rows, self.blocks as u32, 0).unwrap();
        TileView {
            layout: &self.layout,
            records: self.records.as_ptr().cast_mut().cast(),
            block_bytes: self.group.block_bytes() as i64,
            head_bytes: self.layout.bytes() as i64,
            num_blocks: self.blocks as u32,
            staging,
            scratch: KvView { num_blocks: 0, ..staging },
        }
    }

    /// Seals every whole tile with the best level, and reads it back with the reference.
    pub fn seal(&mut self) {
        let tokens = self.layout.shape().tokens as usize;
        let list: Vec<_> = self
            .seqs
            .iter()
            .flat_map(|&(len, first)| first..first + len / tokens)
            .map(|block| SealTile { slot: block as i32, block: block as i32 })
            .collect();
        let refused: Vec<_> = list.iter().map(|_| AtomicU32::new(0)).collect();
        let args =
            SealArgs { shape: self.shape, tiles: self.view(), list: &list, refused: &refused };
        // SAFETY: every slot and block is in the memory.
        unsafe { seal_tiles(&args, CpuLevel::detected(), &Serial) }.unwrap();
        assert!(refused.iter().all(|r| r.load(Ordering::Relaxed) == 0));
        let bytes = self.layout.bytes();
        // SAFETY: the records were written.
        let memory = unsafe {
            std::slice::from_raw_parts(self.records.as_ptr().cast::<u8>(), self.records.len() * 16)
        };
        let (k_dim, v_dim) = (self.shape.k_dim as usize, self.shape.v_dim as usize);
        self.sealed = self
            .seqs
            .iter()
            .map(|&(len, first)| {
                (first..first + len / tokens)
                    .map(|block| {
                        (0..self.shape.kv_heads as usize)
                            .map(|head| {
                                let at = block * self.group.block_bytes() as usize + head * bytes;
                                let tile =
                                    Tile::open(&self.layout, &memory[at..at + bytes]).unwrap();
                                let mut k = vec![0.0; tokens * k_dim];
                                let mut v = vec![0.0; tokens * v_dim];
                                tile.keys(&mut k).unwrap();
                                tile.values(&mut v).unwrap();
                                (k, v)
                            })
                            .collect()
                    })
                    .collect()
            })
            .collect();
    }

    fn raw_element(&self, block: usize, head: usize, slot: usize, c: usize, value: bool) -> f64 {
        let value = value && !self.shape.v_in_k;
        let strides = if value { self.raw.v_strides() } else { self.raw.k_strides() };
        let start = if value { self.raw.v_offset(0) / 2 } else { 0 };
        let at =
            block as i64 * strides.block + head as i64 * strides.head + slot as i64 * strides.token;
        // SAFETY: within the rows.
        unsafe { self.rows.as_ptr().cast::<bf16>().add(start as usize + at as usize + c).read() }
            .to_f64()
    }
}

/// What one query of a sequence sees: its own tile raw, those before sealed.
pub struct Seen<'a> {
    pub cache: &'a Cache,
    pub seq: usize,
    pub own: usize,
    /// Tiles that are not sealed.
    pub open: &'a [usize],
}

impl KvSource for Seen<'_> {
    fn key(&self, _: usize, head: usize, position: usize, channel: usize) -> Option<f64> {
        let tokens = self.cache.layout.shape().tokens as usize;
        let (tile, slot) = (position / tokens, position % tokens);
        if tile == self.own || self.open.contains(&tile) {
            let block = self.cache.seqs[self.seq].1 + tile;
            return Some(self.cache.raw_element(block, head, slot, channel, false));
        }
        let k_dim = self.cache.shape.k_dim as usize;
        Some(f64::from(self.cache.sealed[self.seq][tile][head].0[slot * k_dim + channel]))
    }
    fn value(&self, _: usize, head: usize, position: usize, channel: usize) -> f64 {
        let tokens = self.cache.layout.shape().tokens as usize;
        let (tile, slot) = (position / tokens, position % tokens);
        if tile == self.own || self.open.contains(&tile) {
            let block = self.cache.seqs[self.seq].1 + tile;
            return self.cache.raw_element(block, head, slot, channel, true);
        }
        let v_dim = self.cache.shape.v_dim as usize;
        f64::from(self.cache.sealed[self.seq][tile][head].1[slot * v_dim + channel])
    }
}
