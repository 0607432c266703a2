//! Decode and prefill attention on the CPU.
//!
//! `cargo bench --bench attention` runs criterion; `cargo bench --bench attention -- --table`
//! prints one table: GB/s of K and V read (decode) beside a read of the same memory in the same run
//! with as many threads, from end to end and block by block in the order of the tables (each time
//! the faster of a plain read and one with prefetch hints), and GFLOP/s (prefill). A word after `--table` filters rows.
//!
//! `-- --formats` prints tokens per second of the formats that are stored token by token beside those
//! of bf16, 8 x 16k tokens, in the same turns.
//!
//! `-- --shared` prints how much faster 8 sequences over a shared prefix are decoded where they are
//! neighbours in the batch, so that each split of it is attended by all before the next, than where
//! others stand between them.
//!
//! Block tables are shuffled, as after a long time of serving, or in order (`seq`), as a fresh pool
//! gives them to a prompt.

mod support;

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use kvcache::attention::{HeadShape, Scoring};
use kvcache::cpu::{
    AttendArgs, AttendMaxima, BlockTables, CpuLevel, KvView, RowsView, Threads, attend,
    attend_workspace_bytes,
};
use kvcache::dtype::{DType, KvFormat, bf16, f16};
use kvcache::layout::{GroupLayout, GroupSpec};
use support::{encode, huge, median, random_kv, read_all, read_blocks, seconds};

/// A batch of equal sequences over one layer in native layout, its blocks in random order or their own.
struct Batch {
    shape: HeadShape,
    layout: GroupLayout,
    memory: Vec<u64>,
    tables: Vec<i32>,
    blocks: u32,
    blocks_a_seq: usize,
    /// Sequences of one call; calls rotate over `seqs * rotations` sequences.
    seqs: usize,
    q_tokens: usize,
    kv_len: usize,
    q: Vec<u64>,
    q_dtype: DType,
    out: Vec<u64>,
    q_indptr: Vec<i32>,
    kv_lens: Vec<i32>,
    workspace: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Config {
    name: &'static str,
    format: KvFormat,
    q_dtype: DType,
    shape: HeadShape,
    block_tokens: u32,
    in_order: bool,
    seqs: usize,
    rotations: usize,
    q_tokens: usize,
    kv_len: usize,
}

impl Batch {
    fn new(c: &Config, workers: usize) -> Self {
        let (kv_heads, dim) = (c.shape.kv_heads, c.shape.k_dim);
        let spec = if c.shape.v_in_k {
            GroupSpec::latent(1, c.shape.v_dim, dim - c.shape.v_dim, c.format)
        } else {
            GroupSpec::uniform(1, kv_heads, dim, c.format)
        };
        let layout = GroupLayout::new(spec, c.block_tokens).unwrap();
        let blocks_a_seq = layout.blocks_for(c.kv_len as u64) as usize;
        let blocks = blocks_a_seq * c.seqs * c.rotations;
        let bytes = layout.pool_bytes(blocks as u64).unwrap() as usize;
        let mut memory = huge(bytes / 8);
        if c.format.is_float() {
            fill(c.format.dtype(), &mut memory, 1);
        } else {
            encode(&layout, &mut memory, blocks as u32);
        }
        let mut tables: Vec<i32> = (0..blocks as i32).collect();
        if !c.in_order {
            random_kv(blocks, 2, |i, x| tables.swap(i, ((x + 1.0) / 2.0 * i as f32) as usize));
        }
        let tokens = c.seqs * c.q_tokens;
        let mut q = vec![0; tokens * (c.shape.q_heads * dim) as usize / 2];
        fill(c.q_dtype, &mut q, 3);
        let maxima = AttendMaxima {
            seqs: c.seqs as u32,
            q_tokens: tokens as u32,
            kv_len: c.kv_len as u32,
            workers,
        };
        let bytes = attend_workspace_bytes(&c.shape, &maxima).unwrap();
        Batch {
            shape: c.shape,
            layout,
            memory,
            tables,
            blocks: blocks as u32,
            blocks_a_seq,
            seqs: c.seqs,
            q_tokens: c.q_tokens,
            kv_len: c.kv_len,
            out: vec![0; tokens * (c.shape.q_heads * c.shape.v_dim) as usize / 2],
            q,
            q_dtype: c.q_dtype,
            q_indptr: (0..=c.seqs as i32).map(|s| s * c.q_tokens as i32).collect(),
            kv_lens: vec![c.kv_len as i32; c.seqs],
            workspace: vec![0; bytes as usize],
        }
    }

