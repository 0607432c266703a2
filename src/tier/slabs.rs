//! Loading by parts: what a reader does for an engine that starts before all of its blocks are there.
//!
//! Parts are read across all blocks, in the model's order, and packed one behind the other into
//! *slabs*: buffers of the tier, handed over when they are full and verified. So a load takes about as
//! many buffers as it has blocks, and each belongs to one side at a time. The store holds its objects
//! from the first part to the last; a load that ends early stops after the slab it is reading.

use alloc::sync::Arc;
use alloc::vec::Vec;
use std::time::Instant;

use super::ObjectKey;
use super::arrivals::{Arrivals, Piece};
use super::buffer::Buffer;
use super::object::{self, Sums};
use super::parts::{Parts, Read};
use super::queue::Shared;
use super::store::{GetPart, Outcome};
use super::ticket::{Missed, Want};

/// A reader's share of a load: some of its blocks.
pub(super) struct Share {
    pub wants: Vec<Want>,
    pub slabs: Vec<Buffer>,
    pub arrivals: Arrivals,
}

/// What is read of a block, in a slab that is being filled.
struct Place<'a> {
    read: &'a Read,
    /// The block, within the share.
    block: usize,
    at: usize,
}

/// Slabs that what is read of so many blocks take: in a slab as many as fit, then the next.
pub(super) fn pack(parts: &Parts, blocks: usize, slab_bytes: usize) -> usize {
    let (mut slabs, mut room) = (0, 0);
    for read in parts.reads() {
        let bytes = read.bytes();
        let rest = blocks.saturating_sub(room / bytes);
        if rest == 0 {
            room -= blocks * bytes;
        } else {
            let each = slab_bytes / bytes;
            slabs += rest.div_ceil(each);
            room = slab_bytes - (rest - 1) % each * bytes - bytes;
        }
    }
    slabs
}

/// Why a share ended before its end.
enum Ended {
    Missed(Missed),
    Bad(ObjectKey),
}

impl Shared {
    pub(super) fn load_parts(&self, share: Share) {
        let Share { wants, slabs, arrivals } = share;
        let begin = Instant::now();
        let keys: Vec<ObjectKey> = wants.iter().map(|want| want.label.key).collect();
        let mut held = alloc::vec![false; keys.len()];
        self.store.hold(&keys, &mut held);
        let result = match held.iter().all(|held| *held) {
            true => self.fill_slabs(&wants, slabs, &arrivals),
            false => Err(Ended::Missed(Missed::Absent)),
        };
        let mut both = keys.iter().zip(&held);
        let held: Vec<ObjectKey> =
            both.by_ref().filter(|(_, held)| **held).map(|(key, _)| *key).collect();
        self.store.unhold(&held);
        let bytes = keys.len() as u64 * self.buffers.bytes() as u64;
        let mut state = self.state();
        for key in &keys {
            state.reading.remove(key);
        }
        let counters = &mut state.counters;
        match &result {
            Ok(_) => {
                counters.loaded += keys.len() as u64;
                counters.loaded_bytes += bytes;
                state.load_rate.observe(bytes, begin.elapsed());
                state.pause = None;
            }
            Err(Ended::Bad(key)) => {
                counters.bad += 1;
                state.seen.remove(key);
                state.removes.push(*key);
                self.tell(&[*key], &[]);
            }
            Err(Ended::Missed(Missed::Cancelled)) => {}
            Err(Ended::Missed(why)) => {
                counters.missed += 1;
                if *why == Missed::Down {
                    state.failed();
                }
            }
        }
        drop(state);
        self.work.notify_all();
        // After it was counted: whoever waited for the last of it finds it in the counters.
        match result {
            Ok(last) => arrivals.arrive(last),
            Err(Ended::Bad(_)) => arrivals.fail(Missed::Bad),
            Err(Ended::Missed(why)) => arrivals.fail(why),
        }
    }

