//! Which neighbouring sequences of a batch begin with the same blocks.
//!
//! Found by the ids of their tables, whole blocks before every query alone, in time linear in the
//! entries that are equal. Runs of neighbours, each as wide as its prefix is shared, nest: all of a
//! batch have the system prompt, some of them a longer prefix. Those that a caller's gain makes worth
//! most together, none within another, are chosen in time linear in the sequences. Buffers are kept
//! from batch to batch.

use alloc::vec::Vec;

use super::cascade_model::SharedPrefix;
use crate::error::{Error, Result};

/// Numbers of 32 bits in memory order, not aligned: as tables are uploaded.
#[derive(Debug, Clone, Copy)]
pub struct Words<'a>(pub &'a [[u8; 4]]);

impl Words<'_> {
    /// The number at this place.
    pub fn get(&self, at: usize) -> i32 {
        i32::from_ne_bytes(self.0[at])
    }
}

/// A ragged batch in host memory. Offsets rise from 0 and lie within what they point into.
#[derive(Debug, Clone, Copy)]
pub struct HostBatch<'a> {
    /// `[seqs + 1]` offsets of query tokens.
    pub q_indptr: Words<'a>,
    /// `[seqs]` cached tokens, those of the queries included.
    pub kv_lens: Words<'a>,
    /// `[seqs + 1]` offsets into `indices`.
    pub indptr: Words<'a>,
    /// Block ids.
    pub indices: Words<'a>,
    /// Tokens of a block.
    pub block_tokens: u32,
}

impl HostBatch<'_> {
    /// Sequences.
    pub fn seqs(&self) -> usize {
        self.kv_lens.0.len()
    }

    /// Cached tokens of all sequences together.
    pub fn tokens(&self) -> u64 {
        (0..self.seqs()).map(|seq| self.kv_lens.get(seq).max(0) as u64).sum()
    }

    /// The blocks of a sequence that lie whole before its first query.
    fn before_queries(&self, seq: usize) -> &[[u8; 4]] {
        let table = self.indptr.get(seq) as usize..self.indptr.get(seq + 1) as usize;
        let rows = i64::from(self.q_indptr.get(seq + 1)) - i64::from(self.q_indptr.get(seq));
        let tokens = (i64::from(self.kv_lens.get(seq)) - rows).max(0) as usize;
        let blocks = table.len().min(tokens / self.block_tokens as usize);
        &self.indices.0[table][..blocks]
    }
}

/// A run of neighbours that is not yet at its end.
#[derive(Debug, Clone, Copy)]
struct Run {
    first_seq: u32,
    blocks: u32,
    /// What the chosen ones within it are worth, and the first of them.
    within: f64,
    chosen_from: usize,
}

/// What the sequences of a batch share.
#[derive(Debug, Default)]
pub struct SharedPrefixes {
    /// Blocks that each sequence has in common with the next.
    common: Vec<u32>,
    open: Vec<Run>,
    chosen: Vec<SharedPrefix>,
}

