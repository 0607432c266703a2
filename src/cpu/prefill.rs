//! The kernel for many query rows: tiles of queries against tiles of keys.

use super::decode::{DECODE_ROWS, decode_rows};
use super::job::Job;
use super::vector::{Stored, Vector};

/// The most query rows of one job of the tile kernel.
pub(crate) const TILE_ROWS: usize = 128;

/// Bytes of scratch that a job needs.
pub(crate) fn scratch_bytes(k_dim: usize, v_dim: usize) -> usize {
    super::decode::scratch_bytes(k_dim, v_dim)
}

/// Attention of up to [`TILE_ROWS`] rows.
///
/// # Safety
/// As for [`Kernel`](super::kernels::Kernel).
#[inline(always)]
pub(crate) unsafe fn tile<V: Vector, S: Stored>(job: &Job<'_>) {
    let mut row = 0;
    while row < job.rows() {
        let rows = DECODE_ROWS.min(job.rows() - row);
        // SAFETY: the caller's promise.
        unsafe { decode_rows::<V, S>(job, row, rows) };
        row += rows;
    }
}
