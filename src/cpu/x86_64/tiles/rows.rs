//! Dot products of packed rows with weights, as the rows lie in a record: no row is transposed.
//!
//! A row is the codes of a key over its channels, or of a value channel over its tokens. Four loads
//! of 64 bytes, each a row, part of one, or several, swap words within their quarters, so that a
//! quarter has the same word of four rows; each of its bytes meets its weight, four products to a
//! lane, and only what quarters hold of the same row is left to add up. All of it is exact.
//! Weights must be laid out as the codes come apart ([`Order`]); nothing here knows what they are.

use core::arch::x86_64::*;

use super::ahead::Lines;
use crate::cpu::sealed::pattern;

/// The most vectors that the weights of a row take, for each of their bytes.
pub(super) const MOST: usize = 16;

/// Bits of a code outside its plane.
const fn main_bits(bits: u32) -> usize {
    if bits == 3 { 2 } else { bits as usize }
}

/// Vectors of bytes in a vector of codes.
const fn parts(bits: u32) -> usize {
    8 / main_bits(bits)
}

/// Loads of a row of `count` codes.
const fn loads(bits: u32, count: usize) -> usize {
    (count * main_bits(bits)).div_ceil(512)
}

/// Rows of a load.
const fn rows_in(bits: u32, count: usize) -> usize {
    let bits = count * main_bits(bits);
    if bits >= 512 { 1 } else { 512 / bits }
}

/// Loads of sixteen rows.
pub(super) const fn lines(bits: u32, count: usize) -> usize {
    16 / rows_in(bits, count) * loads(bits, count)
}

/// Words of a row in a quarter of a load.
const fn words_in(bits: u32, count: usize) -> usize {
    if rows_in(bits, count) == 8 { 2 } else { 4 }
}

/// Bytes of the weights of one word and part: they repeat from row to row.
const fn width(bits: u32, count: usize) -> usize {
    match rows_in(bits, count) {
        1 => 64,
        2 => 32,
        _ => 4,
    }
}

/// Where the weight of each byte lies among bytes that [`packed`] has packed: [`width`] bytes for
/// each load of a row, word of a quarter and part of its codes.
pub(super) struct Order {
    at: [[u8; 64]; MOST],
    count: usize,
    many: bool,
}

impl Order {
    /// For rows of `count` codes of `bits`: a power of two from 32 to 256.
    const fn new(bits: u32, count: usize) -> Self {
        let (parts, pattern, width) = (parts(bits), pattern(bits), width(bits, count));
        let (words, mut at, mut i) = (words_in(bits, count), [[0; 64]; MOST], 0);
        let bytes = loads(bits, count) * words * parts * width;
        while i < bytes {
            let (vector, byte) = (i / width, i % width);
            let (load, word, part) =
                (vector / parts / words, vector / parts % words, vector % parts);
            // Of the row, then of the sixteen codes that the pattern orders.
            let word = 16 * load + byte / 16 * 4 + word;
            let (sixteen, word) = (word * parts / 4, word % (4 / parts));
            let within = pattern[4 * (word * parts + part) + byte % 4] as usize;
            at[i / 64][i % 64] = place(16 * sixteen + within);
            i += 1;
        }
        Self { at, count: bytes.div_ceil(64), many: count > 128 }
    }

    /// That of rows of `count` codes of `bits`.
    pub fn of(bits: u32, count: usize) -> &'static Self {
        macro_rules! of {
            ($bits:literal) => {
                match count {
                    32 => const { &Self::new($bits, 32) },
                    64 => const { &Self::new($bits, 64) },
                    128 => const { &Self::new($bits, 128) },
                    _ => const { &Self::new($bits, 256) },
                }
            };
        }
        match bits {
            8 => of!(8),
            4 => of!(4),
            _ => of!(2),
        }
    }

    /// Lays out one byte of the weights of one row.
    ///
    /// # Safety
    /// AVX-512 with VBMI.
    #[inline(always)]
    pub unsafe fn lay_out(&self, bytes: &[__m512i; 4], to: &mut [__m512i; MOST]) {
        // SAFETY: the caller's promise; vectors have 64 bytes.
        unsafe {
            for i in 0..self.count.min(MOST) {
                let at = _mm512_loadu_si512(self.at[i].as_ptr().cast());
                let mut x = _mm512_permutex2var_epi8(bytes[0], at, bytes[1]);
                if self.many {
                    let upper = _mm512_permutex2var_epi8(bytes[2], at, bytes[3]);
                    x = _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), x, upper);
                }
                to[i] = x;
            }
        }
    }
}

