//! Sealed tiles: decode in every format, prefill beside the same rows by the decode kernel, sealing.
//! 32/8 heads of 128 channels; bytes count codes and scales.

use kvcache::device::DeviceMemory;
use kvcache::dtype::{DType, FormatClass, KvFormat};
use kvcache::error::{Error, Result};
use kvcache::kernels::params::{DecodeTileParams, In, Out, SealParams};
use kvcache::kernels::{
    AttendArgs, DecodeBounds, DecodePlan, Pieces, PrefillBounds, ScaleArgs, TILE_ROWS,
    decode_tile_params, prefill_sealed_launch, prefill_sealed_params, seal_launch,
};
use kvcache::layout::Strides;
use serde_json::json;

use crate::Line;
use crate::codes::{DIM, K, KV_HEADS, Q_HEADS, formats, layout, table};
use crate::gpu::Gpu;

const TOKENS: u32 = 64;

/// Which kernel attends.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Decode,
    Prefill,
}

struct Case {
    name: String,
    format: KvFormat,
    by: By,
    batch: u64,
    /// Query tokens of each sequence, one or a multiple of eight.
    q_len: u64,
    /// Cached tokens of each sequence, those of its queries included.
    context: u64,
}

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    for format in formats(FormatClass::Tile) {
        for (batch, context) in [(1, 4 * K), (1, 32 * K), (8, 16 * K), (64, 4 * K), (64, 16 * K)] {
            let name = format!("decode {} 32/8 batch {batch} context {context}", format.name());
            let case = Case { name, format, by: By::Decode, batch, q_len: 1, context };
            attend(gpu, filter, report, case)?;
        }
        for (batch, q_len, context) in
            [(1, 2 * K, 2 * K), (1, 128, 16 * K), (1, 512, 16 * K), (8, 512, 16 * K)]
        {
            for (by, how) in [(By::Prefill, ""), (By::Decode, " by decode")] {
                let name = format!(
                    "prefill {} 32/8 batch {batch} new {q_len} context {context}{how}",
                    format.name()
                );
                let case = Case { name, format, by, batch, q_len, context };
                attend(gpu, filter, report, case)?;
            }
        }
    }
    Ok(())
}

