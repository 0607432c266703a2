//! Every eviction policy, priorities, hints and time against a naive model: a map from each cached
//! prefix to what is known of its last block, searched whole for the next one to go. Where several
//! blocks are equally next, the index may take any of them.

use std::collections::BTreeMap;

use kvcache::ids::{BlockId, Namespace, TokenId};
use kvcache::prefix::{
    DEFAULT_PRIORITY, Eviction, Hint, Hit, PinId, Position, PrefixIndex, Retention,
};
use proptest::prelude::*;

const SPACE: Namespace = Namespace(7);
const ALL: [Eviction; 5] =
    [Eviction::Lru, Eviction::Lfu, Eviction::Fifo, Eviction::Slru, Eviction::S3Fifo];

#[derive(Debug, Clone, PartialEq)]
struct Block {
    id: BlockId,
    /// Last use, and for SLRU and S3-FIFO the place in the lane.
    stamp: u64,
    place: u64,
    stored: u64,
    uses: u64,
    lane: usize,
    priority: u8,
    duration: Option<u32>,
    hint: Hint,
}

/// Class, then rank, then order.
type Rank = (u32, u64, u64);
type Prefix = Vec<TokenId>;

struct Model {
    eviction: Eviction,
    block_tokens: usize,
    capacity: usize,
    blocks: BTreeMap<Prefix, Block>,
    pins: Vec<(PinId, Prefix)>,
    now: u64,
    clock: u64,
    /// S3-FIFO's memory of what went, as that file says: a table by fingerprint.
    ghost: BTreeMap<u32, (u32, u64)>,
    left: u64,
    /// Whether an order was met that the index may resolve otherwise.
    ambiguous: bool,
}