/// Where [`packed`] puts an element.
const fn place(element: usize) -> u8 {
    (element / 64 * 64 + element % 16 / 4 * 16 + element % 64 / 16 * 4 + element % 4) as u8
}

/// Four vectors of words in the signed 16-bit range as their high bytes, rounded, and their low
/// ones: `256 * high + low`, both signed.
///
/// # Safety
/// AVX-512 with BW.
#[inline(always)]
pub(super) unsafe fn packed(x: [__m512i; 4]) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
        let (half, low) = (_mm512_set1_epi16(128), _mm512_set1_epi16(255));
        let high_a = _mm512_srai_epi16::<8>(_mm512_add_epi16(a, half));
        let high_b = _mm512_srai_epi16::<8>(_mm512_add_epi16(b, half));
        [
            _mm512_packs_epi16(high_a, high_b),
            _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low)),
        ]
    }
}

/// Four vectors of words in the signed 8-bit range as bytes in the order of [`packed`].
///
/// # Safety
/// AVX-512 with BW.
#[inline(always)]
pub(super) unsafe fn bytes(x: [__m512i; 4]) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3])) }
}

/// The same for words below 2^8, unsigned.
///
/// # Safety
/// AVX-512 with BW.
#[inline(always)]
pub(super) unsafe fn bytes_unsigned(x: [__m512i; 4]) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_packus_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3])) }
}

/// Those of [`packed`] for words below 2^16, both bytes unsigned.
///
/// # Safety
/// AVX-512 with BW.
#[inline(always)]
pub(super) unsafe fn packed_unsigned(x: [__m512i; 4]) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (_mm512_packus_epi32(x[0], x[1]), _mm512_packus_epi32(x[2], x[3]));
        let low = _mm512_set1_epi16(255);
        [
            _mm512_packus_epi16(_mm512_srli_epi16::<8>(a), _mm512_srli_epi16::<8>(b)),
            _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low)),
        ]
    }
}

/// Rows of packed codes.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub codes: *const u8,
    /// Third bits of 3-bit codes.
    pub plane: *const u8,
}

/// Rows of weights: high bytes or all there are, then low ones.
pub(super) type Weights<const R: usize> = [[[__m512i; MOST]; 2]; R];

/// Dot products of sixteen rows, from row `16 * group` on, with each of `R` rows of weights. Rows
/// have `COUNT` codes of `BITS`. With `WIDE` weights have two bytes. `VALUES`: weights are unsigned
/// and codes signed, else the other way round.
///
/// # Safety
/// AVX-512 with VNNI, and all sixteen rows readable.
#[inline(always)]
pub(super) unsafe fn dots<
    const BITS: u32,
    const COUNT: usize,
    const WIDE: bool,
    const VALUES: bool,
    const R: usize,
>(
    rows: &Rows,
    group: usize,
    weights: &[[[__m512i; MOST]; 2]; R],
    ahead: Lines,
) -> [__m512i; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let loads = const { lines(BITS, COUNT) };
        let from = Rows {
            codes: rows.codes.add(group * loads * 64),
            plane: rows.plane.wrapping_add(group * loads * 32),
        };
        macro_rules! of {
            ($($block:expr),+) => {
                some::<BITS, COUNT, WIDE, VALUES, R, { [$(stringify!($block)),+].len() }>(
                    &from, [$($block),+], weights, ahead,
                )
            };
        }
        match const { rows_in(BITS, COUNT) } {
            1 => {
                // One after the other: a compiler that mixes them runs out of registers.
                let mut halves = [const { core::mem::MaybeUninit::<[__m512i; R]>::uninit() }; 2];
                for half in 0..core::hint::black_box(2) {
                    let [even, odd] = of!(half, half + 2);
                    halves[half & 1].write(merge::<3, R>(even, odd));
                }
                merge::<2, R>(halves[0].assume_init(), halves[1].assume_init())
            }
            2 => {
                let [a, b] = of!(0, 1);
                // Lane `l` has row `l / 8` of load `l % 8`.
                in_order(
                    merge::<2, R>(a, b),
                    _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15),
                )
            }
            4 => in_order(
                of!(0)[0],
                // Lane `l` has row `l / 4` of load `l % 4`.
                _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
            ),
            _ => in_order(
                of!(0)[0],
                // Quarters have two rows of the first load, then two of the second.
                _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15),
            ),
        }
    }
}

