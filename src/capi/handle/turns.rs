//! Borrows that wait for each other instead of being refused: the lock is the slot's, and so outlives
//! what the slot holds. A call that waited finds out after the lock whether its handle is still live.

use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError, TryLockError};

use super::{Noun, SLOTS, Sharing, Slot, refused, slot_of, unwinding};
use crate::error::{Error, Result};

/// A slot's lock. Whether what it guards is poisoned, the slot knows: the lock serves the next handle
/// as well.
pub(super) type Turn = MutexGuard<'static, ()>;

/// The only use of an object at the time; the others wait. A panic inside it poisons the object.
pub(crate) struct Waited<T> {
    slot: &'static Slot,
    /// A caller that unwinds for reasons of its own does not poison what it calls.
    unwinding: bool,
    _turn: Turn,
    object: PhantomData<*mut T>,
}

/// Waits for the calls of other threads in the object of a handle, which was live before and must
/// be so after.
pub(crate) fn waited<T: Noun>(handle: *const T::Handle) -> Result<Waited<T>> {
    const { assert!(matches!(T::SHARING, Sharing::Waits)) };
    let (index, live) = slot_of::<T>(handle)?;
    let slot = &SLOTS[index];
    check_live::<T>(slot, live)?;
    let turn = slot.turn.lock().unwrap_or_else(PoisonError::into_inner);
    check_live::<T>(slot, live)?;
    if slot.poisoned.load(Ordering::Relaxed) {
        return Err(Error::Poisoned);
    }
    Ok(Waited { slot, unwinding: unwinding(), _turn: turn, object: PhantomData })
}

/// Refuses a handle that is not live now. Another thread may end it at once.
pub(crate) fn live<T: Noun>(handle: *const T::Handle) -> Result<()> {
    let (index, live) = slot_of::<T>(handle)?;
    check_live::<T>(&SLOTS[index], live)
}

fn check_live<T: Noun>(slot: &Slot, live: usize) -> Result<()> {
    let seen = slot.word.load(Ordering::Acquire);
    if seen == live { Ok(()) } else { Err(refused::<T>(seen, live)) }
}

/// The turn of who ends the object: now or not at all.
pub(super) fn last<T: Noun>(handle: *const T::Handle) -> Result<Turn> {
    let (index, live) = slot_of::<T>(handle)?;
    let slot = &SLOTS[index];
    // What is not live must not keep the slot's next object from its end.
    check_live::<T>(slot, live)?;
    match slot.turn.try_lock() {
        Ok(turn) => Ok(turn),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => Err(super::busy()),
    }
}

impl<T> Deref for Waited<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the kind says that the object is a T; nobody else uses or ends it before the
        // turn is over.
        unsafe { &*self.slot.object.load(Ordering::Relaxed).cast() }
    }
}

impl<T> DerefMut for Waited<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.slot.object.load(Ordering::Relaxed).cast() }
    }
}

impl<T> Drop for Waited<T> {
    fn drop(&mut self) {
        if unwinding() && !self.unwinding {
            self.slot.poisoned.store(true, Ordering::Relaxed);
        }
    }
}
