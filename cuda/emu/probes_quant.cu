// A kernel that shows the dequantisation of quant.cuh, words of codes to pairs of f16, and the quotients of
// row_codes.cuh. It can run on a GPU too.
#include "../quant.cuh"
#include "../row_codes.cuh"
#include "probe.hpp"

using namespace kvc;

// Writes the pairs of each word of the input, then the value of 1 / kFactor as bits of f32.
template <typename Codes, typename F> KVC_DEVICE void show(const kvc_probe_params &p, F unpack) {
    for (uint32_t i = thread_x(); i < p.n; i += block_threads()) {
        uint32_t pairs[Codes::kPairs];
        unpack(i, pairs);
        for (uint32_t j = 0; j < Codes::kPairs; ++j) p.out[i * Codes::kPairs + j] = pairs[j];
    }
    if (thread_x() == 0) p.out[p.n * Codes::kPairs] = as_bits(Codes::kFactor);
}
// Pair by pair what the small form says, from `zero` on.
template <typename Codes>
KVC_DEVICE void whole(uint32_t (&pairs)[Codes::kPairs], uint32_t zero = 0) {
    for (uint32_t j = 0; j < Codes::kPairs; ++j) {
        // By 2^(24 - place), in two steps for the range of f16.
        const uint32_t up = mul_f16x2(pairs[j], twice(0x7400));
        pairs[j] = sub_f16x2(mul_f16x2(up, twice(0x6400 - Codes::place(j) * 0x400)), zero);
    }
}

// The quotient of each pair of floats of the input.
template <typename F> KVC_DEVICE void divide(const kvc_probe_params &p, F quotient) {
    for (uint32_t i = thread_x(); i < p.n; i += block_threads())
        p.out[i] = as_bits(quotient(as_float(p.in[2 * i]), as_float(p.in[2 * i + 1])));
}

KVC_KERNEL(kvc_probe_quant, kvc_probe_params, 32, 1) {
    const uint32_t *in = p.in;
    switch (p.mode) {
    case 0: show<E4m3>(p, [&](uint32_t i, uint32_t (&out)[2]) { E4m3::unpack(in[i], out); }); break;
    case 1:
        show<E4m3Bits>(p, [&](uint32_t i, uint32_t (&out)[2]) { E4m3Bits::unpack(in[i], out); });
        break;
    case 2: show<E5m2>(p, [&](uint32_t i, uint32_t (&out)[2]) { E5m2::unpack(in[i], out); }); break;
    case 3: show<Int8>(p, [&](uint32_t i, uint32_t (&out)[2]) { Int8::unpack(in[i], out); }); break;
    case 4:
        show<Nibbles>(p, [&](uint32_t i, uint32_t (&out)[4]) { Nibbles::unpack(in[i], out); });
        break;
    case 5: show<E2m1>(p, [&](uint32_t i, uint32_t (&out)[4]) { E2m1::unpack(in[i], out); }); break;
    case 6:
        show<Twos>(p, [&](uint32_t i, uint32_t (&out)[8]) {
            Twos::small(in[i], out);
            whole<Twos>(out);
        });
        break;
    case 7: // two words of low bits and one of third bits, in turn
        show<Threes>(p, [&](uint32_t i, uint32_t (&out)[8]) {
            Threes::small(in[i / 2 * 3 + i % 2], in[i / 2 * 3 + 2] >> 8 * (i % 2), out);
            whole<Threes>(out);
        });
        break;
    case 8:
        show<Bytes<false>>(p, [&](uint32_t i, uint32_t (&out)[2]) {
            Bytes<false>::small(in[i], out);
            whole<Bytes<false>>(out);
        });
        break;
    case 9: show<E4m3>(p, [&](uint32_t i, uint32_t (&out)[2]) { E4m3::rows(in[i], out); }); break;
    case 10: show<E5m2>(p, [&](uint32_t i, uint32_t (&out)[2]) { E5m2::rows(in[i], out); }); break;
    case 11: show<Int8>(p, [&](uint32_t i, uint32_t (&out)[2]) { Int8::rows(in[i], out); }); break;
    case 13:
        show<Nibbles>(p, [&](uint32_t i, uint32_t (&out)[4]) {
            Nibbles::small(in[i], out);
            whole<Nibbles>(out);
        });
        break;
    case 14:
        show<Int8>(p, [&](uint32_t i, uint32_t (&out)[2]) {
            Int8::small(in[i], out);
            whole<Int8>(out, twice(0x5800));
        });
        break;
    case 15: divide(p, [](float x, float by) { return Divisor(by).short_quotient(x); }); break;
    case 16: divide(p, [](float x, float by) { return LongDivisor(by).quotient(x); }); break;
    default:
        show<E4m3Bits>(p, [&](uint32_t i, uint32_t (&out)[2]) { E4m3Bits::rows(in[i], out); });
        break;
    }
}
