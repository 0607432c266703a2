// Paged decode: attention of a few query tokens of each sequence over its cached context, on tensor
// cores with tokens as the M operand.
//
// A unit of work is a piece of one sequence's context for one KV head and up to eight of its query
// columns (a column is a query row and a query head that reads this KV head). Four warps share a
// piece in tiles of 64 tokens; each warp copies, scores and sums its own 16 tokens of every tile,
// so that no barrier of the block stands in the loop:
//
//   S[16 tokens x 8 columns] = K Q'      A = K by ldmatrix, B = Q in registers
//   O'[d x 8 columns]       += V' P      A = V by ldmatrix.trans, B = P through movmatrix
//
// The warps' states are merged in shared memory. A sequence of several pieces writes partial
// results; the last block to arrive merges them in the order of the pieces, so that the result does
// not depend on who was last.
#pragma once
#include "decode_plan.cuh"
#include "state.cuh"

namespace kvc {

constexpr uint32_t kDecodeWarps = 4, kDecodeThreads = 128;
constexpr uint32_t kWarpTokens = kTileTokens / kDecodeWarps;
constexpr uint32_t kColumns = 8;
constexpr int kStages = 3;

// What a column of a unit is, and which tokens it sees: [low, high].
struct Column {
    int64_t low, high;
    uint32_t row, head;
    bool exists;
    float slope, position;
};

// The part of a call that a unit works on.
struct Unit {
    uint32_t seq, kv_head, first_column, columns, first_row, rows;
    int64_t length;
    int64_t first_token; // no row sees an earlier one
    bool empty;          // no column of this tile belongs to the sequence
};

KVC_DEVICE Unit find_unit(const kvc_decode_params &p, uint32_t seq, uint32_t unit) {
    const uint32_t group = p.q_heads / p.kv_heads, tiles = p.units / p.kv_heads;
    Unit u;
    u.seq = seq;
    u.kv_head = unit / tiles;
    u.first_column = unit % tiles * kColumns;
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
    u.columns = group * u.rows;
    const int32_t length = p.seq_lens[seq];
    u.length = length > 0 ? length : 0;
    u.first_token = p.window != 0 ? u.length - u.rows + 1 - p.window : 0;
    u.empty = u.first_column >= u.columns;
    return u;
}

KVC_DEVICE Column find_column(const kvc_decode_params &p, const Unit &u, uint32_t c) {
    const uint32_t group = p.q_heads / p.kv_heads, column = u.first_column + c;
    Column out;
    out.exists = column < u.columns;
    out.row = u.first_row + column / group;
    out.head = u.kv_head * group + column % group;
    const int64_t position = u.length - u.rows + column / group;
    out.high = p.causal != 0 ? position : u.length - 1;
    out.low = p.window != 0 ? position - p.window + 1 : 0;
    if (!out.exists) out.high = -1;
    out.slope = out.exists && p.slopes != nullptr ? p.slopes[out.head] : 0.0f;
    out.position = static_cast<float>(position);
    return out;
}

// The score of a token for a column in powers of two; -inf where it is not seen.
KVC_DEVICE float score(const kvc_decode_params &p, const Column &c, float dot, int64_t token,
                       bool readable) {
    if (!readable || token < c.low || token > c.high) return -infinity();
    float x = dot * p.scale;
    if (p.softcap != 0.0f) x = p.softcap * tanh_approx(x / p.softcap);
    if (p.slopes != nullptr) x += c.slope * (static_cast<float>(token) - c.position);
    return x * kLog2e;
}

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

// The rows of a warp's 16 tokens, K and V, for each stage of its pipeline. A row has eight elements
// more than it needs, which spreads the rows of a matrix load over all banks.
template <typename T, int HeadDim> struct Pipeline {
    static constexpr int kRow = HeadDim + 8, kRowChunks = HeadDim / 8;
    static constexpr int kTileElements = kWarpTokens * kRow;

    uint16_t *tiles;
    const uint16_t *k, *v;
    uint32_t begin, end;
    int64_t first_token;
    uint64_t readable; // 16 bits a tile under way, the oldest lowest

    KVC_DEVICE uint16_t *tile(uint32_t n, uint32_t which) const {
        return tiles + (n % kStages * 2 + which) * kTileElements;
    }

    // Starts the copies of tile `n`, and always closes a group.
    KVC_DEVICE void issue(const kvc_decode_params &p, const BlockTable &table, uint32_t n,
                          uint32_t count, uint32_t under_way) {
        uint32_t mask = 0;
        if (n < count) {
            const uint32_t lane = lane_id();
            const uint32_t token = begin + n * kTileTokens + warp_id() * kWarpTokens + lane;
            uint32_t own_slot = 0, own_block = ~0u;
            // Blocks that the window has left behind may be gone: not even their ids are read.
            if (lane < kWarpTokens && token < end && token >= first_token)
                own_block = static_cast<uint32_t>(table.find(token, own_slot));
            mask = ballot(kFullMask, own_block != ~0u);
            for (int i = 0; i < kRowChunks / 2; ++i) {
                const uint32_t index = i * 32 + lane;
                const uint32_t row = index / kRowChunks, chunk = index % kRowChunks;
                const uint32_t block = shfl(kFullMask, own_block, row);
                const uint32_t slot = shfl(kFullMask, own_slot, row);
                const bool valid = block != ~0u;
                const int64_t from_k = valid ? block * p.k_block + slot * p.k_token : 0;
                const int64_t from_v = valid ? block * p.v_block + slot * p.v_token : 0;
                cp_async_16(tile(n, 0) + row * kRow + chunk * 8, k + from_k + chunk * 8, valid);
                cp_async_16(tile(n, 1) + row * kRow + chunk * 8, v + from_v + chunk * 8, valid);
            }
        }
        cp_async_commit();
        readable |= static_cast<uint64_t>(mask) << (16 * under_way);
    }
};

// A warp's sums over its tokens: lane 4g+t has columns 2t and 2t+1, channels g and g+8 of each 16.
template <int HeadDim> struct WarpState {
    float m[2], l[2];
    float o[HeadDim / 16][4];
};

template <typename T, int HeadDim>
KVC_DEVICE void accumulate(const kvc_decode_params &p, const Column (&columns)[2],
                           const uint32_t (&q)[HeadDim / 16][2], const uint16_t *k,
                           const uint16_t *v, uint32_t token, uint32_t readable,
                           WarpState<HeadDim> &state) {
    constexpr int kRow = HeadDim + 8;
    const uint32_t lane = lane_id(), g = lane / 4;
    float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const uint16_t *k_at = k + lane % 16 * kRow + lane / 16 * 8;
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, k_at + i * 16);
        T::mma(s, a, q[i]);
    }
    float scale[2];
