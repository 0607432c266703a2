//! What belongs to the process, the kernels alone, and the prefix index.

use std::ptr::null_mut;
use std::sync::atomic::Ordering;

use kvcache::capi::*;

use crate::caller::{Caller, DIM, size, zeroed};

impl Caller<'_> {
    pub fn process(&mut self) {
        let mut text = [0u8; 1024];
        let (at, room) = (text.as_mut_ptr().cast(), text.len() as u64);
        call!(self, kvc_status_text(KVC_ERR_OVERFLOW, at, room));
        call!(self, kvc_build_info(at, room));
        call!(self, kvc_abi_0_1());
        assert!(call!(self, kvc_abi_version()) > 0);
        assert!(!call!(self, kvc_version()).is_null());
        // Each thread has its own error.
        assert_eq!(call!(self, kvc_pool_create(4, null_mut())), KVC_ERR_NULL_POINTER);
        assert!(call!(self, kvc_last_error(at, room)) > 0);
        call!(self, kvc_last_missing_blocks());
        let mut pool = null_mut();
        ok!(self, kvc_pool_create(4, &mut pool));
        // SAFETY: this thread's own.
        unsafe { assert_eq!(kvc_pool_destroy(pool), KVC_OK) };
    }

    pub fn kernels(&mut self) {
        let (mut attend, mut append): (kvc_attend_desc, kvc_append_desc) = (zeroed(), zeroed());
        let (bytes, append_bytes) = (size(&attend), size(&append));
        ok!(self, kvc_attend_desc_init(&mut attend, bytes));
        ok!(self, kvc_append_desc_init(&mut append, append_bytes));
        // What they say to an empty description is not of interest here, only that they may be asked
        // at once; calls with work are in the steps below and in `cpu`'s own tests.
        let (mut needed, mut text) = (0, [0u8; 64]);
        call!(self, kvc_attend_workspace_size(&attend, 1, 1, &mut needed));
        call!(self, kvc_attend_kernel(&attend, 1, text.as_mut_ptr().cast(), text.len() as u64));
        call!(self, kvc_attend(&attend));
        call!(self, kvc_append(&append));
        let (mut out, mut lse) = ([1f32; DIM], [0f32]);
        let (other, other_lse) = ([2f32; DIM], [1f32]);
        ok!(
            self,
            kvc_merge_states(
                out.as_mut_ptr(),
                lse.as_mut_ptr(),
                other.as_ptr(),
                other_lse.as_ptr(),
                1,
                DIM as u32,
            )
        );
        let mut seal: kvc_seal_desc = zeroed();
        let bytes = size(&seal);
        ok!(self, kvc_seal_desc_init(&mut seal, bytes));
        call!(self, kvc_seal_record_size(&seal, &mut needed));
        call!(self, kvc_seal(&seal));
        let (mut scales, mut tiles): (kvc_scales, kvc_tile_view) = (zeroed(), zeroed());
        let (bytes, tile_bytes) = (size(&scales), size(&tiles));
        ok!(self, kvc_scales_init(&mut scales, bytes));
        ok!(self, kvc_tile_view_init(&mut tiles, tile_bytes));
        let mut rope: kvc_rope = zeroed();
        let bytes = size(&rope);
        ok!(self, kvc_rope_init(&mut rope, bytes));
        call!(self, kvc_rope_rotate(&rope, out.as_mut_ptr(), 1, DIM as u32, [3u32].as_ptr(), 1));
        let (mut options, mut group): (kvc_plan_options, kvc_group_spec) = (zeroed(), zeroed());
        let (bytes, group_bytes) = (size(&options), size(&group));
        ok!(self, kvc_plan_options_init(&mut options, bytes));
        ok!(self, kvc_group_spec_init(&mut group, group_bytes));
        let mut plan: kvc_plan_result = zeroed();
        let room = u64::from(size(&plan));
        call!(self, kvc_plan_compute(&options, &group, 1, &mut plan, room, null_mut()));
        let mut scoring: kvc_scoring = zeroed();
        let bytes = size(&scoring);
        ok!(self, kvc_scoring_init(&mut scoring, bytes));
    }

    pub fn index(&mut self, round: usize) {
        let mut own = null_mut();
        let mut options: kvc_prefix_options = zeroed();
        let bytes = size(&options);
        ok!(self, kvc_prefix_options_init(&mut options, bytes));
        ok!(self, kvc_prefix_create_with(&options, &mut own));
        ok!(self, kvc_prefix_destroy(own));
        ok!(self, kvc_prefix_create(4, 1, 8, &mut own));
        ok!(self, kvc_prefix_destroy(own));

        let (prefix, tokens) = (self.prefix(), self.tokens(round, 40));
        let (at, count) = (tokens.as_ptr(), tokens.len() as u64);
        let (mut hit, mut done): (kvc_prefix_hit, kvc_prefix_inserted) = (zeroed(), zeroed());
        let (mut found, mut tail) = ([0i32; 64], [0i32]);
        let (out, room) = (found.as_mut_ptr(), found.len() as u64);
        ok!(
            self,
            kvc_prefix_lookup(prefix, 1, at, count, count, out, room, tail.as_mut_ptr(), &mut hit)
        );
        let ids: Vec<i32> = (0..10).collect();
        ok!(
            self,
            kvc_prefix_insert(prefix, 1, at, count, ids.as_ptr(), 10, null_mut(), 0, &mut done)
        );
        let mut pin = 0;
        if fair!(self, kvc_prefix_lock(prefix, &hit.at, &mut pin)) == KVC_OK {
            // Another thread may end it, and this one what another left.
            let other = self.shared.pin.swap(pin, Ordering::AcqRel);
            if round.is_multiple_of(2) {
                fair!(self, kvc_prefix_unlock(prefix, other));
            } else {
                fair!(self, kvc_prefix_release(prefix, other));
            }
        }
        fair!(self, kvc_prefix_touch(prefix, &done.at));
        let range = kvc_retention { start: 0, end: u64::MAX, priority: 50, duration_ms: 3 };
        fair!(self, kvc_prefix_prioritize(prefix, &done.at, &range, 1));
        fair!(self, kvc_prefix_hint(prefix, &done.at, 0, KVC_HINT_WAITED, 0));
        ok!(self, kvc_prefix_advance(prefix, round as u64));
        let mut evicted = 0;
        let status = call!(self, kvc_prefix_set_windows(prefix, [0].as_ptr(), 1));
        assert!([KVC_OK, KVC_ERR_INVALID_STATE].contains(&status), "empty or not");
        let (mut ids, mut none) = ([1i32, 2, 3], 99);
        ok!(self, kvc_prefix_forget(prefix, 0, ids.as_mut_ptr(), 3, &mut none));
        assert_eq!(none, 0, "no group has a window");
        ok!(self, kvc_prefix_evict(prefix, 3, out, room, &mut evicted));
        let mut counts: kvc_prefix_counts = zeroed();
        ok!(self, kvc_prefix_stats(prefix, &mut counts, size_of::<kvc_prefix_counts>() as u64));
        assert!(counts.blocks <= counts.capacity_blocks);

        let mut batch: kvc_prefix_batch = zeroed();
        let bytes = size(&batch);
        ok!(self, kvc_prefix_batch_init(&mut batch, bytes));
        let query = kvc_prefix_query {
            name_space: 1,
            tokens: at,
            token_count: count,
            max_tokens: count,
            out_blocks: out,
            capacity: room,
            out_tail_blocks: null_mut(),
            pin: 1,
            reserved: 0,
        };
        let mut answer: kvc_prefix_answer = zeroed();
        (batch.queries, batch.query_count, batch.out_answers) = (&query, 1, &mut answer);
        ok!(self, kvc_prefix_run(prefix, &batch));
        assert_eq!(answer.status, KVC_OK);
        ok!(self, kvc_prefix_unlock(prefix, answer.pin));
    }
}
