//! What an engine does with a cache: sequences and steps, and what it watches.

use std::ptr::{null, null_mut};
use std::sync::atomic::Ordering;

use kvcache::capi::*;

use crate::caller::{Caller, DIM, count, groups, size, zeroed};

impl Caller<'_> {
    pub fn serve(&mut self, round: usize) {
        let (cache, prompt) = (self.cache(), self.tokens(round, 50));
        let (mut seq, mut cached) = (0, 0);
        let (at, count) = (prompt.as_ptr(), prompt.len() as u64);
        let image = kvc_media { position: 20, digest: [round as u8; 32] };
        let (to, media) = (&mut seq, u32::from(round.is_multiple_of(2)));
        if fair!(self, kvc_seq_start_media(cache, at, count, &image, media, 0, to, &mut cached))
            != KVC_OK
        {
            return;
        }
        if round % 4 == 1 {
            // The same by the call without media.
            ok!(self, kvc_seq_release(cache, seq));
            if fair!(self, kvc_seq_start(cache, at, count, 0, &mut seq, &mut cached)) != KVC_OK {
                return;
            }
        }
        let (mut step, mut forked) = (null_mut(), 0);
        ok!(self, kvc_step_create(&mut step));
        let new = &prompt[cached as usize..];
        let work = kvc_work { seq, token_count: new.len() as u32, tokens: new.as_ptr() };
        if fair!(self, kvc_step_begin(cache, step, &work, 1)) == KVC_OK {
            let rows = [0.5f32; 50 * DIM];
            let mut out = [0f32; 50 * DIM];
            let (from, to) = (rows.as_ptr().cast(), out.as_mut_ptr().cast());
            let f32_ = KVC_DTYPE_F32;
            for group in 0..2 {
                ok!(self, kvc_step_append(cache, step, group, 0, from, from, f32_, null()));
                ok!(
                    self,
                    kvc_step_attend(
                        cache,
                        step,
                        group,
                        0,
                        1,
                        from,
                        f32_,
                        to,
                        f32_,
                        null(),
                        null_mut(),
                    )
                );
                let rows = new.len() * DIM;
                assert!(out[..rows].iter().all(|x| (x - 0.5).abs() <= 1e-3), "{out:?}");
                // There is no device: refused, whoever asks.
                call!(
                    self,
                    kvc_step_append_device(cache, step, group, 0, from, from, f32_, null())
                );
                call!(
                    self,
                    kvc_step_attend_device(
                        cache,
                        step,
                        group,
                        0,
                        1,
                        from,
                        f32_,
                        to,
                        f32_,
                        null(),
                        null_mut(),
                    )
                );
            }
            if round.is_multiple_of(3) {
                ok!(self, kvc_step_cancel(cache, step));
            } else {
                ok!(self, kvc_step_commit(cache, step));
            }
        }
        // SAFETY: this thread's own.
        unsafe { assert_eq!(kvc_step_destroy(step), KVC_OK) };
        let (mut words, mut ids, mut count, mut length) = ([0u32; 64], [0i32; 64], 0, 0);
        ok!(self, kvc_seq_tokens(cache, seq, words.as_mut_ptr(), 64, &mut length));
        ok!(self, kvc_seq_blocks(cache, seq, 1, ids.as_mut_ptr(), 64, &mut count));
        let range = kvc_retention { start: 0, end: 20, priority: 80, duration_ms: 0 };
        ok!(self, kvc_seq_prioritize(cache, seq, &range, 1));
        ok!(self, kvc_seq_hint(cache, seq, 0, KVC_HINT_ENDED, 0));
        if fair!(self, kvc_seq_fork(cache, seq, &mut forked)) == KVC_OK {
            // Not into its image.
            let cut = (length / 2).max(21).min(length) as u32;
            fair!(self, kvc_seq_truncate(cache, forked, cut));
            // Another thread ends it.
            forked = self.shared.seq.swap(forked, Ordering::AcqRel);
            fair!(self, kvc_seq_release(cache, forked));
        }
        ok!(self, kvc_seq_release(cache, seq));
    }

    pub fn watch(&mut self, round: usize) {
        let cache = self.cache();
        let mut own = null_mut();
        let mut options: kvc_cache_options = zeroed();
        let bytes = size(&options);
        ok!(self, kvc_cache_options_init(&mut options, bytes));
        (options.blocks, options.max_seqs, options.threads) = (2, 2, 1);
        ok!(self, kvc_cache_create(&options, groups().as_ptr(), 2, &mut own));
        let name = c"tenant".as_ptr();
        ok!(self, kvc_events_describe(own, 7, name, name));
        ok!(self, kvc_cache_destroy(own));

        // The cache's format has none: refused, whoever asks.
        call!(self, kvc_cache_set_scales(cache, 0, 0, null(), null(), 1));
        // On the CPU, which goes by no rates: the same.
        let mut rates: kvc_device_rates = zeroed();
        let bytes = size(&rates);
        ok!(self, kvc_device_rates_init(&mut rates, bytes));
        call!(self, kvc_cache_set_device_rates(cache, &rates));
        ok!(self, kvc_cache_sync(cache));
        ok!(self, kvc_cache_advance(cache, round as u64));
        ok!(self, kvc_cache_audit(cache));
        if round.is_multiple_of(8) {
            ok!(self, kvc_cache_clear_prefix(cache));
        }
        let mut counts: kvc_cache_counts = zeroed();
        ok!(self, kvc_cache_stats(cache, &mut counts, size_of::<kvc_cache_counts>() as u64));
        let mut metrics: kvc_metrics = zeroed();
        ok!(self, kvc_metrics_read(cache, &mut metrics, size_of::<kvc_metrics>() as u64));
        let (mut text, mut length) = ([0u8; 8192], 0);
        ok!(self, kvc_metrics_text(cache, text.as_mut_ptr().cast(), 8192, &mut length));
        ok!(self, kvc_metrics_watch(cache, 1 + round as u32 % 3));
        ok!(self, kvc_metrics_set_time(cache, round as u64));

        let events = self.shared.events as *mut kvc_events;
        let mut counts: kvc_events_counts = zeroed();
        ok!(self, kvc_events_stats(events, &mut counts, size_of::<kvc_events_counts>() as u64));
        ok!(self, kvc_events_snapshot(events));
        // A callback has no endpoint.
        call!(self, kvc_events_endpoint(events, 0, text.as_mut_ptr().cast(), 100, &mut length));
        let mut options: kvc_events_options = zeroed();
        let bytes = size(&options);
        ok!(self, kvc_events_options_init(&mut options, bytes));
        options.callback = Some(count);
        options.user = (&raw const self.shared.published).cast_mut().cast();
        // The shared cache has its publisher: one of a thread's own.
        let (mut own, mut published) = (null_mut(), null_mut());
        let mut sizes: kvc_cache_options = zeroed();
        let bytes = size(&sizes);
        ok!(self, kvc_cache_options_init(&mut sizes, bytes));
        (sizes.blocks, sizes.max_seqs, sizes.threads) = (2, 2, 1);
        ok!(self, kvc_cache_create(&sizes, groups().as_ptr(), 2, &mut own));
        ok!(self, kvc_events_create(own, &options, &mut published));
        ok!(self, kvc_events_destroy(published));
        ok!(self, kvc_cache_destroy(own));
    }
}
