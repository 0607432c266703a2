//! Paged decode in the emulator, planned on the emulated device, against the reference in f64.
#![cfg(feature = "emulate")]

mod device;

use device::{Rng, Values};
use kvcache::attention::{HeadShape, PagedKv, ReferenceOutput, Scoring, reference_attention};
use kvcache::dtype::{DType, Rows};
use kvcache::emu::{Buffer, Fibers, Options, Schedule, launch};
use kvcache::kernels::params::{DecodeParams, In, Out};
use kvcache::kernels::{DecodeBounds, DecodePlan, Pieces};
use kvcache::layout::Strides;

#[derive(Debug, Clone)]
struct Case {
    cache: DType,
    rows: DType,
    head_dim: usize,
    q_heads: usize,
    kv_heads: usize,
    block_tokens: usize,
    /// Query rows and cached tokens of each sequence.
    lengths: Vec<(usize, usize)>,
    /// Rows by `q_indptr`, or all alike.
    ragged: bool,
    csr: bool,
    nhd: bool,
    causal: bool,
    window: Option<u32>,
    softcap: Option<f32>,
    sinks: bool,
    alibi: bool,
    pieces: Pieces,
    multiprocessors: u32,
    /// Entry of a sequence's table to overwrite.
    spoil: Option<(usize, usize, i32)>,
    schedule: Schedule,
    fibers: Fibers,
    seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            cache: DType::F16,
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
            window: None,
            softcap: None,
            sinks: false,
            alibi: false,
            pieces: Pieces::Balanced,
            multiprocessors: 4,
            spoil: None,
            schedule: Schedule::Forward,
            fibers: Fibers::Native,
            seed: 1,
        }
    }
}

/// Output and LSE as the device holds them, and the error flag.
struct Got {
    out: Values,
    lse: Buffer,
    flag: u32,
}

struct Call {
    case: Case,
    k: Values,
    v: Values,
    q: Values,
    strides: Strides,
    tables: Vec<Vec<i32>>,
    num_blocks: usize,
    sinks: Vec<f32>,
    slopes: Vec<f32>,
    q_indptr: Vec<i32>,
}

