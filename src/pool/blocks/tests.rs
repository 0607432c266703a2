//! The pool's own books: batches, counts, order and what the audit notices.

use super::*;

#[test]
fn sizes_out_of_range_are_refused() {
    for blocks in [0, BlockPool::MAX_BLOCKS + 1, u32::MAX] {
        assert!(matches!(BlockPool::new(blocks), Err(Error::InvalidArgument { .. })));
    }
}

#[test]
fn a_batch_is_all_or_nothing() {
    let mut pool = BlockPool::new(4).unwrap();
    let mut out = [BlockId::NONE; 5];
    let error = pool.allocate_n(&mut out).unwrap_err();
    assert_eq!(error, Error::OutOfBlocks { needed: 5, missing: 1 });
    assert_eq!((out, pool.free_blocks()), ([BlockId::NONE; 5], 4));
    pool.allocate_n(&mut out[..4]).unwrap();
    assert_eq!(out[..4], [0, 1, 2, 3].map(BlockId));
    assert_eq!(pool.allocate(), Err(Error::OutOfBlocks { needed: 1, missing: 1 }));
    pool.audit().unwrap();
}

#[test]
fn a_bad_batch_frees_nothing() {
    let mut pool = BlockPool::new(4).unwrap();
    let mut b = [BlockId::NONE; 3];
    pool.allocate_n(&mut b).unwrap();
    pool.retain(b[1]).unwrap();
    for bad in [[b[0], b[1], BlockId(3)], [BlockId(9), b[1], b[2]], [b[0], b[2], b[0]]] {
        assert!(matches!(pool.free_n(&bad), Err(Error::BadBlock { .. })));
        assert_eq!((pool.free_blocks(), b.map(|b| pool.refs(b))), (1, [1, 2, 1]));
        pool.audit().unwrap();
    }
    assert_eq!(pool.free_n(&[b[1], b[0], b[1]]), Ok(2));
    assert_eq!(pool.free_blocks(), 3);
    pool.audit().unwrap();
}

#[test]
fn freed_blocks_come_back_in_their_order() {
    let mut pool = BlockPool::new(8).unwrap();
    let mut b = [BlockId::NONE; 6];
    pool.allocate_n(&mut b).unwrap();
    pool.free_n(&b[2..5]).unwrap();
    let mut again = [BlockId::NONE; 3];
    pool.allocate_n(&mut again).unwrap();
    assert_eq!(again, b[2..5]);
}

#[test]
fn what_was_freed_is_dirty_until_it_is_scrubbed() {
    let mut pool = BlockPool::new(6).unwrap();
    let mut b = [BlockId::NONE; 4];
    pool.allocate_n(&mut b).unwrap();
    assert_eq!(pool.dirty_blocks().count(), 0);
    pool.free_n(&b[1..3]).unwrap();
    pool.release(b[3]).unwrap();
    assert!(pool.dirty_blocks().eq([b[2], b[1], b[3]]));
    // One that is taken dirty is not free any more.
    assert_eq!(pool.allocate(), Ok(b[3]));
    assert!(pool.dirty_blocks().eq([b[2], b[1]]));
    pool.mark_clean();
    assert_eq!(pool.dirty_blocks().count(), 0);
    pool.release(b[3]).unwrap();
    assert!(pool.dirty_blocks().eq([b[3]]));
    pool.audit().unwrap();
}

#[test]
fn counts_cannot_overflow_or_go_below_zero() {
    let mut pool = BlockPool::new(2).unwrap();
    let b = pool.allocate().unwrap();
    pool.refs[b.index()] = MAX_REFS - 1;
    let error = Err(Error::Overflow { what: "reference count" });
    assert_eq!(pool.retain_n(&[b, b]), error);
    assert_eq!(pool.refs(b), MAX_REFS - 1);
    pool.retain(b).unwrap();
    assert_eq!(pool.retain(b), error);
    pool.refs[b.index()] = 1;
    assert_eq!(pool.release(b), Ok(true));
    assert_eq!(pool.release(b), Err(Error::BadBlock { block: b.0 }));
    assert_eq!(pool.retain(BlockId::NONE), Err(Error::BadBlock { block: u32::MAX }));
    pool.audit().unwrap();
}

