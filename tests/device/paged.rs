//! A batch of sequences with paged keys and values in emulated device memory, and what attention
//! over it must give. It knows no kernel: what a call looks like is the test's.

use kvcache::attention::{HeadShape, PagedKv, ReferenceOutput, Scoring, reference_attention};
use kvcache::dtype::{DType, Rows};
use kvcache::emu::{Buffer, Options};
use kvcache::layout::Strides;

use super::codes::{Coded, Codes};
use super::{Rng, Values, epsilon, shuffled_tables};

#[derive(Debug, Clone)]
pub struct Case {
    pub cache: DType,
    /// K and V as rows of codes; products are then of f16.
    pub codes: Option<Codes>,
    pub q_dtype: DType,
    pub out_dtype: DType,
    pub head_dim: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub block_tokens: usize,
    /// Query rows and cached tokens of each sequence.
    pub lengths: Vec<(usize, usize)>,
    pub csr: bool,
    pub nhd: bool,
    pub causal: bool,
    pub window: Option<u32>,
    pub softcap: Option<f32>,
    pub sinks: bool,
    pub alibi: bool,
    pub scale: Option<f32>,
    /// Entry of a sequence's table to overwrite.
    pub spoil: Option<(usize, usize, i32)>,
    pub options: Options,
    pub seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            cache: DType::F16,
            codes: None,
            q_dtype: DType::F16,
            out_dtype: DType::F16,
            head_dim: 64,
            q_heads: 4,
            kv_heads: 2,
            block_tokens: 16,
            lengths: vec![(70, 100), (1, 1), (3, 0), (0, 40), (5, 150)],
            csr: false,
            nhd: false,
            causal: true,
            window: None,
            softcap: None,
            sinks: false,
            alibi: false,
            scale: None,
            spoil: None,
            options: Options::default(),
            seed: 1,
        }
    }
}

/// The inputs of a case. Blocks that no sequence has are NaN, and so are the places past the last
/// token of a sequence.
pub struct Paged {
    pub case: Case,
    pub k: Values,
    pub v: Values,
    pub coded: Option<Coded>,
    pub q: Values,
    pub strides: Strides,
    pub tables: Vec<Vec<i32>>,
    pub num_blocks: usize,
    pub sinks: Vec<f32>,
    pub slopes: Vec<f32>,
    pub q_indptr: Vec<i32>,
    pub lens: Vec<i32>,
    /// The tables as the kernels get them; entries of a dense table past the length are poison.
    pub table: Buffer,
    pub table_indptr: Buffer,
    pub table_stride: i64,
}

impl Paged {
    pub fn new(case: Case) -> Self {
        let mut rng = Rng::new(case.seed);
        let (bt, d, heads) = (case.block_tokens, case.head_dim, case.kv_heads);
        let (tables, num_blocks) = shuffled_tables(&mut rng, &case.lengths, bt, case.spoil);
        let run = (heads * bt * d) as i64;
        let strides = if case.nhd {
            Strides { block: run, head: d as i64, token: (heads * d) as i64 }
        } else {
            Strides { block: run, head: (bt * d) as i64, token: d as i64 }
        };
        let mut k = vec![f32::NAN; num_blocks * heads * bt * d];
        let mut v = k.clone();
        for (l, table) in case.lengths.iter().zip(&tables) {
            for token in 0..l.1 {
                let Ok(block) = usize::try_from(table[token / bt]) else { continue };
                if block >= num_blocks {
                    continue;
                }
                for head in 0..heads {
                    let at = block as i64 * strides.block
                        + head as i64 * strides.head
                        + (token % bt) as i64 * strides.token;
                    for c in 0..d {
                        k[at as usize + c] = rng.normal();
                        v[at as usize + c] = rng.normal();
                    }
                }
            }
        }
        let mut q_indptr = vec![0];
        for l in &case.lengths {
            q_indptr.push(q_indptr[q_indptr.len() - 1] + l.0 as i32);
        }
        let rows = q_indptr[case.lengths.len()] as usize;
        let q: Vec<f32> = (0..rows * case.q_heads * d).map(|_| rng.normal()).collect();
        let sinks = (0..case.q_heads).map(|_| 2.0 * rng.normal()).collect();
        let slopes = (0..case.q_heads).map(|_| 0.1 * rng.normal().abs()).collect();
        let widest = tables.iter().map(Vec::len).max().unwrap() + 1;
        let (mut flat, mut indptr) = (Vec::new(), vec![0]);
        for (i, table) in tables.iter().enumerate() {
            flat.extend_from_slice(table);
            if !case.csr {
                flat.resize((i + 1) * widest, i32::MIN);
            }
            indptr.push(flat.len() as i32);
        }
        let coded = case.codes.map(|how| {
            let head = |row: usize| if case.nhd { row % heads } else { row / bt % heads };
            Coded::new(how, d, heads, head, &mut k, &mut v)
        });
        let stored = if coded.is_some() { DType::F32 } else { case.cache };
        Paged {
            k: Values::new(stored, &k),
            v: Values::new(stored, &v),
            coded,
            q: Values::new(case.q_dtype, &q),
            strides,
            tables,
            num_blocks,
            sinks,
            slopes,
            q_indptr,
            lens: case.lengths.iter().map(|l| l.1 as i32).collect(),
            table: Buffer::of(&flat).unwrap(),
            table_indptr: Buffer::of(&indptr).unwrap(),
            table_stride: widest as i64,
            case,
        }
    }

