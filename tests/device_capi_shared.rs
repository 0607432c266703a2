//! What sequences share, through the C ABI on every device of this build and machine: lookups in a
//! copy of a prefix index, cascades against plain attention, merges of partial results.
#![cfg(any(feature = "emulate", feature = "cuda"))]

use std::ptr;

use kvcache::capi::*;
use kvcache::dtype::f16;

mod device_memory;
#[path = "random/mod.rs"]
mod random;
use device_memory::{Memory, kinds, made, ok, open};
use random::Rng;

const BLOCK: usize = 4;
const GROUPS: usize = 2;
const MOST: usize = 10;

/// Mostly zeros, so that prefixes are shared and blocks differ late.
fn prompt(rng: &mut Rng) -> Vec<u32> {
    let count = rng.below(MOST * BLOCK + 1);
    (0..count).map(|_| rng.pick(&[0, 0, 0, 0, 1, 2])).collect()
}

fn insert(prefix: *mut kvc_prefix, rng: &mut Rng, next: &mut i32) {
    let mut tokens = prompt(rng);
    tokens.truncate(tokens.len() / BLOCK * BLOCK);
    let ids = tokens.len() / BLOCK * GROUPS;
    let blocks: Vec<i32> = (*next..).take(ids).collect();
    *next += ids as i32;
    let mut inserted = kvc_prefix_inserted {
        present_blocks: 0,
        stored_blocks: 0,
        at: kvc_prefix_position { parts: [0; 3], reserved: 0 },
    };
    // SAFETY: the arrays are as long as said.
    ok(unsafe {
        kvc_prefix_insert(
            prefix,
            rng.below(3) as u64,
            tokens.as_ptr(),
            tokens.len() as u64,
            blocks.as_ptr(),
            ids as u64,
            ptr::null_mut(),
            0,
            &mut inserted,
        )
    });
}

/// A batch of lookups on the device against kvc_prefix_lookup; how many tokens were found.
fn compare(
    device: *mut kvc_device,
    copy: *const kvc_device_prefix,
    prefix: *mut kvc_prefix,
    rng: &mut Rng,
) -> u64 {
    let requests: Vec<(u64, Vec<u32>)> =
        (0..16).map(|_| (rng.below(4) as u64, prompt(rng))).collect();
    let mut indptr = vec![0];
    for (_, tokens) in &requests {
        indptr.push(indptr[indptr.len() - 1] + tokens.len() as i32);
    }
    let flat: Vec<u32> =
        requests.iter().flat_map(|(_, tokens)| tokens.clone()).chain([9]).collect();
    let spaces: Vec<u64> = requests.iter().map(|request| request.0).collect();
    let (tokens, indptr) = (Memory::of(device, &flat), Memory::of(device, &indptr));
    let spaces = Memory::of(device, &spaces);
    let n = requests.len();
    let row = MOST * GROUPS + 3;
    let (matched, tails) = (Memory::of(device, &vec![7u32; n]), Memory::of(device, &vec![7u32; n]));
    let blocks = Memory::of(device, &vec![-9i32; n * row]);
    let tail_blocks = Memory::of(device, &vec![-9i32; n * GROUPS]);
    let flag = Memory::of(device, &[0u32]);
    let mut desc = made(kvc_device_lookup_desc_init);
    (desc.requests, desc.max_blocks) = (n as u32, MOST as u32);
    (desc.tokens, desc.indptr) = (tokens.at.cast(), indptr.at.cast());
    desc.name_spaces = spaces.at.cast();
    (desc.matched, desc.blocks) = (matched.at.cast(), blocks.at.cast());
    desc.block_stride = row as i64;
    (desc.tail_tokens, desc.tail_blocks) = (tails.at.cast(), tail_blocks.at.cast());
    desc.error_flag = flag.at.cast();
    // SAFETY: the addresses are of live device memory, as long as the description says.
    ok(unsafe { kvc_device_prefix_lookup(copy, &desc, ptr::null_mut()) });
    assert_eq!(flag.read::<u32>(), [0]);
    let (matched, tails) = (matched.read::<u32>(), tails.read::<u32>());
    let (blocks, tail_blocks) = (blocks.read::<i32>(), tail_blocks.read::<i32>());
    let mut found = 0;
    for (i, (space, tokens)) in requests.iter().enumerate() {
        let (mut own, mut own_tail) = ([-9; MOST * GROUPS], [-1; GROUPS]);
        let position = kvc_prefix_position { parts: [0; 3], reserved: 0 };
        let mut hit = kvc_prefix_hit { tokens: 0, block_ids: 0, tail_tokens: 0, at: position };
        // SAFETY: the arrays are as long as said.
        ok(unsafe {
            kvc_prefix_lookup(
                prefix,
                *space,
                tokens.as_ptr(),
                tokens.len() as u64,
                tokens.len().saturating_sub(1) as u64,
                own.as_mut_ptr(),
                own.len() as u64,
                own_tail.as_mut_ptr(),
                &mut hit,
            )
        });
        let got = (u64::from(matched[i]), u64::from(tails[i]));
        assert_eq!(got, (hit.tokens, hit.tail_tokens));
        let (ids, past) = blocks[i * row..(i + 1) * row].split_at(own.len());
        assert!(ids == own && past.iter().all(|&id| id == -9), "{blocks:?}");
        if hit.tail_tokens == 0 {
            own_tail = [-1; GROUPS];
        }
        assert_eq!(tail_blocks[i * GROUPS..(i + 1) * GROUPS], own_tail);
        found += hit.tokens;
    }
    found
}

