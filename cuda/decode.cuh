// Paged decode: attention of a few query tokens of each sequence over its cached context, on tensor
// cores with tokens as the M operand.
//
// A block works on a piece of one sequence's context for one unit (decode_unit.cuh). Four warps share
// the piece in tiles of 64 tokens that come through a pipeline (decode_pipe.cuh); each warp scores
// and sums 16 tokens of every tile, with a softmax state of its own, so that no barrier of the block
// stands in the loop:
//
//   S[16 tokens x 8 columns] = K Q'   A = K by ldmatrix, B = Q in registers
//   O'[d x 8 columns]       += V' P   A = V by ldmatrix.trans, B = P through movmatrix
//
// The warps' states are merged in shared memory. A sequence of several pieces writes partial
// results; the last block to arrive merges them (split.cuh).
#pragma once
#include "decode_pipe.cuh"

namespace kvc {

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

// A warp's sums over its tokens: lane 4g+t has columns 2t and 2t+1, channels g and g+8 of each 16.
template <int HeadDim> struct WarpState {
    float m[2], l[2];
    float o[HeadDim / 16][4];
};

template <typename T, int HeadDim>
KVC_DEVICE void accumulate(const kvc_decode_params &p, const Unit &u, const Column (&columns)[2],
                           const uint32_t (&q)[HeadDim / 16][2], const Part &part,
                           WarpState<HeadDim> &state) {
    // Two sums, so that a product waits for the one before the last.
    float s[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, part.k + i * 16);
        T::mma(i % 2 == 0 ? s : odd, a, q[i]);
    }
    for (int i = 0; i < 4; ++i) s[i] += odd[i];
    make_scores(p, u, columns, part.tokens, part.readable, s);
    float scale[2];
KVC_UNROLL
    for (int c = 0; c < 2; ++c) {
        const float top = max_f32(state.m[c], max_over_tokens(max_f32(s[c], s[2 + c])));
        scale[c] = weight(state.m[c], top);
        s[c] = weight(s[c], top);
        s[2 + c] = weight(s[2 + c], top);
        state.l[c] = state.l[c] * scale[c] + (s[c] + s[2 + c]);
        state.m[c] = top;
    }
    const uint32_t weights[2] = {movmatrix_trans(T::pack(s[0], s[1])),
                                 movmatrix_trans(T::pack(s[2], s[3]))};
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, part.v + i * 16);
        for (int j = 0; j < 4; ++j) state.o[i][j] *= scale[j % 2];
        T::mma(state.o[i], a, weights);
    }
}

