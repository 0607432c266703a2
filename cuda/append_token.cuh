// Append to rows of codes: the K and V rows of new tokens, K optionally turned to its position on the
// way, encoded as src/quant/row.rs does, bit for bit: one rounding an operation, nothing contracted.
//
// Lanes have four channels each, and a row lies within a warp: largest elements, scales and rotations
// go by shuffles, codes are stored a row beside each other. A negative slot skips the token. A row that
// is not finite, or whose scale f16 does not hold, is not written and raises a bit of the error flag.
#pragma once
#include "append.cuh"
#include "hadamard.cuh"
#include "quant.cuh"

namespace kvc {

constexpr uint32_t kFlagRow = 32; // a row that its format cannot hold

// The formats, by their ids in src/dtype.
constexpr uint32_t kFp8E4m3 = 4, kFp8E5m2 = 5, kInt8T = 6, kInt4T = 7, kNvfp4 = 8;

// A small float: mantissa bits, the exponent of its smallest normal, its largest code.
template <uint32_t Mantissa, int32_t Least, uint32_t MaxCode, uint32_t Sign> struct SmallFloat {
    // The nearest code, saturating.
    KVC_DEVICE static uint32_t encode(float x) {
        const uint32_t bits = as_bits(x) & 0x7fffffffu;
        const uint32_t sign = (as_bits(x) >> 31) != 0 ? Sign : 0;
        int32_t exponent = static_cast<int32_t>(bits >> 23) - 127;
        if (exponent > 32) return MaxCode | sign;
        exponent = exponent < Least ? Least : exponent;
        const float in_units =
            as_float(static_cast<uint32_t>(127 + static_cast<int32_t>(Mantissa) - exponent) << 23);
        const uint32_t units = static_cast<uint32_t>(round_even(mul_rn(as_float(bits), in_units)));
        const uint32_t code = (static_cast<uint32_t>(exponent - Least) << Mantissa) + units;
        return (code < MaxCode ? code : MaxCode) | sign;
    }
    // The value of a magnitude.
    KVC_DEVICE static float decode(uint32_t code) {
        const uint32_t binade = code >> Mantissa, mantissa = code & ((1u << Mantissa) - 1);
        const uint32_t whole = mantissa + (binade == 0 ? 0 : 1u << Mantissa);
        const int32_t exponent = Least + static_cast<int32_t>(binade == 0 ? 0 : binade - 1) -
                                 static_cast<int32_t>(Mantissa);
        return mul_rn(static_cast<float>(whole), as_float(static_cast<uint32_t>(127 + exponent) << 23));
    }
};
using E4m3Code = SmallFloat<3, -6, 0x7e, 0x80>;
using E5m2Code = SmallFloat<2, -14, 0x7b, 0x80>;
using E2m1Code = SmallFloat<1, 0, 0x07, 0x08>;

// The smallest f16 not below `x`, of at least 0, as its bits: 0x7c00 where there is none.
KVC_DEVICE uint32_t f16_up(float x) {
    const uint32_t near = pack_f16(x, 0.0f) & 0xffff;
    return widen_f16(static_cast<uint16_t>(near)) < x ? near + 1 : near;
}
// The largest f16 not above `x`.
KVC_DEVICE uint32_t f16_down(float x) {
    if (x < 0.0f) return f16_up(-x) | 0x8000;
    const uint32_t near = pack_f16(x, 0.0f) & 0xffff;
    return widen_f16(static_cast<uint16_t>(near)) > x ? near - 1 : near;
}
KVC_DEVICE bool is_finite_f16(uint32_t bits) { return (bits & 0x7c00) != 0x7c00; }

// rne(x / step) within [low, high]; 0 where the step is 0.
KVC_DEVICE float code_of(float x, float step, float low, float high) {
    if (step == 0.0f) return 0.0f;
    const float code = round_even(div_rn(x, step));
    return code < low ? low : code > high ? high : code;
}

// The lanes of a row: `Lanes` of them, of which this is number `at`.
template <uint32_t Lanes, typename F> KVC_DEVICE float over_lanes(float x, F join) {
KVC_UNROLL
    for (uint32_t by = 1; by < Lanes; by *= 2) x = join(x, shfl_xor(kFullMask, x, by));
    return x;
}
KVC_DEVICE float min_f32(float a, float b) { return -max_f32(-a, -b); }

// Turns four channels of a key from `channel` on.
KVC_DEVICE void turn_quad(const kvc_append_params &p, int64_t row, uint32_t channel, uint32_t position,
                          float (&x)[4]) {
    const uint32_t half = p.rope_dim / 2;
    const int64_t at = static_cast<int64_t>(position) * half;
    float out[4];
    for (uint32_t j = 0; j < 4; ++j) {
        out[j] = x[j];
        const uint32_t own = channel + j;
        if (own < p.rope_first || own >= p.rope_first + p.rope_dim) continue;
        const uint32_t base = own - p.rope_first;
        const bool lower = p.rope_interleaved != 0 ? base % 2 == 0 : base < half;
        const uint32_t pair = p.rope_interleaved != 0 ? base / 2 : lower ? base : base - half;
        const uint32_t by = p.rope_interleaved != 0 ? 1 : half;
        const float other = load_element(p.k, row + (lower ? own + by : own - by), p.row_dtype);
        const float turned = mul_rn(other, p.sines[at + pair]);
        out[j] = add_rn(mul_rn(x[j], p.cosines[at + pair]), lower ? -turned : turned);
    }
    for (int j = 0; j < 4; ++j) x[j] = out[j];
}

// Encodes a row that lies in its lanes, rotated where it is to be, and writes it where `write` is set; false where it cannot be.
template <int HeadDim>
KVC_DEVICE bool encode_row(uint32_t format, float head_scale, const float (&x)[4], uint32_t channel,
                           unsigned char *codes, unsigned char *scales, bool write) {
    constexpr uint32_t kLanes = HeadDim / 4;
    const auto larger = [](float a, float b) { return max_f32(a, b); };
    const auto magnitude = [](float a) { return as_float(as_bits(a) & 0x7fffffffu); };
    // Of NaN the larger is the other: they are looked for apart.
    bool finite = true;
    float top = 0.0f;
    for (int j = 0; j < 4; ++j) {
        finite = finite && (as_bits(x[j]) & 0x7f800000u) != 0x7f800000u;
        top = max_f32(top, magnitude(x[j]));
    }
    finite = over_lanes<kLanes>(finite ? 0.0f : 1.0f, larger) == 0.0f;
    top = over_lanes<kLanes>(top, larger);
    uint32_t word = 0;
    if (format == kFp8E4m3 || format == kFp8E5m2) {
        for (int j = 0; j < 4; ++j) {
            const float y = div_rn(x[j], head_scale);
            word |= (format == kFp8E4m3 ? E4m3Code::encode(y) : E5m2Code::encode(y)) << 8 * j;
        }
        if (finite && write) *reinterpret_cast<uint32_t *>(codes + channel) = word;
        return finite;
    }
    if (format == kInt8T) {
        const uint32_t bits = f16_up(div_rn(top, 127.0f));
        const float scale = widen_f16(static_cast<uint16_t>(bits));
        const bool fits = finite && is_finite_f16(bits);
        for (int j = 0; j < 4; ++j) {
            const int32_t code = static_cast<int32_t>(code_of(x[j], scale, -127.0f, 127.0f));
            word |= (static_cast<uint32_t>(code) & 0xff) << 8 * j;
        }
        if (fits && write) {
            *reinterpret_cast<uint32_t *>(codes + channel) = word;
            if (channel == 0) *reinterpret_cast<uint16_t *>(scales) = static_cast<uint16_t>(bits);
        }
        return fits;
    }
    if (format == kInt4T) {
        float low = x[0], high = x[0];
        for (int j = 1; j < 4; ++j) {
            low = min_f32(low, x[j]);
            high = max_f32(high, x[j]);
        }
        low = over_lanes<kLanes>(low, [](float a, float b) { return min_f32(a, b); });
        high = over_lanes<kLanes>(high, larger);
        // Which zero a minimum or maximum of both is must not reach the bits.
        const uint32_t minimum_bits = f16_down(add_rn(low, 0.0f));
        const float minimum = widen_f16(static_cast<uint16_t>(minimum_bits));
        const uint32_t bits = f16_up(div_rn(add_rn(add_rn(high, 0.0f), -minimum), 15.0f));
        const float scale = widen_f16(static_cast<uint16_t>(bits));
        const bool fits = finite && is_finite_f16(bits) && is_finite_f16(minimum_bits);
        uint32_t code[4];
        for (int j = 0; j < 4; ++j)
            code[j] = static_cast<uint32_t>(code_of(add_rn(x[j], -minimum), scale, 0.0f, 15.0f));
        // The word of two lanes: even elements in its lower half.
        word = code[0] | code[2] << 4 | code[1] << 16 | code[3] << 20;
        word <<= channel % 8 * 2;
        word |= shfl_xor(kFullMask, word, 1);
        if (fits && write) {
            if (channel % 8 == 0) *reinterpret_cast<uint32_t *>(codes + channel / 2) = word;
            if (channel == 0) {
                reinterpret_cast<uint16_t *>(scales)[0] = static_cast<uint16_t>(bits);
                reinterpret_cast<uint16_t *>(scales)[1] = static_cast<uint16_t>(minimum_bits);
            }
        }
        return fits;
    }
    // NVFP4: of the scales that put the largest of 16 at 6 and at 4, the one that loses less.
    float largest = 0.0f;
    for (int j = 0; j < 4; ++j) largest = max_f32(largest, magnitude(x[j]));
    largest = over_lanes<4>(largest, larger);
    float best = 0.0f;
    uint32_t block = 0;
    for (uint32_t attempt = 0; attempt < 2; ++attempt) {
        const float wanted = div_rn(div_rn(largest, attempt == 0 ? 6.0f : 4.0f), head_scale);
        const uint32_t own = E4m3Code::encode(wanted);
        const float step = mul_rn(E4m3Code::decode(own), head_scale);
        uint32_t elements = 0;
        float error[4];
        for (int j = 0; j < 4; ++j) {
            const uint32_t code = step > 0.0f ? E2m1Code::encode(div_rn(x[j], step)) : 0;
            const float value = E2m1Code::decode(code & 7);
            error[j] = add_rn(x[j], -mul_rn((code & 8) != 0 ? -value : value, step));
            elements |= code << 4 * j;
        }
        // In the order of the channels: lane by lane.
        float loss = 0.0f;
        for (uint32_t turn = 0; turn < 4; ++turn) {
            float sum = loss;
            for (int j = 0; j < 4; ++j) sum = add_rn(sum, mul_rn(error[j], error[j]));
            loss = as_float(shfl(kFullMask, as_bits(sum), (lane_id() & ~3u) + turn));
        }
        if (attempt == 0 || loss < best) {
            best = loss;
            block = own;
            word = elements;
        }
    }
    if (finite && write) {
        *reinterpret_cast<uint16_t *>(codes + channel / 2) = static_cast<uint16_t>(word);
        if (channel % 16 == 0) scales[channel / 16] = static_cast<unsigned char>(block);
    }
    return finite;
}

template <int HeadDim> KVC_DEVICE void append_token(const kvc_append_token_params &params) {
    const kvc_append_params &p = params.call;
    constexpr uint32_t kLanes = HeadDim / 4, kRows = 32 / kLanes;
    static_assert(32 % kLanes == 0, "rows lie within a warp");
    const uint32_t first = block_x() * p.tokens_per_block, left = p.tokens - first;
    const uint32_t tokens = left < p.tokens_per_block ? left : p.tokens_per_block;
    const uint32_t per_token = 2 * p.kv_heads, rows = tokens * per_token;
    const uint32_t channel = lane_id() % kLanes * 4;
    for (uint32_t base = warp_id() * kRows; base < rows; base += block_threads() / 32 * kRows) {
        const uint32_t own = base + lane_id() / kLanes;
        const bool exists = own < rows;
        const uint32_t token = first + (exists ? own / per_token : 0);
        const uint32_t which = exists ? own % per_token : 0;
        const bool is_key = which < p.kv_heads;
        const uint32_t head = is_key ? which : which - p.kv_heads;
        const int64_t slot = exists ? p.slots[token] : -1;
        const int64_t block = slot / p.block_tokens, place = slot % p.block_tokens;
        bool wanted = slot >= 0;
        if (wanted && block >= p.num_blocks) {
            if (channel == 0) raise(p.error_flag, kFlagBlock);
            wanted = false;
        }
        const uint32_t position = wanted && p.cosines != nullptr ? p.positions[token] : 0;
        if (wanted && p.cosines != nullptr && position >= p.rope_positions) {
            if (channel == 0) raise(p.error_flag, kFlagPosition);
            wanted = false;
        }
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const int64_t row = is_key ? token * p.k_token + head * p.k_head
                                   : token * p.v_token + head * p.v_head;
        if (wanted) {
            load_quad(is_key ? p.k : p.v, row + channel, p.row_dtype, x);
            if (is_key && p.cosines != nullptr) turn_quad(p, row, channel, position, x);
        }
        const int64_t codes_at =
            is_key ? block * p.k_cache_block + head * p.k_cache_head + place * p.k_cache_token
                   : block * p.v_cache_block + head * p.v_cache_head + place * p.v_cache_token;
        const int64_t scales_at =
            is_key ? block * params.k_scale_block + head * params.k_scale_head +
                         place * params.k_scale_token
                   : block * params.v_scale_block + head * params.v_scale_head +
                         place * params.v_scale_token;
        unsigned char *codes = static_cast<unsigned char *>(is_key ? p.k_cache : p.v_cache);
        unsigned char *scales =
            static_cast<unsigned char *>(is_key ? params.k_scales : params.v_scales);
        const float *heads = is_key ? params.k_heads : params.v_heads;
        const bool rotated = params.format == kInt4T || (is_key && params.k_rotated != 0);
        // Both rows of a warp are rotated if either is: what is not meant to be starts again.
        float y[4] = {x[0], x[1], x[2], x[3]};
        if (ballot(kFullMask, rotated) != 0) rotate_quads<HeadDim>(y, channel);
        for (int j = 0; j < 4; ++j) x[j] = rotated ? y[j] : x[j];
        const bool fits =
            encode_row<HeadDim>(params.format, heads == nullptr ? 1.0f : heads[head], x, channel,
                                wanted ? codes + codes_at : nullptr,
                                wanted ? scales + scales_at : nullptr, wanted);
        if (wanted && !fits && channel == 0) raise(p.error_flag, kFlagRow);
    }
    if (p.q_heads != 0) turn_queries(p);
}

} // namespace kvc

#define KVC_APPEND_TOKEN(dim)                                                            \
    KVC_KERNEL(kvc_append_token_d##dim, kvc_append_token_params, 256, 4) {               \
        kvc::append_token<dim>(p);                                                       \
    }