KVC_UNROLL
    for (int c = 0; c < 2; ++c) {
        s[c] = score(p, columns[c], s[c], int64_t(token) + g, readable >> g & 1);
        s[2 + c] = score(p, columns[c], s[2 + c], int64_t(token) + g + 8, readable >> (g + 8) & 1);
        const float top = max_f32(state.m[c], max_over_tokens(max_f32(s[c], s[2 + c])));
        scale[c] = weight(state.m[c], top);
        s[c] = weight(s[c], top);
        s[2 + c] = weight(s[2 + c], top);
        state.l[c] = state.l[c] * scale[c] + (s[c] + s[2 + c]);
        state.m[c] = top;
    }
    const uint32_t weights[2] = {movmatrix_trans(T::pack(s[0], s[1])),
                                 movmatrix_trans(T::pack(s[2], s[3]))};
    const uint16_t *v_at = v + (lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 8;
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, v_at + i * 16);
        for (int j = 0; j < 4; ++j) state.o[i][j] *= scale[j % 2];
        T::mma(state.o[i], a, weights);
    }
}

// Writes four channels of a finished row; the thread with the first of them writes its LSE.
KVC_DEVICE void write_row(const kvc_decode_params &p, const Column &c, uint32_t channel, float m,
                          float l, const float (&o)[4]) {
    const bool has_sink = p.sinks != nullptr;
    const Finish f = finish_row(m, l, has_sink, has_sink ? p.sinks[c.head] : 0.0f);
    const float x[4] = {o[0] * f.factor, o[1] * f.factor, o[2] * f.factor, o[3] * f.factor};
    store_four(p.out, c.row * p.out_row + c.head * p.out_head + channel, p.out_dtype, x);
    if (channel == 0 && p.lse != nullptr)
        p.lse[static_cast<int64_t>(c.row) * p.q_heads + c.head] = f.lse;
}

