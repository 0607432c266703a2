//! Sequences that share blocks are attended together on the CPU, split by split; what comes out of it
//! is, to the bit, what each gives alone.

mod random;

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, Work};
use kvcache::dtype::KvFormat;
use kvcache::ids::{Namespace, SeqId};
use kvcache::layout::{CacheSpec, GroupSpec};
use random::Rng;

const DIM: usize = 64;
const KV_HEADS: usize = 2;
const Q_HEADS: usize = 4;

struct Test {
    cache: KvCache,
    step: Step,
    rng: Rng,
}

impl Test {
    fn new(format: KvFormat, threads: u32) -> Self {
        let group = GroupSpec::uniform(1, KV_HEADS as u32, DIM as u32, format);
        let spec = CacheSpec::uniform(16, group);
        let options =
            CacheOptions { blocks: 1024, max_seqs: 16, threads, ..CacheOptions::default() };
        let cache = KvCache::new(&spec, &options).unwrap();
        Test { cache, step: Step::new(), rng: Rng::new(7) }
    }

    /// New tokens of a sequence, their rows random; no attention.
    fn extend(&mut self, seq: SeqId, tokens: &[u32]) {
        self.cache.begin(&mut self.step, &[Work { seq, tokens }]).unwrap();
        let rows: Vec<f32> =
            (0..tokens.len() * KV_HEADS * DIM).map(|_| self.rng.normal()).collect();
        let at = LayerId::uniform(0);
        self.cache.append(&self.step, at, rows[..].into(), rows[..].into(), None).unwrap();
        self.cache.commit(&mut self.step).unwrap();
    }

    fn start(&mut self, prompt: &[u32], space: u64) -> SeqId {
        let started = self.cache.start(prompt, Namespace(space)).unwrap();
        self.extend(started.seq, &prompt[started.cached_tokens as usize..]);
        started.seq
    }

    /// Outputs and LSE of a step of these sequences, each with `count` tokens whose rows depend on
    /// the sequence alone. Nothing of it stays.
    fn attend(&mut self, seqs: &[SeqId], count: usize, scoring: &Scoring) -> (Vec<u32>, Vec<u32>) {
        let tokens = vec![3; count];
        let work: Vec<_> = seqs.iter().map(|&seq| Work { seq, tokens: &tokens }).collect();
        self.cache.begin(&mut self.step, &work).unwrap();
        let rows = |heads: usize| -> Vec<f32> {
            let of = |seq: &SeqId| {
                let mut rng = Rng::new(u64::from(seq.0) + 100);
                (0..count * heads * DIM).map(|_| rng.normal()).collect::<Vec<_>>()
            };
            seqs.iter().flat_map(of).collect()
        };
        let (k, q, at) = (rows(KV_HEADS), rows(Q_HEADS), LayerId::uniform(0));
        self.cache.append(&self.step, at, k[..].into(), k[..].into(), None).unwrap();
        let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len() / DIM]);
        let to = (&mut out[..]).into();
        self.cache.attend(&self.step, at, q[..].into(), to, scoring, Some(&mut lse)).unwrap();
        self.cache.cancel(&mut self.step).unwrap();
        let bits = |list: Vec<f32>| list.into_iter().map(f32::to_bits).collect();
        (bits(out), bits(lse))
    }
}

#[test]
fn each_sequence_gets_the_bits_that_it_gets_alone() {
    let prompt: Vec<u32> = (0..if cfg!(miri) { 600 } else { 1700 }).collect();
    for (format, threads) in
        [(KvFormat::F32, 1), (KvFormat::Bf16, 3), (KvFormat::F16, 2), (KvFormat::Int8T, 2)]
    {
        let mut test = Test::new(format, threads);
        let first = test.start(&prompt, 0);
        // Forks that go on by themselves, one that was found in the index, one that shares less, one
        // with the same tokens in another namespace, and a short one.
        let mut seqs = vec![first];
        for n in 0..3u32 {
            let seq = test.cache.fork(first).unwrap();
            test.extend(seq, &vec![9 + n; 1 + 30 * n as usize]);
            seqs.push(seq);
        }
        let branch = prompt.len() * 2 / 3;
        seqs.push(test.start(&[&prompt[..branch], &[5; 600]].concat(), 0));
        seqs.push(test.start(&[&prompt[..branch], &[5; 600], &[6; 40]].concat(), 0));
        seqs.push(test.start(&prompt, 1));
        seqs.push(test.start(&[&prompt[..], &[8]].concat(), 0));
        seqs.push(test.start(&[1, 2, 3], 0));
        let blocks = |seq: SeqId| test.cache.blocks(seq, 0).unwrap().to_vec();
        let whole = prompt.len() / 16;
        assert_eq!(blocks(seqs[1])[..whole], blocks(seqs[0])[..whole]);
        assert_eq!(blocks(seqs[7])[..whole], blocks(seqs[0])[..whole]);
        assert_ne!(blocks(seqs[6])[0], blocks(seqs[0])[0]);

        let plain = Scoring { scale: 0.3, ..Scoring::causal(DIM as u32) };
        let sinks = [0.5f32; Q_HEADS];
        let rules = [
            plain,
            Scoring { sinks: Some(&sinks), softcap: Some(9.0), ..plain },
            Scoring { window: Some(700), ..plain },
        ];
        for (n, scoring) in rules.iter().enumerate() {
            let count = 1 + n;
            let alone: Vec<_> =
                seqs.iter().map(|&seq| test.attend(&[seq], count, scoring)).collect();
            for turn in 0..3 {
                // As they were made, the other way round, and every other one first.
                let mut order: Vec<usize> = (0..seqs.len()).collect();
                match turn {
                    1 => order.reverse(),
                    2 => order.sort_by_key(|at| at % 2),
                    _ => {}
                }
                let batch: Vec<_> = order.iter().map(|&at| seqs[at]).collect();
                let (out, lse) = test.attend(&batch, count, scoring);
                let side = count * Q_HEADS;
                for (row, &at) in order.iter().enumerate() {
                    let what = format!("{format:?}, rule {n}, turn {turn}, sequence {at}");
                    let outs = &out[row * side * DIM..][..side * DIM];
                    assert!(outs == alone[at].0, "{what}: out");
                    assert!(lse[row * side..][..side] == alone[at].1, "{what}: lse");
                }
            }
        }
    }
}
