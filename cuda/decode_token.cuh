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
// Codes are half of what a 16-bit cache has or less, so instructions are the bound unless they are few.
// A score or scale that is the largest so far is rare: only then are the warp's sums brought to it, and
// only then do its lanes exchange anything. Tiles that all columns see whole need no masks.
//
// Matrix loads of 16-bit units give lane 4g+t word t of each 16 bytes of a key, whichever codes come
// together in it; the queries are put in that order once a unit. Values come through transposed loads,
// which give a lane the codes of two tokens side by side. Values that are stored rotated are rotated
// back when the unit is finished.
#pragma once
#include "code_state.cuh"
#include "query_rows.cuh"
#include "token_bulk.cuh"
#include "token_formats.cuh"

namespace kvc {

// Bytes of scales of a row.
template <typename Format> KVC_DEVICE constexpr uint32_t scale_bytes(uint32_t head_dim) {
    return Format::kGroups ? head_dim / 16 : Format::kMinimum ? 4 : Format::kScaled ? 2 : 0;
}

// A row in units of 16 bytes, and the channels of those: of 80 with codes of 4 bits they are 96. Queries
// are zero where they are more than the row, and sums of values go nowhere; what lies there is a number.
template <typename Format, int HeadDim> constexpr uint32_t kRowChunks =
    (HeadDim * Format::Codes::kBits + 127) / 128;
template <typename Format, int HeadDim> constexpr int kRowChannels =
    kRowChunks<Format, HeadDim> * 128 / Format::Codes::kBits;

// Four scales of e4m3, as f16.
KVC_DEVICE void group_scales(uint32_t four, uint32_t (&pairs)[2]) {
    E4m3::unpack(four, pairs);
    // Whole, so that small codes stay exact.
    if constexpr (E4m3::kFactor != 1.0f)
        for (uint32_t &pair : pairs) pair = mul_f16x2(pair, twice(0x5c00));
}

// The sums of a warp, of which the largest score and the unit change seldom.
template <int HeadDim> struct TokenState : CodeState<HeadDim> {
    float base[2]; // m, or the least float where no token was seen
    KVC_DEVICE TokenState() : weights{0.0f, 0.0f, 0.0f, 0.0f} { base[0] = base[1] = -kLargest; }
    static constexpr float kLargest = 3.4028234663852886e38f;
    float weights[4]; // sums of the rounded ones, as a row of `o` would be

    // Makes weights of scores; `largest` of the lane's scales of values where they are `Scaled`.
    template <bool Scaled, int Strips>
    KVC_DEVICE void weigh(float (&s)[Strips][4], float largest) {
        float top[2];
KVC_UNROLL
        for (int c = 0; c < 2; ++c) {
            top[c] = max_f32(s[0][c], s[0][2 + c]);
            for (int i = 1; i < Strips; ++i) top[c] = max_f32(top[c], max_f32(s[i][c], s[i][2 + c]));
        }
        bool more = top[0] > this->m[0] || top[1] > this->m[1];
        if constexpr (Scaled) more = more || largest >= this->in_units();
        if (ballot(kFullMask, more) != 0) {
            float keep[2];
KVC_UNROLL
            for (int c = 0; c < 2; ++c) {
                const float next = max_f32(this->m[c], max_over_tokens(top[c]));
                keep[c] = weight(this->m[c], next);
                this->l[c] *= keep[c];
                this->minima[c] *= keep[c];
                this->m[c] = next;
                base[c] = max_f32(next, -kLargest);
            }
            if constexpr (Scaled) {
                const float same = this->count_in(max_over_tokens(largest));
                for (int c = 0; c < 2; ++c) keep[c] *= same;
            }
            this->rescale(keep);
            for (int j = 0; j < 4; ++j) weights[j] *= keep[j % 2];
        }
KVC_UNROLL
        for (int i = 0; i < Strips; ++i)
            for (int j = 0; j < 4; ++j) {
                s[i][j] = exp2_approx(s[i][j] - base[j % 2]);
                this->l[j % 2] += s[i][j];
            }
    }
};

template <typename Format, int HeadDim, int Channels, typename Pipe>
KVC_DEVICE void accumulate_codes(const kvc_decode_params &p, const Unit &u,
                                 const Column (&columns)[2], const float (&q_factors)[2],
                                 const float (&q_sums)[2], const uint32_t (&q)[Channels / 16][2],
                                 const TokenSource &source, uint32_t n, const Pipe &pipe,
                                 TokenState<Channels> &state) {
    using Codes = typename Format::Codes;
    constexpr uint32_t kChunks = kRowChunks<Format, HeadDim>, kStrips = Pipe::kStrips;
    constexpr uint32_t kProducts = Codes::kPairs / 2; // of a chunk
    constexpr uint32_t kWords = Pipe::kWords, kFours = (kChunks + 3) / 4;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;

    uint32_t k_scales[kStrips][2][kWords], key_groups[kStrips][2][2 * kFours];
    if constexpr (scale_bytes<Format>(HeadDim) != 0) pipe.row_scales(0, g, k_scales);
    if constexpr (Format::kGroups) {
        // Of each chunk's two groups, that of this lane's words.
        const uint32_t pick = 0x6420 + t / 2 * 0x1111;
KVC_UNROLL
        for (uint32_t i = 0; i < 2 * kStrips; ++i) {
            const uint32_t (&words)[kWords] = k_scales[i / 2][i % 2];
KVC_UNROLL
            for (uint32_t j = 0; j < 2 * kFours; j += 2) {
                uint32_t pairs[2];
                group_scales(permute(words[j], HeadDim > 64 ? words[j + 1] : 0, pick), pairs);
                key_groups[i / 2][i % 2][j] = pairs[0];
                key_groups[i / 2][i % 2][j + 1] = pairs[1];
            }
        }
    }
    float s[kStrips][4];
    for (uint32_t strip = 0; strip < kStrips; ++strip)
        for (int i = 0; i < 4; ++i)
            if constexpr (Format::kSmall)
                s[strip][i] = -Format::kLess * q_sums[i % 2];
            else
                s[strip][i] = 0.0f;
KVC_UNROLL
    for (uint32_t two = 0; two < kChunks; two += 2) {
KVC_UNROLL
        for (uint32_t strip = 0; strip < kStrips; ++strip) {
            uint32_t codes[4];
            ldmatrix_x4(codes, pipe.at(0, strip, two));
KVC_UNROLL
            for (uint32_t half = 0; half < 2 && two + half < kChunks; ++half) {
                uint32_t low[Codes::kPairs], high[Codes::kPairs];
                Format::keys(codes[2 * half], low);
                Format::keys(codes[2 * half + 1], high);
                if constexpr (Format::kGroups) {
                    const uint32_t both = half == 0 ? 0x1010 : 0x3232;
                    const uint32_t a = permute(key_groups[strip][0][two / 2], 0, both);
                    const uint32_t b = permute(key_groups[strip][1][two / 2], 0, both);
KVC_UNROLL
                    for (int i = 0; i < Codes::kPairs; ++i) {
                        low[i] = mul_f16x2(low[i], a);
                        high[i] = mul_f16x2(high[i], b);
                    }
                }
KVC_UNROLL
                for (uint32_t i = 0; i < kProducts; ++i) {
                    const uint32_t a[4] = {low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]};
                    mma_f16(s[strip], a, q[(two + half) * kProducts + i]);
                }
            }
        }
    }

