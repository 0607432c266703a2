//! What `dynamo-kv-router` makes of the events: its own decoder reads what a real socket (of the
//! crate `zeromq`) received, its own index takes it in, and then finds the blocks that are cached,
//! and no others.

use std::sync::Arc;
use std::time::Duration;

use dynamo_kv_router::RadixTree;
use dynamo_kv_router::indexer::{
    KvIndexerInterface, LowerTierIndexers, LowerTierQueryOptions, query_lower_tiers_with_options,
};
use dynamo_kv_router::protocols::{
    BlockHashOptions, KvCacheEventData, StorageTier, WorkerWithDpRank, compute_block_hash_for_seq,
};
use dynamo_kv_router::zmq_wire::{ZmqEventNormalizer, decode_event_batch};
use kvcache::cache::{Demotion, LowerTier, Media, TierOptions};
use kvcache::dtype::KvFormat;
use kvcache::events::Encoding;
use kvcache::ids::Namespace;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::{Digest, Keys};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Configuration, TierKind, TierSettings};
use routers::{BLOCK_TOKENS, Worker, prompts, wait};
use tokio::time::timeout;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

const RANK: u32 = 3;
const WORKER: WorkerWithDpRank = WorkerWithDpRank { worker_id: 42, dp_rank: RANK };
const SPACE: Namespace = Namespace(0);

/// The router's view of one worker.
struct Router {
    tree: RadixTree,
    /// What is not on the device.
    below: LowerTierIndexers,
    normalizer: ZmqEventNormalizer,
    events: u64,
}

impl Router {
    fn new() -> Self {
        let normalizer = ZmqEventNormalizer::new(BLOCK_TOKENS);
        let below = LowerTierIndexers::new(1, BLOCK_TOKENS);
        Router { tree: RadixTree::new(), below, normalizer, events: 0 }
    }

    /// Takes a payload; returns how many of its events the index took.
    fn take(&mut self, payload: &[u8]) -> usize {
        let batch = decode_event_batch(payload).expect("a payload that the router decodes");
        assert_eq!(batch.data_parallel_rank, Some(RANK as i32));
        let mut taken = 0;
        for raw in batch.events {
            assert!(!raw.is_ignored(), "{raw:?}");
            // Events of the group with a window are not for this index: filtered, not refused.
            if let Some(event) = self.normalizer.normalize(raw, self.events, WORKER) {
                self.events += 1;
                taken += 1;
                let event = event.into_router_event().expect("an event of a worker");
                self.tree.apply_event(event).expect("an event that the index takes");
            }
        }
        taken
    }

    /// The same with the events of lower tiers, for the index of each; what clears the device clears
    /// all, as in the router's own back end.
    async fn take_tiers(&mut self, payload: &[u8]) {
        for raw in decode_event_batch(payload).expect("a payload that the router decodes").events {
            assert!(!raw.is_ignored(), "{raw:?}");
            let event = self.normalizer.normalize(raw, self.events, WORKER).expect("an event");
            self.events += 1;
            let event = event.into_router_event().expect("an event of a worker");
            if matches!(event.event.data, KvCacheEventData::Cleared) {
                for index in self.below.all() {
                    index.apply_event(event.clone()).await;
                }
            }
            if event.targets_primary().expect("a tier that it knows") {
                self.tree.apply_event(event).expect("an event that the index takes");
            } else {
                self.below.get_or_create(event.storage_tier).apply_event(event).await;
            }
        }
    }

    /// Leading blocks of a prompt that it believes to be on the device, then in the host, then on
    /// disk.
    async fn tiers(&self, prompt: &[u32]) -> [usize; 3] {
        for tier in self.below.all() {
            tier.flush().await;
        }
        let hashes = compute_block_hash_for_seq(prompt, BLOCK_TOKENS, BlockHashOptions::default());
        let device = self.tree.find_match_details(hashes.clone(), false);
        let below = LowerTierQueryOptions::default();
        let below = query_lower_tiers_with_options(&self.below, &hashes, &device, below);
        let hits = |tier| below.get(&tier).and_then(|found| found.hits.get(&WORKER)).copied();
        [
            device.overlap_scores.scores.get(&WORKER).map_or(0, |blocks| *blocks as usize),
            hits(StorageTier::HostPinned).unwrap_or(0),
            hits(StorageTier::Disk).unwrap_or(0),
        ]
    }

