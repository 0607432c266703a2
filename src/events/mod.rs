//! KV events: what became cached and what ceased to be, told to the outside as it happens.
//!
//! A cache queues its events while it is inside a call ([`Queue`]), so their order is the order in
//! which things happened; one thread ([`Publisher`]) takes them out and hands them to sinks: a
//! callback, or under the feature `zmq` sockets that existing routers read. Blocks that follow each
//! other are one event, as far as they were queued one after the other.
//!
//! # Tiers
//! A block is told where it is, medium by medium: one that moves from the device to the host is
//! stored there and then removed here, one that is recalled is in both. What a disk tier holds and
//! loses is told by the thread that writes it, exactly; what it holds from before a restart is told
//! when events begin, if its namespace was described (or needs no description), else when it is. Of
//! a store that says nothing by itself (Redis, S3, the engine's own) is told what this cache put
//! there or found there, until it misses it; of the last 131,072 such blocks.
//!
//! # A consumer that does not keep up
//! The cache never waits. The queue holds a fixed number of blocks; where the next event does not
//! fit, all that is queued is dropped and counted, and so is what happens after it. Once the
//! publisher comes back it skips one sequence number, so that the gap can be seen, and tells its
//! sinks that everything is cleared; at its next call the cache queues all that is resident as new
//! and goes on from there. So a consumer may know too little for a while, and never goes on
//! believing in blocks that are gone.
//!
//! What can wait, such as a disk of blocks from before a restart, takes half of the queue at most,
//! and is asked for more each time that something was published ([`Backlog`]).
//!
//! This module knows no cache: it is told digests, tokens and groups.

mod publisher;
mod queue;
mod sync {
    pub(super) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
}
#[cfg(feature = "zmq")]
mod replay;
#[cfg(feature = "zmq")]
mod server;
#[cfg(feature = "zmq")]
mod socket;
#[cfg(feature = "zmq")]
mod wire;
#[cfg(feature = "zmq")]
mod zmq;
#[cfg(feature = "zmq")]
mod zmtp;

pub use publisher::{Message, Publisher, Sink};
pub use queue::{Backlog, Batch, Events, Locked, Queue, QueueStats};
#[cfg(feature = "zmq")]
pub use wire::{Encoding, encode};
#[cfg(feature = "zmq")]
pub use zmq::{Subscribers, ZmqOptions, ZmqSink};

use alloc::string::String;
use alloc::vec::Vec;

use crate::ids::{Namespace, TokenId};
use crate::prefix::Digest;

/// Where blocks are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Medium {
    /// The pool that attention reads, wherever that is.
    Gpu,
    /// Host memory behind it: the host tier.
    Cpu,
    /// Local files or devices: the disk tier.
    Storage,
    /// Another machine, or the engine's own store: remote tiers.
    External,
}

impl Medium {
    /// The name that events carry.
    pub const fn name(self) -> &'static str {
        match self {
            Medium::Gpu => "GPU",
            Medium::Cpu => "CPU",
            Medium::Storage => "STORAGE",
            Medium::External => "EXTERNAL",
        }
    }
}

/// What kind of attention a layer group has: routers index only some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttentionKind {
    /// Every token sees all before it.
    Full,
    /// Multi-head latent attention, over all tokens.
    Latent,
    /// Over the last tokens only: this many.
    Window(u32),
    /// Latent attention over the last tokens only: this many.
    LatentWindow(u32),
}

impl AttentionKind {
    /// The name that events carry.
    pub const fn name(self) -> &'static str {
        match self {
            AttentionKind::Full => "full_attention",
            AttentionKind::Latent => "mla_attention",
            AttentionKind::Window(_) => "sliding_window",
            AttentionKind::LatentWindow(_) => "sliding_window_mla",
        }
    }

    /// The window, in tokens.
    pub const fn window(self) -> Option<u32> {
        match self {
            AttentionKind::Full | AttentionKind::Latent => None,
            AttentionKind::Window(tokens) | AttentionKind::LatentWindow(tokens) => Some(tokens),
        }
    }
}

/// What does not change from event to event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// The layer groups.
    pub groups: Vec<AttentionKind>,
}

/// What readers are told of a namespace, so that they can tell its blocks from those of others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Name {
    /// Tenant or other salt; empty for none.
    pub salt: String,
    /// Name of the adapter; empty for none.
    pub lora: String,
}

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// Blocks that follow each other are cached now.
    Stored {
        /// Where.
        medium: Medium,
        /// In which layer group.
        group: u32,
        /// In which namespace.
        space: Namespace,
        /// The block before the first; `None` where that is the first of its sequence.
        parent: Option<Digest>,
        /// The blocks, at least one.
        digests: &'a [Digest],
        /// Their tokens, [`Shape::block_tokens`] a block.
        tokens: &'a [TokenId],
        /// What begins at some of the tokens that they do not name, such as an image: its token's
        /// place in `tokens` and the digest of its content, in order.
        media: &'a [(u32, Digest)],
    },
    /// Blocks are not cached there any more.
    Removed {
        /// Where.
        medium: Medium,
        /// In which layer group.
        group: u32,
        /// The blocks, in no particular order, at least one.
        digests: &'a [Digest],
    },
    /// Nothing is cached in any medium or group.
    Cleared,
}
