//! NIXL: a directory through its POSIX plugin, and the store of S3 through OBJ.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache::tier::remote::open;
use kvcache::tier::{Get, ObjectKey, Outcome, Put, Store};

use super::{
    get, keeps_objects, keeps_what_it_is_given, lacking_unless, object, options, s3,
    serves_the_next_process,
};

/// Whether there is NIXL's library.
fn nixl() -> bool {
    let found = std::env::var_os("KVCACHE_NIXL").is_some();
    if !found {
        lacking_unless("KVCACHE_REQUIRE_NIXL", "KVCACHE_NIXL names no library");
    }
    found
}

/// A directory that ends with this.
struct Shared(PathBuf);

impl Shared {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("kvcache-nixl-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn store(&self) -> Arc<dyn Store> {
        open(&format!("nixl+posix:{}", self.0.display()), &options()).unwrap()
    }

    fn file(&self, key: &ObjectKey) -> PathBuf {
        let hex: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
        self.0.join("kvcache").join(&hex[..2]).join(hex)
    }

    /// Files that are being written, or were.
    fn writing(&self) -> usize {
        std::fs::read_dir(self.0.join(".writing")).unwrap().count()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn keeps_objects_in_a_directory_and_serves_the_next_process() {
    if !nixl() {
        return;
    }
    let shared = Shared::new("serve");
    keeps_what_it_is_given(&*shared.store());
    serves_the_next_process(&|| shared.store());
    assert_eq!(shared.writing(), 0);
}

#[test]
fn says_which_files_are_damaged_missing_or_do_not_answer() {
    if !nixl() {
        return;
    }
    let shared = Shared::new("faults");
    let store = shared.store();
    let keys = [1, 2, 3, 4].map(|n| ObjectKey([n; 32]));
    let objects = [1, 2, 3, 4].map(object);
    let puts: Vec<Put> =
        keys.iter().zip(&objects).map(|(&key, object)| Put { key, object, label: None }).collect();
    let mut outcomes = [Outcome::None; 4];
    store.put(&puts, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Done; 4]);
    let truncated = std::fs::File::options().write(true).open(shared.file(&keys[1])).unwrap();
    truncated.set_len(1000).unwrap();
    std::fs::remove_file(shared.file(&keys[2])).unwrap();
    let mut buffers = [(); 4].map(|()| vec![0; 20_000]);
    let mut gets: Vec<Get> =
        keys.iter().zip(&mut buffers).map(|(&key, object)| Get { key, object }).collect();
    store.get(&mut gets, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Done, Outcome::Bad, Outcome::Absent, Outcome::Done]);
    assert_eq!((&buffers[0], &buffers[3]), (&objects[0], &objects[3]));

    // A file that is not opened before somebody writes it, as on a server that hangs.
    let slow = shared.file(&keys[3]);
    std::fs::remove_file(&slow).unwrap();
    assert!(Command::new("mkfifo").arg(&slow).status().unwrap().success());
    let begin = Instant::now();
    assert_eq!(get(&*store, keys[3], 20_000).0, Outcome::Failed);
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert_eq!(get(&*store, keys[0], 20_000), (Outcome::Done, objects[0].clone()));
    // It goes on with the pipe, which is no file: nobody asks any more.
    drop(std::fs::File::options().write(true).open(&slow).unwrap());
    store.remove(&keys);
    assert!(!slow.exists());

    // Gone as a whole, and there again.
    std::fs::remove_dir_all(&shared.0).unwrap();
    std::fs::write(&shared.0, "no directory").unwrap();
    store.put(&puts, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Failed; 4]);
    assert_ne!(get(&*store, keys[0], 20_000).0, Outcome::Done);
    let missing = open(&format!("nixl+posix:{}", shared.0.display()), &options());
    assert!(missing.unwrap_err().to_string().contains("directory"));
    std::fs::remove_file(&shared.0).unwrap();
    std::fs::create_dir(&shared.0).unwrap();
    keeps_what_it_is_given(&*store);
}

