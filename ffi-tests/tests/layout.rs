//! Every struct of the header has the size and the offsets in C that Rust gives it. The C side is
//! a program made from the header's own text, so that no struct and no field can be forgotten.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

use ffi_tests::{HERE, compiler, run};
use kvcache::capi::*;

/// `struct` and `struct.field` to bytes.
type Layout = BTreeMap<String, usize>;

macro_rules! layouts {
    ($($name:ident { $($field:ident),* $(,)? })*) => {{
        let mut all = Layout::new();
        $(
            all.insert(stringify!($name).into(), size_of::<$name>());
            $(all.insert(
                concat!(stringify!($name), ".", stringify!($field)).into(),
                offset_of!($name, $field),
            );)*
        )*
        all
    }};
}

fn in_rust() -> Layout {
    layouts! {
        kvc_append_desc {
            struct_size, kv_heads, k_dim, v_dim, v_in_k, format, dtype, block_tokens, num_blocks,
            rows, threads, reserved, k, k_block_stride, k_head_stride, k_token_stride, v,
            v_block_stride, v_head_stride, v_token_stride, slots, k_rows, k_rows_token_stride,
            k_rows_head_stride, v_rows, v_rows_token_stride, v_rows_head_stride, rope, positions,
            scales,
        }
        kvc_attend_desc {
            struct_size, q_heads, kv_heads, k_dim, v_dim, v_in_k, format, q_dtype, out_dtype,
            block_tokens, num_blocks, seqs, causal, window, scale, softcap, threads, reserved, k,
            k_block_stride, k_head_stride, k_token_stride, v, v_block_stride, v_head_stride,
            v_token_stride, table, table_stride, table_indptr, q_indptr, kv_lens, q,
            q_token_stride, q_head_stride, out, out_token_stride, out_head_stride, lse, sinks,
            alibi, bad_block, workspace, workspace_bytes, scales, tiles,
        }
        kvc_cache_counts {
            blocks, free_blocks, cached_blocks, referenced_blocks, sequences, reserved,
            sequence_tokens, waste_tokens, block_bytes, pool_bytes, looked_up_tokens, hit_tokens,
            evicted_blocks, copied_blocks, merged_blocks, staging_blocks, staged_blocks,
            staging_bytes, unsealed_blocks, cascades,
        }
        kvc_cache_options {
            struct_size, block_tokens, blocks, max_seqs, threads, prefix_reuse, device,
            device_ordinal, stream, deterministic, eviction, staging_blocks, scrub, group_blocks,
            cascade, reserved,
        }
        kvc_device_append_options {
            struct_size, rope_style, rotary_dim, first_channel, table_positions, q_heads, cosines,
            sines, q, q_token_stride, q_head_stride, q_out, q_out_token_stride, q_out_head_stride,
            error_flag,
        }
        kvc_device_attend_options {
            struct_size, max_q_tokens, max_kv_tokens, piece_tokens, total_q_tokens, planned,
            multiprocessors, multiprocessor_shared_bytes, tail_mask,
        }
        kvc_device_cascade_estimate { pays, reserved, plain, cascade }
        kvc_device_cascade_prefix { first_seq, seqs, blocks, reserved }
        kvc_device_cascade_query {
            struct_size, q_heads, kv_heads, head_dim, block_tokens, token_bytes, q_tokens, seqs,
            kv_tokens, memory_bytes, cache_bytes, cache_size, operations, launch, multiprocessors,
            reserved,
        }
        kvc_device_cascade_segment { first_seq, seqs, shared_blocks, reserved }
        kvc_device_copy_desc {
            struct_size, count, wide_ids, planes, runs, run_bytes, token_bytes, from_blocks,
            to_blocks, zero, list, tokens, from, from_planes, from_plane_stride,
            from_block_stride, from_run_stride, to, to_planes, to_plane_stride, to_block_stride,
            to_run_stride, error_flag,
        }
        kvc_device_facts { kind, ordinal, multiprocessors, reserved }
        kvc_device_lookup_desc {
            struct_size, requests, leave, max_blocks, tokens, indptr, name_spaces, matched, blocks,
            block_stride, tail_tokens, tail_blocks, error_flag,
        }
        kvc_device_merge_desc {
            struct_size, count, rows, heads, dim, part_dtype, out_dtype, reserved, parts,
            part_stride, row_stride, head_stride, lse, lse_part_stride, lse_row_stride,
            lse_head_stride, out, out_row_stride, out_head_stride, out_lse, out_lse_row_stride,
            out_lse_head_stride, sinks,
        }
        kvc_device_rates {
            struct_size, multiprocessors, memory_bytes, cache_bytes, cache_size, operations, launch,
        }
        kvc_event {
            struct_size, kind, medium, group, seq, name_space, parent, digests, block_count, tokens,
            token_count,
        }
        kvc_events_counts {
            next_seq, queued_events, queued_blocks, capacity_blocks, dropped_events, losses,
            subscribers, publishing,
        }
        kvc_events_options {
            struct_size, encoding, capacity_blocks, callback, user, endpoint, replay_endpoint,
            topic, keep_messages, keep_bytes, rank, remote,
        }
        kvc_histogram { counts, sum_ms }
        kvc_metrics {
            blocks, referenced_blocks, cached_blocks, sequences, queries_tokens, hits_tokens,
            evicted_capacity_blocks, evicted_cleared_blocks, out_of_blocks, missing_blocks,
            out_of_sequences, dropped_events, watched_every, reserved, lifetime, idle_before_evict,
            reuse_gap, evicted_window_blocks,
        }
        kvc_onboard_progress {
            state, ready_layers, device_tokens, loading_tokens, missing_group, missing_layer, why,
            reserved,
        }
        kvc_group_spec {
            struct_size, layers, kv_heads, k_dim, v_dim, v_in_k, format, window, sink_tokens,
        }
        kvc_plan_group { token_bytes, block_bytes, sequence_blocks, blocks }
        kvc_plan_options {
            struct_size, block_tokens, reserve_ppm, reserved, memory_bytes, weight_bytes,
            context_tokens, batch,
        }
        kvc_plan_result {
            kv_bytes, token_bytes, sequence_bytes, batch_bytes, max_batch, max_context_tokens, fits,
            reserved,
        }
        kvc_pool_counts { blocks, free_blocks, held_blocks, reserved }
        kvc_prefix_answer { status, reserved, hit, pin }
        kvc_prefix_batch {
            struct_size, unlock_count, unlocks, out_unlocked, commit_count, query_count, commits,
            out_committed, queries, out_answers,
        }
        kvc_prefix_commit {
            name_space, above, tokens, token_count, blocks, block_ids, out_present, capacity,
        }
        kvc_media { position, digest }
        kvc_prefix_committed { status, reserved, inserted }
        kvc_prefix_counts { blocks, capacity_blocks, name_spaces, nodes, pins, bytes }
        kvc_prefix_hit { tokens, block_ids, tail_tokens, at }
        kvc_prefix_inserted { present_blocks, stored_blocks, at }
        kvc_prefix_options {
            struct_size, block_tokens, groups, capacity_blocks, eviction, reserved,
        }
        kvc_prefix_position { parts, reserved }
        kvc_prefix_query {
            name_space, tokens, token_count, max_tokens, out_blocks, capacity, out_tail_blocks, pin,
            reserved,
        }
        kvc_retention { start, end, priority, duration_ms }
        kvc_scales {
            struct_size, k_unrotated, k, k_block_stride, k_head_stride, k_token_stride, v,
            v_block_stride, v_head_stride, v_token_stride, k_heads, v_heads,
        }
        kvc_raw_block { tile, slot }
        kvc_seal_desc {
            struct_size, kv_heads, k_dim, v_dim, v_in_k, format, block_tokens, num_blocks, count,
            threads, tiles, list, refused,
        }
        kvc_seal_tile { slot, block }
        kvc_tile_view {
            struct_size, staging_blocks, scratch_blocks, reserved, records, block_bytes, head_bytes,
            staging, staging_block_bytes, scratch, scratch_block_bytes, raw_indptr, raw_blocks,
        }
        kvc_rope { struct_size, style, rotary_dim, first_channel, theta, scale, frequencies }
        kvc_scoring { struct_size, causal, window, scale, softcap, reserved, sinks, alibi }
        kvc_tier_counts {
            kind, down, stored, stored_bytes, present, dropped, full, loaded, loaded_bytes, missed,
            bad, failures, timeouts, evicted, queued, objects, bytes, load_latency, load_bandwidth,
            page_locked, reserved,
        }
        kvc_tier_decision {
            device_tokens, host_tokens, found_blocks, load_blocks, load_seconds, compute_seconds,
            why, reserved,
        }
        kvc_tier_object { key, bytes, length }
        kvc_tier_options {
            struct_size, least_priority, model, host_blocks, transit_blocks, disk_dir, disk_bytes,
            store, slices, slice_count, least_uses, on_commit, direct, readers, queued_blocks,
            prefill_seconds, remote, remote_timeout_ms, plain_memory, ahead_blocks,
            reserved,
        }
        kvc_tier_slice { first_layer, first_head }
        kvc_tier_store { struct_size, reserved, user, exists, put, get, remove }
        kvc_work { seq, token_count, tokens }
    }
}