impl SharedPrefixes {
    /// Looks at a batch; whether any two neighbours share a block.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn find(&mut self, batch: &HostBatch) -> Result<bool> {
        let seqs = batch.seqs();
        self.common.clear();
        self.open.clear();
        let refused = Error::OutOfMemory { bytes: seqs as u64 * 40 };
        // None of these grows past the number of sequences later.
        self.common.try_reserve(seqs).map_err(|_| refused)?;
        self.open.try_reserve(seqs).map_err(|_| refused)?;
        self.chosen.clear();
        self.chosen.try_reserve(seqs).map_err(|_| refused)?;
        for seq in 1..seqs {
            let (one, next) = (batch.before_queries(seq - 1), batch.before_queries(seq));
            self.common.push(equal_entries(one, next) as u32);
        }
        Ok(self.common.iter().any(|&blocks| blocks != 0))
    }

    /// The runs, in order and apart, whose gains add up to most among those that are as wide as their
    /// blocks are shared; only those with a gain above 0.
    pub fn choose(&mut self, gain: impl Fn(&SharedPrefix) -> f64) -> &[SharedPrefix] {
        self.chosen.clear();
        self.open.clear();
        let last = self.common.len();
        for seq in 0..=last {
            let blocks = if seq < last { self.common[seq] } else { 0 };
            let (first, from) = (seq as u32, self.chosen.len());
            let mut run = Run { first_seq: first, blocks, within: 0.0, chosen_from: from };
            while let Some(top) = self.open.pop_if(|top| top.blocks > blocks) {
                let seqs = first - top.first_seq + 1;
                let whole = SharedPrefix { first_seq: top.first_seq, seqs, blocks: top.blocks };
                let (worth, mut best) = (gain(&whole), top.within);
                if worth > 0.0 && worth >= best {
                    self.chosen.truncate(top.chosen_from);
                    self.chosen.push(whole);
                    best = worth;
                }
                match self.open.last_mut() {
                    // Within the run below it, which goes on.
                    Some(below) if below.blocks >= blocks => below.within += best,
                    // Within the one that begins with the same sequence, and has fewer blocks.
                    _ => {
                        run = Run {
                            first_seq: top.first_seq,
                            within: best,
                            chosen_from: top.chosen_from,
                            ..run
                        };
                    }
                }
            }
            let goes_on = self.open.last().is_some_and(|top| top.blocks == blocks);
            if blocks != 0 && !goes_on {
                self.open.push(run);
            }
        }
        &self.chosen
    }

    /// What was chosen last.
    pub fn chosen(&self) -> &[SharedPrefix] {
        &self.chosen
    }
}

