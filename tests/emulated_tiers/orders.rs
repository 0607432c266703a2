//! What goes down and comes back is what it was in every order that streams and events allow, and each
//! order that is kept is needed.

use std::sync::Arc;

use kvcache::cache::{Demotion, KvCache, LayerId, LowerTier, Step, TierOptions, Work};
use kvcache::device::{
    Backend, Copies, DeviceMemory, DeviceRows, DeviceStore, HostPart, SideStream, StoreOptions,
    Stream, Way,
};
use kvcache::dtype::DType;
use kvcache::ids::BlockId;
use kvcache::layout::GroupLayout;

use crate::late_device::{CACHE, DOWN, Late, Pace, UP};
use crate::served::{DIM, LAYERS, Prompts, disk, emulated, late, live, on, serve, spec};
use crate::tier_case::{BLOCK, Folder, LONG, SPACE};

#[test]
fn what_goes_down_and_comes_back_is_what_it_was_in_every_order_of_events() {
    let prompts = Prompts::new(6);
    for (n, pace) in (1..).zip(Pace::ALL) {
        let late = late(pace).0;
        assert_eq!(live(&late, &prompts, None, 14, n), 0, "{pace:?}");
        let folder = Folder::new(&format!("lift-{n}"));
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
        ..disk(&folder)
    });
    cache.attach_tiers(options).unwrap();
    let _held = enqueue(&mut cache, &backend, &prompt);
    assert!(cache.flush_tiers(LONG));
    drop(cache);
    // What the disk has, on a device that keeps all orders.
    let mut other = on(&emulated(), 8);
    let mut options = TierOptions::host("m", 4);
    options.lower.push(disk(&folder));
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
