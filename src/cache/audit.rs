//! Proof, by visiting everything, that pools, tables and index agree: for tests and debugging.

use alloc::vec::Vec;

use super::media::keyed;
use super::{KvCache, reserve};
use crate::error::{Error, Result};
use crate::ids::{BlockId, TokenId};

fn must(holds: bool, why: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::InvalidState { why }) }
}

/// What is known of a block.
#[derive(Clone, Copy, Default)]
struct Seen<'a> {
    /// Tables that have it.
    tables: u32,
    /// Its tokens, where the index has it.
    indexed: Option<&'a [TokenId]>,
}

impl KvCache {
    /// Checks that every block is exactly one of free, cached and referenced, that reference counts
    /// are those of the live sequences' tables, that prefix index and pools agree, and that the
    /// index has the tokens of the sequences that use its blocks. Takes time and memory in
    /// proportion to the cache; meant for tests and debugging.
    ///
    /// # Errors
    /// `InvalidState` says what does not hold, `OutOfMemory` where the check could not be made.
    pub fn audit(&self) -> Result<()> {
        let (groups, block_tokens) = (self.pools.len(), self.spec.block_tokens as usize);
        let mut seen: Vec<Vec<Seen>> = Vec::new();
        reserve(&mut seen, groups)?;
        for pool in &self.pools {
            pool.audit()?;
            let mut blocks = Vec::new();
            reserve(&mut blocks, pool.blocks() as usize)?;
            blocks.resize(pool.blocks() as usize, Seen::default());
            seen.push(blocks);
        }
        if let Some(prefix) = &self.prefix {
            prefix.audit()?;
            let mut once = true;
            prefix.for_each_chain(&mut |chain| {
                let entries = chain.blocks.chunks_exact(groups);
                for (ids, tokens) in entries.zip(chain.tokens.chunks_exact(block_tokens)) {
                    for (blocks, id) in seen.iter_mut().zip(ids).filter(|p| *p.1 != BlockId::NONE) {
                        let place = blocks.get_mut(id.index());
                        once &= place.is_some_and(|seen| seen.indexed.replace(tokens).is_none());
                    }
                }
            });
            must(once, "cache: a block is in the prefix index twice, or is none of the pool's")?;
        }
        self.audit_staging()?;
        let loads = || self.sequences.iter().filter_map(|sequence| sequence.load.as_ref());
        must(loads().count() == self.loading as usize, "cache: loads are miscounted")?;
        for sequence in self.sequences.iter() {
            let Some(load) = &sequence.load else { continue };
            let (before, after) = load.tokens(block_tokens);
            must(sequence.tokens.len() == after, "cache: a load is not of its sequence's tokens")?;
            let published = sequence.published.blocks() * block_tokens;
            must(published <= before, "cache: what is being loaded is in the index")?;
        }
        for (group, pool) in self.pools.iter().enumerate() {
            let seen = &mut seen[group];
            for sequence in self.sequences.iter() {
                let table = &sequence.tables[group];
                let same = table.tokens() == sequence.tokens.len();
                must(same || sequence.in_step, "cache: a table is not as long as its sequence")?;
                let held = &table.blocks()[table.left_blocks()..];
                must(!held.contains(&BlockId::NONE), "cache: a table lacks a block")?;
                for id in held {
                    let known = seen.get_mut(id.index());
                    must(known.is_some(), "cache: a table has a block that is none")?;
                    known.into_iter().for_each(|seen| seen.tables += 1);
                }
                let published = table.blocks().iter().take(sequence.published.blocks());
                let tokens = keyed(&sequence.tokens, &sequence.media)?;
                let mut tokens = tokens.chunks_exact(block_tokens);
                for id in published {
                    let tokens = tokens.next();
                    let same = *id == BlockId::NONE || seen[id.index()].indexed == tokens;
                    must(same, "cache: the index has other tokens than a sequence that uses them")?;
                }
            }
            for (seen, block) in seen.iter().zip((0..pool.blocks()).map(BlockId)) {
                let cached = pool.is_cached(block);
                must(seen.indexed.is_some() == cached, "cache: pool and index disagree")?;
                let holders = seen.tables + u32::from(cached);
                must(holders == pool.refs(block), "cache: a reference count is wrong")?;
            }
        }
        Ok(())
    }

