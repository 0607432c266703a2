// Append to rows of codes: the K and V rows of new tokens, K optionally turned to its position on the
// way, encoded as src/quant/row.rs does, bit for bit: one rounding an operation, nothing contracted.
//
// A lane has sixteen channels of a row, a block of NVFP4, and a warp several rows: largest elements,
// scales and rotations go by shuffles of few lanes, a power of two. Where a row has fewer channels the
// lanes that are over hold what its first ones do. A negative slot skips the token. A row that
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
    if (channel < p.rope_first || channel >= p.rope_first + p.rope_dim) return;
    const uint32_t half = p.rope_dim / 2, base = channel - p.rope_first;
    const bool neighbours = p.rope_interleaved != 0;
    const float *cosines = p.cosines + static_cast<int64_t>(position) * half;
    const float *sines = p.sines + static_cast<int64_t>(position) * half;
    float other[4];
    if (neighbours) {
        for (int j = 0; j < 4; ++j) other[j] = x[j ^ 1];
    } else if (half % 4 == 0) {
        load_quad(p.k, row + (base < half ? channel + half : channel - half), p.row_dtype, other);
    } else {
        for (uint32_t j = 0; j < 4 && base + j < p.rope_dim; ++j) {
            const uint32_t own = channel + j, by = base + j < half ? own + half : own - half;
            other[j] = load_element(p.k, row + by, p.row_dtype);
        }
    }
KVC_UNROLL
    for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t at = base + j;
        if (at >= p.rope_dim) break;
        const bool lower = neighbours ? j % 2 == 0 : at < half;
        const uint32_t pair = neighbours ? at / 2 : lower ? at : at - half;
        const float turned = mul_rn(other[j], sines[pair]);
        x[j] = add_rn(mul_rn(x[j], cosines[pair]), lower ? -turned : turned);
    }
}

// Quotients by one divisor, as division rounds them but for the sign of zeros: by its inverse, and what
// that leaves, which a fused multiplication has exactly. A divisor of 0 gives 0.
struct Divisor {
    float by, inverse;
    KVC_DEVICE explicit Divisor(float divisor)
        : by(divisor), inverse(divisor == 0.0f ? 0.0f : div_rn(1.0f, divisor)) {}

    // Whether nothing overflows on the way, and only quotients that round to code 0 underflow.
    KVC_DEVICE static bool covers(float divisor) { return divisor > 0x1p-40f && divisor < 0x1p40f; }

    // Of a divisor of at most 19 bits: a quotient is never so near to the middle between two floats
    // that the error of the inverse, 2^-24 of two last places, could tell.
    KVC_DEVICE float short_quotient(float x) const {
        const float near = mul_rn(x, inverse);
        return fma_rn(fma_rn(-near, by, x), inverse, near);
    }
    // Of any: the second correction is of a quotient within one last place (Markstein).
    KVC_DEVICE float quotient(float x) const {
        const float near = short_quotient(x);
        return fma_rn(fma_rn(-near, by, x), inverse, near);
    }
};

// The integer nearest to `x`, even where two are, plus `Bias`, in the last bits of a float.
constexpr uint32_t kInteger = 0x4b400000u; // 1.5 * 2^23
template <uint32_t Bias> KVC_DEVICE uint32_t integer_bits(float x) {
    return as_bits(add_rn(x, as_float(kInteger + Bias)));
}

constexpr int kOwn = 16; // channels of a row that a lane has

KVC_DEVICE void load_own(const void *rows, int64_t index, uint32_t dtype, float (&x)[kOwn]) {
    const char *at = element(rows, index, dtype);
    if (dtype == kF32) {
KVC_UNROLL
        for (int i = 0; i < kOwn; i += 4) {
            const Vec16 v = *reinterpret_cast<const Vec16 *>(at + 4 * i);
            for (int j = 0; j < 4; ++j) x[i + j] = as_float(v.word[j]);
        }
        return;
    }
    // Both halves of a sector: the second comes from L1.
    const Vec16 v[2] = {reinterpret_cast<const Vec16 *>(at)[0], reinterpret_cast<const Vec16 *>(at)[1]};
    if (dtype == kBf16) {
KVC_UNROLL
        for (int i = 0; i < kOwn; ++i)
            x[i] = as_float(i % 2 == 0 ? v[i / 8].word[i % 8 / 2] << 16
                                       : v[i / 8].word[i % 8 / 2] & 0xffff0000u);
        return;
    }
KVC_UNROLL
    for (int i = 0; i < kOwn; ++i)
        x[i] = widen_f16(static_cast<uint16_t>(v[i / 8].word[i % 8 / 2] >> i % 2 * 16));
}

