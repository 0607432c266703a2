//! Tiers of a cache on an emulated device that is as late as it may be: what is evicted goes down and
//! comes back to the bit, in whatever order streams and their events allow; an order that is not kept is
//! found out; and what a device or a system refuses costs what it says, and nothing else.
#![cfg(all(unix, feature = "emulate"))]

mod late_device;
mod tier_case;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use kvcache::attention::Scoring;
use kvcache::cache::{
    CacheOptions, Demotion, KvCache, LayerId, LowerTier, Step, TierOptions, Work,
};
use kvcache::device::{
    self, Backend, Copies, Device, DeviceMemory, DeviceRows, DeviceStore, HostPart, SideStream,
    StoreOptions, Stream, Way,
};
use kvcache::dtype::{DType, KvFormat};
use kvcache::error::{Error, Result};
use kvcache::ids::BlockId;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupLayout, GroupSpec};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Configuration, Store, TierCounters, TierKind};
use late_device::{CACHE, DOWN, Late, Pace, Trouble, UP};
use tier_case::{BLOCK, LONG, SPACE, below, noise, report};

const LAYERS: u32 = 2;
const DIM: usize = 64;

fn spec() -> CacheSpec {
    CacheSpec::uniform(BLOCK as u32, GroupSpec::uniform(LAYERS, 1, DIM as u32, KvFormat::F16))
}

fn rows(kind: u32, layer: u32, first: usize, tokens: &[u32]) -> Vec<f32> {
    let mut rows = Vec::new();
    for (n, &token) in tokens.iter().enumerate() {
        let at = (first + n) as u32;
        rows.extend((0..DIM as u32).map(|c| noise([kind * 64 + layer, at, token, 0, c])));
    }
    rows
}

/// Serves a prompt: how much of it was cached, and the attention of its last token in all layers.
fn serve(cache: &mut KvCache, prompt: &[u32], by_layers: bool) -> Result<(usize, Vec<f32>)> {
    let started = match by_layers {
        true => cache.start_onboarding(prompt, &[], SPACE)?,
        false => cache.start(prompt, SPACE)?,
    };
    let (cached, last) = (started.cached_tokens as usize, prompt.len() - 1);
    let (mut step, mut out) = (Step::new(), Vec::new());
    // The last token alone, so that its attention depends on nothing but what is stored.
    for part in [cached..last, last..prompt.len()] {
        if part.is_empty() {
            continue;
        }
        let tokens = &prompt[part.clone()];
        cache.begin(&mut step, &[Work { seq: started.seq, tokens }])?;
        for layer in 0..LAYERS {
            let at = LayerId::uniform(layer);
            assert!(cache.wait_layer(started.seq, at, LONG)?);
            let row = |kind| rows(kind, layer, part.start, tokens);
            let (q, k, v) = (row(0), row(1), row(2));
            cache.append(&step, at, k[..].into(), v[..].into(), None)?;
            let mut attended = vec![0f32; q.len()];
            let scoring = Scoring::causal(DIM as u32);
            cache.attend(&step, at, q[..].into(), (&mut attended[..]).into(), &scoring, None)?;
            if part.start == last {
                out.extend(attended);
            }
        }
        cache.commit(&mut step)?;
    }
    cache.release(started.seq)?;
    cache.audit().unwrap();
    Ok((cached, out))
}

fn on(backend: &Arc<dyn Backend>, blocks: u32) -> KvCache {
    let options = CacheOptions {
        blocks,
        max_seqs: 4,
        threads: 1,
        deterministic: true,
        ..CacheOptions::default()
    };
    KvCache::on(backend, &spec(), &options).unwrap()
}

fn emulated() -> Arc<dyn Backend> {
    device::open(Device::Emu).unwrap()
}

/// Prompts, some of which begin alike, and what a cache computes that has room for everything.
struct Prompts(Vec<(Vec<u32>, Vec<f32>)>);

impl Prompts {
    /// The first so many of six.
    fn new(count: usize) -> Self {
        static ALL: OnceLock<Vec<(Vec<u32>, Vec<f32>)>> = OnceLock::new();
        Prompts(ALL.get_or_init(|| Self::serve(6))[..count].to_vec())
    }

