//! What tests of emulated kernels share: typed arrays in device memory.
#![allow(dead_code)]

use kvcache::dtype::{DType, bf16, f16};
use kvcache::emu::Buffer;

#[path = "../random/mod.rs"]
mod random;
pub use random::Rng;

pub mod codes;
pub mod paged;
pub mod sealed;

/// A table for each sequence of `(query rows, tokens)`, its blocks in random order among three more than
/// all of them need, with one entry spoilt where `spoil` has `(sequence, entry, id)`; and how many
/// blocks there are.
pub fn shuffled_tables(
    rng: &mut Rng,
    lengths: &[(usize, usize)],
    block_tokens: usize,
    spoil: Option<(usize, usize, i32)>,
) -> (Vec<Vec<i32>>, usize) {
    let blocks = |tokens: usize| tokens.div_ceil(block_tokens);
    let num_blocks = lengths.iter().map(|l| blocks(l.1)).sum::<usize>() + 3;
    let mut order: Vec<i32> = (0..num_blocks as i32).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, rng.below(i + 1));
    }
    let mut tables: Vec<Vec<i32>> =
        lengths.iter().map(|l| order.split_off(order.len() - blocks(l.1))).collect();
    if let Some((seq, entry, id)) = spoil {
        tables[seq][entry] = id;
    }
    (tables, num_blocks)
}

/// The step of a type near 1: its rounding error is half of it.
pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => f64::powi(2.0, -10),
        _ => f64::powi(2.0, -7),
    }
}

/// Numbers of a run-time type in device memory, and what they were when written.
pub struct Values {
    pub dtype: DType,
    pub buffer: Buffer,
    pub values: Vec<f64>,
}

impl Values {
    pub fn new(dtype: DType, values: &[f32]) -> Self {
        let f16s = || values.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>();
        let bf16s = || values.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
        let buffer = match dtype {
            DType::F32 => Buffer::of(values),
            DType::F16 => Buffer::of(&f16s()),
            _ => Buffer::of(&bf16s()),
        };
        let mut this = Values { dtype, buffer: buffer.unwrap(), values: Vec::new() };
        this.values = this.read();
        this
    }

    pub fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// What device memory holds now.
    pub fn read(&self) -> Vec<f64> {
        match self.dtype {
            DType::F32 => self.buffer.read::<f32>().into_iter().map(f64::from).collect(),
            DType::F16 => self.buffer.read::<f16>().into_iter().map(f16::to_f64).collect(),
            _ => self.buffer.read::<bf16>().into_iter().map(bf16::to_f64).collect(),
        }
    }

    /// Fails where a value is off by more than the rounding of the type and `tolerance`, both
    /// relative to the value and to 1. NaN must be NaN.
    pub fn must_be(&self, want: &[f64], tolerance: f64, what: &str) {
        let got = self.read();
        assert_eq!(got.len(), want.len(), "{what}");
        let tolerance = tolerance + epsilon(self.dtype) / 2.0;
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let good = (got - want).abs() <= tolerance * want.abs().max(1.0);
            assert!(good || (got.is_nan() && want.is_nan()), "{what} [{i}]: {got}, not {want}");
        }
    }
}
