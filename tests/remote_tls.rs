//! Remote stores over TLS, and what is said of one that refuses: Redis with TLS and a password, and the
//! S3-compatible store that `KVCACHE_S3` names behind a proxy that speaks TLS, with a certificate of an
//! authority that the test makes. Needs `redis-server` (with TLS), `openssl` and `socat`; without them
//! it says so, and `KVCACHE_REQUIRE_REMOTE=1` makes that a failure.
//!
//! Whom a process trusts its environment says, so that each part runs in a process of its own.
#![cfg(all(unix, feature = "remote-tls"))]

use std::ffi::CString;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache::tier::remote::{RemoteOptions, open};
use kvcache::tier::{Get, ObjectKey, Outcome, Put, Store};

const SECRET: &str = "hunter2-of-the-fleet";
const LONG: Duration = Duration::from_secs(20);

fn store(address: &str) -> Arc<dyn Store> {
    let options = RemoteOptions { timeout: Duration::from_secs(2), ..RemoteOptions::default() };
    open(address, &options).unwrap()
}

/// Puts objects and gets them: a small one and one of many TLS records.
fn keeps_objects(store: &dyn Store) {
    let objects: Vec<Vec<u8>> = [4096usize, 1 << 20, 5]
        .map(|bytes| (0..bytes).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect())
        .into();
    let keys = [1, 2, 3].map(|n| ObjectKey([n; 32]));
    let puts: Vec<Put> =
        keys.iter().zip(&objects).map(|(&key, object)| Put { key, object, label: None }).collect();
    let mut outcomes = [Outcome::None; 3];
    store.put(&puts, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Done; 3], "{store:?}");
    assert_eq!(store.refusal(), None);
    for _ in 0..3 {
        let mut buffers: Vec<Vec<u8>> =
            objects.iter().map(|object| vec![0; object.len()]).collect();
        let mut gets: Vec<Get> =
            keys.iter().zip(&mut buffers).map(|(&key, object)| Get { key, object }).collect();
        store.get(&mut gets, &mut outcomes);
        assert_eq!((outcomes, &buffers), ([Outcome::Done; 3], &objects));
    }
    store.remove(&keys);
    let mut found = [true; 3];
    assert!(store.exists(&keys, &mut found));
    assert_eq!(found, [false; 3]);
}

/// Every call fails, and what is said of it has `words` in it and no secret.
fn refuses(address: &str, words: &str) {
    let store = store(address);
    let key = ObjectKey([9; 32]);
    let mut outcomes = [Outcome::None];
    assert!(!store.exists(&[key], &mut [false]));
    store.put(&[Put { key, object: &[1; 5000], label: None }], &mut outcomes);
    assert_eq!(outcomes, [Outcome::Failed]);
    store.get(&mut [Get { key, object: &mut [0; 5000] }], &mut outcomes);
    assert_eq!(outcomes, [Outcome::Failed]);
    let refusal = store.refusal().expect(address);
    assert!(refusal.contains(words), "{refusal}");
    for shown in [refusal.to_string(), format!("{store:?}")] {
        assert!(!shown.contains(SECRET) && !shown.contains("wrong-one"), "{shown}");
    }
    told_through_the_c_abi(address, words);
}

