//! Paged decode over sealed tiles and raw ones in the emulator, against the reference in f64 over what
//! each query is to read: its own tile raw, those before it sealed.
#![cfg(feature = "emulate")]

mod device;

use device::sealed::{Case, FORMATS, Got, Sealed};
use kvcache::dtype::DType;
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::kernels::params::{In, Out};
use kvcache::kernels::{DecodeBounds, DecodePlan, Pieces};

/// A call of the rows that begin at `first_row`: their offsets and how long the sequences are.
fn run(inputs: &Sealed, first_row: usize, q_indptr: &[i32], lens: &[i32]) -> Got {
    let case = &inputs.case;
    let plan = DecodePlan::new(DecodeBounds {
        format: case.format,
        head_dim: case.dim as u32,
        tile_tokens: case.tokens as u32,
        q_heads: case.q_heads as u32,
        kv_heads: case.kv_heads as u32,
        q_len: case.lengths.iter().map(|l| l.0).max().unwrap() as u32,
        batch: lens.len() as u32,
        max_tokens: case.lengths.iter().map(|l| l.1).max().unwrap() as u32,
        pieces: case.pieces,
        multiprocessors: case.multiprocessors,
        multiprocessor_shared_bytes: case.shared_kib * 1024,
    })
    .unwrap();
    let got = inputs.room(q_indptr[lens.len()] as usize);
    let (q_rows, lens_there) = (Buffer::of(q_indptr).unwrap(), Buffer::of(lens).unwrap());
    let workspace = Buffer::new(plan.workspace_bytes() as usize).unwrap();
    let (_, mut params) = inputs.args(&got, first_row, &q_rows, &lens_there);
    let (first, plan_params) = plan
        .plan_launch(
            workspace.address(),
            In::at(lens_there.address()),
            lens.len() as u32,
            case.window,
            Out::at(got.flag.address()),
        )
        .unwrap();
    let second = plan.decode_tile_launch(workspace.address(), &mut params).unwrap();
    params.call.bulk = u32::from(case.bulk);
    let options = Options { schedule: case.schedule, ..Options::default() };
    // SAFETY: every address is that of a buffer that lives to the end of this function or in `inputs`.
    unsafe {
        let (kernel, shared) = (first.kernel, first.shared_bytes);
        launch(kernel.name, first.grid, kernel.threads, shared, &plan_params, options).unwrap();
        let (kernel, shared) = (second.kernel, second.shared_bytes);
        launch(kernel.name, second.grid, kernel.threads, shared, &params, options).unwrap();
    }
    got
}

fn check(case: Case) -> u32 {
    let inputs = Sealed::new(case);
    inputs.compare(&run(&inputs, 0, &inputs.q_indptr, &inputs.lens))
}

#[test]
fn every_instance_under_every_schedule() {
    for format in FORMATS {
        for dim in [64, 128] {
            for (i, schedule) in Schedule::ALL.into_iter().enumerate() {
                let case = Case { format, dim, schedule, bulk: i % 2 == 0, ..Case::default() };
                assert_eq!(check(case), 0);
            }
        }
    }
}

/// bf16 rounds queries; with those that it holds exactly, sealed tiles must be met closely.
#[test]
fn tiles_of_128_tokens_and_outliers() {
    for format in FORMATS {
        let lengths = vec![(1, 700), (1, 129), (2, 257)];
        let case = Case { format, tokens: 128, lengths, outliers: true, ..Case::default() };
        assert_eq!(check(Case { dim: 128, ..case.clone() }), 0);
        assert_eq!(check(Case { shared_kib: 100, bulk: false, ..case }), 0);
    }
}

#[test]
fn rows_on_both_sides_of_a_tile() {
    for rows in [2, 5, 8] {
        let lengths = (0..=rows + 1).map(|past| (rows, 192 + past)).collect();
        let case = Case { lengths, q_heads: 6, staging: 3, csr: true, ..Case::default() };
        assert_eq!(check(case), 0);
    }
}

#[test]
fn unsealed_tiles_are_read_raw_or_reported() {
    let lengths = vec![(1, 300), (2, 130)];
    for bulk in [false, true] {
        let case = Case { lengths: lengths.clone(), bulk, ..Case::default() };
        assert_eq!(check(Case { unsealed: Some((0, 2, true)), ..case.clone() }), 0);
        assert_eq!(check(Case { unsealed: Some((0, 1, false)), ..case.clone() }), 1);
        assert_eq!(check(Case { lost: Some((0, 3)), ..case }), 1);
    }
}

#[test]
fn every_scoring_rule_and_any_pieces() {
    let lengths = vec![(2, 1000), (2, 65), (2, 2), (2, 300)];
    for (i, format) in FORMATS.into_iter().enumerate() {
        let case =
            Case { format, lengths: lengths.clone(), multiprocessors: 16, ..Case::default() };
        for window in [5, 70, 400] {
            assert_eq!(check(Case { window: Some(window), ..case.clone() }), 0);
        }
        assert_eq!(check(Case { negative: true, ..case.clone() }), 0);
        let all = Case { softcap: Some(9.0), sinks: true, alibi: true, q_heads: 10, ..case };
        let pieces = [Pieces::Balanced, Pieces::Fixed(64), Pieces::Fixed(256)][i % 3];
        assert_eq!(check(Case { window: Some(333), pieces, rows: DType::F32, ..all }), 0);
    }
}

/// The beginning of the window of the last of them, but of no other, lies past that of a tile: a tile
/// that some see whole is, for all of them together, one of which some tokens may be hidden.
#[test]
fn rows_of_a_window_have_the_same_bits_together_and_alone() {
    for format in FORMATS {
        let inputs = Sealed::new(Case {
            format,
            lengths: vec![(8, 136)],
            rows: DType::F32,
            window: Some(68),
            pieces: Pieces::Fixed(256),
            ..Case::default()
        });
        let together = run(&inputs, 0, &inputs.q_indptr, &inputs.lens);
        assert_eq!(inputs.compare(&together), 0);
        let (all, row) = (together.out.buffer.read::<u32>(), inputs.case.q_heads * inputs.case.dim);
        for i in 0..8 {
            let alone = run(&inputs, i, &[0, 1], &[129 + i as i32]).out.buffer.read::<u32>();
            assert_eq!(alone[..row], all[i * row..][..row], "{format:?}, row {i}");
        }
    }
}
