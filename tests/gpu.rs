//! What only a GPU can show: a graph captured once and replayed with other lengths and tables, streams,
//! and page-locked memory; the last under the emulator, too, where it is built in. Skipped where there
//! is none (`KVCACHE_REQUIRE_GPU=1`: fails).
#![cfg(feature = "cuda")]

mod backends;
mod tiles;

use std::sync::Arc;

use kvcache::attention::HeadShape;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, TierOptions, Work};
use kvcache::cuda::{Cuda, Event, Graph, Queue};
use kvcache::device::{Backend, DeviceMemory, Stream};
use kvcache::dtype::{DType, KvFormat, bf16};
use kvcache::ids::{Namespace, SeqId};
use kvcache::kernels::{
    AttendArgs, AttendBounds, AttendParams, AttendPlan, Kernel, Launch, Pieces, ScaleArgs, kernels,
};
use kvcache::layout::{CacheSpec, GroupSpec, Strides};
use kvcache::tier::TierKind;
use tiles::Rng;

const SEQS: usize = 5;
const BLOCKS: usize = 96;
const BLOCK: usize = 16;
const WIDTH: usize = 20;
const HEADS: usize = 2;
const Q_HEADS: usize = 8;
const D: usize = 128;

fn gpu() -> Option<Arc<Cuda>> {
    backends::gpu()?;
    Some(Cuda::open(0).unwrap())
}

fn bytes<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: numbers without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn put<T: Copy>(backend: &Arc<dyn Backend>, values: &[T]) -> DeviceMemory {
    let mut memory = DeviceMemory::new(backend, size_of_val(values) as u64).unwrap();
    memory.upload(0, bytes(values), Stream::DEFAULT).unwrap();
    memory
}

fn enqueue<P>(backend: &dyn Backend, launch: &Launch, params: &P, stream: Stream) {
    let (at, bytes) = (std::ptr::from_ref(params).cast(), size_of::<P>());
    // SAFETY: the parameters were made by the plan for this kernel, from live memory.
    unsafe { backend.launch(launch, at, bytes, stream) }.unwrap();
}

#[test]
fn a_captured_graph_follows_lengths_and_tables() {
    let Some(cuda) = gpu() else { return };
    let backend: Arc<dyn Backend> = cuda.clone();
    let queue = Queue::new(&cuda).unwrap();
    // SAFETY: a stream of this device, which outlives every use.
    let stream = unsafe { Stream::from_raw(queue.as_raw()) };
    let mut rng = Rng::new(9);
    let mut drawn =
        |count: usize| -> Vec<bf16> { (0..count).map(|_| bf16::from_f32(rng.normal())).collect() };
    let (k, v) = (drawn(BLOCKS * HEADS * BLOCK * D), drawn(BLOCKS * HEADS * BLOCK * D));
    let (k, v) = (put(&backend, &k), put(&backend, &v));
    let q = put(&backend, &drawn(SEQS * Q_HEADS * D));
    let mut out = put(&backend, &[f32::NAN; SEQS * Q_HEADS * D]);
    let shape = HeadShape {
        q_heads: Q_HEADS as u32,
        kv_heads: HEADS as u32,
        k_dim: D as u32,
        v_dim: D as u32,
        v_in_k: false,
    };
    let plan = AttendPlan::new(&AttendBounds {
        shape,
        format: KvFormat::Bf16,
        seqs: SEQS as u32,
        q_len: 1,
        q_tokens: SEQS as u32,
        kv_len: (WIDTH * BLOCK) as u32,
        pieces: Pieces::Balanced,
        multiprocessors: backend.multiprocessors(),
        multiprocessor_shared_bytes: backend.multiprocessor_shared_bytes(),
    })
    .unwrap();
    let workspace = DeviceMemory::new(&backend, plan.workspace_bytes()).unwrap();
    let mut tables = put(&backend, &[0i32; SEQS * WIDTH]);
    let mut lens = put(&backend, &[0i32; SEQS]);
    let strides =
        Strides { block: (HEADS * BLOCK * D) as i64, head: (BLOCK * D) as i64, token: D as i64 };
    let rows = [(Q_HEADS * D) as i64, D as i64];
    let args = AttendArgs {
        q: q.address(),
        q_dtype: DType::Bf16,
        q_strides: rows,
        out: out.address(),
        out_dtype: DType::F32,
        out_strides: rows,
        lse: 0,
        k: k.address(),
        k_strides: strides,
        v: v.address(),
        v_strides: strides,
        scales: ScaleArgs::NONE,
        block_tokens: BLOCK as u32,
        num_blocks: BLOCKS as u32,
        table: tables.address(),
        table_stride: WIDTH as i64,
        table_indptr: 0,
        seqs: SEQS as u32,
        q_indptr: 0,
        kv_lens: lens.address(),
        tail_mask: 0,
        scale: 0.09,
        causal: true,
        window: None,
        softcap: None,
        sinks: 0,
        slopes: 0,
        error_flag: 0,
    };
    let attend = || {
        if let Some((launch, params)) = plan.plan_launch(workspace.address(), &args)? {
            enqueue(&*backend, &launch, &params, stream);
        }
        let (launch, params) = plan.attend_launch(workspace.address(), &args)?;
        match &params {
            AttendParams::Decode(params) => enqueue(&*backend, &launch, params, stream),
            other => panic!("one token a sequence is decoded, not {other:?}"),
        }
        Ok(())
    };
    let graph = Graph::capture(&queue, attend).unwrap();
    let mut read = |clear: bool| {
        let mut held = vec![0u8; out.bytes() as usize];
        out.download(0, &mut held, stream).unwrap();
        if clear {
            out.upload(0, bytes(&[f32::NAN; SEQS * Q_HEADS * D]), stream).unwrap();
        }
        held
    };
    let mut previous = read(true);
    for round in 0..6u32 {
        // Some rounds have empty sequences, as a padded graph does.
        let new_lens: Vec<i32> =
            (0..SEQS as i32).map(|s| (s * 61 * round as i32 + 3 * s) % 320).collect();
        let new_tables: Vec<i32> =
            (0..SEQS * WIDTH).map(|i| ((i * 7 + round as usize * 13) % BLOCKS) as i32).collect();
        lens.upload(0, bytes(&new_lens), stream).unwrap();
        tables.upload(0, bytes(&new_tables), stream).unwrap();
        graph.launch(&queue).unwrap();
        let replayed = read(true);
        attend().unwrap();
        let direct = read(true);
        assert!(replayed == direct, "round {round}: a replay differs from a call");
        assert!(replayed != previous, "round {round}: the lengths had no effect");
        assert!(
            replayed
                .chunks_exact(4)
                .all(|b| { f32::from_ne_bytes([b[0], b[1], b[2], b[3]]).is_finite() })
        );
        previous = replayed;
    }
}