/// Products of some blocks of four loads (two where those have eight rows each), which share what
/// is loaded of the weights: lane `i` of each quarter belongs to load `i`.
#[inline(always)]
unsafe fn some<
    const BITS: u32,
    const COUNT: usize,
    const WIDE: bool,
    const VALUES: bool,
    const R: usize,
    const BLOCKS: usize,
>(
    from: &Rows,
    blocks: [usize; BLOCKS],
    weights: &[[[__m512i; MOST]; 2]; R],
    ahead: Lines,
) -> [[__m512i; R]; BLOCKS] {
    let (loads, parts) = (const { loads(BITS, COUNT) }, const { parts(BITS) });
    let words = const { words_in(BITS, COUNT) };
    // Weights that a compiler brings into registers for all blocks are ones that it spills.
    let weights = core::hint::black_box(weights);
    // SAFETY: the caller's promise.
    unsafe {
        let zero = _mm512_setzero_si512();
        let (mut high, mut low) = ([[zero; R]; BLOCKS], [[zero; R]; BLOCKS]);
        for load in 0..loads {
            let (mut codes, mut thirds) = ([[zero; 4]; BLOCKS], [[zero; 4]; BLOCKS]);
            for b in 0..BLOCKS {
                for i in 0..words {
                    let at = (blocks[b] * words + i) * loads + load;
                    codes[b][i] = _mm512_loadu_si512(from.codes.add(64 * at).cast());
                    if BITS == 3 {
                        thirds[b][i] = third_bits(from.plane.add(32 * at));
                    }
                }
                codes[b] = turn(codes[b], words);
                if BITS == 3 {
                    thirds[b] = turn(thirds[b], words);
                }
            }
            for word in 0..words {
                let mut bytes = [[zero; 4]; BLOCKS];
                for b in 0..BLOCKS {
                    ahead.hint::<BITS>((blocks[b] * words + word) * loads + load);
                    bytes[b] = bytes_of::<BITS>(codes[b][word], thirds[b][word]);
                }
                for part in 0..parts {
                    let vector = (load * words + word) * parts + part;
                    for r in 0..R {
                        let by = weight(&weights[r][0], vector, const { width(BITS, COUNT) });
                        for b in 0..BLOCKS {
                            high[b][r] = products::<VALUES>(high[b][r], bytes[b][part], by);
                        }
                        if WIDE {
                            let by = weight(&weights[r][1], vector, const { width(BITS, COUNT) });
                            for b in 0..BLOCKS {
                                low[b][r] = products::<VALUES>(low[b][r], bytes[b][part], by);
                            }
                        }
                    }
                }
            }
        }
        if WIDE {
            for b in 0..BLOCKS {
                for r in 0..R {
                    let whole = _mm512_slli_epi32::<8>(high[b][r]);
                    high[b][r] = _mm512_add_epi32(whole, low[b][r]);
                }
            }
        }
        high
    }
}

/// Vector `index` of weights that repeat after `width` bytes.
#[inline(always)]
unsafe fn weight(row: &[__m512i; MOST], index: usize, width: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let p = row.as_ptr().cast::<u8>().add(index * width);
        match width {
            64 => _mm512_load_si512(p.cast()),
            32 => _mm512_broadcast_i64x4(_mm256_load_si256(p.cast())),
            _ => _mm512_set1_epi32(p.cast::<i32>().read()),
        }
    }
}

