// Paged decode over sealed tiles, read as they are stored, and over the raw tiles of the same
// sequence (tile_rows.cuh).
//
// A warp works on whole tiles, every fourth of a piece, which come into shared memory record by record
// through a ring of its own: by one bulk copy on sm_90, by cp.async elsewhere. For each tile it folds
// the steps of the key channels into its queries, so that the products meet codes alone:
//
//   score = S sum q' (code - n/2) + Z sum q zi        q' = q us, rounded to f16
//   O    += sum (p r) code,  sum p r in a sum of its own, of which n/2 is taken at the end
//
// Codes are taken in their small form (quant.cuh), whose powers of two q' and the weights make up for.
// Sums that are the same for all tokens of a tile or all channels come from the matrix instruction too:
// of q' times n, of q times the middles, of the weights. Row m of a strip of 16 scores is the token that
// stands at that place in the words of the values, which lie channel by channel: lane 4g+t has tokens
// 16t to 16t+15 of 64, and no code moves between lanes.
#pragma once
#include "tile_fold.cuh"
#include "tile_rows.cuh"

namespace kvc {

// The token of 64 that is row `m` of strip `s`.
template <typename Codes> KVC_DEVICE uint32_t strip_token(uint32_t s, uint32_t m) {
    const uint32_t pair = 2 * s + m / 8, word = pair / Codes::kPairs;
    return m % 8 / 2 * 16 + word * (2 * Codes::kPairs) + Codes::element(pair % Codes::kPairs, m % 2);
}

// The scales of the 8 of 64 tokens that are rows g and g + 8 of the strips, in the order of their pairs.
template <typename V> KVC_DEVICE WordRun<4> strip_scales(const unsigned char *scales, uint32_t g) {
    const WordRun<4> *runs = reinterpret_cast<const WordRun<4> *>(scales);
    if constexpr (V::kPairs == 8) {
        return runs[g];
    } else {
        // Neighbours: the even or the odd ones of 16.
        const WordRun<4> low = runs[g / 2 * 2], high = runs[g / 2 * 2 + 1];
        const uint32_t which = g % 2 == 0 ? 0x5410 : 0x7632;
        return {{permute(low.word[0], low.word[1], which), permute(low.word[2], low.word[3], which),
                 permute(high.word[0], high.word[1], which),
                 permute(high.word[2], high.word[3], which)}};
    }
}

// The sums of a warp, which has also that of the weights as the products take them, in each row. A score
// or scale that is the largest so far is rare: only then do lanes exchange anything.
template <int HeadDim> struct TileState : CodeState<HeadDim> {
    static constexpr float kLargest = 3.4028234663852886e38f;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};

    // Makes weights of products, of which scores are `factor` and `add`; `scales` are the largest, in
    // pairs, of this lane's scales of values.
    KVC_DEVICE void weigh(float (&s)[4][4], const float (&factor)[2], const float (&add)[2],
                          uint32_t scales) {
        float top[2];
KVC_UNROLL
        for (int c = 0; c < 2; ++c) {
            top[c] = max_f32(s[0][c], s[0][2 + c]);
            for (int i = 1; i < 4; ++i) top[c] = max_f32(top[c], max_f32(s[i][c], s[i][2 + c]));
            // No factor is below 0, so that the greatest product has the greatest score.
            top[c] = fma_rn(top[c], factor[c], add[c]);
        }
        const uint32_t larger = (scales >> 16) > (scales & 0xffff) ? scales >> 16 : scales & 0xffff;
        const float largest = widen_f16(static_cast<uint16_t>(larger));
        const bool more = top[0] > this->m[0] || top[1] > this->m[1] || largest >= this->in_units();
        if (ballot(kFullMask, more) != 0) {
            const float same = this->count_in(widen_f16(static_cast<uint16_t>(max_of_warp(larger))));
            float keep[2];
KVC_UNROLL
            for (int c = 0; c < 2; ++c) {
                const float next = max_f32(this->m[c], max_over_tokens(top[c]));
                keep[c] = weight(this->m[c], next);
                this->l[c] *= keep[c];
                this->m[c] = next;
                keep[c] *= same;
            }
            this->rescale(keep);
            for (int i = 0; i < 4; ++i) total[i] *= keep[i % 2];
        }
KVC_UNROLL
        for (int c = 0; c < 2; ++c) {
            const float shift = add[c] - max_f32(this->m[c], -kLargest);
            float sum = 0.0f;
            for (int i = 0; i < 4; ++i) {
                s[i][c] = exp2_approx(fma_rn(s[i][c], factor[c], shift));
                s[i][2 + c] = exp2_approx(fma_rn(s[i][2 + c], factor[c], shift));
                sum += s[i][c] + s[i][2 + c];
            }
            this->l[c] += sum;
        }
    }
};

