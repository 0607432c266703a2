// What the kernels of multi-head latent attention decode share, whatever the type of the latents: the
// query columns of a unit, copies of tiles into shared memory, the softmax state of a column, and how
// sums become output rows. It knows nothing of how scores and sums are made.
#pragma once
#include "hadamard.cuh"
#include "kvc_params.h"
#include "page.cuh"
#include "split.cuh"

namespace kvc {

constexpr uint32_t kMlaDim = 576, kMlaValues = 512;
constexpr uint32_t kMlaWarps = 8, kMlaThreads = 256;
constexpr uint32_t kMlaTokens = 32; // of a tile
// Rows in shared memory are longer than what they hold, which spreads the rows of a matrix load, and
// the lanes of a store, over all banks.
constexpr uint32_t kMlaPadding = 16; // bytes of a latent's
constexpr uint32_t kScoreRow = kMlaTokens + 4, kWeightRow = kMlaTokens + 8;
constexpr uint32_t kValueRow = kMlaValues + 4;
// Steps of the matrix instruction over a warp's half of the channels.
constexpr int kMlaSteps = kMlaDim / 16 / 2;
constexpr uint32_t kWarpValues = kMlaValues / kMlaWarps;

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

// The tokens of a piece that are worked on, in tiles from the first on.
struct MlaSpan {
    uint32_t begin, end, first_token;

    KVC_DEVICE MlaSpan(const Piece &item, const MlaUnit &u)
        : begin(item.begin), end(item.end),
          first_token(u.first_token > 0 ? static_cast<uint32_t>(u.first_token) : 0) {}

