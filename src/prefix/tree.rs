//! The shape of the radix tree: nodes, and the steps that change how they hang together.
//!
//! Three kinds of node in one arena, linked by u32 indices:
//! - a **root** per namespace;
//! - an **edge**: one or more whole blocks, neighbours in storage;
//! - a **fork** at token `d` of a block: its children agree on the first `d` tokens of their next
//!   block and differ at `d`. Forks under forks have rising `d`, so the first blocks of all edges
//!   below a root or edge form a binary-searchable trie, and the one that agrees longest with a
//!   query is found in at most `block_tokens` steps however many there are.
//!
//! A root or an edge has at most one child (an edge or a fork), a fork at least two, which a hash
//! table finds by token. Nothing here recurses; nothing here knows recency, pins or storage. What a
//! node carries for those is copied where a node is split, so that it still holds for every block.

use alloc::vec::Vec;

use super::NIL;
use super::retention::DEFAULT_PRIORITY;
use super::table::Table;
use crate::error::{Error, Result};
use crate::ids::{Namespace, TokenId};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A place in the arena without a node.
    Free,
    Root,
    Edge,
    Fork,
}

/// What is known of an edge's next use, until that use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    None,
    /// There will be none.
    Ended,
    /// It comes `duration_ms` after the last one.
    Expected,
    /// A request that waits for its turn will make it.
    Waited,
}

#[derive(Debug, Clone)]
pub(super) struct Node {
    /// Edge: when its end was last touched (a touch further down counts once that is evicted).
    /// Root: its namespace.
    pub stamp: u64,
    /// Edge: the eviction policy's own number.
    pub order: u64,
    pub parent: u32,
    /// Neighbours among the children of a fork; `next` also links free places.
    pub next: u32,
    pub prev: u32,
    /// The first child, or `NIL`.
    pub child: u32,
    /// Edge: its first slot. Fork: the token of the block at which its children differ.
    pub start: u32,
    /// Edge: its blocks, at least 1. Else 0.
    pub len: u32,
    /// Blocks from the root to the end of this node.
    pub end: u32,
    /// Child of a fork: its token there.
    pub token: TokenId,
    /// Edge: pins that end here.
    pub pins: u32,
    /// Raised whenever the edge is cut short or the place is emptied.
    pub generation: u32,
    /// Edge: for how long after its last use its priority or hint holds, in ms; 0 for ever.
    pub duration_ms: u32,
    pub kind: Kind,
    /// Edge: 0 to 100.
    pub priority: u8,
    /// Edge: what is known of its next use.
    pub hint: Mark,
}

const EMPTY: Node = Node {
    stamp: 0,
    order: 0,
    parent: NIL,
    next: NIL,
    prev: NIL,
    child: NIL,
    start: 0,
    len: 0,
    end: 0,
    token: 0,
    pins: 0,
    generation: 0,
    duration_ms: 0,
    kind: Kind::Free,
    priority: DEFAULT_PRIORITY,
    hint: Mark::None,
};

#[derive(Debug)]
pub(super) struct Tree {
    arena: Vec<Node>,
    free: u32,
    live: usize,
    /// (fork, token) to child.
    pub branches: Table,
    /// Namespace to root.
    pub spaces: Table,
}

fn branch_key(fork: u32, token: TokenId) -> u64 {
    u64::from(fork) << 32 | u64::from(token)
}

impl core::ops::Index<u32> for Tree {
    type Output = Node;
    #[inline]
    fn index(&self, node: u32) -> &Node {
        &self.arena[node as usize]
    }
}

impl core::ops::IndexMut<u32> for Tree {
    #[inline]
    fn index_mut(&mut self, node: u32) -> &mut Node {
        &mut self.arena[node as usize]
    }
}

impl Tree {
    pub(super) fn new(seed: u64) -> Self {
        let (branches, spaces) = (Table::new(seed), Table::new(!seed));
        Tree { arena: Vec::new(), free: NIL, live: 0, branches, spaces }
    }

    /// Nodes of every kind.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// Places in the arena, each of which may have an entry in the eviction queue.
    pub(super) fn places(&self) -> usize {
        self.arena.len()
    }

    pub(super) fn get(&self, node: u32) -> Option<&Node> {
        self.arena.get(node as usize)
    }

    /// Every edge, in no order.
    pub(super) fn edges(&self) -> impl Iterator<Item = &Node> {
        self.arena.iter().filter(|node| node.kind == Kind::Edge)
    }

    pub(super) fn bytes(&self) -> usize {
        self.arena.capacity() * size_of::<Node>() + self.branches.bytes() + self.spaces.bytes()
    }

    /// Makes room for `nodes` further nodes, so that the steps below cannot fail. Returns how many
    /// places there may be then.
    pub(super) fn reserve(&mut self, nodes: usize) -> Result<usize> {
        let bytes = (nodes * size_of::<Node>()) as u64;
        let more = nodes.saturating_sub(self.arena.len() - self.live);
        self.arena.try_reserve(more).map_err(|_| Error::OutOfMemory { bytes })?;
        self.branches.reserve(nodes)?;
        self.spaces.reserve(1)?;
        Ok(self.arena.len() + more)
    }

    /// A node that hangs nowhere yet. Room must have been reserved.
    fn create(&mut self, kind: Kind) -> u32 {
        self.live += 1;
        if self.free == NIL {
            self.arena.push(Node { kind, ..EMPTY });
            return self.arena.len() as u32 - 1;
        }
        let node = self.free;
        let Node { next, generation, .. } = self[node];
        self.free = next;
        self[node] = Node { kind, generation, ..EMPTY };
        node
    }