    fn serve(count: u32) -> Vec<(Vec<u32>, Vec<f32>)> {
        let mut cache = on(&emulated(), 64);
        let prompt = |n: u32| -> Vec<u32> {
            let tokens = (2 + n % 3) * BLOCK as u32 + 3;
            (0..tokens)
                .map(|t| if t < BLOCK as u32 { n % 2 * 500 + t } else { n * 1000 + t })
                .collect()
        };
        let served = |n| {
            let prompt = prompt(n);
            let out = serve(&mut cache, &prompt, false).unwrap().1;
            (prompt, out)
        };
        (0..count).map(served).collect()
    }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kvcache-lift-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Folder(path)
    }

    fn tier(&self) -> LowerTier {
        let config = Configuration::new("m", &spec(), &Slice::whole(&spec())).unwrap();
        let store =
            DiskStore::open(&DiskOptions::new(Path::new(&self.0), 16 << 20), &config).unwrap();
        let store: Arc<dyn Store> = Arc::new(store.0);
        below(store, TierKind::Disk)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn late(pace: Pace) -> (Arc<Late>, Arc<dyn Backend>) {
    let late = Late::new(emulated(), pace);
    (late.clone(), late)
}

fn host(cache: &KvCache) -> TierCounters {
    report(cache, TierKind::Host).counters
}

/// A life of `turns` prompts in a cache that has room for two of them, over a host that has room for
/// some, and perhaps a disk; how often the attention was another than it should be.
fn live(
    late: &Arc<Late>,
    prompts: &Prompts,
    folder: Option<&Folder>,
    turns: u32,
    seed: u32,
) -> u32 {
    let backend: Arc<dyn Backend> = late.clone();
    let mut cache = on(&backend, 8);
    let mut options = TierOptions::host("m", if folder.is_some() { 4 } else { 24 });
    options.transit_blocks = 16;
    options.ahead_blocks = seed % 3;
    if let Some(folder) = folder {
        let mut tier = folder.tier();
        tier.demotion.on_commit = seed % 2 == 1;
        options.lower.push(tier);
    }
    cache.attach_tiers(options).unwrap();
    assert!(report(&cache, TierKind::Host).page_locked);
    let (mut wrong, mut hits, mut state) = (0, 0, seed);
    let mut random = |below: u32| {
        state = state.wrapping_mul(747796405).wrapping_add(2891336453);
        (state >> 16) % below
    };
    for _ in 0..turns {
        let (prompt, expected) = &prompts.0[random(prompts.0.len() as u32) as usize];
        if folder.is_some() && random(2) == 0 {
            let mut prefetch = cache.prefetch(prompt, SPACE).unwrap();
            cache.wait_prefetch(&mut prefetch, LONG);
        }
        let (cached, out) = serve(&mut cache, prompt, random(2) == 0).unwrap();
        hits += cached / BLOCK;
        wrong += u32::from(out != *expected);
    }
    assert!(cache.flush_tiers(LONG));
    let counters = host(&cache);
    assert!(hits > 0 && counters.failures == 0, "{counters:?}");
    assert!(counters.loaded > 0 || folder.is_some(), "{counters:?}");
    wrong
}

#[test]
fn what_goes_down_and_comes_back_is_what_it_was_in_every_order_of_events() {
    let prompts = Prompts::new(6);
    for (n, pace) in (1..).zip(Pace::ALL) {
        let late = late(pace).0;
        assert_eq!(live(&late, &prompts, None, 14, n), 0, "{pace:?}");
        let folder = Folder::new(&format!("life-{n}"));
        assert_eq!(live(&late, &prompts, Some(&folder), 10, n), 0, "{pace:?} with a disk");
        assert_eq!(late.left()[..3], [0; 3], "{pace:?}: all is given back");
    }
}

/// The test above can fail: each of the orders that are kept is needed.
#[test]
fn an_order_that_is_not_kept_is_found_out() {
    let prompts = Prompts::new(6);
    // The cache's stream overwrites a block before it was copied down; attends before it was copied up; is
    // overtaken by the copy down of what it writes, and by the copy up over what it writes; what is copied
    // up was not copied down yet.
    for (order, pace) in [
        ((DOWN, CACHE), Pace::Lazy),
        ((UP, CACHE), Pace::Lazy),
        ((CACHE, DOWN), Pace::EagerSides),
        ((CACHE, UP), Pace::EagerSides),
        ((DOWN, UP), Pace::Lazy),
    ] {
        let late = late(pace).0;
        let wrong = || match order {
            (CACHE, DOWN) => early(&late),
            (CACHE, UP) => overwritten(&late, false).min(overwritten(&late, true)),
            (DOWN, UP) => overtaken(&late),
            _ => live(&late, &prompts, None, 14, 1),
        };
        *late.forgets.lock().unwrap() = Some(order);
        assert!(wrong() > 0, "{order:?} is not needed");
        *late.forgets.lock().unwrap() = None;
        let wrong = match order {
            (CACHE, UP) => overwritten(&late, false) + overwritten(&late, true),
            (CACHE, DOWN) | (DOWN, UP) => wrong(),
            // The test above.
            _ => 0,
        };
        assert_eq!(wrong, 0, "{order:?}");
    }
}

/// Serves a prompt of rows of ones, and waits for nothing; what would wait when it is freed.
fn enqueue(
    cache: &mut KvCache,
    backend: &Arc<dyn Backend>,
    prompt: &[u32],
) -> (DeviceMemory, Step) {
    let row = vec![0x3c00u16; prompt.len() * DIM];
    let bytes: Vec<u8> = row.iter().flat_map(|half| half.to_ne_bytes()).collect();
    let memory = DeviceMemory::new(backend, bytes.len() as u64).unwrap();
    let seq = cache.start(prompt, SPACE).unwrap().seq;
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: prompt }]).unwrap();
    // SAFETY: the memory has the bytes, and outlives what is enqueued on it.
    let rows = unsafe {
        backend.upload(memory.address(), &bytes, Stream::DEFAULT).unwrap();
        DeviceRows::new(memory.address(), DType::F16, row.len() as u64)
    };
    for layer in 0..LAYERS {
        cache.append_device(&step, LayerId::uniform(layer), rows, rows, None).unwrap();
    }
    cache.commit(&mut step).unwrap();
    cache.release(seq).unwrap();
    (memory, step)
}

