//! Chunked prefill in the emulator, against the reference in f64.
#![cfg(feature = "emulate")]

mod device;

use device::codes::Codes;
use device::paged::{Case, Paged};
use device::{Rng, Values};
use kvcache::dtype::{DType, KvFormat};
use kvcache::emu::{Buffer, Fibers, Options, Schedule, launch};
use kvcache::kernels::params::{In, Out, PrefillParams};
use kvcache::kernels::{PrefillBounds, prefill_launch, prefill_token_launch};

/// What the device holds after a call.
struct Got {
    out: Values,
    lse: Buffer,
    flag: u32,
}

/// What of a batch is asked for, and the maxima that the launch is made for.
struct Call {
    q_indptr: Vec<i32>,
    lens: Vec<i32>,
    /// Row of the inputs that is row 0 of the call.
    first_row: usize,
    q_tokens: u32,
    /// The id of the first block that exists in memory; the tables' ids count from it.
    first_block: i32,
}

impl Call {
    fn whole(inputs: &Paged) -> Self {
        let q_indptr = inputs.q_indptr.clone();
        let q_tokens = q_indptr[q_indptr.len() - 1].max(1) as u32;
        Call { q_indptr, lens: inputs.lens.clone(), first_row: 0, q_tokens, first_block: 0 }
    }

    fn run(&self, inputs: &Paged) -> Got {
        let case = &inputs.case;
        let seq_lens = Buffer::of(&self.lens).unwrap();
        let flag = Buffer::of(&[0u32]).unwrap();
        let q_indptr = Buffer::of(&self.q_indptr).unwrap();
        let (sinks, slopes) =
            (Buffer::of(&inputs.sinks).unwrap(), Buffer::of(&inputs.slopes).unwrap());
        let row = case.q_heads * case.head_dim;
        let rows = inputs.q_indptr[case.lengths.len()] as usize - self.first_row;
        let out = Values::new(case.out_dtype, &vec![f32::NAN; rows * row]);
        let lse = Buffer::new(rows * case.q_heads * 4).unwrap();
        fn given<T>(on: bool, buffer: &Buffer) -> In<T> {
            In::at(if on { buffer.address() } else { 0 })
        }
        let absent = self.first_block as u64 * (inputs.strides.block * 2) as u64;
        let ids: Vec<i32> = inputs.table.read();
        let table =
            Buffer::of(&ids.iter().map(|id| id.wrapping_add(self.first_block)).collect::<Vec<_>>());
        let table = table.unwrap();
        let skipped = (self.first_row * row) as u64 * u64::from(case.q_dtype.bytes());
        let mut params = PrefillParams {
            q: In::at(inputs.q.address() + skipped),
            k: In::at(inputs.k.address().wrapping_sub(absent)),
            v: In::at(inputs.v.address().wrapping_sub(absent)),
            out: Out::at(out.address()),
            lse: Out::at(lse.address()),
            q_indptr: In::at(q_indptr.address()),
            table: In::at(table.address()),
            table_indptr: given(case.csr, &inputs.table_indptr),
            seq_lens: In::at(seq_lens.address()),
            sinks: given(case.sinks, &sinks),
            slopes: given(case.alibi, &slopes),
            error_flag: Out::at(flag.address()),
            q_row: row as i64,
            q_head: case.head_dim as i64,
            out_row: row as i64,
            out_head: case.head_dim as i64,
            k_block: inputs.strides.block,
            k_head: inputs.strides.head,
            k_token: inputs.strides.token,
            v_block: inputs.strides.block,
            v_head: inputs.strides.head,
            v_token: inputs.strides.token,
            table_stride: inputs.table_stride,
            causal: u32::from(case.causal),
            block_tokens: case.block_tokens as u32,
            num_blocks: (inputs.num_blocks as i32 + self.first_block) as u32,
            window: case.window.unwrap_or(0),
            q_dtype: case.q_dtype.id(),
            out_dtype: case.out_dtype.id(),
            scale: inputs.scoring().scale,
            softcap: case.softcap.unwrap_or(0.0),
            ..PrefillParams::default()
        };
        let bounds = PrefillBounds { q_tokens: self.q_tokens, ..bounds(case) };
        let mut coded = inputs.coded.as_ref().map(|coded| coded.prefill(params));
        let first = match &mut coded {
            Some(params) => prefill_token_launch(&bounds, params).unwrap(),
            None => prefill_launch(&bounds, &mut params).unwrap(),
        };
        let (kernel, shared) = (first.kernel, first.shared_bytes);
        let (name, threads) = (kernel.name, kernel.threads);
        // SAFETY: every address is that of a buffer that lives to the end of this function.
        unsafe {
            match &coded {
                Some(p) => launch(name, first.grid, threads, shared, p, case.options).unwrap(),
                None => launch(name, first.grid, threads, shared, &params, case.options).unwrap(),
            }
        }
        Got { out, lse, flag: flag.read::<u32>()[0] }
    }
}

