//! Proof, by visiting everything, that the index is whole. For tests and debugging.

use alloc::vec;
use alloc::vec::Vec;

use super::blocks::Run;
use super::tree::{Kind, Node};
use super::{NIL, PrefixIndex};
use crate::error::{Error, Result};

fn must(holds: bool, why: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::InvalidState { why }) }
}

impl PrefixIndex {
    /// Checks every link, count and order of the index. Takes time and memory in proportion to it,
    /// and aborts where memory is refused: for tests and debugging.
    ///
    /// # Errors
    /// `InvalidState` says what does not hold.
    pub fn audit(&self) -> Result<()> {
        let tree = &self.tree;
        let mut used = vec![false; self.blocks.touched()];
        let mut seen = vec![false; tree.places()];
        let mut pins = vec![0u32; tree.places()];
        for node in self.pins.nodes().filter(|&n| n != NIL) {
            must(tree.get(node).is_some(), "prefix: a pin leads nowhere")?;
            pins[node as usize] += 1;
        }
        let (mut live, mut branches) = (0, 0);
        let mut todo: Vec<u32> = Vec::new();
        for root in tree.spaces.nodes() {
            let node = tree.get(root);
            let right = node.is_some_and(|n| n.kind == Kind::Root && n.child != NIL);
            must(right, "prefix: a namespace has no root, or nothing in it")?;
            let space = crate::ids::Namespace(tree[root].stamp);
            must(tree.root(space) == Some(root), "prefix: a namespace is not found")?;
            todo.push(root);
        }
        while let Some(at) = todo.pop() {
            must(!core::mem::replace(&mut seen[at as usize], true), "prefix: a node hangs twice")?;
            live += 1;
            let node = &tree[at];
            must(pins[at as usize] == node.pins, "prefix: a pin count is wrong")?;
            match node.kind {
                Kind::Free => must(false, "prefix: a free node hangs in the tree")?,
                Kind::Root => must(node.end == 0 && node.len == 0, "prefix: a root has blocks")?,
                Kind::Edge => {
                    must(node.len > 0, "prefix: an empty edge")?;
                    let above = tree[tree.owner(at)].end;
                    must(above + node.len == node.end, "prefix: a depth is wrong")?;
                    for slot in node.start..node.start + node.len {
                        let free = used.get(slot as usize) == Some(&false);
                        must(free, "prefix: two edges share a slot")?;
                        used[slot as usize] = true;
                    }
                }
                Kind::Fork => self.audit_fork(at, node)?,
            }
            let (mut child, mut prev, mut children) = (node.child, NIL, 0);
            while child != NIL {
                let below = tree.get(child).map(|n| (n.parent, n.prev));
                must(below == Some((at, prev)), "prefix: a child's links are wrong")?;
                children += 1;
                todo.push(child);
                (prev, child) = (child, tree[child].next);
            }
            if node.kind == Kind::Fork {
                branches += children;
                must(children > 1, "prefix: a fork has fewer than two children")?;
            } else {
                must(children < 2, "prefix: children without a fork")?;
            }
        }
        must(live == tree.live(), "prefix: a node is lost")?;
        must(branches == tree.branches.len(), "prefix: the branch table has other entries")?;
        self.blocks.audit(&used)?;
        must(
            self.windows_are_sound(),
            "prefix: a block of a window is not found, or one too many",
        )?;
        self.audit_queue(&seen)
    }

    /// The children of a fork agree up to its token, differ there, and are found by it.
    fn audit_fork(&self, fork: u32, node: &Node) -> Result<()> {
        let tree = &self.tree;
        let at = node.start as usize;
        let above = &tree[node.parent];
        must(at < self.block_tokens(), "prefix: a fork past the block")?;
        must(node.end == tree[tree.owner(fork)].end, "prefix: a fork's depth is wrong")?;
        let rising = above.kind != Kind::Fork || above.start < node.start;
        must(rising, "prefix: forks out of order")?;
        let first = |node| {
            let start = tree[tree.some_edge(node)].start;
            self.blocks.tokens(Run { start, len: 1 })
        };
        let mut child = node.child;
        while child != NIL {
            let same = first(child)[..at] == first(fork)[..at];
            must(same && first(child)[at] == tree[child].token, "prefix: a branch is misplaced")?;
            let found = tree.branch(fork, tree[child].token) == Some(child);
            must(found, "prefix: a branch is not found")?;
            child = tree[child].next;
        }
        Ok(())
    }

    /// Every leaf that may be evicted is in the queue of its lane, under a key that is no later than
    /// its own; one whose priority ends is among the timers too; lanes have the blocks they count.
    fn audit_queue(&self, live: &[bool]) -> Result<()> {
        let queues = [&self.queues[0], &self.queues[1], &self.timers];
        must(queues.iter().all(|queue| queue.is_sound()), "prefix: a queue is out of order")?;
        let mut keys = vec![[None; 3]; live.len()];
        for (which, queue) in queues.iter().enumerate() {
            for (key, at) in queue.entries() {
                must(self.tree.get(at).is_some(), "prefix: an entry of a queue has no node")?;
                keys[at as usize][which] = Some(key);
            }
        }
        let mut blocks = [0; 2];
        for (at, _) in live.iter().enumerate().filter(|&(_, &live)| live) {
            let node = &self.tree[at as u32];
            if node.kind != Kind::Edge {
                continue;
            }
            let lane = self.policy.lane(node.order);
            blocks[lane] += u64::from(node.len);
            must(node.stamp <= self.clock, "prefix: a stamp of the future")?;
            if !self.is_free_leaf(node) {
                continue;
            }
            let queued = keys[at][lane].is_some_and(|key| key <= self.key(node));
            must(queued, "prefix: a leaf is not queued, or too late")?;
            let timed = self.deadline_of(node).is_none_or(|deadline| {
                keys[at][2].is_some_and(|key| key.order <= deadline && deadline > self.now_ms)
            });
            must(timed, "prefix: the end of a priority is missed")?;
        }
        must(blocks == self.lane_blocks, "prefix: the blocks of a lane are miscounted")
    }
}
