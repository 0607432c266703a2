//! The planning kernel in the emulator: whatever the lengths, its ranges have every token of every
//! sequence once, and no two partial results share a place.
#![cfg(feature = "emulate")]

mod device;

use std::collections::HashSet;

use device::Rng;
use kvcache::dtype::KvFormat;
use kvcache::emu::{Buffer, Options, launch};
use kvcache::kernels::params::{DecodeHead, DecodeRange, DecodeSpan, In, Out};
use kvcache::kernels::{DecodeBounds, DecodePlan, Pieces, SM90_SHARED_BYTES};

const TILE: u64 = 64;
const TOO_LONG: u32 = 4;

fn read<T: Copy>(address: u64, count: usize) -> Vec<T> {
    // SAFETY: the emulator's device memory is this process's; the plan says how much it wrote.
    unsafe { std::slice::from_raw_parts(address as *const T, count) }.to_vec()
}

struct Case {
    lens: Vec<i32>,
    kv_heads: u32,
    q_len: u32,
    window: Option<u32>,
    pieces: Pieces,
    multiprocessors: u32,
    max_tokens: u32,
}

/// Plans, checks the plan, and gives the error flag.
fn check(case: &Case) -> u32 {
    let plan = DecodePlan::new(DecodeBounds {
        format: KvFormat::Bf16,
        head_dim: 128,
        tile_tokens: 64,
        q_heads: case.kv_heads,
        kv_heads: case.kv_heads,
        q_len: case.q_len,
        batch: case.lens.len() as u32,
        max_tokens: case.max_tokens,
        pieces: case.pieces,
        multiprocessors: case.multiprocessors,
        multiprocessor_shared_bytes: SM90_SHARED_BYTES,
    })
    .unwrap();
    let (lens, flag) = (Buffer::of(&case.lens).unwrap(), Buffer::of(&[0u32]).unwrap());
    let at = |workspace: u64| {
        let (lens_at, flag_at) = (In::at(lens.address()), Out::at(flag.address()));
        plan.plan_launch(workspace, lens_at, case.lens.len() as u32, case.window, flag_at).unwrap()
    };
    // Partial results lie behind all that a plan is, and can be gigabytes.
    let (_, nowhere) = at(256);
    let bytes = nowhere.tickets.0 - 256 + u64::from(nowhere.max_ranges * nowhere.units) * 4;
    assert!(bytes <= plan.workspace_bytes());
    let workspace = Buffer::new(bytes.next_multiple_of(256) as usize).unwrap();
    let (run, params) = at(workspace.address());
    let (kernel, options) = (run.kernel, Options::default());
    // SAFETY: all buffers live to the end of this function.
    unsafe {
        launch(kernel.name, run.grid, kernel.threads, run.shared_bytes, &params, options).unwrap();
    }

    let balanced = case.pieces == Pieces::Balanced;
    let head = read::<DecodeHead>(params.head.0, 1)[0];
    let ranges = read::<DecodeRange>(params.ranges.0, head.ranges as usize + 1);
    let spans = read::<DecodeSpan>(params.spans.0, case.lens.len());
    assert!(head.ranges >= 1 && head.ranges <= params.max_ranges, "{head:?} {params:?}");
    assert_eq!((head.slots, head.taken, head.done), (1 + u32::from(balanced), 0, 0));
    let tickets = read::<u32>(params.tickets.0, (head.ranges * params.units) as usize);
    assert!(tickets.iter().all(|&ticket| ticket == 0));

    let max_slots = params.max_ranges * head.slots;
    let mut slots = HashSet::new();
    let mut next = vec![None; case.lens.len()];
    let (mut longest, mut total) = (0, 0);
    for range in 0..head.ranges {
        let (from, to) = (ranges[range as usize], ranges[range as usize + 1]);
        assert!((from.seq, from.offset) < (to.seq, to.offset), "{from:?} {to:?}");
        let mut granules = 0;
        for seq in from.seq..=to.seq.min(case.lens.len() as u32 - 1) {
            if (seq, 0) == (to.seq, to.offset) {
                break;
            }
            let span = spans[seq as usize];
            let begin = span.begin + if seq == from.seq { from.offset } else { 0 };
            let end = if seq == to.seq { span.begin + to.offset } else { span.end };
            // Behind the piece before, and one that is not empty unless the sequence is.
            assert_eq!(begin, next[seq as usize].unwrap_or(span.begin));
            assert!(begin < end || (begin == end && span.begin == span.end), "{begin} {end}");
            assert!(end <= span.end && span.first <= range && range <= span.last, "{span:?}");
            next[seq as usize] = Some(end);
            granules += u64::from(end - begin).div_ceil(TILE).max(1);
            if span.first < span.last {
                let first = balanced && range == span.first;
                let slot = range * head.slots + u32::from(first);
                assert!(slot < max_slots && slots.insert(slot), "{slot}");
            }
        }
        longest = longest.max(granules);
        total += granules;
    }
    for (seq, (span, &len)) in spans.iter().zip(&case.lens).enumerate() {
        let len = len.max(0) as u32;
        let hidden = (i64::from(len) + 1 - i64::from(case.q_len))
            .saturating_sub(case.window.map_or(i64::MAX, i64::from));
        let begin = if hidden > 0 && len > 0 { hidden as u32 / 16 * 16 } else { 0 };
        assert_eq!((span.begin, span.end, next[seq]), (begin, len, Some(len)));
    }
    if balanced {
        // No block begins with more than its share.
        assert!(longest <= total.div_ceil(u64::from(params.longs)), "{longest} of {total}");
    }
    flag.read::<u32>()[0]
}

#[test]
fn every_token_is_in_one_range() {
    let mut rng = Rng::new(77);
    let rounds = std::env::var("KVCACHE_EMU_ROUNDS").map_or(30, |n| n.parse().unwrap());
    for round in 0..10 * rounds {
        let most = rng.pick(&[1, 3, 40, 700]);
        let batch = 1 + rng.below(most);
        let most = rng.pick(&[1usize, 100, 5000, 300_000]);
        let lens: Vec<i32> =
            (0..batch).map(|_| rng.below(most + 1) as i32 - i32::from(rng.below(9) == 0)).collect();
        let pieces = match round % 3 {
            0 => Pieces::Fixed(64 * (1 + rng.below(40) as u32)),
            _ => Pieces::Balanced,
        };
        let case = Case {
            lens,
            kv_heads: rng.pick(&[1, 2, 8, 600]),
            q_len: 1 + rng.below(8) as u32,
            window: (rng.below(3) == 0).then(|| 1 + rng.below(3000) as u32),
            pieces,
            multiprocessors: rng.pick(&[1, 4, 132]),
            max_tokens: most as u32,
        };
        assert_eq!(check(&case), 0);
    }
}

#[test]
fn sequences_longer_than_fixed_pieces_were_made_for_get_longer_ones() {
    let case = Case {
        lens: vec![100_000, 3, 70_000],
        kv_heads: 2,
        q_len: 1,
        window: None,
        pieces: Pieces::Fixed(64),
        multiprocessors: 4,
        max_tokens: 1000,
    };
    assert_eq!(check(&case), TOO_LONG);
}
