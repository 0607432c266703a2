//! The disk tier: objects in a directory that survives the process.
//!
//! ```text
//! DIR/<configuration's name>/lock           held by the process that uses it
//!                            configuration  what the objects are of
//!                            journal        which slot has which object
//!                            labels         of what block each slot's object is
//!                            segment-0000   slots, all of one size, room taken when it is made
//! ```
//!
//! A put is done when its bytes, and then the record that names them, have been flushed; several are
//! flushed together. So after a crash every put that was done is found, and none that was not: what
//! the journal names was written before it was named. A slot is used again only after the record
//! that its object is gone has been flushed; slots are freed ahead of need, in the same flush as
//! other records. Nothing but the journal is read at restart, and the labels where somebody wants to
//! know which blocks there are. Objects are verified by whoever gets them.
//!
//! After a flush that failed nothing more is written (what the disk has is not known then); what is
//! known to be there is still read.

mod files;
mod io;
mod journal;
mod labels;
mod recovery;
#[cfg(target_os = "linux")]
mod sys;
#[cfg(all(feature = "io-uring", target_os = "linux"))]
mod uring;
mod write;

#[cfg(test)]
mod faulty;
#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

pub use files::{Directory, DiskFile, Files};
pub use journal::VERSION;
pub use recovery::Recovery;

use super::key::Configuration;
use super::lru::Lru;
use super::object::{Label, object_bytes};
use super::{Get, GetPart, ObjectKey, Outcome, Put, Store, Watcher};
use crate::error::{Error, Result};
use io::{Bytes, Lane, Transfer};
use journal::{Journal, Record};
use labels::Labels;

/// Room is taken in pieces of about so many bytes.
const SEGMENT_BYTES: u64 = 256 << 20;

/// Where a disk tier is and how large it may get.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    /// The directory; a tier of another configuration has another one below it.
    pub dir: PathBuf,
    /// The most bytes of objects; journal and names come on top.
    pub capacity_bytes: u64,
    /// Past the page cache, where the file system can.
    pub direct: bool,
    /// Through io_uring, where the build and the system have it.
    pub uring: bool,
}

impl DiskOptions {
    /// At most `capacity_bytes` in `dir`, past the page cache, through io_uring where it is there.
    pub fn new(dir: &Path, capacity_bytes: u64) -> Self {
        Self { dir: dir.to_path_buf(), capacity_bytes, direct: true, uring: true }
    }
}

/// Which objects there are.
#[derive(Debug)]
struct Index {
    slots: Lru<u32>,
    /// Of each slot, reads under way.
    readers: Vec<u16>,
}

/// What only a writer touches.
#[derive(Debug)]
struct Writer {
    journal: Journal,
    labels: Labels,
    /// Who is told what changes. All that does, does with the writer locked.
    watcher: Option<Arc<dyn Watcher>>,
    free: Vec<u32>,
    lane: Lane,
    /// A flush failed: nothing more is written.
    broken: bool,
    /// The disk had no room for another segment.
    no_room: bool,
}

/// The store.
pub struct DiskStore {
    files: Box<dyn Files>,
    slot_bytes: u64,
    segment_slots: u32,
    most_slots: u32,
    direct: bool,
    uring: bool,
    segments: RwLock<Vec<Arc<dyn DiskFile>>>,
    index: Mutex<Index>,
    writer: Mutex<Writer>,
    lanes: Mutex<Vec<Lane>>,
    evicted: Mutex<u64>,
}

impl fmt::Debug for DiskStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskStore").field("files", &self.files).finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change leaves what is behind the locks whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn segment_name(n: usize) -> String {
    format!("segment-{n:04}")
}

/// An error of the system as the library says it.
fn failed(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::TierFailed { what, os_code: files::code(&error) }
}

impl DiskStore {
    /// Opens the store of a configuration, or begins one, and says what was found.
    ///
    /// # Errors
    /// `TierFailed` with the system's code where the directory cannot be used; `InvalidState` where
    /// another process uses it, or it is of another version or configuration; `InvalidArgument` for
    /// a capacity below one object.
    pub fn open(options: &DiskOptions, config: &Configuration) -> Result<(Self, Recovery)> {
        let path = options.dir.join(config.name());
        let directory = Directory::new(&path).map_err(failed("the directory of the disk tier"))?;
        Self::on(Box::new(directory), options, config)
    }

