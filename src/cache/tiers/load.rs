//! A load by layers as its sequence has it: where its blocks come from, and how far each part has come.
//! Dropped, it asks for nothing more.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use std::time::Instant;

use crate::cache::LayerId;
use crate::tier::{Arrivals, HostBlock, Missed, Ticket};

/// Where objects that follow each other come from.
#[derive(Debug)]
pub(super) enum Source {
    /// Host memory.
    Host(Vec<Arc<HostBlock>>),
    /// A tier that gives parts.
    Parts(Arrivals),
    /// A tier that gives whole objects.
    Whole(Ticket),
}

/// How far a part has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Absent,
    /// Its copies are on the side stream.
    Enqueued,
    /// What is enqueued on the cache's stream sees it.
    There,
}

/// A load under way.
#[derive(Debug)]
pub(in crate::cache) struct LayerLoad {
    /// Tokens that the sequence held before.
    pub(super) before: usize,
    /// Sources, each with the place of its first object, counted from the first block that comes on. The
    /// last may have objects of a block of which others are lacking.
    pub(super) sources: Vec<(usize, Source)>,
    pub(super) stages: Vec<Stage>,
    pub(super) blocks: usize,
    /// Of the objects, those in host memory, and how long copying them took.
    pub(super) from_host: (usize, Duration),
    pub(super) failed: Option<Missed>,
    /// Copies may be on their way on the side stream.
    pub(super) enqueued: bool,
}

impl LayerLoad {
    pub(super) fn new(
        before: usize,
        sources: Vec<(usize, Source)>,
        blocks: usize,
        parts: usize,
    ) -> Self {
        let in_host = |source: &(usize, Source)| match &source.1 {
            Source::Host(blocks) => blocks.len(),
            _ => 0,
        };
        let from_host = (sources.iter().map(in_host).sum(), Duration::ZERO);
        let stages = alloc::vec![Stage::Absent; parts];
        Self { before, sources, stages, blocks, from_host, failed: None, enqueued: false }
    }

    pub(super) fn end(&mut self) {
        for (_, source) in self.sources.drain(..) {
            match source {
                Source::Host(_) => {}
                Source::Parts(arrivals) => arrivals.cancel(),
                Source::Whole(ticket) => ticket.cancel(),
            }
        }
    }

    /// Tokens that the sequence held before it, and those that it holds with it.
    pub fn tokens(&self, block_tokens: usize) -> (usize, usize) {
        (self.before, self.before + self.blocks * block_tokens)
    }
}

impl Drop for LayerLoad {
    fn drop(&mut self) {
        self.end();
    }
}

/// How the load of a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadState {
    /// Tokens that the sequence held on the device before.
    pub device_tokens: usize,
    /// Tokens that come.
    pub loading_tokens: usize,
    /// Layers that are there, in all groups.
    pub ready_layers: u32,
    /// The first layer, in the order in which they come, that is not.
    pub first_missing: LayerId,
    /// Why it never will be there; `None` while it is on its way.
    pub failed: Option<Missed>,
}

/// What a layer waits for. Needs no cache: others may use it meanwhile.
#[derive(Debug, Default)]
pub struct LayerWait {
    pub(super) parts: Vec<(Arrivals, usize)>,
    pub(super) tickets: Vec<Ticket>,
}

impl LayerWait {
    /// Waits until it has arrived, or never will, at most for `limit`. What has arrived is taken by
    /// [`KvCache::poll_layer`](crate::cache::KvCache::poll_layer).
    pub fn wait(&self, limit: Duration) {
        let begin = Instant::now();
        let left = || limit.saturating_sub(begin.elapsed());
        let parts = self.parts.iter().all(|(arrivals, n)| arrivals.wait(*n, left()).is_ok());
        if parts {
            self.tickets.iter().for_each(|ticket| _ = ticket.wait(left()));
        }
    }
}
