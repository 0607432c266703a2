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
use crate::tier::object::{Label, Nth, Origin};

const NAME: &str = "labels";
/// Media of a record are one for so many tokens of a block, and four at least.
const MEDIUM_TOKENS: usize = 16;
const MEDIA_AT: usize = 112;
const MEDIUM_BYTES: usize = 36;
/// Read at once, and so told at once.
const READ_RECORDS: usize = 1024;

/// ```text
/// 0    u32 CRC-32C of what follows
/// 4    u8 1: there is a parent; u8 1: there is a seed; u8 media; u8 number of the object,
///      and in the upper four bits how many the block has beside the first
/// 8    u64 number of the namespace
/// 16   digest of the block, of its parent, of the namespace's seed
/// 112  media: u32 place, digest; room for as many as `most_media`
///      the tokens, u32 each
/// ```
///
/// A block in which more media begin has no record: it is served all the same, and no event tells of it
/// between a restart and when it is next put. Room for the most that there could be, one a token, would
/// make the file three to six times as large.
#[derive(Debug)]
pub struct Labels {
    /// `None` where there is no such file to be had.
    file: Option<Box<dyn DiskFile>>,
    config: Configuration,
    record: Vec<u8>,
}

/// Media that a record of a block of so many tokens has room for.
fn most_media(block_tokens: usize) -> usize {
    (block_tokens / MEDIUM_TOKENS).max(4)
}

/// Where the tokens of a record begin.
fn tokens_at(block_tokens: usize) -> usize {
    MEDIA_AT + most_media(block_tokens) * MEDIUM_BYTES
}

impl Labels {
    pub fn open(files: &dyn Files, config: &Configuration) -> Self {
        let tokens = config.block_tokens() as usize;
        let bytes = tokens_at(tokens) + tokens * 4;
        let file = files.open(NAME, true, false).ok();
        Self { file, config: config.clone(), record: alloc::vec![0; bytes] }
    }

    /// Notes what the object of a slot is of.
    pub fn write(&mut self, slot: u32, label: &Label) {
        let Label { block, parent, tokens, origin, nth, .. } = label;
        let Origin { space, seed, media } = origin;
        let record = &mut self.record;
        let (bytes, tokens_at) = (record.len(), tokens_at(tokens.len()));
        let fits = tokens_at + tokens.len() * 4 == bytes && media.len() <= most_media(tokens.len());
        let Some(file) = self.file.as_ref().filter(|_| fits) else { return };
        record.fill(0);
        let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
        let (number, others) = (nth.number & 15, nth.of.saturating_sub(1) & 15);
        let flags = [parent.is_some(), seed.is_some()].map(u8::from);
        put(4, &[flags[0], flags[1], media.len() as u8, number | others << 4]);
        put(8, &space.0.to_le_bytes());
        put(16, &block.0);
        put(48, &parent.unwrap_or_default().0);
        put(80, &seed.unwrap_or_default().0);
        for (n, (at, digest)) in media.iter().enumerate() {
            put(MEDIA_AT + n * MEDIUM_BYTES, &at.to_le_bytes());
            put(MEDIA_AT + n * MEDIUM_BYTES + 4, &digest.0);
        }
        for (n, token) in tokens.iter().enumerate() {
            put(tokens_at + n * 4, &token.to_le_bytes());
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
        let block_tokens = self.config.block_tokens() as usize;
        if count > most_media(block_tokens) {
            return None;
        }
        let block = digest(16);
        let (parent, seed) =
            ((record[4] != 0).then(|| digest(48)), (record[5] != 0).then(|| digest(80)));
        let media: Box<[(u32, Digest)]> = (0..count)
            .map(|n| MEDIA_AT + n * MEDIUM_BYTES)
            .map(|at| (word(at), digest(at + 4)))
            .collect();
        let tokens: Box<[TokenId]> =
            (tokens_at(block_tokens)..record.len()).step_by(4).map(word).collect();
        // What it says of itself leads to what it is called.
        let inside = media.iter().all(|(at, _)| (*at as usize) < tokens.len());
        if !inside || Digest::of_block_with_media(parent.as_ref(), &tokens, &media) != block {
            return None;
        }
        let space = Namespace(u64::from(word(8)) | u64::from(word(12)) << 32);
        let keys = Digest::of_media(seed.as_ref(), &media);
        let nth = Nth { number: record[7] & 15, of: (record[7] >> 4) + 1 };
        let key = self.config.key_of(&block, nth.number);
        let origin = Origin { space, seed, media };
        Some(Label { key, block, parent, keys, tokens, origin, nth })
    }
}

#[cfg(test)]
mod tests {
    use super::super::faulty::FaultyFiles;
    use super::*;
    use crate::dtype::KvFormat;
    use crate::layout::slice::Slice;
    use crate::layout::{CacheSpec, GroupSpec};

    #[test]
    fn records_have_room_for_a_medium_every_16_tokens_and_for_four() {
        for (block_tokens, most) in [(16, 4), (64, 4), (128, 8), (256, 16)] {
            let group = GroupSpec::uniform(1, 1, 16, KvFormat::F16);
            let spec = CacheSpec::uniform(block_tokens, group);
            let config = Configuration::new("m", &spec, &Slice::whole(&spec)).unwrap();
            let files = FaultyFiles::default();
            let mut labels = Labels::open(&files, &config);
            let label = |media: u32| {
                let tokens: Box<[TokenId]> = (0..block_tokens).map(|n| n + media * 1000).collect();
                let media: Box<[_]> = (0..media).map(|n| (n, Digest([n as u8; 32]))).collect();
                let block = Digest::of_block_with_media(None, &tokens, &media);
                let keys = Digest::of_media(None, &media);
                let origin = Origin { space: Namespace(3), seed: None, media };
                let nth = Nth { number: 2, of: 7 };
                let key = config.key_of(&block, nth.number);
                Label { key, block, parent: None, keys, tokens, origin, nth }
            };
            (0..=most + 1).for_each(|n| labels.write(n, &label(n)));
            let mut found = Vec::new();
            let has = |key: &ObjectKey, slot| *key == label(slot).key;
            Labels::open(&files, &config).read(has, |labels| found.extend_from_slice(labels));
            let expected: Vec<Label> = (0..=most).map(label).collect();
            assert_eq!(found, expected, "{block_tokens}");
            let origins = |labels: &[Label]| -> Vec<Origin> {
                assert!(labels.iter().all(|label| label.nth == Nth { number: 2, of: 7 }));
                labels.iter().map(|label| label.origin.clone()).collect()
            };
            assert_eq!(origins(&found), origins(&expected));
        }
    }
}
