//! Puts: slots, bytes, one flush of the bytes, one of the journal; and the room for them.

use alloc::sync::Arc;
use alloc::vec::Vec;
use std::io::ErrorKind;
use std::sync::PoisonError;

use super::io::{Bytes, Transfer};
use super::journal::Record;
use super::{DiskStore, Index, Writer, keys_of, locked, segment_name};
use crate::tier::{ObjectKey, Outcome, Put};

/// Records beyond twice those needed before the journal is written anew.
pub(super) const SPARE_RECORDS: u64 = 4096;

impl DiskStore {
    /// Makes free slots for `wanted` puts, as far as that can be: from new segments, and when there
    /// are as many as may be, by evicting.
    fn make_room(&self, writer: &mut Writer, wanted: usize) {
        while writer.free.len() < wanted && !writer.no_room && self.add_segment(writer) {}
        if writer.free.len() < wanted {
            let victims = self.victims(wanted - writer.free.len());
            self.settle(writer, &[], victims);
        }
    }

    fn add_segment(&self, writer: &mut Writer) -> bool {
        let have = self.segments.read().unwrap_or_else(PoisonError::into_inner).len();
        let first = have as u64 * u64::from(self.segment_slots);
        let more = u64::from(self.most_slots).saturating_sub(first).min(self.segment_slots.into());
        if more == 0 {
            return false;
        }
        let make = || {
            let file = self.files.open(&segment_name(have), true, self.direct)?;
            file.own()?;
            file.allocate(more * self.slot_bytes)?;
            file.sync()?;
            self.files.sync_names()?;
            Ok::<_, std::io::Error>(file)
        };
        match make() {
            Ok(file) => {
                locked(&self.index)
                    .readers
                    .resize(have * self.segment_slots as usize + more as usize, 0);
                let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
                segments.push(Arc::from(file));
                writer.free.extend((first as u32..(first + more) as u32).rev());
                true
            }
            // What is there must do. A file that was begun is longer or shorter than its slots, and
            // is begun again when the store is opened.
            Err(_) => {
                writer.no_room = true;
                false
            }
        }
    }

    /// Takes the least recently used objects out of the index, so that no new reader finds them.
    fn victims(&self, count: usize) -> Vec<(ObjectKey, u32)> {
        let Index { slots, readers } = &mut *locked(&self.index);
        let mut victims = Vec::new();
        while victims.len() < count {
            let Some(victim) = slots.pop_oldest(|&slot| readers[slot as usize] == 0) else { break };
            victims.push(victim);
        }
        victims
    }

    /// Records puts, whose bytes were flushed, and evictions, in one flush; whether it was done.
    fn settle(
        &self,
        writer: &mut Writer,
        puts: &[(ObjectKey, u32)],
        victims: Vec<(ObjectKey, u32)>,
    ) -> bool {
        if puts.is_empty() && victims.is_empty() {
            return true;
        }
        let mut records: Vec<Record> =
            victims.iter().map(|&(key, slot)| Record::Removed { key, slot }).collect();
        records.extend(puts.iter().map(|&(key, slot)| Record::Put { key, slot }));
        if let Err(error) = writer.journal.append(&records) {
            // A full disk may have room later; after anything else nothing is certain.
            writer.broken |= error.kind() != ErrorKind::StorageFull;
            let mut index = locked(&self.index);
            for (key, slot) in victims {
                index.slots.insert(key, slot);
            }
            return false;
        }
        *locked(&self.evicted) += victims.len() as u64;
        writer.tell(&keys_of(&victims), &[]);
        writer.free.extend(victims.into_iter().map(|(_, slot)| slot));
        let mut index = locked(&self.index);
        for &(key, slot) in puts {
            index.slots.insert(key, slot);
        }
        let live = index.slots.len() as u64;
        if writer.journal.records() > 2 * live + SPARE_RECORDS {
            let all: Vec<Record> =
                index.slots.iter().map(|(&key, &slot)| Record::Put { key, slot }).collect();
            drop(index);
            if let Err((_, gone)) = writer.journal.rewrite(&*self.files, &all) {
                writer.broken |= gone;
            }
        }
        true
    }

