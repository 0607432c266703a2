// Multi-head latent attention decode: 16-bit latents of 576 channels in one shared head, whose first
// 512 channels are the values too. A token is read from memory once for all query columns of a unit
// (a column is a query row and a query head), and lies once in shared memory.
//
// Eight warps work on a piece of a sequence's context in tiles of 32 tokens:
//
//   S[32 tokens x Columns] = K Q'   a warp has 16 tokens, half of the columns and half of the
//                                   channels: A = K by ldmatrix, B = Q in registers all the time
//   P = 2^(S - max)                 a lane is a token, a warp has Columns / 8 columns
//   O'[512 x Columns] += V' P       a warp has 64 channels: A = V by ldmatrix.trans, B = P
//
// S and P pass through shared memory, with one barrier of the block after each. The next tile is
// copied meanwhile. With 16 columns two blocks fit a multiprocessor of sm_80 and sm_90, and either
// width fits the 99 KB of the smaller devices. Columns past a sequence's own score as zeros and are
// never written.
//
// Contexts are cut by the plan of paged decode; partial results are those of split.cuh.
#pragma once
#include "mla_unit.cuh"

namespace kvc {

constexpr uint32_t kMlaStages = 2;
using MlaRowPipeline = MlaPipeline<uint16_t, kMlaDim / 8, kMlaStages>;
constexpr uint32_t kMlaRow = MlaRowPipeline::kRow;

// The shared memory of a block; src/kernels/mla.rs knows its size.
template <uint32_t Columns> struct MlaShared {
    uint16_t tiles[kMlaStages][kMlaTokens * kMlaRow];
    float scores[2][Columns * kScoreRow]; // of either half of the channels
    uint16_t weights[Columns * kWeightRow];
    float scales[Columns]; // what this tile makes of earlier sums
    uint8_t readable[kMlaStages][kMlaTokens];
    uint32_t arrived[1];
};
static_assert(sizeof(MlaShared<16>) == 80772 && sizeof(MlaShared<32>) == 86724,
              "what the launch asks for");

// A warp's part of the scores of a tile, into shared memory.
template <typename T, uint32_t Columns>
KVC_DEVICE void mla_scores(const uint32_t (&q)[kMlaSteps][Columns / 16][2], const uint16_t *tile,
                           MlaShared<Columns> &shared) {
    constexpr int kTiles = Columns / 16;
    const uint32_t lane = lane_id(), g = lane / 4, t = lane % 4, warp = warp_id();
    const uint32_t tokens = warp % 2 * 16, columns = warp / 2 % 2 * (Columns / 2), half = warp / 4;
    // Even and odd steps apart, so that a product need not wait for the one before.
    float s[2][kTiles][4];
    for (int n = 0; n < kTiles; ++n)
        for (int j = 0; j < 4; ++j) s[0][n][j] = s[1][n][j] = 0.0f;
    const uint16_t *at =
        tile + (tokens + lane % 16) * kMlaRow + half * (kMlaDim / 2) + lane / 16 * 8;
KVC_UNROLL
    for (int i = 0; i < kMlaSteps; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, at + i * 16);
KVC_UNROLL
        for (int n = 0; n < kTiles; ++n) T::mma(s[i % 2][n], a, q[i][n]);
    }
KVC_UNROLL
    for (int n = 0; n < kTiles; ++n)
KVC_UNROLL
        for (int j = 0; j < 4; ++j) {
            const uint32_t column = columns + n * 8 + 2 * t + j % 2;
            shared.scores[half][column * kScoreRow + tokens + g + j / 2 * 8] =
                s[0][n][j] + s[1][n][j];
        }
}

// Turns the scores of a tile into weights, and says how earlier sums shrink.
template <typename T, uint32_t Columns>
KVC_DEVICE void mla_weights(const kvc_mla_params &p, uint32_t first, bool readable,
                            const uint32_t (&low)[MlaRows<Columns>::kOwn],
                            const uint32_t (&after)[MlaRows<Columns>::kOwn],
                            MlaRows<Columns> &rows, MlaShared<Columns> &shared) {
    const uint32_t token = first + lane_id();
KVC_UNROLL
    for (int c = 0; c < MlaRows<Columns>::kOwn; ++c) {
        const uint32_t column = rows.column(c), lane = lane_id();
        const float dot = shared.scores[0][column * kScoreRow + lane] +
                          shared.scores[1][column * kScoreRow + lane];
        const bool seen = readable && token >= low[c] && token < after[c];
        const float x = seen ? dot * p.scale * kLog2e : -infinity();
        const float top = max_f32(rows.m[c], max_over_lanes(x));
        const float scale = weight(rows.m[c], top), w = weight(x, top);
        rows.l[c] = rows.l[c] * scale + w;
        rows.m[c] = top;
        shared.weights[column * kWeightRow + lane] = static_cast<uint16_t>(T::pack(w, 0.0f));
        if (lane == 0) shared.scales[column] = scale;
    }
}

