//! Lookups in a prefix index on the device: the image of the index there, what to upload when the
//! index changed, and how a batch of lookups is launched.
//!
//! The image is one allocation: a head of 16 words (how much of each part is in use, the seeds of
//! the tables, the shape), then the parts as [`crate::prefix::Part`] describes them, each with room
//! for the fullest the index can become. So addresses never change, and a captured graph sees what
//! was uploaded since. Changes go up as one list of runs with their words, and a kernel writes them
//! to their places; uploads and lookups must be ordered by the caller (one stream does it). An image
//! is of the index as it was at its last upload: a block that has been evicted since can still be
//! matched, so whoever acts on a result takes its references first, or holds the evictions back.

use alloc::vec::Vec;

use super::Launch;
use super::params::{In, LookupParams, LookupPatch, LookupPatchParams, Out};
use crate::error::{Error, Result};
use crate::prefix::{Change, Part, PrefixIndex};

kernels! {
    LOOKUP = "kvc_lookup", "kvc_lookup_params", 64;
    PATCH = "kvc_lookup_patch", "kvc_lookup_patch_params", 256;
}

/// Words of the head.
const HEAD_WORDS: u64 = 16;
/// Most words of a run: longer ones are cut, so that all warps have work.
const RUN_WORDS: u32 = 1024;

/// The image of one index: where its parts lie, and how much room they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LookupImage {
    block_tokens: u32,
    groups: u32,
    /// In words from the image's start, in the order of [`Part::ALL`].
    offsets: [u64; 5],
    /// In records.
    room: [u32; 5],
    words: u64,
}

/// What has to go to the device: runs and their words. Reuse one: its buffers keep their memory.
#[derive(Debug, Default)]
pub struct LookupUpload {
    /// Where the words go.
    pub patches: Vec<LookupPatch>,
    /// The words.
    pub words: Vec<u32>,
    changes: Vec<Change>,
}

/// What a batch of lookups has on the device.
#[derive(Debug, Clone, Copy)]
pub struct LookupBatch {
    /// Requests.
    pub requests: u32,
    /// Tokens of all requests.
    pub tokens: In<u32>,
    /// Where the tokens of each request begin, `[requests + 1]`.
    pub indptr: In<i32>,
    /// Namespace of each request; null where all are in namespace 0.
    pub namespaces: In<u64>,
    /// Tokens at the end of each request that are not looked up: 1 leaves the last one to be
    /// computed, as sampling needs its logits.
    pub leave: u32,
    /// The most blocks that a request matches.
    pub max_blocks: u32,
    /// Tokens that whole cached blocks cover, `[requests]`.
    pub matched: Out<u32>,
    /// Their block ids, `[block][group]`, in rows of `block_stride`; what follows is not written.
    pub blocks: Out<i32>,
    /// Ids from a request to the next, at least `max_blocks` times the groups.
    pub block_stride: i64,
    /// How many tokens after those agree with one more cached block, or null.
    pub tail_tokens: Out<u32>,
    /// That block's ids, `[requests][groups]`, or null.
    pub tail_blocks: Out<i32>,
    /// Raised as the kernel's parameters say, or null.
    pub error_flag: Out<u32>,
}

impl LookupImage {
    /// Lays out the image of `index`.
    ///
    /// # Errors
    /// `Overflow` where a part would have 2^32 records.
    pub fn new(index: &PrefixIndex) -> Result<Self> {
        let overflow = Error::Overflow { what: "image of the prefix index" };
        let (mut offsets, mut room) = ([0; 5], [0; 5]);
        let mut at = HEAD_WORDS;
        for (i, part) in Part::ALL.into_iter().enumerate() {
            offsets[i] = at.next_multiple_of(64);
            room[i] = u32::try_from(index.most_records(part)).map_err(|_| overflow)?;
            // Below 2^32 records of at most 2^16 words.
            at = offsets[i] + u64::from(room[i]) * index.record_words(part) as u64;
        }
        Ok(Self {
            block_tokens: index.block_tokens() as u32,
            groups: index.groups() as u32,
            offsets,
            room,
            words: at,
        })
    }

    /// Ids of a block, one a layer group.
    pub fn groups(&self) -> u32 {
        self.groups
    }

    /// Bytes of the image, from an address that is a multiple of 128.
    pub fn bytes(&self) -> u64 {
        self.words * 4
    }

    /// Puts what has changed in `index` since the last call into `upload`, in place of what was
    /// there; the first call after [`PrefixIndex::start_mirror`] gives everything. Several images
    /// of one index take the same uploads. An upload that never reached its image is made good by
    /// [`PrefixIndex::mark_all`].
    ///
    /// # Errors
    /// `InvalidArgument` for an index of another shape, `InvalidState` for one that is not mirrored,
    /// `OutOfMemory`, `Overflow` where 2^32 words have changed. Nothing is lost then: the next call
    /// gives everything.
    pub fn sync(&self, index: &mut PrefixIndex, upload: &mut LookupUpload) -> Result<()> {
        upload.patches.clear();
        upload.words.clear();
        upload.changes.clear();
        let made = self.fits(index).and_then(|()| self.collect(index, upload));
        if made.is_err() {
            index.mark_all();
            upload.patches.clear();
            upload.words.clear();
        }
        made
    }

