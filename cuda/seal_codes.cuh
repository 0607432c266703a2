// The codes of sealed tiles, as src/quant/seal.rs makes them and src/quant/pack.rs places them, bit for
// bit: one rounding an operation, nothing contracted, minima and maxima whose order does not matter, and
// sums over a row as a tree of neighbours.
#pragma once
#include "hadamard.cuh"
#include "kvc_params.h"
#include "row_codes.cuh"

namespace kvc {

constexpr uint32_t kSealThreads = 256;
constexpr uint32_t kSealWarps = kSealThreads / 32;
constexpr int kGroup = 8; // key channels of a thread

// Shared memory of a block: the record, codes of the values by token, then what is known of the key
// channels, and the checksum's.
template <int HeadDim> struct SealArea {
    static constexpr uint32_t kPitch = HeadDim + 4; // of a token's codes: words of a column in many banks
    uint32_t *record;
    uint32_t *codes;              // [tokens][kPitch / 4]
    uint32_t *ranges;             // [kSealWarps][least, largest][HeadDim / 2], pairs of bf16
    float *base, *step, *inverse; // [HeadDim]
    float *room;                  // [2][kSealWarps]
    uint32_t *unsound;            // [kSealWarps]
    uint32_t *sums;               // [kSealThreads]
    KVC_DEVICE SealArea(uint32_t tokens, uint32_t record_bytes)
        : record(KVC_SMEM(uint32_t)), codes(record + record_bytes / 4),
          ranges(codes + tokens * kPitch / 4),
          base(reinterpret_cast<float *>(ranges + kSealWarps * HeadDim)), step(base + HeadDim),
          inverse(step + HeadDim), room(inverse + HeadDim),
          unsound(reinterpret_cast<uint32_t *>(room + 2 * kSealWarps)), sums(unsound + kSealWarps) {}
};

// Where the byte of the third bits of the `group`-th eight of 32 codes lies.
KVC_DEVICE uint32_t plane_byte(uint32_t group) {
    return (group & ~3u) | (group & 1) << 1 | (group >> 1 & 1);
}

// The codes of eight channels of a key row into the record. `pairs` are two beside each other a word,
// `at` counts such eights from the record's start.
KVC_DEVICE void write_key(uint32_t bits, unsigned char *record, uint32_t plane_at, uint32_t at,
                          const uint32_t (&pairs)[kGroup / 2]) {
    if (bits == 8) {
        *reinterpret_cast<TwoWords *>(record + 8 * at) = {
            {permute(pairs[0], pairs[1], 0x6420), permute(pairs[2], pairs[3], 0x6420)}};
        return;
    }
    const uint32_t nibbles = pairs[0] + (pairs[1] << 4) + (pairs[2] << 8) + (pairs[3] << 12);
    if (bits == 4) {
        *reinterpret_cast<uint32_t *>(record + 4 * at) = nibbles;
        return;
    }
    // Channels 2i at bits 4i, channels 2i + 1 at 16 + 4i.
    const uint32_t two = nibbles & 0x33333333u;
    *reinterpret_cast<uint16_t *>(record + 2 * at) = static_cast<uint16_t>(two | two >> 14);
    if (bits == 3) {
        const uint32_t third = nibbles >> 2 & 0x11111111u;
        const uint32_t twos = (third | third >> 15) & 0x3333u, fours = (twos | twos >> 2) & 0x0f0fu;
        record[plane_at + plane_byte(at)] = static_cast<unsigned char>(fours | fours >> 4);
    }
}

// What the codes of eight key channels are made with.
struct KeyGroup {
    float base[kGroup], step[kGroup], inverse[kGroup], units;
    uint32_t most; // twice

