//! Block pool: the time to allocate and free a block, in batches and one at a time, on a pool that
//! has been used for a while; and the waste of the paged layout on the lengths of a real trace.
//!
//! The trace is Mooncake's conversation trace (`mooncake_conversation_trace.jsonl`), looked for in
//! the directory that `KVCACHE_TRACES` names.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvcache::ids::BlockId;
use kvcache::pool::{BlockPool, BlockTable};

const BLOCKS: u32 = 100_000;

/// A pool whose free list is in random order and whose other half is in use.
fn used_pool() -> BlockPool {
    let mut pool = BlockPool::new(BLOCKS).unwrap();
    let mut all = vec![BlockId::NONE; BLOCKS as usize];
    pool.allocate_n(&mut all).unwrap();
    let mut x = 1u64;
    for i in (1..all.len()).rev() {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        all.swap(i, (x >> 33) as usize % (i + 1));
    }
    pool.free_n(&all[..all.len() / 2]).unwrap();
    pool
}

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("pool");
    group.throughput(Throughput::Elements(256));
    let mut pool = used_pool();
    let mut batch = [BlockId::NONE; 256];
    group.bench_function("allocate_n + free_n, 256 blocks", |b| {
        b.iter(|| {
            pool.allocate_n(black_box(&mut batch)).unwrap();
            pool.free_n(black_box(&batch)).unwrap()
        });
    });
    // 64 batches in flight, so that blocks come from all over the pool.
    let mut flight = vec![[BlockId::NONE; 256]; 64];
    for batch in &mut flight {
        pool.allocate_n(batch).unwrap();
    }
    let mut turn = 0;
    group.bench_function("the same, 64 batches in flight", |b| {
        b.iter(|| {
            turn = (turn + 37) % 64;
            pool.free_n(black_box(&flight[turn])).unwrap();
            pool.allocate_n(black_box(&mut flight[turn])).unwrap();
        });
    });
    group.throughput(Throughput::Elements(1));
    let mut pool = used_pool();
    group.bench_function("allocate + release, one block", |b| {
        b.iter(|| {
            let block = pool.allocate().unwrap();
            pool.release(black_box(block)).unwrap()
        });
    });
    let mut live: Vec<BlockId> = (0..20_000).map(|_| pool.allocate().unwrap()).collect();
    let mut at = 0;
    group.bench_function("the same, 20,000 in flight", |b| {
        b.iter(|| {
            at = (at + 7919) % live.len();
            pool.release(live[at]).unwrap();
            live[at] = pool.allocate().unwrap();
        });
    });
    group.finish();

    let mut group = c.benchmark_group("table");
    let mut pool = used_pool();
    let mut table = BlockTable::new();
    group.throughput(Throughput::Elements(256));
    group.bench_function("extend by 4,096 tokens + release, 256 blocks", |b| {
        b.iter(|| {
            table.extend(&mut pool, black_box(4096), 16).unwrap();
            table.release_all(&mut pool).unwrap()
        });
    });
    table.extend(&mut pool, 4090, 16).unwrap();
    group.bench_function("fork + copy of the tail + release, 256 blocks", |b| {
        b.iter(|| {
            let mut beam = table.fork(&mut pool).unwrap();
            let copy = beam.make_tail_writable(&mut pool, 16).unwrap().unwrap();
            black_box(&copy);
            copy.finish(&mut pool).unwrap();
            beam.release_all(&mut pool).unwrap()
        });
    });
    group.finish();
    waste();
}

/// Unused slots over allocated slots, all sequences of the trace at their full length.
fn waste() {
    let Some(directory) = std::env::var_os("KVCACHE_TRACES") else {
        println!("waste: skipped, KVCACHE_TRACES does not name a directory of traces");
        return;
    };
    let path = std::path::Path::new(&directory).join("mooncake_conversation_trace.jsonl");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) => {
            println!("waste: skipped, {}: {error}", path.display());
            return;
        }
    };
    let lengths: Vec<u64> = text
        .lines()
        .map(|line| {
            let request: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
            let tokens = |key: &str| request[key].as_u64().expect("a length");
            tokens("input_length") + tokens("output_length")
        })
        .collect();
    for block_tokens in [16, 32, 64, 128, 256] {
        let slots: u64 = lengths.iter().map(|n| n.next_multiple_of(block_tokens)).sum();
        let unused = slots - lengths.iter().sum::<u64>();
        println!(
            "waste: {} sequences, blocks of {block_tokens}: {:.3} %",
            lengths.len(),
            100.0 * unused as f64 / slots as f64
        );
        assert!(block_tokens != 16 || unused * 100 < slots * 4, "more than 4 %");
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .measurement_time(std::time::Duration::from_secs(2))
        .warm_up_time(std::time::Duration::from_millis(500));
    targets = bench
}
criterion_main!(benches);