/// Structs of the header and the names of their fields, in order.
fn structs(header: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let mut rest = header;
    while let Some((_, after)) = rest.split_once("typedef struct {") {
        let (body, after) = after.split_once('}').expect("the end of a struct");
        let (name, after) = after.split_once(';').expect("the name of a struct");
        let fields = body
            .lines()
            .map(str::trim)
            .filter(|line| !line.starts_with('/') && line.ends_with(';'))
            .map(|line| {
                let name = line.trim_end_matches(';').split(['[']).next().unwrap();
                name.rsplit([' ', '*']).next().unwrap().to_string()
            });
        found.push((name.trim().to_string(), fields.collect()));
        rest = after;
    }
    found
}

fn in_c() -> Layout {
    let header = Path::new(HERE).parent().unwrap().join("include/kvcache.h");
    let mut program =
        String::from("#include <stdio.h>\n#include \"kvcache.h\"\nint main(void) {\n");
    for (name, fields) in structs(&std::fs::read_to_string(header).unwrap()) {
        writeln!(program, "printf(\"{name} %zu\\n\", sizeof({name}));").unwrap();
        for field in fields {
            let offset = format!("offsetof({name}, {field})");
            writeln!(program, "printf(\"{name}.{field} %zu\\n\", {offset});").unwrap();
        }
    }
    program.push_str("return 0;\n}\n");
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, binary) = (dir.join("layout.c"), dir.join("layout"));
    std::fs::write(&source, program).unwrap();
    let mut compile = compiler(false).expect("a C compiler is needed");
    run(compile.arg("-std=c99").arg(&source).arg("-o").arg(&binary));
    let printed = String::from_utf8(run(&mut Command::new(&binary)).stdout).unwrap();
    let entry = |line: &str| {
        let (name, bytes) = line.split_once(' ').unwrap();
        (name.to_string(), bytes.parse().unwrap())
    };
    printed.lines().map(entry).collect()
}

