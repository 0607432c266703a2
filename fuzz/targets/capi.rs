//! Any order of calls of the C ABI, with live, stale, foreign and invented handles and numbers of
//! every size. Pointers are NULL or valid for what the call is told; everything else is up to the
//! input. What must hold: no crash, no panic, counts that add up after every call.
#![no_main]

#[path = "capi/cache.rs"]
mod cache;
mod input;
#[path = "capi/prefix.rs"]
mod prefix;

use std::ptr::null_mut;

use input::Input;
use kvcache::capi::*;
use libfuzzer_sys::fuzz_target;

/// Handles of one noun a program may hold.
const SLOTS: usize = 3;
/// Elements of every buffer that a call may write.
const ROOM: usize = 4096;
const MAX_ROWS: usize = 32;
const HEADS: usize = 4;
const DIM: usize = 16;

struct Program<'a> {
    input: Input<'a>,
    /// Of each noun, live and stale: pool, prefix, cache, step.
    handles: [[usize; SLOTS]; 4],
    seqs: [u32; 8],
    positions: [kvc_prefix_position; 4],
    pins: [u64; 4],
    ids: Vec<i32>,
    words: Vec<u32>,
    rows: Vec<f32>,
    out: Vec<f32>,
}

const POOL: usize = 0;
const PREFIX: usize = 1;
const CACHE: usize = 2;
const STEP: usize = 3;

