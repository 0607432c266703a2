//! The slots of a store's staging pool as bytes: copied to each other, and from and to where sinks are
//! outside the device. A slot is one contiguous object, layer after layer.

use core::marker::PhantomData;

use super::Span;
use super::store::DeviceStore;
use super::tiles::{NO_TILES, Tiles};
use crate::error::{Error, Result};
use crate::ids::BlockId;

impl DeviceStore {
    /// Enqueues a copy of a raw slot, all layers, to another. At least the first `tokens` rows are
    /// copied; a slot is one contiguous object, and so all of it is.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` for more tokens than a tile has; `DeviceFailed`.
    pub fn copy_raw(&mut self, src: BlockId, dst: BlockId, tokens: u32) -> Result<()> {
        let stream = self.options.stream;
        let tiles = self.tiles()?;
        if let Some(bad) = [src, dst].into_iter().find(|id| id.0 >= tiles.staging_blocks) {
            return Err(Error::BadBlock { block: bad.0 });
        }
        if tokens > tiles.raw.block_tokens() {
            return Err(Error::invalid("tokens", "must be at most block_tokens"));
        }
        let bytes = tiles.raw.block_bytes();
        // Below the pool's bytes, which were checked.
        let at = |id: BlockId| tiles.staging.address() + u64::from(id.0) * bytes;
        let (from, to) = (at(src), at(dst));
        // SAFETY: both slots are in the memory; they are apart or the same.
        unsafe { self.backend.copy(from, to, bytes, stream) }
    }

    /// Copies bytes of a raw slot, from `at` on, to host memory, after what is enqueued, and waits for it.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` past the end of the slot; `DeviceFailed`.
    pub fn read_raw(&self, slot: BlockId, at: usize, to: &mut [u8]) -> Result<()> {
        let (tiles, at) = self.raw_at(slot, at, to.len())?;
        tiles.staging.download(at, to, self.options.stream)
    }

    /// Copies bytes to a raw slot, from `at` on, and waits until they have been read.
    ///
    /// # Errors
    /// As for [`read_raw`](Self::read_raw).
    pub fn write_raw(&mut self, slot: BlockId, at: usize, from: &[u8]) -> Result<()> {
        let (stream, (_, at)) = (self.options.stream, self.raw_at(slot, at, from.len())?);
        self.tiles()?.staging.upload(at, from, stream)
    }

    /// Where bytes of a raw slot lie, from `at` on.
    ///
    /// # Errors
    /// `BadBlock`; `InvalidArgument` past the end of the slot.
    pub fn raw_span(&self, slot: BlockId, at: usize, bytes: usize) -> Result<Span<'_>> {
        let (tiles, at) = self.raw_at(slot, at, bytes)?;
        let address = tiles.staging.part(at, bytes as u64)?;
        Ok(Span { address, bytes, store: PhantomData })
    }

    fn raw_at(&self, slot: BlockId, at: usize, bytes: usize) -> Result<(&Tiles, u64)> {
        let tiles = self.tiles.as_ref().ok_or(NO_TILES)?;
        if slot.0 >= tiles.staging_blocks {
            return Err(Error::BadBlock { block: slot.0 });
        }
        let slot_bytes = tiles.raw.block_bytes();
        if at.checked_add(bytes).is_none_or(|end| end as u64 > slot_bytes) {
            return Err(Error::invalid("bytes", "must lie within a slot"));
        }
        Ok((tiles, u64::from(slot.0) * slot_bytes + at as u64))
    }
}
