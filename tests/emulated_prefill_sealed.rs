//! Chunked prefill over sealed tiles and raw ones in the emulator, against the reference in f64 over
//! what each query is to read: its own tile raw, those before it sealed.
#![cfg(feature = "emulate")]

mod device;

use device::Rng;
use device::sealed::{Case, FORMATS, Got, Sealed};
use kvcache::dtype::{DType, KvFormat};
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::kernels::{PrefillBounds, prefill_sealed_launch, prefill_sealed_params};

/// Runs a call over sequences of these rows and lengths, the first row being row `first_row` of all.
fn run(inputs: &Sealed, first_row: usize, q_indptr: &[i32], lens: &[i32]) -> Got {
    let case = &inputs.case;
    let rows = q_indptr[q_indptr.len() - 1];
    let got = inputs.room(rows as usize);
    let (q_rows, lens) = (Buffer::of(q_indptr).unwrap(), Buffer::of(lens).unwrap());
    let (args, tiles) = inputs.args(&got, first_row, &q_rows, &lens);
    let bounds = PrefillBounds {
        format: case.format,
        head_dim: case.dim as u32,
        q_heads: case.q_heads as u32,
        kv_heads: case.kv_heads as u32,
        batch: case.lengths.len() as u32,
        q_tokens: rows.max(1) as u32,
    };
    let mut params = prefill_sealed_params(&args, &tiles).unwrap();
    let plan = prefill_sealed_launch(&bounds, &mut params).unwrap();
    let options = Options { schedule: case.schedule, ..Options::default() };
    let (kernel, shared) = (plan.kernel, plan.shared_bytes);
    // SAFETY: every address is that of a buffer that lives to the end of this function or in `inputs`.
    unsafe { launch(kernel.name, plan.grid, kernel.threads, shared, &params, options).unwrap() };
    got
}

/// All rows of a case against the reference; the error flag.
fn check(case: Case) -> u32 {
    let inputs = Sealed::new(case);
    inputs.compare(&run(&inputs, 0, &inputs.q_indptr, &inputs.lens))
}

/// Ragged rows, none of some sequences, of others no context or more rows than tokens.
fn ragged() -> Case {
    let lengths = vec![(34, 200), (1, 64), (0, 65), (40, 40), (3, 0), (66, 65), (9, 320)];
    Case { lengths, kv_heads: 1, ..Case::default() }
}

#[test]
fn every_format_under_every_schedule() {
    for (i, format) in FORMATS.into_iter().enumerate() {
        for (j, dim) in [64, 128].into_iter().enumerate() {
            let schedule = Schedule::ALL[(2 * i + j) % 4];
            assert_eq!(check(Case { format, dim, schedule, seed: 7 + i as u64, ..ragged() }), 0);
        }
    }
}

#[test]
fn tiles_of_128_tokens_and_outliers() {
    for (i, format) in FORMATS.into_iter().enumerate() {
        let lengths = vec![(9, 400), (70, 200), (1, 129)];
        let dim = [64, 128][i % 2];
        // bf16 holds these queries; far from 0 what it rounds off others would show.
        let rows = DType::Bf16;
        let case = Case {
            format,
            dim,
            tokens: 128,
            lengths,
            rows,
            outliers: true,
            kv_heads: 1,
            ..Case::default()
        };
        assert_eq!(check(case), 0);
    }
}

#[test]
fn any_group_of_heads_and_rows_of_any_type() {
    for (i, (q_heads, kv_heads)) in [(1, 1), (6, 2), (9, 1), (16, 1)].into_iter().enumerate() {
        let rows = [DType::F32, DType::Bf16, DType::F16][i % 3];
        let lengths = vec![(9, 193), (70, 70), (3, 191)];
        let case =
            Case { q_heads, kv_heads, rows, lengths, staging: 2, csr: true, ..Case::default() };
        assert_eq!(check(case), 0);
    }
}

