// The queries of a decode unit as kernels over codes want them: rotated where keys are stored
// rotated, scaled by a power of two so that they use the range of f16, and rounded to it, a row of
// shared memory for each column. The factor that undoes the scaling goes to the scores, with theirs.
#pragma once
#include "decode_unit.cuh"
#include "hadamard.cuh"

namespace kvc {

// The power of two that brings `x` into [1, 2); 1 for what has none.
KVC_DEVICE uint32_t exponent_of(float x) {
    const uint32_t field = as_bits(x) >> 23 & 0xff;
    return field == 0 || field == 255 ? 127 : field < 253 ? field : 253;
}

// Two elements of a row of halves.
template <uint32_t Low, uint32_t High> KVC_DEVICE uint32_t pair_of(const uint16_t *row) {
    if constexpr (Low % 2 == 0 && High == Low + 1)
        return *reinterpret_cast<const uint32_t *>(row + Low);
    return row[Low] | static_cast<uint32_t>(row[High]) << 16;
}

template <int HeadDim> struct QueryRows {
    // Whole chunks of codes of 4 bits: what they have more than a row is zero.
    static constexpr uint32_t kChannels = (HeadDim + 31) / 32 * 32;
    static constexpr uint32_t kRow = kChannels + 8; // halves, so that rows begin on other banks
    static constexpr uint32_t kBytes = kColumns * (kRow * 2 + 8);
    uint16_t *rows;
    float *factors; // of each column: undoes its scaling, and makes dot products what make_scores takes
    float *sums;    // of each column's rounded elements

    KVC_DEVICE explicit QueryRows(unsigned char *at)
        : rows(reinterpret_cast<uint16_t *>(at)),
          factors(reinterpret_cast<float *>(at + kColumns * kRow * 2)), sums(factors + kColumns) {}

    // The lanes that share a row, and the channels of one: a warp has one row or whole ones. Where
    // four channels a lane do not make it so it has one, and lanes behind its end.
    static constexpr uint32_t kOwn = 32 % (HeadDim / 4) == 0 ? 4 : 8;
    static constexpr uint32_t kLanes = kOwn == 4 ? HeadDim / 4 : 32;
    static_assert(kLanes * kOwn >= kChannels, "a row lies within a warp");

    // The greatest of, or the sum over, the lanes that share a row.
    template <typename F> KVC_DEVICE static float over_row(float x, F join) {
KVC_UNROLL
        for (uint32_t by = 1; by < kLanes; by *= 2)
            x = join(x, shfl_xor(kFullMask, x, by));
        return x;
    }

    // All threads of the block call it, between barriers. `Positive`: no factor is below 0, as the rows
    // have the sign of a scale that is.
    template <bool Positive = false>
    KVC_DEVICE void fill(const kvc_decode_params &p, const Unit &u, bool rotated) const {
        for (uint32_t i = thread_x(); i < kColumns * kLanes; i += 128) {
            const uint32_t c = i / kLanes, channel = i % kLanes * kOwn;
            const Column column = find_column(p, u, c);
            float x[kOwn] = {};
            if (column.exists && (kLanes * kOwn == HeadDim || channel < HeadDim)) {
                const int64_t at = column.row * p.q_row + column.head * p.q_head + channel;
                for (uint32_t j = 0; j < kOwn; ++j) x[j] = load_element(p.q, at + j, p.q_dtype);
            }
            if (rotated) rotate_channels<HeadDim>(x, channel);
            float top = 0.0f;
            for (uint32_t j = 0; j < kOwn; ++j)
                top = max_f32(top, as_float(as_bits(x[j]) & 0x7fffffffu));
            top = over_row(top, [](float a, float b) { return max_f32(a, b); });
            const uint32_t exponent = exponent_of(top);
            uint32_t sign = 0;
            if constexpr (Positive) sign = as_bits(score_factor(p)) & 0x80000000u;
            const float down = as_float((254 - exponent) << 23 | sign);
            uint32_t pairs[kOwn / 2];
            for (uint32_t j = 0; j < kOwn / 2; ++j)
                pairs[j] = pack_f16(x[2 * j] * down, x[2 * j + 1] * down);
            float sum = 0.0f;
            for (uint32_t j = 0; j < kOwn / 2; ++j)
                sum += widen_f16(static_cast<uint16_t>(pairs[j / 2 * 2] >> 16 * (j % 2))) +
                       widen_f16(static_cast<uint16_t>(pairs[j / 2 * 2 + 1] >> 16 * (j % 2)));
            sum = over_row(sum, [](float a, float b) { return a + b; });
            if (kLanes * kOwn > kChannels && channel >= kChannels) continue;
            uint32_t *to = reinterpret_cast<uint32_t *>(rows + c * kRow + channel);
            for (uint32_t j = 0; j < kOwn / 2; ++j) to[j] = pairs[j];
            if (channel == 0) {
                factors[c] = as_float(exponent << 23 | sign) * score_factor(p);
                sums[c] = sum;
            }
        }
    }

    // The elements of channels `first + low` and `first + high` of a column.
    template <uint32_t Low, uint32_t High>
    KVC_DEVICE uint32_t pair(uint32_t column, uint32_t first) const {
        return pair_of<Low, High>(rows + column * kRow + first);
    }
};

// How lane `t` of four takes its words of a row of codes, the same in every row, so that the four
// have all words between them: in runs of up to `LongestRun` words, of which four are one load, and one
// is what a matrix load gives.
template <typename Codes, int HeadDim, uint32_t LongestRun = 4> struct RowWords {
    static constexpr uint32_t kBytes = (HeadDim * Codes::kBits + 127) / 128 * 16; // of a row
    static constexpr uint32_t kWords = kBytes / 16;                               // of a lane
    static constexpr uint32_t kRun = kWords < LongestRun ? kWords : LongestRun, kRuns = kWords / kRun;
    static constexpr uint32_t kPerWord = 32 / Codes::kBits;
    static_assert(kWords % kRun == 0, "whole runs");

    // The word of the row that is this lane's `w`-th of run `j`.
    KVC_DEVICE static constexpr uint32_t word(uint32_t t, uint32_t j, uint32_t w) {
        return (j * 4 + t) * kRun + w;
    }

    // The queries of a column for the pairs of this lane's `n`-th word: step s of a word multiplies
    // its pairs 2s and 2s + 1.
    template <typename Rows>
    KVC_DEVICE static void query(const Rows &rows, uint32_t column, uint32_t t,
                                 uint32_t n, uint32_t (&q)[Codes::kPairs]) {
        pairs(rows, column, word(t, n / kRun, n % kRun) * kPerWord, q, Index<0>());
    }
    // The matrix fragments of all words in order.
    KVC_DEVICE static void queries(const QueryRows<HeadDim> &rows, uint32_t column, uint32_t t,
                                   uint32_t (&q)[kWords * Codes::kPairs / 2][2]) {
KVC_UNROLL
        for (uint32_t n = 0; n < kWords; ++n) {
            uint32_t own[Codes::kPairs];
            query(rows, column, t, n, own);
KVC_UNROLL
            for (uint32_t i = 0; i < Codes::kPairs; ++i) {
                const uint32_t at = n * Codes::kPairs + i;
                q[at / 2][at % 2] = own[i];
            }
        }
    }

  private:
    template <uint32_t I> struct Index {};
    template <typename Rows, uint32_t I>
    KVC_DEVICE static void pairs(const Rows &rows, uint32_t column, uint32_t first,
                                 uint32_t (&q)[Codes::kPairs], Index<I>) {
        q[I] = rows.template pair<Codes::element(I, 0), Codes::element(I, 1)>(column, first);
        if constexpr (I + 1 < Codes::kPairs) pairs(rows, column, first, q, Index<I + 1>());
    }
};

// `N` words, 1, 2 or 4, from shared memory.
template <uint32_t N> struct alignas(4 * N) WordRun {
    uint32_t word[N];
};

} // namespace kvc
