//! Layer groups with a sliding window: what a sequence needs of them, and what it leaves behind.
//!
//! A sequence gives up the blocks that its window has passed when its next step begins, so that it
//! can be truncated to any length it had since the step before. Others may use them then; the
//! prefix index keeps them until room is needed in their group, and loses those first that were left
//! first. The entry stays for the other groups, and is whole again once somebody has computed the
//! block anew.

use super::KvCache;
use crate::attention::Scoring;
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::metrics::Evicted;
use crate::prefix::first_visible_block;

impl KvCache {
    /// The window of a group whose blocks are left behind, in tokens; groups of sealed tiles keep
    /// theirs.
    pub(super) fn window(&self, group: usize) -> Option<u32> {
        self.spec.groups[group].window.filter(|_| self.staging[group].is_none())
    }

    /// The first block that the next token after `tokens` needs of a group.
    pub(super) fn first_needed(&self, group: usize, tokens: usize) -> usize {
        let block_tokens = self.spec.block_tokens as usize;
        self.window(group).map_or(0, |window| first_visible_block(tokens, window, block_tokens))
    }

    /// The scoring of a group's layers: with its window, where there is none.
    ///
    /// # Errors
    /// `InvalidArgument` for a wider window than the group's: what it would see may be gone.
    pub(super) fn scoring<'a>(&self, group: usize, scoring: &Scoring<'a>) -> Result<Scoring<'a>> {
        let window = match (scoring.window, self.spec.groups[group].window) {
            (Some(asked), Some(held)) if asked > held => {
                return Err(Error::invalid("window", "must be at most that of the layer group"));
            }
            (asked, held) => asked.or(held),
        };
        Ok(Scoring { window, ..*scoring })
    }

    /// Gives up what the windows of a sequence have left behind; nothing while it is being loaded,
    /// since copies may be on their way there.
    pub(super) fn leave_behind(&mut self, seq: SeqId) -> Result<()> {
        if self.sequences.get(seq)?.load.is_some() {
            return Ok(());
        }
        for group in 0..self.pools.len() {
            if self.window(group).is_none() {
                continue;
            }
            let first = self.first_needed(group, self.sequences.get(seq)?.tokens.len());
            let table = &mut self.sequences.get_mut(seq)?.tables[group];
            table.leave(&mut self.pools[group], first)?;
        }
        Ok(())
    }

    /// Refuses a length whose window was left behind.
    pub(super) fn check_window(&self, seq: SeqId, tokens: usize) -> Result<()> {
        let tables = &self.sequences.get(seq)?.tables;
        for (group, table) in tables.iter().enumerate() {
            if self.first_needed(group, tokens) < table.left_blocks() {
                return Err(Error::InvalidState { why: "a window has left that length behind" });
            }
        }
        Ok(())
    }

    /// Frees blocks of a group with a window until `needed` are free: those that only the index
    /// has, the one left first first.
    pub(super) fn reserve_windowed(&mut self, group: usize, needed: u32) -> Result<()> {
        while self.pools[group].free_blocks() < needed {
            let Some(block) = self.pools[group].oldest_cached() else { return Ok(()) };
            self.forget(group, block, Evicted::Window)?;
        }
        Ok(())
    }

    fn forget(&mut self, group: usize, block: BlockId, why: Evicted) -> Result<()> {
        let known = self.prefix.as_mut().is_some_and(|prefix| prefix.forget(group, block));
        if !known {
            return Err(Error::InvalidState { why: "a cached block is not in the index" });
        }
        self.pools[group].uncache(block)?;
        self.outside.forgotten(group, block, why);
        self.join_down()
    }

    /// Everything that only the index has of groups with windows.
    pub(super) fn forget_windows(&mut self) -> Result<()> {
        for group in 0..self.pools.len() {
            while let Some(block) = self.pools[group].oldest_cached() {
                self.forget(group, block, Evicted::Cleared)?;
            }
        }
        Ok(())
    }
}
