//! What the facade is held against: K and V as a function of all tokens up to a position, as in a real
//! network, and what a format makes of them.

use std::sync::Arc;

use kvcache::device::Backend;
use kvcache::dtype::{KvFormat, f16};
use kvcache::quant::{RowCodec, Stored};

pub const LAYERS: u32 = 2;
pub const KV_HEADS: usize = 2;
pub const Q_HEADS: usize = 4;

/// Where the cache lives, and what its kernels can do.
#[derive(Clone)]
pub struct Setup {
    /// `None` for the CPU.
    pub backend: Option<Arc<dyn Backend>>,
    pub format: KvFormat,
    pub dim: usize,
    pub tolerance: f64,
    /// Of the two layer groups.
    pub windows: [Option<u32>; 2],
    /// Of the two layer groups, where they differ.
    pub group_blocks: Vec<u32>,
}

impl Setup {
    pub fn cpu() -> Self {
        let (windows, group_blocks) = ([None; 2], Vec::new());
        let (format, dim) = (KvFormat::F32, 16);
        Setup { backend: None, format, dim, tolerance: 1e-5, windows, group_blocks }
    }

    /// Formats stored token by token. Where queries are multiplied as 16-bit integers, a score is off
    /// by at most 2 / 65278 * 64 / 8.
    pub fn coded(format: KvFormat) -> Self {
        Setup { format, dim: 64, tolerance: 1e-3, ..Setup::cpu() }
    }

    /// What rows of all heads read as once they were stored.
    pub fn stored(&self, row: Vec<f32>, side: u64) -> Vec<f32> {
        if self.format.is_float() {
            return row;
        }
        let dim = self.dim as u32;
        let codec = match side {
            0 => RowCodec::key(self.format, dim),
            _ => RowCodec::value(self.format, dim),
        };
        let codec = codec.unwrap();
        let mut row = row;
        let (mut codes, mut scales) = (vec![0; codec.code_bytes()], vec![0; codec.scale_bytes()]);
        for head in row.chunks_exact_mut(self.dim) {
            assert_eq!(codec.encode(head, &mut codes, &mut scales).unwrap(), Stored::Encoded);
            codec.decode(&codes, &scales, head).unwrap();
        }
        row
    }

    /// Inputs are values of f16; softmax weights are rounded to it, each by half a step at most,
    /// and values are at most 1.
    pub fn device(backend: Arc<dyn Backend>) -> Self {
        let tolerance = 2f64.powi(-10);
        let (format, dim) = (KvFormat::F16, 64);
        Setup { backend: Some(backend), format, dim, tolerance, ..Setup::cpu() }
    }

    /// Formats stored token by token, of heads whose rows take the most. Queries are rotated and
    /// rounded to f16, and so are weights times scales.
    pub fn coded_device(backend: Arc<dyn Backend>, format: KvFormat) -> Self {
        Setup { format, dim: 256, tolerance: 4e-3, ..Setup::device(backend) }
    }

    pub fn windowed(self, windows: [Option<u32>; 2], group_blocks: [u32; 2]) -> Self {
        Setup { windows, group_blocks: group_blocks.to_vec(), ..self }
    }
}

pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = mix(self.0.wrapping_add(0x9e37_79b9_7f4a_7c15));
        self.0
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n.max(1)
    }
}

pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// K (`side` 0) or V (1) of the last of `history`, one row of all heads.
pub fn kv_row(namespace: u64, history: &[u32], layer: u32, side: u64, dim: usize) -> Vec<f32> {
    let seed = history.iter().fold(mix(namespace ^ 77), |h, &t| mix(h ^ u64::from(t) ^ 0x5bd1));
    let mut rng = Rng(seed ^ u64::from(layer) << 32 ^ side << 48);
    let value = |bits: u64| f16::from_f32(bits as f32 / (1u64 << 23) as f32 - 1.0).to_f32();
    (0..KV_HEADS * dim).map(|_| value(rng.next() >> 40)).collect()
}