// Strips of keys that are multiplied at a time. Two sums are under way, so that a product waits for the
// one before the last: of two strips or, where the words of two would take too many registers, of one.
template <typename K> constexpr uint32_t kKeyStrips = K::kBits < 4 ? 2 : 1;

// The products of such strips of the 64 tokens that begin at row `part` of the keys.
template <typename Format, int HeadDim>
KVC_DEVICE void multiply_keys(const kvc_decode_tile_params &p, const unsigned char *record,
                              uint32_t part, uint32_t strip,
                              const TileQueries<typename Format::K, HeadDim> &q, float (*s)[4]) {
    using K = typename Format::K;
    using V = typename Format::V;
    using Words = RowWords<K, HeadDim>;
    constexpr uint32_t kPlaneRow = HeadDim / 8, kStrips = kKeyStrips<K>;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    uint32_t rows[kStrips][2];
    for (uint32_t i = 0; i < 2 * kStrips; ++i)
        rows[i / 2][i % 2] = part + strip_token<V>(strip + i / 2, g + i % 2 * 8);
    float sums[2][4];
    for (int i = 0; i < 8; ++i)
        sums[i / 4][i % 4] = kStrips == 2 || i < 4 ? q.less[i % 2] : 0.0f;
KVC_UNROLL
    for (uint32_t j = 0; j < Words::kRuns; ++j) {
        WordRun<Words::kRun> run[kStrips][2];
KVC_UNROLL
        for (uint32_t i = 0; i < 2 * kStrips; ++i)
            run[i / 2][i % 2] = *reinterpret_cast<const WordRun<Words::kRun> *>(
                record + rows[i / 2][i % 2] * Words::kBytes + Words::word(t, j, 0) * 4);
KVC_UNROLL
        for (uint32_t w = 0; w < Words::kRun; ++w) {
            uint32_t pairs[kStrips][2][K::kPairs];
KVC_UNROLL
            for (uint32_t i = 0; i < 2 * kStrips; ++i) {
                uint32_t thirds = 0;
                if constexpr (kHasPlane<K>) {
                    const uint32_t word = Words::word(t, j, w);
                    thirds = *reinterpret_cast<const uint32_t *>(record + p.k_plane_at +
                                                                 rows[i / 2][i % 2] * kPlaneRow +
                                                                 word / 2 * 4) >>
                             word % 2 * 8;
                }
                unpack_small<K>(run[i / 2][i % 2].word[w], thirds, pairs[i / 2][i % 2]);
            }
KVC_UNROLL
            for (uint32_t i = 0; i < K::kPairs; i += 2) {
                const uint32_t step = ((j * Words::kRun + w) * K::kPairs + i) / 2;
KVC_UNROLL
                for (uint32_t k = 0; k < kStrips; ++k) {
                    const uint32_t(&low)[K::kPairs] = pairs[k][0], (&high)[K::kPairs] = pairs[k][1];
                    const uint32_t a[4] = {low[i], high[i], low[i + 1], high[i + 1]};
                    mma_f16(sums[kStrips == 2 ? k : step % 2], a, q.folded[step]);
                }
            }
        }
    }
    for (int i = 0; i < 4; ++i) {
        s[0][i] = kStrips == 2 ? sums[0][i] : sums[0][i] + sums[1][i];
        if (kStrips == 2) s[1][i] = sums[1][i];
    }
}

