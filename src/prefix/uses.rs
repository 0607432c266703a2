//! What a use does to the order of eviction, and which leaf is next in it.
//!
//! The clock is a count of uses that keeps step with the caller's time: a reading divided by 2^16 is
//! a millisecond. Where the policy wants no more than the last use and no priority or hint was ever
//! given, a use is one store at the end of its prefix, and eviction passes it on upwards. Else it is
//! noted in every edge of the prefix. Priorities end at their time by themselves: an edge is brought
//! up to date when it is used, becomes a leaf, or is one while time advances.

use super::queue::Key;
use super::retention::DEFAULT_PRIORITY;
use super::tree::{Kind, Mark, Node};
use super::{NIL, PrefixIndex};

/// Binary digits of the clock below a millisecond.
pub(super) const READINGS: u32 = 16;

/// Expectations are all looked at whenever the time divided by 2 to this changes: twelve days.
pub(super) const SWEEP: u32 = 30;

/// The class of what is hinted to have ended: before every priority.
const ENDED: u8 = 0;
/// The class of what is expected again: after the default priority, before those above it.
const EXPECTED: u8 = class(DEFAULT_PRIORITY) + 1;
/// The class of what the queue waits for: after every priority.
const WAITED: u8 = u8::MAX;

const fn class(priority: u8) -> u8 {
    2 + 2 * priority
}

impl PrefixIndex {
    /// The next reading of the clock.
    fn tick(&mut self) -> u64 {
        self.clock = u64::max(self.clock + 1, (self.now_ms << READINGS) + 1);
        self.clock
    }

    /// Whether a use must be noted in every edge of its prefix.
    pub(super) fn notes_every_edge(&self) -> bool {
        self.steered || self.policy.notes_every_edge()
    }

    /// Stores a new edge's first use; its blocks were counted nowhere yet.
    pub(super) fn note_stored(&mut self, first: u32, last: u32) {
        let now = self.tick();
        let run = super::blocks::Run { start: self.tree[first].start, len: 1 };
        let order = self.policy.stored(now, self.blocks.tokens(run));
        let lane = self.policy.lane(order);
        let mut node = last;
        loop {
            let edge = &mut self.tree[node];
            (edge.stamp, edge.order) = (now, order);
            self.lane_blocks[lane] += u64::from(edge.len);
            if node == first {
                break;
            }
            node = edge.parent;
        }
        self.queue_if_leaf(last);
    }

    /// Notes a use of the prefix that ends with edge `end`, or none for `NIL`. Counts, hints and
    /// times of priorities are those of the part past `above` blocks, where an edge begins;
    /// recency is that of the whole.
    pub(super) fn note_use(&mut self, end: u32, above: u32) {
        if end == NIL {
            return;
        }
        let now = self.tick();
        if !self.notes_every_edge() {
            self.tree[end].stamp = now;
            return;
        }
        let mut node = end;
        while self.tree[node].kind == Kind::Edge {
            self.expire_if_due(node);
            let edge = &mut self.tree[node];
            edge.stamp = now;
            if edge.end - edge.len >= above {
                clear_hint(edge);
                edge.duration_ms = 0;
                let order = self.policy.get_mut().used(edge.order, now);
                self.set_order(node, order);
            }
            node = self.tree.owner(node);
        }
        self.queue_if_leaf(end);
    }

    /// Makes the prefix that ends with edge `end` the most recently used, without counting a use.
    /// Where it was `held` until now, no priority of it has ended yet.
    pub(super) fn refresh(&mut self, end: u32, held: bool) {
        if end == NIL {
            return;
        }
        let now = self.tick();
        if !self.notes_every_edge() {
            self.tree[end].stamp = now;
            return;
        }
        let mut node = end;
        while self.tree[node].kind == Kind::Edge {
            if !held {
                self.expire_if_due(node);
            }
            self.tree[node].stamp = now;
            let order = self.policy.get().refreshed(self.tree[node].order, now);
            self.set_order(node, order);
            node = self.tree.owner(node);
        }
    }

