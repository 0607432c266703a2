//! Steps: reserve blocks, write keys and values, read attention, commit or cancel.

use super::media::{check_tokens, keyed};
use super::sinks::{Held, share_sinks};
use super::step::GroupTables;
use super::store::Crew;
use super::{KvCache, LayerId, Step, Work, reserve};
use crate::attention::Scoring;
use crate::cpu::Rope;
use crate::dtype::{Rows, RowsMut};
use crate::error::{Error, Result};
use crate::ids::{BlockId, SeqId};
use crate::metrics::Evicted;
use crate::prefix::{Chain, Position};

impl KvCache {
    /// Opens a step: reserves blocks for the new tokens of every sequence, copying a shared last
    /// block before it is written. All or nothing, but for the blocks that sliding windows have left
    /// behind, which are given up first.
    ///
    /// # Errors
    /// `InvalidState` if the step is open already or a sequence is in another one;
    /// `InvalidArgument` for no work, no tokens, or a sequence named twice; `StaleHandle`;
    /// `OutOfBlocks` with the number missing; `OutOfMemory`.
    pub fn begin(&mut self, step: &mut Step, work: &[Work]) -> Result<()> {
        if step.is_open() {
            return Err(Error::InvalidState { why: "the step is open" });
        }
        self.check_work(work)?;
        self.note_step();
        self.outside.tick();
        self.outside.resync(self.prefix.as_ref(), &self.media);
        step.clear();
        let mut planned = self.check_staging(work);
        planned =
            planned.and_then(|()| work.iter().try_for_each(|item| self.leave_behind(item.seq)));
        planned = planned
            .and_then(|()| self.reserve_for(work))
            .and_then(|()| self.reserve_step(step, work));
        for item in work {
            planned = planned.and_then(|()| self.plan_sequence(step, item));
        }
        planned = planned.and_then(|()| self.plan_spares(step));
        planned = planned.and_then(|()| self.evict_ahead()).and_then(|()| self.upload_step(step));
        if let Err(error) = planned {
            step.clear();
            for item in work {
                self.abandon(item.seq)?;
            }
            return Err(error);
        }
        self.steps_begun += 1;
        for tables in &mut step.groups {
            tables.raw.serial = self.steps_begun;
        }
        step.owner = Some(self.id);
        Ok(())
    }

    fn check_work(&mut self, work: &[Work]) -> Result<()> {
        let mut rows = 0usize;
        let mut checked = 0;
        let mut result = if work.is_empty() {
            Err(Error::invalid("work", "must name at least one sequence"))
        } else {
            Ok(())
        };
        // Marking as it goes finds a sequence that is named twice.
        for item in work {
            result = result.and_then(|()| {
                let failed = self.sequences.get(item.seq)?.load.as_deref();
                failed.map_or(Ok(()), |load| self.check_failed(load))?;
                let sequence = self.sequences.get_idle(item.seq)?;
                rows = rows.saturating_add(item.tokens.len());
                let length = sequence.tokens.len().saturating_add(item.tokens.len());
                check_tokens(item.tokens)?;
                if item.tokens.is_empty() {
                    Err(Error::invalid("tokens", "must have at least one token a sequence"))
                } else if length.max(rows) > i32::MAX as usize {
                    Err(Error::Overflow { what: "tokens of a step or sequence" })
                } else {
                    sequence.in_step = true;
                    checked += 1;
                    Ok(())
                }
            });
        }
        if let Err(error) = result {
            for item in &work[..checked] {
                self.sequences.get_mut(item.seq)?.in_step = false;
            }
            return Err(error);
        }
        Ok(())
    }