    /// Leading blocks of a prompt that the router believes to be cached.
    fn overlap(&self, prompt: &[u32]) -> u32 {
        self.overlap_with(prompt, BlockHashOptions::default())
    }

    fn overlap_with(&self, prompt: &[u32], options: BlockHashOptions) -> u32 {
        let hashes = compute_block_hash_for_seq(prompt, BLOCK_TOKENS, options);
        let scores = self.tree.find_matches(hashes, false).scores;
        assert!(scores.keys().all(|worker| *worker == WORKER));
        scores.get(&WORKER).copied().unwrap_or(0)
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn seq_of(message: &ZmqMessage, frame: usize) -> u64 {
    u64::from_be_bytes(message.get(frame).unwrap().as_ref().try_into().unwrap())
}

async fn receive(socket: &mut impl SocketRecv) -> ZmqMessage {
    timeout(Duration::from_secs(20), socket.recv()).await.expect("a message").unwrap()
}

/// A socket that the worker knows of.
async fn subscribed(worker: &Worker, topic: &str) -> SubSocket {
    let mut socket = SubSocket::new();
    socket.connect(&worker.endpoint).await.unwrap();
    socket.subscribe(topic).await.unwrap();
    // The crate's handshake runs on this thread's runtime.
    while worker.subscribers.count() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    socket
}

async fn sees_the_same_blocks(encoding: Encoding) {
    let mut worker = Worker::new(48, encoding, RANK);
    let mut socket = subscribed(&worker, "").await;
    // Before the subscription the stream began with a clear: that is only in the replay.
    let mut next = worker.settle();
    let mut router = Router::new();
    let prompts = prompts(60, 7);
    for round in 0..200 {
        worker.serve(&prompts[(round * 37) % prompts.len()], SPACE);
        if round == 150 {
            worker.cache.snapshot_events().unwrap();
        }
        let end = worker.settle();
        while next < end {
            let message = receive(&mut socket).await;
            assert_eq!((message.len(), seq_of(&message, 1)), (3, next));
            assert_eq!(message.get(0).unwrap().as_ref(), b"kv-events");
            router.take(message.get(2).unwrap());
            next += 1;
        }
        assert_eq!(router.tree.current_size(), worker.cache.stats().cached_blocks as usize);
    }
    let (mut whole, mut part, mut none) = (0, 0, 0);
    for prompt in &prompts {
        let cached = worker.cached_blocks(prompt, SPACE);
        assert_eq!(router.overlap(prompt), cached);
        match cached {
            0 => none += 1,
            n if n * BLOCK_TOKENS == prompt.len() as u32 => whole += 1,
            _ => part += 1,
        }
    }
    assert!(whole > 0 && part > 0 && none > 0, "{whole} hits, {part} partial, {none} misses");
    assert!(worker.cache.stats().evicted_blocks > 100);

    // A router that comes late: the whole stream again, from the first message.
    let mut dealer = DealerSocket::new();
    dealer.connect(&worker.replay).await.unwrap();
    let mut request = ZmqMessage::from(Vec::new());
    request.push_back(0u64.to_be_bytes().to_vec().into());
    dealer.send(request).await.unwrap();
    let (mut late, mut expected) = (Router::new(), 0);
    loop {
        let message = receive(&mut dealer).await;
        assert_eq!(message.len(), 4);
        if message.get(3).unwrap().is_empty() {
            assert_eq!(seq_of(&message, 2), u64::MAX);
            break;
        }
        assert_eq!(seq_of(&message, 2), expected);
        late.take(message.get(3).unwrap());
        expected += 1;
    }
    assert_eq!(expected, next);
    assert_eq!(late.tree.current_size(), router.tree.current_size());
    for prompt in &prompts {
        assert_eq!(late.overlap(prompt), router.overlap(prompt));
    }
    worker.cache.clear_prefix().unwrap();
    for seq in next..worker.settle() {
        let message = receive(&mut socket).await;
        assert_eq!(seq_of(&message, 1), seq);
        assert!(router.take(message.get(2).unwrap()) > 0);
    }
    assert_eq!(router.tree.current_size(), 0);
}

#[test]
fn the_router_sees_the_same_blocks_in_maps() {
    runtime().block_on(sees_the_same_blocks(Encoding::Map));
}

#[test]
fn the_router_sees_the_same_blocks_in_arrays() {
    runtime().block_on(sees_the_same_blocks(Encoding::Array));
}

async fn sees_the_same_tiers(encoding: Encoding) {
    let dir = std::env::temp_dir().join(format!("kvcache-routers-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    let spec = CacheSpec::uniform(BLOCK_TOKENS, GroupSpec::uniform(1, 1, 8, KvFormat::F16));
    let config = Configuration::new("m", &spec, &Slice::whole(&spec)).unwrap();
    let disk = DiskOptions::new(&dir, 1 << 20);
    let tiers = |host_blocks| {
        let store = Arc::new(DiskStore::open(&disk, &config).unwrap().0);
        let settings =
            TierSettings { kind: TierKind::Disk, readers: 1, writers: 1, queued_blocks: 256 };
        let demotion = Demotion::default();
        let lower = LowerTier { store: store.clone(), settings, demotion };
        (store, TierOptions { lower: vec![lower], ..TierOptions::host("m", host_blocks) })
    };
    let (store, options) = tiers(24);
    let mut worker = Worker::with_tiers(48, options, encoding, RANK);
    let mut socket = subscribed(&worker, "").await;
    let (mut next, mut router) = (worker.settle(), Router::new());
    let prompts = prompts(60, 7);
    let mut seen = [0; 3];
    for round in 0..150 {
        worker.serve(&prompts[(round * 37) % prompts.len()], SPACE);
        if round % 10 == 9 {
            assert!(worker.cache.flush_tiers(Duration::from_secs(20)));
        }
        if round == 100 {
            worker.cache.snapshot_events().unwrap();
        }
        // Which blocks follow each other where: asked of the cache, and of the router. Again where they
        // differ: asking may take what still waits for the disk back into the host.
        let prompt = &prompts[(round * 11) % prompts.len()];
        let longer = [&prompt[..], &[i32::MAX as u32]].concat();
        let begin = std::time::Instant::now();
        let told = loop {
            let prefetch = worker.cache.prefetch(&longer, SPACE).unwrap();
            let block = BLOCK_TOKENS as usize;
            let (device, host) = (prefetch.device_tokens / block, prefetch.host_tokens / block);
            drop(prefetch);
            let end = worker.settle();
            while next < end {
                router.take_tiers(receive(&mut socket).await.get(2).unwrap()).await;
                next += 1;
            }
            let told = router.tiers(prompt).await;
            if (told[0], told[1]) == (device, host) {
                break told;
            }
            let late = begin.elapsed() > Duration::from_secs(20);
            assert!(!late, "round {round}: {told:?} told, {device} and {host} there");
            std::thread::sleep(Duration::from_millis(1));
        };
        seen.iter_mut().zip(told).for_each(|(seen, told)| *seen += told);
    }
    assert!(seen.iter().all(|&blocks| blocks > 20), "{seen:?}");
    // What waits is written.
    drop(worker);
    let on_disk = store.keys().len();
    assert!(on_disk > 50, "{on_disk} on disk");
    drop(store);

    // Another process finds them there, and a router finds them with it.
    let (store, options) = tiers(24);
    assert_eq!(store.keys().len(), on_disk);
    let worker = Worker::with_tiers(48, options, encoding, RANK);
    let mut dealer = DealerSocket::new();
    dealer.connect(&worker.replay).await.unwrap();
    let mut request = ZmqMessage::from(Vec::new());
    request.push_back(0u64.to_be_bytes().to_vec().into());
    dealer.send(request).await.unwrap();
    let mut router = Router::new();
    loop {
        let message = receive(&mut dealer).await;
        if message.get(3).unwrap().is_empty() {
            break;
        }
        router.take_tiers(message.get(3).unwrap()).await;
    }
    let keys: std::collections::BTreeSet<_> = store.keys().into_iter().collect();
    let mut found = 0;
    for prompt in &prompts {
        let mut above = None;
        let there = prompt.chunks_exact(BLOCK_TOKENS as usize).take_while(|tokens| {
            let digest = Digest::of_block(above.as_ref(), tokens);
            above = Some(digest);
            keys.contains(&config.key(&digest))
        });
        let there = there.count();
        assert_eq!(router.tiers(prompt).await, [0, 0, there]);
        found += there;
    }
    assert!(found > 50, "{found} found");
    drop((worker, store));
    let _ = std::fs::remove_dir_all(&dir);
}

#[test]
fn the_router_sees_the_same_tiers() {
    for encoding in [Encoding::Map, Encoding::Array] {
        runtime().block_on(sees_the_same_tiers(encoding));
    }
}

/// Tenants with salts, with the same prompts: the router keeps them apart as the cache does.
#[test]
fn the_router_keeps_salts_apart() {
    let mut worker = Worker::new(256, Encoding::Map, RANK);
    let tenant = Namespace(9);
    let keys = Keys { salt: "dynamo-cache-salt:tenant", ..Keys::default() };
    worker.cache.describe_namespace(tenant, &keys).unwrap();
    let prompts = prompts(30, 3);
    let mut router = Router::new();
    runtime().block_on(async {
        let mut socket = subscribed(&worker, "").await;
        let next = worker.settle();
        for (n, prompt) in prompts.iter().enumerate() {
            // In pieces, so that later events have parents.
            for end in [16, prompt.len()] {
                worker.serve(&prompt[..end], if n % 2 == 0 { tenant } else { SPACE });
            }
        }
        for seq in next..worker.settle() {
            let message = receive(&mut socket).await;
            assert_eq!(seq_of(&message, 1), seq);
            router.take(message.get(2).unwrap());
        }
    });
    let mut apart = 0;
    for prompt in &prompts {
        let options = BlockHashOptions { cache_namespace: Some("tenant"), ..Default::default() };
        let salted = router.overlap_with(prompt, options);
        assert_eq!(salted, worker.cached_blocks(prompt, tenant));
        assert_eq!(router.overlap(prompt), worker.cached_blocks(prompt, SPACE));
        apart += u32::from(salted != router.overlap(prompt));
    }
    assert!(apart > 10);
}

/// Prompts with images: the router takes their events, and has as many blocks as the cache.
#[test]
fn the_router_takes_blocks_with_media() {
    let mut worker = Worker::new(256, Encoding::Map, RANK);
    let mut router = Router::new();
    runtime().block_on(async {
        let mut socket = subscribed(&worker, "").await;
        let next = worker.settle();
        let prompt: Vec<u32> = (0..64).collect();
        for n in 0..3 {
            // Sixteen digits and zeros, as the router knows them.
            let mut digest = Digest::default();
            digest.0[..8].fill(n);
            let media = [Media { position: 20, digest }];
            let cached = worker.serve_with_media(&prompt, &media, SPACE);
            assert_eq!(cached, if n == 0 { 0 } else { 20 });
        }
        for seq in next..worker.settle() {
            let message = receive(&mut socket).await;
            assert_eq!(seq_of(&message, 1), seq);
            router.take(message.get(2).unwrap());
        }
    });
    // One before the image, three from it on for each.
    assert_eq!(worker.cache.stats().cached_blocks, 10);
    assert_eq!(router.tree.current_size(), 10);
}

/// A subscriber that ends without a word, and one that comes after it.
#[test]
fn subscribers_come_and_go() {
    let mut worker = Worker::new(48, Encoding::Map, RANK);
    for _ in 0..3 {
        runtime().block_on(async {
            let mut socket = subscribed(&worker, "kv").await;
            let next = worker.settle();
            worker.serve(&prompts(5, next)[4], SPACE);
            assert_eq!(seq_of(&receive(&mut socket).await, 1), next);
        });
        wait(|| worker.subscribers.count() == 0);
    }
}
