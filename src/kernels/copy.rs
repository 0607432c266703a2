//! How copies and zeros of blocks are launched, and the check of a list that the host has.
//!
//! One kernel serves copies within a pool (fork, defragmentation) and between two pools; swapping
//! blocks out and in is the second, with the other pool in pinned host memory that is mapped into
//! the device's addresses. It serves any layout whose blocks are runs of bytes: a block in one
//! piece, or planes of an engine that has one allocation a layer.
//!
//! A launch has no order among its entries. So a block may be written once in a list, and within
//! one pool no entry may read what another writes: A to B and B to C is two launches. The list is
//! on the device when a kernel runs, so only [`check_copies`] can say so, where the host has it too.

use alloc::vec::Vec;

use super::params::CopyParams;
use super::{Kernel, Launch};
use crate::error::{Error, Result};
use crate::ids::BlockId;

kernels! {
    COPY = "kvc_copy", "kvc_copy_params", 256;
    ZERO = "kvc_zero", "kvc_copy_params", 256;
}

/// Bytes that a warp moves at a time.
const SLICE_BYTES: u32 = 4096;
const WARPS: u32 = 8;
/// Blocks of threads that a multiprocessor holds.
const RESIDENT: u32 = 4;

/// Fills what the launch determines of `params` and gives the launch of a copy on a device with
/// `multiprocessors`; `None` where there is nothing to do.
///
/// # Errors
/// `InvalidArgument` where an address, stride or size is no multiple of 16 bytes, or a size is 0;
/// `Overflow` for a list of 2^32 slices of 4 KiB or more: cut it.
pub fn copy_launch(params: &mut CopyParams, multiprocessors: u32) -> Result<Option<Launch>> {
    let p = &*params;
    let addresses = [p.from.0, p.from_planes.0];
    if addresses == [0, 0] {
        return Err(Error::invalid("from", "must be given, or from_planes"));
    }
    if !p.from.0.is_multiple_of(16)
        || [p.from_plane, p.from_block, p.from_run].iter().any(|s| s % 16 != 0)
    {
        return Err(Error::invalid("from", "must lie and be strided in multiples of 16 bytes"));
    }
    launch(&COPY, params, multiprocessors)
}

/// The same for filling the blocks of a list with zeros; nothing of `from` is used.
///
/// # Errors
/// As [`copy_launch`].
pub fn zero_launch(params: &mut CopyParams, multiprocessors: u32) -> Result<Option<Launch>> {
    launch(&ZERO, params, multiprocessors)
}

fn launch(
    kernel: &'static Kernel,
    params: &mut CopyParams,
    multiprocessors: u32,
) -> Result<Option<Launch>> {
    let p = params;
    if p.to.0 == 0 && p.to_planes.0 == 0 {
        return Err(Error::invalid("to", "must be given, or to_planes"));
    }
    if !p.to.0.is_multiple_of(16) || [p.to_plane, p.to_block, p.to_run].iter().any(|s| s % 16 != 0)
    {
        return Err(Error::invalid("to", "must lie and be strided in multiples of 16 bytes"));
    }
    if p.run_bytes == 0 || !p.run_bytes.is_multiple_of(16) {
        return Err(Error::invalid("run_bytes", "must be a positive multiple of 16"));
    }
    if p.planes == 0 || p.runs == 0 || p.wide_ids > 1 || multiprocessors == 0 {
        return Err(Error::invalid(
            "planes, runs, wide_ids, multiprocessors",
            "must be at least 1 (wide_ids 0 or 1)",
        ));
    }
    if p.tokens.0 != 0 && p.token_bytes == 0 {
        return Err(Error::invalid("token_bytes", "is needed with tokens"));
    }
    p.slices = p.run_bytes.div_ceil(SLICE_BYTES);
    let items = [p.planes, p.runs, p.slices].iter().try_fold(p.count, |n, &by| n.checked_mul(by));
    p.items = items.ok_or(Error::Overflow { what: "slices of a copy" })?;
    if p.items == 0 {
        return Ok(None);
    }
    if p.list.0 == 0 {
        return Err(Error::NullPointer { what: "list" });
    }
    let blocks = multiprocessors.min(1 << 16) * RESIDENT;
    let grid = p.items.div_ceil(WARPS).min(blocks);
    Ok(Some(Launch { kernel, grid: [grid, 1, 1], shared_bytes: 0 }))
}

