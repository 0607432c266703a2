// Paged decode over rows of codes: FP8, INT8_T, INT4_T and NVFP4, read as stored.
//
// The same shape as decode.cuh, with the products in f16 and codes turned into f16 in registers
// (quant.cuh). Scales stay out of them where they can: a key's scale multiplies its scores, a
// value's scale its weights, one of the whole head the query or the output. So
//
//   score(t, c) = s_t * sum q code + m_t * sum q          m_t: what code 0 stands for
//   O          += sum (p_t * s_t) code,  sum p_t * m_t in a sum of its own
//
// Only NVFP4 has scales within a row, which multiply the codes. Weights times scales are kept in
// the range of f16 by a power of two, the largest scale met, that the sums are counted in.
//
// Lane 4g+t takes the same channels of every key, whichever come together in its words; the queries
// are put in that order once a unit. Values come through transposed matrix loads of 16-bit units,
// which give a lane the codes of two tokens side by side. Values that are stored rotated are rotated
// back when the unit is finished.
#pragma once
#include "code_state.cuh"
#include "query_rows.cuh"
#include "quant.cuh"
#include "token_pipe.cuh"

namespace kvc {

// The formats of src/quant/row.rs. Channels of the values' matrices: `channel(i, g, half)` is row g +
// 8 half of the i-th.
template <typename C> struct ByteFormat {
    using Codes = C;
    KVC_DEVICE static constexpr uint32_t channel(uint32_t i, uint32_t g, uint32_t half) {
        return 16 * i + 2 * g + half;
    }
};
template <typename C> struct NibbleFormat {
    using Codes = C;
    KVC_DEVICE static constexpr uint32_t channel(uint32_t i, uint32_t g, uint32_t half) {
        return i / 2 * 32 + g / 2 * 8 + C::row_element(g % 2, i % 2 * 2 + half);
    }
};
struct Fp8E4m3Rows : ByteFormat<E4m3> {
    static constexpr bool kScaled = false, kMinimum = false, kGroups = false;
};
struct Fp8E5m2Rows : ByteFormat<E5m2> {
    static constexpr bool kScaled = false, kMinimum = false, kGroups = false;
};
struct Int8Rows : ByteFormat<Int8> {
    static constexpr bool kScaled = true, kMinimum = false, kGroups = false;
};
struct Int4Rows : NibbleFormat<NibblesLess8> {
    static constexpr bool kScaled = true, kMinimum = true, kGroups = false;
};
struct Nvfp4Rows : NibbleFormat<E2m1> {
    static constexpr bool kScaled = false, kMinimum = false, kGroups = true;
};

// Bytes of scales of a row.
template <typename Format> KVC_DEVICE constexpr uint32_t scale_bytes(uint32_t head_dim) {
    return Format::kGroups ? head_dim / 16 : Format::kMinimum ? 4 : Format::kScaled ? 2 : 0;
}

// Two scales of e4m3, of one token each or of two groups, as f16 pairs.
KVC_DEVICE uint32_t group_scales(uint32_t low, uint32_t high) {
    uint32_t pairs[2];
    E4m3::unpack(low | high << 8, pairs);
    // Whole, so that small codes stay exact.
    return E4m3::kFactor == 1.0f ? pairs[0] : mul_f16x2(pairs[0], twice(0x5c00));
}

template <typename Format, int HeadDim, typename Pipe>
KVC_DEVICE void accumulate_codes(const kvc_decode_token_params &p, const Unit &u,
                                 const Column (&columns)[2], const float (&q_factors)[2],
                                 const float (&q_sums)[2], const uint32_t (&q)[HeadDim / 16][2],
                                 const TokenSource &source, uint32_t n, const Pipe &pipe,
                                 CodeState<HeadDim> &state) {
    using Codes = typename Format::Codes;
    using Words = RowWords<Codes, HeadDim>;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const unsigned char *keys = pipe.rows(pipe.from, 0), *values = pipe.rows(pipe.from, 1);
    const unsigned char *k_scales = pipe.scales(pipe.from, 0), *v_scales = pipe.scales(pipe.from, 1);

    float strip[1][4] = {}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float (&s)[4] = strip[0];
KVC_UNROLL
    for (uint32_t j = 0; j < Words::kRuns; ++j) {
        const uint32_t byte = Words::word(t, j, 0) * 4;
        WordRun<Words::kRun> run[2];
KVC_UNROLL
        for (int i = 0; i < 2; ++i) {
            const uint32_t row = g + 8 * i;
            run[i] = *reinterpret_cast<const WordRun<Words::kRun> *>(
                keys + row * Words::kBytes + Pipe::key_chunk(row, byte / 16) * 16 + byte % 16);
        }
KVC_UNROLL
        for (uint32_t w = 0; w < Words::kRun; ++w) {
            uint32_t low[Codes::kPairs], high[Codes::kPairs];
            Codes::unpack(run[0].word[w], low);
            Codes::unpack(run[1].word[w], high);
            if constexpr (Format::kGroups) {
                const uint32_t group = Words::word(t, j, w) * Words::kPerWord / 16;
                const uint32_t a = group_scales(k_scales[g * kScaleSlot + group],
                                                k_scales[(g + 8) * kScaleSlot + group]);
KVC_UNROLL
                for (int i = 0; i < Codes::kPairs; ++i) {
                    low[i] = mul_f16x2(low[i], permute(a, 0, 0x1010));
                    high[i] = mul_f16x2(high[i], permute(a, 0, 0x3232));
                }
            }
KVC_UNROLL
            for (uint32_t i = 0; i < Codes::kPairs / 2; ++i) {
                const uint32_t step = (j * Words::kRun + w) * (Codes::kPairs / 2) + i;
                const uint32_t a[4] = {low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]};
                mma_f16(step % 2 == 0 ? s : odd, a, q[step]);
            }
        }
    }

