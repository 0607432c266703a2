//! Decode in bf16 over a prefix that all sequences share: plain, as a cascade in each number of
//! chunks, and what the cost model makes of both by the device's own rates. What is measured here is
//! what `src/cuda/rates.rs` should say.

use kvcache::attention::HeadShape;
use kvcache::device::DeviceMemory;
use kvcache::dtype::{DType, KvFormat};
use kvcache::error::Result;
use kvcache::kernels::params::CascadeSegment;
use kvcache::kernels::{
    AttendArgs, AttendBounds, AttendParams, AttendPlan, CascadeAttendPlan, CascadeShape, HostBatch,
    Launch, Pieces, ScaleArgs, SharedPrefixes, Words, cascade_within,
};
use kvcache::layout::Strides;
use serde_json::json;

use crate::Line;
use crate::gpu::Gpu;

const DIM: u64 = 128;
const BLOCK: u64 = 16;
const K: u64 = 1 << 10;

struct Case {
    q_heads: u64,
    kv_heads: u64,
    batch: u64,
    shared: u64,
    own: u64,
}

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    for (q_heads, kv_heads, batch, shared, own) in [
        // A system prompt, as a server has it.
        (32, 8, 64, 4 * K, K),
        (32, 8, 256, 4 * K, K),
        (32, 8, 64, 512, K),
        (32, 8, 8, 16 * K, K),
        (64, 8, 64, 4 * K, K),
        (32, 32, 64, 4 * K, K),
    ] {
        one(gpu, filter, report, &Case { q_heads, kv_heads, batch, shared, own })?;
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

fn words(values: impl Iterator<Item = u64>) -> Vec<[u8; 4]> {
    values.map(|x| (x as i32).to_ne_bytes()).collect()
}

fn one(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line), case: &Case) -> Result<()> {
    let &Case { q_heads, kv_heads, batch, shared, own } = case;
    let name = format!("bf16 {q_heads}/{kv_heads} batch {batch} shared {shared} own {own}");
    if !format!("cascade {name}").contains(filter) && !format!("plain {name}").contains(filter) {
        return Ok(());
    }
    let (shared_blocks, own_blocks) = (shared / BLOCK, own / BLOCK);
    let (blocks, width) = (shared_blocks + batch * own_blocks, shared_blocks + own_blocks);
    let row = q_heads * DIM;
    let (kv_bytes, q_bytes) = (blocks * BLOCK * kv_heads * DIM * 2, batch * row * 2);
    let sets = gpu.sets(2 * (kv_bytes + q_bytes))?;
    let set = || -> Result<Set> {
        let [k, v] = [gpu.random(kv_bytes)?, gpu.random(kv_bytes)?];
        Ok(Set { k, v, q: gpu.random(q_bytes)?, out: gpu.random(q_bytes)? })
    };
    let buffers = (0..sets).map(|_| set()).collect::<Result<Vec<_>>>()?;

    let ids = Gpu::scattered(blocks);
    let (prefix, rest) = ids.split_at(shared_blocks as usize);
    let tables = rest.chunks_exact(own_blocks as usize).flat_map(|own| prefix.iter().chain(own));
    let indices: Vec<[u8; 4]> = tables.map(|id| id.to_ne_bytes()).collect();
    let q_indptr = words(0..=batch);
    let indptr = words((0..=batch).map(|s| s * width));
    let kv_lens = words((0..batch).map(|_| shared + own));
    let host = HostBatch {
        q_indptr: Words(&q_indptr),
        kv_lens: Words(&kv_lens),
        indptr: Words(&indptr),
        indices: Words(&indices),
        block_tokens: BLOCK as u32,
    };
    let at = [&q_indptr, &kv_lens, &indptr, &indices];
    let at = at.map(|list| gpu.put(list.iter().copied()));
    let [q_indptr_at, kv_lens_at, indptr_at, indices_at] = at;
    let (q_indptr_at, kv_lens_at) = (q_indptr_at?, kv_lens_at?);
    let (indptr_at, indices_at) = (indptr_at?, indices_at?);
    let strides = Strides {
        block: (kv_heads * BLOCK * DIM) as i64,
        head: (BLOCK * DIM) as i64,
        token: DIM as i64,
    };
    let args = |set: &Set| AttendArgs {
        q: set.q.address(),
        q_dtype: DType::Bf16,
        q_strides: [row as i64, DIM as i64],
        out: set.out.address(),
        out_dtype: DType::Bf16,
        out_strides: [row as i64, DIM as i64],
        lse: 0,
        k: set.k.address(),
        k_strides: strides,
        v: set.v.address(),
        v_strides: strides,
        scales: ScaleArgs::NONE,
        block_tokens: BLOCK as u32,
        num_blocks: blocks as u32,
        table: indices_at.address(),
        table_stride: 0,
        table_indptr: indptr_at.address(),
        seqs: batch as u32,
        q_indptr: q_indptr_at.address(),
        kv_lens: kv_lens_at.address(),
        tail_mask: 0,
        scale: 1.0 / (DIM as f32).sqrt(),
        causal: true,
        window: None,
        softcap: None,
        sinks: 0,
        slopes: 0,
        error_flag: 0,
    };
    let attend = |launch: &Launch, params: &AttendParams| match params {
        AttendParams::Decode(params) => gpu.enqueue(launch, params),
        AttendParams::DecodeToken(params) => gpu.enqueue(launch, params),
        AttendParams::PrefillToken(params) => gpu.enqueue(launch, params),
        AttendParams::Prefill(params) => gpu.enqueue(launch, params),
        AttendParams::Mla(params) => gpu.enqueue(launch, params),
        AttendParams::MlaToken(params) => gpu.enqueue(launch, params),
    };
    let bounds = AttendBounds {
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
        kv_len: (shared + own) as u32,
        pieces: Pieces::Balanced,
        multiprocessors: gpu.backend.multiprocessors(),
        multiprocessor_shared_bytes: gpu.backend.multiprocessor_shared_bytes(),
    };
    // What must move whatever is done: every block once.
    let bytes = 2 * kv_bytes + 2 * q_bytes;
    let mut line = |name: String, chunks: u32, sample| {
        let shape = json!({
            "op": "cascade", "dtype": "bf16", "q_heads": q_heads, "kv_heads": kv_heads, "dim": DIM,
            "batch": batch, "shared": shared, "own": own, "chunks": chunks, "block_tokens": BLOCK,
        });
        report(Line { name, shape, bytes, flops: 0, sample });
    };

    let plain = AttendPlan::new(&bounds)?;
    let workspace = DeviceMemory::new(&gpu.backend, plain.workspace_bytes())?;
    if let Some((launch, params)) = plain.plan_launch(workspace.address(), &args(&buffers[0]))? {
        gpu.enqueue(&launch, &params)?;
    }
    let sample = gpu.time(sets, |i| {
        let (launch, params) = plain.attend_launch(workspace.address(), &args(&buffers[i]))?;
        attend(&launch, &params)
    })?;
    line(format!("plain {name}"), 0, sample);

    let (first_seq, seqs) = (0, batch as u32);
    let all = CascadeSegment { first_seq, seqs, shared_blocks: shared_blocks as u32, reserved: 0 };
    // What is decoded is cut by its own kernel.
    let counts: &[u32] = if batch > 8 { &[1, 2, 4, 8, 16] } else { &[1] };
    for &chunks in counts {
        let plan = CascadeAttendPlan::new(&bounds, BLOCK as u32, 1, chunks)?;
        let mut views = Vec::new();
        plan.views(&host, &[all], &mut views)?;
        let mut workspace = DeviceMemory::new(&gpu.backend, plan.workspace_bytes())?;
        workspace.upload(0, &views, gpu.stream)?;
        for (launch, params) in
            plan.launches(workspace.address(), &args(&buffers[0]))?.plans.iter().flatten()
        {
            gpu.enqueue(launch, params)?;
        }
        let sample = gpu.time(sets, |i| {
            let launches = plan.launches(workspace.address(), &args(&buffers[i]))?;
            if let Some((launch, params)) = &launches.queries {
                gpu.enqueue(launch, params)?;
            }
            for (launch, params) in &launches.halves {
                attend(launch, params)?;
            }
            match &launches.merge {
                Some((launch, params)) => gpu.enqueue(launch, params),
                None => Ok(()),
            }
        })?;
        line(format!("cascade {name}, {chunks} chunks"), chunks, sample);
    }

    let Some(rates) = gpu.backend.rates() else { return Ok(()) };
    let shape = CascadeShape {
        q_heads: q_heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: DIM as u32,
        block_tokens: BLOCK as u32,
        token_bytes: (kv_heads * DIM * 4) as u32,
        q_len: 1,
        batch: batch as u32,
        tokens: batch * (shared + own),
    };
    let mut prefixes = SharedPrefixes::default();
    prefixes.find(&host)?;
    match cascade_within(&shape, &rates, &mut prefixes, &mut Vec::new())? {
        Some(chosen) => println!(
            "  model: plain {:.1} us, cascade {:.1} us in {} chunks",
            chosen.estimate.plain, chosen.estimate.cascade, chosen.chunks
        ),
        None => println!("  model: plain"),
    }
    Ok(())
}
