//! Remote tiers on real servers: Redis, started here where `redis-server` is installed, and the
//! S3-compatible store that `KVCACHE_S3` names (`s3+http://HOST:PORT/BUCKET`), both also through NIXL
//! where `KVCACHE_NIXL` names its library. `KVCACHE_REQUIRE_REMOTE=1` makes a server that is lacking a
//! failure, `KVCACHE_REQUIRE_NIXL=1` NIXL.
#![cfg(all(unix, feature = "remote"))]

mod tier_case;

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache::cache::{Demotion, KvCache, LowerTier, Progress, TierOptions};
use kvcache::tier::remote::{RemoteOptions, open};
use kvcache::tier::{Get, ObjectKey, Outcome, Put, Store, TierCounters, TierKind};
use tier_case::*;

/// A Redis server of our own, that keeps what it acknowledged; ends with this.
struct Redis {
    dir: PathBuf,
    port: u16,
    child: Child,
}

impl Redis {
    /// None where it is not installed.
    fn start(name: &str) -> Option<Self> {
        let found = Command::new("redis-server").arg("--version").stdout(Stdio::null()).status();
        if !found.is_ok_and(|status| status.success()) {
            lacking("redis-server is not installed");
            return None;
        }
        let dir = std::env::temp_dir().join(format!("kvcache-redis-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Self::spawn(&dir, port);
        let redis = Self { dir, port, child };
        redis.wait();
        Some(redis)
    }

    fn spawn(dir: &std::path::Path, port: u16) -> Child {
        Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
            .args(["--appendfsync", "no", "--unixsocket", "socket", "--port", &port.to_string()])
            .current_dir(dir)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Until it answers.
    fn wait(&self) {
        let (store, begin) = (self.store("redis"), Instant::now());
        while !store.exists(&[ObjectKey::default()], &mut [false]) {
            assert!(begin.elapsed() < LONG, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn address(&self, scheme: &str) -> String {
        match scheme {
            "redis" => format!("redis://127.0.0.1:{}", self.port),
            _ => format!("redis+unix://{}/socket", self.dir.display()),
        }
    }

    fn store(&self, scheme: &str) -> Arc<dyn Store> {
        open(&self.address(scheme), &options()).unwrap()
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = Self::spawn(&self.dir, self.port);
        self.wait();
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn lacking(what: &str) {
    lacking_unless("KVCACHE_REQUIRE_REMOTE", what);
}

fn lacking_unless(required: &str, what: &str) {
    assert!(std::env::var_os(required).is_none(), "{what}");
    println!("skipped: {what}");
}

fn options() -> RemoteOptions {
    RemoteOptions { timeout: Duration::from_secs(1), ..RemoteOptions::default() }
}

/// The address of the S3-compatible store, if there is one.
fn s3() -> Option<String> {
    let address = std::env::var("KVCACHE_S3").ok();
    if address.is_none() {
        lacking("KVCACHE_S3 names no S3-compatible store");
    }
    address
}

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

fn with_store(store: Arc<dyn Store>) -> KvCache {
    let mut cache = cache_of(&spec(), 12);
    let mut options = TierOptions::host("m", 0);
    let demotion = Demotion { on_commit: true, ..Demotion::default() };
    options.lower.push(LowerTier { store, settings: settings(TierKind::Remote), demotion });
    cache.attach_tiers(options).unwrap();
    cache
}

fn counters(cache: &KvCache) -> TierCounters {
    report(cache, TierKind::Remote).counters
}

fn object(seed: u8) -> Vec<u8> {
    (0..20_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect()
}

fn get(store: &dyn Store, key: ObjectKey, bytes: usize) -> (Outcome, Vec<u8>) {
    let (mut bytes, mut outcomes) = (vec![0; bytes], [Outcome::None]);
    store.get(&mut [Get { key, object: &mut bytes }], &mut outcomes);
    (outcomes[0], bytes)
}

/// What every store does.
fn keeps_what_it_is_given(store: &dyn Store) {
    keeps_objects(store);
    // Of another length than what is there.
    let key = ObjectKey([4; 32]);
    let object = object(4);
    let mut outcomes = [Outcome::None];
    store.put(&[Put { key, object: &object, label: None }], &mut outcomes);
    assert_eq!(get(store, key, 19_999).0, Outcome::Bad);
    assert_eq!(get(store, key, 20_001).0, Outcome::Bad);
    assert_eq!(get(store, key, 20_000), (Outcome::Done, object));
    store.remove(&[key]);
}

fn keeps_objects(store: &dyn Store) {
    let keys = [1, 2, 3].map(|n| ObjectKey([n; 32]));
    let objects = [1, 2].map(object);
    store.remove(&keys);
    let mut outcomes = [Outcome::None; 2];
    let puts: Vec<Put> =
        keys.iter().zip(&objects).map(|(&key, object)| Put { key, object, label: None }).collect();
    store.put(&puts, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Done; 2], "{store:?}");
    let mut found = [false; 3];
    assert!(store.exists(&keys, &mut found));
    assert_eq!(found, [true, true, false]);
    let mut buffers = [1, 2, 3].map(|_| vec![0; 20_000]);
    let mut gets: Vec<Get> =
        keys.iter().zip(&mut buffers).map(|(&key, object)| Get { key, object }).collect();
    let mut outcomes = [Outcome::None; 3];
    store.get(&mut gets, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Done, Outcome::Done, Outcome::Absent]);
    assert_eq!(buffers[..2], objects);
    store.remove(&keys);
    assert!(store.exists(&keys, &mut found));
    assert_eq!(found, [false; 3]);
}

/// One cache after the other over a store: the second finds what the first computed, and bytes that
/// changed in the store meanwhile are computed, and removed there.
fn serves_the_next_process(open: &dyn Fn() -> Arc<dyn Store>) {
    let (first, second) = (prompt(1, 8), prompt(2, 8));
    let mut cache = with_store(open());
    for prompt in [&first, &second] {
        assert_eq!(serve(&mut cache, prompt), (0, expected(prompt)));
    }
    assert!(cache.flush_tiers(LONG));
    assert_eq!(counters(&cache).stored, 16);
    drop(cache);

    let mut cache = with_store(open());
    prefetch(&mut cache, &first);
    assert_eq!(serve(&mut cache, &first), (8 * BLOCK, expected(&first)));
    let counted = counters(&cache);
    assert_eq!((counted.loaded, counted.bad, counted.failures), (8, 0, 0));

    // Another length, and other bytes of the same.
    let store = open();
    let parent: [_; 2] = core::array::from_fn(|at| key_of(&cache, &second, at));
    let bytes = kvcache::tier::object::object_bytes(cache.configuration().unwrap().payload_bytes());
    let (outcome, mut changed) = get(&*store, parent[1], bytes.unwrap() as usize);
    assert_eq!(outcome, Outcome::Done);
    changed[5000] ^= 1;
    let puts = [
        Put { key: parent[0], object: b"garbage", label: None },
        Put { key: parent[1], object: &changed, label: None },
    ];
    store.put(&puts, &mut [Outcome::None; 2]);
    drop(cache);
    let mut cache = with_store(open());
    prefetch(&mut cache, &second);
    assert_eq!(serve(&mut cache, &second), (0, expected(&second)));
    assert_eq!(counters(&cache).bad, 2);
    assert!(cache.flush_tiers(LONG));
    drop(cache);
    // What was computed was put there again.
    let mut cache = with_store(open());
    prefetch(&mut cache, &second);
    assert_eq!(serve(&mut cache, &second), (8 * BLOCK, expected(&second)));
    assert_eq!(counters(&cache).bad, 0);
}

/// The key of block `at` of a prompt.
fn key_of(cache: &KvCache, prompt: &[u32], at: usize) -> ObjectKey {
    use kvcache::prefix::Digest;
    let blocks = prompt.chunks_exact(BLOCK).take(at + 1);
    let digest =
        blocks.fold(None, |parent, tokens| Some(Digest::of_block(parent.as_ref(), tokens)));
    cache.configuration().unwrap().key(&digest.unwrap())
}

#[test]
fn redis_keeps_objects_and_serves_the_next_process() {
    let Some(redis) = Redis::start("serve") else { return };
    for scheme in ["redis", "redis+unix"] {
        keeps_what_it_is_given(&*redis.store(scheme));
    }
    serves_the_next_process(&|| redis.store("redis"));
}

#[test]
fn s3_keeps_objects_and_serves_the_next_process() {
    let Some(address) = s3() else { return };
    let open_s3 = || open(&address, &options()).unwrap();
    keeps_what_it_is_given(&*open_s3());
    serves_the_next_process(&open_s3);
}

/// No missing object.
#[test]
fn a_bucket_that_is_not_there_is_a_failure() {
    let Some(address) = s3() else { return };
    let none = open(&format!("{address}-none"), &options()).unwrap();
    let mut outcomes = [Outcome::None];
    none.put(&[Put { key: ObjectKey::default(), object: &object(1), label: None }], &mut outcomes);
    assert_eq!(outcomes, [Outcome::Failed]);
}

/// Through the C ABI, by address: what one cache leaves there the next one finds.
/// With `KVCACHE_S3_REFUSES` the store is one that does not take the environment's credentials.
#[test]
fn s3_with_a_wrong_secret_fails_and_is_counted() {
    let Some(address) = s3().filter(|_| std::env::var_os("KVCACHE_S3_REFUSES").is_some()) else {
        return;
    };
    let store = open(&address, &options()).unwrap();
    let key = ObjectKey([9; 32]);
    assert!(!store.exists(&[key], &mut [false]), "not found out, which is not absent");
    let mut outcomes = [Outcome::None];
    store.put(&[Put { key, object: &object(1), label: None }], &mut outcomes);
    assert_eq!((outcomes[0], get(&*store, key, 20_000).0), (Outcome::Failed, Outcome::Failed));
    let mut cache = with_store(store);
    let prompt = prompt(1, 8);
    assert_eq!(serve(&mut cache, &prompt).1, expected(&prompt));
    cache.flush_tiers(LONG);
    let counted = counters(&cache);
    assert!(counted.failures > 0 && counted.stored == 0 && counted.down, "{counted:?}");
    let refusal = report(&cache, TierKind::Remote).refusal.unwrap();
    assert!(refusal.contains("refuses the access key") && !refusal.contains("wrong"), "{refusal}");
}

#[test]
fn the_c_abi_opens_redis_by_address() {
    use kvcache::capi::*;
    use std::ptr::null_mut;
    let Some(redis) = Redis::start("capi") else { return };
    let address = std::ffi::CString::new(redis.address("redis")).unwrap();
    let tokens: Vec<u32> = (0..8 * 16 + 1).collect();
    let size = |bytes: usize| bytes as u32;
    // SAFETY: pointers are valid for what the calls are told.
    let serve = || unsafe {
        let (mut cache, mut step, mut prefetch) = (null_mut(), null_mut(), null_mut());
        let mut group: kvc_group_spec = std::mem::zeroed();
        assert_eq!(kvc_group_spec_init(&mut group, size(size_of_val(&group))), KVC_OK);
        (group.layers, group.kv_heads, group.k_dim, group.v_dim) = (1, 1, 16, 16);
        assert_eq!(kvc_cache_create(std::ptr::null(), &group, 1, &mut cache), KVC_OK);
        let mut options: kvc_tier_options = std::mem::zeroed();
        assert_eq!(kvc_tier_options_init(&mut options, size(size_of_val(&options))), KVC_OK);
        (options.model, options.on_commit) = (c"toy".as_ptr(), 1);
        (options.remote, options.remote_timeout_ms) = (address.as_ptr(), 2000);
        assert_eq!(kvc_tier_attach(cache, &options), KVC_OK);

        let (mut decision, mut done) = (std::mem::zeroed(), 0);
        let count = tokens.len() as u32;
        let at = tokens.as_ptr();
        assert_eq!(kvc_prefetch_create(cache, at, count, 0, &mut prefetch, &mut decision), KVC_OK);
        assert_eq!(kvc_prefetch_wait(cache, prefetch, 10_000, &mut done), KVC_OK);
        assert_eq!((kvc_prefetch_destroy(prefetch), done), (KVC_OK, 1));
        let (mut seq, mut cached) = (0, 0);
        assert_eq!(kvc_seq_start(cache, at, count.into(), 0, &mut seq, &mut cached), KVC_OK);
        let rest = count - cached;
        let work = kvc_work { seq, token_count: rest, tokens: at.add(cached as usize) };
        assert_eq!(kvc_step_create(&mut step), KVC_OK);
        assert_eq!(kvc_step_begin(cache, step, &work, 1), KVC_OK);
        assert_eq!(kvc_step_commit(cache, step), KVC_OK);
        assert_eq!(kvc_tier_flush(cache, 10_000, &mut done), KVC_OK);
        assert_eq!((done, kvc_step_destroy(step), kvc_cache_destroy(cache)), (1, KVC_OK, KVC_OK));
        cached
    };
    assert_eq!([serve(), serve()], [0, 8 * 16]);
}

#[test]
fn redis_killed_and_started_again_in_the_middle_of_loads() {
    let Some(mut redis) = Redis::start("kill") else { return };
    let prompts: Vec<_> = (1..=12).map(|n| prompt(n, 8)).collect();
    let mut cache = with_store(redis.store("redis"));
    for prompt in &prompts {
        serve(&mut cache, prompt);
        assert!(cache.flush_tiers(LONG));
    }
    assert_eq!(counters(&cache).stored, 96);
    drop(cache);
    let mut cache = with_store(redis.store("redis"));
    let mut whole = 0;
    for (n, prompt) in prompts.iter().enumerate() {
        let begin = Instant::now();
        let mut load = cache.prefetch(prompt, SPACE).unwrap();
        if n == 3 {
            // While its blocks are on their way, at whatever point that is.
            redis.kill();
        }
        assert_eq!(cache.wait_prefetch(&mut load, LONG), Progress::Done);
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        let (cached, out) = serve(&mut cache, prompt);
        assert_eq!(out, expected(prompt));
        whole += usize::from(cached == 8 * BLOCK);
        if n == 6 {
            assert!(counters(&cache).failures > 0 && counters(&cache).down);
            redis.restart();
            let begin = Instant::now();
            while counters(&cache).down {
                assert!(begin.elapsed() < LONG);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
    // Those before it was killed and those after it was back; the one in between as it fell.
    assert!((8..=9).contains(&whole), "{whole} prompts were found");

    // A connection that is kept while the server is started again is no failure.
    let failures = counters(&cache).failures;
    redis.kill();
    redis.restart();
    let again = prompt(1, 8);
    prefetch(&mut cache, &again);
    assert_eq!(serve(&mut cache, &again), (8 * BLOCK, expected(&again)));
    assert_eq!(counters(&cache).failures, failures);
}

#[test]
fn redis_that_stops_answering_is_waited_for_no_longer_than_said() {
    let Some(redis) = Redis::start("stop") else { return };
    let first = prompt(1, 8);
    let mut cache = with_store(redis.store("redis"));
    serve(&mut cache, &first);
    assert!(cache.flush_tiers(LONG));
    drop(cache);
    let mut cache = with_store(redis.store("redis"));
    redis.signal("-STOP");
    // The engine waits as long as it likes.
    let begin = Instant::now();
    let mut load = cache.prefetch(&first, SPACE).unwrap();
    let progress = cache.wait_prefetch(&mut load, Duration::from_millis(50));
    assert_eq!(progress, Progress::Loading);
    assert!(begin.elapsed() < Duration::from_millis(800), "{:?}", begin.elapsed());
    assert_eq!(serve(&mut cache, &first), (0, expected(&first)));
    assert_eq!(counters(&cache).timeouts, 1);
    // And the tier's threads for as long as the store was told: then it is left alone.
    let begin = Instant::now();
    while !counters(&cache).down {
        assert!(begin.elapsed() < Duration::from_secs(4));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(cache.prefetch(&prompt(2, 8), SPACE).unwrap().decision.found, 0);
    let begin = Instant::now();
    drop(cache);
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    redis.signal("-CONT");
    redis.wait();
    let mut cache = with_store(redis.store("redis"));
    prefetch(&mut cache, &first);
    assert_eq!(serve(&mut cache, &first), (8 * BLOCK, expected(&first)));
}

#[test]
fn nixl_keeps_objects_in_a_directory_and_serves_the_next_process() {
    if !nixl() {
        return;
    }
    let shared = Shared::new("serve");
    keeps_what_it_is_given(&*shared.store());
    serves_the_next_process(&|| shared.store());
    assert_eq!(shared.writing(), 0);
}

#[test]
fn nixl_says_which_files_are_damaged_missing_or_do_not_answer() {
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
fn nixl_puts_are_whole_or_not_there() {
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
fn nixl_keeps_objects_in_a_bucket_and_serves_the_next_process() {
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
fn nixl_that_cannot_be_loaded_is_said_when_a_store_is_opened() {
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
            .args(["--exact", "nixl_that_cannot_be_loaded_is_said_when_a_store_is_opened"])
            .envs([("KVCACHE_NIXL", library), (CHILD, says)])
            .stdout(Stdio::null())
            .status();
        assert!(status.unwrap().success(), "{library}");
    }
}