fn bounds(case: &Case) -> PrefillBounds {
    PrefillBounds {
        format: match (case.codes, case.cache) {
            (Some(codes), _) => codes.format,
            (None, DType::F16) => KvFormat::F16,
            (None, _) => KvFormat::Bf16,
        },
        head_dim: case.head_dim as u32,
        q_heads: case.q_heads as u32,
        kv_heads: case.kv_heads as u32,
        batch: case.lengths.len() as u32,
        q_tokens: 1,
    }
}

/// Runs the case and compares outputs and LSE with the reference. Returns the error flag.
fn check(case: Case) -> u32 {
    let inputs = Paged::new(case);
    let got = Call::whole(&inputs).run(&inputs);
    inputs.compare(&got.out, &got.lse);
    got.flag
}

fn under(schedule: Schedule) -> Options {
    Options { schedule, fibers: Fibers::Native }
}

#[test]
fn every_instance() {
    for (i, head_dim) in [64, 80, 96, 128, 192, 256].into_iter().enumerate() {
        for cache in [DType::F16, DType::Bf16] {
            let options = under(Schedule::ALL[i % 4]);
            let case = Case {
                cache,
                q_dtype: cache,
                out_dtype: cache,
                head_dim,
                options,
                ..Case::default()
            };
            assert_eq!(check(case), 0);
        }
    }
}

#[test]
fn every_schedule() {
    let mut bits = Vec::new();
    for schedule in Schedule::ALL {
        let lengths = vec![(90, 300), (2, 2), (40, 200)];
        let inputs = Paged::new(Case { lengths, options: under(schedule), ..Case::default() });
        let got = Call::whole(&inputs).run(&inputs);
        inputs.compare(&got.out, &got.lse);
        assert_eq!(got.flag, 0);
        bits.push(got.out.buffer.read::<u16>());
        assert_eq!(bits[0], bits[bits.len() - 1]);
    }
    let options = Options { fibers: Fibers::Ucontext, ..Options::default() };
    assert_eq!(check(Case { options, ..Case::default() }), 0);
}

#[test]
fn queries_and_outputs_of_any_type() {
    for q_dtype in [DType::F32, DType::F16, DType::Bf16] {
        for out_dtype in [DType::F32, DType::F16, DType::Bf16] {
            let lengths = vec![(20, 30), (3, 3)];
            let case = Case { q_dtype, out_dtype, cache: DType::Bf16, lengths, ..Case::default() };
            assert_eq!(check(case), 0);
        }
    }
}

#[test]
fn any_group_and_block_size() {
    for (q_heads, kv_heads) in [(1, 1), (3, 3), (7, 1), (9, 1), (12, 2), (64, 1)] {
        let lengths = vec![(9, 70), (1, 17), (21, 21)];
        assert_eq!(check(Case { q_heads, kv_heads, lengths, ..Case::default() }), 0);
    }
    for block_tokens in [1, 3, 16, 48, 64, 256] {
        for (csr, nhd) in [(false, true), (true, false)] {
            assert_eq!(check(Case { block_tokens, csr, nhd, ..Case::default() }), 0);
        }
    }
}

#[test]
fn rows_before_the_context_see_nothing() {
    // More rows than tokens: the first positions are negative.
    for causal in [true, false] {
        for window in [None, Some(7)] {
            let lengths = vec![(150, 20), (70, 0), (66, 65)];
            assert_eq!(check(Case { lengths, causal, window, ..Case::default() }), 0);
        }
    }
}

