//! The C ABI on every device of this build and machine, driven as a C program would: memory, the kernels
//! alone on it, and a cache on it with rows on either side.
#![cfg(any(feature = "emulate", feature = "cuda"))]

use std::ptr;

use kvcache::attention::{HeadShape, PagedKv, Scoring, reference_attention};
use kvcache::capi::*;
use kvcache::dtype::{Rows, f16};
use kvcache::layout::Strides;

mod device_memory;
#[path = "random/mod.rs"]
mod random;
use device_memory::{Memory, kinds, ok, open};
use random::Rng;

fn halves(rng: &mut Rng, count: usize) -> Vec<f16> {
    (0..count).map(|_| f16::from_f32(rng.normal())).collect()
}

const D: usize = 64;
const HEADS: usize = 2;
const Q_HEADS: usize = 8;
const BLOCK: usize = 16;
const BLOCKS: usize = 12;

#[test]
fn append_and_attend_alone_are_right() {
    kinds().into_iter().for_each(append_and_attend);
}

fn append_and_attend(kind: u32) {
    let device = open(kind);
    let mut rng = Rng::new(5);
    let lens = [37i32, 0, 64];
    let rows: usize = lens.iter().map(|&n| n as usize).sum();
    let table = [[3i32, 7, 1, -1], [-1; 4], [5, 2, 11, 8]];
    let (k, v) = (halves(&mut rng, rows * HEADS * D), halves(&mut rng, rows * HEADS * D));
    let q = halves(&mut rng, 3 * Q_HEADS * D);
    let slots: Vec<i64> = (0..3)
        .flat_map(|s| {
            (0..lens[s] as usize)
                .map(move |t| i64::from(table[s][t / BLOCK]) * BLOCK as i64 + (t % BLOCK) as i64)
        })
        .collect();
    let nan = vec![f16::NAN; BLOCKS * HEADS * BLOCK * D];
    let (cache_k, cache_v) = (Memory::of(device, &nan), Memory::of(device, &nan));
    let (new_k, new_v) = (Memory::of(device, &k), Memory::of(device, &v));
    let slots = Memory::of(device, &slots);
    let flag = Memory::of(device, &[0u32]);

    // SAFETY: every bit pattern is a value; init fills them in.
    let mut append: kvc_append_desc = unsafe { std::mem::zeroed() };
    let mut more: kvc_device_append_options = unsafe { std::mem::zeroed() };
    // SAFETY: the structs are of the sizes given.
    unsafe {
        ok(kvc_append_desc_init(&mut append, size_of::<kvc_append_desc>() as u32));
        let size = size_of::<kvc_device_append_options>() as u32;
        ok(kvc_device_append_options_init(&mut more, size));
    }
    (append.kv_heads, append.k_dim, append.v_dim) = (HEADS as u32, D as u32, D as u32);
    (append.format, append.dtype) = (KVC_FORMAT_F16, KVC_DTYPE_F16);
    (append.block_tokens, append.num_blocks) = (BLOCK as u32, BLOCKS as u32);
    append.rows = rows as u32;
    (append.k, append.v) = (cache_k.at, cache_v.at);
    (append.k_rows, append.v_rows) = (new_k.at, new_v.at);
    append.slots = slots.at.cast();
    more.error_flag = flag.at.cast();
    // SAFETY: the addresses are of live device memory of these sizes.
    ok(unsafe { kvc_device_append(device, &append, &more, ptr::null_mut()) });
    assert_eq!(flag.read::<u32>(), [0]);

    // SAFETY: every bit pattern is a value; init fills it in.
    let mut desc: kvc_attend_desc = unsafe { std::mem::zeroed() };
    // SAFETY: the struct is of the size given.
    ok(unsafe { kvc_attend_desc_init(&mut desc, size_of::<kvc_attend_desc>() as u32) });
    (desc.q_heads, desc.kv_heads) = (Q_HEADS as u32, HEADS as u32);
    (desc.k_dim, desc.v_dim) = (D as u32, D as u32);
    (desc.format, desc.q_dtype, desc.out_dtype) = (KVC_FORMAT_F16, KVC_DTYPE_F16, KVC_DTYPE_F32);
    (desc.block_tokens, desc.num_blocks, desc.seqs) = (BLOCK as u32, BLOCKS as u32, 3);
    let mut bytes = 0;
    // SAFETY: the struct and the pointer are live.
    ok(unsafe { kvc_device_attend_workspace_size(device, &desc, ptr::null(), &mut bytes) });
    let workspace = Memory::of(device, &vec![0xffu8; bytes as usize]);
    let (lens_at, table_at) = (Memory::of(device, &lens), Memory::of(device, &table.concat()));
    let q_at = Memory::of(device, &q);
    let out = Memory::of(device, &vec![f32::NAN; 3 * Q_HEADS * D]);
    let lse = Memory::of(device, &[f32::NAN; 3 * Q_HEADS]);
    (desc.k, desc.v, desc.q, desc.out) = (cache_k.at, cache_v.at, q_at.at, out.at);
    (desc.table, desc.table_stride) = (table_at.at.cast(), 4);
    desc.kv_lens = lens_at.at.cast();
    desc.lse = lse.at.cast();
    desc.bad_block = flag.at.cast();
    (desc.workspace, desc.workspace_bytes) = (workspace.at, bytes);

    // Bad arguments are answered before anything runs.
    let attend = |desc: &kvc_attend_desc| {
        // SAFETY: the addresses are of live device memory, as long as the description says.
        unsafe { kvc_device_attend(device, desc, ptr::null(), ptr::null_mut()) }
    };
    assert_eq!(
        attend(&kvc_attend_desc { workspace_bytes: bytes - 1, ..desc }),
        KVC_ERR_BUFFER_TOO_SMALL
    );
    assert_eq!(attend(&kvc_attend_desc { q: ptr::null(), ..desc }), KVC_ERR_NULL_POINTER);
    let odd = desc.kv_lens.wrapping_byte_add(2);
    assert_eq!(attend(&kvc_attend_desc { kv_lens: odd, ..desc }), KVC_ERR_MISALIGNED);
    assert_eq!(attend(&kvc_attend_desc { k_dim: 72, v_dim: 72, ..desc }), KVC_ERR_UNSUPPORTED);
    assert!(out.read::<f32>().iter().all(|x| x.is_nan()), "nothing ran");

    let plain = |rows: &[f16]| rows.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (held_k, held_v) = (plain(&cache_k.read::<f16>()), plain(&cache_v.read::<f16>()));
    let stride = (HEADS * BLOCK * D) as i64;
    let strides = Strides { block: stride, head: (BLOCK * D) as i64, token: D as i64 };
    let kv = PagedKv {
        k: Rows::F32(&held_k),
        v: Rows::F32(&held_v),
        k_offset: 0,
        v_offset: 0,
        k_strides: strides,
        v_strides: strides,
        block_tokens: BLOCK,
        num_blocks: BLOCKS,
        tables: table.iter().map(|row| &row[..]).collect(),
    };
    let shape = HeadShape {
        q_heads: Q_HEADS as u32,
        kv_heads: HEADS as u32,
        k_dim: D as u32,
        v_dim: D as u32,
        v_in_k: false,
    };
    let want = reference_attention(
        &shape,
        &Scoring::causal(D as u32),
        &kv,
        Rows::F32(&plain(&q)),
        &[0, 1, 2, 3],
        &lens.map(|n| n as usize),
    )
    .unwrap();
    // Once with a plan of its own, once with the workspace's.
    // SAFETY: every bit pattern is a value; init fills it in.
    let mut options: kvc_device_attend_options = unsafe { std::mem::zeroed() };
    let size = size_of::<kvc_device_attend_options>() as u32;
    // SAFETY: the struct is of the size given.
    ok(unsafe { kvc_device_attend_options_init(&mut options, size) });
    for planned in [0, 1] {
        options.planned = planned;
        // SAFETY: as above.
        ok(unsafe { kvc_device_attend(device, &desc, &options, ptr::null_mut()) });
        for (got, want) in out.read::<f32>().iter().zip(&want.out) {
            // Weights are rounded to f16; values are below 5.
            assert!((f64::from(*got) - want).abs() <= 5.0 * 2f64.powi(-11), "{got} for {want}");
        }
        for (got, want) in lse.read::<f32>().iter().zip(&want.lse) {
            let same = f64::from(*got) == *want;
            assert!(same || (f64::from(*got) - want).abs() <= 1e-3, "{got} for {want}");
        }
    }
    // A tail mask that shows each query its own token is the causal mask; one that does not hides it.
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let causal = bits(out.read());
    for (mask, same) in [([1u32; 3], true), ([0; 3], false)] {
        let mask = Memory::of(device, &mask);
        options.tail_mask = mask.at.cast();
        // SAFETY: as above.
        ok(unsafe { kvc_device_attend(device, &desc, &options, ptr::null_mut()) });
        assert_eq!(bits(out.read()) == causal, same);
    }
    assert_eq!(flag.read::<u32>(), [0]);
    let mut name = [0u8; 64];
    // SAFETY: the buffer has its length.
    ok(unsafe {
        kvc_device_attend_kernel(device, &desc, ptr::null(), name.as_mut_ptr().cast(), 64)
    });
    assert!(name.starts_with(b"kvc_decode_f16_d64\0"));

    drop((new_k, new_v, slots, flag, cache_k, cache_v));
    drop((workspace, lens_at, table_at, q_at, out, lse));
    // SAFETY: open, and closed once.
    ok(unsafe { kvc_device_close(device) });
}

