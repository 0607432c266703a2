//! The conformance table: every CPU level, format, layout and scoring rule against the reference.
//!
//! Inputs are random (seeded), outputs are poisoned with NaN, and errors are compared as
//! `!(error <= tolerance)`, so that NaN fails. `KVCACHE_CONFORMANCE=small` runs a part of the
//! table, for emulated machines.

mod attention_case;

use attention_case::{Case, Layout, Rng, Tables, levels};
use kvcache::attention::HeadShape;
use kvcache::dtype::{DType, KvFormat};

fn shape(q_heads: u32, kv_heads: u32, k_dim: u32, v_dim: u32) -> HeadShape {
    HeadShape { q_heads, kv_heads, k_dim, v_dim, v_in_k: false }
}

fn small() -> bool {
    std::env::var_os("KVCACHE_CONFORMANCE").is_some_and(|value| value == "small")
}

/// Runs a case at every level that this machine has.
fn check(case: &Case) {
    let instance = case.build();
    for level in levels() {
        instance.check(level);
    }
}

#[test]
fn every_format_and_query_type() {
    for &format in KvFormat::FLOATS {
        for (q_dtype, out_dtype) in [
            (DType::F32, DType::F32),
            (DType::F16, DType::F16),
            (DType::Bf16, DType::Bf16),
            (DType::Bf16, DType::F32),
        ] {
            check(&Case { format, q_dtype, out_dtype, ..Case::default() });
        }
    }
}

#[test]
fn every_layout_and_block_size() {
    for layout in [Layout::Native, Layout::Nhd, Layout::Hnd] {
        for tables in [Tables::Dense, Tables::Csr] {
            for block_tokens in [1, 5, 16, 32, 64, 256] {
                for format in [KvFormat::F32, KvFormat::Bf16] {
                    if small() && (block_tokens == 5 || format == KvFormat::F32) {
                        continue;
                    }
                    check(&Case { layout, tables, block_tokens, format, ..Case::default() });
                }
            }
        }
    }
}

#[test]
fn every_group_and_head_dim() {
    let shapes = [
        shape(2, 2, 64, 64),
        shape(8, 2, 128, 128),
        shape(8, 1, 64, 64),
        shape(14, 2, 64, 64),
        shape(6, 2, 32, 32),
        shape(4, 2, 96, 96),
        shape(5, 1, 80, 80),
        shape(20, 1, 40, 40),
        shape(2, 1, 8, 8),
        shape(2, 1, 24, 16),
        shape(4, 1, 192, 128),
        shape(2, 2, 256, 256),
        shape(3, 1, 16, 256),
        shape(4, 4, 72, 104),
        shape(150, 1, 16, 16),
    ];
    for shape in shapes {
        for &format in KvFormat::FLOATS {
            check(&Case { shape, format, ..Case::default() });
            if small() {
                break;
            }
        }
    }
}

#[test]
fn every_head_dim_from_8_to_256() {
    for dim in (8..=256).step_by(if small() { 88 } else { 8 }) {
        let lengths = vec![(1, 21), (9, 21)];
        let shape = shape(4, 2, dim, 264 - dim);
        check(&Case { shape, lengths, format: KvFormat::F16, ..Case::default() });
    }
}

#[test]
fn latent_attention() {
    let latent = HeadShape { q_heads: 16, kv_heads: 1, k_dim: 576, v_dim: 512, v_in_k: true };
    for &format in KvFormat::FLOATS {
        let lengths = vec![(1, 200), (3, 70), (1, 1)];
        check(&Case { shape: latent, lengths, format, block_tokens: 64, ..Case::default() });
        if small() {
            break;
        }
    }
    let wide = HeadShape { q_heads: 128, ..latent };
    let lengths = vec![(1, 67), (2, 33)];
    check(&Case { shape: wide, lengths, format: KvFormat::Bf16, ..Case::default() });
    let few = HeadShape { q_heads: 4, k_dim: 72, v_dim: 40, ..latent };
    check(&Case { shape: few, format: KvFormat::Bf16, ..Case::default() });
}

#[test]
fn every_scoring_rule() {
    let base = Case { format: KvFormat::Bf16, ..Case::default() };
    check(&Case { causal: false, ..base.clone() });
    // Without a causal mask a sequence may have more queries than keys.
    check(&Case { causal: false, lengths: vec![(7, 3), (40, 2), (3, 0)], ..base.clone() });
    for window in [1, 2, 16, 100, 5000] {
        check(&Case { window: Some(window), ..base.clone() });
        check(&Case { window: Some(window), causal: false, ..base.clone() });
    }
    check(&Case { softcap: Some(5.0), ..base.clone() });
    check(&Case { sinks: true, ..base.clone() });
    check(&Case { alibi: true, ..base.clone() });
    check(&Case { scale: Some(3.0), ..base.clone() });
    check(&Case { scale: Some(0.0), ..base.clone() });
    check(&Case {
        window: Some(33),
        softcap: Some(2.0),
        sinks: true,
        alibi: true,
        scale: Some(0.5),
        ..base
    });
}

