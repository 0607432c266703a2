//! Caches of latents on a device, the emulator and a GPU where there is one, beside the same cache on
//! the CPU: what is appended, shared, forked, exported and brought back from a tier is the CPU's to the
//! byte, and attention over it the same but for rounding.
#![cfg(any(feature = "emulate", feature = "cuda"))]

mod backends;
#[path = "random/mod.rs"]
mod random;

use std::sync::Arc;
use std::time::Duration;

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, TierOptions, Work};
use kvcache::cpu::{Rope, RopeStyle};
use kvcache::device::Backend;
use kvcache::dtype::{KvFormat, bf16};
use kvcache::error::Error;
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::{CacheSpec, GroupSpec};
use random::Rng;

const FORMATS: [KvFormat; 5] =
    [KvFormat::Bf16, KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Int8T, KvFormat::Int4T];
const LAYERS: u32 = 2;
const DIM: usize = 576;
const VALUES: usize = 512;
const BLOCK: usize = 16;
const SPACE: Namespace = Namespace(3);
/// Query tokens of a sequence that latent attention on a device takes at a time.
const MOST: usize = 8;

/// The latent of the last of `history` in a layer, of numbers that bf16 holds.
fn latent(history: &[u32], layer: u32) -> Vec<f32> {
    let seed =
        history.iter().fold(0x1a7e, |h: u64, &t| (h ^ u64::from(t)).wrapping_mul(0x9e37_79b9));
    let mut rng = Rng::new(seed ^ u64::from(layer) << 40);
    (0..DIM).map(|_| bf16::from_f32(rng.normal()).to_f32()).collect()
}

/// The same cache on a device (0) and on the CPU (1).
struct Both {
    caches: [KvCache; 2],
    steps: [Step; 2],
    q_heads: usize,
    rope: Option<Rope>,
    tolerance: f32,
    rng: Rng,
}

impl Both {
    fn new(backend: &Arc<dyn Backend>, format: KvFormat) -> Self {
        let spec = CacheSpec::uniform(BLOCK as u32, GroupSpec::latent(LAYERS, 512, 64, format));
        let options =
            CacheOptions { blocks: 24, max_seqs: 6, threads: 1, ..CacheOptions::default() };
        let cache = KvCache::on(backend, &spec, &options).unwrap();
        let caches = [cache, KvCache::new(&spec, &options).unwrap()];
        // Weights are rounded to bf16 or, with codes, to f16, and so are queries.
        let tolerance = if format == KvFormat::Bf16 { 1.5e-2 } else { 4e-3 };
        let steps = [Step::new(), Step::new()];
        Self { caches, steps, q_heads: 16, rope: None, tolerance, rng: Rng::new(11) }
    }

    /// Starts a prompt: its handles, and how many tokens of it were cached in both.
    fn start(&mut self, prompt: &[u32]) -> ([SeqId; 2], usize) {
        let [a, b] = self.caches.each_mut().map(|cache| cache.start(prompt, SPACE).unwrap());
        assert_eq!(a.cached_tokens, b.cached_tokens);
        ([a.seq, b.seq], a.cached_tokens as usize)
    }

    /// One step: of each sequence its handles, all its tokens, and how many of them are held.
    fn step(&mut self, work: &[([SeqId; 2], &[u32], usize)]) {
        for (side, cache) in self.caches.iter_mut().enumerate() {
            let items: Vec<Work> = work
                .iter()
                .map(|(seqs, tokens, held)| Work { seq: seqs[side], tokens: &tokens[*held..] })
                .collect();
            cache.begin(&mut self.steps[side], &items).unwrap();
        }
        let rows: usize = work.iter().map(|(_, tokens, held)| tokens.len() - held).sum();
        let scoring = Scoring { scale: 0.07, ..Scoring::causal(DIM as u32) };
        for layer in 0..LAYERS {
            let at = LayerId::uniform(layer);
            let k: Vec<f32> = work
                .iter()
                .flat_map(|(_, tokens, held)| (*held..tokens.len()).map(|n| &tokens[..=n]))
                .flat_map(|history| latent(history, layer))
                .collect();
            let count = rows * self.q_heads * DIM;
            let q: Vec<f32> =
                (0..count).map(|_| bf16::from_f32(self.rng.normal()).to_f32()).collect();
            let (mut outs, mut lses) = ([const { Vec::new() }; 2], [const { Vec::new() }; 2]);
            for (side, cache) in self.caches.iter_mut().enumerate() {
                let step = &self.steps[side];
                cache.append(step, at, k[..].into(), k[..0].into(), self.rope.as_ref()).unwrap();
                outs[side] = vec![f32::NAN; rows * self.q_heads * VALUES];
                lses[side] = vec![f32::NAN; rows * self.q_heads];
                let (out, lse) = ((&mut outs[side][..]).into(), Some(&mut lses[side][..]));
                cache.attend(step, at, q[..].into(), out, &scoring, lse).unwrap();
            }
            let close = |what: &str, [got, want]: &[Vec<f32>; 2], tolerance: f32| {
                for (i, (got, want)) in got.iter().zip(want).enumerate() {
                    let good = (got - want).abs() <= tolerance * want.abs().max(1.0);
                    assert!(good, "{what} [{i}] of layer {layer}: {got}, {want} on the CPU");
                }
            };
            close("out", &outs, self.tolerance);
            close("LSE", &lses, 1e-2);
        }
        for (cache, step) in self.caches.iter_mut().zip(&mut self.steps) {
            cache.commit(step).unwrap();
            cache.audit().unwrap();
        }
    }

