//! Attention beside PyTorch's `scaled_dot_product_attention`, in one run, on the same threads and
//! the same data.
//!
//! `KVCACHE_PEER_PYTHON=<a Python with torch> cargo bench --bench peers` prints GFLOP/s of causal
//! prefill and GB/s of K and V read in decode, medians with quartiles, and the median ratio. Runs of both
//! sides alternate, so that a drift of the machine meets both. PyTorch is tried in several forms
//! (heads expanded, grouped by hand, `enable_gqa`) and its fastest counts. Outputs are compared.
//! Without the variable only this library's figures are printed. A word after `--` keeps the rows
//! that contain it: `prefill`, `decode`, `bf16`, `1 thread`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use kvcache::attention::{HeadShape, Scoring};
use kvcache::cpu::{
    AttendArgs, AttendMaxima, BlockTables, CpuLevel, KvView, RowsView, Threads, attend,
    attend_workspace_bytes,
};
use kvcache::dtype::{DType, KvFormat, bf16, f16};
use kvcache::layout::{GroupLayout, GroupSpec};
use serde_json::{Value, json};

const SHAPE: HeadShape =
    HeadShape { q_heads: 32, kv_heads: 8, k_dim: 128, v_dim: 128, v_in_k: false };
const BLOCK_TOKENS: u32 = 32;
/// Elements after which the data repeats; a prime, so that no row is like another.
const PERIOD: usize = 1_048_573;
/// Outputs are compared at every so manieth element.
const SAMPLE_STEP: usize = 509;

/// What is measured.
struct Case {
    format: KvFormat,
    seqs: usize,
    kv_len: usize,
    prefill: bool,
    /// Copies of the cache that calls take turns with, so that none finds it in the L3.
    rotations: usize,
}

impl Case {
    fn name(&self, threads: u32) -> String {
        let op = if self.prefill { "prefill" } else { "decode" };
        let plural = if threads == 1 { "" } else { "s" };
        format!(
            "{op:7} {:>2} x {:>5} {:4} {threads} thread{plural}",
            self.seqs,
            self.kv_len,
            self.format.name()
        )
    }

    fn q_tokens(&self) -> usize {
        if self.prefill { self.kv_len } else { 1 }
    }

    /// GFLOP of a prefill, or GB of K and V that a decode reads.
    fn work(&self) -> f64 {
        let n = self.kv_len as f64;
        let dims = f64::from(SHAPE.k_dim + SHAPE.v_dim);
        if self.prefill {
            2.0 * dims * f64::from(SHAPE.q_heads) * n * (n + 1.0) / 2.0 / 1e9
        } else {
            let row_bytes = f64::from(SHAPE.kv_heads * self.format.dtype().bytes()) * dims;
            self.seqs as f64 * n * row_bytes / 1e9
        }
    }
}

