//! Tiers, prefetching, onboarding and transfers.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::atomic::Ordering;

use kvcache::capi::*;

use crate::caller::{Caller, size, zeroed};

impl Caller<'_> {
    /// The shared cache has a host tier; one of a thread's own shows what must come first.
    pub fn tiers(&mut self, round: usize) {
        let (mut store, mut options): (kvc_tier_store, kvc_tier_options) = (zeroed(), zeroed());
        let (store_bytes, bytes) = (size(&store), size(&options));
        ok!(self, kvc_tier_store_init(&mut store, store_bytes));
        ok!(self, kvc_tier_options_init(&mut options, bytes));
        (options.model, options.host_blocks) = (c"toy".as_ptr(), 8);
        let status = call!(self, kvc_tier_attach(self.cache(), &options));
        assert_eq!(status, KVC_ERR_INVALID_STATE, "it has tiers already");

        let cache = self.cache();
        let (tokens, mut done) = (self.tokens(round, 33), 0);
        let (mut prefetch, mut decision) = (null_mut(), zeroed());
        let at = &mut prefetch;
        ok!(self, kvc_prefetch_create(cache, tokens.as_ptr(), 33, 5, at, &mut decision));
        ok!(self, kvc_prefetch_wait(cache, prefetch, 1, &mut done));
        ok!(self, kvc_prefetch_destroy(prefetch));
        let (at, image) = (tokens.as_ptr(), kvc_media { position: 3, digest: [round as u8; 32] });
        let (begun, media) = (&mut prefetch, &image);
        ok!(self, kvc_prefetch_create_media(cache, at, 33, media, 1, 5, begun, &mut decision));
        ok!(self, kvc_prefetch_destroy(prefetch));
        // Whatever another thread made of the host's blocks: what is said to be there is.
        let (mut own, mut cached, mut kept) = (0, 0, 0);
        let none = std::ptr::null();
        ok!(self, kvc_onboard_start(cache, at, 33, none, 0, 5, &mut own, &mut cached));
        let mut progress: kvc_onboard_progress = zeroed();
        let bytes = size_of::<kvc_onboard_progress>() as u64;
        ok!(self, kvc_onboard_state(cache, own, &mut progress, bytes));
        assert!(progress.why == 0 && progress.loading_tokens <= u64::from(cached));
        ok!(self, kvc_onboard_wait(cache, own, 1, 0, 1, &mut done));
        assert_eq!(done, 1, "the host has all layers");
        let closed = null_mut::<kvc_step>();
        let status = call!(self, kvc_onboard_wait_step(cache, closed, 0, 0, 0, &mut done));
        assert_eq!(status, KVC_ERR_NULL_POINTER);
        ok!(self, kvc_onboard_cancel(cache, own, &mut kept));
        assert!(kept <= cached);
        ok!(self, kvc_seq_release(cache, own));
        ok!(self, kvc_tier_flush(cache, 1, &mut done));
        // What others do with the sequence meanwhile decides whether it can be had.
        let (seq, mut moved) = (self.shared.seq.load(Ordering::Relaxed), 0);
        let (model, none) = (c"toy".as_ptr(), std::ptr::null());
        let nowhere = File::options().read(true).write(true).open("/dev/null").unwrap();
        let fd = nowhere.as_raw_fd();
        call!(self, kvc_transfer_export(cache, seq, model, none, 0, fd, &mut moved));
        let status = call!(self, kvc_transfer_import(cache, 5, model, none, 0, &fd, 1, &mut moved));
        assert_eq!(status, KVC_ERR_TIER_FAILED, "nothing is no stream");
        let mut counts: kvc_tier_counts = zeroed();
        ok!(self, kvc_tier_stats(cache, 0, &mut counts, size_of::<kvc_tier_counts>() as u64));
    }
}