    const uint32_t mask = pipe.mask();
    const int32_t token = static_cast<int32_t>(source.begin + n * kTileTokens +
                                               warp_id() * kTokenWarpTokens + g);
    const int32_t tokens[2] = {token, token + 8};
    const bool readable[2] = {(mask >> g & 1) != 0, (mask >> (g + 8) & 1) != 0};
    float v_scale[2] = {1.0f, 1.0f}, v_minimum[2] = {0.0f, 0.0f};
KVC_UNROLL
    for (int i = 0; i < 2; ++i) {
        float scale = 1.0f, minimum = 0.0f;
        if constexpr (Format::kScaled) {
            const uint32_t k = *reinterpret_cast<const uint32_t *>(k_scales + (g + 8 * i) * kScaleSlot);
            const uint32_t v = *reinterpret_cast<const uint32_t *>(v_scales + (g + 8 * i) * kScaleSlot);
            scale = widen_f16(static_cast<uint16_t>(k));
            v_scale[i] = readable[i] ? widen_f16(static_cast<uint16_t>(v)) : 0.0f;
            if constexpr (Format::kMinimum) {
                minimum = widen_f16(static_cast<uint16_t>(k >> 16)) + Codes::kLess * scale;
                v_minimum[i] = readable[i] ? widen_f16(static_cast<uint16_t>(v >> 16)) +
                                                 Codes::kLess * v_scale[i]
                                           : 0.0f;
            }
        }
KVC_UNROLL
        for (int c = 0; c < 2; ++c) {
            float &x = s[2 * i + c];
            x += odd[2 * i + c];
            if constexpr (Format::kScaled) x *= scale;
            if constexpr (Format::kMinimum) x += minimum * q_sums[c];
            x *= q_factors[c];
        }
    }
    make_scores(p.call, u, columns, tokens, readable, s);
    float keep[2];
    state.weigh(strip, keep);
    if constexpr (Format::kMinimum)
        for (int c = 0; c < 2; ++c)
            state.minima[c] =
                state.minima[c] * keep[c] + (s[c] * v_minimum[0] + s[2 + c] * v_minimum[1]);
    if constexpr (Format::kScaled) {
        const float same = state.count_in(max_over_tokens(max_f32(v_scale[0], v_scale[1])));
        const float unit = state.per_unit();
        for (int i = 0; i < 4; ++i) s[i] *= v_scale[i / 2] * unit;
        for (int c = 0; c < 2; ++c) keep[c] *= same;
    }
    const uint32_t weights[2] = {movmatrix_trans(pack_f16(s[0], s[1])),
                                 movmatrix_trans(pack_f16(s[2], s[3]))};
    state.rescale(keep);

    const uint32_t row = lane_id() % 16;
    constexpr uint32_t kPerChunk = Codes::kPairs / 2; // products
KVC_UNROLL
    for (uint32_t two = 0; two < Pipe::kChunks; two += 2) {
        uint32_t codes[4];
        ldmatrix_x4_trans(codes, values + row * Words::kBytes +
                                     Pipe::value_chunk(row, two + lane_id() / 16) * 16);
KVC_UNROLL
        for (uint32_t half = 0; half < 2; ++half) {
            uint32_t low[Codes::kPairs], high[Codes::kPairs];
            Codes::rows(codes[2 * half], low);
            Codes::rows(codes[2 * half + 1], high);
            if constexpr (Format::kGroups) {
                // Channels 32 to a chunk, of which this lane's four are in one group.
                const unsigned char *at = v_scales + (two + half) * 2 + g / 4 + 2 * t * kScaleSlot;
                const uint32_t a = group_scales(at[0], at[kScaleSlot]);
                const uint32_t b = group_scales(at[8 * kScaleSlot], at[9 * kScaleSlot]);
KVC_UNROLL
                for (int i = 0; i < Codes::kPairs; ++i) {
                    low[i] = mul_f16x2(low[i], a);
                    high[i] = mul_f16x2(high[i], b);
                }
            }
KVC_UNROLL
            for (uint32_t i = 0; i < kPerChunk; ++i) {
                const uint32_t a[4] = {low[2 * i], low[2 * i + 1], high[2 * i], high[2 * i + 1]};
                mma_f16(state.o[(two + half) * kPerChunk + i], a, weights);
            }
        }
    }
}