    /// How many objects to evict ahead of need, once no segment can be added.
    fn ahead(&self, writer: &Writer, batch: usize) -> usize {
        let made = locked(&self.index).readers.len();
        let slots = made.min(self.most_slots as usize);
        let grown = slots == self.most_slots as usize || writer.no_room;
        // A small store keeps at least three quarters of its room.
        let reserve = batch.min(slots / 4);
        if grown { reserve.saturating_sub(writer.free.len()) } else { 0 }
    }

    pub(super) fn write(&self, writer: &mut Writer, objects: &[Put], outcomes: &mut [Outcome]) {
        let mut placed: Vec<(usize, u32)> = Vec::new();
        let twice = |n: usize| objects[..n].iter().any(|other| other.key == objects[n].key);
        // What is there is used, like by a read, before anything is evicted: else making room could
        // evict an object of this very batch, and leave it without the slot that it then needs.
        let wanted = {
            let slots = &mut locked(&self.index).slots;
            let absent = objects
                .iter()
                .enumerate()
                .filter(|&(n, put)| slots.get_mut(&put.key).is_none() && !twice(n));
            absent.count()
        };
        self.make_room(writer, wanted);
        if writer.broken {
            outcomes.fill(Outcome::Failed);
            return;
        }
        for (n, put) in objects.iter().enumerate() {
            let fits = put.object.len() as u64 == self.slot_bytes;
            outcomes[n] = if !fits {
                Outcome::Failed
            } else if twice(n) {
                // What becomes of the first, below.
                Outcome::None
            } else if locked(&self.index).slots.contains(&put.key) {
                Outcome::Done
            } else if let Some(slot) = writer.free.pop() {
                placed.push((n, slot));
                Outcome::None
            } else {
                Outcome::Full
            };
        }
        let places: Vec<_> = placed.iter().filter_map(|&(_, slot)| self.place(slot)).collect();
        let mut transfers: Vec<Transfer> = placed
            .iter()
            .zip(&places)
            .map(|(&(n, _), (file, offset))| Transfer {
                file: &**file,
                offset: *offset,
                bytes: Bytes::Write(objects[n].object),
            })
            .collect();
        let results = writer.lane.run(&mut transfers);
        let mut puts = Vec::new();
        for (&(n, slot), result) in placed.iter().zip(results) {
            match result {
                Ok(()) => puts.push((objects[n].key, slot)),
                Err(error) => {
                    writer.free.push(slot);
                    let full = error.kind() == ErrorKind::StorageFull;
                    outcomes[n] = if full { Outcome::Full } else { Outcome::Failed };
                }
            }
        }
        let mut touched: Vec<u32> =
            puts.iter().map(|&(_, slot)| slot / self.segment_slots).collect();
        touched.sort_unstable();
        touched.dedup();
        let synced = touched
            .iter()
            .filter_map(|segment| self.place(segment * self.segment_slots))
            .all(|(file, _)| file.sync().is_ok());
        writer.broken |= !synced;
        for &(n, slot) in &placed {
            if let Some(label) = objects[n].label {
                writer.labels.write(slot, label);
            }
        }
        let done = synced && {
            let victims = self.victims(self.ahead(writer, objects.len()));
            self.settle(writer, &puts, victims)
        };
        if !done {
            writer.free.extend(puts.iter().map(|&(_, slot)| slot));
        }
        let mut stored = Vec::new();
        for (n, _) in placed {
            if outcomes[n] == Outcome::None {
                outcomes[n] = if done { Outcome::Done } else { Outcome::Failed };
                stored.extend(objects[n].label.filter(|_| done));
            }
        }
        writer.tell(&[], &stored);
        for n in 0..outcomes.len() {
            if outcomes[n] == Outcome::None {
                let first = objects.iter().position(|other| other.key == objects[n].key);
                outcomes[n] = first.map_or(Outcome::Failed, |first| outcomes[first]);
            }
        }
    }
}
