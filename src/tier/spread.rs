//! Over how many objects a block is spread.
//!
//! All objects of a configuration are of one size, that of a block with sealed records. A block that has
//! raw rows in some layer group (a sink) is larger, and is several objects: each has, at the place of a
//! layer's records, the next bytes of that layer's raw rows, so that layers stay parts that are
//! verified alone. Groups whose block is sealed have their records in the first object; whatever is not
//! filled is zero.
//!
//! A run of objects is counted from the first object of some block of a sequence on, block after block.

use alloc::vec::Vec;
use core::ops::Range;

use crate::error::{Error, Result};
use crate::layout::GroupLayout;

/// The most objects of a block: a raw number has 16 bits, a sealed one 2 at least.
pub const MOST_OBJECTS: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    /// Blocks at the beginning of a sequence that have raw rows.
    sinks: usize,
    layer_bytes: usize,
    raw_layer_bytes: usize,
}

impl Group {
    fn objects(&self) -> usize {
        self.raw_layer_bytes.div_ceil(self.layer_bytes)
    }
}

/// That of all blocks of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spread {
    groups: Vec<Group>,
}

impl Spread {
    pub(super) fn new(layouts: &[GroupLayout]) -> Result<Self> {
        let overflow = Error::Overflow { what: "object bytes" };
        let bytes = |bytes: u64| usize::try_from(bytes).map_err(|_| overflow);
        let mut groups = Vec::new();
        for layout in layouts {
            let raw = layout.staging_block_bytes() / u64::from(layout.spec().layers);
            let group = Group {
                sinks: layout.sink_blocks() as usize,
                layer_bytes: bytes(layout.layer_bytes())?,
                raw_layer_bytes: bytes(raw)?,
            };
            if group.sinks > 0 && group.objects() > MOST_OBJECTS {
                return Err(overflow);
            }
            groups.push(group);
        }
        Ok(Self { groups })
    }

    /// Objects of a block of a sequence.
    pub fn objects(&self, block: usize) -> usize {
        let raw = self.groups.iter().filter(|group| block < group.sinks).map(Group::objects);
        raw.max().unwrap_or(1)
    }

    /// The block from which on fewer groups are raw than in `block`; `None` where none is.
    fn end_of_run(&self, block: usize) -> Option<usize> {
        self.groups.iter().map(|group| group.sinks).filter(|&end| block < end).min()
    }

    /// Objects of `blocks` blocks from block `first` on.
    pub fn span(&self, first: usize, blocks: usize) -> usize {
        let (mut block, end, mut objects) = (first, first.saturating_add(blocks), 0);
        while let Some(next) = self.end_of_run(block).filter(|_| block < end) {
            let next = next.min(end);
            objects += (next - block) * self.objects(block);
            block = next;
        }
        objects + end - block
    }

    /// Where object `n` from block `first` on belongs: the block, and which of its objects it is.
    pub fn place(&self, first: usize, n: usize) -> (usize, usize) {
        let (mut block, mut n) = (first, n);
        while let Some(next) = self.end_of_run(block) {
            let objects = self.objects(block);
            if n < (next - block) * objects {
                return (block + n / objects, n % objects);
            }
            (n, block) = (n - (next - block) * objects, next);
        }
        // From here on there is one a block.
        (block + n, 0)
    }

    /// Blocks that the first `objects` objects from block `first` on are all of.
    pub fn whole(&self, first: usize, objects: usize) -> usize {
        self.place(first, objects).0 - first
    }

    /// The chunks of layers of a raw slot that object `n` of a block has: where each begins in the slot,
    /// where in the object's bytes of the group, counted from layer `first` on, and how long it is.
    pub fn chunks(
        &self,
        group: usize,
        n: usize,
        layers: Range<u32>,
    ) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let Group { layer_bytes, raw_layer_bytes, .. } = self.groups[group];
        let at = |n: usize| (n * layer_bytes).min(raw_layer_bytes);
        let (begin, bytes, first) = (at(n), at(n + 1) - at(n), layers.start);
        layers.filter(move |_| bytes > 0).map(move |layer| {
            let at = layer as usize * raw_layer_bytes + begin;
            (at, (layer - first) as usize * layer_bytes, bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{FormatClass, KvFormat};
    use crate::layout::GroupSpec;

    fn layout(format: KvFormat, sinks: u32) -> GroupLayout {
        let group = GroupSpec::uniform(3, 2, 64, format);
        GroupLayout::new(GroupSpec { sink_tokens: 64 * sinks, ..group }, 64).unwrap()
    }

    #[test]
    fn runs_of_objects_are_runs_of_blocks() {
        let formats = [(KvFormat::F16, 0), (KvFormat::Kt4v4, 2), (KvFormat::Kt2v2, 1)];
        let layouts = formats.map(|(format, sinks)| layout(format, sinks));
        let spread = Spread::new(&layouts).unwrap();
        let objects: Vec<usize> = (0..5).map(|block| spread.objects(block)).collect();
        assert!(objects[0] > objects[1] && objects[1] > 1, "{objects:?}");
        assert_eq!(objects[2..], [1; 3]);
        for first in 0..5 {
            let mut n = 0;
            for block in first..first + 6 {
                assert_eq!(spread.span(first, block - first), n);
                for object in 0..spread.objects(block) {
                    assert_eq!(spread.place(first, n), (block, object));
                    assert_eq!(spread.whole(first, n), block - first);
                    n += 1;
                }
            }
        }
    }

    #[test]
    fn chunks_are_all_of_a_slot() {
        for format in KvFormat::ALL.iter().copied().filter(|f| f.class() == FormatClass::Tile) {
            let layout = layout(format, 1);
            let spread = Spread::new(core::slice::from_ref(&layout)).unwrap();
            let mut covered = alloc::vec![0; layout.staging_block_bytes() as usize];
            for n in 0..spread.objects(0) {
                let (mut some, mut object) = (false, alloc::vec![0; layout.block_bytes() as usize]);
                for (at, to, bytes) in spread.chunks(0, n, 0..3) {
                    covered[at..at + bytes].iter_mut().for_each(|byte| *byte += 1);
                    object[to..to + bytes].iter_mut().for_each(|byte| *byte += 1);
                    some = true;
                }
                assert!(some && object.iter().all(|&byte| byte <= 1), "{format:?}: {n}");
            }
            assert!(covered.iter().all(|&byte| byte == 1), "{format:?}");
            assert_eq!(spread.chunks(0, 8, 0..3).count(), 0);
        }
    }
}
