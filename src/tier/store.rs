//! What a lower tier must be able to do: keep objects by key. Disk and remote stores are this, and
//! an engine's own store is this behind the C ABI's table of functions.
//!
//! Calls block; the tier's own threads make them ([`super::queue`]), several at a time. A store need
//! not check what it gives back: every object is verified before it is used.

use core::fmt;

use alloc::sync::Arc;

use super::ObjectKey;
use super::object::Label;

/// What became of one object of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Outcome {
    /// Not tried.
    #[default]
    None,
    /// Done: for a put, so that it survives what the store promises to survive.
    Done,
    /// The store has no such object.
    Absent,
    /// The store has something else there, of another length or kind; only of a get.
    Bad,
    /// There is no room.
    Full,
    /// It failed; the store may work again later.
    Failed,
}

/// An object to put: sealed, whole.
#[derive(Debug, Clone, Copy)]
pub struct Put<'a> {
    /// Its key.
    pub key: ObjectKey,
    /// Its bytes.
    pub object: &'a [u8],
    /// What it is of, for stores that tell what they hold ([`Store::watch`]).
    pub label: Option<&'a Label>,
}

/// Is told what a tier holds as that changes. Called with locks held: it calls neither the store nor
/// the tier, and returns soon.
pub trait Watcher: fmt::Debug + Send + Sync {
    /// First `gone` went, then `stored` came; what was there already may come again, and what was
    /// not may go.
    fn changed(&self, gone: &[ObjectKey], stored: &[&Label]);
}

/// An object to get.
#[derive(Debug)]
pub struct Get<'a> {
    /// Its key.
    pub key: ObjectKey,
    /// Where its bytes go; objects of a tier are all of this length.
    pub object: &'a mut [u8],
}

/// A part of an object to get.
#[derive(Debug)]
pub struct GetPart<'a> {
    /// The object's key.
    pub key: ObjectKey,
    /// Where in the object it begins: whole pages of 4,096 bytes.
    pub offset: u64,
    /// Where its bytes go: whole pages, too, that begin at a page of memory.
    pub bytes: &'a mut [u8],
}

/// A store of objects. Calls may come from several threads at once. A call that panics has failed;
/// nothing of what it did before that is relied upon.
pub trait Store: fmt::Debug + Send + Sync {
    /// Whether it has an object, where that is known without waiting; `None` where it has to ask.
    fn knows(&self, key: &ObjectKey) -> Option<bool>;

    /// Finds out which of the objects it has; false where that cannot be found out.
    fn exists(&self, keys: &[ObjectKey], found: &mut [bool]) -> bool;

    /// Puts objects; one outcome each.
    fn put(&self, objects: &[Put], outcomes: &mut [Outcome]);

    /// Gets objects; one outcome each. What an object holds that was not `Done` is of no
    /// consequence.
    fn get(&self, objects: &mut [Get], outcomes: &mut [Outcome]);

    /// The same, and shows each object that is done, by its number: as soon as it is there, where the
    /// store can, so that it is looked at while others are on their way. May show one twice.
    fn get_each(
        &self,
        objects: &mut [Get],
        outcomes: &mut [Outcome],
        see: &mut dyn FnMut(usize, &[u8]),
    ) {
        self.get(objects, outcomes);
        for (n, (get, outcome)) in objects.iter().zip(outcomes).enumerate() {
            if *outcome == Outcome::Done {
                see(n, get.object);
            }
        }
    }

    /// Whether it can give parts of objects ([`get_parts`](Self::get_parts)). False by default: then
    /// an engine that starts with the first layers waits for whole objects.
    fn gives_parts(&self) -> bool {
        false
    }

    /// Keeps objects as they are until [`unhold`](Self::unhold), as often as they are held; which of
    /// them it has.
    fn hold(&self, keys: &[ObjectKey], held: &mut [bool]) {
        let _ = keys;
        held.fill(false);
    }

    /// Ends that, for objects that are held.
    fn unhold(&self, keys: &[ObjectKey]) {
        let _ = keys;
    }

    /// Gets parts of objects that are held; one outcome each.
    fn get_parts(&self, parts: &mut [GetPart], outcomes: &mut [Outcome]) {
        let _ = parts;
        outcomes.fill(Outcome::Absent);
    }

    /// Removes objects; those it does not have are no failure.
    fn remove(&self, keys: &[ObjectKey]);

    /// Tells `watcher` what it holds, as far as it knows what that is of, and from then on what
    /// changes, in the order in which it does. False for a store that cannot know: then the tier
    /// tells what it sees.
    fn watch(&self, watcher: Arc<dyn Watcher>) -> bool {
        let _ = watcher;
        false
    }

    /// What fails since it refuses whoever calls, until a call succeeds: a password or key that it does
    /// not take, a certificate that is not trusted. None where it does not, as far as it knows. The text
    /// names no secret; " failed" follows it.
    fn refusal(&self) -> Option<&'static str> {
        None
    }

    /// Bytes and objects that it holds, where it knows.
    fn used(&self) -> Option<(u64, u64)> {
        None
    }
}
