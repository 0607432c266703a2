//! Priorities and hints by example: which of some cached sequences goes first, and when that changes.
//! The random test against a model is `model_eviction`.

use kvcache::Error;
use kvcache::ids::{BlockId, Namespace};
use kvcache::prefix::{Eviction, Hint, Position, PrefixIndex, Retention};

const SPACE: Namespace = Namespace(0);

/// Sequences of blocks of 16 tokens that share nothing; ids are 10 * sequence + block.
struct Index(PrefixIndex);

impl Index {
    fn new() -> Self {
        Index(PrefixIndex::new(16, 1, 100).unwrap())
    }

    fn insert(&mut self, sequence: u32, blocks: u32) -> Position {
        let tokens = vec![sequence; 16 * blocks as usize];
        let ids: Vec<_> = (0..blocks).map(|block| BlockId(10 * sequence + block)).collect();
        self.0.insert(SPACE, &tokens, &ids, &mut Vec::new()).unwrap().at
    }

    fn evict(&mut self, blocks: usize) -> Vec<u32> {
        let mut gone = Vec::new();
        self.0.evict(blocks, &mut |_| true, &mut |ids| gone.push(ids[0].0));
        self.0.audit().unwrap();
        gone
    }

    fn prioritize(&mut self, at: Position, priority: u8, duration_ms: Option<u32>) {
        self.0.prioritize(at, &[range(0, None, priority, duration_ms)]).unwrap();
        self.0.audit().unwrap();
    }
}

fn range(start: usize, end: Option<usize>, priority: u8, duration_ms: Option<u32>) -> Retention {
    Retention { start, end, priority, duration_ms }
}

#[test]
fn a_range_covers_the_blocks_that_it_overlaps_and_the_first_range_counts() {
    let mut index = Index::new();
    let at = index.insert(1, 4);
    // 17 tokens are two blocks; the second range begins in the second block and does not count
    // there; the last block keeps the default.
    let ranges = [range(0, Some(17), 80, None), range(20, Some(48), 10, None)];
    index.0.prioritize(at, &ranges).unwrap();
    index.insert(2, 1);
    // Leaves only: block 13 stands before 12, and 12 before the two of priority 80.
    assert_eq!(index.evict(3), [13, 12, 20]);
    index.insert(3, 1);
    index.insert(4, 1);
    assert_eq!(index.evict(4), [30, 40, 11, 10]);
}

#[test]
fn the_lowest_priority_goes_first_and_the_least_recent_of_it() {
    let mut index = Index::new();
    for (sequence, priority) in [(1, 36), (2, 35), (3, 100), (4, 0), (5, 34), (6, 0)] {
        let at = index.insert(sequence, 1);
        index.prioritize(at, priority, None);
    }
    index.insert(7, 1);
    assert_eq!(index.evict(9), [40, 60, 50, 20, 70, 10, 30]);
}

#[test]
fn a_priority_that_ends_joins_the_tail_of_the_default_ones() {
    let mut index = Index::new();
    index.0.advance(1000).unwrap();
    let (one, two) = (index.insert(1, 1), index.insert(2, 1));
    index.prioritize(one, 90, Some(50));
    index.prioritize(two, 5, Some(40));
    index.insert(3, 1);
    // A moment before the first ends.
    index.0.advance(1039).unwrap();
    assert_eq!(index.evict(1), [20]);
    let two = index.insert(2, 1);
    index.prioritize(two, 5, Some(1));
    index.0.advance(1050).unwrap();
    // Sequence 2 ended at 1040, sequence 1 at 1050, 3 was used before either; 4 comes after.
    index.insert(4, 1);
    assert_eq!(index.evict(4), [30, 20, 10, 40]);
}

#[test]
fn a_duration_runs_from_the_release() {
    let mut index = Index::new();
    let at = index.insert(1, 2);
    let pin = index.0.lock(at).unwrap();
    index.prioritize(at, 90, Some(10));
    index.0.advance(500).unwrap();
    index.0.release(pin).unwrap();
    index.insert(2, 1);
    assert_eq!(index.evict(1), [20], "ten further ms");
    index.0.advance(510).unwrap();
    index.insert(2, 1);
    assert_eq!(index.evict(2), [11, 10]);
}

#[test]
fn a_use_keeps_the_priority_and_ends_its_duration() {
    let mut index = Index::new();
    let at = index.insert(1, 1);
    index.prioritize(at, 90, Some(10));
    index.0.advance(5).unwrap();
    index.0.touch(at).unwrap();
    index.0.advance(500).unwrap();
    index.insert(2, 1);
    assert_eq!(index.evict(1), [20]);
    // A new priority overrides.
    index.prioritize(at, 1, None);
    index.insert(2, 1);
    assert_eq!(index.evict(1), [10]);
}

