//! A store that does what a test says: a disk that gives parts when it is let.

use std::sync::{Arc, Condvar, Mutex};

use kvcache::tier::disk::DiskStore;
use kvcache::tier::{Get, GetPart, ObjectKey, Outcome, Put, Store, Watcher};

use super::tier_case::LONG;

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// One bit of the part is another.
    Flip,
    /// The file is too short.
    Short,
    Fails,
    Panics,
}

/// A disk that gives a part only when it is let, and then perhaps not as it was.
#[derive(Debug)]
pub struct Gated {
    disk: DiskStore,
    /// Calls that may be made yet.
    allowed: Mutex<u32>,
    more: Condvar,
    /// (bytes of the object before the part, the call of these that goes wrong)
    pub fault: Mutex<Option<(Fault, u64)>>,
}

impl Gated {
    /// Lets nothing through yet.
    pub fn over(disk: DiskStore) -> Arc<Self> {
        Arc::new(Self {
            disk,
            allowed: Mutex::new(0),
            more: Condvar::new(),
            fault: Mutex::new(None),
        })
    }

    pub fn allow(&self, calls: u32) {
        let mut allowed = self.allowed.lock().unwrap();
        *allowed = allowed.saturating_add(calls);
        self.more.notify_all();
    }
}

impl Store for Gated {
    fn knows(&self, key: &ObjectKey) -> Option<bool> {
        self.disk.knows(key)
    }
    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        self.disk.exists(keys, found)
    }
    fn put(&self, objects: &[Put], outcomes: &mut [Outcome]) {
        self.disk.put(objects, outcomes)
    }
    fn get(&self, objects: &mut [Get], outcomes: &mut [Outcome]) {
        self.disk.get(objects, outcomes)
    }
    fn gives_parts(&self) -> bool {
        true
    }
    fn hold(&self, keys: &[ObjectKey], held: &mut [bool]) {
        self.disk.hold(keys, held)
    }
    fn unhold(&self, keys: &[ObjectKey]) {
        self.disk.unhold(keys)
    }
    fn get_parts(&self, parts: &mut [GetPart], outcomes: &mut [Outcome]) {
        let allowed = self.allowed.lock().unwrap();
        // Not for ever: a test that fails ends.
        let waited = self.more.wait_timeout_while(allowed, LONG / 3, |allowed| *allowed == 0);
        let mut allowed = waited.unwrap().0;
        *allowed = allowed.saturating_sub(1);
        drop(allowed);
        self.disk.get_parts(parts, outcomes);
        if let Some((fault, at)) = *self.fault.lock().unwrap() {
            for (part, outcome) in parts.iter_mut().zip(outcomes) {
                if !(part.offset..part.offset + part.bytes.len() as u64).contains(&at) {
                    continue;
                }
                match fault {
                    Fault::Flip => part.bytes[(at - part.offset) as usize] ^= 0x10,
                    Fault::Short => *outcome = Outcome::Absent,
                    Fault::Fails => *outcome = Outcome::Failed,
                    Fault::Panics => panic!("planted"),
                }
            }
        }
    }
    fn remove(&self, keys: &[ObjectKey]) {
        self.disk.remove(keys)
    }
    fn watch(&self, watcher: Arc<dyn Watcher>) -> bool {
        self.disk.watch(watcher)
    }
    fn used(&self) -> Option<(u64, u64)> {
        self.disk.used()
    }
}
