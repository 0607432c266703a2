//! What events tell of the tiers, against what the tiers have: after every step of a random life a
//! listener that knows nothing but the events believes in exactly the blocks that are there.

#[path = "../../../tests/tier_case/folder.rs"]
mod folder;
#[path = "../../../tests/tier_case/remote.rs"]
mod remote;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Instant;

use folder::Folder;
use remote::Remote;

use super::{Demotion, LowerTier, TierOptions};
use crate::cache::{CacheOptions, KvCache, LayerId, Media, Step, Work};
use crate::dtype::{KvFormat, Rows};
use crate::events::{Event, Medium, Message, Publisher};
use crate::ids::{BlockId, Namespace, TokenId};
use crate::layout::slice::Slice;
use crate::layout::{CacheSpec, GroupSpec};
use crate::prefix::{Digest, Keys};
use crate::tier::disk::{DiskOptions, DiskStore};
use crate::tier::{Configuration, Get, ObjectKey, Outcome, Put, Store, TierKind, TierSettings};

/// Tokens of a block without sinks; with them, twice as many.
const BLOCK: usize = 16;
const GROUPS: u32 = 2;
const LONG: Duration = Duration::from_secs(30);
const TENANT: Namespace = Namespace(7);
const KEYS: Keys = Keys { salt: "tenant", lora: "", extra: &[] };

