//! The cases of the table on a device: the same inputs in its memory, the call as an engine with
//! tensors of its own makes it.
#![allow(dead_code)]

use std::sync::Arc;

use kvcache::device::{Backend, DeviceMemory, Stream};
use kvcache::dtype::{bf16, f16};
use kvcache::kernels::{
    AttendArgs, AttendBounds, AttendParams, AttendPlan, Launch, Pieces, ScaleArgs,
};

use super::*;

/// Rows in device memory.
fn put(backend: &Arc<dyn Backend>, rows: Rows) -> DeviceMemory {
    let bytes = rows.elements() * rows.dtype().bytes() as usize;
    // SAFETY: the rows are that many initialised bytes.
    let bytes = unsafe { std::slice::from_raw_parts(rows.as_ptr(), bytes) };
    let mut memory = DeviceMemory::new(backend, bytes.len() as u64).unwrap();
    memory.upload(0, bytes, Stream::DEFAULT).unwrap();
    memory
}

fn put_ints(backend: &Arc<dyn Backend>, ints: &[i32]) -> DeviceMemory {
    let bytes: Vec<u8> = ints.iter().flat_map(|x| x.to_ne_bytes()).collect();
    let mut memory = DeviceMemory::new(backend, bytes.len() as u64).unwrap();
    memory.upload(0, &bytes, Stream::DEFAULT).unwrap();
    memory
}

/// Bytes of device memory as elements of a type.
fn get(memory: &DeviceMemory, dtype: DType) -> Buffer {
    let mut bytes = vec![0u8; memory.bytes() as usize];
    memory.download(0, &mut bytes, Stream::DEFAULT).unwrap();
    let f32s = |b: &[u8]| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]);
    let u16s = |b: &[u8]| u16::from_ne_bytes([b[0], b[1]]);
    match dtype {
        DType::F32 => Buffer::F32(bytes.chunks_exact(4).map(f32s).collect()),
        DType::F16 => Buffer::F16(bytes.chunks_exact(2).map(|b| f16::from_bits(u16s(b))).collect()),
        _ => Buffer::Bf16(bytes.chunks_exact(2).map(|b| bf16::from_bits(u16s(b))).collect()),
    }
}

fn run<P>(backend: &Arc<dyn Backend>, launch: &Launch, params: &P) {
    let (at, bytes) = (std::ptr::from_ref(params).cast(), size_of::<P>());
    // SAFETY: the parameters were made by the plan for this kernel, from live memory.
    unsafe { backend.launch(launch, at, bytes, Stream::DEFAULT) }.unwrap();
}

