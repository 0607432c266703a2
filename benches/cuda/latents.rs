//! Multi-head latent attention (DeepSeek, Kimi): decode over latents of 576 channels in bf16 and in codes,
//! of 16 query heads (an eighth of a model) and of all 128, and append of latents. Bytes count codes and
//! scales; a latent is read once, for keys and values.

use kvcache::attention::HeadShape;
use kvcache::device::DeviceMemory;
use kvcache::dtype::{DType, KvFormat};
use kvcache::error::{Error, Result};
use kvcache::kernels::params::{AppendParams, In, Out};
use kvcache::kernels::{
    AttendArgs, AttendBounds, AttendParams, AttendPlan, MLA_DIM, MLA_VALUES, Pieces, ScaleArgs,
    append_launch, append_token_launch, append_token_params,
};
use kvcache::layout::{GroupLayout, GroupSpec};
use serde_json::json;

use crate::Line;
use crate::codes::{K, table};
use crate::gpu::Gpu;

const FORMATS: [KvFormat; 5] =
    [KvFormat::Bf16, KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Int8T, KvFormat::Int4T];
const BLOCK: u32 = 64;

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    for format in FORMATS {
        for q_heads in [16, 128] {
            for (batch, context) in [(1, 32 * K), (8, 16 * K), (64, 4 * K), (64, 16 * K)] {
                decode(gpu, filter, report, &Decode { format, q_heads, batch, context })?;
            }
        }
        for tokens in [64, 4096, 8192] {
            append(gpu, filter, report, format, tokens)?;
        }
    }
    Ok(())
}

fn layout(format: KvFormat) -> Result<GroupLayout> {
    let (values, rotary) = (MLA_VALUES, MLA_DIM - MLA_VALUES);
    GroupLayout::new(GroupSpec::latent(1, values, rotary, format), BLOCK)
}

fn scales(layout: &GroupLayout, kv: &DeviceMemory) -> ScaleArgs {
    ScaleArgs {
        k: kv.address() + layout.k_scale_offset(0),
        k_strides: layout.k_scale_strides(),
        ..ScaleArgs::NONE
    }
}

/// One token of every sequence.
struct Decode {
    format: KvFormat,
    q_heads: u32,
    batch: u64,
    context: u64,
}

fn decode(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line), case: &Decode) -> Result<()> {
    let &Decode { format, q_heads, batch, context } = case;
    let name = format!("latents {} {q_heads} batch {batch} context {context}", format.name());
    if !name.contains(filter) {
        return Ok(());
    }
    let layout = layout(format)?;
    let width = context.div_ceil(u64::from(BLOCK));
    let kv_bytes = layout.pool_bytes(batch * width)?;
    let (q_row, out_row) = (u64::from(q_heads * MLA_DIM), u64::from(q_heads * MLA_VALUES));
    let moved = kv_bytes + batch * 2 * (q_row + out_row);
    let sets = gpu.sets(moved)?;
    if sets as u64 * moved > gpu.room()? {
        println!("{name:<52} does not fit");
        return Ok(());
    }
    let plan = AttendPlan::new(&AttendBounds {
        shape: HeadShape { q_heads, kv_heads: 1, k_dim: MLA_DIM, v_dim: MLA_VALUES, v_in_k: true },
        format,
        seqs: batch as u32,
        q_len: 1,
        q_tokens: batch as u32,
        kv_len: context as u32,
        pieces: Pieces::Balanced,
        multiprocessors: gpu.backend.multiprocessors(),
        multiprocessor_shared_bytes: gpu.backend.multiprocessor_shared_bytes(),
    })?;
    let buffers = (0..sets)
        .map(|_| {
            let rows = |row: u64| gpu.random(batch * 2 * row);
            Ok([gpu.random(kv_bytes)?, rows(q_row)?, rows(out_row)?])
        })
        .collect::<Result<Vec<_>>>()?;
    let table = table(gpu, batch, width)?;
    let kv_lens = gpu.put((0..batch).map(|_| (context as i32).to_ne_bytes()))?;
    let workspace = DeviceMemory::new(&gpu.backend, plan.workspace_bytes())?;
    let args = |[kv, q, out]: &[DeviceMemory; 3]| AttendArgs {
        q: q.address(),
        q_dtype: DType::Bf16,
        q_strides: [q_row as i64, MLA_DIM.into()],
        out: out.address(),
        out_dtype: DType::Bf16,
        out_strides: [out_row as i64, MLA_VALUES.into()],
        lse: 0,
        k: kv.address() + layout.k_offset(0),
        k_strides: layout.k_strides(),
        v: 0,
        v_strides: layout.v_strides(),
        scales: scales(&layout, kv),
        block_tokens: BLOCK,
        num_blocks: (batch * width) as u32,
        table: table.address(),
        table_stride: width as i64,
        table_indptr: 0,
        seqs: batch as u32,
        q_indptr: 0,
        kv_lens: kv_lens.address(),
        tail_mask: 0,
        scale: 0.07,
        causal: true,
        window: None,
        softcap: None,
        sinks: 0,
        slopes: 0,
        error_flag: 0,
    };
    if let Some((launch, params)) = plan.plan_launch(workspace.address(), &args(&buffers[0]))? {
        gpu.enqueue(&launch, &params)?;
    }
    let sample = gpu.time(sets, |i| {
        let (launch, params) = plan.attend_launch(workspace.address(), &args(&buffers[i]))?;
        match &params {
            AttendParams::Mla(params) => gpu.enqueue(&launch, params),
            AttendParams::MlaToken(params) => gpu.enqueue(&launch, params),
            _ => Err(Error::InvalidState { why: "a plan for latents made another launch" }),
        }
    })?;
    let shape = json!({
        "op": "latents", "dtype": format.name(), "q_heads": q_heads, "kv_heads": 1, "dim": MLA_DIM,
        "batch": batch, "context": context, "block_tokens": BLOCK,
    });
    // All heads multiply: of many it may be arithmetic that bounds.
    let flops = 2 * u64::from(q_heads * (MLA_DIM + MLA_VALUES)) * batch * context;
    let bytes = moved + batch * width * 4 + batch * 4;
    report(Line { name, shape, bytes, flops, sample });
    Ok(())
}