template <typename T, uint32_t Columns>
KVC_DEVICE void mla_accumulate(const uint16_t *tile, const MlaShared<Columns> &shared,
                               MlaSums<Columns> &sums) {
    constexpr int kTiles = Columns / 8;
    const uint32_t lane = lane_id();
    uint32_t w[kTiles][2][2];
    sums.begin(shared.weights, shared.scales, w);
    const uint16_t *at = tile + (lane % 8 + lane / 16 * 8) * kMlaRow + lane / 8 % 2 * 8 +
                         warp_id() * kWarpValues;
KVC_UNROLL
    for (int i = 0; i < static_cast<int>(kWarpValues / 16); ++i)
KVC_UNROLL
        for (int half = 0; half < 2; ++half) {
            uint32_t a[4];
            ldmatrix_x4_trans(a, at + half * 16 * kMlaRow + i * 16);
KVC_UNROLL
            for (int n = 0; n < kTiles; ++n) T::mma(sums.o[i][n], a, w[n][half]);
        }
}

template <typename T, uint32_t Columns>
KVC_DEVICE void mla_unit(const kvc_mla_params &p, const Piece &item, uint32_t unit) {
    constexpr int kTiles = Columns / 16;
    const MlaUnit u = find_mla_unit(p, item.seq, unit * Columns);
    if (u.first_column >= u.columns) return;
    const uint32_t lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
    MlaShared<Columns> &shared = *KVC_SMEM(MlaShared<Columns>);

    const MlaSpan span(item, u);
    MlaRowPipeline pipe(p, span, shared.tiles[0], shared.readable[0]);
    const BlockTable table(p.table, p.table_indptr, p.table_stride, item.seq, p.block_tokens,
                           p.num_blocks, p.error_flag);
    const auto nothing = [](bool, int32_t, uint32_t) {};
    pipe.look_up(table, 0);
    for (uint32_t n = 0; n < kMlaStages - 1; ++n) pipe.issue(p, table, n, nothing);

    // B fragments of the queries: column g of each 8, channels 2t, 2t+1 and those eight further.
    uint32_t q[kMlaSteps][kTiles][2];
KVC_UNROLL
    for (int n = 0; n < kTiles; ++n) {
        const MlaColumn c =
            find_mla_column(p, u, warp / 2 % 2 * (Columns / 2) + n * 8 + g);
        const int64_t at =
            c.row * p.q_row + c.head * p.q_head + warp / 4 * (kMlaDim / 2) + 2 * t;
KVC_UNROLL
        for (int i = 0; i < kMlaSteps; ++i)
            for (int j = 0; j < 2; ++j)
                q[i][n][j] = c.exists ? load_pair<T>(p.q, at + i * 16 + j * 8, p.q_dtype) : 0;
    }
    MlaRows<Columns> rows;
    uint32_t low[MlaRows<Columns>::kOwn], after[MlaRows<Columns>::kOwn];
KVC_UNROLL
    for (int c = 0; c < MlaRows<Columns>::kOwn; ++c) {
        const MlaSight sight(p, u, rows.column(c));
        low[c] = sight.low;
        after[c] = sight.after;
    }
    MlaSums<Columns> sums;

    for (uint32_t n = 0; span.has(n); ++n) {
        // This lane's part of tile n is there, then everybody's; all are done with tile n - 1,
        // whose place the next one takes.
        cp_async_wait<kMlaStages - 2>();
        sync_threads();
        pipe.issue(p, table, n + kMlaStages - 1, nothing);
        const uint32_t stage = n % kMlaStages;
        mla_scores<T, Columns>(q, shared.tiles[stage], shared);
        sync_threads();
        mla_weights<T, Columns>(p, item.begin + n * kMlaTokens, shared.readable[stage][lane] != 0,
                                low, after, rows, shared);
        sync_threads();
        mla_accumulate<T, Columns>(shared.tiles[stage], shared, sums);
    }
    cp_async_wait<0>();
    sync_threads();

    // All channels of a column side by side, where the tiles were.
    float *values = reinterpret_cast<float *>(shared.tiles);
    static_assert(Columns * kValueRow * 4 <= sizeof shared.tiles, "the sums fit the tiles");
    float *tops = shared.scores[0], *denominators = shared.scores[1];
    rows.put(tops, denominators);
    sums.put(values, [&](int i, int half, float x, uint32_t &channel) {
        channel = static_cast<uint32_t>(i * 16 + half * 8) + g;
        return x;
    });
    sync_threads();
    finish_mla_unit<Columns, 4>(p, item, unit, u, tops, denominators, shared.arrived, false,
                                [&](uint32_t c, uint32_t channel, float (&o)[4]) {
                                    const float *at = values + c * kValueRow + channel;
                                    for (int j = 0; j < 4; ++j) o[j] = at[j];
                                });
}

template <typename T, uint32_t Columns> KVC_DEVICE void mla_decode(const kvc_mla_params &p) {
    for_each_piece<false>(p, KVC_SMEM(uint32_t), [&](const Piece &item, uint32_t unit) {
        mla_unit<T, Columns>(p, item, unit);
        return item.range * p.units + unit;
    });
}

} // namespace kvc

// Defines the kernel for one cache type and width; `blocks` a multiprocessor.
#define KVC_MLA(type, Type, columns, blocks)                                             \
    KVC_KERNEL(kvc_mla_##type##_c##columns, kvc_mla_params, 256, blocks) {               \
        kvc::mla_decode<kvc::Type, columns>(p);                                          \
    }
