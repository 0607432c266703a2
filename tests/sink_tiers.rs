//! Raw sinks outside the cache: in host memory, on disk, in a store that machines share, and in streams.
#![cfg(unix)]

mod sink_case;

use std::path::PathBuf;
use std::sync::Arc;

use kvcache::cache::{LowerTier, Step, TierOptions, Work};
use kvcache::dtype::KvFormat;
use kvcache::error::Error;
use kvcache::layout::slice::Slice;
use kvcache::tier::disk::{DiskOptions, DiskStore};
use kvcache::tier::{Configuration, TierKind};
use sink_case::remote::Remote;
use sink_case::{LONG, SPACE, Setup, a_life, a_stream, attach, below, known_prompts, prefetch};

/// One group; two of which one has sinks of two tiles; one beside rows of floats; sinks alone.
fn setups() -> [Setup; 4] {
    let of = |groups: &[(KvFormat, usize)]| Setup::new(None, groups);
    [
        of(&[(KvFormat::Kt4v4, 1)]),
        of(&[(KvFormat::Kt2v2, 2), (KvFormat::Kt8v8, 1)]),
        of(&[(KvFormat::F16, 0), (KvFormat::Kt3v3, 1), (KvFormat::Kt4v2, 0)]),
        of(&[(KvFormat::Kt4v4, 9)]),
    ]
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("kvcache-sinks-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Folder(path)
    }

    fn tier(&self, setup: &Setup, on_commit: bool) -> LowerTier {
        let spec = setup.spec();
        let config = Configuration::new("m", &spec, &Slice::whole(&spec)).unwrap();
        let store = DiskStore::open(&DiskOptions::new(&self.0, 16 << 20), &config).unwrap().0;
        below(Arc::new(store), TierKind::Disk, on_commit)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn sinks_go_down_and_come_back() {
    for (n, setup) in setups().iter().enumerate() {
        let prompts = known_prompts(setup, 6);
        a_life(setup, &prompts, 60, &Vec::new, 20, 1);
        let folder = Folder::new(&format!("life-{n}"));
        a_life(setup, &prompts, 20, &|| vec![folder.tier(setup, n % 2 == 0)], 20, 2);
        let shelf = Arc::new(Remote::default());
        a_life(
            setup,
            &prompts,
            0,
            &|| vec![below(shelf.clone(), TierKind::Remote, n % 2 == 1)],
            20,
            3,
        );
    }
}

#[test]
fn a_restarted_process_finds_them_on_disk_by_blocks_and_by_layers() {
    for (n, setup) in setups().iter().enumerate() {
        let (folder, prompt) = (Folder::new(&format!("restart-{n}")), setup.prompt(7, 4));
        let mut cache = setup.cache();
        attach(&mut cache, 4, vec![folder.tier(setup, true)]);
        let (_, known) = setup.serve(&mut cache, &prompt, false);
        assert!(cache.flush_tiers(LONG));
        let stored = cache.tier_reports()[1].counters.stored as usize;
        assert_eq!(stored, setup.objects(4));
        drop(cache);
        for by_layers in [false, true] {
            let mut cache = setup.cache();
            attach(&mut cache, 40, vec![folder.tier(setup, true)]);
            if !by_layers {
                prefetch(&mut cache, &prompt);
            }
            let (cached, out) = setup.serve(&mut cache, &prompt, by_layers);
            assert_eq!(cached, 4 * setup.tokens, "{n} {by_layers}");
            assert!(out == known, "{n} {by_layers}");
            assert_eq!(cache.tier_reports()[1].counters.loaded as usize, stored);
        }
    }
}

#[test]
fn a_load_that_is_given_up_gives_its_slots_back() {
    let setup = &setups()[1];
    let (folder, prompt) = (Folder::new("cancel"), setup.prompt(7, 3));
    let mut cache = setup.cache();
    attach(&mut cache, 4, vec![folder.tier(setup, true)]);
    let (_, known) = setup.serve(&mut cache, &prompt, false);
    assert!(cache.flush_tiers(LONG));
    drop(cache);
    let mut cache = setup.cache();
    attach(&mut cache, 4, vec![folder.tier(setup, true)]);
    let started = cache.start_onboarding(&prompt, &[], SPACE).unwrap();
    assert_eq!(started.cached_tokens as usize, 3 * setup.tokens);
    assert!(cache.stats().staged_blocks > 0);
    let mut step = Step::new();
    cache
        .begin(&mut step, &[Work { seq: started.seq, tokens: &prompt[3 * setup.tokens..] }])
        .unwrap();
    cache.cancel(&mut step).unwrap();
    assert_eq!(cache.cancel_load(started.seq), Ok(0));
    cache.audit().unwrap();
    assert_eq!(cache.stats().staged_blocks, 0);
    assert!(setup.run(&mut cache, started.seq, &prompt) == known);
    cache.release(started.seq).unwrap();
    // And one that is released while it loads.
    cache.clear_prefix().unwrap();
    let started = cache.start_onboarding(&prompt, &[], SPACE).unwrap();
    assert!(started.cached_tokens > 0);
    cache.release(started.seq).unwrap();
    cache.audit().unwrap();
    assert_eq!(cache.stats().staged_blocks, 0);
}

#[test]
fn damaged_cut_and_missing_objects_are_misses() {
    let setup = &setups()[1];
    let (shelf, prompt) = (Arc::new(Remote::default()), setup.prompt(7, 4));
    let mut cache = setup.cache();
    attach(&mut cache, 4, vec![below(shelf.clone(), TierKind::Remote, true)]);
    let (_, known) = setup.serve(&mut cache, &prompt, false);
    assert!(cache.flush_tiers(LONG));
    drop(cache);
    let whole = shelf.0.lock().unwrap().clone();
    assert_eq!(whole.len(), setup.objects(4));
    let mut lengths = std::collections::BTreeMap::new();
    for (n, key) in whole.keys().enumerate() {
        for harm in 0..3 {
            let mut objects = whole.clone();
            match harm {
                0 => drop(objects.remove(key)),
                1 => objects.get_mut(key).unwrap()[4096 + n * 13] ^= 0x10,
                _ => objects.get_mut(key).unwrap().truncate(5000),
            }
            *shelf.0.lock().unwrap() = objects;
            let mut cache = setup.cache();
            attach(&mut cache, 60, vec![below(shelf.clone(), TierKind::Remote, false)]);
            prefetch(&mut cache, &prompt);
            let (cached, out) = setup.serve(&mut cache, &prompt, false);
            assert!(cached < 4 * setup.tokens && cached.is_multiple_of(setup.tokens));
            assert!(out == known, "object {n}, harm {harm}, of which {cached} tokens were cached");
            *lengths.entry(cached / setup.tokens).or_insert(0) += 1;
        }
    }
    // As many objects as each block has.
    for (block, count) in lengths {
        assert_eq!(count, 3 * (setup.objects(block + 1) - setup.objects(block)), "block {block}");
    }
}

#[test]
fn caches_with_other_sinks_share_nothing() {
    let shelf = Arc::new(Remote::default());
    let of = |sinks| Setup::new(None, &[(KvFormat::Kt4v4, sinks)]);
    let prompt = of(1).prompt(7, 4);
    for sinks in [1, 0, 2] {
        let setup = of(sinks);
        let mut cache = setup.cache();
        attach(&mut cache, 60, vec![below(shelf.clone(), TierKind::Remote, true)]);
        prefetch(&mut cache, &prompt);
        let (cached, out) = setup.serve(&mut cache, &prompt, false);
        assert_eq!(cached, 0, "{sinks}");
        assert!(out == setup.expected(&prompt));
        assert!(cache.flush_tiers(LONG));
    }
    // Nor do they take each other's streams.
    let mut cache = of(1).cache();
    let seq = cache.start(&prompt, SPACE).unwrap().seq;
    of(1).run(&mut cache, seq, &prompt);
    let mut stream = Vec::new();
    cache.export_blocks(seq, "m", None, &mut stream).unwrap();
    for sinks in [0, 2] {
        let mut other = of(sinks).cache();
        let refused = other.import_blocks(&mut [&mut &stream[..]], "m", None, SPACE);
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
        assert_eq!((other.stats().staged_blocks, other.stats().free_blocks), (0, 40));
        other.audit().unwrap();
    }
}

#[test]
fn streams_carry_sinks() {
    for setup in &setups() {
        a_stream(setup, setup);
    }
}

#[test]
fn a_stream_that_is_damaged_or_cut_leaves_nothing() {
    let setup = &setups()[1];
    let prompt = setup.prompt(1, 3);
    let mut cache = setup.cache();
    let seq = cache.start(&prompt, SPACE).unwrap().seq;
    setup.run(&mut cache, seq, &prompt);
    let mut stream = Vec::new();
    cache.export_blocks(seq, "m", None, &mut stream).unwrap();
    let mut other = setup.cache();
    for n in 0..60 {
        let (at, mut harmed) = (n * stream.len() / 60, stream.clone());
        harmed[at] ^= 4;
        for harmed in [&harmed[..], &stream[..at]] {
            assert!(other.import_blocks(&mut [&mut &*harmed], "m", None, SPACE).is_err(), "{at}");
            other.audit().unwrap();
            let stats = other.stats();
            assert_eq!((stats.staged_blocks, stats.cached_blocks), (0, 0));
        }
    }
    // And where slots lack: an answer, and nothing is taken.
    let tight = Setup { staging_blocks: 2, ..setup.clone() };
    let mut other = tight.cache();
    let held = other.start(&[1, 2], SPACE).unwrap().seq;
    tight.run(&mut other, held, &[1, 2]);
    let refused = other.import_blocks(&mut [&mut &stream[..]], "m", None, SPACE);
    assert_eq!(refused, Err(Error::OutOfBlocks { needed: 2, missing: 1 }));
    other.audit().unwrap();
    other.release(held).unwrap();
    assert!(other.import_blocks(&mut [&mut &stream[..]], "m", None, SPACE).is_ok());
}

#[test]
fn without_slots_a_prompt_is_computed_or_refused_and_nothing_is_lost() {
    let setup = Setup { staging_blocks: 3, ..Setup::new(None, &[(KvFormat::Kt4v4, 1)]) };
    let (prompt, other) = (setup.prompt(1, 2), setup.prompt(2, 2));
    for by_layers in [false, true] {
        let mut cache = setup.cache();
        attach(&mut cache, 60, Vec::new());
        let (_, known) = setup.serve(&mut cache, &prompt, false);
        // The slots go to others, and the prompt to the host.
        let held = cache.start(&other, SPACE).unwrap().seq;
        setup.run(&mut cache, held, &other);
        let fork = cache.fork(held).unwrap();
        setup.run(&mut cache, fork, &[5]);
        let started = match by_layers {
            true => cache.start_onboarding(&prompt, &[], SPACE).unwrap(),
            false => cache.start(&prompt, SPACE).unwrap(),
        };
        assert_eq!(started.cached_tokens, 0);
        let mut step = Step::new();
        let refused = cache.begin(&mut step, &[Work { seq: started.seq, tokens: &prompt }]);
        assert_eq!(refused, Err(Error::OutOfBlocks { needed: 2, missing: 2 }));
        cache.audit().unwrap();
        cache.release(started.seq).unwrap();
        cache.release(fork).unwrap();
        cache.release(held).unwrap();
        let (cached, out) = setup.serve(&mut cache, &prompt, by_layers);
        assert_eq!(cached, 2 * setup.tokens);
        assert!(out == known);
    }
}

#[test]
fn a_host_without_room_for_a_sink_does_no_harm() {
    let setup = &setups()[1];
    let prompts = [setup.prompt(1, 3), setup.prompt(2, 3)];
    let known = prompts.clone().map(|prompt| setup.expected(&prompt));
    let small = Setup { blocks: 5, ..setup.clone() };
    for host in [0, 1, 3] {
        let mut cache = small.cache();
        let options = TierOptions { transit_blocks: 1, ..TierOptions::host("m", host) };
        cache.attach_tiers(options).unwrap();
        for turn in 0..6 {
            let (_, out) = small.serve(&mut cache, &prompts[turn % 2], turn % 3 == 0);
            assert!(out == known[turn % 2], "{host}");
        }
    }
}
