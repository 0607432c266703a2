//! Demotion to host memory and promotion from it, as a cache does them: 256 blocks at a time, beside one
//! copy of as many bytes of page-locked memory; and what steps that decode lose by it, beside the same
//! steps in a cache that only evicts.
//!
//! Times are the host's, from the call to the end of what it enqueued, planning included.

use std::time::Instant;

use kvcache::attention::Scoring;
use kvcache::cache::{CacheOptions, KvCache, LayerId, Step, TierOptions, Work};
use kvcache::device::{
    Copies, Device, DeviceRows, DeviceRowsMut, DeviceStore, HostPart, SideStream, StoreOptions, Way,
};
use kvcache::dtype::{DType, KvFormat};
use kvcache::error::Result;
use kvcache::ids::{BlockId, Namespace};
use kvcache::layout::{CacheSpec, GroupLayout, GroupSpec};
use serde_json::json;

use crate::Line;
use crate::gpu::{Gpu, Sample};

const BLOCK: usize = 16;
const BLOCKS: usize = 256;
const SPACE: Namespace = Namespace(0);
const ROUNDS: usize = 12;

pub fn run(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    for mib in [1, 4] {
        moves(gpu, filter, report, mib)?;
    }
    decode(gpu, filter, report)
}

/// Blocks of so many MiB: 8 heads of 128 channels in bf16, 16 layers a MiB.
fn spec(mib: u32) -> CacheSpec {
    CacheSpec::uniform(BLOCK as u32, GroupSpec::uniform(16 * mib, 8, 128, KvFormat::Bf16))
}

fn cache(gpu: &Gpu, mib: u32, blocks: usize) -> Result<KvCache> {
    let options = CacheOptions {
        blocks: blocks as u32,
        max_seqs: 256,
        threads: 1,
        device: Device::Cuda { ordinal: 0 },
        stream: gpu.stream,
        ..CacheOptions::default()
    };
    KvCache::on(&gpu.backend, &spec(mib), &options)
}

fn sample(mut times: Vec<f64>) -> Sample {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    Sample { median_us: at(0.5), p10_us: at(0.1), p90_us: at(0.9) }
}

fn micros(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e6
}

/// A prompt of so many blocks and a token, which nobody else has.
fn prompt(n: usize, blocks: usize) -> Vec<u32> {
    (0..blocks * BLOCK + 1).map(|t| (n * 8192 + t) as u32).collect()
}

/// A sequence that has come and gone: its blocks are cached. What they hold is of no consequence.
fn pass(cache: &mut KvCache, step: &mut Step, prompt: &[u32]) -> Result<()> {
    let started = cache.start(prompt, SPACE)?;
    let tokens = &prompt[started.cached_tokens as usize..];
    cache.begin(step, &[Work { seq: started.seq, tokens }])?;
    cache.commit(step)?;
    cache.release(started.seq)
}

