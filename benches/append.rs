//! Append on the CPU: new keys and values of one layer scattered to slots, with and without
//! rotary embedding. Throughput counts the bytes of the new rows read and of those written.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvcache::attention::HeadShape;
use kvcache::cpu::{AppendArgs, KvView, Rope, RopeStyle, RowsView, Threads, append};
use kvcache::dtype::{DType, KvFormat, bf16};
use kvcache::layout::{GroupLayout, GroupSpec};

const SHAPE: HeadShape =
    HeadShape { q_heads: 32, kv_heads: 8, k_dim: 128, v_dim: 128, v_in_k: false };
const BLOCK_TOKENS: u32 = 16;
/// Blocks of the cache: with bf16 rows 256 MiB, which no cache of a CPU holds.
const BLOCKS: usize = 4096;

fn benches(criterion: &mut Criterion) {
    let rope = Rope::new(RopeStyle::Halves, 128, 500_000.0).unwrap();
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Bf16] {
        // A prefill chunk to consecutive slots, and a decode step of a batch to scattered ones.
        for (name, rows, stride) in [("chunk", 512usize, 1i64), ("step", 64, 1009)] {
            for rotate in [false, true] {
                for threads in [1, 2] {
                    let label = format!(
                        "{name} of {rows} to {}{} t{threads}",
                        format.name(),
                        if rotate { " rope" } else { "" }
                    );
                    run(criterion, &label, format, rows, stride, rotate.then_some(&rope), threads);
                }
            }
        }
    }
}

fn run(
    criterion: &mut Criterion,
    label: &str,
    format: KvFormat,
    rows: usize,
    stride: i64,
    rope: Option<&Rope>,
    threads: u32,
) {
    let layout = GroupLayout::new(GroupSpec::uniform(1, 8, 128, format), BLOCK_TOKENS).unwrap();
    let mut memory = vec![0u64; layout.pool_bytes(BLOCKS as u64).unwrap() as usize / 8];
    let elements = rows * 8 * 128;
    let number = |i: usize| bf16::from_f32((i * 7919 % 2003) as f32 / 1001.0 - 1.0);
    let mut new: Vec<bf16> = (0..2 * elements).map(number).collect();
    let positions: Vec<u32> = (0..rows as u32).map(|i| 1000 + i).collect();
    let (base, from) = (memory.as_mut_ptr().cast::<u8>(), new.as_mut_ptr());
    let pool = Threads::new(threads).unwrap();
    let slots_in_cache = BLOCKS as i64 * i64::from(BLOCK_TOKENS);
    let mut slots = vec![0i64; rows];
    let mut first = 0;
    let bytes = 2 * elements as u64 * u64::from(2 + format.dtype().bytes());
    let mut group = criterion.benchmark_group("append");
    group.sample_size(20).throughput(Throughput::Bytes(bytes));
    group.bench_function(label, |bencher| {
        bencher.iter(|| {
            // Other slots each time, so that they are not in a cache.
            for (i, slot) in slots.iter_mut().enumerate() {
                *slot = (first + i as i64 * stride) % slots_in_cache;
            }
            first = (first + 4099) % slots_in_cache;
            let view = |ptr: *mut bf16| RowsView::contiguous(ptr.cast(), DType::Bf16, 8, 128);
            let args = AppendArgs {
                shape: SHAPE,
                kv: KvView::native(&layout, base, BLOCKS as u32, 0).unwrap(),
                slots: slots.as_ptr(),
                rows: rows as u32,
                k: view(from),
                v: view(from.wrapping_add(elements)),
                rope: rope.map(|rope| (rope, positions.as_ptr())),
            };
            // SAFETY: the buffers have these sizes, and slots are distinct.
            unsafe { append(&args, &pool) }.unwrap();
            black_box(base);
        })
    });
}

criterion_group!(append_benches, benches);
criterion_main!(append_benches);
