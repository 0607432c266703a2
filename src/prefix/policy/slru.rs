//! Segmented LRU. What is stored is on probation; its next use protects it. Where the protected take
//! more than four fifths of the index, the least recently used of them go back on probation, as if
//! used just now. Evicts from probation.
//!
//! `order` is the place in the lane (a time) and, as its lowest bit, the lane: 1 is protected.

use super::{Key, Policy};
use crate::ids::TokenId;

#[derive(Debug)]
pub(in crate::prefix) struct Slru;

const PROTECTED: u64 = 1;

impl Policy for Slru {
    fn stored(&mut self, now: u64, _tokens: &[TokenId]) -> u64 {
        now << 1
    }

    fn used(&mut self, _order: u64, now: u64) -> u64 {
        now << 1 | PROTECTED
    }

    fn refreshed(&self, order: u64, now: u64) -> u64 {
        now << 1 | (order & PROTECTED)
    }

    fn key(&self, _stamp: u64, order: u64) -> Key {
        Key { rank: 0, order: order >> 1 }
    }

    fn lane(&self, order: u64) -> usize {
        (order & PROTECTED) as usize
    }

    fn next_lane(&self, blocks: [u64; 2], capacity: u64) -> usize {
        usize::from(blocks[1] * 5 > capacity * 4)
    }

    fn judge(&mut self, order: u64, now: u64) -> Option<u64> {
        (order & PROTECTED != 0).then_some(now << 1)
    }
}
