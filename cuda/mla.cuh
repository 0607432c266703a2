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
#include "kvc_params.h"
#include "page.cuh"
#include "split.cuh"

namespace kvc {

constexpr uint32_t kMlaDim = 576, kMlaValues = 512;
constexpr uint32_t kMlaWarps = 8, kMlaThreads = 256;
constexpr uint32_t kMlaTokens = 32; // of a tile
constexpr uint32_t kMlaStages = 2;
// Rows in shared memory are longer than what they hold, which spreads the rows of a matrix load, and
// the lanes of a store, over all banks.
constexpr uint32_t kMlaRow = kMlaDim + 8, kScoreRow = kMlaTokens + 4, kWeightRow = kMlaTokens + 8;
constexpr uint32_t kValueRow = kMlaValues + 4;
// Steps of the matrix instruction over a warp's half of the channels.
constexpr int kMlaSteps = kMlaDim / 16 / 2;
constexpr uint32_t kWarpValues = kMlaValues / kMlaWarps;

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

// The part of a call that a unit works on.
struct MlaUnit {
    uint32_t first_column, columns, first_row, rows;
    int64_t length;
    int64_t first_token; // no row sees an earlier one
};

KVC_DEVICE MlaUnit find_mla_unit(const kvc_mla_params &p, uint32_t seq, uint32_t first_column) {
    MlaUnit u;
    u.first_column = first_column;
    u.first_row = seq * p.q_len;
    u.rows = p.q_len;
    if (p.q_indptr != nullptr) {
        u.first_row = static_cast<uint32_t>(p.q_indptr[seq]);
        u.rows = static_cast<uint32_t>(p.q_indptr[seq + 1]) - u.first_row;
        if (u.rows > p.q_len) {
            if (thread_x() == 0) raise(p.error_flag, kFlagPosition);
            u.rows = 0;
        }
    }
    u.columns = p.q_heads * u.rows;
    const int32_t length = p.seq_lens[seq];
    u.length = length > 0 ? length : 0;
    u.first_token = p.window != 0 ? u.length - u.rows + 1 - p.window : 0;
    return u;
}

// What a column is, and which tokens it sees: [low, high].
struct MlaColumn {
    int64_t low, high;
    uint32_t row, head;
    bool exists;
};

KVC_DEVICE MlaColumn find_mla_column(const kvc_mla_params &p, const MlaUnit &u, uint32_t c) {
    const uint32_t column = u.first_column + c, row = column / p.q_heads;
    MlaColumn out;
    out.exists = column < u.columns;
    out.row = u.first_row + row;
    out.head = column - row * p.q_heads;
    const int64_t position = u.length - u.rows + row;
    out.high = p.causal != 0 ? position : u.length - 1;
    out.low = p.window != 0 ? position - p.window + 1 : 0;
    if (!out.exists) out.high = -1;
    return out;
}

// Copies of tiles into the stages. A warp copies four tokens of a tile, eight lanes each.
struct MlaPipeline {
    static constexpr uint32_t kLanes = 8, kWarpRows = 32 / kLanes;
    static constexpr int kChunks = kMlaDim / 8 / kLanes;

    const uint16_t *k;
    uint16_t *tiles;
    uint8_t *readable;
    uint32_t begin, end, count;
    int64_t first_token;
    int32_t entry; // of the block table, for this lane's token of the next tile to be copied

    KVC_DEVICE uint32_t row() const { return warp_id() * kWarpRows + lane_id() / kLanes; }
    // Blocks that the window has left behind may be gone: not even their ids are read.
    KVC_DEVICE bool wanted(uint32_t token) const { return token < end && token >= first_token; }

    // Reads the entry for tile `n` ahead of its use.
    KVC_DEVICE void look_up(const BlockTable &table, uint32_t n) {
        const uint32_t token = begin + n * kMlaTokens + row();
        entry = -1;
        if (n >= count || !wanted(token)) return;
        const uint32_t index =
            table.power_of_two ? token >> table.shift : token / table.block_tokens;
        if (index < table.count) entry = table.entries[index];
    }

