//! S3-FIFO (Yang et al., SOSP 2023): a small queue for what is new, a main one for what has proved
//! itself, and a ghost that remembers what the small one evicted.
//!
//! Takes from the small queue while it has a tenth of the index or more: what was used more than
//! once since it was stored moves to the main queue, the rest goes and leaves a fingerprint. In the
//! main queue what was used goes round once for each use, three at most. What is stored while its
//! fingerprint is remembered starts in the main queue. Blocks stored in one call are one entry, by
//! the fingerprint of the first. A fingerprint is of some of a block's tokens: it can err, which
//! costs a place in the wrong queue and nothing else.
//!
//! `order`: the place in its queue (a time), two bits of use count, one bit of lane (1 is main).

use alloc::vec::Vec;

use super::{Key, Policy};
use crate::error::{Error, Result};
use crate::ids::TokenId;

#[derive(Debug)]
pub(in crate::prefix) struct S3Fifo {
    /// Fingerprint and time of each place; a later one overwrites. A power of two long.
    ghost: Vec<(u32, u32)>,
    /// How many fingerprints were left, wrapping: the ghost's clock.
    left: u32,
    /// For how many further ones a fingerprint is remembered.
    memory: u32,
}

const MAIN: u64 = 1;

fn entry(place: u64, uses: u64, lane: u64) -> u64 {
    place << 3 | uses << 1 | lane
}

fn uses(order: u64) -> u64 {
    order >> 1 & 3
}

/// A hash of sixteen of the tokens, the last among them. Never 0.
fn fingerprint(tokens: &[TokenId]) -> u32 {
    let step = tokens.len().div_ceil(16).max(1);
    let mut hash = tokens.len() as u64;
    for &token in tokens.iter().rev().step_by(step) {
        hash = (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
    }
    (hash >> 32) as u32 | 1
}

impl S3Fifo {
    pub(in crate::prefix) fn new(capacity_blocks: u32) -> Result<Self> {
        let places = (capacity_blocks as usize).next_power_of_two();
        let bytes = (places * size_of::<(u32, u32)>()) as u64;
        let mut ghost = Vec::new();
        ghost.try_reserve_exact(places).map_err(|_| Error::OutOfMemory { bytes })?;
        ghost.resize(places, (0, 0));
        let memory = capacity_blocks - capacity_blocks / 10;
        Ok(S3Fifo { ghost, left: 0, memory })
    }

    fn place(&self, fingerprint: u32) -> usize {
        // The lowest bit is always set.
        (fingerprint >> 1) as usize & (self.ghost.len() - 1)
    }

    fn remembers(&self, tokens: &[TokenId]) -> bool {
        let wanted = fingerprint(tokens);
        let (found, when) = self.ghost[self.place(wanted)];
        found == wanted && self.left.wrapping_sub(when) <= self.memory
    }
}

impl Policy for S3Fifo {
    fn stored(&mut self, now: u64, tokens: &[TokenId]) -> u64 {
        entry(now, 0, if self.remembers(tokens) { MAIN } else { 0 })
    }

    fn used(&mut self, order: u64, _now: u64) -> u64 {
        entry(order >> 3, (uses(order) + 1).min(3), order & MAIN)
    }

    fn key(&self, _stamp: u64, order: u64) -> Key {
        Key { rank: 0, order: order >> 3 }
    }

    fn lane(&self, order: u64) -> usize {
        (order & MAIN) as usize
    }

    fn next_lane(&self, blocks: [u64; 2], capacity: u64) -> usize {
        usize::from(blocks[0] * 10 < capacity)
    }

    fn judge(&mut self, order: u64, now: u64) -> Option<u64> {
        match (order & MAIN, uses(order)) {
            (MAIN, 0) | (0, 0 | 1) => None,
            (MAIN, n) => Some(entry(now, n - 1, MAIN)),
            _ => Some(entry(now, 0, MAIN)),
        }
    }

    fn evicted(&mut self, order: u64, tokens: &[TokenId]) {
        if order & MAIN == 0 {
            let fingerprint = fingerprint(tokens);
            let place = self.place(fingerprint);
            self.left = self.left.wrapping_add(1);
            self.ghost[place] = (fingerprint, self.left);
        }
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.ghost[..])
    }
}
