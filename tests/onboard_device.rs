//! Onboarding by layers onto a device: copies go on a stream of their own, and what is enqueued on the
//! cache's stream after a layer was said to be there comes after them. The device here makes a copy of
//! another stream only when somebody waits for it, which is as late as a real one may.

#![cfg(unix)]

mod late_device;
mod tier_case;

use std::sync::Arc;

use kvcache::cache::{CacheOptions, Step};
use kvcache::cache::{KvCache, LayerId, TierOptions, Work};
use kvcache::device::{Backend, Stream};
use kvcache::dtype::KvFormat;
use kvcache::layout::slice::Slice;
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Configuration, Store, TierKind};
use late_device::{Late, Pace};
use tier_case::{BLOCK, Folder, LONG, SPACE, below, prompt};

const LAYERS: u32 = 5;
const DIM: u32 = 64;
const BLOCKS: usize = 6;

fn spec() -> CacheSpec {
    CacheSpec::uniform(BLOCK as u32, GroupSpec::uniform(LAYERS, 2, DIM, KvFormat::F16))
}

/// A directory with the blocks of a prompt, written by a cache on the CPU, and what they hold.
fn written(name: &str, text: &[u32]) -> (Folder, Vec<Vec<u8>>) {
    let folder = Folder::new(&format!("late-{name}"));
    let mut cache = tier_case::cache_of(&spec(), 16);
    attach(&mut cache, &folder);
    let seq = cache.start(text, SPACE).unwrap().seq;
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: text }]).unwrap();
    for layer in 0..LAYERS {
        let row = |kind: u32| -> Vec<f32> {
            let count = text.len() as u32 * 2 * DIM;
            (0..count).map(|n| tier_case::noise([kind, layer, n, 0, 0])).collect()
        };
        let (k, v) = (row(1), row(2));
        cache.append(&step, LayerId::uniform(layer), k[..].into(), v[..].into(), None).unwrap();
    }
    cache.commit(&mut step).unwrap();
    let blocks = exported(&mut cache, seq);
    assert!(cache.flush_tiers(LONG));
    (folder, blocks)
}

/// The blocks of a sequence, out of its stream: each with a checksum, and eight bytes at the end.
fn exported(cache: &mut KvCache, seq: kvcache::ids::SeqId) -> Vec<Vec<u8>> {
    let mut stream = Vec::new();
    assert_eq!(cache.export_blocks(seq, "m", None, &mut stream), Ok(BLOCKS * BLOCK));
    let bytes = cache.stats().block_bytes as usize;
    let records = &stream[stream.len() - 8 - BLOCKS * (bytes + 4)..stream.len() - 8];
    records.chunks_exact(bytes + 4).map(|record| record[..bytes].to_vec()).collect()
}

fn attach(cache: &mut KvCache, folder: &Folder) {
    let config = Configuration::new("m", &spec(), &Slice::whole(&spec())).unwrap();
    let store = DiskStore::open(&DiskOptions::new(&folder.0, 16 << 20), &config).unwrap().0;
    let store: Arc<dyn Store> = Arc::new(store);
    let lower = vec![below(store, TierKind::Disk)];
    cache.attach_tiers(TierOptions { lower, ..TierOptions::host("m", 0) }).unwrap();
}

fn on(late: &Arc<Late>, folder: &Folder) -> KvCache {
    let backend: Arc<dyn Backend> = late.clone();
    let options = CacheOptions { blocks: 16, max_seqs: 4, threads: 1, ..Default::default() };
    let mut cache = KvCache::on(&backend, &spec(), &options).unwrap();
    attach(&mut cache, folder);
    cache
}

#[test]
fn a_layer_is_there_for_what_is_enqueued_after_it_was_said_to_be() {
    let text = prompt(1, BLOCKS);
    let (folder, blocks) = written("layers", &text);
    let late = Late::memory(Pace::Lazy);
    let mut cache = on(&late, &folder);
    let started = cache.start_onboarding(&text, &[], SPACE).unwrap();
    assert_eq!(started.cached_tokens as usize, BLOCKS * BLOCK);
    let ids = cache.blocks(started.seq, 0).unwrap().to_vec();
    let bytes = cache.stats().block_bytes;
    let each = (bytes / u64::from(LAYERS)) as usize;
    // What the cache's stream would see of a layer.
    let seen = |layer: u32| -> bool {
        ids.iter().zip(&blocks).all(|(id, block)| {
            let at = late.pool() + u64::from(id.0) * bytes + (layer as usize * each) as u64;
            late.read(at, each) == block[layer as usize * each..][..each]
        })
    };
    for layer in 0..LAYERS {
        assert!(!seen(layer), "layer {layer} before it was asked for");
        assert!(cache.wait_layer(started.seq, LayerId::uniform(layer), LONG).unwrap());
        assert!(seen(layer), "layer {layer}");
        // The next one is on its way, where it was read by then, and no other: the cache's stream has
        // come to this layer.
        assert!([0, BLOCKS].contains(&late.waits()), "{}", late.waits());
    }
    assert_eq!((cache.load_state(started.seq).unwrap(), late.waits()), (None, 0));
    assert_eq!(exported(&mut cache, started.seq), blocks);
    cache.release(started.seq).unwrap();
    cache.audit().unwrap();
    drop(cache);
    assert_eq!(late.left()[..3], [0; 3], "streams were closed, and memory given back");
}

#[test]
fn blocks_of_a_load_that_is_given_up_are_nobodys_before_its_copies_were_made() {
    let text = prompt(2, BLOCKS);
    let (folder, blocks) = written("cancel", &text);
    let late = Late::memory(Pace::Lazy);
    let mut cache = on(&late, &folder);
    for cancel in [false, true] {
        let started = cache.start_onboarding(&text, &[], SPACE).unwrap();
        assert!(cache.wait_layer(started.seq, LayerId::uniform(LAYERS - 1), LONG).unwrap());
        // All has been read by now, so that the copies of the first layer wait.
        late.sync(Stream::DEFAULT).unwrap();
        assert_eq!(late.waits(), BLOCKS);
        if cancel {
            assert_eq!(cache.cancel_load(started.seq), Ok(0));
            late.sync(Stream::DEFAULT).unwrap();
            assert_eq!(late.waits(), 0);
        }
        cache.release(started.seq).unwrap();
        late.sync(Stream::DEFAULT).unwrap();
        assert_eq!(late.waits(), 0);
        cache.audit().unwrap();
    }
    let started = cache.start_onboarding(&text, &[], SPACE).unwrap();
    for layer in 0..LAYERS {
        assert!(cache.wait_layer(started.seq, LayerId::uniform(layer), LONG).unwrap());
    }
    assert_eq!(exported(&mut cache, started.seq), blocks);
}
