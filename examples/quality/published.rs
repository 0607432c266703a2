//! Published formats, written from their descriptions as references: what others would store.
//! Scales have the width that the format gives them; everything else is f32.

use std::error::Error;

use kvcache::dtype::{DType, KvFormat, f16};
use kvcache::quant::transcode::{
    Kivi, from_q4_0, from_q8_0, from_vllm_int4, to_q4_0, to_q8_0, to_vllm_int4,
};
use kvcache::quant::{RowCodec, e2m1_from_f32, e2m1_to_f32, rotate, unrotate};

use crate::schemes::{Rows, Scheme, Store, Tiles, codec};

/// Centroids of the normal distribution for 4 and 3 bits (Lloyd and Max), the positive half.
const LLOYD_4: [f32; 8] = [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326];
const LLOYD_3: [f32; 4] = [0.2451, 0.7560, 1.3439, 2.1520];

/// Every published scheme for heads of `dim` channels.
pub fn all(dim: usize, staging: DType) -> Result<Vec<Scheme>, Box<dyn Error>> {
    let d = dim as f64;
    let unrotated = RowCodec::key(KvFormat::Int8T, dim as u32)?.with_rotation(false)?;
    let int4 = RowCodec::key(KvFormat::Int4T, dim as u32)?;
    let int4_bits = (int4.code_bytes() + int4.scale_bytes()) as f64 * 8.0 / d;
    Ok(vec![
        tokens("int8 per token", 8.0 + 32.0 / d, || codec(unrotated, dim)),
        tokens("q8_0", 8.5, || ggml(dim, 34, to_q8_0, from_q8_0)),
        tokens("q4_0", 4.5, || ggml(dim, 18, to_q4_0, from_q4_0)),
        tokens("q4_0+hadamard", 4.5, || rotated(dim, ggml(dim, 18, to_q4_0, from_q4_0))),
        tokens("vllm int4", 4.0 + 32.0 / d, || rotated(dim, vllm_int4(dim))),
        tokens("mxfp4", 4.25, || by_row(32, mxfp4)),
        Scheme {
            name: "turboquant 4-bit".into(),
            own: false,
            bits: 4.0 + (16.0 + 32.0) / 2.0 / d,
            store: Store::Tokens {
                k: rotated(dim, by_row(dim, turbo_key)),
                v: by_row(dim, |row| min_max(row, 15.0)),
            },
            cached: None,
        },
        // What a raw tile alone does for formats that need none.
        raw_tile("int4_t, raw tile", int4_bits, staging, codec(int4, dim)),
        raw_tile("q4_0+h, raw tile", 4.5, staging, rotated(dim, ggml(dim, 18, to_q4_0, from_q4_0))),
        kivi(4, dim, staging)?,
        kivi(2, dim, staging)?,
        // One exact element of f16 and its place in a hundred.
        Scheme {
            name: "kvquant-like 3-bit".into(),
            own: false,
            bits: 3.0 + 0.01 * 32.0,
            store: Store::Tokens {
                k: Box::new(move |rows| kvquant_keys(rows, dim)),
                v: by_row(dim, kvquant_row),
            },
            cached: None,
        },
    ])
}

fn tokens(name: &str, bits: f64, rows: impl Fn() -> Box<Rows>) -> Scheme {
    let store = Store::Tokens { k: rows(), v: rows() };
    Scheme { name: name.into(), own: false, bits, store, cached: None }
}

/// A scheme of independent rows, read as tiles of 64 of which a query's own is raw.
fn raw_tile(name: &str, bits: f64, staging: DType, rows: Box<Rows>) -> Scheme {
    let tile: Box<Tiles> = Box::new(move |k, v| rows(k).and_then(|()| rows(v)));
    let store = Store::Tiles { tokens: 64, staging, tile, sinks: 0 };
    Scheme { name: name.into(), own: false, bits, store, cached: None }
}

/// A scheme of independent rows of `dim`.
fn by_row(dim: usize, row: impl Fn(&mut [f32]) + Sync + 'static) -> Box<Rows> {
    Box::new(move |rows| {
        rows.chunks_exact_mut(dim).for_each(&row);
        Ok(())
    })
}

/// A scheme of rows that are rotated before and after.
fn rotated(dim: usize, inner: Box<Rows>) -> Box<Rows> {
    Box::new(move |rows| {
        rows.chunks_exact_mut(dim).for_each(rotate);
        inner(rows)?;
        rows.chunks_exact_mut(dim).for_each(unrotate);
        Ok(())
    })
}

type Write = fn(&[f32], &mut [u8]) -> kvcache::Result<()>;
type Read = fn(&[u8], &mut [f32]) -> kvcache::Result<()>;

fn ggml(dim: usize, block_bytes: usize, write: Write, read: Read) -> Box<Rows> {
    through(dim, dim / 32 * block_bytes, write, read)
}

fn vllm_int4(dim: usize) -> Box<Rows> {
    through(dim, dim / 2 + 4, to_vllm_int4, from_vllm_int4)
}

/// Rows through the bytes of another project.
fn through(dim: usize, row_bytes: usize, write: Write, read: Read) -> Box<Rows> {
    Box::new(move |rows| {
        let mut bytes = vec![0; row_bytes];
        for row in rows.chunks_exact_mut(dim) {
            write(row, &mut bytes)?;
            read(&bytes, row)?;
        }
        Ok(())
    })
}

