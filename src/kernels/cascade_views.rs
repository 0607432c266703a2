//! The halves of a cascade made by a host that has the batch's tables and lengths: what the split
//! kernel makes on the device, and chunks of the shared prefixes besides.
//!
//! Tables are not copied: both halves index into the batch's own. With chunks, the sequences of the
//! shared half are every segment in the first chunk, then every segment in the second, and so on;
//! chunk `c` has rows of its own, `c` times the batch's rows further on, so that it is one part of the
//! merge.

use alloc::vec::Vec;

use super::cascade::CascadePlan;
use super::params::CascadeSegment;
use super::shared_prefix::HostBatch;
use crate::error::{Error, Result};

/// One array of the views, in the bytes of all.
struct Array<'a>(&'a mut [[u8; 4]]);

impl Array<'_> {
    fn put(&mut self, at: usize, value: i64) {
        // Offsets of the batch's arrays, which are 31 bits wide, and rows, which the plan checked.
        self.0[at] = (value as i32).to_ne_bytes();
    }
}

impl CascadePlan {
    /// Chunks of a shared prefix.
    pub(super) fn chunks(&self) -> u32 {
        self.bounds.chunks
    }

    /// Both halves of a batch, as bytes for the beginning of the workspace. The segments cover the
    /// sequences in order, and their members begin with the same blocks, whole ones before every
    /// query.
    ///
    /// # Errors
    /// `InvalidArgument` where batch or segments are not as many as the plan was made for, segments do
    /// not cover the batch or are longer than a member; `OutOfMemory`.
    pub fn views(
        &self,
        batch: &HostBatch,
        segments: &[CascadeSegment],
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let b = &self.bounds;
        let (seqs, chunks) = (batch.seqs(), b.chunks as usize);
        let rows = i64::from(batch.q_indptr.get(seqs));
        if seqs != b.batch as usize
            || segments.len() != b.segments as usize
            || rows != i64::from(b.rows)
            || batch.block_tokens != b.block_tokens
        {
            return Err(Error::invalid("batch, segments", "must be what the plan was made for"));
        }
        let offsets = self.view_offsets().map(|at| at as usize);
        let all = offsets[5];
        bytes.clear();
        bytes.try_reserve(all).map_err(|_| Error::OutOfMemory { bytes: all as u64 })?;
        bytes.resize(all, 0);
        let mut rest = bytes.as_chunks_mut::<4>().0;
        let mut arrays = [0, 1, 2, 3, 4].map(|n| {
            let words = (offsets[n + 1] - offsets[n]) / 4;
            let (array, after) = core::mem::take(&mut rest).split_at_mut(words);
            rest = after;
            Array(array)
        });
        let [own_lens, own_indptr, shared_lens, shared_indptr, shared_rows] = &mut arrays;
        let begin = |seq: usize| i64::from(batch.indptr.get(seq));

        let mut next = 0;
        for segment in segments {
            let (first, blocks) = (segment.first_seq as usize, i64::from(segment.shared_blocks));
            let members = first..first + segment.seqs as usize;
            if first != next || members.end > seqs {
                return Err(Error::invalid("segments", "must cover the sequences in order"));
            }
            next = members.end;
            for seq in members {
                let tokens = i64::from(batch.kv_lens.get(seq).max(0));
                let own = tokens - blocks * i64::from(b.block_tokens);
                if own < 0 || begin(seq) + blocks > begin(seq + 1) {
                    return Err(Error::invalid("segments", "must not be longer than a member"));
                }
                own_lens.put(seq, own);
                own_indptr.put(seq, begin(seq) + blocks);
            }
        }
        if next != seqs {
            return Err(Error::invalid("segments", "must cover the sequences in order"));
        }
        own_indptr.put(seqs, begin(seqs));

        let mut at = 0;
        for chunk in 0..chunks as i64 {
            for segment in segments {
                let (first, blocks) =
                    (segment.first_seq as usize, i64::from(segment.shared_blocks));
                let each = i64::from(segment.shared_blocks.div_ceil(b.chunks));
                let from = (chunk * each).min(blocks);
                let count = each.min(blocks - from);
                shared_lens.put(at, count * i64::from(b.block_tokens));
                shared_indptr.put(at, begin(first) + from);
                shared_rows.put(at, chunk * rows + i64::from(batch.q_indptr.get(first)));
                at += 1;
            }
            if chunks > 1 {
                // An empty sequence, whose table ends the one before it.
                shared_indptr.put(at, begin(seqs));
                shared_rows.put(at, (chunk + 1) * rows);
                at += 1;
            }
        }
        shared_indptr.put(at, begin(seqs));
        shared_rows.put(at, chunks as i64 * rows);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::super::cascade::CascadeBounds;
    use super::super::shared_prefix::Words;
    use super::*;

    const BLOCK: u32 = 16;

    /// Segments of sequences with their rows and own blocks, behind a few shared blocks.
    type Tree = [(u32, &'static [(i32, u32)])];

    struct Batch {
        lists: [Vec<[u8; 4]>; 4],
        segments: Vec<CascadeSegment>,
        rows: u32,
    }

    impl Batch {
        fn new(tree: &Tree) -> Self {
            let mut lists = [const { Vec::new() }; 4];
            lists[0].push([0; 4]);
            lists[2].push([0; 4]);
            let (mut segments, mut rows, mut next, mut seqs) = (Vec::new(), 0, 0i32, 0);
            for &(shared_blocks, members) in tree {
                let first_seq = seqs;
                let prefix = next..next + shared_blocks as i32;
                next = prefix.end;
                for &(count, own) in members {
                    let table = prefix.clone().chain(next..next + own as i32);
                    lists[3].extend(table.map(i32::to_ne_bytes));
                    next += own as i32;
                    rows += count;
                    // The last block has room for one token more.
                    let tokens = (shared_blocks + own) as i32 * BLOCK as i32 - i32::from(own > 0);
                    lists[0].push(rows.to_ne_bytes());
                    lists[1].push(tokens.to_ne_bytes());
                    lists[2].push((lists[3].len() as i32).to_ne_bytes());
                    seqs += 1;
                }
                let count = members.len() as u32;
                segments.push(CascadeSegment {
                    first_seq,
                    seqs: count,
                    shared_blocks,
                    reserved: 0,
                });
            }
            Batch { lists, segments, rows: rows as u32 }
        }

        fn host(&self) -> HostBatch<'_> {
            let [q_indptr, kv_lens, indptr, indices] = [0, 1, 2, 3].map(|n| Words(&self.lists[n]));
            HostBatch { q_indptr, kv_lens, indptr, indices, block_tokens: BLOCK }
        }

        fn plan(&self, chunks: u32) -> CascadePlan {
            CascadePlan::new(CascadeBounds {
                q_heads: 4,
                head_dim: 64,
                batch: self.host().seqs() as u32,
                rows: self.rows,
                segments: self.segments.len() as u32,
                block_tokens: BLOCK,
                chunks,
            })
            .unwrap()
        }
    }

    const TREE: &Tree = &[
        (0, &[(1, 3)]),
        (7, &[(1, 2), (4, 1), (1, 30)]),
        (1, &[(2, 1), (2, 1)]),
        (0, &[(3, 1), (0, 0), (1, 9)]),
        (20, &[(8, 1), (1, 5)]),
    ];

    /// The blocks that every row of a half sees, each list of tokens with whole blocks but for the last.
    fn seen(
        words: &[i32],
        batch: &Batch,
        at: [usize; 3],
        half: usize,
        rows: usize,
    ) -> Vec<Vec<i32>> {
        let [lens, indptr, first_rows] = at;
        let mut seen = vec![Vec::new(); rows];
        for seq in 0..half {
            let from = words[indptr + seq] as usize;
            let count = (words[lens + seq] as u32).div_ceil(BLOCK) as usize;
            if count > 0 {
                // Never less than the sequence has.
                assert!(from + count <= words[indptr + seq + 1] as usize);
            }
            for row in words[first_rows + seq]..words[first_rows + seq + 1] {
                assert!(seen[row as usize].is_empty());
                let blocks = batch.lists[3][from..from + count].iter();
                seen[row as usize].extend(blocks.map(|id| i32::from_ne_bytes(*id)));
            }
        }
        seen
    }

    #[test]
    fn every_row_sees_each_block_of_its_sequence_once() {
        let batch = Batch::new(TREE);
        let (host, rows) = (batch.host(), batch.rows as usize);
        let mut bytes = Vec::new();
        for chunks in [1, 2, 3, 8, 16, 64] {
            let plan = batch.plan(chunks);
            plan.views(&host, &batch.segments, &mut bytes).unwrap();
            let words: Vec<i32> =
                bytes.as_chunks::<4>().0.iter().map(|word| i32::from_ne_bytes(*word)).collect();
            let [own_lens, own_indptr, lens, indptr, first_rows, _] =
                plan.view_offsets().map(|at| at as usize / 4);
            let all = plan.shared(0).batch as usize;
            let shared =
                seen(&words, &batch, [lens, indptr, first_rows], all, chunks as usize * rows);
            for seq in 0..host.seqs() {
                let table = host.indptr.get(seq) as usize..host.indptr.get(seq + 1) as usize;
                let from = words[own_indptr + seq] as usize;
                let own = (words[own_lens + seq] as u32).div_ceil(BLOCK) as usize;
                let tokens = words[own_lens + seq] + (from - table.start) as i32 * BLOCK as i32;
                assert_eq!(tokens, host.kv_lens.get(seq));
                for row in host.q_indptr.get(seq) as usize..host.q_indptr.get(seq + 1) as usize {
                    let parts = (0..chunks as usize).flat_map(|c| shared[c * rows + row].clone());
                    let own = batch.lists[3][from..from + own].iter();
                    let got: Vec<i32> =
                        parts.chain(own.map(|id| i32::from_ne_bytes(*id))).collect();
                    let want = batch.lists[3][table.clone()].iter();
                    let want: Vec<i32> = want.map(|id| i32::from_ne_bytes(*id)).collect();
                    assert_eq!(got, want, "{chunks} chunks, sequence {seq}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let batch = Batch::new(TREE);
        let (plan, host) = (batch.plan(2), batch.host());
        let mut bytes = Vec::new();
        let mut views = |segments: &[CascadeSegment]| plan.views(&host, segments, &mut bytes);
        assert!(views(&batch.segments).is_ok());
        assert!(views(&batch.segments[1..]).is_err());
        for (at, change) in [(0usize, 2u32), (1, 100), (4, 1000)] {
            let mut segments = batch.segments.clone();
            segments[at].shared_blocks += 2 + change;
            assert!(views(&segments).is_err(), "longer than a member: {at}");
        }
        for at in 0..5 {
            for change in [-1i32, 1, 1 << 30] {
                let mut segments = batch.segments.clone();
                segments[at].seqs = segments[at].seqs.wrapping_add_signed(change);
                assert!(views(&segments).is_err(), "does not cover: {at}");
            }
        }
        let other = Batch::new(&TREE[1..]);
        assert!(plan.views(&other.host(), &batch.segments, &mut bytes).is_err());
    }
}
