//! A thread that calls, the handles that all of them share, and how a call is made and noted.

use std::collections::BTreeSet;
use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvcache::capi::*;

pub const THREADS: usize = 3;
pub const DIM: usize = 8;

/// What a call that others get in the way of may answer.
pub const FAIR: &[kvc_status] = &[
    KVC_OK,
    KVC_ERR_STALE_HANDLE,
    KVC_ERR_INVALID_STATE,
    KVC_ERR_OUT_OF_BLOCKS,
    KVC_ERR_OUT_OF_SEQUENCES,
];

/// Handles that all threads use.
pub struct Shared {
    pub prefix: usize,
    pub cache: usize,
    pub events: usize,
    pub device: usize,
    /// A sequence and a pin that one thread made and others may end.
    pub seq: AtomicU32,
    pub pin: AtomicU64,
    pub published: AtomicU32,
}

pub unsafe extern "C" fn count(user: *mut c_void, _: *const kvc_event) {
    // SAFETY: `published` outlives the publisher.
    unsafe { &*user.cast::<AtomicU32>() }.fetch_add(1, Ordering::Relaxed);
}

pub struct Caller<'a> {
    pub shared: &'a Shared,
    pub thread: usize,
    pub seen: BTreeSet<&'static str>,
}

/// Calls a function of the ABI, notes its name, and gives what it answers.
macro_rules! call {
    ($self:ident, $name:ident($($argument:expr),* $(,)?)) => {{
        $self.seen.insert(stringify!($name));
        // SAFETY: pointers are valid for what the call is told.
        #[allow(unused_unsafe)]
        let answer = unsafe { $name($($argument),*) };
        answer
    }};
}

/// The same for one that answers a status, which must be a fair one.
macro_rules! fair {
    ($self:ident, $name:ident($($argument:expr),* $(,)?)) => {{
        let status = call!($self, $name($($argument),*));
        assert!(
            $crate::caller::FAIR.contains(&status),
            "{}: {status} {}",
            stringify!($name),
            $crate::caller::last_error()
        );
        status
    }};
}

/// The same for one that must succeed.
macro_rules! ok {
    ($self:ident, $name:ident($($argument:expr),* $(,)?)) => {{
        let status = call!($self, $name($($argument),*));
        assert_eq!(status, KVC_OK, "{}: {}", stringify!($name), $crate::caller::last_error());
    }};
}

pub fn last_error() -> String {
    let mut text = [0u8; 200];
    // SAFETY: the buffer has its length.
    unsafe { kvc_last_error(text.as_mut_ptr().cast(), text.len() as u64) };
    CStr::from_bytes_until_nul(&text).unwrap().to_string_lossy().into_owned()
}

pub fn zeroed<T>() -> T {
    // SAFETY: for structs of the ABI, which are integers and pointers.
    unsafe { std::mem::zeroed() }
}

pub fn size<T>(_: &T) -> u32 {
    size_of::<T>() as u32
}

impl Caller<'_> {
    pub fn prefix(&self) -> *mut kvc_prefix {
        self.shared.prefix as *mut _
    }

    pub fn cache(&self) -> *mut kvc_cache {
        self.shared.cache as *mut _
    }

    /// Tokens of which all threads have the first in common.
    pub fn tokens(&self, round: usize, count: usize) -> Vec<u32> {
        let own = (round * THREADS + self.thread) as u32 % 7;
        (0..count as u32).map(|at| if at < 24 { at } else { at + 100 * own }).collect()
    }
}

/// A group of full attention and one with a window.
pub fn groups() -> [kvc_group_spec; 2] {
    [0, 20].map(|window| {
        let mut group: kvc_group_spec = zeroed();
        // SAFETY: `group` is writable for its size.
        unsafe { assert_eq!(kvc_group_spec_init(&mut group, size_of_val(&group) as u32), KVC_OK) };
        (group.layers, group.kv_heads) = (1, 1);
        (group.k_dim, group.v_dim) = (DIM as u32, DIM as u32);
        (group.format, group.window) = (KVC_FORMAT_F32, window);
        group
    })
}
