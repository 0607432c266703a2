//! Cases of the conformance table: random inputs in any layout, the call, the comparison.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use kvcache::attention::{
    HeadShape, PagedKv, ReferenceOutput, Scoring, merge_states, reference_attention,
};
use kvcache::cpu::{
    AttendArgs, AttendMaxima, BlockTables, CpuLevel, Executor, KvView, RowsView, ScaleView, attend,
    attend_workspace_bytes,
};
use kvcache::dtype::{DType, KvFormat, Rows, bf16, f16};
use kvcache::layout::Strides;

mod coded;
#[cfg(any(feature = "emulate", feature = "cuda"))]
mod on_device;
#[path = "../random/mod.rs"]
mod random;
use coded::Coded;
pub use random::Rng;

/// The levels that this CPU has and whose kernels differ here: only sealed tiles are read by other dot
/// products than NEON's own.
#[allow(dead_code, reason = "devices have no levels")]
pub fn levels() -> impl Iterator<Item = CpuLevel> {
    CpuLevel::available().filter(|&level| level != CpuLevel::NeonDotprod)
}

/// Elements of a run-time type.
pub enum Buffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Buffer {
    pub fn filled(dtype: DType, elements: usize, mut next: impl FnMut() -> f32) -> Self {
        match dtype {
            DType::F32 => Buffer::F32((0..elements).map(|_| next()).collect()),
            DType::F16 => Buffer::F16((0..elements).map(|_| f16::from_f32(next())).collect()),
            _ => Buffer::Bf16((0..elements).map(|_| bf16::from_f32(next())).collect()),
        }
    }

    #[allow(dead_code)]
    pub fn of(dtype: DType, values: &[f32]) -> Self {
        let mut values = values.iter().copied();
        Self::filled(dtype, values.len(), || values.next().unwrap_or(f32::NAN))
    }

    pub fn rows(&self) -> Rows<'_> {
        match self {
            Buffer::F32(x) => Rows::F32(x),
            Buffer::F16(x) => Rows::F16(x),
            Buffer::Bf16(x) => Rows::Bf16(x),
        }
    }

    pub fn ptr(&self) -> *mut u8 {
        self.rows().as_ptr().cast_mut()
    }

    pub fn get(&self, i: usize) -> f32 {
        match self {
            Buffer::F32(x) => x[i],
            Buffer::F16(x) => x[i].to_f32(),
            Buffer::Bf16(x) => x[i].to_f32(),
        }
    }
}

/// Threads of its own for each run.
struct Threads(usize);

// SAFETY: a counter hands out each index once, and each thread has its own number.
unsafe impl Executor for Threads {
    fn workers(&self) -> usize {
        self.0
    }