/// Whether blocks that come up are overwritten by what is still to be written to those that had their
/// places before.
fn overwritten(late: &Arc<Late>, by_layers: bool) -> u32 {
    let backend: Arc<dyn Backend> = late.clone();
    let mut cache = on(&backend, 8);
    cache.attach_tiers(TierOptions::host("m", 24)).unwrap();
    let (prompt, expected) = &Prompts::new(3).0[2];
    serve(&mut cache, prompt, false).unwrap();
    let others = |n: u32| -> Vec<u32> { (0..7 * BLOCK as u32 + 1).map(|t| n * 1000 + t).collect() };
    serve(&mut cache, &others(70), false).unwrap();
    let _held = enqueue(&mut cache, &backend, &others(80));
    let (cached, out) = serve(&mut cache, prompt, by_layers).unwrap();
    assert_eq!(cached, prompt.len() / BLOCK * BLOCK);
    u32::from(out != *expected)
}

/// Whether a copy down of a block that the cache's stream has still to write is too early: blocks are
/// copied when they are committed, with nobody having waited for the stream.
fn early(late: &Arc<Late>) -> u32 {
    let backend: Arc<dyn Backend> = late.clone();
    let folder = Folder::new("early");
    let prompt: Vec<u32> = (0..2 * BLOCK as u32 + 1).collect();
    let mut cache = on(&backend, 8);
    let mut options = TierOptions::host("m", 0);
    options.lower.push(LowerTier {
        demotion: Demotion { on_commit: true, ..Demotion::default() },
        ..folder.tier()
    });
    cache.attach_tiers(options).unwrap();
    let _held = enqueue(&mut cache, &backend, &prompt);
    assert!(cache.flush_tiers(LONG));
    drop(cache);
    // What the disk has, on a device that keeps all orders.
    let mut other = on(&emulated(), 8);
    let mut options = TierOptions::host("m", 4);
    options.lower.push(folder.tier());
    other.attach_tiers(options).unwrap();
    let mut prefetch = other.prefetch(&prompt, SPACE).unwrap();
    other.wait_prefetch(&mut prefetch, LONG);
    let started = other.start(&prompt, SPACE).unwrap();
    assert_eq!(started.cached_tokens as usize, 2 * BLOCK);
    let mut stream = Vec::new();
    other.export_blocks(started.seq, "m", None, &mut stream).unwrap();
    let ones = stream.windows(2).filter(|pair| *pair == 0x3c00u16.to_le_bytes()).count();
    let all = 2 * BLOCK * DIM * 2 * LAYERS as usize;
    u32::from(ones < all)
}