    /// Gives every edge the stamp of what was used last at or below it, as eviction would in time.
    pub(super) fn pass_stamps_up(&mut self) {
        for root in 0..self.tree.places() as u32 {
            if self.tree[root].kind != Kind::Root {
                continue;
            }
            // Children before parents, by the links alone; `up`: all below `node` is done.
            let (mut node, mut up) = (self.tree[root].child, false);
            while node != root {
                while !up && self.tree[node].child != NIL {
                    node = self.tree[node].child;
                }
                if self.tree[node].kind == Kind::Edge {
                    let (owner, stamp) = (self.tree.owner(node), self.tree[node].stamp);
                    if self.tree[owner].kind == Kind::Edge {
                        self.tree[owner].stamp = self.tree[owner].stamp.max(stamp);
                    }
                }
                (node, up) = self.after(node);
            }
        }
    }

    /// Gives an edge another number of the policy's, and with it maybe another lane.
    fn set_order(&mut self, node: u32, order: u64) {
        let policy = &self.policy;
        let edge = &mut self.tree[node];
        let (from, to) = (policy.lane(edge.order), policy.lane(order));
        edge.order = order;
        if from != to {
            self.lane_blocks[from] -= u64::from(edge.len);
            self.lane_blocks[to] += u64::from(edge.len);
            self.queue_if_leaf(node);
        }
    }

    /// Where an edge stands in its lane.
    pub(super) fn key(&self, node: &Node) -> Key {
        let class = match node.hint {
            Mark::Ended => ENDED,
            Mark::Waited => WAITED,
            Mark::Expected if node.priority <= DEFAULT_PRIORITY => {
                // The one expected last goes first.
                let rank = u32::from(EXPECTED) << 24;
                return Key { rank, order: !self.deadline(node) };
            }
            _ => class(node.priority),
        };
        let key = self.policy.key(node.stamp, node.order);
        Key { rank: u32::from(class) << 24 | key.rank, ..key }
    }

    /// When the priority or hint of a node ends, in ms, if it does.
    pub(super) fn deadline_of(&self, node: &Node) -> Option<u64> {
        let timed = node.duration_ms > 0 || node.hint == Mark::Expected;
        timed.then(|| self.deadline(node))
    }

    /// The same for a node of which it is known that it does.
    fn deadline(&self, node: &Node) -> u64 {
        if node.hint == Mark::Expected {
            // The low half of an absolute time, which is within 2^31 ms of now.
            let ahead = node.duration_ms.wrapping_sub(self.now_ms as u32) as i32;
            return self.now_ms.saturating_add_signed(i64::from(ahead));
        }
        (node.stamp >> READINGS) + u64::from(node.duration_ms)
    }

    /// Ends the priority or the expectation of an edge whose time has come. It is then as recent as
    /// if it was used at that time.
    pub(super) fn expire_if_due(&mut self, node: u32) {
        let edge = &self.tree[node];
        let Some(deadline) = self.deadline_of(edge).filter(|&ms| ms <= self.now_ms) else {
            return;
        };
        self.expire(node, deadline);
    }

    /// Ends the expectations that end by `now_ms`, before that is the time. An edge has the low half
    /// of the time at which it is expected, which is clear within 2^31 ms of when it is read: what
    /// has passed must not be there any more when it is that long ago.
    pub(super) fn end_expectations(&mut self, now_ms: u64) {
        for place in 0..self.tree.places() as u32 {
            let node = &self.tree[place];
            if node.kind != Kind::Edge || node.hint != Mark::Expected {
                continue;
            }
            let deadline = self.deadline(node);
            if deadline <= now_ms {
                self.expire(place, deadline);
                self.queue_if_leaf(place);
            }
        }
    }

    fn expire(&mut self, node: u32, deadline: u64) {
        let edge = &self.tree[node];
        let stamp = u64::max(edge.stamp, deadline << READINGS);
        let order = self.policy.get().refreshed(edge.order, stamp);
        let edge = &mut self.tree[node];
        if edge.hint == Mark::Expected {
            edge.hint = Mark::None;
        } else {
            edge.priority = DEFAULT_PRIORITY;
        }
        (edge.duration_ms, edge.stamp) = (0, stamp);
        self.set_order(node, order);
    }

