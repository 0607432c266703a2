//! A process that writes to a disk tier is killed, again and again, at random points; each next
//! start is checked against a log of what was acknowledged. Nothing that was acknowledged is lost,
//! nothing wrong is ever served.
//!
//! `KVCACHE_CRASHES` says how often (default 20). The child is this test program itself.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kvcache::dtype::KvFormat;
use kvcache::ids::TokenId;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::Digest;
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::object::{self, Label};
use kvcache::tier::{Configuration, Get, Outcome, Put, Store};

const DIR: &str = "KVCACHE_CRASH_DIR";
/// Slots of the store: fewer than objects, so that slots are used again all the time.
const SLOTS: u64 = 100;
const OBJECTS: u32 = 150;
/// More than may be evicted ahead of need.
const GROUP: usize = 7;

fn config() -> Configuration {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(2, 4, 64, KvFormat::F16));
    Configuration::new("crash", &spec, &Slice::whole(&spec)).unwrap()
}

fn label(config: &Configuration, n: u32) -> Label {
    let tokens: Box<[TokenId]> = (n * 100..n * 100 + 16).collect();
    let block = Digest::of_block(None, &tokens);
    Label { key: config.key(&block), block, parent: None, keys: None, tokens }
}

fn fill(config: &Configuration, n: u32, object: &mut [u8]) -> Label {
    for (at, byte) in object.iter_mut().enumerate() {
        *byte = (n as usize * 31 + at / 64) as u8;
    }
    let label = label(config, n);
    object::seal(object, config, &label);
    label
}

fn open(dir: &Path) -> (DiskStore, kvcache::tier::disk::Recovery) {
    let config = config();
    let bytes = object::object_bytes(config.payload_bytes()).unwrap();
    let mut options = DiskOptions::new(dir, SLOTS * bytes);
    // Buffers of a test are not aligned to pages.
    options.direct = false;
    DiskStore::open(&options, &config).unwrap()
}

fn log_of(dir: &Path) -> PathBuf {
    dir.join("log")
}

/// The child: puts objects for ever, and logs each that was acknowledged. The log is written with
/// one call a line and survives the process.
#[test]
fn writer() {
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    let (config, (store, _)) = (config(), open(&dir));
    let mut log = OpenOptions::new().append(true).create(true).open(log_of(&dir)).unwrap();
    let bytes = store.object_bytes() as usize;
    let mut objects = vec![vec![0u8; bytes]; GROUP];
    let mut n = std::process::id();
    loop {
        let count = 1 + n as usize % GROUP;
        let group: Vec<(u32, Label)> = objects[..count]
            .iter_mut()
            .map(|object| {
                n = n.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                let number = (n >> 8) % OBJECTS;
                (number, fill(&config, number, object))
            })
            .collect();
        let puts: Vec<Put> = group
            .iter()
            .zip(&objects)
            .map(|((_, label), object)| Put { key: label.key, object })
            .collect();
        let new: Vec<bool> = puts.iter().map(|put| store.knows(&put.key) == Some(false)).collect();
        let mut outcomes = vec![Outcome::None; count];
        store.put(&puts, &mut outcomes);
        for ((number, _), (outcome, new)) in group.iter().zip(outcomes.into_iter().zip(new)) {
            assert_eq!(outcome, Outcome::Done);
            // One that was there is as old as it was, as far as the next start knows; until then it
            // is used, which leaves less room for those that are not.
            let line = if new { format!("{number}\n") } else { "used\n".to_string() };
            log.write_all(line.as_bytes()).unwrap();
        }
    }
}

/// Acknowledged objects, each with how many were acknowledged or used after its last time.
fn acknowledged(dir: &Path) -> BTreeMap<u32, usize> {
    let mut text = String::new();
    std::fs::File::open(log_of(dir)).unwrap().read_to_string(&mut text).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect();
    let last = lines.len();
    let new = |(at, line): (usize, &&str)| Some((line.trim().parse().ok()?, last - at));
    lines.iter().enumerate().filter_map(new).collect()
}

#[test]
fn a_killed_writer_loses_nothing_that_was_acknowledged() {
    if std::env::var_os(DIR).is_some() {
        return;
    }
    let crashes = std::env::var("KVCACHE_CRASHES").map_or(20, |text| text.parse().unwrap());
    let dir = std::env::temp_dir().join(format!("kvcache-crash-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    let config = config();
    let (mut served, mut damaged) = (0, 0);
    for crash in 0..crashes {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--nocapture"])
            .env(DIR, &dir)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Until it writes, and then a while that is another each time.
        let before = std::fs::metadata(log_of(&dir)).map_or(0, |log| log.len());
        let begin = Instant::now();
        while std::fs::metadata(log_of(&dir)).map_or(0, |log| log.len()) == before {
            assert!(begin.elapsed() < Duration::from_secs(120), "the child does not write");
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(u64::from(crash as u32 * 7919 % 60) * 1000));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        // A put that is refused ends the writer before it is killed: nothing is lost, but it is told.
        if let Some(status) = ended {
            eprintln!("crash {crash}: the writer ended by itself: {status}");
        }

        let (store, recovery) = open(&dir);
        damaged += recovery.damaged_records;
        let log = acknowledged(&dir);
        let mut object = vec![0u8; store.object_bytes() as usize];
        for number in 0..OBJECTS {
            let label = label(&config, number);
            let mut outcome = [Outcome::None];
            store.get(&mut [Get { key: label.key, object: &mut object }], &mut outcome);
            let there = outcome[0] == Outcome::Done;
            if there {
                assert_eq!(object::verify(&object, &config, &label), Ok(()), "object {number}");
                served += 1;
            }
            // Whatever fits since it was acknowledged, with room for what is evicted ahead and for
            // the groups that were under way, cannot have pushed it out.
            let recent = log.get(&number).is_some_and(|&after| after < SLOTS as usize / 2);
            assert!(there || !recent, "crash {crash}: acknowledged object {number} is lost");
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
    assert!(served > 0);
    println!("{crashes} crashes, {served} objects read back, {damaged} damaged records left out");
}
