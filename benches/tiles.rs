//! Quantised formats on the CPU: decode of all of them beside our own bf16 in the same run, append
//! and seal of sealed tiles beside a memory copy of the same rows. `cargo bench --bench tiles` prints both
//! tables, with `-- --seal` the second alone.
//!
//! Tokens a second are cached tokens of one layer that a call attends to; tables are shuffled. With
//! `KVCACHE_PEERS` (see `peers/decode.rs`) llama.cpp's and vLLM's CPU kernels run in the same turns.

#[path = "peers/decode.rs"]
mod peer;
mod support;

use std::hint::black_box;
use std::sync::atomic::AtomicU32;

use kvcache::attention::{HeadShape, Scoring};
use kvcache::cpu::{
    AttendArgs, AttendMaxima, BlockTables, CpuLevel, Executor, KvView, RawBlock, RawTables,
    RowsView, SealArgs, SealTile, Threads, TileAppendArgs, TileAttendArgs, TileView, append_tiles,
    attend, attend_tiles, attend_tiles_workspace_bytes, attend_workspace_bytes, seal_tiles,
};
use kvcache::dtype::{DType, KvFormat, bf16};
use kvcache::layout::tile::{TileLayout, TileShape};
use kvcache::layout::{GroupLayout, GroupSpec};
use peer::Peer;
use support::{encode, huge, median, random_kv, read_all, seconds};

const TOKENS: u32 = 64;
const SHAPE: HeadShape =
    HeadShape { q_heads: 32, kv_heads: 8, k_dim: 128, v_dim: 128, v_in_k: false };
const TILES: [KvFormat; 5] =
    [KvFormat::Kt8v8, KvFormat::Kt4v4, KvFormat::Kt3v3, KvFormat::Kt4v2, KvFormat::Kt2v2];
const CODES: [KvFormat; 5] =
    [KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Int8T, KvFormat::Int4T, KvFormat::Nvfp4];

/// Zeroed memory, aligned to words of 16 bytes.
fn memory(bytes: usize) -> Vec<u128> {
    huge(bytes.div_ceil(16))
}

fn fill(memory: &mut [u128], seed: u64) {
    // SAFETY: any bits are bf16, and the memory is whole words of it.
    let rows = unsafe {
        std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<bf16>(), memory.len() * 8)
    };
    random_kv(rows.len(), seed, |i, x| rows[i] = bf16::from_f32(x));
}

/// One layer of one format: a batch of equal sequences, or the rows of a prompt.
struct Layer {
    group: GroupLayout,
    raw: GroupLayout,
    tile: Option<TileLayout>,
    blocks: usize,
    records: Vec<u128>,
    /// Raw blocks: one for each sequence, or for each tile of the prompt.
    rows: Vec<u128>,
    raw_blocks: usize,
}

impl Layer {
    fn new(format: KvFormat, blocks: usize, raw_blocks: usize) -> Self {
        let layout = |format| {
            let spec = GroupSpec::uniform(1, SHAPE.kv_heads, SHAPE.k_dim, format);
            GroupLayout::new(spec, TOKENS).unwrap()
        };
        let (group, raw) = (layout(format), layout(KvFormat::Bf16));
        let shape = TileShape { k_dim: 128, v_dim: 128, v_in_k: false, tokens: TOKENS };
        let mut layer = Layer {
            tile: TileLayout::new(format, shape).ok(),
            blocks,
            records: memory(blocks * group.block_bytes() as usize),
            rows: memory(raw_blocks * raw.block_bytes() as usize),
            raw_blocks,
            group,
            raw,
        };
        fill(&mut layer.rows, 1);
        if format.is_float() {
            fill(&mut layer.records, 2);
        } else if layer.tile.is_none() {
            let words = layer.records.len() * 2;
            // SAFETY: the same memory as words of 8 bytes.
            let words = unsafe {
                std::slice::from_raw_parts_mut(layer.records.as_mut_ptr().cast::<u64>(), words)
            };
            encode(&layer.group, words, blocks as u32);
        }
        layer
    }

