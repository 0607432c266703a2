// What prefill over sealed tiles has in shared memory: 64 tokens of a record as they come, and how its
// codes become rows of f16 there, once for all query rows. Which tiles, and what is done with their rows,
// is prefill_sealed.cuh's.
#pragma once
#include "prefill.cuh"
#include "quant.cuh"

namespace kvc::prefill {

// By how many powers of two sealed values are smaller than they are, that the largest scale times the
// largest code is in the range of f16; and what a code of theirs counts.
KVC_DEVICE constexpr int value_down(uint32_t bits) {
    return bits == 8 ? 8 : bits == 4 ? 3 : bits == 3 ? 2 : 1;
}
KVC_DEVICE constexpr float value_unit(uint32_t bits) {
    return bits == 8   ? 256.0f
           : bits == 4 ? 0.3352f * 8.0f
           : bits == 3 ? 0.5860f * 4.0f
                       : 0.9957f * 2.0f;
}

// Queries as f16 have a 16th of their size, so that those up to a million are finite. Factors of
// scores are never zero, which with a score that is hidden would be no number.
constexpr float kQueryUnit = 16.0f, kLeastFactor = 1e-37f;

// Shared memory behind queries, keys and values: what the loops need seldom, then what has come of a
// record's keys (steps, middles, header, codes, third bits) and of its values (scales, codes, third
// bits). src/kernels/prefill_sealed.rs counts the bytes.
template <int HeadDim> struct Room {
    using S = Shape<HeadDim>;
    static constexpr uint32_t kSideAt =
        (S::kRows + kKeys) * S::kRow * 2 + HeadDim * kTokenRow * 2;
    static_assert(HeadDim * kTokenRow >= kKeys * S::kRow, "raw values have their place there too");

    struct Side {
        Tile tile;
        Sight sights[kWarps]; // of sealed tiles
        float units[kWarps];  // what makes dot products of those with keys of f16
        uint32_t seq;
        uint32_t past;      // the end of the sealed tiles, in parts of 64 tokens
        uint32_t next;      // the part after the one that is worked on
        uint32_t known;     // which 32 tiles `blocks` has
        int32_t blocks[32]; // of the records of 32 tiles, -1 where there is none to read
        // Raw tiles to be added, of up to 32: the first token, the slot, and whether rows further on
        // see it too.
        uint32_t raw_count;
        struct {
            int32_t token, slot;
            uint32_t later;
        } raws[32];
    };
    static constexpr uint32_t kStageAt = kSideAt + 1024;
    static_assert(sizeof(Side) <= 1024, "src/kernels/prefill_sealed.rs has room for it");

    KVC_DEVICE static Side &side() {
        return *reinterpret_cast<Side *>(KVC_SMEM(unsigned char) + kSideAt);
    }
    KVC_DEVICE static unsigned char *stage() { return KVC_SMEM(unsigned char) + kStageAt; }

    // Of the keys' stage.
    static constexpr uint32_t kMidsAt = HeadDim, kHeaderAt = 2 * HeadDim, kCodesAt = kHeaderAt + 16;
    KVC_DEVICE static constexpr uint32_t main_bits(uint32_t bits) { return bits == 3 ? 2 : bits; }
    KVC_DEVICE static uint32_t key_bytes(uint32_t bits) { return kKeys * HeadDim / 8 * main_bits(bits); }
    KVC_DEVICE static constexpr uint32_t plane_bytes(uint32_t bits) {
        return bits == 3 ? kKeys * HeadDim / 8 : 0;
    }
    KVC_DEVICE static unsigned char *value_stage(uint32_t k_bits) {
        return stage() + kCodesAt + key_bytes(k_bits) + plane_bytes(k_bits);
    }
    // Of the values'.
    static constexpr uint32_t kScaleBytes = kKeys * 2;
};

KVC_DEVICE void copy_bytes(unsigned char *to, const unsigned char *from, uint32_t bytes) {
KVC_ROLL
    for (uint32_t i = opaque(thread_x()) * 16; i < bytes; i += kThreads * 16)
        cp_async_16(to + i, from + i, true);
}

// As many bytes as the block copies at a time, or fewer.
template <uint32_t Bytes> KVC_DEVICE void copy_few(unsigned char *to, const unsigned char *from) {
    static_assert(Bytes <= kThreads * 16, "16 bytes a thread");
    const uint32_t at = opaque(thread_x()) * 16;
    if (at < Bytes) cp_async_16(to + at, from + at, true);
}

KVC_DEVICE const unsigned char *record_at(const kvc_prefill_sealed_params &params, int32_t block,
                                          uint32_t kv_head) {
    return static_cast<const unsigned char *>(params.records) + block * params.record_block +
           kv_head * params.record_head;
}

// Starts the copies of what 64 tokens of a record say of keys, and of values; `part` is which 64.
template <int HeadDim>
KVC_DEVICE void fetch_keys(const kvc_prefill_sealed_params &params, const unsigned char *record,
                           uint32_t part) {
    using R = Room<HeadDim>;
    unsigned char *to = R::stage();
    // Middles lie behind the steps, as in the record.
    copy_few<2 * HeadDim>(to, record + params.k_steps_at);
    copy_few<16>(to + R::kHeaderAt, record + params.header_at);
    const uint32_t bytes = R::key_bytes(params.k_bits), plane = R::plane_bytes(params.k_bits);
    copy_bytes(to + R::kCodesAt, record + part * bytes, bytes);
    if (plane != 0)
        copy_bytes(to + R::kCodesAt + bytes, record + params.k_plane_at + part * plane, plane);
}
template <int HeadDim>
KVC_DEVICE void fetch_values(const kvc_prefill_sealed_params &params, const unsigned char *record,
                             uint32_t part) {
    using R = Room<HeadDim>;
    unsigned char *to = R::value_stage(params.k_bits);
    copy_few<R::kScaleBytes>(to, record + params.v_scales_at + part * R::kScaleBytes);
    // A channel has its tokens beside each other: 16 bytes of them, 32 or 64.
    const uint32_t bits = R::main_bits(params.v_bits), chunks = bits / 2, shift = bits / 4;
    const uint32_t row_bytes = params.tile_tokens / 8 * bits;
    const unsigned char *from = record + params.v_codes_at + part * 8 * bits;
    to += R::kScaleBytes;
KVC_ROLL
    for (uint32_t i = opaque(thread_x()); i < HeadDim * chunks; i += kThreads)
        cp_async_16(to + i * 16, from + (i >> shift) * row_bytes + (i & (chunks - 1)) * 16, true);
    if (params.v_bits == 3)
        copy_bytes(to + HeadDim * chunks * 16, record + params.v_plane_at,
                   HeadDim * params.tile_tokens / 8);
}

// Turns the keys that have come into f16. Gives what makes dot products of theirs, U and the queries'
// unit, to each warp. A thread has eight channels of every few tokens.
template <int Bits, int HeadDim> KVC_DEVICE void widen_keys() {
    using R = Room<HeadDim>;
    using Codes = Octet<Bits, 0>;
    constexpr uint32_t kOctets = HeadDim / 8, kRowBytes = HeadDim * Codes::kMain / 8;
    const unsigned char *stage = R::stage();
    const uint32_t thread = opaque(thread_x()), o = thread % kOctets;
    const uint32_t units = *reinterpret_cast<const uint32_t *>(stage + R::kHeaderAt);
    const float step_unit = widen_f16(static_cast<uint16_t>(units));
    const float mid_unit = widen_f16(static_cast<uint16_t>(units >> 16));
    // A step times a code is then below 2^13, and so is a middle.
    const float most = max_f32(max_f32(step_unit * 4.0f, mid_unit * 0.015625f), 1e-12f);
    const uint32_t exponent = (as_bits(most) & 0x7f800000u) + (1u << 23);
    const float down = as_float((254u << 23) - exponent);
    const uint32_t s = pack_f16(step_unit * down, step_unit * down);
    const uint32_t z = pack_f16(mid_unit * down, mid_unit * down);
    const TwoWords steps = *reinterpret_cast<const TwoWords *>(stage + o * 8);
    const TwoWords mids = *reinterpret_cast<const TwoWords *>(stage + R::kMidsAt + o * 8);
    uint32_t step[4], base[4];
KVC_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t which = i % 2 == 0 ? 0x4140 : 0x4342;
        const uint32_t us = sub_f16x2(permute(steps.word[i / 2], 0x64646464u, which), twice(0x6400));
        const uint32_t zi = sub_f16x2(
            permute(mids.word[i / 2] ^ 0x80808080u, 0x64646464u, which), twice(0x6480));
        step[i] = mul_f16x2(us, s);
        base[i] = fma_f16x2(zi, z, mul_f16x2(step[i], twice(0x3800)));
    }
    const unsigned char *codes = stage + R::kCodesAt;
    const unsigned char *plane = codes + kKeys * kRowBytes;
KVC_UNROLL
    for (uint32_t i = 0; i < kKeys * kOctets / kThreads; ++i) {
        const uint32_t token = i * (kThreads / kOctets) + thread / kOctets;
        uint32_t x[4];
        Codes::load(codes + token * kRowBytes, plane + token * (HeadDim / 8), o, x);
        Vec16 out;
KVC_UNROLL
        for (uint32_t j = 0; j < 4; ++j) out.word[j] = fma_f16x2(x[j], step[j], base[j]);
        *reinterpret_cast<Vec16 *>(keys<HeadDim>() + token * Shape<HeadDim>::kRow + o * 8) = out;
    }
    if (thread % 32 == 0) R::side().units[thread / 32] = as_float(exponent) * kQueryUnit;
}

