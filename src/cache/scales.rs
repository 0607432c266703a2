//! How K and V are stored: the scales that FP8 and NVFP4 share a layer and head, and what of the
//! storage is part of a block's name outside this process.

use alloc::vec::Vec;

use super::{KvCache, LayerId};
use crate::error::{Error, Result};

impl KvCache {
    /// Sets the scales by which the keys and values of a layer's heads are divided when they are
    /// stored (FP8, NVFP4), `[kv_heads]` each; both are 1 until then. Where values lie in keys, `v`
    /// is empty.
    ///
    /// Blocks that were stored under other scales would be misread: nothing may be in the cache.
    ///
    /// # Errors
    /// `InvalidState` with a sequence alive or a block cached; `InvalidArgument` for another layer,
    /// number or format, and for a scale that is not positive and finite; `Unsupported` on a device.
    pub fn set_scales(&mut self, layer: LayerId, k: &[f32], v: &[f32]) -> Result<()> {
        let held = |pool: &crate::pool::BlockPool| pool.free_blocks() != pool.blocks();
        if self.sequences.live() != 0 || self.pools.iter().any(held) {
            return Err(Error::InvalidState { why: "the cache holds sequences or blocks" });
        }
        let store = self
            .stores
            .get_mut(layer.group as usize)
            .ok_or(Error::invalid("layer", "is not in the spec"))?;
        store.set_scales(layer.layer, k, v)?;
        self.name_storage();
        Ok(())
    }

    /// Makes formats, sinks and scales part of digests. Floats alone have no say: their digests are those
    /// that other stores know.
    pub(super) fn name_storage(&mut self) {
        let mut bytes = Vec::new();
        if self.spec.groups.iter().any(|group| !group.format.is_float()) {
            for store in &self.stores {
                let (format, sinks) = (store.layout().spec().format, store.layout().sink_blocks());
                bytes.extend_from_slice(&format.id().to_le_bytes());
                if sinks != 0 {
                    bytes.extend_from_slice(b"sinks");
                    bytes.extend_from_slice(&sinks.to_le_bytes());
                }
                let scales = store.scales();
                bytes.extend_from_slice(&(scales.clone().count() as u64).to_le_bytes());
                bytes.extend(scales.flat_map(f32::to_le_bytes));
            }
        }
        self.outside.set_storage(bytes);
    }
}