    /// Reads and verifies everything, slab by slab; the pieces of the last have yet to arrive.
    fn fill_slabs(
        &self,
        wants: &[Want],
        slabs: Vec<Buffer>,
        arrivals: &Arrivals,
    ) -> Result<Vec<(usize, Piece)>, Ended> {
        let parts = self.config.parts();
        let reads = parts.reads().iter();
        let mut left =
            reads.flat_map(|read| (0..wants.len()).map(move |block| (read, block))).peekable();
        let mut sums: Vec<Sums> = Vec::with_capacity(wants.len());
        let mut pieces = Vec::new();
        for mut slab in slabs {
            arrivals.arrive(core::mem::take(&mut pieces));
            let (mut places, mut used) = (Vec::new(), 0);
            let room = |used: usize, read: &Read| used + read.bytes() <= slab.len();
            while let Some((read, block)) = left.next_if(|(read, _)| room(used, read)) {
                places.push(Place { read, block, at: used });
                used += read.bytes();
            }
            if arrivals.failed().is_some() {
                return Err(Ended::Missed(Missed::Cancelled));
            }
            self.fill(&mut slab, &places, wants)?;
            let slab = Arc::new(slab);
            for Place { read, block, at } in places {
                let label = &wants[block].label;
                let bytes = &slab[at..at + read.bytes()];
                if sums.len() == block {
                    // The first part of each block, which has its head.
                    let head = object::verify_head(bytes, &self.config, label);
                    sums.push(head.map_err(|_| Ended::Bad(label.key))?);
                }
                for part in read.parts.clone() {
                    let within = parts.get(part).within(read);
                    let whole = |sums: &Sums| sums.verify(part, &bytes[within.clone()]);
                    if !sums.get(block).is_some_and(whole) {
                        return Err(Ended::Bad(label.key));
                    }
                    let at = at + within.start..at + within.end;
                    pieces.push((part, Piece { block: wants[block].at, slab: slab.clone(), at }));
                }
            }
        }
        Ok(pieces)
    }

    /// Reads the pieces of a slab.
    fn fill(&self, slab: &mut Buffer, places: &[Place], wants: &[Want]) -> Result<(), Ended> {
        let mut rest = &mut slab[..];
        let mut gets = Vec::with_capacity(places.len());
        for place in places {
            let bytes;
            (bytes, rest) = rest.split_at_mut(place.read.bytes());
            let offset = place.read.offset();
            gets.push(GetPart { key: wants[place.block].label.key, offset, bytes });
        }
        let mut outcomes = alloc::vec![Outcome::None; gets.len()];
        self.store.get_parts(&mut gets, &mut outcomes);
        let why = outcomes.iter().zip(places).find_map(|(outcome, place)| match outcome {
            Outcome::Done => None,
            Outcome::Bad => Some(Ended::Bad(wants[place.block].label.key)),
            Outcome::Absent | Outcome::None => Some(Ended::Missed(Missed::Absent)),
            Outcome::Failed | Outcome::Full => Some(Ended::Missed(Missed::Down)),
        });
        why.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::KvFormat;
    use crate::layout::slice::Slice;
    use crate::layout::{CacheSpec, GroupSpec};
    use crate::tier::Configuration;

    /// As [`Shared::fill_slabs`] does it.
    fn packed_one_by_one(parts: &Parts, blocks: usize, slab_bytes: usize) -> usize {
        let (mut slabs, mut used) = (0, slab_bytes);
        for read in parts.reads() {
            for _ in 0..blocks {
                if used + read.bytes() > slab_bytes {
                    (slabs, used) = (slabs + 1, 0);
                }
                used += read.bytes();
            }
        }
        slabs
    }

    #[test]
    fn slabs_are_counted_as_they_are_filled() {
        for (layers, dim) in [(1, 8), (2, 64), (3, 24), (7, 40), (32, 128)] {
            let group = GroupSpec::uniform(layers, 3, dim, KvFormat::F16);
            let mut spec = CacheSpec::uniform(16, group.clone());
            spec.groups.push(GroupSpec { layers: 3, ..group });
            let config = Configuration::new("m", &spec, &Slice::whole(&spec)).unwrap();
            let bytes = object::object_bytes(config.payload_bytes()).unwrap() as usize;
            for blocks in 0..40 {
                let counted = pack(config.parts(), blocks, bytes);
                assert_eq!(counted, packed_one_by_one(config.parts(), blocks, bytes));
                assert!(counted <= 3 * blocks + 1);
            }
        }
    }
}
