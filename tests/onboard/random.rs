//! Onboarding in random order.

use std::time::Duration;

use kvcache::Error;
use kvcache::cache::{LayerId, Step, TierOptions, Work};
use kvcache::tier::TierKind;

use super::stores::{Fault, Gated};
use super::tier_case::{BLOCK, DIM, HEADS, SPACE, below, cache_of, prompt};
use super::{Folder, LAYERS, MODEL, deep, disk, expected, layer, onboarded};

/// A pseudo-random number below `n`.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }
}

/// A sequence of the random life: its prompt, and what the engine has of it.
struct Live {
    seq: kvcache::ids::SeqId,
    prompt: usize,
    held: usize,
    step: Step,
}

/// Loads that interleave, with faults, cancels, evictions and steps in any order, on a device of few
/// blocks, few buffers and a disk that evicts. Whatever is attended, is what a cache that computes
/// everything attends; and all books agree after each call.
fn a_random_life(seed: u64, steps: usize) {
    let folder = Folder::new(&format!("random-{seed}"));
    let object = 4096 + u64::from(LAYERS) * 4096;
    let store = Gated::over(disk(&folder, &deep(), 40 * object));
    let mut dice = Dice(seed);
    let mut cache = cache_of(&deep(), 24);
    let mut lower = below(store.clone(), TierKind::Disk);
    lower.demotion.on_commit = true;
    let host = dice.below(2) * 10;
    let lower = vec![lower];
    let options = TierOptions { transit_blocks: 24, lower, ..TierOptions::host(MODEL, host) };
    cache.attach_tiers(options).unwrap();
    // Prompts that share beginnings.
    let prompts: Vec<Vec<u32>> = (0..8u32)
        .map(|n| {
            let mut tokens = prompt(n / 3, 3 + n as usize % 4);
            for (at, token) in tokens.iter_mut().enumerate().skip(2 * BLOCK) {
                *token = n * 10_000 + 5_000 + at as u32;
            }
            tokens
        })
        .collect();
    let truth: Vec<Vec<f32>> = prompts.iter().map(|prompt| expected(prompt)).collect();
    let mut live: Vec<Live> = Vec::new();
    let (mut finished, mut failed, mut loaded) = (0, 0, 0);
    for _ in 0..steps {
        match dice.below(12) {
            0..=2 if live.len() < 4 => {
                let n = dice.below(prompts.len());
                let Ok(started) = cache.start_onboarding(&prompts[n], &[], SPACE) else { continue };
                let held = started.cached_tokens as usize;
                loaded += usize::from(cache.load_state(started.seq).unwrap().is_some());
                live.push(Live { seq: started.seq, prompt: n, held, step: Step::new() });
            }
            3 => {
                let layer_bytes = 4096u64;
                let at = 4096 + dice.below(LAYERS as usize) as u64 * layer_bytes + 77;
                let fault = [Fault::Flip, Fault::Short, Fault::Flip][dice.below(3)];
                *store.fault.lock().unwrap() = (dice.below(2) == 0).then_some((fault, at));
            }
            4 => store.allow(dice.below(6) as u32),
            5 => cache.clear_prefix().unwrap(),
            6 if !live.is_empty() => {
                let one = live.swap_remove(dice.below(live.len()));
                match dice.below(2) {
                    0 => cache.release(one.seq).unwrap(),
                    _ => {
                        let held = cache.cancel_load(one.seq).unwrap();
                        live.push(Live { held, ..one });
                    }
                }
            }
            _ if !live.is_empty() => {
                let at = dice.below(live.len());
                let one = &mut live[at];
                let text = &prompts[one.prompt];
                let last = text.len() - 1;
                let to = if one.held < last { last } else { text.len() };
                let tokens = &text[one.held..to];
                match cache.begin(&mut one.step, &[Work { seq: one.seq, tokens }]) {
                    Ok(()) => {}
                    Err(Error::LayerMissing { .. }) => {
                        one.held = cache.cancel_load(one.seq).unwrap();
                        failed += 1;
                        continue;
                    }
                    // No blocks: somebody has to go.
                    Err(Error::OutOfBlocks { .. }) => {
                        cache.release(live.swap_remove(at).seq).unwrap();
                        continue;
                    }
                    Err(error) => panic!("{error}"),
                }
                let mut attended = Vec::new();
                for n in 0..LAYERS {
                    store.allow(dice.below(3) as u32);
                    let wait = cache.step_layer_wait(&one.step, LayerId::uniform(n)).unwrap();
                    wait.wait(Duration::from_millis(dice.below(3) as u64));
                    let there = cache.poll_step_layer(&one.step, LayerId::uniform(n)) == Ok(true);
                    match layer(&mut cache, &one.step, n, one.held, tokens) {
                        Ok(out) => {
                            assert!(there, "attended what is not there");
                            attended.extend(out);
                        }
                        Err(error) => {
                            assert!(!there, "{error}");
                            break;
                        }
                    }
                    cache.audit().unwrap();
                }
                let all = attended.len() == LAYERS as usize * tokens.len() * HEADS as usize * DIM;
                if !all || dice.below(8) == 0 {
                    if !all {
                        assert!(cache.commit(&mut one.step).is_err());
                    }
                    cache.cancel(&mut one.step).unwrap();
                } else {
                    cache.commit(&mut one.step).unwrap();
                    one.held = to;
                    if to == text.len() {
                        assert_eq!(attended, truth[one.prompt], "seed {seed}");
                        finished += 1;
                        cache.release(live.swap_remove(at).seq).unwrap();
                    }
                }
            }
            _ => {}
        }
        cache.audit().unwrap();
    }
    store.allow(u32::MAX);
    for one in live {
        cache.release(one.seq).unwrap();
    }
    *store.fault.lock().unwrap() = None;
    cache.audit().unwrap();
    // Nothing was left behind that is wrong, nor a buffer that is missing.
    for (prompt, truth) in prompts.iter().zip(&truth) {
        // What a read of before, still under way, finds damaged goes: then it is computed once more.
        let ended = (0..2).map(|_| {
            let (_, out, ended) = onboarded(&mut cache, prompt);
            assert!(&out == truth, "seed {seed}: {ended:?}");
            ended
        });
        assert_eq!(ended.last(), Some(Ok(())), "seed {seed}");
    }
    assert!(finished > 0 && loaded > 0, "seed {seed}: {finished} {loaded} {failed}");
}

#[test]
fn random_lives_attend_what_a_cache_that_computes_attends() {
    // More of them: KVCACHE_ROUNDS=100.
    let rounds = std::env::var("KVCACHE_ROUNDS").map_or(8, |text| text.parse().unwrap());
    for seed in 0..rounds {
        a_random_life(seed, 300);
    }
}
