//! The parts of an object: consecutive layers that have a checksum of their own, and so can be
//! verified, and used, before the rest has come.
//!
//! A part is one layer; more where a head has no room for the sums of all of them, or where layers are
//! so small that of the pages they lie in more than a quarter would be read twice. It never spans two
//! layer groups. Parts are read in the order in which a model needs them: layer
//! groups are interleaved in proportion to their layers, since a model alternates between them; those
//! that lie one behind the other, several at once ([`Read`]). Past the page cache only whole pages are
//! read: a page that two reads share is read for each.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;

use super::object::{HEAD_BYTES, MOST_PARTS, object_bytes};
use crate::error::{Error, Result};
use crate::layout::GroupLayout;

/// Parts of so many layers, and the first of each group.
fn divide(layouts: &[GroupLayout], layers_each: u32, padded: u64) -> (Vec<Part>, Vec<usize>) {
    let (mut list, mut first, mut start) = (Vec::new(), Vec::new(), 0);
    for (group, layout) in layouts.iter().enumerate() {
        first.push(list.len());
        let all = layout.spec().layers;
        for n in 0..all.div_ceil(layers_each) {
            let first_layer = n * layers_each;
            let layers = layers_each.min(all - first_layer);
            let end = start + u64::from(layers) * layout.layer_bytes();
            list.push(Part { group: group as u32, first_layer, layers, start, end });
            start = end;
        }
    }
    if let Some(last) = list.last_mut() {
        last.end = padded - HEAD_BYTES as u64;
    }
    (list, first)
}

/// Some layers of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Their layer group.
    pub group: u32,
    /// The first of them, counted within the group.
    pub first_layer: u32,
    /// How many.
    pub layers: u32,
    /// Their bytes in the payload; the padding belongs to the last part.
    start: u64,
    end: u64,
}

impl Part {
    /// Its bytes in the payload.
    pub fn payload(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    /// The pages of an object that have it: where they begin, and how many bytes they are. The first
    /// part comes with the head.
    pub fn pages(&self) -> Range<u64> {
        let head = HEAD_BYTES as u64;
        let begin = if self.start == 0 { 0 } else { head + self.start / head * head };
        begin..head + self.end.next_multiple_of(head)
    }

    /// Its bytes within a read.
    pub fn within(&self, read: &Read) -> Range<usize> {
        let skip = (HEAD_BYTES as u64 + self.start - read.pages.start) as usize;
        skip..skip + (self.end - self.start) as usize
    }
}

/// Parts that lie one behind the other and are read at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Their numbers.
    pub parts: Range<usize>,
    /// The pages of an object that have them.
    pages: Range<u64>,
}

impl Read {
    /// Where in the object it begins.
    pub fn offset(&self) -> u64 {
        self.pages.start
    }

    /// How much it reads.
    pub fn bytes(&self) -> usize {
        (self.pages.end - self.pages.start) as usize
    }
}

/// The first part alone, so that it is there soon; then twice as much each time, since many small reads
/// take longer than few large ones, up to [`MOST_READ_BYTES`].
fn reads(list: &[Part], order: &[usize]) -> Vec<Read> {
    let mut reads: Vec<Read> = Vec::new();
    let mut most = 0;
    for &n in order {
        let pages = list[n].pages();
        match reads.last_mut() {
            Some(read) if read.parts.end == n && pages.end - read.pages.start <= most => {
                (read.parts.end, read.pages.end) = (n + 1, pages.end);
            }
            _ => {
                most = match reads.last() {
                    None => 0,
                    Some(read) => (2 * (read.bytes() as u64)).min(MOST_READ_BYTES),
                };
                reads.push(Read { parts: n..n + 1, pages });
            }
        }
    }
    reads
}

/// Past so many bytes a read is hardly slower for being one of several.
const MOST_READ_BYTES: u64 = 256 << 10;

/// All parts of the objects of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    list: Box<[Part]>,
    reads: Box<[Read]>,
    /// Of each group, its first part.
    first: Box<[usize]>,
    layers_each: u32,
}

impl Parts {
    /// For objects with a block of each of these layouts.
    ///
    /// # Errors
    /// `Overflow` where an object has no size.
    pub(super) fn new(layouts: &[GroupLayout], payload_bytes: u64) -> Result<Self> {
        let padded = object_bytes(payload_bytes).ok_or(Error::Overflow { what: "object bytes" })?;
        let layers: u64 = layouts.iter().map(|layout| u64::from(layout.spec().layers)).sum();
        let deepest = layouts.iter().map(|layout| layout.spec().layers).max().unwrap_or(1);
        let least = u32::try_from(layers.div_ceil(MOST_PARTS as u64)).unwrap_or(u32::MAX).max(1);
        let mut layers_each = least.min(deepest);
        let (list, first) = loop {
            let (list, first) = divide(layouts, layers_each, padded);
            let read: u64 = list.iter().map(|part| part.pages().end - part.pages().start).sum();
            let fits = list.len() <= MOST_PARTS && read <= padded + padded / 4;
            if fits || layers_each == deepest {
                break (list, first);
            }
            layers_each += 1;
        };
        // How far down the model a part is; the first is read with the head, before all others.
        let depth = |n: usize| {
            let part: &Part = &list[n];
            let layers = f64::from(layouts[part.group as usize].spec().layers);
            (f64::from(part.first_layer) + f64::from(part.layers) / 2.0) / layers
        };
        let mut order: Vec<usize> = (0..list.len()).collect();
        if let Some(rest) = order.get_mut(1..) {
            rest.sort_by(|&a, &b| depth(a).total_cmp(&depth(b)));
        }
        let reads = reads(&list, &order).into();
        Ok(Self { list: list.into(), reads, first: first.into(), layers_each })
    }

