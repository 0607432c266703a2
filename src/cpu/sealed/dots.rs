//! Products of codes with queries and with probabilities: both are rounded to whole numbers first,
//! and what their scales and the middles of the codes add is put back in f32.

use super::codes::{self, whole};
use super::kernel::SealedJob;
use super::scratch::{Dims, GROUP, Scratch};
use crate::cpu::words::{ByteDot, Words};
use crate::quant::value_step;

/// The largest whole number that a query or probability of two bytes is rounded to: its high byte
/// stays within 127.
pub(in crate::cpu) const WIDE: f32 = 32639.0;

/// What a row's rounding to whole numbers leaves to be undone.
#[derive(Clone, Copy, Default)]
pub(super) struct Rounded {
    /// What a whole number stands for.
    pub unit: f32,
    /// Sums of the high and of the low bytes.
    pub high: f32,
    pub low: f32,
    /// Of a query: its dot product with the middles. Of probabilities: the factor of older sums.
    pub more: f32,
}

/// The middle of the codes of each number of bits.
pub(super) const CODE_MIDDLE: [f32; 9] = [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 63.5, 127.5];

/// Scales a query's channels to whole numbers, as bytes in the order of the codes.
#[inline(always)]
pub(super) unsafe fn round_query<V: Words>(
    dims: &Dims,
    s: &Scratch,
    row: usize,
    r: usize,
) -> Rounded {
    let wide = dims.k_bits == 8;
    // SAFETY: the caller's promise.
    unsafe {
        let q = s.q.add(row * dims.k_dim);
        let (mut top, mut low) = (V::splat(0.0), V::splat(0.0));
        let mut middle = V::splat(0.0);
        for c in (0..dims.k_dim).step_by(V::LANES) {
            let q = V::load(q.add(c));
            let x = q.mul(V::load(s.step.add(c)));
            (top, low) = (top.max(x), low.min(x));
            middle = q.fma(V::load(s.mid.add(c)), middle);
        }
        let largest = top.top().max(V::splat(0.0).sub(low).top());
        let limit = if wide { WIDE } else { 127.0 };
        // Smaller ones mean nothing beside any other term.
        let usable = largest > 1e-30 && largest < 1e30;
        let factor = V::splat(if usable { limit / largest } else { 0.0 });
        let (mut sum_high, mut sum_low) = (V::splat(0.0), V::splat(0.0));
        let (high, low) = (s.buffer, s.buffer.add(dims.k_dim));
        for c in (0..dims.k_dim).step_by(V::LANES) {
            let x = V::load(q.add(c)).mul(V::load(s.step.add(c))).mul(factor).round();
            let (h, l) = if wide { halves::<V>(x) } else { (x, V::splat(0.0)) };
            sum_high = sum_high.add(h);
            h.store_bytes(high.add(c));
            if wide {
                sum_low = sum_low.add(l);
                l.store_bytes(low.add(c));
            }
        }
        let to = s.q_bytes.add(r * 2 * dims.k_dim / 4).cast::<u8>();
        order::<V>(dims.k_bits, high, dims.k_dim, to);
        if wide {
            order::<V>(dims.k_bits, low, dims.k_dim, to.add(dims.k_dim));
        }
        // What is past f32 shows as such.
        let unit = if usable {
            largest / limit
        } else if largest <= 1e-30 {
            0.0
        } else {
            f32::NAN
        };
        Rounded { unit, high: sum_high.sum(), low: sum_low.sum(), more: middle.sum() }
    }
}

/// A whole number within [`WIDE`] as `256 * high + low`, both within a signed byte.
#[inline(always)]
pub(super) unsafe fn halves<V: Words>(x: V) -> (V, V) {
    // SAFETY: the caller's promise.
    unsafe {
        let high = x.add(V::splat(0.5)).mul(V::splat(1.0 / 256.0)).round();
        (high, x.sub(high.mul(V::splat(256.0))))
    }
}