// The same with the values. A thread has eight tokens of every 16th channel.
template <int Bits, int HeadDim>
KVC_DEVICE void widen_values(const unsigned char *stage, uint32_t tile_tokens, uint32_t part) {
    constexpr int kDown = value_down(Bits);
    using Codes = Octet<Bits, kDown, Bits == 8>;
    const uint32_t thread = opaque(thread_x()), o = thread % 8;
    const Vec16 scales = *reinterpret_cast<const Vec16 *>(stage + o * 16);
    uint32_t half[4];
KVC_UNROLL
    for (uint32_t i = 0; i < 4; ++i) half[i] = mul_f16x2(scales.word[i], twice((14 - kDown) << 10));
    const unsigned char *codes = stage + Room<HeadDim>::kScaleBytes;
    const unsigned char *plane = codes + HeadDim * 8 * Codes::kMain + part * 8;
KVC_UNROLL
    for (uint32_t i = 0; i < HeadDim / 16; ++i) {
        const uint32_t channel = i * 16 + thread / 8;
        uint32_t x[4];
        Codes::load(codes + channel * (8 * Codes::kMain), plane + channel * (tile_tokens / 8), o, x);
        Vec16 out;
KVC_UNROLL
        for (uint32_t j = 0; j < 4; ++j)
            out.word[j] = Bits == 8 ? mul_f16x2(x[j], scales.word[j])
                                    : fma_f16x2(x[j], scales.word[j], half[j]);
        *reinterpret_cast<Vec16 *>(values<HeadDim>() + channel * kTokenRow + o * 8) = out;
    }
}

template <int HeadDim> KVC_DEVICE void widen_keys(uint32_t bits) {
    switch (bits) {
    case 8: return widen_keys<8, HeadDim>();
    case 4: return widen_keys<4, HeadDim>();
    case 3: return widen_keys<3, HeadDim>();
    default: return widen_keys<2, HeadDim>();
    }
}
template <int HeadDim>
KVC_DEVICE void widen_values(const kvc_prefill_sealed_params &params, uint32_t part) {
    const unsigned char *stage = Room<HeadDim>::value_stage(params.k_bits);
    switch (params.v_bits) {
    case 8: return widen_values<8, HeadDim>(stage, params.tile_tokens, part);
    case 4: return widen_values<4, HeadDim>(stage, params.tile_tokens, part);
    case 3: return widen_values<3, HeadDim>(stage, params.tile_tokens, part);
    default: return widen_values<2, HeadDim>(stage, params.tile_tokens, part);
    }
}

} // namespace kvc::prefill