    // Quotients are taken in units of 2^bits, which is within 1 where a code is at most that.
    template <int HeadDim>
    KVC_DEVICE KeyGroup(const SealArea<HeadDim> &area, uint32_t bits, uint32_t first)
        : units(static_cast<float>(1u << bits)), most(((1u << bits) - 1) * 0x10001u) {
        const float *const from[3] = {area.base + first, area.step + first, area.inverse + first};
        float *const to[3] = {base, step, inverse};
KVC_UNROLL
        for (int i = 0; i < 3; ++i) {
KVC_UNROLL
            for (int j = 0; j < kGroup; j += 4) {
                const Vec16 v = *reinterpret_cast<const Vec16 *>(from[i] + j);
                for (int n = 0; n < 4; ++n) to[i][j + n] = as_float(v.word[n]);
            }
        }
    }
    // A step is at most 8 bits times 11.
    KVC_DEVICE uint32_t code(float x, int channel) const {
        const float offset = add_rn(x, -base[channel]), near = mul_rn(offset, inverse[channel]);
        const float left = fma_rn(-near, step[channel], offset);
        return as_bits(fma_rn(fma_within_1(left, inverse[channel], near), units, as_float(kInteger)));
    }
    KVC_DEVICE void encode(const Vec16 &row, uint32_t (&pairs)[kGroup / 2]) const {
KVC_UNROLL
        for (int i = 0; i < kGroup / 2; ++i)
            pairs[i] = min_f16x2(last_halves(code(as_float(row.word[i] << 16), 2 * i),
                                             code(as_float(row.word[i] & 0xffff0000u), 2 * i + 1)),
                                 most);
    }
};

// A sum over the channels of a row as a tree of neighbours.
template <int Count> KVC_DEVICE void add_neighbours(float (&x)[kOwn]) {
KVC_UNROLL
    for (int i = 0; i < Count; ++i) x[i] = add_rn(x[2 * i], x[2 * i + 1]);
    if constexpr (Count > 1) add_neighbours<Count / 2>(x);
}
template <uint32_t Lanes> KVC_DEVICE float row_sum(float (&x)[kOwn]) {
    add_neighbours<kOwn / 2>(x);
    return over_lanes<Lanes>(x[0], [](float a, float b) { return add_rn(a, b); });
}

// A lane's channels of a value row, bf16.
struct ValueRow {
    Vec16 half[2]; // of a sector: the second comes from L1
    KVC_DEVICE void load(const uint16_t *at) {
        half[0] = reinterpret_cast<const Vec16 *>(at)[0];
        half[1] = reinterpret_cast<const Vec16 *>(at)[1];
    }
    KVC_DEVICE void widen_to(float (&x)[kOwn]) const {
KVC_UNROLL
        for (int i = 0; i < kOwn; ++i) {
            const uint32_t word = half[i / 8].word[i % 8 / 2];
            x[i] = as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
        }
    }
};

// Codes and scale of a value row that lies in its lanes; false where it is not finite or the scale is
// past f16. The lane's channels begin at `channel`.
template <int HeadDim>
KVC_DEVICE bool seal_value(uint32_t bits, ValueRow &row, uint32_t channel, Vec16 &codes,
                           uint32_t &scale) {
    constexpr uint32_t kLanes = HeadDim / kOwn;
    float x[kOwn];
    if (bits == 8) {
        uint32_t largest = 0;
KVC_UNROLL
        for (int i = 0; i < kOwn / 2; ++i)
            largest = max_nan_bf16x2(largest, row.half[i / 4].word[i % 4] & 0x7fff7fffu);
KVC_UNROLL
        for (uint32_t by = 1; by < kLanes; by *= 2)
            largest = max_nan_bf16x2(largest, shfl_xor(kFullMask, largest, by));
        const float top = as_float(max_u32(largest << 16, largest & 0xffff0000u));
        scale = f16_up(div_rn(top, 127.0f));
        row.widen_to(x);
        codes = encode_int8(widen_f16(static_cast<uint16_t>(scale)), x);
        return is_finite_f16(scale);
    }
KVC_UNROLL
    for (int i = 0; i < 2; ++i) {
        const Vec16 signs =
            *reinterpret_cast<const Vec16 *>(kSignPairs<HeadDim>.pairs + channel / 2 + 4 * i);
        for (int j = 0; j < 4; ++j) row.half[i].word[j] ^= signs.word[j];
    }
    row.widen_to(x);
    transform_channels<HeadDim>(x);
    const float count = bits == 4 ? 0.3352f : bits == 3 ? 0.5860f : 0.9957f;
    float y[kOwn];
KVC_UNROLL
    for (int j = 0; j < kOwn; ++j) y[j] = mul_rn(x[j], x[j]);
    // Not finite where an element is not.
    const float squares = row_sum<kLanes>(y);
    static_assert((HeadDim & (HeadDim - 1)) == 0, "dividing by it is exact");
    const float width = mul_rn(sqrt_rn(mul_rn(squares, 1.0f / HeadDim)), count);
    // A quotient that underflows would be a zero of either sign, of which the floor would tell. No
    // element but 0 is below 2^-137, the least bf16 over the root of 256, so none does here.
    if (width > 0x1p-40f && width < 0x1p12f) {
        const LongDivisor by(width);
KVC_UNROLL
        for (int j = 0; j < kOwn; ++j) y[j] = by.quotient(x[j]);
    } else {
KVC_UNROLL
        for (int j = 0; j < kOwn; ++j) y[j] = width == 0.0f ? -256.0f : div_rn(x[j], width);
    }
    const float zero = as_float(kInteger), middle = static_cast<float>(1u << (bits - 1));
    const float most = as_float(kInteger + (1u << bits) - 1);
KVC_UNROLL
    for (int i = 0; i < 4; ++i) {
        uint32_t code[4];
KVC_UNROLL
        for (int j = 0; j < 4; ++j) {
            const float floor = add_floor(y[4 * i + j], add_rn(zero, middle));
            const float within = min_f32(max_f32(floor, zero), most);
            code[j] = as_bits(within);
            // The code's point less half a step, and that exactly.
            const float point = add_rn(add_rn(within, -zero), add_rn(0.5f, -middle));
            y[4 * i + j] = mul_rn(x[4 * i + j], mul_rn(point, count));
        }
        codes.word[i] = last_bytes(code[0], code[1], code[2], code[3]);
    }
    const float aligned = row_sum<kLanes>(y);
    scale = width == 0.0f ? 0 : pack_f16(div_rn(squares, aligned), 0.0f) & 0xffff;
    return (as_bits(squares) & 0x7f800000u) != 0x7f800000u && is_finite_f16(scale);
}

// Bytes of four words as words of their first, second, third and fourth bytes.
KVC_DEVICE void transpose_bytes(uint32_t (&w)[4]) {
    const uint32_t a = permute(w[0], w[1], 0x5140), b = permute(w[2], w[3], 0x5140);
    const uint32_t c = permute(w[0], w[1], 0x7362), d = permute(w[2], w[3], 0x7362);
    w[0] = permute(a, b, 0x5410);
    w[1] = permute(a, b, 0x7632);
    w[2] = permute(c, d, 0x5410);
    w[3] = permute(c, d, 0x7632);
}

// The words of four value channels from `at` on: `Main` bits of the codes of 32 / Main tokens, and
// third bits where codes have three.
template <int HeadDim, uint32_t Main>
KVC_DEVICE void write_values(const kvc_seal_params &p, const SealArea<HeadDim> &area) {
    constexpr uint32_t kTokens = 32 / Main, kPitch = SealArea<HeadDim>::kPitch / 4;
    const uint32_t groups = p.tile_tokens / kTokens;
    unsigned char *plane = reinterpret_cast<unsigned char *>(area.record) + p.v_plane_at;
    for (uint32_t i = thread_x(); i < HeadDim / 4 * groups; i += kSealThreads) {
        const uint32_t four = quotient_of(i, groups), group = i - four * groups;
        const uint32_t *from = area.codes + group * kTokens * kPitch + four;
        uint32_t code[kTokens], words[4];
KVC_UNROLL
        for (uint32_t t = 0; t < kTokens; ++t) code[t] = from[t * kPitch];
        if constexpr (Main == 8) {
            for (int b = 0; b < 4; ++b) words[b] = code[b];
        } else if constexpr (Main == 4) {
            for (uint32_t b = 0; b < 4; ++b) {
                const uint32_t first = b % 2 * 4 + b / 2;
                words[b] = code[first] + (code[first + 2] << 4);
            }
        } else {
            const uint32_t two = p.v_bits == 3 ? 0x03030303u : 0xffffffffu;
            for (uint32_t b = 0; b < 4; ++b) {
                words[b] = 0;
                for (uint32_t j = 0; j < 4; ++j) words[b] += (code[4 * b + j] & two) << 2 * j;
            }
        }
        transpose_bytes(words);
        uint32_t *to = area.record + p.v_codes_at / 4 + 4 * four * groups + group;
KVC_UNROLL
        for (uint32_t c = 0; c < 4; ++c) to[c * groups] = words[c];
        if constexpr (Main == 2) {
            if (p.v_bits != 3) continue;
KVC_UNROLL
            for (uint32_t h = 0; h < 2; ++h) {
                uint32_t thirds = 0;
                for (uint32_t j = 0; j < 8; ++j)
                    thirds += (code[8 * h + j] >> 2 & 0x01010101u) << j;
                const uint32_t eights = p.tile_tokens / 8, byte = plane_byte(2 * group + h);
                for (uint32_t c = 0; c < 4; ++c)
                    plane[(4 * four + c) * eights + byte] =
                        static_cast<unsigned char>(thirds >> 8 * c);
            }
        }
    }
}

} // namespace kvc