// Turns a lane's channels of a key.
KVC_DEVICE void turn_own(const kvc_append_params &p, int64_t row, uint32_t channel, uint32_t position,
                         float (&x)[kOwn]) {
KVC_UNROLL
    for (int i = 0; i < kOwn; i += 4) {
        float quad[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
        turn_quad(p, row, channel + i, position, quad);
        for (int j = 0; j < 4; ++j) x[i + j] = quad[j];
    }
}

// Whether all of a lane's channels are finite.
KVC_DEVICE bool all_finite(const float (&x)[kOwn]) {
    float zero[2] = {0.0f, 0.0f};
KVC_UNROLL
    for (int j = 0; j < kOwn; ++j) zero[j % 2] = fma_rn(x[j], 0.0f, zero[j % 2]);
    return add_rn(zero[0], zero[1]) == 0.0f;
}

KVC_DEVICE float largest_of(const float (&x)[kOwn]) {
    float top[2] = {0.0f, 0.0f};
KVC_UNROLL
    for (int j = 0; j < kOwn; ++j) top[j % 2] = max_f32(top[j % 2], as_float(as_bits(x[j]) & 0x7fffffffu));
    return max_f32(top[0], top[1]);
}

// Four floats as bytes of an FP8 format.
KVC_DEVICE uint32_t fp8_word(uint32_t format, float a, float b, float c, float d) {
#if !defined(KVC_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return format == kFp8E4m3 ? pack_e4m3(a, b) | pack_e4m3(c, d) << 16
                              : pack_e5m2(a, b) | pack_e5m2(c, d) << 16;
#else
    const float x[4] = {a, b, c, d};
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j)
        word |= (format == kFp8E4m3 ? E4m3Code::encode(x[j]) : E5m2Code::encode(x[j])) << 8 * j;
    return word;
#endif
}

