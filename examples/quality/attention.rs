//! The model's attention over what a scheme stores: through a cache where the scheme is the library's
//! (`decode.rs`), else by the library's paged kernels on f32 rows that hold what stored keys and values
//! read as.
//!
//! There are two blocks for each tile: the tile as stored, and its raw rows. A tile's queries are a
//! sequence of their own, whose block table leads through the stored tiles before and to the raw
//! rows of their own: exactly what each of these tokens would see if they came one by one. Where
//! every token is read as stored, the whole text is one sequence over stored blocks.

use std::error::Error;

use kvcache::attention::{HeadShape, Scoring};
use kvcache::cpu::{
    AttendArgs, AttendMaxima, BlockTables, CpuLevel, Executor, KvView, Rope, RopeStyle, RowsView,
    ScaleView, Threads, attend, attend_workspace_bytes,
};
use kvcache::dtype::{DType, KvFormat};
use kvcache::layout::Strides;
use rayon::prelude::*;

use crate::decode;
use crate::model::{Attention, Config};
use crate::modes::{Change, Mode};
use crate::schemes::{BLOCK, Scheme, Store, round};

/// Attention of one text; without a scheme, in f32.
pub struct Through<'a> {
    config: &'a Config,
    scheme: Option<&'a Scheme>,
    mode: Mode,
    rope: Rope,
    level: CpuLevel,
    threads: Threads,
    workspace: Vec<u8>,
    /// Sum of the variances of key channels over the text, and their number.
    pub variances: (f64, usize),
}

/// Keys and values of one head, `[tokens][head_dim]`.
#[derive(Clone)]
struct Head {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl<'a> Through<'a> {
    pub fn new(
        config: &'a Config,
        scheme: Option<&'a Scheme>,
        mode: Mode,
    ) -> Result<Self, Box<dyn Error>> {
        Ok(Self {
            config,
            scheme,
            mode,
            rope: Rope::new(RopeStyle::Halves, config.head_dim as u32, config.rope_theta)?,
            level: CpuLevel::chosen()?,
            threads: Threads::new(rayon::current_num_threads() as u32)?,
            workspace: Vec::new(),
            variances: (0.0, 0),
        })
    }

    /// Tokens of a tile, and where a query reads its own as raw rows, how many of the first too.
    fn tiles(&self) -> (usize, Option<usize>) {
        match self.scheme.map(|scheme| &scheme.store) {
            Some(Store::Tiles { tokens, sinks, .. }) => (*tokens, Some(*sinks)),
            _ => (BLOCK, None),
        }
    }

    /// What the rows of one head read as: stored, and raw.
    fn head(&self, mut raw: Head) -> Result<[Head; 2], String> {
        let dim = self.config.head_dim;
        match self.scheme.map(|scheme| &scheme.store) {
            None => Ok([raw.clone(), raw]),
            Some(Store::Tokens { k, v }) => {
                let mut stored = raw.clone();
                k(&mut stored.k).and_then(|()| v(&mut stored.v)).map_err(|e| e.to_string())?;
                Ok([stored, raw])
            }
            Some(Store::Tiles { tokens, staging, tile, .. }) => {
                round(&mut raw.k, *staging);
                round(&mut raw.v, *staging);
                let mut stored = raw.clone();
                let full = tokens * dim;
                for (k, v) in stored.k.chunks_exact_mut(full).zip(stored.v.chunks_exact_mut(full)) {
                    tile(k, v).map_err(|e| e.to_string())?;
                }
                Ok([stored, raw])
            }
        }
    }