#[test]
fn lookups_in_a_copy_are_those_of_the_index() {
    kinds().into_iter().for_each(lookups);
}

fn lookups(kind: u32) {
    let (device, mut rng) = (open(kind), Rng::new(11));
    let (mut prefix, mut copy, mut next) = (ptr::null_mut(), ptr::null_mut(), 0);
    let (mut all, mut bytes, mut gone) = (0, 0, 0);
    let mut evicted = vec![0i32; 600 * GROUPS];
    // SAFETY: the pointers are to live memory of the sizes that the calls document.
    unsafe {
        ok(kvc_prefix_create(BLOCK as u32, GROUPS as u32, 600, &mut prefix));
        ok(kvc_device_prefix_create(device, prefix, &mut copy));
        let mut second = ptr::null_mut();
        let again = kvc_device_prefix_create(device, prefix, &mut second);
        assert_eq!((again, second.is_null()), (KVC_ERR_INVALID_STATE, true));
        for _ in 0..300 {
            insert(prefix, &mut rng, &mut next);
        }
        ok(kvc_device_prefix_sync(copy, ptr::null_mut(), &mut all));
        for _ in 0..5 {
            assert!(compare(device, copy, prefix, &mut rng) > 0);
            let (out, room) = (evicted.as_mut_ptr(), evicted.len() as u64);
            ok(kvc_prefix_evict(prefix, 40, out, room, &mut gone));
            assert!(gone > 0);
            for _ in 0..20 {
                insert(prefix, &mut rng, &mut next);
            }
            ok(kvc_device_prefix_sync(copy, ptr::null_mut(), &mut bytes));
            assert!(bytes > 80 && bytes < all, "{bytes} of {all}");
        }
        // Nothing changed: the head alone, and its run.
        ok(kvc_device_prefix_sync(copy, ptr::null_mut(), &mut bytes));
        assert_eq!(bytes, 80);
        compare(device, copy, prefix, &mut rng);
        // The device may be closed before its copies, and the index end before its copy.
        ok(kvc_device_close(device));
        ok(kvc_prefix_destroy(prefix));
        assert_eq!(
            kvc_device_prefix_sync(copy, ptr::null_mut(), ptr::null_mut()),
            KVC_ERR_STALE_HANDLE
        );
        ok(kvc_device_prefix_destroy(copy));
        assert_eq!(kvc_device_prefix_destroy(copy), KVC_ERR_STALE_HANDLE);
    }
}

const D: usize = 64;
const HEADS: usize = 2;
const Q_HEADS: usize = 8;
const BT: usize = 16;

fn halves(rng: &mut Rng, count: usize) -> Vec<f16> {
    (0..count).map(|_| f16::from_f32(rng.normal())).collect()
}

