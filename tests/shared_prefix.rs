//! One prefix index in the hands of several threads, through the C ABI: every answer is true while
//! others insert and evict, and what a call pinned stays.
#![cfg(feature = "std")]

use std::collections::HashMap;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use kvcache::capi::*;

mod random;
use random::Rng;

const BLOCK: usize = 4;
const CAPACITY: u32 = 48;

/// A handle that threads share.
#[derive(Clone, Copy)]
struct Index(*mut kvc_prefix);
// SAFETY: the handle is a number, and the noun is documented as thread-safe.
unsafe impl Send for Index {}
// SAFETY: likewise.
unsafe impl Sync for Index {}

/// Few distinct sequences, long shared parts.
fn tokens(rng: &mut Rng) -> Vec<u32> {
    let blocks = 1 + rng.below(6);
    (0..blocks * BLOCK).map(|i| if i % BLOCK == 0 { rng.below(3) as u32 } else { 7 }).collect()
}

/// Looks up, with a pin, and answers with the ids and the pin.
fn look_up(index: Index, tokens: &[u32]) -> (Vec<i32>, u64) {
    let mut blocks = [0i32; 8];
    let query = kvc_prefix_query {
        name_space: 1,
        tokens: tokens.as_ptr(),
        token_count: tokens.len() as u64,
        max_tokens: u64::MAX,
        out_blocks: blocks.as_mut_ptr(),
        capacity: 8,
        out_tail_blocks: ptr::null_mut(),
        pin: 1,
        reserved: 0,
    };
    // SAFETY: plain numbers and pointers; all of it outlives the call.
    unsafe {
        let mut answer: kvc_prefix_answer = std::mem::zeroed();
        let mut batch: kvc_prefix_batch = std::mem::zeroed();
        assert_eq!(kvc_prefix_batch_init(&mut batch, size_of_val(&batch) as u32), KVC_OK);
        (batch.queries, batch.query_count, batch.out_answers) = (&query, 1, &mut answer);
        assert_eq!(kvc_prefix_run(index.0, &batch), KVC_OK);
        assert_eq!(answer.status, KVC_OK);
        (blocks[..answer.hit.block_ids as usize].to_vec(), answer.pin)
    }
}

#[test]
fn threads_share_an_index() {
    // What each block id was inserted for: ids are given once, so an answer can be checked.
    let meaning: Mutex<HashMap<i32, Vec<u32>>> = Mutex::default();
    let pinned: Mutex<HashMap<i32, u32>> = Mutex::default();
    let next = AtomicU32::new(0);
    let mut handle = ptr::null_mut();
    // SAFETY: writable.
    unsafe { assert_eq!(kvc_prefix_create(BLOCK as u32, 1, CAPACITY, &mut handle), KVC_OK) };
    let index = Index(handle);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (meaning, pinned, next) = (&meaning, &pinned, &next);
            scope.spawn(move || {
                let index: Index = index;
                let mut rng = Rng::new(thread + 1);
                for _ in 0..if cfg!(miri) { 20 } else { 4000 } {
                    let tokens = tokens(&mut rng);
                    match rng.below(4) {
                        0 => {
                            let ids: Vec<i32> = (0..tokens.len() / BLOCK)
                                .map(|_| next.fetch_add(1, Ordering::Relaxed) as i32)
                                .collect();
                            let mut meaning = meaning.lock().unwrap();
                            for (n, &id) in ids.iter().enumerate() {
                                meaning.insert(id, tokens[..(n + 1) * BLOCK].to_vec());
                            }
                            drop(meaning);
                            let (at, count) = (tokens.as_ptr(), tokens.len() as u64);
                            // SAFETY: the arrays outlive the call.
                            let status = unsafe {
                                let mut done: kvc_prefix_inserted = std::mem::zeroed();
                                let (ids, n) = (ids.as_ptr(), ids.len() as u64);
                                let none = ptr::null_mut();
                                kvc_prefix_insert(index.0, 1, at, count, ids, n, none, 0, &mut done)
                            };
                            assert_eq!(status, KVC_OK);
                        }
                        1 => {
                            let (mut gone, mut count) = ([0i32; 8], 0);
                            // Held across the call, so that no pin of now is missed.
                            let pinned = pinned.lock().unwrap();
                            // SAFETY: room for what is asked.
                            let status = unsafe {
                                kvc_prefix_evict(index.0, 8, gone.as_mut_ptr(), 8, &mut count)
                            };
                            assert_eq!(status, KVC_OK);
                            for id in &gone[..count as usize] {
                                assert_eq!(pinned.get(id), None, "evicted while pinned");
                            }
                        }
                        _ => {
                            let (ids, pin) = {
                                let mut pinned = pinned.lock().unwrap();
                                let (ids, pin) = look_up(index, &tokens);
                                ids.iter().for_each(|&id| *pinned.entry(id).or_default() += 1);
                                (ids, pin)
                            };
                            let meaning_now = meaning.lock().unwrap();
                            for (n, id) in ids.iter().enumerate() {
                                assert_eq!(meaning_now[id], tokens[..(n + 1) * BLOCK]);
                            }
                            drop(meaning_now);
                            let mut pinned = pinned.lock().unwrap();
                            for id in &ids {
                                let count = pinned.get_mut(id).unwrap();
                                *count -= 1;
                                if *count == 0 {
                                    pinned.remove(id);
                                }
                            }
                            // SAFETY: a live pin of this index.
                            unsafe { assert_eq!(kvc_prefix_unlock(index.0, pin), KVC_OK) };
                        }
                    }
                }
            });
        }
    });
    // SAFETY: the handle is live, `counts` writable.
    unsafe {
        let mut counts: kvc_prefix_counts = std::mem::zeroed();
        let bytes = size_of_val(&counts) as u64;
        assert_eq!(kvc_prefix_stats(index.0, &mut counts, bytes), KVC_OK);
        assert_eq!(counts.pins, 0);
        assert!(counts.blocks <= u64::from(CAPACITY));
        assert_eq!(kvc_prefix_destroy(index.0), KVC_OK);
    }
}