type Blocks = BTreeSet<(&'static str, u32, Digest)>;

/// Knows what events tell.
#[derive(Debug, Default)]
struct Listener {
    blocks: Blocks,
    block_tokens: usize,
    /// What stands before the first block of a sequence.
    seeds: BTreeMap<Namespace, Option<Digest>>,
}

impl Listener {
    fn take(&mut self, message: &Message) {
        for event in message.events() {
            match event {
                Event::Stored { medium, group, space, parent, digests, tokens, media } => {
                    assert_eq!(message.name(space).is_some(), space == TENANT);
                    let seed = self.seeds[&space];
                    let mut above = parent.or(seed);
                    let blocks = tokens.chunks_exact(self.block_tokens).zip(digests).enumerate();
                    for (n, (tokens, digest)) in blocks {
                        let media: Vec<(u32, Digest)> = media
                            .iter()
                            .filter(|(at, _)| *at as usize / self.block_tokens == n)
                            .map(|&(at, medium)| (at % self.block_tokens as u32, medium))
                            .collect();
                        let own = Digest::of_block_with_media(above.as_ref(), tokens, &media);
                        assert_eq!(*digest, own, "tokens and parent are the block's");
                        let news = self.blocks.insert((medium.name(), group, own));
                        assert!(news, "{medium:?} stored twice");
                        above = Some(own);
                    }
                }
                Event::Removed { medium, group, digests } => {
                    for &digest in digests {
                        let known = self.blocks.remove(&(medium.name(), group, digest));
                        assert!(known, "{medium:?} removed unknown");
                    }
                }
                Event::Cleared => self.blocks.clear(),
            }
        }
    }
}

/// A cache with all tiers, and what they really have.
struct Bed {
    cache: KvCache,
    disk: Arc<DiskStore>,
    remote: Arc<Remote>,
    listener: Arc<Mutex<Listener>>,
    publisher: Option<Publisher>,
    /// Every block there ever was, by the keys of its objects; and how many those are.
    known: BTreeMap<ObjectKey, (Digest, usize)>,
    step: Step,
}

impl Bed {
    /// Over a directory, with room for so many blocks in the device, the host and on disk.
    fn new(folder: &Folder, sizes: [usize; 3], on_commit: bool) -> Self {
        let full = GroupSpec::uniform(1, 1, 8, KvFormat::F16);
        Self::of(folder, BLOCK, full, sizes, on_commit)
    }

    /// With the first block of each sequence raw in a group, and so of several objects.
    fn with_sinks(folder: &Folder, sizes: [usize; 3], on_commit: bool) -> Self {
        let sealed = GroupSpec::uniform(1, 1, 32, KvFormat::Kt4v4);
        let group = GroupSpec { sink_tokens: 2 * BLOCK as u32, ..sealed };
        Self::of(folder, 2 * BLOCK, group, sizes, on_commit)
    }

    fn of(
        folder: &Folder,
        block_tokens: usize,
        first: GroupSpec,
        [device, host, disk]: [usize; 3],
        on_commit: bool,
    ) -> Self {
        let window = GroupSpec::uniform(1, 1, 8, KvFormat::F16);
        let window = GroupSpec { window: Some(4 * block_tokens as u32), ..window };
        let spec = CacheSpec { block_tokens: block_tokens as u32, groups: vec![first, window] };
        let blocks = device as u32;
        let options = CacheOptions { blocks, max_seqs: 4, threads: 1, ..CacheOptions::default() };
        let mut cache = KvCache::new(&spec, &options).unwrap();
        let config = Configuration::new("m", &spec, &Slice::whole(&spec)).unwrap();
        let mut at = DiskOptions::new(&folder.0, 0);
        // One page for the head, one for the payload.
        at.capacity_bytes = disk as u64 * 8192;
        let disk = Arc::new(DiskStore::open(&at, &config).unwrap().0);
        let remote = Arc::new(Remote::default());
        let lower = |store: Arc<dyn Store>, kind| {
            let settings = TierSettings { kind, readers: 2, writers: 1, queued_blocks: 256 };
            LowerTier { store, settings, demotion: Demotion { on_commit, ..Demotion::default() } }
        };
        let mut tiers = TierOptions::host("m", host);
        let stores: [(Arc<dyn Store>, _); 2] =
            [(disk.clone(), TierKind::Disk), (remote.clone(), TierKind::Remote)];
        tiers.lower = stores.map(|(store, kind)| lower(store, kind)).into();
        cache.attach_tiers(tiers).unwrap();
        let listener = Listener { block_tokens, ..Listener::default() };
        let listener = Arc::new(Mutex::new(listener));
        let (publisher, known, step) = (None, BTreeMap::new(), Step::new());
        Bed { cache, disk, remote, listener, publisher, known, step }
    }

    fn block_tokens(&self) -> usize {
        self.cache.spec().block_tokens as usize
    }

    fn describe(&mut self) {
        let mut listener = self.listener.lock().unwrap();
        self.cache.describe_namespace(TENANT, &KEYS).unwrap();
        listener.seeds.insert(TENANT, self.cache.outside.seed(TENANT));
    }

    fn listen(&mut self, capacity: usize) {
        let seed = self.cache.outside.seed(Namespace(0));
        self.listener.lock().unwrap().seeds.insert(Namespace(0), seed);
        let queue = self.cache.enable_events(capacity).unwrap();
        let listener = self.listener.clone();
        let take = move |message: &Message| listener.lock().unwrap().take(message);
        self.publisher = Some(Publisher::start(queue, vec![Box::new(take)]).unwrap());
    }

    fn serve(&mut self, prompt: &[TokenId], media: &[Media], space: Namespace) -> u32 {
        let mut prefetch = self.cache.prefetch_with_media(prompt, media, space).unwrap();
        self.cache.wait_prefetch(&mut prefetch, LONG);
        let started = self.cache.start_with_media(prompt, media, space).unwrap();
        let tokens = &prompt[started.cached_tokens as usize..];
        self.cache.begin(&mut self.step, &[Work { seq: started.seq, tokens }]).unwrap();
        for group in 0..GROUPS {
            let row = self.cache.spec().groups[group as usize].k_dim as usize;
            let rows = vec![1.0f32; tokens.len() * row];
            let (at, rows) = (LayerId { group, layer: 0 }, Rows::F32(&rows));
            self.cache.append(&self.step, at, rows, rows, None).unwrap();
        }
        self.cache.commit(&mut self.step).unwrap();
        self.cache.release(started.seq).unwrap();
        self.cache.audit().unwrap();
        started.cached_tokens
    }

    /// What is where.
    fn truth(&mut self) -> Blocks {
        let cache = &self.cache;
        let tiers = cache.tiers.as_ref().unwrap();
        assert!(tiers.lower.iter().all(|(tier, _)| tier.flush(LONG)));
        let mut truth = Blocks::new();
        cache.prefix.as_ref().unwrap().for_each_chain(&mut |chain| {
            for ids in chain.blocks.chunks_exact(GROUPS as usize) {
                let objects = tiers.objects(ids);
                for (group, &id) in (0..).zip(ids).filter(|(_, id)| **id != BlockId::NONE) {
                    let digest = cache.digest(group, id).unwrap();
                    for number in 0..objects {
                        let key = tiers.config.key_of(&digest, number);
                        self.known.insert(key, (digest, objects.into()));
                    }
                    truth.insert((Medium::Gpu.name(), group, digest));
                }
            }
        });
        let host: Vec<ObjectKey> = tiers.host.iter().map(|block| block.label.key).collect();
        let remote: Vec<ObjectKey> = self.remote.0.lock().unwrap().keys().copied().collect();
        let below =
            [(Medium::Cpu, host), (Medium::Storage, self.disk.keys()), (Medium::External, remote)];
        for (medium, keys) in below {
            let mut there: BTreeMap<Digest, usize> = BTreeMap::new();
            for key in keys {
                let (digest, objects) = self.known[&key];
                let there = there.entry(digest).or_default();
                *there += 1;
                if *there == objects {
                    truth.extend((0..GROUPS).map(|group| (medium.name(), group, digest)));
                }
            }
        }
        truth
    }

    /// Waits until the listener believes what is so, which must be soon.
    fn check(&mut self) {
        let (begin, truth) = (Instant::now(), self.truth());
        loop {
            // After a loss the next call tells everything anew.
            self.cache.outside.resync(self.cache.prefix.as_ref(), &self.cache.media);
            let told = self.listener.lock().unwrap().blocks.clone();
            if told == truth {
                return;
            }
            if begin.elapsed() > LONG {
                let count = |blocks: &Blocks, medium: Medium| {
                    blocks.iter().filter(|(name, ..)| *name == medium.name()).count()
                };
                for medium in [Medium::Gpu, Medium::Cpu, Medium::Storage, Medium::External] {
                    let (told, there) = (count(&told, medium), count(&truth, medium));
                    std::eprintln!("{medium:?}: {told} told, {there} there");
                }
                panic!("what was told is not what is there");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A number below `below`.
fn random(state: &mut u64, below: usize) -> usize {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 33) as usize % below
}

fn prompt(state: &mut u64) -> (Vec<TokenId>, Vec<Media>) {
    let (base, fork, tail) = (random(state, 3), random(state, 120), 10 + random(state, 6));
    let tokens: Vec<TokenId> = (0..1 + random(state, 150))
        .map(|at| if at < fork { base as u32 } else { tail as u32 })
        .collect();
    let place = random(state, 60) as u32;
    let media = match random(state, 4) {
        0 if (place as usize) < tokens.len() => {
            vec![Media { position: place, digest: Digest([1 + random(state, 2) as u8; 32]) }]
        }
        _ => Vec::new(),
    };
    (tokens, media)
}

fn live(sizes: [usize; 3], on_commit: bool, capacity: usize, seed: u64) {
    let folder = Folder::new(&alloc::format!("told-life-{seed}"));
    live_in(Bed::new(&folder, sizes, on_commit), on_commit, capacity, seed);
}

fn live_in(mut bed: Bed, on_commit: bool, capacity: usize, seed: u64) {
    bed.describe();
    bed.listen(capacity);
    let mut state = seed;
    for _ in 0..100 {
        let (mut prompt, media) = prompt(&mut state);
        if bed.block_tokens() > BLOCK {
            prompt = prompt.iter().flat_map(|&token| [token; 2]).collect();
        }
        let space = if random(&mut state, 3) == 0 { TENANT } else { Namespace(0) };
        match random(&mut state, 24) {
            0 => bed.cache.clear_prefix().unwrap(),
            1 => bed.cache.snapshot_events().unwrap(),
            2 => assert!(bed.cache.flush_tiers(LONG)),
            // Several at once, with the listener behind.
            3..=5 => {
                for end in [16, 40, prompt.len()].map(|end| end.min(prompt.len())) {
                    let media: Vec<_> =
                        media.iter().filter(|m| (m.position as usize) < end).copied().collect();
                    bed.serve(&prompt[..end], &media, space);
                }
            }
            _ => drop(bed.serve(&prompt, &media, space)),
        }
        bed.check();
    }
    let reports = bed.cache.tier_reports();
    let evicted: u64 = reports.iter().map(|report| report.counters.evicted).sum();
    assert!(evicted + bed.disk.evicted() > 50, "blocks came and went");
    let media: BTreeSet<_> = bed.truth().iter().map(|(medium, ..)| *medium).collect();
    // Without `on_commit` what the host evicts goes to the first that takes it.
    assert!(media.len() >= if on_commit { 4 } else { 3 }, "{media:?}");
    // The end of the cache is the end of what is told, whatever its tiers still write.
    let Bed { cache, listener, publisher, .. } = bed;
    drop((cache, publisher));
    assert!(listener.lock().unwrap().blocks.is_empty());
}

#[test]
fn a_listener_knows_what_each_tier_has() {
    live([12, 6, 10], false, 0, 1);
    live([12, 6, 10], true, 0, 2);
}

#[test]
fn a_block_of_several_objects_is_there_while_all_of_them_are() {
    for (n, (on_commit, capacity)) in [(false, 0), (true, 0), (true, 24)].into_iter().enumerate() {
        let folder = Folder::new(&alloc::format!("told-sinks-{n}"));
        let bed = Bed::with_sinks(&folder, [12, 9, 14], on_commit);
        live_in(bed, on_commit, capacity, 11 + n as u64);
    }
    // After a restart those on disk are told, and found.
    let folder = Folder::new("told-sinks-restart");
    let mut bed = Bed::with_sinks(&folder, [12, 6, 400], true);
    let prompts: Vec<Vec<TokenId>> = (0..5).map(|n| (n * 1000..n * 1000 + 99).collect()).collect();
    for prompt in &prompts {
        bed.serve(prompt, &[], Namespace(0));
        bed.truth();
    }
    let known = bed.known.clone();
    drop(bed);
    let mut bed = Bed::with_sinks(&folder, [12, 60, 400], true);
    bed.known = known;
    bed.listen(0);
    bed.check();
    assert_eq!(bed.listener.lock().unwrap().blocks.len(), 5 * 3 * GROUPS as usize);
    assert_eq!(bed.serve(&prompts[0], &[], Namespace(0)), 96);
    bed.check();
}

#[test]
fn what_finds_no_room_in_the_queue_is_told_later() {
    // Less room than the tiers have blocks; and a disk that is larger than everything.
    live([12, 20, 30], true, 24, 3);
    live([12, 4, 100], false, 24, 4);
}

#[test]
fn after_a_restart_the_blocks_on_disk_are_told() {
    for (capacity, before) in [(0, true), (24, true), (24, false)] {
        let folder = Folder::new(&alloc::format!("told-restart-{capacity}-{before}"));
        let mut bed = Bed::new(&folder, [12, 6, 400], true);
        bed.describe();
        let mut state = 5;
        for n in 0..40 {
            let (prompt, media) = prompt(&mut state);
            bed.serve(&prompt, &media, if n % 3 == 0 { TENANT } else { Namespace(0) });
            bed.truth();
        }
        let (known, on_disk) = (bed.known.clone(), bed.disk.keys().len());
        assert!(on_disk > 40);
        drop(bed);
        let mut bed = Bed::new(&folder, [12, 6, 400], true);
        bed.known = known;
        if before {
            bed.describe();
        }
        bed.listen(capacity);
        if !before {
            // Those of a namespace that nobody has described wait for its name.
            let begin = Instant::now();
            let told = |bed: &Bed| bed.listener.lock().unwrap().blocks.len();
            let plain = loop {
                let now = told(&bed);
                std::thread::sleep(Duration::from_millis(100));
                if now > 0 && told(&bed) == now {
                    break now;
                }
                assert!(begin.elapsed() < LONG);
            };
            assert!(plain > 0 && plain < on_disk * GROUPS as usize, "{plain} of {on_disk}");
            bed.describe();
        }
        bed.check();
        assert_eq!(bed.listener.lock().unwrap().blocks.len(), on_disk * GROUPS as usize);
        // And they are what the prompts find.
        let mut state = 5;
        let (prompt, media) = prompt(&mut state);
        let whole = (prompt.len() - 1) / BLOCK * BLOCK;
        assert_eq!(bed.serve(&prompt, &media, TENANT) as usize, whole);
        bed.check();
    }
}

#[test]
fn what_a_store_lost_is_told_when_it_is_missed() {
    let folder = Folder::new("told-lost");
    let mut bed = Bed::new(&folder, [12, 0, 1], true);
    bed.listen(0);
    let prompt: Vec<TokenId> = (0..131).collect();
    bed.serve(&prompt, &[], Namespace(0));
    bed.check();
    assert_eq!(bed.remote.0.lock().unwrap().len(), 8);
    // Elsewhere somebody removes all of it; the device's and the host's copies go for others.
    bed.remote.0.lock().unwrap().clear();
    let other: Vec<TokenId> = (1000..1180).collect();
    bed.serve(&other, &[], Namespace(0));
    let listener = bed.listener.clone();
    let told = || {
        let listener = listener.lock().unwrap();
        listener.blocks.iter().filter(|(name, ..)| *name == Medium::External.name()).count()
    };
    bed.truth();
    // Of what was removed nothing is told yet.
    let before = (8 + bed.remote.0.lock().unwrap().len()) * GROUPS as usize;
    let begin = Instant::now();
    let wait = |until: &dyn Fn(usize) -> bool| {
        while !until(told()) {
            assert!(begin.elapsed() < LONG, "{before} told, and {} now", told());
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    wait(&|told| told == before);
    let mut prefetch = bed.cache.prefetch(&prompt, Namespace(0)).unwrap();
    bed.cache.wait_prefetch(&mut prefetch, LONG);
    wait(&|told| told < before);
    // Computed again, and so put again.
    bed.serve(&prompt, &[], Namespace(0));
    bed.check();
}
