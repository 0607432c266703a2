//! Quantised K and V, token by token: decode and prefill in every format beside bf16 of the same shape
//! (attend.rs), append to rows of codes. 32/8 heads of 128 channels, of 256 where the name says so; bytes
//! count codes and scales.

use kvcache::attention::HeadShape;
use kvcache::device::DeviceMemory;
use kvcache::dtype::{DType, FormatClass, KvFormat};
use kvcache::error::{Error, Result};
use kvcache::kernels::params::{AppendParams, In, Out};
use kvcache::kernels::{
    AttendArgs, AttendBounds, AttendParams, AttendPlan, Pieces, ScaleArgs, append_token_launch,
    append_token_params,
};
use kvcache::layout::{GroupLayout, GroupSpec};
use serde_json::json;

use crate::Line;
use crate::gpu::Gpu;

pub const DIM: u32 = 128;
pub const Q_HEADS: u32 = 32;
pub const KV_HEADS: u32 = 8;
pub const K: u64 = 1 << 10;

/// The formats of a class.
pub fn formats(class: FormatClass) -> impl Iterator<Item = KvFormat> {
    KvFormat::ALL.iter().copied().filter(move |format| format.class() == class)
}

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    for format in formats(FormatClass::Token) {
        for (batch, context) in [(1, 4 * K), (1, 32 * K), (8, 16 * K), (64, 4 * K), (64, 16 * K)] {
            let decode = Rows { format, dim: DIM, batch, q_len: 1, context };
            attend_rows(gpu, filter, report, &decode)?;
        }
        for (q_len, context) in [(2 * K, 2 * K), (512, 16 * K)] {
            let prefill = Rows { format, dim: DIM, batch: 1, q_len, context };
            attend_rows(gpu, filter, report, &prefill)?;
        }
        for tokens in [64, 4096, 8192] {
            append_rows(gpu, filter, report, format, tokens)?;
        }
    }
    let format = KvFormat::Fp8E4m3;
    let wide = Rows { format, dim: 256, batch: 8, q_len: 1, context: 16 * K };
    attend_rows(gpu, filter, report, &wide)?;
    Ok(())
}

/// The layout of one layer.
pub fn layout(format: KvFormat, dim: u32, block_tokens: u32) -> Result<GroupLayout> {
    GroupLayout::new(GroupSpec::uniform(1, KV_HEADS, dim, format), block_tokens)
}

/// A dense table of `batch` sequences over scattered blocks.
pub fn table(gpu: &Gpu, batch: u64, width: u64) -> Result<DeviceMemory> {
    gpu.put(Gpu::scattered(batch * width).into_iter().map(i32::to_ne_bytes))
}

fn head_shape(dim: u32) -> HeadShape {
    HeadShape { q_heads: Q_HEADS, kv_heads: KV_HEADS, k_dim: dim, v_dim: dim, v_in_k: false }
}

/// Attention over rows of codes: one token of every sequence, or `q_len` of one at the end of its
/// context.
struct Rows {
    format: KvFormat,
    dim: u32,
    batch: u64,
    q_len: u64,
    context: u64,
}

impl Rows {
    fn name(&self) -> String {
        let Rows { dim, batch, q_len, context, .. } = self;
        let format = self.format.name();
        let heads = if *dim == DIM { "32/8".into() } else { format!("32/8 d{dim}") };
        match q_len {
            1 => format!("decode {format} {heads} batch {batch} context {context}"),
            _ => format!("prefill {format} {heads} new {q_len} context {context}"),
        }
    }
}

