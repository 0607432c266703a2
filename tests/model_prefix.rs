//! The prefix index against a naive model: a map from each cached prefix to its ids and the time of
//! its last touch. Small alphabets, so that splits, forks inside a block and shared tails abound.

use std::collections::BTreeMap;

use kvcache::Error;
use kvcache::ids::{BlockId, Namespace, TokenId};
use kvcache::prefix::{Hit, PinId, Position, PrefixIndex};
use proptest::prelude::*;

type Key = (u64, Vec<TokenId>);

struct Entry {
    ids: Vec<BlockId>,
    stamp: u64,
}

/// One map entry a cached block, under its namespace and all tokens up to its end.
struct Model {
    block_tokens: usize,
    capacity: usize,
    entries: BTreeMap<Key, Entry>,
    pins: Vec<(PinId, Key)>,
    clock: u64,
    /// How often anything was taken out.
    removals: u64,
}

impl Model {
    fn cached_blocks(&self, space: u64, tokens: &[TokenId]) -> usize {
        let is = |n: &usize| {
            self.entries.contains_key(&(space, tokens[..n * self.block_tokens].to_vec()))
        };
        (1..=tokens.len() / self.block_tokens).take_while(is).count()
    }

    fn ids(&self, space: u64, tokens: &[TokenId], blocks: usize) -> Vec<BlockId> {
        let entry = |n| &self.entries[&(space, tokens[..n * self.block_tokens].to_vec())];
        (1..=blocks).flat_map(|n| entry(n).ids.clone()).collect()
    }

    fn touch(&mut self, space: u64, tokens: &[TokenId]) {
        self.clock += 1;
        for n in 1..=tokens.len() / self.block_tokens {
            let key = (space, tokens[..n * self.block_tokens].to_vec());
            self.entries.get_mut(&key).expect("touched what is not cached").stamp = self.clock;
        }
    }

    fn is_leaf(&self, key: &Key) -> bool {
        let extends = |k: &Key| k.0 == key.0 && k.1.len() > key.1.len() && k.1.starts_with(&key.1);
        !self.entries.range(key.clone()..).skip(1).take(1).any(|(k, _)| extends(k))
    }

    fn pinned(&self, key: &Key) -> bool {
        self.pins.iter().any(|(_, pin)| pin.0 == key.0 && pin.1.starts_with(&key.1))
    }

    fn oldest_leaf(&self, skip: &[Key]) -> Option<Key> {
        let free = |k: &Key| self.is_leaf(k) && !self.pinned(k) && !skip.contains(k);
        let leaves = self.entries.iter().filter(|(k, _)| free(k));
        leaves.min_by_key(|(_, e)| e.stamp).map(|(k, _)| k.clone())
    }

    fn evict(&mut self, want: usize, evictable: impl Fn(&[BlockId]) -> bool) -> Vec<Vec<BlockId>> {
        let (mut gone, mut vetoed) = (Vec::new(), Vec::new());
        while gone.len() < want {
            let Some(key) = self.oldest_leaf(&vetoed) else { break };
            if evictable(&self.entries[&key].ids) {
                gone.push(self.entries.remove(&key).unwrap().ids);
            } else {
                vetoed.push(key);
            }
        }
        self.removals += u64::from(!gone.is_empty());
        gone
    }
}

#[derive(Debug, Clone)]
enum Op {
    Insert(u64, Vec<TokenId>),
    /// Below the position of an earlier insertion or lookup.
    InsertBelow(usize, Vec<TokenId>),
    Lookup(u64, Vec<TokenId>, usize),
    /// Use the position of an earlier insertion or lookup.
    Lock(usize),
    Touch(usize),
    TouchPinned(usize),
    Unlock(usize),
    /// How many, and which ids are vetoed: those divisible by it.
    Evict(usize, u32),
    Remove(u64, Vec<TokenId>),
    Clear(u64),
}

fn tokens(block_tokens: usize, blocks: usize) -> impl Strategy<Value = Vec<TokenId>> {
    // Mostly zeros: long shared prefixes. Sometimes the extremes of the range.
    let token = prop_oneof![6 => Just(0u32), 3 => 1..3u32, 1 => Just(u32::MAX)];
    prop::collection::vec(token, 0..=block_tokens * blocks)
}

