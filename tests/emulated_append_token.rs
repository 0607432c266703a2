//! Append to rows of codes in the emulator: the bytes of `quant`, bit for bit.
#![cfg(feature = "emulate")]

mod device;

use device::{Rng, Values};
use kvcache::dtype::{DType, KvFormat};
use kvcache::emu::{Buffer, Options, Schedule, launch};
use kvcache::kernels::append_token_launch;
use kvcache::kernels::params::{AppendParams, AppendTokenParams, In, Out};
use kvcache::quant::{RowCodec, Stored};

const FORMATS: [KvFormat; 5] =
    [KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Int8T, KvFormat::Int4T, KvFormat::Nvfp4];
const DIMS: [usize; 6] = [64, 80, 96, 128, 192, 256];
/// Latents: 512 channels, which are the values too, and 64 rotary ones.
const LATENT: usize = 576;
const UNTOUCHED: u8 = 0xa5;
const BLOCK_TOKENS: usize = 16;
const BLOCKS: usize = 4;

struct Case {
    format: KvFormat,
    dim: usize,
    heads: usize,
    rows: DType,
    rotated: bool,
    /// What the heads' scales are multiples of.
    scale: Option<f32>,
    /// Pairs of half a row, or neighbours.
    rope: Option<bool>,
    /// How many times as many tokens a block takes as it would for so few.
    times: u32,
    schedule: Schedule,
}

/// A row of one of many kinds: normal, tiny, huge, constant, zero, with outliers.
fn row(dim: usize, kind: usize, rng: &mut Rng) -> Vec<f32> {
    let normal = |rng: &mut Rng| (0..dim).map(|_| rng.normal()).collect::<Vec<f32>>();
    match kind % 8 {
        0 => vec![0.0; dim],
        1 => vec![-0.37; dim],
        2 => normal(rng).iter().map(|x| x * 1e-6).collect(),
        3 => normal(rng).iter().map(|x| x * 4e3).collect(),
        4 => normal(rng).iter().map(|x| x.abs() + 3.0).collect(),
        5 => normal(rng)
            .iter()
            .enumerate()
            .map(|(i, x)| if i % 29 == 3 { x * 40.0 } else { *x })
            .collect(),
        6 => (0..dim).map(|i| if i == dim / 2 { f32::from_bits(1) } else { -0.0 }).collect(),
        _ => normal(rng),
    }
}