// Where the partial results of a slot lie.
struct Partial {
    float *o, *lse;
};
template <int HeadDim>
KVC_DEVICE Partial find_partial(const kvc_decode_params &p, uint32_t slot, uint32_t unit) {
    const int64_t row = (static_cast<int64_t>(slot) * p.units + unit) * kColumns;
    const int64_t rows = static_cast<int64_t>(p.max_slots) * p.units * kColumns;
    return {p.partial + row * HeadDim, p.partial + rows * HeadDim + row};
}

// Merges the states of the four warps, or the partial results of all pieces, channel by channel.
template <int HeadDim>
KVC_DEVICE void merge_pieces(const kvc_decode_params &p, const kvc_decode_item &item,
                             const Unit &u, uint32_t unit) {
    constexpr uint32_t kQuads = HeadDim / 4;
    for (uint32_t i = thread_x(); i < kColumns * kQuads; i += kDecodeThreads) {
        const uint32_t c = i / kQuads, channel = i % kQuads * 4;
        const Column column = find_column(p, u, c);
        if (!column.exists) continue;
        float top = -infinity(), sum = 0.0f, o[4] = {};
        for (uint32_t piece = 0; piece < item.pieces; ++piece) {
            const Partial from = find_partial<HeadDim>(p, item.first_slot + piece, unit);
            const float lse = load_fresh(from.lse + c);
            const Vec16 v = load_fresh_16(from.o + c * HeadDim + channel);
            const float next = max_f32(top, lse);
            const float keep = weight(top, next), add = weight(lse, next);
            sum = sum * keep + add;
            for (int j = 0; j < 4; ++j) o[j] = o[j] * keep + as_float(v.word[j]) * add;
            top = next;
        }
        write_row(p, column, channel, top, sum, o);
    }
}

