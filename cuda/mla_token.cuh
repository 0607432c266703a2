// Multi-head latent attention decode over rows of codes: FP8, INT8_T and INT4_T, read as stored. A unit is
// worked on as mla.cuh does it, with the products in f16 and codes turned into f16 in registers, and what
// decode_token.cuh says of scales holds here too. A latent has two parts, of 512 and 64 channels, each with
// scales of its own:
//
//   score(t, c) = s_t sum q code + m_t sum q   over the latent's part, and the same over the rotary one
//   O          += sum (p_t * s_t) code,  sum p_t * m_t in a sum of its own   with those of the latent's part
//
// The queries of a unit are rotated and rounded by a warp a column, and pass through the last stages of the
// pipeline before a tile comes there.
#pragma once
#include "code_unit.cuh"
#include "mla_unit.cuh"
#include "query_rows.cuh"
#include "token_formats.cuh"

namespace kvc {

constexpr uint32_t kMlaQueryRow = kMlaDim + 8; // halves

// How latents of a format lie in shared memory.
template <typename Format> struct MlaCodes {
    static constexpr uint32_t kChunks = kMlaDim * Format::Codes::kBits / 128; // of 16 bytes
    // A warp's half of them, and how many of the second half's are the latent's.
    static constexpr uint32_t kHalf = kChunks / 2;
    static constexpr uint32_t kLatent = kMlaValues * Format::Codes::kBits / 128 - kHalf;
    // As many bytes under way with codes of 4 bits as with those of 8.
    static constexpr uint32_t kStages = Format::Codes::kBits == 8 ? 4 : 7;
    // The scales of a row: of each part s, or s and m.
    static constexpr uint32_t kScales = Format::kMinimum ? 4 : Format::kScaled ? 2 : 0;
    static constexpr uint32_t kPart = kScales / 2;
    using Pipeline = MlaPipeline<unsigned char, kChunks, kStages>;
    static constexpr uint32_t kRow = Pipeline::kRow, kTile = kMlaTokens * kRow;
};

// The shared memory of a block; src/kernels/mla_token.rs knows its size.
template <typename Format, uint32_t Columns> struct MlaTokenShared {
    using Codes = MlaCodes<Format>;
    alignas(16) unsigned char tiles[Codes::kStages][Codes::kTile];
    float scores[2][Columns * kScoreRow]; // of either half of the channels
    uint16_t weights[Columns * kWeightRow];
    float scales[Columns];    // what this tile makes of earlier sums
    float factors[Columns];   // of the scores
    float q_sums[2][Columns]; // of the queries' channels, of each part
    uint32_t low[Columns], after[Columns]; // the tokens that a column sees
    uint16_t row_scales[Codes::kScales == 0 ? 2 : Codes::kStages * kMlaTokens * Codes::kScales];
    uint8_t readable[Codes::kStages][kMlaTokens];
    uint32_t arrived[1];
    // What is worked on, for want of registers.
    uint32_t range, unit;
    MlaSpan span;
    BlockTable table;
};

static_assert(sizeof(MlaTokenShared<Fp8E4m3Rows, 16>) == 82256 &&
                  sizeof(MlaTokenShared<Fp8E4m3Rows, 32>) == 88528 &&
                  sizeof(MlaTokenShared<Int8Rows, 16>) == 82752 &&
                  sizeof(MlaTokenShared<Int8Rows, 32>) == 89024 &&
                  sizeof(MlaTokenShared<Int4Rows, 16>) == 76448 &&
                  sizeof(MlaTokenShared<Int4Rows, 32>) == 82720,
              "what the launch asks for");

// Copies of tiles as those of rows without scales, and the scales: too few for cp.async, a lane loads
// one of its row's and puts it there when it comes to the next tile.
template <typename Format> struct MlaTokenPipeline : MlaCodes<Format>::Pipeline {
    using Codes = MlaCodes<Format>;
    using Base = typename Codes::Pipeline;
    static_assert(Codes::kStages > 2, "scales are there two tiles after they are asked for");
    uint16_t *row_scales;
    uint32_t pending; // of tile n - 1

    KVC_DEVICE MlaTokenPipeline(const kvc_mla_token_params &params, const MlaSpan &of,
                                unsigned char *tiles, uint8_t *readable, uint16_t *to)
        : Base(params.call, of, tiles, readable), row_scales(to), pending(0) {}

    KVC_DEVICE void issue(const kvc_mla_token_params &params, const BlockTable &table, uint32_t n) {
        const uint32_t thread = opaque(thread_x()), own = thread % Base::kLanes;
        if constexpr (Codes::kScales != 0) {
            const uint32_t before = n - 1;
            if (n != 0 && this->span.has(before) && own < Codes::kScales)
                row_scales[(before % Codes::kStages * kMlaTokens + thread / Base::kLanes) *
                               Codes::kScales +
                           own] = static_cast<uint16_t>(pending);
            pending = 0;
        }
        Base::issue(params.call, table, n, [&](bool valid, int32_t block, uint32_t slot) {
            if constexpr (Codes::kScales != 0)
                if (valid && own < Codes::kScales)
                    pending = reinterpret_cast<const uint16_t *>(
                        static_cast<const unsigned char *>(params.k_scales) +
                        block * params.k_scale_block + slot * params.k_scale_token)[own];
        });
    }
};

// The queries of a unit as rows of f16, scaled by a power of two so that they use its range, rotated where
// keys are, and what is said of columns once. A lane has sixteen channels of a column's latent part and
// two of its rotary one.
template <typename Format, uint32_t Columns>
KVC_DEVICE void fill_mla_queries(const kvc_mla_token_params &params, const MlaUnit &u,
                                 uint16_t *rows, MlaTokenShared<Format, Columns> &shared) {
    const kvc_mla_params &p = params.call;
    const float k_factor = key_factor<Format>() * p.scale * kLog2e *
                           (params.k_heads == nullptr ? 1.0f : params.k_heads[0]);
KVC_ROLL
    for (uint32_t c = warp_id(); c < Columns; c += kMlaWarps) {
        const MlaColumn column = find_mla_column(p, u, c);
        // Signs, too, are made when they are used, not kept for the next unit.
        const uint32_t lane = opaque(lane_id()), rotary = kMlaValues + 2 * lane;
        float x[16] = {}, y[2] = {};
        if (column.exists) {
            const int64_t at = column.row * p.q_row + column.head * p.q_head;
KVC_UNROLL
            for (int i = 0; i < 16; i += 4) {
                float quad[4];
                load_quad(p.q, at + lane * 16 + i, p.q_dtype, quad);
                for (int j = 0; j < 4; ++j) x[i + j] = quad[j];
            }
            for (int j = 0; j < 2; ++j) y[j] = load_element(p.q, at + rotary + j, p.q_dtype);
        }
        if (Format::kScaled && params.k_rotated != 0) {
            rotate_channels<kMlaValues>(x, lane * 16, lane);
            rotate_channels<kMlaDim - kMlaValues>(y, lane * 2, lane);
        }
        const auto magnitude = [](float a) { return as_float(as_bits(a) & 0x7fffffffu); };
        float top = max_f32(magnitude(y[0]), magnitude(y[1]));
        for (int j = 0; j < 16; ++j) top = max_f32(top, magnitude(x[j]));
        const uint32_t exponent = exponent_of(max_over_lanes(top));
        const float down = as_float((254 - exponent) << 23);
        Vec16 halves[2];
        for (int j = 0; j < 8; ++j)
            halves[j / 4].word[j % 4] = pack_f16(x[2 * j] * down, x[2 * j + 1] * down);
        const uint32_t last = pack_f16(y[0] * down, y[1] * down);
        uint16_t *row = rows + c * kMlaQueryRow;
        for (int i = 0; i < 2; ++i)
            *reinterpret_cast<Vec16 *>(row + lane * 16 + i * 8) = halves[i];
        *reinterpret_cast<uint32_t *>(row + rotary) = last;
        const auto sum_of = [](uint32_t pair) {
            return widen_f16(static_cast<uint16_t>(pair)) + widen_f16(static_cast<uint16_t>(pair >> 16));
        };
        if constexpr (Format::kSmall) {
            float sum = 0.0f;
            for (int j = 0; j < 8; ++j) sum += sum_of(halves[j / 4].word[j % 4]);
            const float own = sum_over_lanes(sum), others = sum_over_lanes(sum_of(last));
            if (lane < 2)
                shared.q_sums[lane][c] = (lane == 0 ? own : others) * (1.0f / key_factor<Format>());
        }
        if (lane == 0) {
            const MlaSight sight(p, u, c);
            shared.low[c] = sight.low;
            shared.after[c] = sight.after;
            shared.factors[c] = as_float(exponent << 23) * k_factor;
        }
    }
}

// Those rows, as RowWords takes them.
struct MlaQueryRows {
    const uint16_t *rows;
    template <uint32_t Low, uint32_t High>
    KVC_DEVICE uint32_t pair(uint32_t column, uint32_t first) const {
        return pair_of<Low, High>(rows + column * kMlaQueryRow + first);
    }
};

// A warp's part of the scores of a tile, into shared memory.
template <typename Format, uint32_t Columns>
KVC_DEVICE void mla_token_scores(const uint32_t (&q)[kMlaSteps][Columns / 16][2], uint32_t stage,
                                 MlaTokenShared<Format, Columns> &shared) {
    using Codes = MlaCodes<Format>;
    constexpr int kTiles = Columns / 16, kPairs = Format::Codes::kPairs, kProducts = kPairs / 2;
    // What follows from the thread is computed again for every tile, for want of registers.
    const uint32_t thread = opaque(thread_x()), lane = thread % 32, warp = thread / 32;
    const uint32_t g = lane / 4, t = lane % 4;
    const uint32_t tokens = warp % 2 * 16, columns = warp / 2 % 2 * (Columns / 2), half = warp / 4;
    const float *q_sums = shared.q_sums[half] + columns + 2 * t;
    // Even and odd steps apart, so that a product need not wait for the one before, until, where parts
    // have scales of their own, what is the rotary part in the second half. What codes are too large by
    // is taken from the part that the sums of the queries' half are of.
    const auto less = [&](uint32_t of, int n, int j) {
        if constexpr (Format::kSmall)
            return half == of ? -Format::kLess * q_sums[n * 8 + j % 2] : 0.0f;
        else
            return 0.0f;
    };
    float s[2][kTiles][4];
KVC_UNROLL
    for (int n = 0; n < kTiles; ++n)
        for (int j = 0; j < 4; ++j) {
            s[0][n][j] = less(0, n, j);
            s[1][n][j] = 0.0f;
        }
    // Two chunks a matrix load; of an odd last one both are that.
    const uint32_t other = lane / 16 * 16;
    const unsigned char *at = shared.tiles[stage] + (tokens + lane % 16) * Codes::kRow +
                              half * Codes::kHalf * 16 + other;
KVC_UNROLL
    for (uint32_t two = 0; two < Codes::kHalf; two += 2) {
        uint32_t codes[4];
        ldmatrix_x4(codes, at + two * 16 - (two + 1 < Codes::kHalf ? 0 : other));
KVC_UNROLL
        for (uint32_t one = 0; one < 2 && two + one < Codes::kHalf; ++one) {
            if (Format::kScaled && two + one == Codes::kLatent) {
KVC_UNROLL
                for (int n = 0; n < kTiles; ++n)
                    for (int j = 0; j < 4; ++j) {
                        s[0][n][j] += s[1][n][j];
                        s[1][n][j] = less(1, n, j);
                    }
            }
            uint32_t low[kPairs], high[kPairs];
            Format::keys(codes[2 * one], low);
            Format::keys(codes[2 * one + 1], high);
KVC_UNROLL
            for (uint32_t i = 0; i < kProducts; ++i) {
                const uint32_t a[4] = {low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]};
                const uint32_t step = (two + one) * kProducts + i;
                const uint32_t to = Format::kScaled && two + one >= Codes::kLatent ? 1 : step % 2;
KVC_UNROLL
                for (int n = 0; n < kTiles; ++n) mma_f16(s[to][n], a, q[step][n]);
            }
        }
    }
KVC_UNROLL
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t token = tokens + g + i * 8;
        float latent = 1.0f, last = 1.0f, minimum = 0.0f;
        if constexpr (Format::kScaled) {
            const uint16_t *scales =
                shared.row_scales + (stage * kMlaTokens + token) * Codes::kScales;
            latent = widen_f16(scales[0]);
            last = half == 0 ? latent : widen_f16(scales[Codes::kPart]);
            if constexpr (Format::kMinimum)
                minimum = widen_f16(scales[half * Codes::kPart + 1]) + Format::kLess * last;
        }
KVC_UNROLL
        for (int n = 0; n < kTiles; ++n)
            for (uint32_t j = 0; j < 2; ++j) {
                const uint32_t column = n * 8 + j;
                float x = s[0][n][2 * i + j] * latent + s[1][n][2 * i + j] * last;
                if constexpr (Format::kMinimum) x += minimum * q_sums[column];
                shared.scores[half][(columns + column + 2 * t) * kScoreRow + token] = x;
            }
    }
}

