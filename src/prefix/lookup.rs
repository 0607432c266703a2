//! Matching: from tokens to the blocks that hold them. Writes nothing.

use alloc::vec::Vec;

use super::blocks::Run;
use super::compare::common_prefix;
use super::tree::Kind;
use super::{NIL, Position, PrefixIndex};
use crate::ids::{BlockId, Namespace, TokenId};

/// What a lookup found. Reuse one: its buffers keep their memory.
#[derive(Debug, Clone, Default)]
pub struct Hit {
    /// Tokens covered by whole blocks.
    pub tokens: usize,
    /// Their ids, `[block][group]`.
    pub blocks: Vec<BlockId>,
    /// How many tokens after those agree with one more cached block: fewer than a block has, and
    /// the most that any block here offers. 0 if none.
    pub tail_tokens: usize,
    /// The ids of that block, one per group; empty if `tail_tokens` is 0. It is for copying from,
    /// and nothing but the caller's own reference keeps it from being evicted meanwhile.
    pub tail_blocks: Vec<BlockId>,
    /// The end of the whole blocks, for [`PrefixIndex::lock`] and [`PrefixIndex::touch`].
    pub at: Position,
}

impl Hit {
    /// Forgets the last result, keeps the memory.
    pub fn clear(&mut self) {
        (self.tokens, self.tail_tokens, self.at) = (0, 0, Position::default());
        self.blocks.clear();
        self.tail_blocks.clear();
    }
}

/// Where a walk along the tree ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Walk {
    /// The root or edge in or at whose end the matched blocks end; `NIL` without a root.
    pub node: u32,
    /// Blocks matched of that edge.
    pub inside: u32,
    /// Blocks matched from the root.
    pub depth: u32,
    /// A node whose (first) block agrees with the next tokens of the query longest: `node` itself
    /// if the walk ended inside it, else an edge or fork below it, `NIL` if there is none.
    pub near: u32,
    /// For how many tokens it does.
    pub common: u32,
    /// The buffer could not grow; the walk ended early.
    pub out_of_memory: bool,
}

impl PrefixIndex {
    /// Finds the longest cached prefix of the first `max_tokens` of `tokens` in `space` that every
    /// layer group can serve.
    ///
    /// Give `tokens.len() - 1` as the maximum to leave the last token to be computed, as sampling
    /// needs its logits. If memory for `hit.blocks` is refused, the hit is shorter than it could
    /// be, but true.
    pub fn lookup(&self, space: Namespace, tokens: &[TokenId], max_tokens: usize, hit: &mut Hit) {
        hit.clear();
        let tokens = &tokens[..tokens.len().min(max_tokens)];
        let root = self.root(space);
        if !self.may_begin(&root, tokens) {
            return;
        }
        let walk = self.walk(root, tokens, Some(&mut hit.blocks));
        let served = self.served(&hit.blocks, walk.depth as usize);
        hit.blocks.truncate(served * self.blocks.groups);
        hit.tokens = served * self.blocks.block_tokens;
        hit.at = self.position(&walk).first(served);
        if served < walk.depth as usize
            || walk.common == 0
            || hit.tail_blocks.try_reserve(self.blocks.groups).is_err()
        {
            return;
        }
        let edge = &self.tree[walk.near];
        let inside = if walk.near == walk.node { walk.inside } else { 0 };
        let block = self.blocks.ids(Run { start: edge.start + inside, len: 1 });
        if self.windows.is_none() || !block.contains(&BlockId::NONE) {
            hit.tail_tokens = walk.common as usize;
            hit.tail_blocks.extend_from_slice(block);
        }
    }

    /// Where the longest cached prefix of `tokens` ends, whether every group can serve it or not.
    pub fn end_of(&self, space: Namespace, tokens: &[TokenId]) -> Position {
        self.position(&self.walk(self.root(space), tokens, None))
    }

    /// The position at which a walk ended.
    pub(super) fn position(&self, walk: &Walk) -> Position {
        if walk.depth == 0 {
            return Position::default();
        }
        let generation = self.tree[walk.node].generation;
        Position { node: walk.node, generation, blocks: walk.depth }
    }

    /// Where every walk in `space` begins.
    pub(super) fn root(&self, space: Namespace) -> Walk {
        let node = self.tree.root(space).unwrap_or(NIL);
        Walk { node, inside: 0, depth: 0, near: NIL, common: 0, out_of_memory: false }
    }

    /// Whether anything at `root` may begin like `query`: false for most misses, which differ in
    /// the first token, and so spares them the walk.
    #[inline]
    fn may_begin(&self, root: &Walk, query: &[TokenId]) -> bool {
        let Some(&first) = query.first() else { return false };
        let child = if root.node == NIL { NIL } else { self.tree[root.node].child };
        if child == NIL {
            return false;
        }
        let node = &self.tree[child];
        node.kind != Kind::Fork || node.start != 0 || self.tree.branch(child, first).is_some()
    }

    /// Follows `query` from the end of `from` as far as it is cached and appends the ids of the
    /// blocks it passes to `ids`, if wanted.
    pub(super) fn walk(
        &self,
        from: Walk,
        query: &[TokenId],
        mut ids: Option<&mut Vec<BlockId>>,
    ) -> Walk {
        let mut walk = from;
        if walk.node == NIL {
            return walk;
        }
        let block_tokens = self.blocks.block_tokens;
        let mut rest = query;
        while !rest.is_empty() {
            // What is left of the edge where the walk stands, else down the forks to the edge that
            // agrees longest; exact, see `tree`.
            let stands = &self.tree[walk.node];
            let inside = if walk.inside < stands.len { walk.inside } else { 0 };
            let mut below = if walk.inside < stands.len { walk.node } else { stands.child };
            if below == NIL {
                break;
            }
            while self.tree[below].kind == Kind::Fork {
                let at = self.tree[below].start as usize;
                let branch = rest.get(at).and_then(|&token| self.tree.branch(below, token));
                match branch {
                    Some(child) => below = child,
                    None if at == 0 => {
                        walk.near = below;
                        return walk;
                    }
                    None => below = self.tree.some_edge(below),
                }
            }
            let edge = &self.tree[below];
            let run = Run { start: edge.start + inside, len: edge.len - inside };
            let common = common_prefix(self.blocks.tokens(run), rest);
            let whole = common / block_tokens;
            walk.near = below;
            walk.common = (common % block_tokens) as u32;
            if whole == 0 {
                return walk;
            }
            if let Some(ids) = &mut ids {
                if ids.try_reserve(whole * self.blocks.groups).is_err() {
                    (walk.common, walk.out_of_memory) = (0, true);
                    return walk;
                }
                let passed = Run { start: run.start, len: whole as u32 };
                ids.extend_from_slice(self.blocks.ids(passed));
            }
            walk.node = below;
            walk.inside = inside + whole as u32;
            walk.depth += whole as u32;
            if walk.inside < edge.len {
                return walk;
            }
            walk.near = NIL;
            rest = &rest[whole * block_tokens..];
        }
        walk
    }
}