    const bool whole = pipe.whole(source, n);
    float v_scale[kStrips][2], v_minimum[kStrips][2], largest = 0.0f;
    if constexpr (Format::kScaled) {
        uint32_t v_scales[kStrips][2][kWords];
        pipe.row_scales(1, g, v_scales);
KVC_UNROLL
        for (uint32_t strip = 0; strip < kStrips; ++strip)
            for (int i = 0; i < 2; ++i) {
                const uint32_t k = k_scales[strip][i][0];
                const uint32_t v = v_scales[strip][i][0];
                const bool used = whole || pipe.can_read(source, n, strip, g + 8 * i);
                const float scale = widen_f16(static_cast<uint16_t>(k));
                v_scale[strip][i] = used ? widen_f16(static_cast<uint16_t>(v)) : 0.0f;
                largest = max_f32(largest, v_scale[strip][i]);
                float minimum = 0.0f;
                if constexpr (Format::kMinimum) {
                    minimum = widen_f16(static_cast<uint16_t>(k >> 16)) + Format::kLess * scale;
                    v_minimum[strip][i] = used ? widen_f16(static_cast<uint16_t>(v >> 16)) +
                                                     Format::kLess * v_scale[strip][i]
                                               : 0.0f;
                }
                for (int c = 0; c < 2; ++c) {
                    float &x = s[strip][2 * i + c];
                    x *= scale;
                    if constexpr (Format::kMinimum) x += minimum * q_sums[c];
                }
            }
    }
KVC_UNROLL
    for (uint32_t strip = 0; strip < kStrips; ++strip)
        for (int i = 0; i < 4; ++i) s[strip][i] *= q_factors[i % 2];
    const int32_t begin = static_cast<int32_t>(source.begin + n * Pipe::kTokens);
    const int32_t end = begin + static_cast<int32_t>(Pipe::kTokens);
    if (!whole || begin < u.plain_from || end > u.plain_to) {
KVC_UNROLL
        for (uint32_t strip = 0; strip < kStrips; ++strip) {
            int32_t tokens[2];
            bool readable[2];
KVC_UNROLL
            for (uint32_t i = 0; i < 2; ++i) {
                tokens[i] = static_cast<int32_t>(pipe.token(source, n, strip, g + 8 * i));
                readable[i] = pipe.can_read(source, n, strip, g + 8 * i);
            }
            make_scores(p, u, columns, tokens, readable, s[strip]);
        }
    }
    state.template weigh<Format::kScaled>(s, largest);