#[test]
fn structs_are_laid_out_alike_in_c_and_rust() {
    let (c, rust) = (in_c(), in_rust());
    assert_eq!(c, rust, "C (left) against Rust (right)");
    assert_eq!(rust.keys().filter(|name| !name.contains('.')).count(), 52);
}

/// The header as bindgen reads it, for whoever binds it from Rust.
#[cfg(feature = "bindgen")]
mod from_the_header {
    #![allow(non_camel_case_types, non_upper_case_globals, dead_code)]
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

#[cfg(feature = "bindgen")]
#[test]
fn bindgen_reads_the_same_layout() {
    macro_rules! same {
        ($($name:ident)*) => {$(
            assert_eq!(
                (size_of::<$name>(), align_of::<$name>()),
                (size_of::<from_the_header::$name>(), align_of::<from_the_header::$name>()),
                stringify!($name)
            );
        )*};
    }
    same!(kvc_append_desc kvc_attend_desc kvc_cache_counts kvc_cache_options kvc_group_spec
        kvc_plan_group kvc_plan_options kvc_plan_result kvc_pool_counts kvc_prefix_answer
        kvc_prefix_batch kvc_prefix_commit kvc_prefix_committed kvc_prefix_counts kvc_prefix_hit
        kvc_prefix_inserted kvc_prefix_options kvc_prefix_position kvc_prefix_query kvc_retention kvc_rope kvc_scoring kvc_work);
    assert_eq!(from_the_header::KVC_ERR_OUT_OF_BLOCKS, KVC_ERR_OUT_OF_BLOCKS);
    assert_eq!(
        offset_of!(from_the_header::kvc_attend_desc, workspace_bytes),
        offset_of!(kvc_attend_desc, workspace_bytes)
    );
    // The linker finds what the header names.
    // SAFETY: takes nothing.
    assert_eq!(unsafe { from_the_header::kvc_abi_version() }, KVC_ABI_VERSION);
}