// The columns whose softmax a warp keeps, with a lane's part of what rounded weights sum up to, and
// weighted minima.
template <uint32_t Columns> struct MlaTokenRows : MlaRows<Columns>, CodeUnit {
    using MlaRows<Columns>::kOwn;
    float weights[kOwn], minima[kOwn];

    KVC_DEVICE MlaTokenRows() {
        for (int c = 0; c < kOwn; ++c) weights[c] = minima[c] = 0.0f;
    }
};

// Turns the scores of a tile into weights, and says how earlier sums shrink.
template <typename Format, uint32_t Columns>
KVC_DEVICE void mla_token_weights(uint32_t first, uint32_t stage, MlaTokenRows<Columns> &rows,
                                  MlaTokenShared<Format, Columns> &shared) {
    using Codes = MlaCodes<Format>;
    const uint32_t thread = opaque(thread_x()), lane = thread % 32, token = first + lane;
    const bool readable = shared.readable[stage][lane] != 0;
    float same = 1.0f, v_factor = 1.0f, v_minimum = 0.0f;
    if constexpr (Format::kScaled) {
        // Rows that cannot be read have scales of 0.
        const uint16_t *scales = shared.row_scales + (stage * kMlaTokens + lane) * Codes::kScales;
        const float scale = widen_f16(scales[0]);
        if constexpr (Format::kMinimum)
            v_minimum = widen_f16(scales[1]) + Format::kLess * scale;
        // The same in every warp.
        if (ballot(kFullMask, scale >= rows.in_units()) != 0)
            same = rows.count_in(max_over_lanes(scale));
        v_factor = scale * rows.per_unit();
    }
KVC_UNROLL
    for (int c = 0; c < MlaRows<Columns>::kOwn; ++c) {
        const uint32_t column = thread / 32 * MlaRows<Columns>::kOwn + static_cast<uint32_t>(c);
        const float dot = shared.scores[0][column * kScoreRow + lane] +
                          shared.scores[1][column * kScoreRow + lane];
        const bool seen =
            readable && token >= shared.low[column] && token < shared.after[column];
        const float x = seen ? dot * shared.factors[column] : -infinity();
        const float top = max_f32(rows.m[c], max_over_lanes(x));
        const float keep = weight(rows.m[c], top), w = weight(x, top);
        rows.l[c] = rows.l[c] * keep + w;
        rows.m[c] = top;
        const float shrink = keep * same;
        const uint32_t rounded = pack_f16(w * v_factor, 0.0f);
        if constexpr (Format::kMinimum) rows.minima[c] = rows.minima[c] * keep + w * v_minimum;
        if constexpr (Format::kSmall)
            rows.weights[c] = rows.weights[c] * shrink + widen_f16(static_cast<uint16_t>(rounded));
        shared.weights[column * kWeightRow + lane] = static_cast<uint16_t>(rounded);
        if (lane == 0) shared.scales[column] = shrink;
    }
}