    /// The same on files that are somewhere else.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn on(
        mut files: Box<dyn Files>,
        options: &DiskOptions,
        config: &Configuration,
    ) -> Result<(Self, Recovery)> {
        let slot_bytes =
            object_bytes(config.payload_bytes()).ok_or(Error::Overflow { what: "object bytes" })?;
        let most_slots = (options.capacity_bytes / slot_bytes).min(u64::from(u32::MAX) - 1) as u32;
        if most_slots == 0 {
            return Err(Error::invalid("capacity_bytes", "must be at least one object"));
        }
        if !files.lock().map_err(failed("the lock of the disk tier"))? {
            return Err(Error::InvalidState {
                why: "another process uses the disk tier's directory",
            });
        }
        // Not of the capacity: a store that is opened with another one finds its slots.
        let segment_slots = (SEGMENT_BYTES / slot_bytes).clamp(1, 1 << 24) as u32;
        let (found, recovery) = recovery::recover(
            &*files,
            config,
            slot_bytes,
            segment_slots,
            most_slots,
            options.direct,
        )?;
        let readers = alloc::vec![0; found.segments.len() * segment_slots as usize];
        let labels = Labels::open(&*files, config);
        let writer = Writer {
            journal: found.journal,
            labels,
            watcher: None,
            free: found.free,
            lane: Lane::new(options.uring),
            broken: false,
            no_room: false,
        };
        let store = DiskStore {
            files,
            slot_bytes,
            segment_slots,
            most_slots,
            direct: options.direct,
            uring: options.uring,
            segments: RwLock::new(found.segments),
            index: Mutex::new(Index { slots: found.slots, readers }),
            writer: Mutex::new(writer),
            lanes: Mutex::default(),
            evicted: Mutex::new(0),
        };
        Ok((store, recovery))
    }

    /// Bytes of each object.
    pub fn object_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Whether it reads and writes through io_uring.
    pub fn is_uring(&self) -> bool {
        locked(&self.writer).lane.is_uring()
    }

    /// Objects that went to make room.
    pub fn evicted(&self) -> u64 {
        *locked(&self.evicted)
    }

    /// The keys of all objects, the least recently used first.
    pub fn keys(&self) -> Vec<ObjectKey> {
        locked(&self.index).slots.iter().map(|(key, _)| *key).collect()
    }

    /// The file that has a slot, and where in it.
    fn place(&self, slot: u32) -> Option<(Arc<dyn DiskFile>, u64)> {
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        let file = segments.get((slot / self.segment_slots) as usize)?;
        Some((file.clone(), u64::from(slot % self.segment_slots) * self.slot_bytes))
    }
}

/// Bytes to read of a slot; of no slot where there is nothing to read.
struct Read<'a> {
    slot: Option<u32>,
    offset: u64,
    bytes: &'a mut [u8],
}

impl DiskStore {
    fn slot(&self, key: &ObjectKey) -> Option<u32> {
        locked(&self.index).slots.peek(key).copied()
    }

    /// Reads of slots that are held; one outcome each.
    fn read(&self, reads: Vec<Read>, outcomes: &mut [Outcome]) {
        let places: Vec<_> =
            reads.iter().map(|read| read.slot.and_then(|slot| self.place(slot))).collect();
        let mut numbers = Vec::new();
        let mut transfers = Vec::new();
        for (n, (read, place)) in reads.into_iter().zip(&places).enumerate() {
            outcomes[n] = Outcome::Absent;
            if let Some((file, offset)) = place {
                numbers.push(n);
                let (offset, bytes) = (offset + read.offset, Bytes::Read(read.bytes));
                transfers.push(Transfer { file: &**file, offset, bytes });
            }
        }
        let mut lane = locked(&self.lanes).pop().unwrap_or_else(|| Lane::new(self.uring));
        let results = lane.run(&mut transfers);
        locked(&self.lanes).push(lane);
        for (n, result) in numbers.into_iter().zip(results) {
            outcomes[n] = match result {
                Ok(()) => Outcome::Done,
                // A file that was cut short has lost the object; the disk works.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => Outcome::Absent,
                Err(_) => Outcome::Failed,
            };
        }
    }
}

impl Writer {
    fn tell(&self, gone: &[ObjectKey], stored: &[&Label]) {
        if let Some(watcher) = &self.watcher
            && !(gone.is_empty() && stored.is_empty())
        {
            watcher.changed(gone, stored);
        }
    }
}

fn keys_of(objects: &[(ObjectKey, u32)]) -> Vec<ObjectKey> {
    objects.iter().map(|(key, _)| *key).collect()
}