/// Brings bytes into the order of the codes.
#[inline(always)]
pub(super) unsafe fn order<V: Words>(bits: u32, from: *const u8, count: usize, to: *mut u8) {
    let pattern = match bits {
        8 => const { &codes::pattern(8) },
        4 => const { &codes::pattern(4) },
        _ => const { &codes::pattern(2) },
    };
    for at in (0..count).step_by(16) {
        // SAFETY: the caller's promise.
        unsafe { V::permute16(from.add(at), pattern, to.add(at)) }
    }
}

/// Scores of `R` rows with all keys of the tile, scaled.
#[inline(always)]
pub(super) unsafe fn scores<V: Words, D: ByteDot<V>, const BITS: u32, const R: usize>(
    job: &SealedJob<'_>,
    dims: &Dims,
    s: &Scratch,
    queries: &[Rounded; GROUP],
) {
    let wide = BITS == 8;
    let (words, row_words) = (dims.k_words(), whole(dims.k_words()));
    let (parts, q_words) = (codes::parts(BITS), 2 * dims.k_dim / 4);
    let side = if V::MANY_REGISTERS { 2 } else { 1 };
    // SAFETY: the caller's promise.
    unsafe {
        let mut t = 0;
        while t < dims.tokens {
            let zero = V::splat_word(0);
            let (mut high, mut low) = ([[zero; R]; 2], [[zero; R]; 2]);
            for w in 0..words {
                let mut codes = [[zero; 4]; 2];
                for i in 0..side {
                    let at = (t + i * V::LANES) * row_words + w * V::LANES;
                    let third = if BITS == 3 {
                        let row = whole(dims.k_plane_row);
                        V::load_words(s.k_plane.add((t + i * V::LANES) * row + w / 2 * V::LANES))
                    } else {
                        zero
                    };
                    codes[i] = codes::bytes::<V, BITS>(V::load_words(s.k.add(at)), third, w);
                }
                for part in 0..parts {
                    for r in 0..R {
                        let q = s.q_bytes.add(r * q_words + w * parts + part);
                        let by = V::splat_word(q.read());
                        for i in 0..side {
                            high[i][r] = dot::<V, D, BITS>(high[i][r], codes[i][part], by);
                        }
                        if wide {
                            let by = V::splat_word(q.add(dims.k_dim / 4).read());
                            for i in 0..side {
                                low[i][r] = dot::<V, D, BITS>(low[i][r], codes[i][part], by);
                            }
                        }
                    }
                }
            }
            for i in 0..side {
                for r in 0..R {
                    let query = &queries[r];
                    let half = CODE_MIDDLE[BITS as usize];
                    let mut x = V::words_to_f32(high[i][r]).sub(V::splat(half * query.high));
                    if wide {
                        let low = V::words_to_f32(low[i][r]).sub(V::splat(half * query.low));
                        x = x.fma(V::splat(256.0), low);
                    }
                    let unit = V::splat(query.unit * job.scale);
                    let x = x.fma(unit, V::splat(query.more * job.scale));
                    x.store(s.s.add(r * dims.tokens + t + i * V::LANES));
                }
            }
            t += side * V::LANES;
        }
    }
}

#[inline(always)]
unsafe fn dot<V: Words, D: ByteDot<V>, const BITS: u32>(
    acc: V::Word,
    codes: V::Word,
    by: V::Word,
) -> V::Word {
    // SAFETY: the caller's promise.
    unsafe {
        if BITS == 8 { D::dot::<false>(acc, codes, by) } else { D::dot::<true>(acc, codes, by) }
    }
}

/// Adds the values of the tile, weighted by the probabilities of `R` rows, to their sums.
#[inline(always)]
pub(super) unsafe fn values<V: Words, D: ByteDot<V>, const BITS: u32, const R: usize>(
    dims: &Dims,
    s: &Scratch,
    first: usize,
    weights: &[Rounded; GROUP],
) {
    // SAFETY: the caller's promise.
    unsafe {
        if V::MANY_REGISTERS && (dims.v_dim / V::LANES).is_multiple_of(2) {
            values_of::<V, D, BITS, R, 2>(dims, s, first, weights);
        } else {
            values_of::<V, D, BITS, R, 1>(dims, s, first, weights);
        }
    }
}

