//! Attention over paged K and V in bf16: decode of one token a sequence at the grid's batches and
//! contexts, and chunked prefill.

use kvcache::attention::HeadShape;
use kvcache::device::DeviceMemory;
use kvcache::dtype::{DType, KvFormat};
use kvcache::error::Result;
use kvcache::kernels::{AttendArgs, AttendBounds, AttendParams, AttendPlan, Pieces, ScaleArgs};
use kvcache::layout::Strides;
use serde_json::{Value, json};

use crate::Line;
use crate::gpu::Gpu;

const DIM: u64 = 128;
const BLOCK: u64 = 16;
const K: u64 = 1 << 10;

struct Case {
    name: String,
    shape: Value,
    q_heads: u64,
    kv_heads: u64,
    /// Query tokens of every sequence.
    q_len: u64,
    /// Cached tokens of each sequence, those of its queries included.
    lens: Vec<u64>,
    /// Also time the plan by itself.
    plan: bool,
}

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    for (q_heads, kv_heads) in [(32, 8), (64, 8), (32, 32)] {
        for batch in [1, 8, 64, 256] {
            for context in [K, 4 * K, 16 * K, 32 * K] {
                let case = decode(q_heads, kv_heads, batch, context, false);
                attend(gpu, filter, report, case)?;
            }
        }
    }
    for (batch, context) in [(8, 4 * K), (64, 4 * K), (64, 16 * K)] {
        attend(gpu, filter, report, decode(32, 8, batch, context, true))?;
    }
    for tokens in [2 * K, 4 * K, 8 * K, 16 * K] {
        attend(gpu, filter, report, prefill(1, tokens, tokens))?;
    }
    for batch in [1, 8] {
        attend(gpu, filter, report, prefill(batch, 512, 16 * K))?;
    }
    Ok(())
}

/// One token a sequence. Ragged lengths go from a quarter of the mean to seven quarters.
fn decode(q_heads: u64, kv_heads: u64, batch: u64, context: u64, ragged: bool) -> Case {
    let length = |s: u64| {
        if ragged { context / 4 + s * (context * 3 / 2) / (batch - 1).max(1) } else { context }
    };
    let kind = if ragged { " ragged" } else { "" };
    Case {
        name: format!("decode bf16 {q_heads}/{kv_heads} batch {batch} context {context}{kind}"),
        shape: json!({
            "op": "decode", "dtype": "bf16", "q_heads": q_heads, "kv_heads": kv_heads, "dim": DIM,
            "batch": batch, "context": context, "ragged": ragged, "block_tokens": BLOCK,
        }),
        q_heads,
        kv_heads,
        q_len: 1,
        lens: (0..batch).map(length).collect(),
        plan: batch == 64 && context == 4 * K && !ragged,
    }
}

/// `tokens` new tokens at the end of a context, causal.
fn prefill(batch: u64, tokens: u64, context: u64) -> Case {
    Case {
        name: format!("prefill bf16 32/8 batch {batch} new {tokens} context {context}"),
        shape: json!({
            "op": "prefill", "dtype": "bf16", "q_heads": 32, "kv_heads": 8, "dim": DIM,
            "batch": batch, "tokens": tokens, "context": context, "block_tokens": BLOCK,
        }),
        q_heads: 32,
        kv_heads: 8,
        q_len: tokens,
        lens: vec![context; batch as usize],
        plan: false,
    }
}

/// One set of buffers.
struct Set {
    k: DeviceMemory,
    v: DeviceMemory,
    q: DeviceMemory,
    out: DeviceMemory,
}

