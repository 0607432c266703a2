//! Calls on a prefix index: lookups and commits in one, what stays and what goes, its copy on a device
//! that is not there.

use std::ptr::null_mut;

use kvcache::capi::*;

use super::{POOL, PREFIX, Program, ROOM};

impl Program<'_> {
    pub(super) fn ranges(&mut self) -> ([kvc_retention; 2], u32) {
        let ranges = [(); 2].map(|()| kvc_retention {
            start: self.input.number(),
            end: self.input.number(),
            priority: self.input.number32(),
            duration_ms: self.input.number32(),
        });
        (ranges, self.input.below(3) as u32)
    }

    /// What the engine says about what stays in an index.
    pub(super) unsafe fn steer_prefix(&mut self) {
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

    pub(super) unsafe fn prefix_run(&mut self) {
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
}
