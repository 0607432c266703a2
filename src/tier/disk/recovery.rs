//! Opening a directory: which objects there are, from the journal alone, and what was dropped.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::files::{DiskFile, Files, read_all, write_all};
use super::journal::{Found, Journal, Record};
use super::{failed, segment_name};
use crate::error::{Error, Result};
use crate::tier::ObjectKey;
use crate::tier::key::Configuration;
use crate::tier::lru::Lru;

/// What was found when a disk tier was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovery {
    /// Objects that can be served.
    pub objects: u64,
    /// Journal records that were damaged or half written, and left out.
    pub damaged_records: u64,
    /// Objects left out because their part of a file is not there.
    pub truncated_objects: u64,
    /// Objects left out because the store is smaller now.
    pub excess_objects: u64,
    /// The journal's head was damaged: everything was left out, and the store begins anew.
    pub reset: bool,
}

/// What the store goes on with.
pub struct Recovered {
    pub journal: Journal,
    pub segments: Vec<Arc<dyn DiskFile>>,
    pub slots: Lru<u32>,
    /// The lowest slot last, so that it is used first.
    pub free: Vec<u32>,
}

/// The file that says what the objects are of.
const CONFIGURATION: &str = "configuration";

fn check_configuration(files: &dyn Files, config: &Configuration) -> Result<()> {
    let io = failed("the configuration of the disk tier");
    let file = files.open(CONFIGURATION, true, false).map_err(&io)?;
    let expected = config.text().as_bytes();
    let length = file.length().map_err(&io)?;
    // Shorter and the beginning of it: cut off while it was first written.
    let mut text = alloc::vec![0; length.min(expected.len() as u64 + 1) as usize];
    read_all(&*file, &mut text, 0).map_err(&io)?;
    if text == expected {
        return Ok(());
    }
    if !expected.starts_with(&text) && text.iter().any(|&byte| byte != 0) {
        return Err(Error::InvalidState {
            why: "the disk tier's directory is of another configuration",
        });
    }
    write_all(&*file, expected, 0).map_err(&io)?;
    file.set_len(expected.len() as u64).map_err(&io)?;
    file.sync().map_err(&io)?;
    files.sync_names().map_err(&io)
}

/// Opens everything.
pub fn recover(
    files: &dyn Files,
    config: &Configuration,
    slot_bytes: u64,
    segment_slots: u32,
    most_slots: u32,
    direct: bool,
) -> Result<(Recovered, Recovery)> {
    check_configuration(files, config)?;
    let io = failed("the files of the disk tier");
    let mut recovery = Recovery::default();

    // Segments first: how many of their slots are really there.
    let mut segments: Vec<Arc<dyn DiskFile>> = Vec::new();
    let mut whole: Vec<u32> = Vec::new();
    let names = files.names().map_err(&io)?;
    while names.contains(&segment_name(segments.len())) {
        let name = segment_name(segments.len());
        let file: Box<dyn DiskFile> = files.open(&name, false, direct).map_err(&io)?;
        file.own().map_err(&io)?;
        let length = file.length().map_err(&io)?;
        whole.push((length / slot_bytes).min(segment_slots.into()) as u32);
        segments.push(Arc::from(file));
    }

    let mut slots: Lru<u32> = Lru::new();
    let mut owners: Vec<Option<ObjectKey>> = Vec::new();
    let see = |record: Option<Record>| match record {
        None => recovery.damaged_records += 1,
        Some(Record::Put { key, slot }) => {
            let at = slot as usize;
            if owners.len() <= at {
                // Slots are numbered from 0: a number far off is of a record that was forged.
                if at >= segments.len() * segment_slots as usize {
                    recovery.truncated_objects += 1;
                    return;
                }
                owners.resize(at + 1, None);
            }
            // What was in the slot is gone, and so is what the object had before.
            if let Some(old) = owners[at].replace(key)
                && old != key
            {
                slots.remove(&old);
            }
            if let Some(old) = slots.insert(key, slot)
                && old != slot
            {
                owners[old as usize] = None;
            }
        }
        Some(Record::Removed { key, slot }) => {
            if owners.get(slot as usize) == Some(&Some(key)) {
                owners[slot as usize] = None;
                slots.remove(&key);
            }
        }
    };
    let (mut journal, found) = Journal::open(files, slot_bytes, see).map_err(&io)?;
    match found {
        Found::New | Found::Good => {}
        Found::Foreign => {
            let why = "the disk tier's directory is of another format version";
            return Err(Error::InvalidState { why });
        }
        Found::Damaged => {
            recovery.reset = true;
            journal.rewrite(files, &[]).map_err(|(error, _)| io(error))?;
        }
    }

    let mut dropped = Vec::new();
    for (at, owner) in owners.iter_mut().enumerate() {
        let Some(key) = *owner else { continue };
        let (segment, inside) = (at / segment_slots as usize, at as u32 % segment_slots);
        let there = whole.get(segment).is_some_and(|&slots| inside < slots);
        if there && (at as u32) < most_slots {
            continue;
        }
        match there {
            true => recovery.excess_objects += 1,
            false => recovery.truncated_objects += 1,
        }
        slots.remove(&key);
        *owner = None;
        dropped.push(Record::Removed { key, slot: at as u32 });
    }
    if !dropped.is_empty() {
        journal.append(&dropped).map_err(&io)?;
    }
    // A segment that was cut short, or never got its room, is made whole for what comes.
    let mut free = Vec::new();
    for (n, file) in segments.iter().enumerate() {
        let first = n as u64 * u64::from(segment_slots);
        let most = u64::from(most_slots).saturating_sub(first).min(segment_slots.into());
        let mut have = u64::from(whole[n]).min(most);
        if have < most && file.allocate(most * slot_bytes).and_then(|()| file.sync()).is_ok() {
            have = most;
        }
        let unused = |slot: &u32| owners.get(*slot as usize).is_none_or(|owner| owner.is_none());
        free.extend((first as u32..(first + have) as u32).filter(unused));
    }
    free.reverse();
    recovery.objects = slots.len() as u64;
    Ok((Recovered { journal, segments, slots, free }, recovery))
}
