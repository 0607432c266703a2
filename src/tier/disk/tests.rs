//! The disk store against disks that fail and power that goes, and on a real directory.

use std::collections::BTreeMap;

use super::faulty::{FaultyFiles, Trouble};
use super::write::SPARE_RECORDS;
use super::*;
use crate::dtype::KvFormat;
use crate::layout::slice::Slice;
use crate::layout::{CacheSpec, GroupSpec};
use crate::prefix::Digest;
use crate::tier::object::{self, Label, Nth, Origin};

fn config() -> Configuration {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 16, KvFormat::F16));
    Configuration::new("disk", &spec, &Slice::whole(&spec)).unwrap()
}

fn label(config: &Configuration, n: u32) -> Label {
    let tokens: Box<[u32]> = (n..n + 16).collect();
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

/// A sealed object whose payload depends on `n`.
fn sealed(config: &Configuration, n: u32) -> (Label, Vec<u8>) {
    let label = label(config, n);
    let mut object = alloc::vec![n as u8; object_bytes(config.payload_bytes()).unwrap() as usize];
    object::seal(&mut object, config, &label);
    (label, object)
}

fn options(objects: u64) -> DiskOptions {
    DiskOptions::new(Path::new("/nowhere"), objects * 8192)
}

fn open(files: &FaultyFiles, objects: u64) -> Result<(DiskStore, Recovery)> {
    DiskStore::on(Box::new(files.clone()), &options(objects), &config())
}

fn put(store: &DiskStore, config: &Configuration, numbers: &[u32]) -> Vec<Outcome> {
    let objects: Vec<_> = numbers.iter().map(|&n| sealed(config, n)).collect();
    let puts: Vec<Put> = objects
        .iter()
        .map(|(label, object)| Put { key: label.key, object, label: Some(label) })
        .collect();
    let mut outcomes = alloc::vec![Outcome::None; puts.len()];
    store.put(&puts, &mut outcomes);
    outcomes
}

/// What the store gives, where it is the object that was put.
fn get(store: &DiskStore, config: &Configuration, n: u32) -> (Outcome, bool) {
    let label = label(config, n);
    let mut object = alloc::vec![0xee; store.object_bytes() as usize];
    let mut outcome = [Outcome::None];
    store.get(&mut [Get { key: label.key, object: &mut object }], &mut outcome);
    let good = outcome[0] == Outcome::Done && object::verify(&object, config, &label).is_ok();
    (outcome[0], good)
}

/// Puts `0..puts` in groups of up to 3 into a small store, and reads between them; which objects
/// were acknowledged, in order.
fn load(store: &DiskStore, config: &Configuration, puts: u32) -> Vec<u32> {
    let mut acknowledged = Vec::new();
    let mut next = 0;
    while next < puts {
        let group: Vec<u32> = (next..puts.min(next + 1 + next % 3)).collect();
        for (outcome, n) in put(store, config, &group).iter().zip(&group) {
            if *outcome == Outcome::Done {
                acknowledged.push(*n);
            }
        }
        next += group.len() as u32;
        for n in 0..next {
            let (outcome, good) = get(store, config, n);
            assert!(outcome != Outcome::Done || good, "object {n} is wrong");
        }
        if next % 7 == 0 {
            store.remove(&[label(config, next - 1).key]);
            acknowledged.retain(|&n| n != next - 1);
        }
    }
    acknowledged
}

#[test]
fn what_was_put_is_found_and_the_oldest_go_first() {
    let (files, config) = (FaultyFiles::default(), config());
    let (store, recovery) = open(&files, 8).unwrap();
    assert_eq!(recovery, Recovery::default());
    assert_eq!(put(&store, &config, &[1, 2, 3, 2]), [Outcome::Done; 4]);
    assert_eq!(store.used(), Some((3 * 8192, 3)));
    assert_eq!(get(&store, &config, 2), (Outcome::Done, true));
    assert_eq!(get(&store, &config, 9), (Outcome::Absent, false));
    for n in 10..40 {
        assert_eq!(put(&store, &config, &[n]), [Outcome::Done]);
        assert_eq!(get(&store, &config, 1), (Outcome::Done, true), "used, and gone");
        assert!(store.used().unwrap().1 <= 8);
    }
    assert!(store.evicted() > 20);
    assert_eq!(get(&store, &config, 3), (Outcome::Absent, false));
    let mut short = [0; 100];
    let mut outcome = [Outcome::None];
    store.get(&mut [Get { key: label(&config, 1).key, object: &mut short }], &mut outcome);
    assert_eq!(outcome, [Outcome::Absent]);
    store.put(&[Put { key: ObjectKey([1; 32]), object: &short, label: None }], &mut outcome);
    assert_eq!(outcome, [Outcome::Failed]);
}

#[test]
fn making_room_for_a_batch_evicts_none_of_it() {
    let (files, config) = (FaultyFiles::default(), config());
    let (store, _) = open(&files, 8).unwrap();
    // Nine puts one by one fill the store but for the slot that is freed ahead.
    for n in 0..9 {
        assert_eq!(put(&store, &config, &[n]), [Outcome::Done]);
    }
    let oldest = (0..9).find(|&n| store.knows(&label(&config, n).key) == Some(true)).unwrap();
    // Three are new, and two have to go: not the oldest, which is used here.
    assert_eq!(put(&store, &config, &[20, 21, 22, oldest, 20]), [Outcome::Done; 5]);
    for n in [20, 21, 22, oldest] {
        assert_eq!(get(&store, &config, n), (Outcome::Done, true), "object {n}");
    }
}

#[test]
fn a_restart_finds_everything_in_the_order_of_its_use() {
    let (files, config) = (FaultyFiles::default(), config());
    let (store, _) = open(&files, 64).unwrap();
    let there = load(&store, &config, 40);
    assert!(open(&files, 64).is_err(), "the directory is in use");
    drop(store);
    let before = files.operations();
    let (store, recovery) = open(&files.after_kill(), 64).unwrap();
    assert_eq!(recovery, Recovery { objects: there.len() as u64, ..Recovery::default() });
    // Fewer reads than objects: the index comes from the journal.
    assert!(before > 40);
    for n in there {
        assert_eq!(get(&store, &config, n), (Outcome::Done, true));
    }
}

#[test]
fn the_journal_is_written_anew_when_most_of_it_is_history() {
    let (files, config) = (FaultyFiles::default(), config());
    let (store, _) = open(&files, 8).unwrap();
    for n in 0..3000 {
        assert_eq!(put(&store, &config, &[n]), [Outcome::Done]);
    }
    assert!(locked(&store.writer).journal.records() < 2 * 8 + SPARE_RECORDS + 4);
    let held = store.keys();
    let (again, recovery) = open(&files.after_power_cut(1), 8).unwrap();
    assert_eq!(recovery.objects as usize, held.len());
    assert_eq!(again.keys(), held);
}

/// Every operation of a load in turn is the last before the power goes; then, whatever part of what
/// was not flushed survives, all that was acknowledged is there and nothing is wrong.
#[test]
fn a_power_cut_at_any_operation_loses_nothing_that_was_acknowledged() {
    let config = config();
    let whole = {
        let files = FaultyFiles::default();
        let (store, _) = open(&files, 64).unwrap();
        load(&store, &config, 24);
        files.operations()
    };
    assert!(whole > 100);
    for at in 1..=whole {
        let files = FaultyFiles::default();
        files.trouble(at, Trouble::PowerCut);
        let acknowledged = match open(&files, 64) {
            Ok((store, _)) => load(&store, &config, 24),
            Err(_) => Vec::new(),
        };
        for seed in 0..3 {
            let after = files.after_power_cut(at * 7 + seed);
            let (store, recovery) = open(&after, 64).expect("the next start");
            for &n in &acknowledged {
                assert_eq!(get(&store, &config, n), (Outcome::Done, true), "cut at {at}: lost {n}");
            }
            let mut served = 0;
            for n in 0..24 {
                let (outcome, good) = get(&store, &config, n);
                assert!(outcome != Outcome::Done || good, "cut at {at}: object {n} is wrong");
                served += u64::from(good);
            }
            assert_eq!(served, recovery.objects, "cut at {at}: the index names what is not there");
            assert!(served <= acknowledged.len() as u64 + 3);
            assert_eq!(put(&store, &config, &[100]), [Outcome::Done]);
        }
    }
}

/// The same with a store that evicts all the time: what is served is right, whatever was reused.
#[test]
fn a_power_cut_while_slots_are_used_again_serves_nothing_wrong() {
    let config = config();
    for at in 1..=200 {
        let files = FaultyFiles::default();
        files.trouble(at, Trouble::PowerCut);
        let held = match open(&files, 4) {
            Ok((store, _)) => {
                let acknowledged = load(&store, &config, 30);
                let keys = store.keys();
                acknowledged
                    .into_iter()
                    .filter(|&n| keys.contains(&label(&config, n).key))
                    .collect()
            }
            Err(_) => Vec::new(),
        };
        let (store, recovery) = open(&files.after_power_cut(at), 4).expect("the next start");
        let good = |n: u32| {
            let (outcome, good) = get(&store, &config, n);
            assert!(outcome != Outcome::Done || good, "cut at {at}: object {n} is wrong");
            good
        };
        assert_eq!((0..30).filter(|&n| good(n)).count() as u64, recovery.objects);
        for n in held {
            // In the index when the power went, and not on its way out of it.
            assert!(good(n) || recovery.objects < 4, "cut at {at}: lost {n}");
        }
    }
}

#[test]
fn errors_and_full_disks_at_any_operation_are_answered_and_harm_nothing() {
    let config = config();
    for trouble in [Trouble::Full, Trouble::Broken, Trouble::Short] {
        for at in 1..=150 {
            let files = FaultyFiles::default();
            files.trouble(at, trouble);
            let Ok((store, _)) = open(&files, 16) else {
                assert!(trouble != Trouble::Short, "short counts are finished");
                continue;
            };
            let acknowledged = load(&store, &config, 20);
            if trouble == Trouble::Short {
                assert!(acknowledged.len() >= 17);
            }
            let held = store.keys();
            drop(store);
            let (store, _) = open(&files.after_kill(), 16).unwrap();
            for n in acknowledged.into_iter().filter(|&n| held.contains(&label(&config, n).key)) {
                assert_eq!(get(&store, &config, n), (Outcome::Done, true), "{trouble:?} at {at}");
            }
            for n in 0..20 {
                let (outcome, good) = get(&store, &config, n);
                assert!(outcome != Outcome::Done || good, "{trouble:?} at {at}: {n} is wrong");
            }
        }
    }
}

#[test]
fn damage_costs_what_it_touched_and_is_reported() {
    let config = config();
    let fresh = || {
        let files = FaultyFiles::default();
        let (store, _) = open(&files, 16).unwrap();
        assert_eq!(put(&store, &config, &[1, 2, 3, 4]), [Outcome::Done; 4]);
        drop(store);
        files.after_kill()
    };
    let served = |files: &FaultyFiles| {
        let (store, recovery) = open(files, 16).unwrap();
        let good: Vec<u32> = (1..=4).filter(|&n| get(&store, &config, n).1).collect();
        (good, recovery)
    };
    // The second record.
    let files = fresh();
    files.edit("journal", |bytes| bytes[64 * 2 + 20] ^= 4);
    let (good, recovery) = served(&files);
    assert_eq!((good, recovery.damaged_records, recovery.objects), (alloc::vec![1, 3, 4], 1, 3));
    // Half of the last record.
    let files = fresh();
    files.edit("journal", |bytes| bytes.truncate(64 * 5 - 30));
    let (good, recovery) = served(&files);
    assert_eq!((good, recovery.damaged_records), (alloc::vec![1, 2, 3], 1));
    // The head.
    let files = fresh();
    files.edit("journal", |bytes| bytes[17] ^= 1);
    let (good, recovery) = served(&files);
    assert!(good.is_empty() && recovery.reset);
    // An object: found, and bad for whoever verifies it.
    let files = fresh();
    files.edit("segment-0000", |bytes| bytes[8192 + 5000] ^= 1);
    assert_eq!(served(&files).0, [1, 3, 4]);
    // A segment cut short.
    let files = fresh();
    files.edit("segment-0000", |bytes| bytes.truncate(8192 * 2 + 1));
    let (good, recovery) = served(&files);
    assert_eq!((good, recovery.truncated_objects), (alloc::vec![1, 2], 2));
    // A smaller store.
    let files = fresh();
    let (store, recovery) = open(&files, 3).unwrap();
    assert_eq!((recovery.objects, recovery.excess_objects), (3, 1));
    assert_eq!(put(&store, &config, &[9]), [Outcome::Done]);
    // A larger one finds the same.
    drop(store);
    let (store, recovery) = open(&files.after_kill(), 64).unwrap();
    assert_eq!(recovery.objects, store.keys().len() as u64);
    assert!(get(&store, &config, 9).1 && recovery.damaged_records == 0);
}

#[test]
fn what_is_not_ours_is_refused() {
    let files = FaultyFiles::default();
    drop(open(&files, 16).unwrap());
    let other = files.after_kill();
    other.edit("configuration", |bytes| bytes[30] ^= 1);
    assert!(matches!(open(&other, 16), Err(Error::InvalidState { .. })));
    let newer = files.after_kill();
    newer.edit("journal", |bytes| {
        bytes[16] = 2;
        let crc = crc32c::crc32c(&bytes[4..64]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
    });
    let refused = open(&newer, 16).map(|_| ()).unwrap_err();
    assert!(alloc::format!("{refused}").contains("version"), "{refused}");
    assert!(matches!(open(&files.after_kill(), 0), Err(Error::InvalidArgument { .. })));
}

/// A directory of the system that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kvcache-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_real_directory_serves_what_was_put_directly_and_through_the_ring() {
    let (scratch, config) = (Scratch::new("disk"), config());
    let mut expected = BTreeMap::new();
    for (direct, uring) in [(false, false), (true, false), (true, true)] {
        let options =
            DiskOptions { dir: scratch.0.clone(), capacity_bytes: 1 << 20, direct, uring };
        let (store, recovery) = DiskStore::open(&options, &config).unwrap();
        assert_eq!(recovery.objects, expected.len() as u64);
        assert!(matches!(DiskStore::open(&options, &config), Err(Error::InvalidState { .. })));
        if uring && cfg!(feature = "io-uring") && !store.is_uring() {
            println!("skipped: io_uring is not to be had here");
        }
        // Alignment is what direct access needs.
        let buffers = crate::tier::buffer::Buffers::new(store.object_bytes() as usize, 40);
        let first = expected.len() as u32;
        let objects: Vec<_> = (first..first + 20)
            .map(|n| {
                let (label, object) = sealed(&config, n);
                let mut buffer = buffers.take().unwrap();
                buffer.copy_from_slice(&object);
                (label, buffer)
            })
            .collect();
        let puts: Vec<Put> = objects
            .iter()
            .map(|(label, object)| Put { key: label.key, object, label: Some(label) })
            .collect();
        let mut outcomes = alloc::vec![Outcome::None; puts.len()];
        store.put(&puts, &mut outcomes);
        assert_eq!(outcomes, [Outcome::Done; 20]);
        expected.extend((first..first + 20).map(|n| (n, ())));
        let mut read: Vec<_> =
            (0..expected.len()).map(|_| buffers.take()).collect::<Result<_>>().unwrap_or_default();
        for (n, buffer) in read.iter_mut().enumerate() {
            let label = label(&config, n as u32);
            let mut outcome = [Outcome::None];
            store.get(&mut [Get { key: label.key, object: buffer }], &mut outcome);
            assert_eq!(outcome, [Outcome::Done]);
            assert_eq!(object::verify(buffer, &config, &label), Ok(()));
        }
    }
}

#[test]
fn a_directory_that_cannot_be_is_answered_with_the_systems_words() {
    let (scratch, config) = (Scratch::new("file"), config());
    std::fs::write(&scratch.0, "a file").unwrap();
    let error = DiskStore::open(&DiskOptions::new(&scratch.0, 1 << 20), &config).unwrap_err();
    assert!(matches!(error, Error::TierFailed { os_code, .. } if os_code != 0), "{error}");
    let _ = std::fs::remove_file(&scratch.0);
}

/// Collects what is told.
#[derive(Debug, Default)]
struct Told(Mutex<Vec<ObjectKey>>);

impl Watcher for Told {
    fn changed(&self, gone: &[ObjectKey], stored: &[&Label]) {
        let mut keys = self.0.lock().unwrap();
        keys.retain(|key| !gone.contains(key));
        keys.extend(stored.iter().map(|label| label.key));
    }
}

#[test]
fn what_is_there_is_told_and_a_damaged_label_costs_only_that() {
    let (config, files) = (config(), FaultyFiles::default());
    let (store, _) = open(&files, 40).unwrap();
    put(&store, &config, &[1, 2, 3, 4, 5, 6]);
    store.remove(&[label(&config, 2).key]);
    drop(store);
    let files = files.after_kill();
    // The third slot's, whose object is still there.
    let record = 256 + 16 * 4;
    files.edit("labels", |bytes| bytes[2 * record + 200] ^= 4);
    let (store, _) = open(&files, 40).unwrap();
    let told = Arc::new(Told::default());
    assert!(store.watch(told.clone()));
    let keys = |numbers: &[u32]| -> Vec<ObjectKey> {
        numbers.iter().map(|&n| label(&config, n).key).collect()
    };
    assert_eq!(*told.0.lock().unwrap(), keys(&[1, 4, 5, 6]));
    assert_eq!(get(&store, &config, 3), (Outcome::Done, true));
    put(&store, &config, &[7]);
    store.remove(&keys(&[4]));
    assert_eq!(*told.0.lock().unwrap(), keys(&[1, 5, 6, 7]));
    for n in 100..200 {
        put(&store, &config, &[n]);
    }
    let mut told = told.0.lock().unwrap().clone();
    let mut there = store.keys();
    told.sort_unstable();
    there.sort_unstable();
    assert_eq!(told, there, "evictions are told");
}
