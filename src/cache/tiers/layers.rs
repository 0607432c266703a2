//! Onboarding layer by layer: a sequence that is started before all of its blocks are on the device.
//!
//! The sequence holds its blocks from the start, and the tokens of those that tiers have count as
//! cached. What the blocks hold comes part by part, in the model's order (`tier/parts.rs`), while the
//! engine computes; before a layer's attention it asks whether that layer of all blocks is there. Bytes
//! are copied when they are asked for, on a device one part ahead, on a stream of its own that the
//! cache's stream waits for.
//!
//! - Nothing unverified reaches a block: parts have checksums of their own (`tier/object.rs` says
//!   why). A layer that is not there is never attended: `attend` refuses it.
//! - Nobody else sees such blocks: the index gets them when all layers are there. A step in which a
//!   sequence waits for a layer cannot be committed.
//! - The first thing that goes wrong ends the load, and the error names the first layer that is not
//!   there. The engine cancels its step and calls [`KvCache::cancel_load`]: the sequence is what it was
//!   on the device, and the rest is computed. Until then it cannot be in a step: tokens would land where
//!   the engine does not expect them.
//! - A load takes buffers for all of its blocks when it begins, and is for fewer blocks where there are
//!   not so many. What comes by parts passes the host by: its copies are on the device and below.
//!
//! Of a store that has to be asked (a remote one) only blocks that it was seen to have are loaded so,
//! and each is there as a whole or not at all: an engine prefetches there first.

use alloc::vec::Vec;
use core::time::Duration;
use std::time::Instant;

use super::load::{LayerLoad, LayerWait, LoadState, Source, Stage};
use super::onboard::put_layers;
use crate::cache::{KvCache, LayerId, Media, Started, Step};
use crate::error::{Error, Result};
use crate::ids::{Namespace, SeqId, TokenId};
use crate::tier::buffer::Buffer;
use crate::tier::object::HEAD_BYTES;
use crate::tier::{Missed, Piece};

impl KvCache {
    /// [`start_with_media`](Self::start_with_media) for an engine that begins before all blocks are on
    /// the device: what tiers have of the prompt, as far as loading is worth it, is counted in
    /// `cached_tokens`, and comes layer by layer. Before a layer is attended it must be there
    /// ([`poll_layer`](Self::poll_layer), [`poll_step_layer`](Self::poll_step_layer)), and all before the
    /// step is committed; till then the sequence can be neither forked nor truncated. Waits for nothing.
    ///
    /// # Errors
    /// As for [`start_with_media`](Self::start_with_media); `InvalidState` without tiers.
    pub fn start_onboarding(
        &mut self,
        prompt: &[TokenId],
        media: &[Media],
        namespace: Namespace,
    ) -> Result<Started> {
        if self.tiers.is_none() {
            return Err(Error::InvalidState { why: "the cache has no tiers" });
        }
        self.start_how(prompt, media, namespace, true)
    }

    /// Whether a layer of all blocks of a sequence is there, for whatever is enqueued on the cache's
    /// stream from here on; it is, for a sequence that loads nothing. Copies it where it has arrived,
    /// in the caller's thread, and waits for nothing.
    ///
    /// # Errors
    /// `LayerMissing` where it never will be there, `StaleHandle`, `InvalidArgument` for a layer that
    /// is not in the spec, `DeviceFailed`.
    pub fn poll_layer(&mut self, seq: SeqId, layer: LayerId) -> Result<bool> {
        let part = self.part_of(layer)?;
        let Some(mut load) = self.sequences.get_mut(seq)?.load.take() else { return Ok(true) };
        let mut result = self.bring(seq, &mut load, part);
        match result {
            Ok(_) | Err(Error::LayerMissing { .. }) => {}
            // Nothing more can be had of it.
            Err(error) => {
                let device = matches!(error, Error::DeviceFailed { .. });
                load.failed = Some(if device { Missed::Down } else { Missed::Bad });
                load.end();
                if !device {
                    result = self.check_failed(&load).map(|()| false);
                }
            }
        }
        let done = load.stages.iter().all(|stage| *stage == Stage::There);
        if !done {
            self.sequences.get_mut(seq)?.load = Some(load);
            return result;
        }
        self.loading -= 1;
        let block_tokens = self.spec.block_tokens as usize;
        self.totals.hit_tokens += (load.blocks * block_tokens) as u64;
        if let Some(tiers) = &mut self.tiers {
            // Where all came from the host; on a device, its copies tell.
            let time = Some(load.from_host.1).filter(|time| !time.is_zero());
            tiers.host_loaded(load.from_host.0, time);
        }
        // Merging blocks would change the tables of an open step: its commit publishes them.
        if !self.sequences.get(seq)?.in_step {
            self.publish_or_wait(seq)?;
        }
        result
    }

