//! The prefix index against hostile shapes and arguments: whatever is sent, an answer that is true,
//! or an error and nothing changed.

use kvcache::Error;
use kvcache::ids::{BlockId, Namespace, TokenId};
use kvcache::prefix::{Hit, Inserted, Position, PrefixIndex};

const A: Namespace = Namespace(0);
const B: Namespace = Namespace(u64::MAX);

fn insert(index: &mut PrefixIndex, space: Namespace, tokens: &[TokenId], first: u32) -> Inserted {
    let ids = tokens.len() / index.block_tokens() * index.groups();
    let ids: Vec<_> = (0..ids as u32).map(|i| BlockId(first + i)).collect();
    index.insert(space, tokens, &ids, &mut Vec::new()).unwrap()
}

fn lookup(index: &PrefixIndex, space: Namespace, tokens: &[TokenId]) -> Hit {
    let mut hit = Hit::default();
    index.lookup(space, tokens, usize::MAX, &mut hit);
    hit
}

#[test]
fn impossible_sizes_are_refused() {
    let over = PrefixIndex::MAX_BLOCKS + 1;
    for (tokens, groups, blocks) in
        [(0, 1, 1), (1, 0, 1), (1, 1, 0), (65537, 1, 1), (1, 65537, 1), (1, 1, over)]
    {
        let refused = PrefixIndex::new(tokens, groups, blocks);
        assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    }
    let huge = PrefixIndex::new(65536, 65536, PrefixIndex::MAX_BLOCKS);
    assert!(matches!(huge, Err(Error::OutOfMemory { .. })));
}

#[test]
fn wrong_lengths_are_errors_and_change_nothing() {
    let mut index = PrefixIndex::new(4, 2, 8).unwrap();
    let mut same = vec![BlockId(7)];
    let ids = [BlockId(0); 6];
    for (tokens, ids) in
        [(&[1; 5][..], &ids[..2]), (&[1; 4], &ids[..1]), (&[], &ids[..2]), (&[1; 8], &ids)]
    {
        let refused = index.insert(A, tokens, ids, &mut same);
        assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
        assert!(same.is_empty());
    }
    assert!(index.remove(A, &[1; 3], &mut |_| ()).is_err());
    assert_eq!((index.len_blocks(), index.stats().nodes), (0, 0));
    index.audit().unwrap();
}

#[test]
fn the_empty_sequence_is_no_special_case() {
    let mut index = PrefixIndex::new(4, 1, 8).unwrap();
    assert_eq!(
        insert(&mut index, A, &[], 0),
        Inserted { present: 0, stored: 0, at: Position::default() }
    );
    let hit = lookup(&index, A, &[]);
    assert_eq!((hit.tokens, hit.tail_tokens, hit.at), (0, 0, Position::default()));
    let pin = index.lock(hit.at).unwrap();
    index.touch(hit.at).unwrap();
    index.unlock(pin).unwrap();
    assert_eq!(index.unlock(pin), Err(Error::StaleHandle { what: "pin" }));
    assert_eq!(index.remove(A, &[], &mut |_| ()), Ok(0));
    assert_eq!((index.clear(A, &mut |_| ()), index.evict(9, &mut |_| true, &mut |_| ())), (0, 0));
    assert_eq!(index.stats().nodes, 0);
}

#[test]
fn a_full_index_stores_what_fits() {
    let mut index = PrefixIndex::new(2, 1, 3).unwrap();
    let tokens: Vec<u32> = (0..10).collect();
    let done = insert(&mut index, A, &tokens, 0);
    assert_eq!((done.present, done.stored, done.at.blocks()), (0, 3, 3));
    let more = insert(&mut index, A, &tokens, 50);
    assert_eq!((more.present, more.stored), (3, 0));
    let other = insert(&mut index, B, &tokens, 60);
    assert_eq!((other.present, other.stored, index.stats().namespaces), (0, 0, 1));
    assert_eq!(lookup(&index, A, &tokens).tokens, 6);
    index.audit().unwrap();
}

#[test]
fn namespaces_do_not_see_each_other() {
    let mut index = PrefixIndex::new(2, 1, 100).unwrap();
    let tokens = [5, 6, 7, 8];
    insert(&mut index, A, &tokens, 10);
    let miss = lookup(&index, B, &tokens);
    assert_eq!((miss.tokens, miss.tail_tokens), (0, 0));
    assert_eq!(insert(&mut index, B, &tokens, 20).present, 0);
    assert_eq!(lookup(&index, A, &tokens).blocks, [BlockId(10), BlockId(11)]);
    assert_eq!(lookup(&index, B, &tokens).blocks, [BlockId(20), BlockId(21)]);
    assert_eq!(index.clear(A, &mut |ids| assert!(ids[0].0 < 20)), 2);
    assert_eq!((lookup(&index, A, &tokens).tokens, lookup(&index, B, &tokens).tokens), (0, 4));
    // A thousand tenants come and go, and nothing of them stays.
    for space in 1..1000 {
        insert(&mut index, Namespace(space), &tokens, 0);
        index.clear(Namespace(space), &mut |_| ());
    }
    assert_eq!((index.stats().namespaces, index.stats().nodes), (1, 2));
    index.audit().unwrap();
}

