//! Tiers: blocks to the host and back beside a plain copy, objects to a disk and back, how long an engine
//! waits for the first layer of a load and for all of it, and the time that a store of a million objects
//! takes to open.
//!
//! A ratio is of medians of rounds that alternate in one run. `KVCACHE_BENCH_DIR` is where the disk
//! tier writes (default: the system's folder for temporary files). Without `--bench`, which
//! `cargo bench` gives, sizes are small, and what is printed means nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Result};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvcache::cache::{
    CacheOptions, Demotion, KvCache, LayerId, LowerTier, Step, TierOptions, Work,
};
use kvcache::dtype::KvFormat;
use kvcache::ids::Namespace;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::buffer::{Buffer, Buffers};
use kvcache::tier::disk::{DiskFile, DiskOptions, DiskStore, Files};
use kvcache::tier::{Configuration, Get, ObjectKey, Outcome, Put, Store, TierKind, TierSettings};

const BLOCK: u32 = 16;
/// Blocks of a prompt, and so of a round.
const PROMPT: usize = 32;

fn main() {
    let test = !std::env::args().any(|word| word == "--bench");
    host(test);
    disk(test);
    layers(test);
    restore(if test { 10_000 } else { 1_000_000 });
}

/// A block of 1 MiB: 32 layers of 8 heads of 64 channels, 16 tokens.
fn spec(test: bool) -> CacheSpec {
    let layers = if test { 1 } else { 32 };
    CacheSpec::uniform(BLOCK, GroupSpec::uniform(layers, 8, 64, KvFormat::F16))
}

fn median(times: &mut [f64]) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    (at(0.5), (at(0.9) - at(0.1)) / at(0.5))
}

fn gigabytes(bytes: usize, times: &mut [f64]) -> f64 {
    let (median, spread) = median(times);
    let rate = bytes as f64 / median / 1e9;
    print!("{rate:8.2} GB/s (p10-p90 {:3.0} %)", spread * 100.0);
    rate
}

/// Prompts that push each other out of the device: begin() demotes what is new, start() promotes.
fn host(test: bool) {
    let spec = spec(test);
    let rounds = if test { 2 } else { 24 };
    let options =
        CacheOptions { blocks: PROMPT as u32 + 1, max_seqs: 1, threads: 1, ..Default::default() };
    let mut cache = KvCache::new(&spec, &options).unwrap();
    cache.attach_tiers(TierOptions::host("bench", (rounds + 3) * PROMPT)).unwrap();
    let bytes = cache.stats().block_bytes as usize * PROMPT;
    let (mut from, mut to) = (vec![1u8; bytes * 4], vec![2u8; bytes * 4]);
    let prompt = |n: usize| -> Vec<u32> {
        (0..(PROMPT * BLOCK as usize + 1) as u32).map(|t| n as u32 * 100_000 + t).collect()
    };
    let mut step = Step::new();
    let mut serve = |cache: &mut KvCache, n: usize| {
        let tokens = prompt(n);
        let begin = Instant::now();
        let started = cache.start(&tokens, Namespace(0)).unwrap();
        let start = begin.elapsed().as_secs_f64();
        let rest = &tokens[started.cached_tokens as usize..];
        let begin = Instant::now();
        cache.begin(&mut step, &[Work { seq: started.seq, tokens: rest }]).unwrap();
        let reserve = begin.elapsed().as_secs_f64();
        cache.commit(&mut step).unwrap();
        cache.release(started.seq).unwrap();
        (started.cached_tokens as usize / BLOCK as usize, start, reserve)
    };
    // Every buffer of the host is made, and its pages are touched, before anything is timed.
    for n in 0..rounds + 5 {
        serve(&mut cache, n);
    }
    let (mut copy, mut demote, mut promote) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..rounds {
        let begin = Instant::now();
        to.copy_from_slice(&from);
        copy.push(begin.elapsed().as_secs_f64() / 4.0);
        std::mem::swap(&mut from, &mut to);
        let (one, other) = (1000 + 2 * n, 1001 + 2 * n);
        serve(&mut cache, one);
        // It pushes out what is new, ...
        demote.push(serve(&mut cache, other).2);
        assert_eq!(serve(&mut cache, one).0, PROMPT);
        // ... and when it comes back, what the host has: nothing goes down while it comes up.
        let (hit, start, _) = serve(&mut cache, other);
        assert_eq!(hit, PROMPT);
        promote.push(start);
    }
    println!(
        "host tier, blocks of {} KiB, {PROMPT} a round, {rounds} rounds",
        bytes / PROMPT / 1024
    );
    print!("  plain copy of {:>4} MiB", (bytes * 4) >> 20);
    let plain = gigabytes(bytes, &mut copy);
    print!("\n  demote (begin)        ");
    let demote = gigabytes(bytes, &mut demote);
    print!("   {:.2} of the copy\n  promote (start)       ", demote / plain);
    let promote = gigabytes(bytes, &mut promote);
    println!("   {:.2} of the copy", promote / plain);
}

