//! Any order of calls of the C ABI, with live, stale, foreign and invented handles and numbers of
//! every size. Pointers are NULL or valid for what the call is told; everything else is up to the
//! input. What must hold: no crash, no panic, counts that add up after every call.
#![no_main]

mod input;

use std::ptr::{null, null_mut};

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

    fn ranges(&mut self) -> ([kvc_retention; 2], u32) {
        let ranges = [(); 2].map(|()| kvc_retention {
            start: self.input.number(),
            end: self.input.number(),
            priority: self.input.number32(),
            duration_ms: self.input.number32(),
        });
        (ranges, self.input.below(3) as u32)
    }

    /// What the engine says about what stays in an index.
    unsafe fn steer_prefix(&mut self) {
        let (prefix, at) = (self.handle(PREFIX), self.positions[self.input.below(4)]);
        let number = self.input.number();
        unsafe {
            match self.input.below(9) {
                8 => self.copy_prefix(prefix),
                6 => {
                    let windows = [self.input.number32() % 70, 0, 40];
                    let groups = self.input.below(4) as u32;
                    kvc_prefix_set_windows(prefix, windows.as_ptr(), groups);
                }
                7 => {
                    let (group, count) = (self.input.below(3) as u32, self.capacity());
                    let mut forgotten = 0;
                    let ids = self.ids.as_mut_ptr();
                    kvc_prefix_forget(prefix, group, ids, count, &mut forgotten);
                }
                0 => _ = kvc_prefix_advance(prefix, number),
                1 => _ = kvc_prefix_touch(prefix, &at),
                2 => _ = kvc_prefix_release(prefix, self.pins[self.input.below(4)]),
                3 => {
                    let (ranges, count) = self.ranges();
                    kvc_prefix_prioritize(prefix, &at, ranges.as_ptr(), count);
                }
                4 => {
                    let (from, hint) = (self.input.number(), self.input.below(5) as u32);
                    kvc_prefix_hint(prefix, &at, from, hint, number);
                }
                _ => {
                    let (mut options, mut made) = (std::mem::zeroed(), null_mut());
                    let bytes = size_of_val(&options) as u32;
                    assert_eq!(kvc_prefix_options_init(&mut options, bytes), KVC_OK);
                    options.block_tokens = 1 + number as u32 % 8;
                    options.capacity_blocks = 1 + self.input.below(64) as u32;
                    options.eviction = self.input.below(6) as u32;
                    if kvc_prefix_create_with(&options, &mut made) == KVC_OK {
                        self.keep(PREFIX, made as usize);
                    }
                }
            }
        }
    }

    /// A copy of an index on a device that is not there, and the cost model of a cascade.
    unsafe fn copy_prefix(&mut self, prefix: *mut kvc_prefix) {
        let (device, copied) = (self.handle(POOL), self.handle(PREFIX));
        unsafe {
            let (mut bytes, mut made) = (0, null_mut());
            kvc_device_prefix_size(prefix, &mut bytes);
            assert_ne!(kvc_device_prefix_create(device, prefix, &mut made), KVC_OK);
            assert_ne!(kvc_device_prefix_sync(copied, null_mut(), &mut bytes), KVC_OK);
            let mut lookup = std::mem::zeroed();
            let size = size_of_val(&lookup) as u32;
            assert_eq!(kvc_device_lookup_desc_init(&mut lookup, size), KVC_OK);
            assert_ne!(kvc_device_prefix_lookup(copied, &lookup, null_mut()), KVC_OK);
            let mut query: kvc_device_cascade_query = std::mem::zeroed();
            let size = size_of_val(&query) as u32;
            assert_eq!(kvc_device_cascade_query_init(&mut query, size), KVC_OK);
            query.q_heads = self.input.number32();
            query.kv_heads = 1 + self.input.below(8) as u32;
            query.head_dim = self.input.number32();
            query.block_tokens = self.input.number32();
            query.token_bytes = self.input.number32();
            query.q_tokens = self.input.number32();
            query.seqs = self.input.number32();
            query.kv_tokens = self.input.number();
            query.memory_bytes = f64::from_bits(self.input.number());
            (query.cache_bytes, query.cache_size) = (6e6, self.input.number());
            (query.operations, query.launch) = (3e8, self.input.number() as f64);
            query.multiprocessors = self.input.number32();
            let prefixes = [(); 3].map(|()| kvc_device_cascade_prefix {
                first_seq: self.input.number32(),
                seqs: self.input.number32(),
                blocks: self.input.number32(),
                reserved: 0,
            });
            let (count, length) = (self.input.below(4) as u32, self.input.below(6) as u32);
            let mut list = [std::mem::zeroed::<kvc_device_cascade_segment>(); 5];
            let mut said: kvc_device_cascade_estimate = std::mem::zeroed();
            let (given, out) = (prefixes.as_ptr(), list.as_mut_ptr());
            let size = size_of_val(&said) as u64;
            if kvc_device_cascade_choose(&query, given, count, out, length, &mut said, size)
                == KVC_OK
            {
                // The list covers the batch in order.
                let mut end = 0;
                for segment in &list[..length as usize] {
                    assert!(segment.first_seq == end);
                    end += segment.seqs;
                }
                assert_eq!(end, query.seqs);
            }
        }
    }

    /// The same of a cache's sequences.
    unsafe fn steer_cache(&mut self) {
        let (cache, seq) = (self.handle(CACHE), self.seqs[self.input.below(8)]);
        let number = self.input.number();
        unsafe {
            match self.input.below(3) {
                0 => _ = kvc_cache_advance(cache, number),
                1 => {
                    let (ranges, count) = self.ranges();
                    kvc_seq_prioritize(cache, seq, ranges.as_ptr(), count);
                }
                _ => {
                    let (from, hint) = (self.input.number(), self.input.below(5) as u32);
                    kvc_seq_hint(cache, seq, from, hint, number);
                }
            }
        }
    }

    /// Metrics, and a name for a namespace.
    unsafe fn measure(&mut self) {
        let cache = self.handle(CACHE);
        let number = self.input.number();
        unsafe {
            match self.input.below(5) {
                0 => _ = kvc_metrics_watch(cache, number as u32),
                1 => _ = kvc_metrics_set_time(cache, number),
                2 => {
                    let mut metrics: kvc_metrics = std::mem::zeroed();
                    let bytes = number.min(size_of_val(&metrics) as u64);
                    kvc_metrics_read(cache, &mut metrics, bytes);
                }
                3 => {
                    let (mut text, mut length) = ([0u8; 300], 0);
                    let room = number.min(text.len() as u64);
                    kvc_metrics_text(cache, text.as_mut_ptr().cast(), room, &mut length);
                }
                _ => {
                    let names = [c"".as_ptr(), c"tenant".as_ptr(), null()];
                    let salt = names[self.input.below(3)];
                    kvc_events_describe(cache, number % 3, salt, names[self.input.below(3)]);
                }
            }
        }
    }

    unsafe fn prefix_run(&mut self) {
        let (prefix, tokens) = (self.handle(PREFIX), self.input.tokens(40));
        let count = tokens.len() as u64;
        let max = self.input.number();
        let room = self.capacity();
        let ids = self.ids.as_mut_ptr();
        let query = kvc_prefix_query {
            name_space: self.input.number() % 3,
            tokens: tokens.as_ptr(),
            token_count: count,
            max_tokens: max,
            out_blocks: ids,
            capacity: room,
            out_tail_blocks: if self.input.seldom() {
                ids.wrapping_add(ROOM / 2)
            } else {
                null_mut()
            },
            pin: self.input.below(3) as u32,
            reserved: 0,
        };
        let given: Vec<i32> = (0..self.input.below(40) as i32).collect();
        let above = if self.input.seldom() {
            self.positions[self.input.below(4)]
        } else {
            kvc_prefix_position { parts: [0; 3], reserved: 0 }
        };
        let commit = kvc_prefix_commit {
            name_space: self.input.number() % 3,
            above,
            tokens: tokens.as_ptr(),
            token_count: count,
            blocks: given.as_ptr(),
            block_ids: given.len() as u64,
            out_present: null_mut(),
            capacity: 0,
        };
        let pin = self.pins[self.input.below(4)];
        unsafe {
            let (mut answer, mut committed) = (std::mem::zeroed(), std::mem::zeroed());
            let mut batch = std::mem::zeroed();
            assert_eq!(kvc_prefix_batch_init(&mut batch, size_of_val(&batch) as u32), KVC_OK);
            (batch.queries, batch.out_answers) = (&query, &mut answer);
            (batch.commits, batch.out_committed) = (&commit, &mut committed);
            batch.unlocks = &pin;
            batch.query_count = self.input.below(2) as u32;
            batch.commit_count = self.input.below(2) as u32;
            batch.unlock_count = u32::from(self.input.seldom());
            if kvc_prefix_run(prefix, &batch) != KVC_OK {
                return;
            }
            let slot = self.input.below(4);
            if batch.query_count == 1 && answer.status == KVC_OK {
                (self.positions[slot], self.pins[slot]) = (answer.hit.at, answer.pin);
                assert!(answer.hit.tokens <= count.min(max));
            }
            if batch.commit_count == 1 && committed.status == KVC_OK {
                self.positions[slot] = committed.inserted.at;
            }
        }
    }

    unsafe fn cache_create(&mut self) {
        unsafe {
            let (mut options, mut made) = (std::mem::zeroed(), null_mut());
            let bytes = size_of_val(&options) as u32;
            assert_eq!(kvc_cache_options_init(&mut options, bytes), KVC_OK);
            options.blocks = self.input.number32().min(64);
            options.max_seqs = self.input.number32().min(64);
            options.threads = 1;
            options.prefix_reuse = self.input.below(3) as u32;
            options.eviction = self.input.below(6) as u32;
            options.scrub = self.input.below(3) as u32;
            let own = [self.input.below(20) as u32, self.input.below(20) as u32];
            if self.input.seldom() {
                options.group_blocks = own.as_ptr();
            }
            if self.input.seldom() {
                options.block_tokens = self.input.number32();
            }
            let mut groups = [std::mem::zeroed::<kvc_group_spec>(); 2];
            for group in &mut groups {
                assert_eq!(kvc_group_spec_init(group, size_of_val(group) as u32), KVC_OK);
                group.layers = 1 + self.input.below(2) as u32;
                group.kv_heads = 1 + self.input.below(2) as u32;
                group.k_dim = DIM as u32;
                group.v_dim = DIM as u32;
                group.format = 1 + self.input.below(4) as u32;
                group.window = self.input.below(3) as u32 * 20;
            }
            let count = self.input.below(4) as u32;
            if count <= 2 {
                kvc_cache_create(&options, groups.as_ptr(), count, &mut made);
            }
            self.keep(CACHE, made as usize);
        }
    }

    /// A host tier, and sequences that start before what it has of them is on the device.
    unsafe fn onboard(&mut self) {
        let (cache, step) = (self.handle(CACHE), self.handle::<kvc_step>(STEP));
        let at = self.input.below(8);
        let (seq, group) = (self.seqs[at], self.input.below(3) as u32);
        let (layer, wait) = (self.input.below(3) as u32, self.input.below(2) as u32);
        unsafe {
            match self.input.below(6) {
                0 => {
                    let mut options = std::mem::zeroed();
                    let bytes = size_of_val(&options) as u32;
                    assert_eq!(kvc_tier_options_init(&mut options, bytes), KVC_OK);
                    options.model = c"fuzz".as_ptr();
                    options.host_blocks = self.input.below(32) as u64;
                    kvc_tier_attach(cache, &options);
                }
                1 | 2 => {
                    let prompt = self.input.tokens(60);
                    let (mut new, mut cached) = (u32::MAX, 0);
                    let (tokens, count) = (prompt.as_ptr(), prompt.len() as u64);
                    let space = self.input.number() % 3;
                    let none = null();
                    let status = kvc_onboard_start(
                        cache,
                        tokens,
                        count,
                        none,
                        0,
                        space,
                        &mut new,
                        &mut cached,
                    );
                    assert!(status != KVC_OK || u64::from(cached) < count);
                    self.seqs[at] = new;
                }
                3 => {
                    let mut there = 7;
                    let status = kvc_onboard_wait(cache, seq, group, layer, wait, &mut there);
                    // The host has all of it, always.
                    assert_eq!(there, if status == KVC_OK { 1 } else { 7 });
                }
                4 => {
                    let mut there = 7;
                    kvc_onboard_wait_step(cache, step, group, layer, wait, &mut there);
                }
                _ => {
                    let mut progress = std::mem::zeroed();
                    let mut tokens = 0;
                    let bytes = self.input.number().min(size_of::<kvc_onboard_progress>() as u64);
                    kvc_onboard_state(cache, seq, &mut progress, bytes);
                    kvc_onboard_cancel(cache, seq, &mut tokens);
                }
            }
        }
    }

    /// Begins, or goes on with, a step.
    unsafe fn step(&mut self) {
        let (cache, step) = (self.handle(CACHE), self.handle(STEP));
        unsafe {
            match self.input.below(6) {
                0 | 1 => {
                    let lists = [self.input.tokens(MAX_ROWS / 2), self.input.tokens(MAX_ROWS / 2)];
                    let work = lists.each_ref().map(|tokens| kvc_work {
                        seq: self.seqs[self.input.below(8)],
                        token_count: tokens.len() as u32,
                        tokens: if tokens.is_empty() { null() } else { tokens.as_ptr() },
                    });
                    let count = self.input.below(3) as u32;
                    kvc_step_begin(cache, step, work.as_ptr(), count);
                }
                2 => {
                    let rope: *const kvc_rope = null();
                    let (group, layer) = (self.input.below(3) as u32, self.input.below(3) as u32);
                    let (k, v) = (self.rows.as_ptr().cast(), self.rows.as_ptr().cast());
                    kvc_step_append(cache, step, group, layer, k, v, KVC_DTYPE_F32, rope);
                }
                3 => {
                    let (group, layer) = (self.input.below(3) as u32, self.input.below(3) as u32);
                    let heads = self.input.below(HEADS + 1) as u32;
                    let (q, out) = (self.rows.as_ptr().cast(), self.out.as_mut_ptr().cast());
                    let (f32_, none) = (KVC_DTYPE_F32, null());
                    kvc_step_attend(
                        cache,
                        step,
                        group,
                        layer,
                        heads,
                        q,
                        f32_,
                        out,
                        f32_,
                        none,
                        null_mut(),
                    );
                }
                4 => _ = kvc_step_commit(cache, step),
                _ => _ = kvc_step_cancel(cache, step),
            }
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
