//! Least often used first, the least recently used of those. `order` counts the uses, the storing
//! one included. Counts do not age, and those past 2^24 rank alike.

use super::{Key, Policy};
use crate::ids::TokenId;

#[derive(Debug)]
pub(in crate::prefix) struct Lfu;

const MOST: u64 = (1 << 24) - 1;

impl Policy for Lfu {
    fn stored(&mut self, _now: u64, _tokens: &[TokenId]) -> u64 {
        1
    }

    fn used(&mut self, order: u64, _now: u64) -> u64 {
        order.saturating_add(1).min(MOST)
    }

    fn key(&self, stamp: u64, order: u64) -> Key {
        Key { rank: order as u32, order: stamp }
    }
}