fn folder(name: &str) -> PathBuf {
    let base = std::env::var_os("KVCACHE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let path = base.join(format!("kvcache-bench-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    path
}

fn key(n: u64) -> ObjectKey {
    let mut key = ObjectKey::default();
    // As spread as a digest.
    let words = [n, n ^ 0x55, !n, n.rotate_left(17)];
    for (eight, word) in key.0.chunks_exact_mut(8).zip(words) {
        let mixed = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        eight.copy_from_slice(&(mixed ^ mixed >> 29).to_le_bytes());
    }
    key
}

/// Groups of 16 objects, put with their flushes, and got past the page cache.
fn disk(test: bool) {
    let spec = spec(test);
    let config = Configuration::new("bench", &spec, &Slice::whole(&spec)).unwrap();
    let (groups, each) = if test { (2, 16) } else { (48, 16) };
    for uring in [false, true] {
        let path = folder("disk");
        let mut options = DiskOptions::new(&path, 2 << 30);
        options.uring = uring;
        let (store, _) = DiskStore::open(&options, &config).unwrap();
        if uring && !store.is_uring() {
            println!("disk tier through io_uring: not in this build or system");
            continue;
        }
        let bytes = store.object_bytes() as usize;
        let pool = Buffers::new(bytes, each);
        let mut buffers: Vec<Buffer> = (0..each).map(|_| pool.take().unwrap()).collect();
        buffers.iter_mut().for_each(|buffer| buffer.fill(0x5a));
        let (mut puts, mut gets) = (Vec::new(), Vec::new());
        let mut outcomes = vec![Outcome::None; each];
        for group in 0..groups as u64 {
            let objects: Vec<Put> = buffers
                .iter()
                .zip(group * each as u64..)
                .map(|(buffer, n)| Put { key: key(n), object: buffer, label: None })
                .collect();
            let begin = Instant::now();
            store.put(&objects, &mut outcomes);
            puts.push(begin.elapsed().as_secs_f64());
            assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done));
        }
        for group in 0..groups as u64 {
            let mut objects: Vec<Get> = buffers
                .iter_mut()
                .zip(group * each as u64..)
                .map(|(buffer, n)| Get { key: key(n), object: buffer })
                .collect();
            let begin = Instant::now();
            store.get(&mut objects, &mut outcomes);
            gets.push(begin.elapsed().as_secs_f64());
            assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done));
        }
        let how = if uring { "through io_uring" } else { "by plain calls" };
        println!(
            "disk tier {how}, objects of {} KiB, {each} a group, {groups} groups",
            bytes / 1024
        );
        print!("  put, flushed          ");
        gigabytes(bytes * each, &mut puts);
        print!("\n  get, past the cache   ");
        gigabytes(bytes * each, &mut gets);
        println!();
        drop(store);
        let _ = fs::remove_dir_all(&path);
    }
}

