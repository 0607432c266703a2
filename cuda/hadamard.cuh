// The rotation of src/quant/hadamard.rs over rows that lie four or more channels a lane: fixed signs, then a
// Hadamard transform in blocks of the largest power of two that divides the row. The butterflies are
// in the same order and nothing is contracted, so the bits are the CPU's.
//
// A block of the transform lies in neighbouring lanes of one warp, of which the first has a number that
// is a multiple of their count, and all lanes of the warp take part.
#pragma once
#include "num.cuh"

namespace kvc {

// Signs of the channels 64 * word to 64 * word + 63, a bit each.
KVC_DEVICE constexpr uint64_t sign_word(uint32_t word) {
    uint64_t x = 0x006b766361636865ull + (word % 9 + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Those of up to 32 channels from `channel` on, in one word; the lowest bit is that of the first.
template <int HeadDim> KVC_DEVICE uint32_t signs_from(uint32_t channel) {
    uint64_t word = sign_word(0);
KVC_UNROLL
    for (uint32_t i = 1; i < (HeadDim + 63) / 64; ++i)
        if (channel / 64 == i) word = sign_word(i);
    return static_cast<uint32_t>(word >> channel % 64);
}
// The sign bits of the channels as those of pairs of 16-bit elements.
template <int HeadDim> struct alignas(16) SignPairs {
    uint32_t pairs[HeadDim / 2];
    constexpr SignPairs() : pairs{} {
        for (uint32_t i = 0; i < HeadDim / 2; ++i) {
            const uint64_t two = sign_word(i / 32) >> 2 * i % 64;
            pairs[i] = static_cast<uint32_t>((two & 1) << 15 | (two >> 1 & 1) << 31);
        }
    }
};
template <int HeadDim> KVC_TABLE SignPairs<HeadDim> kSignPairs{};

// Sixteen channels from a multiple of eight on, by that table.
template <int HeadDim> KVC_DEVICE void negate_sixteen(float (&x)[16], uint32_t channel) {
KVC_UNROLL
    for (uint32_t i = 0; i < 16; i += 8) {
        const Vec16 signs =
            *reinterpret_cast<const Vec16 *>(kSignPairs<HeadDim>.pairs + (channel + i) / 2);
KVC_UNROLL
        for (uint32_t j = 0; j < 8; ++j) {
            const uint32_t pair = signs.word[j / 2];
            x[i + j] = as_float(as_bits(x[i + j]) ^ (j % 2 == 0 ? pair << 16 : pair & 0x80000000u));
        }
    }
}

// `Own` channels from a multiple of `Own` on, a power of two of at most 32.
template <int HeadDim, int Own> KVC_DEVICE void negate_channels(float (&x)[Own], uint32_t channel) {
    const uint32_t signs = signs_from<HeadDim>(channel);
KVC_UNROLL
    for (int j = 0; j < Own; ++j) x[j] = as_float(as_bits(x[j]) ^ (signs << (31 - j) & 0x80000000u));
}

KVC_DEVICE constexpr uint32_t hadamard_block(uint32_t dim) { return dim & (~dim + 1); }
// Channels of a lane where rows lie in lanes one behind the other: four, or what leaves a block of the
// transform in one warp.
template <int HeadDim> constexpr int kRotatedOwn = hadamard_block(HeadDim) > 128 ? 8 : 4;

// H x / sqrt(n) for blocks of n channels, of which a lane has `Own` beside each other.
template <int HeadDim, int Own>
KVC_DEVICE void transform_channels(float (&x)[Own], uint32_t lane = lane_id()) {
    constexpr uint32_t kBlock = hadamard_block(HeadDim);
    static_assert(kBlock >= Own && kBlock <= 32 * Own, "a lane has channels of one block, a warp all");
KVC_UNROLL
    for (int half = 1; half < Own; half *= 2) {
KVC_UNROLL
        for (int i = 0; i < Own; ++i) {
            if ((i & half) != 0) continue;
            const float sum = add_rn(x[i], x[i + half]), difference = add_rn(x[i], -x[i + half]);
            x[i] = sum;
            x[i + half] = difference;
        }
    }
KVC_UNROLL
    for (uint32_t half = 1; half < kBlock / Own; half *= 2) {
        const float sign = (lane & half) != 0 ? -1.0f : 1.0f;
KVC_UNROLL
        for (int j = 0; j < Own; ++j) x[j] = fma_rn(x[j], sign, shfl_xor(kFullMask, x[j], half));
    }
    constexpr uint32_t kLog = kBlock == 16    ? 4
                              : kBlock == 32  ? 5
                              : kBlock == 64  ? 6
                              : kBlock == 128 ? 7
                              : kBlock == 256 ? 8
                                              : 9;
    static_assert(1u << kLog == kBlock, "16 to 512 channels");
    const float root = as_float((127 - kLog / 2) << 23);
    const float scale = kLog % 2 == 0 ? root : mul_rn(0.70710678118654752440f, root);
KVC_UNROLL
    for (int j = 0; j < Own; ++j) x[j] = mul_rn(x[j], scale);
}

// `lane` is lane_id(), which need not be known to be that.
template <int HeadDim, int Own>
KVC_DEVICE void rotate_channels(float (&x)[Own], uint32_t channel, uint32_t lane = lane_id()) {
    negate_channels<HeadDim>(x, channel);
    transform_channels<HeadDim>(x, lane);
}
template <int HeadDim, int Own>
KVC_DEVICE void unrotate_channels(float (&x)[Own], uint32_t channel, uint32_t lane = lane_id()) {
    transform_channels<HeadDim>(x, lane);
    negate_channels<HeadDim>(x, channel);
}

} // namespace kvc
