//! Append on the CPU: new keys and values of one layer scattered to slots, with and without
//! rotary embedding. Throughput counts the bytes of the new rows read and of those written.
//!
//! `-- --formats` prints nanoseconds a row of 128 channels for each format beside a plain copy of the
//! same rows to the same places, in the same turns.

use std::hint::black_box;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group};
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

/// Nanoseconds a row, of append in each format and of a copy of the bf16 rows.
fn formats() {
    const ROWS: usize = 512;
    const ROUNDS: usize = 200;
    let elements = ROWS * 8 * 128;
    let number = |i: usize| bf16::from_f32((i * 7919 % 2003) as f32 / 1001.0 - 1.0);
    let mut new: Vec<bf16> = (0..2 * elements).map(number).collect();
    let from = new.as_mut_ptr();
    let pool = Threads::new(1).unwrap();
    let formats = [
        KvFormat::Bf16,
        KvFormat::F32,
        KvFormat::Fp8E4m3,
        KvFormat::Fp8E5m2,
        KvFormat::Int8T,
        KvFormat::Int4T,
        KvFormat::Nvfp4,
    ];
    let spec = |format| GroupSpec::uniform(1, 8, 128, format);
    let layouts = formats.map(|format| GroupLayout::new(spec(format), BLOCK_TOKENS).unwrap());
    let bytes = |layout: &GroupLayout| layout.pool_bytes(BLOCKS as u64).unwrap() as usize;
    let mut memories: Vec<_> = layouts.iter().map(|layout| vec![0u64; bytes(layout) / 8]).collect();
    let mut plain = vec![0u16; bytes(&layouts[0]) / 2];
    let mut times = vec![Vec::new(); formats.len() + 1];
    let slots_in_cache = BLOCKS * BLOCK_TOKENS as usize;
    for round in 0..ROUNDS {
        let first = round * 4099 % (slots_in_cache - ROWS);
        let slots: Vec<i64> = (first..first + ROWS).map(|slot| slot as i64).collect();
        let time = Instant::now();
        // Rows in the order of the cache: eight heads of keys and of values.
        let to = plain[first * 2048..][..2 * elements].as_mut_ptr();
        // SAFETY: both are that long.
        unsafe { to.copy_from_nonoverlapping(from.cast(), 2 * elements) };
        black_box(to);
        times[formats.len()].push(time.elapsed().as_nanos() as f64);
        for (n, layout) in layouts.iter().enumerate() {
            let base = memories[n].as_mut_ptr().cast::<u8>();
            let view = |ptr: *mut bf16| RowsView::contiguous(ptr.cast(), DType::Bf16, 8, 128);
            let args = AppendArgs {
                shape: SHAPE,
                kv: KvView::native(layout, base, BLOCKS as u32, 0).unwrap(),
                slots: slots.as_ptr(),
                rows: ROWS as u32,
                k: view(from),
                v: view(from.wrapping_add(elements)),
                rope: None,
            };
            let time = Instant::now();
            // SAFETY: the buffers have these sizes, and slots are distinct.
            unsafe { append(&args, &pool) }.unwrap();
            times[n].push(time.elapsed().as_nanos() as f64);
        }
    }
    let rows = (2 * ROWS * 8) as f64;
    let quartiles = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        [all.len() / 4, all.len() / 2, all.len() * 3 / 4].map(|at| all[at] / rows)
    };
    let copy = times.pop().map(quartiles).unwrap_or_default();
    println!("{:10} {:>7} {:>8}  quartiles", "", "ns/row", "of copy");
    println!("{:10} {:>7.1} {:>8}  {:.1} to {:.1}", "copy bf16", copy[1], "", copy[0], copy[2]);
    for (format, times) in formats.iter().zip(times) {
        let [low, middle, high] = quartiles(times);
        let ratio = middle / copy[1];
        println!("{:10} {middle:>7.1} {ratio:>7.2}x  {low:.1} to {high:.1}", format.name());
    }
}

criterion_group!(append_benches, benches);

fn main() {
    if std::env::args().any(|arg| arg == "--formats") {
        return formats();
    }
    append_benches();
    Criterion::default().configure_from_args().final_summary();
}