    fn run(&mut self, pool: &Threads, rotation: usize) {
        let base = self.memory.as_mut_ptr().cast::<u8>();
        let table = &self.tables[rotation * self.seqs * self.blocks_a_seq..];
        let (q_heads, v_dim) = (self.shape.q_heads, self.shape.v_dim);
        let args = AttendArgs {
            shape: self.shape,
            scoring: Scoring::causal(self.shape.k_dim),
            kv: KvView::native(&self.layout, base, self.blocks, 0).unwrap(),
            tables: BlockTables::Dense { table: table.as_ptr(), stride: self.blocks_a_seq as i64 },
            seqs: self.seqs as u32,
            q_indptr: self.q_indptr.as_ptr(),
            kv_lens: self.kv_lens.as_ptr(),
            q: RowsView::contiguous(
                self.q.as_mut_ptr().cast(),
                self.q_dtype,
                q_heads,
                self.shape.k_dim,
            ),
            out: RowsView::contiguous(self.out.as_mut_ptr().cast(), DType::F32, q_heads, v_dim),
            lse: std::ptr::null_mut(),
            bad_block: None,
        };
        let level = CpuLevel::chosen().unwrap();
        // SAFETY: the buffers were made for these sizes.
        unsafe { attend(&args, level, pool, &mut self.workspace) }.unwrap();
        black_box(&self.out);
    }

    /// Bytes of K and V that one call reads.
    fn kv_bytes(&self) -> f64 {
        self.layout.token_bytes() as f64 * (self.seqs * self.kv_len) as f64
    }

    /// Reads the memory of one rotation from end to end.
    fn read_through(&self, pool: &Threads, rotation: usize, hints: bool) {
        let words = self.seqs * self.blocks_a_seq * self.block_words();
        black_box(read_all(pool, &self.memory[rotation * words..][..words], hints));
    }

    /// Reads the blocks of one rotation in the order of its tables.
    fn read_tables(&self, pool: &Threads, rotation: usize, hints: bool) {
        let blocks = self.seqs * self.blocks_a_seq;
        let table = &self.tables[rotation * blocks..][..blocks];
        black_box(read_blocks(pool, &self.memory, self.block_words(), table, hints));
    }

    fn block_words(&self) -> usize {
        self.layout.block_bytes() as usize / 8
    }

