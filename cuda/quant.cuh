// Dequantisation in registers: a word of codes becomes pairs of f16 for the matrix instruction.
//
// Element `element(i, e)` of a word is half `e` of pair `i`. A code `x` comes out as `x` times
// 1 / kFactor, exactly. Of codes of sealed tiles there is a form that takes one instruction a pair:
// `small` puts them into the last bits of f16, the last bit at `place(i)`. Without an exponent that is
// the subnormal number x 2^(place - 24), which matrix instructions multiply exactly; the powers of two
// are for the other operand, and for what is made of the sums. `rows` takes 16 bits of codes of each of
// two rows, as a transposed matrix load gives them: pair `i` is then the `i`-th code of both.
//
// The formats are those of src/quant; scales are no concern of this file. e4m3 is converted by
// hardware from sm_89 on, and below by moving its bits under the exponent of f16.
#pragma once
#include "num.cuh"

namespace kvc {

KVC_DEVICE constexpr uint32_t twice(uint32_t half) { return half << 16 | half; }

// Bytes in the upper halves of f16: e5m2 is just that.
struct E5m2 {
    static constexpr int kBits = 8, kPairs = 2;
    static constexpr float kFactor = 1.0f;
    KVC_DEVICE static constexpr uint32_t element(uint32_t i, uint32_t e) { return 2 * i + e; }
    KVC_DEVICE static void unpack(uint32_t w, uint32_t (&out)[2]) {
        out[0] = permute(w, 0, 0x1404);
        out[1] = permute(w, 0, 0x3424);
    }
    KVC_DEVICE static void rows(uint32_t w, uint32_t (&out)[2]) {
        out[0] = permute(w, 0, 0x2404);
        out[1] = permute(w, 0, 0x3414);
    }
};

// e4m3 by its bits: 2^-8 of its value, subnormals included; NaN comes out as 480 * 2^-8.
struct E4m3Bits {
    static constexpr int kBits = 8, kPairs = 2;
    static constexpr float kFactor = 256.0f;
    KVC_DEVICE static constexpr uint32_t element(uint32_t i, uint32_t e) { return 2 * i + e; }
    KVC_DEVICE static uint32_t move(uint32_t upper) {
        return (upper >> 1 & 0x3f803f80u) | (upper & 0x80008000u);
    }
    KVC_DEVICE static void unpack(uint32_t w, uint32_t (&out)[2]) {
        E5m2::unpack(w, out);
        for (uint32_t &pair : out) pair = move(pair);
    }
    KVC_DEVICE static void rows(uint32_t w, uint32_t (&out)[2]) {
        E5m2::rows(w, out);
        for (uint32_t &pair : out) pair = move(pair);
    }
};

#if !defined(KVC_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
struct E4m3 {
    static constexpr int kBits = 8, kPairs = 2;
    static constexpr float kFactor = 1.0f;
    KVC_DEVICE static constexpr uint32_t element(uint32_t i, uint32_t e) { return 2 * i + e; }
    KVC_DEVICE static void unpack(uint32_t w, uint32_t (&out)[2]) {
        f16x2_from_e4m3(w, out[0], out[1]);
    }
    KVC_DEVICE static void rows(uint32_t w, uint32_t (&out)[2]) {
        unpack(permute(w, 0, 0x3120), out);
    }
};
#else
using E4m3 = E4m3Bits;
#endif

// Bytes 0 to 255 of which kZero stands for 0: as the last bits of 1024. The small form of signed ones
// counts from -128.
template <bool Signed> struct Bytes {
    static constexpr int kBits = 8, kPairs = 2;
    static constexpr float kFactor = 1.0f;
    static constexpr uint32_t kFlip = Signed ? 0x80808080u : 0;
    static constexpr uint32_t kMagic = 0x64646464u, kZero = twice(Signed ? 0x6480 : 0x6400);
    KVC_DEVICE static constexpr uint32_t element(uint32_t i, uint32_t e) { return 2 * i + e; }
    KVC_DEVICE static constexpr uint32_t place(uint32_t) { return 0; }
    KVC_DEVICE static void small(uint32_t w, uint32_t (&out)[2]) {
        out[0] = permute(w ^ kFlip, 0, 0x4140);
        out[1] = permute(w ^ kFlip, 0, 0x4342);
    }
    // With kZero added.
    KVC_DEVICE static void biased(uint32_t w, uint32_t (&out)[2]) {
        out[0] = permute(w ^ kFlip, kMagic, 0x4140);
        out[1] = permute(w ^ kFlip, kMagic, 0x4342);
    }
    KVC_DEVICE static void unpack(uint32_t w, uint32_t (&out)[2]) {
        biased(w, out);
        for (uint32_t &pair : out) pair = sub_f16x2(pair, kZero);
    }
    KVC_DEVICE static void rows(uint32_t w, uint32_t (&out)[2]) {
        unpack(permute(w, 0, 0x3120), out);
    }
};
using Int8 = Bytes<true>;

// Codes 0 to 15 in the order [0, 2, 4, 6, 1, 3, 5, 7].
struct Nibbles {
    static constexpr int kBits = 4, kPairs = 4;
    static constexpr float kFactor = 1.0f;
    KVC_DEVICE static constexpr uint32_t element(uint32_t i, uint32_t e) { return 2 * i + e; }
    // The exponent under which the nibble's last bit counts 1.
    KVC_DEVICE static constexpr uint32_t bias(uint32_t i) { return twice(i % 2 == 0 ? 0x6400 : 0x5400); }
    KVC_DEVICE static void biased(uint32_t w, uint32_t (&out)[4]) {
        const uint32_t upper = w >> 8;
        out[0] = (w & 0x000f000fu) | bias(0);
        out[1] = (w & 0x00f000f0u) | bias(1);
        out[2] = (upper & 0x000f000fu) | bias(2);
        out[3] = (upper & 0x00f000f0u) | bias(3);
    }
    KVC_DEVICE static void unpack(uint32_t w, uint32_t (&out)[4]) {
        biased(w, out);
        for (uint32_t i = 0; i < 4; ++i) out[i] = sub_f16x2(out[i], bias(i));
    }
    KVC_DEVICE static constexpr uint32_t place(uint32_t i) { return i % 2 * 4; }
    KVC_DEVICE static void small(uint32_t w, uint32_t (&out)[4]) {
        for (uint32_t i = 0; i < 4; ++i)
            out[i] = (i < 2 ? w : w >> 8) & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
    }
    // The channel that code `i` of a row's 16 bits stands for, which are the `half`-th of a word.
    KVC_DEVICE static constexpr uint32_t row_element(uint32_t half, uint32_t i) { return 2 * i + half; }
    KVC_DEVICE static void rows(uint32_t w, uint32_t (&out)[4]) { unpack(w, out); }
};

// e2m1 in order; 2^-14 of its value.
struct E2m1 {
    static constexpr int kBits = 4, kPairs = 4;
    static constexpr float kFactor = 16384.0f;
    KVC_DEVICE static constexpr uint32_t element(uint32_t i, uint32_t e) { return i + 4 * e; }
    KVC_DEVICE static void unpack(uint32_t w, uint32_t (&out)[4]) {
        // Upper bytes of f16, of the codes in the lower halves of bytes and of those in the upper.
        const uint32_t lower = (w << 4 & 0x80808080u) | (w << 1 & 0x0e0e0e0eu);
        const uint32_t upper = (w & 0x80808080u) | (w >> 3 & 0x0e0e0e0eu);
        out[0] = permute(lower, 0, 0x2404);
        out[1] = permute(upper, 0, 0x2404);
        out[2] = lower & 0xff00ff00u;
        out[3] = upper & 0xff00ff00u;
    }
    KVC_DEVICE static constexpr uint32_t row_element(uint32_t half, uint32_t i) { return 4 * half + i; }
    KVC_DEVICE static void rows(uint32_t w, uint32_t (&out)[4]) { unpack(w, out); }
};

// Codes 0 to 3 in order: pair `i` is elements `i` and `i + 8` of 16.
struct Twos {
    static constexpr int kBits = 2, kPairs = 8;
    static constexpr float kFactor = 1.0f;
    KVC_DEVICE static constexpr uint32_t element(uint32_t i, uint32_t e) { return i + 8 * e; }
    KVC_DEVICE static constexpr uint32_t place(uint32_t i) { return (i < 5 ? i : i - 5) * 2; }
    KVC_DEVICE static void small(uint32_t w, uint32_t (&out)[8]) {
        for (uint32_t i = 0; i < 8; ++i) out[i] = (i < 5 ? w : w >> 10) & twice(3u << place(i));
    }
};

// Whether codes have bits in a plane beside them.
template <typename Codes> constexpr bool kHasPlane = false;

// Codes 0 to 7: two bits as above, and the third from the word of a plane, shifted so that the bits
// of this word's pairs are the lowest of both halves.
struct Threes {
    static constexpr int kBits = 2, kPairs = 8;
    static constexpr float kFactor = 1.0f;
    KVC_DEVICE static constexpr uint32_t element(uint32_t i, uint32_t e) { return i + 8 * e; }
    // Words are shifted by 0, 4 or 8, and planes so that a third bit comes to lie above its two: so few
    // shifts, most of them to the left, serve all pairs.
    KVC_DEVICE static constexpr uint32_t place(uint32_t i) { return 2 * i - down(i); }
    KVC_DEVICE static void small(uint32_t w, uint32_t thirds, uint32_t (&out)[8]) {
        for (uint32_t i = 0; i < 8; ++i) {
            const uint32_t third = thirds << (place(i) + 2 - i) & twice(4u << place(i));
            out[i] = (w >> down(i) & twice(3u << place(i))) | third;
        }
    }

