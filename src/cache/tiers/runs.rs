//! Where the blocks of a load come from: what tiers have of a prompt, in runs of objects in the same
//! place, and the loads that are begun for them. Knows nothing of layers.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::Tiers;
use super::load::{LayerLoad, Source};
use super::onboard::last_entry;
use crate::cache::KvCache;
use crate::cache::sequence::Sequence;
use crate::ids::{Namespace, TokenId};
use crate::prefix::Hit;
use crate::tier::object::Label;
use crate::tier::{CopyState, Found, HostBlock, Rate, Want};

/// Where a run of objects is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Host memory.
    Host,
    /// The lower tier of this number, which gives parts.
    Parts(usize),
    /// The lower tier of this number, which gives whole objects.
    Whole(usize),
}

/// An object that is wanted.
enum Wanted {
    /// In memory.
    Held(Arc<HostBlock>),
    /// Below.
    Below(Box<Label>),
}

/// Objects that follow each other, by where they are.
type Runs = Vec<(Place, Vec<Wanted>)>;

impl Tiers {
    /// Where an object is, if that is known: a load that is begun is not to end for want of it.
    fn place(&self, label: &Label) -> Option<(Place, Option<Arc<HostBlock>>)> {
        let waiting = || self.lower.iter().find_map(|(tier, _)| tier.recall(label));
        if let Some(block) = self.host.peek(label).or_else(waiting) {
            return Some((Place::Host, Some(block)));
        }
        let place = self.lower.iter().enumerate().find_map(|(n, (tier, _))| {
            let has = || matches!(tier.state(&label.key), CopyState::Clean | CopyState::Reading);
            if tier.has_parts(&label.key) {
                Some(Place::Parts(n))
            } else {
                (tier.may_have(&label.key) && has()).then_some(Place::Whole(n))
            }
        });
        place.map(|place| (place, None))
    }

    fn rate(&self, place: Place) -> Rate {
        match place {
            Place::Host => self.host_rate,
            Place::Parts(n) | Place::Whole(n) => self.lower[n].0.load_rate(),
        }
    }

    /// Begins to load a run; of how many of its objects.
    fn begin(&mut self, place: Place, run: Vec<Wanted>) -> (Source, usize) {
        let (mut held, mut wants) = (Vec::new(), Vec::new());
        for (at, wanted) in run.into_iter().enumerate() {
            match wanted {
                Wanted::Held(block) => held.push(block),
                Wanted::Below(label) => wants.push(Want { at, label: *label }),
            }
        }
        self.make_spare(wants.len());
        match place {
            Place::Host => {
                for block in &held {
                    self.host.touch(&block.label.key);
                }
                let blocks = held.len();
                (Source::Host(held), blocks)
            }
            Place::Parts(n) => {
                let arrivals = self.lower[n].0.load_parts(wants);
                let blocks = arrivals.blocks();
                (Source::Parts(arrivals), blocks)
            }
            Place::Whole(n) => {
                let ticket = self.lower[n].0.load(wants);
                let blocks = ticket.blocks();
                (Source::Whole(ticket), blocks)
            }
        }
    }
}

impl KvCache {
    /// Takes new blocks at the end of a sequence's tables for what tiers have of a prompt after `hit`,
    /// and begins to load them; how many tokens that are. What cannot be loaded is computed, so nothing
    /// here fails.
    pub(in crate::cache) fn begin_load(
        &mut self,
        sequence: &mut Sequence,
        prompt: &[TokenId],
        hit: &Hit,
    ) -> usize {
        let block_tokens = self.spec.block_tokens as usize;
        let first = hit.tokens / block_tokens;
        let Some((runs, planned)) = self.find_runs(sequence.namespace, prompt, hit) else {
            return 0;
        };
        if planned == 0 || !self.has_slots(first, planned) {
            return 0;
        }
        let mut taken = self.make_sinks_free(first, planned);
        taken = taken.and_then(|()| self.reserve(|_| planned as u32));
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            taken = taken
                .and_then(|()| table.extend(pool, planned * block_tokens, block_tokens).map(drop));
        }
        taken = taken.and_then(|()| self.take_sinks(sequence, first, planned));
        let (mut sources, mut objects, mut blocks) = (Vec::new(), 0, 0);
        if let (Ok(()), Some(tiers)) = (&taken, &mut self.tiers) {
            for (place, run) in runs {
                let wanted = run.len();
                let (source, got) = tiers.begin(place, run);
                sources.push((objects, source));
                objects += got;
                if got < wanted {
                    break;
                }
            }
            blocks = tiers.config.spread().whole(first, objects);
        }
        // Nothing to allocate, so nothing to fail.
        let _ = self.cut_unborn(sequence, first + blocks);
        let parts = self.tiers.as_ref().map_or(0, |tiers| tiers.config.parts().len());
        // Dropped where it is for nothing.
        let load = Box::new(LayerLoad::new(hit.tokens, sources, blocks, parts));
        if blocks == 0 {
            return 0;
        }
        sequence.load = Some(load);
        self.loading += 1;
        blocks * block_tokens
    }

    /// What tiers have of a prompt after `hit`, as far as loading is worth it, in runs of objects in the
    /// same place; and how many blocks those are.
    fn find_runs(
        &mut self,
        space: Namespace,
        prompt: &[TokenId],
        hit: &Hit,
    ) -> Option<(Runs, usize)> {
        let block_tokens = self.spec.block_tokens as usize;
        let above = self.outside.digest_of(last_entry(&hit.blocks, self.pools.len()));
        let keys = (space, self.outside.seed(space));
        let room = self.pools.iter().map(|pool| pool.free_blocks() + pool.cached_blocks()).min();
        let tiers = self.tiers.as_mut()?;
        tiers.used(&hit.blocks);
        let skip = hit.tokens / block_tokens;
        let room = tiers.config.spread().span(skip, room.unwrap_or(0) as usize);
        if room == 0 {
            return None;
        }
        let mut runs: Runs = Vec::new();
        let mut places = Vec::new();
        for label in tiers.labels(prompt, &self.media, skip, above, keys) {
            let Some((place, held)) = tiers.place(&label) else { break };
            places.push((place, held.map_or_else(|| Wanted::Below(Box::new(label)), Wanted::Held)));
            if places.len() >= room {
                break;
            }
        }
        for (place, wanted) in places {
            match runs.last_mut() {
                Some((last, run)) if *last == place => run.push(wanted),
                _ => runs.push((place, alloc::vec![wanted])),
            }
        }
        let found =
            runs.iter().map(|(place, run)| Found { blocks: run.len(), rate: tiers.rate(*place) });
        let (mut left, decision) = tiers.decide(found, skip, tiers.config.payload_bytes());
        tiers.last = Some(decision);
        for (_, run) in &mut runs {
            run.truncate(left);
            left -= run.len();
        }
        runs.retain(|(_, run)| !run.is_empty());
        Some((runs, decision.blocks))
    }
}