#[test]
fn the_index_is_one_holder_more() {
    let mut pool = BlockPool::new(4).unwrap();
    let b = pool.allocate().unwrap();
    assert!(pool.uncache(b).is_err() && pool.cache(BlockId(1)).is_err());
    pool.cache(b).unwrap();
    assert!(pool.cache(b).is_err());
    assert_eq!((pool.refs(b), pool.cached_blocks()), (2, 0));
    assert_eq!(pool.free_n(&[b]), Ok(0));
    assert_eq!((pool.refs(b), pool.cached_blocks(), pool.free_blocks()), (1, 1, 3));
    // The index's own reference is not for others to give up.
    assert!(pool.release(b).is_err() && pool.free_n(&[b]).is_err());
    pool.audit().unwrap();
    pool.retain_n(&[b, b]).unwrap();
    assert!(pool.free_n(&[BlockId(3), b, b]).is_err() && pool.retain_n(&[b, BlockId(3)]).is_err());
    assert_eq!((pool.refs(b), pool.cached_blocks()), (3, 0));
    assert_eq!(pool.uncache(b), Ok(false));
    assert_eq!(pool.free_n(&[b, b]), Ok(1));
    let c = pool.allocate().unwrap();
    pool.cache(c).unwrap();
    assert_eq!((pool.release(c), pool.uncache(c)), (Ok(false), Ok(true)));
    assert_eq!(pool.free_blocks(), 4);
    pool.audit().unwrap();
}

#[test]
fn cached_blocks_are_kept_in_the_order_in_which_they_were_left() {
    let mut pool = BlockPool::new(6).unwrap();
    pool.order_cached().unwrap();
    let mut b = [BlockId::NONE; 5];
    pool.allocate_n(&mut b).unwrap();
    b[..4].iter().for_each(|&b| pool.cache(b).unwrap());
    assert_eq!(pool.oldest_cached(), None);
    pool.free_n(&b[..3]).unwrap();
    assert!(pool.order_cached().is_err());
    // The last of a batch first.
    assert_eq!(pool.oldest_cached(), Some(b[2]));
    pool.retain(b[2]).unwrap();
    pool.release(b[3]).unwrap();
    pool.release(b[2]).unwrap();
    let mut order = Vec::new();
    while let Some(oldest) = pool.oldest_cached() {
        pool.audit().unwrap();
        assert_eq!(pool.uncache(oldest), Ok(true));
        order.push(oldest);
    }
    assert_eq!(order, [b[1], b[0], b[3], b[2]]);
    assert_eq!((pool.cached_blocks(), pool.free_blocks()), (0, 5));
    // A batch that is refused leaves none out and none in.
    pool.cache(b[4]).unwrap();
    pool.release(b[4]).unwrap();
    assert!(pool.retain_n(&[b[4], BlockId(77)]).is_err());
    assert_eq!(pool.oldest_cached(), Some(b[4]));
    pool.retain(b[4]).unwrap();
    assert!(pool.free_n(&[BlockId(77), b[4]]).is_err());
    assert_eq!(pool.oldest_cached(), None);
    pool.audit().unwrap();
}

#[test]
fn the_audit_notices_damage() {
    let damage: [fn(&mut BlockPool); 6] = [
        |p| p.cached = 1,
        |p| p.refs[3] = CACHED,
        |p| p.refs[3] = 1,
        |p| p.free[0] = p.free[1],
        |p| p.free_len -= 1,
        |p| p.free[1] = 77,
    ];
    for harm in damage {
        let mut pool = BlockPool::new(4).unwrap();
        pool.audit().unwrap();
        harm(&mut pool);
        assert!(matches!(pool.audit(), Err(Error::InvalidState { .. })));
    }
}