    /// Every slot of a staging pool has the holders it counts, and every open tile has a slot.
    fn audit_staging(&self) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        for (group, pool) in self.staging.iter().enumerate() {
            let Some(pool) = pool else {
                let none = self.sequences.iter().all(|sequence| sequence.raw[group].is_empty());
                must(none, "cache: raw rows of a format without tiles")?;
                continue;
            };
            pool.audit()?;
            let mut holders = Vec::new();
            reserve(&mut holders, pool.blocks() as usize)?;
            holders.resize(pool.blocks() as usize, 0u32);
            for sequence in self.sequences.iter() {
                let raw = &sequence.raw[group];
                let ordered = raw.windows(2).all(|pair| pair[0].tile < pair[1].tile);
                must(ordered, "cache: raw tiles are out of order")?;
                let open = sequence.tokens.len() / block_tokens;
                let known = sequence.tokens.len().is_multiple_of(block_tokens)
                    || sequence.raw_slot(group, open).is_some();
                must(known, "cache: an open tile has no raw rows")?;
                for staged in raw {
                    let holders = holders.get_mut(staged.slot.index());
                    must(holders.is_some(), "cache: a raw slot is none of the pool's")?;
                    holders.into_iter().for_each(|count| *count += 1);
                }
            }
            for rescued in self.rescued.iter().filter(|rescued| rescued.group == group) {
                holders[rescued.slot.index()] += 1;
            }
            for spare in self.spares.iter().filter(|spare| spare.group == group) {
                holders[spare.slot.index()] += 1;
            }
            for (&count, slot) in holders.iter().zip((0..pool.blocks()).map(BlockId)) {
                must(count == pool.refs(slot), "cache: a raw slot's reference count is wrong")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CacheOptions, Step, Work};
    use super::*;
    use crate::dtype::KvFormat;
    use crate::ids::Namespace;
    use crate::layout::{CacheSpec, GroupSpec};

    /// A cache with a sequence of three published blocks and a tail.
    fn cache() -> KvCache {
        let group = GroupSpec::uniform(1, 1, 8, KvFormat::F16);
        let spec = CacheSpec { block_tokens: 16, groups: alloc::vec![group.clone(), group] };
        let options = CacheOptions { blocks: 8, max_seqs: 2, threads: 1, ..Default::default() };
        let mut cache = KvCache::new(&spec, &options).unwrap();
        let seq = cache.start(&[1], Namespace(0)).unwrap().seq;
        let mut step = Step::new();
        cache.begin(&mut step, &[Work { seq, tokens: &[5; 50] }]).unwrap();
        cache.commit(&mut step).unwrap();
        cache.audit().unwrap();
        cache
    }

    #[test]
    fn the_audit_notices_damage() {
        let id = |cache: &KvCache| cache.sequences.iter().next().unwrap().tables[1].blocks()[1];
        let damage: [fn(&mut KvCache, BlockId); 5] = [
            |cache, id| cache.pools[1].retain(id).unwrap(),
            |cache, id| assert!(!cache.pools[1].uncache(id).unwrap()),
            |cache, _| cache.pools[0].allocate().map(drop).unwrap(),
            |cache, _| {
                assert_eq!(cache.prefix.as_mut().unwrap().clear(Namespace(0), &mut |_| {}), 3);
            },
            |cache, _| {
                let seq = cache.sequences.iter_mut().next().unwrap();
                seq.tokens[20] = 6;
            },
        ];
        for harm in damage {
            let mut cache = cache();
            let block = id(&cache);
            harm(&mut cache, block);
            assert!(matches!(cache.audit(), Err(Error::InvalidState { .. })));
        }
    }
}
