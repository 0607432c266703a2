//! What it costs to call the library from C and from C++ over calling it from Rust: the same calls
//! from three programs in turn, on the shared and the static library, beside each other. Medians, and the
//! fastest of all rounds: the calls do the same each time, so that on a machine shared with others
//! what the fastest round does not have is not theirs. A crossing is counted from the fastest.
//!
//! `refs` reads one number and is almost nothing but the crossing (handle check, lock, status, panic
//! guard); `allocate` takes and frees 16 blocks in two calls; `step` opens and cancels a step of one
//! sequence, three calls. Without `--bench` each runs briefly and nothing is printed. With
//! `--prebuilt` the programs of an earlier run are measured, and no compiler runs beside them.

use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use ffi_tests::{HERE, NATIVE_STATIC_LIBS, compiler, libraries, run};
use kvcache::cache::{CacheOptions, KvCache, Step, Work};
use kvcache::dtype::KvFormat;
use kvcache::ids::{BlockId, Namespace};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::pool::BlockPool;

const NAMES: [(&str, u32); 3] = [("refs", 1), ("allocate", 2), ("step", 3)];
const ROUNDS: usize = 301;
/// Each program runs so often, in turn with the others.
const TURNS: usize = 5;

/// Nanoseconds of a call.
#[derive(Clone, Copy)]
struct Cost {
    median: f64,
    fastest: f64,
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What several costs of one call come to.
fn cost(of: impl Iterator<Item = Cost> + Clone) -> Cost {
    let fastest = of.clone().map(|cost| cost.fastest).fold(f64::INFINITY, f64::min);
    Cost { median: median(of.map(|cost| cost.median)), fastest }
}

fn time(calls: u32, mut call: impl FnMut()) -> Cost {
    let round = |_| {
        let start = Instant::now();
        (0..calls).for_each(|_| call());
        let ns = start.elapsed().as_secs_f64() * 1e9 / f64::from(calls);
        Cost { median: ns, fastest: ns }
    };
    let rounds: Vec<Cost> = (0..ROUNDS).map(round).collect();
    cost(rounds.into_iter())
}

fn from_rust(calls: u32) -> [Cost; 3] {
    let mut pool = BlockPool::new(1024).unwrap();
    let mut blocks = [BlockId::NONE; 16];
    pool.allocate_n(&mut blocks[..1]).unwrap();
    let held = blocks[0];
    let refs = time(calls, || assert!(pool.refs(black_box(held)) == 1));
    let allocate = time(calls, || {
        pool.allocate_n(black_box(&mut blocks)).unwrap();
        pool.free_n(black_box(&blocks)).unwrap();
    });
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 8, KvFormat::Bf16));
    let mut cache = KvCache::new(&spec, &CacheOptions::default()).unwrap();
    let started = cache.start(&[1], Namespace(0)).unwrap();
    let mut step = Step::new();
    let work = [Work { seq: started.seq, tokens: &[1] }];
    let whole = time(calls, || {
        cache.begin(&mut step, black_box(&work)).unwrap();
        assert!(step.positions().len() == 1);
        cache.cancel(&mut step).unwrap();
    });
    [refs, allocate, whole]
}

/// Runs a program and reads what it printed.
fn from_program(program: &Path, calls: u32) -> [Cost; 3] {
    let output = run(Command::new(program).arg(calls.to_string()));
    let text = String::from_utf8(output.stdout).unwrap();
    NAMES.map(|(name, _)| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        let mut words =
            line.expect("a line a measurement").split(' ').map(|ns| ns.parse().unwrap());
        Cost { median: words.next().unwrap(), fastest: words.next().unwrap() }
    })
}

fn main() {
    let measured = std::env::args().any(|word| word == "--bench");
    let prebuilt = std::env::args().any(|word| word == "--prebuilt");
    let calls = if measured { 2_000 } else { 10 };
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("crossing");
    std::fs::create_dir_all(&dir).unwrap();
    let mut programs = Vec::new();
    for (language, source, standard) in
        [("C", "crossing.c", "c99"), ("C++", "crossing.cpp", "c++17")]
    {
        let Some(_) = compiler(language == "C++") else { continue };
        for linked in ["shared", "static"] {
            let program = dir.join(format!("{source}-{linked}"));
            if prebuilt {
                programs.push((format!("{language}, {linked}"), program));
                continue;
            }
            let mut command = compiler(language == "C++").unwrap();
            command.args(["-O2", &format!("-std={standard}"), "-o"]).arg(&program);
            command.arg(Path::new(HERE).join("bench").join(source));
            if linked == "shared" {
                let soname = dir.join(ffi_tests::soname(&libraries().join("libkvcache.so")));
                std::fs::copy(libraries().join("libkvcache.so"), &soname).unwrap();
                command.arg(&soname).arg(format!("-Wl,-rpath,{}", dir.display()));
            } else {
                command.arg(libraries().join("libkvcache.a")).args(NATIVE_STATIC_LIBS.split(' '));
            }
            run(&mut command);
            programs.push((format!("{language}, {linked}"), program));
        }
    }

    let mut rust = Vec::new();
    let mut others = vec![Vec::new(); programs.len()];
    for _ in 0..if measured { TURNS } else { 1 } {
        rust.push(from_rust(calls));
        for (program, times) in programs.iter().zip(&mut others) {
            times.push(from_program(&program.1, calls));
        }
    }
    if !measured {
        return;
    }
    let of = |times: &[[Cost; 3]], i: usize| cost(times.iter().map(|turn| turn[i]));
    println!(
        "{:<10} {:<14} {:>9} {:>9} {:>15}",
        "call", "from", "median ns", "fastest", "a crossing"
    );
    for (i, (name, crossings)) in NAMES.into_iter().enumerate() {
        let base = of(&rust, i);
        println!("{name:<10} {:<14} {:>9.2} {:>9.2}", "Rust", base.median, base.fastest);
        for ((from, _), times) in programs.iter().zip(&others) {
            let Cost { median, fastest } = of(times, i);
            let each = (fastest - base.fastest) / f64::from(crossings);
            println!("{name:<10} {from:<14} {median:>9.2} {fastest:>9.2} {each:>12.2} ns");
        }
    }
}