template <typename T, int HeadDim>
KVC_DEVICE void decode_unit(const kvc_decode_params &p, const kvc_decode_item &item,
                            uint32_t unit) {
    constexpr int kSteps = HeadDim / 16;
    const Unit u = find_unit(p, item.seq, unit);
    if (u.empty) return;
    const uint32_t lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;

    Pipeline<T, HeadDim> pipe;
    pipe.tiles = KVC_SMEM(uint16_t) + warp * kStages * 2 * Pipeline<T, HeadDim>::kTileElements;
    pipe.k = static_cast<const uint16_t *>(p.k) + u.kv_head * p.k_head;
    pipe.v = static_cast<const uint16_t *>(p.v) + u.kv_head * p.v_head;
    pipe.begin = item.begin;
    pipe.end = item.end;
    pipe.first_token = u.first_token;
    pipe.readable = 0;
    const BlockTable table(p.table, p.table_indptr, p.table_stride, u.seq, p.block_tokens,
                           p.num_blocks, p.error_flag);
    const uint32_t count = (item.end - item.begin + kTileTokens - 1) / kTileTokens;
    for (uint32_t n = 0; n < kStages - 1; ++n) pipe.issue(p, table, n, count, n);

    // B fragments of the queries: column g, channels 2t, 2t+1 and those eight further.
    uint32_t q[kSteps][2];
    const Column own = find_column(p, u, g);
    const int64_t q_at = own.row * p.q_row + own.head * p.q_head + 2 * t;
KVC_UNROLL
    for (int i = 0; i < kSteps; ++i)
        for (int j = 0; j < 2; ++j)
            q[i][j] = own.exists ? load_pair<T>(p.q, q_at + i * 16 + j * 8, p.q_dtype) : 0;

    const Column columns[2] = {find_column(p, u, 2 * t), find_column(p, u, 2 * t + 1)};
    WarpState<HeadDim> state;
    for (int c = 0; c < 2; ++c) {
        state.m[c] = -infinity();
        state.l[c] = 0.0f;
    }
    for (int i = 0; i < kSteps; ++i)
        for (int j = 0; j < 4; ++j) state.o[i][j] = 0.0f;

    for (uint32_t n = 0; n < count; ++n) {
        // This lane's part of tile n is there, then every lane's; all are done with tile n - 1,
        // whose place tile n + 2 takes.
        cp_async_wait<kStages - 2>();
        sync_warp();
        pipe.issue(p, table, n + kStages - 1, count, kStages - 1);
        const uint32_t token = item.begin + n * kTileTokens + warp * kWarpTokens;
        accumulate<T, HeadDim>(p, columns, q, pipe.tile(n, 0), pipe.tile(n, 1), token,
                               static_cast<uint32_t>(pipe.readable) & 0xffff, state);
        pipe.readable >>= 16;
    }
    cp_async_wait<0>();
    sync_threads();

    // The warps' states side by side: channels of a column together, columns four words apart.
    constexpr uint32_t kColumnWords = HeadDim + 4;
    float *states = KVC_SMEM(float);
    float *tops = states + kDecodeWarps * kColumns * kColumnWords;
    float *sums = tops + kDecodeWarps * kColumns;
KVC_UNROLL
    for (int c = 0; c < 2; ++c) {
        const float l = sum_over_tokens(state.l[c]);
        const uint32_t at = warp * kColumns + 2 * t + c;
        if (g == 0) {
            tops[at] = state.m[c];
            sums[at] = l;
        }
KVC_UNROLL
        for (int i = 0; i < kSteps; ++i) {
            states[at * kColumnWords + i * 16 + g] = state.o[i][c];
            states[at * kColumnWords + i * 16 + g + 8] = state.o[i][2 + c];
        }
    }
    sync_threads();

    constexpr uint32_t kQuads = HeadDim / 4;
    const Partial partial = find_partial<HeadDim>(p, item.first_slot + item.piece, unit);
    for (uint32_t i = thread_x(); i < kColumns * kQuads; i += kDecodeThreads) {
        const uint32_t c = i / kQuads, channel = i % kQuads * 4;
        const Column column = find_column(p, u, c);
        if (!column.exists) continue;
        float top = -infinity(), sum = 0.0f, o[4] = {};
        for (uint32_t w = 0; w < kDecodeWarps; ++w) top = max_f32(top, tops[w * kColumns + c]);
        for (uint32_t w = 0; w < kDecodeWarps; ++w) {
            const uint32_t at = w * kColumns + c;
            const float factor = weight(tops[at], top);
            sum += sums[at] * factor;
            for (int j = 0; j < 4; ++j)
                o[j] += states[at * kColumnWords + channel + j] * factor;
        }
        if (item.pieces == 1) {
            write_row(p, column, channel, top, sum, o);
            continue;
        }
        const float factor = top == -infinity() ? 0.0f : 1.0f / sum;
        Vec16 v;
        for (int j = 0; j < 4; ++j) v.word[j] = as_bits(o[j] * factor);
        store_16(partial.o + c * HeadDim + channel, v);
        if (channel == 0)
            partial.lse[c] = top == -infinity() ? -infinity() : top + log2_approx(sum);
    }
    if (item.pieces == 1) return;

    // The last block of this sequence and unit to come here merges; its ticket is 0 again then.
    fence_device();
    sync_threads();
    uint32_t *arrived = KVC_SMEM(uint32_t);
    uint32_t *ticket = p.tickets + static_cast<int64_t>(item.ticket) * p.units + unit;
    if (thread_x() == 0) {
        *arrived = atomic_add(ticket, 1);
        fence_device();
    }
    sync_threads();
    if (*arrived + 1 != item.pieces) return;
    if (thread_x() == 0) *ticket = 0;
    merge_pieces<HeadDim>(p, item, u, unit);
}

template <typename T, int HeadDim> KVC_DEVICE void decode(const kvc_decode_params &p) {
    const uint64_t total = static_cast<uint64_t>(*p.item_count) * p.units;
    for (uint64_t work = block_x(); work < total; work += grid_x()) {
        const kvc_decode_item item = p.items[work / p.units];
        decode_unit<T, HeadDim>(p, item, static_cast<uint32_t>(work % p.units));
        sync_threads();
    }
}

} // namespace kvc

// Defines the kernel for one cache type and head dimension; `blocks` a multiprocessor.
#define KVC_DECODE(type, Type, dim, blocks)                                              \
    KVC_KERNEL(kvc_decode_##type##_d##dim, kvc_decode_params, 128, blocks) {             \
        kvc::decode<kvc::Type, dim>(p);                                                  \
    }