    /// How many.
    #[allow(clippy::len_without_is_empty)] // there is always one
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// All of them, as they lie in the object.
    pub fn iter(&self) -> core::slice::Iter<'_, Part> {
        self.list.iter()
    }

    /// Part `n`.
    pub fn get(&self, n: usize) -> &Part {
        &self.list[n]
    }

    /// What is read, in this order: each part once.
    pub fn reads(&self) -> &[Read] {
        &self.reads
    }

    /// The numbers of the parts in the order in which they are read.
    pub fn order(&self) -> impl Iterator<Item = usize> + '_ {
        self.reads.iter().flat_map(|read| read.parts.clone())
    }

    /// The number of the part with a layer, which the configuration has.
    pub fn of(&self, group: u32, layer: u32) -> usize {
        self.first[group as usize] + (layer / self.layers_each) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::KvFormat;
    use crate::layout::GroupSpec;

    fn parts(layers: &[u32], dim: u32) -> Parts {
        let of = |&layers: &u32| {
            GroupLayout::new(GroupSpec::uniform(layers, 1, dim, KvFormat::F16), 16).unwrap()
        };
        let layouts: Vec<GroupLayout> = layers.iter().map(of).collect();
        let bytes = layouts.iter().map(GroupLayout::block_bytes).sum();
        Parts::new(&layouts, bytes).unwrap()
    }

    #[test]
    fn parts_cover_an_object_and_pages_cover_parts() {
        let cases = [(&[5][..], 64, 5), (&[1], 8, 1), (&[3, 7], 24, 3), (&[2, 4, 1], 256, 7)];
        for (layers, dim, count) in cases {
            let parts = parts(layers, dim);
            assert_eq!(parts.len(), count, "{layers:?} of {dim}");
            let mut end = 0;
            for part in parts.iter() {
                assert_eq!(part.payload().start, end);
                end = part.payload().end;
                assert!(parts.get(parts.of(part.group, part.first_layer)) == part);
            }
            assert_eq!(end % 4096, 0);
            assert_eq!(parts.get(0).pages().start, 0);
            for read in parts.reads() {
                assert!(read.offset() % 4096 == 0 && read.bytes() % 4096 == 0);
                for part in read.parts.clone().map(|n| parts.get(n)) {
                    let within = part.within(read);
                    assert_eq!(within.len(), part.payload().len());
                    let at = read.offset() as usize + within.start;
                    assert_eq!(at, HEAD_BYTES + part.payload().start);
                    assert!(within.end <= read.bytes());
                }
            }
            let mut order: Vec<usize> = parts.order().collect();
            assert_eq!(order[0], 0);
            order.sort_unstable();
            assert!(order.iter().enumerate().all(|(n, &part)| n == part));
        }
    }

    #[test]
    fn groups_are_read_as_a_model_alternates_between_them() {
        // Five layers with a window, then a full one, four times.
        let parts = parts(&[20, 4], 64);
        let groups: Vec<u32> = parts.order().map(|n| parts.get(n).group).collect();
        for part in groups.chunks_exact(6) {
            assert_eq!(part.iter().sum::<u32>(), 1, "{groups:?}");
        }
    }

    #[test]
    fn the_first_part_is_read_alone_and_then_more_at_once() {
        // 16 KiB a layer.
        let parts = parts(&[40], 256);
        let layers: Vec<usize> = parts.reads().iter().map(|read| read.parts.len()).collect();
        assert_eq!(layers, [1, 2, 4, 8, 16, 9]);
        assert!(parts.reads().iter().all(|read| read.bytes() as u64 <= MOST_READ_BYTES));
    }

    #[test]
    fn models_with_very_many_layers_share_sums() {
        let parts = parts(&[1000, 1, 999], 64);
        assert!(parts.len() <= MOST_PARTS);
        assert_eq!(parts.get(0).layers, 3);
        for (group, layers) in [(0, 1000), (1, 1), (2, 999)] {
            for layer in 0..layers {
                let part = parts.get(parts.of(group, layer));
                assert_eq!(part.group, group);
                assert!((part.first_layer..part.first_layer + part.layers).contains(&layer));
            }
        }
    }
}