    /// Multiply-adds of one causal call, times two.
    fn flops(&self) -> f64 {
        let n = self.q_tokens as f64;
        let pairs = n * (self.kv_len as f64 - n) + n * (n + 1.0) / 2.0;
        let dims = f64::from(self.shape.k_dim + self.shape.v_dim);
        2.0 * pairs * dims * f64::from(self.shape.q_heads) * self.seqs as f64
    }
}

fn fill(dtype: DType, memory: &mut [u64], seed: u64) {
    let elements = memory.len() * 8 / dtype.bytes() as usize;
    let base = memory.as_mut_ptr();
    random_kv(elements, seed, |i, x| {
        // SAFETY: `i` is below the elements of the memory.
        unsafe {
            match dtype {
                DType::F32 => base.cast::<f32>().add(i).write(x),
                DType::F16 => base.cast::<f16>().add(i).write(f16::from_f32(x)),
                _ => base.cast::<bf16>().add(i).write(bf16::from_f32(x)),
            }
        }
    });
}

const LLAMA: HeadShape =
    HeadShape { q_heads: 32, kv_heads: 8, k_dim: 128, v_dim: 128, v_in_k: false };
const LATENT: HeadShape =
    HeadShape { q_heads: 128, kv_heads: 1, k_dim: 576, v_dim: 512, v_in_k: true };

fn configs() -> Vec<Config> {
    let mut list = Vec::new();
    for &format in KvFormat::FLOATS {
        let base = Config {
            name: "decode",
            format,
            q_dtype: format.dtype(),
            shape: LLAMA,
            block_tokens: 16,
            in_order: false,
            seqs: 8,
            rotations: 1,
            q_tokens: 1,
            kv_len: 16_384,
        };
        list.push(base);
        list.push(Config { block_tokens: 64, ..base });
        list.push(Config { in_order: true, ..base });
        list.push(Config { block_tokens: 64, in_order: true, ..base });
        list.push(Config { seqs: 1, kv_len: 4096, rotations: 16, ..base });
        list.push(Config { seqs: 1, kv_len: 4096, rotations: 16, block_tokens: 64, ..base });
        for tokens in [2048, 4096] {
            list.push(Config {
                name: "prefill",
                seqs: 1,
                q_tokens: tokens,
                kv_len: tokens,
                rotations: 1,
                ..base
            });
        }
    }
    let latent = Config {
        name: "latent",
        format: KvFormat::Bf16,
        q_dtype: DType::Bf16,
        shape: LATENT,
        block_tokens: 64,
        in_order: false,
        seqs: 4,
        rotations: 4,
        q_tokens: 1,
        kv_len: 4096,
    };
    list.push(latent);
    list
}

/// Formats that are stored token by token beside bf16: the same tokens, bf16 queries.
const CODED: [KvFormat; 6] = [
    KvFormat::Bf16,
    KvFormat::Fp8E4m3,
    KvFormat::Fp8E5m2,
    KvFormat::Int8T,
    KvFormat::Int4T,
    KvFormat::Nvfp4,
];

/// Prints tokens per second of every format, in turns, beside bf16's of the same turn.
fn formats(kv_len: usize, rounds: usize) {
    println!(
        "level {}, 8 x {kv_len} tokens, 32/8 heads of 128",
        CpuLevel::chosen().unwrap().name()
    );
    println!(
        "{:10} {:>6} {:>3} {:>9} {:>7} {:>8} {:>8}  quartiles",
        "", "block", "thr", "Mtok/s", "GB/s", "read", "of bf16"
    );
    for block_tokens in [64, 16] {
        let config = |format| Config {
            name: "decode",
            format,
            q_dtype: DType::Bf16,
            shape: LLAMA,
            block_tokens,
            in_order: false,
            seqs: 8,
            rotations: 1,
            q_tokens: 1,
            kv_len,
        };
        for threads in [1, 2] {
            let pool = Threads::new(threads).unwrap();
            let mut batches: Vec<_> =
                CODED.iter().map(|&format| Batch::new(&config(format), threads as usize)).collect();
            let mut times = vec![Vec::new(); CODED.len()];
            let mut reads = Vec::new();
            for round in 0..rounds + 1 {
                let turn: Vec<f64> =
                    batches.iter_mut().map(|batch| seconds(|| batch.run(&pool, 0))).collect();
                let read =
                    [false, true].map(|hints| seconds(|| batches[0].read_tables(&pool, 0, hints)));
                if round > 0 {
                    reads.push(batches[0].kv_bytes() / read[0].min(read[1]) / 1e9);
                    times.iter_mut().zip(turn).for_each(|(all, t)| all.push(t));
                }
            }
            let read = median(reads).0;
            for (n, &format) in CODED.iter().enumerate() {
                let ratio = |turn: usize| times[0][turn] / times[n][turn];
                let ratio = median((0..rounds).map(ratio).collect());
                let time = median(times[n].clone()).0;
                println!(
                    "{:10} {block_tokens:>6} {threads:>3} {:>9.2} {:>7.1} {read:>8.1} {:>7.2}x  {:.2} to {:.2}",
                    format.name(),
                    (8 * kv_len) as f64 / time / 1e6,
                    batches[n].kv_bytes() / time / 1e9,
                    ratio.0,
                    ratio.1,
                    ratio.2,
                );
            }
        }
    }
}

/// Tokens of a sequence that all share, and its own.
const SHARED: (usize, usize) = (8192, 1024);
/// Tables that calls rotate over, as over the layers of a model.
const SHARED_LAYERS: usize = 8;

/// Decode of 8 sequences that share most of their blocks: as neighbours, and with a sequence of one
/// token between each two, in the same turns.
fn shared(rounds: usize) {
    let (seqs, kv_len) = (8, SHARED.0 + SHARED.1);
    println!(
        "{:10} {:>6} {:>3} {:>9} {:>9} {:>8}  quartiles",
        "", "block", "thr", "apart ms", "ms", "faster"
    );
    for format in [KvFormat::F32, KvFormat::Bf16, KvFormat::F16, KvFormat::Fp8E4m3, KvFormat::Int8T]
    {
        let config = Config {
            name: "shared",
            format,
            q_dtype: DType::Bf16,
            shape: LLAMA,
            block_tokens: 64,
            in_order: false,
            // With those between.
            seqs: 2 * seqs - 1,
            rotations: 1,
            q_tokens: 1,
            kv_len,
        };
        for threads in [1, 2] {
            let pool = Threads::new(threads).unwrap();
            let mut batch = Batch::new(&config, threads as usize);
            let (prefix, row) = (SHARED.0 / 64, kv_len / 64);
            let mut orders = [(seqs, Vec::new()), (2 * seqs - 1, Vec::new())];
            for layer in
                batch.tables.chunks_exact(prefix + seqs * (row - prefix)).take(SHARED_LAYERS)
            {
                let own = layer[prefix..].chunks_exact(row - prefix);
                for (s, own) in own.enumerate() {
                    let table = || layer[..prefix].iter().chain(own).copied();
                    orders[0].1.extend(table());
                    if s > 0 {
                        // Of which one token is read.
                        orders[1].1.extend(own.iter().cycle().take(row));
                    }
                    orders[1].1.extend(table());
                }
            }
            let mut times = [Vec::new(), Vec::new()];
            for round in 0..rounds + 1 {
                for (n, (rows, tables)) in orders.iter_mut().enumerate() {
                    batch.seqs = *rows;
                    let between = |s: usize| *rows > seqs && s % 2 == 1;
                    let length = |s| if between(s) { 1 } else { kv_len as i32 };
                    batch.kv_lens = (0..*rows).map(length).collect();
                    std::mem::swap(&mut batch.tables, tables);
                    let time = seconds(|| (0..SHARED_LAYERS).for_each(|at| batch.run(&pool, at)));
                    std::mem::swap(&mut batch.tables, tables);
                    if round > 0 {
                        times[n].push(time / SHARED_LAYERS as f64);
                    }
                }
            }
            let ratio = median((0..rounds).map(|n| times[1][n] / times[0][n]).collect());
            let [together, apart] = times.map(|times| 1e3 * median(times).0);
            println!(
                "{:10} {:>6} {threads:>3} {apart:>9.2} {together:>9.2} {:>7.2}x  {:.2} to {:.2}",
                format.name(),
                config.block_tokens,
                ratio.0,
                ratio.1,
                ratio.2,
            );
        }
    }
}

fn label(c: &Config) -> String {
    let order = if c.in_order { " seq" } else { "" };
    format!("{} {} {}x{} b{}{order}", c.name, c.format.name(), c.seqs, c.kv_len, c.block_tokens)
}

/// Prints one line a configuration and thread count.
fn table(filter: &str) {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    println!("level {}", CpuLevel::chosen().unwrap().name());
    println!(
        "{:30} {:>3} {:>7} {:>7} {:>7} {:>9}  {:14} {:>9}  quartiles",
        "", "thr", "here", "through", "tables", "of that", "quartiles", "of that"
    );
    for c in configs().iter().filter(|c| label(c).contains(filter)) {
        for threads in [1, 2] {
            if threads > cores {
                continue;
            }
            let pool = Threads::new(threads as u32).unwrap();
            let mut batch = Batch::new(c, threads);
            let decode = c.q_tokens == 1;
            let rounds = if decode { 15 } else { 5 };
            let (mut here, mut reads) = (Vec::new(), [Vec::new(), Vec::new()]);
            let mut shares = [Vec::new(), Vec::new()];
            for round in 0..rounds + 1 {
                let (mut t_here, mut t_reads) = (0.0, [f64::INFINITY; 2]);
                for rotation in 0..c.rotations {
                    t_here += seconds(|| batch.run(&pool, rotation));
                }
                for hints in [false, true] {
                    let (mut through, mut tables) = (0.0, 0.0);
                    for rotation in 0..if decode { c.rotations } else { 0 } {
                        through += seconds(|| batch.read_through(&pool, rotation, hints));
                        tables += seconds(|| batch.read_tables(&pool, rotation, hints));
                    }
                    t_reads = [t_reads[0].min(through), t_reads[1].min(tables)];
                }
                if round > 0 {
                    let work = if decode { batch.kv_bytes() } else { batch.flops() };
                    let rate = |t: f64| work * c.rotations as f64 / t / 1e9;
                    here.push(rate(t_here));
                    for (i, t) in t_reads.into_iter().enumerate() {
                        reads[i].push(rate(t));
                        shares[i].push(100.0 * t / t_here);
                    }
                }
            }
            let here = median(here);
            if decode {
                let [through, tables] = reads.map(|rates| median(rates).0);
                let [of_through, of_tables] = shares.map(median);
                println!(
                    "{:30} {:>3} {:>7.1} {:>7.1} {:>7.1} {:>8.1}%  {:14} {:>8.1}%  {:.1} to {:.1}",
                    label(c),
                    threads,
                    here.0,
                    through,
                    tables,
                    of_through.0,
                    format!("{:.1} to {:.1}", of_through.1, of_through.2),
                    of_tables.0,
                    of_tables.1,
                    of_tables.2,
                );
            } else {
                println!(
                    "{:30} {:>3} {:>7.1} GFLOP/s         {:.1} to {:.1}",
                    label(c),
                    threads,
                    here.0,
                    here.1,
                    here.2
                );
            }
        }
    }
}

fn criterion_benches(criterion: &mut Criterion) {
    for c in configs() {
        for threads in [1, 2] {
            let pool = Threads::new(threads as u32).unwrap();
            let mut batch = Batch::new(&c, threads);
            let mut group = criterion.benchmark_group("attention");
            group.sample_size(10);
            let work = if c.q_tokens == 1 { batch.kv_bytes() } else { batch.flops() };
            group.throughput(if c.q_tokens == 1 {
                Throughput::Bytes(work as u64)
            } else {
                Throughput::Elements(work as u64)
            });
            let mut rotation = 0;
            group.bench_function(format!("{} t{threads}", label(&c)), |bencher| {
                bencher.iter(|| {
                    batch.run(&pool, rotation);
                    rotation = (rotation + 1) % c.rotations;
                })
            });
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|arg| arg == "--table") {
        let filter = args[at + 1..].iter().find(|arg| !arg.starts_with("--"));
        return table(filter.map_or("", |filter| filter));
    }
    if args.iter().any(|arg| arg == "--shared") {
        return shared(11);
    }
    if args.iter().any(|arg| arg == "--formats") {
        return formats(16_384, 9);
    }
    let mut criterion = Criterion::default().configure_from_args();
    criterion_benches(&mut criterion);
    criterion.final_summary();
}
