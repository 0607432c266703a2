//! A process that writes to a disk tier is killed, again and again, at random points. It logs each
//! group before it puts it and after it was acknowledged, and a model says what each put evicts: the
//! next start must find exactly what the model holds after the acknowledged groups, and of the one
//! that was under way what a beginning of its journal records leaves. So nothing that was
//! acknowledged is lost but to the store's own order of eviction, and nothing wrong is ever served.
//! While it lives, the writer compares the store with the model after each group, order and all.
//!
//! `KVCACHE_CRASHES` says how often (default 20). The child is this test program itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kvcache::dtype::KvFormat;
use kvcache::ids::TokenId;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::Digest;
use kvcache::tier::buffer::{Buffer, Buffers};
use kvcache::tier::disk::{DiskOptions, DiskStore, Recovery};
use kvcache::tier::object::{self, Label, Nth, Origin};
use kvcache::tier::{Configuration, Get, ObjectKey, Outcome, Put, Store};

const DIR: &str = "KVCACHE_CRASH_DIR";
/// Slots of the store: fewer than objects, so that slots are used again all the time.
const SLOTS: usize = 100;
const OBJECTS: u32 = 150;
/// The most objects of one put.
const GROUP: usize = 7;

fn config() -> Configuration {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(2, 4, 64, KvFormat::F16));
    Configuration::new("crash", &spec, &Slice::whole(&spec)).unwrap()
}

fn label(config: &Configuration, n: u32) -> Label {
    let tokens: Box<[TokenId]> = (n * 100..n * 100 + 16).collect();
    let block = Digest::of_block(None, &tokens);
    Label {
        key: config.key(&block),
        block,
        parent: None,
        keys: None,
        tokens,
        origin: Origin::default(),
        nth: Nth::ONLY,
    }
}

fn fill(config: &Configuration, n: u32, object: &mut [u8]) -> Label {
    for (at, byte) in object.iter_mut().enumerate() {
        *byte = (n as usize * 31 + at / 64) as u8;
    }
    let label = label(config, n);
    object::seal(object, config, &label);
    label
}

fn open(dir: &Path) -> (DiskStore, Recovery) {
    let config = config();
    let bytes = object::object_bytes(config.payload_bytes()).unwrap();
    DiskStore::open(&DiskOptions::new(dir, SLOTS as u64 * bytes), &config).unwrap()
}

/// Buffers for objects, aligned as direct access needs them.
fn buffers(store: &DiskStore, count: usize) -> Vec<Buffer> {
    let pool = Buffers::new(store.object_bytes() as usize, count);
    (0..count).map(|_| pool.take().unwrap()).collect()
}

/// The number of each object's key.
fn numbers(config: &Configuration) -> BTreeMap<ObjectKey, u32> {
    (0..OBJECTS).map(|n| (label(config, n).key, n)).collect()
}

/// What a store holds, the least recently used first.
fn held(store: &DiskStore, numbers: &BTreeMap<ObjectKey, u32>) -> Vec<u32> {
    store.keys().iter().map(|key| numbers[key]).collect()
}

/// A record of the journal.
#[derive(Clone, Copy)]
enum Change {
    Removed(u32),
    Put(u32),
}

/// What the store holds by its own rules, the least recently used first.
struct Model(Vec<u32>);

impl Model {
    /// One put of a group, all of it done: what it writes to the journal, in order. What is there is
    /// used; room for the others is made from the oldest end, then room for as many as the group has
    /// once more, ahead of need.
    fn put(&mut self, group: &[u32]) -> Vec<Change> {
        let Model(order) = self;
        let mut new: Vec<u32> = Vec::new();
        for &n in group {
            if let Some(at) = order.iter().position(|&held| held == n) {
                let used = order.remove(at);
                order.push(used);
            } else if !new.contains(&n) {
                new.push(n);
            }
        }
        let needed = new.len().saturating_sub(SLOTS - order.len());
        let free = SLOTS - order.len() + needed - new.len();
        let ahead = group.len().min(SLOTS / 4).saturating_sub(free);
        let mut changes: Vec<Change> = order.drain(..needed + ahead).map(Change::Removed).collect();
        changes.extend(new.iter().map(|&n| Change::Put(n)));
        order.extend(new);
        changes
    }
}

fn log_of(dir: &Path) -> PathBuf {
    dir.join("log")
}

fn line(word: &str, numbers: &[u32]) -> String {
    let numbers: String = numbers.iter().map(|n| format!(" {n}")).collect();
    format!("{word}{numbers}\n")
}