#[test]
fn blocks_are_copied_and_zeroed_by_a_list() {
    kinds().into_iter().for_each(copy_and_zero);
}

fn copy_and_zero(kind: u32) {
    let device = open(kind);
    let blocks: Vec<u32> = (0..6 * 8).collect();
    let pool = Memory::of(device, &blocks);
    let other = Memory::of(device, &[u32::MAX; 4 * 8]);
    let list = Memory::of(device, &[5i32, 0, 2, 3, 9, 1, 0, 4]);
    let flag = Memory::of(device, &[0u32]);
    // SAFETY: every bit pattern is a value; init fills it in.
    let mut copy: kvc_device_copy_desc = unsafe { std::mem::zeroed() };
    let size = size_of::<kvc_device_copy_desc>() as u32;
    // SAFETY: the struct is of the size given.
    ok(unsafe { kvc_device_copy_desc_init(&mut copy, size) });
    (copy.count, copy.run_bytes) = (4, 32);
    (copy.from_blocks, copy.to_blocks) = (6, 4);
    (copy.from, copy.to, copy.list) = (pool.at, other.at, list.at);
    (copy.from_block_stride, copy.to_block_stride) = (32, 32);
    copy.error_flag = flag.at.cast();
    // SAFETY: the addresses are of live device memory of these sizes, here and below.
    ok(unsafe { kvc_device_copy(device, &copy, ptr::null_mut()) });
    let got = other.read::<u32>();
    assert_eq!((&got[..8], &got[24..]), (&blocks[40..48], &blocks[16..24]));
    assert!(got[8..24].iter().all(|&x| x == u32::MAX), "ids outside the pools are skipped");
    assert_ne!(flag.read::<u32>(), [0]);

    let ids = Memory::of(device, &[1i32, 3]);
    let zero = kvc_device_copy_desc { zero: 1, count: 2, list: ids.at, ..copy };
    // SAFETY: see above.
    ok(unsafe { kvc_device_copy(device, &zero, ptr::null_mut()) });
    let got = other.read::<u32>();
    assert!(got[8..16].iter().chain(&got[24..]).all(|&x| x == 0) && got[..8] == blocks[40..]);

    // An engine's own pools, one allocation a layer: K and V of three layers, by their addresses.
    let layers = |first: u32| -> Vec<Memory> {
        (0..3).map(|i| Memory::of(device, &[first + i; 5 * 8])).collect()
    };
    let (own, others) = (layers(10), layers(20));
    let addresses = |layers: &[Memory]| {
        layers.iter().map(|m| m.at.expose_provenance() as u64).collect::<Vec<_>>()
    };
    let own_at = Memory::of(device, &addresses(&own));
    let others_at = Memory::of(device, &addresses(&others));
    let pairs = Memory::of(device, &[4i32, 0, 1, 2]);
    let apart = kvc_device_copy_desc {
        count: 2,
        planes: 3,
        from_blocks: 5,
        to_blocks: 5,
        list: pairs.at,
        from: ptr::null(),
        to: ptr::null_mut(),
        from_planes: own_at.at.cast(),
        to_planes: others_at.at.cast(),
        ..copy
    };
    // SAFETY: see above.
    ok(unsafe { kvc_device_copy(device, &apart, ptr::null_mut()) });
    for (i, layer) in others.iter().enumerate() {
        let got = layer.read::<u32>();
        let block = |at: usize| got[at * 8..][..8].iter().all(|&x| x == 10 + i as u32);
        assert!(block(0) && block(2) && !block(1) && !block(3) && !block(4), "{got:?}");
    }

    for (bad, status) in [
        (kvc_device_copy_desc { run_bytes: 20, ..copy }, KVC_ERR_INVALID_ARGUMENT),
        (kvc_device_copy_desc { list: ptr::null(), ..copy }, KVC_ERR_NULL_POINTER),
        (kvc_device_copy_desc { zero: 2, ..copy }, KVC_ERR_INVALID_ARGUMENT),
        (kvc_device_copy_desc { from: copy.from.wrapping_byte_add(4), ..copy }, KVC_ERR_MISALIGNED),
    ] {
        // SAFETY: see above; these are refused.
        assert_eq!(unsafe { kvc_device_copy(device, &bad, ptr::null_mut()) }, status);
    }
    drop((pool, other, list, flag, ids, own, others, own_at, others_at, pairs));
    // SAFETY: open, and closed once.
    ok(unsafe { kvc_device_close(device) });
}