/// The scale is the power of two that puts the largest element between 4 and 8.
fn mxfp4(group: &mut [f32]) {
    let largest = group.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    if largest == 0.0 {
        return;
    }
    let scale = (largest.log2().floor() - 2.0).exp2();
    group.iter_mut().for_each(|x| *x = e2m1_to_f32(e2m1_from_f32(*x / scale)) * scale);
}

fn nearest(x: f32, half: &[f32]) -> f32 {
    let magnitude =
        half.iter().copied().min_by(|a, b| (a - x.abs()).abs().total_cmp(&(b - x.abs()).abs()));
    magnitude.unwrap_or(0.0).copysign(x)
}

fn norm(row: &[f32]) -> f32 {
    row.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// Codes for unit variance, and the length of the row kept: the norm in f16.
fn turbo_key(row: &mut [f32]) {
    let length = norm(row);
    if length == 0.0 {
        return;
    }
    let deviation = length / (row.len() as f32).sqrt();
    row.iter_mut().for_each(|x| *x = nearest(*x / deviation, &LLOYD_4));
    let scale = f16::from_f32(length / norm(row)).to_f32();
    row.iter_mut().for_each(|x| *x *= scale);
}

/// Uniform codes `0..=n` from the smallest to the largest element, both ends in f16.
fn min_max(row: &mut [f32], n: f32) {
    let low = row.iter().copied().fold(f32::INFINITY, f32::min);
    let high = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (scale, low) = (f16::from_f32((high - low) / n).to_f32(), f16::from_f32(low).to_f32());
    if scale > 0.0 {
        row.iter_mut().for_each(|x| *x = low + ((*x - low) / scale).round().clamp(0.0, n) * scale);
    }
}

/// Keys per channel over 32 tokens, values per token over 32 channels, one raw group at the end.
fn kivi(bits: u32, dim: usize, staging: DType) -> Result<Scheme, Box<dyn Error>> {
    const GROUP: usize = 32;
    let layout = Kivi::new(bits, GROUP)?;
    let tile: Box<Tiles> = Box::new(move |k, v| {
        let through = |row: &mut [f32]| -> Result<(), Box<dyn Error>> {
            let mut words = vec![0; row.len() * bits as usize / 32];
            let mut scales = vec![f16::ZERO; row.len() / GROUP];
            let mut mins = scales.clone();
            layout.encode(row, &mut words, &mut scales, &mut mins)?;
            Ok(layout.decode(&words, &scales, &mins, row)?)
        };
        for channel in 0..dim {
            let mut column: Vec<f32> = k.iter().skip(channel).step_by(dim).copied().collect();
            through(&mut column)?;
            k.iter_mut().skip(channel).step_by(dim).zip(column).for_each(|(k, x)| *k = x);
        }
        v.chunks_exact_mut(dim).try_for_each(through)
    });
    Ok(Scheme {
        name: format!("kivi-{bits}"),
        own: false,
        bits: f64::from(bits) + 1.0,
        store: Store::Tiles { tokens: GROUP, staging, tile, sinks: 0 },
        cached: None,
    })
}

/// Codes of 3 bits for a normal distribution of mean and deviation; what lies past the hundredth
/// largest magnitude stays as it is.
fn kvquant_row(row: &mut [f32]) {
    let limit = kept_from(row);
    let (mean, deviation) = moments(row.iter().copied().filter(|x| x.abs() < limit));
    for x in row.iter_mut().filter(|x| x.abs() < limit) {
        *x = mean + deviation * nearest((*x - mean) / deviation, &LLOYD_3);
    }
}

/// The same per channel, calibrated on the text itself: better than a real calibration. The largest
/// hundredth is by token, from the channel's mean in deviations.
fn kvquant_keys(rows: &mut [f32], dim: usize) -> Result<(), Box<dyn Error>> {
    let channels: Vec<(f32, f32)> =
        (0..dim).map(|c| moments(rows.iter().skip(c).step_by(dim).copied())).collect();
    for row in rows.chunks_exact_mut(dim) {
        let mut units: Vec<f32> = row
            .iter()
            .zip(&channels)
            .map(|(x, (mean, deviation))| (x - mean) / deviation)
            .collect();
        let limit = kept_from(&units);
        units.iter_mut().filter(|x| x.abs() < limit).for_each(|x| *x = nearest(*x, &LLOYD_3));
        for ((x, unit), (mean, deviation)) in row.iter_mut().zip(units).zip(&channels) {
            *x = mean + deviation * unit;
        }
    }
    Ok(())
}

/// The magnitude from which the largest hundredth of a row, at least one element, is kept.
fn kept_from(row: &[f32]) -> f32 {
    let mut magnitudes: Vec<f32> = row.iter().map(|x| x.abs()).collect();
    magnitudes.sort_by(f32::total_cmp);
    magnitudes[row.len() - row.len().div_ceil(100)]
}

fn moments(elements: impl Iterator<Item = f32> + Clone) -> (f32, f32) {
    let count = elements.clone().count().max(1) as f32;
    let mean = elements.clone().sum::<f32>() / count;
    let variance = elements.map(|x| (x - mean) * (x - mean)).sum::<f32>() / count;
    (mean, variance.sqrt().max(f32::MIN_POSITIVE))
}
