// What of a sealed tile's scores does not depend on the token: the queries times the steps of the key
// channels, in the order of a lane's words of codes, and what all scores have in common. Also the formats
// of tiles for decode, and the powers of two that their small codes want.
#pragma once
#include "decode_finish.cuh"
#include "quant.cuh"
#include "query_rows.cuh"
#include "tile_ring.cuh"

namespace kvc {

// The formats of src/quant/seal.rs; kLevels is n, kStep what a value's code counts in.
template <typename Key, typename Value> struct TileFormat {
    using K = Key;
    using V = Value;
    // Whether tiles of 64 tokens and of 128 have an instance each, with addresses known when it is compiled;
    // the registers that it takes are there where keys have few words.
    static constexpr bool kByTokens = K::kBits < 4;
};
struct Kt8v8 : TileFormat<Bytes<false>, Int8> {
    static constexpr uint32_t kLevels = 255;
    static constexpr float kValueMiddle = 128.0f, kStep = 1.0f; // the small form's middle
};
struct Kt4v4 : TileFormat<Nibbles, Nibbles> {
    static constexpr uint32_t kLevels = 15;
    static constexpr float kValueMiddle = 7.5f, kStep = 0.3352f;
};
struct Kt3v3 : TileFormat<Threes, Threes> {
    static constexpr uint32_t kLevels = 7;
    static constexpr float kValueMiddle = 3.5f, kStep = 0.5860f;
};
struct Kt4v2 : TileFormat<Nibbles, Twos> {
    static constexpr uint32_t kLevels = 15;
    static constexpr float kValueMiddle = 1.5f, kStep = 0.9957f;
};
struct Kt2v2 : TileFormat<Twos, Twos> {
    static constexpr uint32_t kLevels = 3;
    static constexpr float kValueMiddle = 1.5f, kStep = 0.9957f;
};

template <typename Codes>
KVC_DEVICE void unpack_small(uint32_t w, uint32_t thirds, uint32_t (&out)[Codes::kPairs]) {
    if constexpr (kHasPlane<Codes>)
        Codes::small(w, thirds, out);
    else
        Codes::small(w, out);
}

// Powers of two that keep small codes in range of the other operand. Queries are scaled up by 2^14,
// which with an element of at most 2 is in range of f16; their products with steps, bytes in the small
// form themselves, are at most 2^-1 and, to the last bit of f16, as good as those with whole steps.
// Scores are then in units of 2^(14 - 24 - 24). Weights, at most 1, are scaled up by 2^15.
constexpr uint32_t kQueryUp = 14, kWeightUp = 15;
constexpr float kScoreUnit = 17179869184.0f; // 2^34
constexpr float kSumUnit = 512.0f;           // 2^(24 - 15)

// Pairs of bytes in the small form, one for each channel of a word of codes, in the order of its pairs.
template <typename Codes>
KVC_DEVICE void channel_pairs(const uint32_t *words, uint32_t (&out)[Codes::kPairs]) {
KVC_UNROLL
    for (uint32_t i = 0; i < Codes::kPairs; i += 2) {
        if constexpr (Codes::kPairs < 8) {
            // Neighbours.
            out[i] = permute(words[i / 2], 0, 0x4140);
            out[i + 1] = permute(words[i / 2], 0, 0x4342);
        } else {
            const uint32_t two = permute(words[i / 4], words[i / 4 + 2], i % 4 == 0 ? 0x5410 : 0x7632);
            out[i] = two & 0x00ff00ffu;
            out[i + 1] = permute(two, 0, 0x4341);
        }
    }
}

// Queries in the order of a lane's words of codes and made up for their places, 16 bytes a lane, so that
// a tile has them in few loads.
template <typename Codes, int HeadDim> struct FoldRows {
    using Words = RowWords<Codes, HeadDim>;
    static constexpr uint32_t kLoads = HeadDim / 32;
    unsigned char *at;

    KVC_DEVICE explicit FoldRows(const QueryRows<HeadDim> &rows)
        : at(reinterpret_cast<unsigned char *>(rows.rows) + QueryRows<HeadDim>::kBytes) {}

    // All threads of the block call it, behind a barrier after the rows are filled.
    KVC_DEVICE void fill(const QueryRows<HeadDim> &rows) const {
        for (uint32_t i = thread_x(); i < 32 * kLoads * 4; i += kDecodeThreads) {
            const uint32_t lane = i / 4 % 32, n = i / 128 * 4 + i % 4;
            const uint32_t word = n / Codes::kPairs, pair = n % Codes::kPairs;
            const uint16_t *row =
                rows.rows + lane / 4 * rows.kRow +
                Words::word(lane % 4, word / Words::kRun, word % Words::kRun) * Words::kPerWord;
            const uint32_t two = row[Codes::element(pair, 0)] |
                                 static_cast<uint32_t>(row[Codes::element(pair, 1)]) << 16;
            reinterpret_cast<uint32_t *>(at)[i] =
                mul_f16x2(two, twice((15 + kQueryUp - Codes::place(pair)) << 10));
        }
    }
    KVC_DEVICE TileWork *work() const { return reinterpret_cast<TileWork *>(at + HeadDim * 16); }
    // Pairs 4i to 4i + 3 of this lane.
    KVC_DEVICE WordRun<4> load(uint32_t i) const {
        return reinterpret_cast<const WordRun<4> *>(at)[i * 32 + lane_id()];
    }
};
// What of a tile's scores does not depend on the token.
template <typename K, int HeadDim> struct TileQueries {
    uint32_t folded[HeadDim / 16][2]; // steps in the queries
    float less[2];                    // what sums of products begin with
    float factor[2], add[2];
};

template <typename Format, int HeadDim>
KVC_DEVICE void fold_steps(const kvc_decode_tile_params &p, const QueryRows<HeadDim> &queries,
                           const unsigned char *record, TileQueries<typename Format::K, HeadDim> &out) {
    using K = typename Format::K;
    using Words = RowWords<K, HeadDim>;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const FoldRows<K, HeadDim> fold(queries);
    uint32_t pairs[HeadDim / 8];
KVC_UNROLL
    for (uint32_t i = 0; i < HeadDim / 32; ++i) {
        const WordRun<4> run = fold.load(i);
        for (uint32_t j = 0; j < 4; ++j) pairs[4 * i + j] = run.word[j];
    }
    // Of two steps in turn, what one multiplies is in the upper rows and what the other does in the
    // lower, so that no row is there twice; rows of the other step are not looked at.
    float levels[2][4] = {}, middle[2][4] = {};
KVC_UNROLL
    for (uint32_t j = 0; j < Words::kRuns; ++j) {
        // A byte a channel: those of a run lie side by side.
        constexpr uint32_t kWords = Words::kRun * Words::kPerWord / 4;
        uint32_t steps[kWords];
        const unsigned char *at = record + p.k_steps_at + Words::word(t, j, 0) * Words::kPerWord;
KVC_UNROLL
        for (uint32_t i = 0; i < kWords; i += 4) {
            const WordRun<4> four = *reinterpret_cast<const WordRun<4> *>(at + i * 4);
            for (uint32_t k = 0; k < 4; ++k) steps[i + k] = four.word[k];
        }
KVC_UNROLL
        for (uint32_t w = 0; w < Words::kRun; ++w) {
            uint32_t up[K::kPairs];
            channel_pairs<K>(steps + w * (Words::kPerWord / 4), up);
KVC_UNROLL
            for (uint32_t i = 0; i < K::kPairs; ++i) {
                const uint32_t n = (j * Words::kRun + w) * K::kPairs + i;
                out.folded[n / 2][n % 2] = mul_f16x2(pairs[n], up[i]);
            }
        }
    }
KVC_UNROLL
    for (uint32_t n = 0; n < HeadDim / 16; n += 2) {
        uint32_t a[4];
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t pair = 2 * (n + i % 2) + i / 2;
            a[i] = twice(Format::kLevels << K::place(pair % K::kPairs));
        }
        mma_f16(levels[0], a, out.folded[n]);
        mma_f16(levels[1], a, out.folded[n + 1]);
    }
    for (int i = 0; i < 2; ++i) out.less[i] = -0.5f * (levels[0][i] + levels[1][2 + i]);

