//! Of which block each slot's object is: what the journal, which knows keys alone, cannot say, and
//! KV events must. A file of records of one size, one for each slot, at the slot's place.
//!
//! A record is used only where it is whole and leads to the key that the journal has in its slot. So
//! it is never flushed, and an error is no failure: a block without its record is served like any
//! other, and only not told of until it is put again. Records are read where somebody watches.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::files::{DiskFile, Files, read_all, write_all};
use crate::ids::{Namespace, TokenId};
use crate::prefix::Digest;
use crate::tier::ObjectKey;
use crate::tier::key::Configuration;
use crate::tier::object::{Label, Origin};

const NAME: &str = "labels";
/// Media of a record; a block in which more begin has none.
const MOST_MEDIA: usize = 4;
const MEDIA_AT: usize = 112;
const TOKENS_AT: usize = MEDIA_AT + MOST_MEDIA * 36;
/// Read at once, and so told at once.
const READ_RECORDS: usize = 1024;

/// ```text
/// 0    u32 CRC-32C of what follows
/// 4    u8 1: there is a parent; u8 1: there is a seed; u8 media; u8 0
/// 8    u64 number of the namespace
/// 16   digest of the block, of its parent, of the namespace's seed
/// 112  media: u32 place, digest
/// 256  the tokens, u32 each
/// ```
#[derive(Debug)]
pub struct Labels {
    /// `None` where there is no such file to be had.
    file: Option<Box<dyn DiskFile>>,
    config: Configuration,
    record: Vec<u8>,
}

impl Labels {
    pub fn open(files: &dyn Files, config: &Configuration) -> Self {
        let bytes = TOKENS_AT + config.block_tokens() as usize * 4;
        let file = files.open(NAME, true, false).ok();
        Self { file, config: config.clone(), record: alloc::vec![0; bytes] }
    }

    /// Notes what the object of a slot is of.
    pub fn write(&mut self, slot: u32, label: &Label) {
        let Label { block, parent, tokens, origin, .. } = label;
        let Origin { space, seed, media } = origin;
        let record = &mut self.record;
        let (bytes, fits) = (record.len(), TOKENS_AT + tokens.len() * 4 == record.len());
        let Some(file) = self.file.as_ref().filter(|_| fits && media.len() <= MOST_MEDIA) else {
            return;
        };
        record.fill(0);
        let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
        put(4, &[u8::from(parent.is_some()), u8::from(seed.is_some()), media.len() as u8]);
        put(8, &space.0.to_le_bytes());
        put(16, &block.0);
        put(48, &parent.unwrap_or_default().0);
        put(80, &seed.unwrap_or_default().0);
        for (n, (at, digest)) in media.iter().enumerate() {
            put(MEDIA_AT + n * 36, &at.to_le_bytes());
            put(MEDIA_AT + n * 36 + 4, &digest.0);
        }
        for (n, token) in tokens.iter().enumerate() {
            put(TOKENS_AT + n * 4, &token.to_le_bytes());
        }
        let crc = crc32c::crc32c(&record[4..]).to_le_bytes();
        record[..4].copy_from_slice(&crc);
        // Without it the block is not told of after a restart.
        let _ = write_all(&**file, record, u64::from(slot) * bytes as u64);
    }

    /// Shows the labels of the objects that `has` says are in their slots, some at a time.
    pub fn read(&self, has: impl Fn(&ObjectKey, u32) -> bool, mut see: impl FnMut(&[Label])) {
        let Some(file) = &self.file else { return };
        let bytes = self.record.len();
        let records = file.length().unwrap_or(0) / bytes as u64;
        let mut buffer = Vec::new();
        let mut first = 0;
        while first < records {
            let count = (records - first).min(READ_RECORDS as u64);
            buffer.resize(count as usize * bytes, 0);
            if read_all(&**file, &mut buffer, first * bytes as u64).is_err() {
                return;
            }
            let labels: Vec<Label> = buffer
                .chunks_exact(bytes)
                .zip(first as u32..)
                .filter_map(|(record, slot)| self.decode(record).filter(|l| has(&l.key, slot)))
                .collect();
            if !labels.is_empty() {
                see(&labels);
            }
            first += count;
        }
    }

    fn decode(&self, record: &[u8]) -> Option<Label> {
        if record[..4] != crc32c::crc32c(&record[4..]).to_le_bytes() {
            return None;
        }
        let digest = |at: usize| {
            let mut digest = Digest::default();
            digest.0.copy_from_slice(&record[at..at + 32]);
            digest
        };
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| record[at + n]));
        let count = usize::from(record[6]);
        if count > MOST_MEDIA {
            return None;
        }
        let block = digest(16);
        let (parent, seed) =
            ((record[4] != 0).then(|| digest(48)), (record[5] != 0).then(|| digest(80)));
        let media: Box<[(u32, Digest)]> =
            (0..count).map(|n| MEDIA_AT + n * 36).map(|at| (word(at), digest(at + 4))).collect();
        let tokens: Box<[TokenId]> = (TOKENS_AT..record.len()).step_by(4).map(word).collect();
        // What it says of itself leads to what it is called.
        let inside = media.iter().all(|(at, _)| (*at as usize) < tokens.len());
        if !inside || Digest::of_block_with_media(parent.as_ref(), &tokens, &media) != block {
            return None;
        }
        let space = Namespace(u64::from(word(8)) | u64::from(word(12)) << 32);
        let keys = Digest::of_media(seed.as_ref(), &media);
        let key = self.config.key(&block);
        Some(Label { key, block, parent, keys, tokens, origin: Origin { space, seed, media } })
    }
}
