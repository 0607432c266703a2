//! Specs and layouts: sizes, offsets, refusals.

use super::*;

#[test]
fn a_uniform_block_is_contiguous_and_covered_by_its_runs() {
    let layout = GroupLayout::new(GroupSpec::uniform(3, 2, 64, KvFormat::Bf16), 16).unwrap();
    assert_eq!(layout.token_bytes(), 2 * 3 * 2 * 64 * 2);
    let mut runs: Vec<_> = layout.runs().collect();
    runs.sort_unstable();
    let mut at = 0;
    for (offset, token_bytes) in runs {
        assert_eq!(offset, at);
        at += token_bytes * 16;
    }
    assert_eq!(at, layout.block_bytes());
}

#[test]
fn latent_attention_stores_one_row_a_token() {
    let layout = GroupLayout::new(GroupSpec::latent(61, 512, 64, KvFormat::Bf16), 64).unwrap();
    assert_eq!(layout.token_bytes(), 70_272);
    assert_eq!(layout.v_offset(7), layout.k_offset(7));
    assert_eq!(layout.runs().count(), 61);
}

#[test]
fn quantised_tokens_have_codes_and_scales_in_runs_that_cover_the_block() {
    let tokens = KvFormat::ALL.iter().filter(|f| f.class() == FormatClass::Token);
    for &format in tokens {
        for spec in [GroupSpec::uniform(3, 2, 80, format), GroupSpec::latent(2, 512, 64, format)] {
            let layout = GroupLayout::new(spec, 32).unwrap();
            let mut runs: Vec<_> = layout.runs().collect();
            runs.sort_unstable();
            let mut at = 0;
            for (offset, token_bytes) in runs {
                assert_eq!(offset, at, "{format:?}");
                at += token_bytes * 32;
            }
            assert_eq!(at, layout.block_bytes(), "{format:?}");
            assert!(layout.k_strides().head % 16 == 0 && layout.staging_block_bytes() == 0);
            // Scales are found in the runs that hold them.
            let scales = layout.v_scale_strides();
            let head = i64::from(layout.spec().kv_heads) - 1;
            let at = layout.v_scale_offset(1) as i64 + head * scales.head;
            let run = (at as u64, scales.token as u64);
            assert_eq!(layout.runs().any(|own| own == run), scales.token != 0, "{format:?}");
        }
    }
    let int8 = GroupLayout::new(GroupSpec::uniform(1, 1, 128, KvFormat::Int8T), 16).unwrap();
    assert_eq!(int8.token_bytes(), 2 * (128 + 2));
}

#[test]
fn a_block_of_sealed_tiles_is_its_records() {
    let spec = GroupSpec::uniform(3, 2, 128, KvFormat::Kt4v4);
    let layout = GroupLayout::new(spec.clone(), 64).unwrap();
    assert_eq!(layout.block_bytes(), 3 * 2 * 8_592);
    assert_eq!(layout.token_bytes(), 806); // 805.5
    assert_eq!(layout.tile().map(|tile| tile.bytes()), Some(8_592));
    assert_eq!((layout.k_strides().head, layout.v_offset(2)), (8_592, layout.k_offset(2)));
    assert_eq!(layout.runs().count(), 0);
    assert_eq!(layout.staging_block_bytes(), 3 * 2 * 64 * 2 * 128 * 2);
    for block_tokens in [16, 256] {
        assert!(GroupLayout::new(spec.clone(), block_tokens).is_err());
    }
    assert!(GroupLayout::new(GroupSpec { k_dim: 72, ..spec }, 64).is_err());
}

#[test]
fn impossible_geometry_is_refused() {
    let bad = |group: GroupSpec, block_tokens| GroupLayout::new(group, block_tokens).unwrap_err();
    let good = GroupSpec::uniform(1, 1, 64, KvFormat::F16);
    for block_tokens in [0, 8, 17, 48, 512] {
        bad(good.clone(), block_tokens);
    }
    for dim in [0, 4, 65, 264, u32::MAX] {
        bad(GroupSpec::uniform(1, 1, dim, KvFormat::F16), 16);
    }
    bad(GroupSpec { layers: 0, ..good.clone() }, 16);
    bad(GroupSpec { kv_heads: 0, ..good.clone() }, 16);
    bad(GroupSpec { window: Some(0), ..good.clone() }, 16);
    bad(GroupSpec { sink_tokens: 16, ..good.clone() }, 16);
    bad(GroupSpec::latent(1, u32::MAX, 64, KvFormat::F16), 16);
    bad(GroupSpec { v_dim: 584, ..GroupSpec::latent(1, 512, 64, KvFormat::F16) }, 16);
    let huge = GroupSpec { layers: u32::MAX, kv_heads: u32::MAX, ..good };
    assert_eq!(bad(huge, 256), Error::Overflow { what: "block_bytes" });
}