    fn run(&self, units: usize, unit: &(dyn Fn(usize, usize) + Sync)) {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for worker in 0..self.0 {
                let next = &next;
                scope.spawn(move || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= units {
                            break;
                        }
                        unit(worker, index);
                    }
                });
            }
        });
    }
}

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

    fn view(&self, v: *mut u8) -> KvView {
        let case = &self.case;
        match &self.coded {
            Some(coded) => coded.view(case, self.num_blocks),
            None => KvView {
                k: self.k.ptr(),
                v,
                format: case.format,
                k_strides: self.k_strides,
                v_strides: self.v_strides,
                num_blocks: self.num_blocks as u32,
                block_tokens: case.block_tokens,
                scales: ScaleView::NONE,
            },
        }
    }

    /// Runs the sequences `seqs` and returns out and LSE of their tokens, and the flag.
    fn call(
        &self,
        level: CpuLevel,
        threads: usize,
        seqs: Range<usize>,
        scoring: Scoring<'_>,
        keys: Option<(usize, &[u32])>,
    ) -> (Buffer, Vec<f32>, bool) {
        let (case, shape) = (&self.case, &self.case.shape);
        let first = self.q_indptr[seqs.start];
        let q_indptr: Vec<i32> =
            self.q_indptr[seqs.start..=seqs.end].iter().map(|i| i - first).collect();
        let (skip, kv_lens) = match keys {
            None => (0, case.lengths[seqs.clone()].iter().map(|l| l.1 as i32).collect()),
            Some((skip, lens)) => (skip, lens.iter().map(|&l| l as i32).collect::<Vec<_>>()),
        };
        let widest = self.tables.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let mut flat = Vec::new();
        let mut indptr = vec![0];
        for table in &self.tables[seqs.clone()] {
            flat.extend_from_slice(&table[skip.min(table.len())..]);
            if matches!(case.tables, Tables::Dense) {
                // Entries past the length must never be read: poison.
                flat.resize(indptr.len() * widest, i32::MIN);
            }
            indptr.push(flat.len() as i32);
        }
        flat.push(i32::MIN);
        let tables = match case.tables {
            Tables::Dense => BlockTables::Dense { table: flat.as_ptr(), stride: widest as i64 },
            Tables::Csr => BlockTables::Csr { indptr: indptr.as_ptr(), indices: flat.as_ptr() },
        };
        let v = if self.together {
            let bytes = self.v_offset * case.format.dtype().bytes() as usize;
            self.k.ptr().wrapping_add(bytes)
        } else {
            self.v.ptr()
        };
        let tokens = q_indptr[seqs.len()] as usize;
        let heads = shape.q_heads as usize;
        let out_elements = tokens * heads * shape.v_dim as usize;
        let out = Buffer::filled(case.out_dtype, out_elements, || f32::NAN);
        let mut lse = vec![f32::NAN; tokens * heads];
        let flag = AtomicU32::new(0);
        let q_row = first as usize * heads * shape.k_dim as usize;
        let q = self.q.ptr().wrapping_add(q_row * case.q_dtype.bytes() as usize);
        let args = AttendArgs {
            shape: *shape,
            scoring,
            kv: self.view(v),
            tables,
            seqs: seqs.len() as u32,
            q_indptr: q_indptr.as_ptr(),
            kv_lens: kv_lens.as_ptr(),
            q: RowsView::contiguous(q, case.q_dtype, shape.q_heads, shape.k_dim),
            out: RowsView::contiguous(out.ptr(), case.out_dtype, shape.q_heads, shape.v_dim),
            lse: lse.as_mut_ptr(),
            bad_block: Some(&flag),
        };
        let maxima = AttendMaxima {
            seqs: args.seqs,
            q_tokens: tokens as u32,
            kv_len: kv_lens.iter().copied().max().unwrap_or(0) as u32,
            workers: threads,
        };
        let bytes = attend_workspace_bytes(shape, &maxima).unwrap();
        let mut workspace = vec![0xff; bytes as usize];
        // SAFETY: all buffers live here and have the documented sizes.
        unsafe { attend(&args, level, &Threads(threads), &mut workspace) }.unwrap();
        (out, lse, flag.load(Ordering::Relaxed) != 0)
    }

    /// That a call whose view `change` spoils is refused, and nothing is written. The scales it gets
    /// live as long as the call.
    #[allow(dead_code)]
    pub fn refuses(&self, change: impl FnOnce(&mut KvView, &mut [f32])) {
        let case = &self.case;
        let mut scales = vec![1.0; case.shape.kv_heads as usize];
        let mut kv = self.view(self.v.ptr());
        change(&mut kv, &mut scales);
        let tokens = self.q_indptr[case.lengths.len()] as usize;
        let heads = case.shape.q_heads;
        let elements = tokens * (heads * case.shape.v_dim) as usize;
        let out = Buffer::filled(DType::F32, elements, || 7.0);
        let widest = self.tables.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let table = vec![0; widest * case.lengths.len()];
        let kv_lens: Vec<i32> = case.lengths.iter().map(|l| l.1 as i32).collect();
        let args = AttendArgs {
            shape: case.shape,
            scoring: self.scoring(),
            kv,
            tables: BlockTables::Dense { table: table.as_ptr(), stride: widest as i64 },
            seqs: kv_lens.len() as u32,
            q_indptr: self.q_indptr.as_ptr(),
            kv_lens: kv_lens.as_ptr(),
            q: RowsView::contiguous(self.q.ptr(), case.q_dtype, heads, case.shape.k_dim),
            out: RowsView::contiguous(out.ptr(), DType::F32, heads, case.shape.v_dim),
            lse: std::ptr::null_mut(),
            bad_block: None,
        };
        let mut workspace = vec![0; 64 << 20];
        // SAFETY: all buffers live here; what is wrong with the view is found before it is followed.
        let result = unsafe { attend(&args, CpuLevel::Scalar, &Threads(1), &mut workspace) };
        assert!(result.is_err(), "{:?}", args.kv);
        assert!((0..elements).all(|i| out.get(i) == 7.0));
    }

    /// Runs at `level` and compares with the reference; returns whether a bad block was reported.
    pub fn check(&self, level: CpuLevel) -> bool {
        let (out, lse, flag) = self.call(level, 1, 0..self.tables.len(), self.scoring(), None);
        self.compare_level(level, |i| out.get(i), &lse);
        flag
    }

    fn compare_level(&self, level: CpuLevel, out: impl Fn(usize) -> f32, lse: &[f32]) {
        // Where pairs of bf16 are multiplied, softmax weights are rounded to bf16: at most 2^-8 of
        // the largest value, which `normal` keeps below 4.25, and FP8 rounds to 5 at most.
        let fp8 = matches!(self.case.format, KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2);
        let pairs = level == CpuLevel::Avx512Bf16
            && (fp8 || self.case.format == KvFormat::Bf16)
            && self.case.q_dtype == DType::Bf16;
        let largest = if fp8 { 5.0 } else { 4.25 };
        let tolerance = if pairs { largest * 2f64.powi(-8) } else { 4e-5 };
        let tolerance = tolerance + if self.coded.is_some() { 4e-5 } else { 0.0 };
        // Where codes are multiplied as integers, queries are rounded to 16 bits (their largest
        // channel, which `normal` keeps below 5, being 32639) and weights to 15.
        let integers = level == CpuLevel::Avx512Bf16
            && matches!(self.case.format, KvFormat::Int8T | KvFormat::Int4T);
        let scale = f64::from(self.scoring().scale).abs();
        let deviation =
            scale * 5.0 / 32639.0 / 12f64.sqrt() * f64::from(self.case.shape.k_dim).sqrt();
        let score = if integers { 8.0 * deviation } else { 0.0 };
        // Codes of INT4_T are all positive: what their weights lose is alike in all channels of a
        // rotated row, and meets in one when the row is turned back.
        let weight = match (integers, self.case.format) {
            (false, _) => 0.0,
            (true, KvFormat::Int4T) => {
                4.0 * 6.0 / 65534.0 * f64::from(self.case.shape.v_dim).sqrt()
            }
            (true, _) => 4.25 / 32767.0,
        };
        self.compare(level.name(), &self.want, tolerance + score + weight, score, out, lse);
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

    /// The bits of out and LSE.
    pub fn run(&self, level: CpuLevel, threads: usize) -> (Vec<u32>, Vec<u32>) {
        self.bits(self.call(level, threads, 0..self.tables.len(), self.scoring(), None))
    }

    /// The bits of one sequence, called by itself.
    pub fn run_alone(&self, level: CpuLevel, s: usize) -> (Vec<u32>, Vec<u32>) {
        self.bits(self.call(level, 2, s..s + 1, self.scoring(), None))
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

    /// Runs each sequence over its first `cuts[s]` keys (whole blocks) and over the rest, merges
    /// the two, and compares.
    #[allow(dead_code)]
    pub fn check_parts(&self, level: CpuLevel, cuts: &[u32]) {
        let dim = self.case.shape.v_dim as usize;
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for (s, &cut) in cuts.iter().enumerate() {
            let blocks = (cut / self.case.block_tokens) as usize;
            let rest = self.case.lengths[s].1 - cut;
            let part = |skip, len: u32| {
                let (out, lse, _) =
                    self.call(level, 1, s..s + 1, self.scoring(), Some((skip, &[len])));
                let out: Vec<f32> = (0..out.rows().elements()).map(|i| out.get(i)).collect();
                (out, lse)
            };
            let (mut a, mut a_lse) = part(0, cut);
            let (b, b_lse) = part(blocks, rest);
            merge_states(&mut a, &mut a_lse, &b, &b_lse, dim).unwrap();
            out.extend(a);
            lse.extend(a_lse);
        }
        self.compare_level(level, |i| out[i], &lse);
    }
}