    fn fits(&self, index: &PrefixIndex) -> Result<()> {
        if Self::new(index)? != *self {
            return Err(Error::invalid("index", "must be of the shape that the image has"));
        }
        let full = |(i, part): (usize, Part)| index.records(part) > self.room[i] as usize;
        if Part::ALL.into_iter().enumerate().any(full) {
            return Err(Error::Overflow { what: "image of the prefix index" });
        }
        Ok(())
    }

    fn collect(&self, index: &mut PrefixIndex, upload: &mut LookupUpload) -> Result<()> {
        let mut changes = core::mem::take(&mut upload.changes);
        let taken = index.take_changes(&mut changes);
        let result = taken.and_then(|()| {
            let head = self.head(index);
            push(upload, 0, &mut |words| {
                words.try_reserve(head.len()).map_err(|_| Error::OutOfMemory { bytes: 64 })?;
                words.extend_from_slice(&head);
                Ok(())
            })?;
            for Change { part, records } in changes.iter().cloned() {
                let i = Part::ALL.iter().position(|&p| p == part).unwrap_or(0);
                let record = index.record_words(part) as u64;
                let to = self.offsets[i] + u64::from(records.start) * record;
                push(upload, to, &mut |words| index.read_records(part, records.clone(), words))?;
            }
            Ok(())
        });
        changes.clear();
        upload.changes = changes;
        result
    }

    fn head(&self, index: &PrefixIndex) -> [u32; HEAD_WORDS as usize] {
        let count = |part| index.records(part) as u32;
        let [branches, spaces] = index.table_seeds();
        let mut head = [0; HEAD_WORDS as usize];
        head[..10].copy_from_slice(&[
            count(Part::Nodes),
            count(Part::Branches),
            count(Part::Spaces),
            count(Part::Tokens),
            branches as u32,
            (branches >> 32) as u32,
            spaces as u32,
            (spaces >> 32) as u32,
            self.block_tokens,
            self.groups,
        ]);
        head
    }

    /// The launch that writes an upload to the image: its runs and words lie at `patches` and
    /// `words` on the device. `None` where there is nothing to write.
    ///
    /// # Errors
    /// `NullPointer` for a missing address.
    pub fn patch_launch(
        &self,
        image: u64,
        upload: &LookupUpload,
        patches: In<LookupPatch>,
        words: In<u32>,
        error_flag: Out<u32>,
    ) -> Result<Option<(Launch, LookupPatchParams)>> {
        let count = upload.patches.len() as u32;
        if count == 0 {
            return Ok(None);
        }
        if image == 0 || patches.0 == 0 || words.0 == 0 {
            return Err(Error::NullPointer { what: "image, patches, words" });
        }
        let params = LookupPatchParams {
            patches,
            words,
            image: Out::at(image),
            error_flag,
            image_words: self.words as i64,
            uploaded: upload.words.len() as u32,
            count,
        };
        let grid = [count.div_ceil(PATCH.threads / 32), 1, 1];
        Ok(Some((Launch { kernel: &PATCH, grid, shared_bytes: 0 }, params)))
    }

    /// The launch of a batch of lookups in the image; `None` for an empty batch.
    ///
    /// # Errors
    /// `InvalidArgument` where rows of block ids overlap, an image is not aligned, or a match of
    /// `max_blocks` would have 2^32 tokens; `NullPointer` for a missing address.
    pub fn lookup_launch(
        &self,
        image: u64,
        batch: &LookupBatch,
    ) -> Result<Option<(Launch, LookupParams)>> {
        let b = batch;
        if b.requests == 0 {
            return Ok(None);
        }
        if image == 0 || b.tokens.0 == 0 || b.indptr.0 == 0 || b.matched.0 == 0 || b.blocks.0 == 0 {
            return Err(Error::NullPointer { what: "image, tokens, indptr, matched, blocks" });
        }
        if !image.is_multiple_of(128) {
            return Err(Error::Misaligned { what: "image", align_bytes: 128 });
        }
        if b.max_blocks.checked_mul(self.block_tokens).is_none() {
            return Err(Error::invalid("max_blocks", "must have fewer than 2^32 tokens"));
        }
        if b.block_stride < i64::from(b.max_blocks) * i64::from(self.groups) {
            return Err(Error::invalid("block_stride", "must hold max_blocks for each group"));
        }
        let at = |i: usize| In::at(image + self.offsets[i] * 4);
        let params = LookupParams {
            head: In::at(image),
            nodes: at(0),
            branches: at(1),
            spaces: at(2),
            slot_tokens: at(3),
            slot_ids: at(4),
            tokens: b.tokens,
            indptr: b.indptr,
            namespaces: b.namespaces,
            matched: b.matched,
            blocks: b.blocks,
            tail_tokens: b.tail_tokens,
            tail_blocks: b.tail_blocks,
            error_flag: b.error_flag,
            block_stride: b.block_stride,
            requests: b.requests,
            max_blocks: b.max_blocks,
            leave: b.leave,
            block_tokens: self.block_tokens,
            groups: self.groups,
            node_room: self.room[0],
            branch_room: self.room[1],
            space_room: self.room[2],
            slot_room: self.room[3],
            reserved: 0,
        };
        let grid = [b.requests.div_ceil(LOOKUP.threads / 32), 1, 1];
        Ok(Some((Launch { kernel: &LOOKUP, grid, shared_bytes: 0 }, params)))
    }
}

