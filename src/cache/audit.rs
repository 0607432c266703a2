//! The books must balance: for tests.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use super::KvCache;
use crate::ids::BlockId;

impl KvCache {
    /// Checks that every block is exactly one of free, cached or referenced, that reference counts
    /// are those of the live sequences' tables, and that the prefix index and the pools agree.
    /// Linear in the size of the cache; meant for tests.
    ///
    /// # Errors
    /// What does not add up.
    #[doc(hidden)]
    pub fn audit(&self) -> Result<(), String> {
        let mut indexed =
            self.pools.iter().map(|pool| vec![false; pool.blocks() as usize]).collect::<Vec<_>>();
        if let Some(prefix) = &self.prefix {
            prefix.audit().map_err(|error| error.to_string())?;
            let mut twice = false;
            prefix.for_each_block(&mut |ids| {
                for (marks, id) in
                    indexed.iter_mut().zip(ids).filter(|(_, id)| **id != BlockId::NONE)
                {
                    twice |= core::mem::replace(&mut marks[id.index()], true);
                }
            });
            if twice {
                return Err("a block is in the prefix index twice".to_string());
            }
        }
        for (group, pool) in self.pools.iter().enumerate() {
            pool.audit().map_err(|error| error.to_string())?;
            let mut refs = vec![0u32; pool.blocks() as usize];
            for sequence in self.sequences.iter() {
                let table = &sequence.tables[group];
                if !sequence.in_step && table.tokens() != sequence.tokens.len() {
                    return Err(format!(
                        "a table has {} tokens, its sequence {}",
                        table.tokens(),
                        sequence.tokens.len()
                    ));
                }
                for id in table.blocks() {
                    refs[id.index()] += 1;
                }
            }
            for block in (0..pool.blocks()).map(BlockId) {
                let counted = refs[block.index()] + u32::from(pool.is_cached(block));
                let held = pool.refs(block);
                if counted != held {
                    return Err(format!(
                        "block {} has {held} references, {counted} holders",
                        block.0
                    ));
                }
                if indexed[group][block.index()] != pool.is_cached(block) {
                    return Err(format!("pool and index disagree on block {}", block.0));
                }
            }
        }
        Ok(())
    }
}
