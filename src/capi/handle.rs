//! Handles that can be checked without touching what they name.
//!
//! A handle is a number in the clothes of a pointer: a tag, the noun's kind, a generation and the
//! index of a slot in one fixed table. It is never followed, so a stale, foreign or invented
//! handle is answered with an error and not with a read of freed memory. On 64-bit machines the
//! tag makes it a non-canonical address: no pointer to a real object can pass for a handle, and a
//! caller that follows one faults at once.
//!
//! Each slot is one atomic word `[tag | kind | generation | exclusive]` beside the object's address;
//! a handle is live when it agrees with its slot's word above the low bits. Borrows are marked, so
//! that two calls on a per-handle noun at once, or a destroy during a call, is an error instead of a
//! race. Shared borrows are counted in shards, so that threads that share an object do not share a
//! cache line; `gate` has the protocol. A noun may have its calls wait for each other instead: `turns`.
//! Nothing else here locks, and this file knows no noun.
//!
//! A generation returns after 2^32 reuses of one slot (2^16 on 32-bit machines).

mod gate;
#[cfg(feature = "std")]
mod turns;
mod sync {
    pub(super) use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
}

use alloc::alloc::alloc;
use alloc::boxed::Box;
use core::alloc::Layout;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

#[cfg(feature = "std")]
pub(crate) use self::turns::{Waited, live, waited};
use super::shard::{Padded, SHARDS, own_shard};
use crate::error::{Error, Result};

/// Handles that a process can hold at once, all nouns together.
pub(crate) const MAX_HANDLES: usize = 4096;

/// Low bits: the slot's index in a handle; in a slot's word 0, or [`EXCLUSIVE`].
const LOW_BITS: u32 = if usize::BITS >= 64 { 16 } else { 12 };
const GENERATION_BITS: u32 = if usize::BITS >= 64 { 32 } else { 16 };
const KIND_SHIFT: u32 = LOW_BITS + GENERATION_BITS;
const LOW_MASK: usize = (1 << LOW_BITS) - 1;
/// Kind of a free slot. Its word keeps the generation of its next handle.
const FREE: usize = 0;
/// Kind of a slot that is being filled; no handle carries it.
const RESERVED: usize = 15;
/// Marks an exclusive borrow.
const EXCLUSIVE: usize = LOW_MASK;
/// Upper bits of every handle: `K`, where an address has room for it.
const TAG: usize = if usize::BITS >= 64 { 0x4b << (usize::BITS - 8) } else { 0 };

const _: () = assert!(MAX_HANDLES <= 1 << LOW_BITS);

/// A Rust object that C code holds by handle.
pub(crate) trait Noun: Send + Sized {
    /// The opaque type of the C ABI.
    type Handle;
    /// 1 to 14, one a noun.
    const KIND: usize;
    /// The parameter's name in errors.
    const NAME: &'static str;
    /// What calls do that meet in one object.
    const SHARING: Sharing = Sharing::Counts;
}

/// What calls do that meet in one object.
pub(crate) enum Sharing {
    /// Some share it ([`shared`]); who wants it alone ([`exclusive`]) is refused meanwhile.
    Counts,
    /// All want it alone: nobody looks for those who share it.
    #[cfg_attr(not(feature = "std"), allow(dead_code))] // its nouns need std
    Refuses,
    /// All want it alone, and wait for it ([`waited`]).
    #[cfg(feature = "std")]
    Waits,
}

/// In a cache line of its own: what is done to one handle slows no other.
#[repr(align(64))]
struct Slot {
    word: AtomicUsize,
    object: AtomicPtr<()>,
    poisoned: AtomicBool,
    #[cfg(feature = "std")]
    turn: std::sync::Mutex<()>,
}

impl Slot {
    const fn new() -> Self {
        Slot {
            word: AtomicUsize::new(0),
            object: AtomicPtr::new(ptr::null_mut()),
            poisoned: AtomicBool::new(false),
            #[cfg(feature = "std")]
            turn: std::sync::Mutex::new(()),
        }
    }
}

static SLOTS: [Slot; MAX_HANDLES] = [const { Slot::new() }; MAX_HANDLES];
/// Shared borrows of each slot. Only pages that are used take memory.
static SHARED: [[Padded<AtomicU32>; SHARDS]; MAX_HANDLES] =
    [const { [const { Padded(AtomicU32::new(0)) }; SHARDS] }; MAX_HANDLES];