#[test]
fn a_cache_on_a_device_takes_rows_from_either_side() {
    for kind in kinds() {
        either_side(kind, KVC_FORMAT_F16, BLOCK as u32, 21);
        // A tile that is sealed and one that is open.
        either_side(kind, KVC_FORMAT_KT4V4, 64, 70);
    }
}

fn either_side(kind: u32, format: u32, block_tokens: u32, count: usize) {
    // SAFETY: every bit pattern is a value; init fills them in.
    let mut options: kvc_cache_options = unsafe { std::mem::zeroed() };
    let mut group: kvc_group_spec = unsafe { std::mem::zeroed() };
    // SAFETY: the structs are of the sizes given.
    unsafe {
        ok(kvc_cache_options_init(&mut options, size_of::<kvc_cache_options>() as u32));
        ok(kvc_group_spec_init(&mut group, size_of::<kvc_group_spec>() as u32));
    }
    options.device = kind;
    (group.layers, group.kv_heads) = (1, HEADS as u32);
    (group.k_dim, group.v_dim, group.format) = (D as u32, D as u32, format);
    options.block_tokens = block_tokens;
    let (mut cache, mut step) = (ptr::null_mut(), ptr::null_mut());
    let mut rng = Rng::new(6);
    let tokens: Vec<u32> = (0..count as u32).collect();
    let (k, v) = (halves(&mut rng, count * HEADS * D), halves(&mut rng, count * HEADS * D));
    let q = halves(&mut rng, count * Q_HEADS * D);
    let (mut seq, mut cached) = (0, 0);
    let (mut host, mut host_lse) =
        (vec![f32::NAN; count * Q_HEADS * D], vec![0f32; count * Q_HEADS]);
    // SAFETY: the pointers are to live memory of the sizes that the calls document.
    unsafe {
        let device = open(kind);
        ok(kvc_cache_create(&options, &group, 1, &mut cache));
        ok(kvc_step_create(&mut step));
        ok(kvc_seq_start(cache, tokens.as_ptr(), count as u64, 0, &mut seq, &mut cached));
        let work = kvc_work { seq, token_count: count as u32, tokens: tokens.as_ptr() };
        ok(kvc_step_begin(cache, step, &work, 1));
        let (k_at, v_at) = (k.as_ptr().cast(), v.as_ptr().cast());
        ok(kvc_step_append(cache, step, 0, 0, k_at, v_at, KVC_DTYPE_F16, ptr::null()));
        ok(kvc_step_attend(
            cache,
            step,
            0,
            0,
            Q_HEADS as u32,
            q.as_ptr().cast(),
            KVC_DTYPE_F16,
            host.as_mut_ptr().cast(),
            KVC_DTYPE_F32,
            ptr::null(),
            host_lse.as_mut_ptr(),
        ));
        // Each emulator has memory of its own, but all of it is the process's: a kernel reads it.
        let (dk, dv, dq) = (Memory::of(device, &k), Memory::of(device, &v), Memory::of(device, &q));
        let out = Memory::of(device, &vec![f32::NAN; host.len()]);
        let lse = Memory::of(device, &vec![f32::NAN; host_lse.len()]);
        ok(kvc_step_append_device(cache, step, 0, 0, dk.at, dv.at, KVC_DTYPE_F16, ptr::null()));
        let attend = |q| {
            kvc_step_attend_device(
                cache,
                step,
                0,
                0,
                Q_HEADS as u32,
                q,
                KVC_DTYPE_F16,
                out.at,
                KVC_DTYPE_F32,
                ptr::null(),
                lse.at.cast(),
            )
        };
        assert_eq!(attend(dq.at.wrapping_byte_add(8)), KVC_ERR_MISALIGNED);
        ok(attend(dq.at));
        ok(kvc_cache_sync(cache));
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&out.read::<f32>()), bits(&host));
        assert_eq!(bits(&lse.read::<f32>()), bits(&host_lse));
        assert!(host.iter().all(|x| x.is_finite()));
        ok(kvc_step_commit(cache, step));
        ok(kvc_step_destroy(step));
        ok(kvc_cache_destroy(cache));
        drop((dk, dv, dq, out, lse));
        ok(kvc_device_close(device));
    }
    // What a device has no kernels for is refused when the cache is made.
    group.format = KVC_FORMAT_F32;
    // SAFETY: as above.
    let refused = unsafe { kvc_cache_create(&options, &group, 1, &mut cache) };
    assert_eq!(refused, KVC_ERR_UNSUPPORTED);
}