    pub fn scoring(&self) -> Scoring<'_> {
        let case = &self.case;
        let plain = Scoring::causal(case.head_dim as u32);
        Scoring {
            scale: case.scale.unwrap_or(plain.scale),
            causal: case.causal,
            window: case.window,
            softcap: case.softcap,
            sinks: case.sinks.then_some(&self.sinks[..]),
            alibi: case.alibi.then_some(&self.slopes[..]),
        }
    }

    pub fn reference(&self) -> ReferenceOutput {
        let case = &self.case;
        let narrow = |values: &Values| values.values.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let (k, v) = (narrow(&self.k), narrow(&self.v));
        // The matrix instruction takes queries of the cache's type.
        let q = narrow(&Values::new(case.cache, &narrow(&self.q)));
        let kv = PagedKv {
            k: Rows::F32(&k),
            v: Rows::F32(&v),
            k_offset: 0,
            v_offset: 0,
            k_strides: self.strides,
            v_strides: self.strides,
            block_tokens: case.block_tokens,
            num_blocks: self.num_blocks,
            tables: self.tables.iter().map(|table| &table[..]).collect(),
        };
        let shape = HeadShape {
            q_heads: case.q_heads as u32,
            kv_heads: case.kv_heads as u32,
            k_dim: case.head_dim as u32,
            v_dim: case.head_dim as u32,
            v_in_k: false,
        };
        let indptr: Vec<usize> = self.q_indptr.iter().map(|&i| i as usize).collect();
        let lens: Vec<usize> = case.lengths.iter().map(|l| l.1).collect();
        reference_attention(&shape, &self.scoring(), &kv, Rows::F32(&q), &indptr, &lens).unwrap()
    }

    /// How far an output may be off, beyond the rounding of its own type. A softmax weight is at
    /// most 1 and its sum at least 1 where the largest score is met; each weight is rounded to the
    /// cache's type before the product with V, by half a step relative to it, or in f16 by 2^-25
    /// where it is subnormal. So the weighted mean is off by at most the largest value times these;
    /// 2e-5 of it is for the scores, which are sums in f32 and pass approximate functions.
    pub fn tolerance(&self) -> f64 {
        let largest =
            self.v.values.iter().filter(|x| !x.is_nan()).fold(0.0f64, |a, x| a.max(x.abs()));
        let longest = self.case.lengths.iter().map(|l| l.1).max().unwrap() as f64;
        let subnormal =
            if self.case.cache == DType::F16 { longest * f64::powi(2.0, -25) } else { 0.0 };
        // Codes times scales are rounded to f16, and so are rotated queries.
        let codes = if self.case.codes.is_some() { 8e-4 } else { 0.0 };
        largest * (epsilon(self.case.cache) / 2.0 + subnormal + 2e-5 + codes)
    }

    /// Fails where outputs or LSE are not those of the reference.
    pub fn compare(&self, out: &Values, lse: &Buffer) {
        let want = self.reference();
        let what = format!("{:?}", self.case);
        out.must_be(&want.out, self.tolerance(), &what);
        let tolerance = if self.case.codes.is_some() { 1.5e-3 } else { 2e-5 };
        let lse = lse.read::<f32>();
        assert_eq!(lse.len(), want.lse.len(), "{what}");
        for (i, (&got, &want)) in lse.iter().zip(&want.lse).enumerate() {
            let got = f64::from(got);
            let good = got == want || (got - want).abs() <= tolerance * want.abs().max(1.0);
            assert!(good, "{what} LSE [{i}]: {got}, not {want}");
        }
    }
}