#[test]
fn hints_and_priorities_have_one_order() {
    let mut index = Index::new();
    let hints = [
        (1, Hint::Waited),
        (2, Hint::ExpectedAt { ms: 50 }),
        (3, Hint::ExpectedAt { ms: 90 }),
        (4, Hint::SessionEnded),
        (5, Hint::None),
    ];
    for (sequence, hint) in hints {
        let at = index.insert(sequence, 1);
        index.0.hint(at, 0, hint).unwrap();
    }
    for (sequence, priority) in [(6, 0), (7, 36), (8, 100)] {
        let at = index.insert(sequence, 1);
        index.prioritize(at, priority, None);
    }
    // The one expected last goes before the one expected soon.
    assert_eq!(index.evict(9), [40, 60, 50, 30, 20, 70, 80, 10]);
}

#[test]
fn an_expectation_that_passed_or_was_met_is_forgotten() {
    let mut index = Index::new();
    let (one, two) = (index.insert(1, 1), index.insert(2, 1));
    let three = index.insert(3, 1);
    index.0.hint(one, 0, Hint::ExpectedAt { ms: 50 }).unwrap();
    index.0.hint(two, 0, Hint::SessionEnded).unwrap();
    index.0.hint(three, 0, Hint::Waited).unwrap();
    // Used after all.
    index.0.touch(two).unwrap();
    index.0.touch(three).unwrap();
    index.0.advance(50).unwrap();
    index.insert(4, 1);
    assert_eq!(index.evict(4), [20, 30, 10, 40]);
}

#[test]
fn an_expectation_ends_however_far_the_time_goes() {
    // In one jump, as where an engine sets its clock late, and in steps of days.
    for steps in [1, 60] {
        let mut index = Index::new();
        let one = index.insert(1, 1);
        let long = index.insert(2, 2);
        index.0.hint(one, 0, Hint::ExpectedAt { ms: 50 }).unwrap();
        // One that nothing brings up to date meanwhile: something hangs below it.
        index.0.hint(long.first(1), 0, Hint::ExpectedAt { ms: 1 << 30 }).unwrap();
        let far = 5u64 << 31;
        for step in 1..=steps {
            index.0.advance(far * step / steps).unwrap();
            index.0.audit().unwrap();
        }
        index.insert(3, 1);
        assert_eq!(index.evict(4), [21, 10, 20, 30], "{steps} steps");
    }
}

#[test]
fn what_a_session_shares_stays_as_it_was() {
    let mut index = Index::new();
    let mut tokens = vec![1; 64];
    tokens[32..].fill(2);
    index.insert(1, 4);
    let ids = [BlockId(10), BlockId(11), BlockId(22), BlockId(23)];
    let at = index.0.insert(SPACE, &tokens, &ids, &mut Vec::new()).unwrap().at;
    index.0.hint(at, 2, Hint::SessionEnded).unwrap();
    assert_eq!(index.evict(2), [23, 22]);
    index.insert(5, 1);
    assert_eq!(index.evict(5), [13, 12, 11, 10, 50], "by age again");
}

#[test]
fn bad_arguments_change_nothing() {
    for eviction in [Eviction::Lru, Eviction::S3Fifo] {
        let mut index = PrefixIndex::with_eviction(16, 1, 8, eviction).unwrap();
        let at = index.insert(SPACE, &[1; 32], &[BlockId(1), BlockId(2)], &mut Vec::new());
        let at = at.unwrap().at;
        let before = index.stats();
        for wrong in [
            range(0, None, 101, None),
            range(5, Some(5), 50, None),
            range(5, Some(4), 50, None),
            range(0, None, 50, Some(0)),
        ] {
            let refused = index.prioritize(at, &[range(0, None, 1, None), wrong]);
            assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
        }
        let far = Hint::ExpectedAt { ms: 1 << 31 };
        assert!(matches!(index.hint(at, 0, far), Err(Error::InvalidArgument { .. })));
        let late = index.advance(PrefixIndex::MAX_MS + 1);
        assert!(matches!(late, Err(Error::InvalidArgument { .. })));
        assert_eq!(index.stats(), before);
        // The extremes that are allowed, and ranges past the end, which cover nothing.
        index.advance(PrefixIndex::MAX_MS).unwrap();
        index.advance(0).unwrap();
        index.prioritize(at, &[range(usize::MAX, None, 1, Some(u32::MAX))]).unwrap();
        index.prioritize(at, &[range(0, Some(usize::MAX), 1, Some(u32::MAX))]).unwrap();
        index.hint(at, usize::MAX, Hint::SessionEnded).unwrap();
        let soon = PrefixIndex::MAX_MS + i32::MAX as u64;
        index.hint(at, 0, Hint::ExpectedAt { ms: soon }).unwrap();
        index.prioritize(Position::default(), &[range(0, None, 1, None)]).unwrap();
        index.hint(Position::default(), 0, Hint::Waited).unwrap();
        index.audit().unwrap();
        assert_eq!(index.evict(9, &mut |_| true, &mut |_| ()), 2);
        let stale = Err(Error::StaleHandle { what: "prefix position" });
        assert_eq!(index.hint(at, 0, Hint::Waited), stale);
        assert_eq!(index.prioritize(at, &[]), stale);
        index.audit().unwrap();
    }
}
