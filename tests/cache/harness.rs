//! A cache and what its sequences should be, as token lists: random actions, and attention in each step
//! against the model. Whatever is shared, copied, evicted or merged, it must read what the model says.

use kvcache::Error;
use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::{CacheSpec, GroupSpec};
use kvcache::prefix::{Eviction, Hint, Retention};

use crate::model::{KV_HEADS, LAYERS, Q_HEADS, Rng, Setup, kv_row};

pub struct Harness {
    setup: Setup,
    pub cache: KvCache,
    pub step: Step,
    pub rng: Rng,
    /// Live sequences: id, namespace, tokens.
    pub live: Vec<(SeqId, u64, Vec<u32>)>,
    pub refused_truncations: u32,
}

impl Harness {
    pub fn new(seed: u64, blocks: u32, prefix_reuse: bool) -> Self {
        Self::with(Setup::cpu(), seed, blocks, prefix_reuse)
    }

    pub fn with(setup: Setup, seed: u64, blocks: u32, prefix_reuse: bool) -> Self {
        let group = GroupSpec::uniform(LAYERS, KV_HEADS as u32, setup.dim as u32, setup.format);
        // Two groups, so that tables, pools and the index go through the general case.
        let groups = setup.windows.map(|window| GroupSpec { window, ..group.clone() }).to_vec();
        let spec = CacheSpec { block_tokens: 16, groups };
        let policies =
            [Eviction::Lru, Eviction::Lfu, Eviction::Fifo, Eviction::Slru, Eviction::S3Fifo];
        let eviction = policies[(seed >> 7) as usize % policies.len()];
        let options = CacheOptions {
            blocks,
            max_seqs: 6,
            threads: 1,
            prefix_reuse,
            eviction,
            group_blocks: setup.group_blocks.clone(),
            scrub: seed.is_multiple_of(2),
            ..CacheOptions::default()
        };
        let cache = match &setup.backend {
            None => KvCache::new(&spec, &options),
            Some(backend) => KvCache::on(backend, &spec, &options),
        };
        let (cache, step) = (cache.unwrap(), Step::new());
        Self { setup, cache, step, rng: Rng(seed), live: Vec::new(), refused_truncations: 0 }
    }

    /// A prompt that likely shares a beginning with another: few tokens, few namespaces.
    fn prompt(&mut self) -> Vec<u32> {
        let base = self.rng.below(3) as u32;
        let length = 1 + self.rng.below(90);
        let fork = self.rng.below(90);
        let tail = self.rng.below(4) as u32;
        (0..length).map(|at| if at < fork { base } else { 10 + tail }).collect()
    }

    fn start(&mut self) {
        let namespace = self.rng.below(2) as u64;
        let prompt = self.prompt();
        match self.cache.start(&prompt, Namespace(namespace)) {
            Ok(started) => {
                let held = &prompt[..started.cached_tokens as usize];
                assert!(held.len() < prompt.len());
                self.live.push((started.seq, namespace, held.to_vec()));
                let rest = prompt[held.len()..].to_vec();
                let last = self.live.len() - 1;
                self.step(&[(last, rest)]);
            }
            Err(Error::OutOfSequences { limit }) => assert_eq!(self.live.len(), limit as usize),
            Err(error) => panic!("{error}"),
        }
    }

    /// Runs one step over some live sequences and checks what attention reads.
    fn step(&mut self, work: &[(usize, Vec<u32>)]) {
        let items: Vec<Work> =
            work.iter().map(|(at, tokens)| Work { seq: self.live[*at].0, tokens }).collect();
        let before = self.cache.stats();
        match self.cache.begin(&mut self.step, &items) {
            Ok(()) => {}
            Err(Error::OutOfBlocks { needed, missing }) => {
                assert!(missing > 0 && missing <= needed);
                if self.setup.windows == [None; 2] {
                    assert_eq!(missing, needed - before.free_blocks - before.cached_blocks);
                    assert_eq!(self.cache.stats(), before);
                }
                return;
            }
            Err(error) => panic!("{error}"),
        }
        let histories: Vec<(u64, Vec<u32>, usize)> = work
            .iter()
            .map(|(at, tokens)| {
                let (_, namespace, held) = &self.live[*at];
                (*namespace, [held.as_slice(), tokens].concat(), held.len())
            })
            .collect();
        for group in 0..2 {
            for layer in 0..LAYERS {
                self.layer(&histories, LayerId { group, layer });
            }
        }
        if self.rng.below(8) == 0 {
            self.cache.cancel(&mut self.step).unwrap();
        } else {
            self.cache.commit(&mut self.step).unwrap();
            for ((at, tokens), (_, history, _)) in work.iter().zip(&histories) {
                assert!(!tokens.is_empty());
                self.live[*at].2 = history.clone();
            }
        }
        self.cache.audit().unwrap();
    }

