//! A walk over everything cached, parents before children: for whoever shows the index's content
//! to the outside.

use super::blocks::Run;
use super::tree::Kind;
use super::{NIL, PrefixIndex};
use crate::ids::{BlockId, Namespace, TokenId};

/// Cached blocks that follow each other, as [`PrefixIndex::for_each_chain`] shows them.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a> {
    /// Where they are cached.
    pub space: Namespace,
    /// The ids of the block before the first, one per group; empty at the start of a sequence.
    pub above: &'a [BlockId],
    /// Tokens of the blocks.
    pub tokens: &'a [TokenId],
    /// Ids of the blocks, `[block][group]`.
    pub blocks: &'a [BlockId],
}

impl PrefixIndex {
    /// Whether anything is cached in a namespace.
    pub fn has_namespace(&self, space: Namespace) -> bool {
        self.tree.root(space).is_some()
    }

    /// Shows all that is cached as chains of whole blocks. What a chain follows was shown before
    /// it, and a chain that nothing branches off comes right before the one that continues it.
    pub fn for_each_chain<'a>(&'a self, see: &mut dyn FnMut(Chain<'a>)) {
        let tree = &self.tree;
        for root in tree.spaces.nodes() {
            let space = Namespace(tree[root].stamp);
            let mut node = root;
            loop {
                if tree[node].child != NIL {
                    node = tree[node].child;
                } else {
                    while node != root && tree[node].next == NIL {
                        node = tree[node].parent;
                    }
                    if node == root {
                        break;
                    }
                    node = tree[node].next;
                }
                let edge = &tree[node];
                if edge.kind != Kind::Edge {
                    continue;
                }
                let owner = &tree[tree.owner(node)];
                let above = match owner.kind {
                    Kind::Edge => Run { start: owner.start + owner.len - 1, len: 1 },
                    _ => Run { start: 0, len: 0 },
                };
                let run = Run { start: edge.start, len: edge.len };
                see(Chain {
                    space,
                    above: self.blocks.ids(above),
                    tokens: self.blocks.tokens(run),
                    blocks: self.blocks.ids(run),
                });
            }
        }
    }
}