    /// Takes a sequence out of a step: its tables are as long as its tokens again.
    fn abandon(&mut self, seq: SeqId) -> Result<()> {
        let sequence = self.sequences.get_mut(seq)?;
        sequence.in_step = false;
        let tokens = sequence.tokens.len();
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            table.truncate(pool, tokens, self.spec.block_tokens as usize)?;
        }
        self.cut_raw(seq, tokens)
    }

    /// Makes free blocks for the step.
    fn reserve_for(&mut self, work: &[Work]) -> Result<()> {
        let mut needed = [0u32; crate::layout::MAX_GROUPS];
        let mut counted = Ok(());
        for (group, needed) in needed.iter_mut().enumerate().take(self.pools.len()) {
            counted = counted.and_then(|()| {
                *needed = self.blocks_needed(group, work)?;
                Ok(())
            });
        }
        counted.and_then(|()| self.reserve(|group| needed[group]))
    }

    /// Makes room in the step's buffers, and in its sequences for what `commit` will add: from
    /// here on no allocation can fail.
    fn reserve_step(&mut self, step: &mut Step, work: &[Work]) -> Result<()> {
        let groups = self.pools.len();
        let rows = work.iter().map(|item| item.tokens.len()).sum();
        let mut blocks = 0;
        for item in work {
            let sequence = self.sequences.get_mut(item.seq)?;
            reserve(&mut sequence.tokens, item.tokens.len())?;
            let length = sequence.tokens.len() + item.tokens.len();
            blocks += length.div_ceil(self.spec.block_tokens as usize);
        }
        reserve(&mut step.groups, groups)?;
        step.groups.resize_with(groups, GroupTables::default);
        step.clear();
        reserve(&mut step.seqs, work.len())?;
        reserve(&mut step.tokens, rows)?;
        reserve(&mut step.positions, rows)?;
        reserve(&mut step.q_indptr, work.len() + 1)?;
        reserve(&mut step.kv_lens, work.len())?;
        for tables in &mut step.groups {
            reserve(&mut tables.indptr, work.len() + 1)?;
            reserve(&mut tables.indices, blocks)?;
            reserve(&mut tables.slots, rows)?;
            tables.indptr.push(0);
        }
        step.q_indptr.push(0);
        self.reserve_staging(step, work)
    }

    /// Blocks that the step takes in a group: growth, and copies of shared last blocks.
    fn blocks_needed(&mut self, group: usize, work: &[Work]) -> Result<u32> {
        let block_tokens = self.spec.block_tokens as usize;
        let pool = &self.pools[group];
        let mut needed = 0u64;
        self.tails.clear();
        reserve(&mut self.tails, work.len())?;
        for item in work {
            let table = &self.sequences.get(item.seq)?.tables[group];
            needed += table.blocks_needed(item.tokens.len(), block_tokens)? as u64;
            if table.tail_shared(pool, block_tokens) {
                self.tails.extend(table.blocks().last());
            }
        }
        // Where every holder of a last block is in this step, the last of them keeps it.
        self.tails.sort_unstable();
        for sharers in self.tails.chunk_by(|a, b| a == b) {
            let count = sharers.len() as u32;
            needed += u64::from(count - u32::from(count == pool.refs(sharers[0])));
        }
        u32::try_from(needed).map_err(|_| Error::Overflow { what: "blocks of a step" })
    }

    /// Extends one sequence's tables and writes its part of the batch.
    fn plan_sequence(&mut self, step: &mut Step, item: &Work) -> Result<()> {
        let block_tokens = self.spec.block_tokens as usize;
        let sequence = self.sequences.get_mut(item.seq)?;
        let (start, count) = (sequence.tokens.len(), item.tokens.len());
        for (group, tables) in step.groups.iter_mut().enumerate() {
            let (pool, table) = (&mut self.pools[group], &mut sequence.tables[group]);
            if let Some(copy) = table.make_tail_writable(pool, block_tokens)? {
                self.stores[group].copy_tokens(copy.src, copy.dst, copy.tokens as u32)?;
                copy.finish(pool)?;
                self.totals.copied_blocks += 1;
            }
            table.extend(pool, count, block_tokens)?;
            let blocks = table.blocks();
            tables.indices.extend(blocks.iter().map(|id| id.0 as i32));
            tables.indptr.push(tables.indices.len() as i32);
            tables.slots.extend((start..start + count).map(|position| {
                let block = blocks[position / block_tokens];
                i64::from(block.0) * block_tokens as i64 + (position % block_tokens) as i64
            }));
        }
        let index = step.seqs.len();
        for (group, tables) in step.groups.iter_mut().enumerate() {
            self.plan_raw(tables, group, index, item)?;
        }
        step.seqs.push(item.seq);
        step.tokens.extend_from_slice(item.tokens);
        step.positions.extend(start as u32..(start + count) as u32);
        step.q_indptr.push(step.tokens.len() as i32);
        step.kv_lens.push((start + count) as i32);
        Ok(())
    }

    /// Writes the keys and values of the step's tokens in one layer, converting to the stored
    /// format (round to nearest even). `k` is `[rows][kv_heads][k_dim]`, `v`
    /// `[rows][kv_heads][v_dim]`; where values lie in keys, `v` is empty. With `rope` the keys are
    /// rotated to their positions on the way. On a device the rows are copied there, and the call
    /// waits until they have been read.
    ///
    /// Of a format with sealed tiles, the tiles that the step fills are sealed here, and a layer
    /// must be attended before the next is appended, of this step or of another that is open. A tile
    /// with NaN, infinity or elements past the scales of f16 stays raw: it is read raw, counted in
    /// [`CacheStats`](super::CacheStats), and not published.
    ///
    /// # Errors
    /// `InvalidState` for a step that is not this cache's open one, `InvalidArgument` for a layer
    /// or a length that does not fit; `OutOfBlocks` where tiles stay raw and no staging block is
    /// free for them (the step can only be cancelled then); the device's own errors.
    /// `InvalidArgument` too where a row of a token-by-token format is not finite or out of its
    /// range: it is left out, and the step can only be cancelled or the row written again.
    pub fn append(
        &mut self,
        step: &Step,
        layer: LayerId,
        k: Rows,
        v: Rows,
        rope: Option<&Rope>,
    ) -> Result<()> {
        let group = self.check_step(step, layer)?;
        self.stores[group].append(step, layer, k, v, rope, &self.threads)?;
        self.rescue(step, group, layer)
    }

    /// Attention of the step's query rows over everything their sequences hold in one layer, the
    /// step's own tokens included. `q` is `[rows][q_heads][k_dim]`, `out` `[rows][q_heads][v_dim]`,
    /// `lse` (natural logarithm) `[rows][q_heads]`. A group's window applies where `scoring` has
    /// none of its own, which is no wider. On a device the rows are copied there and back, and the call waits for them.
    ///
    /// # Errors
    /// As for [`append`](Self::append).
    pub fn attend(
        &mut self,
        step: &Step,
        layer: LayerId,
        q: Rows,
        out: RowsMut,
        scoring: &Scoring,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let group = self.check_step(step, layer)?;
        self.check_loaded(step, layer)?;
        let scoring = self.scoring(group, scoring)?;
        let crew = Crew { threads: &self.threads, workspace: &mut self.workspace };
        self.stores[group].attend(step, layer, q, out, lse, &scoring, crew)
    }

    pub(super) fn check_step(&self, step: &Step, layer: LayerId) -> Result<usize> {
        if step.owner != Some(self.id) {
            return Err(Error::InvalidState { why: "the step is not open in this cache" });
        }
        let group = layer.group as usize;
        match self.stores.get(group) {
            Some(store) if layer.layer < store.layout().spec().layers => Ok(group),
            _ => Err(Error::invalid("layer", "is not in the spec")),
        }
    }

    /// Makes the step's tokens part of their sequences and publishes the blocks they filled.
    /// A block whose tokens the index already has is given back for the one it has. On a device, a step
    /// that filled sealed tiles is waited for, to learn which of them stay raw. Where memory for
    /// the index is refused, blocks are published with the next one that fills.
    ///
    /// # Errors
    /// `InvalidState` for a step that is not this cache's open one, and while a sequence of it is being
    /// loaded; `LayerMissing` where that failed, and `OutOfBlocks` where a device found no staging
    /// block for tiles that stay raw: the step can only be cancelled then. `DeviceFailed`.
    pub fn commit(&mut self, step: &mut Step) -> Result<()> {
        if step.owner == Some(self.id) {
            self.check_all_loaded(step)?;
            self.settle(step)?;
        }
        self.close(step)?;
        for (n, &seq) in step.seqs.iter().enumerate() {
            let rows = step.q_indptr[n] as usize..step.q_indptr[n + 1] as usize;
            let sequence = self.sequences.get_mut(seq)?;
            sequence.in_step = false;
            sequence.tokens.extend_from_slice(&step.tokens[rows]);
            self.commit_raw(step, n)?;
            self.publish_or_wait(seq)?;
        }
        step.clear();
        self.scrub()
    }

    /// Closes the step without its tokens: the sequences are as before `begin`, and the blocks that
    /// it took are free again.
    ///
    /// # Errors
    /// `InvalidState` for a step that is not this cache's open one.
    pub fn cancel(&mut self, step: &mut Step) -> Result<()> {
        self.close(step)?;
        for &seq in &step.seqs {
            self.abandon(seq)?;
        }
        step.clear();
        self.scrub()
    }

    fn close(&mut self, step: &mut Step) -> Result<()> {
        if step.owner != Some(self.id) {
            return Err(Error::InvalidState { why: "the step is not open in this cache" });
        }
        step.owner = None;
        Ok(())
    }

    /// [`publish`](Self::publish); where memory is refused, tried again when the sequence fills its next
    /// block.
    pub(super) fn publish_or_wait(&mut self, seq: SeqId) -> Result<()> {
        match self.publish(seq) {
            Err(Error::OutOfMemory { .. }) => Ok(()),
            result => result,
        }
    }

    /// Puts the full blocks of a sequence into the prefix index; none while it is being loaded.
    pub(super) fn publish(&mut self, seq: SeqId) -> Result<()> {
        if self.sequences.get(seq)?.load.is_some() {
            return Ok(());
        }
        let Some(prefix) = self.prefix.as_mut() else { return Ok(()) };
        let block_tokens = self.spec.block_tokens as usize;
        let sealed = self.sequences.get(seq)?.sealed_blocks();
        let sequence = self.sequences.get_mut(seq)?;
        let whole = (sequence.tokens.len() / block_tokens).min(sealed);
        let fresh = whole.saturating_sub(sequence.published.blocks());
        if fresh == 0 {
            return Ok(());
        }
        // Entries can outlast their blocks where every group has a window.
        let lacking = fresh.saturating_sub(prefix.free_blocks());
        if lacking > 0 {
            self.evict(lacking as u32, Evicted::Capacity)?;
        }
        let Some(prefix) = self.prefix.as_mut() else { return Ok(()) };
        let sequence = self.sequences.get_mut(seq)?;
        let groups = self.pools.len();
        self.ids.clear();
        reserve(&mut self.ids, whole * groups)?;
        for block in 0..whole {
            self.ids.extend(sequence.tables.iter().map(|table| table.blocks()[block]));
        }
        let mut above = sequence.published;
        let tokens = keyed(&sequence.tokens[..whole * block_tokens], &sequence.media)?;
        let inserted = loop {
            let from = above.blocks();
            let tokens = &tokens[from * block_tokens..whole * block_tokens];
            let ids = &self.ids[from * groups..];
            let space = sequence.namespace;
            match prefix.insert_below(space, above, tokens, ids, &mut self.canonical) {
                // What hung below was evicted: a walk from the root finds the place again.
                Err(Error::StaleHandle { .. }) if from > 0 => above = Position::default(),
                result => break result?,
            }
        };
        let (present, stored) = (inserted.present, inserted.stored);
        let first = above.blocks() + present;
        // Up to here the index has taken ids for entries that lacked them.
        let mut refilled = 0;
        for block in above.blocks()..inserted.at.blocks() {
            for (group, table) in sequence.tables.iter_mut().enumerate() {
                let (pool, own) = (&mut self.pools[group], table.blocks()[block]);
                let place = (block - above.blocks()) * groups + group;
                if own == BlockId::NONE {
                    continue;
                }
                let known = if block < first { self.canonical[place] } else { own };
                let news = known == own && !pool.is_cached(own);
                if news {
                    pool.cache(own)?;
                    refilled = if block < first { block + 1 } else { refilled };
                } else if known != own && known != BlockId::NONE {
                    table.replace(pool, block, known)?;
                    self.totals.merged_blocks += 1;
                }
                if block < first && !news {
                    self.ids[block * groups + group] = BlockId::NONE;
                }
            }
        }
        sequence.published = inserted.at;
        let held = (&mut self.staging[..], &mut self.sinks[..], &self.stores[..]);
        share_sinks(held, &sequence.tables, &mut sequence.raw, inserted.at.blocks())?;
        let held = Held { stores: &self.stores, sinks: &self.sinks };
        let chain = |above, blocks: core::ops::Range<usize>, ids| Chain {
            space: sequence.namespace,
            above,
            tokens: &tokens[blocks.start * block_tokens..blocks.end * block_tokens],
            blocks: ids,
        };
        if refilled > 0 {
            self.ids[..above.blocks() * groups].fill(BlockId::NONE);
            let ids = &self.ids[..refilled * groups];
            let chain = chain(&[], 0..refilled, ids);
            self.outside.stored(&chain, &[], &self.media);
            if let Some(tiers) = &mut self.tiers {
                tiers.stored(&chain, &[], (&self.outside, &self.media), held);
            }
        }
        if stored > 0 {
            // The last of those that were there already.
            let before = match (present, first) {
                (0, 0) => &[],
                (0, _) => &self.ids[(first - 1) * groups..first * groups],
                _ => &self.canonical[(present - 1) * groups..],
            };
            let ids = &self.ids[first * groups..(first + stored) * groups];
            let tokens = &tokens[..first * block_tokens];
            let chain = chain(before, first..first + stored, ids);
            self.outside.stored(&chain, tokens, &self.media);
            if let Some(tiers) = &mut self.tiers {
                tiers.stored(&chain, tokens, (&self.outside, &self.media), held);
            }
        }
        Ok(())
    }
}