/// SplitMix64 of `seed` and the index: numbers in -1..1.
fn pattern(seed: u64) -> Vec<f32> {
    let number = |i: u64| {
        let mut x = ((seed << 32) + i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^= x >> 27;
        (x >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (1..=PERIOD as u64).map(number).collect()
}

/// Memory for elements of a run-time type, aligned for all, in huge pages where the system has
/// them: as the library's own caches, and as PyTorch's tensors are told to be.
struct Elements {
    memory: Vec<u64>,
    dtype: DType,
}

impl Elements {
    fn new(dtype: DType, count: usize) -> Self {
        let words = (count * dtype.bytes() as usize).div_ceil(8);
        let mut memory = Vec::<u64>::with_capacity(words);
        #[cfg(target_os = "linux")]
        {
            let at = memory.as_mut_ptr().cast::<u8>();
            let skip = at.align_offset(4096);
            if words * 8 > skip + 4096 {
                let pages = at.wrapping_add(skip).cast();
                // SAFETY: advice about pages of our own, which changes no contents.
                unsafe { libc::madvise(pages, (words * 8 - skip) & !4095, libc::MADV_HUGEPAGE) };
            }
        }
        memory.resize(words, 0);
        Self { memory, dtype }
    }

    fn ptr(&mut self) -> *mut u8 {
        self.memory.as_mut_ptr().cast()
    }

    fn put(&mut self, i: usize, x: f32) {
        // SAFETY: callers stay below the count that `new` was given.
        unsafe {
            match self.dtype {
                DType::F32 => self.ptr().cast::<f32>().add(i).write(x),
                DType::F16 => self.ptr().cast::<f16>().add(i).write(f16::from_f32(x)),
                _ => self.ptr().cast::<bf16>().add(i).write(bf16::from_f32(x)),
            }
        }
    }

    fn get(&mut self, i: usize) -> f32 {
        // SAFETY: as above.
        unsafe {
            match self.dtype {
                DType::F32 => self.ptr().cast::<f32>().add(i).read(),
                DType::F16 => self.ptr().cast::<f16>().add(i).read().to_f32(),
                _ => self.ptr().cast::<bf16>().add(i).read().to_f32(),
            }
        }
    }
}

/// Our side of a case: a cache in native layout whose blocks lie in mixed order.
struct Ours {
    layout: GroupLayout,
    pool: Elements,
    tables: Vec<i32>,
    blocks_a_seq: usize,
    seqs: usize,
    q_indptr: Vec<i32>,
    kv_lens: Vec<i32>,
    q: Elements,
    out: Elements,
    workspace: Vec<u8>,
    threads: Threads,
    turn: usize,
}

impl Ours {
    fn new(case: &Case, workers: u32) -> Self {
        let dtype = case.format.dtype();
        let spec = GroupSpec::uniform(1, SHAPE.kv_heads, SHAPE.k_dim, case.format);
        let layout = GroupLayout::new(spec, BLOCK_TOKENS).unwrap();
        let blocks_a_seq = layout.blocks_for(case.kv_len as u64) as usize;
        let blocks = blocks_a_seq * case.seqs * case.rotations;
        let bytes = layout.pool_bytes(blocks as u64).unwrap() as usize;
        let mut pool = Elements::new(dtype, bytes / dtype.bytes() as usize);
        // A stride that shares no factor with the number of blocks visits each once.
        let step = (blocks / 3..).find(|&s| gcd(s, blocks) == 1).unwrap();
        let tables: Vec<i32> = (0..blocks).map(|i| (i * step % blocks) as i32).collect();
        let (heads, dim) = (SHAPE.kv_heads as usize, SHAPE.k_dim as usize);
        for (seed, offset) in [(2, layout.k_offset(0)), (3, layout.v_offset(0))] {
            let (values, strides) = (pattern(seed), layout.k_strides());
            let start = offset as usize / dtype.bytes() as usize;
            for (entry, &block) in tables.iter().enumerate() {
                let seq = entry / blocks_a_seq % case.seqs;
                for row in 0..heads * BLOCK_TOKENS as usize {
                    let (head, slot) = (row / BLOCK_TOKENS as usize, row % BLOCK_TOKENS as usize);
                    let token = entry % blocks_a_seq * BLOCK_TOKENS as usize + slot;
                    let from = ((seq * heads + head) * case.kv_len + token) * dim;
                    let at = block as usize * strides.block as usize
                        + head * strides.head as usize
                        + slot * strides.token as usize;
                    for c in 0..dim {
                        pool.put(start + at + c, values[(from + c) % PERIOD]);
                    }
                }
            }
        }
        let tokens = case.seqs * case.q_tokens();
        let rows = tokens * (SHAPE.q_heads * SHAPE.k_dim) as usize;
        let (mut q, values) = (Elements::new(dtype, rows), pattern(1));
        (0..rows).for_each(|i| q.put(i, values[i % PERIOD]));
        let maxima = AttendMaxima {
            seqs: case.seqs as u32,
            q_tokens: tokens as u32,
            kv_len: case.kv_len as u32,
            workers: workers as usize,
        };
        Self {
            layout,
            pool,
            tables,
            blocks_a_seq,
            seqs: case.seqs,
            q_indptr: (0..=case.seqs).map(|s| (s * case.q_tokens()) as i32).collect(),
            kv_lens: vec![case.kv_len as i32; case.seqs],
            q,
            out: Elements::new(dtype, rows),
            workspace: vec![0; attend_workspace_bytes(&SHAPE, &maxima).unwrap() as usize],
            threads: Threads::new(workers).unwrap(),
            turn: 0,
        }
    }

    /// One call; the seconds it took.
    fn run(&mut self) -> f64 {
        let blocks = self.blocks_a_seq * self.seqs;
        self.turn = (self.turn + 1) % (self.tables.len() / blocks);
        let table = &self.tables[self.turn * blocks..];
        let dtype = self.q.dtype;
        let args = AttendArgs {
            shape: SHAPE,
            scoring: Scoring::causal(SHAPE.k_dim),
            kv: KvView::native(&self.layout, self.pool.ptr(), self.tables.len() as u32, 0).unwrap(),
            tables: BlockTables::Dense { table: table.as_ptr(), stride: self.blocks_a_seq as i64 },
            seqs: self.seqs as u32,
            q_indptr: self.q_indptr.as_ptr(),
            kv_lens: self.kv_lens.as_ptr(),
            q: RowsView::contiguous(self.q.ptr(), dtype, SHAPE.q_heads, SHAPE.k_dim),
            out: RowsView::contiguous(self.out.ptr(), dtype, SHAPE.q_heads, SHAPE.v_dim),
            lse: std::ptr::null_mut(),
            bad_block: None,
        };
        let level = CpuLevel::chosen().unwrap();
        let start = Instant::now();
        // SAFETY: the buffers were made for these sizes.
        unsafe { attend(&args, level, &self.threads, &mut self.workspace) }.unwrap();
        start.elapsed().as_secs_f64()
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The other side: a Python process that answers lines of JSON.
struct Peer {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Peer {
    fn start() -> Option<Self> {
        let python = std::env::var_os("KVCACHE_PEER_PYTHON")?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/sdpa.py");
        let mut command = Command::new(python);
        let command = command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped());
        let command = command.env("THP_MEM_ALLOC_ENABLE", "1");
        let mut child = command.spawn().expect("KVCACHE_PEER_PYTHON must name a Python");
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Some(Self { child, to, from: BufReader::new(from) })
    }

    fn ask(&mut self, question: &Value) -> Value {
        writeln!(self.to, "{question}").expect("the peer reads");
        let mut line = String::new();
        self.from.read_line(&mut line).expect("the peer answers");
        serde_json::from_str(&line).expect("the peer answers in JSON (is torch installed?)")
    }

    fn run(&mut self) -> f64 {
        self.ask(&json!({ "op": "run" }))["seconds"].as_f64().unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Nothing to lose: it only computes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Median and quartiles of rates.
fn summary(work: f64, seconds: &[f64]) -> String {
    let mut rates: Vec<f64> = seconds.iter().map(|s| work / s).collect();
    rates.sort_by(f64::total_cmp);
    let at = |part: usize| rates[(rates.len() - 1) * part / 4];
    format!("{:7.1} ({:.1} .. {:.1})", at(2), at(1), at(3))
}

fn measure(case: &Case, workers: u32, peer: &mut Option<Peer>) {
    let mut ours = Ours::new(case, workers);
    let question = json!({
        "op": if case.prefill { "prefill" } else { "decode" },
        "dtype": case.format.name(),
        "tokens": case.kv_len,
        "seqs": case.seqs,
        "rotations": case.rotations,
        "threads": workers,
        "q_heads": SHAPE.q_heads,
        "kv_heads": SHAPE.kv_heads,
        "dim": SHAPE.k_dim,
        "sample_step": SAMPLE_STEP,
    });
    let built = peer.as_mut().map(|peer| peer.ask(&question));
    ours.run();
    let difference = built.as_ref().map(|built| {
        let sample = built["sample"].as_array().unwrap();
        let pairs = sample.iter().enumerate();
        pairs.fold(0.0, |worst: f64, (i, theirs)| {
            let ours = f64::from(ours.out.get(i * SAMPLE_STEP));
            // `max` would drop a NaN.
            let difference = (ours - theirs.as_f64().unwrap()).abs();
            if difference <= worst { worst } else { difference }
        })
    });
    let (mut our_seconds, mut their_seconds) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while our_seconds.len() < 5 || our_seconds.len() < 31 && start.elapsed().as_secs() < 5 {
        // Threads of the other side may spin for a moment after their work.
        std::thread::sleep(Duration::from_millis(10));
        our_seconds.push(ours.run());
        if let Some(peer) = peer {
            std::thread::sleep(Duration::from_millis(10));
            their_seconds.push(peer.run());
        }
    }
    let text = summary(case.work(), &our_seconds);
    let unit = if case.prefill { "GFLOP/s" } else { "GB/s" };
    print!("{:36} {text:26} {unit:8}", case.name(workers));
    if let (Some(built), Some(difference)) = (built, difference) {
        let text = summary(case.work(), &their_seconds);
        let form = built["form"].as_str().unwrap();
        // Of runs that followed each other, so that a disturbance meets both sides of a ratio.
        let mut ratios: Vec<f64> =
            their_seconds.iter().zip(&our_seconds).map(|(theirs, ours)| theirs / ours).collect();
        ratios.sort_by(f64::total_cmp);
        print!(" {text:24} {form:10} {:5.2}x  {difference:.1e}", ratios[ratios.len() / 2]);
        // Outputs are below 1: a rounding of bf16 and the weights' own.
        assert!(difference <= 2e-2, "the outputs differ by {difference}");
    }
    println!();
}

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if !args.iter().any(|arg| arg == "--bench") {
        println!("peers: only runs under `cargo bench`");
        return;
    }
    args.retain(|arg| !arg.starts_with("--"));
    let mut peer = Peer::start();
    let version = peer.as_mut().map(|peer| peer.ask(&json!({ "op": "version" })));
    match &version {
        Some(answer) => println!("peer: PyTorch {}", answer["version"].as_str().unwrap()),
        None => println!("peer: none; KVCACHE_PEER_PYTHON names a Python with torch"),
    }
    println!("level: {}; 32 query heads, 8 KV heads, d 128", CpuLevel::chosen().unwrap().name());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{:36} {:26} {:8} {:24} {:10} {:6}  largest difference",
        "median (quartiles)", "libkvcache", "", "PyTorch SDPA", "its form", "ratio"
    );
    let prefill = |format, kv_len| Case { format, seqs: 1, kv_len, prefill: true, rotations: 1 };
    let decode = |format, seqs, kv_len| {
        // Enough copies that twice 32 MB pass before one comes again.
        let mut case = Case { format, seqs, kv_len, prefill: false, rotations: 1 };
        case.rotations = 1 + (0.064 / case.work()).ceil() as usize;
        case
    };
    let mut cases = Vec::new();
    for format in [KvFormat::F32, KvFormat::Bf16] {
        cases.extend([2048, 4096].map(|tokens| prefill(format, tokens)));
    }
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Bf16] {
        cases.extend([(1, 4096), (8, 4096), (8, 16384)].map(|(s, n)| decode(format, s, n)));
    }
    for case in &cases {
        for workers in [1, 2].into_iter().filter(|&n| n as usize <= cores) {
            if args.iter().all(|word| case.name(workers).contains(word.as_str())) {
                measure(case, workers, &mut peer);
            }
        }
    }
}