    fn discard(&mut self, node: u32) {
        let generation = self[node].generation.wrapping_add(1);
        self[node] = Node { generation, next: self.free, ..EMPTY };
        self.free = node;
        self.live -= 1;
    }

    /// The root of `space`, if anything is cached there.
    #[inline]
    pub(super) fn root(&self, space: Namespace) -> Option<u32> {
        self.spaces.get(space.0, |node| self[node].stamp == space.0)
    }

    /// The root of `space`, made if there is none.
    pub(super) fn root_or_new(&mut self, space: Namespace) -> u32 {
        self.root(space).unwrap_or_else(|| {
            let root = self.create(Kind::Root);
            self[root].stamp = space.0;
            self.spaces.insert(space.0, root);
            root
        })
    }

    /// Removes a root without children.
    pub(super) fn remove_root(&mut self, root: u32) {
        debug_assert!(self[root].kind == Kind::Root && self[root].child == NIL);
        self.spaces.remove(self[root].stamp, root);
        self.discard(root);
    }

    /// An edge that hangs nowhere yet, of `len` blocks from slot `start`, ending at depth `end`.
    pub(super) fn new_edge(&mut self, start: u32, len: u32, end: u32) -> u32 {
        let edge = self.create(Kind::Edge);
        let node = &mut self[edge];
        (node.start, node.len, node.end) = (start, len, end);
        edge
    }

    /// The child of `fork` for `token`.
    #[inline]
    pub(super) fn branch(&self, fork: u32, token: TokenId) -> Option<u32> {
        self.branches.get(branch_key(fork, token), |node| {
            let node = &self[node];
            node.parent == fork && node.token == token
        })
    }

    /// Some edge at or below `node`.
    #[inline]
    pub(super) fn some_edge(&self, mut node: u32) -> u32 {
        while self[node].kind == Kind::Fork {
            node = self[node].child;
        }
        node
    }

    /// The root or edge above `node`.
    pub(super) fn owner(&self, mut node: u32) -> u32 {
        loop {
            node = self[node].parent;
            if self[node].kind != Kind::Fork {
                return node;
            }
        }
    }

    /// Hangs `child` below a root or edge that has no child.
    pub(super) fn attach(&mut self, parent: u32, child: u32) {
        debug_assert!(self[parent].kind != Kind::Fork && self[parent].child == NIL);
        self[parent].child = child;
        self[child].parent = parent;
    }

    /// Hangs `child` below `fork`, which has none for `token` yet.
    pub(super) fn add_branch(&mut self, fork: u32, child: u32, token: TokenId) {
        let first = self[fork].child;
        let node = &mut self[child];
        (node.parent, node.prev, node.next, node.token) = (fork, NIL, first, token);
        if first != NIL {
            self[first].prev = child;
        }
        self[fork].child = child;
        self.branches.insert(branch_key(fork, token), child);
    }

    /// Puts a new fork at token `at` of the block between `below` and its parent; `token` is the
    /// one that `below` has there.
    pub(super) fn fork_above(&mut self, below: u32, at: u32, token: TokenId) -> u32 {
        let fork = self.create(Kind::Fork);
        let end = self[self.owner(below)].end;
        (self[fork].start, self[fork].end) = (at, end);
        self.take_place(below, fork);
        self.add_branch(fork, below, token);
        fork
    }

    /// Cuts `edge` after its first `blocks` blocks, fewer than it has. The upper part is a new
    /// node, which is returned; the lower part stays `edge`, and with it its pins and every position
    /// at its end.
    pub(super) fn split(&mut self, edge: u32, blocks: u32) -> u32 {
        let Node { start, len, end, stamp, order, duration_ms, priority, hint, .. } = self[edge];
        debug_assert!(0 < blocks && blocks < len);
        let upper = self.new_edge(start, blocks, end - len + blocks);
        let node = &mut self[upper];
        (node.stamp, node.order, node.duration_ms) = (stamp, order, duration_ms);
        (node.priority, node.hint) = (priority, hint);
        self.take_place(edge, upper);
        self.attach(upper, edge);
        let lower = &mut self[edge];
        (lower.start, lower.len) = (start + blocks, len - blocks);
        upper
    }

    /// Hangs `new` where `old` hangs; `old` then hangs nowhere.
    fn take_place(&mut self, old: u32, new: u32) {
        let Node { parent, next, prev, token, .. } = self[old];
        let node = &mut self[new];
        (node.parent, node.next, node.prev, node.token) = (parent, next, prev, token);
        if next != NIL {
            self[next].prev = new;
        }
        if prev != NIL {
            self[prev].next = new;
        } else {
            self[parent].child = new;
        }
        if self[parent].kind == Kind::Fork {
            self.branches.replace(branch_key(parent, token), old, new);
        }
        let node = &mut self[old];
        (node.parent, node.next, node.prev) = (NIL, NIL, NIL);
    }

    /// Removes an edge without children; returns the root or edge that it hung below. A fork that
    /// is left with one child goes too.
    pub(super) fn remove_leaf(&mut self, edge: u32) -> u32 {
        debug_assert!(self[edge].kind == Kind::Edge && self[edge].child == NIL);
        let owner = self.owner(edge);
        let Node { parent, next, prev, token, .. } = self[edge];
        if next != NIL {
            self[next].prev = prev;
        }
        if prev != NIL {
            self[prev].next = next;
        } else {
            self[parent].child = next;
        }
        if self[parent].kind == Kind::Fork {
            self.branches.remove(branch_key(parent, token), edge);
            let last = self[parent].child;
            if self[last].next == NIL {
                self.branches.remove(branch_key(parent, self[last].token), last);
                self.take_place(parent, last);
                self.discard(parent);
            }
        }
        self.discard(edge);
        owner
    }
}