/// Checks a list that the host has: every id within its pool, no block written twice, and in one
/// pool (`same_pool`) no block both read and written.
///
/// # Errors
/// `BadBlock` with the first id outside its pool; `InvalidArgument` where the result would depend
/// on the order of entries; `OutOfMemory`.
pub fn check_copies(
    list: &[(BlockId, BlockId)],
    from_blocks: u32,
    to_blocks: u32,
    same_pool: bool,
) -> Result<()> {
    for &(from, to) in list {
        for (id, blocks) in [(from, from_blocks), (to, to_blocks)] {
            if id.0 >= blocks {
                return Err(Error::BadBlock { block: id.0 });
            }
        }
    }
    let mut written: Vec<BlockId> = Vec::new();
    let refused = Error::OutOfMemory { bytes: size_of_val(list) as u64 / 2 };
    written.try_reserve_exact(list.len()).map_err(|_| refused)?;
    written.extend(list.iter().map(|entry| entry.1));
    written.sort_unstable();
    if written.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid("list", "must not write a block twice"));
    }
    if same_pool && list.iter().any(|entry| written.binary_search(&entry.0).is_ok()) {
        return Err(Error::invalid("list", "must not read a block that it writes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::params::{In, Out};
    use super::*;

    fn sound() -> CopyParams {
        CopyParams {
            from: In::at(256),
            to: Out::at(512),
            list: In::at(1024),
            from_block: 32 << 10,
            to_block: 32 << 10,
            count: 100,
            planes: 1,
            runs: 1,
            run_bytes: 32 << 10,
            from_blocks: 10,
            to_blocks: 10,
            ..CopyParams::default()
        }
    }

    #[test]
    fn the_grid_is_the_device_or_the_work() {
        let mut p = sound();
        let launch = copy_launch(&mut p, 132).unwrap().unwrap();
        assert_eq!((p.slices, p.items, launch.grid), (8, 800, [100, 1, 1]));
        let mut p = CopyParams { count: 10_000, run_bytes: 16, planes: 3, ..sound() };
        assert_eq!(zero_launch(&mut p, 132).unwrap().unwrap().grid, [528, 1, 1]);
        assert_eq!(copy_launch(&mut CopyParams { count: 0, ..sound() }, 132), Ok(None));
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for bad in [
            CopyParams { to: Out::NULL, ..sound() },
            CopyParams { from: In::NULL, ..sound() },
            CopyParams { from: In::at(8), ..sound() },
            CopyParams { to: Out::at(8), ..sound() },
            CopyParams { list: In::NULL, ..sound() },
            CopyParams { from_block: 8, ..sound() },
            CopyParams { to_run: -4, ..sound() },
            CopyParams { run_bytes: 0, ..sound() },
            CopyParams { run_bytes: 40, ..sound() },
            CopyParams { planes: 0, ..sound() },
            CopyParams { runs: 0, ..sound() },
            CopyParams { wide_ids: 2, ..sound() },
            CopyParams { tokens: In::at(16), ..sound() },
        ] {
            assert!(copy_launch(&mut { bad }, 132).is_err(), "{bad:?}");
        }
        assert!(copy_launch(&mut sound(), 0).is_err());
        let huge = CopyParams { count: u32::MAX, run_bytes: u32::MAX - 15, ..sound() };
        let overflow = Error::Overflow { what: "slices of a copy" };
        assert_eq!(copy_launch(&mut { huge }, 132), Err(overflow));
    }

    #[test]
    fn lists_whose_order_would_matter_are_refused() {
        let check = |list: &[(u32, u32)], same| {
            let list: Vec<_> = list.iter().map(|&(a, b)| (BlockId(a), BlockId(b))).collect();
            check_copies(&list, 8, 6, same)
        };
        assert_eq!(check(&[(0, 1), (0, 2), (7, 5)], true), Ok(()));
        assert_eq!(check(&[(0, 1), (1, 2)], false), Ok(()));
        assert!(check(&[(0, 1), (1, 2)], true).is_err());
        assert!(check(&[(3, 3)], true).is_err());
        assert!(check(&[(0, 1), (2, 1)], false).is_err());
        assert_eq!(check(&[(8, 1)], false), Err(Error::BadBlock { block: 8 }));
        assert_eq!(check(&[(7, 6)], false), Err(Error::BadBlock { block: 6 }));
    }
}