/// Swaps words within quarters: word `i` of quarters of load `j` becomes word `j` of vector `i`.
/// With two words a row, a quarter has two rows, and the words of those of two loads come together.
#[inline(always)]
unsafe fn turn(x: [__m512i; 4], words: usize) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        if words == 2 {
            let (a, b) = (_mm512_castsi512_ps(x[0]), _mm512_castsi512_ps(x[1]));
            let even = _mm512_castps_si512(_mm512_shuffle_ps::<0x88>(a, b));
            return [even, _mm512_castps_si512(_mm512_shuffle_ps::<0xdd>(a, b)), x[2], x[3]];
        }
        let (a, b) = (_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpacklo_epi32(x[2], x[3]));
        let (c, d) = (_mm512_unpackhi_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[2], x[3]));
        [
            _mm512_unpacklo_epi64(a, b),
            _mm512_unpackhi_epi64(a, b),
            _mm512_unpacklo_epi64(c, d),
            _mm512_unpackhi_epi64(c, d),
        ]
    }
}

/// Lanes to the order of rows.
#[inline(always)]
unsafe fn in_order<const R: usize>(mut x: [__m512i; R], order: __m512i) -> [__m512i; R] {
    for r in 0..R {
        // SAFETY: the caller's promise.
        x[r] = unsafe { _mm512_permutexvar_epi32(order, x[r]) };
    }
    x
}

/// Sums of lanes that differ in bit `BIT` of their index: those of `x` where it is 0, of `y` where
/// it is 1.
#[inline(always)]
unsafe fn merge<const BIT: u32, const R: usize>(x: [__m512i; R], y: [__m512i; R]) -> [__m512i; R] {
    let mut sums = x;
    for r in 0..R {
        // SAFETY: the caller's promise.
        unsafe {
            let (x, y) = (x[r], y[r]);
            sums[r] = match BIT {
                3 => _mm512_add_epi32(
                    _mm512_mask_blend_epi32(0xff00, x, y),
                    _mm512_shuffle_i64x2::<0x4e>(x, y),
                ),
                _ => {
                    let others = _mm512_mask_blend_epi32(0xf0f0, y, x);
                    _mm512_add_epi32(
                        _mm512_mask_blend_epi32(0xf0f0, x, y),
                        _mm512_shuffle_i32x4::<0xb1>(others, others),
                    )
                }
            };
        }
    }
    sums
}

#[inline(always)]
unsafe fn products<const VALUES: bool>(sum: __m512i, codes: __m512i, by: __m512i) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        if VALUES {
            _mm512_dpbusd_epi32(sum, by, codes)
        } else {
            _mm512_dpbusd_epi32(sum, codes, by)
        }
    }
}

/// The third bits of 256 codes, those of a word and its neighbour in both their lanes: the second
/// one's brought down.
#[inline(always)]
unsafe fn third_bits(plane: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let words = _mm512_cvtepu32_epi64(_mm256_loadu_si256(plane.cast()));
        _mm512_or_si512(words, _mm512_slli_epi64::<32>(_mm512_srli_epi64::<8>(words)))
    }
}

/// The bytes of packed words: [`parts`] vectors, the others unspecified.
#[inline(always)]
unsafe fn bytes_of<const BITS: u32>(word: __m512i, third: __m512i) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        match BITS {
            8 => [word; 4],
            4 => {
                let mask = _mm512_set1_epi8(15);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(word), mask);
                [_mm512_and_si512(word, mask), high, word, word]
            }
            _ => {
                let mask = _mm512_set1_epi8(3);
                let mut codes = [
                    _mm512_and_si512(word, mask),
                    _mm512_and_si512(_mm512_srli_epi16::<2>(word), mask),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(word), mask),
                    _mm512_and_si512(_mm512_srli_epi16::<6>(word), mask),
                ];
                if BITS == 3 {
                    // A byte's four third bits, first side by side, then one to each part.
                    let low = _mm512_and_si512(third, _mm512_set1_epi32(0x000f_000f));
                    let high = _mm512_and_si512(third, _mm512_set1_epi32(0x00f0_00f0));
                    let t = _mm512_or_si512(low, _mm512_slli_epi32::<4>(high));
                    let bit = _mm512_set1_epi8(4);
                    // code | (shifted & bit)
                    macro_rules! add {
                        ($i:literal, $t:expr) => {
                            codes[$i] = _mm512_ternarylogic_epi32::<0xf8>(codes[$i], $t, bit)
                        };
                    }
                    add!(0, _mm512_slli_epi32::<2>(t));
                    add!(1, _mm512_slli_epi32::<1>(t));
                    add!(2, t);
                    add!(3, _mm512_srli_epi32::<1>(t));
                }
                codes
            }
        }
    }
}
