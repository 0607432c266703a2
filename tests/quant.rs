//! The quantised formats: golden bytes of an independent implementation, error bounds on any data,
//! and refusals. The records' checksums below come from a model of the format in NumPy, written
//! from its description.

#[allow(dead_code)]
mod random;

use kvcache::dtype::{FormatClass, KvFormat};
use kvcache::layout::tile::{TILE_TOKENS, TileLayout, TileShape};
use kvcache::quant::{
    Refusal, RowCodec, SIGNS, Stored, Tile, crc32c, hadamard_block, rotate, seal, tree_sum,
    unrotate,
};
use random::Rng;

fn tiles() -> impl Iterator<Item = KvFormat> {
    KvFormat::ALL.iter().copied().filter(|format| format.class() == FormatClass::Tile)
}

fn layout(format: KvFormat, k_dim: usize, v_dim: usize, tokens: usize) -> TileLayout {
    let (k_dim, v_dim, tokens) = (k_dim as u32, v_dim as u32, tokens as u32);
    TileLayout::new(format, TileShape { k_dim, v_dim, v_in_k: false, tokens }).unwrap()
}

/// Multiples of 2^-13 in -4..4: sums and products of few of them are exact.
fn exact(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..count).map(|_| ((rng.next() >> 40 & 0xffff) as f32 - 32768.0) / 8192.0).collect()
}

/// Keys whose channels differ in scale and offset.
fn exact_keys(tokens: usize, dim: usize) -> Vec<f32> {
    let mut keys = exact(1, tokens * dim);
    for row in keys.chunks_exact_mut(dim) {
        for (c, x) in row.iter_mut().enumerate() {
            *x = *x * [0.25, 0.5, 1.0, 2.0, 4.0][c % 5] + ((c % 7) as f32 - 3.0) * 4.0;
        }
    }
    keys
}

fn sealed(layout: &TileLayout, k: &[f32], v: &[f32]) -> Vec<u8> {
    let mut record = vec![0xa5; layout.bytes()];
    assert_eq!(seal(layout, k, v, &mut record).unwrap(), Stored::Encoded);
    record
}

fn checksum(record: &[u8]) -> u32 {
    u32::from_le_bytes(record[record.len() - 4..].try_into().unwrap())
}

#[test]
fn records_have_the_golden_bytes() {
    #[rustfmt::skip]
    let golden = [
        (16, 64, 64, 32, 0xb2c2_4e5c), (16, 80, 80, 64, 0x9167_81d3),
        (16, 96, 96, 64, 0x8bb2_3189), (16, 128, 128, 64, 0x5107_00fd),
        (16, 192, 128, 128, 0xfa2d_330b), (16, 256, 256, 32, 0x3393_8d8b),
        (17, 64, 64, 32, 0x4b8d_27eb), (17, 80, 80, 64, 0xec75_f418),
        (17, 96, 96, 64, 0x3de8_20a6), (17, 128, 128, 64, 0x7982_6261),
        (17, 192, 128, 128, 0xfa10_7366), (17, 256, 256, 32, 0x6448_0f29),
        (18, 64, 64, 32, 0x225d_20de), (18, 80, 80, 64, 0x5859_6952),
        (18, 96, 96, 64, 0xd669_e883), (18, 128, 128, 64, 0x1fee_542d),
        (18, 192, 128, 128, 0xc7da_9478), (18, 256, 256, 32, 0xcf04_0c67),
        (19, 64, 64, 32, 0x0fb4_5dcc), (19, 80, 80, 64, 0xe311_30ef),
        (19, 96, 96, 64, 0xeb90_e6a2), (19, 128, 128, 64, 0xc60b_6a1d),
        (19, 192, 128, 128, 0x8df3_67ed), (19, 256, 256, 32, 0x8222_9dda),
        (20, 64, 64, 32, 0x852c_739d), (20, 80, 80, 64, 0x5c92_e4eb),
        (20, 96, 96, 64, 0xffde_6f77), (20, 128, 128, 64, 0x4b1f_f66a),
        (20, 192, 128, 128, 0x58da_49b4), (20, 256, 256, 32, 0x1f57_21fc),
    ];
    for (id, k_dim, v_dim, tokens, expected) in golden {
        let layout = layout(KvFormat::from_id(id).unwrap(), k_dim, v_dim, tokens);
        let record = sealed(&layout, &exact_keys(tokens, k_dim), &exact(2, tokens * v_dim));
        assert_eq!(checksum(&record), expected, "format {id}, {k_dim} and {v_dim}, {tokens}");
        Tile::open(&layout, &record).unwrap();
    }
    // A quarter of the channels constant, beside others of any offset.
    #[rustfmt::skip]
    let constants = [(16, 0x9496_6cda), (17, 0x50ef_9f3e), (18, 0xb95a_6e5a), (19, 0xcf47_3f1a), (20, 0x2db2_32e0)];
    for (id, expected) in constants {
        let layout = layout(KvFormat::from_id(id).unwrap(), 64, 64, 32);
        let mut keys = exact_keys(32, 64);
        for row in keys.chunks_exact_mut(64) {
            row.iter_mut()
                .enumerate()
                .skip(3)
                .step_by(4)
                .for_each(|(c, x)| *x = (c as f32 - 20.0) * 0.37);
        }
        let record = sealed(&layout, &keys, &exact(2, 32 * 64));
        assert_eq!(checksum(&record), expected, "constant channels, format {id}");
    }
    #[rustfmt::skip]
    let latents = [
        (16, 0xd1dc_350a), (17, 0xb9a1_ffc6), (18, 0xe89e_7fd1), (19, 0x06c6_dc47),
        (20, 0xb9f2_8c45),
    ];
    for (id, expected) in latents {
        let shape = TileShape { k_dim: 576, v_dim: 512, v_in_k: true, tokens: 64 };
        let layout = TileLayout::new(KvFormat::from_id(id).unwrap(), shape).unwrap();
        let record = sealed(&layout, &exact_keys(64, 576), &[]);
        assert_eq!(checksum(&record), expected, "latent, format {id}");
    }
}