// Adds a tile; a `plain` one lies before the tail and in the piece, and every column sees all of it.
template <typename Format, int HeadDim, uint32_t Tokens>
KVC_DEVICE void accumulate_tile(const kvc_decode_tile_params &p, const QueryRows<HeadDim> &queries,
                                const unsigned char *record, uint32_t tile, bool plain, TileState<HeadDim> &state) {
    using V = typename Format::V;
    constexpr int kSteps = HeadDim / 16;
    constexpr uint32_t kRun = V::kBits / 2; // words of a channel's 16 tokens
    // Said anew, so that what follows from it takes no register through the loop.
    const uint32_t lane = opaque(lane_id()), g = lane / 4, t = lane % 4;
    const uint32_t tokens = Tokens != 0 ? Tokens : p.tile_tokens;
    TileQueries<typename Format::K, HeadDim> q;
    fold_steps<Format, HeadDim>(p, queries, record, q);

KVC_ROLL
    for (uint32_t part = 0; part < tokens; part += 64) {
        float s[4][4];
KVC_UNROLL
        for (uint32_t strip = 0; strip < 4; strip += kKeyStrips<typename Format::K>)
            multiply_keys<Format, HeadDim>(p, record, part, strip, q, s + strip);
        float factor[2] = {q.factor[0], q.factor[1]}, add[2] = {q.add[0], q.add[1]};
        if (!plain) {
            // Rare, so columns are found anew, which saves the others their registers, and the strips take
            // turns in one place. Where scores are no more than products with their factor and summand,
            // products are what stays, but of tokens that are hidden: others must have the bits that they
            // have in a plain tile. A factor of 0 would make a number of those again.
            const TileWork &work = *FoldRows<typename Format::K, HeadDim>(queries).work();
            const Unit &u = work.u;
            const Piece &item = work.item;
            const bool scored = p.call.softcap != 0.0f || p.call.slopes != nullptr;
            Column columns[2];
            for (uint32_t c = 0; c < 2; ++c)
                columns[c] = only_where(find_column(p.call, u, 2 * t + c),
                                        own_tile(p, u, 2 * t + c) > static_cast<int32_t>(tile));
KVC_ROLL
            for (uint32_t strip = 0; strip < 4; ++strip) {
                int32_t own[2];
                bool readable[2];
KVC_UNROLL
                for (uint32_t i = 0; i < 2; ++i) {
                    const uint32_t token = tile * tokens + part + strip_token<V>(strip, g + 8 * i);
                    own[i] = static_cast<int32_t>(token);
                    readable[i] = token >= item.begin && token < item.end &&
                                  token >= static_cast<uint32_t>(u.first_token);
                }
                float scores[4];
                for (int i = 0; i < 4; ++i) scores[i] = fma_rn(s[0][i], factor[i % 2], add[i % 2]);
                make_scores(p.call, u, columns, own, readable, scores);
KVC_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const bool taken = scored || factor[i % 2] == 0.0f || scores[i] == -infinity();
                    const float first = taken ? scores[i] : s[0][i];
                    s[0][i] = s[1][i];
                    s[1][i] = s[2][i];
                    s[2][i] = s[3][i];
                    s[3][i] = first;
                }
            }
            for (int c = 0; c < 2; ++c)
                if (scored || factor[c] == 0.0f) factor[c] = 1.0f, add[c] = 0.0f;
        }
        const WordRun<4> scales =
            strip_scales<V>(record + p.v_scales_at + part * 2, g);
        state.weigh(s, factor, add,
                    max_f16x2(max_f16x2(scales.word[0], scales.word[1]),
                              max_f16x2(scales.word[2], scales.word[3])));
        const float per_unit = state.per_unit();
        uint32_t weights[4][2];
KVC_UNROLL
        for (uint32_t pair = 0; pair < 8; ++pair) {
            const uint32_t half = pair % 2, place = V::place(pair % V::kPairs);
            const float up = per_unit * (static_cast<float>(1u << kWeightUp) / (1u << place));
            const float scale =
                widen_f16(static_cast<uint16_t>(scales.word[pair / 2] >> 16 * half)) * up;
            const float (&w)[4] = s[pair / 2];
            weights[pair / 2][half] =
                movmatrix_trans(pack_f16(w[2 * half] * scale, w[2 * half + 1] * scale));
        }
        // What all codes are too large by is taken from their sums by that of the weights.
KVC_UNROLL
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t low_one = twice(1u << V::place(2 * i % V::kPairs));
            const uint32_t high_one = twice(1u << V::place((2 * i + 1) % V::kPairs));
            const uint32_t a[4] = {low_one, low_one, high_one, high_one};
            mma_f16(state.total, a, weights[i]);
        }

        const uint32_t plane_row = tokens / 8, row = plane_row * V::kBits;
        const unsigned char *codes =
            record + p.v_codes_at + g * row + part / 8 * V::kBits + t * 4 * kRun;
        const unsigned char *plane = record + p.v_plane_at + g * plane_row + part / 8 + t / 2 * 4;
