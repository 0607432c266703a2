//! Sequences begin, split and end: start from the prefix index, fork, truncate, release.

use super::sequence::Sequence;
use super::{KvCache, Started};
use crate::error::{Error, Result};
use crate::ids::{BlockId, Namespace, SeqId, TokenId};
use crate::pool::BlockTable;

impl KvCache {
    /// Starts a sequence for `prompt`, holding whatever leading part of it the prefix index has in
    /// `namespace`: whole blocks shared, and of the block where it diverges the matching tokens
    /// copied. At least the last prompt token is left to compute, since its logits are needed.
    ///
    /// The prompt itself is not kept: the engine feeds `prompt[cached_tokens..]` to its steps.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty prompt, `OutOfSequences`.
    pub fn start(&mut self, prompt: &[TokenId], namespace: Namespace) -> Result<Started> {
        if prompt.is_empty() {
            return Err(Error::invalid("prompt", "must have at least one token"));
        }
        if prompt.len() > i32::MAX as usize {
            return Err(Error::invalid("prompt", "must be shorter than 2^31 tokens"));
        }
        self.sequences.has_room()?;
        let groups = self.pools.len();
        let mut tables: Vec<BlockTable> = (0..groups).map(|_| BlockTable::new()).collect();
        let mut cached = 0;
        if let Some(prefix) = self.prefix.as_mut() {
            let mut hit = core::mem::take(&mut self.hit);
            prefix.lookup(namespace, prompt, prompt.len() - 1, &mut hit);
            prefix.touch(hit.at)?;
            let adopted = self.adopt(&mut tables, &hit);
            self.hit = hit;
            cached = adopted?;
        }
        self.totals.looked_up_tokens += prompt.len() as u64;
        self.totals.hit_tokens += cached as u64;
        let sequence = Sequence {
            namespace,
            tokens: prompt[..cached].to_vec(),
            published_blocks: cached / self.spec.block_tokens as usize,
            tables,
            in_step: false,
        };
        let seq = self.sequences.insert(sequence)?;
        Ok(Started { seq, cached_tokens: cached as u32 })
    }

    /// Shares the hit's whole blocks and copies its partial tail; the tokens that are then held.
    fn adopt(&mut self, tables: &mut [BlockTable], hit: &crate::prefix::Hit) -> Result<usize> {
        let (groups, block_tokens) = (self.pools.len(), self.spec.block_tokens as usize);
        for (group, table) in tables.iter_mut().enumerate() {
            let blocks = hit.blocks.iter().skip(group).step_by(groups).copied();
            table.adopt(&mut self.pools[group], blocks, block_tokens)?;
        }
        if hit.tail_tokens == 0 {
            return Ok(hit.tokens);
        }
        // Referenced, so that making room for the copy cannot evict what is to be copied.
        for (pool, &source) in self.pools.iter_mut().zip(&hit.tail_blocks) {
            pool.retain(source)?;
        }
        let room = self.reserve(|_| 1);
        if room.is_ok() {
            for (group, table) in tables.iter_mut().enumerate() {
                table.extend(&mut self.pools[group], hit.tail_tokens, block_tokens)?;
                let target = *table.blocks().last().unwrap_or(&BlockId::NONE);
                let source = hit.tail_blocks[group];
                self.stores[group].copy_tokens(source, target, hit.tail_tokens as u32)?;
                self.totals.copied_blocks += 1;
            }
        }
        for (pool, &source) in self.pools.iter_mut().zip(&hit.tail_blocks) {
            pool.release(source)?;
        }
        // No room for a copy is no error: those tokens are computed instead.
        Ok(hit.tokens + if room.is_ok() { hit.tail_tokens } else { 0 })
    }

    /// A second sequence with the same tokens, sharing every block. Whichever of the two next
    /// writes to the last, partly full block gets a copy of it.
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidState` while a step holds the sequence, `OutOfSequences`.
    pub fn fork(&mut self, seq: SeqId) -> Result<SeqId> {
        self.sequences.has_room()?;
        let parent = self.sequences.get_idle(seq)?;
        let mut child = Sequence {
            namespace: parent.namespace,
            tokens: parent.tokens.clone(),
            published_blocks: parent.published_blocks,
            ..Sequence::default()
        };
        for (table, pool) in parent.tables.iter().zip(&mut self.pools) {
            child.tables.push(table.fork(pool)?);
        }
        self.sequences.insert(child)
    }

    /// Forgets all tokens of a sequence from position `tokens` on (rejected speculation).
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidState` while a step holds the sequence, `InvalidArgument` past its
    /// length.
    pub fn truncate(&mut self, seq: SeqId, tokens: u32) -> Result<()> {
        let sequence = self.sequences.get_idle(seq)?;
        if tokens as usize > sequence.tokens.len() {
            return Err(Error::invalid("tokens", "must be at most the sequence's length"));
        }
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            table.truncate(pool, tokens as usize, self.spec.block_tokens as usize)?;
        }
        sequence.tokens.truncate(tokens as usize);
        let whole = (tokens / self.spec.block_tokens) as usize;
        sequence.published_blocks = sequence.published_blocks.min(whole);
        Ok(())
    }

    /// Ends a sequence. Its published blocks stay in the prefix index until they are evicted.
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidState` while a step holds the sequence.
    pub fn release(&mut self, seq: SeqId) -> Result<()> {
        self.sequences.get_idle(seq)?;
        let mut sequence = self.sequences.remove(seq)?;
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            table.release_all(pool)?;
        }
        Ok(())
    }

    /// The tokens of a sequence whose K and V are in the cache.
    ///
    /// # Errors
    /// `StaleHandle`.
    pub fn tokens(&self, seq: SeqId) -> Result<&[TokenId]> {
        Ok(&self.sequences.get(seq)?.tokens)
    }

    /// The blocks of a sequence in one layer group, in order.
    ///
    /// # Errors
    /// `StaleHandle`; `InvalidArgument` for a group that the spec does not have.
    pub fn blocks(&self, seq: SeqId, group: u32) -> Result<&[BlockId]> {
        let tables = &self.sequences.get(seq)?.tables;
        let table =
            tables.get(group as usize).ok_or(Error::invalid("group", "is not in the spec"))?;
        Ok(table.blocks())
    }

    /// Drops everything from the prefix index that no sequence uses.
    ///
    /// # Errors
    /// None in practice: a failure is a bug in the library.
    pub fn clear_prefix(&mut self) -> Result<()> {
        let most = self.pools.iter().map(|pool| pool.cached_blocks()).max().unwrap_or(0);
        self.evict(most)
    }
}
