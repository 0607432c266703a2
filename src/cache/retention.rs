//! What the engine says about what stays when sequences are gone: passed on to the prefix index, for
//! the blocks that a sequence has published there.

use super::KvCache;
use crate::error::{Error, Result};
use crate::ids::SeqId;
use crate::prefix::{Hint, Position, Retention};

impl KvCache {
    /// Sets the time of the prefix index; see
    /// [`PrefixIndex::advance`](crate::prefix::PrefixIndex::advance).
    ///
    /// # Errors
    /// `InvalidArgument` past its limit.
    pub fn advance(&mut self, now_ms: u64) -> Result<()> {
        self.prefix.as_mut().map_or(Ok(()), |prefix| prefix.advance(now_ms))
    }

    /// Gives priorities to the committed full blocks of a sequence; see
    /// [`PrefixIndex::prioritize`](crate::prefix::PrefixIndex::prioritize). A duration runs from the
    /// last step or [`Self::release`]: give it right before the latter. Without prefix reuse there is nothing to keep, and nothing happens.
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidState` while a step holds the sequence, `InvalidArgument` for a range
    /// that is none, `OutOfMemory`.
    pub fn prioritize(&mut self, seq: SeqId, ranges: &[Retention]) -> Result<()> {
        let at = self.published(seq)?;
        self.prefix.as_mut().map_or(Ok(()), |prefix| prefix.prioritize(at, ranges))
    }

    /// Says what is known of the next use of a sequence's committed full blocks, from `from_block`
    /// on; see [`PrefixIndex::hint`](crate::prefix::PrefixIndex::hint).
    ///
    /// # Errors
    /// As for [`Self::prioritize`], and `InvalidArgument` for a time too far ahead.
    pub fn hint(&mut self, seq: SeqId, from_block: usize, hint: Hint) -> Result<()> {
        let at = self.published(seq)?;
        self.prefix.as_mut().map_or(Ok(()), |prefix| prefix.hint(at, from_block, hint))
    }

    /// The end of what a sequence has in the prefix index. A position goes stale where blocks after
    /// it were evicted; the blocks of a live sequence never are, and so are found again, but for
    /// those that it does not use any more where every layer group has a window.
    fn published(&mut self, seq: SeqId) -> Result<Position> {
        let sequence = self.sequences.get_idle(seq)?;
        let Some(prefix) = self.prefix.as_ref() else { return Ok(Position::default()) };
        if !prefix.is_cached(sequence.published) {
            let whole = sequence.published.blocks() * self.spec.block_tokens as usize;
            let at = prefix.end_of(sequence.namespace, &sequence.tokens[..whole]);
            let all = self.spec.groups.iter().all(|group| group.window.is_some());
            if at.blocks() < sequence.published.blocks() && !all {
                return Err(Error::InvalidState { why: "a published block is not in the index" });
            }
            sequence.published = at;
        }
        Ok(sequence.published)
    }

    /// The use of what a sequence has published ends now: it is the most recently used.
    pub(super) fn end_use(&mut self, seq: SeqId) {
        let Ok(at) = self.published(seq) else { return };
        if let Some(prefix) = self.prefix.as_mut() {
            // Refused memory leaves the prefix as recent as it was.
            let _ = prefix.end_use(at);
        }
    }
}