/// Whether a copy up of what is still being copied down brings something else.
fn overtaken(late: &Arc<Late>) -> u32 {
    let backend: Arc<dyn Backend> = late.clone();
    let layout = GroupLayout::new(spec().groups[0].clone(), BLOCK as u32).unwrap();
    let bytes = layout.block_bytes() as usize;
    let mut store = DeviceStore::new(&backend, layout, 2, StoreOptions::default()).unwrap();
    let block: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8).collect();
    store.write_block(BlockId(0), &block).unwrap();
    let (down, up) = (SideStream::new(&backend).unwrap(), SideStream::new(&backend).unwrap());
    let mut part = HostPart::allocate(&backend, bytes, 1, true).unwrap().next().unwrap();
    let mut copies = Copies::new(&backend, Way::Down);
    // Two halves, which lie side by side on both sides: one copy.
    let half = bytes / LAYERS as usize;
    for layer in 0..LAYERS {
        let span = store.layers_span(BlockId(0), layer, half).unwrap();
        copies.read(span, &mut part, layer as usize * half).unwrap();
    }
    let before = *late.copied.lock().unwrap();
    let (flight, enqueued) = copies.enqueue(&down);
    enqueued.unwrap();
    let after = *late.copied.lock().unwrap();
    assert_eq!((after.0 - before.0, after.1 - before.1), (1, 1));
    assert!(part.is_lent() && flight.poll().is_none());
    let mut copies = Copies::new(&backend, Way::Up);
    copies.write(store.span(BlockId(1)).unwrap(), &part, 0).unwrap();
    assert!(copies.write(store.span(BlockId(1)).unwrap(), &part, 1).is_err());
    copies.enqueue(&up).1.unwrap();
    up.lead(Default::default()).unwrap();
    let mut read = vec![0; bytes];
    store.read_block(BlockId(1), &mut read).unwrap();
    // Who reads the part waits for what writes it.
    assert!(part[..] == block[..] && flight.poll() == Some(Ok(())));
    // Copies that are given up leave nothing to copy on, before somebody has written it.
    let mut copies = Copies::new(&backend, Way::Down);
    copies.read(store.span(BlockId(0)).unwrap(), &mut part, 0).unwrap();
    drop(copies);
    let mut copies = Copies::new(&backend, Way::Up);
    assert!(part.arrived().is_err() && !part.is_lent());
    assert!(copies.write(store.span(BlockId(0)).unwrap(), &part, 0).is_err());
    part.fill(7);
    copies.write(store.span(BlockId(0)).unwrap(), &part, 0).unwrap();
    assert_eq!(
        (part.arrived(), copies.enqueue(&up).1, up.lead(Stream::DEFAULT)),
        (Ok(()), Ok(()), Ok(()))
    );
    store.read_block(BlockId(0), &mut part).unwrap();
    assert!(part.iter().all(|&byte| byte == 7));
    u32::from(read != block)
}

#[test]
fn what_a_step_evicts_is_one_batch_that_nobody_waits_for() {
    let (late, backend) = late(Pace::Lazy);
    let mut cache = on(&backend, 8);
    cache.attach_tiers(TierOptions::host("m", 24)).unwrap();
    let prompts = Prompts::new(4);
    let (first, expected) = &prompts.0[2];
    serve(&mut cache, first, false).unwrap();
    let blocks = first.len() / BLOCK;
    let seq = cache.start(&[1], SPACE).unwrap().seq;
    let mut step = Step::new();
    let tokens: Vec<u32> = (0..8 * BLOCK as u32).map(|t| 90_000 + t).collect();
    let before = *late.copied.lock().unwrap();
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    let after = *late.copied.lock().unwrap();
    assert_eq!((after.0 - before.0, after.1 - before.1), (1, blocks));
    // They are on their way, and the host counts them when they have come.
    assert_eq!(
        (late.waits(), host(&cache).queued, host(&cache).stored),
        (blocks, blocks as u64, 0)
    );
    cache.cancel(&mut step).unwrap();
    cache.release(seq).unwrap();
    let (cached, out) = serve(&mut cache, first, false).unwrap();
    assert_eq!((cached, &out), (blocks * BLOCK, expected));
    let counters = host(&cache);
    assert_eq!(
        (counters.queued, counters.stored, counters.loaded),
        (0, blocks as u64, blocks as u64)
    );
    assert!(report(&cache, TierKind::Host).load_rate.is_some());
}

