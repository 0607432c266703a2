//! Kernels alone, on jobs built by hand: that for tiles against f64 and against itself to the bit, that
//! for few rows against itself.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::AtomicU32;

use super::{scratch_bytes, tile_rows};
use crate::cpu::CpuLevel;
use crate::cpu::decode;
use crate::cpu::job::{Blocks, Job, States};
use crate::cpu::kernels::{Kernel, Kernels};
use crate::cpu::prefetch::Prefetch;
use crate::cpu::quant::Coding;
use crate::dtype::{DType, KvFormat, bf16, f16};

/// A cheap generator of numbers in -1..1.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Elements of `dtype` as bytes, and what they stand for.
    fn elements(&mut self, n: usize, size: f32, dtype: DType) -> (Vec<u8>, Vec<f64>) {
        let mut bytes = Vec::new();
        let mut values = Vec::new();
        for _ in 0..n {
            let x = self.next() * size;
            match dtype {
                DType::F32 => bytes.extend(x.to_ne_bytes()),
                DType::F16 => bytes.extend(f16::from_f32(x).to_ne_bytes()),
                DType::Bf16 => bytes.extend(bf16::from_f32(x).to_ne_bytes()),
            }
            values.push(match dtype {
                DType::F32 => f64::from(x),
                DType::F16 => f16::from_f32(x).to_f64(),
                DType::Bf16 => bf16::from_f32(x).to_f64(),
            });
        }
        (bytes, values)
    }
}

/// One sequence and one KV head, of which jobs are cut.
#[derive(Clone)]
struct Case {
    group: usize,
    tokens: usize,
    k_dim: usize,
    v_dim: usize,
    v_in_k: bool,
    kv_len: usize,
    block_tokens: usize,
    bad: Option<usize>,
    format: KvFormat,
    q_dtype: DType,
    causal: bool,
    window: u32,
    softcap: Option<f32>,
    alibi: Option<Vec<f32>>,
}

impl Case {
    fn new(group: usize, tokens: usize, dim: usize, kv_len: usize, format: KvFormat) -> Self {
        Self {
            group,
            tokens,
            k_dim: dim,
            v_dim: dim,
            v_in_k: false,
            kv_len,
            block_tokens: 16,
            bad: None,
            format,
            q_dtype: DType::F32,
            causal: true,
            window: u32::MAX,
            softcap: None,
            alibi: None,
        }
    }
}

/// The memory of a case.
struct Data {
    case: Case,
    q: Vec<u8>,
    q_values: Vec<f64>,
    k: Vec<u8>,
    k_values: Vec<f64>,
    v: Vec<u8>,
    v_values: Vec<f64>,
    table: Vec<i32>,
    num_blocks: u32,
}

/// States as written: `m`, `l`, `o`.
type Output = (Vec<f32>, Vec<f32>, Vec<f32>);

impl Data {
    fn new(case: &Case) -> Self {
        let mut noise = Noise(7);
        let blocks = case.kv_len.div_ceil(case.block_tokens) + 3;
        let rows = blocks * case.block_tokens;
        // A stride coprime to the number of blocks visits each once.
        let shared = |s: usize| (2..=s).any(|d| s.is_multiple_of(d) && blocks.is_multiple_of(d));
        let step = (2..).find(|&s| !shared(s)).unwrap();
        let mut table: Vec<i32> = (0..blocks).map(|i| ((i * step + 1) % blocks) as i32).collect();
        if let Some(bad) = case.bad {
            table[bad] = if bad % 2 == 0 { -1 } else { blocks as i32 };
        }
        let q_elements = case.tokens * case.group * case.k_dim;
        let (q, q_values) = noise.elements(q_elements, 2.0, case.q_dtype);
        let dtype = case.format.dtype();
        let (k, k_values) = noise.elements(rows * case.k_dim, 2.0, dtype);
        let (v, v_values) = noise.elements(rows * case.v_dim, 1.0, dtype);
        let num_blocks = blocks as u32;
        Self { case: case.clone(), q, q_values, k, k_values, v, v_values, table, num_blocks }
    }

