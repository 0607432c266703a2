//! Events as C sees them, handed to the caller's function.

use core::ffi::c_void;
use core::ptr;

use super::{
    KVC_EVENT_CLEARED, KVC_EVENT_REMOVED, KVC_EVENT_STORED, KVC_MEDIUM_CPU, KVC_MEDIUM_EXTERNAL,
    KVC_MEDIUM_GPU, KVC_MEDIUM_STORAGE, kvc_event,
};
use crate::events::{Event, Medium, Message, Sink};

/// The caller's function.
pub(super) struct Callback {
    pub(super) call: unsafe extern "C" fn(*mut c_void, *const kvc_event),
    pub(super) user: *mut c_void,
}

// SAFETY: kvc_events_create makes the caller promise that it may be called from another thread.
unsafe impl Send for Callback {}

impl Sink for Callback {
    fn publish(&mut self, message: &Message) {
        for event in message.events() {
            let mut shown = kvc_event {
                struct_size: size_of::<kvc_event>() as u32,
                kind: KVC_EVENT_CLEARED,
                medium: 0,
                group: 0,
                seq: message.seq,
                name_space: 0,
                parent: ptr::null(),
                digests: ptr::null(),
                block_count: 0,
                tokens: ptr::null(),
                token_count: 0,
            };
            let above;
            match event {
                Event::Stored { medium, group, space, parent, digests, tokens, .. } => {
                    above = parent;
                    (shown.kind, shown.medium) = (KVC_EVENT_STORED, medium_id(medium));
                    (shown.group, shown.name_space) = (group, space.0);
                    shown.parent = above.as_ref().map_or(ptr::null(), |above| above.0.as_ptr());
                    shown.digests = digests.as_ptr().cast();
                    shown.block_count = digests.len() as u64;
                    shown.tokens = tokens.as_ptr();
                    shown.token_count = tokens.len() as u64;
                }
                Event::Removed { medium, group, digests } => {
                    (shown.kind, shown.medium) = (KVC_EVENT_REMOVED, medium_id(medium));
                    shown.group = group;
                    shown.digests = digests.as_ptr().cast();
                    shown.block_count = digests.len() as u64;
                }
                Event::Cleared => {}
            }
            // SAFETY: the promise of kvc_events_create; what the event points to lives on.
            unsafe { (self.call)(self.user, &raw const shown) };
        }
    }
}

fn medium_id(medium: Medium) -> u32 {
    match medium {
        Medium::Gpu => KVC_MEDIUM_GPU,
        Medium::Cpu => KVC_MEDIUM_CPU,
        Medium::Storage => KVC_MEDIUM_STORAGE,
        Medium::External => KVC_MEDIUM_EXTERNAL,
    }
}
