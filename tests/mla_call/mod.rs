//! Calls of latent attention decode in the emulator, planned on the emulated device, and what the reference
//! in f64 says of them; of rows of codes over what the codes say.
#![allow(dead_code)]

use kvcache::attention::{HeadShape, PagedKv, ReferenceOutput, Scoring, reference_attention};
use kvcache::dtype::{DType, KvFormat, Rows};
use kvcache::emu::{Buffer, Fibers, Options, Schedule, launch};
use kvcache::kernels::params::{In, MlaParams, Out};
use kvcache::kernels::{Kernel, MLA_DIM, MLA_VALUES, MlaBounds, MlaPlan, Pieces};
use kvcache::layout::Strides;

use super::device::codes::{Codes, Latents};
use super::device::{Rng, Values, epsilon, shuffled_tables};

const DIM: usize = MLA_DIM as usize;
pub const VALUES: usize = MLA_VALUES as usize;
/// DeepSeek's: the width of the heads that the latents stand for, not of the latents.
const SCALE: f32 = 0.07216878;

#[derive(Debug, Clone)]
pub struct Case {
    pub cache: DType,
    /// Rows of codes, in place of floats of type `cache`.
    pub codes: Option<Codes>,
    pub rows: DType,
    pub q_heads: usize,
    pub block_tokens: usize,
    /// Query rows and cached tokens of each sequence.
    pub lengths: Vec<(usize, usize)>,
    /// Rows by `q_indptr`, or all alike.
    pub ragged: bool,
    pub csr: bool,
    /// Elements between the end of a latent and the next: an engine's own padding.
    pub gap: usize,
    pub causal: bool,
    pub window: Option<u32>,
    pub pieces: Pieces,
    pub multiprocessors: u32,
    /// Entry of a sequence's table to overwrite.
    pub spoil: Option<(usize, usize, i32)>,
    pub schedule: Schedule,
    pub fibers: Fibers,
    pub seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            cache: DType::Bf16,
            codes: None,
            rows: DType::Bf16,
            q_heads: 16,
            block_tokens: 64,
            lengths: vec![(1, 100), (1, 1), (1, 0), (1, 33)],
            ragged: false,
            csr: false,
            gap: 0,
            causal: true,
            window: None,
            pieces: Pieces::Balanced,
            multiprocessors: 1,
            spoil: None,
            schedule: Schedule::Forward,
            fibers: Fibers::Native,
            seed: 1,
        }
    }
}

/// Output and LSE as the device holds them, and the error flag.
pub struct Got {
    pub out: Values,
    pub lse: Buffer,
    pub flag: u32,
}

pub struct Call {
    pub case: Case,
    pub k: Values,
    pub codes: Option<Latents>,
    pub q: Values,
    pub strides: Strides,
    pub tables: Vec<Vec<i32>>,
    pub num_blocks: usize,
    pub q_indptr: Vec<i32>,
}

impl Call {
    pub fn new(case: Case) -> Self {
        let mut rng = Rng::new(case.seed);
        let bt = case.block_tokens;
        let (tables, num_blocks) = shuffled_tables(&mut rng, &case.lengths, bt, case.spoil);
        // Blocks that no sequence has stay NaN, and so do gaps and the places past the last token.
        let row = DIM + case.gap;
        let strides = Strides { block: (bt * row) as i64, head: 0, token: row as i64 };
        let mut k = vec![f32::NAN; num_blocks * bt * row];
        for (l, table) in case.lengths.iter().zip(&tables) {
            for token in 0..l.1 {
                let Ok(block) = usize::try_from(table[token / bt]) else { continue };
                if block < num_blocks {
                    let at = (block * bt + token % bt) * row;
                    k[at..at + DIM].iter_mut().for_each(|x| *x = rng.normal());
                }
            }
        }
        let mut q_indptr = vec![0];
        for l in &case.lengths {
            q_indptr.push(q_indptr[q_indptr.len() - 1] + l.0 as i32);
        }
        let rows = q_indptr[case.lengths.len()] as usize;
        let q: Vec<f32> = (0..rows * case.q_heads * DIM).map(|_| 0.5 * rng.normal()).collect();
        let codes = case.codes.map(|how| Latents::new(how, (DIM, VALUES), case.gap, &mut k));
        // What codes say is compared with as it is.
        let floats = if codes.is_some() { DType::F32 } else { case.cache };
        Call {
            k: Values::new(floats, &k),
            codes,
            q: Values::new(case.rows, &q),
            strides,
            tables,
            num_blocks,
            q_indptr,
            case,
        }
    }

    fn reference(&self) -> ReferenceOutput {
        let case = &self.case;
        let narrow = |values: &Values| values.values.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let k = narrow(&self.k);
        // The matrix instruction takes queries of the cache's type, of codes f16, after a rotation.
        let q = match self.codes {
            None => narrow(&Values::new(case.cache, &narrow(&self.q))),
            Some(_) => narrow(&self.q),
        };
        let kv = PagedKv {
            k: Rows::F32(&k),
            v: Rows::F32(&k),
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
            kv_heads: 1,
            k_dim: MLA_DIM,
            v_dim: MLA_VALUES,
            v_in_k: true,
        };
        let scoring = Scoring {
            scale: SCALE,
            causal: case.causal,
            window: case.window,
            ..Scoring::causal(MLA_DIM)
        };
        let indptr: Vec<usize> = self.q_indptr.iter().map(|&i| i as usize).collect();
        let lens: Vec<usize> = case.lengths.iter().map(|l| l.1).collect();
        reference_attention(&shape, &scoring, &kv, Rows::F32(&q), &indptr, &lens).unwrap()
    }

