//! The cache on a device: the step's tables there, and the operations for an engine whose rows are
//! there too. These only enqueue, on the cache's stream; nothing is waited for.

use alloc::sync::Arc;

use super::step::GroupTables;
use super::{KvCache, LayerId, Step};
use crate::attention::Scoring;
use crate::cpu::Rope;
use crate::device::{
    Backend, BatchTables, Device, DeviceRows, DeviceRowsMut, GroupTables as BlockTables,
    SideStream, Stream,
};
use crate::error::Result;
use crate::kernels::DeviceRates;

impl KvCache {
    /// Where blocks live and kernels run.
    pub fn device(&self) -> Device {
        self.backend.as_ref().map_or(Device::Cpu, |backend| backend.device())
    }

    /// The device's backend; `None` for the CPU.
    pub fn backend(&self) -> Option<&Arc<dyn Backend>> {
        self.backend.as_ref()
    }

    /// [`append`](KvCache::append) for rows in the memory of the cache's device. `k` and `v` have
    /// the same type; `v` is ignored where values lie in keys.
    ///
    /// # Errors
    /// As for [`append`](KvCache::append); `InvalidState` where the cache is not on a device.
    pub fn append_device(
        &mut self,
        step: &Step,
        layer: LayerId,
        k: DeviceRows,
        v: DeviceRows,
        rope: Option<&Rope>,
    ) -> Result<()> {
        let group = self.check_step(step, layer)?;
        let rope = rope.map(|rope| (rope, step.positions.as_slice()));
        let store = self.stores[group].device()?;
        store.append_device(layer.layer, &step.device, group, k, v, rope)
    }

    /// [`attend`](KvCache::attend) for rows in the memory of the cache's device; `lse` is of f32.
    ///
    /// # Errors
    /// As for [`attend`](KvCache::attend); `InvalidState` where the cache is not on a device.
    pub fn attend_device(
        &mut self,
        step: &Step,
        layer: LayerId,
        q: DeviceRows,
        out: DeviceRowsMut,
        scoring: &Scoring,
        lse: Option<DeviceRowsMut>,
    ) -> Result<()> {
        let group = self.check_step(step, layer)?;
        self.check_loaded(step, layer)?;
        let scoring = self.scoring(group, scoring)?;
        let store = self.stores[group].device()?;
        store.attend_device(layer.layer, &step.device, group, q, out, lse, &scoring)
    }

    /// Waits for everything that the cache enqueued on its device. Nothing to wait for on the CPU.
    ///
    /// # Errors
    /// `DeviceFailed` where some of it has failed.
    pub fn sync(&mut self) -> Result<()> {
        if self.backend.is_some() {
            for store in &mut self.stores {
                store.device()?.sync()?;
            }
        }
        Ok(())
    }

    /// Enqueues everything from here on on `stream`, after what was enqueued before.
    ///
    /// # Errors
    /// `DeviceFailed` where work on the old stream has failed; `InvalidState` where the cache is
    /// not on a device.
    pub fn set_stream(&mut self, stream: Stream) -> Result<()> {
        for store in &mut self.stores {
            store.device()?.set_stream(stream)?;
        }
        self.stream = stream;
        Ok(())
    }

    /// Has ways to compute the same chosen by these rates from here on, as somebody measured them,
    /// instead of by what the device says of itself: whether a prefix that sequences share is read once
    /// for all of them ([`CacheOptions::cascade`](super::CacheOptions::cascade)).
    ///
    /// # Errors
    /// `InvalidArgument` where one is not positive and finite; `InvalidState` where the cache is not on
    /// a device.
    pub fn set_device_rates(&mut self, rates: DeviceRates) -> Result<()> {
        self.stores.iter_mut().try_for_each(|store| store.device()?.set_rates(rates))
    }

    /// Copies that are enqueued on the side stream from here on come after what is enqueued now.
    pub(super) fn fork_side(&mut self) -> Result<()> {
        let Some(backend) = &self.backend else { return Ok(()) };
        let side = match self.side.take() {
            Some(side) => side,
            None => SideStream::new(backend)?,
        };
        self.side.insert(side).follow(self.stream)
    }

    /// What is enqueued from here on comes after the copies on the side stream.
    pub(super) fn join_side(&mut self) -> Result<()> {
        self.side.as_ref().map_or(Ok(()), |side| side.lead(self.stream))
    }

    /// Puts the tables of a step that was planned where the kernels read them.
    pub(super) fn upload_step(&self, step: &mut Step) -> Result<()> {
        let Some(backend) = &self.backend else { return Ok(()) };
        let Step { q_indptr, kv_lens, groups, device, .. } = step;
        let groups = groups.iter().enumerate().map(|(group, tables)| {
            let GroupTables { indptr, indices, slots, raw, .. } = tables;
            (BlockTables { indptr, indices, slots }, self.is_tiled(group).then_some(raw))
        });
        device.upload_raw(backend, self.stream, &BatchTables { q_indptr, kv_lens }, groups)
    }
}