#[test]
fn every_kernel_of_the_build_is_found() {
    let Some(cuda) = gpu() else { return };
    let missing: Vec<&str> = cuda.missing().collect();
    // A build may leave out head dimensions; nothing else.
    for name in &missing {
        assert!(name.contains("_d"), "{name} is missing");
    }
    let found: Vec<&Kernel> = kernels().filter(|kernel| !missing.contains(&kernel.name)).collect();
    assert!(found.iter().any(|kernel| kernel.name == "kvc_append"));
    println!("{} kernels, {} left out; {:?}", found.len(), missing.len(), cuda.facts().unwrap());
}

#[test]
fn events_measure_what_a_queue_does() {
    let Some(cuda) = gpu() else { return };
    let queue = Queue::new(&cuda).unwrap();
    let backend: Arc<dyn Backend> = cuda.clone();
    // SAFETY: a stream of this device, which outlives every use.
    let stream = unsafe { Stream::from_raw(queue.as_raw()) };
    let mut memory = DeviceMemory::new(&backend, 64 << 20).unwrap();
    let (start, end) = (Event::new(&cuda).unwrap(), Event::new(&cuda).unwrap());
    start.record(&queue).unwrap();
    memory.zero(stream).unwrap();
    end.record(&queue).unwrap();
    queue.sync().unwrap();
    let took = end.milliseconds_since(&start).unwrap();
    assert!(took > 0.0 && took < 1000.0, "{took} ms for 64 MiB");
}

#[test]
fn a_stream_says_whether_it_is_captured() {
    let Some(cuda) = gpu() else { return };
    let queue = Queue::new(&cuda).unwrap();
    let backend: Arc<dyn Backend> = cuda.clone();
    // SAFETY: a stream of this device, which outlives every use.
    let stream = unsafe { Stream::from_raw(queue.as_raw()) };
    let mut memory = DeviceMemory::new(&backend, 256).unwrap();
    assert_eq!(backend.is_capturing(stream), Ok(false));
    let graph = Graph::capture(&queue, || {
        assert_eq!(backend.is_capturing(stream), Ok(true));
        memory.zero(stream)
    })
    .unwrap();
    assert_eq!(backend.is_capturing(stream), Ok(false));
    graph.launch(&queue).unwrap();
    queue.sync().unwrap();
    assert!(backend.rates().is_some_and(|rates| rates.check().is_ok()), "{:?}", backend.rates());
}

const LAYERS: u32 = 3;

/// What the blocks of a sequence hold, out of its stream.
fn content(cache: &mut KvCache, seq: SeqId) -> Vec<u8> {
    let mut stream = Vec::new();
    cache.export_blocks(seq, "m", None, &mut stream).unwrap();
    stream
}

