//! Attention over paged K and V in bf16: decode of one token a sequence, at the grid's batches and
//! contexts.

use kvcache::attention::HeadShape;
use kvcache::device::DeviceMemory;
use kvcache::dtype::{DType, KvFormat};
use kvcache::error::Result;
use kvcache::kernels::{AttendArgs, AttendBounds, AttendParams, AttendPlan, Pieces};
use kvcache::layout::Strides;
use serde_json::json;

use crate::Line;
use crate::gpu::Gpu;

const DIM: u64 = 128;
const BLOCK: u64 = 16;

/// Lengths of a batch around a mean.
#[derive(Clone, Copy)]
enum Lengths {
    Same,
    /// From a quarter of the mean to seven quarters.
    Ragged,
}

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    let contexts = [1 << 10, 4 << 10, 16 << 10, 32 << 10];
    for (q_heads, kv_heads) in [(32, 8), (64, 8), (32, 32)] {
        for batch in [1, 8, 64, 256] {
            for context in contexts {
                decode(gpu, filter, report, q_heads, kv_heads, batch, context, Lengths::Same)?;
            }
        }
    }
    for (batch, context) in [(8, 4 << 10), (64, 4 << 10), (64, 16 << 10)] {
        decode(gpu, filter, report, 32, 8, batch, context, Lengths::Ragged)?;
    }
    Ok(())
}

/// One set of buffers.
struct Set {
    k: DeviceMemory,
    v: DeviceMemory,
    q: DeviceMemory,
    out: DeviceMemory,
}

#[allow(clippy::too_many_arguments)]
fn decode(
    gpu: &Gpu,
    filter: &str,
    report: &mut impl FnMut(Line),
    q_heads: u64,
    kv_heads: u64,
    batch: u64,
    context: u64,
    lengths: Lengths,
) -> Result<()> {
    let ragged = matches!(lengths, Lengths::Ragged);
    let kind = if ragged { " ragged" } else { "" };
    let name = format!("decode bf16 {q_heads}/{kv_heads} batch {batch} context {context}{kind}");
    if !name.contains(filter) {
        return Ok(());
    }
    let lens: Vec<u64> = (0..batch)
        .map(|s| match lengths {
            Lengths::Same => context,
            Lengths::Ragged => context / 4 + s * (context * 3 / 2) / (batch - 1).max(1),
        })
        .collect();
    let longest = lens.iter().copied().max().unwrap_or(0);
    let blocks: u64 = lens.iter().map(|len| len.div_ceil(BLOCK)).sum();
    let kv_bytes = blocks * BLOCK * kv_heads * DIM * 2;
    let q_bytes = batch * q_heads * DIM * 2;
    let sets = gpu.sets(2 * kv_bytes)?;
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
        q_len: 1,
        q_tokens: batch as u32,
        kv_len: longest as u32,
        pieces: Pieces::Balanced,
        multiprocessors: gpu.backend.multiprocessors(),
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
    // Blocks in an order as scattered as a pool's after a while.
    let stride = (0..).map(|i| blocks / 2 + 1 + i).find(|s| gcd(*s, blocks) == 1).unwrap_or(1);
    let width = longest.div_ceil(BLOCK);
    let mut next = 0;
    let mut table = vec![-1i32; (batch * width) as usize];
    for (s, len) in lens.iter().enumerate() {
        for i in 0..len.div_ceil(BLOCK) as usize {
            table[s * width as usize + i] = (next * stride % blocks) as i32;
            next += 1;
        }
    }
    let table = gpu.put(table.iter().map(|x| x.to_ne_bytes()))?;
    let kv_lens = gpu.put(lens.iter().map(|len| (*len as i32).to_ne_bytes()))?;
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
        block_tokens: BLOCK as u32,
        num_blocks: blocks as u32,
        table: table.address(),
        table_stride: width as i64,
        table_indptr: 0,
        seqs: batch as u32,
        q_indptr: 0,
        kv_lens: kv_lens.address(),
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
            AttendParams::Prefill(params) => gpu.enqueue(&launch, params),
            AttendParams::Mla(params) => gpu.enqueue(&launch, params),
        }
    })?;
    let tokens: u64 = lens.iter().sum();
    let shape = json!({
        "op": "decode", "dtype": "bf16", "q_heads": q_heads, "kv_heads": kv_heads, "dim": DIM,
        "batch": batch, "context": context, "ragged": ragged, "block_tokens": BLOCK,
    });
    let bytes = 2 * tokens * kv_heads * DIM * 2 + 2 * q_bytes + blocks * 4 + batch * 4;
    report(Line { name, shape: shape.clone(), bytes, flops: 0, sample });
    if batch == 64 && context == 4 << 10 && !ragged {
        let sample = gpu.time(1, |_| enqueue_plan())?;
        let name = format!("plan of decode {q_heads}/{kv_heads} batch {batch} context {context}");
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

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
