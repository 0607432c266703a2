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
// How the warps' sums become a row is in decode_finish.cuh.
#pragma once
#include "decode_finish.cuh"
#include "decode_pipe.cuh"

namespace kvc {

// A warp's sums over its tokens: lane 4g+t has columns 2t and 2t+1, channels g and g+8 of each 16.
template <int HeadDim> struct WarpState {
    float m[2], l[2];
    float o[HeadDim / 16][4];
};

template <typename T, int HeadDim, typename State>
KVC_DEVICE void accumulate(const kvc_decode_params &p, const Unit &u, const Column (&columns)[2],
                           const uint32_t (&q)[HeadDim / 16][2], const Part &part,
                           State &state) {
    // Two sums, so that a product waits for the one before the last.
    float s[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, part.k + i * 16);
        T::mma(i % 2 == 0 ? s : odd, a, q[i]);
    }
    const float factor = score_factor(p);
    for (int i = 0; i < 4; ++i) s[i] = (s[i] + odd[i]) * factor;
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
KVC_DEVICE void decode_unit(const kvc_decode_params &p, const Piece &item, uint32_t unit,
                            Pipe &pipe) {
    constexpr int kSteps = HeadDim / 16;
    const Unit u = find_unit(p, item.seq, unit);
    if (u.empty) return;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;

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

    put_warp_sums<HeadDim>(state.m, state.l, [&](int i, int half, int c, uint32_t &channel) {
        channel = i * 16 + g + half * 8;
        return state.o[i][half * 2 + c];
    });
    finish_unit<HeadDim>(p, item, unit, u, false);
}

template <typename T, int HeadDim, typename Pipe>
KVC_DEVICE void decode_with(const kvc_decode_params &p, Pipe &&pipe) {
    for_each_piece<true>(p, KVC_SMEM(uint32_t), [&](const Piece &item, uint32_t unit) {
        decode_unit<T, HeadDim>(p, item, unit, pipe);
        pipe.give_back();
    });
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