#[test]
fn unsealed_tiles_are_read_raw_or_reported() {
    let lengths = vec![(9, 300), (75, 140)];
    let case = Case { lengths, kv_heads: 1, q_heads: 2, ..Case::default() };
    // Before all rows, and among the tiles that rows fill: from there on rows read it raw.
    for (seq, tile) in [(0, 2), (1, 1)] {
        assert_eq!(check(Case { unsealed: Some((seq, tile, true)), ..case.clone() }), 0);
    }
    assert_eq!(check(Case { unsealed: Some((0, 1, false)), ..case.clone() }), 1);
    assert_eq!(check(Case { lost: Some((0, 3)), ..case.clone() }), 1);
    // Behind the window nothing is looked up.
    let window = Some(40);
    assert_eq!(check(Case { lost: Some((0, 2)), window, ..case.clone() }), 0);
    assert_eq!(check(Case { lost: Some((0, 3)), window, ..case }), 1);
}

#[test]
fn every_scoring_rule() {
    let lengths = vec![(33, 330), (66, 66), (2, 300)];
    for (i, format) in FORMATS.into_iter().enumerate() {
        let case = Case { format, lengths: lengths.clone(), kv_heads: 1, ..Case::default() };
        let window = Some([5, 64, 70, 200, 400][i]);
        assert_eq!(check(Case { window, ..case.clone() }), 0);
        let all = Case { softcap: Some(9.0), sinks: true, alibi: true, q_heads: 10, ..case };
        assert_eq!(check(Case { window, rows: DType::F32, ..all }), 0);
    }
}

/// More tiles than are found at a time.
#[test]
fn a_long_context() {
    let lengths = vec![(9, 64 * 34 + 5)];
    let case = Case { kv_heads: 1, q_heads: 2, lengths, ..Case::default() };
    assert_eq!(check(Case { unsealed: Some((0, 31, true)), ..case.clone() }), 0);
    assert_eq!(check(Case { lost: Some((0, 32)), ..case }), 1);
}

#[test]
fn random_batches() {
    let mut rng = Rng::new(11);
    for seed in 0..5 {
        let tokens = [64, 128][rng.below(2)];
        let lengths: Vec<_> = (0..1 + rng.below(4))
            .map(|_| {
                let len = rng.below(330);
                (rng.below(90).min(len), len)
            })
            .collect();
        let (kv_heads, group) = (1 + rng.below(2), 1 + rng.below(5));
        let outliers = rng.below(2) == 0;
        let case = Case {
            format: FORMATS[rng.below(5)],
            dim: [64, 128][rng.below(2)],
            tokens,
            kv_heads,
            q_heads: kv_heads * group,
            lengths,
            rows: if outliers { DType::Bf16 } else { DType::F16 },
            staging: rng.below(4),
            csr: rng.below(2) == 0,
            window: [None, Some(1 + rng.below(300) as u32)][rng.below(2)],
            outliers,
            schedule: Schedule::ALL[rng.below(4)],
            seed,
            ..Case::default()
        };
        assert_eq!(check(case), 0);
    }
}

#[test]
fn a_prompt_has_the_same_bits_in_chunks_and_alone() {
    for (format, window, tokens) in
        [(KvFormat::Kt4v4, None, 64), (KvFormat::Kt8v8, Some(90), 64), (KvFormat::Kt3v3, None, 128)]
    {
        let lengths = vec![(3, 70), (210, 290)];
        // A raw tile among those that rows fill, and rows whose blocks begin elsewhere in chunks.
        let unsealed = Some((1, if tokens == 64 { 2 } else { 0 }, true));
        let inputs = Sealed::new(Case {
            format,
            window,
            tokens,
            lengths,
            unsealed,
            q_heads: 6,
            ..Case::default()
        });
        let all = run(&inputs, 0, &inputs.q_indptr, &inputs.lens);
        assert_eq!(inputs.compare(&all), 0);
        let (whole, row) = (all.out.buffer.read::<u16>(), 6 * 64);
        let mut begin = 0usize;
        for end in [1, 49, 50, 114, 177, 210] {
            // The first sequence has no rows in these calls.
            let got =
                run(&inputs, 3 + begin, &[0, 0, (end - begin) as i32], &[70, (80 + end) as i32]);
            let want = &whole[(3 + begin) * row..(3 + end) * row];
            assert_eq!(&got.out.buffer.read::<u16>()[..want.len()], want, "{begin} to {end}");
            begin = end;
        }
    }
}