impl Instance {
    /// Runs the sequences `seqs` on a device; out, LSE, and whether a bad block was reported.
    fn call_on(
        &self,
        backend: &Arc<dyn Backend>,
        seqs: Range<usize>,
        pieces: Pieces,
    ) -> (Buffer, Vec<f32>, bool) {
        let (case, shape, scoring) = (&self.case, &self.case.shape, self.scoring());
        let first = self.q_indptr[seqs.start];
        let q_indptr: Vec<i32> =
            self.q_indptr[seqs.start..=seqs.end].iter().map(|i| i - first).collect();
        let kv_lens: Vec<i32> = case.lengths[seqs.clone()].iter().map(|l| l.1 as i32).collect();
        let widest = self.tables.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let (mut flat, mut indptr) = (Vec::new(), vec![0]);
        for table in &self.tables[seqs.clone()] {
            flat.extend_from_slice(table);
            if matches!(case.tables, Tables::Dense) {
                // Entries past the length must never be read: poison.
                flat.resize(indptr.len() * widest, i32::MIN);
            }
            indptr.push(flat.len() as i32);
        }
        flat.push(i32::MIN);
        let bounds = AttendBounds {
            shape: *shape,
            format: case.format,
            seqs: seqs.len() as u32,
            q_len: case.lengths[seqs.clone()].iter().map(|l| l.0).max().unwrap_or(0).max(1),
            q_tokens: q_indptr[seqs.len()].max(1) as u32,
            kv_len: case.lengths[seqs.clone()].iter().map(|l| l.1).max().unwrap_or(0),
            pieces,
            multiprocessors: backend.multiprocessors(),
            multiprocessor_shared_bytes: backend.multiprocessor_shared_bytes(),
        };
        let plan = AttendPlan::new(&bounds).unwrap_or_else(|error| panic!("{error}: {case:?}"));
        let tokens = q_indptr[seqs.len()] as usize;
        let (heads, k_dim, v_dim) = (shape.q_heads as usize, shape.k_dim as i64, shape.v_dim);
        let (k, v) = (put(backend, self.k.rows()), put(backend, self.v.rows()));
        let v_at = if self.together {
            k.address() + (self.v_offset * case.format.dtype().bytes() as usize) as u64
        } else {
            v.address()
        };
        let q = put(backend, self.q.rows());
        let nan = Buffer::filled(case.out_dtype, tokens * heads * v_dim as usize, || f32::NAN);
        let (out, lse) = (put(backend, nan.rows()), vec![f32::NAN; tokens * heads]);
        let lse = put(backend, Rows::F32(&lse));
        let mut flag = DeviceMemory::new(backend, 4).unwrap();
        flag.zero(Stream::DEFAULT).unwrap();
        let mut workspace = DeviceMemory::new(backend, plan.workspace_bytes()).unwrap();
        workspace.upload(0, &vec![0xff; plan.workspace_bytes() as usize], Stream::DEFAULT).unwrap();
        let lists = [&self.sinks, &self.alibi].map(|list| put(backend, Rows::F32(list)));
        let ints = [&flat, &indptr, &q_indptr, &kv_lens].map(|list| put_ints(backend, list));
        let skipped = first as i64 * heads as i64 * k_dim * i64::from(case.q_dtype.bytes());
        let args = AttendArgs {
            q: q.address() + skipped as u64,
            q_dtype: case.q_dtype,
            q_strides: [heads as i64 * k_dim, k_dim],
            out: out.address(),
            out_dtype: case.out_dtype,
            out_strides: [heads as i64 * i64::from(v_dim), v_dim.into()],
            lse: lse.address(),
            k: k.address(),
            k_strides: self.k_strides,
            v: v_at,
            v_strides: self.v_strides,
            scales: ScaleArgs::NONE,
            block_tokens: case.block_tokens,
            num_blocks: self.num_blocks as u32,
            table: ints[0].address(),
            table_stride: widest as i64,
            table_indptr: match case.tables {
                Tables::Dense => 0,
                Tables::Csr => ints[1].address(),
            },
            seqs: seqs.len() as u32,
            q_indptr: ints[2].address(),
            kv_lens: ints[3].address(),
            tail_mask: 0,
            scale: scoring.scale,
            causal: scoring.causal,
            window: scoring.window,
            softcap: scoring.softcap,
            sinks: if case.sinks { lists[0].address() } else { 0 },
            slopes: if case.alibi { lists[1].address() } else { 0 },
            error_flag: flag.address(),
        };
        if let Some((launch, params)) = plan.plan_launch(workspace.address(), &args).unwrap() {
            run(backend, &launch, &params);
        }
        let (launch, params) = plan.attend_launch(workspace.address(), &args).unwrap();
        match &params {
            AttendParams::Decode(params) => run(backend, &launch, params),
            AttendParams::DecodeToken(params) => run(backend, &launch, params),
            AttendParams::PrefillToken(params) => run(backend, &launch, params),
            AttendParams::Prefill(params) => run(backend, &launch, params),
            AttendParams::Mla(params) => run(backend, &launch, params),
            AttendParams::MlaToken(params) => run(backend, &launch, params),
        }
        let Buffer::F32(lse) = get(&lse, DType::F32) else { unreachable!("as asked for") };
        let mut raised = [0; 4];
        flag.download(0, &mut raised, Stream::DEFAULT).unwrap();
        (get(&out, case.out_dtype), lse, raised != [0; 4])
    }

    /// Runs on a device and compares with the reference; returns whether a bad block was reported.
    pub fn check_on(&self, backend: &Arc<dyn Backend>) -> bool {
        let (out, lse, flag) = self.call_on(backend, 0..self.tables.len(), Pieces::Balanced);
        // The matrix instruction takes queries of the cache's type.
        let cache = self.case.format.dtype();
        let mut values = (0..self.q.rows().elements()).map(|i| self.q.get(i));
        let q = Buffer::filled(cache, values.len(), || values.next().unwrap());
        let want = self.reference(q.rows());
        // Softmax weights are rounded to the cache's type, by half a step each; and what `normal`
        // draws is below 4.25.
        let half_step = if cache == DType::F16 { 2f64.powi(-11) } else { 2f64.powi(-8) };
        let name = backend.name();
        self.compare(name, &want, 4.25 * half_step + 4e-5, 0.0, |i| out.get(i), &lse);
        flag
    }

    /// The bits of out and LSE of the sequences `seqs`, their contexts cut in fixed pieces.
    pub fn run_on(&self, backend: &Arc<dyn Backend>, seqs: Range<usize>) -> (Vec<u32>, Vec<u32>) {
        self.bits(self.call_on(backend, seqs, Pieces::Fixed(64)))
    }
}
