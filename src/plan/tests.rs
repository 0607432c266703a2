//! The planner against published figures, against counting, and at the edges of 64 bits.

use super::presets::{self, Preset};
use super::*;
use crate::layout::{GroupSpec, MAX_GROUPS};

const GIB: u64 = 1 << 30;

fn spec_of(name: &str, format: KvFormat, block_tokens: u32) -> CacheSpec {
    Preset::find(name).expect(name).spec(format, block_tokens)
}

fn bytes_at(spec: &CacheSpec, tokens: u64) -> u64 {
    sequence_bytes(&spec.layouts().unwrap(), tokens).unwrap()
}

fn budget(kv_bytes: u64) -> Budget {
    Budget { memory_bytes: kv_bytes, weight_bytes: 0, reserve_ppm: 0 }
}

/// The blocks that the window of the last token touches, worst case over where it ends, by
/// counting.
fn counted_window_blocks(window: u64, block_tokens: u64) -> u64 {
    (window..window + block_tokens)
        .map(|end| (end - 1) / block_tokens - (end - window) / block_tokens + 1)
        .max()
        .unwrap()
}

#[test]
fn published_figures() {
    let llama_2_7b = spec_of("llama-2-7b", KvFormat::F16, 16);
    assert_eq!(bytes_at(&llama_2_7b, 4096), 2 * GIB);

    let with_64_heads = CacheSpec::uniform(16, GroupSpec::uniform(80, 64, 128, KvFormat::F16));
    assert_eq!(bytes_at(&with_64_heads, 4096), 10 * GIB);
    let llama_2_70b = spec_of("llama-2-70b", KvFormat::F16, 16);
    assert_eq!(bytes_at(&llama_2_70b, 4096), GIB + GIB / 4);

    let llama_3_70b = spec_of("llama-3-70b", KvFormat::Bf16, 16);
    assert_eq!(bytes_at(&llama_3_70b, 1_000_000).div_ceil(1_000_000_000), 328);

    for name in ["deepseek-v3", "deepseek-r1", "kimi-k2"] {
        let spec = spec_of(name, KvFormat::Bf16, 64);
        let plan = plan(&spec, &budget(GIB), &Workload { context_tokens: 64, batch: 1 }).unwrap();
        assert_eq!(plan.token_bytes, 70_272, "{name}");
    }
}

#[test]
fn every_preset_is_a_valid_cache_under_one_name() {
    for (at, preset) in presets::ALL.iter().enumerate() {
        assert!(presets::ALL[..at].iter().all(|other| other.name != preset.name));
        assert_eq!(preset.name, preset.name.to_ascii_lowercase());
        for &format in KvFormat::ALL {
            // Sealed tiles have 32, 64 or 128 tokens; every preset has dims that all formats take.
            let spec = preset.spec(format, 64);
            spec.layouts().unwrap();
            assert!(spec.groups.iter().all(|group| group.format == format));
        }
    }
    assert_eq!(Preset::find("Llama-3-8B").unwrap().name, "llama-3-8b");
    assert_eq!(Preset::find("llama"), None);
}

#[test]
fn a_window_holds_what_it_touches_at_the_worst_alignment() {
    for block_tokens in [16, 32, 256] {
        for window in [1, 2, 15, 16, 17, 128, 511, 512, 4096] {
            let group =
                GroupSpec { window: Some(window), ..GroupSpec::uniform(1, 1, 64, KvFormat::F16) };
            let layout = GroupLayout::new(group, block_tokens).unwrap();
            let expected = counted_window_blocks(u64::from(window), u64::from(block_tokens));
            assert_eq!(sequence_blocks(&layout, 1 << 40), expected);
            assert_eq!(sequence_blocks(&layout, 1), 1);
        }
    }
}

#[test]
fn windowed_groups_stop_growing_and_full_ones_do_not() {
    let spec = spec_of("gpt-oss-20b", KvFormat::Bf16, 16);
    let token_bytes = 12 * 8 * 64 * 2 * 2;
    let short = bytes_at(&spec, 128);
    assert_eq!(short, 2 * 128 * token_bytes);
    let long = bytes_at(&spec, 131_072);
    assert_eq!(long, (131_072 + 9 * 16) * token_bytes);
}