    // Starts the copies of tile `n`, whose entries were looked up; always closes a group.
    KVC_DEVICE void issue(const kvc_mla_params &p, const BlockTable &table, uint32_t n) {
        if (n < count) {
            const uint32_t stage = n % kMlaStages, lane = lane_id() % kLanes;
            const uint32_t token = begin + n * kMlaTokens + row();
            const bool known = static_cast<uint32_t>(entry) < table.num_blocks;
            const bool valid = wanted(token) && known;
            if (wanted(token) && !known && lane == 0) raise(p.error_flag, kFlagBlock);
            const uint32_t slot = table.power_of_two ? token & (table.block_tokens - 1)
                                                     : token % table.block_tokens;
            const int64_t from = valid ? entry * p.k_block + slot * p.k_token : 0;
            uint16_t *to = tiles + (stage * kMlaTokens + row()) * kMlaRow;
KVC_UNROLL
            for (int i = 0; i < kChunks; ++i) {
                const uint32_t channel = (i * kLanes + lane) * 8;
                cp_async_16(to + channel, k + from + channel, valid);
            }
            if (lane == 0) readable[stage * kMlaTokens + row()] = valid;
        }
        cp_async_commit();
        look_up(table, n + 1);
    }
};

KVC_DEVICE float max_over_lanes(float x) {
    for (uint32_t with = 16; with > 0; with /= 2) x = max_f32(x, shfl_xor(kFullMask, x, with));
    return x;
}
KVC_DEVICE float sum_over_lanes(float x) {
    for (uint32_t with = 16; with > 0; with /= 2) x += shfl_xor(kFullMask, x, with);
    return x;
}

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

// The columns whose softmax a warp keeps: the largest score, and a lane's part of the sum.
template <uint32_t Columns> struct MlaRows {
    static constexpr int kOwn = Columns / kMlaWarps;
    uint32_t low[kOwn], after[kOwn]; // tokens seen: [low, after), in 32 bits for their registers
    float m[kOwn], l[kOwn];
};

// Turns the scores of a tile into weights, and says how earlier sums shrink.
template <typename T, uint32_t Columns>
KVC_DEVICE void mla_weights(const kvc_mla_params &p, uint32_t first, bool readable,
                            MlaRows<Columns> &rows, MlaShared<Columns> &shared) {
    const uint32_t token = first + lane_id();
KVC_UNROLL
    for (int c = 0; c < MlaRows<Columns>::kOwn; ++c) {
        const uint32_t column = warp_id() * MlaRows<Columns>::kOwn + c, lane = lane_id();
        const float dot = shared.scores[0][column * kScoreRow + lane] +
                          shared.scores[1][column * kScoreRow + lane];
        const bool seen = readable && token >= rows.low[c] && token < rows.after[c];
        const float x = seen ? dot * p.scale * kLog2e : -infinity();
        const float top = max_f32(rows.m[c], max_over_lanes(x));
        const float scale = weight(rows.m[c], top), w = weight(x, top);
        rows.l[c] = rows.l[c] * scale + w;
        rows.m[c] = top;
        shared.weights[column * kWeightRow + lane] = static_cast<uint16_t>(T::pack(w, 0.0f));
        if (lane == 0) shared.scales[column] = scale;
    }
}

// A warp's 64 channels of every column: lane 4g+t has channels g and g+8 of each 16, columns 2t and
// 2t+1 of each 8.
template <uint32_t Columns> struct MlaSums {
    float o[kWarpValues / 16][Columns / 8][4];
};

template <typename T, uint32_t Columns>
KVC_DEVICE void mla_accumulate(const uint16_t *tile, const MlaShared<Columns> &shared,
                               MlaSums<Columns> &sums) {
    constexpr int kTiles = Columns / 8;
    const uint32_t lane = lane_id(), t = lane % 4;
    uint32_t w[kTiles][2][2];
KVC_UNROLL
    for (int n = 0; n < kTiles; ++n) {
        uint32_t r[4];
        ldmatrix_x4(r, shared.weights + (n * 8 + lane % 8) * kWeightRow + lane / 8 * 8);
        for (int j = 0; j < 4; ++j) w[n][j / 2][j % 2] = r[j];
        const float scale[2] = {shared.scales[n * 8 + 2 * t], shared.scales[n * 8 + 2 * t + 1]};
        for (int i = 0; i < static_cast<int>(kWarpValues / 16); ++i)
            for (int j = 0; j < 4; ++j) sums.o[i][n][j] *= scale[j % 2];
    }
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

// Writes four channels of a finished row; the thread with the first of them writes its LSE.
KVC_DEVICE void write_mla_row(const kvc_mla_params &p, const MlaColumn &c, uint32_t channel,
                              const Quad &q) {
    const Finish f = finish_row(q.top, q.sum, false, 0.0f);
    const float x[4] = {q.o[0] * f.factor, q.o[1] * f.factor, q.o[2] * f.factor,
                        q.o[3] * f.factor};
    store_four(p.out, c.row * p.out_row + c.head * p.out_head + channel, p.out_dtype, x);
    if (channel == 0 && p.lse != nullptr)
        p.lse[static_cast<int64_t>(c.row) * p.q_heads + c.head] = f.lse;
}

template <typename T, uint32_t Columns>
KVC_DEVICE void mla_unit(const kvc_mla_params &p, const Piece &item, uint32_t unit) {
    constexpr int kTiles = Columns / 16;
    const MlaUnit u = find_mla_unit(p, item.seq, unit * Columns);
    if (u.first_column >= u.columns) return;
    const uint32_t lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
    MlaShared<Columns> &shared = *KVC_SMEM(MlaShared<Columns>);

    MlaPipeline pipe;
    pipe.k = static_cast<const uint16_t *>(p.k);
    pipe.tiles = shared.tiles[0];
    pipe.readable = shared.readable[0];
    pipe.begin = item.begin;
    pipe.end = item.end;
    pipe.count = (item.end - item.begin + kMlaTokens - 1) / kMlaTokens;
    pipe.first_token = u.first_token;
    const BlockTable table(p.table, p.table_indptr, p.table_stride, item.seq, p.block_tokens,
                           p.num_blocks, p.error_flag);
    pipe.look_up(table, 0);
    for (uint32_t n = 0; n < kMlaStages - 1; ++n) pipe.issue(p, table, n);

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
KVC_UNROLL
    for (int c = 0; c < MlaRows<Columns>::kOwn; ++c) {
        const MlaColumn column = find_mla_column(p, u, warp * MlaRows<Columns>::kOwn + c);
        rows.low[c] = column.low > 0 ? static_cast<uint32_t>(column.low) : 0;
        rows.after[c] = column.high >= 0 ? static_cast<uint32_t>(column.high) + 1 : 0;
        rows.m[c] = -infinity();
        rows.l[c] = 0.0f;
    }
    MlaSums<Columns> sums;
    for (int i = 0; i < static_cast<int>(kWarpValues / 16); ++i)
        for (uint32_t n = 0; n < Columns / 8; ++n)
            for (int j = 0; j < 4; ++j) sums.o[i][n][j] = 0.0f;

    for (uint32_t n = 0; n < pipe.count; ++n) {
        // This lane's part of tile n is there, then everybody's; all are done with tile n - 1,
        // whose place the next one takes.
        cp_async_wait<kMlaStages - 2>();
        sync_threads();
        pipe.issue(p, table, n + kMlaStages - 1);
        const uint32_t stage = n % kMlaStages;
        mla_scores<T, Columns>(q, shared.tiles[stage], shared);
        sync_threads();
        mla_weights<T, Columns>(p, item.begin + n * kMlaTokens, shared.readable[stage][lane] != 0,
                                rows, shared);
        sync_threads();
        mla_accumulate<T, Columns>(shared.tiles[stage], shared, sums);
    }
    cp_async_wait<0>();
    sync_threads();

    // All channels of a column side by side, where the tiles were.
    float *values = reinterpret_cast<float *>(shared.tiles);
    static_assert(Columns * kValueRow * 4 <= sizeof shared.tiles, "the sums fit the tiles");
    float *tops = shared.scores[0], *denominators = shared.scores[1];
KVC_UNROLL
    for (int c = 0; c < MlaRows<Columns>::kOwn; ++c) {
        const float l = sum_over_lanes(rows.l[c]);
        if (lane == 0) {
            tops[warp * MlaRows<Columns>::kOwn + c] = rows.m[c];
            denominators[warp * MlaRows<Columns>::kOwn + c] = l;
        }
    }
KVC_UNROLL
    for (int i = 0; i < static_cast<int>(kWarpValues / 16); ++i)
KVC_UNROLL
        for (int n = 0; n < static_cast<int>(Columns / 8); ++n)
KVC_UNROLL
            for (int j = 0; j < 4; ++j) {
                const uint32_t column = n * 8 + 2 * t + j % 2;
                const uint32_t channel = warp * kWarpValues + i * 16 + g + j / 2 * 8;
                values[column * kValueRow + channel] = sums.o[i][n][j];
            }
    sync_threads();

    const Place place(p, item);
    constexpr uint32_t kQuads = kMlaValues / 4;
    const Partials<Columns, kMlaValues> partials = {p.partial, p.max_slots, p.units};
    for (uint32_t i = thread_x(); i < Columns * kQuads; i += kMlaThreads) {
        const uint32_t c = i / kQuads, channel = i % kQuads * 4;
        const MlaColumn column = find_mla_column(p, u, c);
        if (!column.exists) continue;
        const float *at = values + c * kValueRow + channel;
        const Quad quad = {tops[c], denominators[c], {at[0], at[1], at[2], at[3]}};
        if (place.pieces == 1)
            write_mla_row(p, column, channel, quad);
        else
            store_partial(partials, place.slot(place.piece), unit, c, channel, quad);
    }
    if (place.pieces == 1) return;

    uint32_t *ticket = p.tickets + static_cast<int64_t>(place.first) * p.units + unit;
    if (!last_to_arrive(ticket, place.pieces, shared.arrived)) return;
    for (uint32_t i = thread_x(); i < Columns * kQuads; i += kMlaThreads) {
        const uint32_t c = i / kQuads, channel = i % kQuads * 4;
        const MlaColumn column = find_mla_column(p, u, c);
        if (!column.exists) continue;
        write_mla_row(p, column, channel,
                      merge_partials(partials, place, unit, c, channel));
    }
}

template <typename T, uint32_t Columns> KVC_DEVICE void mla_decode(const kvc_mla_params &p) {
    for_each_piece<false>(p, KVC_SMEM(uint32_t),
                   [&](const Piece &item, uint32_t unit) { mla_unit<T, Columns>(p, item, unit); });
}

} // namespace kvc

// Defines the kernel for one cache type and width; `blocks` a multiprocessor.
#define KVC_MLA(type, Type, columns, blocks)                                             \
    KVC_KERNEL(kvc_mla_##type##_c##columns, kvc_mla_params, 256, blocks) {               \
        kvc::mla_decode<kvc::Type, columns>(p);                                          \
    }