    /// Runs jobs of at most `chunk` query tokens by the tile kernel.
    fn run(&self, level: CpuLevel, chunk: usize) -> Output {
        let kernel = Kernels::of(level, self.case.format).tile;
        self.run_by(kernel, Prefetch::of_cpu(), chunk)
    }

    /// The same by a kernel that the CPU can run.
    fn run_by(&self, kernel: Kernel, prefetch: Prefetch, chunk: usize) -> Output {
        let case = &self.case;
        let bytes = case.format.dtype().bytes() as usize;
        let q_bytes = case.q_dtype.bytes() as usize;
        let rows = case.tokens * case.group;
        let mut m = vec![f32::NAN; rows];
        let mut l = vec![f32::NAN; rows];
        let mut o = vec![f32::NAN; rows * case.v_dim];
        // Poisoned: a kernel that reads what it did not write gives NaN.
        let bytes_of = [scratch_bytes, decode::scratch_bytes].map(|of| of(case.k_dim, case.v_dim));
        let mut scratch = vec![u128::MAX; bytes_of[0].max(bytes_of[1]) / 16 + 4];
        let align = scratch.as_ptr().align_offset(64);
        let flag = AtomicU32::new(0);
        let (k_row, v_row) = (case.k_dim * bytes, case.v_dim * bytes);
        let mut token = 0;
        while token < case.tokens {
            let tokens = chunk.min(case.tokens - token);
            let row = token * case.group;
            let job = Job {
                coming: None,
                prefetch,
                kv_heads: 1,
                k_head_bytes: 0,
                v_head_bytes: 0,
                k_scale_head_bytes: 0,
                v_scale_head_bytes: 0,
                coding: Coding {
                    format: case.format,
                    k_first: case.k_dim,
                    k_rotated: false,
                    v_rotated: false,
                    k_heads: core::ptr::null(),
                    v_heads: core::ptr::null(),
                },
                group: case.group,
                tokens,
                k_dim: case.k_dim,
                v_dim: case.v_dim,
                v_in_k: case.v_in_k,
                q: self.q[row * case.k_dim * q_bytes..].as_ptr(),
                q_dtype: case.q_dtype,
                q_token_bytes: (case.group * case.k_dim * q_bytes) as isize,
                q_head_bytes: (case.k_dim * q_bytes) as isize,
                q_pos: (case.kv_len - case.tokens + token) as i64,
                blocks: Blocks {
                    table: self.table.as_ptr(),
                    num_blocks: self.num_blocks,
                    block_tokens: case.block_tokens as u32,
                    k: self.k.as_ptr(),
                    v: if case.v_in_k { self.k.as_ptr() } else { self.v.as_ptr() },
                    k_block_bytes: (k_row * case.block_tokens) as isize,
                    k_token_bytes: k_row as isize,
                    v_block_bytes: (v_row * case.block_tokens) as isize,
                    v_token_bytes: v_row as isize,
                    k_scales: core::ptr::null(),
                    v_scales: core::ptr::null(),
                    k_scale_bytes: [0; 2],
                    v_scale_bytes: [0; 2],
                    bad_block: Some(&flag),
                },
                kv_start: 0,
                kv_end: case.kv_len as u32,
                scale: 1.0 / (case.k_dim as f32).sqrt(),
                causal: case.causal,
                window: case.window,
                softcap: case.softcap,
                alibi: case.alibi.as_deref(),
                states: States {
                    m: m[row..].as_mut_ptr(),
                    l: l[row..].as_mut_ptr(),
                    o: o[row * case.v_dim..].as_mut_ptr(),
                },
                scratch: scratch.as_mut_ptr().wrapping_add(align).cast(),
            };
            // SAFETY: the level is available, and every pointer leads to what it says.
            unsafe { kernel(&job) };
            token += tokens;
        }
        assert_eq!(flag.into_inner() == 1, case.bad.is_some());
        (m, l, o)
    }