/// Sequences whose tables begin with the same `shared` blocks, `q` query tokens each: a cascade over
/// them against plain attention.
fn cascade_is_plain_attention(
    kind: u32,
    (seqs, q): (usize, usize),
    shared: usize,
    claimed: u32,
    ragged: bool,
) {
    let (device, mut rng) = (open(kind), Rng::new((seqs * 31 + q) as u64));
    let lens: Vec<i32> = (0..seqs).map(|s| (shared * BT + q + 11 * s) as i32).collect();
    let width = (lens[seqs - 1] as usize).div_ceil(BT);
    let mut next = shared as i32;
    let mut table = Vec::new();
    for &len in &lens {
        let own = (len as usize).div_ceil(BT) - shared;
        table.extend(0..shared as i32);
        table.extend(next..next + own as i32);
        table.resize(table.len() + width - shared - own, -1);
        next += own as i32;
    }
    let blocks = next as usize;
    let elements = blocks * HEADS * BT * D;
    let (k, v) = (halves(&mut rng, elements), halves(&mut rng, elements));
    let rows = seqs * q;
    let sinks: Vec<f32> = (0..Q_HEADS).map(|_| rng.normal()).collect();
    let (k, v) = (Memory::of(device, &k), Memory::of(device, &v));
    let q_rows = Memory::of(device, &halves(&mut rng, rows * Q_HEADS * D));
    let (table, lens) = (Memory::of(device, &table), Memory::of(device, &lens));
    let indptr: Vec<i32> = (0..=seqs).map(|s| (s * q) as i32).collect();
    let (indptr, sinks) = (Memory::of(device, &indptr), Memory::of(device, &sinks));
    let flag = Memory::of(device, &[0u32]);
    let first = kvc_device_cascade_segment {
        first_seq: 0,
        seqs: seqs as u32,
        shared_blocks: claimed,
        reserved: 0,
    };
    let filler =
        kvc_device_cascade_segment { first_seq: seqs as u32, seqs: 0, shared_blocks: 0, ..first };
    let segments = Memory::of(device, &[first, filler]);

    let mut desc = made(kvc_attend_desc_init);
    let mut options = made(kvc_device_attend_options_init);
    (desc.q_heads, desc.kv_heads) = (Q_HEADS as u32, HEADS as u32);
    (desc.k_dim, desc.v_dim) = (D as u32, D as u32);
    (desc.format, desc.q_dtype, desc.out_dtype) = (KVC_FORMAT_F16, KVC_DTYPE_F16, KVC_DTYPE_F32);
    (desc.block_tokens, desc.num_blocks, desc.seqs) = (BT as u32, blocks as u32, seqs as u32);
    (desc.k, desc.v, desc.q) = (k.at, v.at, q_rows.at);
    (desc.table, desc.table_stride) = (table.at.cast(), width as i64);
    (desc.kv_lens, desc.sinks) = (lens.at.cast(), sinks.at.cast());
    desc.bad_block = flag.at.cast();
    if ragged {
        desc.q_indptr = indptr.at.cast();
    }
    (options.max_q_tokens, options.max_kv_tokens) = (q as u32, (width * BT) as u32);
    let run = |cascade: bool, planned: u32, workspace: &Memory| {
        let out = Memory::of(device, &vec![f32::NAN; rows * Q_HEADS * D]);
        let lse = Memory::of(device, &vec![f32::NAN; rows * Q_HEADS]);
        let mut desc = desc;
        (desc.out, desc.lse) = (out.at, lse.at.cast());
        (desc.workspace, desc.workspace_bytes) = (workspace.at, workspace.bytes as u64);
        let options = kvc_device_attend_options { planned, ..options };
        let (list, stream) = (segments.at.cast(), ptr::null_mut());
        // SAFETY: the addresses are of live device memory, as long as the description says.
        ok(unsafe {
            if cascade {
                kvc_device_cascade(device, &desc, &options, list, 2, stream)
            } else {
                kvc_device_attend(device, &desc, &options, stream)
            }
        });
        (out.read::<f32>(), lse.read::<f32>())
    };
    let (mut plain, mut bytes) = (0, 0);
    // SAFETY: the structs and places are live.
    unsafe {
        ok(kvc_device_attend_workspace_size(device, &desc, &options, &mut plain));
        ok(kvc_device_cascade_workspace_size(device, &desc, &options, 2, &mut bytes));
    }
    let small = Memory::of(device, &vec![0xffu8; plain as usize]);
    let workspace = Memory::of(device, &vec![0xffu8; bytes as usize]);
    let (out, lse) = run(false, 0, &small);
    // A plan of its own, then the workspace's.
    for planned in [0, 1] {
        let (got, got_lse) = run(true, planned, &workspace);
        for (got, want) in got.iter().zip(&out) {
            // Weights are rounded to f16 in either half; values are below 5.
            assert!((got - want).abs() <= 10.0 / 2048.0, "{got} for {want}");
        }
        for (got, want) in got_lse.iter().zip(&lse) {
            assert!((got - want).abs() <= 1e-3, "{got} for {want}");
        }
    }
    // Bit 3: a prefix was shorter than its segment says.
    assert_eq!(flag.read::<u32>()[0], if claimed > shared as u32 { 8 } else { 0 });

    // What a half cannot know is refused, and so is too little workspace.
    let refused = |desc: &kvc_attend_desc, count: u32| {
        let list = segments.at.cast();
        // SAFETY: see above; these are refused.
        unsafe { kvc_device_cascade(device, desc, &options, list, count, ptr::null_mut()) }
    };
    (desc.out, desc.workspace, desc.workspace_bytes) = (q_rows.at, workspace.at, bytes);
    assert_eq!(refused(&kvc_attend_desc { window: 5, ..desc }, 2), KVC_ERR_UNSUPPORTED);
    let slopes = kvc_attend_desc { alibi: sinks.at.cast(), ..desc };
    assert_eq!(refused(&slopes, 2), KVC_ERR_UNSUPPORTED);
    let short = kvc_attend_desc { workspace_bytes: bytes - 1, ..desc };
    assert_eq!(refused(&short, 2), KVC_ERR_BUFFER_TOO_SMALL);
    assert_eq!(refused(&desc, 0), KVC_ERR_INVALID_ARGUMENT);
    drop((k, v, q_rows, table, lens, indptr, sinks, flag, segments, small, workspace));
    // SAFETY: open, and closed once.
    ok(unsafe { kvc_device_close(device) });
}