fn attend_rows(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line), rows: &Rows) -> Result<()> {
    const BLOCK: u32 = 16;
    let (name, &Rows { format, dim, batch, q_len, context }) = (rows.name(), rows);
    if !name.contains(filter) {
        return Ok(());
    }
    let layout = layout(format, dim, BLOCK)?;
    let width = context.div_ceil(u64::from(BLOCK));
    let kv_bytes = layout.pool_bytes(batch * width)?;
    let row = u64::from(Q_HEADS * dim);
    let q_bytes = batch * q_len * row * 2;
    let moved = kv_bytes + 2 * q_bytes;
    let sets = gpu.sets(moved)?;
    if sets as u64 * moved > gpu.room()? {
        println!("{name:<52} does not fit");
        return Ok(());
    }
    let plan = AttendPlan::new(&AttendBounds {
        shape: head_shape(dim),
        format,
        seqs: batch as u32,
        q_len: q_len as u32,
        q_tokens: (batch * q_len) as u32,
        kv_len: context as u32,
        pieces: Pieces::Balanced,
        multiprocessors: gpu.backend.multiprocessors(),
        multiprocessor_shared_bytes: gpu.backend.multiprocessor_shared_bytes(),
    })?;
    let buffers = (0..sets)
        .map(|_| Ok([gpu.random(kv_bytes)?, gpu.random(q_bytes)?, gpu.random(q_bytes)?]))
        .collect::<Result<Vec<_>>>()?;
    let table = table(gpu, batch, width)?;
    let kv_lens = gpu.put((0..batch).map(|_| (context as i32).to_ne_bytes()))?;
    let q_indptr = gpu.put((0..=batch).map(|s| ((s * q_len) as i32).to_ne_bytes()))?;
    let workspace = DeviceMemory::new(&gpu.backend, plan.workspace_bytes())?;
    let args = |[kv, q, out]: &[DeviceMemory; 3]| AttendArgs {
        q: q.address(),
        q_dtype: DType::Bf16,
        q_strides: [row as i64, dim.into()],
        out: out.address(),
        out_dtype: DType::Bf16,
        out_strides: [row as i64, dim.into()],
        lse: 0,
        k: kv.address() + layout.k_offset(0),
        k_strides: layout.k_strides(),
        v: kv.address() + layout.v_offset(0),
        v_strides: layout.v_strides(),
        scales: ScaleArgs {
            k: kv.address() + layout.k_scale_offset(0),
            v: kv.address() + layout.v_scale_offset(0),
            k_strides: layout.k_scale_strides(),
            v_strides: layout.v_scale_strides(),
            ..ScaleArgs::NONE
        },
        block_tokens: BLOCK,
        num_blocks: (batch * width) as u32,
        table: table.address(),
        table_stride: width as i64,
        table_indptr: 0,
        seqs: batch as u32,
        q_indptr: q_indptr.address(),
        kv_lens: kv_lens.address(),
        tail_mask: 0,
        scale: 1.0 / (dim as f32).sqrt(),
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
            AttendParams::DecodeToken(params) => gpu.enqueue(&launch, params),
            AttendParams::PrefillToken(params) => gpu.enqueue(&launch, params),
            _ => Err(Error::InvalidState { why: "a plan for codes made another launch" }),
        }
    })?;
    let products = batch * (q_len * context - q_len * (q_len - 1) / 2);
    let flops = if q_len > 1 { 4 * row * products } else { 0 };
    let shape = json!({
        "op": if q_len > 1 { "prefill" } else { "decode" }, "dtype": format.name(), "q_heads": Q_HEADS,
        "kv_heads": KV_HEADS, "dim": dim, "batch": batch, "tokens": q_len, "context": context,
        "block_tokens": BLOCK,
    });
    let bytes = moved + batch * width * 4 + batch * 4;
    report(Line { name, shape, bytes, flops, sample });
    Ok(())
}

fn append_rows(
    gpu: &Gpu,
    filter: &str,
    report: &mut impl FnMut(Line),
    format: KvFormat,
    tokens: u64,
) -> Result<()> {
    const BLOCK: u32 = 16;
    let name = format!("append {} {KV_HEADS} heads {tokens} tokens", format.name());
    if !name.contains(filter) {
        return Ok(());
    }
    let layout = layout(format, DIM, BLOCK)?;
    let blocks = tokens.div_ceil(u64::from(BLOCK));
    let (row, cache) = (u64::from(KV_HEADS * DIM), layout.pool_bytes(blocks)?);
    let moved = 2 * tokens * row * 2 + cache;
    let sets = gpu.sets(moved)?;
    let buffers = (0..sets)
        .map(|_| {
            let rows = || gpu.random(tokens * row * 2);
            Ok([rows()?, rows()?, gpu.random(cache)?])
        })
        .collect::<Result<Vec<_>>>()?;
    let slots = gpu.put((0..tokens).map(|t| (t as i64).to_ne_bytes()))?;
    let sample = gpu.time(sets, |i| {
        let [k, v, kv] = &buffers[i];
        let (k_strides, v_strides) = (layout.k_strides(), layout.v_strides());
        let call = AppendParams {
            k: In::at(k.address()),
            v: In::at(v.address()),
            k_cache: Out::at(kv.address() + layout.k_offset(0)),
            v_cache: Out::at(kv.address() + layout.v_offset(0)),
            slots: In::at(slots.address()),
            k_token: row as i64,
            k_head: DIM.into(),
            v_token: row as i64,
            v_head: DIM.into(),
            k_cache_block: k_strides.block,
            k_cache_head: k_strides.head,
            k_cache_token: k_strides.token,
            v_cache_block: v_strides.block,
            v_cache_head: v_strides.head,
            v_cache_token: v_strides.token,
            tokens: tokens as u32,
            kv_heads: KV_HEADS,
            k_dim: DIM,
            v_dim: DIM,
            block_tokens: BLOCK,
            num_blocks: blocks as u32,
            row_dtype: DType::Bf16.id(),
            ..AppendParams::default()
        };
        let scales = ScaleArgs {
            k: kv.address() + layout.k_scale_offset(0),
            v: kv.address() + layout.v_scale_offset(0),
            k_strides: layout.k_scale_strides(),
            v_strides: layout.v_scale_strides(),
            ..ScaleArgs::NONE
        };
        let mut params = append_token_params(call, format, &scales);
        match append_token_launch(&mut params)? {
            Some(launch) => gpu.enqueue(&launch, &params),
            None => Ok(()),
        }
    })?;
    let shape = json!({
        "op": "append", "dtype": format.name(), "kv_heads": KV_HEADS, "dim": DIM, "tokens": tokens,
    });
    report(Line { name, shape, bytes: moved + tokens * 8, flops: 0, sample });
    Ok(())
}
