// The token-wise formats of src/quant/row.rs as the decode kernels read them: how words of codes become
// operands of the matrix instructions, which channels those are, and what is left of their factors.
#pragma once
#include "quant.cuh"

namespace kvc {

// How a word of keys, or 16 bits of two values, become pairs of f16.
// Channels of the values' matrices: `channel(i, g, half)` is row g + 8 half of the i-th.
//
// A `kSmall` format has its codes plus kLess as the last bits of f16, of pair i from bit `place(i)` on:
// subnormal numbers, codes times 2^(place - 24), which the products take exactly and which cost one
// instruction a pair. Queries have the other powers of two, of which key_factor is left, and sums of values
// get theirs at the end. What kLess adds is taken away by the sums of the queries, and by those of the
// rounded weights, which a product with ones makes.
template <typename C> struct ByteFormat {
    using Codes = C;
    static constexpr bool kScaled = false, kMinimum = false, kGroups = false, kSmall = false;
    KVC_DEVICE static void keys(uint32_t w, uint32_t (&out)[C::kPairs]) { C::unpack(w, out); }
    KVC_DEVICE static void values(uint32_t w, uint32_t (&out)[C::kPairs]) { C::rows(w, out); }
    KVC_DEVICE static constexpr uint32_t channel(uint32_t i, uint32_t g, uint32_t half) {
        return 16 * i + 2 * g + half;
    }
    KVC_DEVICE static constexpr uint32_t place(uint32_t) { return 0; }
};
template <typename C> struct NibbleFormat : ByteFormat<C> {
    KVC_DEVICE static constexpr uint32_t channel(uint32_t i, uint32_t g, uint32_t half) {
        return i / 2 * 32 + g / 2 * 8 + C::row_element(g % 2, i % 2 * 2 + half);
    }
};
struct Fp8E4m3Rows : ByteFormat<E4m3> {};
struct Fp8E5m2Rows : ByteFormat<E5m2> {};
struct Int8Rows : ByteFormat<Int8> {
    static constexpr bool kScaled = true, kSmall = true;
    static constexpr float kLess = 128.0f;
    KVC_DEVICE static void keys(uint32_t w, uint32_t (&out)[2]) {
        out[0] = permute(w ^ 0x80808080u, 0, 0x4140);
        out[1] = permute(w ^ 0x80808080u, 0, 0x4342);
    }
    KVC_DEVICE static void values(uint32_t w, uint32_t (&out)[2]) {
        out[0] = permute(w ^ 0x80808080u, 0, 0x4240);
        out[1] = permute(w ^ 0x80808080u, 0, 0x4341);
    }
};
// Codes less 8: what all codes have in common would come together in one channel where values are
// rotated back.
struct Int4Rows : NibbleFormat<Nibbles> {
    static constexpr bool kScaled = true, kMinimum = true, kSmall = true;
    static constexpr float kLess = 8.0f;
    KVC_DEVICE static constexpr uint32_t place(uint32_t i) { return i % 2 * 4; }
    KVC_DEVICE static void keys(uint32_t w, uint32_t (&out)[4]) {
        const uint32_t upper = w >> 8;
        out[0] = w & 0x000f000fu;
        out[1] = w & 0x00f000f0u;
        out[2] = upper & 0x000f000fu;
        out[3] = upper & 0x00f000f0u;
    }
    KVC_DEVICE static void values(uint32_t w, uint32_t (&out)[4]) { keys(w, out); }
};
struct Nvfp4Rows : NibbleFormat<E2m1> {
    static constexpr bool kGroups = true;
};

// What is left of the powers of two of small codes and their queries, which are up to 2 and get 2^14.
template <typename Format> KVC_DEVICE constexpr float key_factor() {
    return Format::kSmall ? 1024.0f : Format::Codes::kFactor;
}
template <typename Format> KVC_DEVICE constexpr float value_factor(uint32_t pair) {
    return Format::kSmall ? static_cast<float>(1u << (24 - Format::place(pair))) : Format::Codes::kFactor;
}

} // namespace kvc
