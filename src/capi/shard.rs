//! What many threads count on, kept in several cache lines: each thread has one of its own, mostly.

/// Lines that are kept of one thing.
pub(crate) const SHARDS: usize = 8;

/// A value in a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Padded<T>(pub(crate) T);

/// The shard of this thread: threads take turns.
#[cfg(feature = "std")]
pub(crate) fn own_shard() -> usize {
    use core::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    std::thread_local! {
        static OWN: core::cell::Cell<usize> = const { core::cell::Cell::new(usize::MAX) };
    }
    match OWN.get() {
        usize::MAX => {
            let own = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            OWN.set(own);
            own
        }
        own => own,
    }
}

/// Nothing tells threads apart.
#[cfg(not(feature = "std"))]
pub(crate) fn own_shard() -> usize {
    0
}

/// A lock whose readers do not wait for each other, nor write to one line: a reader takes the lock
/// of its shard, a writer takes all of them, in order.
#[cfg(feature = "std")]
pub(crate) mod lock {
    use core::cell::UnsafeCell;
    use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

    use super::{Padded, SHARDS, own_shard};
    use crate::error::{Error, Result};

    /// See the module. A panic under a writer's lock poisons it.
    #[derive(Debug)]
    pub(crate) struct ShardedLock<T> {
        shards: [Padded<RwLock<()>>; SHARDS],
        value: UnsafeCell<T>,
    }

    // SAFETY: `&T` is shared between readers and `&mut T` goes to one writer at a time.
    unsafe impl<T: Send + Sync> Sync for ShardedLock<T> {}

    impl<T> ShardedLock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self { shards: Default::default(), value: UnsafeCell::new(value) }
        }

        /// Runs `work` beside other readers.
        pub(crate) fn read<R>(&self, work: impl FnOnce(&T) -> Result<R>) -> Result<R> {
            let _guard: RwLockReadGuard<'_, ()> =
                self.shards[own_shard()].0.read().map_err(|_| Error::Poisoned)?;
            // SAFETY: a writer would hold this shard's lock.
            work(unsafe { &*self.value.get() })
        }

        /// Runs `work` alone.
        pub(crate) fn write<R>(&self, work: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
            let mut guards: [Option<RwLockWriteGuard<'_, ()>>; SHARDS] = Default::default();
            for (guard, shard) in guards.iter_mut().zip(&self.shards) {
                *guard = Some(shard.0.write().map_err(|_| Error::Poisoned)?);
            }
            // SAFETY: every reader and writer would hold one of these locks.
            work(unsafe { &mut *self.value.get() })
        }
    }
}
