//! One decode call in the emulator: its inputs, what the reference in f64 makes of them, and the
//! launches. The cases are in the test files.
#![allow(dead_code)]

pub use crate::device::codes::{Coded, Codes};
use crate::device::{self, Rng, Values, shuffled_tables};
use kvcache::attention::{
    HeadShape, KvSource, PagedKv, ReferenceOutput, Scoring, reference_attention,
};
use kvcache::dtype::{DType, KvFormat, Rows};
use kvcache::emu::{Buffer, Fibers, Options, Schedule, launch};
use kvcache::kernels::params::{DecodeParams, In, Out};
use kvcache::kernels::{DecodeBounds, DecodePlan, Pieces};
use kvcache::layout::Strides;

/// Which tokens of its sequence's tail a row sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// As `causal` says.
    Plain,
    /// Its path in a random tree.
    Tree,
    /// Any.
    Bits,
}

#[derive(Debug, Clone)]
pub struct Case {
    pub cache: DType,
    /// K and V as rows of codes; products are then of f16.
    pub codes: Option<Codes>,
    pub rows: DType,
    pub head_dim: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub block_tokens: usize,
    /// Query rows and cached tokens of each sequence.
    pub lengths: Vec<(usize, usize)>,
    /// Rows by `q_indptr`, or all alike.
    pub ragged: bool,
    pub csr: bool,
    pub nhd: bool,
    pub causal: bool,
    pub tail: Tail,
    pub window: Option<u32>,
    pub softcap: Option<f32>,
    pub sinks: bool,
    pub alibi: bool,
    pub pieces: Pieces,
    pub multiprocessors: u32,
    pub multiprocessor_shared_bytes: u32,
    /// Copies in chunks of 16 bytes where bulk copies are possible too.
    pub chunks: bool,
    /// Entry of a sequence's table to overwrite.
    pub spoil: Option<(usize, usize, i32)>,
    pub schedule: Schedule,
    pub fibers: Fibers,
    pub seed: u64,
    /// What the contents of each sequence are drawn from, beside the seed; its index where short.
    pub names: Vec<u64>,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            cache: DType::F16,
            codes: None,
            rows: DType::F16,
            head_dim: 64,
            q_heads: 8,
            kv_heads: 2,
            block_tokens: 16,
            lengths: vec![(1, 100), (1, 1), (1, 0), (1, 64), (1, 333)],
            ragged: false,
            csr: false,
            nhd: false,
            causal: true,
            tail: Tail::Plain,
            window: None,
            softcap: None,
            sinks: false,
            alibi: false,
            pieces: Pieces::Balanced,
            multiprocessors: 4,
            multiprocessor_shared_bytes: 228 * 1024,
            chunks: false,
            spoil: None,
            schedule: Schedule::Forward,
            fibers: Fibers::Native,
            seed: 1,
            names: Vec::new(),
        }
    }
}

/// The bits of the rows of one sequence; those past its rows are set at random too.
fn tail_bits(tail: Tail, rows: usize, rng: &mut Rng) -> Vec<u32> {
    let mut bits: Vec<u32> = Vec::new();
    for row in 0..rows {
        bits.push(match tail {
            Tail::Bits => rng.below(1 << 16) as u32,
            // The parent is an earlier row, or the last token before the tail.
            _ => {
                let path = match rng.below(row + 1) {
                    0 => 0,
                    parent => bits[parent - 1] & ((1 << rows) - 1),
                };
                path | 1 << row | (rng.below(1 << 8) as u32) << rows
            }
        });
    }
    bits
}

/// The tokens that one row sees of a sequence, as a sequence.
struct Path<'a> {
    kv: &'a PagedKv<'a>,
    seq: usize,
    tokens: Vec<usize>,
}

impl KvSource for Path<'_> {
    fn key(&self, _: usize, head: usize, position: usize, channel: usize) -> Option<f64> {
        self.kv.key(self.seq, head, self.tokens[position], channel)
    }
    fn value(&self, _: usize, head: usize, position: usize, channel: usize) -> f64 {
        self.kv.value(self.seq, head, self.tokens[position], channel)
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
    pub v: Values,
    pub coded: Option<Coded>,
    pub q: Values,
    pub strides: Strides,
    pub tables: Vec<Vec<i32>>,
    pub num_blocks: usize,
    pub sinks: Vec<f32>,
    pub slopes: Vec<f32>,
    pub q_indptr: Vec<i32>,
    /// The bits of each row.
    pub masks: Vec<u32>,
}

