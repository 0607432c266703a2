//! The rotation that spreads outliers over a row: fixed signs, then a Hadamard transform in blocks
//! of the largest power of two that divides the row.
//!
//! Orthonormal: lengths and dot products survive, and [`unrotate`] is the inverse. The order of the
//! butterflies is fixed, so the bits are the same wherever it runs.

/// The sign of channel `c` is bit `c % 64` of word `c / 64`: 1 negates. The first nine outputs of
/// SplitMix64 from the seed 0x006b_7663_6163_6865 ("kvcache").
pub const SIGNS: [u64; 9] = signs();

const fn signs() -> [u64; 9] {
    let mut words = [0; 9];
    let mut state: u64 = 0x006b_7663_6163_6865;
    let mut at = 0;
    while at < words.len() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        words[at] = x ^ (x >> 31);
        at += 1;
    }
    words
}

/// Channels of one block of the transform in a row of `dim`: the largest power of two that divides
/// it (64 for 64 and 192, 16 for 80, 32 for 96).
pub const fn hadamard_block(dim: usize) -> usize {
    if dim == 0 { 1 } else { 1 << dim.trailing_zeros() }
}

fn negate(row: &mut [f32]) {
    for (c, x) in row.iter_mut().enumerate() {
        if SIGNS[c / 64 % SIGNS.len()] >> (c % 64) & 1 == 1 {
            *x = -*x;
        }
    }
}

/// `H x / sqrt(n)` in place, in blocks of `n`.
fn transform(row: &mut [f32]) {
    let n = hadamard_block(row.len());
    let mut half = 1;
    while half < n {
        for pair in row.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = hadamard_scale(n);
    row.iter_mut().for_each(|x| *x *= scale);
}

/// `1 / sqrt(n)` for a block of `n`: a power of two, or one times `1 / sqrt(2)`.
pub(crate) fn hadamard_scale(n: usize) -> f32 {
    let log = n.trailing_zeros();
    let root = f32::from_bits((127 - log / 2) << 23);
    if log.is_multiple_of(2) { root } else { core::f32::consts::FRAC_1_SQRT_2 * root }
}

/// Rotates a row in place. Channels past the 576th repeat the signs of the first.
pub fn rotate(row: &mut [f32]) {
    negate(row);
    transform(row);
}

/// Undoes [`rotate`], but for rounding.
pub fn unrotate(row: &mut [f32]) {
    transform(row);
    negate(row);
}

/// The sum of at most 576 terms, neighbours first, then neighbouring sums, and so on; a last odd one
/// waits for the next round. What a warp adds up by shuffles. Terms past the 576th are not added.
pub fn tree_sum(terms: impl Iterator<Item = f32>) -> f32 {
    let mut sums = [0.0; 576];
    let mut count = 0;
    for (slot, term) in sums.iter_mut().zip(terms) {
        *slot = term;
        count += 1;
    }
    while count > 1 {
        for at in 0..count / 2 {
            sums[at] = sums[2 * at] + sums[2 * at + 1];
        }
        if count % 2 == 1 {
            sums[count / 2] = sums[count - 1];
        }
        count = count.div_ceil(2);
    }
    sums[0]
}
