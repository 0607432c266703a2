//! Keys of objects that a store was seen to have, for stores that cannot say without being asked: so
//! that a block is not sent there again each time it is evicted. Bounded: what was seen long ago is
//! forgotten, half of it at a time. What is remembered may have gone meanwhile; a miss says so.

use std::collections::HashSet;

use super::ObjectKey;

/// Keys that are remembered at least.
const LEAST: usize = 1 << 16;

/// The keys.
#[derive(Debug, Default)]
pub(super) struct Recent {
    now: HashSet<ObjectKey>,
    before: HashSet<ObjectKey>,
}

impl Recent {
    pub fn insert(&mut self, key: ObjectKey) {
        if self.now.len() >= LEAST {
            self.before = core::mem::take(&mut self.now);
        }
        self.now.insert(key);
    }

    pub fn remove(&mut self, key: &ObjectKey) {
        self.now.remove(key);
        self.before.remove(key);
    }

    pub fn contains(&self, key: &ObjectKey) -> bool {
        self.now.contains(key) || self.before.contains(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_remembered_and_memory_is_bounded() {
        let key = |n: usize| {
            let mut key = ObjectKey([0; 32]);
            key.0[..8].copy_from_slice(&(n as u64).to_le_bytes());
            key
        };
        let mut recent = Recent::default();
        for n in 0..LEAST * 3 {
            recent.insert(key(n));
            assert!(recent.now.len() + recent.before.len() <= LEAST * 2);
        }
        assert!((LEAST * 2..LEAST * 3).all(|n| recent.contains(&key(n))));
        assert!(!recent.contains(&key(0)));
        recent.remove(&key(LEAST * 2));
        assert!(!recent.contains(&key(LEAST * 2)));
    }
}