fn attend(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line), case: Case) -> Result<()> {
    let Case { name, shape, q_heads, kv_heads, q_len, lens, plan: with_plan } = case;
    if !name.contains(filter) {
        return Ok(());
    }
    let batch = lens.len() as u64;
    let longest = lens.iter().copied().max().unwrap_or(0);
    let blocks: u64 = lens.iter().map(|len| len.div_ceil(BLOCK)).sum();
    let kv_bytes = blocks * BLOCK * kv_heads * DIM * 2;
    let q_bytes = batch * q_len * q_heads * DIM * 2;
    let sets = gpu.sets(2 * (kv_bytes + q_bytes))?;
    if sets as u64 * 2 * (kv_bytes + q_bytes) > gpu.room()? {
        println!("{name:<52} does not fit");
        return Ok(());
    }
    let plan = AttendPlan::new(&AttendBounds {
        shape: HeadShape {
            q_heads: q_heads as u32,
            kv_heads: kv_heads as u32,
            k_dim: DIM as u32,
            v_dim: DIM as u32,
            v_in_k: false,
        },
        format: KvFormat::Bf16,
        seqs: batch as u32,
        q_len: q_len as u32,
        q_tokens: (batch * q_len) as u32,
        kv_len: longest as u32,
        pieces: Pieces::Balanced,
        multiprocessors: gpu.backend.multiprocessors(),
        multiprocessor_shared_bytes: gpu.backend.multiprocessor_shared_bytes(),
    })?;
    let set = || -> Result<Set> {
        Ok(Set {
            k: gpu.random(kv_bytes)?,
            v: gpu.random(kv_bytes)?,
            q: gpu.random(q_bytes)?,
            out: gpu.random(q_bytes)?,
        })
    };
    let buffers = (0..sets).map(|_| set()).collect::<Result<Vec<_>>>()?;
    let width = longest.div_ceil(BLOCK);
    let mut ids = Gpu::scattered(blocks).into_iter();
    let mut table = vec![-1i32; (batch * width) as usize];
    for (s, len) in lens.iter().enumerate() {
        for i in 0..len.div_ceil(BLOCK) as usize {
            table[s * width as usize + i] = ids.next().unwrap_or(-1);
        }
    }
    let table = gpu.put(table.iter().map(|x| x.to_ne_bytes()))?;
    let kv_lens = gpu.put(lens.iter().map(|len| (*len as i32).to_ne_bytes()))?;
    let q_indptr = gpu.put((0..=batch).map(|s| ((s * q_len) as i32).to_ne_bytes()))?;
    let workspace = DeviceMemory::new(&gpu.backend, plan.workspace_bytes())?;
    let args = |set: &Set| AttendArgs {
        q: set.q.address(),
        q_dtype: DType::Bf16,
        q_strides: [(q_heads * DIM) as i64, DIM as i64],
        out: set.out.address(),
        out_dtype: DType::Bf16,
        out_strides: [(q_heads * DIM) as i64, DIM as i64],
        lse: 0,
        k: set.k.address(),
        k_strides: strides(kv_heads),
        v: set.v.address(),
        v_strides: strides(kv_heads),
        scales: ScaleArgs::NONE,
        block_tokens: BLOCK as u32,
        num_blocks: blocks as u32,
        table: table.address(),
        table_stride: width as i64,
        table_indptr: 0,
        seqs: batch as u32,
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
    let enqueue_plan = || match plan.plan_launch(workspace.address(), &args(&buffers[0]))? {
        Some((launch, params)) => gpu.enqueue(&launch, &params),
        None => Ok(()),
    };
    enqueue_plan()?;
    // As in all layers but the first: the plan is made once a step.
    let sample = gpu.time(sets, |i| {
        let (launch, params) = plan.attend_launch(workspace.address(), &args(&buffers[i]))?;
        match &params {
            AttendParams::Decode(params) => gpu.enqueue(&launch, params),
            AttendParams::DecodeToken(params) => gpu.enqueue(&launch, params),
            AttendParams::PrefillToken(params) => gpu.enqueue(&launch, params),
            AttendParams::Prefill(params) => gpu.enqueue(&launch, params),
            AttendParams::Mla(params) => gpu.enqueue(&launch, params),
            AttendParams::MlaToken(params) => gpu.enqueue(&launch, params),
        }
    })?;
    let tokens: u64 = lens.iter().sum();
    // Keys that the rows of a sequence see: the last sees all, each before it one less.
    let seen = |len: &u64| q_len * len - q_len * (q_len - 1) / 2;
    let products: u64 = lens.iter().map(seen).sum();
    let bytes = 2 * tokens * kv_heads * DIM * 2 + 2 * q_bytes + blocks * 4 + batch * 4;
    let flops = if q_len > 1 { 4 * q_heads * DIM * products } else { 0 };
    report(Line { name: name.clone(), shape: shape.clone(), bytes, flops, sample });
    if with_plan {
        let sample = gpu.time(1, |_| enqueue_plan())?;
        let name = format!("plan of {name}");
        let shape = json!({ "op": "plan", "of": shape });
        report(Line { name, shape, bytes: batch * 4, flops: 0, sample });
    }
    Ok(())
}

fn strides(kv_heads: u64) -> Strides {
    Strides {
        block: (kv_heads * BLOCK * DIM) as i64,
        head: (BLOCK * DIM) as i64,
        token: DIM as i64,
    }
}
