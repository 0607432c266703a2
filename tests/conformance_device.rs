//! The conformance table on devices: the emulator where it is built in, a GPU where there is one
//! (`KVCACHE_REQUIRE_GPU=1` makes a missing one a failure). Contexts are short: what they must
//! cover is every rule and shape, not time.
#![cfg(any(feature = "emulate", feature = "cuda"))]

#[allow(dead_code)]
mod attention_case;
mod backends;

use attention_case::{Case, Layout, Rng, Tables};
use kvcache::attention::HeadShape;
use kvcache::dtype::{DType, KvFormat};

const FORMATS: [KvFormat; 2] = [KvFormat::F16, KvFormat::Bf16];

fn shape(q_heads: u32, kv_heads: u32, dim: u32) -> HeadShape {
    HeadShape { q_heads, kv_heads, k_dim: dim, v_dim: dim, v_in_k: false }
}

fn base() -> Case {
    Case {
        format: KvFormat::Bf16,
        lengths: vec![(1, 100), (1, 1), (5, 5), (1, 0), (0, 9), (2, 64), (8, 83), (0, 0)],
        ..Case::default()
    }
}

fn check(case: &Case) {
    let instance = case.build();
    for backend in backends::all() {
        assert!(!instance.check_on(&backend), "no entry is bad: {case:?}");
    }
}

#[test]
fn every_format_and_row_type() {
    for format in FORMATS {
        for (q_dtype, out_dtype) in [
            (DType::F32, DType::F32),
            (DType::F16, DType::F16),
            (DType::Bf16, DType::Bf16),
            (DType::Bf16, DType::F32),
        ] {
            check(&Case { format, q_dtype, out_dtype, ..base() });
        }
    }
}

#[test]
fn every_layout_and_block_size() {
    for layout in [Layout::Native, Layout::Nhd, Layout::Hnd] {
        for tables in [Tables::Dense, Tables::Csr] {
            for block_tokens in [1, 5, 16, 32, 64, 256] {
                check(&Case { layout, tables, block_tokens, ..base() });
            }
        }
    }
}

#[test]
fn every_group_and_head_dim() {
    for (q_heads, kv_heads) in [(2, 2), (8, 1), (14, 2), (3, 1), (64, 1), (9, 3)] {
        for format in FORMATS {
            for dim in [64, 128] {
                let lengths = vec![(1, 70), (3, 21), (1, 0)];
                check(&Case { shape: shape(q_heads, kv_heads, dim), format, lengths, ..base() });
            }
        }
    }
}

#[test]
fn every_scoring_rule() {
    check(&Case { causal: false, ..base() });
    check(&Case { causal: false, lengths: vec![(7, 3), (8, 2), (3, 0)], ..base() });
    for window in [1, 2, 16, 100, 5000] {
        check(&Case { window: Some(window), ..base() });
        check(&Case { window: Some(window), causal: false, ..base() });
    }
    check(&Case { softcap: Some(5.0), ..base() });
    check(&Case { sinks: true, ..base() });
    check(&Case { alibi: true, ..base() });
    check(&Case { scale: Some(3.0), ..base() });
    check(&Case { scale: Some(0.0), ..base() });
    check(&Case {
        window: Some(33),
        softcap: Some(2.0),
        sinks: true,
        alibi: true,
        scale: Some(0.5),
        ..base()
    });
}

#[test]
fn long_contexts_are_split() {
    let lengths = vec![(1, 1500), (2, 900), (1, 70), (1, 0)];
    check(&Case { shape: shape(4, 1, 64), lengths: lengths.clone(), ..base() });
    check(&Case { window: Some(700), sinks: true, lengths, ..base() });
}

#[test]
fn bad_table_entries_are_masked_and_reported() {
    let mut rng = Rng::new(77);
    for bad in [-1, i32::MIN, i32::MAX, 10_000] {
        for block_tokens in [1, 16] {
            let mut instance = Case { block_tokens, ..base() }.build();
            instance.spoil(&mut rng, bad);
            for backend in backends::all() {
                assert!(instance.check_on(&backend), "a bad entry must raise the flag");
            }
        }
    }
}

#[test]
fn what_a_window_hides_is_not_looked_up() {
    let lengths = vec![(1, 100), (4, 90)];
    let mut instance = Case { window: Some(16), lengths, ..base() }.build();
    instance.set_entries(&[(0, 0..5), (1, 0..4)], -1);
    for backend in backends::all() {
        assert!(!instance.check_on(&backend), "blocks behind the window may be gone");
    }
}

#[test]
fn fixed_pieces_give_the_same_bits_in_any_batch() {
    let lengths = vec![(1, 400), (1, 17), (3, 300), (8, 100), (1, 0)];
    for format in FORMATS {
        let instance = Case { format, lengths: lengths.clone(), ..base() }.build();
        for backend in backends::all() {
            let (want, want_lse) = instance.run_on(&backend, 0..lengths.len());
            for s in 0..lengths.len() {
                let (got, lse) = instance.run_on(&backend, s..s + 1);
                let (rows, row) = instance.rows_of(s);
                assert!(got == want[rows] && lse == want_lse[row], "sequence {s} alone");
            }
        }
    }
}