fn fingerprint(tokens: &[TokenId]) -> u32 {
    let mut hash = tokens.len() as u64;
    for &token in tokens.iter().rev().step_by(tokens.len().div_ceil(16)) {
        hash = (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
    }
    (hash >> 32) as u32 | 1
}

impl Model {
    fn tick(&mut self) -> u64 {
        self.clock = u64::max(self.clock + 1, (self.now << 16) + 1);
        self.clock
    }

    fn present(&self, tokens: &[TokenId]) -> usize {
        let cached = |n: &usize| self.blocks.contains_key(&tokens[..n * self.block_tokens]);
        (1..=tokens.len() / self.block_tokens).take_while(cached).count()
    }

    fn path(&self, tokens: &[TokenId]) -> impl Iterator<Item = (usize, Prefix)> + use<> {
        let (bt, tokens) = (self.block_tokens, tokens.to_vec());
        (1..=tokens.len() / bt).map(move |n| (n - 1, tokens[..n * bt].to_vec()))
    }

    fn children(&self, prefix: &Prefix) -> usize {
        let longer = |k: &Prefix| k.len() == prefix.len() + self.block_tokens;
        let below = self.blocks.range(prefix.clone()..).take_while(|(k, _)| k.starts_with(prefix));
        below.filter(|(k, _)| longer(k)).count()
    }

    fn held(&self, prefix: &Prefix) -> bool {
        self.pins.iter().any(|(_, pin)| pin.starts_with(prefix))
    }

    fn deadline(&self, block: &Block) -> Option<u64> {
        match block.hint {
            Hint::ExpectedAt { ms } => Some(ms),
            _ => block.duration.map(|ms| (block.stamp >> 16) + u64::from(ms)),
        }
    }

    fn expire(&mut self, prefix: &Prefix) {
        let block = &self.blocks[prefix];
        let Some(deadline) = self.deadline(block).filter(|&ms| ms <= self.now) else { return };
        let block = self.blocks.get_mut(prefix).unwrap();
        match block.hint {
            Hint::ExpectedAt { .. } => block.hint = Hint::None,
            _ => block.priority = DEFAULT_PRIORITY,
        }
        block.duration = None;
        block.stamp = block.stamp.max(deadline << 16);
        if self.eviction == Eviction::Slru {
            block.place = block.stamp;
        }
    }

    /// Ends what nobody holds.
    fn expire_free(&mut self) {
        for prefix in self.blocks.keys().cloned().collect::<Vec<_>>() {
            if !self.held(&prefix) {
                self.expire(&prefix);
            }
        }
    }

    fn touch(&mut self, tokens: &[TokenId], above: usize) {
        let now = self.tick();
        for (n, prefix) in self.path(tokens) {
            self.expire(&prefix);
            let block = self.blocks.get_mut(&prefix).unwrap();
            block.stamp = now;
            if n >= above {
                (block.hint, block.duration) = (Hint::None, None);
                block.uses += 1;
                match self.eviction {
                    Eviction::Slru => (block.lane, block.place) = (1, now),
                    Eviction::S3Fifo => block.uses = block.uses.min(3),
                    _ => {}
                }
            }
        }
    }

    fn refresh(&mut self, tokens: &[TokenId], held: bool) {
        let now = self.tick();
        for (_, prefix) in self.path(tokens) {
            if !held {
                self.expire(&prefix);
            }
            let block = self.blocks.get_mut(&prefix).unwrap();
            block.stamp = now;
            if self.eviction == Eviction::Slru {
                block.place = now;
            }
        }
    }

    fn insert(&mut self, tokens: &[TokenId], above: usize, ids: &[BlockId]) -> (usize, usize) {
        let bt = self.block_tokens;
        let blocks = tokens.len() / bt;
        let present = self.present(tokens);
        let stored = (blocks - present).min(self.capacity - self.blocks.len());
        self.touch(&tokens[..present * bt], above);
        if stored > 0 {
            let now = self.tick();
            let first = fingerprint(&tokens[present * bt..(present + 1) * bt]);
            let places = self.capacity.next_power_of_two() as u32;
            let memory = (self.capacity - self.capacity / 10) as u64;
            let remembered = self.ghost.get(&(first >> 1 & (places - 1)));
            let again = remembered.is_some_and(|&(f, at)| f == first && self.left - at <= memory);
            let main = self.eviction == Eviction::S3Fifo && again;
            for n in present..present + stored {
                let block = Block {
                    id: ids[n - above],
                    stamp: now,
                    place: now,
                    stored: now,
                    uses: u64::from(self.eviction != Eviction::S3Fifo),
                    lane: usize::from(main),
                    priority: DEFAULT_PRIORITY,
                    duration: None,
                    hint: Hint::None,
                };
                self.blocks.insert(tokens[..(n + 1) * bt].to_vec(), block);
            }
        }
        (present, stored)
    }

    fn rank(&self, block: &Block) -> Rank {
        let class = match block.hint {
            Hint::SessionEnded => 0,
            Hint::Waited => 2000,
            Hint::ExpectedAt { ms } if block.priority <= DEFAULT_PRIORITY => {
                return (10 * u32::from(DEFAULT_PRIORITY) + 6, 0, u64::MAX - ms);
            }
            _ => 10 * u32::from(block.priority) + 5,
        };
        match self.eviction {
            Eviction::Lru => (class, 0, block.stamp),
            Eviction::Lfu => (class, block.uses, block.stamp),
            Eviction::Fifo => (class, 0, block.stored),
            Eviction::Slru | Eviction::S3Fifo => (class, 0, block.place),
        }
    }

    /// The leaves of a lane that go first.
    fn first(&self, lane: usize, vetoed: &[Prefix]) -> (Option<Rank>, Vec<Prefix>) {
        let free = |(prefix, block): &(&Prefix, &Block)| {
            block.lane == lane
                && self.children(prefix) == 0
                && !self.held(prefix)
                && !vetoed.contains(prefix)
        };
        let leaves: Vec<_> = self.blocks.iter().filter(free).collect();
        let rank = leaves.iter().map(|(_, block)| self.rank(block)).min();
        let first = leaves.iter().filter(|(_, block)| Some(self.rank(block)) == rank);
        (rank, first.map(|(prefix, _)| (*prefix).clone()).collect())
    }

    /// Those of which one is next.
    fn next(&mut self, vetoed: &[Prefix]) -> Vec<Prefix> {
        if !matches!(self.eviction, Eviction::Slru | Eviction::S3Fifo) {
            return self.first(0, vetoed).1;
        }
        loop {
            let ((low, probation), (high, main)) = (self.first(0, vetoed), self.first(1, vetoed));
            let blocks = |lane| self.blocks.values().filter(|b| b.lane == lane).count();
            let lane = match (low.map(|r| r.0), high.map(|r| r.0)) {
                (None, None) => return Vec::new(),
                (Some(_), None) => 0,
                (None, Some(_)) => 1,
                (Some(a), Some(b)) if a != b => usize::from(b < a),
                _ if self.eviction == Eviction::Slru => {
                    usize::from(blocks(1) * 5 > self.capacity * 4)
                }
                _ => usize::from(blocks(0) * 10 < self.capacity),
            };
            let leaves = if lane == 0 { probation } else { main };
            let shown = self.blocks[&leaves[0]].clone();
            let kept = match (self.eviction, lane) {
                (Eviction::Slru, 1) => Some((0, shown.uses)),
                (Eviction::S3Fifo, 1) if shown.uses > 0 => Some((1, shown.uses - 1)),
                (Eviction::S3Fifo, 0) if shown.uses > 1 => Some((1, 0)),
                _ => None,
            };
            let Some((lane, uses)) = kept else { return leaves };
            self.ambiguous |= leaves.len() > 1;
            let now = self.tick();
            let mut prefix = leaves[0].clone();
            loop {
                let block = self.blocks.get_mut(&prefix).unwrap();
                (block.lane, block.uses, block.place) = (lane, uses, now);
                prefix.truncate(prefix.len() - self.block_tokens);
                let alike = |b: &Block| {
                    let uses = self.eviction == Eviction::Slru || b.uses == shown.uses;
                    b.place == shown.place && b.lane == shown.lane && uses
                };
                let same = self.blocks.get(&prefix).is_some_and(alike);
                if !same || self.children(&prefix) != 1 {
                    break;
                }
            }
        }
    }

    fn remove(&mut self, prefix: &Prefix) {
        let block = self.blocks.remove(prefix).unwrap();
        if self.eviction == Eviction::S3Fifo && block.lane == 0 {
            let fingerprint = fingerprint(&prefix[prefix.len() - self.block_tokens..]);
            let places = self.capacity.next_power_of_two() as u32;
            self.left += 1;
            self.ghost.insert(fingerprint >> 1 & (places - 1), (fingerprint, self.left));
        }
    }
}

#[derive(Debug, Clone)]
enum Op {
    Insert(Prefix),
    /// Below an earlier position.
    Append(usize, Prefix),
    Lookup(Prefix),
    Touch(usize),
    Lock(usize),
    Unlock(usize),
    Release(usize),
    Prioritize(usize, Vec<Retention>),
    Hint(usize, usize, u32),
    Advance(u64),
    Evict(usize, u32),
}

fn op(bt: usize) -> impl Strategy<Value = Op> {
    let token = prop_oneof![5 => Just(0u32), 3 => 1..3u32];
    let tokens = prop::collection::vec(token, 0..=bt * 6).boxed();
    let duration = prop_oneof![Just(None), (1..60u32).prop_map(Some)];
    let priority = prop_oneof![Just(0u8), Just(34), Just(35), Just(36), Just(80), Just(100)];
    let range = (0..bt * 6, prop::option::of(1..bt * 4), priority, duration).prop_map(
        |(start, len, priority, duration_ms)| Retention {
            start,
            end: len.map(|len| start + len),
            priority,
            duration_ms,
        },
    );
    prop_oneof![
        8 => tokens.clone().prop_map(Op::Insert),
        4 => (any::<usize>(), tokens.clone()).prop_map(|(at, t)| Op::Append(at, t)),
        4 => tokens.prop_map(Op::Lookup),
        4 => any::<usize>().prop_map(Op::Touch),
        3 => any::<usize>().prop_map(Op::Lock),
        2 => any::<usize>().prop_map(Op::Unlock),
        2 => any::<usize>().prop_map(Op::Release),
        2 => (any::<usize>(), prop::collection::vec(range, 0..3))
            .prop_map(|(at, ranges)| Op::Prioritize(at, ranges)),
        2 => (any::<usize>(), 0..6usize, 0..60u32).prop_map(|(at, n, h)| Op::Hint(at, n, h)),
        3 => (0..25u64).prop_map(Op::Advance),
        6 => (0..5usize, prop_oneof![4 => Just(u32::MAX), 1 => 2..5u32])
            .prop_map(|(n, v)| Op::Evict(n, v)),
    ]
}

struct Run {
    index: PrefixIndex,
    model: Model,
    places: Vec<(Position, Prefix)>,
    next_id: u32,
}

impl Run {
    fn new(eviction: Eviction, block_tokens: usize, capacity: u32) -> Self {
        let model = Model {
            eviction,
            block_tokens,
            capacity: capacity as usize,
            blocks: BTreeMap::new(),
            pins: Vec::new(),
            now: 0,
            clock: 0,
            ghost: BTreeMap::new(),
            left: 0,
            ambiguous: false,
        };
        let index = PrefixIndex::with_eviction(block_tokens, 1, capacity, eviction).unwrap();
        assert_eq!(index.eviction(), eviction);
        Run { index, model, places: Vec::new(), next_id: 1 }
    }

    /// An earlier position that is still good, by looking its prefix up again.
    fn place(&self, which: usize) -> Option<(Position, Prefix)> {
        let (_, prefix) = self.places.get(which.checked_rem(self.places.len())?)?;
        let mut hit = Hit::default();
        self.index.lookup(SPACE, prefix, usize::MAX, &mut hit);
        assert_eq!(hit.at.blocks(), self.model.present(prefix));
        Some((hit.at, prefix[..hit.tokens].to_vec()))
    }

    fn insert(&mut self, at: Position, above: Prefix, mut tokens: Prefix) {
        let bt = self.model.block_tokens;
        tokens.truncate(tokens.len() / bt * bt);
        let count = (tokens.len() / bt) as u32;
        let ids: Vec<_> = (self.next_id..self.next_id + count).map(BlockId).collect();
        self.next_id += count;
        let mut same = Vec::new();
        let done = self.index.insert_below(SPACE, at, &tokens, &ids, &mut same).unwrap();
        let mut all = above.clone();
        all.extend(&tokens);
        let (present, stored) = self.model.insert(&all, above.len() / bt, &ids);
        assert_eq!((at.blocks() + done.present, done.stored), (present, stored));
        all.truncate((present + stored) * bt);
        self.places.push((done.at, all));
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Insert(tokens) => self.insert(Position::default(), Vec::new(), tokens),
            Op::Append(which, tokens) => {
                let Some((at, above)) = self.place(which) else { return };
                self.insert(at, above, tokens);
            }
            Op::Lookup(tokens) => self.places.push((Position::default(), tokens)),
            Op::Touch(which) => {
                let Some((at, prefix)) = self.place(which) else { return };
                self.index.touch(at).unwrap();
                self.model.touch(&prefix, 0);
            }
            Op::Lock(which) => {
                let Some((at, prefix)) = self.place(which) else { return };
                let pin = self.index.lock(at).unwrap();
                self.model.touch(&prefix, 0);
                self.model.pins.push((pin, prefix));
            }
            Op::Unlock(which) | Op::Release(which) => {
                let n = self.model.pins.len();
                let Some(which) = which.checked_rem(n) else { return };
                let (pin, prefix) = self.model.pins.swap_remove(which);
                if matches!(op, Op::Release(_)) {
                    self.index.release(pin).unwrap();
                    self.model.refresh(&prefix, true);
                } else {
                    self.index.unlock(pin).unwrap();
                }
                self.model.expire_free();
            }
            Op::Prioritize(which, ranges) => {
                let Some((at, prefix)) = self.place(which) else { return };
                self.index.prioritize(at, &ranges).unwrap();
                self.model.refresh(&prefix, false);
                let bt = self.model.block_tokens;
                for (n, prefix) in self.model.path(&prefix) {
                    let block = self.model.blocks.get_mut(&prefix).unwrap();
                    block.hint = Hint::None;
                    let overlaps = |r: &&Retention| {
                        r.start < (n + 1) * bt && r.end.is_none_or(|end| end > n * bt)
                    };
                    if let Some(range) = ranges.iter().find(overlaps) {
                        block.priority = range.priority;
                        let timed = range.priority != DEFAULT_PRIORITY;
                        block.duration = range.duration_ms.filter(|_| timed);
                    }
                }
            }
            Op::Hint(which, from, kind) => {
                let Some((at, prefix)) = self.place(which) else { return };
                let ms = self.model.now + u64::from(kind);
                let hint = match kind {
                    0..5 => Hint::None,
                    5..15 => Hint::SessionEnded,
                    15..25 => Hint::Waited,
                    _ => Hint::ExpectedAt { ms },
                };
                self.index.hint(at, from, hint).unwrap();
                self.model.refresh(&prefix, false);
                for (n, prefix) in self.model.path(&prefix) {
                    let block = self.model.blocks.get_mut(&prefix).unwrap();
                    block.hint = if n >= from { hint } else { Hint::None };
                    if matches!(block.hint, Hint::ExpectedAt { .. }) && block.duration.is_some() {
                        (block.priority, block.duration) = (DEFAULT_PRIORITY, None);
                    }
                }
            }
            Op::Advance(ms) => {
                self.model.now += ms;
                self.model.clock = self.model.clock.max(self.model.now << 16);
                self.index.advance(self.model.now).unwrap();
                self.model.expire_free();
            }
            Op::Evict(want, veto) => self.evict(want, veto),
        }
    }

    fn evict(&mut self, want: usize, veto: u32) {
        // Each entry that the index shows, and whether it may go.
        let (mut shown, mut gone) = (Vec::new(), 0);
        let done = self.index.evict(
            want,
            &mut |ids| {
                shown.push((ids[0], !ids[0].0.is_multiple_of(veto)));
                !ids[0].0.is_multiple_of(veto)
            },
            &mut |_| gone += 1,
        );
        assert_eq!(done, gone);
        let mut vetoed = Vec::new();
        for (id, goes) in shown {
            let next = self.model.next(&vetoed);
            if self.model.ambiguous {
                return;
            }
            let found = next.iter().find(|prefix| self.model.blocks[*prefix].id == id);
            let found = found.unwrap_or_else(|| panic!("{id:?} is not next: {next:?}")).clone();
            if goes {
                self.model.remove(&found);
            } else {
                vetoed.push(found);
            }
        }
        let more = done < want && !self.model.next(&vetoed).is_empty();
        assert!(!more, "more could be evicted");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_policy_is_its_model(
        (bt, capacity, ops) in (prop::sample::select(vec![1usize, 2, 4]), 1..50u32).prop_flat_map(
            |(bt, capacity)| (Just(bt), Just(capacity), prop::collection::vec(op(bt), 1..200))),
    ) {
        for eviction in ALL {
            let mut run = Run::new(eviction, bt, capacity);
            for op in &ops {
                run.step(op.clone());
                if run.model.ambiguous {
                    break;
                }
                run.index.audit().unwrap();
                prop_assert_eq!(run.index.len_blocks(), run.model.blocks.len());
            }
        }
    }
}