fn op(bt: usize) -> impl Strategy<Value = Op> {
    let space = 0..3u64;
    prop_oneof![
        8 => (space.clone(), tokens(bt, 7)).prop_map(|(s, t)| Op::Insert(s, t)),
        4 => (any::<usize>(), tokens(bt, 4)).prop_map(|(w, t)| Op::InsertBelow(w, t)),
        6 => (space.clone(), tokens(bt, 8), prop_oneof![Just(usize::MAX), 0..20usize])
            .prop_map(|(s, t, max)| Op::Lookup(s, t, max)),
        4 => any::<usize>().prop_map(Op::Lock),
        2 => any::<usize>().prop_map(Op::Touch),
        1 => any::<usize>().prop_map(Op::TouchPinned),
        3 => any::<usize>().prop_map(Op::Unlock),
        4 => (0..6usize, prop_oneof![3 => Just(u32::MAX), 1 => 2..5u32])
            .prop_map(|(n, v)| Op::Evict(n, v)),
        1 => (space.clone(), tokens(bt, 7)).prop_map(|(s, t)| Op::Remove(s, t)),
        (1) => space.prop_map(Op::Clear),
    ]
}

struct Run {
    index: PrefixIndex,
    model: Model,
    groups: usize,
    hit: Hit,
    same: Vec<BlockId>,
    /// Positions with what they stand for and the model's removals when they were made.
    places: Vec<(Position, Key, u64)>,
    stale_pins: Vec<PinId>,
    next_id: u32,
}

impl Run {
    fn new(block_tokens: usize, groups: usize, capacity: u32) -> Self {
        Run {
            index: PrefixIndex::new(block_tokens, groups, capacity).unwrap(),
            model: Model {
                block_tokens,
                capacity: capacity as usize,
                entries: BTreeMap::new(),
                pins: Vec::new(),
                clock: 0,
                removals: 0,
            },
            groups,
            hit: Hit::default(),
            same: Vec::new(),
            places: Vec::new(),
            stale_pins: Vec::new(),
            next_id: 1,
        }
    }

    fn place(&mut self, at: Position, key: Key) {
        assert_eq!(at.blocks() * self.model.block_tokens, key.1.len());
        self.places.push((at, key, self.model.removals));
    }

    fn insert(&mut self, above: Position, (space, prefix): Key, mut tokens: Vec<TokenId>) {
        let bt = self.model.block_tokens;
        tokens.truncate(tokens.len() / bt * bt);
        let (first, blocks) = (prefix.len() / bt, tokens.len() / bt);
        let ids: Vec<BlockId> =
            (0..blocks * self.groups).map(|i| BlockId(self.next_id + i as u32)).collect();
        self.next_id += ids.len() as u32;
        let whole = [&prefix[..], &tokens].concat();
        let (space_, same) = (Namespace(space), &mut self.same);
        let done = match self.index.insert_below(space_, above, &tokens, &ids, same) {
            Ok(done) => done,
            Err(error) => {
                assert_eq!(error, Error::StaleHandle { what: "prefix position" });
                assert!(first > 0, "the empty prefix was refused");
                return;
            }
        };
        // All of `prefix` is cached, or the position would have been refused.
        let there = self.model.cached_blocks(space, &whole);
        assert!(there >= first, "inserted below a prefix that is gone");
        let present = there - first;
        let stored = (blocks - present).min(self.model.capacity - self.model.entries.len());
        assert_eq!((done.present, done.stored), (present, stored));
        assert_eq!(self.same, self.model.ids(space, &whole, there)[first * self.groups..]);
        for n in present..present + stored {
            let ids = ids[n * self.groups..(n + 1) * self.groups].to_vec();
            let key = (space, whole[..(first + n + 1) * bt].to_vec());
            self.model.entries.insert(key, Entry { ids, stamp: 0 });
        }
        let end = whole[..(first + present + stored) * bt].to_vec();
        self.model.touch(space, &end);
        self.place(done.at, (space, end));
    }

