//! Packed words of a record: to lanes, and from words to bytes.
//!
//! The kernels want a word of each of `LANES` rows side by side: rows are tokens for keys, channels
//! for values. Of such a vector every byte is a code, and the four bytes of a lane meet four
//! weights in one dot product. Weights are brought into the order of the bytes once
//! ([`pattern`]), so that codes never move.

use crate::cpu::vector::prefetch;
use crate::cpu::words::Words;

/// Vectors of bytes in a packed word of codes of `bits`: 3-bit codes are 2 bits here and a third in
/// their plane.
pub(super) const fn parts(bits: u32) -> usize {
    match bits {
        8 => 1,
        4 => 2,
        _ => 4,
    }
}

/// Where in sixteen elements each byte of their packed words comes from: word by word, part by
/// part.
pub(in crate::cpu) const fn pattern(bits: u32) -> [u8; 16] {
    match bits {
        8 => [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        4 => [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15],
        _ => [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
    }
}

/// The inverse of [`pattern`].
pub(super) const fn inverse(bits: u32) -> [u8; 16] {
    let (pattern, mut inverse, mut i) = (pattern(bits), [0; 16], 0);
    while i < 16 {
        inverse[pattern[i] as usize] = i as u8;
        i += 1;
    }
    inverse
}

/// The bytes of packed words: [`parts`] vectors, the others unspecified. `plane` holds the third
/// bits of word `index` and its neighbour, and is not used but for 3 bits.
///
/// # Safety
/// As for [`Words`].
#[inline(always)]
pub(in crate::cpu) unsafe fn bytes<V: Words, const BITS: u32>(
    word: V::Word,
    plane: V::Word,
    index: usize,
) -> [V::Word; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        match BITS {
            8 => [word; 4],
            4 => {
                let mask = V::splat_word(0x0f0f_0f0f);
                let (low, high) = (V::and(word, mask), V::and(V::shr(word, 4), mask));
                [low, high, low, high]
            }
            _ => {
                let mask = V::splat_word(0x0303_0303);
                let mut codes = [
                    V::and(word, mask),
                    V::and(V::shr(word, 2), mask),
                    V::and(V::shr(word, 4), mask),
                    V::and(V::shr(word, 6), mask),
                ];
                if BITS == 3 {
                    // A byte's four third bits, first side by side, then one to each part.
                    let t = if index % 2 == 1 { V::shr(plane, 8) } else { plane };
                    let low = V::and(t, V::splat_word(0x000f_000f));
                    let high = V::shl(V::and(t, V::splat_word(0x00f0_00f0)), 4);
                    let (t, third) = (V::or(low, high), V::splat_word(0x0404_0404));
                    codes[0] = V::or(codes[0], V::and(V::shl(t, 2), third));
                    codes[1] = V::or(codes[1], V::and(V::shl(t, 1), third));
                    codes[2] = V::or(codes[2], V::and(t, third));
                    codes[3] = V::or(codes[3], V::and(V::shr(t, 1), third));
                }
                codes
            }
        }
    }
}

/// Lines of the next record that are prefetched while this one is brought into lanes.
pub(super) struct Ahead {
    pub line: *const u8,
    pub lines: usize,
    /// Lines a call.
    pub pace: usize,
}

impl Ahead {
    /// Prefetches the next few lines.
    #[inline(always)]
    pub fn step(&mut self) {
        for _ in 0..self.pace.min(self.lines) {
            prefetch(self.line);
            self.line = self.line.wrapping_add(64);
            self.lines -= 1;
        }
    }
}

/// Brings the first `words` words of `rows` rows, `row_words` apart, into lanes: word `w` of rows
/// `LANES * i ..` lies at `to + (i * to_words + w) * LANES`; `to_words` is `words` rounded up to
/// [`whole`]. `readable` words may be read from `from` on.
///
/// # Safety
/// As for [`Words`]; `to` must have room for `rows * to_words` words.
#[inline(always)]
pub(super) unsafe fn rows_to_lanes<V: Words>(
    from: *const u32,
    rows: usize,
    row_words: usize,
    words: usize,
    readable: usize,
    to: *mut u32,
    ahead: &mut Ahead,
) {
    let to_words = whole(words);
    // SAFETY: the caller's promise; whole vectors are read only where they are readable.
    unsafe {
        for first in (0..rows).step_by(V::LANES) {
            for word in (0..words).step_by(V::LANES) {
                ahead.step();
                let from = from.add(first * row_words + word);
                let to = to.add(first * to_words + word * V::LANES);
                if (first + V::LANES - 1) * row_words + word + V::LANES <= readable {
                    V::transpose(from, row_words, to, V::LANES);
                    continue;
                }
                for row in 0..V::LANES {
                    for w in 0..V::LANES.min(words - word) {
                        to.add(w * V::LANES + row).write(from.add(row * row_words + w).read());
                    }
                }
            }
        }
    }
}

/// Words of a row in lanes: whole vectors of the widest machine.
pub(super) const fn whole(words: usize) -> usize {
    words.next_multiple_of(16)
}

/// The same for the channels of values, `words` (a power of two) each, without gaps: word `w` of
/// channels in vector `i` lies at `to + (i * words + w) * LANES`. Which channel a lane holds is
/// [`channel_of`]'s to say.
///
/// # Safety
/// As for [`Words`]; `to` must have room for `channels * words` words.
#[inline(always)]
pub(super) unsafe fn channels_to_lanes<V: Words>(
    from: *const u32,
    channels: usize,
    words: usize,
    interleaved: usize,
    to: *mut u32,
    ahead: &mut Ahead,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if words >= V::LANES {
            for first in (0..channels).step_by(V::LANES) {
                for word in (0..words).step_by(V::LANES) {
                    ahead.step();
                    let from = from.add(first * words + word);
                    V::transpose(from, words, to.add(first * words + word * V::LANES), V::LANES);
                }
            }
        } else if interleaved > 1 {
            // A vector of words holds several channels: they become neighbouring vectors.
            for at in (0..channels * words).step_by(V::LANES * V::LANES) {
                ahead.step();
                V::transpose(from.add(at), V::LANES, to.add(at), V::LANES);
            }
        } else {
            ahead.step();
            scatter::<V>(from, channels, words, 1, to);
        }
    }
}

/// The same, word by word, in the order of `interleaved`.
///
/// # Safety
/// As for [`channels_to_lanes`].
#[inline(always)]
pub(super) unsafe fn scatter<V: Words>(
    from: *const u32,
    channels: usize,
    words: usize,
    interleaved: usize,
    to: *mut u32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        for vector in 0..channels / V::LANES {
            for lane in 0..V::LANES {
                let from = from.add(channel_of(vector, lane, V::LANES, interleaved) * words);
                for word in 0..words {
                    let to = to.add((vector * words + word) * V::LANES + lane);
                    to.write(from.add(word).read());
                }
            }
        }
    }
}

/// Channels whose words share a vector when `words` words of each of `channels` channels are
/// brought into lanes; 1 where channels keep their order.
pub(super) const fn interleaved(lanes: usize, channels: usize, words: usize) -> usize {
    if words == 0 || words >= lanes || !(channels * words).is_multiple_of(lanes * lanes) {
        1
    } else {
        lanes / words
    }
}

/// The channel in a lane of a vector of channels.
#[inline(always)]
pub(super) fn channel_of(vector: usize, lane: usize, lanes: usize, interleaved: usize) -> usize {
    vector / interleaved * lanes * interleaved + lane * interleaved + vector % interleaved
}
