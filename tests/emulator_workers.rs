//! The emulator with the blocks of a launch on several OS threads: that they run side by side, that
//! what happens within a block is what one thread makes of it, and that faults come back.
//!
//! The number of workers belongs to the process: the tests here run one at a time.
#![cfg(feature = "emulate")]

#[path = "device/probe.rs"]
mod probe;

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvcache::emu::{FaultKind, Options, Schedule, set_workers, workers};
use probe::{options, run};

const BLOCKS: u32 = 12;

/// Holds the number of workers until it is dropped.
fn with_workers(count: usize) -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    set_workers(count);
    alone
}

fn seeded(seed: u64) -> Options {
    Options { schedule: Schedule::Seeded(seed), ..Options::default() }
}

/// The most blocks that saw each other, and what each block's threads wrote.
fn blocks(patience: u32, options: Options) -> (u32, Vec<u32>) {
    let zeros = vec![0; 2 + 64 * BLOCKS as usize];
    let out =
        run("kvc_probe_blocks", BLOCKS, 64, 256, &[0], &zeros, (0, patience), options).unwrap();
    assert_eq!(out[0], 0, "every block counted itself out");
    (out[1], out[2..].to_vec())
}

#[test]
fn blocks_run_side_by_side_only_on_several_workers() {
    {
        let _alone = with_workers(1);
        assert_eq!(blocks(1000, Options::default()).0, 1);
    }
    let _alone = with_workers(4);
    assert_eq!(workers(), 4);
    // Each block waits long enough for another to start, on a busy machine too.
    assert!(blocks(1 << 27, Options::default()).0 >= 2);
}

#[test]
fn the_order_within_a_block_does_not_depend_on_the_workers() {
    for options in options().into_iter().chain([seeded(7)]) {
        let alone = with_workers(1);
        let one = blocks(0, options).1;
        assert_eq!(blocks(0, options).1, one, "the same again");
        drop(alone);
        let _alone = with_workers(3);
        assert_eq!(blocks(0, options).1, one);
    }
    let _alone = with_workers(1);
    assert_ne!(blocks(0, seeded(1)).1, blocks(0, seeded(2)).1);
}

#[test]
fn atomics_count_across_workers() {
    let _alone = with_workers(4);
    for options in options() {
        let out = run("kvc_probe_atomics", 400, 128, 512, &[0], &[0; 4], (0, 0), options).unwrap();
        assert_eq!(out, [400 * (127 * 128 / 2), u32::MAX, 400 * 128 - 1, 0]);
    }
}

#[test]
fn a_fault_of_any_worker_comes_back() {
    let _alone = with_workers(4);
    for options in options() {
        // A matrix load past shared memory, a stack without end where a signal can be caught, a
        // barrier that half of the block misses, and a phase that never ends.
        for (mode, kind) in [
            (6, FaultKind::Shared),
            (26, FaultKind::Stack),
            (15, FaultKind::Diverged),
            (24, FaultKind::Deadlock),
        ] {
            if mode == 26 && cfg!(kvc_emu_sanitize) {
                continue;
            }
            let fault =
                run("kvc_probe_bug", BLOCKS, 64, 1024, &[0; 256], &[0; 67], (mode, 256), options)
                    .expect_err("the bug must be seen");
            assert_eq!(fault.kind, kind, "{fault}");
        }
        // The next launch is as good as new.
        assert_eq!(blocks(0, options).1.len(), 64 * BLOCKS as usize);
    }
}

#[test]
fn the_number_of_workers_has_bounds() {
    let _alone = with_workers(0);
    assert_eq!(workers(), 1);
    set_workers(usize::MAX);
    assert_eq!(workers(), 256);
    set_workers(1);
}