    /// Whether eviction may take `node` now.
    pub(super) fn is_free_leaf(&self, node: &Node) -> bool {
        node.kind == Kind::Edge && node.child == NIL && node.pins == 0
    }

    /// Queues `edge` for eviction if it is a leaf that nothing pins, and its priority for its end.
    pub(super) fn queue_if_leaf(&mut self, edge: u32) {
        if !self.is_free_leaf(&self.tree[edge]) {
            return;
        }
        self.expire_if_due(edge);
        let node = &self.tree[edge];
        self.queues[self.policy.lane(node.order)].lower(self.key(node), edge);
        if let Some(order) = self.deadline_of(node) {
            self.timers.lower(Key { rank: 0, order }, edge);
        }
    }

    /// Ends what ends by now: the part of [`Self::advance`] after the time is set.
    pub(super) fn expire_all(&mut self) {
        while let Some((Key { order: deadline, .. }, leaf)) = self.timers.top() {
            if deadline > self.now_ms {
                return;
            }
            let node = &self.tree[leaf];
            match self.deadline_of(node).filter(|_| self.is_free_leaf(node)) {
                Some(order) if order > self.now_ms => {
                    self.timers.raise_top(Key { rank: 0, order });
                }
                due => {
                    self.timers.drop_top();
                    if due.is_some() {
                        self.queue_if_leaf(leaf);
                    }
                }
            }
        }
    }

    /// The next leaf to evict, by priority, then lane, then key, with its lane; what the policy
    /// keeps has been moved out of the way.
    pub(super) fn next_leaf(&mut self) -> Option<(usize, u32)> {
        if !self.policy.two_lanes() {
            return self.first_of_lane(0).map(|(_, leaf)| (0, leaf));
        }
        loop {
            let (lane, leaf) = match (self.first_of_lane(0), self.first_of_lane(1)) {
                (None, None) => return None,
                (Some((_, leaf)), None) => (0, leaf),
                (None, Some((_, leaf))) => (1, leaf),
                (Some(probation), Some(main)) => {
                    let class = |key: Key| key.rank >> 24;
                    let lane = match class(probation.0).cmp(&class(main.0)) {
                        core::cmp::Ordering::Less => 0,
                        core::cmp::Ordering::Greater => 1,
                        core::cmp::Ordering::Equal => {
                            let capacity = u64::from(self.blocks.capacity());
                            self.policy.get().next_lane(self.lane_blocks, capacity)
                        }
                    };
                    (lane, if lane == 0 { probation.1 } else { main.1 })
                }
            };
            let (old, now) = (self.tree[leaf].order, self.tick());
            let Some(order) = self.policy.get_mut().judge(old, now) else {
                return Some((lane, leaf));
            };
            // All that was stored and used as one: as far up as nothing else hangs on it.
            let (mut node, mut held) = (leaf, false);
            loop {
                self.set_order(node, order);
                node = self.tree[node].parent;
                if self.tree[node].kind != Kind::Edge {
                    break;
                }
                held |= self.tree[node].pins > 0;
                if !held {
                    self.expire_if_due(node);
                }
                if self.tree[node].order != old {
                    break;
                }
            }
        }
    }

    /// The first leaf of a lane under its true key.
    fn first_of_lane(&mut self, lane: usize) -> Option<(Key, u32)> {
        loop {
            let (key, leaf) = self.queues[lane].top()?;
            let node = &self.tree[leaf];
            let policy = &self.policy;
            if !self.is_free_leaf(node) || policy.lane(node.order) != lane {
                self.queues[lane].drop_top();
                continue;
            }
            let now = self.key(node);
            if key >= now {
                return Some((key, leaf));
            }
            self.queues[lane].raise_top(now);
        }
    }
}

/// Forgets what was expected of an edge.
pub(super) fn clear_hint(edge: &mut Node) {
    if edge.hint == Mark::Expected {
        edge.duration_ms = 0;
    }
    edge.hint = Mark::None;
}