template <typename T, int HeadDim, typename Pipe>
KVC_DEVICE void decode_unit(const kvc_decode_params &p, const kvc_decode_item &item, uint32_t unit,
                            Pipe &pipe) {
    constexpr int kSteps = HeadDim / 16;
    const Unit u = find_unit(p, item.seq, unit);
    if (u.empty) return;
    const uint32_t lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;

    Source source;
    source.k = static_cast<const uint16_t *>(p.k) + u.kv_head * p.k_head;
    source.v = static_cast<const uint16_t *>(p.v) + u.kv_head * p.v_head;
    source.begin = item.begin;
    source.end = item.end;
    source.first_token = static_cast<uint32_t>(u.first_token);
    source.count = (item.end - item.begin + kTileTokens - 1) / kTileTokens;
    const BlockTable table(p.table, p.table_indptr, p.table_stride, u.seq, p.block_tokens,
                           p.num_blocks, p.error_flag);
    pipe.look_up(source, table, 0);

    // B fragments of the queries: column g, channels 2t, 2t+1 and those eight further.
    uint32_t q[kSteps][2];
    const Column own = find_column(p, u, g);
    const int64_t q_at = own.row * p.q_row + own.head * p.q_head + 2 * t;
KVC_UNROLL
    for (int i = 0; i < 2 * kSteps; ++i) q[i / 2][i % 2] = 0;
    if (own.exists && p.q_dtype == T::id) {
KVC_UNROLL
        for (int i = 0; i < 2 * kSteps; ++i)
            q[i / 2][i % 2] = load_pair<T>(p.q, q_at + i * 8, T::id);
    } else if (own.exists) {
KVC_UNROLL
        for (int i = 0; i < 2 * kSteps; ++i)
            q[i / 2][i % 2] = load_pair<T>(p.q, q_at + i * 8, p.q_dtype);
    }

    const Column columns[2] = {find_column(p, u, 2 * t), find_column(p, u, 2 * t + 1)};
    WarpState<HeadDim> state;
    for (int c = 0; c < 2; ++c) {
        state.m[c] = -infinity();
        state.l[c] = 0.0f;
    }
    for (int i = 0; i < kSteps; ++i)
        for (int j = 0; j < 4; ++j) state.o[i][j] = 0.0f;

    const uint32_t ahead = p.stages - 1;
    for (uint32_t next = 0; next < source.count + ahead; ++next) {
        pipe.issue(source, table, next);
        if (next < ahead) continue;
        pipe.wait();
        accumulate<T, HeadDim>(p, u, columns, q, pipe.part(source, next - ahead), state);
        pipe.release();
    }
    pipe.finish();
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
    const Partials<kColumns, HeadDim> partials = {p.partial, p.max_slots, p.units};
    for (uint32_t i = thread_x(); i < kColumns * kQuads; i += kDecodeThreads) {
        const uint32_t c = i / kQuads, channel = i % kQuads * 4;
        const Column column = find_column(p, u, c);
        if (!column.exists) continue;
        Quad quad = {-infinity(), 0.0f, {}};
        for (uint32_t w = 0; w < kDecodeWarps; ++w)
            quad.top = max_f32(quad.top, tops[w * kColumns + c]);
        for (uint32_t w = 0; w < kDecodeWarps; ++w) {
            const uint32_t at = w * kColumns + c;
            const float factor = weight(tops[at], quad.top);
            quad.sum += sums[at] * factor;
            for (int j = 0; j < 4; ++j)
                quad.o[j] += states[at * kColumnWords + channel + j] * factor;
        }
        if (item.pieces == 1)
            write_row(p, column, channel, quad);
        else
            store_partial(partials, item.first_slot + item.piece, unit, c, channel, quad);
    }
    if (item.pieces == 1) return;

    uint32_t *ticket = p.tickets + static_cast<int64_t>(item.ticket) * p.units + unit;
    if (!last_to_arrive(ticket, item.pieces, KVC_SMEM(uint32_t))) return;
    for (uint32_t i = thread_x(); i < kColumns * kQuads; i += kDecodeThreads) {
        const uint32_t c = i / kQuads, channel = i % kQuads * 4;
        const Column column = find_column(p, u, c);
        if (column.exists)
            write_row(p, column, channel,
                      merge_partials(partials, item.first_slot, item.pieces, unit, c, channel));
    }
}

template <typename T, int HeadDim, typename Pipe>
KVC_DEVICE void decode_with(const kvc_decode_params &p, Pipe &&pipe) {
    const uint64_t total = static_cast<uint64_t>(*p.item_count) * p.units;
    for (uint64_t work = block_x(); work < total; work += grid_x()) {
        const kvc_decode_item item = p.items[work / p.units];
        decode_unit<T, HeadDim>(p, item, static_cast<uint32_t>(work % p.units), pipe);
        pipe.give_back();
        sync_threads();
    }
}

template <typename T, int HeadDim> KVC_DEVICE void decode(const kvc_decode_params &p) {
#if defined(KVC_EMULATE) || __CUDA_ARCH__ >= 900
    if (p.bulk != 0) return decode_with<T, HeadDim>(p, BulkPipeline<HeadDim>(p));
#endif
    decode_with<T, HeadDim>(p, CopyPipeline<HeadDim>(p));
}

} // namespace kvc

// Defines the kernel for one cache type and head dimension; `blocks` a multiprocessor, as
// src/kernels/decode.rs has it.
#define KVC_DECODE(type, Type, dim, blocks)                                              \
    KVC_KERNEL(kvc_decode_##type##_d##dim, kvc_decode_params, 128, blocks) {             \
        kvc::decode<kvc::Type, dim>(p);                                                  \
    }