template <typename Format, uint32_t Columns>
KVC_DEVICE void mla_token_accumulate(uint32_t stage, const MlaTokenShared<Format, Columns> &shared,
                                     MlaSums<Columns> &sums) {
    using Codes = MlaCodes<Format>;
    constexpr int kTiles = Columns / 8, kPairs = Format::Codes::kPairs, kProducts = kPairs / 2;
    constexpr uint32_t kChunks = kWarpValues * Format::Codes::kBits / 128;
    uint32_t w[kTiles][2][2];
    sums.begin(shared.weights, shared.scales, w);
    // All 32 tokens of a chunk of 16 bytes.
    const uint32_t thread = opaque(thread_x());
    const unsigned char *at =
        shared.tiles[stage] + thread % 32 * Codes::kRow + thread / 32 * kChunks * 16;
KVC_UNROLL
    for (uint32_t chunk = 0; chunk < kChunks; ++chunk) {
        uint32_t codes[4];
        ldmatrix_x4_trans(codes, at + chunk * 16);
KVC_UNROLL
        for (uint32_t half = 0; half < 2; ++half) {
            uint32_t low[kPairs], high[kPairs];
            Format::values(codes[2 * half], low);
            Format::values(codes[2 * half + 1], high);
KVC_UNROLL
            for (uint32_t i = 0; i < kProducts; ++i) {
                const uint32_t a[4] = {low[2 * i], low[2 * i + 1], high[2 * i], high[2 * i + 1]};
KVC_UNROLL
                for (int n = 0; n < kTiles; ++n)
                    mma_f16(sums.o[chunk * kProducts + i][n], a, w[n][half]);
            }
        }
    }
}

