//! The sockets' thread: accepts, shakes hands, and writes to each peer as fast as that takes it.
//!
//! All peers are served from the one list of kept messages, each by its position in it, so a peer
//! that is slow, or gone without a word, costs the message that it is in the middle of and nothing
//! more; one that falls behind the list skips what it missed. Nothing here blocks.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use core::time::Duration;
use std::io::{self, Read, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use mio::{Events, Interest, Poll, Token, Waker};

use super::replay::Replay;
use super::socket::{Listener, Stream};
use super::zmq::Endpoint;
use super::zmtp::{Broken, GREETING, Reader, Said, frame, frame_header, pong, ready};

/// Connections at once; further ones are closed.
const MAX_PEERS: usize = 256;
/// Subscriptions or replay requests of one peer at once.
const MAX_ASKED: usize = 64;
/// Reads of one peer before the others get their turn.
const MAX_READS: usize = 16;
/// How long a handshake may take, and how long a peer may take nothing of what waits for it.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often peers are looked at that nothing happens to.
const ROUND: Duration = Duration::from_secs(2);
/// How long peers may take the last messages.
const LINGER: Duration = Duration::from_millis(250);
/// The number that ends a replay.
const END: [u8; 8] = [0xff; 8];

/// The token of the waker; listeners follow, then peers.
const WAKER: usize = 0;

/// What the thread shares with the sink.
#[derive(Debug)]
pub(super) struct Shared {
    replay: Mutex<Replay>,
    waker: Waker,
    stop: AtomicBool,
    subscribers: AtomicU32,
}

impl Shared {
    pub(super) fn publish(&self, seq: u64, message: Vec<u8>) {
        self.replay().push(seq, Arc::new(message));
        self.wake();
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    pub(super) fn subscribers(&self) -> u32 {
        self.subscribers.load(Ordering::Relaxed)
    }

    fn wake(&self) {
        // Without it the thread looks again at the end of its round.
        let _ = self.waker.wake();
    }

    fn replay(&self) -> std::sync::MutexGuard<'_, Replay> {
        self.replay.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(super) struct Server {
    poll: Poll,
    shared: Arc<Shared>,
    topic: Vec<u8>,
    listeners: Vec<(Listener, bool)>,
    peers: BTreeMap<usize, Peer>,
    next_token: usize,
    /// Peers that may have more to say than was read: the system does not tell twice.
    unheard: Vec<usize>,
}

/// One connection.
#[derive(Debug)]
struct Peer {
    stream: Stream,
    /// Of the ROUTER socket, else of PUB.
    replays: bool,
    reader: Reader,
    said_ready: bool,
    ready: bool,
    /// What is being written: small frames, then a message.
    head: Vec<u8>,
    message: Option<Arc<Vec<u8>>>,
    written: usize,
    /// PUB: beginnings of topics that it asked for, and the next message for it.
    topics: Vec<Vec<u8>>,
    next: Option<u64>,
    /// ROUTER: from which to before which number it wants messages.
    asked: VecDeque<(u64, u64)>,
    /// When something last went to it or came from it.
    moved: Instant,
}

impl Server {
    pub(super) fn new(topic: &[u8], keep: (usize, usize)) -> io::Result<Self> {
        let poll = Poll::new()?;
        let shared = Shared {
            replay: Mutex::new(Replay::new(keep.0, keep.1)),
            waker: Waker::new(poll.registry(), Token(WAKER))?,
            stop: AtomicBool::new(false),
            subscribers: AtomicU32::new(0),
        };
        Ok(Server {
            poll,
            shared: Arc::new(shared),
            topic: topic.to_vec(),
            listeners: Vec::new(),
            peers: BTreeMap::new(),
            next_token: 16,
            unheard: Vec::new(),
        })
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Binds; returns where, with the port that was taken.
    pub(super) fn listen(&mut self, endpoint: &Endpoint, replays: bool) -> io::Result<Endpoint> {
        let mut listener = Listener::bind(endpoint)?;
        let token = Token(WAKER + 1 + self.listeners.len());
        self.poll.registry().register(listener.source(), token, Interest::READABLE)?;
        let bound = listener.endpoint()?;
        self.listeners.push((listener, replays));
        Ok(bound)
    }

    /// Serves until it is stopped.
    pub(super) fn run(mut self) {
        let mut events = Events::with_capacity(128);
        let mut last_round = Instant::now();
        while !self.shared.stop.load(Ordering::Acquire) {
            let wait = if self.unheard.is_empty() { ROUND } else { Duration::ZERO };
            if self.poll.poll(&mut events, Some(wait)).is_err() {
                // Interrupted, or worse: do not spin.
                std::thread::sleep(Duration::from_millis(1));
            }
            self.accept();
            for token in core::mem::take(&mut self.unheard) {
                self.hear(token);
            }
            for event in &events {
                if event.is_readable() || event.is_read_closed() || event.is_error() {
                    self.hear(event.token().0);
                }
            }
            self.write_all();
            if last_round.elapsed() >= ROUND {
                last_round = Instant::now();
                let idle = |peer: &Peer| peer.moved.elapsed() > PATIENCE;
                self.peers.retain(|_, peer| !(idle(peer) && (!peer.ready || peer.is_writing())));
            }
            let subscribers = self.peers.values().filter(|peer| peer.next.is_some()).count();
            self.shared.subscribers.store(subscribers as u32, Ordering::Relaxed);
        }
        let end = Instant::now() + LINGER;
        loop {
            self.write_all();
            let waits = self.peers.values().any(Peer::is_writing);
            let Some(left) = end.checked_duration_since(Instant::now()).filter(|_| waits) else {
                return;
            };
            let _ = self.poll.poll(&mut events, Some(left));
        }
    }

    fn accept(&mut self) {
        for at in 0..self.listeners.len() {
            // Any error, too many open files among them: again at the end of the round.
            while let Ok(mut stream) = self.listeners[at].0.accept() {
                let token = self.next_token;
                self.next_token += 1;
                let both = Interest::READABLE | Interest::WRITABLE;
                let registry = self.poll.registry();
                if self.peers.len() < MAX_PEERS
                    && registry.register(stream.source(), Token(token), both).is_ok()
                {
                    self.peers.insert(token, Peer::new(stream, self.listeners[at].1));
                }
            }
        }
    }

    fn hear(&mut self, token: usize) {
        let next_seq = self.shared.replay().next_seq();
        let Some(peer) = self.peers.get_mut(&token) else { return };
        match peer.hear(&self.topic, next_seq) {
            Ok(true) => {}
            Ok(false) => self.unheard.push(token),
            Err(Broken) => drop(self.peers.remove(&token)),
        }
    }

    fn write_all(&mut self) {
        let (shared, topic) = (&self.shared, &self.topic);
        self.peers.retain(|_, peer| peer.write(topic, shared).is_ok());
    }
}

impl Peer {
    fn new(stream: Stream, replays: bool) -> Self {
        Peer {
            stream,
            replays,
            reader: Reader::default(),
            said_ready: false,
            ready: false,
            head: GREETING.to_vec(),
            message: None,
            written: 0,
            topics: Vec::new(),
            next: None,
            asked: VecDeque::new(),
            moved: Instant::now(),
        }
    }

    fn is_writing(&self) -> bool {
        !self.head.is_empty()
    }

    /// Reads what arrived and acts on it; whether that was all. An error ends the connection.
    fn hear(&mut self, topic: &[u8], next_seq: u64) -> Result<bool, Broken> {
        let mut bytes = [0; 4096];
        for _ in 0..MAX_READS {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Broken),
                Ok(count) => {
                    self.moved = Instant::now();
                    self.reader.push(&bytes[..count]);
                    while let Some(said) = self.reader.next()? {
                        self.act(said, topic, next_seq)?;
                    }
                    if self.reader.is_greeted() && !self.said_ready {
                        self.said_ready = true;
                        ready(&mut self.head, if self.replays { "ROUTER" } else { "PUB" });
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Broken),
            }
        }
        Ok(false)
    }

    fn act(&mut self, said: Said, topic: &[u8], next_seq: u64) -> Result<(), Broken> {
        match said {
            Said::Ready(kind) => {
                let reads: [&[u8]; 3] = if self.replays {
                    [b"REQ", b"DEALER", b"ROUTER"]
                } else {
                    [b"SUB", b"XSUB", b""]
                };
                if self.ready || !reads.contains(&kind.as_slice()) {
                    return Err(Broken);
                }
                self.ready = true;
            }
            _ if !self.ready => return Err(Broken),
            Said::Ping(context) if !self.is_writing() => pong(&mut self.head, &context),
            Said::Ping(_) => {} // it sees from what is written that this side lives
            Said::Subscribe(prefix, on) => self.subscribe(prefix, on, topic, next_seq)?,
            Said::Message(frames) if self.replays => {
                let from = match frames.as_slice() {
                    [empty, seq] if empty.is_empty() => seq.as_slice().try_into().ok(),
                    _ => None,
                };
                if self.asked.len() == MAX_ASKED {
                    return Err(Broken);
                }
                // A request that is none gets the end at once.
                self.asked.push_back((from.map_or(next_seq, u64::from_be_bytes), next_seq));
            }
            Said::Message(mut frames) => match frames.pop() {
                Some(body) if frames.is_empty() && matches!(body.first(), Some(0 | 1)) => {
                    self.subscribe(body[1..].to_vec(), body[0] == 1, topic, next_seq)?;
                }
                _ => {}
            },
        }
        Ok(())
    }

    fn subscribe(
        &mut self,
        prefix: Vec<u8>,
        on: bool,
        topic: &[u8],
        next_seq: u64,
    ) -> Result<(), Broken> {
        if on {
            if self.topics.len() == MAX_ASKED {
                return Err(Broken);
            }
            self.topics.push(prefix);
        } else if let Some(at) = self.topics.iter().position(|known| *known == prefix) {
            self.topics.swap_remove(at);
        }
        let wanted = self.topics.iter().any(|prefix| topic.starts_with(prefix));
        self.next = wanted.then(|| self.next.unwrap_or(next_seq));
        Ok(())
    }

    /// Writes what the peer takes now. An error ends the connection.
    fn write(&mut self, topic: &[u8], shared: &Shared) -> io::Result<()> {
        loop {
            while self.is_writing() {
                let head = self.head.len();
                let message = self.message.as_ref().map_or(&[][..], |message| message.as_slice());
                let rest = match self.written.checked_sub(head) {
                    Some(of_message) => &message[of_message..],
                    None => &self.head[self.written..],
                };
                match self.stream.write(rest) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(count) => self.written += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
                self.moved = Instant::now();
                if self.written == head + message.len() {
                    self.head.clear();
                    (self.message, self.written) = (None, 0);
                }
            }
            if !self.ready || !self.prepare(topic, shared) {
                return Ok(());
            }
        }
    }

    /// Makes the next message the one that is written; false where there is none.
    fn prepare(&mut self, topic: &[u8], shared: &Shared) -> bool {
        let head = &mut self.head;
        if self.replays {
            let Some((next, end)) = self.asked.front_mut() else { return false };
            frame(head, b"", true);
            match shared.replay().from(*next).filter(|(seq, _)| seq < end) {
                Some((seq, message)) => {
                    *next = seq + 1;
                    frame(head, topic, true);
                    frame(head, &seq.to_be_bytes(), true);
                    frame_header(head, message.len(), false);
                    self.message = Some(message);
                }
                None => {
                    self.asked.pop_front();
                    frame(head, b"", true);
                    frame(head, &END, true);
                    frame(head, b"", false);
                }
            }
            return true;
        }
        let Some(next) = &mut self.next else { return false };
        let Some((seq, message)) = shared.replay().from(*next) else { return false };
        *next = seq + 1;
        frame(head, topic, true);
        frame(head, &seq.to_be_bytes(), true);
        frame_header(head, message.len(), false);
        self.message = Some(message);
        true
    }
}