    /// The same for all sequences of a step: whether the layer of all of them is there.
    ///
    /// # Errors
    /// As for [`poll_layer`](Self::poll_layer), of the first sequence that has one; `InvalidState` for
    /// a step that is not this cache's open one.
    pub fn poll_step_layer(&mut self, step: &Step, layer: LayerId) -> Result<bool> {
        self.check_step(step, layer)?;
        let mut there = true;
        if self.loading > 0 {
            for &seq in &step.seqs {
                there &= self.poll_layer(seq, layer)?;
            }
        }
        Ok(there)
    }

    /// What a layer of a sequence waits for: nothing where it is there.
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidArgument` for a layer that is not in the spec.
    pub fn layer_wait(&self, seq: SeqId, layer: LayerId) -> Result<LayerWait> {
        let mut wait = LayerWait::default();
        self.wait_for(seq, self.part_of(layer)?, &mut wait)?;
        Ok(wait)
    }

    /// The same for all sequences of a step.
    ///
    /// # Errors
    /// As for [`layer_wait`](Self::layer_wait); `InvalidState` for a step that is not this cache's open
    /// one.
    pub fn step_layer_wait(&self, step: &Step, layer: LayerId) -> Result<LayerWait> {
        self.check_step(step, layer)?;
        let (mut wait, part) = (LayerWait::default(), self.part_of(layer)?);
        if self.loading > 0 {
            step.seqs.iter().try_for_each(|&seq| self.wait_for(seq, part, &mut wait))?;
        }
        Ok(wait)
    }

    fn wait_for(&self, seq: SeqId, part: usize, wait: &mut LayerWait) -> Result<()> {
        let Some(load) = &self.sequences.get(seq)?.load else { return Ok(()) };
        if load.stages[part] != Stage::Absent {
            return Ok(());
        }
        for (_, source) in &load.sources {
            match source {
                Source::Host(_) => {}
                Source::Parts(arrivals) => wait.parts.push((arrivals.clone(), part)),
                Source::Whole(ticket) => wait.tickets.push(ticket.clone()),
            }
        }
        Ok(())
    }

    /// [`poll_layer`](Self::poll_layer) after waiting for the layer, at most for `limit`.
    ///
    /// # Errors
    /// As for [`poll_layer`](Self::poll_layer).
    pub fn wait_layer(&mut self, seq: SeqId, layer: LayerId, limit: Duration) -> Result<bool> {
        self.layer_wait(seq, layer)?.wait(limit);
        self.poll_layer(seq, layer)
    }

    /// How the load of a sequence stands; `None` where nothing is loaded, or all is there.
    ///
    /// # Errors
    /// `StaleHandle`.
    pub fn load_state(&self, seq: SeqId) -> Result<Option<LoadState>> {
        let (Some(load), Some(tiers)) = (&self.sequences.get(seq)?.load, &self.tiers) else {
            return Ok(None);
        };
        let parts = tiers.config.parts();
        let (before, after) = load.tokens(self.spec.block_tokens as usize);
        let there = |n: &usize| load.stages[*n] == Stage::There;
        let ready = (0..parts.len()).filter(there).map(|n| parts.get(n).layers).sum();
        Ok(Some(LoadState {
            device_tokens: before,
            loading_tokens: after - before,
            ready_layers: ready,
            first_missing: self.first_missing(load),
            failed: load.failed,
        }))
    }

    /// Gives up what has not come: the sequence holds the tokens that it held before the load, or all
    /// of them where it is complete; how many. What a load that failed needs before the next step.
    ///
    /// # Errors
    /// `StaleHandle`, `InvalidState` while a step holds the sequence.
    pub fn cancel_load(&mut self, seq: SeqId) -> Result<usize> {
        let sequence = self.sequences.get_idle(seq)?;
        let Some(mut load) = sequence.load.take() else { return Ok(sequence.tokens.len()) };
        self.leave_load(&mut load)?;
        self.cut_raw(seq, load.before)?;
        let sequence = self.sequences.get_mut(seq)?;
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            table.truncate(pool, load.before, self.spec.block_tokens as usize)?;
        }
        sequence.tokens.truncate(load.before);
        self.scrub()?;
        Ok(load.before)
    }

    /// Ends a load; its blocks may be given to others afterwards.
    pub(in crate::cache) fn leave_load(&mut self, load: &mut LayerLoad) -> Result<()> {
        self.loading -= 1;
        load.end();
        if load.enqueued { self.join_side() } else { Ok(()) }
    }

    /// Refuses a layer that is not there in all sequences of a step.
    pub(in crate::cache) fn check_loaded(&self, step: &Step, layer: LayerId) -> Result<()> {
        if self.loading == 0 {
            return Ok(());
        }
        let part = self.part_of(layer)?;
        for &seq in &step.seqs {
            if let Some(load) = &self.sequences.get(seq)?.load {
                self.check_failed(load)?;
                if load.stages[part] != Stage::There {
                    return Err(Error::InvalidState {
                        why: "the layer of a sequence is still being loaded",
                    });
                }
            }
        }
        Ok(())
    }

    /// Refuses a step of which a sequence is being loaded.
    pub(in crate::cache) fn check_all_loaded(&self, step: &Step) -> Result<()> {
        if self.loading == 0 {
            return Ok(());
        }
        for &seq in &step.seqs {
            if let Some(load) = &self.sequences.get(seq)?.load {
                self.check_failed(load)?;
                return Err(Error::InvalidState { why: "a sequence is still being loaded" });
            }
        }
        Ok(())
    }

    /// Refuses a load that failed, by the first layer that is not there.
    pub(in crate::cache) fn check_failed(&self, load: &LayerLoad) -> Result<()> {
        let Some(why) = load.failed else { return Ok(()) };
        let LayerId { group, layer } = self.first_missing(load);
        Err(Error::LayerMissing { group, layer, why: why.text() })
    }

    fn first_missing(&self, load: &LayerLoad) -> LayerId {
        let missing = self.tiers.as_ref().and_then(|tiers| {
            let parts = tiers.config.parts();
            let part = parts.get(parts.order().find(|&n| load.stages[n] != Stage::There)?);
            Some(LayerId { group: part.group, layer: part.first_layer })
        });
        missing.unwrap_or(LayerId::uniform(0))
    }

    fn part_of(&self, layer: LayerId) -> Result<usize> {
        let known = self.spec.groups.get(layer.group as usize);
        if known.is_none_or(|group| layer.layer >= group.layers) {
            return Err(Error::invalid("layer", "is not in the spec"));
        }
        let parts = self.tiers.as_ref().map(|tiers| tiers.config.parts());
        Ok(parts.map_or(0, |parts| parts.of(layer.group, layer.layer)))
    }

    /// Brings a part as far as it can come.
    fn bring(&mut self, seq: SeqId, load: &mut LayerLoad, part: usize) -> Result<bool> {
        self.check_failed(load)?;
        if load.stages[part] == Stage::There {
            return Ok(true);
        }
        match self.enqueue(seq, load, part) {
            Ok(true) => {}
            Ok(false) => {
                self.check_failed(load)?;
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        if self.backend.is_some() {
            self.join_side()?;
            load.stages[part] = Stage::There;
            // The copies of the next part run beside the kernels of this one.
            let next = self.tiers.as_ref().and_then(|tiers| {
                tiers.config.parts().order().find(|&n| load.stages[n] == Stage::Absent)
            });
            if let Some(next) = next {
                self.enqueue(seq, load, next)?;
            }
        }
        load.stages[part] = Stage::There;
        Ok(true)
    }

    /// Copies a part to the blocks, where all of it has arrived; whether it has. Notes a failure.
    fn enqueue(&mut self, seq: SeqId, load: &mut LayerLoad, n: usize) -> Result<bool> {
        if load.stages[n] != Stage::Absent {
            return Ok(true);
        }
        if !self.has_arrived(load, n) {
            return Ok(false);
        }
        let Some(tiers) = &self.tiers else { return Ok(false) };
        let part = tiers.config.parts().get(n).clone();
        let (group, payload) = (part.group as usize, part.payload());
        let mut taken: Vec<(usize, Vec<Piece>)> = Vec::new();
        for (first, source) in &load.sources {
            match source {
                Source::Host(_) => {}
                Source::Parts(arrivals) => {
                    let pieces = arrivals.take(n).unwrap_or_default();
                    if pieces.len() != arrivals.blocks() {
                        load.failed = arrivals.failed().or(Some(Missed::Down));
                        return Ok(false);
                    }
                    taken.push((*first, pieces));
                }
                Source::Whole(_) => return Ok(false),
            }
        }
        // Where each object has the part: its block in the sequence and its number of that, a buffer, and
        // where in it.
        let (spread, first) =
            (tiers.config.spread(), load.before / tiers.config.block_tokens() as usize);
        let objects = spread.span(first, load.blocks);
        let mut from: Vec<((usize, usize), &Buffer, usize)> = Vec::new();
        let mut add = |n: usize, buffer, at| {
            if n < objects {
                from.push((spread.place(first, n), buffer, at));
            }
        };
        for (begin, source) in &load.sources {
            if let Source::Host(blocks) = source {
                let at = HEAD_BYTES + payload.start;
                (*begin..).zip(blocks).for_each(|(n, block)| add(n, &block.buffer, at));
            }
        }
        // Parts that came alone say nothing of how fast the host is.
        let timed = taken.is_empty();
        for (begin, pieces) in &taken {
            for piece in pieces {
                let (slab, at) = piece.place();
                add(begin + piece.block, slab, at);
            }
        }
        let layers = part.first_layer..part.first_layer + part.layers;
        if self.backend.is_some() {
            if !load.enqueued {
                load.enqueued = true;
                self.fork_side()?;
            }
            self.lift_part(seq, (group, layers), &from, timed)?;
        } else {
            let (sequence, store) = (self.sequences.get(seq)?, &mut self.stores[group]);
            let bytes = part.layers as usize * store.layout().layer_bytes() as usize;
            let begin = Instant::now();
            for (place, buffer, at) in from {
                let to = (sequence, group, layers.clone());
                put_layers(store, to, spread, place, &buffer[at..at + bytes])?;
            }
            if timed {
                load.from_host.1 += begin.elapsed();
            }
        }
        load.stages[n] = Stage::Enqueued;
        Ok(true)
    }

    /// Whether all sources have a part. Where one never will, the load has failed.
    fn has_arrived(&mut self, load: &mut LayerLoad, part: usize) -> bool {
        let mut arrived = true;
        let mut failed = None;
        for (_, source) in &mut load.sources {
            match source {
                Source::Host(_) => {}
                Source::Parts(arrivals) => match arrivals.wait(part, Duration::ZERO) {
                    Ok(there) => arrived &= there,
                    Err(why) => failed = failed.or(Some(why)),
                },
                Source::Whole(ticket) if ticket.is_done() => {
                    let (blocks, missed) = ticket.take();
                    if let Some(tiers) = &mut self.tiers {
                        // Whatever becomes of this load, the host has them.
                        blocks.iter().for_each(|block| tiers.keep(block.clone()));
                    }
                    failed = failed.or(missed);
                    *source = Source::Host(blocks);
                }
                Source::Whole(_) => arrived = false,
            }
        }
        if failed.is_some() {
            load.failed = failed;
            load.end();
        }
        arrived && failed.is_none()
    }
}