/// What the cache holds afterwards, and the error flag.
fn check(case: &Case, spoil: Option<(usize, f32)>, slots: &[i64]) -> u32 {
    let (dim, heads, tokens) = (case.dim, case.heads, slots.len());
    let mut rng = Rng::new(9);
    let mut make = |shift: usize| -> Vec<f32> {
        (0..tokens * heads).flat_map(|r| row(dim, r + shift, &mut rng)).collect()
    };
    let (mut k, v) = (make(0), make(3));
    if let Some((at, bad)) = spoil {
        k[at] = bad;
    }
    let (k, v) = (Values::new(case.rows, &k), Values::new(case.rows, &v));
    let latent = dim == LATENT;
    // Keys, and values where they are stored; and the channels of keys that turn.
    let (sides, turning) = if latent { (1, 512..dim) } else { (2, 0..dim) };
    let keys = match latent {
        true => RowCodec::latent(case.format, 512, 64),
        false => RowCodec::key(case.format, dim as u32),
    };
    let keys = keys.unwrap();
    let keys = if case.format == KvFormat::Int8T {
        keys.with_rotation(case.rotated).unwrap()
    } else {
        keys
    };
    let values = if latent { keys } else { RowCodec::value(case.format, dim as u32).unwrap() };
    let scale = |head: usize| case.scale.map_or(1.0, |scale| scale * (0.3 + head as f32));
    let (row_bytes, scale_bytes) = (keys.code_bytes(), keys.scale_bytes());
    let run = BLOCK_TOKENS * (row_bytes + scale_bytes);
    let (head_stride, block_stride) = (run as i64, (sides * heads * run) as i64);

    let positions: Vec<u32> = (0..tokens as u32).map(|t| t * 3 % 50).collect();
    let pairs = turning.len() / 2;
    let angles = |f: fn(f32) -> f32| -> Vec<f32> {
        (0..50 * pairs).map(|i| f((i / pairs) as f32 * 0.9f32.powi((i % pairs) as i32))).collect()
    };
    let (cosines, sines) = (angles(f32::cos), angles(f32::sin));
    let mut want = vec![UNTOUCHED; BLOCKS * sides * heads * run];
    for (token, &slot) in slots.iter().enumerate() {
        let place = slot as usize;
        if slot < 0 || place >= BLOCKS * BLOCK_TOKENS {
            continue;
        }
        for side in 0..sides {
            for head in 0..heads {
                let (codec, rows) = if side == 0 { (keys, &k) } else { (values, &v) };
                let codec = if case.scale.is_some() {
                    codec.with_scale(scale(head)).unwrap()
                } else {
                    codec
                };
                let from = (token * heads + head) * dim;
                let mut x: Vec<f32> =
                    rows.values[from..from + dim].iter().map(|&x| x as f32).collect();
                if let (Some(neighbours), 0) = (case.rope, side) {
                    let x = &mut x[turning.clone()];
                    let before = x.to_vec();
                    for c in 0..2 * pairs {
                        let (lower, pair, other) = match neighbours {
                            true => (c % 2 == 0, c / 2, c ^ 1),
                            false => (c < pairs, c % pairs, (c + pairs) % (2 * pairs)),
                        };
                        let at = positions[token] as usize * pairs + pair;
                        let turned = before[other] * sines[at];
                        x[c] = before[c] * cosines[at] + if lower { -turned } else { turned };
                    }
                }
                let base = (place / BLOCK_TOKENS * sides + side) * heads * run + head * run;
                let slot = place % BLOCK_TOKENS;
                let (codes, scales) = want[base..base + run].split_at_mut(BLOCK_TOKENS * row_bytes);
                let codes = &mut codes[slot * row_bytes..][..row_bytes];
                let scales = &mut scales[slot * scale_bytes..][..scale_bytes];
                let stored = codec.encode(&x, codes, scales).unwrap();
                assert!(stored == Stored::Encoded || spoil.is_some());
            }
        }
    }

    let cache = Buffer::of(&vec![UNTOUCHED; want.len()]).unwrap();
    let flag = Buffer::of(&[0u32]).unwrap();
    let slots = Buffer::of(slots).unwrap();
    let positions = Buffer::of(&positions).unwrap();
    let (cosines, sines) = (Buffer::of(&cosines).unwrap(), Buffer::of(&sines).unwrap());
    let scales = Buffer::of(&(0..heads).map(scale).collect::<Vec<_>>()).unwrap();
    let v_at = cache.address() + if latent { 0 } else { (heads * run) as u64 };
    let codes = (BLOCK_TOKENS * row_bytes) as u64;
    let turns = |at: &Buffer| In::at(if case.rope.is_some() { at.address() } else { 0 });
    let mut params = AppendTokenParams {
        call: AppendParams {
            k: In::at(k.address()),
            v: In::at(if latent { 0 } else { v.address() }),
            k_cache: Out::at(cache.address()),
            v_cache: Out::at(v_at),
            slots: In::at(slots.address()),
            positions: In::at(positions.address()),
            cosines: turns(&cosines),
            sines: turns(&sines),
            error_flag: Out::at(flag.address()),
            k_token: (heads * dim) as i64,
            k_head: dim as i64,
            v_token: (heads * dim) as i64,
            v_head: dim as i64,
            k_cache_block: block_stride,
            k_cache_head: head_stride,
            k_cache_token: row_bytes as i64,
            v_cache_block: block_stride,
            v_cache_head: head_stride,
            v_cache_token: row_bytes as i64,
            tokens: tokens as u32,
            kv_heads: heads as u32,
            k_dim: dim as u32,
            v_dim: if latent { 0 } else { dim as u32 },
            block_tokens: BLOCK_TOKENS as u32,
            num_blocks: BLOCKS as u32,
            rope_first: if case.rope.is_some() { turning.start as u32 } else { 0 },
            rope_dim: if case.rope.is_some() { turning.len() as u32 } else { 0 },
            rope_positions: 50,
            rope_interleaved: u32::from(case.rope == Some(true)),
            row_dtype: case.rows.id(),
            ..AppendParams::default()
        },
        k_scales: Out::at(cache.address() + codes),
        v_scales: Out::at(v_at + codes),
        k_heads: In::at(if case.scale.is_some() { scales.address() } else { 0 }),
        v_heads: In::at(if case.scale.is_some() { scales.address() } else { 0 }),
        k_scale_block: block_stride,
        k_scale_head: head_stride,
        k_scale_token: scale_bytes as i64,
        v_scale_block: block_stride,
        v_scale_head: head_stride,
        v_scale_token: scale_bytes as i64,
        format: case.format.id(),
        k_rotated: u32::from(keys.is_rotated()),
    };
    let mut plan = append_token_launch(&mut params).unwrap().unwrap();
    params.call.tokens_per_block *= case.times;
    plan.grid[0] = params.call.tokens.div_ceil(params.call.tokens_per_block);
    let options = Options { schedule: case.schedule, ..Options::default() };
    // SAFETY: every address is that of a buffer that lives to the end of this function.
    unsafe { launch(plan.kernel.name, plan.grid, plan.kernel.threads, 0, &params, options) }
        .unwrap();
    let got = cache.read::<u8>();
    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
        let what = format!("{:?} d{} byte {at} of a run of {run}", case.format, dim);
        assert_eq!(got, want, "{what}");
    }
    flag.read::<u32>()[0]
}

