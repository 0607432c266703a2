//! Devices: without one all of it is refused, from any thread.

use std::ptr::{null, null_mut};

use kvcache::capi::*;

use crate::caller::{Caller, size, zeroed};

impl Caller<'_> {
    /// On a machine without a device these are refused, from any thread.
    pub fn device(&mut self) {
        let device = self.shared.device as *mut kvc_device;
        let (mut own, mut facts, mut address) = (null_mut(), zeroed(), null_mut());
        let (mut text, mut needed) = ([0u8; 64], 0);
        call!(self, kvc_device_open(KVC_DEVICE_EMU, 0, &mut own));
        call!(self, kvc_device_close(own));
        call!(self, kvc_device_info(device, &mut facts, size_of::<kvc_device_facts>() as u64));
        call!(self, kvc_device_name(device, text.as_mut_ptr().cast(), text.len() as u64));
        if call!(self, kvc_device_alloc(device, 64, &mut address)) != KVC_OK {
            address = null_mut();
        }
        let stream = null_mut();
        let mut bytes = [7u8; 64];
        let (from, to) = (bytes.as_ptr().cast(), bytes.as_mut_ptr().cast());
        let room = if address.is_null() { 0 } else { 64 };
        call!(self, kvc_device_upload(device, address, from, room, stream));
        call!(self, kvc_device_zero(device, address, room, stream));
        call!(self, kvc_device_download(device, to, address, room, stream));
        call!(self, kvc_device_sync(device, stream));
        if !address.is_null() {
            assert_eq!(bytes, [0; 64]);
        }
        call!(self, kvc_device_free(device, address));
        let (mut attend, mut append): (kvc_attend_desc, kvc_append_desc) = (zeroed(), zeroed());
        let (mut how, mut write): (kvc_device_attend_options, kvc_device_append_options) =
            (zeroed(), zeroed());
        let mut copy: kvc_device_copy_desc = zeroed();
        let (bytes, write_bytes, copy_bytes) = (size(&how), size(&write), size(&copy));
        ok!(self, kvc_device_attend_options_init(&mut how, bytes));
        ok!(self, kvc_device_append_options_init(&mut write, write_bytes));
        ok!(self, kvc_device_copy_desc_init(&mut copy, copy_bytes));
        let (bytes, append_bytes) = (size(&attend), size(&append));
        ok!(self, kvc_attend_desc_init(&mut attend, bytes));
        ok!(self, kvc_append_desc_init(&mut append, append_bytes));
        call!(self, kvc_device_attend_workspace_size(device, &attend, &how, &mut needed));
        let (at, room) = (text.as_mut_ptr().cast(), text.len() as u64);
        call!(self, kvc_device_attend_kernel(device, &attend, &how, at, room));
        call!(self, kvc_device_attend(device, &attend, &how, stream));
        call!(self, kvc_device_append(device, &append, &write, stream));
        call!(self, kvc_device_copy(device, &copy, stream));
        let mut rates: kvc_device_rates = zeroed();
        call!(self, kvc_device_rates_read(device, &mut rates, size_of_val(&rates) as u64));
        self.shared_on_device(device, &attend, &how);
    }

    /// The same of what sequences share; the cost model needs no device.
    fn shared_on_device(
        &mut self,
        device: *mut kvc_device,
        attend: &kvc_attend_desc,
        how: &kvc_device_attend_options,
    ) {
        let (prefix, stream) = (self.shared.prefix as *mut kvc_prefix, null_mut());
        let (mut bytes, mut copied) = (0, null_mut());
        ok!(self, kvc_device_prefix_size(prefix, &mut bytes));
        // An index has one copy: another thread's may be there.
        call!(self, kvc_device_prefix_create(device, prefix, &mut copied));
        let (mut lookup, mut merge): (kvc_device_lookup_desc, kvc_device_merge_desc) =
            (zeroed(), zeroed());
        let mut query: kvc_device_cascade_query = zeroed();
        let (lookup_bytes, merge_bytes, query_bytes) = (size(&lookup), size(&merge), size(&query));
        ok!(self, kvc_device_lookup_desc_init(&mut lookup, lookup_bytes));
        ok!(self, kvc_device_merge_desc_init(&mut merge, merge_bytes));
        ok!(self, kvc_device_cascade_query_init(&mut query, query_bytes));
        call!(self, kvc_device_prefix_sync(copied, stream, null_mut()));
        call!(self, kvc_device_prefix_lookup(copied, &lookup, stream));
        call!(self, kvc_device_merge(device, &merge, stream));
        (query.q_heads, query.kv_heads, query.head_dim) = (8, 8, 64);
        (query.block_tokens, query.token_bytes, query.seqs) = (16, 2048, 4);
        (query.memory_bytes, query.cache_bytes, query.operations) = (3e6, 6e6, 3e8);
        query.multiprocessors = 132;
        let shared = kvc_device_cascade_prefix { first_seq: 0, seqs: 4, blocks: 9, reserved: 0 };
        let mut list = [zeroed::<kvc_device_cascade_segment>(); 2];
        let mut said: kvc_device_cascade_estimate = zeroed();
        let (out, said_bytes) = (list.as_mut_ptr(), size_of_val(&said) as u64);
        ok!(self, kvc_device_cascade_choose(&query, &shared, 1, out, 2, &mut said, said_bytes));
        assert_eq!((list[0].seqs, list[1].first_seq), (4, 4));
        let list = null();
        call!(self, kvc_device_cascade_workspace_size(device, attend, how, 2, &mut bytes));
        call!(self, kvc_device_cascade(device, attend, how, list, 2, stream));
        call!(self, kvc_device_prefix_destroy(copied));
    }
}
