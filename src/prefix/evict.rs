//! Taking blocks out: by the order of eviction, one sequence, a whole namespace. Always leaves first, from the last
//! block of an edge up, so that what remains is a prefix of what was.

use super::blocks::Run;
use super::tree::{Kind, Node};
use super::{NIL, PrefixIndex};
use crate::error::{Error, Result};
use crate::ids::{BlockId, Namespace, TokenId};

impl PrefixIndex {
    /// Evicts up to `want_blocks` block entries, leaves first, in the order of the [`Eviction`] that
    /// was chosen, after priorities and hints; returns how many.
    ///
    /// [`Eviction`]: super::Eviction
    ///
    /// `evictable` sees the ids of an entry (one per group) and may veto; then that entry and all
    /// that it hangs below stay for this call. Vetoes cost time in each call: pin what is known to
    /// be in use. `evicted` is told each entry that goes; the caller gives up its references.
    pub fn evict(
        &mut self,
        want_blocks: usize,
        evictable: &mut dyn FnMut(&[BlockId]) -> bool,
        evicted: &mut dyn FnMut(&[BlockId]),
    ) -> usize {
        let mut done = 0;
        while done < want_blocks {
            let Some((lane, leaf)) = self.next_leaf() else {
                break;
            };
            let Node { start, len, order, .. } = self.tree[leaf];
            // With two lanes each block that goes may change the lane to take from.
            let whole = if self.policy.two_lanes() { 1 } else { len as usize };
            let most = usize::min(whole, want_blocks - done) as u32;
            let mut gone = 0;
            while gone < most {
                let block = Run { start: start + len - 1 - gone, len: 1 };
                let ids = self.blocks.ids(block);
                if !evictable(ids) {
                    break;
                }
                evicted(ids);
                if self.policy.remembers() {
                    self.policy.get_mut().evicted(order, self.blocks.tokens(block));
                }
                gone += 1;
            }
            done += gone as usize;
            if gone == len {
                self.queues[lane].drop_top();
            } else if gone < most {
                self.queues[lane].set_top_aside();
            }
            self.cut_leaf(leaf, gone);
        }
        self.queues.iter_mut().for_each(|queue| queue.restore());
        done
    }

    /// Takes the last `blocks` blocks off a leaf, and the leaf out of the tree if none remain.
    fn cut_leaf(&mut self, leaf: u32, blocks: u32) {
        if blocks == 0 {
            return;
        }
        let node = &mut self.tree[leaf];
        node.len -= blocks;
        node.end -= blocks;
        // Other blocks may take their place in this edge: positions here end.
        node.generation = node.generation.wrapping_add(1);
        let (start, len, stamp) = (node.start, node.len, node.stamp);
        self.lane_blocks[self.policy.lane(node.order)] -= u64::from(blocks);
        self.unplace(Run { start: start + len, len: blocks });
        self.blocks.give(Run { start: start + len, len: blocks });
        if len > 0 {
            return;
        }
        let owner = self.tree.remove_leaf(leaf);
        if self.tree[owner].kind == Kind::Edge {
            if !self.notes_every_edge() {
                let node = &mut self.tree[owner];
                node.stamp = node.stamp.max(stamp);
            }
            self.queue_if_leaf(owner);
        } else if self.tree[owner].child == NIL {
            self.tree.remove_root(owner);
        }
    }

    /// Takes a whole leaf out and reports its entries from the last to the first.
    fn drop_leaf(&mut self, leaf: u32, evicted: &mut dyn FnMut(&[BlockId])) -> usize {
        let (start, len) = (self.tree[leaf].start, self.tree[leaf].len);
        for slot in (start..start + len).rev() {
            evicted(self.blocks.ids(Run { start: slot, len: 1 }));
        }
        self.cut_leaf(leaf, len);
        len as usize
    }

    /// Removes the cached sequence `tokens` (whole blocks) of `space`, from its last block up to
    /// the first one that another cached sequence shares or a pin protects; returns how many block
    /// entries went. Nothing goes if a longer sequence goes on from it, or it is not cached whole.
    ///
    /// # Errors
    /// `InvalidArgument` if `tokens` are not whole blocks. Nothing changed then.
    pub fn remove(
        &mut self,
        space: Namespace,
        tokens: &[TokenId],
        evicted: &mut dyn FnMut(&[BlockId]),
    ) -> Result<usize> {
        let block_tokens = self.blocks.block_tokens;
        if !tokens.len().is_multiple_of(block_tokens) {
            return Err(Error::invalid("tokens", "must be whole blocks"));
        }
        let walk = self.walk(self.root(space), tokens, None);
        let whole = walk.depth as usize == tokens.len() / block_tokens;
        if !whole || walk.depth == 0 || walk.inside < self.tree[walk.node].len {
            return Ok(0);
        }
        let (mut node, mut done) = (walk.node, 0);
        loop {
            let edge = &self.tree[node];
            if edge.kind != Kind::Edge || edge.child != NIL || edge.pins > 0 {
                return Ok(done);
            }
            let owner = self.tree.owner(node);
            let last = self.tree[owner].kind == Kind::Root;
            done += self.drop_leaf(node, evicted);
            if last {
                return Ok(done);
            }
            node = owner;
        }
    }

    /// Removes everything of `space` that no pin protects; returns how many block entries went.
    pub fn clear(&mut self, space: Namespace, evicted: &mut dyn FnMut(&[BlockId])) -> usize {
        let Some(root) = self.tree.root(space) else {
            return 0;
        };
        // Children before parents, by the links alone; `up`: all below `node` is done.
        let (mut node, mut up, mut done) = (self.tree[root].child, false, 0);
        while node != root {
            while !up && self.tree[node].child != NIL {
                node = self.tree[node].child;
            }
            let next = self.after(node);
            let edge = &self.tree[node];
            if edge.child == NIL && edge.pins == 0 {
                done += self.drop_leaf(node, evicted);
            }
            (node, up) = next;
        }
        done
    }

    /// A walk by the links alone: where to go on when all at and below `node` is done. A sibling to
    /// descend from (false), or the root or edge above (true). Removing `node` leaves both in place:
    /// all that can go with it is the fork that it hung on, which is neither.
    pub(super) fn after(&self, mut node: u32) -> (u32, bool) {
        loop {
            if self.tree[node].next != NIL {
                return (self.tree[node].next, false);
            }
            node = self.tree[node].parent;
            if self.tree[node].kind != Kind::Fork {
                return (node, true);
            }
        }
    }
}
