//! The storage of a layer group, on the CPU or on a device: one place that tells the two apart.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::{LayerId, Step};
use crate::attention::Scoring;
use crate::cpu::{KvStore, Rope, Threads, TileStore};
use crate::device::{DeviceStore, Span, Stream};
use crate::dtype::{Rows, RowsMut};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::layout::GroupLayout;

const NO_TILES: Error = Error::InvalidState { why: "the format has no sealed tiles" };

const NO_DEVICE: Error = Error::InvalidState { why: "the cache is not on a device" };

#[derive(Debug)]
pub(super) enum Store {
    Cpu(KvStore),
    Tiles(Box<TileStore>),
    Device(Box<DeviceStore>),
}

/// What the CPU's kernels run with.
pub(super) struct Crew<'a> {
    pub threads: &'a Threads,
    pub workspace: &'a mut Vec<u8>,
}

impl Store {
    pub fn layout(&self) -> &GroupLayout {
        match self {
            Store::Cpu(store) => store.layout(),
            Store::Tiles(store) => store.layout(),
            Store::Device(store) => store.layout(),
        }
    }

    pub fn bytes(&self) -> u64 {
        match self {
            Store::Cpu(store) => store.bytes(),
            Store::Tiles(store) => store.bytes(),
            Store::Device(store) => store.bytes(),
        }
    }

    /// The stream of a device's operations.
    pub fn stream(&self) -> Option<Stream> {
        match self {
            Store::Cpu(_) | Store::Tiles(_) => None,
            Store::Device(store) => Some(store.stream()),
        }
    }

    /// Bytes of raw rows beside the blocks.
    pub fn raw_bytes(&self) -> u64 {
        match self {
            Store::Tiles(store) => store.raw_bytes(),
            Store::Device(store) => store.raw_bytes(),
            Store::Cpu(_) => 0,
        }
    }

    /// Attention calls that read what sequences share once.
    pub fn cascades(&self) -> u64 {
        match self {
            Store::Cpu(_) | Store::Tiles(_) => 0,
            Store::Device(store) => store.cascades(),
        }
    }

    /// Makes room for a step that fills so many sealed tiles from end to end.
    pub fn reserve_scratch(&mut self, tiles: u32) -> Result<()> {
        match self {
            Store::Cpu(_) => Ok(()),
            Store::Tiles(store) => store.reserve_scratch(tiles),
            Store::Device(store) => store.reserve_scratch(tiles),
        }
    }

    /// Copies the first tokens of a slot of the staging pool to another.
    pub fn copy_raw(&mut self, src: BlockId, dst: BlockId, tokens: u32) -> Result<()> {
        match self {
            Store::Cpu(_) => Err(NO_TILES),
            Store::Tiles(store) => store.copy_raw(src, dst, tokens),
            Store::Device(store) => store.copy_raw(src, dst, tokens),
        }
    }

    /// Makes the records of a block, all layers, say that they are not sealed: its rows are read raw.
    pub fn unseal(&mut self, block: BlockId) -> Result<()> {
        match self {
            Store::Cpu(_) => Err(NO_TILES),
            Store::Tiles(store) => store.unseal(block),
            // No sealed record has a header of zeros.
            Store::Device(store) => store.zero(block),
        }
    }

    /// Copies bytes of a slot of the staging pool, from `at` on, to host memory; waits for a device.
    pub fn read_raw(&self, slot: BlockId, at: usize, to: &mut [u8]) -> Result<()> {
        match self {
            Store::Cpu(_) => Err(NO_TILES),
            Store::Tiles(store) => store.read_raw(slot, at, to),
            Store::Device(store) => store.read_raw(slot, at, to),
        }
    }

    /// Copies bytes of host memory to a slot of the staging pool, from `at` on.
    pub fn write_raw(&mut self, slot: BlockId, at: usize, from: &[u8]) -> Result<()> {
        match self {
            Store::Cpu(_) => Err(NO_TILES),
            Store::Tiles(store) => store.write_raw(slot, at, from),
            Store::Device(store) => store.write_raw(slot, at, from),
        }
    }

    /// The sealed tiles of a group in host memory whose format has them.
    pub fn tiles(&mut self) -> Option<&mut TileStore> {
        match self {
            Store::Tiles(store) => Some(store),
            Store::Cpu(_) | Store::Device(_) => None,
        }
    }

    /// Copies the first tokens of a block to another. A block that is being filled with a sealed
    /// tile holds nothing yet: its rows lie in the staging pool.
    pub fn copy_tokens(&mut self, src: BlockId, dst: BlockId, tokens: u32) -> Result<()> {
        match self {
            Store::Cpu(store) => store.copy_tokens(src, dst, tokens),
            Store::Tiles(_) => Ok(()),
            Store::Device(store) if store.layout().staging_block_bytes() != 0 => Ok(()),
            Store::Device(store) => store.copy_tokens(src, dst, tokens),
        }
    }