impl Call {
    fn new(case: Case) -> Self {
        let mut rng = Rng::new(case.seed);
        let (bt, d, heads) = (case.block_tokens, case.head_dim, case.kv_heads);
        let needed: usize = case.lengths.iter().map(|l| l.1.div_ceil(bt)).sum();
        let num_blocks = needed + 3;
        let mut order: Vec<i32> = (0..num_blocks as i32).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let mut tables: Vec<Vec<i32>> =
            case.lengths.iter().map(|l| order.split_off(order.len() - l.1.div_ceil(bt))).collect();
        if let Some((seq, entry, id)) = case.spoil {
            tables[seq][entry] = id;
        }
        // Blocks that no sequence has stay NaN, and so do the places past the last token.
        let (bt_, d_, h_) = (bt as i64, d as i64, heads as i64);
        let strides = if case.nhd {
            Strides { block: h_ * bt_ * d_, head: d_, token: h_ * d_ }
        } else {
            Strides { block: h_ * bt_ * d_, head: bt_ * d_, token: d_ }
        };
        let mut k = vec![f32::NAN; num_blocks * heads * bt * d];
        let mut v = k.clone();
        for (l, table) in case.lengths.iter().zip(&tables) {
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
        let mut q_indptr = vec![0];
        for l in &case.lengths {
            q_indptr.push(q_indptr[q_indptr.len() - 1] + l.0 as i32);
        }
        let rows = q_indptr[case.lengths.len()] as usize;
        let q: Vec<f32> = (0..rows * case.q_heads * d).map(|_| rng.normal()).collect();
        let sinks = (0..case.q_heads).map(|_| 2.0 * rng.normal()).collect();
        let slopes = (0..case.q_heads).map(|_| 0.1 * rng.normal().abs()).collect();
        Call {
            k: Values::new(case.cache, &k),
            v: Values::new(case.cache, &v),
            q: Values::new(case.rows, &q),
            strides,
            tables,
            num_blocks,
            sinks,
            slopes,
            q_indptr,
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

    fn reference(&self) -> ReferenceOutput {
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

    /// Plans and decodes `layers` times with one plan; the results of the last.
    fn run(&self, layers: usize) -> Got {
        let case = &self.case;
        let options = Options { schedule: case.schedule, fibers: case.fibers };
        let q_len = case.lengths.iter().map(|l| l.0).max().unwrap();
        let plan = DecodePlan::new(DecodeBounds {
            cache: case.cache,
            head_dim: case.head_dim as u32,
            q_heads: case.q_heads as u32,
            kv_heads: case.kv_heads as u32,
            q_len: q_len as u32,
            batch: case.lengths.len() as u32,
            max_tokens: case.lengths.iter().map(|l| l.1).max().unwrap() as u32,
            pieces: case.pieces,
            multiprocessors: case.multiprocessors,
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
        let second = plan.decode_launch(workspace.address(), &mut params).unwrap();
        // SAFETY: every address is that of a buffer that lives to the end of this function.
        unsafe {
            let (kernel, shared) = (first.kernel, first.shared_bytes);
            launch(kernel.name, first.grid, kernel.threads, shared, &plan_params, options).unwrap();
            let (kernel, shared) = (second.kernel, second.shared_bytes);
            for _ in 0..layers {
                launch(kernel.name, second.grid, kernel.threads, shared, &params, options).unwrap();
            }
        }
        Got { out, lse, flag: flag.read::<u32>()[0] }
    }
}

/// Runs the case and compares outputs and LSE with the reference. Returns the error flag.
fn check(case: Case) -> u32 {
    let what = format!("{case:?}");
    let call = Call::new(case);
    let (got, want) = (call.run(1), call.reference());
    // Weights are rounded to the cache's type before the product with V, each by half a step.
    let tolerance = 2.0 * device::epsilon(call.case.cache);
    got.out.must_be(&want.out, tolerance, &what);
    for (i, (&got, &want)) in got.lse.read::<f32>().iter().zip(&want.lse).enumerate() {
        let got = f64::from(got);
        let good = got == want || (got - want).abs() <= 2e-5 * want.abs().max(1.0);
        assert!(good, "{what} LSE [{i}]: {got}, not {want}");
    }
    got.flag
}

#[test]
fn every_instance_under_every_schedule() {
    for cache in [DType::F16, DType::Bf16] {
        for head_dim in [64, 128] {
            for schedule in Schedule::ALL {
                let case = Case { cache, rows: cache, head_dim, schedule, ..Case::default() };
                assert_eq!(check(case), 0);
            }
        }
    }
}

#[test]
fn queries_of_any_type() {
    for rows in [DType::F32, DType::F16, DType::Bf16] {
        assert_eq!(check(Case { rows, cache: DType::Bf16, ..Case::default() }), 0);
    }
}

#[test]
fn any_group_and_block_size() {
    for (q_heads, kv_heads) in [(1, 1), (3, 3), (7, 1), (8, 1), (9, 1), (12, 2), (64, 1)] {
        let lengths = vec![(1, 70), (1, 17)];
        assert_eq!(check(Case { q_heads, kv_heads, lengths, ..Case::default() }), 0);
    }
    for block_tokens in [1, 3, 16, 48, 64, 256] {
        for (csr, nhd) in [(false, true), (true, false)] {
            assert_eq!(check(Case { block_tokens, csr, nhd, ..Case::default() }), 0);
        }
    }
}

#[test]
fn several_rows_a_sequence() {
    let lengths = vec![(3, 70), (3, 3), (3, 2), (3, 0), (3, 300)];
    for causal in [true, false] {
        assert_eq!(check(Case { lengths: lengths.clone(), causal, ..Case::default() }), 0);
    }
    let lengths = vec![(1, 90), (8, 131), (0, 40), (2, 1), (5, 5)];
    assert_eq!(check(Case { lengths, ragged: true, ..Case::default() }), 0);
}

#[test]
fn every_scoring_rule() {
    let base = || Case { lengths: vec![(2, 200), (2, 1), (2, 0), (2, 77)], ..Case::default() };
    for window in [1, 16, 50, 1000] {
        assert_eq!(check(Case { window: Some(window), ..base() }), 0);
    }
    assert_eq!(check(Case { softcap: Some(5.0), ..base() }), 0);
    assert_eq!(check(Case { sinks: true, ..base() }), 0);
    assert_eq!(check(Case { alibi: true, ..base() }), 0);
    let all = Case { window: Some(60), softcap: Some(9.0), sinks: true, alibi: true, ..base() };
    for schedule in Schedule::ALL {
        assert_eq!(check(Case { schedule, ..all.clone() }), 0);
    }
}

#[test]
fn bad_block_ids_are_masked_and_flagged() {
    // 7 + 1 + 0 + 4 + 21 blocks are in use, and 3 are not: 36 exist.
    for id in [-1, i32::MIN, i32::MAX, 36] {
        for (seq, entry) in [(0, 2), (1, 0), (4, 20)] {
            assert_eq!(check(Case { spoil: Some((seq, entry, id)), ..Case::default() }), 1);
        }
    }
}

#[test]
fn blocks_behind_the_window_are_not_looked_up() {
    // Of 333 tokens the two rows of the last sequence see those from 282 on.
    for (block_tokens, entry) in [(16, 16), (3, 93), (1, 281)] {
        let lengths = vec![(2, 40), (1, 8), (2, 333)];
        let spoil = Some((2, entry, -1));
        let case = Case {
            lengths: lengths.clone(),
            ragged: true,
            window: Some(50),
            block_tokens,
            spoil,
            ..Case::default()
        };
        assert_eq!(check(case.clone()), 0);
        // The next entry is in use.
        assert_eq!(check(Case { spoil: Some((2, entry + 1, -1)), ..case }), 1);
    }
}

#[test]
fn long_contexts_are_cut_and_merged() {
    let lengths = vec![(1, 3000), (1, 5), (1, 0), (1, 700)];
    for schedule in Schedule::ALL {
        let case =
            Case { lengths: lengths.clone(), schedule, multiprocessors: 16, ..Case::default() };
        assert_eq!(check(case), 0);
    }
    let case = Case { lengths, fibers: Fibers::Ucontext, multiprocessors: 16, ..Case::default() };
    assert_eq!(check(case), 0);
}

#[test]
fn a_plan_serves_any_number_of_layers() {
    let lengths = vec![(1, 1500), (1, 200)];
    let call = Call::new(Case { lengths, multiprocessors: 16, ..Case::default() });
    let (once, thrice) = (call.run(1), call.run(3));
    assert_eq!(once.out.read(), thrice.out.read());
}

#[test]
fn fixed_pieces_give_a_sequence_the_same_bits_in_any_batch() {
    let pieces = Pieces::Fixed(128);
    let bits = |lengths: Vec<(usize, usize)>, schedule| {
        let case = Case { lengths, pieces, schedule, ..Case::default() };
        assert_eq!(check(case.clone()), 0);
        let call = Call::new(case);
        (call.run(1).out.buffer.read::<u16>(), call)
    };
    // The first sequence's inputs are drawn first but for its blocks: give it all of them by
    // putting it into batches whose other sequences are empty, which changes the plan's input.
    let (alone, _) = bits(vec![(1, 1000)], Schedule::Forward);
    for others in [1, 30] {
        let mut lengths = vec![(1, 1000)];
        lengths.resize(1 + others, (1, 0));
        let (together, call) = bits(lengths, Schedule::Seeded(others as u64));
        let row = call.case.q_heads * call.case.head_dim;
        let (q, want) = (
            call.q.values[..row].to_vec(),
            Call::new(Case { lengths: vec![(1, 1000)], pieces, ..Case::default() }),
        );
        assert_eq!(q, want.q.values, "the inputs of the two batches must be the same");
        assert_eq!(together[..row], alone[..row]);
    }
}

#[test]
fn random_cases() {
    let rounds = std::env::var("KVCACHE_EMU_ROUNDS").map_or(40, |n| n.parse().unwrap());
    let mut rng = Rng::new(0xdec0de);
    for round in 0..rounds {
        let kv_heads = rng.pick(&[1, 2, 3]);
        let q_len = rng.pick(&[1, 1, 1, 2, 4, 8]);
        let ragged = rng.below(3) == 0;
        let lengths: Vec<(usize, usize)> = (0..1 + rng.below(5))
            .map(|_| {
                let rows = if ragged { rng.below(q_len + 1) } else { q_len };
                (rows, rng.pick(&[0, 1, 15, 63, 64, 65, 130, 400, 1100]) + rng.below(3))
            })
            .collect();
        if lengths.iter().all(|l| l.0 == 0) {
            continue;
        }
        let any = |rng: &mut Rng| rng.below(3) == 0;
        check(Case {
            cache: rng.pick(&[DType::F16, DType::Bf16]),
            rows: rng.pick(&[DType::F32, DType::F16, DType::Bf16]),
            head_dim: rng.pick(&[64, 128]),
            q_heads: kv_heads * rng.pick(&[1, 2, 4, 5, 8, 12]),
            kv_heads,
            block_tokens: rng.pick(&[1, 7, 16, 32, 128]),
            lengths,
            ragged,
            csr: any(&mut rng),
            nhd: any(&mut rng),
            causal: rng.below(4) != 0,
            window: any(&mut rng).then(|| 1 + rng.below(200) as u32),
            softcap: any(&mut rng).then(|| 1.0 + rng.below(30) as f32),
            sinks: any(&mut rng),
            alibi: any(&mut rng),
            pieces: rng.pick(&[Pieces::Balanced, Pieces::Fixed(64), Pieces::Fixed(256)]),
            multiprocessors: rng.pick(&[1, 4, 60]),
            spoil: None,
            schedule: Schedule::Seeded(round),
            fibers: Fibers::Native,
            seed: round,
        });
    }
}
