//! A cache of sealed tiles with raw sinks on an emulated device: against the reference, which reads sinks
//! raw, and its own bits whatever the chunks, hits, forks and speculation.
#![cfg(feature = "emulate")]

mod tiles;

use std::sync::Arc;

use kvcache::device::{Backend, Device, open};
use kvcache::dtype::KvFormat;
use tiles::sinks::{
    blocks_that_held_records, chunks_hits_and_forks, cuts, random_operations, slots,
};
use tiles::{Setup, against_the_reference, chunks_and_hits, many_rows_beside_few};

fn emu() -> Arc<dyn Backend> {
    open(Device::Emu).unwrap()
}

fn setup(
    backend: &Arc<dyn Backend>,
    format: KvFormat,
    (dim, tokens): (usize, usize),
    tiles: usize,
) -> Setup {
    let sink_tokens = (tiles * tokens) as u32;
    Setup { sink_tokens, ..Setup::new(backend, format, dim, tokens) }
}

#[test]
fn chunks_hits_and_forks_do_not_change_a_bit() {
    let backend = emu();
    let cases = [
        (KvFormat::Kt4v4, (64, 64), 1, &[61, 4, 74][..]),
        (KvFormat::Kt2v2, (64, 64), 2, &[128, 3, 8]),
        (KvFormat::Kt8v8, (128, 64), 1, &[64, 65]),
        (KvFormat::Kt3v3, (64, 128), 1, &[127, 2, 40]),
        (KvFormat::Kt4v2, (128, 128), 1, &[150, 1]),
    ];
    for (i, (format, shape, tiles, cut)) in cases.into_iter().enumerate() {
        let setup = setup(&backend, format, shape, tiles);
        // A window, whose beginning lies in a sink, and other rules.
        let window = (i == 1).then_some(150);
        chunks_hits_and_forks(&Setup { window, rules: i == 2, ..setup }, cut);
    }
}

#[test]
fn many_rows_beside_few_read_sinks_raw() {
    let backend = emu();
    for (format, tiles, window) in
        [(KvFormat::Kt4v4, 1, None), (KvFormat::Kt8v8, 1, Some(90)), (KvFormat::Kt2v2, 2, None)]
    {
        many_rows_beside_few(&Setup { window, ..setup(&backend, format, (64, 64), tiles) }, 1);
    }
}

#[test]
fn streams_are_those_of_the_cpu_and_are_read_alike() {
    let setup = setup(&emu(), KvFormat::Kt4v4, (64, 64), 1);
    against_the_reference(&setup);
    chunks_and_hits(&setup, &[61, 4, 74]);
}

#[test]
fn speculation_at_the_end_of_the_sinks() {
    for (format, tokens, tiles) in [(KvFormat::Kt3v3, 64, 1), (KvFormat::Kt4v4, 64, 2)] {
        cuts(&setup(&emu(), format, (64, tokens), tiles));
    }
}

#[test]
fn slots_of_unused_sinks_are_had_by_eviction_and_others_are_not() {
    let setup = setup(&emu(), KvFormat::Kt4v4, (64, 64), 1);
    slots(&setup);
    blocks_that_held_records(&setup);
}

#[test]
fn random_operations_against_the_reference() {
    for (seed, deterministic, tiles) in [(1, true, 1), (2, false, 2)] {
        let setup = setup(&emu(), KvFormat::Kt4v2, (64, 64), tiles);
        let setup = Setup { deterministic, blocks: 14, staging_blocks: 9, ..setup };
        random_operations(&setup, 40, seed);
    }
}