    // Queries times middles, of channels in their order: a byte with its sign flipped is 128 more.
KVC_UNROLL
    for (uint32_t i = 0; i < HeadDim / 32; ++i) {
        const uint32_t first = (4 * i + t) * 8;
        const WordRun<4> q =
            *reinterpret_cast<const WordRun<4> *>(queries.rows + g * queries.kRow + first);
        const WordRun<2> mids =
            *reinterpret_cast<const WordRun<2> *>(record + p.k_mids_at + first);
        uint32_t m[2][2];
        for (uint32_t j = 0; j < 2; ++j) Int8::small(mids.word[j], m[j]);
        const uint32_t a[4] = {m[0][0], m[1][0], m[0][1], m[1][1]};
        for (uint32_t j = 0; j < 2; ++j) {
            const uint32_t b[2] = {q.word[2 * j], q.word[2 * j + 1]};
            mma_f16(middle[j], a, b);
        }
    }
    const uint32_t units = *reinterpret_cast<const uint32_t *>(record + p.header_at);
    const float unit = widen_f16(static_cast<uint16_t>(units)) * kScoreUnit;
    const float mid_unit = widen_f16(static_cast<uint16_t>(units >> 16));
    for (int c = 0; c < 2; ++c) {
        const float q_factor = queries.factors[2 * t + c];
        out.factor[c] = unit * q_factor;
        const float mids = (middle[0][c] + middle[1][2 + c]) * 16777216.0f;
        out.add[c] = mid_unit * (mids - 128.0f * queries.sums[2 * t + c]) * q_factor;
    }
}

} // namespace kvc