    fn lookup(&mut self, space: u64, tokens: &[TokenId], max: usize) {
        let bt = self.model.block_tokens;
        self.index.lookup(Namespace(space), tokens, max, &mut self.hit);
        let tokens = &tokens[..tokens.len().min(max)];
        let blocks = self.model.cached_blocks(space, tokens);
        assert_eq!(self.hit.tokens, blocks * bt);
        assert_eq!(self.hit.blocks, self.model.ids(space, tokens, blocks));
        let (whole, rest) = tokens.split_at(blocks * bt);
        let next =
            |k: &Key| k.0 == space && k.1.len() == whole.len() + bt && k.1.starts_with(whole);
        let common =
            |k: &Key| k.1[whole.len()..].iter().zip(rest).take_while(|(a, b)| a == b).count();
        let candidates = self.model.entries.iter().filter(|(k, _)| next(k));
        let tails: Vec<_> = candidates.map(|(k, e)| (common(k), &e.ids)).collect();
        let best = tails.iter().map(|t| t.0).max().unwrap_or(0);
        assert_eq!(self.hit.tail_tokens, best);
        if best == 0 {
            assert!(self.hit.tail_blocks.is_empty());
        } else {
            assert!(tails.contains(&(best, &self.hit.tail_blocks)));
        }
        self.place(self.hit.at, (space, whole.to_vec()));
    }

    /// A remembered position, and whether the index must and may accept it.
    fn pick(&self, which: usize) -> Option<(Position, Key, bool, bool)> {
        let (at, key, removals) = self.places.get(which.checked_rem(self.places.len())?)?;
        let cached = self.model.cached_blocks(key.0, &key.1) * self.model.block_tokens;
        let may = cached == key.1.len();
        let must = key.1.is_empty() || *removals == self.model.removals;
        Some((*at, key.clone(), must, may))
    }