/// Prompts that are loaded in turns: as a whole, and layer by layer. From the host, where all rounds'
/// prompts are; from disk past the page cache, where the host has none of them.
fn layers(test: bool) {
    let spec = spec(test);
    let rounds = if test { 2 } else { 24 };
    let last = LayerId::uniform(spec.groups[0].layers - 1);
    let path = folder("layers");
    for disk in [false, true] {
        let options = CacheOptions {
            blocks: PROMPT as u32 + 1,
            max_seqs: 1,
            threads: 1,
            ..Default::default()
        };
        let mut cache = KvCache::new(&spec, &options).unwrap();
        let config = Configuration::new("bench", &spec, &Slice::whole(&spec)).unwrap();
        let mut tiers = TierOptions::host("bench", if disk { 0 } else { (rounds + 1) * PROMPT });
        tiers.transit_blocks = 3 * PROMPT;
        if disk {
            let options = DiskOptions::new(&path, 2 << 30);
            let settings = TierSettings {
                kind: TierKind::Disk,
                readers: 2,
                writers: 1,
                queued_blocks: 2 * PROMPT,
            };
            let store: Arc<dyn Store> = Arc::new(DiskStore::open(&options, &config).unwrap().0);
            tiers.lower.push(LowerTier { store, settings, demotion: Demotion::default() });
        }
        cache.attach_tiers(tiers).unwrap();
        let bytes = cache.stats().block_bytes as usize * PROMPT;
        let prompt = |n: usize| -> Vec<u32> {
            (0..(PROMPT * BLOCK as usize + 1) as u32).map(|t| n as u32 * 100_000 + t).collect()
        };
        let long = Duration::from_secs(60);
        let mut step = Step::new();
        // One more, which pushes the last of them out.
        for n in 0..=rounds {
            let (tokens, seq) = (prompt(n), cache.start(&prompt(n), Namespace(0)).unwrap().seq);
            cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
            cache.commit(&mut step).unwrap();
            cache.release(seq).unwrap();
            assert!(cache.flush_tiers(long));
        }
        let (mut whole, mut first, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for n in (0..rounds).chain(0..if disk { 0 } else { rounds }) {
            // Its copies below stay.
            cache.clear_prefix().unwrap();
            let tokens = prompt(n);
            let begin = Instant::now();
            let started = if n % 2 == 0 {
                if disk {
                    let mut prefetch = cache.prefetch(&tokens, Namespace(0)).unwrap();
                    cache.wait_prefetch(&mut prefetch, long);
                }
                let started = cache.start(&tokens, Namespace(0)).unwrap();
                whole.push(begin.elapsed().as_secs_f64());
                started
            } else {
                let started = cache.start_onboarding(&tokens, &[], Namespace(0)).unwrap();
                for layer in 0..=last.layer {
                    let layer = LayerId::uniform(layer);
                    assert!(cache.wait_layer(started.seq, layer, long).unwrap());
                    if layer.layer == 0 {
                        first.push(begin.elapsed().as_secs_f64());
                    }
                }
                all.push(begin.elapsed().as_secs_f64());
                started
            };
            assert_eq!(started.cached_tokens as usize, PROMPT * BLOCK as usize, "prompt {n}");
            cache.release(started.seq).unwrap();
        }
        println!(
            "onboarding from {}, {PROMPT} blocks of {} KiB, {} layers",
            if disk { "disk" } else { "the host" },
            bytes / PROMPT / 1024,
            last.layer + 1
        );
        let [whole, first, all] = [
            ("as a whole            ", &mut whole),
            ("first layer there     ", &mut first),
            ("all layers there      ", &mut all),
        ]
        .map(|(what, times)| {
            let (median, spread) = median(times);
            print!("  {what}{:8.2} ms (p10-p90 {:3.0} %)", median * 1e3, spread * 100.0);
            println!();
            median
        });
        println!(
            "  first layer after {:.3} of the whole, all after {:.2}",
            first / whole,
            all / whole
        );
    }
    let _ = fs::remove_dir_all(&path);
}

/// Files that keep the journal and forget the objects.
#[derive(Debug, Clone, Default)]
struct JournalOnly(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

#[derive(Debug)]
struct Kept {
    files: JournalOnly,
    name: String,
}

impl Files for JournalOnly {
    fn open(&self, name: &str, create: bool, _: bool) -> Result<Box<dyn DiskFile>> {
        let mut files = self.0.lock().unwrap();
        if !create && !files.contains_key(name) {
            return Err(ErrorKind::NotFound.into());
        }
        files.entry(name.into()).or_default();
        Ok(Box::new(Kept { files: self.clone(), name: name.into() }))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let mut files = self.0.lock().unwrap();
        let file = files.remove(from).ok_or(ErrorKind::NotFound)?;
        files.insert(to.into(), file);
        Ok(())
    }

    fn sync_names(&self) -> Result<()> {
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        Ok(self.0.lock().unwrap().keys().cloned().collect())
    }

    fn lock(&mut self) -> Result<bool> {
        Ok(true)
    }
}

impl DiskFile for Kept {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<usize> {
        let files = self.files.0.lock().unwrap();
        let from = files[&self.name].get(offset as usize..).unwrap_or(&[]);
        let count = from.len().min(bytes.len());
        bytes[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<usize> {
        if !self.name.starts_with("segment") {
            let mut files = self.files.0.lock().unwrap();
            let file = files.get_mut(&self.name).ok_or(ErrorKind::NotFound)?;
            let end = offset as usize + bytes.len();
            file.resize(file.len().max(end), 0);
            file[offset as usize..end].copy_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn length(&self) -> Result<u64> {
        Ok(self.files.0.lock().unwrap()[&self.name].len() as u64)
    }

    fn allocate(&self, _: u64) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> Result<()> {
        let mut files = self.files.0.lock().unwrap();
        files.get_mut(&self.name).ok_or(ErrorKind::NotFound)?.resize(bytes as usize, 0);
        Ok(())
    }
}

/// The index of a store of small objects, from a journal that a store wrote. The segments are
/// sparse files of the right length: nothing reads them.
fn restore(objects: u64) {
    let spec = CacheSpec::uniform(BLOCK, GroupSpec::uniform(1, 1, 16, KvFormat::F16));
    let config = Configuration::new("restore", &spec, &Slice::whole(&spec)).unwrap();
    let path = folder("restore");
    // With room to spare: a full store evicts ahead of need, as many as the last batch had.
    let options = DiskOptions::new(&path, objects * 8192 + (1 << 30));
    let files = JournalOnly::default();
    let (store, _) = DiskStore::on(Box::new(files.clone()), &options, &config).unwrap();
    let object = vec![0; store.object_bytes() as usize];
    let mut outcomes = vec![Outcome::None; 256];
    for first in (0..objects).step_by(256) {
        let last = (first + 256).min(objects);
        let puts: Vec<Put> =
            (first..last).map(|n| Put { key: key(n), object: &object, label: None }).collect();
        store.put(&puts, &mut outcomes[..puts.len()]);
    }
    assert_eq!((store.used().unwrap().1, store.evicted()), (objects, 0));
    drop(store);
    let inside = path.join(config.name());
    fs::create_dir_all(&inside).unwrap();
    for (name, bytes) in files.0.lock().unwrap().iter() {
        fs::write(inside.join(name), bytes).unwrap();
        if name.starts_with("segment") {
            let file = fs::OpenOptions::new().write(true).open(inside.join(name)).unwrap();
            file.set_len(256 << 20).unwrap();
        }
    }
    let mut times: Vec<f64> = (0..5)
        .map(|_| {
            let begin = Instant::now();
            let (store, recovery) = DiskStore::open(&options, &config).unwrap();
            let time = begin.elapsed();
            assert_eq!(recovery.objects, objects);
            drop(store);
            std::thread::sleep(Duration::from_millis(10));
            time.as_secs_f64()
        })
        .collect();
    let (median, spread) = median(&mut times);
    println!(
        "opening a store of {objects} objects: {median:.3} s (p10-p90 {:.0} %)",
        spread * 100.0
    );
    let _ = fs::remove_dir_all(&path);
}
