//! Memory that is refused: the nouns that promise it allocate nothing after creation, and the
//! others answer KVC_ERR_OUT_OF_MEMORY at every allocation that fails, and work afterwards.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::{null, null_mut};

use kvcache::capi::*;

/// The system's allocator, which refuses one allocation of the thread that asked for it.
struct Refusing;

thread_local! {
    /// Allocations of this thread that still succeed; `u64::MAX` for all.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

fn granted() -> bool {
    COUNT.with(|count| count.set(count.get() + 1));
    LEFT.with(|left| match left.get() {
        u64::MAX => true,
        0 => false,
        n => {
            left.set(n - 1);
            true
        }
    })
}

// SAFETY: the system's allocator, or NULL, which means refused.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        if granted() { unsafe { System.alloc(layout) } } else { null_mut() }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        if granted() { unsafe { System.alloc_zeroed(layout) } } else { null_mut() }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        if granted() { unsafe { System.realloc(block, layout, size) } } else { null_mut() }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

/// Runs `call` with `left` allocations, and counts those it made.
fn with_allocations<R>(left: u64, call: impl FnOnce() -> R) -> (R, u64) {
    COUNT.with(|count| count.set(0));
    LEFT.with(|l| l.set(left));
    let result = call();
    LEFT.with(|l| l.set(u64::MAX));
    (result, COUNT.with(Cell::get))
}

/// Calls with 0, 1, 2, ... allocations until it succeeds; every answer before must be
/// KVC_ERR_OUT_OF_MEMORY. Returns how often it was refused.
fn refused_until_it_works(mut call: impl FnMut() -> kvc_status) -> u64 {
    for n in 0.. {
        match with_allocations(n, &mut call).0 {
            KVC_OK => return n,
            KVC_ERR_OUT_OF_MEMORY => {}
            other => panic!("status {other} with {n} allocations"),
        }
    }
    unreachable!()
}

#[test]
fn a_pool_is_made_or_refused_and_then_allocates_nothing() {
    let mut pool = null_mut();
    // SAFETY: everything that is passed lives through the calls.
    unsafe {
        let refusals = refused_until_it_works(|| kvc_pool_create(1000, &mut pool));
        assert!(refusals >= 3, "the arrays and the object: {refusals}");
        let mut blocks = [0; 1000];
        let (status, made) = with_allocations(0, || {
            assert_eq!(kvc_pool_allocate_n(pool, 1000, blocks.as_mut_ptr()), KVC_OK);
            assert_eq!(kvc_pool_allocate_n(pool, 1, blocks.as_mut_ptr()), KVC_ERR_OUT_OF_BLOCKS);
            assert_eq!(kvc_pool_retain_n(pool, blocks.as_ptr(), 1000), KVC_OK);
            assert_eq!(kvc_pool_free_n(pool, blocks.as_ptr(), 1000, null_mut()), KVC_OK);
            kvc_pool_free_n(pool, blocks.as_ptr(), 1000, null_mut())
        });
        assert_eq!((status, made), (KVC_OK, 0));
        assert_eq!(kvc_pool_destroy(pool), KVC_OK);
    }
}

#[test]
fn a_prefix_index_refuses_whole_and_works_afterwards() {
    let mut prefix = null_mut();
    // SAFETY: everything that is passed lives through the calls.
    unsafe {
        assert!(refused_until_it_works(|| kvc_prefix_create(4, 1, 1000, &mut prefix)) > 0);
        let mut refusals = 0;
        for sequence in 0..20u32 {
            let tokens: Vec<u32> = (0..40).map(|i| i.min(sequence) * 7 + i).collect();
            let blocks: Vec<i32> = (0..10).map(|i| sequence as i32 * 10 + i).collect();
            let mut inserted = std::mem::zeroed();
            refusals += refused_until_it_works(|| {
                kvc_prefix_insert(
                    prefix,
                    0,
                    tokens.as_ptr(),
                    40,
                    blocks.as_ptr(),
                    10,
                    null_mut(),
                    0,
                    &mut inserted,
                )
            });
            // Found under the ids that it was given, or that were there before: all ten blocks.
            let (mut found, mut hit) = ([0; 10], std::mem::zeroed());
            let status = kvc_prefix_lookup(
                prefix,
                0,
                tokens.as_ptr(),
                40,
                40,
                found.as_mut_ptr(),
                10,
                null_mut(),
                &mut hit,
            );
            assert_eq!((status, hit.tokens), (KVC_OK, 40));
            assert_eq!(found[9], blocks[9]);
            let mut pin = 0;
            refusals += refused_until_it_works(|| kvc_prefix_lock(prefix, &hit.at, &mut pin));
            assert_eq!(kvc_prefix_unlock(prefix, pin), KVC_OK);
        }
        assert!(refusals > 0, "something was allocated");
        assert_eq!(kvc_prefix_destroy(prefix), KVC_OK);
    }
}

#[test]
fn kernels_and_errors_allocate_nothing() {
    let (k, v, q) = (vec![0.5f32; 4 * 16 * 64], vec![1.0f32; 4 * 16 * 64], vec![1.0f32; 64]);
    let mut out = vec![0f32; 64];
    let (table, q_indptr, kv_lens) = ([3i32, 1, 0, 2], [0i32, 1], [50i32]);
    // SAFETY: everything that is passed lives through the calls; a zeroed struct is a value.
    unsafe {
        let mut desc = std::mem::zeroed::<kvc_attend_desc>();
        assert_eq!(kvc_attend_desc_init(&mut desc, size_of_val(&desc) as u32), KVC_OK);
        (desc.q_heads, desc.kv_heads, desc.k_dim, desc.v_dim) = (1, 1, 64, 64);
        (desc.format, desc.q_dtype, desc.out_dtype) =
            (KVC_FORMAT_F32, KVC_DTYPE_F32, KVC_DTYPE_F32);
        (desc.block_tokens, desc.num_blocks, desc.seqs) = (16, 4, 1);
        (desc.k, desc.v, desc.q) = (k.as_ptr().cast(), v.as_ptr().cast(), q.as_ptr().cast());
        (desc.table, desc.table_stride) = (table.as_ptr(), 4);
        (desc.q_indptr, desc.kv_lens) = (q_indptr.as_ptr(), kv_lens.as_ptr());
        desc.out = out.as_mut_ptr().cast();
        let mut bytes = 0;
        // The first call asks the CPU what it is, once.
        assert_eq!(kvc_attend_workspace_size(&desc, 1, 64, &mut bytes), KVC_OK);
        assert_eq!(kvc_attend(&desc), KVC_ERR_BUFFER_TOO_SMALL);
        let mut workspace = vec![0u8; bytes as usize];
        desc.workspace = workspace.as_mut_ptr().cast();
        desc.workspace_bytes = bytes;
        let (_, made) = with_allocations(0, || {
            assert_eq!(kvc_attend(&desc), KVC_OK);
            assert_eq!(kvc_attend(null()), KVC_ERR_NULL_POINTER);
            let mut text = [0; 100];
            assert!(kvc_last_error(text.as_mut_ptr(), 100) > 0);
            assert!(kvc_build_info(text.as_mut_ptr(), 100) > 0);
        });
        assert_eq!(made, 0);
        assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6), "{out:?}");
    }
}