    fn gone(&mut self, gone: Vec<Vec<BlockId>>, space: u64) {
        let before = self.model.entries.len();
        self.model.entries.retain(|k, e| k.0 != space || !gone.contains(&e.ids));
        assert_eq!(before - self.model.entries.len(), gone.len(), "removed what was not cached");
        self.model.removals += u64::from(!gone.is_empty());
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Insert(space, tokens) => {
                self.insert(Position::default(), (space, Vec::new()), tokens)
            }
            Op::InsertBelow(which, tokens) => {
                let Some((at, key, must, _)) = self.pick(which) else { return };
                let places = self.places.len();
                // A place in the middle of what the position names is one too.
                let blocks = key.1.len() / self.model.block_tokens;
                let blocks = if which.is_multiple_of(3) { blocks / 2 } else { blocks };
                let prefix = key.1[..blocks * self.model.block_tokens].to_vec();
                self.insert(at.first(blocks), (key.0, prefix), tokens);
                assert!(!must || self.places.len() > places, "a good position was refused");
            }
            Op::Lookup(space, tokens, max) => self.lookup(space, &tokens, max),
            Op::Lock(which) => {
                let Some((at, key, must, may)) = self.pick(which) else { return };
                match self.index.lock(at) {
                    Ok(pin) => {
                        assert!(may, "locked a prefix that is gone");
                        self.model.touch(key.0, &key.1);
                        self.model.pins.push((pin, key));
                    }
                    Err(error) => {
                        assert_eq!(error, Error::StaleHandle { what: "prefix position" });
                        assert!(!must, "a good position was refused");
                    }
                }
            }
            Op::Touch(which) => {
                let Some((at, key, must, may)) = self.pick(which) else { return };
                match self.index.touch(at) {
                    Ok(()) => {
                        assert!(may, "touched a prefix that is gone");
                        self.model.touch(key.0, &key.1);
                    }
                    Err(_) => assert!(!must, "a good position was refused"),
                }
            }
            Op::TouchPinned(which) => {
                let n = self.model.pins.len();
                let Some(which) = which.checked_rem(n) else { return };
                let (pin, key) = self.model.pins[which].clone();
                self.index.touch_pinned(pin).unwrap();
                self.model.touch(key.0, &key.1);
            }
            Op::Unlock(which) => {
                for &pin in &self.stale_pins {
                    let stale = Err(Error::StaleHandle { what: "pin" });
                    assert_eq!(
                        (self.index.unlock(pin), self.index.touch_pinned(pin)),
                        (stale, stale)
                    );
                }
                let n = self.model.pins.len();
                let Some(which) = which.checked_rem(n) else { return };
                let (pin, _) = self.model.pins.swap_remove(which);
                self.index.unlock(pin).unwrap();
                self.stale_pins.push(pin);
            }
            Op::Evict(want, veto) => {
                let evictable = |ids: &[BlockId]| !ids[0].0.is_multiple_of(veto);
                let mut gone = Vec::new();
                let n =
                    self.index.evict(want, &mut { evictable }, &mut |ids| gone.push(ids.to_vec()));
                assert_eq!(n, gone.len());
                assert_eq!(gone, self.model.evict(want, evictable), "not the LRU order of leaves");
            }
            Op::Remove(space, mut tokens) => {
                let bt = self.model.block_tokens;
                tokens.truncate(tokens.len() / bt * bt);
                let mut want = Vec::new();
                if self.model.cached_blocks(space, &tokens) * bt == tokens.len() {
                    let mut left = tokens.clone();
                    while !left.is_empty() {
                        let key = (space, left.clone());
                        // What hung below it went in the earlier rounds.
                        let others = self.model.entries.keys().any(|k| {
                            let beside = k.1.len() > left.len() && !tokens.starts_with(&k.1);
                            k.0 == space
                                && k.1.starts_with(&left)
                                && (beside || k.1.len() > tokens.len())
                        });
                        if others || self.model.pinned(&key) {
                            break;
                        }
                        want.push(self.model.entries[&key].ids.clone());
                        left.truncate(left.len() - bt);
                    }
                }
                let mut gone = Vec::new();
                let n = self
                    .index
                    .remove(Namespace(space), &tokens, &mut |ids| gone.push(ids.to_vec()))
                    .unwrap();
                assert_eq!((n, &gone), (want.len(), &want));
                self.gone(gone, space);
            }
            Op::Clear(space) => {
                let kept = |k: &Key| k.0 != space || self.model.pinned(k);
                let want = self.model.entries.keys().filter(|k| !kept(k)).count();
                let keep: Vec<_> = self.model.entries.iter().filter(|(k, _)| kept(k)).collect();
                let keep: Vec<_> = keep.iter().map(|(_, e)| e.ids.clone()).collect();
                let mut gone = Vec::new();
                let n = self.index.clear(Namespace(space), &mut |ids| gone.push(ids.to_vec()));
                assert_eq!((n, gone.len()), (want, want));
                assert!(gone.iter().all(|ids| !keep.contains(ids)), "cleared what is pinned");
                self.gone(gone, space);
            }
        }
    }

    fn check(&self) {
        self.index.audit().unwrap();
        let spaces: std::collections::BTreeSet<_> =
            self.model.entries.keys().map(|k| k.0).collect();
        let stats = self.index.stats();
        assert_eq!(stats.blocks, self.model.entries.len());
        assert_eq!(stats.namespaces, spaces.len());
        assert_eq!(stats.pins, self.model.pins.len());
        assert_eq!(self.index.free_blocks(), self.model.capacity - stats.blocks);
        let mut seen = Vec::new();
        self.index.for_each_block(&mut |ids| seen.push(ids.to_vec()));
        let mut want: Vec<_> = self.model.entries.values().map(|e| e.ids.clone()).collect();
        seen.sort_unstable();
        want.sort_unstable();
        assert_eq!(seen, want);
    }
}

fn case() -> impl Strategy<Value = (usize, usize, u32, Vec<Op>)> {
    let shape = (prop::sample::select(vec![1usize, 2, 4]), 1..3usize, 1..60u32);
    shape.prop_flat_map(|(bt, groups, capacity)| {
        let ops = prop::collection::vec(op(bt), 1..250);
        (Just(bt), Just(groups), Just(capacity), ops)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_index_is_the_model((bt, groups, capacity, ops) in case()) {
        let mut run = Run::new(bt, groups, capacity);
        for op in ops {
            run.step(op);
            run.check();
        }
        // Everything can be taken out again.
        while let Some((pin, _)) = run.model.pins.pop() {
            run.index.unlock(pin).unwrap();
        }
        run.step(Op::Evict(usize::MAX, u32::MAX));
        run.check();
        prop_assert_eq!(run.index.len_blocks(), 0);
        prop_assert_eq!(run.index.stats().nodes, 0);
    }
}