#[test]
fn what_is_evicted_ahead_is_waited_for_by_the_step_that_takes_its_room() {
    let (late, backend) = late(Pace::Lazy);
    let mut cache = on(&backend, 8);
    let options = TierOptions { ahead_blocks: 3, ..TierOptions::host("m", 24) };
    cache.attach_tiers(options).unwrap();
    let prompts = Prompts::new(3);
    // Four blocks are cached and four are free, of which the step takes two.
    serve(&mut cache, &prompts.0[2].0, false).unwrap();
    let seq = cache.start(&[1], SPACE).unwrap().seq;
    let tokens: Vec<u32> = (0..2 * BLOCK as u32).map(|t| 90_000 + t).collect();
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    assert_eq!(cache.stats().free_blocks, 3);
    late.sync(Stream::DEFAULT).unwrap();
    assert_eq!(late.waits(), 1, "the step does not wait for it");
    cache.commit(&mut step).unwrap();
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    late.sync(Stream::DEFAULT).unwrap();
    // The first, which the step could write, is copied; those that it evicted ahead are not.
    assert_eq!((late.waits(), cache.stats().free_blocks), (2, 3));
    cache.cancel(&mut step).unwrap();
    cache.release(seq).unwrap();
    let (prompt, expected) = &prompts.0[2];
    assert_eq!(serve(&mut cache, prompt, false).unwrap(), (4 * BLOCK, expected.clone()));
}

#[test]
fn a_cache_that_ends_with_copies_under_way_gives_everything_back() {
    for pace in Pace::ALL {
        let (late, backend) = late(pace);
        let folder = Folder::new("dropped");
        let mut cache = on(&backend, 8);
        let mut options = TierOptions::host("m", 2);
        options.lower.push(folder.tier());
        cache.attach_tiers(options).unwrap();
        let prompts = Prompts::new(3);
        prompts.0.iter().for_each(|(prompt, _)| drop(serve(&mut cache, prompt, false).unwrap()));
        let seq = cache.start(&[1], SPACE).unwrap().seq;
        let tokens: Vec<u32> = (0..8 * BLOCK as u32).map(|t| 90_000 + t).collect();
        cache.begin(&mut Step::new(), &[Work { seq, tokens: &tokens }]).unwrap();
        drop(cache);
        assert_eq!(late.left()[..3], [0; 3], "{pace:?}");
        // What waited to be written was: the device went on until it was there.
        let mut other = on(&emulated(), 8);
        let mut options = TierOptions::host("m", 8);
        options.lower.push(folder.tier());
        other.attach_tiers(options).unwrap();
        let found = report(&other, TierKind::Disk).counters;
        assert!(found.objects > 0, "{pace:?}: {found:?}");
    }
}

#[test]
fn host_memory_that_is_refused_is_an_answer_and_plain_memory_a_choice() {
    let (late, backend) = late(Pace::Lazy);
    *late.no_host_memory.lock().unwrap() = true;
    let mut cache = on(&backend, 8);
    let refused = cache.attach_tiers(TierOptions::host("m", 24));
    assert!(matches!(refused, Err(Error::OutOfMemory { .. })), "{refused:?}");
    assert!(cache.tier_reports().is_empty());
    let left = late.left();
    assert_eq!((left[0], left[1]), (0, 0));
    cache.attach_tiers(TierOptions { plain_memory: true, ..TierOptions::host("m", 24) }).unwrap();
    assert!(!report(&cache, TierKind::Host).page_locked);
    let prompts = Prompts::new(4);
    for (prompt, expected) in prompts.0.iter().chain(&prompts.0) {
        assert_eq!(serve(&mut cache, prompt, false).unwrap().1, *expected);
    }
    assert!(host(&cache).loaded > 0);
    // A device whose host memory is plain says so.
    let mut plain = on(&emulated(), 8);
    plain.attach_tiers(TierOptions::host("m", 24)).unwrap();
    assert!(!report(&plain, TierKind::Host).page_locked);
}

