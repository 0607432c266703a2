//! The merge kernel in the emulator, against the pairwise merge of `attention`.
#![cfg(feature = "emulate")]

mod device;

use device::{Rng, Values};
use kvcache::attention::merge_states;
use kvcache::dtype::DType;
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::kernels::merge_launch;
use kvcache::kernels::params::{In, MergeParams, Out};

#[derive(Debug, Clone, Copy)]
struct Case {
    parts: DType,
    out: DType,
    count: usize,
    rows: usize,
    heads: usize,
    dim: usize,
    /// LSE as `[head][row]`, else `[row][head]`.
    heads_first: bool,
    sinks: bool,
    /// How far apart the LSE of parts are.
    spread: f32,
    multiprocessors: u32,
    schedule: Schedule,
}

const BASE: Case = Case {
    parts: DType::F32,
    out: DType::F32,
    count: 3,
    rows: 7,
    heads: 4,
    dim: 64,
    heads_first: false,
    sinks: false,
    spread: 3.0,
    multiprocessors: 2,
    schedule: Schedule::Forward,
};

const GAP: usize = 8;

fn check(case: Case) {
    let Case { count, rows, heads, dim, .. } = case;
    let mut rng = Rng::new((count * 1000 + rows * 10 + dim) as u64);
    let lines = rows * heads;
    // Parts lie apart, by poison.
    let part = lines * dim + GAP;
    let mut values = vec![f32::NAN; count * part];
    let mut lse = vec![f32::NEG_INFINITY; count * lines];
    for line in 0..lines {
        for i in 0..count {
            // Row 0 saw no key in any part; others lack some parts, whose outputs are poison.
            if line < heads || rng.below(4) == 0 {
                continue;
            }
            lse[i * lines + line] = 20.0 + case.spread * rng.normal();
            for c in 0..dim {
                values[i * part + line * dim + c] = rng.normal();
            }
        }
    }
    let sinks: Vec<f32> = (0..heads).map(|_| 20.0 + case.spread * rng.normal()).collect();
    let given = Values::new(case.parts, &values);

    let mut want = vec![0f32; lines * dim];
    let mut want_lse = vec![f32::NEG_INFINITY; lines];
    for i in 0..count {
        let other: Vec<f32> =
            given.values[i * part..][..lines * dim].iter().map(|&x| x as f32).collect();
        merge_states(&mut want, &mut want_lse, &other, &lse[i * lines..][..lines], dim).unwrap();
    }
    if case.sinks {
        // A sink is a part of value 0 that rows which saw no key do without.
        let sink = |line: usize| match want_lse[line] {
            f32::NEG_INFINITY => f32::NEG_INFINITY,
            _ => sinks[line % heads],
        };
        let sinks: Vec<f32> = (0..lines).map(sink).collect();
        merge_states(&mut want, &mut want_lse, &vec![0.0; lines * dim], &sinks, dim).unwrap();
    }

    let (lse_row, lse_head) = if case.heads_first { (1, rows) } else { (heads, 1) };
    let mut placed = lse.clone();
    for i in 0..count {
        for line in 0..lines {
            let at = line / heads * lse_row + line % heads * lse_head;
            placed[i * lines + at] = lse[i * lines + line];
        }
    }
    let (lse_at, sinks_at) = (Buffer::of(&placed).unwrap(), Buffer::of(&sinks).unwrap());
    let out = Values::new(case.out, &vec![f32::NAN; lines * dim]);
    let out_lse = Buffer::new(lines * 4).unwrap();
    let params = MergeParams {
        parts: In::at(given.address()),
        lse: In::at(lse_at.address()),
        out: Out::at(out.address()),
        out_lse: Out::at(out_lse.address()),
        sinks: if case.sinks { In::at(sinks_at.address()) } else { In::NULL },
        part: part as i64,
        row: (heads * dim) as i64,
        head: dim as i64,
        lse_part: lines as i64,
        lse_row: lse_row as i64,
        lse_head: lse_head as i64,
        out_row: (heads * dim) as i64,
        out_head: dim as i64,
        out_lse_row: lse_row as i64,
        out_lse_head: lse_head as i64,
        count: count as u32,
        rows: rows as u32,
        heads: heads as u32,
        dim: dim as u32,
        part_dtype: case.parts.id(),
        out_dtype: case.out.id(),
    };
    let plan = merge_launch(&params, case.multiprocessors).unwrap().unwrap();
    let options = Options { schedule: case.schedule, ..Options::default() };
    let run = |params: &MergeParams| {
        // SAFETY: every address is that of a buffer that lives to the end of this function.
        unsafe { launch(plan.kernel.name, plan.grid, plan.kernel.threads, 0, params, options) }
            .unwrap();
    };
    run(&params);
    let want: Vec<f64> = want.iter().map(|&x| f64::from(x)).collect();
    // The reference rounds the LSE at each of its steps, which is the relative error of a weight.
    let largest =
        lse.iter().chain(&sinks).filter(|x| x.is_finite()).fold(1f32, |a, x| a.max(x.abs()));
    let tolerance = f64::from(largest) * 1.2e-7 * (count + 1) as f64 + 2e-6;
    out.must_be(&want, tolerance, &format!("{case:?}"));
    let got_lse = out_lse.read::<f32>();
    for line in 0..lines {
        let (got, want) =
            (got_lse[line / heads * lse_row + line % heads * lse_head], want_lse[line]);
        let good = got == want || f64::from((got - want).abs()) <= tolerance;
        assert!(good, "{case:?} LSE {line}: {got}, not {want}");
    }
    let before = out.read();
    run(&MergeParams { out_lse: Out::NULL, ..params });
    assert_eq!(out.read(), before);
}

#[test]
fn every_pair_of_types() {
    for parts in [DType::F32, DType::F16, DType::Bf16] {
        for out in [DType::F32, DType::F16, DType::Bf16] {
            for schedule in Schedule::ALL {
                check(Case { parts, out, schedule, ..BASE });
            }
        }
    }
}

#[test]
fn any_number_of_parts() {
    for count in [1, 2, 3, 4, 5, 17] {
        for parts in [DType::F32, DType::Bf16] {
            check(Case { count, parts, ..BASE });
            check(Case { count, parts, sinks: true, heads_first: true, ..BASE });
        }
    }
}

#[test]
fn any_shape() {
    for (rows, heads, dim) in [(1, 1, 8), (2, 3, 24), (5, 1, 576), (3, 12, 128), (40, 2, 256)] {
        for multiprocessors in [1, 100] {
            check(Case { rows, heads, dim, multiprocessors, ..BASE });
        }
    }
}

#[test]
fn weights_that_vanish() {
    // Parts that differ by hundreds: the smaller ones' weights are 0, or denormal.
    for spread in [30.0, 100.0, 1000.0] {
        check(Case { spread, count: 4, sinks: true, ..BASE });
    }
}