/// How many leading entries are equal.
fn equal_entries(a: &[[u8; 4]], b: &[[u8; 4]]) -> usize {
    // Compared many at a time as far as they are equal.
    const MANY: usize = 64;
    let pieces = a.chunks_exact(MANY).zip(b.chunks_exact(MANY));
    let at = MANY * pieces.take_while(|(a, b)| a.as_flattened() == b.as_flattened()).count();
    at + a[at..].iter().zip(&b[at..]).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    struct Draw(u64);

    impl Draw {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 33) % n
        }
    }

    /// A batch in the form that is uploaded.
    #[derive(Default)]
    struct Lists([Vec<[u8; 4]>; 4]);

    impl Lists {
        fn new(sequences: &[(Vec<i32>, i32, i32)]) -> Self {
            let mut lists = Lists::default();
            let mut ends = [0i32; 2];
            lists.0[0].push([0; 4]);
            lists.0[2].push([0; 4]);
            for (table, tokens, rows) in sequences {
                ends = [ends[0] + rows, ends[1] + table.len() as i32];
                lists.0[0].push(ends[0].to_ne_bytes());
                lists.0[1].push(tokens.to_ne_bytes());
                lists.0[2].push(ends[1].to_ne_bytes());
                lists.0[3].extend(table.iter().map(|id| id.to_ne_bytes()));
            }
            lists
        }

        fn batch(&self, block_tokens: u32) -> HostBatch<'_> {
            let [q_indptr, kv_lens, indptr, indices] = &self.0;
            HostBatch {
                q_indptr: Words(q_indptr),
                kv_lens: Words(kv_lens),
                indptr: Words(indptr),
                indices: Words(indices),
                block_tokens,
            }
        }
    }

    fn common(sequences: &[(Vec<i32>, i32, i32)]) -> Vec<u32> {
        let mut shared = SharedPrefixes::default();
        let lists = Lists::new(sequences);
        let any = shared.find(&lists.batch(16)).unwrap();
        assert_eq!(any, shared.common.iter().any(|&blocks| blocks > 0));
        shared.common
    }

    #[test]
    fn only_whole_blocks_before_every_query_count() {
        let table = |n: i32| (0..n).collect::<Vec<_>>();
        // Four blocks each, of the same ids; the last is the query's own in one of them.
        assert_eq!(common(&[(table(4), 64, 1), (table(4), 64, 1)]), [3]);
        assert_eq!(common(&[(table(5), 65, 1), (table(5), 80, 1)]), [4]);
        assert_eq!(common(&[(table(5), 65, 2), (table(5), 80, 1)]), [3]);
        assert_eq!(common(&[(table(5), 80, 80), (table(5), 80, 1)]), [0]);
        // Tables that are shorter than the lengths say, and lengths below their rows.
        assert_eq!(common(&[(table(2), 800, 1), (table(50), 800, 1)]), [2]);
        assert_eq!(common(&[(table(2), 1, 7), (table(2), -9, 1)]), [0]);
        let long = (0..300).collect::<Vec<_>>();
        for differs in [0, 1, 63, 64, 65, 127, 128, 200, 299] {
            let mut other = long.clone();
            other[differs] = -1;
            let found = common(&[(long.clone(), 4801, 1), (other, 4801, 1)]);
            assert_eq!(found, [differs as u32]);
        }
        assert_eq!(common(&[(long, 4801, 1)]), []);
    }

    /// The most that the runs of some gaps can be worth, each as wide as its blocks are shared: all of
    /// them as one, or what is left where the fewest blocks are shared.
    fn most(common: &[u32], first: usize, gain: &impl Fn(&SharedPrefix) -> f64) -> f64 {
        let Some(&fewest) = common.iter().min() else { return 0.0 };
        let (mut apart, mut from) = (0.0, 0);
        for part in common.split(|&blocks| blocks == fewest) {
            apart += most(part, first + from, gain);
            from += part.len() + 1;
        }
        let seqs = common.len() as u32 + 1;
        let run = SharedPrefix { first_seq: first as u32, seqs, blocks: fewest };
        if fewest == 0 { apart } else { f64::max(apart, gain(&run)) }
    }

    #[test]
    fn the_chosen_runs_are_worth_most_and_true() {
        let mut draw = Draw(1);
        let mut chosen_in_all = 0;
        for _ in 0..2000 {
            let highest = 1 + draw.below(8);
            let common: Vec<u32> =
                (0..draw.below(12)).map(|_| draw.below(highest + 1) as u32).collect();
            let fixed = [0.0, 3.0, 9.0][draw.below(3) as usize];
            // Blocks that are not read again, for a price.
            let gain = |run: &SharedPrefix| f64::from(run.seqs - 1) * f64::from(run.blocks) - fixed;
            let mut shared = SharedPrefixes { common: common.clone(), ..Default::default() };
            let chosen = shared.choose(gain).to_vec();
            let mut end = 0;
            for run in &chosen {
                assert!(run.first_seq >= end && run.seqs > 1 && gain(run) > 0.0, "{common:?}");
                let gaps = run.first_seq as usize..(run.first_seq + run.seqs - 1) as usize;
                assert_eq!(common[gaps].iter().min(), Some(&run.blocks), "{common:?}");
                end = run.first_seq + run.seqs;
            }
            assert!(end as usize <= common.len() + 1);
            let worth: f64 = chosen.iter().map(gain).sum();
            assert_eq!(worth, most(&common, 0, &gain), "{common:?}: {chosen:?}");
            chosen_in_all += chosen.len();
        }
        assert!(chosen_in_all > 2000, "{chosen_in_all}");
    }

    #[test]
    fn nothing_shared_chooses_nothing() {
        let mut shared = SharedPrefixes::default();
        assert!(shared.choose(|_| 1.0).is_empty());
        let mut shared = SharedPrefixes { common: vec![0, 3, 0], ..Default::default() };
        assert_eq!(shared.choose(|_| 1.0), [SharedPrefix { first_seq: 1, seqs: 2, blocks: 3 }]);
        assert!(shared.choose(|_| 0.0).is_empty() && shared.chosen().is_empty());
        assert!(shared.choose(|_| f64::NAN).is_empty());
    }
}
