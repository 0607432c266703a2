//! Steps: reserve blocks, write keys and values, read attention, commit or cancel.

use super::{KvCache, LayerId, Step, Work};
use crate::attention::Scoring;
use crate::cpu::{AttendBatch, Rope};
use crate::dtype::{Rows, RowsMut};
use crate::error::{Error, Result};

impl KvCache {
    /// Opens a step: reserves blocks for the new tokens of every sequence, copying a shared last
    /// block before it is written. All or nothing.
    ///
    /// # Errors
    /// `InvalidState` if the step is open already or a sequence is in another one;
    /// `InvalidArgument` for no work, no tokens, or a sequence named twice; `StaleHandle`;
    /// `OutOfBlocks` with the number missing.
    pub fn begin(&mut self, step: &mut Step, work: &[Work]) -> Result<()> {
        if step.is_open() {
            return Err(Error::InvalidState { why: "the step is open" });
        }
        self.check_work(work)?;
        self.reserve_for(work)?;
        step.clear(self.pools.len());
        for item in work {
            self.plan_sequence(step, item)?;
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
                let sequence = self.sequences.get_idle(item.seq)?;
                rows = rows.saturating_add(item.tokens.len());
                let length = sequence.tokens.len().saturating_add(item.tokens.len());
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
        if result.is_err() {
            self.unmark(&work[..checked]);
        }
        result
    }

    fn unmark(&mut self, work: &[Work]) {
        for item in work {
            if let Ok(sequence) = self.sequences.get_mut(item.seq) {
                sequence.in_step = false;
            }
        }
    }

    /// Makes room for the step, or leaves the sequences as they were.
    fn reserve_for(&mut self, work: &[Work]) -> Result<()> {
        let mut needed = [0u32; crate::layout::MAX_GROUPS];
        let mut counted = Ok(());
        for (group, needed) in needed.iter_mut().enumerate().take(self.pools.len()) {
            counted = counted.and_then(|()| {
                *needed = self.blocks_needed(group, work)?;
                Ok(())
            });
        }
        let reserved = counted.and_then(|()| self.reserve(|group| needed[group]));
        if reserved.is_err() {
            self.unmark(work);
        }
        reserved
    }

    /// Blocks that the step takes in a group: growth, and copies of shared last blocks.
    fn blocks_needed(&mut self, group: usize, work: &[Work]) -> Result<u32> {
        let block_tokens = self.spec.block_tokens as usize;
        let pool = &self.pools[group];
        let mut needed = 0u64;
        self.tails.clear();
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

    /// Extends one sequence's tables and writes its part of the batch. Blocks were reserved, so
    /// only a bug can make this fail.
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
    /// rotated to their positions on the way.
    ///
    /// # Errors
    /// `InvalidState` for a step that is not this cache's open one, `InvalidArgument` for a layer
    /// or a length that does not fit.
    pub fn append(
        &mut self,
        step: &Step,
        layer: LayerId,
        k: Rows,
        v: Rows,
        rope: Option<&Rope>,
    ) -> Result<()> {
        let group = self.check_step(step, layer)?;
        let rope = rope.map(|rope| (rope, step.positions.as_slice()));
        let slots = &step.groups[group].slots;
        self.stores[group].append(layer.layer, slots, k, v, rope, &self.threads)
    }

    /// Attention of the step's query rows over everything their sequences hold in one layer, the
    /// step's own tokens included. `q` is `[rows][q_heads][k_dim]`, `out` `[rows][q_heads][v_dim]`,
    /// `lse` (natural logarithm) `[rows][q_heads]`. A group's window applies where `scoring` has
    /// none of its own.
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
        let window = scoring.window.or(self.stores[group].layout().spec().window);
        let tables = &step.groups[group];
        let batch = AttendBatch {
            q_indptr: &step.q_indptr,
            kv_lens: &step.kv_lens,
            indptr: &tables.indptr,
            indices: &tables.indices,
        };
        let scoring = Scoring { window, ..*scoring };
        let store = &self.stores[group];
        store.attend(layer.layer, &batch, q, out, lse, &scoring, &mut self.workspace, &self.threads)
    }

    fn check_step(&self, step: &Step, layer: LayerId) -> Result<usize> {
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
    /// A block whose tokens the index already has is given back for the one it has.
    ///
    /// # Errors
    /// `InvalidState` for a step that is not this cache's open one.
    pub fn commit(&mut self, step: &mut Step) -> Result<()> {
        self.close(step)?;
        for (n, &seq) in step.seqs.iter().enumerate() {
            let rows = step.q_indptr[n] as usize..step.q_indptr[n + 1] as usize;
            let sequence = self.sequences.get_mut(seq)?;
            sequence.in_step = false;
            sequence.tokens.extend_from_slice(&step.tokens[rows]);
            self.publish(seq)?;
        }
        step.clear(0);
        Ok(())
    }

    /// Closes the step without its tokens: the sequences are as before `begin`, and the blocks that
    /// it took are free again.
    ///
    /// # Errors
    /// `InvalidState` for a step that is not this cache's open one.
    pub fn cancel(&mut self, step: &mut Step) -> Result<()> {
        self.close(step)?;
        for &seq in &step.seqs {
            let sequence = self.sequences.get_mut(seq)?;
            sequence.in_step = false;
            let tokens = sequence.tokens.len();
            for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
                table.truncate(pool, tokens, self.spec.block_tokens as usize)?;
            }
        }
        step.clear(0);
        Ok(())
    }

    fn close(&mut self, step: &mut Step) -> Result<()> {
        if step.owner != Some(self.id) {
            return Err(Error::InvalidState { why: "the step is not open in this cache" });
        }
        step.owner = None;
        Ok(())
    }

    /// Puts the full blocks of a sequence into the prefix index.
    fn publish(&mut self, seq: crate::ids::SeqId) -> Result<()> {
        let Some(prefix) = self.prefix.as_mut() else { return Ok(()) };
        let sequence = self.sequences.get_mut(seq)?;
        let block_tokens = self.spec.block_tokens as usize;
        let whole = sequence.tokens.len() / block_tokens;
        if whole <= sequence.published_blocks {
            return Ok(());
        }
        self.ids.clear();
        for block in 0..whole {
            self.ids.extend(sequence.tables.iter().map(|table| table.blocks()[block]));
        }
        let tokens = &sequence.tokens[..whole * block_tokens];
        let inserted = prefix.insert(sequence.namespace, tokens, &self.ids, &mut self.canonical)?;
        let groups = self.pools.len();
        for block in sequence.published_blocks..inserted.present + inserted.stored {
            for (group, table) in sequence.tables.iter_mut().enumerate() {
                let pool = &mut self.pools[group];
                let own = table.blocks()[block];
                if block >= inserted.present {
                    pool.cache(own)?;
                } else if self.canonical[block * groups + group] != own {
                    table.replace(pool, block, self.canonical[block * groups + group])?;
                    self.totals.merged_blocks += 1;
                }
            }
        }
        sequence.published_blocks = whole;
        Ok(())
    }
}
