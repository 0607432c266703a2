//! A cache of sealed tiles on an emulated device: against the reference, and its own bits whatever the
//! chunks, hits, forks and speculation; every raw slot is accounted for.
#![cfg(feature = "emulate")]

mod tiles;

use std::sync::Arc;

use kvcache::Error;
use kvcache::cache::{Step, Work};
use kvcache::device::{Backend, Device, open};
use kvcache::dtype::KvFormat;
use kvcache::ids::{Namespace, SeqId};
use tiles::{
    FORMATS, LOUD, Rng, Setup, a_raw_tile, against_the_reference, chunks_and_hits,
    chunks_at_the_end_of_a_piece, many_rows_beside_few, prompt, same,
};

fn emu() -> Arc<dyn Backend> {
    open(Device::Emu).unwrap()
}

#[test]
fn every_format_against_the_reference() {
    let backend = emu();
    for (i, format) in FORMATS.into_iter().enumerate() {
        let (dim, tokens) = [(64, 64), (128, 64), (64, 128), (128, 128)][i % 4];
        let (deterministic, rules) = (i % 2 == 0, i == 1);
        let setup = Setup::new(&backend, format, dim, tokens);
        against_the_reference(&Setup { deterministic, rules, ..setup });
    }
}

#[test]
fn chunks_and_hits_do_not_change_a_bit() {
    let backend = emu();
    // Every format's run on a GPU (gpu.rs); here there is one of each width of codes.
    for (i, format) in [KvFormat::Kt8v8, KvFormat::Kt4v4, KvFormat::Kt2v2].into_iter().enumerate() {
        // A window whose beginning lies in a tile, and none.
        let (window, rules) = ([None, Some(70)][i % 2], i == 1);
        let setup = Setup { window, rules, ..Setup::new(&backend, format, 64, 64) };
        chunks_and_hits(&setup, [&[61, 4, 74][..], &[128, 3, 8]][i % 2]);
    }
    chunks_at_the_end_of_a_piece(&Setup::new(&backend, KvFormat::Kt4v4, 64, 128));
}

#[test]
fn forks_speculation_and_batches() {
    let setup = Setup::new(&emu(), KvFormat::Kt3v3, 64, 64);
    let text = prompt(70);
    let all = setup.at_once(&text);
    for at in [63, 64, 65] {
        let mut cache = setup.cache();
        let seq = setup.start(&mut cache, &text);
        setup.run(&mut cache, seq, &text[..at - 3]);
        // Four guesses, three of them right; then a cancelled step.
        setup.run(&mut cache, seq, &[&text[at - 3..at], &[LOUD][..]].concat());
        cache.truncate(seq, at as u32).unwrap();
        let mut step = Step::new();
        cache.begin(&mut step, &[Work { seq, tokens: &prompt(80) }]).unwrap();
        setup.layers(&mut cache, &step, &[(at, &prompt(80))]);
        cache.cancel(&mut step).unwrap();
        cache.audit().unwrap();
        // Both go on from the middle of a tile, in one step.
        let fork = cache.fork(seq).unwrap();
        let own = [7777, 7778];
        let both = setup.run_all(&mut cache, &[(seq, &text[at..]), (fork, &own)]);
        let (new, rows) = (text.len() - at, text.len() - at + own.len());
        let want = setup.part(&all, text.len(), at..text.len());
        assert!(same(&setup.part(&both, rows, 0..new), &want), "{at}");
        let left = [&text[..at], &own].concat();
        setup.check(&setup.part(&both, rows, new..rows), &left, 2, 1);
        if at >= 64 {
            setup.check_records(&mut cache, fork);
        }
    }
}

#[test]
fn many_rows_have_a_kernel_of_their_own() {
    let backend = emu();
    for (format, window) in [(KvFormat::Kt4v4, None), (KvFormat::Kt8v8, Some(90))] {
        many_rows_beside_few(&Setup { window, ..Setup::new(&backend, format, 64, 64) }, 1);
    }
}

#[test]
fn what_cannot_be_sealed_stays_raw_and_says_so() {
    a_raw_tile(&Setup::new(&emu(), KvFormat::Kt4v4, 64, 64));
}