  private:
    KVC_DEVICE static constexpr uint32_t down(uint32_t i) { return i < 2 ? 0 : i < 6 ? 4 : 8; }
};

template <> inline constexpr bool kHasPlane<Threes> = true;

// Eight codes that lie beside each other in a row of a sealed tile, as four pairs of neighbours: each
// less 2^(Bits - 1) (signed bytes are that already), times 2^-Down, exactly. What takes the middle
// from codes adds half of that unit. Codes are the last bits of a power of two, from which all of it is
// taken at once.
template <int Bits, int Down, bool Signed = false> struct Octet {
    static constexpr int kMain = Bits == 3 ? 2 : Bits; // bits that lie in the row; the third in a plane
    // That power where a code's last bit lies at `place` of its half, and what is taken.
    KVC_DEVICE static constexpr uint32_t power(uint32_t place) {
        return twice(0x6400 - ((Down + place) << 10));
    }
    KVC_DEVICE static constexpr uint32_t taken(uint32_t place) {
        return power(place) + twice(1u << (Bits - 1 + place));
    }

    // Octet `o` of a row, and of its third bits.
    KVC_DEVICE static void load(const unsigned char *row, const unsigned char *plane, uint32_t o,
                                uint32_t (&out)[4]) {
        if constexpr (Bits == 8) {
            const TwoWords two = *reinterpret_cast<const TwoWords *>(row + o * 8);
            constexpr uint32_t kFlip = Signed ? 0x80808080u : 0, kBytes = power(0) >> 8 & 0xff;
            for (uint32_t i = 0; i < 4; ++i)
                out[i] = sub_f16x2(permute(two.word[i / 2] ^ kFlip, kBytes * 0x01010101u,
                                           i % 2 == 0 ? 0x4140 : 0x4342),
                                   taken(0));
        } else {
            // Pair i at bits 4i of both halves.
            uint32_t w, thirds = 0;
            if constexpr (Bits == 4) {
                w = *reinterpret_cast<const uint32_t *>(row + o * 4);
            } else {
                const uint32_t in_order = *reinterpret_cast<const uint16_t *>(row + o * 2);
                w = in_order << 14 | in_order;
            }
            if constexpr (Bits == 3) {
                const uint32_t byte = plane[o / 4 * 4 + o / 2 % 2 + o % 2 * 2];
                thirds = byte << 15 | byte; // at bits 2i of both halves
            }
            for (uint32_t i = 0; i < 4; ++i) {
                const uint32_t place = i % 2 * 4;
                uint32_t above = power(place);
                if constexpr (Bits == 3)
                    above = and_or(i < 2 ? thirds << (2 * i + 2) : thirds >> (6 - 2 * i),
                                   twice(4u << place), above);
                const uint32_t code =
                    and_or(i < 2 ? w : w >> 8, twice(((1u << kMain) - 1) << place), above);
                out[i] = sub_f16x2(code, taken(place));
            }
        }
    }
};

} // namespace kvc