KVC_DEVICE Vec16 encode_fp8(uint32_t format, float head_scale, const float (&x)[kOwn]) {
    float y[kOwn];
    if (head_scale == 1.0f) {
        for (int j = 0; j < kOwn; ++j) y[j] = x[j];
    } else if (Divisor::covers(head_scale) && largest_of(x) < 0x1p80f) {
        const Divisor scale(head_scale);
KVC_UNROLL
        for (int j = 0; j < kOwn; ++j)
            y[j] = as_float((as_bits(scale.quotient(x[j])) & 0x7fffffffu) |
                            (as_bits(x[j]) & 0x80000000u));
    } else {
KVC_UNROLL
        for (int j = 0; j < kOwn; ++j) y[j] = div_rn(x[j], head_scale);
    }
    Vec16 codes;
KVC_UNROLL
    for (int i = 0; i < 4; ++i)
        codes.word[i] = fp8_word(format, y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
    return codes;
}

// No code leaves -127 to 127: the scale is rounded up.
KVC_DEVICE Vec16 encode_int8(float scale, const float (&x)[kOwn]) {
    const Divisor step(scale);
    Vec16 codes;
KVC_UNROLL
    for (int i = 0; i < 4; ++i) {
        uint32_t word = 0 - (kInteger + (kInteger << 8));
KVC_UNROLL
        for (int j = 0; j < 4; ++j)
            word += integer_bits<128>(step.short_quotient(x[4 * i + j])) << 8 * j;
        codes.word[i] = word ^ 0x80808080u;
    }
    return codes;
}

// Nor one 0 to 15. Of 8 codes even ones come first.
KVC_DEVICE TwoWords encode_int4(float minimum, float scale, const float (&x)[kOwn]) {
    const Divisor step(scale);
    TwoWords codes;
KVC_UNROLL
    for (int i = 0; i < 2; ++i) {
        uint32_t word = 0 - (kInteger + (kInteger << 4) + (kInteger << 8));
KVC_UNROLL
        for (int j = 0; j < 8; ++j)
            word += integer_bits<0>(step.short_quotient(add_rn(x[8 * i + j], -minimum)))
                    << (j / 2 + j % 2 * 4) * 4;
        codes.word[i] = word;
    }
    return codes;
}

// Sixteen magnitudes as e2m1 for one scale, and what that loses.
struct Nvfp4Block {
    uint32_t scale;
    float loss;
    TwoWords codes; // but for signs

    // Where `Exact`, a value times the step is, and one rounding is what it and the difference take.
    template <bool Exact, typename Divide>
    KVC_DEVICE void encode(float wanted, float head_scale, const float (&x)[kOwn], Divide divide) {
        scale = E4m3Code::encode(wanted);
        const float step = mul_rn(E4m3Code::decode(scale), head_scale);
        const auto by = divide(step);
        loss = 0.0f;
        uint32_t bytes[kOwn / 2];
KVC_UNROLL
        for (int j = 0; j < kOwn; ++j) {
            const float magnitude = as_float(as_bits(x[j]) & 0x7fffffffu);
            const float y = by(magnitude);
            // Half the value's power of two, of at least 1, is the unit that a sum with this ends in.
            const float unit = max_f32(as_float(as_bits(y) & 0x7f800000u), 1.0f);
            const float sum = fma_rn(unit, 0x1.8p22f, y);
            const float value = min_f32(fma_rn(unit, -0x1.8p22f, sum), 6.0f);
            const float error = Exact ? fma_rn(value, -step, magnitude)
                                      : add_rn(magnitude, -mul_rn(value, step));
            loss = add_rn(loss, mul_rn(error, error));
            // As a subnormal the value's first bits are its code.
            const uint32_t code = as_bits(mul_rn(value, 0x1p-126f));
            bytes[j / 2] = j % 2 == 0 ? code << 2 : bytes[j / 2] + (code << 6);
        }
KVC_UNROLL
        for (int i = 0; i < 2; ++i)
            codes.word[i] = permute(permute(bytes[4 * i], bytes[4 * i + 1], 0x0073),
                                    permute(bytes[4 * i + 2], bytes[4 * i + 3], 0x0073), 0x5410);
        if (!(step > 0.0f)) scale |= kNoSigns;
    }
    static constexpr uint32_t kNoSigns = 0x100; // every code is 0: no scale fits
};

// Of the scales that put the largest of 16 at 6 and at 4, the one that loses less.
KVC_DEVICE TwoWords encode_nvfp4(float head_scale, const float (&x)[kOwn], uint32_t &scale) {
    const float largest = largest_of(x);
    const float six = div_rn(div_rn(largest, 6.0f), head_scale);
    const float four = div_rn(mul_rn(largest, 0.25f), head_scale);
    Nvfp4Block best, other;
    if (head_scale == 1.0f) {
        const auto divide = [](float step) {
            return [by = Divisor(step)](float x) { return by.short_quotient(x); };
        };
        best.encode<true>(six, head_scale, x, divide);
        other.encode<true>(four, head_scale, x, divide);
    } else if (Divisor::covers(head_scale)) {
        const auto divide = [](float step) {
            return [by = Divisor(step)](float x) { return by.quotient(x); };
        };
        best.encode<false>(six, head_scale, x, divide);
        other.encode<false>(four, head_scale, x, divide);
    } else {
        const auto divide = [](float step) {
            return [step](float x) { return step > 0.0f ? div_rn(x, step) : 0.0f; };
        };
        best.encode<false>(six, head_scale, x, divide);
        other.encode<false>(four, head_scale, x, divide);
    }
    if (other.loss < best.loss) best = other;
    if ((best.scale & Nvfp4Block::kNoSigns) == 0) {
KVC_UNROLL
        for (int j = 0; j < kOwn; ++j)
            best.codes.word[j / 8] |= (as_bits(x[j]) & 0x80000000u) >> (28 - j % 8 * 4);
    }
    scale = best.scale & 0xff;
    return best.codes;
}

// The lanes of a row: those with channels of their own, and all.
template <int HeadDim> constexpr uint32_t kChannelLanes = HeadDim / kOwn;
template <int HeadDim> constexpr uint32_t kRowLanes =
    HeadDim <= 64 ? 4 : HeadDim <= 128 ? 8 : HeadDim <= 256 ? 16 : 32;

// Whether a format can hold a row that lies in its lanes, and the bits of the scales that it is given.
struct RowScales {
    bool fits;
    uint32_t scale, minimum;
};
template <int HeadDim> KVC_DEVICE RowScales find_scales(uint32_t format, const float (&x)[kOwn]) {
    constexpr uint32_t kLanes = kRowLanes<HeadDim>, kRow = ~0u >> (32 - kLanes);
    const uint32_t sound = ballot(kFullMask, all_finite(x)) >> (lane_id() & ~(kLanes - 1));
    const auto larger = [](float a, float b) { return max_f32(a, b); };
    RowScales found = {(sound & kRow) == kRow, 0, 0};
    if (format == kInt8T) {
        found.scale = f16_up(div_rn(over_lanes<kLanes>(largest_of(x), larger), 127.0f));
    } else if (format == kInt4T) {
        float low = x[0], high = x[0];
KVC_UNROLL
        for (int j = 1; j < kOwn; ++j) {
            low = min_f32(low, x[j]);
            high = max_f32(high, x[j]);
        }
        low = over_lanes<kLanes>(low, [](float a, float b) { return min_f32(a, b); });
        high = over_lanes<kLanes>(high, larger);
        // Which zero a minimum or maximum of both is must not reach the bits.
        found.minimum = f16_down(add_rn(low, 0.0f));
        const float minimum = widen_f16(static_cast<uint16_t>(found.minimum));
        found.scale = f16_up(div_rn(add_rn(add_rn(high, 0.0f), -minimum), 15.0f));
    }
    found.fits = found.fits && is_finite_f16(found.scale) && is_finite_f16(found.minimum);
    return found;
}

// Writes a lane's channels from `channel` on of a row that fits.
KVC_DEVICE void write_codes(uint32_t format, const RowScales &found, float head_scale,
                            const float (&x)[kOwn], uint32_t channel, unsigned char *codes,
                            unsigned char *scales) {
    uint16_t *halves = reinterpret_cast<uint16_t *>(scales);
    const float scale = widen_f16(static_cast<uint16_t>(found.scale));
    if (format == kInt8T) {
        store_16(codes + channel, encode_int8(scale, x));
        if (channel == 0) halves[0] = static_cast<uint16_t>(found.scale);
    } else if (format == kInt4T) {
        *reinterpret_cast<TwoWords *>(codes + channel / 2) =
            encode_int4(widen_f16(static_cast<uint16_t>(found.minimum)), scale, x);
        if (channel == 0) {
            halves[0] = static_cast<uint16_t>(found.scale);
            halves[1] = static_cast<uint16_t>(found.minimum);
        }
    } else if (format == kNvfp4) {
        uint32_t block;
        *reinterpret_cast<TwoWords *>(codes + channel / 2) = encode_nvfp4(head_scale, x, block);
        scales[channel / kOwn] = static_cast<unsigned char>(block);
    } else {
        store_16(codes + channel, encode_fp8(format, head_scale, x));
    }
}

// Encodes a row that lies in its lanes and writes it where `write` is set; false where it cannot be.
template <int HeadDim>
KVC_DEVICE bool encode_row(uint32_t format, float head_scale, const float (&x)[kOwn], uint32_t channel,
                           unsigned char *codes, unsigned char *scales, bool write) {
    const RowScales found = find_scales<HeadDim>(format, x);
    if (found.fits && write) write_codes(format, found, head_scale, x, channel, codes, scales);
    return found.fits;
}

template <int HeadDim> KVC_DEVICE void append_token(const kvc_append_token_params &params) {
    const kvc_append_params &p = params.call;
    constexpr uint32_t kLanes = kRowLanes<HeadDim>, kRows = 32 / kLanes;
    const uint32_t first = block_x() * p.tokens_per_block, left = p.tokens - first;
    const uint32_t tokens = left < p.tokens_per_block ? left : p.tokens_per_block;
    const uint32_t per_token = 2 * p.kv_heads, rows = tokens * per_token;
    const uint32_t own_lane = lane_id() % kLanes;
    const bool spare = kChannelLanes<HeadDim> < kLanes && own_lane >= kChannelLanes<HeadDim>;
    const uint32_t channel = (spare ? own_lane - kChannelLanes<HeadDim> : own_lane) * kOwn;
KVC_ROLL
    for (uint32_t base = warp_id() * kRows; base < rows; base += kAppendThreads / 32 * kRows) {
        const uint32_t own = base + lane_id() / kLanes;
        const bool exists = own < rows;
        const uint32_t ahead = exists ? own / per_token : 0, token = first + ahead;
        const uint32_t which = exists ? own - ahead * per_token : 0;
        const bool is_key = which < p.kv_heads;
        const uint32_t head = is_key ? which : which - p.kv_heads;
        int64_t block;
        uint32_t place;
        bool wanted = find_slot(p, exists ? p.slots[token] : -1, channel == 0, block, place);
        const uint32_t position = wanted && p.cosines != nullptr ? p.positions[token] : 0;
        if (wanted && p.cosines != nullptr && position >= p.rope_positions) {
            if (channel == 0) raise(p.error_flag, kFlagPosition);
            wanted = false;
        }
        float x[kOwn] = {};
        if (wanted) {
            const int64_t row = is_key ? token * p.k_token + head * p.k_head
                                       : token * p.v_token + head * p.v_head;
            load_own(is_key ? p.k : p.v, row + channel, p.row_dtype, x);
            if (is_key && p.cosines != nullptr) turn_own(p, row, channel, position, x);
        }
        // Rows of a warp are rotated if any is: what is not meant to be stays as it was.
        const bool rotated = params.format == kInt4T || (is_key && params.k_rotated != 0);
        if (ballot(kFullMask, rotated) != 0) {
            float y[kOwn];
            for (int j = 0; j < kOwn; ++j) y[j] = x[j];
            rotate_channels<HeadDim>(y, channel);
            for (int j = 0; j < kOwn; ++j) x[j] = rotated ? y[j] : x[j];
        }
        unsigned char *codes = static_cast<unsigned char *>(is_key ? p.k_cache : p.v_cache);
        unsigned char *scales =
            static_cast<unsigned char *>(is_key ? params.k_scales : params.v_scales);
        if (wanted) {
            codes += is_key ? block * p.k_cache_block + head * p.k_cache_head + place * p.k_cache_token
                            : block * p.v_cache_block + head * p.v_cache_head + place * p.v_cache_token;
            scales += is_key ? block * params.k_scale_block + head * params.k_scale_head +
                                   place * params.k_scale_token
                             : block * params.v_scale_block + head * params.v_scale_head +
                                   place * params.v_scale_token;
        }
        const float *heads = is_key ? params.k_heads : params.v_heads;
        const bool fits = encode_row<HeadDim>(params.format, heads == nullptr ? 1.0f : heads[head], x,
                                              channel, codes, scales, wanted && !spare);
        if (wanted && !fits && channel == 0) raise(p.error_flag, kFlagRow);
        // Codes of 4 bits of 80 channels end in the middle of 16 bytes: the first lane that is over has
        // the rest, which is zero.
        if constexpr (HeadDim % 32 != 0)
            if (wanted && fits && own_lane == kChannelLanes<HeadDim> &&
                (params.format == kInt4T || params.format == kNvfp4))
                *reinterpret_cast<TwoWords *>(codes + HeadDim / 2) = {};
    }
    if (p.q_heads != 0) turn_queries(p);
}

} // namespace kvc

#define KVC_APPEND_TOKEN(dim)                                                            \
    KVC_KERNEL(kvc_append_token_d##dim, kvc_append_token_params, 256, 3) {               \
        kvc::append_token<dim>(p);                                                       \
    }
