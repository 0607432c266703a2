// The rotation of src/quant/hadamard.rs over rows that lie four channels a lane: fixed signs, then a
// Hadamard transform in blocks of the largest power of two that divides the row. The butterflies are
// in the same order and nothing is contracted, so the bits are the CPU's.
//
// A block of the transform, at most 128 channels, lies in neighbouring lanes of which the first has
// a number that is a multiple of their count, and all lanes of the warp take part.
#pragma once
#include "num.cuh"

namespace kvc {

// Signs of the channels 64 * word to 64 * word + 63, a bit each.
KVC_DEVICE uint64_t sign_word(uint32_t word) {
    uint64_t x = 0x006b766361636865ull + (word % 9 + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

KVC_DEVICE void negate_quad(float (&x)[4], uint32_t channel) {
    const uint32_t signs = static_cast<uint32_t>(sign_word(channel / 64) >> channel % 64);
    for (int j = 0; j < 4; ++j) x[j] = as_float(as_bits(x[j]) ^ (signs >> j & 1) << 31);
}

KVC_DEVICE constexpr uint32_t hadamard_block(uint32_t dim) { return dim & (~dim + 1); }

// H x / sqrt(n) for blocks of n channels.
template <int HeadDim> KVC_DEVICE void transform_quads(float (&x)[4]) {
    constexpr uint32_t kBlock = hadamard_block(HeadDim);
    const auto turn = [](float &a, float &b) {
        const float sum = add_rn(a, b), difference = add_rn(a, -b);
        a = sum;
        b = difference;
    };
    turn(x[0], x[1]);
    turn(x[2], x[3]);
    turn(x[0], x[2]);
    turn(x[1], x[3]);
KVC_UNROLL
    for (uint32_t half = 1; half < kBlock / 4; half *= 2) {
        const bool upper = (lane_id() & half) != 0;
        for (int j = 0; j < 4; ++j) {
            const float other = shfl_xor(kFullMask, x[j], half);
            x[j] = add_rn(other, upper ? -x[j] : x[j]);
        }
    }
    constexpr uint32_t kLog = kBlock == 16 ? 4 : kBlock == 32 ? 5 : kBlock == 64 ? 6 : 7;
    static_assert(1u << kLog == kBlock, "16 to 128 channels");
    const float root = as_float((127 - kLog / 2) << 23);
    const float scale = kLog % 2 == 0 ? root : mul_rn(0.70710678118654752440f, root);
    for (int j = 0; j < 4; ++j) x[j] = mul_rn(x[j], scale);
}

template <int HeadDim> KVC_DEVICE void rotate_quads(float (&x)[4], uint32_t channel) {
    negate_quad(x, channel);
    transform_quads<HeadDim>(x);
}
template <int HeadDim> KVC_DEVICE void unrotate_quads(float (&x)[4], uint32_t channel) {
    transform_quads<HeadDim>(x);
    negate_quad(x, channel);
}

} // namespace kvc