impl Call {
    pub fn new(case: Case) -> Self {
        let mut rng = Rng::new(case.seed);
        let (bt, d, heads) = (case.block_tokens, case.head_dim, case.kv_heads);
        let (tables, num_blocks) = shuffled_tables(&mut rng, &case.lengths, bt, case.spoil);
        // Blocks that no sequence has stay NaN, and so do the places past the last token.
        let (bt_, d_, h_) = (bt as i64, d as i64, heads as i64);
        let strides = if case.nhd {
            Strides { block: h_ * bt_ * d_, head: d_, token: h_ * d_ }
        } else {
            Strides { block: h_ * bt_ * d_, head: bt_ * d_, token: d_ }
        };
        let mut k = vec![f32::NAN; num_blocks * heads * bt * d];
        let mut v = k.clone();
        let (mut q, mut q_indptr, mut masks) = (Vec::new(), vec![0], Vec::new());
        for (i, (l, table)) in case.lengths.iter().zip(&tables).enumerate() {
            let name = case.names.get(i).copied().unwrap_or(i as u64);
            let mut rng = Rng::new(case.seed << 32 | name);
            q.extend((0..l.0 * case.q_heads * d).map(|_| rng.normal()));
            q_indptr.push(q_indptr[i] + l.0 as i32);
            masks.extend(tail_bits(case.tail, l.0, &mut rng));
            for token in 0..l.1 {
                let Ok(block) = u32::try_from(table[token / bt]) else { continue };
                if block as usize >= num_blocks {
                    continue;
                }
                for head in 0..heads {
                    let at = i64::from(block) * strides.block
                        + head as i64 * strides.head
                        + (token % bt) as i64 * strides.token;
                    for c in 0..d {
                        k[at as usize + c] = rng.normal();
                        v[at as usize + c] = rng.normal();
                    }
                }
            }
        }
        let sinks = (0..case.q_heads).map(|_| 2.0 * rng.normal()).collect();
        let slopes = (0..case.q_heads).map(|_| 0.1 * rng.normal().abs()).collect();
        let coded = case.codes.map(|how| {
            let head = |row: usize| if case.nhd { row % heads } else { row / bt % heads };
            Coded::new(how, d, heads, head, &mut k, &mut v)
        });
        let stored = if coded.is_some() { DType::F32 } else { case.cache };
        Call {
            k: Values::new(stored, &k),
            v: Values::new(stored, &v),
            coded,
            q: Values::new(case.rows, &q),
            strides,
            tables,
            num_blocks,
            sinks,
            slopes,
            q_indptr,
            masks,
            case,
        }
    }

