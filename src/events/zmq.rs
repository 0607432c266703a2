//! Events over ZeroMQ: a PUB socket with all messages, and a ROUTER socket that repeats the last
//! ones to whoever asks, both in vLLM's format, for routers that read vLLM's.
//!
//! A published message is `[topic][number][payload]`, the number in eight bytes, big-endian. A
//! request to the ROUTER socket is `[][number]`; the replies are `[][topic][number][payload]` for
//! each message kept from that number on, then `[][][ff ff ff ff ff ff ff ff][]`.
//!
//! Both sockets bind. They speak to this machine only unless told otherwise: there is no
//! authentication, and events carry the tokens of all prompts. The protocol is a small part of
//! ZMTP, written here over plain sockets (`mio` waits for them): the crates that speak all of it
//! bring an asynchronous runtime or a C++ library, and their queues for each subscriber.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::thread::JoinHandle;

use super::server::{Server, Shared};
use super::wire::{Encoding, encode, most_bytes};
use super::{Message, Sink};
use crate::error::{Error, Result};

/// Where and how to publish.
#[derive(Debug, Clone)]
pub struct ZmqOptions {
    /// Where the PUB socket binds: `tcp://127.0.0.1:5557`, `tcp://[::1]:5557`,
    /// `tcp://localhost:5557`, `tcp://*:5557` or `ipc:///path`. Port 0 takes any.
    pub endpoint: String,
    /// Where the ROUTER socket binds, if there is to be one.
    pub replay_endpoint: Option<String>,
    /// The topic of all messages.
    pub topic: String,
    /// How events are written.
    pub encoding: Encoding,
    /// The data-parallel rank that messages carry.
    pub rank: u32,
    /// The most messages that are kept for replay and for slow subscribers.
    pub keep_messages: usize,
    /// The most bytes of those, but for a single larger one.
    pub keep_bytes: usize,
    /// Allow addresses that other machines can reach.
    pub remote: bool,
}

impl Default for ZmqOptions {
    fn default() -> Self {
        ZmqOptions {
            endpoint: "tcp://127.0.0.1:5557".to_string(),
            replay_endpoint: None,
            topic: String::new(),
            encoding: Encoding::Map,
            rank: 0,
            keep_messages: 10_000,
            keep_bytes: 64 << 20,
            remote: false,
        }
    }
}

/// A place to bind to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Endpoint {
    Tcp(SocketAddr),
    Ipc(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(address) => write!(f, "tcp://{address}"),
            Endpoint::Ipc(path) => write!(f, "ipc://{}", path.display()),
        }
    }
}

impl Endpoint {
    fn parse(text: &str, what: &'static str, remote: bool) -> Result<Self> {
        let why = "must be tcp://ADDRESS:PORT or ipc:///PATH";
        let wrong = Error::invalid(what, why);
        if let Some(path) = text.strip_prefix("ipc://") {
            if !cfg!(unix) {
                return Err(Error::Unsupported { what: "ipc" });
            }
            // No socket takes a longer path.
            let fits = path.starts_with('/') && path.len() < 100 && !path.contains('\0');
            return if fits { Ok(Endpoint::Ipc(path.into())) } else { Err(wrong) };
        }
        let (host, port) =
            text.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':')).ok_or(wrong)?;
        let port: u16 = port.parse().map_err(|_| wrong)?;
        let ip = match host {
            "*" => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            _ => match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
                Some(v6) => IpAddr::V6(v6.parse::<Ipv6Addr>().map_err(|_| wrong)?),
                None => IpAddr::V4(host.parse::<Ipv4Addr>().map_err(|_| wrong)?),
            },
        };
        if !ip.is_loopback() && !remote {
            let why = "must be a loopback address or ipc, unless remote readers are allowed";
            return Err(Error::invalid(what, why));
        }
        Ok(Endpoint::Tcp(SocketAddr::new(ip, port)))
    }
}

/// The sockets, as a sink for a [`Publisher`](super::Publisher). Dropping it sends what subscribers
/// take within a quarter of a second, and closes them.
#[derive(Debug)]
pub struct ZmqSink {
    shared: Arc<Shared>,
    encoding: Encoding,
    rank: u32,
    endpoint: String,
    replay_endpoint: Option<String>,
    thread: Option<JoinHandle<()>>,
}