#[test]
fn copies_that_are_refused_cost_demotions_and_nothing_else() {
    let (late, backend) = late(Pace::Lazy);
    let mut cache = on(&backend, 8);
    cache.attach_tiers(TierOptions::host("m", 24)).unwrap();
    let prompts = Prompts::new(4);
    *late.trouble.lock().unwrap() = Trouble::Refused;
    for (prompt, expected) in &prompts.0 {
        assert_eq!(serve(&mut cache, prompt, false).unwrap().1, *expected);
    }
    let counters = host(&cache);
    assert_eq!((counters.stored, counters.objects), (0, 0), "{counters:?}");
    assert!(counters.dropped > 0 && counters.failures > 0);
    *late.trouble.lock().unwrap() = Trouble::None;
    for (prompt, expected) in prompts.0.iter().chain(&prompts.0) {
        assert_eq!(serve(&mut cache, prompt, true).unwrap().1, *expected);
    }
    assert!(host(&cache).loaded > 0);
    drop(cache);
    assert_eq!(late.left()[..3], [0; 3]);
}

#[test]
fn a_device_that_fails_in_a_copy_says_so_and_nothing_of_it_is_kept() {
    for pace in [Pace::Lazy, Pace::EagerSides] {
        let (late, backend) = late(pace);
        let folder = Folder::new("failing");
        let mut cache = on(&backend, 8);
        let mut options = TierOptions::host("m", 4);
        options.lower.push(folder.tier());
        cache.attach_tiers(options).unwrap();
        let prompts = Prompts::new(4);
        *late.trouble.lock().unwrap() = Trouble::Failing;
        let mut failed = None;
        for (prompt, _) in &prompts.0 {
            failed = failed.or(serve(&mut cache, prompt, false).err());
        }
        assert!(matches!(failed, Some(Error::DeviceFailed { .. })), "{failed:?}");
        // What was on its way is in no tier.
        let _ = cache.prefetch(&prompts.0[0].0, SPACE);
        assert_eq!((host(&cache).objects, host(&cache).stored), (0, 0), "{:?}", host(&cache));
        assert!(cache.flush_tiers(LONG) || host(&cache).failures > 0);
        drop(cache);
        assert_eq!(late.left()[..3], [0; 3], "{pace:?}");
        let config = Configuration::new("m", &spec(), &Slice::whole(&spec())).unwrap();
        let store = DiskStore::open(&DiskOptions::new(&folder.0, 16 << 20), &config).unwrap().0;
        assert_eq!(store.used().unwrap().1, 0, "{pace:?}");
    }
}

#[test]
fn demotions_are_dropped_where_buffers_are_still_being_copied() {
    let (late, backend) = late(Pace::Lazy);
    let mut cache = on(&backend, 8);
    let options = TierOptions { transit_blocks: 1, ..TierOptions::host("m", 2) };
    cache.attach_tiers(options).unwrap();
    let prompts = Prompts::new(3);
    serve(&mut cache, &prompts.0[2].0, false).unwrap();
    let seq = cache.start(&[1], SPACE).unwrap().seq;
    let tokens: Vec<u32> = (0..8 * BLOCK as u32).map(|t| 90_000 + t).collect();
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &tokens }]).unwrap();
    // Three buffers for four blocks, all of which the device is at.
    assert_eq!(host(&cache).dropped, prompts.0[2].0.len() as u64 / BLOCK as u64 - 3);
    assert_eq!(late.waits(), 3);
    cache.cancel(&mut step).unwrap();
    cache.release(seq).unwrap();
    for (prompt, expected) in prompts.0.iter().chain(&prompts.0) {
        assert_eq!(serve(&mut cache, prompt, false).unwrap().1, *expected);
    }
}
