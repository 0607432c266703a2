//! An index whose layer groups have windows against the plainest model: a map from prefixes to ids.
//! A hit is the longest prefix for which every group has the blocks that its window reaches.

use std::collections::BTreeMap;

use kvcache::ids::{BlockId, Namespace, TokenId};
use kvcache::prefix::{Hit, Position, PrefixIndex, first_visible_block};
use proptest::prelude::*;

const BLOCK: usize = 4;
const SPACE: Namespace = Namespace(9);

#[derive(Debug, Clone)]
enum Op {
    /// Insert tokens, with the ids of some groups missing where they may.
    Insert(Vec<TokenId>, u8),
    /// Insert below the end of an earlier insertion or hit.
    Below(usize, Vec<TokenId>),
    Lookup(Vec<TokenId>, usize),
    /// Forget the nth id of a group.
    Forget(usize, usize),
    Evict(usize),
    Remove(Vec<TokenId>),
}

fn tokens(blocks: usize) -> impl Strategy<Value = Vec<TokenId>> {
    // Whole blocks of one token each, and few tokens: prompts share beginnings and fork.
    prop::collection::vec(0u32..3, 0..=blocks)
        .prop_map(|list| list.iter().flat_map(|&token| [7, 7, 7, token]).collect())
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (tokens(9), any::<u8>()).prop_map(|(t, holes)| Op::Insert(t, holes)),
        2 => (any::<usize>(), tokens(4)).prop_map(|(at, t)| Op::Below(at, t)),
        4 => (tokens(9), 0usize..40).prop_map(|(t, max)| Op::Lookup(t, max)),
        4 => (0usize..3, any::<usize>()).prop_map(|(group, nth)| Op::Forget(group, nth)),
        1 => (1usize..8).prop_map(Op::Evict),
        1 => tokens(5).prop_map(Op::Remove),
    ]
}

struct Bed {
    index: PrefixIndex,
    windows: Vec<Option<u32>>,
    /// Prefixes of whole blocks to the ids of their last block.
    entries: BTreeMap<Vec<TokenId>, Vec<BlockId>>,
    next: u32,
    places: Vec<(Position, Vec<TokenId>)>,
}

impl Bed {
    fn new(windows: Vec<Option<u32>>, capacity: u32) -> Self {
        let mut index = PrefixIndex::new(BLOCK, windows.len(), capacity).unwrap();
        index.set_windows(&windows).unwrap();
        Bed { index, windows, entries: BTreeMap::new(), next: 0, places: Vec::new() }
    }

    /// Blocks of `tokens` that are cached, served or not.
    fn depth(&self, tokens: &[TokenId]) -> usize {
        let whole = 1..=tokens.len() / BLOCK;
        whole.take_while(|n| self.entries.contains_key(&tokens[..n * BLOCK])).count()
    }

    fn served(&self, tokens: &[TokenId]) -> usize {
        let has = |block: usize, group: usize| {
            self.entries[&tokens[..(block + 1) * BLOCK]][group] != BlockId::NONE
        };
        let serves = |n: usize| {
            self.windows.iter().enumerate().all(|(group, window)| {
                let first = window.map_or(0, |w| first_visible_block(n * BLOCK, w, BLOCK));
                (first..n).all(|block| has(block, group))
            })
        };
        (0..=self.depth(tokens)).rev().find(|&n| serves(n)).unwrap()
    }

    fn insert(&mut self, above: Position, before: &[TokenId], tokens: &[TokenId], holes: u8) {
        let (groups, count) = (self.windows.len(), tokens.len() / BLOCK);
        let mut ids = Vec::new();
        for at in 0..count * groups {
            self.next += 1;
            let windowed = self.windows[at % groups].is_some();
            let hole = windowed && holes >> (at % 8) & 1 == 1;
            ids.push(if hole { BlockId::NONE } else { BlockId(self.next) });
        }
        let whole = [before, tokens].concat();
        let (from, mut known) = (before.len() / BLOCK, Vec::new());
        let done = self.index.insert_below(SPACE, above, tokens, &ids, &mut known).unwrap();
        assert_eq!(from + done.present, self.depth(&whole));
        assert_eq!(known.len(), done.present * groups);
        for block in from..from + done.present + done.stored {
            let given = &ids[(block - from) * groups..][..groups];
            let entry = self.entries.entry(whole[..(block + 1) * BLOCK].to_vec());
            let entry = entry.or_insert_with(|| vec![BlockId::NONE; groups]);
            for (id, &given) in entry.iter_mut().zip(given) {
                if *id == BlockId::NONE {
                    *id = given;
                }
            }
            if block - from < done.present {
                assert_eq!(&known[(block - from) * groups..][..groups], &entry[..]);
            }
        }
        let end = (from + done.present + done.stored) * BLOCK;
        self.places.push((done.at, whole[..end].to_vec()));
    }

