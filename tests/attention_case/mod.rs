//! Cases of the conformance table: random inputs in any layout, the right answer, the comparison. The
//! calls are in `on_cpu.rs` and `on_device.rs`.

use std::ops::Range;

use kvcache::attention::{HeadShape, PagedKv, ReferenceOutput, Scoring, reference_attention};
use kvcache::dtype::{DType, KvFormat, Rows};
use kvcache::layout::Strides;

mod buffer;
mod coded;
mod on_cpu;
#[cfg(any(feature = "emulate", feature = "cuda"))]
mod on_device;
#[path = "../random/mod.rs"]
mod random;
pub use buffer::Buffer;
use coded::Coded;
#[allow(unused_imports, reason = "devices have no levels")]
pub use on_cpu::levels;
pub use random::Rng;

#[derive(Debug, Clone, Copy)]
pub enum Layout {
    Native,
    Nhd,
    Hnd,
}

#[derive(Debug, Clone, Copy)]
pub enum Tables {
    Dense,
    Csr,
}

/// The formats that are stored token by token.
#[allow(dead_code)]
pub const TOKEN_FORMATS: [KvFormat; 5] =
    [KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Int8T, KvFormat::Int4T, KvFormat::Nvfp4];

/// What is computed; the inputs follow from the seed.
#[derive(Debug, Clone)]
pub struct Case {
    pub shape: HeadShape,
    pub format: KvFormat,
    pub q_dtype: DType,
    pub out_dtype: DType,
    pub layout: Layout,
    pub tables: Tables,
    pub block_tokens: u32,
    /// Query tokens and cached tokens of each sequence.
    pub lengths: Vec<(u32, u32)>,
    pub causal: bool,
    pub window: Option<u32>,
    pub softcap: Option<f32>,
    pub sinks: bool,
    pub alibi: bool,
    pub scale: Option<f32>,
    /// Keys of INT8_T are rotated.
    pub k_rotated: bool,
    /// Heads of FP8 and NVFP4 have scales other than 1.
    pub head_scales: bool,
    pub seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            shape: HeadShape { q_heads: 8, kv_heads: 2, k_dim: 64, v_dim: 64, v_in_k: false },
            format: KvFormat::F32,
            q_dtype: DType::F32,
            out_dtype: DType::F32,
            layout: Layout::Native,
            tables: Tables::Dense,
            block_tokens: 16,
            lengths: vec![(1, 100), (1, 1), (5, 5), (1, 0), (0, 9), (2, 64), (19, 83), (0, 0)],
            causal: true,
            window: None,
            softcap: None,
            sinks: false,
            alibi: false,
            scale: None,
            k_rotated: true,
            head_scales: true,
            seed: 1,
        }
    }
}

impl Case {
    pub fn random(rng: &mut Rng, round: usize) -> Case {
        let kv_heads = rng.pick(&[1, 1, 2, 3]);
        let group = rng.pick(&[1, 2, 3, 4, 7, 8, 16]);
        let dims = [8, 16, 32, 40, 64, 80, 128, 136];
        let v_in_k = kv_heads == 1 && rng.below(4) == 0;
        let (k_dim, v_dim) = (rng.pick(&dims), rng.pick(&dims));
        let v_dim = if v_in_k { v_dim.min(k_dim) } else { v_dim };
        let shape = HeadShape { q_heads: kv_heads * group, kv_heads, k_dim, v_dim, v_in_k };
        let dtypes = [DType::F32, DType::F16, DType::Bf16];
        let lengths = (0..1 + rng.below(4))
            .map(|_| {
                let kv = rng.pick(&[0, 1, 15, 16, 63, 64, 65, 130, 257]) + rng.below(3) as u32;
                (rng.pick(&[0, 1, 1, 2, 3, 9, 33, 70]).min(kv), kv)
            })
            .collect();
        let any = |rng: &mut Rng| rng.below(3) == 0;
        Case {
            shape,
            format: rng.pick(KvFormat::FLOATS),
            q_dtype: rng.pick(&dtypes),
            out_dtype: rng.pick(&dtypes),
            layout: rng.pick(&[Layout::Native, Layout::Nhd, Layout::Hnd]),
            tables: rng.pick(&[Tables::Dense, Tables::Csr]),
            block_tokens: rng.pick(&[1, 2, 3, 16, 32, 64, 256]),
            lengths,
            causal: rng.below(4) != 0,
            window: any(rng).then(|| 1 + rng.below(80) as u32),
            softcap: any(rng).then(|| 1.0 + rng.below(30) as f32),
            sinks: any(rng),
            alibi: any(rng),
            scale: any(rng).then(|| rng.normal()),
            k_rotated: true,
            head_scales: true,
            seed: round as u64,
        }
    }