/// The child: puts objects for ever, and logs each group before and after. The log is written with
/// one call a line and survives the process.
#[test]
fn writer() {
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    let (config, (store, _)) = (config(), open(&dir));
    let numbers = numbers(&config);
    let mut model = Model(held(&store, &numbers));
    let mut log = OpenOptions::new().append(true).create(true).open(log_of(&dir)).unwrap();
    let mut say = |line: String| log.write_all(line.as_bytes()).unwrap();
    say(line("held", &model.0));
    let mut objects = buffers(&store, GROUP);
    let (mut n, mut evicted) = (std::process::id(), 0);
    loop {
        let count = 1 + n as usize % GROUP;
        let mut group = Vec::new();
        let mut labels = Vec::new();
        for object in &mut objects[..count] {
            n = n.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            group.push((n >> 8) % OBJECTS);
            labels.push(fill(&config, group[group.len() - 1], object));
        }
        let puts: Vec<Put> = labels
            .iter()
            .zip(&objects)
            .map(|(label, object)| Put { key: label.key, object, label: Some(label) })
            .collect();
        let mut outcomes = vec![Outcome::None; count];
        say(line("put", &group));
        store.put(&puts, &mut outcomes);
        assert_eq!(outcomes, vec![Outcome::Done; count], "{group:?} into {:?}", model.0);
        say(line("done", &[]));
        let changes = model.put(&group);
        evicted += changes.iter().filter(|change| matches!(change, Change::Removed(_))).count();
        assert_eq!(held(&store, &numbers), model.0, "after {group:?}");
        assert_eq!(store.evicted(), evicted as u64);
    }
}

/// What a writer's part of the log says: its model after the acknowledged groups, the records of the
/// group that was under way, and how many were evicted.
fn replay(text: &str, before: &[u32]) -> (Model, Vec<Change>, usize) {
    let mut model = Model(before.to_vec());
    let (mut under_way, mut evicted) = (None, 0);
    // A line that was cut off was not followed by anything.
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let mut words = line.split_whitespace();
        let word = words.next().unwrap();
        let numbers: Vec<u32> = words.map(|word| word.parse().unwrap()).collect();
        match word {
            "held" => assert_eq!(numbers, before, "two starts found something else"),
            "put" => under_way = Some(numbers),
            "done" => {
                let changes = model.put(&under_way.take().unwrap());
                evicted += changes.iter().filter(|c| matches!(c, Change::Removed(_))).count();
            }
            word => panic!("{word} in the log"),
        }
    }
    let rest = under_way.map(|group| Model(model.0.clone()).put(&group)).unwrap_or_default();
    (model, rest, evicted)
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
    let numbers = numbers(&config);
    if cfg!(feature = "io-uring") && !open(&dir).0.is_uring() {
        println!("skipped: io_uring is not to be had here, plain calls are tested");
    }
    let mut before: Vec<u32> = Vec::new();
    let (mut served, mut damaged, mut evicted, mut inside) = (0, 0, 0, 0);
    for crash in 0..crashes {
        let length = || std::fs::metadata(log_of(&dir)).map_or(0, |log| log.len());
        let (begin, already) = (Instant::now(), length());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer", "--nocapture"])
            .env(DIR, &dir)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Until it writes, and then a while that is another each time; each eighth is killed
        // wherever it is, be it while it starts.
        while crash % 8 != 7 && length() == already && child.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < Duration::from_secs(120), "the child does not write");
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(u64::from(crash as u32 * 7919 % 60) * 1000));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "the writer ended by itself: {status}");

        let (store, recovery) = open(&dir);
        damaged += recovery.damaged_records;
        let now = held(&store, &numbers);
        let mut text = String::new();
        if let Ok(mut log) = std::fs::File::open(log_of(&dir)) {
            log.seek(SeekFrom::Start(already)).unwrap();
            log.read_to_string(&mut text).unwrap();
        }
        let (model, under_way, gone) = replay(&text, &before);
        evicted += gone;
        let found: BTreeSet<u32> = now.iter().copied().collect();
        let mut expected: BTreeSet<u32> = model.0.iter().copied().collect();
        let mut changes = under_way.iter();
        while expected != found {
            match changes.next() {
                Some(Change::Removed(n)) => expected.remove(n),
                Some(Change::Put(n)) => expected.insert(*n),
                None => {
                    let model: BTreeSet<u32> = model.0.into_iter().collect();
                    let lost: Vec<_> = model.difference(&found).collect();
                    let strange: Vec<_> = found.difference(&model).collect();
                    panic!("crash {crash}: {lost:?} lost, {strange:?} from nowhere");
                }
            };
        }
        inside += usize::from(!under_way.is_empty());

        let mut object = buffers(&store, 1).remove(0);
        for number in 0..OBJECTS {
            let label = label(&config, number);
            let mut outcome = [Outcome::None];
            store.get(&mut [Get { key: label.key, object: &mut object }], &mut outcome);
            let there = outcome[0] == Outcome::Done;
            assert_eq!(there, found.contains(&number), "object {number}: {outcome:?}");
            if there {
                assert_eq!(object::verify(&object, &config, &label), Ok(()), "object {number}");
                served += 1;
            }
        }
        before = now;
    }
    let _ = std::fs::remove_dir_all(&dir);
    assert!(served > 0 && (evicted > 0 || crashes < 20));
    println!(
        "{crashes} crashes, {inside} of them inside a put: {served} objects read back, {evicted} \
         evicted as the model has it, {damaged} damaged records left out"
    );
}
