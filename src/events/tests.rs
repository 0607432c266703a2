//! The queue by itself: order, joining, the bound.

use alloc::vec;
use alloc::vec::Vec;

use super::super::AttentionKind;
use super::*;

fn queue(capacity: usize) -> Arc<Queue> {
    let groups = vec![AttentionKind::Full, AttentionKind::Window(64)];
    Queue::new(Shape { block_tokens: 2, groups }, capacity).unwrap()
}

fn digest(n: u32) -> Digest {
    Digest([n as u8; 32])
}

/// Stores blocks `from..to` of one chain; block `n` has tokens `n, n`.
fn store(queue: &Queue, group: u32, from: u32, to: u32) {
    let digests: Vec<_> = (from..to).map(digest).collect();
    let tokens: Vec<_> = (from..to).flat_map(|n| [n, n]).collect();
    let parent = from.checked_sub(1).map(digest);
    queue.lock().stored((Medium::Gpu, group, Namespace(0)), parent, &digests, &tokens);
}

/// Each event as (kind, group, first block, blocks).
fn shapes(batch: &Batch) -> Vec<(char, u32, u8, usize)> {
    let shape = |event| match event {
        Event::Stored { group, digests, tokens, .. } => {
            assert_eq!(tokens.len(), digests.len() * 2);
            assert!(digests.iter().zip(tokens.chunks(2)).all(|(d, t)| u32::from(d.0[0]) == t[0]));
            ('s', group, digests[0].0[0], digests.len())
        }
        Event::Removed { group, digests, .. } => ('r', group, digests[0].0[0], digests.len()),
        Event::Cleared => ('c', 0, 0, 0),
    };
    batch.events().map(shape).collect()
}

fn take(queue: &Queue) -> Vec<(char, u32, u8, usize)> {
    let mut batch = Batch::default();
    assert_eq!(queue.take(&mut batch), Taken::Events);
    shapes(&batch)
}

#[test]
fn blocks_that_follow_each_other_are_one_event() {
    let queue = queue(100);
    store(&queue, 0, 0, 3);
    store(&queue, 0, 3, 5);
    store(&queue, 1, 5, 6); // another group
    store(&queue, 1, 7, 8); // does not follow
    for n in 0..3 {
        queue.lock().removed(Medium::Gpu, 0, digest(n));
    }
    queue.lock().removed(Medium::Cpu, 0, digest(9));
    let expected = [('s', 0, 0, 5), ('s', 1, 5, 1), ('s', 1, 7, 1), ('r', 0, 0, 3), ('r', 0, 9, 1)];
    assert_eq!(take(&queue), expected);
    // What was taken cannot grow any more.
    store(&queue, 1, 8, 9);
    assert_eq!(take(&queue), [('s', 1, 8, 1)]);
    // A sequence's first block follows nothing, not even in the same namespace.
    store(&queue, 0, 0, 1);
    let key = (Medium::Gpu, 0, Namespace(0));
    queue.lock().stored(key, None, &[digest(5)], &[5, 5]);
    queue.lock().stored((Medium::Gpu, 0, Namespace(1)), Some(digest(5)), &[digest(6)], &[6, 6]);
    assert_eq!(take(&queue), [('s', 0, 0, 1), ('s', 0, 5, 1), ('s', 0, 6, 1)]);
}

#[test]
fn long_chains_are_several_events_with_their_parents() {
    let queue = queue(10_000);
    let digests: Vec<_> = (0..2500u32)
        .map(|n| {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&n.to_le_bytes());
            Digest(bytes)
        })
        .collect();
    let tokens = vec![7; 5000];
    let key = (Medium::Gpu, 0, Namespace(0));
    queue.lock().stored(key, None, &digests[..1000], &tokens[..2000]);
    queue.lock().stored(key, Some(digests[999]), &digests[1000..], &tokens[2000..]);
    let mut batch = Batch::default();
    queue.take(&mut batch);
    let mut seen = Vec::new();
    for event in batch.events() {
        let Event::Stored { parent, digests, .. } = event else { panic!("{event:?}") };
        assert_eq!(parent, seen.last().copied());
        assert!(digests.len() <= MAX_EVENT_BLOCKS);
        seen.extend_from_slice(digests);
    }
    assert_eq!(seen, digests);
    assert_eq!(batch.events().len(), 3);
    // Pieces for messages: whole events, in order, none lost.
    let (mut events, mut pieces) = (batch.events(), Vec::new());
    while events.len() > 0 {
        pieces.push(events.split_front(1500).len());
    }
    assert_eq!(pieces, [1, 2]);
}

#[test]
fn a_full_queue_drops_everything_and_starts_again() {
    let queue = queue(4);
    store(&queue, 0, 0, 3);
    store(&queue, 0, 10, 12); // does not fit
    store(&queue, 0, 20, 21); // would fit, but means nothing now
    let stats = queue.stats();
    assert_eq!((stats.queued_blocks, stats.dropped_events, stats.losses), (0, 3, 1));
    assert!(!queue.lock().wants_resync());
    let mut batch = Batch::default();
    assert_eq!(queue.take(&mut batch), Taken::Lost);
    assert!(queue.lock().wants_resync());
    store(&queue, 0, 22, 23);
    assert_eq!(queue.stats().dropped_events, 4);
    queue.lock().restart();
    assert!(!queue.lock().wants_resync());
    store(&queue, 0, 20, 24);
    assert_eq!(take(&queue), [('c', 0, 0, 0), ('s', 0, 20, 4)]);
    // Exactly full is not too full, and a restart makes what waits obsolete.
    store(&queue, 0, 0, 4);
    queue.lock().restart();
    store(&queue, 0, 1, 5);
    assert_eq!(take(&queue), [('c', 0, 0, 0), ('s', 0, 1, 4)]);
    assert_eq!(queue.stats().losses, 1);
    queue.stop();
    assert_eq!(queue.take(&mut batch), Taken::Stopped);
}
