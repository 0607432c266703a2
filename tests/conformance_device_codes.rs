//! A store of rows of codes on devices, the emulator and a GPU where there is one: what was appended
//! is attended as it is stored, in prefill and in decode, against the reference in f64.
#![cfg(any(feature = "emulate", feature = "cuda"))]

mod backends;
#[path = "random/mod.rs"]
mod random;

use std::sync::Arc;

use kvcache::Error;
use kvcache::attention::{HeadShape, KvSource, Scoring, reference_attention};
use kvcache::device::{
    Backend, BatchTables, DeviceBatch, DeviceStore, GroupTables, StoreOptions, Stream,
};
use kvcache::dtype::{KvFormat, Rows, RowsMut};
use kvcache::layout::{GroupLayout, GroupSpec};
use kvcache::quant::{RowCodec, Stored};
use random::Rng;

const FORMATS: [KvFormat; 5] =
    [KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Int8T, KvFormat::Int4T, KvFormat::Nvfp4];
/// The emulator has every head dimension; a build for GPUs those that it was asked for, or these.
const DIMS: &[usize] =
    if cfg!(feature = "emulate") { &[64, 80, 96, 128, 192, 256] } else { &[64, 128, 256] };
const HEADS: usize = 2;
const Q_HEADS: usize = 6;
const BLOCK: usize = 16;
const SEQS: usize = 4;

/// What the codes of each sequence say: `[seq][side]`, tokens of `[head][dim]`.
struct Decoded {
    dim: usize,
    rows: Vec<[Vec<f32>; 2]>,
}

impl KvSource for Decoded {
    fn key(&self, seq: usize, head: usize, position: usize, channel: usize) -> Option<f64> {
        let at = (position * HEADS + head) * self.dim + channel;
        Some(f64::from(self.rows[seq][0][at]))
    }
    fn value(&self, seq: usize, head: usize, position: usize, channel: usize) -> f64 {
        f64::from(self.rows[seq][1][(position * HEADS + head) * self.dim + channel])
    }
}

fn coded(codec: RowCodec, row: &[f32]) -> Vec<f32> {
    let (mut codes, mut scales) = (vec![0; codec.code_bytes()], vec![0; codec.scale_bytes()]);
    assert_eq!(codec.encode(row, &mut codes, &mut scales), Ok(Stored::Encoded));
    let mut back = vec![0.0; row.len()];
    codec.decode(&codes, &scales, &mut back).unwrap();
    back
}

/// Appends and attends `new[s]` tokens of each sequence, on layer 1 of 2.
#[allow(clippy::too_many_arguments)]
fn step(
    backend: &Arc<dyn Backend>,
    store: &mut DeviceStore,
    format: KvFormat,
    lens: &mut [usize; SEQS],
    new: [usize; SEQS],
    decoded: &mut Decoded,
    rng: &mut Rng,
) {
    let (dim, rows) = (decoded.dim, new.iter().sum::<usize>());
    let codecs =
        [RowCodec::key(format, dim as u32).unwrap(), RowCodec::value(format, dim as u32).unwrap()];
    let mut random = |count: usize| (0..count).map(|_| rng.normal()).collect::<Vec<f32>>();
    let (k, v) = (random(rows * HEADS * dim), random(rows * HEADS * dim));
    let q = random(rows * Q_HEADS * dim);
    let (mut q_indptr, mut indptr, mut indices, mut slots) = (vec![0], vec![0], vec![], vec![]);
    let mut at = 0;
    for s in 0..SEQS {
        for token in lens[s]..lens[s] + new[s] {
            // Sequence s has the blocks s, s + SEQS, ...
            slots.push(((token / BLOCK * SEQS + s) * BLOCK + token % BLOCK) as i64);
            for (side, all) in [&k, &v].into_iter().enumerate() {
                for row in all[at * HEADS * dim..(at + 1) * HEADS * dim].chunks_exact(dim) {
                    decoded.rows[s][side].extend(coded(codecs[side], row));
                }
            }
            at += 1;
        }
        lens[s] += new[s];
        q_indptr.push(at as i32);
        indices.extend((0..lens[s].div_ceil(BLOCK)).map(|i| (i * SEQS + s) as i32));
        indptr.push(indices.len() as i32);
    }
    let kv_lens: Vec<i32> = lens.iter().map(|&n| n as i32).collect();
    let mut batch = DeviceBatch::default();
    let tables = BatchTables { q_indptr: &q_indptr, kv_lens: &kv_lens };
    let group = GroupTables { indptr: &indptr, indices: &indices, slots: &slots };
    batch.upload(backend, Stream::DEFAULT, &tables, [group].into_iter()).unwrap();
    store.append(1, &batch, 0, Rows::F32(&k), Rows::F32(&v), None).unwrap();
    let mut out = vec![f32::NAN; q.len()];
    let mut lse = vec![f32::NAN; rows * Q_HEADS];
    let scoring = Scoring::causal(dim as u32);
    let to = RowsMut::F32(&mut out);
    store.attend(1, &batch, 0, Rows::F32(&q), to, Some(&mut lse), &scoring).unwrap();

    let shape = HeadShape {
        q_heads: Q_HEADS as u32,
        kv_heads: HEADS as u32,
        k_dim: dim as u32,
        v_dim: dim as u32,
        v_in_k: false,
    };
    let offsets: Vec<usize> = q_indptr.iter().map(|&i| i as usize).collect();
    let want =
        reference_attention(&shape, &scoring, decoded, Rows::F32(&q), &offsets, &lens[..]).unwrap();
    // Products are of f16: queries, weights and what prefill makes of codes are rounded to it.
    let tolerance = 4e-3;
    let what = format!("{format:?} d{dim} {new:?} on {}", backend.name());
    for (i, (&got, &want)) in out.iter().zip(&want.out).enumerate() {
        assert!(
            (f64::from(got) - want).abs() <= tolerance * want.abs().max(1.0),
            "{what} [{i}]: {got}, not {want}"
        );
    }
    for (i, (&got, &want)) in lse.iter().zip(&want.lse).enumerate() {
        assert!(
            (f64::from(got) - want).abs() <= 2e-3 * want.abs().max(1.0),
            "{what} LSE [{i}]: {got}, not {want}"
        );
    }
}