/// Readers see one of the objects that writers put there, never parts of two or of one.
#[test]
fn puts_are_whole_or_not_there() {
    if !nixl() {
        return;
    }
    let shared = Shared::new("atomic");
    let key = ObjectKey([7; 32]);
    let objects: Vec<Vec<u8>> = (0..4u8).map(|n| vec![n; 300_000]).collect();
    let (store, other) = (shared.store(), shared.store());
    let writing = std::sync::atomic::AtomicBool::new(true);
    let seen = std::thread::scope(|scope| {
        let readers: Vec<_> = [&store, &other]
            .map(|store| {
                let writing = &writing;
                scope.spawn(move || {
                    let mut seen = 0;
                    while writing.load(std::sync::atomic::Ordering::Relaxed) || seen == 0 {
                        match get(&**store, key, 300_000) {
                            (Outcome::Absent, _) => {}
                            (Outcome::Done, bytes) => {
                                assert!(bytes.iter().all(|&byte| byte == bytes[0]));
                                seen += 1;
                            }
                            (outcome, _) => panic!("{outcome:?}"),
                        }
                    }
                    seen
                })
            })
            .into();
        let writers: Vec<_> = objects
            .iter()
            .map(|object| {
                let store = &store;
                scope.spawn(move || {
                    for _ in 0..50 {
                        let mut outcomes = [Outcome::None];
                        store.put(&[Put { key, object, label: None }], &mut outcomes);
                        assert_eq!(outcomes, [Outcome::Done]);
                    }
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        writing.store(false, std::sync::atomic::Ordering::Relaxed);
        readers.into_iter().map(|reader| reader.join().unwrap()).sum::<usize>()
    });
    assert!(seen > 0);
    assert_eq!(shared.writing(), 0);
}

#[test]
fn keeps_objects_in_a_bucket_and_serves_the_next_process() {
    let Some(address) = s3().filter(|_| nixl()) else { return };
    let open_s3 = || open(&format!("nixl+{address}"), &options()).unwrap();
    keeps_objects(&*open_s3());
    serves_the_next_process(&open_s3);
    // Where there is no bucket, and no server.
    for address in [format!("nixl+{address}-none"), "nixl+s3+http://127.0.0.1:1/kv".into()] {
        let none = open(&address, &options()).unwrap();
        let (key, begin) = (ObjectKey::default(), Instant::now());
        let mut outcomes = [Outcome::None];
        none.put(&[Put { key, object: &object(1), label: None }], &mut outcomes);
        assert_eq!(outcomes, [Outcome::Failed], "{address}");
        assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    }
}

/// In processes of their own: what is loaded stays.
#[test]
fn that_cannot_be_loaded_is_said_when_a_store_is_opened() {
    const CHILD: &str = "KVCACHE_TEST_NIXL_SAYS";
    let shared = Shared::new("missing");
    if let Ok(says) = std::env::var(CHILD) {
        let error = open(&format!("nixl+posix:{}", shared.0.display()), &options()).unwrap_err();
        assert_eq!(error.status(), kvcache::Status::TierFailed);
        assert!(error.to_string().contains(&says), "{error}");
        return;
    }
    let not_nixl = shared.0.join("libnixl_capi.so");
    std::fs::write(&not_nixl, "no library").unwrap();
    for (library, says) in [
        ("/nowhere/libnixl_capi.so", "loading NIXL's libnixl_capi.so, which KVCACHE_NIXL names"),
        (not_nixl.to_str().unwrap(), "loading NIXL's libnixl_capi.so"),
        // One that is another.
        ("libc.so.6", "finding NIXL's calls"),
    ] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "nixl::that_cannot_be_loaded_is_said_when_a_store_is_opened"])
            .envs([("KVCACHE_NIXL", library), (CHILD, says)])
            .stdout(Stdio::null())
            .status();
        assert!(status.unwrap().success(), "{library}");
    }
}