    fn view(&self) -> TileView<'_> {
        let tile = self.tile.as_ref().unwrap();
        let rows = self.rows.as_ptr().cast_mut().cast();
        let staging = KvView::native(&self.raw, rows, self.raw_blocks as u32, 0).unwrap();
        TileView {
            layout: tile,
            records: self.records.as_ptr().cast_mut().cast(),
            block_bytes: self.group.block_bytes() as i64,
            head_bytes: tile.bytes() as i64,
            num_blocks: self.blocks as u32,
            staging,
            scratch: KvView { num_blocks: 0, ..staging },
        }
    }

    /// Seals raw blocks in turn into `list`.
    fn seal(&self, pool: &Threads, list: &[SealTile], refused: &[AtomicU32]) {
        let args = SealArgs { shape: SHAPE, tiles: self.view(), list, refused };
        // SAFETY: the list has blocks of this layer.
        unsafe { seal_tiles(&args, CpuLevel::chosen().unwrap(), pool) }.unwrap();
    }

    fn seal_all(&self, pool: &Threads) {
        let slot = |block: usize| (block % self.raw_blocks) as i32;
        let list: Vec<_> = (0..self.blocks)
            .map(|block| SealTile { slot: slot(block), block: block as i32 })
            .collect();
        let refused: Vec<_> = list.iter().map(|_| AtomicU32::new(0)).collect();
        self.seal(pool, &list, &refused);
    }
}

/// One decode step over a layer.
struct Decode {
    layer: Layer,
    seqs: usize,
    kv_len: usize,
    table: Vec<i32>,
    q: Vec<bf16>,
    out: Vec<f32>,
    workspace: Vec<u8>,
}

impl Decode {
    fn new(format: KvFormat, seqs: usize, kv_len: usize, pool: &Threads) -> Self {
        let blocks = seqs * kv_len / TOKENS as usize;
        let layer = Layer::new(format, blocks, seqs);
        if layer.tile.is_some() {
            layer.seal_all(pool);
        }
        let mut table: Vec<i32> = (0..blocks as i32).collect();
        random_kv(blocks, 2, |i, x| table.swap(i, ((x + 1.0) / 2.0 * i as f32) as usize));
        let mut q = vec![bf16::ZERO; seqs * 32 * 128];
        random_kv(q.len(), 3, |i, x| q[i] = bf16::from_f32(x));
        let maxima = AttendMaxima {
            seqs: seqs as u32,
            q_tokens: seqs as u32,
            kv_len: kv_len as u32,
            workers: pool.workers(),
        };
        let bytes = match &layer.tile {
            Some(tile) => attend_tiles_workspace_bytes(&SHAPE, tile, &maxima).unwrap(),
            None => attend_workspace_bytes(&SHAPE, &maxima).unwrap(),
        };
        let out = vec![0.0; seqs * 32 * 128];
        Self { layer, seqs, kv_len, table, q, out, workspace: vec![0; bytes as usize] }
    }

    fn run(&mut self, pool: &Threads) {
        let level = CpuLevel::chosen().unwrap();
        let q_indptr: Vec<i32> = (0..=self.seqs as i32).collect();
        let kv_lens = vec![self.kv_len as i32; self.seqs];
        let tiles = self.kv_len / TOKENS as usize;
        let tables = BlockTables::Dense { table: self.table.as_ptr(), stride: tiles as i64 };
        let q = RowsView::contiguous(self.q.as_ptr().cast_mut().cast(), DType::Bf16, 32, 128);
        let out = RowsView::contiguous(self.out.as_mut_ptr().cast(), DType::F32, 32, 128);
        let raw: Vec<_> =
            (0..self.seqs).map(|s| RawBlock { tile: tiles as i32 - 1, slot: s as i32 }).collect();
        let scoring = Scoring::causal(128);
        // SAFETY: the buffers were made for these sizes.
        unsafe {
            if self.layer.tile.is_some() {
                let args = TileAttendArgs {
                    shape: SHAPE,
                    scoring,
                    tiles: self.layer.view(),
                    tables,
                    raw: RawTables { indptr: q_indptr.as_ptr(), blocks: raw.as_ptr() },
                    seqs: self.seqs as u32,
                    q_indptr: q_indptr.as_ptr(),
                    kv_lens: kv_lens.as_ptr(),
                    q,
                    out,
                    lse: std::ptr::null_mut(),
                    bad_block: None,
                };
                attend_tiles(&args, level, pool, &mut self.workspace).unwrap();
            } else {
                let memory = self.layer.records.as_mut_ptr().cast();
                let kv = KvView::native(&self.layer.group, memory, self.layer.blocks as u32, 0);
                let args = AttendArgs {
                    shape: SHAPE,
                    scoring,
                    kv: kv.unwrap(),
                    tables,
                    seqs: self.seqs as u32,
                    q_indptr: q_indptr.as_ptr(),
                    kv_lens: kv_lens.as_ptr(),
                    q,
                    out,
                    lse: std::ptr::null_mut(),
                    bad_block: None,
                };
                attend(&args, level, pool, &mut self.workspace).unwrap();
            }
        }
        black_box(&self.out);
    }
}