    /// The same in a format that is stored token by token.
    #[allow(dead_code)]
    pub fn random_coded(rng: &mut Rng, round: usize) -> Case {
        let mut case = Case::random(rng, round);
        case.format = rng.pick(&TOKEN_FORMATS);
        let shape = &mut case.shape;
        let whole = |dim: u32| dim.next_multiple_of(16);
        (shape.k_dim, shape.v_dim) = (whole(shape.k_dim), whole(shape.v_dim));
        case.k_rotated = rng.below(2) == 0;
        case.head_scales = rng.below(2) == 0;
        case
    }

    /// Draws the inputs and computes the reference.
    pub fn build(&self) -> Instance {
        let mut rng = Rng::new(self.seed);
        let (shape, bt) = (&self.shape, self.block_tokens as usize);
        let heads = shape.kv_heads as i64;
        let needed: usize = self.lengths.iter().map(|l| (l.1 as usize).div_ceil(bt)).sum();
        let num_blocks = needed + 3;
        // A random order of blocks; the rest stays unused and full of NaN.
        let mut order: Vec<i32> = (0..num_blocks as i32).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let mut tables = Vec::new();
        for &(_, kv) in &self.lengths {
            tables.push(order.split_off(order.len() - (kv as usize).div_ceil(bt)));
        }
        let (k_dim, v_dim) = (i64::from(shape.k_dim), i64::from(shape.v_dim));
        let bt = bt as i64;
        let is_coded = !self.format.is_float();
        let strides = |dim: i64, block: i64| match self.layout {
            // What codes decode to is kept in one order, whatever theirs.
            _ if is_coded => Strides { block, head: dim, token: heads * dim },
            Layout::Nhd => Strides { block, head: dim, token: heads * dim },
            _ => Strides { block, head: bt * dim, token: dim },
        };
        // Native: K and V of a block in one run; else a tensor each.
        let together = matches!(self.layout, Layout::Native) && !shape.v_in_k && !is_coded;
        let (k_block, v_block) = (heads * bt * k_dim, heads * bt * v_dim);
        let block = k_block + v_block;
        let (k_strides, v_strides) = if together {
            (strides(k_dim, block), strides(v_dim, block))
        } else if shape.v_in_k {
            (strides(k_dim, k_block), strides(k_dim, k_block))
        } else {
            (strides(k_dim, k_block), strides(v_dim, v_block))
        };
        let dtype = if is_coded { DType::F32 } else { self.format.dtype() };
        let elements = |block: i64| num_blocks * block as usize;
        let k_elements = if together { elements(block) } else { elements(k_block) };
        let v_elements = if together || shape.v_in_k { 0 } else { elements(v_block) };
        let mut random = || rng.normal();
        let mut k = Buffer::filled(dtype, k_elements, &mut random);
        let mut v = Buffer::filled(dtype, v_elements, &mut random);
        let coded = match (&mut k, &mut v) {
            (Buffer::F32(k), Buffer::F32(v)) if is_coded => {
                Some(Coded::new(self, num_blocks, k, v, &mut random))
            }
            _ => None,
        };
        let mut q_indptr = vec![0];
        for l in &self.lengths {
            q_indptr.push(q_indptr[q_indptr.len() - 1] + l.0 as i32);
        }
        let total = q_indptr[self.lengths.len()] as usize;
        let heads = shape.q_heads as usize;
        let q = Buffer::filled(self.q_dtype, total * heads * k_dim as usize, &mut random);
        let sinks = (0..heads).map(|_| 2.0 * random()).collect();
        let alibi = (0..heads).map(|_| random().abs() * 0.1).collect();
        let mut instance = Instance {
            case: self.clone(),
            coded,
            k,
            v,
            together,
            v_offset: if together { k_block as usize } else { 0 },
            k_strides,
            v_strides,
            num_blocks,
            tables,
            q,
            q_indptr,
            sinks,
            alibi,
            want: ReferenceOutput { out: Vec::new(), lse: Vec::new() },
        };
        instance.want = instance.reference(instance.q.rows());
        instance
    }
}

