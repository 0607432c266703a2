// How the sums of a decode unit's four warps become output rows: merged in shared memory, rotated
// back where values are stored rotated, and written, or stored as a partial result that the last
// block to arrive merges with the others (split.cuh). It knows nothing of how they were made.
#pragma once
#include "decode_unit.cuh"
#include "hadamard.cuh"

namespace kvc {

constexpr uint32_t kDecodeWarps = 4, kDecodeThreads = 128;

KVC_DEVICE float max_over_tokens(float x) {
    x = max_f32(x, shfl_xor(kFullMask, x, 4));
    x = max_f32(x, shfl_xor(kFullMask, x, 8));
    return max_f32(x, shfl_xor(kFullMask, x, 16));
}
KVC_DEVICE float sum_over_tokens(float x) {
    x += shfl_xor(kFullMask, x, 4);
    x += shfl_xor(kFullMask, x, 8);
    return x + shfl_xor(kFullMask, x, 16);
}

// The warps' states side by side, from the beginning of shared memory: channels of a column
// together, columns four words apart.
template <int HeadDim> struct WarpSums {
    static constexpr uint32_t kColumnWords = HeadDim + 4;
    float *states, *tops, *sums;

    KVC_DEVICE WarpSums()
        : states(KVC_SMEM(float)), tops(states + kDecodeWarps * kColumns * kColumnWords),
          sums(tops + kDecodeWarps * kColumns) {}
};

// Puts a warp's sums there. Lane 4g+t has columns 2t and 2t+1: `value(i, half, c, channel)` gives
// row g + 8 half of its i-th matrix for column 2t + c, and the channel that this is, or what is none.
// Barriers before and after are the caller's, and `finish_unit`'s.
template <int HeadDim, int Matrices = HeadDim / 16, typename Value>
KVC_DEVICE void put_warp_sums(const float (&m)[2], const float (&l)[2], Value value) {
    const WarpSums<HeadDim> to;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
KVC_UNROLL
    for (int c = 0; c < 2; ++c) {
        const float sum = sum_over_tokens(l[c]);
        const uint32_t at = warp_id() * kColumns + 2 * t + c;
        if (g == 0) {
            to.tops[at] = m[c];
            to.sums[at] = sum;
        }
KVC_UNROLL
        for (int i = 0; i < Matrices; ++i)
            for (int half = 0; half < 2; ++half) {
                uint32_t channel;
                const float x = value(i, half, c, channel);
                if (Matrices * 16 > HeadDim && channel >= HeadDim) continue;
                to.states[at * to.kColumnWords + channel] = x;
            }
    }
}

// Merges what the warps have put there, and writes or stores it, `Own` channels a thread: kRotatedOwn
// where values can be `rotated`.
template <int HeadDim, int Own = 4>
KVC_DEVICE void finish_unit(const kvc_decode_params &p, const Piece &item, uint32_t unit,
                            const Unit &u, bool rotated) {
    const WarpSums<HeadDim> from;
    const Place place(p, item);
    sync_threads();
    constexpr uint32_t kQuads = HeadDim / 4, kParts = HeadDim / Own;
    const Partials<kColumns, HeadDim> partials = {p.partial, p.max_slots, p.units};
    for (uint32_t i = thread_x(); i < kColumns * kParts; i += kDecodeThreads) {
        const uint32_t c = i / kParts, first = i % kParts * Own;
        const Column column = find_column(p, u, c);
        if (!column.exists && !rotated) continue;
        float top = -infinity(), sum = 0.0f, o[Own] = {};
        for (uint32_t w = 0; w < kDecodeWarps; ++w)
            top = max_f32(top, from.tops[w * kColumns + c]);
        for (uint32_t w = 0; w < kDecodeWarps; ++w) {
            const uint32_t at = w * kColumns + c;
            const float factor = weight(from.tops[at], top);
            sum += from.sums[at] * factor;
            for (int j = 0; j < Own; ++j)
                o[j] += from.states[at * from.kColumnWords + first + j] * factor;
        }
        // All lanes take part: warps are whole, and of a column that is not there too.
        static_assert(kColumns * kParts % 32 == 0, "whole warps");
        if constexpr (hadamard_block(HeadDim) <= 32 * Own)
            if (rotated) unrotate_channels<HeadDim>(o, first);
        if (!column.exists) continue;
KVC_UNROLL
        for (int j = 0; j < Own; j += 4) {
            const uint32_t channel = first + j;
            const Quad quad = {top, sum, {o[j], o[j + 1], o[j + 2], o[j + 3]}};
            if (place.pieces == 1)
                write_row(p, column, channel, quad);
            else
                store_partial(partials, place.slot(place.piece), unit, c, channel, quad);
        }
    }
    if (place.pieces == 1) return;

    uint32_t *ticket = p.tickets + static_cast<int64_t>(place.first) * p.units + unit;
    if (!last_to_arrive(ticket, place.pieces, KVC_SMEM(uint32_t))) return;
    for (uint32_t i = thread_x(); i < kColumns * kQuads; i += kDecodeThreads) {
        const uint32_t c = i / kQuads, channel = i % kQuads * 4;
        const Column column = find_column(p, u, c);
        if (column.exists)
            write_row(p, column, channel,
                      merge_partials(partials, place, unit, c, channel));
    }
}

} // namespace kvc
