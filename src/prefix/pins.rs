//! Pins: prefixes that eviction must leave alone.
//!
//! A pin is a count on the edge at whose end its prefix ends. That is enough to protect exactly the
//! prefix: an edge with a pin is never evicted, whatever is above it has it as a descendant and is
//! no leaf, and a prefix that ends inside an edge splits it first. Splitting leaves the count with
//! the lower part, where the pinned prefix still ends.

use alloc::vec::Vec;

use super::tree::Kind;
use super::{NIL, Position, PrefixIndex};
use crate::error::{Error, Result};

/// A pin. Carries a generation, so that an unlocked id is refused and not mistaken for a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct PinId(pub u64);

#[derive(Debug, Clone, Copy)]
struct Slot {
    /// Odd while the slot is in use.
    generation: u32,
    /// In use: the pinned edge, or `NIL` for the empty prefix. Else: the next free slot, or `NIL`.
    node: u32,
}

/// The live pins.
#[derive(Debug)]
pub(super) struct Pins {
    slots: Vec<Slot>,
    free: u32,
    live: usize,
}

impl Pins {
    pub(super) const fn new() -> Self {
        Pins { slots: Vec::new(), free: NIL, live: 0 }
    }

    pub(super) fn live(&self) -> usize {
        self.live
    }

    pub(super) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>()
    }

    /// The edges of all pins, `NIL` for empty prefixes.
    pub(super) fn nodes(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots.iter().filter(|s| s.generation % 2 == 1).map(|s| s.node)
    }

    fn reserve(&mut self) -> Result<()> {
        if self.free == NIL {
            if self.slots.len() >= NIL as usize {
                return Err(Error::Overflow { what: "number of pins" });
            }
            let refused = Error::OutOfMemory { bytes: size_of::<Slot>() as u64 };
            self.slots.try_reserve(1).map_err(|_| refused)?;
        }
        Ok(())
    }

    /// A new pin of `node`; room was reserved.
    fn add(&mut self, node: u32) -> PinId {
        self.live += 1;
        let mut at = self.free;
        if at == NIL {
            at = self.slots.len() as u32;
            self.slots.push(Slot { generation: 1, node });
        } else {
            let slot = &mut self.slots[at as usize];
            self.free = slot.node;
            *slot = Slot { generation: slot.generation.wrapping_add(1), node };
        }
        PinId(u64::from(self.slots[at as usize].generation) << 32 | u64::from(at))
    }

    /// The node of a live pin.
    fn node(&self, pin: PinId) -> Result<u32> {
        let (at, generation) = (pin.0 as u32, (pin.0 >> 32) as u32);
        match self.slots.get(at as usize) {
            Some(slot) if slot.generation == generation && generation % 2 == 1 => Ok(slot.node),
            _ => Err(Error::StaleHandle { what: "pin" }),
        }
    }

    /// Ends a live pin.
    fn remove(&mut self, pin: PinId) {
        let at = pin.0 as u32;
        let slot = &mut self.slots[at as usize];
        *slot = Slot { generation: slot.generation.wrapping_add(1), node: self.free };
        self.free = at;
        self.live -= 1;
    }
}

impl PrefixIndex {
    /// Pins the prefix that ends at `at` until [`Self::unlock`], and touches it. Blocks below it
    /// are not protected. The empty prefix can be pinned too, which protects nothing.
    ///
    /// # Errors
    /// `StaleHandle` if the prefix is no longer cached, `OutOfMemory`. Nothing changed then.
    pub fn lock(&mut self, at: Position) -> Result<PinId> {
        self.pins.reserve()?;
        let node = self.settle(at)?;
        if node != NIL {
            self.tree[node].pins += 1; // there are fewer than 2^32 pins in all
            self.note_use(node, 0);
        }
        Ok(self.pins.add(node))
    }

