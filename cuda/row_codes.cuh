// Rows of codes in registers, as src/quant/row.rs encodes them, bit for bit: one rounding an operation,
// nothing contracted. A lane has sixteen channels of a row, a block of NVFP4; largest elements go by
// shuffles of few lanes, a power of two.
#pragma once
#include "num.cuh"

namespace kvc {

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
// NaN where one is.
KVC_DEVICE float min_nan_f32(float a, float b) { return -max_nan_f32(-a, -b); }

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
};
// The same of any divisor: with what the inverse lacks the first quotient is within one last place of
// the true one, and what that leaves then corrects it (Markstein). Of elements below 2^-100 only the
// sign is sure, and that they are not 0.
struct LongDivisor : Divisor {
    float rest;
    KVC_DEVICE explicit LongDivisor(float divisor)
        : Divisor(divisor), rest(mul_rn(fma_rn(-inverse, divisor, 1.0f), inverse)) {}
    KVC_DEVICE float quotient(float x) const {
        const float near = fma_rn(x, inverse, mul_rn(x, rest));
        return fma_rn(fma_rn(-near, by, x), inverse, near);
    }
};

// The integer nearest to `x`, even where two are, in the last bits of a float: as they are up to 2^22,
// in two's complement below 0.
constexpr uint32_t kInteger = 0x4b400000u; // 1.5 * 2^23
KVC_DEVICE uint32_t integer_bits(float x) { return as_bits(add_rn(x, as_float(kInteger))); }
// The last bytes of four words, and the last halves of two.
KVC_DEVICE uint32_t last_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return permute(permute(a, b, 0x0040), permute(c, d, 0x0040), 0x5410);
}
KVC_DEVICE uint32_t last_halves(uint32_t a, uint32_t b) { return permute(a, b, 0x5410); }

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

// Whether all of a lane's channels are finite.
KVC_DEVICE bool all_finite(const float (&x)[kOwn]) {
    float zero[2] = {0.0f, 0.0f};
KVC_UNROLL
    for (int j = 0; j < kOwn; ++j) zero[j % 2] = fma_rn(x[j], 0.0f, zero[j % 2]);
    return add_rn(zero[0], zero[1]) == 0.0f;
}

KVC_DEVICE float magnitude(float x) { return as_float(as_bits(x) & 0x7fffffffu); }

// The largest magnitude, NaN where an element is.
KVC_DEVICE float largest_of(const float (&x)[kOwn]) {
    float top[2] = {0.0f, 0.0f};
KVC_UNROLL
    for (int j = 0; j < kOwn; ++j) top[j % 2] = max_nan_f32(top[j % 2], magnitude(x[j]));
    return max_nan_f32(top[0], top[1]);
}

// Four floats as bytes of an FP8 format.
template <uint32_t Format> KVC_DEVICE uint32_t fp8_word(float a, float b, float c, float d) {
#if !defined(KVC_EMULATE) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return Format == kFp8E4m3 ? permute(pack_e4m3(a, b), pack_e4m3(c, d), 0x5410)
                              : permute(pack_e5m2(a, b), pack_e5m2(c, d), 0x5410);
#else
    const float x[4] = {a, b, c, d};
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j)
        word |= (Format == kFp8E4m3 ? E4m3Code::encode(x[j]) : E5m2Code::encode(x[j])) << 8 * j;
    return word;
#endif
}
template <uint32_t Format> KVC_DEVICE Vec16 fp8_words(const float (&x)[kOwn]) {
    Vec16 codes;
KVC_UNROLL
    for (int i = 0; i < 4; ++i)
        codes.word[i] = fp8_word<Format>(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    return codes;
}

KVC_DEVICE Vec16 encode_fp8(uint32_t format, float head_scale, float (&x)[kOwn]) {
    if (head_scale != 1.0f) {
        if (Divisor::covers(head_scale) && largest_of(x) < 0x1p80f) {
            const LongDivisor scale(head_scale);
KVC_UNROLL
            for (int j = 0; j < kOwn; ++j)
                x[j] = as_float((as_bits(scale.quotient(x[j])) & 0x7fffffffu) |
                                (as_bits(x[j]) & 0x80000000u));
        } else {
KVC_UNROLL
            for (int j = 0; j < kOwn; ++j) x[j] = div_rn(x[j], head_scale);
        }
    }
    return format == kFp8E4m3 ? fp8_words<kFp8E4m3>(x) : fp8_words<kFp8E5m2>(x);
}

// No code leaves -127 to 127: the scale is rounded up.
KVC_DEVICE Vec16 encode_int8(float scale, const float (&x)[kOwn]) {
    const Divisor step(scale);
    Vec16 codes;
KVC_UNROLL
    for (int i = 0; i < 4; ++i) {
        uint32_t code[4];
        for (int j = 0; j < 4; ++j) code[j] = integer_bits(step.short_quotient(x[4 * i + j]));
        codes.word[i] = last_bytes(code[0], code[1], code[2], code[3]);
    }
    return codes;
}

// Nor one 0 to 15. Of 8 codes even ones come first.
KVC_DEVICE TwoWords encode_int4(float minimum, float scale, const float (&x)[kOwn]) {
    const Divisor step(scale);
    TwoWords codes;
KVC_UNROLL
    for (int i = 0; i < 2; ++i) {
        codes.word[i] = 0;
KVC_UNROLL
        for (int j = 0; j < 8; j += 2) {
            const float a = add_rn(x[8 * i + j], -minimum), b = add_rn(x[8 * i + j + 1], -minimum);
            codes.word[i] += last_halves(integer_bits(step.short_quotient(a)),
                                         integer_bits(step.short_quotient(b)))
                             << 2 * j;
        }
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
            const float size = magnitude(x[j]), y = by(size);
            // Half the value's power of two, of at least 1, is the unit that a sum with this ends in.
            const float unit = max_f32(as_float(as_bits(y) & 0x7f800000u), 1.0f);
            const float sum = fma_rn(unit, 0x1.8p22f, y);
            const float value = min_f32(fma_rn(unit, -0x1.8p22f, sum), 6.0f);
            const float error = Exact ? fma_rn(value, -step, size)
                                      : add_rn(size, -mul_rn(value, step));
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
            return [by = LongDivisor(step)](float x) { return by.quotient(x); };
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

} // namespace kvc