#[test]
fn every_scoring_rule() {
    let base = || Case { lengths: vec![(80, 200), (2, 1), (65, 140)], ..Case::default() };
    assert_eq!(check(Case { causal: false, ..base() }), 0);
    for window in [1, 16, 64, 100, u32::MAX] {
        for causal in [true, false] {
            assert_eq!(check(Case { window: Some(window), causal, ..base() }), 0);
        }
    }
    assert_eq!(check(Case { softcap: Some(5.0), ..base() }), 0);
    assert_eq!(check(Case { sinks: true, ..base() }), 0);
    assert_eq!(check(Case { alibi: true, ..base() }), 0);
    for scale in [-0.3, 0.0, 1.0] {
        assert_eq!(check(Case { scale: Some(scale), ..base() }), 0);
    }
    let all = Case { window: Some(60), softcap: Some(9.0), sinks: true, alibi: true, ..base() };
    assert_eq!(check(all), 0);
}

#[test]
fn bad_block_ids_are_masked_and_flagged() {
    // 7 + 1 + 0 + 3 + 10 blocks are in use, and 3 are not: 24 exist.
    for id in [-1, i32::MIN, i32::MAX, 24] {
        for (seq, entry) in [(0, 2), (1, 0), (4, 9)] {
            assert_eq!(check(Case { spoil: Some((seq, entry, id)), ..Case::default() }), 1);
        }
    }
    // Of a sequence without rows nothing is looked up.
    assert_eq!(check(Case { spoil: Some((3, 1, -1)), ..Case::default() }), 0);
}

#[test]
fn blocks_behind_the_window_are_not_looked_up() {
    // The first of 10 rows stands at 323 and sees the tokens from 274 on.
    for (block_tokens, entry) in [(16, 16), (3, 90), (1, 273)] {
        let lengths = vec![(2, 40), (10, 333)];
        let spoil = Some((1, entry, -1));
        let case = Case { lengths, window: Some(50), block_tokens, spoil, ..Case::default() };
        assert_eq!(check(case.clone()), 0);
        // The next entry is in use.
        assert_eq!(check(Case { spoil: Some((1, entry + 1, -1)), ..case }), 1);
    }
}

#[test]
fn a_prompt_has_the_same_bits_in_chunks_and_alone() {
    for (case, cuts) in [
        (
            Case { q_heads: 6, lengths: vec![(30, 60), (200, 200)], ..Case::default() },
            [31, 33, 130],
        ),
        (
            Case {
                lengths: vec![(1, 5), (150, 190)],
                softcap: Some(20.0),
                window: Some(70),
                sinks: true,
                head_dim: 256,
                cache: DType::Bf16,
                ..Case::default()
            },
            [1, 64, 149],
        ),
    ] {
        let inputs = Paged::new(case);
        let case = &inputs.case;
        let whole = Call::whole(&inputs).run(&inputs).out.buffer.read::<u16>();
        let (first, rows) = (case.lengths[0].0, case.lengths[1].0);
        let row = case.q_heads * case.head_dim;
        let mut begin = 0;
        for end in cuts.into_iter().chain([rows]) {
            // The first sequence has no rows in these calls, and the second those of a chunk.
            let call = Call {
                q_indptr: vec![0, 0, (end - begin) as i32],
                lens: vec![5, (case.lengths[1].1 - rows + end) as i32],
                first_row: first + begin,
                q_tokens: (end - begin) as u32,
                ..Call::whole(&inputs)
            };
            let got = call.run(&inputs).out.buffer.read::<u16>();
            let want = &whole[(first + begin) * row..(first + end) * row];
            assert_eq!(&got[..want.len()], want, "rows {begin} to {end}");
            begin = end;
        }
    }
}

#[test]
fn a_launch_serves_smaller_calls_and_flags_larger_ones() {
    let lengths = vec![(40, 50), (0, 10), (90, 120), (2, 2)];
    let inputs = Paged::new(Case { lengths, ..Case::default() });
    let got = Call { q_tokens: 5000, ..Call::whole(&inputs) }.run(&inputs);
    inputs.compare(&got.out, &got.lse);
    assert_eq!(got.flag, 0);
    // The rows of the last two sequences end past what the launch was made for.
    let row = inputs.case.q_heads * inputs.case.head_dim;
    let got = Call { q_tokens: 129, ..Call::whole(&inputs) }.run(&inputs);
    assert_eq!(got.flag, 2);
    assert!(got.out.read()[..40 * row].iter().all(|x| !x.is_nan()));
    assert!(got.out.read()[40 * row..].iter().all(|x| x.is_nan()));
    // Offsets that do not ascend, or are negative.
    for q_indptr in [vec![0, 40, 30, 90, 132], vec![0, -3, 40, 130, 132], vec![7, 3, 1, 0, -1]] {
        let got = Call { q_indptr, ..Call::whole(&inputs) }.run(&inputs);
        assert_eq!(got.flag & 2, 2);
    }
}