    /// One row in f64: its outputs, the same with the absolute values of V, and its LSE.
    fn expected(&self, row: usize) -> (Vec<f64>, Vec<f64>, f64) {
        let case = &self.case;
        let position = (case.kv_len - case.tokens + row / case.group) as i64;
        let slot = |j: usize| {
            let block = usize::try_from(self.table[j / case.block_tokens]).ok()?;
            (block < self.num_blocks as usize)
                .then_some(block * case.block_tokens + j % case.block_tokens)
        };
        let mut scores = Vec::new();
        for j in 0..case.kv_len {
            let distance = position - j as i64;
            if case.causal && distance < 0 || distance >= i64::from(case.window) {
                continue;
            }
            let Some(slot) = slot(j) else { continue };
            let q = &self.q_values[row * case.k_dim..][..case.k_dim];
            let k = &self.k_values[slot * case.k_dim..][..case.k_dim];
            let dot: f64 = q.iter().zip(k).map(|(a, b)| a * b).sum();
            let mut s = dot / (case.k_dim as f64).sqrt();
            if let Some(cap) = case.softcap.map(f64::from) {
                s = cap * (s / cap).tanh();
            }
            if let Some(slopes) = &case.alibi {
                s -= f64::from(slopes[row % case.group]) * distance as f64;
            }
            scores.push((s, slot));
        }
        let top = scores.iter().fold(f64::NEG_INFINITY, |top, (s, _)| top.max(*s));
        let sum: f64 = scores.iter().map(|(s, _)| (s - top).exp()).sum();
        let (v, stride) =
            if case.v_in_k { (&self.k_values, case.k_dim) } else { (&self.v_values, case.v_dim) };
        let weigh = |value: fn(f64) -> f64| {
            let sum_of = |c| {
                scores
                    .iter()
                    .map(move |(s, at)| (s - top).exp() / sum * value(v[at * stride + c]))
                    .sum()
            };
            (0..case.v_dim).map(sum_of).collect()
        };
        (weigh(|v| v), weigh(f64::abs), top + sum.ln())
    }