#[test]
fn long_contexts_are_split() {
    if small() {
        return;
    }
    let shape = shape(4, 1, 32, 32);
    let lengths = vec![(1, 2048), (1, 2049), (2, 5000), (40, 4500), (1, 70), (1, 40_000)];
    let base = Case { shape, lengths, format: KvFormat::F16, ..Case::default() };
    check(&base);
    check(&Case { window: Some(2050), sinks: true, ..base.clone() });
    check(&Case { alibi: true, ..base });
}

#[test]
fn random_cases() {
    let mut rng = Rng::new(0x5eed);
    for round in 0..if small() { 10 } else { 150 } {
        check(&Case::random(&mut rng, round));
    }
}

#[test]
fn bad_table_entries_are_masked_and_reported() {
    let mut rng = Rng::new(77);
    for bad in [-1, i32::MIN, i32::MAX, 10_000] {
        for block_tokens in [1, 16] {
            let case = Case { block_tokens, format: KvFormat::Bf16, ..Case::default() };
            let mut instance = case.build();
            for level in levels() {
                assert!(!instance.check(level), "no entry is bad yet");
            }
            instance.spoil(&mut rng, bad);
            for level in levels() {
                assert!(instance.check(level), "a bad entry must raise the flag");
            }
        }
    }
}

#[test]
fn what_a_window_hides_is_not_looked_up() {
    let case = Case {
        window: Some(16),
        lengths: vec![(1, 100), (4, 90)],
        block_tokens: 16,
        ..Case::default()
    };
    let mut instance = case.build();
    instance.set_entries(&[(0, 0..5), (1, 0..4)], -1);
    for level in levels() {
        assert!(!instance.check(level), "blocks behind the window may be gone");
    }
}

#[test]
fn bits_depend_on_neither_threads_nor_neighbours() {
    let lengths = vec![(1, 5000), (1, 17), (33, 3000), (2, 2100), (100, 100), (1, 0)];
    bits_are_the_same(Case { shape: shape(8, 2, 64, 64), lengths, ..Case::default() });
}

/// Rows of 128 channels side by side are read by straight code as far as the worker knows what it
/// reads next, and by other code after that.
#[test]
fn bits_depend_on_neither_threads_nor_neighbours_where_code_is_straight() {
    let lengths = vec![(1, 1100), (1, 130), (2, 590), (1, 64)];
    let shape = shape(16, 4, 128, 128);
    bits_are_the_same(Case { shape, lengths, block_tokens: 64, ..Case::default() });
}

#[test]
fn straight_code_is_right() {
    let lengths = vec![(1, 300), (2, 195), (1, 128)];
    for shape in [shape(16, 4, 128, 128), shape(4, 4, 128, 128)] {
        for block_tokens in [16, 64] {
            for (format, q_dtype) in [
                (KvFormat::F32, DType::F32),
                (KvFormat::F16, DType::F16),
                (KvFormat::Bf16, DType::Bf16),
                (KvFormat::Bf16, DType::F32),
            ] {
                let lengths = lengths.clone();
                check(&Case { shape, lengths, block_tokens, format, q_dtype, ..Case::default() });
                if small() {
                    return;
                }
            }
        }
    }
}

fn bits_are_the_same(base: Case) {
    let (formats, crews) = if small() {
        (&[KvFormat::Bf16][..], &[3][..])
    } else {
        (KvFormat::FLOATS, &[2, 3, 7][..])
    };
    for &format in formats {
        for window in [None, Some(2500)] {
            let case = Case { format, window, ..base.clone() };
            let instance = case.build();
            for level in levels() {
                let (want, want_lse) = instance.run(level, 1);
                for &threads in crews {
                    let (got, lse) = instance.run(level, threads);
                    assert!(got == want && lse == want_lse, "{threads} threads");
                }
                for s in 0..case.lengths.len() {
                    let (got, lse) = instance.run_alone(level, s);
                    let (rows, row) = instance.rows_of(s);
                    assert!(got == want[rows], "sequence {s} alone");
                    assert!(lse == want_lse[row], "sequence {s} alone");
                }
            }
        }
    }
}

#[test]
fn parts_merge_to_the_whole() {
    let case = Case { causal: false, lengths: vec![(3, 300), (1, 77)], ..Case::default() };
    let instance = case.build();
    for level in levels() {
        instance.check_parts(level, &[96, 32]);
    }
}