/// By the call that waits for demotions.
fn told_through_the_c_abi(address: &str, words: &str) {
    use kvcache::capi::*;
    use std::ptr::null_mut;
    let address = CString::new(address).unwrap();
    let tokens: Vec<u32> = (0..33).collect();
    // SAFETY: pointers are valid for what the calls are told.
    unsafe {
        let (mut cache, mut step) = (null_mut(), null_mut());
        let mut group: kvc_group_spec = std::mem::zeroed();
        assert_eq!(kvc_group_spec_init(&mut group, size_of_val(&group) as u32), KVC_OK);
        (group.layers, group.kv_heads, group.k_dim, group.v_dim) = (1, 1, 16, 16);
        assert_eq!(kvc_cache_create(std::ptr::null(), &group, 1, &mut cache), KVC_OK);
        let mut options: kvc_tier_options = std::mem::zeroed();
        assert_eq!(kvc_tier_options_init(&mut options, size_of_val(&options) as u32), KVC_OK);
        (options.model, options.on_commit) = (c"toy".as_ptr(), 1);
        (options.remote, options.remote_timeout_ms) = (address.as_ptr(), 2000);
        assert_eq!(kvc_tier_attach(cache, &options), KVC_OK);
        let (mut seq, mut cached, mut done) = (0, 0, 7);
        let at = tokens.as_ptr();
        assert_eq!(kvc_seq_start(cache, at, 33, 0, &mut seq, &mut cached), KVC_OK);
        let work = kvc_work { seq, token_count: 33, tokens: at };
        assert_eq!(kvc_step_create(&mut step), KVC_OK);
        assert_eq!(kvc_step_begin(cache, step, &work, 1), KVC_OK);
        assert_eq!(kvc_step_commit(cache, step), KVC_OK);
        assert_eq!(kvc_tier_flush(cache, 10_000, &mut done), KVC_ERR_TIER_FAILED);
        assert_eq!(done, 7, "written on success only");
        let mut text = vec![0u8; 500];
        let bytes = kvc_last_error(text.as_mut_ptr().cast(), 500) as usize;
        let text = String::from_utf8_lossy(&text[..bytes]);
        assert!(text.contains(words) && text.contains("failed"), "{text}");
        assert!(!text.contains(SECRET) && !text.contains("wrong-one"), "{text}");
        assert_eq!((kvc_step_destroy(step), kvc_cache_destroy(cache)), (KVC_OK, KVC_OK));
    }
}

/// What a process of its own does.
fn child(part: &str, redis: u16, s3: Option<String>) {
    let at = format!("127.0.0.1:{redis}");
    match part {
        "trusts" => {
            keeps_objects(&*store(&format!("rediss://:{SECRET}@{at}/3")));
            keeps_objects(&*store(&format!("rediss://:{SECRET}@localhost:{redis}")));
            refuses(&format!("rediss://:wrong-one@{at}"), "refuses the user or the password");
            refuses(&format!("rediss://nobody:{SECRET}@{at}"), "refuses the user or the password");
            refuses(&format!("rediss://{at}"), "wants a password");
            // Neither side understands the other; each call ends all the same.
            let plain = store(&format!("redis://:{SECRET}@{at}"));
            assert!(!plain.exists(&[ObjectKey::default()], &mut [false]));
            let Some(s3) = s3 else { return };
            keeps_objects(&*store(&s3));
            let no_bucket = format!("{s3}-none");
            let (none, key) = (store(&no_bucket), ObjectKey([9; 32]));
            let mut outcomes = [Outcome::None];
            none.put(&[Put { key, object: &[1; 5000], label: None }], &mut outcomes);
            none.get(&mut [Get { key, object: &mut [0; 5000] }], &mut outcomes);
            assert_eq!(outcomes, [Outcome::Absent]);
            assert!(none.refusal().unwrap().contains("has no such bucket"));
            told_through_the_c_abi(&no_bucket, "has no such bucket");
            if std::env::var_os("KVCACHE_NIXL").is_some() {
                keeps_objects(&*store(&format!("nixl+{s3}")));
            }
        }
        "distrusts" => {
            refuses(&format!("rediss://:{SECRET}@{at}"), "certificate is not trusted");
            let Some(s3) = s3 else { return };
            refuses(&s3, "certificate is not trusted");
        }
        _ => {
            let error = open(&format!("rediss://{at}"), &RemoteOptions::default()).unwrap_err();
            assert_eq!(error.status(), kvcache::Status::TierFailed);
            assert!(error.to_string().contains("SSL_CERT_FILE"), "{error}");
        }
    }
}

struct Server(Child);