#[test]
fn rows_without_a_spare_slot_are_an_answer() {
    let setup = Setup { staging_blocks: 2, ..Setup::new(&emu(), KvFormat::Kt2v2, 64, 64) };
    let mut text = prompt(140);
    // One of them has a spare slot, the other not.
    (text[5], text[70]) = (LOUD, LOUD);
    let mut cache = setup.cache();
    let seq = setup.start(&mut cache, &text);
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &text }]).unwrap();
    setup.layers(&mut cache, &step, &[(0, &text)]);
    for _ in 0..2 {
        let refused = cache.commit(&mut step).unwrap_err();
        assert_eq!(refused, Error::OutOfBlocks { needed: 1, missing: 1 });
    }
    cache.audit().unwrap();
    cache.cancel(&mut step).unwrap();
    cache.audit().unwrap();
    assert_eq!(cache.stats().staged_blocks, 0);
    text[70] = 1;
    setup.run(&mut cache, seq, &text);
    assert_eq!((cache.stats().unsealed_blocks, cache.stats().staged_blocks), (1, 2));
}

#[test]
fn layers_must_take_turns() {
    use kvcache::attention::Scoring;
    use kvcache::cache::LayerId;
    let setup = Setup::new(&emu(), KvFormat::Kt8v8, 64, 64);
    let (mut cache, text) = (setup.cache(), prompt(130));
    let seq = setup.start(&mut cache, &text);
    let mut step = Step::new();
    cache.begin(&mut step, &[Work { seq, tokens: &text }]).unwrap();
    for layer in 0..2 {
        let rows = |kind| setup.rows(kind, layer, &text, 0, tiles::KV_HEADS);
        let (k, v) = (rows(1), rows(2));
        cache.append(&step, LayerId::uniform(layer), k[..].into(), v[..].into(), None).unwrap();
    }
    let q = setup.rows(0, 0, &text, 0, tiles::Q_HEADS);
    let mut out = vec![0.0; q.len()];
    let scoring = Scoring::causal(64);
    let mut attend = |scoring: &Scoring| {
        let id = LayerId::uniform(0);
        cache.attend(&step, id, q[..].into(), (&mut out[..]).into(), scoring, None).unwrap_err()
    };
    assert!(matches!(attend(&scoring), Error::InvalidState { .. }));
}

#[test]
fn random_operations() {
    let setup = Setup::new(&emu(), KvFormat::Kt4v2, 64, 64);
    let mut rng = Rng::new(4);
    let mut cache = setup.cache();
    let mut live: Vec<(SeqId, Vec<u32>)> = Vec::new();
    for _ in 0..30 {
        match rng.below(8) {
            0 | 1 if live.len() < 4 => {
                let text = prompt(1 + rng.below(150));
                let started = cache.start(&text, Namespace(0)).unwrap();
                live.push((started.seq, text[..started.cached_tokens as usize].to_vec()));
            }
            2 if !live.is_empty() && live.len() < 4 => {
                let (seq, tokens) = live[rng.below(live.len())].clone();
                live.push((cache.fork(seq).unwrap(), tokens));
            }
            3 if !live.is_empty() => {
                let at = rng.below(live.len());
                cache.release(live.swap_remove(at).0).unwrap();
            }
            4 if !live.is_empty() => {
                let at = rng.below(live.len());
                let (seq, tokens) = &mut live[at];
                let to = tokens.len().saturating_sub(rng.below(70));
                match cache.truncate(*seq, to as u32) {
                    Ok(()) => tokens.truncate(to),
                    Err(error) => assert!(matches!(error, Error::InvalidArgument { .. })),
                }
            }
            _ if !live.is_empty() => {
                let at = rng.below(live.len());
                let (seq, tokens) = &mut live[at];
                let count = rng.pick(&[1, 2, 5, 20, 70]);
                let new: Vec<u32> =
                    (0..count).map(|_| rng.pick(&[1, 2, 3, 3, 2, 1, 2, LOUD])).collect();
                setup.go_on(&mut cache, &mut rng, (*seq, tokens), &new);
            }
            _ => {}
        }
        cache.audit().unwrap();
        for (seq, tokens) in &live {
            assert_eq!(cache.tokens(*seq).unwrap(), tokens);
        }
    }
    for (seq, _) in live {
        cache.release(seq).unwrap();
    }
    cache.audit().unwrap();
    assert_eq!(cache.stats().staged_blocks, 0);
}
