//! How a merge of partial attention results is launched: a thread for eight channels of a row.

use super::Launch;
use super::params::MergeParams;
use crate::dtype::DType;
use crate::error::{Error, Result};

kernels! {
    MERGE = "kvc_merge", "kvc_merge_params", 256;
}

/// Blocks of threads that a multiprocessor holds.
const RESIDENT: u32 = 4;

/// Gives the launch of a merge on a device with `multiprocessors`; `None` without rows.
///
/// # Errors
/// `InvalidArgument` where a dimension, a type or an alignment is outside what the fields of
/// `params` document; `Overflow` for 2^32 chunks of eight channels or more.
pub fn merge_launch(params: &MergeParams, multiprocessors: u32) -> Result<Option<Launch>> {
    let p = params;
    if p.count == 0 || p.heads == 0 || multiprocessors == 0 {
        return Err(Error::invalid("count, heads, multiprocessors", "must be at least 1"));
    }
    if p.dim == 0 || !p.dim.is_multiple_of(8) {
        return Err(Error::invalid("dim", "must be a positive multiple of 8"));
    }
    let known = |id| [DType::F32, DType::F16, DType::Bf16].iter().any(|dtype| dtype.id() == id);
    if !known(p.part_dtype) || !known(p.out_dtype) {
        return Err(Error::invalid("part_dtype, out_dtype", "must be f32, f16 or bf16"));
    }
    let strides = [p.part, p.row, p.head, p.out_row, p.out_head];
    if strides.iter().any(|s| s % 8 != 0)
        || !p.parts.0.is_multiple_of(16)
        || !p.out.0.is_multiple_of(16)
    {
        return Err(Error::invalid("parts, out", "rows must begin at multiples of 8 channels"));
    }
    let items = [p.heads, p.dim / 8].iter().try_fold(p.rows, |n, &by| n.checked_mul(by));
    let items = items.ok_or(Error::Overflow { what: "channels of a merge" })?;
    if items == 0 {
        return Ok(None);
    }
    if p.parts.0 == 0 || p.lse.0 == 0 || p.out.0 == 0 {
        return Err(Error::NullPointer { what: "parts, lse, out" });
    }
    let grid = items.div_ceil(MERGE.threads).min(multiprocessors.min(1 << 16) * RESIDENT);
    Ok(Some(Launch { kernel: &MERGE, grid: [grid, 1, 1], shared_bytes: 0 }))
}

#[cfg(test)]
mod tests {
    use super::super::params::{In, Out};
    use super::*;

    fn sound() -> MergeParams {
        MergeParams {
            parts: In::at(256),
            lse: In::at(512),
            out: Out::at(1024),
            count: 2,
            rows: 10,
            heads: 4,
            dim: 64,
            part_dtype: DType::F32.id(),
            out_dtype: DType::Bf16.id(),
            ..MergeParams::default()
        }
    }

    #[test]
    fn the_grid_is_the_device_or_the_work() {
        assert_eq!(merge_launch(&sound(), 132).unwrap().unwrap().grid, [2, 1, 1]);
        let long = MergeParams { rows: 1 << 20, ..sound() };
        assert_eq!(merge_launch(&long, 132).unwrap().unwrap().grid, [528, 1, 1]);
        assert_eq!(merge_launch(&MergeParams { rows: 0, ..sound() }, 132), Ok(None));
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bad in [
            MergeParams { count: 0, ..sound() },
            MergeParams { heads: 0, ..sound() },
            MergeParams { dim: 0, ..sound() },
            MergeParams { dim: 60, ..sound() },
            MergeParams { part_dtype: 0, ..sound() },
            MergeParams { out_dtype: 99, ..sound() },
            MergeParams { row: 4, ..sound() },
            MergeParams { out_head: -1, ..sound() },
            MergeParams { parts: In::at(8), ..sound() },
            MergeParams { parts: In::NULL, ..sound() },
            MergeParams { lse: In::NULL, ..sound() },
            MergeParams { out: Out::NULL, ..sound() },
            MergeParams { rows: u32::MAX, ..sound() },
        ] {
            assert!(merge_launch(&bad, 132).is_err(), "{bad:?}");
        }
        assert!(merge_launch(&sound(), 0).is_err());
    }
}