/// [`values`], `SIDE` vectors of channels at a time: a constant, so that sums stay in registers.
#[inline(always)]
unsafe fn values_of<V: Words, D: ByteDot<V>, const BITS: u32, const R: usize, const SIDE: usize>(
    dims: &Dims,
    s: &Scratch,
    first: usize,
    weights: &[Rounded; GROUP],
) {
    let (words, parts, p_words) = (dims.v_words, codes::parts(BITS), 2 * dims.tokens / 4);
    // 8-bit codes are signed: flipped in their highest bit they are 128 more, and unsigned.
    let half = if BITS == 8 { 128.0 } else { CODE_MIDDLE[BITS as usize] };
    let step = if BITS == 8 { 1.0 } else { value_step(BITS) };
    // SAFETY: the caller's promise.
    unsafe {
        let mut c = 0;
        while c < dims.v_dim {
            let zero = V::splat_word(0);
            let (mut high, mut low) = ([[zero; R]; SIDE], [[zero; R]; SIDE]);
            for w in 0..words {
                let mut codes = [[zero; 4]; SIDE];
                for i in 0..SIDE {
                    let at = (c + i * V::LANES) * words + w * V::LANES;
                    let mut word = V::load_words(s.v.add(at));
                    if BITS == 8 {
                        word = V::xor_high_bits(word);
                    }
                    let third = if BITS == 3 {
                        let words = dims.v_plane_words;
                        V::load_words(s.v_plane.add((c + i * V::LANES) * words + w / 2 * V::LANES))
                    } else {
                        zero
                    };
                    codes[i] = codes::bytes::<V, BITS>(word, third, w);
                }
                for part in 0..parts {
                    for r in 0..R {
                        let p = s.p_bytes.add(r * p_words + w * parts + part);
                        let by = V::splat_word(p.read());
                        let by_low = V::splat_word(p.add(dims.tokens / 4).read());
                        for i in 0..SIDE {
                            high[i][r] = dot::<V, D, BITS>(high[i][r], codes[i][part], by);
                            low[i][r] = dot::<V, D, BITS>(low[i][r], codes[i][part], by_low);
                        }
                    }
                }
            }
            for i in 0..SIDE {
                for r in 0..R {
                    let p = &weights[r];
                    let high = V::words_to_f32(high[i][r]).sub(V::splat(half * p.high));
                    let low = V::words_to_f32(low[i][r]).sub(V::splat(half * p.low));
                    let sum = high.fma(V::splat(256.0), low);
                    let o = s.o.add((first + r) * dims.v_dim + c + i * V::LANES);
                    let older = V::load(o).mul(V::splat(p.more));
                    sum.fma(V::splat(p.unit * step), older).store(o);
                }
            }
            c += SIDE * V::LANES;
        }
    }
}

/// The same for values that lie in keys, from f32.
#[inline(always)]
pub(super) unsafe fn latent_values<V: Words, const R: usize>(
    dims: &Dims,
    s: &Scratch,
    first: usize,
    weights: &[Rounded; GROUP],
) {
    let rows = s.v.cast::<f32>();
    // SAFETY: the caller's promise.
    unsafe {
        for c in (0..dims.v_dim).step_by(V::LANES) {
            let mut sums = [V::splat(0.0); R];
            for r in 0..R {
                let o = V::load(s.o.add((first + r) * dims.v_dim + c));
                sums[r] = o.mul(V::splat(weights[r].more));
            }
            for t in 0..dims.tokens {
                let x = V::load(rows.add(t * dims.v_dim + c));
                for r in 0..R {
                    let p = V::splat(s.s.add(r * dims.tokens + t).read());
                    sums[r] = x.fma(p, sums[r]);
                }
            }
            for r in 0..R {
                sums[r].store(s.o.add((first + r) * dims.v_dim + c));
            }
        }
    }
}