/// Where the search for a free slot starts: it walks round, so that generations age evenly.
static NEXT: AtomicUsize = AtomicUsize::new(0);

const fn word(kind: usize, generation: usize, low: usize) -> usize {
    let generation = generation & ((1 << GENERATION_BITS) - 1);
    TAG | kind << KIND_SHIFT | generation << LOW_BITS | low
}

const fn kind_of(word: usize) -> usize {
    (word >> KIND_SHIFT) & 15
}

const fn generation_of(word: usize) -> usize {
    (word >> LOW_BITS) & ((1 << GENERATION_BITS) - 1)
}

/// Moves `object` to the heap, or answers that there is no room.
fn boxed<T>(object: T) -> Result<Box<T>> {
    let layout = Layout::new::<T>();
    if layout.size() == 0 {
        return Ok(Box::new(object));
    }
    // SAFETY: the layout has a size; the block is filled before the box owns it, and a box frees
    // with the same allocator and layout.
    unsafe {
        let block = alloc(layout).cast::<T>();
        if block.is_null() {
            return Err(Error::OutOfMemory { bytes: layout.size() as u64 });
        }
        block.write(object);
        Ok(Box::from_raw(block))
    }
}

/// Gives `object` a handle. The object lives until [`destroy`].
pub(crate) fn publish<T: Noun>(object: T) -> Result<*mut T::Handle> {
    const { assert!(T::KIND > FREE && T::KIND < RESERVED) };
    let object = boxed(object)?;
    let start = NEXT.fetch_add(1, Ordering::Relaxed);
    for step in 0..MAX_HANDLES {
        let index = start.wrapping_add(step) % MAX_HANDLES;
        let slot = &SLOTS[index];
        let seen = slot.word.load(Ordering::Relaxed);
        if kind_of(seen) != FREE {
            continue;
        }
        let generation = generation_of(seen);
        let taken = word(RESERVED, generation, 0);
        let claim = slot.word.compare_exchange(seen, taken, Ordering::Acquire, Ordering::Relaxed);
        if claim.is_err() {
            continue;
        }
        slot.object.store(Box::into_raw(object).cast(), Ordering::Relaxed);
        slot.poisoned.store(false, Ordering::Relaxed);
        slot.word.store(word(T::KIND, generation, 0), Ordering::Release);
        return Ok(ptr::without_provenance_mut(word(T::KIND, generation, index)));
    }
    Err(Error::TooManyHandles { limit: MAX_HANDLES as u32 })
}

/// The index of the slot that a handle names and the word of a live one, if its kind can be right;
/// whether it is live only the slot can say.
fn slot_of<T: Noun>(handle: *const T::Handle) -> Result<(usize, usize)> {
    let value = handle.addr();
    if value == 0 {
        return Err(Error::NullPointer { what: T::NAME });
    }
    let index = value & LOW_MASK;
    // Only the generation may be the caller's: tag and kind must be ours.
    if index >= MAX_HANDLES || value & !LOW_MASK != word(T::KIND, generation_of(value), 0) {
        return Err(Error::StaleHandle { what: T::NAME });
    }
    Ok((index, value & !LOW_MASK))
}

/// Why a word that is not `live` refuses a borrow.
fn refused<T: Noun>(seen: usize, live: usize) -> Error {
    if seen & !LOW_MASK != live {
        return Error::StaleHandle { what: T::NAME };
    }
    busy()
}

fn busy() -> Error {
    Error::InvalidState { why: "the handle is in use by another call" }
}

/// Counts a shared borrow: the slot, and where it is counted.
fn enter_shared<T: Noun>(handle: *const T::Handle) -> Result<(&'static Slot, &'static AtomicU32)> {
    let (index, live) = slot_of::<T>(handle)?;
    let (slot, count) = (&SLOTS[index], &SHARED[index][own_shard()].0);
    gate::enter_shared(&slot.word, count, live).map_err(|seen| refused::<T>(seen, live))?;
    Ok((slot, count))
}

/// Marks an exclusive borrow.
fn enter_exclusive<T: Noun>(handle: *const T::Handle) -> Result<&'static Slot> {
    let (index, live) = slot_of::<T>(handle)?;
    let shards: &[Padded<AtomicU32>] = match T::SHARING {
        Sharing::Counts => &SHARED[index],
        _ => &[],
    };
    let (slot, counts) = (&SLOTS[index], shards.iter().map(|count| &count.0));
    gate::enter_exclusive(&slot.word, counts, live, EXCLUSIVE)
        .map_err(|seen| refused::<T>(seen, live))?;
    Ok(slot)
}

