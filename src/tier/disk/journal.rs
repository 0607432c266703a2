//! The index journal: which slot has which object, as records appended to a file.
//!
//! A record is 64 bytes with a checksum of its own, so that one that was half written, or changed
//! since, is known and left out: it costs the object that it names, never a wrong one. A header of
//! one record's length says version and slot size. The file is written anew, beside the old one
//! and then in its place, when most of its records say what is no longer so.

use alloc::boxed::Box;
use alloc::vec::Vec;
use std::io::{Error, Result};

use super::files::{DiskFile, Files, read_all, write_all};
use crate::tier::ObjectKey;

pub const RECORD_BYTES: usize = 64;
/// The version of the directory's files.
pub const VERSION: u32 = 1;
const NAME: &str = "journal";
const NEW_NAME: &str = "journal.new";
const MAGIC: [u8; 8] = *b"KVCJRN1\0";
/// Read at once at restart.
const READ_BYTES: usize = 1 << 20;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// The slot has the object now.
    Put { key: ObjectKey, slot: u32 },
    /// The object is gone from the slot.
    Removed { key: ObjectKey, slot: u32 },
}

impl Record {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let (kind, key, slot) = match self {
            Record::Put { key, slot } => (1, key, slot),
            Record::Removed { key, slot } => (2, key, slot),
        };
        let mut bytes = [0; RECORD_BYTES];
        bytes[4] = kind;
        bytes[8..12].copy_from_slice(&slot.to_le_bytes());
        bytes[16..48].copy_from_slice(&key.0);
        with_checksum(bytes)
    }

    fn decode(bytes: &[u8]) -> Option<Record> {
        if !is_whole(bytes) {
            return None;
        }
        let (mut key, mut slot) = (ObjectKey::default(), [0; 4]);
        key.0.copy_from_slice(&bytes[16..48]);
        slot.copy_from_slice(&bytes[8..12]);
        let slot = u32::from_le_bytes(slot);
        match bytes[4] {
            1 => Some(Record::Put { key, slot }),
            2 => Some(Record::Removed { key, slot }),
            _ => None,
        }
    }
}

fn with_checksum(mut bytes: [u8; RECORD_BYTES]) -> [u8; RECORD_BYTES] {
    let crc = crc32c::crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn is_whole(bytes: &[u8]) -> bool {
    bytes[..4] == crc32c::crc32c(&bytes[4..RECORD_BYTES]).to_le_bytes()
}

fn header(slot_bytes: u64) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    bytes[8..16].copy_from_slice(&MAGIC);
    bytes[16..20].copy_from_slice(&VERSION.to_le_bytes());
    bytes[24..32].copy_from_slice(&slot_bytes.to_le_bytes());
    with_checksum(bytes)
}

/// How a journal was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// There was none.
    New,
    /// It can be used.
    Good,
    /// Its header is damaged: nothing that it says can be trusted to be of this version.
    Damaged,
    /// It is of another version, or of other slots.
    Foreign,
}

/// The open journal.
#[derive(Debug)]
pub struct Journal {
    file: Box<dyn DiskFile>,
    slot_bytes: u64,
    /// Where the next record goes.
    end: u64,
    records: u64,
}

impl Journal {
    /// Opens the journal, or begins one; `see` is shown each record in order, `None` for one that
    /// is damaged.
    ///
    /// # Errors
    /// Those of the system.
    pub fn open(
        files: &dyn Files,
        slot_bytes: u64,
        mut see: impl FnMut(Option<Record>),
    ) -> Result<(Self, Found)> {
        let file = files.open(NAME, true, false)?;
        let length = file.length()?;
        let mut journal = Journal { file, slot_bytes, end: RECORD_BYTES as u64, records: 0 };
        let mut first = [0; RECORD_BYTES];
        if length < RECORD_BYTES as u64 {
            // Begun, and cut off before its header was there: no record can be either.
            journal.file.set_len(0)?;
            write_all(&*journal.file, &header(slot_bytes), 0)?;
            journal.file.sync()?;
            files.sync_names()?;
            return Ok((journal, Found::New));
        }
        read_all(&*journal.file, &mut first, 0)?;
        if !is_whole(&first) || first[8..16] != MAGIC {
            return Ok((journal, Found::Damaged));
        }
        if first != header(slot_bytes) {
            return Ok((journal, Found::Foreign));
        }
        let whole = length / RECORD_BYTES as u64 * RECORD_BYTES as u64;
        let mut buffer = Vec::new();
        let mut good = journal.end;
        let mut bad = 0u64;
        let mut at = journal.end;
        while at < whole {
            buffer.resize(READ_BYTES.min((whole - at) as usize), 0);
            read_all(&*journal.file, &mut buffer, at)?;
            for bytes in buffer.chunks_exact(RECORD_BYTES) {
                at += RECORD_BYTES as u64;
                match Record::decode(bytes) {
                    None => bad += 1,
                    record => {
                        (0..bad).for_each(|_| see(None));
                        (bad, good) = (0, at);
                        journal.records += 1;
                        see(record);
                    }
                }
            }
        }
        // What follows the last good record was being written when it ended. It is cut off, so that
        // records are where they are looked for.
        (0..bad).for_each(|_| see(None));
        if good < length {
            if whole < length && bad == 0 {
                see(None);
            }
            journal.file.set_len(good)?;
        }
        journal.end = good;
        Ok((journal, Found::Good))
    }

    /// Records in the file.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Appends records and waits until they survive a power cut.
    ///
    /// # Errors
    /// Those of the system; then none of the records counts, whatever is in the file.
    pub fn append(&mut self, records: &[Record]) -> Result<()> {
        let bytes: Vec<u8> = records.iter().flat_map(Record::encode).collect();
        let written = write_all(&*self.file, &bytes, self.end).and_then(|()| self.file.sync());
        if let Err(error) = written {
            // Where even this fails, the next records go over what is there now.
            let _ = self.file.set_len(self.end);
            return Err(error);
        }
        self.end += bytes.len() as u64;
        self.records += records.len() as u64;
        Ok(())
    }

    /// Writes the journal anew with only these records.
    ///
    /// # Errors
    /// Those of the system, and whether the old journal may still be gone: where not, it is in use.
    pub fn rewrite(
        &mut self,
        files: &dyn Files,
        records: &[Record],
    ) -> core::result::Result<(), (Error, bool)> {
        let bytes: Vec<u8> = records.iter().flat_map(Record::encode).collect();
        let write = || -> Result<Box<dyn DiskFile>> {
            let file = files.open(NEW_NAME, true, false)?;
            file.set_len(0)?;
            write_all(&*file, &header(self.slot_bytes), 0)?;
            write_all(&*file, &bytes, RECORD_BYTES as u64)?;
            file.sync()?;
            Ok(file)
        };
        let file = write().map_err(|error| (error, false))?;
        files.rename(NEW_NAME, NAME).map_err(|error| (error, true))?;
        self.file = file;
        self.end = (RECORD_BYTES + bytes.len()) as u64;
        self.records = records.len() as u64;
        files.sync_names().map_err(|error| (error, true))
    }
}