    fn layer(&mut self, histories: &[(u64, Vec<u32>, usize)], id: LayerId) {
        let salt = id.layer + 100 * id.group;
        let dim = self.setup.dim;
        let rows = |side: u64| -> Vec<f32> {
            let row = |(ns, tokens, held): &(u64, Vec<u32>, usize)| -> Vec<f32> {
                (*held..tokens.len())
                    .flat_map(|at| kv_row(*ns, &tokens[..=at], salt, side, dim))
                    .collect()
            };
            histories.iter().flat_map(row).collect()
        };
        let (k, v) = (rows(0), rows(1));
        self.cache.append(&self.step, id, k.as_slice().into(), v.as_slice().into(), None).unwrap();
        let count = self.step.rows() * Q_HEADS * dim;
        let value = |n: usize| n as f32 / 256.0 - 2.0;
        let q: Vec<f32> = (0..count).map(|_| value(self.rng.below(1024))).collect();
        let mut out = vec![f32::NAN; count];
        let scoring = Scoring::causal(dim as u32);
        let out_rows = out.as_mut_slice().into();
        self.cache.attend(&self.step, id, q.as_slice().into(), out_rows, &scoring, None).unwrap();
        let mut at = 0;
        let window = self.setup.windows[id.group as usize].map_or(usize::MAX, |w| w as usize);
        for (namespace, tokens, held) in histories {
            let rows = |side| -> Vec<_> {
                let row =
                    |n| self.setup.stored(kv_row(*namespace, &tokens[..n], salt, side, dim), side);
                (1..=tokens.len()).map(row).collect()
            };
            let (keys, values) = (rows(0), rows(1));
            for position in *held..tokens.len() {
                for head in 0..Q_HEADS {
                    let row = at..at + dim;
                    let kv = head / (Q_HEADS / KV_HEADS) * dim;
                    check_row(
                        &q[row.clone()],
                        &out[row],
                        &keys[(position + 1).saturating_sub(window)..=position],
                        &values[(position + 1).saturating_sub(window)..=position],
                        kv,
                        self.setup.tolerance,
                    );
                    at += dim;
                }
            }
        }
    }

    pub fn act(&mut self) {
        let live = self.live.len();
        match self.rng.below(10) {
            0..=2 => self.start(),
            3..=5 if live > 0 => {
                let mut work = Vec::new();
                for at in 0..live {
                    if self.rng.below(2) == 0 {
                        let count = 1 + self.rng.below(20);
                        let token = self.rng.below(3) as u32;
                        work.push((at, vec![token; count]));
                    }
                }
                if !work.is_empty() {
                    self.step(&work);
                }
            }
            6 if live > 0 => {
                let at = self.rng.below(live);
                let (seq, namespace, tokens) = self.live[at].clone();
                match self.cache.fork(seq) {
                    Ok(child) => self.live.push((child, namespace, tokens)),
                    Err(error) => assert!(matches!(error, Error::OutOfSequences { .. })),
                }
            }
            7 if live > 0 => {
                let at = self.rng.below(live);
                let keep = self.rng.below(self.live[at].2.len() + 1);
                match self.cache.truncate(self.live[at].0, keep as u32) {
                    Ok(()) => self.live[at].2.truncate(keep),
                    Err(Error::InvalidState { .. }) => {
                        assert_ne!(self.setup.windows, [None; 2]);
                        self.refused_truncations += 1;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            8 if live > 0 => {
                let at = self.rng.below(live);
                let (seq, ..) = self.live.swap_remove(at);
                self.cache.release(seq).unwrap();
                assert_eq!(self.cache.release(seq), Err(Error::StaleHandle { what: "sequence" }));
            }
            9 if self.rng.below(10) == 0 => self.cache.clear_prefix().unwrap(),
            9 if !self.live.is_empty() => self.steer(),
            _ => {}
        }
        self.cache.audit().unwrap();
        for (seq, _, tokens) in &self.live {
            assert_eq!(self.cache.tokens(*seq).unwrap(), tokens);
        }
    }

    /// Says something about what stays.
    fn steer(&mut self) {
        let seq = self.live[self.rng.below(self.live.len())].0;
        let (now, priority) = (self.rng.below(5000) as u64, self.rng.below(101) as u8);
        self.cache.advance(now).unwrap();
        let duration_ms = (now % 2 == 0).then_some(500);
        let range = Retention { start: self.rng.below(40), end: None, priority, duration_ms };
        self.cache.prioritize(seq, &[range]).unwrap();
        let hints =
            [Hint::None, Hint::SessionEnded, Hint::ExpectedAt { ms: now + 900 }, Hint::Waited];
        if self.rng.below(2) == 0 {
            let from = self.rng.below(3);
            self.cache.hint(seq, from, hints[self.rng.below(4)]).unwrap();
        }
    }
}

fn check_row(
    q: &[f32],
    out: &[f32],
    keys: &[Vec<f32>],
    values: &[Vec<f32>],
    kv: usize,
    tolerance: f64,
) {
    let dot = |key: &Vec<f32>| -> f64 {
        q.iter().zip(&key[kv..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let scores: Vec<f64> = keys.iter().map(|key| dot(key) / (q.len() as f64).sqrt()).collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (channel, &out) in out.iter().enumerate() {
        let sum =
            weights.iter().zip(values).map(|(w, v)| w * f64::from(v[kv + channel])).sum::<f64>();
        let error = (f64::from(out) - sum / total).abs();
        assert!(error <= tolerance, "channel {channel}: {out} for {}", sum / total);
    }
}
