//! KV events over real sockets: what a subscriber receives, what is replayed, and that no peer,
//! absent, slow, gone or hostile, holds up the cache or makes it keep more than it may.
//!
//! The peer here is written from the protocol alone; another is pyzmq, where there is one.
#![cfg(feature = "zmq")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache::cache::{CacheOptions, KvCache, Step, Work};
use kvcache::dtype::KvFormat;
use kvcache::events::{Publisher, Queue, Subscribers, ZmqOptions, ZmqSink};
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::{CacheSpec, GroupSpec};

/// A ZMTP 3.0 peer.
struct Peer(TcpStream);

impl Peer {
    /// Greets and says what kind it is, before it hears anything.
    fn greet(endpoint: &str, kind: &str) -> Peer {
        let mut stream = TcpStream::connect(endpoint.strip_prefix("tcp://").unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut greeting = [0; 64];
        (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
        greeting[12..16].copy_from_slice(b"NULL");
        stream.write_all(&greeting).unwrap();
        let mut ready = b"\x05READY\x0bSocket-Type\0\0\0".to_vec();
        ready.push(kind.len() as u8);
        ready.extend_from_slice(kind.as_bytes());
        stream.write_all(&[4, ready.len() as u8]).unwrap();
        stream.write_all(&ready).unwrap();
        Peer(stream)
    }

    fn connect(endpoint: &str, kind: &str) -> Peer {
        let mut peer = Peer::greet(endpoint, kind);
        let mut theirs = [0; 64];
        peer.0.read_exact(&mut theirs).unwrap();
        assert_eq!((theirs[0], theirs[9], &theirs[10..17]), (0xff, 0x7f, &b"\x03\0NULL\0"[..]));
        let (flags, theirs) = peer.frame();
        assert!(flags == 4 && theirs.starts_with(b"\x05READY"));
        peer
    }

    fn subscriber(endpoint: &str, topic: &str) -> Peer {
        let mut peer = Peer::connect(endpoint, "SUB");
        peer.send(&[&[b"\x01", topic.as_bytes()].concat()]);
        peer
    }

    fn send(&mut self, frames: &[&[u8]]) {
        for (at, frame) in frames.iter().enumerate() {
            let more = u8::from(at + 1 < frames.len());
            self.0.write_all(&[more, frame.len() as u8]).unwrap();
            self.0.write_all(frame).unwrap();
        }
    }

    fn frame(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 2];
        self.0.read_exact(&mut head).unwrap();
        let mut bytes = u64::from(head[1]);
        if head[0] & 2 != 0 {
            let mut rest = [0; 8];
            rest[0] = head[1];
            self.0.read_exact(&mut rest[1..]).unwrap();
            bytes = u64::from_be_bytes(rest);
        }
        let mut body = vec![0; bytes as usize];
        self.0.read_exact(&mut body).unwrap();
        (head[0], body)
    }

    fn message(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        loop {
            let (flags, body) = self.frame();
            frames.push(body);
            if flags & 1 == 0 {
                return frames;
            }
        }
    }

    /// Whether the other side has ended the connection.
    fn is_closed(&mut self) -> bool {
        loop {
            match self.0.read(&mut [0; 1000]) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }
}

fn seq_of(frame: &[u8]) -> u64 {
    u64::from_be_bytes(frame.try_into().unwrap())
}

struct Bed {
    cache: KvCache,
    step: Step,
    queue: Arc<Queue>,
    publisher: Publisher,
    subscribers: Subscribers,
    endpoint: String,
    replay: String,
    seq: SeqId,
    fed: u32,
}

impl Bed {
    fn new(options: ZmqOptions) -> Bed {
        let spec = CacheSpec::uniform(16, GroupSpec::uniform(1, 1, 8, KvFormat::F16));
        let sizes = CacheOptions { blocks: 256, max_seqs: 4, threads: 1, ..Default::default() };
        let mut cache = KvCache::new(&spec, &sizes).unwrap();
        let queue = cache.enable_events(0).unwrap();
        let sink = ZmqSink::bind(&ZmqOptions {
            endpoint: "tcp://127.0.0.1:0".into(),
            replay_endpoint: Some("tcp://127.0.0.1:0".into()),
            ..options
        })
        .unwrap();
        let (subscribers, endpoint) = (sink.subscribers(), sink.endpoint().to_string());
        let replay = sink.replay_endpoint().unwrap().to_string();
        let publisher = Publisher::start(queue.clone(), vec![Box::new(sink)]).unwrap();
        let seq = cache.start(&[1], Namespace(0)).unwrap().seq;
        let step = Step::new();
        // What is resident at the beginning, which is nothing, is a message of its own.
        wait(|| publisher.next_seq() == 1);
        Bed { cache, step, queue, publisher, subscribers, endpoint, replay, seq, fed: 0 }
    }

    /// Commits one further block, which nobody has seen, and waits until it is published.
    fn store(&mut self) {
        if self.fed % 200 == 199 {
            self.cache.release(self.seq).unwrap();
            self.seq = self.cache.start(&[1], Namespace(0)).unwrap().seq;
        }
        self.fed += 1;
        let work = [Work { seq: self.seq, tokens: &[self.fed; 16] }];
        self.cache.begin(&mut self.step, &work).unwrap();
        self.cache.commit(&mut self.step).unwrap();
        let busy = |queue: &Queue| {
            let stats = queue.stats();
            stats.queued_events > 0 || stats.publishing
        };
        wait(|| !busy(&self.queue));
    }

    fn subscribe(&self, topic: &str) -> Peer {
        let before = self.subscribers.count();
        let peer = Peer::subscriber(&self.endpoint, topic);
        wait(|| self.subscribers.count() > before);
        peer
    }
}

fn wait(mut until: impl FnMut() -> bool) {
    let start = Instant::now();
    while !until() {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing came of it");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn subscribers_get_every_message_from_their_subscription_on() {
    let mut bed = Bed::new(ZmqOptions { topic: "kv@me".into(), ..ZmqOptions::default() });
    for _ in 0..3 {
        bed.store();
    }
    let first = bed.publisher.next_seq();
    assert_eq!(first, 4, "cleared, and three blocks");
    let (mut all, mut some) = (bed.subscribe(""), bed.subscribe("kv@"));
    let mut other = Peer::subscriber(&bed.endpoint, "other");
    for _ in 0..10 {
        bed.store();
    }
    for seq in first..first + 10 {
        let message = all.message();
        assert_eq!((message[0].as_slice(), seq_of(&message[1])), (&b"kv@me"[..], seq));
        assert_eq!(message.len(), 3);
        assert!(message[2].starts_with(&[0x93, 0xcb]) && message[2].ends_with(&[0]));
        assert_eq!(some.message(), message);
    }
    // No more after the subscription ends, here by the command of ZMTP 3.1.
    some.0.write_all(b"\x04\x0a\x06CANCELkv@").unwrap();
    wait(|| bed.subscribers.count() == 1);
    bed.store();
    assert_eq!(seq_of(&all.message()[1]), first + 10);
    some.0.write_all(b"\x04\x07\x04PING\0\0").unwrap();
    assert_eq!(some.frame(), (4, b"\x04PONG".to_vec()));
    other.0.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(other.0.read(&mut [0]).is_err(), "nothing for another topic");
}

#[test]
fn what_is_kept_is_replayed() {
    let keep = ZmqOptions { keep_messages: 5, topic: "t".into(), ..ZmqOptions::default() };
    let mut bed = Bed::new(keep);
    for _ in 0..9 {
        bed.store();
    }
    let mut peer = Peer::connect(&bed.replay, "DEALER");
    let mut replay = |from: u64| -> Vec<u64> {
        peer.send(&[b"", &from.to_be_bytes()]);
        let mut seqs = Vec::new();
        loop {
            let message = peer.message();
            assert!(message.len() == 4 && message[0].is_empty());
            if message[2] == [0xff; 8] {
                assert!(message[1].is_empty() && message[3].is_empty());
                return seqs;
            }
            assert!(message[1] == b"t" && message[3].starts_with(&[0x93]));
            seqs.push(seq_of(&message[2]));
        }
    };
    assert_eq!(replay(0), [5, 6, 7, 8, 9]);
    assert_eq!(replay(8), [8, 9]);
    assert_eq!(replay(10), [0u64; 0]);
    assert_eq!(replay(u64::MAX), [0u64; 0]);
    // A request that is none gets the end, and the next is answered.
    peer.send(&[b"what"]);
    assert_eq!(peer.message()[2], [0xff; 8]);
    peer.send(&[b"", &9u64.to_be_bytes()]);
    assert_eq!(seq_of(&peer.message()[2]), 9);
}

#[test]
fn the_cache_waits_for_no_peer() {
    let keep = ZmqOptions { keep_messages: 50, keep_bytes: 60_000, ..ZmqOptions::default() };
    let mut bed = Bed::new(keep);
    for _ in 0..100 {
        bed.store(); // nobody is there
    }
    let mut slow = bed.subscribe("");
    let vanishing = bed.subscribe("");
    let mut steady = bed.subscribe("");
    bed.cache.release(bed.seq).unwrap();
    let first = bed.publisher.next_seq();
    drop(vanishing);
    let mut expected = first;
    // Chains of 200 blocks make messages of some 10 kB: far more than the sockets' buffers hold.
    let start = Instant::now();
    let mut sent = 0;
    while sent < 24 << 20 {
        let seq = bed.cache.start(&[7], Namespace(expected)).unwrap().seq;
        let tokens: Vec<u32> = (0..3200).map(|at| 100_000 + at).collect();
        bed.cache.begin(&mut bed.step, &[Work { seq, tokens: &tokens }]).unwrap();
        bed.cache.commit(&mut bed.step).unwrap();
        bed.cache.release(seq).unwrap();
        loop {
            let message = steady.message();
            assert_eq!(seq_of(&message[1]), expected, "a reader that keeps up misses nothing");
            expected += 1;
            sent += message[2].len();
            if message[2].windows(11).any(|part| part == b"BlockStored") {
                break;
            }
        }
    }
    assert!(start.elapsed() < Duration::from_secs(60));
    wait(|| bed.subscribers.count() == 2);
    // The slow one finds what the sockets held, then a gap, then the last messages.
    let (mut last, mut gaps) = (first - 1, 0);
    while last + 1 < bed.publisher.next_seq() {
        let seq = seq_of(&slow.message()[1]);
        assert!(seq > last);
        gaps += u32::from(seq > last + 1);
        last = seq;
    }
    assert!(gaps >= 1);
    bed.cache.audit().unwrap();
}

#[test]
fn peers_that_break_the_rules_are_cut_off() {
    let mut bed = Bed::new(ZmqOptions::default());
    // Another protocol altogether; the wrong kind of socket; messages before the handshake.
    let mut http = TcpStream::connect(bed.endpoint.strip_prefix("tcp://").unwrap()).unwrap();
    http.write_all(&[b'G'; 100]).unwrap();
    assert!(Peer(http).is_closed());
    assert!(Peer::greet(&bed.endpoint, "REQ").is_closed());
    assert!(Peer::greet(&bed.replay, "SUB").is_closed());
    let mut huge = Peer::connect(&bed.endpoint, "SUB");
    huge.0.write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 0]).unwrap();
    assert!(huge.is_closed());
    let mut greedy = Peer::connect(&bed.endpoint, "SUB");
    for _ in 0..65 {
        greedy.send(&[b"\x01x"]);
    }
    assert!(greedy.is_closed());
    // More peers than there is room for; those that are there are served on.
    let mut served = bed.subscribe("");
    let address = bed.endpoint.strip_prefix("tcp://").unwrap();
    let crowd: Vec<_> = (0..300).map(|_| TcpStream::connect(address).unwrap()).collect();
    bed.store();
    assert!(served.message()[2].len() > 20);
    drop(crowd);
    wait(|| Peer::try_subscribe(&bed.endpoint));
}

impl Peer {
    /// Whether a peer is let in.
    fn try_subscribe(endpoint: &str) -> bool {
        let mut stream = TcpStream::connect(endpoint.strip_prefix("tcp://").unwrap()).unwrap();
        stream.read_exact(&mut [0; 64]).is_ok()
    }
}

#[test]
fn endpoints_are_bound_once_and_given_back() {
    let sink = ZmqSink::bind(&ZmqOptions {
        endpoint: "tcp://127.0.0.1:0".into(),
        ..ZmqOptions::default()
    })
    .unwrap();
    let endpoint = sink.endpoint().to_string();
    let again = || ZmqSink::bind(&ZmqOptions { endpoint: endpoint.clone(), ..Default::default() });
    assert!(again().is_err());
    drop(sink);
    drop(again().unwrap());
    let remote = ZmqOptions { endpoint: "tcp://0.0.0.0:0".into(), ..Default::default() };
    assert!(ZmqSink::bind(&remote).is_err());
    drop(ZmqSink::bind(&ZmqOptions { remote: true, ..remote }).unwrap());
}

#[cfg(unix)]
#[test]
fn a_file_that_a_dead_process_left_is_replaced() {
    let path = std::env::temp_dir().join(format!("kvcache-zmq-{}", std::process::id()));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let ipc = ZmqOptions { endpoint: format!("ipc://{}", path.display()), ..Default::default() };
    let sink = ZmqSink::bind(&ipc).unwrap();
    assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
    assert!(ZmqSink::bind(&ipc).is_err(), "somebody answers there");
    drop(sink);
    assert!(!path.exists());
}

/// The program that pyzmq runs: subscribes, says so, prints what it receives, and asks for a replay.
const PYTHON: &str = "
import sys, zmq
context = zmq.Context()
sub = context.socket(zmq.SUB)
sub.setsockopt_string(zmq.SUBSCRIBE, '')
sub.setsockopt(zmq.RCVTIMEO, 20000)
sub.setsockopt(zmq.HEARTBEAT_IVL, 50)
sub.connect(sys.argv[1])
print('ready', flush=True)
for _ in range(20):
    topic, seq, payload = sub.recv_multipart()
    print(topic.decode(), int.from_bytes(seq, 'big'), payload.hex(), flush=True)
dealer = context.socket(zmq.DEALER)
dealer.setsockopt(zmq.RCVTIMEO, 20000)
dealer.connect(sys.argv[2])
dealer.send_multipart([b'', (5).to_bytes(8, 'big')])
while True:
    empty, topic, seq, payload = dealer.recv_multipart()
    if not payload:
        break
    print(topic.decode(), int.from_bytes(seq, 'big'), payload.hex(), flush=True)
print('end', int.from_bytes(seq, 'big', signed=True), flush=True)
";

#[test]
fn pyzmq_receives_the_same() {
    let python = std::env::var("KVCACHE_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", "import zmq"]).stderr(Stdio::null()).status();
    if !has.is_ok_and(|status| status.success()) {
        println!("skipped: {python} has no pyzmq");
        return;
    }
    let mut bed = Bed::new(ZmqOptions { topic: "kv".into(), ..ZmqOptions::default() });
    let mut own = bed.subscribe("");
    let mut child = Command::new(&python)
        .args(["-c", PYTHON, &bed.endpoint, &bed.replay])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait(|| bed.subscribers.count() == 2);
    let mut expected: Vec<String> = vec!["ready".into()];
    for n in 0..20 {
        if n == 10 {
            std::thread::sleep(Duration::from_millis(200)); // some heartbeats
        }
        bed.store();
        let message = own.message();
        let hex: String = message[2].iter().map(|byte| format!("{byte:02x}")).collect();
        expected.push(format!("kv {} {hex}", seq_of(&message[1])));
    }
    let from = expected.iter().position(|line| line.starts_with("kv 5 ")).unwrap();
    expected.extend(expected[from..].to_vec());
    expected.push("end -1".into());
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(said.lines().collect::<Vec<_>>(), expected);
}