/// What takes turns in the table of decode.
enum Runner {
    Ours(Box<Decode>),
    /// Which peer, and the number of its step.
    Theirs(usize, usize),
}

struct Row {
    name: String,
    /// Of K and V of a token.
    bytes: f64,
    runner: Runner,
    times: Vec<f64>,
}

/// Our formats, bf16 first, and then those of the peers.
fn rows(peers: &mut [Peer], seqs: usize, kv_len: usize) -> Vec<Row> {
    let all = Threads::new(0).unwrap();
    let formats = [KvFormat::Bf16].into_iter().chain(TILES).chain(CODES);
    let ours = formats.map(|format| {
        let decode = Box::new(Decode::new(format, seqs, kv_len, &all));
        let group = &decode.layer.group;
        Row {
            name: format!("decode {} {seqs}x{kv_len} b{TOKENS}", group.spec().format.name()),
            bytes: group.token_bytes() as f64,
            runner: Runner::Ours(decode),
            times: Vec::new(),
        }
    });
    let mut rows: Vec<Row> = ours.collect();
    for (at, peer) in peers.iter_mut().enumerate() {
        for kind in peer.kinds.clone() {
            let (step, bytes) = peer.build(&kind, seqs, kv_len);
            let name = format!("{} {kind}", peer.name);
            rows.push(Row { name, bytes, runner: Runner::Theirs(at, step), times: Vec::new() });
        }
    }
    rows
}

fn decode_table(seqs: usize, kv_len: usize, rounds: usize) {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut peers = Peer::all();
    let mut rows = rows(&mut peers, seqs, kv_len);
    // What tokens a second are compared with: our bf16, and each of the peers'.
    let ours = rows.iter().filter(|row| matches!(row.runner, Runner::Ours(_))).count();
    let bases: Vec<usize> = [0].into_iter().chain(ours..rows.len()).collect();
    print!("{:28} {:>3} {:>9} {:>7} {:>7} {:>7}", "", "thr", "Mtok/s", "GB/s", "read", "x bf16");
    print!("  {:12}", "quartiles");
    rows[ours..].iter().for_each(|row| print!(" {:>13}", row.name));
    println!();
    for threads in [1, 2] {
        if threads > cores {
            continue;
        }
        let pool = Threads::new(threads as u32).unwrap();
        rows.iter_mut().for_each(|row| row.times.clear());
        let mut reads = Vec::new();
        for round in 0..=rounds {
            for row in &mut rows {
                let t = match &mut row.runner {
                    Runner::Ours(decode) => seconds(|| decode.run(&pool)),
                    Runner::Theirs(peer, step) => peers[*peer].run(*step, threads),
                };
                if round > 0 {
                    row.times.push(t);
                }
            }
            let Runner::Ours(bf16) = &rows[0].runner else { unreachable!("bf16 comes first") };
            let words = &bf16.layer.records;
            // SAFETY: the same memory as words of 8 bytes.
            let words =
                unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 2) };
            let bytes = words.len() as f64 * 8.0;
            let t = seconds(|| {
                black_box(read_all(&pool, words, true));
            });
            reads.push(bytes / 1e9 / t);
        }
        let read = median(reads).0;
        for row in &rows {
            let against = |base: &usize| {
                let times = row.times.iter().zip(&rows[*base].times);
                median(times.map(|(t, base)| base / t).collect())
            };
            let (t, ratio) = (median(row.times.clone()).0, against(&0));
            let tokens = (seqs * kv_len) as f64;
            print!(
                "{:28} {:>3} {:>9.2} {:>7.1} {:>7.1} {:>7.2}  {:12}",
                row.name,
                threads,
                tokens / t / 1e6,
                row.bytes * tokens / t / 1e9,
                read,
                ratio.0,
                format!("{:.2} to {:.2}", ratio.1, ratio.2)
            );
            bases[1..].iter().for_each(|base| print!(" {:>12.2}x", against(base).0));
            println!();
        }
    }
}

