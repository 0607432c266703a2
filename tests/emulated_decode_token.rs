//! Paged decode over rows of codes in the emulator, against the reference in f64 over what the codes
//! say.
#![cfg(feature = "emulate")]

mod decode_call;
mod device;

use decode_call::{Call, Case, Codes, Tail, check};
use device::Rng;
use kvcache::dtype::{DType, KvFormat};
use kvcache::emu::{Fibers, Schedule};
use kvcache::kernels::Pieces;

const FORMATS: [KvFormat; 5] =
    [KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Int8T, KvFormat::Int4T, KvFormat::Nvfp4];

const DIMS: [usize; 6] = [64, 80, 96, 128, 192, 256];

fn plain(format: KvFormat) -> Option<Codes> {
    Some(Codes { format, rotated: true, heads: false })
}

/// Rows whose tiles have half as many tokens, and those with the most scales.
const LARGE: [(KvFormat, usize); 2] = [(KvFormat::Int8T, 256), (KvFormat::Nvfp4, 256)];

fn has_heads(format: KvFormat) -> bool {
    matches!(format, KvFormat::Fp8E4m3 | KvFormat::Fp8E5m2 | KvFormat::Nvfp4)
}

#[test]
fn every_instance_under_every_schedule() {
    for (i, format) in FORMATS.into_iter().enumerate() {
        for (j, head_dim) in DIMS.into_iter().enumerate() {
            let some = [64, 128].contains(&head_dim);
            let schedules = Schedule::ALL.into_iter().enumerate();
            for (_, schedule) in schedules.filter(|(n, _)| some || *n == (i + j) % 4) {
                for chunks in [false, true] {
                    let codes = plain(format);
                    let case = Case { codes, head_dim, schedule, chunks, ..Case::default() };
                    assert_eq!(check(case), 0);
                }
            }
        }
    }
}

#[test]
fn scales_of_heads_and_keys_as_they_are() {
    for format in FORMATS {
        let codes = Some(Codes { format, rotated: false, heads: has_heads(format) });
        if format != KvFormat::Int4T {
            assert_eq!(check(Case { codes, nhd: true, ..Case::default() }), 0);
        }
    }
}

#[test]
fn every_instance_with_everything() {
    for (i, format) in FORMATS.into_iter().enumerate() {
        for head_dim in DIMS {
            let block_tokens = [24, 16, 32][(i + head_dim / 16) % 3];
            let case = Case {
                codes: Some(Codes { format, rotated: true, heads: has_heads(format) }),
                rows: [DType::F32, DType::F16, DType::Bf16][i % 3],
                head_dim,
                q_heads: 10,
                block_tokens,
                lengths: vec![(3, 401), (0, 30), (8, 99), (2, 0), (1, 1)],
                ragged: true,
                csr: i % 2 == 0,
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
            // Of a token in the window.
            assert_eq!(check(Case { spoil: Some((0, 370 / block_tokens, -1)), ..case }), 1);
        }
    }
}

#[test]
fn any_depth_of_the_pipeline_and_any_pieces() {
    for (format, head_dim) in FORMATS.into_iter().map(|format| (format, 128)).chain(LARGE) {
        for kib in [228, 100, 48] {
            // Two tiles of rows of 256 bytes take 64 KiB.
            let kib = if head_dim == 256 { kib.max(72) } else { kib };
            let lengths = [(1, 700), (1, 40), (2, 0)];
            let lengths =
                if kib == 48 { vec![(1, 1500), (1, 5), (1, 0)] } else { lengths[..2].to_vec() };
            let case = Case {
                codes: plain(format),
                head_dim,
                lengths,
                multiprocessor_shared_bytes: kib * 1024,
                multiprocessors: 16,
                ..Case::default()
            };
            assert_eq!(check(case), 0);
        }
    }
}

#[test]
fn any_block_size() {
    for (i, block_tokens) in [1, 3, 8, 16, 40, 64, 256].into_iter().enumerate() {
        let case =
            Case { codes: plain(FORMATS[i % 5]), block_tokens, nhd: i % 2 == 0, ..Case::default() };
        assert_eq!(check(case), 0);
    }
}

#[test]
fn fixed_pieces_give_a_sequence_the_same_bits_in_any_batch() {
    for format in FORMATS {
        let bits = |lengths: Vec<(usize, usize)>, names: Vec<u64>| {
            let place = names.iter().position(|&name| name == 7).unwrap();
            let pieces = Pieces::Fixed(128);
            let call =
                Call::new(Case { codes: plain(format), lengths, names, pieces, ..Case::default() });
            let row = call.case.q_heads * call.case.head_dim;
            let (first, rows) = (call.q_indptr[place] as usize, call.case.lengths[place].0);
            call.run(1).out.buffer.read::<u16>()[first * row..(first + rows) * row].to_vec()
        };
        let alone = bits(vec![(2, 600)], vec![7]);
        assert!(
            alone == bits(vec![(2, 3), (2, 300), (2, 600), (2, 0)], vec![1, 2, 7, 3]),
            "{format:?}"
        );
    }
}

#[test]
fn random_cases() {
    let rounds = std::env::var("KVCACHE_EMU_ROUNDS").map_or(30, |n| n.parse().unwrap());
    let mut rng = Rng::new(0xc0de);
    for round in 0..rounds {
        let kv_heads = rng.pick(&[1, 2, 3]);
        let q_len = rng.pick(&[1, 1, 2, 8]);
        let lengths: Vec<(usize, usize)> = (0..1 + rng.below(4))
            .map(|_| (q_len, rng.pick(&[0, 1, 15, 63, 64, 65, 130, 400]) + rng.below(3)))
            .collect();
        let any = |rng: &mut Rng| rng.below(3) == 0;
        let format = rng.pick(&FORMATS);
        check(Case {
            codes: Some(Codes {
                format,
                rotated: format == KvFormat::Int4T || any(&mut rng),
                heads: has_heads(format) && any(&mut rng),
            }),
            rows: rng.pick(&[DType::F32, DType::F16, DType::Bf16]),
            head_dim: rng.pick(&DIMS),
            q_heads: kv_heads * rng.pick(&[1, 2, 5, 8, 12]),
            kv_heads,
            block_tokens: rng.pick(&[1, 7, 8, 16, 24, 32, 128]),
            lengths,
            csr: any(&mut rng),
            nhd: any(&mut rng),
            chunks: any(&mut rng),
            causal: rng.below(4) != 0,
            tail: rng.pick(&[Tail::Plain, Tail::Plain, Tail::Tree]),
            window: any(&mut rng).then(|| 1 + rng.below(200) as u32),
            softcap: any(&mut rng).then(|| 1.0 + rng.below(30) as f32),
            sinks: any(&mut rng),
            alibi: any(&mut rng),
            pieces: rng.pick(&[Pieces::Balanced, Pieces::Fixed(64), Pieces::Fixed(256)]),
            multiprocessors: rng.pick(&[1, 4, 60]),
            multiprocessor_shared_bytes: 1024 * rng.pick(&[100, 164, 228]),
            schedule: Schedule::Seeded(round),
            fibers: Fibers::Native,
            seed: round,
            ..Case::default()
        });
    }
}
