//! The Redis tier beside a bare client: seconds an object through the tier (queues, threads,
//! checksums and all) and through `redis-benchmark`, Redis's own client in C, on the same server over
//! the same socket, in rounds that alternate.
//!
//! Both send 16 commands at a time over one connection, to as many keys as there are objects; the bare
//! client draws its keys, so that it sets some of them twice and gets some that are not there, and it
//! throws away what it gets. Its rate is coarse where few objects go.
//! Needs `redis-server` and `redis-benchmark`;
//! without them it says so and measures nothing. With `--test` what is printed means nothing.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvcache::dtype::KvFormat;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::Digest;
use kvcache::tier::buffer::Buffers;
use kvcache::tier::object::{HEAD_BYTES, Label, Nth, Origin, object_bytes};
use kvcache::tier::remote::{RemoteOptions, open};
use kvcache::tier::{Configuration, HostBlock, ObjectKey, Tier, TierKind, TierSettings, Want};

const PIPELINE: usize = 16;
const LONG: Duration = Duration::from_secs(60);

struct Redis {
    dir: PathBuf,
    child: Child,
}

impl Redis {
    fn start() -> Option<Self> {
        let dir = std::env::temp_dir().join(format!("kvcache-bench-redis-{}", std::process::id()));
        std::fs::create_dir_all(&dir).ok()?;
        let child = Command::new("redis-server")
            .args(["--port", "0", "--unixsocket", "socket", "--save", ""])
            .current_dir(&dir)
            .stdout(Stdio::null())
            .spawn()
            .ok()?;
        let redis = Self { dir, child };
        let store = open(&redis.address(), &RemoteOptions::default()).unwrap();
        let begin = Instant::now();
        while !store.exists(&[ObjectKey::default()], &mut [false]) {
            assert!(begin.elapsed() < LONG, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(redis)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("socket")
    }

    fn address(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Seconds an object of `bytes` bytes takes `redis-benchmark`: puts, gets.
fn bare(socket: &Path, bytes: usize, objects: usize) -> Option<[f64; 2]> {
    let output = Command::new("redis-benchmark")
        .arg("-s")
        .arg(socket)
        .args(["-t", "set,get", "-c", "1", "--csv"])
        .args(["-P", &PIPELINE.to_string(), "-d", &bytes.to_string(), "-n", &objects.to_string()])
        .args(["-r", &objects.to_string()])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let rate = |name: &str| -> Option<f64> {
        let line = text.lines().find(|line| line.starts_with(&format!("\"{name}\"")))?;
        line.split(',').nth(1)?.trim_matches('"').parse().ok()
    };
    Some([1.0 / rate("SET")?, 1.0 / rate("GET")?])
}

fn median(times: &mut [f64]) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    (at(0.5), (at(0.9) - at(0.1)) / at(0.5))
}

fn measure(redis: &Redis, layers: u32, objects: usize, rounds: usize) {
    let spec = CacheSpec::uniform(16, GroupSpec::uniform(layers, 8, 64, KvFormat::F16));
    let config = Configuration::new("bench", &spec, &Slice::whole(&spec)).unwrap();
    let bytes = object_bytes(config.payload_bytes()).unwrap() as usize;
    let buffers = Buffers::new(bytes, objects * 2);
    let settings =
        TierSettings { kind: TierKind::Remote, readers: 1, writers: 1, queued_blocks: objects };
    let store = open(&redis.address(), &RemoteOptions::default()).unwrap();
    let label = |n: usize| {
        let tokens: Box<[u32]> = (0..16).map(|t| (n * 16 + t) as u32).collect();
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
    };
    let mut times: [Vec<f64>; 4] = Default::default();
    for round in 0..rounds + 1 {
        // One that has seen nothing yet; the connection is kept.
        let tier = Tier::new(store.clone(), config.clone(), buffers.clone(), settings).unwrap();
        let labels: Vec<Label> = (0..objects).map(label).collect();
        let blocks: Vec<_> = labels
            .iter()
            .map(|label| {
                let mut buffer = buffers.take().unwrap();
                buffer[HEAD_BYTES..].fill(0x5a);
                std::sync::Arc::new(HostBlock { label: label.clone(), buffer })
            })
            .collect();
        let begin = Instant::now();
        for block in blocks {
            assert!(tier.put(block));
        }
        assert!(tier.flush(LONG));
        let put = begin.elapsed().as_secs_f64() / objects as f64;
        let wants: Vec<Want> =
            labels.into_iter().enumerate().map(|(at, label)| Want { at, label }).collect();
        let begin = Instant::now();
        let ticket = tier.load(wants);
        assert!(ticket.wait(LONG));
        let get = begin.elapsed().as_secs_f64() / objects as f64;
        assert_eq!(ticket.take().0.len(), objects);
        let Some([bare_put, bare_get]) = bare(&redis.socket(), bytes, objects) else {
            println!(
                "redis-benchmark is not here, or says something else: nothing to compare with"
            );
            return;
        };
        // The first is to warm up.
        if round > 0 {
            for (times, time) in times.iter_mut().zip([put, bare_put, get, bare_get]) {
                times.push(time);
            }
        }
    }
    println!("objects of {} KiB, {objects} a round, {rounds} rounds", bytes / 1024);
    for (name, pair) in ["put", "get"].iter().zip(times.chunks_mut(2)) {
        let [ours, theirs] = pair else { unreachable!("two of each") };
        let ((ours, spread), (theirs, their_spread)) = (median(ours), median(theirs));
        println!(
            "  {name}  tier {:8.1} us (p10-p90 {:2.0} %)   bare client {:8.1} us ({:2.0} %)   {:.2} times",
            ours * 1e6,
            spread * 100.0,
            theirs * 1e6,
            their_spread * 100.0,
            ours / theirs
        );
    }
}

fn main() {
    let test = std::env::args().any(|word| word == "--test");
    let Some(redis) = Redis::start() else {
        println!("redis-server is not here: nothing measured");
        return;
    };
    // 36 KiB, 260 KiB, 1 MiB, 2 MiB.
    for (layers, objects) in [(1, 2048), (8, 256), (32, 128), (64, 64)] {
        let objects = if test { 32 } else { objects };
        measure(&redis, layers, objects, if test { 1 } else { 12 });
    }
}