    /// Computes what a prompt does not have cached, a chunk at a time.
    fn feed(&mut self, seqs: [SeqId; 2], prompt: &[u32], mut held: usize) {
        while held < prompt.len() {
            let end = prompt.len().min(held + MOST);
            self.step(&[(seqs, &prompt[..end], held)]);
            held = end;
        }
    }

    fn serve(&mut self, prompt: &[u32]) -> ([SeqId; 2], usize) {
        let (seqs, cached) = self.start(prompt);
        self.feed(seqs, prompt, cached);
        (seqs, cached)
    }

    fn release(&mut self, seqs: [SeqId; 2]) {
        self.caches.iter_mut().zip(seqs).for_each(|(cache, seq)| cache.release(seq).unwrap());
    }

    /// The full blocks of a sequence as either cache exports them.
    fn exported(&mut self, seqs: [SeqId; 2]) -> [Vec<u8>; 2] {
        let mut streams = [Vec::new(), Vec::new()];
        for ((cache, seq), to) in self.caches.iter_mut().zip(seqs).zip(&mut streams) {
            cache.export_blocks(seq, "m", None, to).unwrap();
        }
        streams
    }
}

fn prompt(seed: u32, tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|n| (n * 7 + seed) % 50).collect()
}

#[test]
fn what_a_device_stores_is_what_the_cpu_does() {
    for backend in backends::all() {
        for format in FORMATS {
            let mut both = Both::new(&backend, format);
            let (first, _) = both.serve(&prompt(1, 37));
            let [device, cpu] = both.exported(first);
            assert!(device == cpu && device.len() > 2 * BLOCK * 288, "{format:?}");
            // What a device wrote is read by a CPU, and the other way round.
            let mut other = Both::new(&backend, format);
            for (cache, stream) in other.caches.iter_mut().zip([&cpu, &device]) {
                let mut stream = &stream[..];
                let held = cache.import_blocks(&mut [&mut stream], "m", None, SPACE).unwrap();
                assert_eq!(held, 2 * BLOCK);
            }
            let (again, cached) = other.serve(&prompt(1, 37));
            assert_eq!(cached, 2 * BLOCK);
            assert!(other.exported(again)[0] == device, "{format:?}");
        }
    }
}

#[test]
fn prefixes_forks_and_drafts() {
    for backend in backends::all() {
        for (i, format) in FORMATS.into_iter().enumerate() {
            let mut both = Both::new(&backend, format);
            both.q_heads = [16, 20, 128, 5, 33][i];
            let long = prompt(2, 41);
            let (first, cached) = both.serve(&long);
            assert_eq!(cached, 0);
            // A prefix of whole blocks, and the part of one that is copied.
            let mut shared = prompt(2, 38);
            shared.extend([60, 61, 62]);
            let (second, cached) = both.serve(&shared);
            assert!(cached >= 2 * BLOCK, "{format:?}: {cached}");
            // A child goes on where its parent is, each with tokens of its own, and all in one step.
            let child = [0, 1].map(|side| both.caches[side].fork(first[side]).unwrap());
            let ways = [[70].as_slice(), &[71, 72, 73, 74, 75, 76, 77, 78], &[79, 80, 81]];
            let histories = [&long, &long, &shared].map(Vec::clone);
            let extended: Vec<Vec<u32>> = std::iter::zip(&histories, ways)
                .map(|(history, new)| [&history[..], new].concat())
                .collect();
            let seqs = [first, child, second];
            let work: Vec<_> =
                (0..3).map(|n| (seqs[n], &extended[n][..], histories[n].len())).collect();
            both.step(&work);
            // Drafts that were not accepted.
            let keep = extended[1].len() - 5;
            for (cache, seq) in both.caches.iter_mut().zip(child) {
                cache.truncate(seq, keep as u32).unwrap();
            }
            let other = [&extended[1][..keep], &[90, 91]].concat();
            both.step(&[(child, &other, keep)]);
            seqs.into_iter().for_each(|seqs| both.release(seqs));
        }
    }
}

