// LSE merge: attention over disjoint sets of keys, each normalised, into attention over all.
//
//   out = sum_i w_i o_i / sum_i w_i,   w_i = e^(lse_i - top),   lse = top + ln sum_i w_i
//
// A thread makes eight channels of one row and head, and reads the LSE of all parts itself: they
// come from L1 for all but the first of the threads that share them. Parts are summed in their
// order. A part whose weight is 0 is not read: a part that saw no key may hold anything.
#pragma once
#include "kvc_params.h"
#include "num.cuh"

namespace kvc {

constexpr uint32_t kMergeThreads = 256, kMergeAhead = 2;

// Eight channels of a part as they lie in memory: of 32 bits where `Wide`, else of 16.
template <bool Wide> struct Packed {
    Vec16 v[Wide ? 2 : 1];
};
template <bool Wide>
KVC_DEVICE Packed<Wide> load_part(const kvc_merge_params &p, uint32_t part, int64_t from) {
    const char *at =
        static_cast<const char *>(p.parts) + (part * p.part + from) * (Wide ? 4 : 2);
    Packed<Wide> packed;
    packed.v[0] = load_stream(at);
    if (Wide) packed.v[Wide ? 1 : 0] = load_stream(at + 16);
    return packed;
}
template <bool Wide>
KVC_DEVICE void add_part(Chunk &sum, float weight, const Packed<Wide> &part, uint32_t dtype) {
KVC_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (Wide) {
            sum.x[i] += weight * as_float(part.v[0].word[i]);
            sum.x[4 + i] += weight * as_float(part.v[Wide ? 1 : 0].word[i]);
        } else {
            const uint32_t word = part.v[0].word[i];
            sum.x[2 * i] += weight * widen(static_cast<uint16_t>(word), dtype);
            sum.x[2 * i + 1] += weight * widen(static_cast<uint16_t>(word >> 16), dtype);
        }
    }
}

template <bool Wide> KVC_DEVICE void merge_chunk(const kvc_merge_params &p, uint32_t item) {
    const uint32_t chunks = p.dim / 8;
    const uint32_t channel = item % chunks * 8, rows = item / chunks;
    const uint32_t head = rows % p.heads, row = rows / p.heads;
    const float *lse = p.lse + row * p.lse_row + head * p.lse_head;
    const int64_t from = row * p.row + head * p.head + channel;

    float top = -infinity();
    for (uint32_t i = 0; i < p.count; ++i) top = max_f32(top, lse[i * p.lse_part]);
    const bool empty = top == -infinity();
    // A row that saw no key gives zeros and -inf, with or without a sink.
    float sum = 0.0f;
    if (p.sinks != nullptr && !empty) {
        const float sink = p.sinks[head];
        top = max_f32(top, sink);
        sum = exp2_approx((sink - top) * kLog2e);
    }
    Chunk merged = {};
    for (uint32_t first = 0; first < p.count && !empty; first += kMergeAhead) {
        float weights[kMergeAhead];
        bool all = true;
KVC_UNROLL
        for (uint32_t i = 0; i < kMergeAhead; ++i) {
            const uint32_t part = first + i;
            const float x = part < p.count ? lse[part * p.lse_part] : -infinity();
            weights[i] = exp2_approx((x - top) * kLog2e);
            all = all && weights[i] != 0.0f;
        }
        if (all) {
            // All loads are under way before the first is used.
            Packed<Wide> parts[kMergeAhead];
KVC_UNROLL
            for (uint32_t i = 0; i < kMergeAhead; ++i)
                parts[i] = load_part<Wide>(p, first + i, from);
KVC_UNROLL
            for (uint32_t i = 0; i < kMergeAhead; ++i) {
                sum += weights[i];
                add_part<Wide>(merged, weights[i], parts[i], p.part_dtype);
            }
        } else {
KVC_UNROLL
            for (uint32_t i = 0; i < kMergeAhead; ++i) {
                if (weights[i] == 0.0f) continue;
                sum += weights[i];
                const Packed<Wide> part = load_part<Wide>(p, first + i, from);
                add_part<Wide>(merged, weights[i], part, p.part_dtype);
            }
        }
    }
    const float factor = empty ? 0.0f : 1.0f / sum;
    for (int j = 0; j < 8; ++j) merged.x[j] *= factor;
    store_chunk(p.out, row * p.out_row + head * p.out_head + channel, p.out_dtype, merged);
    if (channel == 0 && p.out_lse != nullptr)
        p.out_lse[row * p.out_lse_row + head * p.out_lse_head] =
            empty ? -infinity() : top + kLn2 * log2_approx(sum);
}

KVC_DEVICE void merge(const kvc_merge_params &p) {
    const uint64_t items = static_cast<uint64_t>(p.rows) * p.heads * (p.dim / 8);
    const uint64_t step = static_cast<uint64_t>(grid_x()) * kMergeThreads;
    for (uint64_t i = block_x() * kMergeThreads + thread_x(); i < items; i += step) {
        if (p.part_dtype == kF32)
            merge_chunk<true>(p, static_cast<uint32_t>(i));
        else
            merge_chunk<false>(p, static_cast<uint32_t>(i));
    }
}

} // namespace kvc