/// Attention over tiles that the sealing kernel has sealed, which is timed too; those that hold queries
/// are raw.
fn attend(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line), case: Case) -> Result<()> {
    let Case { name, format, by, batch, q_len, context } = case;
    if !name.contains(filter) {
        return Ok(());
    }
    let layout = layout(format, DIM, TOKENS)?;
    let tile = layout.tile().ok_or(Error::InvalidState { why: "a tile format without tiles" })?;
    let width = context.div_ceil(u64::from(TOKENS));
    let kv_bytes = layout.pool_bytes(batch * width)?;
    let raw = Strides {
        block: i64::from(2 * KV_HEADS * TOKENS * DIM),
        head: i64::from(TOKENS * DIM),
        token: DIM.into(),
    };
    let own = width - (context - q_len) / u64::from(TOKENS);
    let slots = batch * own;
    let (raw_bytes, v_at) = (slots * raw.block as u64 * 2, u64::from(KV_HEADS * TOKENS * DIM) * 2);
    let row = u64::from(Q_HEADS * DIM);
    let q_bytes = batch * q_len * row * 2;
    let moved = kv_bytes + 2 * q_bytes;
    let sets = gpu.sets(moved)?;
    if sets as u64 * (moved + raw_bytes) > gpu.room()? {
        println!("{name:<52} does not fit");
        return Ok(());
    }
    let buffers = (0..sets)
        .map(|_| {
            let kv = DeviceMemory::new(&gpu.backend, kv_bytes)?;
            Ok([kv, gpu.random(raw_bytes)?, gpu.random(q_bytes)?, gpu.random(q_bytes)?])
        })
        .collect::<Result<Vec<_>>>()?;
    // Every record is sealed of one of the raw slots.
    let count = batch * width;
    let list = gpu.put(
        (0..count).flat_map(|i| [((i % slots) as i32).to_ne_bytes(), (i as i32).to_ne_bytes()]),
    )?;
    let refused = gpu.put((0..count).map(|_| 0u32.to_ne_bytes()))?;
    let seal = |[kv, rows, ..]: &[DeviceMemory; 4]| {
        let mut params = SealParams {
            k: Out::at(rows.address()),
            v: Out::at(rows.address() + v_at),
            records: Out::at(kv.address()),
            list: In::at(list.address()),
            refused: Out::at(refused.address()),
            k_block: raw.block,
            k_head: raw.head,
            k_token: raw.token,
            v_block: raw.block,
            v_head: raw.head,
            v_token: raw.token,
            record_block: layout.block_bytes() as i64,
            record_head: tile.bytes() as i64,
            staging_blocks: slots as u32,
            num_blocks: count as u32,
            kv_heads: KV_HEADS,
            ..SealParams::default()
        };
        match seal_launch(&tile, count as u32, &mut params)? {
            Some(launch) => gpu.enqueue(&launch, &params),
            None => Ok(()),
        }
    };
    buffers.iter().try_for_each(seal)?;
    // The decode kernel takes up to eight rows at a time, sequences of their own.
    let part = if by == By::Decode { q_len.min(TILE_ROWS.into()) } else { q_len };
    let parts = batch * (q_len / part);
    let ends: Vec<_> =
        (0..parts).map(|i| (context - q_len + (i % (q_len / part) + 1) * part) as i32).collect();
    let table = table(gpu, batch, width)?;
    let kv_lens = gpu.put(ends.into_iter().map(i32::to_ne_bytes))?;
    let q_indptr = gpu.put((0..=parts).map(|i| ((i * part) as i32).to_ne_bytes()))?;
    let owners = gpu.put((0..parts).map(|i| ((i / (q_len / part)) as i32).to_ne_bytes()))?;
    let raw_indptr = gpu.put((0..=batch).map(|s| ((s * own) as i32).to_ne_bytes()))?;
    let raw_blocks = gpu.put((0..slots).flat_map(|i| {
        [((width - own + i % own) as i32).to_ne_bytes(), (i as i32).to_ne_bytes()]
    }))?;
    let args = |[_, rows, q, out]: &[DeviceMemory; 4]| AttendArgs {
        q: q.address(),
        q_dtype: DType::Bf16,
        q_strides: [row as i64, DIM.into()],
        out: out.address(),
        out_dtype: DType::Bf16,
        out_strides: [row as i64, DIM.into()],
        lse: 0,
        k: rows.address(),
        k_strides: raw,
        v: rows.address() + v_at,
        v_strides: raw,
        scales: ScaleArgs::NONE,
        block_tokens: TOKENS,
        num_blocks: count as u32,
        table: table.address(),
        table_stride: width as i64,
        table_indptr: 0,
        seqs: parts as u32,
        q_indptr: q_indptr.address(),
        kv_lens: kv_lens.address(),
        tail_mask: 0,
        scale: 1.0 / (DIM as f32).sqrt(),
        causal: true,
        window: None,
        softcap: None,
        sinks: 0,
        slopes: 0,
        error_flag: 0,
    };
    let tiles = |buffers: &[DeviceMemory; 4]| -> Result<DecodeTileParams> {
        Ok(DecodeTileParams {
            records: In::at(buffers[0].address()),
            raw_indptr: In::at(raw_indptr.address()),
            raw_blocks: In::at(raw_blocks.address()),
            owners: In::at(owners.address()),
            record_block: layout.block_bytes() as i64,
            record_head: tile.bytes() as i64,
            staging_blocks: slots as u32,
            ..decode_tile_params(&args(buffers))?
        })
    };
    let sample = match by {
        By::Prefill => {
            let bounds = PrefillBounds {
                format,
                head_dim: DIM,
                q_heads: Q_HEADS,
                kv_heads: KV_HEADS,
                batch: batch as u32,
                q_tokens: (batch * q_len) as u32,
            };
            gpu.time(sets, |i| {
                let mut params = prefill_sealed_params(&args(&buffers[i]), &tiles(&buffers[i])?)?;
                let launch = prefill_sealed_launch(&bounds, &mut params)?;
                gpu.enqueue(&launch, &params)
            })?
        }
        By::Decode => {
            let plan = DecodePlan::new(DecodeBounds {
                format,
                head_dim: DIM,
                tile_tokens: TOKENS,
                q_heads: Q_HEADS,
                kv_heads: KV_HEADS,
                q_len: part as u32,
                batch: parts as u32,
                max_tokens: context as u32,
                pieces: Pieces::Balanced,
                multiprocessors: gpu.backend.multiprocessors(),
                multiprocessor_shared_bytes: gpu.backend.multiprocessor_shared_bytes(),
            })?;
            let workspace = DeviceMemory::new(&gpu.backend, plan.workspace_bytes())?;
            let (launch, params) = plan.plan_tile_launch(
                workspace.address(),
                In::at(kv_lens.address()),
                parts as u32,
                None,
                Out::NULL,
            )?;
            gpu.enqueue(&launch, &params)?;
            gpu.time(sets, |i| {
                let mut params = tiles(&buffers[i])?;
                let launch = plan.decode_tile_launch(workspace.address(), &mut params)?;
                gpu.enqueue(&launch, &params)
            })?
        }
    };
    let op = if q_len > 1 { "prefill" } else { "decode" };
    let kernel = if by == By::Prefill { "prefill" } else { "decode" };
    let shape = json!({
        "op": op, "dtype": format.name(), "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "dim": DIM,
        "batch": batch, "tokens": q_len, "context": context, "tile_tokens": TOKENS, "kernel": kernel,
    });
    // The last tile of each sequence is read raw and not from its record, and others that hold queries
    // from both.
    let bytes = moved - layout.pool_bytes(batch)? + raw_bytes + count * 4;
    let products = batch * (q_len * context - q_len * (q_len - 1) / 2);
    let flops = if q_len > 1 { 4 * row * products } else { 0 };
    report(Line { name, shape, bytes, flops, sample });
    if batch == 8 && q_len == 1 {
        let sample = gpu.time(sets, |i| seal(&buffers[i]))?;
        let name = format!("seal {} {KV_HEADS} heads {count} tiles", format.name());
        let shape = json!({ "op": "seal", "dtype": format.name(), "tiles": count, "dim": DIM });
        // Raw rows come from few slots, so from the cache; what counts is what is written.
        report(Line { name, shape, bytes: kv_bytes, flops: 0, sample });
    }
    Ok(())
}
