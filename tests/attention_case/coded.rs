//! Cases of formats that are stored token by token: rows encoded by the reference, in runs with
//! their scales behind them or with scales in tensors of their own; what they decode to is what the
//! reference attends over.

use kvcache::cpu::{KvView, ScaleView};
use kvcache::quant::{RowCodec, Stored};

use super::*;

/// Codes and scales of a case.
pub struct Coded {
    /// K, or K and V in one; V; scales of K and of V where those are tensors of their own.
    memory: [Vec<u8>; 4],
    k_strides: Strides,
    v_strides: Strides,
    v_offset: usize,
    scale_offsets: [usize; 2],
    k_scale_strides: Strides,
    v_scale_strides: Strides,
    k_heads: Vec<f32>,
    v_heads: Vec<f32>,
    k_rotated: bool,
}

fn codecs(case: &Case, heads: &[Vec<f32>; 2], head: usize) -> (RowCodec, Option<RowCodec>) {
    let (format, shape) = (case.format, &case.shape);
    let scaled = |codec: RowCodec, side: usize| match heads[side].get(head) {
        Some(&scale) => codec.with_scale(scale).unwrap(),
        None => codec,
    };
    let key = if shape.v_in_k {
        RowCodec::latent(format, shape.v_dim, shape.k_dim - shape.v_dim)
    } else {
        RowCodec::key(format, shape.k_dim)
    };
    let mut key = key.unwrap();
    if format == KvFormat::Int8T {
        key = key.with_rotation(case.k_rotated).unwrap();
    }
    let value = (!shape.v_in_k).then(|| RowCodec::value(format, shape.v_dim).unwrap());
    (scaled(key, 0), value.map(|value| scaled(value, 1)))
}

impl Coded {
    /// Encodes `k` and `v`, `[block][token][head]` rows, and leaves there what they decode to.
    pub fn new(
        case: &Case,
        num_blocks: usize,
        k: &mut [f32],
        v: &mut [f32],
        random: &mut impl FnMut() -> f32,
    ) -> Self {
        let shape = &case.shape;
        let (heads, bt) = (shape.kv_heads as usize, case.block_tokens as usize);
        let has_heads =
            matches!(case.format, KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 | KvFormat::Nvfp4);
        let mut scales = |wanted: bool| -> Vec<f32> {
            let count = if has_heads && wanted && case.head_scales { heads } else { 0 };
            (0..count).map(|_| 0.02 + 0.1 * random().abs()).collect()
        };
        let scales = [scales(true), scales(!shape.v_in_k)];
        let (key, value) = codecs(case, &scales, 0);
        let row = |codec: &RowCodec| (codec.code_bytes(), codec.scale_bytes());
        let (k_row, v_row) = (row(&key), value.as_ref().map_or((0, 0), row));
        let strides = |block: usize, head: usize, token: usize| Strides {
            block: block as i64,
            head: head as i64,
            token: token as i64,
        };
        let tensor = |bytes: usize| match case.layout {
            Layout::Nhd => strides(heads * bt * bytes, bytes, heads * bytes),
            _ => strides(heads * bt * bytes, bt * bytes, bytes),
        };
        let mut coded = Coded {
            memory: [const { Vec::new() }; 4],
            k_strides: tensor(k_row.0),
            v_strides: tensor(v_row.0),
            v_offset: 0,
            scale_offsets: [0; 2],
            k_scale_strides: tensor(k_row.1),
            v_scale_strides: tensor(v_row.1),
            k_heads: scales[0].clone(),
            v_heads: scales[1].clone(),
            k_rotated: case.k_rotated,
        };
        // What nobody wrote is NaN, in codes and in scales, but for integers.
        let memory = |bytes: usize| vec![0xff; num_blocks * heads * bt * bytes];
        if let Layout::Native = case.layout {
            let (k_run, v_run) = (bt * (k_row.0 + k_row.1), bt * (v_row.0 + v_row.1));
            let block = heads * (k_run + v_run);
            coded.k_strides = strides(block, k_run, k_row.0);
            coded.v_strides = strides(block, v_run, v_row.0);
            coded.k_scale_strides = strides(block, k_run, k_row.1);
            coded.v_scale_strides = strides(block, v_run, v_row.1);
            coded.v_offset = heads * k_run;
            coded.scale_offsets = [bt * k_row.0, heads * k_run + bt * v_row.0];
            coded.memory[0] = memory(k_row.0 + k_row.1 + v_row.0 + v_row.1);
        } else {
            coded.memory = [k_row.0, v_row.0, k_row.1, v_row.1].map(memory);
        }
        let slots = (0..num_blocks).flat_map(|b| (0..bt).map(move |t| (b, t)));
        for (slot, (block, token)) in slots.enumerate() {
            for head in 0..heads {
                let (key, value) = codecs(case, &scales, head);
                let nth = slot * heads + head;
                let k_dim = shape.k_dim as usize;
                let place = (block, head, token);
                coded.store(&key, 0, place, &mut k[nth * k_dim..][..k_dim]);
                if let Some(value) = value {
                    let v_dim = shape.v_dim as usize;
                    coded.store(&value, 1, place, &mut v[nth * v_dim..][..v_dim]);
                }
            }
        }
        coded
    }

    fn store(
        &mut self,
        codec: &RowCodec,
        side: usize,
        (block, head, token): (usize, usize, usize),
        row: &mut [f32],
    ) {
        let (mut codes, mut scales) = (vec![0; codec.code_bytes()], vec![0; codec.scale_bytes()]);
        assert_eq!(codec.encode(row, &mut codes, &mut scales).unwrap(), Stored::Encoded);
        codec.decode(&codes, &scales, row).unwrap();
        let at = |s: &Strides| {
            block * s.block as usize + head * s.head as usize + token * s.token as usize
        };
        let (code_strides, scale_strides) = if side == 0 {
            (self.k_strides, self.k_scale_strides)
        } else {
            (self.v_strides, self.v_scale_strides)
        };
        let code_at = at(&code_strides) + if side == 1 { self.v_offset } else { 0 };
        let scale_at = at(&scale_strides) + self.scale_offsets[side];
        let native = self.scale_offsets[0] != 0;
        let (code_tensor, scale_tensor) = if native { (0, 0) } else { (side, 2 + side) };
        self.memory[code_tensor][code_at..][..codes.len()].copy_from_slice(&codes);
        self.memory[scale_tensor][scale_at..][..scales.len()].copy_from_slice(&scales);
    }

    pub fn view(&self, case: &Case, num_blocks: usize) -> KvView {
        let native = self.scale_offsets[0] != 0;
        let at = |tensor: usize, offset: usize| {
            self.memory[if native { 0 } else { tensor }].as_ptr().wrapping_add(offset).cast_mut()
        };
        let heads = |scales: &[f32]| {
            if scales.is_empty() { std::ptr::null() } else { scales.as_ptr() }
        };
        KvView {
            k: at(0, 0),
            v: at(1, self.v_offset),
            format: case.format,
            k_strides: self.k_strides,
            v_strides: self.v_strides,
            num_blocks: num_blocks as u32,
            block_tokens: case.block_tokens,
            scales: ScaleView {
                k: at(2, self.scale_offsets[0]),
                v: at(3, self.scale_offsets[1]),
                k_strides: self.k_scale_strides,
                v_strides: self.v_scale_strides,
                k_heads: heads(&self.k_heads),
                v_heads: heads(&self.v_heads),
                k_rotated: self.k_rotated,
            },
        }
    }
}