fn plain(format: KvFormat, dim: usize) -> Case {
    Case {
        format,
        dim,
        heads: if dim == LATENT { 1 } else { 3 },
        rows: DType::F32,
        rotated: true,
        scale: None,
        rope: None,
        times: 1,
        schedule: Schedule::Forward,
    }
}

fn slots() -> Vec<i64> {
    (0..40).map(|t| if t % 7 == 3 { -1 } else { (t * 37 + 5) % 64 }).collect()
}

#[test]
fn rows_have_the_bits_of_the_reference() {
    for format in FORMATS {
        for dim in DIMS.into_iter().chain([LATENT]) {
            for rows in [DType::F32, DType::F16, DType::Bf16] {
                if rows == DType::F16 {
                    // What f16 holds of rows made for f32 may be infinite.
                    continue;
                }
                assert_eq!(check(&Case { rows, ..plain(format, dim) }, None, &slots()), 0);
            }
        }
    }
}

#[test]
fn head_scales_rotation_and_positions() {
    for (i, format) in FORMATS.into_iter().enumerate() {
        for dim in DIMS.into_iter().chain([LATENT]) {
            let scaled = !matches!(format, KvFormat::Int8T | KvFormat::Int4T);
            let scale = scaled.then_some(1.0);
            let rope = [None, Some(false), Some(true)][(i + dim / 16) % 3];
            for schedule in Schedule::ALL {
                let heads = if dim == LATENT { 1 } else { 2 };
                let case =
                    Case { scale, rope, schedule, rotated: false, heads, ..plain(format, dim) };
                assert_eq!(check(&case, None, &slots()), 0);
            }
        }
    }
}

/// Threads have rows of several tokens, or a token has more rows than a block at once; with and without
/// positions.
#[test]
fn any_number_of_heads_and_of_tokens_a_block() {
    for (i, format) in FORMATS.into_iter().enumerate() {
        for (dim, heads, times) in [(128, 1, 4), (128, 3, 8), (64, 8, 2), (128, 19, 1), (80, 17, 4)]
        {
            let rope = (i % 2 == dim / 64 % 2).then_some(false);
            let case = Case { heads, times, rope, ..plain(format, dim) };
            assert_eq!(check(&case, None, &slots()), 0, "{format:?} d{dim} {heads} heads");
        }
    }
}

/// Scales by whose inverse nothing can be multiplied without an overflow or an underflow.
#[test]
fn head_scales_far_from_1() {
    for format in [KvFormat::Fp8E4m3, KvFormat::Fp8E5m2, KvFormat::Nvfp4] {
        for scale in [1e-38, 1e-14, 1e-10, 1e10, 1e14, 1e38] {
            let case = Case { scale: Some(scale), ..plain(format, 64) };
            assert_eq!(check(&case, None, &slots()), 0, "{format:?} {scale}");
        }
    }
}

#[test]
fn rows_that_cannot_be_stored_are_left_and_flagged() {
    for format in FORMATS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(check(&plain(format, 64), Some((64 * 3 * 2 + 17, bad)), &slots()), 32);
        }
    }
    for format in [KvFormat::Int8T, KvFormat::Int4T] {
        for dim in [80, 128, 256] {
            assert_eq!(check(&plain(format, dim), Some((dim * 5, 3e38)), &slots()), 32);
        }
    }
    // In either part of a latent.
    for (format, channel) in FORMATS.into_iter().flat_map(|f| [(f, 3), (f, 575)]) {
        let bad = Some((LATENT * 2 + channel, f32::INFINITY));
        assert_eq!(check(&plain(format, LATENT), bad, &slots()), 32);
    }
    for format in [KvFormat::Int8T, KvFormat::Int4T] {
        let bad = Some((LATENT * 5 + 520, 3e38));
        assert_eq!(check(&plain(format, LATENT), bad, &slots()), 32);
    }
    // In the last channel of a row that ends before its lanes do.
    for format in FORMATS {
        assert_eq!(check(&plain(format, 80), Some((80 * 4 - 1, f32::NAN)), &slots()), 32);
    }
}

#[test]
fn slots_past_the_pool_are_skipped_and_flagged() {
    for format in FORMATS {
        assert_eq!(check(&plain(format, 128), None, &[3, 64, -1, 7]), 1);
        assert_eq!(check(&plain(format, LATENT), None, &[3, 64, -1, 7]), 1);
    }
}

#[test]
fn latents_turn_wherever_they_are_asked_to() {
    for (i, format) in FORMATS.into_iter().enumerate() {
        for rope in [None, Some(false), Some(true)] {
            let case = Case { rope, rows: DType::Bf16, ..plain(format, LATENT) };
            assert_eq!(check(&case, None, &slots()), 0);
            let schedule = Schedule::ALL[i % Schedule::ALL.len()];
            assert_eq!(check(&Case { schedule, ..case }, None, &slots()[..3]), 0);
        }
    }
}