#[test]
fn a_cascade_is_plain_attention() {
    for kind in kinds() {
        // The shared half by the decode kernel, by the prefill kernel, several query tokens, and a
        // claim of more than is shared.
        cascade_is_plain_attention(kind, (4, 1), 5, 5, false);
        cascade_is_plain_attention(kind, (11, 1), 5, 5, false);
        cascade_is_plain_attention(kind, (5, 3), 4, 4, true);
        cascade_is_plain_attention(kind, (3, 12), 3, 3, true);
        cascade_is_plain_attention(kind, (4, 2), 4, 6, false);
    }
}

#[test]
fn parts_with_strides_are_merged() {
    kinds().into_iter().for_each(merge);
}

fn merge(kind: u32) {
    let (device, mut rng) = (open(kind), Rng::new(3));
    let (count, rows, heads, dim) = (3usize, 4usize, 2usize, 16usize);
    // Rows of f16 with a gap, as heads of one tensor have it.
    let (row, part) = (heads * dim + 8, rows * (heads * dim + 8));
    let parts = halves(&mut rng, count * part);
    let mut lse: Vec<f32> = (0..count * rows * heads).map(|_| rng.normal()).collect();
    lse[5] = f32::NEG_INFINITY;
    let sinks = [0.5f32, -1.0];
    let (parts_at, lse_at) = (Memory::of(device, &parts), Memory::of(device, &lse));
    let sinks_at = Memory::of(device, &sinks);
    let out = Memory::of(device, &vec![f32::NAN; rows * heads * dim]);
    let out_lse = Memory::of(device, &vec![f32::NAN; rows * heads]);
    let mut desc = made(kvc_device_merge_desc_init);
    (desc.count, desc.rows, desc.heads, desc.dim) =
        (count as u32, rows as u32, heads as u32, dim as u32);
    desc.part_dtype = KVC_DTYPE_F16;
    (desc.part_stride, desc.row_stride, desc.head_stride) = (part as i64, row as i64, dim as i64);
    (desc.parts, desc.lse, desc.sinks) = (parts_at.at, lse_at.at.cast(), sinks_at.at.cast());
    (desc.out, desc.out_lse) = (out.at, out_lse.at.cast());
    // SAFETY: the addresses are of live device memory, as long as the description says.
    ok(unsafe { kvc_device_merge(device, &desc, ptr::null_mut()) });
    let (out, out_lse) = (out.read::<f32>(), out_lse.read::<f32>());
    for r in 0..rows {
        for h in 0..heads {
            let weight = |p: usize| f64::from(lse[(p * rows + r) * heads + h]).exp();
            let total = (0..count).map(weight).sum::<f64>() + f64::from(sinks[h]).exp();
            let got = f64::from(out_lse[r * heads + h]);
            assert!((got - total.ln()).abs() <= 1e-5, "{got} for {}", total.ln());
            for c in 0..dim {
                let value = |p: usize| parts[p * part + r * row + h * dim + c].to_f64();
                let want = (0..count).map(|p| weight(p) * value(p)).sum::<f64>() / total;
                let got = f64::from(out[(r * heads + h) * dim + c]);
                assert!((got - want).abs() <= 1e-5, "{got} for {want}");
            }
        }
    }
}