    /// Entries went, leaves first; which, the index itself says, for entries may have equal ids.
    fn gone(&mut self, mut gone: Vec<Vec<BlockId>>) {
        let index = &self.index;
        let is_cached =
            |prefix: &[TokenId]| index.end_of(SPACE, prefix).blocks() * BLOCK == prefix.len();
        let mut went = Vec::new();
        self.entries.retain(|prefix, ids| {
            let stays = is_cached(prefix);
            if !stays {
                went.push(ids.clone());
            }
            stays
        });
        gone.sort();
        went.sort();
        assert_eq!(gone, went);
        let parents = self.entries.keys().filter(|prefix| prefix.len() > BLOCK);
        let mut parents = parents.map(|prefix| &prefix[..prefix.len() - BLOCK]);
        assert!(parents.all(|parent| self.entries.contains_key(parent)));
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Insert(tokens, holes) => self.insert(Position::default(), &[], &tokens, holes),
            Op::Below(which, tokens) => {
                let Some(at) = which.checked_rem(self.places.len()) else { return };
                let (position, before) = self.places[at].clone();
                if self.index.is_cached(position) {
                    self.insert(position, &before, &tokens, 0);
                }
            }
            Op::Lookup(tokens, max) => {
                let mut hit = Hit::default();
                self.index.lookup(SPACE, &tokens, max, &mut hit);
                let asked = &tokens[..max.min(tokens.len())];
                let served = self.served(asked);
                assert_eq!((hit.tokens, hit.at.blocks()), (served * BLOCK, served));
                let ids = (1..=served).flat_map(|n| self.entries[&tokens[..n * BLOCK]].clone());
                assert!(hit.blocks.iter().copied().eq(ids));
                assert!(hit.tail_blocks.iter().all(|&id| id != BlockId::NONE));
                if served < self.depth(asked) {
                    assert_eq!(hit.tail_tokens, 0);
                }
                self.places.push((hit.at, tokens[..hit.tokens].to_vec()));
            }
            Op::Forget(group, nth) => {
                let group = group % self.windows.len();
                let held = |(p, ids): (&Vec<TokenId>, &Vec<BlockId>)| {
                    (ids[group] != BlockId::NONE).then(|| (p.clone(), ids[group]))
                };
                let held: Vec<_> = self.entries.iter().filter_map(held).collect();
                let Some(at) = nth.checked_rem(held.len()) else { return };
                let (prefix, id) = held[at].clone();
                let windowed = self.windows[group].is_some();
                assert_eq!(self.index.forget(group, id), windowed);
                if windowed {
                    self.entries.get_mut(&prefix).unwrap()[group] = BlockId::NONE;
                    assert!(!self.index.forget(group, id));
                }
            }
            Op::Evict(want) => {
                let mut gone = Vec::new();
                self.index.evict(want, &mut |_| true, &mut |ids| gone.push(ids.to_vec()));
                self.gone(gone);
            }
            Op::Remove(tokens) => {
                let mut gone = Vec::new();
                let mut see = |ids: &[BlockId]| gone.push(ids.to_vec());
                self.index.remove(SPACE, &tokens, &mut see).unwrap();
                // From the last block up, so each is the deepest of its prefix.
                for (n, ids) in gone.iter().enumerate() {
                    let prefix = &tokens[..tokens.len() - n * BLOCK];
                    assert_eq!(self.entries.remove(prefix).as_ref(), Some(ids));
                }
            }
        }
        self.index.audit().unwrap();
        assert_eq!(self.index.len_blocks(), self.entries.len());
        for (prefix, ids) in &self.entries {
            let at = self.index.end_of(SPACE, prefix);
            assert_eq!(at.blocks() * BLOCK, prefix.len(), "{ids:?}");
        }
    }
}

fn windows() -> impl Strategy<Value = Vec<Option<u32>>> {
    let window = prop_oneof![Just(None), (1u32..20).prop_map(Some), Just(Some(u32::MAX))];
    prop::collection::vec(window, 1..=3)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases))]
    #[test]
    fn a_hit_is_what_every_group_can_serve(
        windows in windows(), capacity in 4u32..40, ops in prop::collection::vec(op(), 1..60)
    ) {
        let mut bed = Bed::new(windows, capacity);
        for op in ops {
            bed.step(op);
        }
    }
}

#[test]
fn bad_windows_are_refused() {
    let mut index = PrefixIndex::new(BLOCK, 2, 8).unwrap();
    for bad in [&[None][..], &[None, Some(0)], &[None; 3]] {
        assert!(index.set_windows(bad).is_err());
    }
    index.set_windows(&[None, Some(3)]).unwrap();
    assert!(index.start_mirror().is_err());
    let mut same = Vec::new();
    let mut insert = |ids: [u32; 2]| {
        index.insert(SPACE, &[1, 2, 3, 4], &ids.map(BlockId), &mut same).map(|done| done.stored)
    };
    // Only a group with a window may lack a block.
    assert!(insert([u32::MAX, 5]).is_err());
    assert_eq!(insert([5, u32::MAX]), Ok(1));
    assert!(index.set_windows(&[None, None]).is_err());
    assert!(!index.forget(0, BlockId(5)) && !index.forget(1, BlockId::NONE));
    assert!(!index.forget(7, BlockId(5)));
    // More groups than a model has.
    let mut wide = PrefixIndex::new(BLOCK, 17, 8).unwrap();
    assert!(wide.set_windows(&[None; 17]).is_err());
}
