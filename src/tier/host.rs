//! The host tier: blocks in memory, by key, the least recently used to go first.
//!
//! A block keeps its copy here when it is recalled to the device (inclusive): blocks never change,
//! so when the device evicts it again nothing is copied. Copies are shared: one that is being
//! written to a lower tier, or read from here, stays whole after it was evicted. Memory is trusted
//! as the device's is: tokens and keys are compared, no checksum is taken.
//!
//! A block of a device is here from when its copy is enqueued: what reads it comes after that
//! ([`Buffer`]).

use alloc::sync::Arc;

use super::ObjectKey;
use super::buffer::Buffer;
use super::lru::Lru;
use super::object::{HEAD_BYTES, Label};

/// A block outside the device: what it is of, and its object's buffer, whose head is unwritten
/// until the object is sealed.
#[derive(Debug)]
pub struct HostBlock {
    /// What it is of.
    pub label: Label,
    /// Room for the whole object.
    pub buffer: Buffer,
}

impl HostBlock {
    /// The bytes of the block, padding behind them. Waits for a device that is still writing them; where
    /// that fails ([`Buffer::arrived`]) they are nothing in particular.
    pub fn payload(&self) -> &[u8] {
        &self.buffer[HEAD_BYTES..]
    }
}

/// The tier. Not synchronised: it belongs to the cache.
#[derive(Debug)]
pub struct HostTier {
    capacity: usize,
    blocks: Lru<Arc<HostBlock>>,
}

impl HostTier {
    /// An empty tier of at most `capacity` blocks.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, blocks: Lru::new() }
    }

    /// The most blocks it holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Blocks it holds.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it holds a block; not a use of it.
    pub fn contains(&self, key: &ObjectKey) -> bool {
        self.blocks.contains(key)
    }

    /// The block of a key, whatever it is of; not a use of it.
    pub fn find(&self, key: &ObjectKey) -> Option<&Arc<HostBlock>> {
        self.blocks.peek(key)
    }

    /// Notes a use of a block; whether it is here.
    pub fn touch(&mut self, key: &ObjectKey) -> bool {
        self.blocks.get_mut(key).is_some()
    }

    /// A block, if it is really the one that `label` describes; not a use of it.
    pub fn peek(&self, label: &Label) -> Option<Arc<HostBlock>> {
        self.blocks.peek(&label.key).filter(|block| block.label == *label).cloned()
    }

    /// A block, used now, if it is really the one that `label` describes.
    pub fn get(&mut self, label: &Label) -> Option<Arc<HostBlock>> {
        let block = self.blocks.get_mut(&label.key)?;
        (block.label == *label).then(|| block.clone())
    }

    /// Puts a block in as the most recently used; the block that had to go for it, if one had.
    /// A tier without capacity gives the block itself back.
    pub fn insert(&mut self, block: Arc<HostBlock>) -> Option<Arc<HostBlock>> {
        if self.capacity == 0 {
            return Some(block);
        }
        let known = self.blocks.contains(&block.label.key);
        let gone = if known || self.blocks.len() < self.capacity {
            None
        } else {
            self.blocks.pop_oldest(|_| true).map(|(_, gone)| gone)
        };
        self.blocks.insert(block.label.key, block);
        gone
    }

    /// The least recently used block.
    pub fn oldest(&self) -> Option<&Arc<HostBlock>> {
        self.iter().next()
    }

    /// Takes the least recently used block out, to make room.
    pub fn pop_oldest(&mut self) -> Option<Arc<HostBlock>> {
        self.blocks.pop_oldest(|_| true).map(|(_, gone)| gone)
    }

    /// Takes a block out.
    pub fn remove(&mut self, key: &ObjectKey) -> Option<Arc<HostBlock>> {
        self.blocks.remove(key)
    }

    /// All blocks, the least recently used first.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<HostBlock>> {
        self.blocks.iter().map(|(_, block)| block)
    }
}

#[cfg(test)]
mod tests {
    use super::super::buffer::Buffers;
    use super::super::object::{Nth, Origin};
    use super::*;
    use crate::prefix::Digest;

    fn label(n: u8) -> Label {
        let tokens = alloc::vec![u32::from(n)].into_boxed_slice();
        let (key, block, origin) = (ObjectKey([n; 32]), Digest([n; 32]), Origin::default());
        Label { key, block, parent: None, keys: None, tokens, origin, nth: Nth::ONLY }
    }

    #[test]
    fn the_least_recently_used_goes_and_what_is_read_stays_whole() {
        let buffers = Buffers::new(8192, 4);
        let block = |n: u8| {
            let mut buffer = buffers.take().unwrap();
            buffer[HEAD_BYTES] = n;
            Arc::new(HostBlock { label: label(n), buffer })
        };
        let mut tier = HostTier::new(2);
        assert!(tier.insert(block(1)).is_none());
        assert!(tier.insert(block(2)).is_none());
        assert!(tier.touch(&label(1).key));
        let reading = tier.get(&label(2)).unwrap();
        assert!(tier.touch(&label(1).key) && tier.contains(&label(2).key));
        let gone = tier.insert(block(3)).unwrap();
        assert_eq!((gone.label.key, tier.len()), (label(2).key, 2));
        drop(gone);
        let _other = block(4);
        assert_eq!(reading.payload()[0], 2);
        drop(reading);
        assert_eq!(buffers.counts(), (4, 1));
        // The same key with other tokens is no hit.
        assert!(tier.get(&Label { tokens: label(9).tokens, ..label(1) }).is_none());
        assert!(HostTier::new(0).insert(_other).is_some());
    }
}
