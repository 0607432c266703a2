//! The disk tier beside `fio`: bytes a second of objects put with their flushes, and got past the
//! page cache, by both on the same directory, in rounds that alternate.
//!
//! Both move objects of one size, with 16 in flight through io_uring (or one, by plain calls), and
//! flush after 16: `fio` by one fdatasync of its
//! data, the tier by one of its data and one of the journal that names it, without which a put
//! would not be done. Files are made with room taken and nothing written, as the tier's segments
//! are. `KVCACHE_BENCH_DIR` is where (default: the system's folder for temporary files). Needs `fio`;
//! without it this says so and measures nothing. With `--test` what is printed means nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use kvcache::dtype::KvFormat;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::buffer::{Buffer, Buffers};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Configuration, Get, ObjectKey, Outcome, Put, Store};

/// Objects in flight, and between flushes.
const DEPTH: usize = 16;

struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let base =
            std::env::var_os("KVCACHE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let path = base.join(format!("kvcache-bench-fio-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Bytes a second of `fio`, writing (and flushing) or reading a file of `bytes` bytes, another in
/// each round: like the tier it writes where nothing was written before.
fn fio(
    dir: &Path,
    engine: &str,
    write: bool,
    round: usize,
    object: usize,
    bytes: usize,
) -> Option<f64> {
    let output = Command::new("fio")
        .current_dir(dir)
        .args([
            "--name=fio",
            &format!("--filename=fio-{round}"),
            "--direct=1",
            "--fallocate=native",
            "--thread",
        ])
        .args(["--output-format=json", &format!("--ioengine={engine}")])
        .args([format!("--iodepth={DEPTH}"), format!("--bs={object}"), format!("--size={bytes}")])
        .args(match write {
            true => ["--rw=write".into(), format!("--fdatasync={DEPTH}")],
            false => ["--rw=read".into(), "--invalidate=1".into()],
        })
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    // The first of its numbers are of reads, the next of writes.
    let part = &text[text.find(if write { "\"write\" : {" } else { "\"read\" : {" })?..];
    let number = |name: &str| -> Option<f64> {
        let rest = &part[part.find(name)? + name.len()..];
        rest.trim_start_matches([' ', ':']).split([',', '\n']).next()?.trim().parse().ok()
    };
    let (bytes, runtime) = (number("\"io_bytes\"")?, number("\"runtime\"")?);
    (bytes > 0.0 && runtime > 0.0).then(|| bytes / (runtime / 1000.0))
}

fn median(rates: &mut [f64]) -> (f64, f64) {
    rates.sort_by(f64::total_cmp);
    let at = |share: f64| rates[((rates.len() - 1) as f64 * share) as usize];
    (at(0.5), (at(0.9) - at(0.1)) / at(0.5))
}

fn key(n: usize) -> ObjectKey {
    let mut key = ObjectKey([0x5a; 32]);
    key.0[..8].copy_from_slice(&(n as u64).to_le_bytes());
    key
}

/// Bytes a second of the tier: puts, gets.
fn tier(store: &DiskStore, buffers: &mut [Buffer], round: usize, groups: usize) -> [f64; 2] {
    let bytes = (store.object_bytes() as usize * DEPTH * groups) as f64;
    let mut outcomes = vec![Outcome::None; DEPTH];
    let begin = Instant::now();
    for group in 0..groups {
        let first = (round * groups + group) * DEPTH;
        let objects: Vec<Put> = (buffers.iter().cycle().zip(first..first + DEPTH))
            .map(|(buffer, n)| Put { key: key(n), object: buffer, label: None })
            .collect();
        store.put(&objects, &mut outcomes);
        assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done));
    }
    let put = bytes / begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    let end = (round + 1) * groups * DEPTH;
    for first in (round * groups * DEPTH..end).step_by(buffers.len()) {
        let mut objects: Vec<Get> = (buffers.iter_mut().zip(first..))
            .map(|(buffer, n)| Get { key: key(n), object: buffer })
            .collect();
        let outcomes = &mut outcomes[..objects.len()];
        store.get(&mut objects, outcomes);
        assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done));
    }
    [put, bytes / begin.elapsed().as_secs_f64()]
}

fn measure(uring: bool, layers: u32, groups: usize, rounds: usize) {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(layers, 8, 64, KvFormat::F16));
    let config = Configuration::new("bench", &spec, &Slice::whole(&spec)).unwrap();
    let folder = Folder::new();
    let options = DiskOptions { uring, ..DiskOptions::new(&folder.0, 64 << 30) };
    let (store, _) = DiskStore::open(&options, &config).unwrap();
    if uring && !store.is_uring() {
        println!("io_uring: not in this build or system");
        return;
    }
    let (engine, depth) = if uring { ("io_uring", DEPTH) } else { ("psync", 1) };
    let object = store.object_bytes() as usize;
    // As many as fio has: one that is used again and again is in the cache.
    let pool = Buffers::new(object, depth);
    let mut buffers: Vec<Buffer> = (0..depth).map(|_| pool.take().unwrap()).collect();
    let mut rates: [Vec<f64>; 4] = Default::default();
    for round in 0..rounds + 1 {
        // Not of zeros, which a disk may know.
        for (n, buffer) in buffers.iter_mut().enumerate() {
            let mut word = (round * DEPTH + n) as u64;
            for eight in buffer.chunks_exact_mut(8) {
                word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                eight.copy_from_slice(&word.to_le_bytes());
            }
        }
        let bytes = object * DEPTH * groups;
        let theirs =
            || [true, false].map(|write| fio(&folder.0, engine, write, round, object, bytes));
        // Whoever comes first finds the disk in another state than who comes second.
        let first = (round % 2 == 1).then(theirs);
        let [put, get] = tier(&store, &mut buffers, round, groups);
        let [Some(write), Some(read)] = first.unwrap_or_else(theirs) else {
            println!("fio is not here, or says something else: nothing to compare with");
            return;
        };
        // The first is to warm up.
        if round > 0 {
            for (rates, rate) in rates.iter_mut().zip([put, write, get, read]) {
                rates.push(rate);
            }
        }
    }
    println!(
        "objects of {} KiB, {depth} in flight ({engine}), {} MiB a round, {rounds} rounds",
        object / 1024,
        (object * DEPTH * groups) >> 20
    );
    for (name, pair) in ["put", "get"].iter().zip(rates.chunks_mut(2)) {
        let [ours, theirs] = pair else { unreachable!("two of each") };
        let ((ours, spread), (theirs, their_spread)) = (median(ours), median(theirs));
        println!(
            "  {name}  tier {:6.3} GB/s (p10-p90 {:2.0} %)   fio {:6.3} GB/s ({:2.0} %)   {:.2} of it",
            ours / 1e9,
            spread * 100.0,
            theirs / 1e9,
            their_spread * 100.0,
            ours / theirs
        );
    }
}

fn main() {
    let test = !std::env::args().any(|word| word == "--bench");
    if Command::new("fio").arg("--version").output().is_err() {
        println!("fio is not here: nothing measured");
        return;
    }
    // 260 KiB, 1 MiB, 4 MiB.
    for uring in [true, false] {
        for (layers, groups) in [(8, 32), (32, 8), (128, 2)] {
            let (groups, rounds) = if test { (1, 1) } else { (groups, 16) };
            measure(uring, layers, groups, rounds);
        }
    }
}