template <typename Format, int HeadDim, typename Pipe>
KVC_DEVICE void decode_token_unit(const kvc_decode_token_params &params,
                                  const Piece &item, uint32_t unit, Pipe &pipe) {
    using Codes = typename Format::Codes;
    const kvc_decode_params &p = params.call;
    const Unit u = find_unit(p, item.seq, unit);
    if (u.empty) return;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;

    TokenSource source;
    source.k = static_cast<const unsigned char *>(p.k) + u.kv_head * p.k_head;
    source.v = static_cast<const unsigned char *>(p.v) + u.kv_head * p.v_head;
    source.k_scales =
        static_cast<const unsigned char *>(params.k_scales) + u.kv_head * params.k_scale_head;
    source.v_scales =
        static_cast<const unsigned char *>(params.v_scales) + u.kv_head * params.v_scale_head;
    source.begin = item.begin;
    source.end = item.end;
    source.first_token = static_cast<uint32_t>(u.first_token);
    source.count = (item.end - item.begin + kTileTokens - 1) / kTileTokens;
    const BlockTable table(p.table, p.table_indptr, p.table_stride, u.seq, p.block_tokens,
                           p.num_blocks, p.error_flag);
    pipe.look_up(source, table, 0);

    const QueryRows<HeadDim> rows(KVC_SMEM(unsigned char) + params.query_at);
    rows.fill(p, u, params.k_rotated != 0);
    sync_threads();
    uint32_t q[HeadDim / 16][2];
    RowWords<Codes, HeadDim>::queries(rows, g, t, q);
    const float k_factor =
        Codes::kFactor * (params.k_heads == nullptr ? 1.0f : params.k_heads[u.kv_head]);
    const float q_factors[2] = {rows.factors[2 * t] * k_factor, rows.factors[2 * t + 1] * k_factor};
    const float q_sums[2] = {rows.sums[2 * t], rows.sums[2 * t + 1]};
    const Column columns[2] = {find_column(p, u, 2 * t), find_column(p, u, 2 * t + 1)};
    CodeState<HeadDim> state;

    const uint32_t ahead = p.stages - 1;
    for (uint32_t next = 0; next < source.count + ahead; ++next) {
        pipe.issue(source, table, next);
        if (next < ahead) continue;
        pipe.wait();
        accumulate_codes<Format, HeadDim>(params, u, columns, q_factors, q_sums, q, source,
                                          next - ahead, pipe, state);
        pipe.release();
    }
    pipe.finish();
    sync_threads();

    const float v_factor =
        (Format::kScaled ? state.in_units() : 1.0f) * Codes::kFactor *
        (params.v_heads == nullptr ? 1.0f : params.v_heads[u.kv_head]);
    // A minimum counts for every channel, once for all of a token's lanes.
    float minima[2] = {0.0f, 0.0f};
    if constexpr (Format::kMinimum)
        for (int c = 0; c < 2; ++c) minima[c] = sum_over_tokens(state.minima[c]);
    put_warp_sums<HeadDim>(state.m, state.l, [&](int i, int half, int c, uint32_t &channel) {
        channel = Format::channel(static_cast<uint32_t>(i), g, static_cast<uint32_t>(half));
        return state.o[i][half * 2 + c] * v_factor + minima[c];
    });
    finish_unit<HeadDim>(p, item, unit, u, params.v_rotated != 0);
}

template <typename Format, int HeadDim>
KVC_DEVICE void decode_token(const kvc_decode_token_params &params) {
    const kvc_decode_params &p = params.call;
    TokenPipeline<RowWords<typename Format::Codes, HeadDim>::kBytes, scale_bytes<Format>(HeadDim)> pipe(
        params);
    for_each_piece<true>(p, KVC_SMEM(uint32_t), [&](const Piece &item, uint32_t unit) {
        decode_token_unit<Format, HeadDim>(params, item, unit, pipe);
    });
}

} // namespace kvc

// Defines the kernel of one format and head dimension; `blocks` a multiprocessor, as
// src/kernels/decode_token.rs has it.
#define KVC_DECODE_TOKEN(format, Format, dim, blocks)                                    \
    KVC_KERNEL(kvc_decode_##format##_d##dim, kvc_decode_token_params, 128, blocks) {     \
        kvc::decode_token<kvc::Format, dim>(p);                                          \
    }
