//! Random lives of sequences on the CPU and on devices, in every format stored token by token, with and
//! without windows.

use kvcache::dtype::{FormatClass, KvFormat};

use crate::backends;
use crate::harness::Harness;
use crate::model::{Setup, mix};

#[test]
fn random_lives_read_what_they_wrote() {
    for seed in 0..24 {
        random_life(Setup::cpu(), seed);
    }
}

#[test]
fn random_lives_of_formats_stored_token_by_token() {
    let formats = KvFormat::ALL.iter().filter(|format| format.class() == FormatClass::Token);
    for (n, &format) in formats.enumerate() {
        for seed in 4 * n as u64..4 * n as u64 + 4 {
            random_life(Setup::coded(format), seed);
        }
    }
}

fn random_life(setup: Setup, seed: u64) {
    // Tight, so that eviction and running out happen; ample, so that hits do.
    let blocks = [9, 14, 30, 120][seed as usize % 4];
    let mut harness = Harness::with(setup, mix(seed), blocks, seed % 6 != 5);
    for _ in 0..120 {
        harness.act();
    }
    let stats = harness.cache.stats();
    if blocks == 30 && seed % 6 != 5 {
        assert!(
            stats.hit_tokens > 0 && stats.evicted_blocks > 0 && stats.copied_blocks > 0,
            "{stats:?}"
        );
    }
    for (seq, ..) in harness.live.drain(..) {
        harness.cache.release(seq).unwrap();
    }
    harness.cache.clear_prefix().unwrap();
    assert_eq!(harness.cache.stats().free_blocks, blocks);
}

#[test]
fn random_lives_with_windows_read_what_they_wrote() {
    let (mut refused, mut hits, mut alone) = (0, 0, 0);
    for seed in 0..24 {
        // Wide and narrow windows, one beside full attention and two of different widths; pools in
        // which the group with a window is the tight one, and others.
        let windows = [
            [None, Some(40)],
            [Some(17), None],
            [Some(24), Some(50)],
            [Some(1), Some(16)],
            [None, Some(1000)],
        ][seed as usize % 5];
        let blocks = [[40, 12], [14, 40], [30, 30]][seed as usize % 3];
        let setup = Setup::cpu().windowed(windows, blocks);
        let mut harness = Harness::with(setup, mix(1000 + seed), 0, true);
        for _ in 0..120 {
            harness.act();
        }
        let metrics = harness.cache.metrics();
        alone += metrics.counters.evicted_blocks[2];
        refused += harness.refused_truncations;
        hits += metrics.hits_tokens;
        for (seq, ..) in harness.live.drain(..) {
            harness.cache.release(seq).unwrap();
        }
        harness.cache.clear_prefix().unwrap();
        harness.cache.audit().unwrap();
        assert_eq!(harness.cache.stats().free_blocks, blocks[0]);
    }
    assert!(refused > 0 && hits > 0 && alone > 0, "{refused} {hits} {alone}");
}

#[test]
fn random_lives_on_a_device_read_what_they_wrote() {
    for backend in backends::all() {
        let (mut copied, mut hits) = (0, 0);
        for seed in 0..3 {
            let mut setup = Setup::device(backend.clone());
            if seed == 1 {
                setup = setup.windowed([None, Some(40)], [120, 20]);
            }
            let mut harness =
                Harness::with(setup, mix(100 + seed), [30, 120, 14][seed as usize], true);
            for _ in 0..40 {
                harness.act();
            }
            harness.cache.sync().unwrap();
            let stats = harness.cache.stats();
            (copied, hits) = (copied + stats.copied_blocks, hits + stats.hit_tokens);
        }
        assert!(copied > 0 && hits > 0, "{backend:?}: {copied} copies, {hits} hits");
        let (mut copied, mut hits) = (0, 0);
        for (seed, format) in [(200, KvFormat::Fp8E4m3), (201, KvFormat::Int8T)] {
            let setup = Setup::coded_device(backend.clone(), format);
            let mut harness = Harness::with(setup, mix(seed), 30, true);
            for _ in 0..30 {
                harness.act();
            }
            harness.cache.sync().unwrap();
            let stats = harness.cache.stats();
            (copied, hits) = (copied + stats.copied_blocks, hits + stats.hit_tokens);
        }
        assert!(copied > 0 && hits > 0, "{backend:?}: {copied} copies of codes, {hits} hits");
    }
}