    /// Plans and decodes `layers` times with one plan; the results of the last.
    pub fn run(&self, layers: usize) -> Got {
        let case = &self.case;
        let options = Options { schedule: case.schedule, fibers: case.fibers };
        let plan = MlaPlan::new(MlaBounds {
            format: match (case.codes, case.cache) {
                (Some(codes), _) => codes.format,
                (None, DType::F16) => KvFormat::F16,
                (None, _) => KvFormat::Bf16,
            },
            q_heads: case.q_heads as u32,
            q_len: case.lengths.iter().map(|l| l.0).max().unwrap() as u32,
            batch: case.lengths.len() as u32,
            max_tokens: case.lengths.iter().map(|l| l.1).max().unwrap() as u32,
            pieces: case.pieces,
            multiprocessors: case.multiprocessors,
        })
        .unwrap();
        let lens: Vec<i32> = case.lengths.iter().map(|l| l.1 as i32).collect();
        let seq_lens = Buffer::of(&lens).unwrap();
        let flag = Buffer::of(&[0u32]).unwrap();
        // What `MlaPlan` asks a caller for is 256; buffers here begin at multiples of 128.
        let room = Buffer::new(plan.workspace_bytes() as usize + 128).unwrap();
        let workspace = room.address().next_multiple_of(256);
        let q_indptr = Buffer::of(&self.q_indptr).unwrap();
        // Entries past the length are poison: the largest dense table has one more.
        let widest = self.tables.iter().map(Vec::len).max().unwrap() + 1;
        let (mut flat, mut indptr) = (Vec::new(), vec![0]);
        for (i, table) in self.tables.iter().enumerate() {
            flat.extend_from_slice(table);
            if !case.csr {
                flat.resize((i + 1) * widest, i32::MIN);
            }
            indptr.push(flat.len() as i32);
        }
        let (table, indptr) = (Buffer::of(&flat).unwrap(), Buffer::of(&indptr).unwrap());
        let rows = self.q_indptr[case.lengths.len()] as usize;
        let mut out = Values::new(case.rows, &vec![f32::NAN; rows * case.q_heads * VALUES]);
        let mut lse = Buffer::new(rows * case.q_heads * 4).unwrap();
        fn given<T>(on: bool, buffer: &Buffer) -> In<T> {
            In::at(if on { buffer.address() } else { 0 })
        }
        let mut params = MlaParams {
            q: In::at(self.q.address()),
            k: In::at(self.k.address()),
            out: Out::at(out.address()),
            lse: Out::at(lse.address()),
            q_indptr: given(case.ragged, &q_indptr),
            table: In::at(table.address()),
            table_indptr: given(case.csr, &indptr),
            seq_lens: In::at(seq_lens.address()),
            error_flag: Out::at(flag.address()),
            q_row: (case.q_heads * DIM) as i64,
            q_head: DIM as i64,
            out_row: (case.q_heads * VALUES) as i64,
            out_head: VALUES as i64,
            k_block: self.strides.block,
            k_token: self.strides.token,
            table_stride: widest as i64,
            causal: u32::from(case.causal),
            block_tokens: case.block_tokens as u32,
            num_blocks: self.num_blocks as u32,
            window: case.window.unwrap_or(0),
            q_dtype: case.rows.id(),
            out_dtype: case.rows.id(),
            scale: SCALE,
            ..MlaParams::default()
        };
        let batch = case.lengths.len() as u32;
        let flag_at = Out::at(flag.address());
        let (first, plan_params) = plan
            .plan_launch(workspace, In::at(seq_lens.address()), batch, case.window, flag_at)
            .unwrap();
        let mut coded = self.codes.as_ref().map(|latents| latents.params(params));
        let second = match &mut coded {
            Some(coded) => plan.decode_token_launch(workspace, coded),
            None => plan.decode_launch(workspace, &mut params),
        };
        let second = second.unwrap();
        assert_eq!(second.kernel, plan.kernel());
        // SAFETY: every address is that of a buffer that lives to the end of this function.
        unsafe {
            let (kernel, shared) = (first.kernel, first.shared_bytes);
            launch(kernel.name, first.grid, kernel.threads, shared, &plan_params, options).unwrap();
            let (Kernel { name, threads, .. }, shared) = (second.kernel, second.shared_bytes);
            for _ in 0..layers {
                // Each layer writes all of it anew.
                out.buffer.poison();
                lse.poison();
                match &coded {
                    Some(p) => launch(name, second.grid, *threads, shared, p, options),
                    None => launch(name, second.grid, *threads, shared, &params, options),
                }
                .unwrap();
            }
        }
        Got { out, lse, flag: flag.read::<u32>()[0] }
    }
}

/// Runs the case and compares outputs and LSE with the reference. Returns the error flag.
pub fn check(case: Case) -> u32 {
    let what = format!("{case:?}");
    let call = Call::new(case);
    let (got, want) = (call.run(1), call.reference());
    // Weights are rounded to the cache's type before the product with V, each by half a step; beside
    // codes queries are too, and weights times scales, to f16.
    let coded = call.case.codes.is_some();
    let largest = call.k.values.iter().filter(|x| !x.is_nan()).fold(1.0f64, |a, x| a.max(x.abs()));
    let tolerance = if coded { largest * 0.8e-3 } else { 2.0 * epsilon(call.case.cache) };
    let lse_tolerance = if coded { 1e-3 } else { 2e-5 };
    got.out.must_be(&want.out, tolerance, &what);
    for (i, (&got, &want)) in got.lse.read::<f32>().iter().zip(&want.lse).enumerate() {
        let got = f64::from(got);
        let good = got == want || (got - want).abs() <= lse_tolerance * want.abs().max(1.0);
        assert!(good, "{what} LSE [{i}]: {got}, not {want}");
    }
    got.flag
}