impl Store for DiskStore {
    fn knows(&self, key: &ObjectKey) -> Option<bool> {
        Some(locked(&self.index).slots.contains(key))
    }

    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool {
        let index = locked(&self.index);
        for (key, found) in keys.iter().zip(found) {
            *found = index.slots.contains(key);
        }
        true
    }

    fn put(&self, objects: &[Put], outcomes: &mut [Outcome]) {
        let mut writer = locked(&self.writer);
        if writer.broken {
            outcomes.fill(Outcome::Failed);
        } else {
            self.write(&mut writer, objects, outcomes);
        }
    }

    fn get(&self, objects: &mut [Get], outcomes: &mut [Outcome]) {
        let keys: Vec<ObjectKey> = objects.iter().map(|get| get.key).collect();
        let mut held = alloc::vec![false; keys.len()];
        self.hold(&keys, &mut held);
        let whole = |object: &[u8]| object.len() as u64 == self.slot_bytes;
        let reads = objects.iter_mut().map(|get| Read {
            slot: if whole(get.object) { self.slot(&get.key) } else { None },
            offset: 0,
            bytes: get.object,
        });
        // Those that are not held have no slot to read, or one that nobody keeps.
        let reads =
            reads.zip(&held).map(|(read, held)| Read { slot: read.slot.filter(|_| *held), ..read });
        self.read(reads.collect(), outcomes);
        let held = keys.into_iter().zip(held).filter(|(_, held)| *held);
        self.unhold(&held.map(|(key, _)| key).collect::<Vec<_>>());
    }

    fn gives_parts(&self) -> bool {
        true
    }

    fn hold(&self, keys: &[ObjectKey], held: &mut [bool]) {
        let Index { slots, readers } = &mut *locked(&self.index);
        for (key, held) in keys.iter().zip(held) {
            *held = false;
            if let Some(&mut slot) = slots.get_mut(key)
                && readers[slot as usize] < u16::MAX
            {
                readers[slot as usize] += 1;
                *held = true;
            }
        }
    }

    /// What is held neither goes nor moves, so its slot is still the one that was counted.
    fn unhold(&self, keys: &[ObjectKey]) {
        let Index { slots, readers } = &mut *locked(&self.index);
        for key in keys {
            if let Some(slot) = slots.peek(key) {
                readers[*slot as usize] -= 1;
            }
        }
    }

    fn get_parts(&self, parts: &mut [GetPart], outcomes: &mut [Outcome]) {
        let within = |part: &GetPart| {
            let end = part.offset.checked_add(part.bytes.len() as u64);
            end.is_some_and(|end| end <= self.slot_bytes)
        };
        let reads = parts.iter_mut().map(|part| Read {
            slot: if within(part) { self.slot(&part.key) } else { None },
            offset: part.offset,
            bytes: part.bytes,
        });
        self.read(reads.collect(), outcomes);
    }

    fn remove(&self, keys: &[ObjectKey]) {
        let mut writer = locked(&self.writer);
        let mut gone = Vec::new();
        {
            let Index { slots, readers } = &mut *locked(&self.index);
            for key in keys {
                // One that is being read goes another time: whoever reads it finds it bad as well.
                if slots.peek_mut(key).is_some_and(|slot| readers[*slot as usize] == 0)
                    && let Some(slot) = slots.remove(key)
                {
                    gone.push((*key, slot));
                }
            }
        }
        let records: Vec<Record> =
            gone.iter().map(|&(key, slot)| Record::Removed { key, slot }).collect();
        writer.tell(&keys_of(&gone), &[]);
        // Where this fails the slots are not used again before a restart, which finds the object
        // that was removed, and whoever gets it finds it bad.
        if !records.is_empty() && !writer.broken && writer.journal.append(&records).is_ok() {
            writer.free.extend(gone.into_iter().map(|(_, slot)| slot));
        }
    }

    /// Reads the labels, in the caller's thread.
    fn watch(&self, watcher: Arc<dyn Watcher>) -> bool {
        let mut writer = locked(&self.writer);
        writer.labels.read(
            |key, slot| locked(&self.index).slots.peek_mut(key).is_some_and(|at| *at == slot),
            |labels| watcher.changed(&[], &labels.iter().collect::<Vec<_>>()),
        );
        writer.watcher = Some(watcher);
        true
    }

    fn used(&self) -> Option<(u64, u64)> {
        let objects = locked(&self.index).slots.len() as u64;
        Some((objects * self.slot_bytes, objects))
    }
}