fn moves(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line), mib: u32) -> Result<()> {
    let name = |what: &str| format!("{what} {BLOCKS} blocks of {mib} MiB");
    if !["demote", "promote"].iter().any(|what| name(what).contains(filter)) {
        return Ok(());
    }
    let bytes = (BLOCKS as u64) << 20 << mib.trailing_zeros();
    if 3 * bytes > gpu.room()? {
        println!("{:<52} does not fit", name("demote, promote"));
        return Ok(());
    }
    let pinned = [Way::Down, Way::Up].map(|way| pinned(gpu, mib, way));
    let mut cache = cache(gpu, mib, BLOCKS + 1)?;
    cache.attach_tiers(TierOptions {
        transit_blocks: BLOCKS,
        ..TierOptions::host("bench", BLOCKS)
    })?;
    let mut times = [Vec::new(), Vec::new()];
    let mut step = Step::new();
    for round in 0..ROUNDS + 2 {
        let known = prompt(round, BLOCKS);
        pass(&mut cache, &mut step, &known)?;
        cache.sync()?;
        // All of the device, so that all that is cached leaves it.
        let seq = cache.start(&[1], SPACE)?.seq;
        let all: Vec<u32> = prompt(ROUNDS + 2, BLOCKS + 1)[..(BLOCKS + 1) * BLOCK].to_vec();
        let begin = Instant::now();
        cache.begin(&mut step, &[Work { seq, tokens: &all }])?;
        cache.sync()?;
        let down = micros(begin);
        cache.cancel(&mut step)?;
        cache.release(seq)?;
        let begin = Instant::now();
        let started = cache.start(&known, SPACE)?;
        cache.sync()?;
        let up = micros(begin);
        assert_eq!(started.cached_tokens as usize, BLOCKS * BLOCK, "all of it was in the host");
        cache.release(started.seq)?;
        if round >= 2 {
            times[0].push(down);
            times[1].push(up);
        }
    }
    let counters = cache.tier_reports()[0].counters;
    assert_eq!(counters.stored as usize, (ROUNDS + 2) * BLOCKS, "each was copied down once");
    for ((what, times), pinned) in ["demote", "promote"].into_iter().zip(times).zip(pinned) {
        let (sample, pinned) = (sample(times), pinned?);
        let line = |name: String, op: &str, sample: Sample, of_pinned: f64| Line {
            name,
            shape: json!({
                "op": op, "way": what, "blocks": BLOCKS, "block_bytes": bytes / BLOCKS as u64,
                "of_pinned": of_pinned, "batched": gpu.cuda.copies_in_batches(),
            }),
            bytes,
            flops: 0,
            sample,
        };
        let of_pinned = pinned.median_us / sample.median_us;
        report(line(format!("pinned copy beside {}", name(what)), "pinned copy", pinned, 1.0));
        report(line(name(what), "tier", sample, of_pinned));
        println!("    {of_pinned:.3} of one pinned copy's rate");
    }
    Ok(())
}

/// One copy of as many bytes, page-locked, on a stream of its own.
fn pinned(gpu: &Gpu, mib: u32, way: Way) -> Result<Sample> {
    let layout = GroupLayout::new(spec(mib).groups[0].clone(), BLOCK as u32)?;
    let each = layout.block_bytes() as usize;
    let options = StoreOptions { stream: gpu.stream, ..StoreOptions::default() };
    let store = DeviceStore::new(&gpu.backend, layout, BLOCKS as u32, options)?;
    let side = SideStream::new(&gpu.backend)?;
    let parts = HostPart::allocate(&gpu.backend, each * BLOCKS, 1, true)?;
    let mut times = Vec::new();
    for mut part in parts {
        for round in 0..ROUNDS + 2 {
            let mut copies = Copies::new(&gpu.backend, way);
            // Neighbours become one copy.
            for block in 0..BLOCKS {
                let span = store.span(BlockId(block as u32))?;
                match way {
                    Way::Down => copies.read(span, &mut part, block * each)?,
                    Way::Up => copies.write(span, &part, block * each)?,
                }
            }
            let begin = Instant::now();
            let (flight, enqueued) = copies.enqueue(&side);
            enqueued.and_then(|()| flight.wait())?;
            if round >= 2 {
                times.push(micros(begin));
            }
        }
    }
    Ok(sample(times))
}

const SEQS: usize = 128;
/// Blocks of each sequence when the steps begin.
const LONG: usize = 32;
const STEPS: usize = 60;
const WARM_UP: usize = 24;
/// Blocks of what is cached beside them, a prompt. As many are evicted in each step, on average, since the
/// sequences grow, and as many come back.
const MOVED: usize = SEQS / BLOCK;
const PROMPTS: usize = 2 * (STEPS + WARM_UP) + 8;

