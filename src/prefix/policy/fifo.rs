//! First stored, first out, whatever was used since. `order` is when it was stored.

use super::{Key, Policy};
use crate::ids::TokenId;

#[derive(Debug)]
pub(in crate::prefix) struct Fifo;

impl Policy for Fifo {
    fn stored(&mut self, now: u64, _tokens: &[TokenId]) -> u64 {
        now
    }

    fn used(&mut self, order: u64, _now: u64) -> u64 {
        order
    }

    fn key(&self, _stamp: u64, order: u64) -> Key {
        Key { rank: 0, order }
    }
}
