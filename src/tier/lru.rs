//! A map from keys to values in the order of their last use. What a tier's index is made of.

use alloc::vec::Vec;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::ObjectKey;

const NIL: u32 = u32::MAX;

#[derive(Debug)]
struct Node<V> {
    key: ObjectKey,
    /// `None` in a free node.
    value: Option<V>,
    /// Towards the least recently used; in a free node, the next free one.
    older: u32,
    newer: u32,
}

/// The map.
#[derive(Debug)]
pub(super) struct Lru<V> {
    map: HashMap<ObjectKey, u32>,
    nodes: Vec<Node<V>>,
    free: u32,
    oldest: u32,
    newest: u32,
}

impl<V> Lru<V> {
    pub fn new() -> Self {
        Lru { map: HashMap::new(), nodes: Vec::new(), free: NIL, oldest: NIL, newest: NIL }
    }

    pub fn len(&self) -> usize {
        self.map.len()
    }

    pub fn contains(&self, key: &ObjectKey) -> bool {
        self.map.contains_key(key)
    }

    /// A value, used now.
    pub fn get_mut(&mut self, key: &ObjectKey) -> Option<&mut V> {
        let at = *self.map.get(key)?;
        self.unlink(at);
        self.link(at);
        self.nodes[at as usize].value.as_mut()
    }

    /// A value, without a use.
    pub fn peek(&self, key: &ObjectKey) -> Option<&V> {
        self.nodes[*self.map.get(key)? as usize].value.as_ref()
    }

    /// The same, to be changed.
    pub fn peek_mut(&mut self, key: &ObjectKey) -> Option<&mut V> {
        let at = *self.map.get(key)?;
        self.nodes[at as usize].value.as_mut()
    }

    /// Puts a value in as the most recently used; the one that it replaces.
    pub fn insert(&mut self, key: ObjectKey, value: V) -> Option<V> {
        match self.map.entry(key) {
            Entry::Occupied(entry) => {
                let at = *entry.get();
                self.unlink(at);
                self.link(at);
                self.nodes[at as usize].value.replace(value)
            }
            Entry::Vacant(entry) => {
                let node = Node { key, value: Some(value), older: NIL, newer: NIL };
                let at = if self.free == NIL {
                    self.nodes.push(node);
                    (self.nodes.len() - 1) as u32
                } else {
                    let at = self.free;
                    self.free = self.nodes[at as usize].older;
                    self.nodes[at as usize] = node;
                    at
                };
                entry.insert(at);
                self.link(at);
                None
            }
        }
    }

    pub fn remove(&mut self, key: &ObjectKey) -> Option<V> {
        let at = self.map.remove(key)?;
        self.unlink(at);
        let node = &mut self.nodes[at as usize];
        let value = node.value.take();
        node.older = self.free;
        self.free = at;
        value
    }

    /// Takes out the least recently used entry that `may` go.
    pub fn pop_oldest(&mut self, mut may: impl FnMut(&V) -> bool) -> Option<(ObjectKey, V)> {
        let mut at = self.oldest;
        while at != NIL {
            let node = &self.nodes[at as usize];
            if node.value.as_ref().is_some_and(&mut may) {
                let key = node.key;
                return self.remove(&key).map(|value| (key, value));
            }
            at = node.newer;
        }
        None
    }

    /// From the least recently used on.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectKey, &V)> {
        let mut at = self.oldest;
        core::iter::from_fn(move || {
            let node = self.nodes.get(at as usize)?;
            at = node.newer;
            node.value.as_ref().map(|value| (&node.key, value))
        })
    }

    fn unlink(&mut self, at: u32) {
        let Node { older, newer, .. } = self.nodes[at as usize];
        match older {
            NIL => self.oldest = newer,
            older => self.nodes[older as usize].newer = newer,
        }
        match newer {
            NIL => self.newest = older,
            newer => self.nodes[newer as usize].older = older,
        }
    }

    fn link(&mut self, at: u32) {
        let newest = self.newest;
        let node = &mut self.nodes[at as usize];
        (node.older, node.newer) = (newest, NIL);
        match newest {
            NIL => self.oldest = at,
            newest => self.nodes[newest as usize].newer = at,
        }
        self.newest = at;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(n: u8) -> ObjectKey {
        ObjectKey([n; 32])
    }

    proptest! {
        /// Against a list that is searched.
        #[test]
        fn it_does_what_a_list_does(ops in prop::collection::vec((0u8..5, 0u8..12), 0..200)) {
            let mut lru = Lru::new();
            let mut list: Vec<(u8, u32)> = Vec::new();
            for (step, (op, n)) in ops.into_iter().enumerate() {
                let step = step as u32;
                let at = list.iter().position(|entry| entry.0 == n);
                let old = at.map(|at| list[at].1);
                match op {
                    0 => {
                        at.map(|at| list.remove(at));
                        list.push((n, step));
                        prop_assert_eq!(lru.insert(key(n), step), old);
                    }
                    1 => {
                        if let Some(at) = at {
                            let entry = list.remove(at);
                            list.push(entry);
                        }
                        prop_assert_eq!(lru.get_mut(&key(n)).copied(), old);
                    }
                    2 => {
                        at.map(|at| list.remove(at));
                        prop_assert_eq!(lru.remove(&key(n)), old);
                    }
                    3 => prop_assert_eq!(lru.peek_mut(&key(n)).copied(), old),
                    _ => {
                        let even = |value: &u32| value.is_multiple_of(2);
                        let at = list.iter().position(|entry| even(&entry.1));
                        let gone = at.map(|at| list.remove(at)).map(|(n, v)| (key(n), v));
                        prop_assert_eq!(lru.pop_oldest(even), gone);
                    }
                }
                let all: Vec<_> = lru.iter().map(|(k, v)| (k.0[0], *v)).collect();
                prop_assert_eq!(&all, &list);
                prop_assert_eq!(lru.len(), list.len());
                prop_assert_eq!(lru.contains(&key(n)), list.iter().any(|entry| entry.0 == n));
            }
        }
    }
}