fn store(
    backend: &Arc<dyn Backend>,
    format: KvFormat,
    dim: usize,
    deterministic: bool,
) -> DeviceStore {
    let spec = GroupSpec::uniform(2, HEADS as u32, dim as u32, format);
    let layout = GroupLayout::new(spec, BLOCK as u32).unwrap();
    let options = StoreOptions { deterministic, ..StoreOptions::default() };
    DeviceStore::new(backend, layout, (SEQS * 8) as u32, options).unwrap()
}

#[test]
fn what_is_appended_is_attended() {
    for backend in backends::all() {
        for (i, format) in FORMATS.into_iter().enumerate() {
            for &dim in DIMS {
                let mut store = store(&backend, format, dim, i % 2 == 0);
                let mut decoded = Decoded { dim, rows: vec![Default::default(); SEQS] };
                let (mut lens, mut rng) = ([0; SEQS], Rng::new(5));
                // A prompt each, a chunk more of some, then one token each, then drafts.
                let steps = [[37, 5, 16, 70], [20, 0, 1, 33], [1, 1, 1, 1], [4, 0, 8, 2]];
                // Of most dimensions a prompt and drafts.
                let every = if [64, 128].contains(&dim) { 1 } else { 3 };
                for new in steps.into_iter().step_by(every) {
                    step(&backend, &mut store, format, &mut lens, new, &mut decoded, &mut rng);
                }
            }
        }
    }
}

#[test]
fn rows_that_no_code_can_hold_are_answered() {
    for backend in backends::all() {
        for format in FORMATS {
            let mut store = store(&backend, format, 64, false);
            let mut batch = DeviceBatch::default();
            let tables = BatchTables { q_indptr: &[0, 1], kv_lens: &[1] };
            let group = GroupTables { indptr: &[0, 1], indices: &[0], slots: &[0] };
            batch.upload(&backend, Stream::DEFAULT, &tables, [group].into_iter()).unwrap();
            let (good, mut bad) = (vec![1.0f32; HEADS * 64], vec![1.0f32; HEADS * 64]);
            bad[70] = f32::NAN;
            let mut append =
                |k: &[f32]| store.append(0, &batch, 0, Rows::F32(k), Rows::F32(&good), None);
            assert!(matches!(append(&bad), Err(Error::InvalidArgument { .. })), "{format:?}");
            assert_eq!(append(&good), Ok(()), "{format:?}");
        }
    }
}

#[test]
fn what_has_no_kernels_has_no_store() {
    for backend in backends::all() {
        for (format, dim) in
            [(KvFormat::Kt4v4, 96), (KvFormat::Int8T, 160), (KvFormat::Fp8E4m3, 224)]
        {
            let layout = GroupLayout::new(GroupSpec::uniform(1, 1, dim, format), 64).unwrap();
            let made = DeviceStore::new(&backend, layout, 4, StoreOptions::default());
            assert!(matches!(made, Err(Error::Unsupported { .. })), "{format:?} {dim}");
        }
    }
}
