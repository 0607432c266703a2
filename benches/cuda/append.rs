//! Append of 1 to 8192 tokens in bf16, K and V scattered to paged slots, with and without a
//! rotation of K and Q on the way.

use kvcache::error::Result;
use kvcache::kernels::append_launch;
use kvcache::kernels::params::{AppendParams, In, Out};
use serde_json::json;

use crate::Line;
use crate::gpu::Gpu;

const Q_HEADS: u64 = 32;
const KV_HEADS: u64 = 8;
const DIM: u64 = 128;
const BLOCK: u64 = 16;

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    for rotated in [false, true] {
        for tokens in [1, 16, 256, 1024, 4096, 8192] {
            append(gpu, filter, report, tokens, rotated)?;
        }
    }
    Ok(())
}

fn append(
    gpu: &Gpu,
    filter: &str,
    report: &mut impl FnMut(Line),
    tokens: u64,
    rotated: bool,
) -> Result<()> {
    let how = if rotated { " + rotation of K and Q" } else { "" };
    let name = format!("append bf16 {KV_HEADS} heads {tokens} tokens{how}");
    if !name.contains(filter) {
        return Ok(());
    }
    let (row, q_row) = (KV_HEADS * DIM * 2, if rotated { Q_HEADS * DIM * 2 } else { 0 });
    let moved = tokens * (4 * row + 2 * q_row);
    let sets = gpu.sets(moved)?;
    let blocks = tokens.div_ceil(BLOCK);
    let buffers = (0..sets)
        .map(|_| {
            Ok([
                gpu.random(tokens * row)?,
                gpu.random(tokens * row)?,
                gpu.random((tokens * q_row).max(16))?,
                gpu.random((tokens * q_row).max(16))?,
                gpu.random(blocks * BLOCK * row)?,
                gpu.random(blocks * BLOCK * row)?,
            ])
        })
        .collect::<Result<Vec<_>>>()?;
    // Whole blocks in a scattered order, as prefill fills them.
    let slots = gpu.put((0..tokens).map(|t| {
        let block = (t / BLOCK * 7 + 3) % blocks.max(1);
        let scattered = if blocks.is_multiple_of(7) { t / BLOCK } else { block };
        ((scattered * BLOCK + t % BLOCK) as i64).to_ne_bytes()
    }))?;
    let positions = gpu.put((0..tokens).map(|t| (t as u32).to_ne_bytes()))?;
    let angles = |f: fn(f32) -> f32| {
        gpu.put((0..tokens * DIM / 2).map(move |i| f(i as f32 * 0.01).to_ne_bytes()))
    };
    let (cosines, sines) = (angles(f32::cos)?, angles(f32::sin)?);
    let (block, head) = ((KV_HEADS * BLOCK * DIM) as i64, (BLOCK * DIM) as i64);
    let sample = gpu.time(sets, |i| {
        let [k, v, q, q_out, k_cache, v_cache] = &buffers[i];
        let mut params = AppendParams {
            k: In::at(k.address()),
            v: In::at(v.address()),
            q: In::at(if rotated { q.address() } else { 0 }),
            q_out: Out::at(q_out.address()),
            k_cache: Out::at(k_cache.address()),
            v_cache: Out::at(v_cache.address()),
            slots: In::at(slots.address()),
            positions: In::at(positions.address()),
            cosines: In::at(if rotated { cosines.address() } else { 0 }),
            sines: In::at(if rotated { sines.address() } else { 0 }),
            k_token: (KV_HEADS * DIM) as i64,
            k_head: DIM as i64,
            v_token: (KV_HEADS * DIM) as i64,
            v_head: DIM as i64,
            q_token: (Q_HEADS * DIM) as i64,
            q_head: DIM as i64,
            q_out_token: (Q_HEADS * DIM) as i64,
            q_out_head: DIM as i64,
            k_cache_block: block,
            k_cache_head: head,
            k_cache_token: DIM as i64,
            v_cache_block: block,
            v_cache_head: head,
            v_cache_token: DIM as i64,
            tokens: tokens as u32,
            q_heads: if rotated { Q_HEADS as u32 } else { 0 },
            kv_heads: KV_HEADS as u32,
            k_dim: DIM as u32,
            v_dim: DIM as u32,
            block_tokens: BLOCK as u32,
            num_blocks: blocks as u32,
            rope_dim: if rotated { DIM as u32 } else { 0 },
            rope_positions: tokens as u32,
            row_dtype: 3,
            cache_dtype: 3,
            ..AppendParams::default()
        };
        match append_launch(&mut params)? {
            Some(launch) => gpu.enqueue(&launch, &params),
            None => Ok(()),
        }
    })?;
    let tables = if rotated { tokens * (DIM / 2 * 8 + 4) } else { 0 };
    let shape = json!({
        "op": "append", "dtype": "bf16", "kv_heads": KV_HEADS, "dim": DIM, "tokens": tokens,
        "rotated": rotated, "q_heads": if rotated { Q_HEADS } else { 0 },
    });
    report(Line { name, shape, bytes: moved + tokens * 8 + tables, flops: 0, sample });
    Ok(())
}