/// Appends words that go to `to`, and the runs that say so.
fn push(
    upload: &mut LookupUpload,
    to: u64,
    append: &mut dyn FnMut(&mut Vec<u32>) -> Result<()>,
) -> Result<()> {
    let overflow = Error::Overflow { what: "upload of the prefix index" };
    let from = upload.words.len();
    append(&mut upload.words)?;
    let end = u32::try_from(upload.words.len()).map_err(|_| overflow)?;
    let runs = (upload.words.len() - from).div_ceil(RUN_WORDS as usize);
    let bytes = (runs * size_of::<LookupPatch>()) as u64;
    upload.patches.try_reserve(runs).map_err(|_| Error::OutOfMemory { bytes })?;
    let mut at = from as u32;
    while at < end {
        let words = RUN_WORDS.min(end - at);
        let to = (to + u64::from(at) - from as u64) as i64;
        upload.patches.push(LookupPatch { to, from: at, words });
        at += words;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{BlockId, Namespace};

    fn filled() -> PrefixIndex {
        let mut index = PrefixIndex::new(4, 2, 100).unwrap();
        let tokens: Vec<u32> = (0..40).collect();
        let ids: Vec<BlockId> = (0..20).map(BlockId).collect();
        index.insert(Namespace(7), &tokens, &ids, &mut Vec::new()).unwrap();
        index
    }

    #[test]
    fn the_first_upload_is_everything_and_the_next_what_changed() {
        let mut index = filled();
        let image = LookupImage::new(&index).unwrap();
        let mut upload = LookupUpload::default();
        let state = image.sync(&mut index, &mut upload);
        assert!(matches!(state, Err(Error::InvalidState { .. })), "{state:?}");
        index.start_mirror().unwrap();
        image.sync(&mut index, &mut upload).unwrap();
        // A head, two nodes, two empty or small tables, ten slots.
        let parts = Part::ALL.iter().map(|&p| index.records(p) * index.record_words(p));
        assert_eq!(upload.words.len(), 16 + parts.sum::<usize>());
        image.sync(&mut index, &mut upload).unwrap();
        assert_eq!((upload.patches.len(), upload.words.len()), (1, 16));
        // Its last two blocks go: the edge is shorter, and nothing else is written.
        index.evict(2, &mut |_| true, &mut |_| ());
        image.sync(&mut index, &mut upload).unwrap();
        assert_eq!((upload.patches.len(), upload.words.len()), (2, 16 + 8));
        index.mark_all();
        image.sync(&mut index, &mut upload).unwrap();
        assert!(upload.words.len() > 100);
    }

    #[test]
    fn a_wrong_index_or_batch_is_refused() {
        let image = LookupImage::new(&filled()).unwrap();
        let mut other = PrefixIndex::new(8, 2, 100).unwrap();
        other.start_mirror().unwrap();
        assert!(image.sync(&mut other, &mut LookupUpload::default()).is_err());
        let good = LookupBatch {
            requests: 3,
            tokens: In::at(4),
            indptr: In::at(4),
            namespaces: In::NULL,
            leave: 0,
            max_blocks: 10,
            matched: Out::at(4),
            blocks: Out::at(4),
            block_stride: 20,
            tail_tokens: Out::NULL,
            tail_blocks: Out::NULL,
            error_flag: Out::NULL,
        };
        let (launch, params) = image.lookup_launch(256, &good).unwrap().unwrap();
        assert_eq!((launch.grid, params.slot_room), ([2, 1, 1], 100));
        assert!(image.lookup_launch(256, &LookupBatch { requests: 0, ..good }).unwrap().is_none());
        for bad in [
            LookupBatch { block_stride: 19, ..good },
            LookupBatch { max_blocks: u32::MAX, block_stride: i64::MAX, ..good },
            LookupBatch { matched: Out::NULL, ..good },
            LookupBatch { tokens: In::NULL, ..good },
        ] {
            assert!(image.lookup_launch(256, &bad).is_err(), "{bad:?}");
        }
        assert!(image.lookup_launch(64, &good).is_err());
    }
}
