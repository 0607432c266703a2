// Chunked prefill over rows of codes: a tile of keys or values is turned into f16 on its way to shared
// memory, and from there on it is the prefill of 16-bit rows (prefill.cuh).
//
// Scales of rows are multiplied in, so an element of 65504 and more is infinite; those of a whole head
// go to the queries and the output. Queries are rotated where keys are stored rotated, and output rows
// are rotated back where values are.
#pragma once
#include "hadamard.cuh"
#include "prefill.cuh"
#include "quant.cuh"

namespace kvc::prefill {

// The formats of src/quant/row.rs: how a word of codes becomes f16 numbers in the order of channels,
// before scales.
template <typename C, uint32_t ScaleBytes> struct Whole {
    using Codes = C;
    static constexpr uint32_t kScaleBytes = ScaleBytes;
    static constexpr bool kGroups = false, kMinimum = false;
    KVC_DEVICE static void unpack(uint32_t w, uint32_t (&out)[C::kPairs]) {
        C::unpack(w, out);
        if constexpr (C::kFactor != 1.0f)
            for (uint32_t &pair : out) pair = mul_f16x2(pair, twice(0x5c00)); // by 256
    }
};
struct Fp8E4m3Rows : Whole<E4m3, 0> {};
struct Fp8E5m2Rows : Whole<E5m2, 0> {};
struct Int8Rows : Whole<Int8, 2> {};
struct Int4Rows : Whole<Nibbles, 4> {
    static constexpr bool kMinimum = true;
};
struct Nvfp4Rows {
    using Codes = E2m1;
    static constexpr uint32_t kScaleBytes = 1; // of 16 channels
    static constexpr bool kGroups = true, kMinimum = false;
    KVC_DEVICE static void unpack(uint32_t w, uint32_t (&out)[4]) {
        uint32_t apart[4];
        E2m1::unpack(w, apart);
        for (uint32_t i = 0; i < 4; ++i) {
            // Elements i and i + 4 to neighbours; by 2^14, which is their factor.
            const uint32_t two = permute(apart[i % 2 * 2], apart[i % 2 * 2 + 1], i < 2 ? 0x5410 : 0x7632);
            out[i] = mul_f16x2(two, twice(0x7400));
        }
    }
};

template <typename Format, int HeadDim> struct CodeLoader : Loader<HeadDim> {
    using Codes = typename Format::Codes;
    using Base = Loader<HeadDim>;
    // Elements that a lane takes at a time, of one group of 16, and how many such parts a row has: eight
    // lanes share them.
    static constexpr uint32_t kElements = HeadDim % 128 == 0 ? 16 : 8, kParts = HeadDim / kElements;
    static constexpr uint32_t kWords = kElements * Codes::kBits / 32;
    static constexpr int kOwn = kRotatedOwn<HeadDim>;
    static_assert(Shape<HeadDim>::kWarpRows * (HeadDim / kOwn) % 32 == 0, "whole warps rotate");

    const kvc_prefill_token_params &params;

    KVC_DEVICE explicit CodeLoader(const kvc_prefill_token_params &p) : params(p) {}

    // The f16 scales and minimum of the group of a row's part, each twice in a word.
    KVC_DEVICE static void load_scales(const unsigned char *at, uint32_t part, uint32_t &scale,
                                       uint32_t &minimum) {
        if constexpr (Format::kGroups) {
            uint32_t pairs[2];
            E4m3::unpack(at[part * kElements / 16], pairs);
            scale = twice(pairs[0] & 0xffff);
            if constexpr (E4m3::kFactor != 1.0f) scale = mul_f16x2(scale, twice(0x5c00));
        } else if constexpr (Format::kScaleBytes != 0) {
            const uint16_t *halves = reinterpret_cast<const uint16_t *>(at);
            scale = twice(halves[0]);
            if constexpr (Format::kMinimum) minimum = twice(halves[1]);
        }
    }

    KVC_DEVICE void copy(uint16_t *to, const void *rows, int64_t head, int64_t block_stride,
                         int64_t token_stride, const void *scales, int64_t scale_head,
                         int64_t scale_block, int64_t scale_token) const {
        const auto which = Base::places();
        const uint32_t row = warp_id() * Base::kOwn + lane_id() / 8, chunk = lane_id() % 8;
        const bool known = which.block != ~0u;
        const int64_t own = known ? head + which.block * block_stride + which.slot * token_stride : 0;
        const int64_t own_scale =
            known ? scale_head + which.block * scale_block + which.slot * scale_token : 0;
        const uint32_t valid = static_cast<uint32_t>(which.readable >> row);
        uint16_t *at = to + row * Base::kRow + chunk * kElements;
KVC_UNROLL
        for (uint32_t i = 0; i < Base::kOwn / 4; ++i) {
            const int64_t from = shfl_of_8(kFullMask, own, i);
            const int64_t scale_from = shfl_of_8(kFullMask, own_scale, i);
            uint32_t *out = reinterpret_cast<uint32_t *>(at + i * 4 * Base::kRow);
            const bool readable = (valid >> i * 4 & 1) != 0;
KVC_UNROLL
            for (uint32_t j = 0; j < kParts; j += 8, out += 4 * kElements) {
                if (j + 8 > kParts && j + chunk >= kParts) break;
                if (!readable) {
                    for (uint32_t w = 0; w < kElements / 2; ++w) out[w] = 0;
                    continue;
                }
                const unsigned char *codes = static_cast<const unsigned char *>(rows) + from;
                const unsigned char *own_scales = static_cast<const unsigned char *>(scales) + scale_from;
                dequantise(reinterpret_cast<const uint32_t *>(codes) + (j + chunk) * kWords, own_scales,
                           j + chunk, out);
            }
        }
    }
    // A part of a row as f16.
    KVC_DEVICE static void dequantise(const uint32_t *words, const unsigned char *scales, uint32_t part,
                                      uint32_t *out) {
        uint32_t scale = 0, minimum = 0;
        load_scales(scales, part, scale, minimum);
KVC_UNROLL
        for (uint32_t w = 0; w < kWords; ++w) {
            uint32_t pairs[Codes::kPairs];
            Format::unpack(words[w], pairs);
KVC_UNROLL
            for (uint32_t j = 0; j < Codes::kPairs; ++j) {
                // Rounded once: what rows lose alike adds up in the first channel that is rotated back.
                if constexpr (Format::kMinimum)
                    pairs[j] = fma_f16x2(pairs[j], scale, minimum);
                else if constexpr (Format::kScaleBytes != 0)
                    pairs[j] = mul_f16x2(pairs[j], scale);
                out[w * Codes::kPairs + j] = pairs[j];
            }
        }
    }
    KVC_DEVICE void copy_keys(const kvc_prefill_params &p, const Tile &u) const {
        copy(keys<HeadDim>(), p.k, u.kv_head * p.k_head, p.k_block, p.k_token, params.k_scales,
             u.kv_head * params.k_scale_head, params.k_scale_block, params.k_scale_token);
    }
    KVC_DEVICE void copy_values(const kvc_prefill_params &p, const Tile &u) const {
        copy(values<HeadDim>(), p.v, u.kv_head * p.v_head, p.v_block, p.v_token, params.v_scales,
             u.kv_head * params.v_scale_head, params.v_scale_block, params.v_scale_token);
    }

    // Rotates the warp's queries and multiplies the scale of the keys in.
    KVC_DEVICE void prepare(const Tile &u, uint16_t *queries) const {
        using S = Shape<HeadDim>;
        const float scale = params.k_heads == nullptr ? 1.0f : params.k_heads[u.kv_head];
        if (params.k_rotated == 0 && params.k_heads == nullptr) return;
        // The rows were brought by other threads, also of other warps.
        cp_async_commit();
        cp_async_wait<0>();
        sync_threads();
        constexpr uint32_t kLanes = HeadDim / kOwn; // of a row
        for (uint32_t i = lane_id(); i < S::kWarpRows * kLanes; i += 32) {
            const uint32_t row = warp_id() * S::kWarpRows + i / kLanes, channel = i % kLanes * kOwn;
            uint32_t *at = reinterpret_cast<uint32_t *>(queries + row * S::kRow + channel);
            float x[kOwn];
            for (int j = 0; j < kOwn; ++j)
                x[j] = widen_f16(static_cast<uint16_t>(at[j / 2] >> j % 2 * 16)) * scale;
            if (params.k_rotated != 0) rotate_channels<HeadDim>(x, channel);
            for (int j = 0; j < kOwn; j += 2) at[j / 2] = pack_f16(x[j], x[j + 1]);
        }
        sync_warp();
    }

    // The same backwards for the output rows of the warp.
    KVC_DEVICE void finish(const Tile &u, float *rows) const {
        using S = Shape<HeadDim>;
        const float scale = params.v_heads == nullptr ? 1.0f : params.v_heads[u.kv_head];
        if (params.v_rotated == 0 && params.v_heads == nullptr) return;
        constexpr uint32_t kLanes = HeadDim / kOwn;
        for (uint32_t i = lane_id(); i < S::kWarpRows * kLanes; i += 32) {
            const uint32_t channel = i % kLanes * kOwn;
            float *at = rows + i / kLanes * S::kRow + channel;
            float x[kOwn];
            for (int j = 0; j < kOwn; ++j) x[j] = at[j] * scale;
            if (params.v_rotated != 0) unrotate_channels<HeadDim>(x, channel);
            for (int j = 0; j < kOwn; ++j) at[j] = x[j];
        }
        sync_warp();
    }
};

} // namespace kvc::prefill

// Defines the kernel for one format and head dimension.
#define KVC_PREFILL_TOKEN(format, Format, dim)                                           \
    KVC_KERNEL(kvc_prefill_##format##_d##dim, kvc_prefill_token_params, 128, 2) {        \
        kvc::prefill::attend<kvc::F16, dim>(                                             \
            p.call, kvc::prefill::CodeLoader<kvc::prefill::Format, dim>(p));             \
    }
