//! The cases of the table on the CPU: the call at a level, with threads that run units in any order.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use kvcache::attention::merge_states;
use kvcache::cpu::{
    AttendArgs, AttendMaxima, BlockTables, CpuLevel, Executor, KvView, RowsView, ScaleView, attend,
    attend_workspace_bytes,
};

use super::*;

/// The levels that this CPU has and whose kernels differ here: only sealed tiles are read by other dot
/// products than NEON's own.
#[allow(dead_code, reason = "devices have no levels")]
pub fn levels() -> impl Iterator<Item = CpuLevel> {
    CpuLevel::available().filter(|&level| level != CpuLevel::NeonDotprod)
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

impl Instance {
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

    /// The bits of out and LSE.
    pub fn run(&self, level: CpuLevel, threads: usize) -> (Vec<u32>, Vec<u32>) {
        self.bits(self.call(level, threads, 0..self.tables.len(), self.scoring(), None))
    }

    /// The bits of one sequence, called by itself.
    pub fn run_alone(&self, level: CpuLevel, s: usize) -> (Vec<u32>, Vec<u32>) {
        self.bits(self.call(level, 2, s..s + 1, self.scoring(), None))
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
