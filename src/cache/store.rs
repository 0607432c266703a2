//! The storage of a layer group, on the CPU or on a device: one place that tells the two apart.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::step::GroupTables;
use super::{LayerId, Step};
use crate::attention::Scoring;
use crate::cpu::{AttendBatch, KvStore, Rope, Threads};
use crate::device::DeviceStore;
use crate::dtype::{Rows, RowsMut};
use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::layout::GroupLayout;

#[derive(Debug)]
pub(super) enum Store {
    Cpu(KvStore),
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
            Store::Device(store) => store.layout(),
        }
    }

    pub fn bytes(&self) -> u64 {
        match self {
            Store::Cpu(store) => store.bytes(),
            Store::Device(store) => store.bytes(),
        }
    }

    pub fn copy_tokens(&mut self, src: BlockId, dst: BlockId, tokens: u32) -> Result<()> {
        match self {
            Store::Cpu(store) => store.copy_tokens(src, dst, tokens),
            Store::Device(store) => store.copy_tokens(src, dst, tokens),
        }
    }

    /// Copies a block, all layers, to host memory; waits for a device.
    pub fn read_block(&mut self, id: BlockId, to: &mut [u8]) -> Result<()> {
        match self {
            Store::Cpu(store) => store.read_block(id, to),
            Store::Device(store) => store.read_block(id, to),
        }
    }

    /// Copies a block, all layers, from host memory.
    pub fn write_block(&mut self, id: BlockId, from: &[u8]) -> Result<()> {
        match self {
            Store::Cpu(store) => store.write_block(id, from),
            Store::Device(store) => store.write_block(id, from),
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
            Store::Device(store) => store.append(layer.layer, &step.device, group, k, v, rope),
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
                let GroupTables { indptr, indices, .. } = &step.groups[group];
                let batch = AttendBatch {
                    q_indptr: &step.q_indptr,
                    kv_lens: &step.kv_lens,
                    indptr,
                    indices,
                };
                let Crew { threads, workspace } = crew;
                store.attend(layer.layer, &batch, q, out, lse, scoring, workspace, threads)
            }
            Store::Device(store) => {
                store.attend(layer.layer, &step.device, group, q, out, lse, scoring)
            }
        }
    }

    /// The store on a device.
    ///
    /// # Errors
    /// `InvalidState` where blocks are in host memory.
    pub fn device(&mut self) -> Result<&mut DeviceStore> {
        match self {
            Store::Cpu(_) => Err(Error::InvalidState { why: "the cache is not on a device" }),
            Store::Device(store) => Ok(store),
        }
    }
}