/// Steps that decode a token of each sequence in all layers and evict what they need for it, with a host
/// tier and without one, where what is evicted is gone.
fn decode(gpu: &Gpu, filter: &str, report: &mut impl FnMut(Line)) -> Result<()> {
    let name = |what: &str| format!("decode {SEQS} x {} {what}", LONG * BLOCK);
    let kinds = ["evicting", "demoting", "demoting and promoting", "demoting ahead and promoting"];
    if !kinds.iter().any(|what| name(what).contains(filter)) {
        return Ok(());
    }
    let blocks = SEQS * (LONG + 1) + PROMPTS * MOVED + 1;
    if (blocks as u64) << 21 > gpu.room()? {
        println!("{:<52} does not fit", name(kinds[0]));
        return Ok(());
    }
    // In turns, so that clocks are the same for all.
    let mut samples = [const { Vec::new() }; 4];
    for _ in 0..3 {
        for (kind, times) in samples.iter_mut().enumerate() {
            times.extend(steps(gpu, blocks, kind)?);
        }
    }
    let mut alone = None;
    for (what, times) in kinds.into_iter().zip(samples) {
        let sample = sample(times);
        let alone = *alone.get_or_insert(sample.median_us);
        let slower = sample.median_us / alone - 1.0;
        let shape = json!({
            "op": "decode beside tiers", "what": what, "seqs": SEQS, "tokens": LONG * BLOCK,
            "moved_blocks": MOVED, "block_bytes": 1 << 20, "slowdown": slower,
        });
        let bytes = ((SEQS * LONG) as u64) << 20;
        report(Line { name: name(what), shape, bytes, flops: 0, sample });
        println!("    {:+.1} % of the time of steps that only evict", 100.0 * slower);
    }
    Ok(())
}

/// Microseconds of each step. 0: no tier; 1: blocks go down; 2: others come back, too; 3: a step evicts
/// what the next one takes.
fn steps(gpu: &Gpu, blocks: usize, kind: usize) -> Result<Vec<f64>> {
    let mut cache = cache(gpu, 1, blocks)?;
    if kind > 0 {
        let ahead_blocks = if kind == 3 { 3 * MOVED as u32 } else { 0 };
        cache.attach_tiers(TierOptions {
            transit_blocks: 64 * MOVED,
            ahead_blocks,
            ..TierOptions::host("bench", PROMPTS * MOVED)
        })?;
    }
    let mut step = Step::new();
    for n in 0..PROMPTS {
        pass(&mut cache, &mut step, &prompt(n, MOVED))?;
    }
    let mut seqs = Vec::new();
    for n in 0..SEQS {
        let prompt = prompt(10_000 + n, LONG + 1);
        let seq = cache.start(&prompt, SPACE)?.seq;
        // So that not all of them fill a block in the same step.
        let tokens = &prompt[..LONG * BLOCK + n % BLOCK + 1];
        cache.begin(&mut step, &[Work { seq, tokens }])?;
        cache.commit(&mut step)?;
        seqs.push(seq);
    }
    let rows = |heads: u64| gpu.random(SEQS as u64 * heads * 128 * 2);
    let (new, q, out) = (rows(8)?, rows(32)?, rows(32)?);
    let elements = |heads: u64| SEQS as u64 * heads * 128;
    // SAFETY: the memory has these rows, and outlives what is enqueued on it.
    let (new, q) = unsafe {
        (
            DeviceRows::new(new.address(), DType::Bf16, elements(8)),
            DeviceRows::new(q.address(), DType::Bf16, elements(32)),
        )
    };
    let (work, scoring) = (
        seqs.iter().map(|&seq| Work { seq, tokens: &[7] }).collect::<Vec<_>>(),
        Scoring::causal(128),
    );
    let mut times = Vec::new();
    for n in 0..WARM_UP + STEPS {
        let begin = Instant::now();
        let back = match n.checked_sub(16).filter(|_| kind >= 2) {
            Some(n) => Some(cache.start(&prompt(n, MOVED), SPACE)?),
            None => None,
        };
        cache.begin(&mut step, &work)?;
        for layer in 0..16 {
            let at = LayerId::uniform(layer);
            cache.append_device(&step, at, new, new, None)?;
            // SAFETY: as above.
            let out = unsafe { DeviceRowsMut::new(out.address(), DType::Bf16, elements(32)) };
            cache.attend_device(&step, at, q, out, &scoring, None)?;
        }
        cache.commit(&mut step)?;
        cache.sync()?;
        if n >= WARM_UP {
            times.push(micros(begin));
        }
        if let Some(back) = back {
            assert_eq!(back.cached_tokens as usize, MOVED * BLOCK, "the host had it");
            cache.release(back.seq)?;
        }
    }
    if kind > 0 {
        let stored = cache.tier_reports()[0].counters.stored as usize;
        assert!(stored >= STEPS * MOVED, "{stored} blocks went down");
    }
    Ok(times)
}