fn append(
    gpu: &Gpu,
    filter: &str,
    report: &mut impl FnMut(Line),
    format: KvFormat,
    tokens: u64,
) -> Result<()> {
    let name = format!("append latents {} {tokens} tokens", format.name());
    if !name.contains(filter) {
        return Ok(());
    }
    let layout = layout(format)?;
    let blocks = tokens.div_ceil(u64::from(BLOCK));
    let (row, cache) = (u64::from(MLA_DIM) * 2, layout.pool_bytes(blocks)?);
    let moved = tokens * row + cache;
    let sets = gpu.sets(moved)?;
    let buffers = (0..sets)
        .map(|_| Ok([gpu.random(tokens * row)?, gpu.random(cache)?]))
        .collect::<Result<Vec<_>>>()?;
    let slots = gpu.put((0..tokens).map(|t| (t as i64).to_ne_bytes()))?;
    let sample = gpu.time(sets, |i| {
        let [k, kv] = &buffers[i];
        let strides = layout.k_strides();
        let mut call = AppendParams {
            k: In::at(k.address()),
            k_cache: Out::at(kv.address() + layout.k_offset(0)),
            slots: In::at(slots.address()),
            k_token: MLA_DIM.into(),
            k_head: MLA_DIM.into(),
            k_cache_block: strides.block,
            k_cache_head: strides.head,
            k_cache_token: strides.token,
            tokens: tokens as u32,
            kv_heads: 1,
            k_dim: MLA_DIM,
            block_tokens: BLOCK,
            num_blocks: blocks as u32,
            row_dtype: DType::Bf16.id(),
            cache_dtype: DType::Bf16.id(),
            ..AppendParams::default()
        };
        if format.is_float() {
            return match append_launch(&mut call)? {
                Some(launch) => gpu.enqueue(&launch, &call),
                None => Ok(()),
            };
        }
        let mut params = append_token_params(call, format, &scales(&layout, kv));
        match append_token_launch(&mut params)? {
            Some(launch) => gpu.enqueue(&launch, &params),
            None => Ok(()),
        }
    })?;
    let shape = json!({
        "op": "append", "dtype": format.name(), "kv_heads": 1, "dim": MLA_DIM, "tokens": tokens,
    });
    report(Line { name, shape, bytes: moved + tokens * 8, flops: 0, sample });
    Ok(())
}