impl Program<'_> {
    /// A handle of this noun, or what is none.
    fn handle<T>(&mut self, noun: usize) -> *mut T {
        let value = if self.input.seldom() {
            let foreign = self.handles[self.input.below(4)][self.input.below(SLOTS)];
            [foreign, self.input.number() as usize, foreign ^ 1][self.input.below(3)]
        } else {
            self.handles[noun][self.input.below(SLOTS)]
        };
        value as *mut T
    }

    /// Keeps a new handle where a call made one; the old one stays live, and leaks until the end
    /// where nothing destroys it, so it is destroyed here.
    fn keep(&mut self, noun: usize, made: usize) {
        if made != 0 {
            let slot = self.input.below(SLOTS);
            let old = std::mem::replace(&mut self.handles[noun][slot], made);
            destroy(noun, old);
        }
    }

    /// A place for a result, or NULL.
    fn or_null<T>(&mut self, place: *mut T) -> *mut T {
        if self.input.seldom() { null_mut() } else { place }
    }

    /// Random block ids in the buffer, and how many.
    fn some_ids(&mut self) -> (*const i32, u32) {
        let count = self.input.below(40);
        for i in 0..count {
            self.ids[i] = self.input.number() as i32;
        }
        (self.ids.as_ptr(), count as u32)
    }

    fn capacity(&mut self) -> u64 {
        self.input.number().min(ROOM as u64)
    }

    /// # Safety
    /// None: whatever the input says must be answered.
    unsafe fn call(&mut self) {
        match self.input.below(29) {
            0 => {
                let mut made = null_mut();
                // Up to what is created in an instant.
                let blocks = self.input.number32().min(1 << 16);
                let out = self.or_null(&mut made);
                unsafe { kvc_pool_create(blocks, out) };
                self.keep(POOL, made as usize);
            }
            1 => unsafe {
                kvc_pool_destroy(self.handle(POOL));
            },
            2 => {
                let n = (self.input.number() as usize).min(ROOM) as u32;
                let out = self.ids.as_mut_ptr();
                let out = self.or_null(out);
                unsafe { kvc_pool_allocate_n(self.handle(POOL), n, out) };
            }
            3 => {
                let (ids, n) = self.some_ids();
                unsafe { kvc_pool_retain_n(self.handle(POOL), ids, n) };
            }
            4 => {
                let (ids, n) = self.some_ids();
                let mut freed = 0;
                unsafe { kvc_pool_free_n(self.handle(POOL), ids, n, &mut freed) };
            }
            5 => {
                let mut refs = 0;
                let block = self.input.number() as i32;
                unsafe { kvc_pool_refs(self.handle(POOL), block, &mut refs) };
            }
            6 => {
                let mut made = null_mut();
                let (block_tokens, groups) = (self.input.number32(), self.input.number32());
                let capacity = self.input.number32().min(1 << 12);
                unsafe { kvc_prefix_create(block_tokens, groups.min(8), capacity, &mut made) };
                self.keep(PREFIX, made as usize);
            }
            7 => unsafe {
                kvc_prefix_destroy(self.handle(PREFIX));
            },
            8..=10 => unsafe { self.prefix_run() },
            11 => {
                let at = self.positions[self.input.below(4)];
                let mut pin = 0;
                unsafe { kvc_prefix_lock(self.handle(PREFIX), &at, &mut pin) };
                let slot = self.input.below(4);
                self.pins[slot] = pin;
            }
            12 => {
                let (want, capacity) = (self.input.number(), self.capacity());
                let mut evicted = 0;
                let out = self.ids.as_mut_ptr();
                unsafe { kvc_prefix_evict(self.handle(PREFIX), want, out, capacity, &mut evicted) };
            }
            13 => unsafe { self.cache_create() },
            14 => unsafe {
                kvc_cache_destroy(self.handle(CACHE));
            },
            15 => unsafe {
                kvc_cache_clear_prefix(self.handle(CACHE));
            },
            16 | 17 => {
                let prompt = self.input.tokens(60);
                let (mut seq, mut cached) = (u32::MAX, 0);
                let (at, count) = (prompt.as_ptr(), prompt.len() as u64);
                let space = self.input.number() % 3;
                let digest = [self.input.below(4) as u8; 32];
                let media = [5, self.input.number()].map(|position| kvc_media { position, digest });
                let (images, some) = (media.as_ptr(), self.input.below(3) as u32);
                unsafe {
                    kvc_seq_start_media(
                        self.handle(CACHE),
                        at,
                        count,
                        images,
                        some,
                        space,
                        &mut seq,
                        &mut cached,
                    )
                };
                let slot = self.input.below(8);
                self.seqs[slot] = seq;
            }
            18 => {
                let (from, to) = (self.seqs[self.input.below(8)], self.input.below(8));
                unsafe { kvc_seq_fork(self.handle(CACHE), from, &mut self.seqs[to]) };
            }
            19 => {
                let (seq, tokens) = (self.seqs[self.input.below(8)], self.input.number32());
                unsafe { kvc_seq_truncate(self.handle(CACHE), seq, tokens) };
            }
            20 => {
                let seq = self.seqs[self.input.below(8)];
                unsafe { kvc_seq_release(self.handle(CACHE), seq) };
            }
            21 => {
                let (seq, capacity) = (self.seqs[self.input.below(8)], self.capacity());
                let (mut count, group) = (0, self.input.number32());
                let (words, ids) = (self.words.as_mut_ptr(), self.ids.as_mut_ptr());
                unsafe {
                    kvc_seq_tokens(self.handle(CACHE), seq, words, capacity, &mut count);
                    kvc_seq_blocks(self.handle(CACHE), seq, group, ids, capacity, &mut count);
                }
            }
            22 => {
                let mut made = null_mut();
                unsafe { kvc_step_create(&mut made) };
                self.keep(STEP, made as usize);
            }
            23 => unsafe {
                kvc_step_destroy(self.handle(STEP));
            },
            24 => unsafe { self.steer_prefix() },
            25 => unsafe { self.steer_cache() },
            26 => unsafe { self.measure() },
            27 => unsafe { self.onboard() },
            _ => unsafe { self.step() },
        }
    }

    /// Counts of everything that is live add up.
    fn check(&self) {
        for slot in 0..SLOTS {
            unsafe {
                let mut c: kvc_pool_counts = std::mem::zeroed();
                let (handle, bytes) = (self.handles[POOL][slot] as *mut _, size_of_val(&c) as u64);
                if kvc_pool_stats(handle, &mut c, bytes) == KVC_OK {
                    assert_eq!(c.free_blocks + c.held_blocks, c.blocks);
                }
                let mut c: kvc_prefix_counts = std::mem::zeroed();
                let (handle, bytes) =
                    (self.handles[PREFIX][slot] as *mut _, size_of_val(&c) as u64);
                if kvc_prefix_stats(handle, &mut c, bytes) == KVC_OK {
                    assert!(c.blocks <= c.capacity_blocks);
                }
                let mut c: kvc_cache_counts = std::mem::zeroed();
                let (handle, bytes) = (self.handles[CACHE][slot] as *mut _, size_of_val(&c) as u64);
                if kvc_cache_stats(handle, &mut c, bytes) == KVC_OK {
                    let all = c.free_blocks + c.cached_blocks + c.referenced_blocks;
                    assert_eq!(all, c.blocks);
                    let handle = self.handles[CACHE][slot] as *const _;
                    assert_eq!(kvc_cache_audit(handle), KVC_OK);
                }
            }
        }
    }
}

fn destroy(noun: usize, handle: usize) {
    unsafe {
        match noun {
            POOL => kvc_pool_destroy(handle as *mut _),
            PREFIX => kvc_prefix_destroy(handle as *mut _),
            CACHE => kvc_cache_destroy(handle as *mut _),
            _ => kvc_step_destroy(handle as *mut _),
        };
    }
}

fuzz_target!(|data: &[u8]| {
    let mut program = Program {
        input: Input(data),
        handles: [[0; SLOTS]; 4],
        seqs: [u32::MAX; 8],
        positions: [kvc_prefix_position { parts: [0; 3], reserved: 0 }; 4],
        pins: [0; 4],
        ids: vec![0; ROOM],
        words: vec![0; ROOM],
        rows: vec![0.5; MAX_ROWS * HEADS * DIM],
        out: vec![0.0; MAX_ROWS * HEADS * DIM],
    };
    while !program.input.is_empty() {
        // SAFETY: see `call`.
        unsafe { program.call() };
        program.check();
    }
    // Steps before caches: a step that is open gives its blocks back first.
    for noun in [STEP, CACHE, PREFIX, POOL] {
        for handle in program.handles[noun] {
            destroy(noun, handle);
        }
    }
});
