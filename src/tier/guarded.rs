//! A store as a tier calls it: one that panics has failed, and the thread that called it goes on.
//! Stores are other people's code; what they own after a panic is theirs to put right.

use alloc::sync::Arc;
use core::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use super::ObjectKey;
use super::store::{Get, GetPart, Outcome, Put, Store, Watcher};

/// The store.
pub(super) struct Guarded {
    store: Arc<dyn Store>,
    /// Panics where the call has no outcome that could say so.
    silent: AtomicU64,
}

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

impl Guarded {
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store, silent: AtomicU64::new(0) }
    }

    /// Failures that no outcome told of.
    pub fn silent_failures(&self) -> u64 {
        self.silent.load(Ordering::Relaxed)
    }

    fn call<T>(&self, call: impl FnOnce(&dyn Store) -> T) -> Option<T> {
        catch_unwind(AssertUnwindSafe(|| call(&*self.store))).ok()
    }

    fn call_silent<T>(&self, call: impl FnOnce(&dyn Store) -> T) -> Option<T> {
        let result = self.call(call);
        if result.is_none() {
            self.silent.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    pub fn knows(&self, key: &ObjectKey) -> Option<bool> {
        self.call_silent(|store| store.knows(key)).flatten()
    }

    pub fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        self.call(|store| store.exists(keys, found)).unwrap_or(false)
    }

    /// Whatever was done before a panic is not relied upon: all of it failed.
    pub fn put(&self, objects: &[Put], outcomes: &mut [Outcome]) {
        if self.call(|store| store.put(objects, outcomes)).is_none() {
            outcomes.fill(Outcome::Failed);
        }
    }

    pub fn get_each(
        &self,
        objects: &mut [Get],
        outcomes: &mut [Outcome],
        see: &mut dyn FnMut(usize, &[u8]),
    ) {
        if self.call(|store| store.get_each(objects, outcomes, see)).is_none() {
            outcomes.fill(Outcome::Failed);
        }
    }

    pub fn gives_parts(&self) -> bool {
        self.call_silent(|store| store.gives_parts()).unwrap_or(false)
    }

    /// None is held where the store panics: what it held then stays so.
    pub fn hold(&self, keys: &[ObjectKey], held: &mut [bool]) {
        if self.call_silent(|store| store.hold(keys, held)).is_none() {
            held.fill(false);
        }
    }

    pub fn unhold(&self, keys: &[ObjectKey]) {
        self.call_silent(|store| store.unhold(keys));
    }

    pub fn get_parts(&self, parts: &mut [GetPart], outcomes: &mut [Outcome]) {
        if self.call(|store| store.get_parts(parts, outcomes)).is_none() {
            outcomes.fill(Outcome::Failed);
        }
    }

    pub fn remove(&self, keys: &[ObjectKey]) {
        self.call_silent(|store| store.remove(keys));
    }

    pub fn watch(&self, watcher: Arc<dyn Watcher>) -> bool {
        self.call_silent(|store| store.watch(watcher)).unwrap_or(false)
    }

    pub fn refusal(&self) -> Option<&'static str> {
        self.call_silent(|store| store.refusal()).flatten()
    }

    pub fn used(&self) -> Option<(u64, u64)> {
        self.call_silent(|store| store.used()).flatten()
    }
}