    /// Holds the kernel against f64 at every level.
    fn check(&self) {
        let case = &self.case;
        let rows = case.tokens * case.group;
        let longest = tile_rows(case.k_dim, case.v_dim) / case.group;
        let expected: Vec<_> = (0..rows).map(|row| self.expected(row)).collect();
        for level in CpuLevel::available() {
            // Where pairs are multiplied, weights are rounded to bf16: each by 2^-8 of it at most.
            let pairs = level == CpuLevel::Avx512Bf16
                && (case.format, case.q_dtype) == (KvFormat::Bf16, DType::Bf16);
            let rounding = if pairs { 2f64.powi(-8) } else { 0.0 };
            let (m, l, o) = self.run(level, longest);
            for (row, (out, absolute, lse)) in expected.iter().enumerate() {
                if *lse == f64::NEG_INFINITY {
                    assert!(m[row] == f32::NEG_INFINITY && l[row] == 0.0);
                    assert!(o[row * case.v_dim..][..case.v_dim].iter().all(|&o| o == 0.0));
                    continue;
                }
                let error = (f64::from(m[row]) + f64::from(l[row]).ln() - lse).abs();
                assert!(
                    error <= 2e-5 * lse.abs().max(1.0),
                    "{level:?} row {row}: LSE off by {error:e}"
                );
                for (c, want) in out.iter().enumerate() {
                    let got = f64::from(o[row * case.v_dim + c]) / f64::from(l[row]);
                    let error = (got - want).abs();
                    assert!(
                        error <= 2e-5 + rounding * absolute[c],
                        "{level:?} row {row} channel {c}: {got}, want {want}, off by {error:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_format_and_query_type() {
    for &format in KvFormat::FLOATS {
        for q_dtype in [DType::F32, DType::F16, DType::Bf16] {
            Data::new(&Case { q_dtype, ..Case::new(4, 37, 64, 301, format) }).check();
        }
    }
}

#[test]
fn every_head_size() {
    for (k_dim, v_dim) in
        [(8, 8), (16, 24), (40, 72), (80, 80), (96, 128), (128, 16), (192, 128), (256, 256)]
    {
        for (format, q_dtype) in [(KvFormat::F32, DType::F32), (KvFormat::Bf16, DType::Bf16)] {
            let case = Case::new(3, 7, k_dim, 150, format);
            Data::new(&Case { k_dim, v_dim, q_dtype, ..case }).check();
        }
    }
}

#[test]
fn latents() {
    for (format, q_dtype) in [(KvFormat::F16, DType::F32), (KvFormat::Bf16, DType::Bf16)] {
        let case = Case::new(128, 1, 576, 270, format);
        Data::new(&Case { v_dim: 512, v_in_k: true, q_dtype, ..case }).check();
    }
}

#[test]
fn every_scoring_rule() {
    let base = Case { q_dtype: DType::Bf16, ..Case::new(2, 60, 32, 420, KvFormat::Bf16) };
    let slopes = Some(vec![0.25, -0.01]);
    for case in [
        Case { window: 1, ..base.clone() },
        Case { window: 50, ..base.clone() },
        Case { window: 300, causal: false, ..base.clone() },
        Case { causal: false, ..base.clone() },
        Case { softcap: Some(1.5), ..base.clone() },
        Case { alibi: slopes.clone(), ..base.clone() },
        Case { softcap: Some(2.0), alibi: slopes, window: 200, ..base.clone() },
    ] {
        Data::new(&case).check();
        Data::new(&Case { format: KvFormat::F32, ..case }).check();
    }
}

#[test]
fn any_block_size_and_bad_blocks() {
    for (block_tokens, bad) in
        [(1, Some(200)), (7, Some(3)), (16, Some(0)), (100, Some(1)), (512, None)]
    {
        for (format, q_dtype) in [(KvFormat::F32, DType::F32), (KvFormat::Bf16, DType::Bf16)] {
            let case = Case::new(4, 20, 64, 290, format);
            Data::new(&Case { block_tokens, bad, q_dtype, ..case }).check();
        }
    }
    // Every key of the first rows is bad: O = 0, LSE = -inf.
    let bad = Some(0);
    Data::new(&Case { block_tokens: 64, bad, ..Case::new(4, 90, 64, 90, KvFormat::F32) }).check();
}

#[test]
fn a_row_has_the_same_bits_in_every_chunking() {
    for (format, q_dtype) in
        [(KvFormat::F32, DType::F32), (KvFormat::F16, DType::F16), (KvFormat::Bf16, DType::Bf16)]
    {
        for window in [u32::MAX, 77] {
            let case = Case { window, q_dtype, ..Case::new(4, 300, 32, 560, format) };
            let data = Data::new(&case);
            for level in CpuLevel::available() {
                let whole = data.run(level, 96);
                for chunk in [1, 17, 95] {
                    let parts = data.run(level, chunk);
                    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&whole.0), bits(&parts.0), "{level:?} {format:?} {chunk}");
                    assert_eq!(bits(&whole.1), bits(&parts.1), "{level:?} {format:?} {chunk}");
                    assert_eq!(bits(&whole.2), bits(&parts.2), "{level:?} {format:?} {chunk}");
                }
            }
        }
    }
}

#[test]
fn few_rows_have_the_same_bits_however_memory_is_asked_for() {
    for &format in KvFormat::FLOATS {
        for (group, dim, block_tokens) in [(4, 128, 64), (4, 128, 16), (2, 64, 32), (1, 80, 16)] {
            let q_dtype = format.dtype();
            let case = Case::new(group, 1, dim, 1000, format);
            let data = Data::new(&Case { block_tokens, q_dtype, ..case });
            for level in CpuLevel::available() {
                let kernel = Kernels::of(level, format).decode;
                let levels = data.run_by(kernel, Prefetch::Levels, 1);
                assert_eq!(levels, data.run_by(kernel, Prefetch::First, 1), "{level:?}");
                assert!(levels.2.iter().all(|o| o.is_finite()));
            }
        }
    }
}