#[test]
fn a_plan_splits_the_budget_and_never_exceeds_it() {
    for preset in presets::ALL {
        for (memory, context_tokens, batch) in
            [(80 * GIB, 8192, 16), (24 * GIB, 1000, 3), (GIB, 131_071, 1), (1, 1, 1), (4096, 17, 2)]
        {
            let spec = preset.spec(KvFormat::Bf16, 16);
            let budget = Budget { memory_bytes: memory, weight_bytes: 0, reserve_ppm: 100_000 };
            let Ok(kv_bytes) = budget.kv_bytes() else {
                assert_eq!(memory, 1, "only a single byte is all reserve");
                continue;
            };
            let plan = plan(&spec, &budget, &Workload { context_tokens, batch }).unwrap();
            assert_eq!(plan.kv_bytes, kv_bytes);

            let held: u64 = plan.groups.iter().map(|g| g.blocks * g.block_bytes).sum();
            assert!(held <= kv_bytes);
            let batch_by_blocks =
                plan.groups.iter().map(|g| g.blocks / g.sequence_blocks).min().unwrap();
            assert_eq!(plan.max_batch, batch_by_blocks, "{}", preset.name);
            assert!(plan.max_batch * plan.sequence_bytes <= kv_bytes);
            assert!((plan.max_batch + 1) * plan.sequence_bytes > kv_bytes);
            assert_eq!(plan.fits, plan.max_batch >= batch);

            if let Some(most) = plan.max_context_tokens {
                let fits = |tokens| tokens == 0 || batch * bytes_at(&spec, tokens) <= kv_bytes;
                assert!(fits(most), "{}", preset.name);
                assert!(!fits(most + 1), "{}", preset.name);
            }
        }
    }
}

#[test]
fn a_context_is_unlimited_only_where_every_layer_has_a_window() {
    let workload = Workload { context_tokens: 1, batch: 1 };
    let mistral = spec_of("mistral-7b-v0.1", KvFormat::F16, 16);
    assert_eq!(plan(&mistral, &budget(GIB), &workload).unwrap().max_context_tokens, None);
    // 257 blocks of 2 MiB are a full window.
    let one_less = plan(&mistral, &budget(257 * (2 << 20) - 1), &workload).unwrap();
    assert_eq!(one_less.max_context_tokens, Some(256 * 16));
    let gemma = spec_of("gemma-2-9b", KvFormat::F16, 16);
    assert!(plan(&gemma, &budget(GIB), &workload).unwrap().max_context_tokens.is_some());
}

#[test]
fn a_budget_too_small_is_an_answer() {
    let spec = spec_of("llama-3-8b", KvFormat::F32, 256);
    let plan = plan(&spec, &budget(1), &Workload { context_tokens: 1, batch: 1 }).unwrap();
    assert!(!plan.fits);
    assert_eq!((plan.max_batch, plan.max_context_tokens, plan.groups[0].blocks), (0, Some(0), 0));
}

#[test]
fn reserve_and_weights_come_off_exactly_once() {
    let whole = Budget { memory_bytes: 80 * GIB, weight_bytes: 16 * GIB, reserve_ppm: 100_000 };
    assert_eq!(whole.kv_bytes().unwrap(), 56 * GIB);
    let odd = Budget { memory_bytes: 1001, weight_bytes: 0, reserve_ppm: 1 };
    assert_eq!(odd.kv_bytes().unwrap(), 1000, "the reserve rounds up");
    let largest = Budget { memory_bytes: u64::MAX, weight_bytes: 0, reserve_ppm: PPM - 1 };
    assert_eq!(largest.kv_bytes().unwrap(), u64::MAX / 1_000_000);
}

#[test]
fn impossible_input_is_an_error() {
    let spec = spec_of("llama-3-8b", KvFormat::Bf16, 16);
    let good = budget(80 * GIB);
    let one = Workload { context_tokens: 1, batch: 1 };
    let invalid = |result: Result<Plan>| {
        assert!(matches!(result, Err(Error::InvalidArgument { .. })), "{result:?}");
    };
    invalid(plan(&spec, &budget(0), &one));
    invalid(plan(&spec, &Budget { weight_bytes: 80 * GIB, ..good }, &one));
    invalid(plan(&spec, &Budget { weight_bytes: u64::MAX, ..good }, &one));
    invalid(plan(&spec, &Budget { reserve_ppm: PPM, ..good }, &one));
    invalid(plan(&spec, &Budget { reserve_ppm: u32::MAX, ..good }, &one));
    invalid(plan(&spec, &good, &Workload { context_tokens: 0, ..one }));
    invalid(plan(&spec, &good, &Workload { batch: 0, ..one }));
    invalid(plan(&CacheSpec { block_tokens: 24, ..spec.clone() }, &good, &one));
    invalid(plan(&CacheSpec { groups: Vec::new(), ..spec.clone() }, &good, &one));
    let zero_dim = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 0, KvFormat::Bf16));
    invalid(plan(&zero_dim, &good, &one));
}