    /// Ends a pin. Does not touch: the prefix is as recent as its last touch.
    ///
    /// # Errors
    /// `StaleHandle` for a pin that is not live. Nothing changed then.
    pub fn unlock(&mut self, pin: PinId) -> Result<()> {
        let node = self.pins.node(pin)?;
        self.pins.remove(pin);
        if node != NIL {
            self.tree[node].pins -= 1;
            self.queue_if_leaf(node);
        }
        Ok(())
    }

    /// Makes the prefix that ends at `at` the most recently used.
    ///
    /// # Errors
    /// `StaleHandle` if it is no longer cached, `OutOfMemory`. Nothing changed then.
    pub fn touch(&mut self, at: Position) -> Result<()> {
        let node = self.settle(at)?;
        self.note_use(node, 0);
        Ok(())
    }

    /// Makes the prefix that ends at `at` the most recently used, as at the end of a request that
    /// used it without a pin. Not one use more where uses are counted.
    ///
    /// # Errors
    /// `StaleHandle` if it is no longer cached, `OutOfMemory`. Nothing changed then.
    pub fn end_use(&mut self, at: Position) -> Result<()> {
        let node = self.settle(at)?;
        self.refresh(node, true);
        Ok(())
    }

    /// Whether the prefix that ends at `at` is known to be cached: false for a stale position.
    pub fn is_cached(&self, at: Position) -> bool {
        self.find(at).is_ok()
    }

    /// Makes a pinned prefix the most recently used, as at the end of a request that used it. Not
    /// one use more where uses are counted: that was the lock.
    ///
    /// # Errors
    /// `StaleHandle` for a pin that is not live. Nothing changed then.
    pub fn touch_pinned(&mut self, pin: PinId) -> Result<()> {
        let node = self.pins.node(pin)?;
        self.refresh(node, true);
        Ok(())
    }

    /// Where a pinned prefix ends: good as long as the pin, whatever is evicted below it.
    ///
    /// # Errors
    /// `StaleHandle` for a pin that is not live.
    pub fn pinned(&self, pin: PinId) -> Result<Position> {
        let node = self.pins.node(pin)?;
        if node == NIL {
            return Ok(Position::default());
        }
        let edge = &self.tree[node];
        Ok(Position { node, generation: edge.generation, blocks: edge.end })
    }

    /// Ends a pin at the end of the request that used the prefix: [`Self::touch_pinned`] and
    /// [`Self::unlock`].
    ///
    /// # Errors
    /// `StaleHandle` for a pin that is not live. Nothing changed then.
    pub fn release(&mut self, pin: PinId) -> Result<()> {
        self.touch_pinned(pin)?;
        self.unlock(pin)
    }

    /// The edge that ends exactly at `at`, split off if need be; `NIL` for the empty prefix.
    pub(super) fn settle(&mut self, at: Position) -> Result<u32> {
        let (node, inside) = self.find(at)?;
        if node == NIL || inside == self.tree[node].len {
            return Ok(node);
        }
        self.reserve_nodes(1)?;
        Ok(self.tree.split(node, inside))
    }

    /// The edge in or at whose end `at` is, and how many of its blocks are before it; `NIL` for the
    /// empty prefix.
    pub(super) fn find(&self, at: Position) -> Result<(u32, u32)> {
        if at.blocks == 0 {
            return Ok((NIL, 0));
        }
        let stale = Err(Error::StaleHandle { what: "prefix position" });
        let mut node = match self.tree.get(at.node) {
            Some(n) if n.kind == Kind::Edge && n.generation == at.generation => at.node,
            _ => return stale,
        };
        if at.blocks > self.tree[node].end {
            return stale;
        }
        // The edge may have been split since: then the end of the prefix is further up.
        while at.blocks <= self.tree[node].end - self.tree[node].len {
            node = self.tree.owner(node);
        }
        let edge = &self.tree[node];
        Ok((node, at.blocks - (edge.end - edge.len)))
    }
}
