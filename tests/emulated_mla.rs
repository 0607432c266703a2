//! Multi-head latent attention decode in the emulator, of floats and of rows of codes, against the
//! reference in f64.
#![cfg(feature = "emulate")]

mod device;
mod mla_call;

use device::Rng;
use device::codes::Codes;
use kvcache::dtype::{DType, KvFormat};
use kvcache::emu::{Fibers, Schedule};
use kvcache::kernels::Pieces;
use mla_call::{Call, Case, VALUES, check};

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
    }
    // Codes in turns.
    for (i, q_heads) in (16..=128).step_by(7).chain([31, 32, 33, 128]).enumerate() {
        let codes = plain(FORMATS[i % 4]);
        assert_eq!(check(Case { codes, q_heads, lengths: vec![(1, 5)], ..Case::default() }), 0);
    }
}

#[test]
fn any_block_size_table_and_stride() {
    for (i, block_tokens) in [1, 3, 16, 48, 256].into_iter().enumerate() {
        for (csr, gap) in [(false, 8), (true, 0)] {
            for codes in [None, plain(FORMATS[(i + gap / 8) % 4])] {
                let case = Case { codes, block_tokens, csr, gap, ..Case::default() };
                assert_eq!(check(case), 0);
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
    for (i, id) in [-1, i32::MIN, i32::MAX, 14].into_iter().enumerate() {
        for (seq, entry) in [(0, 2), (1, 0), (3, 2)] {
            for codes in [None, plain(FORMATS[(i + seq) % 4])] {
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
    let codes = FORMATS.into_iter().map(plain).zip(Schedule::ALL);
    for (codes, schedule) in Schedule::ALL.map(|schedule| (None, schedule)).into_iter().chain(codes)
    {
        let lengths = lengths.clone();
        let case = Case { codes, lengths, schedule, multiprocessors: 6, ..Case::default() };
        assert_eq!(check(case), 0);
    }
    for codes in [None, plain(KvFormat::Fp8E4m3), plain(KvFormat::Int4T)] {
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
