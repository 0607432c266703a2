//! Least recently used first. Keeps nothing: the time of the last use is the order.

use super::{Key, Policy};
use crate::ids::TokenId;

#[derive(Debug)]
pub(in crate::prefix) struct Lru;

impl Policy for Lru {
    fn notes_every_edge(&self) -> bool {
        false
    }

    fn stored(&mut self, _now: u64, _tokens: &[TokenId]) -> u64 {
        0
    }

    fn used(&mut self, order: u64, _now: u64) -> u64 {
        order
    }

    fn key(&self, stamp: u64, _order: u64) -> Key {
        Key { rank: 0, order: stamp }
    }
}