KVC_UNROLL
        for (uint32_t i = 0; i < kSteps; ++i) {
            WordRun<kRun> run[2];
            uint32_t thirds[2] = {0, 0};
KVC_UNROLL
            for (uint32_t half = 0; half < 2; ++half) {
                const uint32_t channel = 16 * i + 8 * half;
                run[half] = *reinterpret_cast<const WordRun<kRun> *>(codes + channel * row);
                if constexpr (kHasPlane<V>)
                    thirds[half] =
                        *reinterpret_cast<const uint32_t *>(plane + channel * plane_row) >> t % 2 * 8;
            }
KVC_UNROLL
            for (uint32_t w = 0; w < kRun; ++w) {
                uint32_t low[V::kPairs], high[V::kPairs];
                unpack_small<V>(run[0].word[w], thirds[0], low);
                unpack_small<V>(run[1].word[w], thirds[1], high);
KVC_UNROLL
                for (uint32_t j = 0; j < V::kPairs / 2; ++j) {
                    const uint32_t a[4] = {low[2 * j], high[2 * j], low[2 * j + 1], high[2 * j + 1]};
                    mma_f16(state.o[i], a, weights[w * (V::kPairs / 2) + j]);
                }
            }
        }
    }
}

template <typename Format, int HeadDim>
KVC_DEVICE void decode_tile_unit(const kvc_decode_tile_params &params, const Piece &item,
                                 uint32_t unit, TileRing &ring) {
    const kvc_decode_params &p = params.call;
    Unit u = find_unit(p, item.seq, unit);
    if (u.empty) return;
    const uint32_t g = lane_id() / 4, tokens = params.tile_tokens;
    const BlockTable table(p.table, p.table_indptr, p.table_stride, owner_of(params, u.seq),
                           tokens, p.num_blocks, p.error_flag);

    // Sealed tiles are those before the own tile of the last row. Which warp has which follows from
    // the piece, not from what the rows of this call see of it.
    const int32_t last = u.length > 0 ? (u.length - 1) / static_cast<int32_t>(tokens) : 0;
    uint32_t first = item.begin / tokens + warp_id();
    // A table of the call's own may lack a tile that no row sees.
    if (params.owners == nullptr && static_cast<int64_t>(first + 1) * tokens <= u.first_token)
        first += kDecodeWarps;
    const uint32_t past = (item.end + tokens - 1) / tokens;
    const uint32_t end = past < static_cast<uint32_t>(last) ? past : static_cast<uint32_t>(last);
    ring.look_up(table, first, first < end);

    // Some of what lies before the tail is hidden all the same: from a column whose own tile it is, and
    // where others read it raw. So for scores that are made one by one nothing is plain.
    const uint32_t plain_from =
        (max_u32(item.begin, static_cast<uint32_t>(u.plain_from)) + tokens - 1) / tokens;
    const uint32_t plain_to =
        min_u32(item.end, u.plain_to > 0 ? static_cast<uint32_t>(u.plain_to) : 0) / tokens;
    u.plain_to = 0;

    const QueryRows<HeadDim> rows(KVC_SMEM(unsigned char) + params.query_at);
    rows.template fill<true>(p, u, false);
    sync_threads();
    const FoldRows<typename Format::K, HeadDim> fold(rows);
    fold.fill(rows);
    if (thread_x() == 0)
        *fold.work() = {u, item, table,
                        static_cast<const unsigned char *>(params.records) + u.kv_head * params.record_head,
                        unit, plain_from, plain_to};
    TileState<HeadDim> state;
    accumulate_raw<HeadDim>(params, item, u, table, Format::kStep * kSumUnit, state);
    if (ring.bulk()) fence_bulk();
    sync_threads();

    // Tiles whose copies start before the first is waited for.
    const uint32_t ahead = ring.stages() - 1;
    const auto issue = [&](uint32_t tile, uint32_t to) {
        const uint32_t next = tile + kDecodeWarps;
        ring.issue(*fold.work(), to, tile < end, next, next < end);
    };
KVC_ROLL
    for (uint32_t i = 0; i < ahead; ++i) issue(first + i * kDecodeWarps, ring.stage_after(i));
    for (uint32_t tile = first; tile < end; tile += kDecodeWarps) {
        issue(tile + ahead * kDecodeWarps, ring.stage_after(ahead));
        const unsigned char *record = ring.wait();
        if (!is_sealed(params, record)) {
            // Read raw, where it is.
            if (!has_raw(params, fold.work()->u.seq, tile)) raise(p.error_flag, kFlagBlock);
        } else {
            const bool plain = tile >= fold.work()->plain_from && tile < fold.work()->plain_to;
            if (!Format::kByTokens)
                accumulate_tile<Format, HeadDim, 0>(params, rows, record, tile, plain, state);
            else if (tokens == 64)
                accumulate_tile<Format, HeadDim, 64>(params, rows, record, tile, plain, state);
            else
                accumulate_tile<Format, HeadDim, 128>(params, rows, record, tile, plain, state);
        }
        ring.release();
    }
    ring.finish();
    sync_threads();

    const float factor = state.in_units() * (Format::kStep * kSumUnit);
    const float middle[2] = {state.total[0] * Format::kValueMiddle,
                             state.total[1] * Format::kValueMiddle};
    put_warp_sums<HeadDim>(state.m, state.l, [&](int i, int half, int c, uint32_t &channel) {
        channel = 16 * i + g + 8 * half;
        return (state.o[i][half * 2 + c] - middle[c]) * factor;
    });
    const TileWork work = *fold.work();
    finish_unit<HeadDim>(p, work.item, work.unit, work.u, params.v_rotated != 0);
    if (ring.bulk()) fence_bulk();
}

template <typename Format, int HeadDim>
KVC_DEVICE void decode_tile(const kvc_decode_tile_params &params) {
    const kvc_decode_params &p = params.call;
    TileRing ring(params);
    for_each_piece<true>(p, KVC_SMEM(uint32_t), [&](const Piece &item, uint32_t unit) {
        decode_tile_unit<Format, HeadDim>(params, item, unit, ring);
    });
}

} // namespace kvc

// Defines the kernel of one format and head dimension; `blocks` a multiprocessor, as
// src/kernels/decode_tile.rs has it.
#define KVC_DECODE_TILE(format, Format, dim, blocks)                                     \
    KVC_KERNEL(kvc_decode_##format##_d##dim, kvc_decode_tile_params, 128, blocks) {      \
        kvc::decode_tile<kvc::Format, dim>(p);                                           \
    }
