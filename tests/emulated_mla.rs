//! Multi-head latent attention decode in the emulator, planned on the emulated device, against the
//! reference in f64; of rows of codes over what the codes say.
#![cfg(feature = "emulate")]

mod device;

use device::codes::{Codes, Latents};
use device::{Rng, Values};
use kvcache::attention::{HeadShape, PagedKv, ReferenceOutput, Scoring, reference_attention};
use kvcache::dtype::{DType, KvFormat, Rows};
use kvcache::emu::{Buffer, Fibers, Options, Schedule, launch};
use kvcache::kernels::params::{In, MlaParams, Out};
use kvcache::kernels::{Kernel, MLA_DIM, MLA_VALUES, MlaBounds, MlaPlan, Pieces};
use kvcache::layout::Strides;

const DIM: usize = MLA_DIM as usize;
const VALUES: usize = MLA_VALUES as usize;
/// DeepSeek's: the width of the heads that the latents stand for, not of the latents.
const SCALE: f32 = 0.07216878;

#[derive(Debug, Clone)]
struct Case {
    cache: DType,
    /// Rows of codes, in place of floats of type `cache`.
    codes: Option<Codes>,
    rows: DType,
    q_heads: usize,
    block_tokens: usize,
    /// Query rows and cached tokens of each sequence.
    lengths: Vec<(usize, usize)>,
    /// Rows by `q_indptr`, or all alike.
    ragged: bool,
    csr: bool,
    /// Elements between the end of a latent and the next: an engine's own padding.
    gap: usize,
    causal: bool,
    window: Option<u32>,
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
struct Got {
    out: Values,
    lse: Buffer,
    flag: u32,
}

struct Call {
    case: Case,
    k: Values,
    codes: Option<Latents>,
    q: Values,
    strides: Strides,
    tables: Vec<Vec<i32>>,
    num_blocks: usize,
    q_indptr: Vec<i32>,
}

impl Call {
    fn new(case: Case) -> Self {
        let mut rng = Rng::new(case.seed);
        let bt = case.block_tokens;
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
    fn run(&self, layers: usize) -> Got {
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
fn check(case: Case) -> u32 {
    let what = format!("{case:?}");
    let call = Call::new(case);
    let (got, want) = (call.run(1), call.reference());
    // Weights are rounded to the cache's type before the product with V, each by half a step; beside
    // codes queries are too, and weights times scales, to f16.
    let coded = call.case.codes.is_some();
    let largest = call.k.values.iter().filter(|x| !x.is_nan()).fold(1.0f64, |a, x| a.max(x.abs()));
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

const FORMATS: [KvFormat; 4] =
    [KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Int8T, KvFormat::Int4T];

fn plain(format: KvFormat) -> Option<Codes> {
    Some(Codes { format, rotated: true, heads: false })
}

/// Floats, and codes of every format.
fn kinds() -> impl Iterator<Item = Option<Codes>> {
    [None].into_iter().chain(FORMATS.into_iter().map(plain))
}

#[test]
fn every_instance_under_every_schedule() {
    for (cache, codes) in [(DType::F16, None)].into_iter().chain(kinds().map(|c| (DType::Bf16, c)))
    {
        for q_heads in [16, 32] {
            for schedule in Schedule::ALL {
                let lengths = vec![(1, 100), (1, 1), (1, 0)];
                let rows = cache;
                let case =
                    Case { cache, codes, rows, q_heads, schedule, lengths, ..Case::default() };
                assert_eq!(check(case), 0);
            }
        }
    }
}

#[test]
fn scales_of_the_layer_and_latents_as_they_are() {
    for (format, heads) in
        [(KvFormat::Fp8E4m3, true), (KvFormat::Fp8E5m2, true), (KvFormat::Int8T, false)]
    {
        let codes = Some(Codes { format, rotated: false, heads });
        assert_eq!(check(Case { codes, ..Case::default() }), 0);
        assert_eq!(check(Case { codes, q_heads: 20, gap: 8, ..Case::default() }), 0);
    }
}

#[test]
fn queries_of_any_type() {
    for rows in [DType::F32, DType::F16, DType::Bf16] {
        for codes in kinds() {
            assert_eq!(check(Case { codes, rows, lengths: vec![(1, 40)], ..Case::default() }), 0);
        }
    }
}

#[test]
fn any_number_of_heads() {
    for q_heads in [1, 5, 8, 17, 24, 33, 64, 100, 128] {
        assert_eq!(check(Case { q_heads, lengths: vec![(1, 50)], ..Case::default() }), 0);
    }
    for q_heads in 16..=128 {
        assert_eq!(check(Case { q_heads, lengths: vec![(1, 5)], ..Case::default() }), 0);
        // Codes in turns: every format has every sort of last unit.
        let codes = plain(FORMATS[(q_heads + q_heads / 4) % 4]);
        assert_eq!(check(Case { codes, q_heads, lengths: vec![(1, 5)], ..Case::default() }), 0);
    }
}

#[test]
fn any_block_size_table_and_stride() {
    for block_tokens in [1, 3, 16, 48, 256] {
        for (csr, gap) in [(false, 8), (true, 0)] {
            for codes in kinds() {
                let lengths = vec![(1, 70), (1, 1), (1, 0), (1, 33)];
                assert_eq!(
                    check(Case { codes, block_tokens, csr, gap, lengths, ..Case::default() }),
                    0
                );
            }
        }
    }
}

#[test]
fn several_rows_a_sequence() {
    let lengths = vec![(3, 70), (3, 3), (3, 2), (3, 0)];
    for causal in [true, false] {
        assert_eq!(
            check(Case { q_heads: 5, lengths: lengths.clone(), causal, ..Case::default() }),
            0
        );
    }
    // More columns than one unit has, and fewer than the bound says.
    let lengths = vec![(1, 40), (8, 77), (0, 40), (2, 1), (5, 5)];
    for codes in kinds() {
        let lengths = lengths.clone();
        assert_eq!(check(Case { codes, q_heads: 7, lengths, ragged: true, ..Case::default() }), 0);
        let lengths = vec![(2, 90)];
        assert_eq!(check(Case { codes, q_heads: 16, lengths, ..Case::default() }), 0);
    }
}

#[test]
fn windows() {
    for window in [1, 16, 50, 1000] {
        for codes in [None, plain(KvFormat::Fp8E4m3), plain(KvFormat::Int4T)] {
            let (lengths, window) = (vec![(2, 200), (2, 1), (2, 0), (2, 77)], Some(window));
            assert_eq!(check(Case { codes, window, q_heads: 4, lengths, ..Case::default() }), 0);
        }
    }
}

#[test]
fn blocks_behind_the_window_are_not_looked_up() {
    // Of 333 tokens the two rows of the last sequence see those from 282 on.
    for (block_tokens, entry) in [(16, 16), (3, 93), (1, 281)] {
        let case = Case {
            q_heads: 4,
            lengths: vec![(2, 40), (1, 8), (2, 333)],
            ragged: true,
            window: Some(50),
            block_tokens,
            spoil: Some((2, entry, -1)),
            ..Case::default()
        };
        for codes in [None, plain(KvFormat::Int8T)] {
            assert_eq!(check(Case { codes, ..case.clone() }), 0);
            // The next entry is in use.
            let spoil = Some((2, entry + 1, -1));
            assert_eq!(check(Case { codes, spoil, ..case.clone() }), 1);
        }
    }
}

#[test]
fn bad_block_ids_are_masked_and_flagged() {
    // 7 + 1 + 0 + 3 blocks are in use, and 3 are not: 14 exist.
    for id in [-1, i32::MIN, i32::MAX, 14] {
        for (seq, entry) in [(0, 2), (1, 0), (3, 2)] {
            for codes in kinds() {
                let spoil = Some((seq, entry, id));
                assert_eq!(check(Case { codes, block_tokens: 16, spoil, ..Case::default() }), 1);
            }
        }
    }
}

#[test]
fn rows_past_the_bound_are_not_computed() {
    // The plan is made for the widest sequence: a call that then says more writes nothing for it.
    let mut call = Call::new(Case {
        q_heads: 2,
        lengths: vec![(2, 20), (1, 9)],
        ragged: true,
        ..Case::default()
    });
    let want = call.run(1);
    call.q_indptr = vec![0, 3, 3];
    let got = call.run(1);
    assert_eq!((want.flag, got.flag), (0, 2));
    assert!(got.out.read().iter().all(|x| x.is_nan()));
}

#[test]
fn long_contexts_are_cut_and_merged() {
    let lengths = vec![(1, 700), (1, 5), (1, 0), (1, 300)];
    for (codes, schedule) in kinds().flat_map(|codes| Schedule::ALL.map(|s| (codes, s))) {
        let lengths = lengths.clone();
        let case = Case { codes, lengths, schedule, multiprocessors: 6, ..Case::default() };
        assert_eq!(check(case), 0);
    }
    for codes in kinds() {
        let case = Case {
            codes,
            q_heads: 40,
            lengths: vec![(1, 700), (1, 65)],
            fibers: Fibers::Ucontext,
            multiprocessors: 12,
            ..Case::default()
        };
        assert_eq!(check(case), 0);
    }
}

#[test]
fn a_plan_serves_any_number_of_layers() {
    let lengths = vec![(1, 500), (1, 90)];
    let call = Call::new(Case { lengths, multiprocessors: 6, ..Case::default() });
    let (once, thrice) = (call.run(1), call.run(3));
    assert_eq!(once.out.buffer.read::<u16>(), thrice.out.buffer.read::<u16>());
    assert_eq!(once.lse.read::<u32>(), thrice.lse.read::<u32>());
}

#[test]
fn fixed_pieces_give_a_sequence_the_same_bits_in_any_batch() {
    let bits = |codes, others: usize, schedule| {
        // The first sequence's inputs do not depend on how many empty ones follow it.
        let mut lengths = vec![(1, 300)];
        lengths.resize(1 + others, (1, 0));
        let case = Case { codes, lengths, pieces: Pieces::Fixed(128), schedule, ..Case::default() };
        assert_eq!(check(case.clone()), 0);
        Call::new(case).run(1).out.buffer.read::<u16>()[..16 * VALUES].to_vec()
    };
    for codes in kinds() {
        let alone = bits(codes, 0, Schedule::Forward);
        for others in [1, 30] {
            assert!(bits(codes, others, Schedule::Seeded(others as u64)) == alone);
        }
    }
}

#[test]
fn random_cases() {
    let rounds = std::env::var("KVCACHE_EMU_ROUNDS").map_or(30, |n| n.parse().unwrap());
    let mut rng = Rng::new(0x576);
    for round in 0..rounds {
        let q_len = rng.pick(&[1, 1, 1, 2, 4, 8]);
        let ragged = rng.below(3) == 0;
        let lengths: Vec<(usize, usize)> = (0..1 + rng.below(4))
            .map(|_| {
                let rows = if ragged { rng.below(q_len + 1) } else { q_len };
                (rows, rng.pick(&[0, 1, 15, 31, 32, 33, 64, 130, 400]) + rng.below(3))
            })
            .collect();
        if lengths.iter().all(|l| l.0 == 0) {
            continue;
        }
        let any = |rng: &mut Rng| rng.below(3) == 0;
        let format = rng.pick(&FORMATS);
        let fp8 = matches!(format, KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2);
        let how = Codes { format, rotated: any(&mut rng), heads: fp8 && any(&mut rng) };
        check(Case {
            cache: rng.pick(&[DType::F16, DType::Bf16]),
            codes: (!any(&mut rng)).then_some(how),
            rows: rng.pick(&[DType::F32, DType::F16, DType::Bf16]),
            q_heads: rng.pick(&[1, 3, 8, 16, 20, 32, 48]),
            block_tokens: rng.pick(&[1, 7, 16, 32, 64, 128]),
            lengths,
            ragged,
            csr: any(&mut rng),
            gap: rng.pick(&[0, 0, 8, 64]),
            causal: rng.below(4) != 0,
            window: any(&mut rng).then(|| 1 + rng.below(100) as u32),
            pieces: rng.pick(&[Pieces::Balanced, Pieces::Fixed(64), Pieces::Fixed(128)]),
            multiprocessors: rng.pick(&[1, 4, 20]),
            spoil: None,
            schedule: Schedule::Seeded(round),
            fibers: Fibers::Native,
            seed: round,
        });
    }
}
