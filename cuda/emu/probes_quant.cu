// A kernel that shows the dequantisation of quant.cuh: words of codes to pairs of f16. It can run on
// a GPU too.
#include "../quant.cuh"
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
// Pair by pair what the biased form says less its bias.
template <typename Codes> KVC_DEVICE void unbiased(uint32_t (&pairs)[Codes::kPairs]) {
    for (uint32_t j = 0; j < Codes::kPairs; ++j)
        pairs[j] = sub_f16x2(pairs[j], Codes::bias(j));
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
    case 6: show<Twos>(p, [&](uint32_t i, uint32_t (&out)[8]) { Twos::unpack(in[i], out); }); break;
    case 7: // two words of low bits and one of third bits, in turn
        show<Threes>(p, [&](uint32_t i, uint32_t (&out)[8]) {
            Threes::unpack(in[i / 2 * 3 + i % 2], in[i / 2 * 3 + 2] >> 8 * (i % 2), out);
        });
        break;
    case 8:
        show<Bytes<false>>(p, [&](uint32_t i, uint32_t (&out)[2]) {
            Bytes<false>::biased(in[i], out);
            unbiased<Bytes<false>>(out);
        });
        break;
    case 9: show<E4m3>(p, [&](uint32_t i, uint32_t (&out)[2]) { E4m3::rows(in[i], out); }); break;
    case 10: show<E5m2>(p, [&](uint32_t i, uint32_t (&out)[2]) { E5m2::rows(in[i], out); }); break;
    case 11: show<Int8>(p, [&](uint32_t i, uint32_t (&out)[2]) { Int8::rows(in[i], out); }); break;
    default:
        show<E4m3Bits>(p, [&](uint32_t i, uint32_t (&out)[2]) { E4m3Bits::rows(in[i], out); });
        break;
    }
}
