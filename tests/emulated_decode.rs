//! Paged decode in the emulator, planned on the emulated device, against the reference in f64.
#![cfg(feature = "emulate")]

mod decode_call;
mod device;

use decode_call::{Call, Case, Tail, check};
use device::Rng;
use kvcache::dtype::DType;
use kvcache::emu::{Fibers, Schedule};
use kvcache::kernels::Pieces;

const HEAD_DIMS: [usize; 6] = [64, 80, 96, 128, 192, 256];

#[test]
fn every_instance_under_every_schedule() {
    for cache in [DType::F16, DType::Bf16] {
        for head_dim in HEAD_DIMS {
            for schedule in Schedule::ALL {
                for chunks in [false, true] {
                    let case = Case { cache, rows: cache, head_dim, schedule, ..Case::default() };
                    assert_eq!(check(Case { chunks, ..case }), 0);
                }
            }
        }
    }
}

#[test]
fn every_instance_with_everything() {
    for (i, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        for chunks in [false, true] {
            let case = Case {
                cache: [DType::F16, DType::Bf16][i % 2],
                rows: DType::F32,
                head_dim,
                q_heads: 10,
                block_tokens: 24,
                lengths: vec![(3, 401), (0, 30), (8, 99), (2, 0), (1, 1)],
                ragged: true,
                csr: i % 3 == 0,
                chunks,
                tail: Tail::Tree,
                window: Some(70),
                softcap: Some(9.0),
                sinks: true,
                alibi: true,
                multiprocessors: 2,
                schedule: Schedule::Seeded(i as u64),
                ..Case::default()
            };
            assert_eq!(check(case.clone()), 0);
            assert_eq!(check(Case { spoil: Some((0, 15, -1)), ..case }), 1);
        }
    }
}

#[test]
fn any_depth_of_the_pipeline() {
    for (head_dim, kib) in [(128, 228), (128, 164), (256, 100), (192, 100)] {
        for schedule in Schedule::ALL {
            for chunks in [false, true] {
                let multiprocessor_shared_bytes = kib * 1024;
                let lengths = vec![(1, 700), (1, 40)];
                let case = Case { head_dim, multiprocessor_shared_bytes, ..Case::default() };
                assert_eq!(check(Case { lengths, schedule, chunks, ..case }), 0);
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
    for (q_heads, kv_heads) in [(1, 1), (3, 3), (7, 1), (8, 1), (9, 1), (12, 2), (33, 1), (128, 2)]
    {
        let lengths = vec![(1, 70), (1, 17)];
        assert_eq!(check(Case { q_heads, kv_heads, lengths, ..Case::default() }), 0);
    }
    for q_heads in 1..=64 {
        assert_eq!(
            check(Case { q_heads, kv_heads: 1, lengths: vec![(1, 19)], ..Case::default() }),
            0
        );
    }
    for block_tokens in [1, 3, 8, 16, 32, 40, 48, 64, 128, 256] {
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
fn a_tail_mask_says_what_a_row_sees_of_the_last_tokens() {
    for rows in 1..=8 {
        let lengths = vec![(rows, 70), (rows, rows), (rows, rows - 1), (rows, 0), (rows, 257)];
        for tail in [Tail::Tree, Tail::Bits] {
            assert_eq!(check(Case { lengths: lengths.clone(), tail, ..Case::default() }), 0);
        }
        // Positions of a tree's tokens are those in its paths.
        for window in [1, 2, 3, 5, 60] {
            let case = Case { lengths: lengths.clone(), tail: Tail::Tree, ..Case::default() };
            assert_eq!(check(Case { window: Some(window), alibi: true, ..case }), 0);
        }
    }
    let lengths = vec![(1, 90), (8, 131), (0, 40), (2, 1), (5, 5)];
    assert_eq!(check(Case { lengths, ragged: true, tail: Tail::Tree, ..Case::default() }), 0);
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

/// The bits of one sequence's rows, whatever else is in the batch and wherever it stands there.
#[test]
fn fixed_pieces_give_a_sequence_the_same_bits_in_any_batch() {
    let bits = |lengths: Vec<(usize, usize)>, names: Vec<u64>, base: &Case| {
        let place = names.iter().position(|&name| name == 7).unwrap();
        let case = Case { lengths, names, ..base.clone() };
        assert_eq!(check(case.clone()), 0);
        let call = Call::new(case);
        let row = call.case.q_heads * call.case.head_dim;
        let (first, rows) = (call.q_indptr[place] as usize, call.case.lengths[place].0);
        call.run(1).out.buffer.read::<u16>()[first * row..(first + rows) * row].to_vec()
    };
    for (window, chunks) in [(None, false), (None, true), (Some(300), false)] {
        let base = Case { pieces: Pieces::Fixed(128), window, chunks, ..Case::default() };
        let alone = bits(vec![(2, 1000)], vec![7], &base);
        let others = [
            (vec![(2, 1000), (2, 40)], vec![7, 1]),
            (vec![(2, 3), (2, 700), (2, 0), (2, 1000), (2, 1400)], vec![1, 2, 3, 7, 4]),
            (
                vec![(2, 64); 30].into_iter().chain([(2, 1000)]).collect(),
                (10..40).chain([7]).collect(),
            ),
        ];
        for (i, (lengths, names)) in others.into_iter().enumerate() {
            let (schedule, multiprocessors) = (Schedule::Seeded(i as u64), 1 + 9 * i as u32);
            let together =
                bits(lengths, names, &Case { schedule, multiprocessors, ..base.clone() });
            assert!(together == alone, "batch {i}, window {window:?}, chunks {chunks}");
        }
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
            codes: None,
            rows: rng.pick(&[DType::F32, DType::F16, DType::Bf16]),
            head_dim: rng.pick(&HEAD_DIMS),
            q_heads: kv_heads * rng.pick(&[1, 2, 4, 5, 8, 12, 64]),
            kv_heads,
            block_tokens: rng.pick(&[1, 7, 8, 16, 24, 32, 128]),
            lengths,
            ragged,
            csr: any(&mut rng),
            nhd: any(&mut rng),
            causal: rng.below(4) != 0,
            tail: rng.pick(&[Tail::Plain, Tail::Plain, Tail::Tree]),
            window: any(&mut rng).then(|| 1 + rng.below(200) as u32),
            softcap: any(&mut rng).then(|| 1.0 + rng.below(30) as f32),
            sinks: any(&mut rng),
            alibi: any(&mut rng),
            pieces: rng.pick(&[Pieces::Balanced, Pieces::Fixed(64), Pieces::Fixed(256)]),
            multiprocessors: rng.pick(&[1, 4, 60]),
            multiprocessor_shared_bytes: 1024 * rng.pick(&[100, 164, 228]),
            chunks: any(&mut rng),
            spoil: None,
            schedule: Schedule::Seeded(round),
            fibers: Fibers::Native,
            seed: round,
            names: Vec::new(),
        });
    }
}