/// As many siblings as one likes, all alike but for the last token of their first block.
#[test]
fn siblings_that_share_all_but_the_last_token() {
    const N: u32 = 20_000;
    let mut index = PrefixIndex::new(16, 1, 2 * N).unwrap();
    let sequence = |last: u32| {
        let mut tokens = vec![u32::MAX; 32];
        tokens[15] = last;
        tokens
    };
    for i in 0..N {
        insert(&mut index, A, &sequence(i), 2 * i);
    }
    index.audit().unwrap();
    for i in [0, 1, 4711, N - 1] {
        let hit = lookup(&index, A, &sequence(i));
        assert_eq!((hit.tokens, hit.blocks), (32, vec![BlockId(2 * i), BlockId(2 * i + 1)]));
    }
    let near = lookup(&index, A, &sequence(N));
    assert_eq!((near.tokens, near.tail_tokens), (0, 15));
    let mut wrong = sequence(N);
    wrong[7] = 0;
    assert_eq!(lookup(&index, A, &wrong).tail_tokens, 7);
    assert_eq!(index.evict(usize::MAX, &mut |_| true, &mut |_| ()), 2 * N as usize);
    assert_eq!(index.stats().nodes, 0);
}

/// Blocks of one token, a long stem, branches all along it, and half of it pinned.
#[test]
fn a_long_stem_with_branches() {
    const N: usize = 200_000;
    let mut index = PrefixIndex::new(1, 1, 2 * N as u32).unwrap();
    let stem: Vec<u32> = (0..N as u32).collect();
    insert(&mut index, A, &stem, 0);
    assert_eq!(lookup(&index, A, &stem).tokens, N);
    for n in (1..=64).map(|i| i * (N / 64)) {
        let mut tokens = stem[..n - 1].to_vec();
        tokens.push(u32::MAX);
        assert_eq!(insert(&mut index, A, &tokens, N as u32 + n as u32).stored, 1);
    }
    index.audit().unwrap();
    assert_eq!(lookup(&index, A, &stem).tokens, N);
    let pin = index.lock(lookup(&index, A, &stem[..N / 2]).at).unwrap();
    assert_eq!(index.clear(A, &mut |_| ()), N + 64 - N / 2);
    index.audit().unwrap();
    index.unlock(pin).unwrap();
    assert_eq!(index.evict(usize::MAX, &mut |_| true, &mut |_| ()), N / 2);
    assert_eq!(index.stats().nodes, 0);
}

/// Forks under forks: each sibling leaves the others one token later.
#[test]
fn nested_forks_find_the_longest_tail() {
    let mut index = PrefixIndex::new(256, 1, 600).unwrap();
    let leaving = |at: usize| {
        let mut tokens = vec![0; 256];
        tokens[at..].fill(1);
        tokens
    };
    for at in (0..256).rev().step_by(2) {
        insert(&mut index, A, &leaving(at), at as u32);
    }
    index.audit().unwrap();
    for at in 0..256usize {
        let mut query = leaving(at);
        let hit = lookup(&index, A, &query);
        // The cached ones leave at odd places; an even one agrees up to there with many.
        let whole = at % 2 == 1;
        assert_eq!(hit.tokens, if whole { 256 } else { 0 });
        if !whole {
            assert_eq!(hit.tail_tokens, at, "those that leave later");
        }
        query.truncate(200);
        let hit = lookup(&index, A, &query);
        let longest = if whole || at >= 200 { 200 } else { at };
        assert_eq!((hit.tokens, hit.tail_tokens), (0, longest));
    }
}

/// Sequences that grow by a block at a time, many at once, as decoding does.
#[test]
fn decoded_sequences_stay_few_edges() {
    const SEQUENCES: usize = 8;
    const BLOCKS: usize = 256;
    let mut index = PrefixIndex::new(16, 1, (SEQUENCES * BLOCKS) as u32 + 64).unwrap();
    let sequence =
        |s: usize| (0..16 * BLOCKS).map(|i| (s * 1_000_000 + i) as u32).collect::<Vec<_>>();
    let sequences: Vec<_> = (0..SEQUENCES).map(sequence).collect();
    for n in 1..=BLOCKS {
        for (s, tokens) in sequences.iter().enumerate() {
            let done = insert(&mut index, A, &tokens[..16 * n], (s * BLOCKS) as u32);
            assert_eq!((done.present, done.stored), (n - 1, 1));
        }
        index.audit().unwrap();
    }
    let nodes = index.stats().nodes;
    assert!(nodes < SEQUENCES * BLOCKS / 8, "{nodes} nodes");
}

/// Lookups need shared access only: threads may match at the same time.
#[test]
fn threads_look_up_together() {
    let mut index = PrefixIndex::new(4, 1, 4000).unwrap();
    let sequence = |s: u32| (0..40).map(|i| if i < 20 { i } else { s }).collect::<Vec<u32>>();
    for s in 0..500 {
        insert(&mut index, A, &sequence(s), s * 10);
    }
    let index = &index;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for s in (thread..500).step_by(4) {
                    let hit = lookup(index, A, &sequence(s));
                    assert_eq!((hit.tokens, hit.blocks[9]), (40, BlockId(s * 10 + 9)));
                }
            });
        }
    });
}