#[test]
fn rates_are_what_the_device_says_until_an_engine_says_others() {
    for kind in kinds() {
        // SAFETY: every bit pattern is a value; init and the call fill them in.
        let mut options: kvc_cache_options = unsafe { std::mem::zeroed() };
        let mut group: kvc_group_spec = unsafe { std::mem::zeroed() };
        let mut rates: kvc_device_rates = unsafe { std::mem::zeroed() };
        let mut cache = ptr::null_mut();
        // SAFETY: the structs are of the sizes given.
        unsafe {
            let bytes = size_of::<kvc_device_rates>() as u64;
            ok(kvc_device_rates_read(open(kind), &mut rates, bytes));
            assert_eq!(u64::from(rates.struct_size), bytes);
            ok(kvc_cache_options_init(&mut options, size_of::<kvc_cache_options>() as u32));
            ok(kvc_group_spec_init(&mut group, size_of::<kvc_group_spec>() as u32));
            (options.device, options.blocks, options.cascade) = (kind, 4, 1);
            (group.layers, group.kv_heads) = (1, HEADS as u32);
            (group.k_dim, group.v_dim, group.format) = (D as u32, D as u32, KVC_FORMAT_F16);
            ok(kvc_cache_create(&options, &group, 1, &mut cache));
            ok(kvc_cache_set_device_rates(cache, &rates));
            for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
                let rates = kvc_device_rates { memory_bytes: wrong, ..rates };
                assert_eq!(kvc_cache_set_device_rates(cache, &rates), KVC_ERR_INVALID_ARGUMENT);
            }
            ok(kvc_cache_destroy(cache));
        }
    }
}