    /// Copies a block, all layers, to host memory; waits for a device.
    pub fn read_block(&self, id: BlockId, to: &mut [u8]) -> Result<()> {
        match self {
            Store::Cpu(store) => store.read_block(id, to),
            Store::Tiles(store) => store.read_block(id, to),
            Store::Device(store) => store.read_block(id, to),
        }
    }

    /// Copies a block, all layers, from host memory.
    pub fn write_block(&mut self, id: BlockId, from: &[u8]) -> Result<()> {
        match self {
            Store::Cpu(store) => store.write_block(id, from),
            Store::Tiles(store) => store.write_block(id, from),
            Store::Device(store) => store.write_block(id, from),
        }
    }

    /// Copies consecutive layers of a block from host memory; those of a device are copied together
    /// ([`span`](Self::span)).
    pub fn write_layers(&mut self, id: BlockId, first: u32, from: &[u8]) -> Result<()> {
        match self {
            Store::Cpu(store) => store.write_layers(id, first, from),
            Store::Tiles(store) => store.write_layers(id, first, from),
            Store::Device(_) => Err(Error::InvalidState { why: "blocks are on a device" }),
        }
    }

    /// Checks bytes that are to be copied to a device: sealed records of the group's format.
    pub fn check_records(&self, from: &[u8]) -> Result<()> {
        match self {
            Store::Cpu(_) | Store::Tiles(_) => Ok(()),
            Store::Device(store) => store.check_records(from),
        }
    }

    /// Where consecutive layers of a block lie on a device.
    pub fn span(&self, id: BlockId, first: u32, bytes: usize) -> Result<Span<'_>> {
        match self {
            Store::Cpu(_) | Store::Tiles(_) => Err(NO_DEVICE),
            Store::Device(store) => store.layers_span(id, first, bytes),
        }
    }

    /// Where bytes of a slot of the staging pool lie on a device, from `at` on.
    pub fn raw_span(&self, slot: BlockId, at: usize, bytes: usize) -> Result<Span<'_>> {
        match self {
            Store::Cpu(_) | Store::Tiles(_) => Err(NO_DEVICE),
            Store::Device(store) => store.raw_span(slot, at, bytes),
        }
    }

    pub fn append(
        &mut self,
        step: &Step,
        layer: LayerId,
        k: Rows,
        v: Rows,
        rope: Option<&Rope>,
        threads: &Threads,
    ) -> Result<()> {
        let rope = rope.map(|rope| (rope, step.positions.as_slice()));
        let group = layer.group as usize;
        match self {
            Store::Cpu(store) => {
                store.append(layer.layer, &step.groups[group].slots, k, v, rope, threads)
            }
            Store::Tiles(store) => {
                store.append(layer.layer, &step.groups[group].raw, k, v, rope, threads)
            }
            Store::Device(store) => store.append(layer.layer, &step.device, group, k, v, rope),
        }
    }

    pub fn zero(&mut self, block: BlockId) -> Result<()> {
        match self {
            Store::Cpu(store) => store.zero(block),
            Store::Tiles(_) => Err(Error::Unsupported { what: "scrubbing of sealed tiles" }),
            Store::Device(store) => store.zero(block),
        }
    }

    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &mut self,
        step: &Step,
        layer: LayerId,
        q: Rows,
        out: RowsMut,
        lse: Option<&mut [f32]>,
        scoring: &Scoring,
        crew: Crew,
    ) -> Result<()> {
        let group = layer.group as usize;
        match self {
            Store::Cpu(store) => {
                let (batch, _) = step.batch(group);
                let Crew { threads, workspace } = crew;
                store.attend(layer.layer, &batch, q, out, lse, scoring, workspace, threads)
            }
            Store::Tiles(store) => {
                let (batch, raw) = step.batch(group);
                let Crew { threads, workspace } = crew;
                store.attend(layer.layer, &batch, raw, q, out, lse, scoring, workspace, threads)
            }
            Store::Device(store) => {
                store.attend(layer.layer, &step.device, group, q, out, lse, scoring)
            }
        }
    }

    /// Sets the scales that the rows of a layer's heads share.
    pub fn set_scales(&mut self, layer: u32, k: &[f32], v: &[f32]) -> Result<()> {
        match self {
            Store::Cpu(store) => store.set_scales(layer, k, v),
            Store::Tiles(_) => Err(Error::invalid("scales", "are the tiles' own in this format")),
            Store::Device(_) => {
                Err(Error::Unsupported { what: "scales of layers and heads on a device" })
            }
        }
    }

    /// The scales of all layers and heads, none while all are 1.
    pub fn scales(&self) -> impl Iterator<Item = f32> + Clone {
        let scales = match self {
            Store::Cpu(store) => store.scales(),
            Store::Tiles(_) | Store::Device(_) => [&[][..]; 2],
        };
        scales.into_iter().flatten().copied()
    }

    /// The store on a device.
    ///
    /// # Errors
    /// `InvalidState` where blocks are in host memory.
    pub fn device(&mut self) -> Result<&mut DeviceStore> {
        match self {
            Store::Cpu(_) | Store::Tiles(_) => Err(NO_DEVICE),
            Store::Device(store) => Ok(store),
        }
    }
}