    fn scoring(&self) -> Scoring<'_> {
        let case = &self.case;
        Scoring {
            causal: case.causal,
            window: case.window,
            softcap: case.softcap,
            sinks: case.sinks.then_some(&self.sinks[..]),
            alibi: case.alibi.then_some(&self.slopes[..]),
            ..Scoring::causal(case.head_dim as u32)
        }
    }

    pub fn reference(&self) -> ReferenceOutput {
        let case = &self.case;
        let narrow = |values: &Values| values.values.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let (k, v) = (narrow(&self.k), narrow(&self.v));
        // The matrix instruction takes queries of the cache's type.
        let q = narrow(&self.q);
        let q = if case.codes.is_some() { q } else { narrow(&Values::new(case.cache, &q)) };
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
        let scoring = self.scoring();
        if case.tail == Tail::Plain {
            return reference_attention(&shape, &scoring, &kv, Rows::F32(&q), &indptr, &lens)
                .unwrap();
        }
        // With a mask, a row sees what it would see if the sequence had nothing else.
        let row_elements = case.q_heads * case.head_dim;
        let mut all = ReferenceOutput { out: Vec::new(), lse: Vec::new() };
        for (seq, &(rows, len)) in case.lengths.iter().enumerate() {
            for row in 0..rows {
                let at = indptr[seq] + row;
                let tail = len as i64 - rows as i64;
                let seen = |&token: &usize| {
                    let place = token as i64 - tail;
                    place < 0 || self.masks[at] >> place & 1 != 0
                };
                let path = Path { kv: &kv, seq, tokens: (0..len).filter(seen).collect() };
                let q = Rows::F32(&q[at * row_elements..(at + 1) * row_elements]);
                let one =
                    reference_attention(&shape, &scoring, &path, q, &[0, 1], &[path.tokens.len()]);
                let one = one.unwrap();
                all.out.extend(one.out);
                all.lse.extend(one.lse);
            }
        }
        all
    }

    /// Plans and decodes `layers` times with one plan; the results of the last.
    pub fn run(&self, layers: usize) -> Got {
        let case = &self.case;
        let options = Options { schedule: case.schedule, fibers: case.fibers };
        let q_len = case.lengths.iter().map(|l| l.0).max().unwrap();
        let plan = DecodePlan::new(DecodeBounds {
            format: match (case.codes, case.cache) {
                (Some(codes), _) => codes.format,
                (None, DType::F16) => KvFormat::F16,
                (None, _) => KvFormat::Bf16,
            },
            head_dim: case.head_dim as u32,
            tile_tokens: case.block_tokens as u32,
            q_heads: case.q_heads as u32,
            kv_heads: case.kv_heads as u32,
            q_len: q_len as u32,
            batch: case.lengths.len() as u32,
            max_tokens: case.lengths.iter().map(|l| l.1).max().unwrap() as u32,
            pieces: case.pieces,
            multiprocessors: case.multiprocessors,
            multiprocessor_shared_bytes: case.multiprocessor_shared_bytes,
        })
        .unwrap();
        let lens: Vec<i32> = case.lengths.iter().map(|l| l.1 as i32).collect();
        let seq_lens = Buffer::of(&lens).unwrap();
        let flag = Buffer::of(&[0u32]).unwrap();
        let workspace = Buffer::new(plan.workspace_bytes() as usize).unwrap();
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
        let masks = Buffer::of(&self.masks).unwrap();
        let (sinks, slopes) = (Buffer::of(&self.sinks).unwrap(), Buffer::of(&self.slopes).unwrap());
        let rows = self.q_indptr[case.lengths.len()] as usize;
        let out = Values::new(case.rows, &vec![f32::NAN; rows * case.q_heads * case.head_dim]);
        let lse = Buffer::new(rows * case.q_heads * 4).unwrap();
        fn given<T>(on: bool, buffer: &Buffer) -> In<T> {
            In::at(if on { buffer.address() } else { 0 })
        }
        let row = (case.q_heads * case.head_dim) as i64;
        let mut params = DecodeParams {
            q: In::at(self.q.address()),
            k: In::at(self.k.address()),
            v: In::at(self.v.address()),
            out: Out::at(out.address()),
            lse: Out::at(lse.address()),
            q_indptr: given(case.ragged, &q_indptr),
            tail_mask: given(case.tail != Tail::Plain, &masks),
            table: In::at(table.address()),
            table_indptr: given(case.csr, &indptr),
            seq_lens: In::at(seq_lens.address()),
            sinks: given(case.sinks, &sinks),
            slopes: given(case.alibi, &slopes),
            error_flag: Out::at(flag.address()),
            q_row: row,
            q_head: case.head_dim as i64,
            out_row: row,
            out_head: case.head_dim as i64,
            k_block: self.strides.block,
            k_head: self.strides.head,
            k_token: self.strides.token,
            v_block: self.strides.block,
            v_head: self.strides.head,
            v_token: self.strides.token,
            table_stride: widest as i64,
            causal: u32::from(case.causal),
            block_tokens: case.block_tokens as u32,
            num_blocks: self.num_blocks as u32,
            window: case.window.unwrap_or(0),
            q_dtype: case.rows.id(),
            out_dtype: case.rows.id(),
            scale: self.scoring().scale,
            softcap: case.softcap.unwrap_or(0.0),
            ..DecodeParams::default()
        };
        let (first, plan_params) = plan
            .plan_launch(
                workspace.address(),
                In::at(seq_lens.address()),
                case.lengths.len() as u32,
                case.window,
                Out::at(flag.address()),
            )
            .unwrap();
        let mut token_params = self.coded.as_ref().map(|coded| coded.decode(params));
        let second = match &mut token_params {
            Some(params) => plan.decode_token_launch(workspace.address(), params).unwrap(),
            None => plan.decode_launch(workspace.address(), &mut params).unwrap(),
        };
        assert_eq!(second, plan.kernel());
        if case.chunks {
            params.bulk = 0;
        }
        if let Some(params) = token_params.as_mut() {
            // Whole runs are for bulk copies, and nothing else is.
            let row = plan.format().row_bytes(case.head_dim as u32);
            let run = if row > 128 { 8 } else { 16 };
            let runs = case.block_tokens.is_multiple_of(run) && !case.nhd;
            let room = case.multiprocessor_shared_bytes >= 100 * 1024;
            assert!(params.call.bulk == u32::from(runs) || !room);
            params.call.bulk &= u32::from(!case.chunks);
        }
        // SAFETY: every address is that of a buffer that lives to the end of this function.
        unsafe {
            let (kernel, shared) = (first.kernel, first.shared_bytes);
            launch(kernel.name, first.grid, kernel.threads, shared, &plan_params, options).unwrap();
            let (kernel, shared) = (second.kernel, second.shared_bytes);
            for _ in 0..layers {
                let (name, threads) = (kernel.name, kernel.threads);
                match &token_params {
                    Some(p) => launch(name, second.grid, threads, shared, p, options).unwrap(),
                    None => launch(name, second.grid, threads, shared, &params, options).unwrap(),
                }
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
    // Weights are rounded to the cache's type before the product with V, each by half a step.
    // Beside codes, rotated queries and weights times scales are rounded to f16 too.
    let coded = call.case.codes.is_some();
    let largest = call.v.values.iter().filter(|x| !x.is_nan()).fold(1.0f64, |a, x| a.max(x.abs()));
    let tolerance = if coded { largest * 0.8e-3 } else { 2.0 * device::epsilon(call.case.cache) };
    let lse_tolerance = if coded { 1e-3 } else { 2e-5 };
    got.out.must_be(&want.out, tolerance, &what);
    for (i, (&got, &want)) in got.lse.read::<f32>().iter().zip(&want.lse).enumerate() {
        let got = f64::from(got);
        let good = got == want || (got - want).abs() <= lse_tolerance * want.abs().max(1.0);
        assert!(good, "{what} LSE [{i}]: {got}, not {want}");
    }
    got.flag
}
