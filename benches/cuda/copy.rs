//! Copy and zero of blocks that are a GiB together, scattered over their pools: blocks in one piece,
//! and an engine's pools of one allocation for K and for V of each layer.

use kvcache::error::Result;
use kvcache::kernels::params::{CopyParams, In, Out};
use kvcache::kernels::{copy_launch, zero_launch};
use serde_json::json;

use crate::Line;
use crate::gpu::Gpu;

const TOTAL: u64 = 1 << 30;
/// K and V of 32 layers.
const PLANES: u64 = 64;

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    for (planes, run_bytes) in [(1, 2 << 20), (1, 64 << 10), (PLANES, 32 << 10)] {
        for zero in [false, true] {
            blocks(gpu, filter, report, planes, run_bytes, zero)?;
        }
    }
    Ok(())
}

fn blocks(
    gpu: &Gpu,
    filter: &str,
    report: &mut impl FnMut(Line),
    planes: u64,
    run_bytes: u64,
    zero: bool,
) -> Result<()> {
    let op = if zero { "zero" } else { "copy" };
    let name = format!("{op} 1 GiB {planes} x {} KiB a block", run_bytes >> 10);
    if !name.contains(filter) {
        return Ok(());
    }
    if 2 * TOTAL > gpu.room()? {
        println!("{name:<52} does not fit");
        return Ok(());
    }
    let count = TOTAL / (planes * run_bytes);
    let (from, to) = (gpu.random(TOTAL)?, gpu.random(TOTAL)?);
    // Any odd number has no factor in common with the power of two that `count` is.
    let place = |i: u64| (i * ((count / 2) | 1) % count) as i32;
    let list = gpu.put((0..count).flat_map(|i| {
        let pair = if zero { [place(i), -1] } else { [i as i32, place(i)] };
        pair.into_iter().take(if zero { 1 } else { 2 }).map(i32::to_ne_bytes)
    }))?;
    let mut params = CopyParams {
        from: In::at(from.address()),
        to: Out::at(to.address()),
        list: In::at(list.address()),
        from_plane: (count * run_bytes) as i64,
        from_block: run_bytes as i64,
        to_plane: (count * run_bytes) as i64,
        to_block: run_bytes as i64,
        count: count as u32,
        planes: planes as u32,
        runs: 1,
        run_bytes: run_bytes as u32,
        from_blocks: count as u32,
        to_blocks: count as u32,
        ..CopyParams::default()
    };
    let launch_of = if zero { zero_launch } else { copy_launch };
    let Some(launch) = launch_of(&mut params, gpu.backend.multiprocessors())? else {
        return Ok(());
    };
    let sample = gpu.time(1, |_| gpu.enqueue(&launch, &params))?;
    let shape = json!({
        "op": op, "bytes": TOTAL, "planes": planes, "run_bytes": run_bytes, "blocks": count,
    });
    let moved = if zero { TOTAL } else { 2 * TOTAL };
    report(Line { name, shape, bytes: moved, flops: 0, sample });
    Ok(())
}