#[test]
fn rotary_channels_turn_on_the_way() {
    for backend in backends::all() {
        for format in FORMATS {
            let mut both = Both::new(&backend, format);
            let rope = Rope::new(RopeStyle::Interleaved, 64, 10_000.0).unwrap();
            both.rope = Some(rope.from_channel(512));
            // Codes may fall on the other side of a rounding, and no more.
            both.tolerance = 2.5e-2;
            both.serve(&prompt(5, 19));
        }
    }
}

#[test]
fn what_tiers_bring_back_is_what_was_evicted() {
    for backend in backends::all() {
        for format in FORMATS {
            let mut both = Both::new(&backend, format);
            for cache in &mut both.caches {
                cache.attach_tiers(TierOptions::host("m", 64)).unwrap();
            }
            let (seqs, _) = both.serve(&prompt(0, 50));
            let before = both.exported(seqs);
            both.release(seqs);
            // Enough others that the first has gone.
            for seed in 1..9 {
                let (seqs, _) = both.serve(&prompt(seed * 100 + 7, 49));
                both.release(seqs);
            }
            for cache in &mut both.caches {
                assert!(cache.flush_tiers(Duration::from_secs(60)));
            }
            let (seqs, cached) = both.serve(&prompt(0, 50));
            assert_eq!(cached, 3 * BLOCK, "{format:?}");
            assert!(both.exported(seqs) == before, "{format:?}");
        }
    }
}

#[test]
fn more_tokens_than_a_device_takes_are_refused_as_with_16_bits() {
    for backend in backends::all() {
        for format in FORMATS {
            let mut both = Both::new(&backend, format);
            let tokens = prompt(3, MOST + 1);
            let (seqs, _) = both.start(&tokens);
            let ([cache, _], [step, _]) = (&mut both.caches, &mut both.steps);
            cache.begin(step, &[Work { seq: seqs[0], tokens: &tokens }]).unwrap();
            let q = vec![0.5f32; tokens.len() * 16 * DIM];
            let mut out = vec![0f32; tokens.len() * 16 * VALUES];
            let k: Vec<f32> = (1..=tokens.len()).flat_map(|n| latent(&tokens[..n], 0)).collect();
            let (at, scoring) = (LayerId::uniform(0), Scoring::causal(DIM as u32));
            cache.append(step, at, k[..].into(), k[..0].into(), None).unwrap();
            let to = (&mut out[..]).into();
            let refused = cache.attend(step, at, q[..].into(), to, &scoring, None);
            let Err(Error::Unsupported { what }) = refused else {
                panic!("{format:?}: {refused:?}")
            };
            assert!(what.contains("8 query tokens"), "{what}");
        }
    }
}

#[test]
fn formats_without_kernels_are_refused_by_name() {
    for backend in backends::all() {
        for format in [KvFormat::F32, KvFormat::Nvfp4, KvFormat::Kt4v4] {
            let spec = CacheSpec::uniform(64, GroupSpec::latent(1, 512, 64, format));
            let options = CacheOptions { blocks: 4, ..CacheOptions::default() };
            match KvCache::on(&backend, &spec, &options) {
                Err(Error::Unsupported { what }) => assert!(what.contains("int8_t"), "{what}"),
                other => panic!("{format:?}: {:?}", other.map(|_| ())),
            }
        }
    }
}

#[test]
fn latents_that_no_code_can_hold_are_answered_and_lose_nothing() {
    for backend in backends::all() {
        for format in FORMATS.into_iter().filter(|format| !format.is_float()) {
            let mut both = Both::new(&backend, format);
            let tokens = prompt(4, 3);
            let (seqs, _) = both.start(&tokens);
            let ([cache, _], [step, _]) = (&mut both.caches, &mut both.steps);
            cache.begin(step, &[Work { seq: seqs[0], tokens: &tokens }]).unwrap();
            let at = LayerId::uniform(0);
            let mut k = vec![1.0f32; 3 * DIM];
            k[2 * DIM - 1] = f32::NAN;
            let refused = cache.append(step, at, k[..].into(), k[..0].into(), None);
            assert!(matches!(refused, Err(Error::InvalidArgument { .. })), "{format:?}");
            k[2 * DIM - 1] = 1.0;
            cache.append(step, at, k[..].into(), k[..0].into(), None).unwrap();
        }
    }
}