#[test]
fn sequences_are_found_in_any_batch() {
    // Up to 32 sequences are searched in one step, up to 1024 in two.
    for batch in [2, 31, 32, 33, 70, 1030] {
        let rows = |i| if batch < 100 || i % 97 == 0 { i * 7 % 5 } else { 0 };
        let lengths = (0..batch).map(|i| (rows(i), 5 + i % 3)).collect();
        assert_eq!(check(Case { lengths, q_heads: 1, kv_heads: 1, ..Case::default() }), 0);
    }
    // Many tiles of one sequence among small ones.
    let lengths = vec![(1, 4), (0, 0), (300, 20), (0, 9), (2, 9)];
    assert_eq!(check(Case { lengths, q_heads: 3, kv_heads: 1, ..Case::default() }), 0);
}

#[test]
fn offsets_past_32_bits() {
    let inputs = Paged::new(Case { lengths: vec![(20, 70), (3, 3)], ..Case::default() });
    // 2048 elements a block: the first that exists lies 2^33 bytes behind the base.
    let first_block = 1 << 21;
    let got = Call { first_block, ..Call::whole(&inputs) }.run(&inputs);
    inputs.compare(&got.out, &got.lse);
    assert_eq!(got.flag, 0);
}

#[test]
fn random_cases() {
    let rounds = std::env::var("KVCACHE_EMU_ROUNDS").map_or(30, |n| n.parse().unwrap());
    let mut rng = Rng::new(0xf111);
    for round in 0..rounds {
        let kv_heads = rng.pick(&[1, 2, 3]);
        let lengths: Vec<(usize, usize)> = (0..1 + rng.below(4))
            .map(|_| {
                let tokens = rng.pick(&[0, 1, 15, 63, 64, 65, 130, 300]) + rng.below(3);
                (rng.pick(&[0, 1, 2, 9, 33, 64, 100]), tokens)
            })
            .collect();
        if lengths.iter().all(|l| l.0 == 0) {
            continue;
        }
        let any = |rng: &mut Rng| rng.below(3) == 0;
        let types = [DType::F32, DType::F16, DType::Bf16];
        check(Case {
            codes: None,
            cache: rng.pick(&[DType::F16, DType::Bf16]),
            q_dtype: rng.pick(&types),
            out_dtype: rng.pick(&types),
            head_dim: rng.pick(&[64, 64, 80, 96, 128, 192, 256]),
            q_heads: kv_heads * rng.pick(&[1, 2, 4, 5, 8]),
            kv_heads,
            block_tokens: rng.pick(&[1, 7, 16, 32, 128]),
            lengths,
            csr: any(&mut rng),
            nhd: any(&mut rng),
            causal: rng.below(4) != 0,
            window: any(&mut rng).then(|| 1 + rng.below(200) as u32),
            softcap: any(&mut rng).then(|| 1.0 + rng.below(30) as f32),
            sinks: any(&mut rng),
            alibi: any(&mut rng),
            scale: None,
            spoil: None,
            options: under(Schedule::Seeded(round)),
            seed: round,
        });
    }
}

#[test]
fn rows_of_codes() {
    let formats =
        [KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Int8T, KvFormat::Int4T, KvFormat::Nvfp4];
    for (i, format) in formats.into_iter().enumerate() {
        let scaled = !matches!(format, KvFormat::Int8T | KvFormat::Int4T);
        for head_dim in [64, 80, 96, 128, 192, 256] {
            let codes = Some(Codes { format, rotated: true, heads: scaled });
            let case = Case { codes, head_dim, ..Case::default() };
            assert_eq!(check(Case { options: under(Schedule::ALL[i % 3]), ..case.clone() }), 0);
            let plain = Some(Codes { format, rotated: format == KvFormat::Int4T, heads: false });
            let case = Case {
                codes: plain,
                q_dtype: [DType::F32, DType::Bf16][i % 2],
                block_tokens: 24,
                csr: true,
                nhd: i % 2 == 0,
                window: Some(60),
                softcap: Some(9.0),
                sinks: true,
                alibi: true,
                ..case
            };
            assert_eq!(check(case.clone()), 0);
            assert_eq!(check(Case { spoil: Some((4, 5, -1)), ..case }), 1);
        }
    }
}
