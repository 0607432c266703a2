//! A Redis server of our own: killed, started again, and stopped in the middle of things.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache::cache::Progress;
use kvcache::tier::remote::open;
use kvcache::tier::{ObjectKey, Store};

use super::tier_case::*;
use super::{
    counters, keeps_what_it_is_given, lacking, options, serves_the_next_process, with_store,
};

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

#[test]
fn keeps_objects_and_serves_the_next_process() {
    let Some(redis) = Redis::start("serve") else { return };
    for scheme in ["redis", "redis+unix"] {
        keeps_what_it_is_given(&*redis.store(scheme));
    }
    serves_the_next_process(&|| redis.store("redis"));
}

/// Through the C ABI, by address: what one cache leaves there the next one finds.
#[test]
fn the_c_abi_opens_it_by_address() {
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
fn killed_and_started_again_in_the_middle_of_loads() {
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
fn that_stops_answering_is_waited_for_no_longer_than_said() {
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