/// Prompts leave the device for host memory and come back, whole and layer by layer, with copies on side
/// streams that nobody waits for; to the bit.
#[test]
fn blocks_leave_for_the_host_and_come_back() {
    for backend in backends::all() {
        let spec =
            CacheSpec::uniform(BLOCK as u32, GroupSpec::uniform(LAYERS, 2, 128, KvFormat::Bf16));
        let blocks = 40;
        let options = CacheOptions { blocks, max_seqs: 4, threads: 1, ..CacheOptions::default() };
        let mut cache = KvCache::on(&backend, &spec, &options).unwrap();
        cache.attach_tiers(TierOptions::host("m", 256)).unwrap();
        let locked = cache.tier_reports()[0].page_locked;
        assert_eq!(locked, backend.locks_pages());
        let mut rng = Rng::new(3);
        let space = Namespace(0);
        let mut known: Vec<(Vec<u32>, Vec<u8>)> = Vec::new();
        let mut step = Step::new();
        for n in 0..8u32 {
            let prompt: Vec<u32> = (0..14 * BLOCK as u32 + 1).map(|t| n * 1000 + t).collect();
            let seq = cache.start(&prompt, space).unwrap().seq;
            cache.begin(&mut step, &[Work { seq, tokens: &prompt }]).unwrap();
            for layer in 0..LAYERS {
                let rows: Vec<bf16> =
                    (0..prompt.len() * 256).map(|_| bf16::from_f32(rng.normal())).collect();
                let at = LayerId::uniform(layer);
                cache.append(&step, at, rows[..].into(), rows[..].into(), None).unwrap();
            }
            cache.commit(&mut step).unwrap();
            known.push((prompt, content(&mut cache, seq)));
            cache.release(seq).unwrap();
        }
        let mut back = 0;
        for turn in 0..32usize {
            let (prompt, expected) = &known[(turn * 5 + turn / 8) % known.len()];
            let seq = if turn % 2 == 0 {
                cache.start(prompt, space).unwrap().seq
            } else {
                let seq = cache.start_onboarding(prompt, &[], space).unwrap().seq;
                for layer in 0..LAYERS {
                    let limit = std::time::Duration::from_secs(10);
                    assert!(cache.wait_layer(seq, LayerId::uniform(layer), limit).unwrap());
                }
                seq
            };
            assert_eq!(cache.tokens(seq).unwrap().len(), 14 * BLOCK, "turn {turn}");
            assert!(content(&mut cache, seq) == *expected, "turn {turn} on {backend:?}");
            cache.release(seq).unwrap();
            cache.audit().unwrap();
            back += 1;
        }
        cache.sync().unwrap();
        let seq = cache.start(&[1], space).unwrap().seq;
        let host = cache.tier_reports()[0];
        assert_eq!(host.kind, TierKind::Host);
        assert!(host.counters.loaded >= 14 * back / 2, "{host:?}");
        assert_eq!((host.counters.queued, host.counters.failures), (0, 0));
        assert!(host.load_rate.is_some());
        cache.release(seq).unwrap();
    }
}

/// Sealed tiles in a cache: records, attention and its bits, as under the emulator (emulated_tiles.rs).
#[test]
fn a_cache_of_sealed_tiles() {
    use tiles::Setup;
    let Some(backend) = backends::gpu() else { return };
    for (i, format) in tiles::FORMATS.into_iter().enumerate() {
        for (dim, tokens) in [(64, 64), (128, 64), (64, 128), (128, 128)] {
            let setup = Setup::new(&backend, format, dim, tokens);
            for deterministic in [true, false] {
                let rules = tokens == 64;
                tiles::against_the_reference(&Setup { deterministic, rules, ..setup.clone() });
            }
            let window = [None, Some(70)][i % 2];
            let cut: &[usize] = if dim == 64 { &[61, 4, 190] } else { &[128, 3, 8] };
            tiles::chunks_and_hits(&Setup { window, ..setup.clone() }, cut);
        }
        tiles::chunks_at_the_end_of_a_piece(&Setup::new(&backend, format, 128, 64));
    }
}

#[test]
fn a_tile_that_stays_raw() {
    let Some(backend) = backends::gpu() else { return };
    for format in tiles::FORMATS {
        tiles::a_raw_tile(&tiles::Setup::new(&backend, format, 128, 64));
    }
}

/// Raw sinks, as under the emulator (emulated_sinks.rs).
#[test]
fn sinks_of_sealed_tiles_are_read_raw() {
    use tiles::{Setup, sinks};
    let Some(backend) = backends::gpu() else { return };
    for format in tiles::FORMATS {
        let setup = Setup::new(&backend, format, 128, 64);
        for sink_tokens in [64, 128] {
            sinks::chunks_hits_and_forks(&Setup { sink_tokens, ..setup.clone() }, &[61, 4, 190]);
            sinks::cuts(&Setup { sink_tokens, ..setup.clone() });
        }
        let setup = Setup { sink_tokens: 64, ..setup };
        sinks::slots(&setup);
        sinks::blocks_that_held_records(&setup);
        tiles::many_rows_beside_few(&setup, backend.multiprocessors() as usize / 4);
    }
}

/// As many sequences of many rows as it takes for such a device.
#[test]
fn many_rows_over_sealed_tiles_have_a_kernel_of_their_own() {
    let Some(backend) = backends::gpu() else { return };
    for format in tiles::FORMATS {
        for (dim, tokens) in [(64, 128), (128, 64)] {
            let setup = tiles::Setup::new(&backend, format, dim, tokens);
            tiles::many_rows_beside_few(&setup, backend.multiprocessors() as usize / 4);
        }
    }
}