    uint32_t weights[kStrips][2];
KVC_UNROLL
    for (uint32_t strip = 0; strip < kStrips; ++strip)
        for (int i = 0; i < 2; ++i) {
            float &x = s[strip][2 * i], &y = s[strip][2 * i + 1];
            if constexpr (Format::kMinimum) {
                state.minima[0] += x * v_minimum[strip][i];
                state.minima[1] += y * v_minimum[strip][i];
            }
            if constexpr (Format::kScaled) {
                const float factor = v_scale[strip][i] * state.per_unit();
                x *= factor;
                y *= factor;
            }
            weights[strip][i] = movmatrix_trans(pack_f16(x, y));
        }

    if constexpr (Format::kSmall) {
        constexpr uint32_t kOnes[4] = {twice(0x3c00), twice(0x3c00), twice(0x3c00), twice(0x3c00)};
KVC_UNROLL
        for (uint32_t strip = 0; strip < kStrips; ++strip)
            mma_f16(state.weights, kOnes, weights[strip]);
    }

    // Scales of the tokens 2t and 2t + 1 of each strip, and those eight further.
    uint32_t even[kStrips][2][kWords], odd[kStrips][2][kWords];
    if constexpr (Format::kGroups) {
        pipe.row_scales(1, 2 * t, even);
        pipe.row_scales(1, 2 * t + 1, odd);
    }
KVC_UNROLL
    for (uint32_t two = 0; two < kChunks; two += 2) {
KVC_UNROLL
        for (uint32_t strip = 0; strip < kStrips; ++strip) {
            uint32_t codes[4], first[2], second[2];
            ldmatrix_x4_trans(codes, pipe.at(1, strip, two));
            if constexpr (Format::kGroups) {
                // Channels 32 to a chunk, of which this lane's four are in one group.
                const uint32_t pick = 0x6240 + g / 4 * 0x1111;
                group_scales(permute(even[strip][0][two / 2], odd[strip][0][two / 2], pick), first);
                group_scales(permute(even[strip][1][two / 2], odd[strip][1][two / 2], pick), second);
            }
KVC_UNROLL
            for (uint32_t half = 0; half < 2 && two + half < kChunks; ++half) {
                uint32_t low[Codes::kPairs], high[Codes::kPairs];
                Format::values(codes[2 * half], low);
                Format::values(codes[2 * half + 1], high);
                if constexpr (Format::kGroups) {
KVC_UNROLL
                    for (int i = 0; i < Codes::kPairs; ++i) {
                        low[i] = mul_f16x2(low[i], first[half]);
                        high[i] = mul_f16x2(high[i], second[half]);
                    }
                }
KVC_UNROLL
                for (uint32_t i = 0; i < kProducts; ++i) {
                    const uint32_t a[4] = {low[2 * i], low[2 * i + 1], high[2 * i], high[2 * i + 1]};
                    mma_f16(state.o[(two + half) * kProducts + i], a, weights[strip]);
                }
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
    source.count = (item.end - item.begin + Pipe::kTokens - 1) / Pipe::kTokens;
    const BlockTable table(p.table, p.table_indptr, p.table_stride, u.seq, p.block_tokens,
                           p.num_blocks, p.error_flag);
    pipe.look_up(source, table);

    const QueryRows<HeadDim> rows(KVC_SMEM(unsigned char) + params.query_at);
    rows.fill(p, u, params.k_rotated != 0);
    sync_threads();
    constexpr int kChannels = kRowChannels<Format, HeadDim>;
    uint32_t q[kChannels / 16][2];
    RowWords<Codes, HeadDim, 1>::queries(rows, g, t, q);
    if constexpr (Format::kSmall) {
KVC_UNROLL
        for (uint32_t at = 0; at < kChannels / 8; ++at)
            q[at / 2][at % 2] = mul_f16x2(q[at / 2][at % 2],
                                          twice((29 - Format::place(at % Codes::kPairs)) << 10));
    }
    const float k_factor =
        key_factor<Format>() * (params.k_heads == nullptr ? 1.0f : params.k_heads[u.kv_head]);
    const float q_factors[2] = {rows.factors[2 * t] * k_factor, rows.factors[2 * t + 1] * k_factor};
    constexpr float kDown = Format::kSmall ? 1.0f / key_factor<Format>() : 1.0f;
    const float q_sums[2] = {rows.sums[2 * t] * kDown, rows.sums[2 * t + 1] * kDown};
    const Column columns[2] = {find_column(p, u, 2 * t), find_column(p, u, 2 * t + 1)};
    TokenState<kChannels> state;

    const uint32_t ahead = pipe.ahead();
    for (uint32_t next = 0; next < source.count + ahead; ++next) {
        pipe.issue(source, table, next);
        if (next < ahead) continue;
        pipe.wait(source, next - ahead);
        accumulate_codes<Format, HeadDim, kChannels>(p, u, columns, q_factors, q_sums, q, source,
                                                     next - ahead, pipe, state);
        pipe.release();
    }
    pipe.finish();
    sync_threads();

    const float v_factor =
        (Format::kScaled ? state.in_units() : 1.0f) *
        (params.v_heads == nullptr ? 1.0f : params.v_heads[u.kv_head]);
    // A minimum counts for every channel, once for all of a token's lanes.
    float minima[2] = {0.0f, 0.0f};
    if constexpr (Format::kMinimum)
        for (int c = 0; c < 2; ++c) minima[c] = sum_over_tokens(state.minima[c]);
    if constexpr (Format::kSmall)
        for (int c = 0; c < 2; ++c) minima[c] -= Format::kLess * state.weights[c] * v_factor;
    constexpr int kMatrices = kChannels / 16;
    put_warp_sums<HeadDim, kMatrices>(state.m, state.l, [&](int i, int half, int c, uint32_t &channel) {
        channel = Format::channel(static_cast<uint32_t>(i), g, static_cast<uint32_t>(half));
        return state.o[i][half * 2 + c] * (value_factor<Format>(half) * v_factor) + minima[c];
    });
    finish_unit<HeadDim, kRotatedOwn<HeadDim>>(p, item, unit, u, params.v_rotated != 0);
}

template <typename Format, int HeadDim, typename Pipe>
KVC_DEVICE void decode_token_with(const kvc_decode_token_params &params, Pipe &&pipe) {
    const kvc_decode_params &p = params.call;
    for_each_piece<true>(p, KVC_SMEM(uint32_t), [&](const Piece &item, uint32_t unit) {
        decode_token_unit<Format, HeadDim>(params, item, unit, pipe);
        pipe.give_back();
    });
}

template <typename Format, int HeadDim>
KVC_DEVICE void decode_token(const kvc_decode_token_params &params) {
    constexpr uint32_t kRow = kRowChunks<Format, HeadDim> * 16, kScales = scale_bytes<Format>(HeadDim);
#if defined(KVC_EMULATE) || __CUDA_ARCH__ >= 900
    // Integers and their weights of 0 are no NaN.
    using Bulk = TokenBulkPipeline<kRow, kScales, !Format::kScaled, (Format::Codes::kBits < 8)>;
    if (params.call.bulk != 0)
        return decode_token_with<Format, HeadDim>(
            params, Bulk(params, params.query_at + QueryRows<HeadDim>::kBytes));
#endif
    decode_token_with<Format, HeadDim>(params, TokenPipeline<kRow, kScales>(params));
}

} // namespace kvc

// Defines the kernel of one format and head dimension; `blocks` a multiprocessor, as
// src/kernels/decode_token.rs has it.
#define KVC_DECODE_TOKEN(format, Format, dim, blocks)                                    \
    KVC_KERNEL(kvc_decode_##format##_d##dim, kvc_decode_token_params, 128, blocks) {     \
        kvc::decode_token<kvc::Format, dim>(p);                                          \
    }