impl Server {
    fn start(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn wait_for(port: u16) {
    let begin = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(begin.elapsed() < LONG, "nothing listens at {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn openssl(dir: &Path, line: &str) {
    let words = line.split_whitespace();
    let made = Command::new("openssl").args(words).current_dir(dir).output().unwrap();
    assert!(made.status.success(), "{line}: {}", String::from_utf8_lossy(&made.stderr));
}

/// An authority of our own, another, and a certificate of the first.
fn certificates(dir: &Path) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    for name in ["ca", "other"] {
        openssl(
            dir,
            &format!("req -x509 {key} -days 2 -subj /CN={name} -keyout {name}.key -out {name}.pem"),
        );
    }
    openssl(dir, &format!("req {key} -subj /CN=server -keyout server.key -out server.csr"));
    std::fs::write(dir.join("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
    openssl(
        dir,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names \
         -out server.pem",
    );
}

#[test]
fn servers_over_tls_are_used_if_trusted_and_what_they_refuse_is_said() {
    if let Ok(part) = std::env::var("KVCACHE_TEST_TLS") {
        let port = std::env::var("KVCACHE_TEST_TLS_PORT").unwrap().parse().unwrap();
        return child(&part, port, std::env::var("KVCACHE_TEST_TLS_S3").ok());
    }
    for tool in ["redis-server", "openssl", "socat"] {
        let found = Command::new("sh").arg("-c").arg(format!("command -v {tool}")).output();
        if !found.is_ok_and(|found| found.status.success()) {
            assert!(std::env::var_os("KVCACHE_REQUIRE_REMOTE").is_none(), "{tool} is lacking");
            println!("skipped: {tool} is not installed");
            return;
        }
    }
    let dir = Dir(std::env::temp_dir().join(format!("kvcache-tls-{}", std::process::id())));
    let _ = std::fs::remove_dir_all(&dir.0);
    std::fs::create_dir(&dir.0).unwrap();
    certificates(&dir.0);
    let port = free_port();
    let _redis = Server::start(
        Command::new("redis-server")
            .args(["--port", "0", "--bind", "127.0.0.1", "--save", "", "--requirepass", SECRET])
            .args(["--tls-port", &port.to_string(), "--tls-auth-clients", "no"])
            .args(["--tls-cert-file", "server.pem", "--tls-key-file", "server.key"])
            .args(["--tls-ca-cert-file", "ca.pem"])
            .current_dir(&dir.0),
    );
    wait_for(port);
    let s3 = std::env::var("KVCACHE_S3").ok();
    let behind = s3.as_ref().and_then(|s3| s3.strip_prefix("s3+http://")?.split_once('/'));
    let proxied = behind.map(|(server, bucket)| {
        let port = free_port();
        let listen = format!(
            "OPENSSL-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork,cert=server.pem,key=server.key,verify=0"
        );
        let socat = Command::new("socat")
            .args([&listen, &format!("TCP:{server}")])
            .current_dir(&dir.0)
            .stderr(Stdio::null())
            .spawn();
        wait_for(port);
        (Server(socat.unwrap()), format!("s3+https://127.0.0.1:{port}/{bucket}"))
    });
    std::fs::write(dir.0.join("empty.pem"), "no certificate").unwrap();
    for (part, file) in [("trusts", "ca.pem"), ("distrusts", "other.pem"), ("lacks", "empty.pem")] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "servers_over_tls_are_used_if_trusted_and_what_they_refuse_is_said"])
            .envs([("KVCACHE_TEST_TLS", part), ("KVCACHE_TEST_TLS_PORT", &port.to_string())])
            .env("SSL_CERT_FILE", dir.0.join(file));
        if let Some((_, address)) = &proxied {
            command.env("KVCACHE_TEST_TLS_S3", address);
        }
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{part}: {said}");
    }
    // Mozilla's authorities know nothing of this one.
    let address = format!("rediss://:{SECRET}@127.0.0.1:{port}");
    if std::env::var_os("SSL_CERT_FILE").is_none() {
        refuses(&address, "certificate is not trusted");
    }
}