/// A borrow of a live object; ends with the value. A panic inside it poisons the object.
pub(crate) struct Borrow<T> {
    slot: &'static Slot,
    /// Where a shared borrow is counted; `None` for an exclusive one.
    count: Option<&'static AtomicU32>,
    /// A caller that unwinds for reasons of its own does not poison what it calls.
    unwinding: bool,
    object: PhantomData<*mut T>,
}

#[cfg(feature = "std")]
fn unwinding() -> bool {
    std::thread::panicking()
}

#[cfg(not(feature = "std"))]
fn unwinding() -> bool {
    false
}

impl<T> Borrow<T> {
    fn new(slot: &'static Slot, count: Option<&'static AtomicU32>) -> Result<Self> {
        Self { slot, count, unwinding: unwinding(), object: PhantomData }.check()
    }

    fn check(self) -> Result<Self> {
        if self.slot.poisoned.load(Ordering::Relaxed) { Err(Error::Poisoned) } else { Ok(self) }
    }

    fn object(&self) -> *mut T {
        self.slot.object.load(Ordering::Relaxed).cast()
    }
}

impl<T> Drop for Borrow<T> {
    fn drop(&mut self) {
        if unwinding() && !self.unwinding {
            self.slot.poisoned.store(true, Ordering::Relaxed);
        }
        match self.count {
            Some(count) => gate::leave_shared(count),
            None => gate::leave_exclusive(&self.slot.word, EXCLUSIVE),
        }
    }
}

/// Shared use of an object, beside other shared uses.
pub(crate) struct Shared<T>(Borrow<T>);

/// The only use of an object at the time.
pub(crate) struct Exclusive<T>(Borrow<T>);

impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the kind says that the object is a T, and the borrow count keeps it alive and
        // unaliased by exclusive borrows.
        unsafe { &*self.0.object() }
    }
}

impl<T> Deref for Exclusive<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: as for Shared; this borrow is the only one.
        unsafe { &*self.0.object() }
    }
}

impl<T> DerefMut for Exclusive<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as for Shared; this borrow is the only one.
        unsafe { &mut *self.0.object() }
    }
}

/// Borrows the object of a live handle beside other shared borrows.
pub(crate) fn shared<T: Noun + Sync>(handle: *const T::Handle) -> Result<Shared<T>> {
    const { assert!(matches!(T::SHARING, Sharing::Counts)) };
    let (slot, count) = enter_shared::<T>(handle)?;
    Borrow::new(slot, Some(count)).map(Shared)
}

/// Borrows the object of a live handle alone.
///
/// # Errors
/// `InvalidState` while another call is inside the object.
pub(crate) fn exclusive<T: Noun>(handle: *const T::Handle) -> Result<Exclusive<T>> {
    let slot = enter_exclusive::<T>(handle)?;
    Borrow::new(slot, None).map(Exclusive)
}

/// Ends a handle and drops its object, poisoned or not. NULL is accepted.
///
/// # Errors
/// `InvalidState` while a call is inside the object.
pub(crate) fn destroy<T: Noun>(handle: *mut T::Handle) -> Result<()> {
    if handle.is_null() {
        return Ok(());
    }
    #[cfg(feature = "std")]
    let turn = match T::SHARING {
        Sharing::Waits => Some(turns::last::<T>(handle)?),
        _ => None,
    };
    let slot = enter_exclusive::<T>(handle)?;
    let object = slot.object.swap(ptr::null_mut(), Ordering::Relaxed).cast::<T>();
    let generation = generation_of(slot.word.load(Ordering::Relaxed)).wrapping_add(1);
    slot.word.store(word(FREE, generation, 0), Ordering::Release);
    #[cfg(feature = "std")]
    drop(turn);
    // SAFETY: publish made it from a box of T (the kind says so), and the exclusive borrow that
    // the store ended made this the only place that has it. The slot is free before the drop, so
    // that a panic there leaks no slot, and who waited for its turn is not kept.
    drop(unsafe { Box::from_raw(object) });
    Ok(())
}

#[cfg(test)]
mod tests;
