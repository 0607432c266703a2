//! Codes to bits and back, in the order in which a GPU unpacks two at a time.
//!
//! Within a little-endian 32-bit word of 4-bit codes, nibble `n` holds element `[0, 2, 4, 6, 1, 3,
//! 5, 7][n]`: shifted right by `4i` and masked with 0x000f000f it gives elements `2i` and `2i + 1`.
//! 2-bit codes stand in order: shifted by `2i` and masked with 0x00030003 a word gives elements `i`
//! and `i + 8`. A 3-bit code is a 2-bit code and its third bit in a plane beside it, where a word
//! holds the bits of elements 0..8, 16..24, 8..16, 24..32: shifted by `i` and masked with
//! 0x00010001 it gives the third bits of the pair above. 8-bit codes are bytes in order.

const NIBBLES: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Where the third bit of element `at` of 32 stands in its word.
const fn plane_bit(at: usize) -> usize {
    match at / 8 {
        1 => at + 8,
        2 => at - 8,
        _ => at,
    }
}

/// Packs `codes` of `bits` bits: a multiple of 16 of them, into `main` and, for 3-bit codes,
/// `plane`, both at least as long as they need be. Bytes past the codes become 0.
pub(super) fn pack(bits: u32, codes: &[u8], main: &mut [u8], plane: &mut [u8]) {
    main.fill(0);
    plane.fill(0);
    match bits {
        8 => main[..codes.len()].copy_from_slice(codes),
        4 => {
            for (codes, word) in codes.chunks_exact(8).zip(main.chunks_exact_mut(4)) {
                for (n, &at) in NIBBLES.iter().enumerate() {
                    word[n / 2] |= codes[at] << (n % 2 * 4);
                }
            }
        }
        _ => {
            for (at, &code) in codes.iter().enumerate() {
                main[at / 4] |= (code & 3) << (at % 4 * 2);
                if bits == 3 {
                    let bit = at / 32 * 32 + plane_bit(at % 32);
                    plane[bit / 8] |= (code >> 2 & 1) << (bit % 8);
                }
            }
        }
    }
}

/// Element `at` of what [`pack`] wrote.
pub(super) fn unpack(bits: u32, at: usize, main: &[u8], plane: &[u8]) -> u8 {
    match bits {
        8 => main[at],
        4 => {
            // The inverse of the nibbles' order: even elements first.
            let nibble = at % 8 / 2 + at % 2 * 4;
            main[at / 8 * 4 + nibble / 2] >> (nibble % 2 * 4) & 15
        }
        _ => {
            let low = main[at / 4] >> (at % 4 * 2) & 3;
            if bits != 3 {
                return low;
            }
            let bit = at / 32 * 32 + plane_bit(at % 32);
            low | (plane[bit / 8] >> (bit % 8) & 1) << 2
        }
    }
}

/// The step of a uniform code for unit variance that loses least, for values: bits 4, 3 and 2.
pub(crate) const fn value_step(bits: u32) -> f32 {
    match bits {
        4 => 0.3352,
        3 => 0.5860,
        _ => 0.9957,
    }
}

/// The share of a key channel's range that codes cover, where losing the ends is less than the
/// coarser step would cost.
pub(crate) const fn key_clip(bits: u32) -> f32 {
    match bits {
        3 => 0.9,
        2 => 0.8,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};

    use super::*;

    fn packed(bits: u32, codes: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let main_bits = if bits == 3 { 2 } else { bits as usize };
        let mut main = vec![0xff; (codes.len() * main_bits / 8).next_multiple_of(16)];
        let mut plane = vec![0xff; codes.len().div_ceil(32) * 4];
        pack(bits, codes, &mut main, &mut plane);
        (main, plane)
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().unwrap())
    }

    #[test]
    fn codes_come_back_whatever_their_number() {
        for bits in [2, 3, 4, 8] {
            for count in [16, 32, 48, 64, 80, 128, 256] {
                let codes: Vec<u8> = (0..count)
                    .map(|at| (at * 37 + at / 5) as u8 & ((1u16 << bits) - 1) as u8)
                    .collect();
                let (main, plane) = packed(bits, &codes);
                let back: Vec<u8> = (0..count).map(|at| unpack(bits, at, &main, &plane)).collect();
                assert_eq!(back, codes, "{bits} bits, {count}");
            }
        }
    }

    /// The shifts and masks of the module's text, on every word.
    #[test]
    fn one_shift_and_one_mask_give_a_pair() {
        let codes: Vec<u8> = (0..64).map(|at| (at * 11 + at / 7) as u8 & 7).collect();
        let pair = |low: usize, high: usize, mask: u8| {
            u32::from(codes[low] & mask) | u32::from(codes[high] & mask) << 16
        };
        let (nibbles, _) = packed(4, &codes);
        for w in 0..8 {
            for i in 0..4 {
                let at = 8 * w + 2 * i;
                assert_eq!(word(&nibbles, w) >> (4 * i) & 0x000f_000f, pair(at, at + 1, 15));
            }
        }
        let (main, plane) = packed(3, &codes);
        for w in 0..4 {
            for i in 0..8 {
                let (at, shift) = (16 * w + i, 8 * (w % 2) + i);
                let low = word(&main, w) >> (2 * i) & 0x0003_0003;
                let third = word(&plane, w / 2) >> shift & 0x0001_0001;
                assert_eq!(low | third << 2, pair(at, at + 8, 7), "word {w}, shift {i}");
            }
        }
    }
}