impl ZmqSink {
    /// Binds, and starts the thread that serves the sockets.
    ///
    /// # Errors
    /// `InvalidArgument` for an endpoint that is not understood, is not on this machine, or cannot
    /// be bound, for a topic above 255 bytes, and for limits of 0; `Unsupported` for ipc where the
    /// system has none; `OutOfMemory` where it refuses a thread or sockets.
    pub fn bind(options: &ZmqOptions) -> Result<Self> {
        let ZmqOptions { endpoint, replay_endpoint, topic, remote, .. } = options;
        let endpoint = Endpoint::parse(endpoint, "endpoint", *remote)?;
        let replay = replay_endpoint
            .as_ref()
            .map(|text| Endpoint::parse(text, "replay_endpoint", *remote))
            .transpose()?;
        if topic.len() > 255 {
            return Err(Error::invalid("topic", "must be at most 255 bytes"));
        }
        if options.keep_messages == 0 || options.keep_bytes == 0 {
            return Err(Error::invalid("keep_messages, keep_bytes", "must be at least 1"));
        }
        let refused = |_: io::Error| Error::OutOfMemory { bytes: 0 };
        let keep = (options.keep_messages, options.keep_bytes);
        let mut server = Server::new(topic.as_bytes(), keep).map_err(refused)?;
        let cannot = |what| Error::invalid(what, "must be an address that can be bound");
        let bound = server.listen(&endpoint, false).map_err(|_| cannot("endpoint"))?;
        let replay = match replay {
            Some(at) => {
                let bound = server.listen(&at, true).map_err(|_| cannot("replay_endpoint"))?;
                Some(bound.to_string())
            }
            None => None,
        };
        let shared = server.shared();
        let builder = std::thread::Builder::new().name("kvcache-zmq".into());
        let thread = Some(builder.spawn(move || server.run()).map_err(refused)?);
        Ok(ZmqSink {
            shared,
            encoding: options.encoding,
            rank: options.rank,
            endpoint: bound.to_string(),
            replay_endpoint: replay,
            thread,
        })
    }

    /// Where the PUB socket is bound, with the port that was taken.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where the ROUTER socket is bound.
    pub fn replay_endpoint(&self) -> Option<&str> {
        self.replay_endpoint.as_deref()
    }

    /// To ask how many subscribers there are, also after the sink was given away.
    pub fn subscribers(&self) -> Subscribers {
        Subscribers(self.shared.clone())
    }
}

/// A count of subscribers that can be asked for.
#[derive(Debug, Clone)]
pub struct Subscribers(Arc<Shared>);

impl Subscribers {
    /// Connections that subscribed to the topic and are served.
    pub fn count(&self) -> u32 {
        self.0.subscribers()
    }
}

impl Sink for ZmqSink {
    fn publish(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        // Where memory is refused the number stays without a message, as for one that was lost.
        if bytes.try_reserve(most_bytes(message)).is_ok() {
            encode(message, self.encoding, self.rank, &mut bytes);
            bytes.shrink_to_fit();
            self.shared.publish(message.seq, bytes);
        }
    }
}

impl Drop for ZmqSink {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_understood_or_refused() {
        let parse = |text, remote| Endpoint::parse(text, "endpoint", remote).map(|e| e.to_string());
        for (text, same) in [
            ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5557"),
            ("tcp://localhost:0", "tcp://127.0.0.1:0"),
            ("tcp://[::1]:1", "tcp://[::1]:1"),
            ("ipc:///tmp/kv", "ipc:///tmp/kv"),
        ] {
            assert_eq!(parse(text, false).unwrap(), same);
        }
        for text in ["tcp://*:5557", "tcp://10.0.0.1:5557", "tcp://[::]:5557"] {
            assert!(parse(text, false).is_err() && parse(text, true).is_ok(), "{text}");
        }
        let long = alloc::format!("ipc:///{}", "x".repeat(100));
        for text in
            ["", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:70000", "tcp://host:1", "udp://*:1"]
                .into_iter()
                .chain(["ipc://", "ipc://relative", "ipc:///a\0b", "tcp://[::1:1", &long])
        {
            assert!(matches!(parse(text, true), Err(Error::InvalidArgument { .. })), "{text}");
        }
    }
}
