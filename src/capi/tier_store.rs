//! The engine's own store below a cache: its functions, called from the tier's threads.

use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr;

use super::pointer::{self, Plain, Sized32};
use super::status::{
    KVC_ERR_BAD_BLOCK, KVC_ERR_OUT_OF_MEMORY, KVC_ERR_TIER_FAILED, KVC_OK, guard, kvc_status,
};
use crate::error::{Error, Result};
use crate::tier::{Get, ObjectKey, Outcome, Put, Store};

/// An object that a store is given or asked for. The library verifies what it gets: a store that
/// gives something else costs a miss. This struct never grows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_tier_object {
    /// Its name: 32 bytes.
    pub key: *const u8,
    /// Its bytes: to be read in a put, to be written in a get.
    pub bytes: *mut c_void,
    /// How many; all objects of a cache have the same length.
    pub length: u64,
}

/// Finds out which of `count` keys (32 bytes each) the store has: `found[i]` 1 or 0. 0 for success.
pub type kvc_tier_exists_fn = Option<
    unsafe extern "C" fn(user: *mut c_void, keys: *const u8, count: u64, found: *mut u8) -> i32,
>;
/// Puts or gets objects; writes an outcome for each: KVC_OK, KVC_ERR_TIER_FAILED, in a get
/// KVC_ERR_BAD_BLOCK for what the store does not have, in a put KVC_ERR_OUT_OF_MEMORY where it is
/// full. A get writes all bytes of an object whose outcome is KVC_OK.
pub type kvc_tier_move_fn = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        objects: *const kvc_tier_object,
        count: u64,
        outcomes: *mut kvc_status,
    ),
>;
/// Removes objects by `count` keys of 32 bytes; what is not there is no failure.
pub type kvc_tier_remove_fn =
    Option<unsafe extern "C" fn(user: *mut c_void, keys: *const u8, count: u64)>;

/// A store of the engine's own: functions that the tier's threads call, several at a time, and that
/// block until they are done. What they point to lives for the call.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_tier_store {
    /// sizeof(kvc_tier_store); kvc_tier_store_init sets it.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Handed to each function.
    pub user: *mut c_void,
    /// Which objects it has.
    pub exists: kvc_tier_exists_fn,
    /// Keeps objects.
    pub put: kvc_tier_move_fn,
    /// Gives objects.
    pub get: kvc_tier_move_fn,
    /// Forgets objects.
    pub remove: kvc_tier_remove_fn,
}

// SAFETY: integers, a pointer, and function pointers that may be NULL.
unsafe impl Plain for kvc_tier_store {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_tier_store {
    const NAME: &'static str = "kvc_tier_store";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            reserved: 0,
            user: ptr::null_mut(),
            exists: None,
            put: None,
            get: None,
            remove: None,
        }
    }
}

/// Fills a kvc_tier_store of `struct_size` bytes with its defaults.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `store` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_tier_store_init(
    store: *mut kvc_tier_store,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(store, struct_size) })
}

type Exists = unsafe extern "C" fn(*mut c_void, *const u8, u64, *mut u8) -> i32;
type Move = unsafe extern "C" fn(*mut c_void, *const kvc_tier_object, u64, *mut kvc_status);
type Remove = unsafe extern "C" fn(*mut c_void, *const u8, u64);

/// The functions, all there.
#[derive(Debug)]
pub(super) struct Foreign {
    user: *mut c_void,
    exists: Exists,
    put: Move,
    get: Move,
    remove: Remove,
}

// SAFETY: kvc_tier_attach makes the caller promise that they may be called from any threads.
unsafe impl Send for Foreign {}
// SAFETY: as above.
unsafe impl Sync for Foreign {}

impl Foreign {
    pub(super) fn new(given: kvc_tier_store) -> Result<Self> {
        let kvc_tier_store { user, exists, put, get, remove, .. } = given;
        let (Some(exists), Some(put), Some(get), Some(remove)) = (exists, put, get, remove) else {
            return Err(Error::NullPointer { what: "a function of kvc_tier_store" });
        };
        Ok(Self { user, exists, put, get, remove })
    }

    /// Calls `call` with objects; a code that is none of those documented is a failure.
    fn moved(&self, call: Move, objects: &[kvc_tier_object], outcomes: &mut [Outcome]) {
        let mut codes = alloc::vec![KVC_ERR_TIER_FAILED; objects.len()];
        // SAFETY: the promise of kvc_tier_attach; the objects live for the call.
        unsafe { call(self.user, objects.as_ptr(), objects.len() as u64, codes.as_mut_ptr()) };
        for (outcome, code) in outcomes.iter_mut().zip(codes) {
            *outcome = match code {
                KVC_OK => Outcome::Done,
                KVC_ERR_BAD_BLOCK => Outcome::Absent,
                KVC_ERR_OUT_OF_MEMORY => Outcome::Full,
                _ => Outcome::Failed,
            };
        }
    }
}

fn flat(keys: &[ObjectKey]) -> Vec<u8> {
    keys.iter().flat_map(|key| key.0).collect()
}

impl Store for Foreign {
    fn knows(&self, _: &ObjectKey) -> Option<bool> {
        None
    }

    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        let (bytes, mut answers) = (flat(keys), alloc::vec![0u8; keys.len()]);
        let count = keys.len() as u64;
        // SAFETY: the promise of kvc_tier_attach; keys and answers live for the call.
        let code = unsafe { (self.exists)(self.user, bytes.as_ptr(), count, answers.as_mut_ptr()) };
        for (found, answer) in found.iter_mut().zip(answers) {
            *found = answer == 1;
        }
        code == 0
    }

    fn put(&self, objects: &[Put], outcomes: &mut [Outcome]) {
        let objects: Vec<kvc_tier_object> = objects
            .iter()
            .map(|put| kvc_tier_object {
                key: put.key.0.as_ptr(),
                // Only read: a put's promise.
                bytes: put.object.as_ptr().cast_mut().cast(),
                length: put.object.len() as u64,
            })
            .collect();
        self.moved(self.put, &objects, outcomes);
    }

    fn get(&self, objects: &mut [Get], outcomes: &mut [Outcome]) {
        let objects: Vec<kvc_tier_object> = objects
            .iter_mut()
            .map(|get| kvc_tier_object {
                key: get.key.0.as_ptr(),
                bytes: get.object.as_mut_ptr().cast(),
                length: get.object.len() as u64,
            })
            .collect();
        self.moved(self.get, &objects, outcomes);
    }

    fn remove(&self, keys: &[ObjectKey]) {
        let bytes = flat(keys);
        // SAFETY: as above.
        unsafe { (self.remove)(self.user, bytes.as_ptr(), keys.len() as u64) };
    }
}
