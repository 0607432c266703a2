// Number formats: the types of cache elements, rows whose type is known at run time, and the
// functions of softmax in powers of two. The type ids are those of src/dtype.
#pragma once
#include "ptx.cuh"

namespace kvc {

constexpr uint32_t kF32 = 1, kF16 = 2, kBf16 = 3;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

#ifdef KVC_EMULATE
KVC_DEVICE float infinity() { return HUGE_VALF; }
KVC_DEVICE float max_f32(float a, float b) { return fmaxf(a, b); }
#else
KVC_DEVICE float infinity() { return __int_as_float(0x7f800000); }
KVC_DEVICE float max_f32(float a, float b) { return fmaxf(a, b); }
#endif

KVC_DEVICE uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }
KVC_DEVICE uint32_t min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }
// `x / by`, where that is most often a power of two and the same for all threads.
KVC_DEVICE uint32_t quotient_of(uint32_t x, uint32_t by) {
    return (by & (by - 1)) == 0 ? x >> find_first(by) : x / by;
}

// The formats of a cache that the matrix instructions take.
struct F16 {
    static constexpr uint32_t id = kF16;
    KVC_DEVICE static uint32_t pack(float low, float high) { return pack_f16(low, high); }
    KVC_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4],
                               const uint32_t (&b)[2] KVC_SITE) {
        mma_f16(c, a, b KVC_PASS_SITE);
    }
};
struct Bf16 {
    static constexpr uint32_t id = kBf16;
    KVC_DEVICE static uint32_t pack(float low, float high) { return pack_bf16(low, high); }
    KVC_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4],
                               const uint32_t (&b)[2] KVC_SITE) {
        mma_bf16(c, a, b KVC_PASS_SITE);
    }
};

KVC_DEVICE float widen(uint16_t bits, uint32_t dtype) {
    return dtype == kF16 ? widen_f16(bits) : as_float(static_cast<uint32_t>(bits) << 16);
}
KVC_DEVICE uint32_t pack(float low, float high, uint32_t dtype) {
    return dtype == kF16 ? pack_f16(low, high) : pack_bf16(low, high);
}
KVC_DEVICE int64_t element_bytes(uint32_t dtype) { return dtype == kF32 ? 4 : 2; }

// The address of an element of `rows`.
KVC_DEVICE const char *element(const void *rows, int64_t index, uint32_t dtype) {
    return static_cast<const char *>(rows) + index * element_bytes(dtype);
}
KVC_DEVICE char *element(void *rows, int64_t index, uint32_t dtype) {
    return static_cast<char *>(rows) + index * element_bytes(dtype);
}

KVC_DEVICE float load_element(const void *rows, int64_t index, uint32_t dtype) {
    const char *at = element(rows, index, dtype);
    if (dtype == kF32) return *reinterpret_cast<const float *>(at);
    return widen(*reinterpret_cast<const uint16_t *>(at), dtype);
}

KVC_DEVICE void store_element(void *rows, int64_t index, uint32_t dtype, float x) {
    char *at = element(rows, index, dtype);
    if (dtype == kF32) {
        *reinterpret_cast<float *>(at) = x;
    } else {
        *reinterpret_cast<uint16_t *>(at) = static_cast<uint16_t>(pack(x, 0.0f, dtype));
    }
}

// Eight elements; 16-bit ones lie in 16 aligned bytes, 32-bit ones in 32.
struct Chunk {
    float x[8];
};

KVC_DEVICE Chunk load_chunk(const void *rows, int64_t index, uint32_t dtype KVC_SITE) {
    const char *at = element(rows, index, dtype);
    Chunk c;
    const Vec16 v = load_stream(at KVC_PASS_SITE);
    if (dtype == kF32) {
        const Vec16 w = load_stream(at + 16 KVC_PASS_SITE);
        for (int i = 0; i < 4; ++i) {
            c.x[i] = as_float(v.word[i]);
            c.x[4 + i] = as_float(w.word[i]);
        }
        return c;
    }
    for (int i = 0; i < 4; ++i) {
        c.x[2 * i] = widen(static_cast<uint16_t>(v.word[i]), dtype);
        c.x[2 * i + 1] = widen(static_cast<uint16_t>(v.word[i] >> 16), dtype);
    }
    return c;
}

KVC_DEVICE void store_chunk(void *rows, int64_t index, uint32_t dtype, const Chunk &c KVC_SITE) {
    char *at = element(rows, index, dtype);
    Vec16 v;
    if (dtype == kF32) {
        Vec16 w;
        for (int i = 0; i < 4; ++i) {
            v.word[i] = as_bits(c.x[i]);
            w.word[i] = as_bits(c.x[4 + i]);
        }
        store_16(at, v KVC_PASS_SITE);
        store_16(at + 16, w KVC_PASS_SITE);
        return;
    }
    for (int i = 0; i < 4; ++i) v.word[i] = pack(c.x[2 * i], c.x[2 * i + 1], dtype);
    store_16(at, v KVC_PASS_SITE);
}

// Four neighbouring elements from a multiple of four, of rows that begin at multiples of 16 bytes.
struct alignas(8) TwoWords {
    uint32_t word[2];
};
KVC_DEVICE void load_quad(const void *rows, int64_t index, uint32_t dtype, float (&x)[4]) {
    const char *at = element(rows, index, dtype);
    if (dtype == kF32) {
        const Vec16 v = load_stream(at);
        for (int i = 0; i < 4; ++i) x[i] = as_float(v.word[i]);
        return;
    }
    const TwoWords v = *reinterpret_cast<const TwoWords *>(at);
    for (int i = 0; i < 4; ++i)
        x[i] = widen(static_cast<uint16_t>(v.word[i / 2] >> i % 2 * 16), dtype);
}

// Two neighbouring elements, the first at an even index, rounded to T and packed.
template <typename T>
KVC_DEVICE uint32_t load_pair(const void *rows, int64_t index, uint32_t dtype) {
    const char *at = element(rows, index, dtype);
    if (dtype == T::id) return *reinterpret_cast<const uint32_t *>(at);
    return T::pack(load_element(rows, index, dtype), load_element(rows, index + 1, dtype));
}

// Four neighbouring elements from a multiple of four.
KVC_DEVICE void store_four(void *rows, int64_t index, uint32_t dtype, const float (&x)[4]) {
    char *at = element(rows, index, dtype);
    if (dtype == kF32) {
        for (int i = 0; i < 4; ++i) reinterpret_cast<float *>(at)[i] = x[i];
        return;
    }
    reinterpret_cast<uint32_t *>(at)[0] = pack(x[0], x[1], dtype);
    reinterpret_cast<uint32_t *>(at)[1] = pack(x[2], x[3], dtype);
}

// Absolute error near 1e-7, which a soft-cap of 50 makes 5e-6.
KVC_DEVICE float tanh_approx(float x) {
    return 1.0f - 2.0f * rcp_approx(exp2_approx(2.0f * kLog2e * x) + 1.0f);
}

} // namespace kvc