/// A case with its inputs and the right answer.
pub struct Instance {
    case: Case,
    /// K and V as they are stored, where that is codes.
    coded: Option<Coded>,
    k: Buffer,
    v: Buffer,
    /// V lies in the memory of K.
    together: bool,
    v_offset: usize,
    k_strides: Strides,
    v_strides: Strides,
    num_blocks: usize,
    tables: Vec<Vec<i32>>,
    q: Buffer,
    q_indptr: Vec<i32>,
    sinks: Vec<f32>,
    alibi: Vec<f32>,
    want: ReferenceOutput,
}

impl Instance {
    fn scoring(&self) -> Scoring<'_> {
        let case = &self.case;
        let plain = Scoring::causal(case.shape.k_dim);
        Scoring {
            scale: case.scale.unwrap_or(plain.scale),
            causal: case.causal,
            window: case.window,
            softcap: case.softcap,
            sinks: case.sinks.then_some(&self.sinks[..]),
            alibi: case.alibi.then_some(&self.alibi[..]),
        }
    }

    fn reference(&self, q: Rows) -> ReferenceOutput {
        let v = if self.together || self.case.shape.v_in_k { &self.k } else { &self.v };
        let kv = PagedKv {
            k: self.k.rows(),
            v: v.rows(),
            k_offset: 0,
            v_offset: self.v_offset,
            k_strides: self.k_strides,
            v_strides: self.v_strides,
            block_tokens: self.case.block_tokens as usize,
            num_blocks: self.num_blocks,
            tables: self.tables.iter().map(|table| &table[..]).collect(),
        };
        let q_indptr: Vec<usize> = self.q_indptr.iter().map(|&i| i as usize).collect();
        let kv_lens: Vec<usize> = self.case.lengths.iter().map(|l| l.1 as usize).collect();
        let shape = &self.case.shape;
        reference_attention(shape, &self.scoring(), &kv, q, &q_indptr, &kv_lens).unwrap()
    }

    /// Replaces some entry that is looked up by `bad`, and computes the reference again.
    pub fn spoil(&mut self, rng: &mut Rng, bad: i32) {
        let used: Vec<usize> = (0..self.tables.len())
            .filter(|&s| self.case.lengths[s].0 > 0 && !self.tables[s].is_empty())
            .collect();
        let s = rng.pick(&used);
        let at = rng.below(self.tables[s].len());
        self.tables[s][at] = bad;
        self.want = self.reference(self.q.rows());
    }

    /// Writes `value` over table entries without computing the reference again.
    #[allow(dead_code)]
    pub fn set_entries(&mut self, at: &[(usize, Range<usize>)], value: i32) {
        for (s, range) in at {
            self.tables[*s][range.clone()].fill(value);
        }
    }

    fn compare(
        &self,
        what: &str,
        want: &ReferenceOutput,
        tolerance: f64,
        lse_tolerance: f64,
        out: impl Fn(usize) -> f32,
        lse: &[f32],
    ) {
        let rounding = match self.case.out_dtype {
            DType::F32 => 0.0,
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        for (i, &want) in want.out.iter().enumerate() {
            let got = f64::from(out(i));
            let error = (got - want).abs();
            if !(error <= tolerance + rounding * want.abs()) {
                let (dim, heads) = (self.case.shape.v_dim, self.case.shape.q_heads);
                let (row, c) = (i / dim as usize, i % dim as usize);
                let (token, head) = (row / heads as usize, row % heads as usize);
                panic!(
                    "{what}: token {token} head {head} channel {c}: {got}, want {want}\n{:?}",
                    self.case
                );
            }
        }
        for (i, (&got, &want)) in lse.iter().zip(&want.lse).enumerate() {
            let same = f64::from(got) == want;
            let bound = 2e-5 * (1.0 + want.abs()) + lse_tolerance;
            if !same && !((f64::from(got) - want).abs() <= bound) {
                panic!("{what}: LSE of row {i}: {got}, want {want}\n{:?}", self.case);
            }
        }
    }

    fn bits(&self, (out, lse, _): (Buffer, Vec<f32>, bool)) -> (Vec<u32>, Vec<u32>) {
        let elements = out.rows().elements();
        let out = (0..elements).map(|i| out.get(i).to_bits()).collect();
        (out, lse.iter().map(|x| x.to_bits()).collect())
    }

    /// The elements of out and of LSE that belong to sequence `s`.
    pub fn rows_of(&self, s: usize) -> (Range<usize>, Range<usize>) {
        let heads = self.case.shape.q_heads as usize;
        let rows = self.q_indptr[s] as usize * heads..self.q_indptr[s + 1] as usize * heads;
        let dim = self.case.shape.v_dim as usize;
        (rows.start * dim..rows.end * dim, rows)
    }
}
