//! Calls on a cache: its sizes, what it is told of its sequences, metrics, tiers, and steps.

use std::ptr::{null, null_mut};

use kvcache::capi::*;

use super::{CACHE, DIM, HEADS, MAX_ROWS, Program, STEP};

impl Program<'_> {
    pub(super) unsafe fn cache_create(&mut self) {
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

    /// The same of a cache's sequences.
    pub(super) unsafe fn steer_cache(&mut self) {
        let (cache, seq) = (self.handle(CACHE), self.seqs[self.input.below(8)]);
        let number = self.input.number();
        unsafe {
            match self.input.below(4) {
                0 => _ = kvc_cache_advance(cache, number),
                // No cache here is on a device.
                3 => {
                    let mut rates: kvc_device_rates = std::mem::zeroed();
                    rates.struct_size = size_of_val(&rates) as u32;
                    rates.memory_bytes = f64::from_bits(number);
                    assert_ne!(kvc_cache_set_device_rates(cache, &rates), KVC_OK);
                }
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
    pub(super) unsafe fn measure(&mut self) {
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

    /// A host tier, and sequences that start before what it has of them is on the device.
    pub(super) unsafe fn onboard(&mut self) {
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
    pub(super) unsafe fn step(&mut self) {
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
}