    // Whether there is a tile `n`.
    KVC_DEVICE bool has(uint32_t n) const { return begin + n * kMlaTokens < end; }
    // Blocks that the window has left behind may be gone: not even their ids are read.
    KVC_DEVICE bool wanted(uint32_t token) const { return token < end && token >= first_token; }
};

// Copies of tiles into the stages. A warp copies four tokens of a tile, eight lanes each. Strides are
// in elements, rows of `RowChunks` units of 16 bytes.
template <typename Element, uint32_t RowChunks, uint32_t Stages> struct MlaPipeline {
    static constexpr uint32_t kLanes = 8;
    static constexpr uint32_t kPerChunk = 16 / sizeof(Element);
    static constexpr uint32_t kRow = (RowChunks * 16 + kMlaPadding) / sizeof(Element);

    const Element *k;
    Element *tiles;
    uint8_t *readable;
    const MlaSpan &span;
    int32_t entry; // of the block table, for this lane's token of the next tile to be copied

    KVC_DEVICE MlaPipeline(const kvc_mla_params &p, const MlaSpan &of, Element *to, uint8_t *flags)
        : k(static_cast<const Element *>(p.k)), tiles(to), readable(flags), span(of) {}

    // The row of a tile that a thread copies a part of.
    KVC_DEVICE static uint32_t row() { return opaque(thread_x()) / kLanes; }

    // Reads the entry for tile `n` ahead of its use.
    KVC_DEVICE void look_up(const BlockTable &table, uint32_t n) {
        const uint32_t token = span.begin + n * kMlaTokens + row();
        entry = -1;
        if (!span.wanted(token)) return;
        const uint32_t index =
            table.power_of_two ? token >> table.shift : token / table.block_tokens;
        if (index < table.count) entry = table.entries[index];
    }

    // Starts the copies of tile `n`, whose entries were looked up; always closes a group. Of a tile
    // that there is `beside(valid, block, slot)` copies what a token has besides.
    template <typename Beside>
    KVC_DEVICE void issue(const kvc_mla_params &p, const BlockTable &table, uint32_t n,
                          Beside beside) {
        if (span.has(n)) {
            const uint32_t thread = opaque(thread_x()), lane = thread % kLanes;
            const uint32_t place = n % Stages * kMlaTokens + thread / kLanes;
            const uint32_t token = span.begin + n * kMlaTokens + thread / kLanes;
            const bool known = static_cast<uint32_t>(entry) < table.num_blocks;
            const bool wanted = span.wanted(token), valid = wanted && known;
            if (wanted && !known && lane == 0) raise(p.error_flag, kFlagBlock);
            const uint32_t slot = table.power_of_two ? token & (table.block_tokens - 1)
                                                     : token % table.block_tokens;
            const int64_t from = valid ? entry * p.k_block + slot * p.k_token : 0;
            Element *to = tiles + place * kRow;
KVC_UNROLL
            for (uint32_t i = 0; i < (RowChunks + kLanes - 1) / kLanes; ++i) {
                const uint32_t chunk = i * kLanes + lane;
                if (RowChunks % kLanes != 0 && chunk >= RowChunks) break;
                cp_async_16(to + chunk * kPerChunk, k + from + chunk * kPerChunk, valid);
            }
            if (lane == 0) readable[place] = valid;
            beside(valid, entry, slot);
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

// The tokens that a column sees, [low, after), in 32 bits for their registers.
struct MlaSight {
    uint32_t low, after;
    KVC_DEVICE MlaSight(const kvc_mla_params &p, const MlaUnit &u, uint32_t c) {
        const MlaColumn column = find_mla_column(p, u, c);
        low = column.low > 0 ? static_cast<uint32_t>(column.low) : 0;
        after = column.high >= 0 ? static_cast<uint32_t>(column.high) + 1 : 0;
    }
};

// The columns whose softmax a warp keeps: the largest score, and a lane's part of the sum.
template <uint32_t Columns> struct MlaRows {
    static constexpr int kOwn = Columns / kMlaWarps;
    float m[kOwn], l[kOwn];

    KVC_DEVICE MlaRows() {
        for (int c = 0; c < kOwn; ++c) {
            m[c] = -infinity();
            l[c] = 0.0f;
        }
    }
    KVC_DEVICE static uint32_t column(int c) { return warp_id() * kOwn + static_cast<uint32_t>(c); }
    // Puts the columns' largest scores and sums into shared memory.
    KVC_DEVICE void put(float *tops, float *denominators) const {
KVC_UNROLL
        for (int c = 0; c < kOwn; ++c) {
            const float all = sum_over_lanes(l[c]);
            if (lane_id() == 0) {
                tops[column(c)] = m[c];
                denominators[column(c)] = all;
            }
        }
    }
};

// A warp's 64 channels of every column: lane 4g+t has channels g and g+8 of each 16, columns 2t and
// 2t+1 of each 8.
template <uint32_t Columns> struct MlaSums {
    float o[kWarpValues / 16][Columns / 8][4];

    KVC_DEVICE MlaSums() {
        for (int i = 0; i < static_cast<int>(kWarpValues / 16); ++i)
            for (uint32_t n = 0; n < Columns / 8; ++n)
                for (int j = 0; j < 4; ++j) o[i][n][j] = 0.0f;
    }
    // The weights of a tile as the other operand, earlier sums shrunk by `scales`.
    KVC_DEVICE void begin(const uint16_t *weights, const float *scales,
                          uint32_t (&w)[Columns / 8][2][2]) {
        const uint32_t lane = opaque(lane_id()), t = lane % 4;
KVC_UNROLL
        for (int n = 0; n < static_cast<int>(Columns / 8); ++n) {
            uint32_t r[4];
            ldmatrix_x4(r, weights + (n * 8 + lane % 8) * kWeightRow + lane / 8 * 8);
            for (int j = 0; j < 4; ++j) w[n][j / 2][j % 2] = r[j];
            const float scale[2] = {scales[n * 8 + 2 * t], scales[n * 8 + 2 * t + 1]};
            for (int i = 0; i < static_cast<int>(kWarpValues / 16); ++i)
                for (int j = 0; j < 4; ++j) o[i][n][j] *= scale[j % 2];
        }
    }
    // Puts the sums into shared memory, all channels of a column side by side: `value(i, half, x,
    // channel)` is what sum x of row g + 8 half of the warp's i-th matrix is, and its channel.
    template <typename Value> KVC_DEVICE void put(float *values, Value value) const {
        const uint32_t t = opaque(lane_id()) % 4;
KVC_UNROLL
        for (int i = 0; i < static_cast<int>(kWarpValues / 16); ++i)
KVC_UNROLL
            for (int n = 0; n < static_cast<int>(Columns / 8); ++n)
KVC_UNROLL
                for (int j = 0; j < 4; ++j) {
                    uint32_t channel;
                    const float x = value(i, j / 2, o[i][n][j], channel);
                    values[(n * 8 + 2 * t + j % 2) * kValueRow + warp_id() * kWarpValues + channel] = x;
                }
    }
};

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

// Writes the columns of a unit, or stores them as partial results that the last block to arrive merges,
// `Own` channels a thread: `read(column, channel, o)` gives sums. Values that are stored rotated are
// rotated back, for which a thread has sixteen. The last barrier before is the caller's.
template <uint32_t Columns, int Own, typename Read>
KVC_DEVICE void finish_mla_unit(const kvc_mla_params &p, const Piece &item, uint32_t unit,
                                const MlaUnit &u, const float *tops, const float *denominators,
                                uint32_t *arrived, bool rotated, Read read) {
    const Place place(p, item);
    constexpr uint32_t kQuads = kMlaValues / 4, kParts = kMlaValues / Own;
    const Partials<Columns, kMlaValues> partials = {p.partial, p.max_slots, p.units};
KVC_ROLL
    for (uint32_t i = thread_x(); i < Columns * kParts; i += kMlaThreads) {
        // Known to follow from the thread, signs would be made before the tiles and held meanwhile.
        const uint32_t own = opaque(i), c = i / kParts, first = own % kParts * Own;
        const MlaColumn column = find_mla_column(p, u, c);
        if (!column.exists && !rotated) continue;
        float o[Own];
        read(c, first, o);
        if constexpr (hadamard_block(kMlaValues) <= 32 * Own)
            if (rotated) unrotate_channels<kMlaValues>(o, first, own % 32);
        if (!column.exists) continue;
KVC_UNROLL
        for (int j = 0; j < Own; j += 4) {
            const uint32_t channel = first + j;
            const Quad quad = {tops[c], denominators[c], {o[j], o[j + 1], o[j + 2], o[j + 3]}};
            if (place.pieces == 1)
                write_mla_row(p, column, channel, quad);
            else
                store_partial(partials, place.slot(place.piece), unit, c, channel, quad);
        }
    }
    if (place.pieces == 1) return;

    uint32_t *ticket = p.tickets + static_cast<int64_t>(place.first) * p.units + unit;
    if (!last_to_arrive(ticket, place.pieces, arrived)) return;
    for (uint32_t i = thread_x(); i < Columns * kQuads; i += kMlaThreads) {
        const uint32_t c = i / kQuads, channel = i % kQuads * 4;
        const MlaColumn column = find_mla_column(p, u, c);
        if (!column.exists) continue;
        write_mla_row(p, column, channel,
                      merge_partials(partials, place, unit, c, channel));
    }
}

} // namespace kvc