#[test]
fn sizes_past_64_bits_are_an_error() {
    let spec = spec_of("llama-3-8b", KvFormat::Bf16, 16);
    let good = budget(80 * GIB);
    let overflow = |spec: &CacheSpec, budget: &Budget, context_tokens, batch| {
        let result = plan(spec, budget, &Workload { context_tokens, batch });
        assert!(matches!(result, Err(Error::Overflow { .. })), "{result:?}");
    };
    overflow(&spec, &good, u64::MAX, 1);
    overflow(&spec, &good, 1, u64::MAX);
    overflow(&spec, &good, 1 << 40, 1 << 40);
    let huge = GroupSpec::uniform(u32::MAX, u32::MAX, 8, KvFormat::F32);
    overflow(&CacheSpec::uniform(16, huge.clone()), &good, 1, 1);
    // Each group's blocks stay below 2^63 bytes, their sum does not.
    let wide = GroupSpec { layers: 1 << 31, kv_heads: 1 << 22, ..huge };
    let groups = alloc::vec![wide; MAX_GROUPS];
    overflow(&CacheSpec { block_tokens: 16, groups }, &good, 1, 1);
    // More blocks than ids.
    let tiny = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 8, KvFormat::F16));
    overflow(&tiny, &budget(512 * (1 << 32)), 1, 1);
    let most =
        plan(&tiny, &budget(512 * ((1 << 32) - 1)), &Workload { context_tokens: 1, batch: 1 });
    assert_eq!(most.unwrap().groups[0].blocks, u64::from(u32::MAX));
}

#[test]
fn a_format_of_half_the_bytes_holds_twice_as_much() {
    let workload = Workload { context_tokens: 8192, batch: 1 };
    let spec = spec_of("qwen3-32b", KvFormat::F32, 16);
    let wide = plan(&spec, &budget(64 * GIB), &workload).unwrap();
    let narrow = plan(&with_format(&spec, KvFormat::Bf16), &budget(64 * GIB), &workload).unwrap();
    assert_eq!(wide.token_bytes, 2 * narrow.token_bytes);
    assert_eq!(narrow.max_batch, 2 * wide.max_batch);
    assert_eq!(narrow.groups[0].blocks, 2 * wide.groups[0].blocks);
}

#[test]
fn sealed_tiles_count_their_raw_blocks() {
    let spec = spec_of("llama-3-8b", KvFormat::Kt4v4, 64);
    let (block, raw) = (32 * 8 * 8_592, 32 * 8 * 64 * 2 * 128 * 2);
    // One raw block while the first tile fills, two from then on, never more.
    assert_eq!(bytes_at(&spec, 64), block + raw);
    assert_eq!(bytes_at(&spec, 65), 2 * (block + raw));
    assert_eq!(bytes_at(&spec, 64_000), 1000 * block + 2 * raw);
    // And the sinks.
    let mut sunk = spec.clone();
    sunk.groups[0].sink_tokens = 192;
    assert_eq!(bytes_at(&sunk, 65), 2 * (block + raw));
    assert_eq!(bytes_at(&sunk, 64_000), 1000 * block + 5 * raw);
    assert_eq!(with_format(&sunk, KvFormat::Bf16).groups[0].sink_tokens, 0);

    let workload = Workload { context_tokens: 8192, batch: 4 };
    let tiles = plan(&spec, &budget(GIB), &workload).unwrap();
    let group = &tiles.groups[0];
    assert_eq!(tiles.sequence_bytes, 128 * block + 2 * raw);
    assert_eq!(group.staging_block_bytes, raw);
    assert!(group.staging_blocks >= 2 * tiles.max_batch && group.staging_blocks > 0);
    let held = group.blocks * block + group.staging_blocks * raw;
    assert!(held <= tiles.kv_bytes && held + block + raw > tiles.kv_bytes);
    // The longest context fits, and one block more does not.
    let longest = tiles.max_context_tokens.unwrap();
    assert!(4 * bytes_at(&spec, longest) <= tiles.kv_bytes);
    assert!(4 * bytes_at(&spec, longest + 1) > tiles.kv_bytes);

    let floats = plan(&with_format(&spec, KvFormat::Bf16), &budget(GIB), &workload).unwrap();
    assert_eq!((floats.groups[0].staging_blocks, floats.groups[0].staging_block_bytes), (0, 0));
    assert!(tiles.max_batch >= 3 * floats.max_batch);
}