#[test]
fn a_small_record_byte_by_byte() {
    let layout = layout(KvFormat::Kt2v2, 16, 16, 32);
    let record = sealed(&layout, &exact(5, 32 * 16), &exact(6, 32 * 16));
    let hex: String = record[32 * 16..].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        "e25b5662ac59e8dd0a4661194a6a67ae976d62dea6ae94589b261a5db04ba96e553388a3e8d1236bd0e6c90d\
         a995715678bda66b299450e5ba0a34892b1929c9d6d599647a24ad358dde0a84223916b8fd7685ddd65cb955\
         d9975beb1f0f566ec1617b878aa981dd7a5355c2523d5a2914a45e5685aa3de44a57a169717e9a20ede6fbf2\
         f6e7e2f4fdfeffffedfce9f0b7bb13fdf97f85c308140b0205f00325b441724297404c4038407c40b740e740\
         cf406e426e41eb40d140de3d2841434024414b415f419840d641ed406f41de408340c4404c41334119420f42\
         b14154403e206e1a00000000140005002f16f6c2"
    );
    assert_eq!(record[..16], [0x68, 0xd4, 0xd4, 0x5f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

fn encoded(codec: &RowCodec, row: &[f32]) -> (Vec<u8>, Vec<u8>) {
    let (mut codes, mut scales) = (vec![0xa5; codec.code_bytes()], vec![0xa5; codec.scale_bytes()]);
    assert_eq!(codec.encode(row, &mut codes, &mut scales).unwrap(), Stored::Encoded);
    (codes, scales)
}

#[test]
fn rows_have_the_golden_bytes() {
    for (format, dim, expected) in [
        (KvFormat::Int8T, 64, 0xaa90_d485),
        (KvFormat::Int4T, 64, 0xc2cb_f251),
        (KvFormat::Int8T, 80, 0xb137_af23),
        (KvFormat::Int4T, 80, 0xa6b6_9c22),
        (KvFormat::Int8T, 128, 0x80dc_7187),
        (KvFormat::Int4T, 128, 0x4cdf_742f),
    ] {
        let codec = RowCodec::key(format, dim).unwrap();
        let (codes, scales) = encoded(&codec, &exact(3, dim as usize));
        assert_eq!(crc32c(crc32c(0, &codes), &scales), expected, "{format:?} {dim}");
    }
    // Written by hand: the grid of e2m1 times 2, which is stored exactly with the scale 12 / 6.
    let grid = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];
    let row: Vec<f32> = grid.iter().chain(&grid.map(|x| -x)).copied().collect();
    let codec = RowCodec::value(KvFormat::Nvfp4, 16).unwrap().with_scale(0.5).unwrap();
    let (codes, scales) = encoded(&codec, &row);
    assert_eq!(codes, [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(scales, [0x48]); // 4 in e4m3, times 0.5
    let codec = RowCodec::key(KvFormat::Fp8E4m3, 16).unwrap().with_scale(2.0).unwrap();
    let row = [2.0, -4.0, 896.0, 1e6, 0.0, 0.002, 1.0, 3.0, 0., 0., 0., 0., 0., 0., 0., 0.];
    let (codes, _) = encoded(&codec, &row);
    assert_eq!(codes[..8], [0x38, 0xc0, 0x7e, 0x7e, 0x00, 0x01, 0x30, 0x3c]);
}

#[test]
fn the_rotation_is_orthonormal_and_its_signs_are_published() {
    assert_eq!((SIGNS[0], SIGNS[8]), (0x68eb_a48c_11a0_8588, 0x0282_aa34_7a38_d144));
    let blocks = [(64, 64), (80, 16), (96, 32), (128, 128), (192, 64), (256, 256), (512, 512)];
    let mut rng = Rng::new(7);
    for (dim, block) in blocks {
        assert_eq!(hadamard_block(dim), block);
        let row: Vec<f32> = (0..dim).map(|_| rng.normal()).collect();
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let mut turned = row.clone();
        rotate(&mut turned);
        assert!(!((norm(&turned) / norm(&row) - 1.0).abs() > 1e-6));
        // One channel spreads over its block alone.
        let mut unit = vec![0.0; dim];
        unit[block - 1] = 1.0;
        rotate(&mut unit);
        let spread = 1.0 / (block as f32).sqrt();
        assert!(unit[..block].iter().all(|x| !((x.abs() - spread).abs() > 1e-6)));
        assert!(unit[block..].iter().all(|x| *x == 0.0));
        unrotate(&mut turned);
        let error: Vec<f32> = turned.iter().zip(&row).map(|(a, b)| a - b).collect();
        assert!(!(norm(&error) > 4e-6 * norm(&row)), "{dim}");
    }
    assert_eq!(tree_sum([1.0, 1e8, -1e8, 1.0, 5.0].into_iter()), 5.0);
    assert_eq!(tree_sum(core::iter::empty()), 0.0);
}

/// Rows of many kinds: normal, constant channels, offsets, outliers, denormals, large.
fn kinds(rng: &mut Rng, rows: usize, dim: usize) -> Vec<(&'static str, Vec<f32>)> {
    let mut make = |of: &mut dyn FnMut(&mut Rng, usize, usize) -> f32| -> Vec<f32> {
        (0..rows * dim).map(|at| of(rng, at / dim, at % dim)).collect()
    };
    vec![
        ("normal", make(&mut |rng, _, _| rng.normal())),
        ("zero", make(&mut |_, _, _| 0.0)),
        ("constant channels", make(&mut |_, _, c| c as f32 * 0.37 - 5.0)),
        ("constant rows", make(&mut |_, t, _| 3.0 - t as f32)),
        ("offsets", make(&mut |rng, _, c| rng.normal() + if c % 9 == 0 { 30.0 } else { 0.0 })),
        ("outliers", make(&mut |rng, _, c| rng.normal() * if c % 11 == 3 { 40.0 } else { 1.0 })),
        ("denormal", make(&mut |rng, _, _| rng.normal() * 1e-40)),
        ("tiny", make(&mut |rng, _, _| rng.normal() * 1e-9)),
        ("large", make(&mut |rng, _, _| rng.normal() * 1e4)),
        ("one element", make(&mut |_, t, c| if (t, c) == (1, 3) { -7.0 } else { 0.0 })),
    ]
}

#[test]
fn rows_come_back_within_their_bounds() {
    let mut rng = Rng::new(11);
    for format in [KvFormat::Int8T, KvFormat::Int4T, KvFormat::Fp8E4m3, KvFormat::Fp8E5m2] {
        for dim in [16, 64, 80, 96, 128, 192, 256, 576] {
            let codec = match dim {
                576 => RowCodec::latent(format, 512, 64).unwrap(),
                _ => RowCodec::key(format, dim as u32).unwrap(),
            };
            let mut back = vec![0.0; dim];
            for (kind, rows) in kinds(&mut rng, 4, dim) {
                for row in rows.chunks_exact(dim) {
                    let (codes, scales) = encoded(&codec, row);
                    codec.decode_rotated(&codes, &scales, &mut back).unwrap();
                    let mut target = row.to_vec();
                    let first = if dim == 576 { 512 } else { dim };
                    for (n, part) in [0..first, first..dim].into_iter().enumerate() {
                        if codec.is_rotated() {
                            rotate(&mut target[part.clone()]);
                        }
                        for at in part {
                            let x = target[at];
                            // Half a step of the scale that is stored, and of f32's last place.
                            let bound = match format {
                                KvFormat::Fp8E4m3 => x.abs() / 16.0 + 2f32.powi(-10),
                                KvFormat::Fp8E5m2 => x.abs() / 8.0 + 2f32.powi(-17),
                                _ => {
                                    let at = n * if format == KvFormat::Int4T { 4 } else { 2 };
                                    let bits = u16::from_le_bytes([scales[at], scales[at + 1]]);
                                    kvcache::dtype::f16::from_bits(bits).to_f32() / 2.0
                                }
                            };
                            let past = match format {
                                KvFormat::Fp8E4m3 => x.abs() > 448.0,
                                KvFormat::Fp8E5m2 => x.abs() > 57344.0,
                                _ => false,
                            };
                            let error = (back[at] - x).abs();
                            let slack = 2e-6 * x.abs().max(bound);
                            assert!(past || !(error > bound + slack), "{format:?} {dim} {kind}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn tiles_come_back_within_their_bounds() {
    let mut rng = Rng::new(13);
    for format in tiles() {
        for (dim, tokens) in [(64, 32), (80, 64), (96, 32), (128, 128), (192, 32), (256, 64)] {
            let layout = layout(format, dim, dim, tokens);
            for (kind, rows) in kinds(&mut rng, tokens, dim) {
                let record = sealed(&layout, &rows, &rows);
                let tile = Tile::open(&layout, &record).unwrap();
                let (mut k, mut v) = (vec![0.0; rows.len()], vec![0.0; rows.len()]);
                tile.keys(&mut k).unwrap();
                tile.values(&mut v).unwrap();
                check_keys(format, dim, &rows, &k, kind);
                for (row, back) in rows.chunks_exact(dim).zip(v.chunks_exact(dim)) {
                    check_value(format, row, back, kind);
                }
            }
        }
    }
}

/// No key is farther off than half its channel's step and, of coarse codes, half a unit of the
/// middle and what the clip cuts off.
fn check_keys(format: KvFormat, dim: usize, rows: &[f32], back: &[f32], kind: &str) {
    let column = |c: usize| rows.iter().skip(c).step_by(dim).copied();
    let range = |c: usize| {
        (column(c).fold(f32::INFINITY, f32::min), column(c).fold(f32::NEG_INFINITY, f32::max))
    };
    let n = ((1u32 << format.k_bits()) - 1) as f32;
    let clip = match format.k_bits() {
        3 => 0.9,
        2 => 0.8,
        _ => 1.0,
    };
    let widest = (0..dim).map(|c| range(c).1 - range(c).0).fold(0.0, f32::max) * clip / n;
    let farthest = (0..dim).map(|c| (range(c).0 + range(c).1).abs() / 2.0).fold(0.0, f32::max);
    for c in 0..dim {
        let (low, high) = range(c);
        // Units round up to an f16: one part in 1024, or the smallest f16.
        let unit = 1.001 * widest / 255.0 + 6e-8;
        let middle = 1.001 * farthest / 127.0 + 6e-8;
        let bound = if n == 255.0 {
            // The codes cover the range as seen from the stored middle.
            ((high - low + middle) / n + unit) / 2.0
        } else if low == high {
            // The outermost code lies on a channel without a range.
            (middle / n + unit) / 2.0
        } else {
            let step = (high - low).max(middle) * clip / n + unit;
            step / 2.0 + middle / 2.0 + (high - low) * (1.0 - clip) / 2.0
        };
        let step = (high - low) / n;
        let slack = 3e-6 * (low.abs().max(high.abs()) + step * n);
        for (x, y) in column(c).zip(back.iter().skip(c).step_by(dim)) {
            assert!(!((x - y).abs() > bound + slack), "{format:?} {dim} {kind}: {x} {y} {bound}");
        }
    }
}

/// 8-bit values are within half a step; below that they keep their length along themselves.
fn check_value(format: KvFormat, row: &[f32], back: &[f32], kind: &str) {
    let largest = row.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    if format.v_bits() == 8 {
        let bound = 1.001 * largest / 254.0 + 6e-8;
        assert!(row.iter().zip(back).all(|(x, y)| !((x - y).abs() > bound)), "{kind}");
        return;
    }
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    if largest > 1e-3 {
        let gain = dot(row, back) / dot(row, row);
        assert!(!((gain - 1.0).abs() > 1e-3), "{format:?} {kind}: gain {gain}");
    } else {
        // A scale below f16's normal range: lost precision, never more than its last place.
        assert!(back.iter().all(|y| !(y.abs() > 16.0 * largest + 1e-6)), "{kind}");
    }
}

/// The errors for normal data to 4 %: 8 and 4 bits by theory, 3 and 2 with their clip by simulation.
#[test]
fn normal_data_loses_what_it_must() {
    let mut rng = Rng::new(17);
    let (dim, tokens) = (128, 64);
    for (format, k_error, v_error) in [
        (KvFormat::Kt8v8, 0.0053, 0.0065),
        (KvFormat::Kt4v4, 0.0895, 0.1061),
        (KvFormat::Kt3v3, 0.1772, 0.195),
        (KvFormat::Kt2v2, 0.3654, 0.364),
    ] {
        let layout = layout(format, dim, dim, tokens);
        let (mut k_sum, mut v_sum, mut total) = (0.0, 0.0, 0.0);
        for _ in 0..8 {
            let rows: Vec<f32> = (0..tokens * dim).map(|_| gaussian(&mut rng)).collect();
            let record = sealed(&layout, &rows, &rows);
            let tile = Tile::open(&layout, &record).unwrap();
            let mut back = vec![0.0; rows.len()];
            let off = |back: &[f32]| -> f64 {
                rows.iter().zip(back).map(|(x, y)| f64::from(x - y).powi(2)).sum()
            };
            tile.keys(&mut back).unwrap();
            k_sum += off(&back);
            tile.values(&mut back).unwrap();
            v_sum += off(&back);
            total += rows.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        }
        let (k, v) = ((k_sum / total).sqrt(), (v_sum / total).sqrt());
        assert!(!((k / k_error - 1.0).abs() > 0.04), "{format:?}: keys {k} for {k_error}");
        assert!(!((v / v_error - 1.0).abs() > 0.04), "{format:?}: values {v} for {v_error}");
    }
}

/// Normal by Box and Muller: the tails matter here.
fn gaussian(rng: &mut Rng) -> f32 {
    let mut uniform = || (rng.next() >> 11) as f64 / (1u64 << 53) as f64;
    let (a, b) = (1.0 - uniform(), uniform());
    ((-2.0 * a.ln()).sqrt() * (2.0 * core::f64::consts::PI * b).cos()) as f32
}

#[test]
fn what_cannot_be_stored_stays_raw_and_changes_nothing() {
    for format in tiles() {
        let layout = layout(format, 64, 64, 32);
        let good = exact(1, 32 * 64);
        for (bad, refusal) in [
            (f32::NAN, Refusal::NonFinite),
            (f32::INFINITY, Refusal::NonFinite),
            (f32::NEG_INFINITY, Refusal::NonFinite),
            (1e12, Refusal::OutOfRange),
            (f32::MIN, Refusal::OutOfRange),
        ] {
            for at in [0, 63, 64 * 31, 64 * 32 - 1] {
                let mut rows = good.clone();
                rows[at] = bad;
                for (k, v) in [(&rows, &good), (&good, &rows)] {
                    let mut record = vec![0xa5; layout.bytes()];
                    let stored = seal(&layout, k, v, &mut record).unwrap();
                    assert_eq!(stored, Stored::Raw(refusal), "{format:?} {bad} at {at}");
                    assert!(record.iter().all(|&byte| byte == 0xa5));
                }
            }
        }
    }
    for format in [KvFormat::Int8T, KvFormat::Int4T, KvFormat::Fp8E4m3, KvFormat::Nvfp4] {
        let codec = RowCodec::key(format, 64).unwrap();
        let mut row = exact(1, 64);
        row[63] = f32::NAN;
        let (mut codes, mut scales) =
            (vec![0xa5; codec.code_bytes()], vec![0xa5; codec.scale_bytes()]);
        let stored = codec.encode(&row, &mut codes, &mut scales).unwrap();
        assert_eq!(stored, Stored::Raw(Refusal::NonFinite));
        assert!(codes.iter().chain(&scales).all(|&byte| byte == 0xa5));
        row[63] = f32::MAX;
        let wide = matches!(format, KvFormat::Int8T | KvFormat::Int4T);
        let stored = codec.encode(&row, &mut codes, &mut scales).unwrap();
        assert_eq!(stored == Stored::Raw(Refusal::OutOfRange), wide, "{format:?}");
    }
}

#[test]
fn damaged_and_foreign_records_are_refused() {
    let mut rng = Rng::new(19);
    for format in tiles() {
        for tokens in TILE_TOKENS {
            let layout = layout(format, 64, 64, tokens as usize);
            let rows = exact(1, tokens as usize * 64);
            let record = sealed(&layout, &rows, &rows);
            Tile::open(&layout, &record).unwrap();
            let flip = |record: &mut [u8], bit: usize| record[bit / 8] ^= 1 << (bit % 8);
            let mut damaged = record.clone();
            for bit in 0..8 * record.len() {
                flip(&mut damaged, bit);
                assert!(Tile::open(&layout, &damaged).is_err(), "{format:?} {tokens} bit {bit}");
                flip(&mut damaged, bit);
            }
            for _ in 0..200 {
                let mut damaged = record.clone();
                (0..2 + rng.below(2)).for_each(|_| flip(&mut damaged, rng.below(8 * record.len())));
                assert!(damaged == record || Tile::open(&layout, &damaged).is_err());
            }
            for length in 0..record.len() {
                assert!(Tile::open(&layout, &record[..length]).is_err());
            }
            for other in tiles().filter(|&other| other != format) {
                let other = self::layout(other, 64, 64, tokens as usize);
                let mut renamed = record.clone();
                renamed.resize(other.bytes(), 0);
                assert!(Tile::open(&other, &renamed).is_err());
            }
        }
    }
    // As many bytes with other dimensions: only the checksum can tell.
    let (a, b) = (layout(KvFormat::Kt4v4, 192, 64, 32), layout(KvFormat::Kt4v4, 64, 208, 32));
    assert_eq!(a.bytes(), b.bytes());
    let record = sealed(&a, &exact(1, 32 * 192), &exact(2, 32 * 64));
    assert!(Tile::open(&a, &record).is_ok() && Tile::open(&b, &record).is_err());
}

#[test]
fn bad_arguments_are_errors() {
    for dim in [0, 8, 24, 100, 272, u32::MAX] {
        assert!(RowCodec::key(KvFormat::Int8T, dim).is_err(), "{dim}");
        assert!(RowCodec::latent(KvFormat::Int8T, dim, 64).is_err() || dim == 272);
    }
    assert!(RowCodec::latent(KvFormat::Int8T, 512, 80).is_err());
    for format in [KvFormat::F32, KvFormat::Kt4v4] {
        assert!(RowCodec::value(format, 64).is_err());
    }
    let codec = RowCodec::key(KvFormat::Fp8E4m3, 64).unwrap();
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(codec.with_scale(scale).is_err());
    }
    assert!(RowCodec::key(KvFormat::Int8T, 64).unwrap().with_scale(1.0).is_err());
    assert!(RowCodec::key(KvFormat::Int4T, 64).unwrap().with_rotation(false).is_err());
    let plain = RowCodec::key(KvFormat::Int8T, 64).unwrap().with_rotation(false).unwrap();
    assert!(!plain.is_rotated() && !RowCodec::value(KvFormat::Int8T, 64).unwrap().is_rotated());
    let (row, mut codes, mut scales) = (vec![0.0; 64], vec![0; 64], vec![0; 2]);
    assert!(plain.encode(&row[1..], &mut codes, &mut scales).is_err());
    assert!(plain.encode(&row, &mut codes[1..], &mut scales).is_err());
    assert!(plain.decode(&codes, &scales[1..], &mut [0.0; 64]).is_err());
    let layout = layout(KvFormat::Kt4v4, 64, 64, 32);
    let (rows, mut record) = (vec![0.0; 32 * 64], vec![0; layout.bytes()]);
    assert!(seal(&layout, &rows[1..], &rows, &mut record).is_err());
    assert!(seal(&layout, &rows, &rows[1..], &mut record).is_err());
    assert!(seal(&layout, &rows, &rows, &mut record[1..]).is_err());
}
