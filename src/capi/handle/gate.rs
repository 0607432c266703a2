//! Who may be inside an object: the protocol on a slot's word and its counts of shared borrows.
//!
//! Whoever borrows beside others counts first and looks at the word then; whoever borrows alone
//! marks the word first and looks at the counts then. Entering is sequentially consistent, so that
//! of two at least one sees the other. Knows no handles and no objects; a model checker explores it
//! (`scripts/shuttle`), which is why its atomics come through `sync`.

use super::sync::{AtomicU32, AtomicUsize, Ordering};

/// Counts a shared borrow in `count`; where the word is not `live`, says what it is.
pub(super) fn enter_shared(
    word: &AtomicUsize,
    count: &AtomicU32,
    live: usize,
) -> Result<(), usize> {
    // What is not live does not even count: the slot may be another's now.
    let seen = word.load(Ordering::Relaxed);
    if seen != live {
        return Err(seen);
    }
    count.fetch_add(1, Ordering::SeqCst);
    let seen = word.load(Ordering::SeqCst);
    if seen != live {
        leave_shared(count);
        return Err(seen);
    }
    Ok(())
}

pub(super) fn leave_shared(count: &AtomicU32) {
    count.fetch_sub(1, Ordering::Release);
}

/// Marks an exclusive borrow with the bits of `mark`; where the word is not `live`, or others are
/// inside, says what the word is then.
pub(super) fn enter_exclusive<'a>(
    word: &AtomicUsize,
    counts: impl IntoIterator<Item = &'a AtomicU32>,
    live: usize,
    mark: usize,
) -> Result<(), usize> {
    word.compare_exchange(live, live | mark, Ordering::SeqCst, Ordering::Relaxed)?;
    if counts.into_iter().any(|count| count.load(Ordering::SeqCst) != 0) {
        word.store(live, Ordering::SeqCst);
        return Err(live | mark);
    }
    Ok(())
}

/// Only who is alone writes the word, so that it takes no exchange.
pub(super) fn leave_exclusive(word: &AtomicUsize, mark: usize) {
    word.store(word.load(Ordering::Relaxed) & !mark, Ordering::Release);
}