// Returns what for_each_piece asks for.
template <typename Format, uint32_t Columns>
KVC_DEVICE uint32_t mla_token_unit(const kvc_mla_token_params &params, const Piece &item,
                                   uint32_t unit) {
    using Codes = MlaCodes<Format>;
    constexpr int kTiles = Columns / 16, kPairs = Format::Codes::kPairs;
    const kvc_mla_params &p = params.call;
    const MlaUnit u = find_mla_unit(p, item.seq, unit * Columns);
    if (u.first_column >= u.columns) return item.range * p.units + unit;
    const uint32_t thread = opaque(thread_x()), warp = thread / 32;
    const uint32_t g = thread % 32 / 4, t = thread % 4;
    using Shared = MlaTokenShared<Format, Columns>;
    Shared &shared = *KVC_SMEM(Shared);

    if (thread_x() == 0) {
        shared.range = item.range;
        shared.unit = unit;
        shared.span = MlaSpan(item, u);
        shared.table = BlockTable(p.table, p.table_indptr, p.table_stride, item.seq,
                                  p.block_tokens, p.num_blocks, p.error_flag);
    }
    sync_threads();
    const BlockTable &table = shared.table;
    MlaTokenPipeline<Format> pipe(params, shared.span, shared.tiles[0], shared.readable[0],
                                  shared.row_scales);
    pipe.look_up(table, 0);
    // The queries lie in the last stages meanwhile.
    constexpr uint32_t kQueryStages =
        (Columns * kMlaQueryRow * 2 + Codes::kTile - 1) / Codes::kTile;
    constexpr uint32_t kBefore = Codes::kStages - kQueryStages;
KVC_ROLL
    for (uint32_t n = 0; n < kBefore; ++n) pipe.issue(params, table, n);
    uint16_t *query_rows = reinterpret_cast<uint16_t *>(shared.tiles[kBefore]);
    fill_mla_queries<Format, Columns>(params, u, query_rows, shared);
    sync_threads();
    // B fragments of the queries for the words that a lane has of a row of codes.
    uint32_t q[kMlaSteps][kTiles][2];
KVC_UNROLL
    for (int n = 0; n < kTiles; ++n) {
        const uint32_t column = warp / 2 % 2 * (Columns / 2) + n * 8 + g;
KVC_UNROLL
        for (uint32_t i = 0; i < Codes::kHalf; ++i) {
            uint32_t pairs[kPairs];
            RowWords<typename Format::Codes, static_cast<int>(kMlaDim), 1>::query(
                MlaQueryRows{query_rows}, column, t, warp / 4 * Codes::kHalf + i, pairs);
KVC_UNROLL
            for (int j = 0; j < kPairs; ++j) {
                const uint32_t at = i * kPairs + j;
                q[at / 2][n][at % 2] =
                    Format::kSmall ? mul_f16x2(pairs[j], twice((29 - Format::place(j)) << 10))
                                   : pairs[j];
            }
        }
    }
    MlaTokenRows<Columns> rows;
    MlaSums<Columns> sums;
    sync_threads();
KVC_ROLL
    for (uint32_t n = kBefore; n < Codes::kStages - 1; ++n) pipe.issue(params, table, n);

    for (uint32_t n = 0; shared.span.has(n); ++n) {
        // This lane's part of tile n is there, then everybody's; all are done with tile n - 1,
        // whose place another one takes.
        cp_async_wait<static_cast<int>(Codes::kStages) - 2>();
        sync_threads();
        pipe.issue(params, table, n + Codes::kStages - 1);
        const uint32_t stage = n % Codes::kStages;
        mla_token_scores<Format, Columns>(q, stage, shared);
        sync_threads();
        mla_token_weights<Format, Columns>(shared.span.begin + n * kMlaTokens, stage, rows, shared);
        sync_threads();
        mla_token_accumulate<Format, Columns>(stage, shared, sums);
    }
    cp_async_wait<0>();
    sync_threads();

    // All channels of a column side by side, where the tiles were.
    float *values = reinterpret_cast<float *>(shared.tiles);
    static_assert(Columns * kValueRow * 4 <= sizeof shared.tiles, "the sums fit the tiles");
    float *tops = shared.scores[0], *denominators = shared.scores[1], *shifts = shared.factors;
    rows.put(tops, denominators);
    const float unit_value = Format::kScaled ? rows.in_units() : 1.0f;
    if constexpr (Format::kSmall) {
        // A minimum counts for every channel, and so does what codes are too large by.
KVC_UNROLL
        for (int c = 0; c < MlaRows<Columns>::kOwn; ++c) {
            const float shift =
                sum_over_lanes(rows.minima[c] - Format::kLess * unit_value * rows.weights[c]);
            if (lane_id() == 0) shifts[rows.column(c)] = shift;
        }
    }
    const float v_factor = unit_value * (params.k_heads == nullptr ? 1.0f : params.k_heads[0]);
    sums.put(values, [&](int i, int half, float x, uint32_t &channel) {
        channel = Format::channel(static_cast<uint32_t>(i), lane_id() / 4, static_cast<uint32_t>(half));
        return x * (value_factor<Format>(static_cast<uint32_t>(half)) * v_factor);
    });
    sync_threads();
    constexpr int kOwn = Format::kScaled ? 16 : 4;
    // Read again, not held meanwhile.
    const uint32_t same = shared.unit;
    const Piece piece = {item.seq, 0, 0, shared.range};
    finish_mla_unit<Columns, kOwn>(
        p, piece, same, find_mla_unit(p, item.seq, same * Columns), tops, denominators, shared.arrived,
        Format::kScaled && params.k_rotated != 0,
        [&](uint32_t c, uint32_t channel, float (&o)[kOwn]) {
            const float *at = values + c * kValueRow + channel;
            for (int j = 0; j < kOwn; ++j) o[j] = at[j];
            if constexpr (Format::kSmall)
                for (int j = 0; j < kOwn; ++j) o[j] += shifts[c];
        });
    return shared.range * p.units + shared.unit;
}

template <typename Format, uint32_t Columns>
KVC_DEVICE void mla_token_decode(const kvc_mla_token_params &params) {
    for_each_piece<false>(params.call, KVC_SMEM(uint32_t), [&](const Piece &item, uint32_t unit) {
        return mla_token_unit<Format, Columns>(params, item, unit);
    });
}

} // namespace kvc

// Defines the kernel for one format and width; `blocks` a multiprocessor.
#define KVC_MLA_TOKEN(format, Format, columns, blocks)                                   \
    KVC_KERNEL(kvc_mla_##format##_c##columns, kvc_mla_token_params, 256, blocks) {       \
        kvc::mla_token_decode<kvc::Format, columns>(p);                                  \
    }