    /// Attention over `[block][kv_head][token][head_dim]` keys and values: stored blocks, then raw.
    fn run(&mut self, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) -> kvcache::Result<()> {
        let c = self.config;
        let (block, raw) = self.tiles();
        let tokens = out.len() / (c.q_heads * c.head_dim);
        let tiles = tokens.div_ceil(block);
        let ends = |tile: usize| ((tile + 1) * block).min(tokens) as i32;
        let (mut q_indptr, mut kv_lens) = (vec![0], Vec::new());
        let (mut indptr, mut indices) = (vec![0], Vec::new());
        for tile in if raw.is_some() { 0..tiles } else { tiles - 1..tiles } {
            q_indptr.push(ends(tile));
            kv_lens.push(ends(tile));
            let is_raw = |at| raw.is_some_and(|sinks| at == tile || at < sinks);
            let place = |at| if is_raw(at) { tiles + at } else { at };
            indices.extend((0..=tile).map(|at| place(at) as i32));
            indptr.push(indices.len() as i32);
        }
        let (dim, heads) = (c.head_dim as u32, c.q_heads as u32);
        let kv_heads = c.kv_heads as u32;
        let shape = HeadShape { q_heads: heads, kv_heads, k_dim: dim, v_dim: dim, v_in_k: false };
        let strides = Strides {
            block: (c.kv_heads * block * c.head_dim) as i64,
            head: (block * c.head_dim) as i64,
            token: c.head_dim as i64,
        };
        let maxima = AttendMaxima {
            seqs: kv_lens.len() as u32,
            q_tokens: tokens as u32,
            kv_len: tokens as u32,
            workers: self.threads.workers(),
        };
        self.workspace.resize(attend_workspace_bytes(&shape, &maxima)? as usize, 0);
        let elements = strides.block as usize * 2 * tiles;
        assert!(k.len() == elements && v.len() == elements && q.len() == out.len());
        let args = AttendArgs {
            shape,
            scoring: Scoring::causal(dim),
            kv: KvView {
                k: k.as_ptr().cast_mut().cast(),
                v: v.as_ptr().cast_mut().cast(),
                format: KvFormat::F32,
                k_strides: strides,
                v_strides: strides,
                num_blocks: 2 * tiles as u32,
                block_tokens: block as u32,
                scales: ScaleView::NONE,
            },
            tables: BlockTables::Csr { indptr: indptr.as_ptr(), indices: indices.as_ptr() },
            seqs: maxima.seqs,
            q_indptr: q_indptr.as_ptr(),
            kv_lens: kv_lens.as_ptr(),
            q: RowsView::contiguous(q.as_ptr().cast_mut().cast(), DType::F32, heads, dim),
            out: RowsView::contiguous(out.as_mut_ptr().cast(), DType::F32, heads, dim),
            lse: std::ptr::null_mut(),
            bad_block: None,
        };
        // SAFETY: the lists have an entry for each sequence and block that they name, the blocks
        // are below `num_blocks`, K, V, Q and `out` have the elements that were asserted.
        unsafe { attend(&args, self.level, &self.threads, &mut self.workspace) }
    }
}

impl Attention for Through<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &mut [f32],
        k: &mut [f32],
        v: &[f32],
        out: &mut [f32],
    ) -> Result<(), Box<dyn Error>> {
        let c = self.config;
        let (dim, row) = (c.head_dim, c.kv_heads * c.head_dim);
        let tokens = k.len() / row;
        let positions: Vec<u32> = (0..tokens as u32).collect();
        self.rope.rotate(q, dim as u32, &positions)?;
        self.rope.rotate(k, dim as u32, &positions)?;
        for channel in 0..row {
            let (mut sum, mut squares) = (0.0, 0.0);
            for x in k.iter().skip(channel).step_by(row).map(|&x| f64::from(x)) {
                (sum, squares) = (sum + x, squares + x * x);
            }
            self.variances.0 += (squares - sum * sum / tokens as f64) / tokens as f64;
            self.variances.1 += 1;
        }

        let changes: Vec<Change> =
            (0..c.kv_heads).map(|head| self.mode.change(layer, head, dim)).collect();
        let change_of = |at: usize| &changes[at / dim % c.q_heads / (c.q_heads / c.kv_heads)];
        q.iter_mut().enumerate().for_each(|(at, q)| *q /= change_of(at).k_scale[at % dim]);
        let mut v = v.to_vec();
        for (at, (k, v)) in k.iter_mut().zip(&mut v).enumerate() {
            let (change, channel) = (&changes[at / dim % c.kv_heads], at % dim);
            *k = *k * change.k_scale[channel] + change.k_offset[channel];
            *v *= change.v_scale[channel];
        }
        match self.scheme.and_then(|scheme| scheme.cached.as_ref()) {
            Some(cached) => decode::attend(c, cached, q, k, &v, out)?,
            None => self.attend_rows(q, k, &v, out)?,
        }
        out.iter_mut().enumerate().for_each(|(at, out)| *out /= change_of(at).v_scale[at % dim]);
        Ok(())
    }
}

impl Through<'_> {
    /// Attention over f32 rows, which read as the scheme stores them.
    fn attend_rows(
        &mut self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        out: &mut [f32],
    ) -> Result<(), Box<dyn Error>> {
        let c = self.config;
        let (dim, row) = (c.head_dim, c.kv_heads * c.head_dim);
        let tokens = k.len() / row;
        let gather = |rows: &[f32], head: usize| -> Vec<f32> {
            let of_head = rows.chunks_exact(row).map(|row| &row[head * dim..(head + 1) * dim]);
            of_head.flatten().copied().collect()
        };
        let heads = (0..c.kv_heads)
            .into_par_iter()
            .map(|n| self.head(Head { k: gather(k, n), v: gather(v, n) }))
            .collect::<Result<Vec<_>, _>>()?;
        let (block, _) = self.tiles();
        let blocks = |side: fn(&Head) -> &[f32]| -> Vec<f32> {
            let mut all = Vec::with_capacity(2 * row * tokens.next_multiple_of(block));
            for raw in 0..2 {
                for start in (0..tokens).step_by(block) {
                    for head in &heads {
                        let end = (start + block).min(tokens);
                        all.extend(&side(&head[raw])[start * dim..end * dim]);
                        // Past the end of the text: never read.
                        all.resize(all.len() + (block - (end - start)) * dim, f32::NAN);
                    }
                }
            }
            all
        };
        let (k, v) = (blocks(|head| &head.k), blocks(|head| &head.v));
        Ok(self.run(q, &k, &v, out)?)
    }
}
