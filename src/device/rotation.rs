//! The rotation of a step's rows as the append kernel reads it: one row of cosines and sines for
//! each new token, computed in f64 by `Rope`, so that positions of any size are exact and no table
//! grows with the context.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::memory::DeviceMemory;
use super::{Backend, Stream};
use crate::cpu::Rope;
use crate::error::Result;

/// The tables of one rotation and one batch.
#[derive(Debug)]
pub(super) struct Rotation {
    /// The batch and the rotation that they are of; `None` where they are of none.
    of: Option<(u64, Rope)>,
    tables: DeviceMemory,
    staging: Vec<u8>,
    bytes: u64,
}

impl Rotation {
    pub fn new(backend: &Arc<dyn Backend>) -> Result<Self> {
        let tables = DeviceMemory::new(backend, 1)?;
        Ok(Self { of: None, tables, staging: Vec::new(), bytes: 0 })
    }

    /// Addresses of cosines and sines `[positions][pairs]`, uploaded where batch `serial` has not
    /// used this rotation last.
    pub fn tables(
        &mut self,
        backend: &dyn Backend,
        stream: Stream,
        serial: u64,
        rope: &Rope,
        positions: &[u32],
    ) -> Result<(u64, u64)> {
        if self.of != Some((serial, *rope)) {
            self.of = None;
            let (cosines, sines) = rope.tables(positions);
            self.staging.clear();
            self.staging.extend(cosines.iter().chain(&sines).flat_map(|x| x.to_ne_bytes()));
            self.bytes = (cosines.len() * 4) as u64;
            self.tables.grow(2 * self.bytes)?;
            let to = self.tables.part(0, 2 * self.bytes)?;
            // SAFETY: within the memory; the staging buffer is not page-locked.
            unsafe { backend.upload(to, &self.staging, stream) }?;
            self.of = Some((serial, *rope));
        }
        Ok((self.tables.address(), self.tables.address() + self.bytes))
    }
}