/// A prompt of 4096 tokens: rows to raw blocks and records, beside a copy of the rows.
fn seal_table(rounds: usize) {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let rows = 4096usize;
    let tiles = rows / TOKENS as usize;
    println!("{:28} {:>3} {:>9} {:>7} {:>7}  quartiles", "", "thr", "Mtok/s", "GB/s", "x copy");
    for threads in [1, 2] {
        if threads > cores {
            continue;
        }
        let pool = Threads::new(threads as u32).unwrap();
        for format in TILES {
            let layer = Layer::new(format, tiles, tiles);
            let elements = rows * 8 * 128;
            let (mut k, mut v) = (memory(elements * 2), memory(elements * 2));
            fill(&mut k, 5);
            fill(&mut v, 6);
            let mut copy = memory(elements * 4);
            let slots: Vec<i64> = (0..rows as i64).collect();
            let list: Vec<_> = (0..tiles as i32).map(|i| SealTile { slot: i, block: i }).collect();
            let refused: Vec<_> = list.iter().map(|_| AtomicU32::new(0)).collect();
            let view = |rows: &mut Vec<u128>| {
                RowsView::contiguous(rows.as_mut_ptr().cast(), DType::Bf16, 8, 128)
            };
            let (k_rows, v_rows) = (view(&mut k), view(&mut v));
            let own: Vec<_> = (0..tiles as u32).map(|i| i * TOKENS..(i + 1) * TOKENS).collect();
            // As a cache does.
            let args = TileAppendArgs {
                seals: SealArgs {
                    shape: SHAPE,
                    tiles: layer.view(),
                    list: &list,
                    refused: &refused,
                },
                own: &own,
                staging: slots.as_ptr(),
                scratch: std::ptr::null(),
                rows: rows as u32,
                k: k_rows,
                v: v_rows,
                rope: None,
            };
            let (mut times, mut ratios) = (Vec::new(), Vec::new());
            for round in 0..=rounds {
                let here = seconds(|| {
                    // SAFETY: the slots are those of the raw blocks.
                    unsafe { append_tiles(&args, CpuLevel::chosen().unwrap(), &pool) }.unwrap();
                });
                let words = k.len();
                let base = copy.as_mut_ptr() as usize;
                let (from_k, from_v) = (k.as_ptr() as usize, v.as_ptr() as usize);
                let copied = seconds(|| {
                    // Parts as large as those of append.
                    pool.run(2 * words / 4096, &|_, i| {
                        let (half, at) = (words / 4096, i * 4096);
                        let from = if i < half { from_k } else { from_v };
                        // SAFETY: parts do not overlap, and stay within the memory.
                        unsafe {
                            let from = (from as *const u128).add(i % half * 4096);
                            from.copy_to_nonoverlapping((base as *mut u128).add(at), 4096);
                        }
                    });
                });
                black_box(&copy);
                if round > 0 {
                    times.push(here);
                    ratios.push(here / copied);
                }
            }
            let (t, ratio) = (median(times).0, median(ratios));
            println!(
                "{:28} {:>3} {:>9.2} {:>7.1} {:>7.2}  {:.2} to {:.2}",
                format!("append+seal {} {rows} b{TOKENS}", format.name()),
                threads,
                rows as f64 / t / 1e6,
                rows as f64 * 8.0 * 512.0 / t / 1e9,
                ratio.0,
                ratio.1,
                ratio.2
            );
        }
    }
}

fn main() {
    // What cargo bench passes is of no use here; `--quick` is for trying out.
    let has = |name: &str| std::env::args().any(|arg| arg == name);
    let quick = has("--quick");
    println!("level {}", CpuLevel::chosen().unwrap().name());
    if !has("--seal") {
        decode_table(8, if quick { 2048 } else { 16384 }, if quick { 3 } else { 15 });
        println!();
    }
    seal_table(if quick { 3 } else { 15 });
}
