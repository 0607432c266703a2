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
// Keys stay biased (quant.cuh): what that and n/2 add is a product of q' with constants, and the
// middles one of q with them, in the same instructions. Row m of a strip of 16 scores is the token
// that stands at that place in the words of the values, which lie channel by channel: lane 4g+t has
// tokens 16t to 16t+15 of 64, and no code moves between lanes.
#pragma once
#include "query_rows.cuh"
#include "quant.cuh"
#include "tile_rows.cuh"

namespace kvc {

// The formats of src/quant/seal.rs; kMiddle is n/2 as f16, kStep what a value's code counts in.
template <typename Key, typename Value> struct TileFormat {
    using K = Key;
    using V = Value;
};
struct Kt8v8 : TileFormat<Bytes<false>, Int8> {
    static constexpr uint32_t kMiddle = 0x57f8;
    static constexpr float kValueMiddle = 0.0f, kStep = 1.0f;
};
struct Kt4v4 : TileFormat<Nibbles, Nibbles> {
    static constexpr uint32_t kMiddle = 0x4780;
    static constexpr float kValueMiddle = 7.5f, kStep = 0.3352f;
};
struct Kt3v3 : TileFormat<Threes, Threes> {
    static constexpr uint32_t kMiddle = 0x4300;
    static constexpr float kValueMiddle = 3.5f, kStep = 0.5860f;
};
struct Kt4v2 : TileFormat<Nibbles, Twos> {
    static constexpr uint32_t kMiddle = 0x4780;
    static constexpr float kValueMiddle = 1.5f, kStep = 0.9957f;
};
struct Kt2v2 : TileFormat<Twos, Twos> {
    static constexpr uint32_t kMiddle = 0x3e00;
    static constexpr float kValueMiddle = 1.5f, kStep = 0.9957f;
};

template <typename Codes>
KVC_DEVICE void unpack_biased(uint32_t w, uint32_t thirds, uint32_t (&out)[Codes::kPairs]) {
    if constexpr (kHasPlane<Codes>)
        Codes::biased(w, thirds, out);
    else
        Codes::biased(w, out);
}
template <typename Codes>
KVC_DEVICE void unpack_whole(uint32_t w, uint32_t thirds, uint32_t (&out)[Codes::kPairs]) {
    if constexpr (kHasPlane<Codes>)
        Codes::unpack(w, thirds, out);
    else
        Codes::unpack(w, out);
}

// A warp's ring of records.
struct TileRing {
    const kvc_decode_tile_params &p;
    uint32_t stages, to, from, from_phase;
    uint32_t valid; // a bit a stage: the tile has a record there
    int32_t entry;  // of the next tile
    bool bulk;

    KVC_DEVICE explicit TileRing(const kvc_decode_tile_params &params)
        : p(params), stages(params.call.stages), to(0), from(0), from_phase(0), valid(0),
          entry(-1), bulk(false) {
#if defined(KVC_EMULATE) || __CUDA_ARCH__ >= 900
        bulk = p.call.bulk != 0;
        if (bulk && lane_id() == 0) {
            for (uint32_t at = 0; at < stages; ++at) mbar_init(full(at), 1);
            mbar_fence_init();
        }
        sync_threads();
#endif
    }

    KVC_DEVICE unsigned char *stage(uint32_t at) const {
        return KVC_SMEM(unsigned char) + (warp_id() * stages + at) * p.record_bytes;
    }
    KVC_DEVICE uint64_t *full(uint32_t at) const {
        unsigned char *bars = KVC_SMEM(unsigned char) + p.barriers_at;
        return reinterpret_cast<uint64_t *>(bars) + warp_id() * stages + at;
    }

    KVC_DEVICE void look_up(const BlockTable &table, uint32_t tile, bool wanted) {
        uint32_t slot;
        if (wanted) entry = table.load(tile * p.tile_tokens, slot);
    }
    // Starts the copy of a tile's record; `next` is the tile after it.
    KVC_DEVICE void issue(const BlockTable &table, bool wanted, uint32_t next, bool next_wanted,
                          uint32_t kv_head) {
        if (wanted) {
            const int32_t block = table.checked(entry);
            look_up(table, next, next_wanted);
            valid = (valid & ~(1u << to)) | static_cast<uint32_t>(block >= 0) << to;
            const unsigned char *record = static_cast<const unsigned char *>(p.records) +
                                          (block < 0 ? 0 : block) * p.record_block +
                                          kv_head * p.record_head;
            if (bulk) {
                if (lane_id() == 0 && block >= 0) {
                    mbar_arrive_expect(full(to), p.record_bytes);
                    bulk_copy(stage(to), record, p.record_bytes, full(to));
                } else if (lane_id() == 0) {
                    mbar_arrive(full(to));
                }
            } else {
                unsigned char *at = stage(to);
                for (uint32_t i = lane_id() * 16; i < p.record_bytes; i += 512)
                    cp_async_16(at + i, record + i, block >= 0);
            }
            to = to + 1 == stages ? 0 : to + 1;
        }
        if (!bulk) cp_async_commit();
    }
    // The oldest record under way, for all of the warp; null for a tile without one.
    KVC_DEVICE const unsigned char *wait() {
        if (bulk) {
            mbar_wait(full(from), from_phase);
        } else {
            if (stages == 1) cp_async_wait<0>();
            if (stages == 2) cp_async_wait<1>();
            if (stages == 3) cp_async_wait<2>();
        }
        sync_warp();
        return (valid >> from & 1) != 0 ? stage(from) : nullptr;
    }
    KVC_DEVICE void release() {
        sync_warp();
        from = from + 1 == stages ? 0 : from + 1;
        from_phase ^= from == 0;
    }
    // After the last tile of a piece: barriers go on from piece to piece.
    KVC_DEVICE void finish() {
        if (!bulk) cp_async_wait<0>();
    }
};

// Pairs of bytes, one for each channel of a word of codes, as f16 in the order of its pairs.
template <typename Codes, typename Sort>
KVC_DEVICE void channel_pairs(const unsigned char *bytes, uint32_t first,
                              uint32_t (&out)[Codes::kPairs]) {
KVC_UNROLL
    for (uint32_t i = 0; i < Codes::kPairs; i += 2) {
        uint32_t word;
        if constexpr (Codes::kPairs < 8) {
            // Neighbours.
            word = *reinterpret_cast<const uint32_t *>(bytes + first + 2 * i);
        } else {
            const uint32_t *words = reinterpret_cast<const uint32_t *>(bytes + first);
            word = permute(words[i / 4], words[i / 4 + 2], i % 4 == 0 ? 0x5140 : 0x7362);
        }
        uint32_t two[2];
        Sort::unpack(word, two);
        out[i] = two[0];
        out[i + 1] = two[1];
    }
}

// The token of 64 that is row `m` of strip `s`.
template <typename Codes> KVC_DEVICE uint32_t strip_token(uint32_t s, uint32_t m) {
    const uint32_t pair = 2 * s + m / 8, word = pair / Codes::kPairs;
    return m % 8 / 2 * 16 + word * (2 * Codes::kPairs) + Codes::element(pair % Codes::kPairs, m % 2);
}

// Adds a tile; a `plain` one lies before the tail and in the piece, and every column sees all of it.
template <typename Format, int HeadDim>
KVC_DEVICE void accumulate_tile(const kvc_decode_tile_params &p, const Piece &item,
                                const Unit &u, const Column (&columns)[2],
                                const QueryRows<HeadDim> &queries, const unsigned char *record,
                                uint32_t tile, bool plain, CodeState<HeadDim> &state) {
    using K = typename Format::K;
    using V = typename Format::V;
    using Words = RowWords<K, HeadDim>;
    constexpr int kSteps = HeadDim / 16;
    constexpr uint32_t kPlaneRow = HeadDim / 8;
    constexpr uint32_t kRun = V::kBits / 2; // words of a channel's 16 tokens
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;

    // Steps into the queries, and what does not depend on the token.
    uint32_t folded[kSteps][2];
    float constant[4] = {0.0f, 0.0f, 0.0f, 0.0f}, middle[4] = {0.0f, 0.0f, 0.0f, 0.0f};
KVC_UNROLL
    for (uint32_t n = 0; n < Words::kWords; ++n) {
        const uint32_t first = Words::word(t, n / Words::kRun, n % Words::kRun) * Words::kPerWord;
        uint32_t q[K::kPairs], steps[K::kPairs], mids[K::kPairs];
        Words::query(queries, g, t, n, q);
        channel_pairs<K, Bytes<false>>(record + p.k_steps_at, first, steps);
        channel_pairs<K, Int8>(record + p.k_mids_at, first, mids);
KVC_UNROLL
        for (uint32_t i = 0; i < K::kPairs; i += 2) {
            const uint32_t step = (n * K::kPairs + i) / 2;
            folded[step][0] = mul_f16x2(q[i], steps[i]);
            folded[step][1] = mul_f16x2(q[i + 1], steps[i + 1]);
            const uint32_t a[4] = {K::bias(i), twice(Format::kMiddle), K::bias(i + 1),
                                   twice(Format::kMiddle)};
            mma_f16(constant, a, folded[step]);
            const uint32_t b[4] = {mids[i], mids[i], mids[i + 1], mids[i + 1]};
            const uint32_t whole[2] = {q[i], q[i + 1]};
            mma_f16(middle, b, whole);
        }
    }
    const uint32_t units = *reinterpret_cast<const uint32_t *>(record + p.header_at);
    const float unit = widen_f16(static_cast<uint16_t>(units));
    const float mid_unit = widen_f16(static_cast<uint16_t>(units >> 16));
    float factor[2], add[2];
    for (int c = 0; c < 2; ++c) {
        const float q_factor = queries.factors[2 * t + c];
        factor[c] = unit * q_factor;
        add[c] = mid_unit * middle[c] * q_factor;
    }
    // Rows 0 to 7 had the biases, rows 8 to 15 the middle of the codes.
    for (int c = 0; c < 2; ++c) constant[c] += constant[2 + c];

    const uint16_t *v_scales = reinterpret_cast<const uint16_t *>(record + p.v_scales_at);
    float largest = 0.0f;
    for (uint32_t i = lane_id(); i < p.tile_tokens; i += 32)
        largest = max_f32(largest, widen_f16(v_scales[i]));
    for (uint32_t by = 1; by < 32; by *= 2)
        largest = max_f32(largest, shfl_xor(kFullMask, largest, by));
    const float same = state.count_in(largest), per_unit = state.per_unit();

    for (uint32_t part = 0; part < p.tile_tokens; part += 64) {
        float s[4][4];
KVC_UNROLL
        for (uint32_t strip = 0; strip < 4; ++strip) {
            const uint32_t rows[2] = {part + strip_token<V>(strip, g), part + strip_token<V>(strip, g + 8)};
            float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
KVC_UNROLL
            for (uint32_t j = 0; j < Words::kRuns; ++j) {
                WordRun<Words::kRun> run[2];
KVC_UNROLL
                for (int i = 0; i < 2; ++i)
                    run[i] = *reinterpret_cast<const WordRun<Words::kRun> *>(
                        record + rows[i] * Words::kBytes + Words::word(t, j, 0) * 4);
KVC_UNROLL
                for (uint32_t w = 0; w < Words::kRun; ++w) {
                    uint32_t thirds[2] = {0, 0};
                    if constexpr (kHasPlane<K>) {
                        const uint32_t word = Words::word(t, j, w);
                        for (int i = 0; i < 2; ++i)
                            thirds[i] = *reinterpret_cast<const uint32_t *>(
                                            record + p.k_plane_at + rows[i] * kPlaneRow + word / 2 * 4) >>
                                        word % 2 * 8;
                    }
                    uint32_t low[K::kPairs], high[K::kPairs];
                    unpack_biased<K>(run[0].word[w], thirds[0], low);
                    unpack_biased<K>(run[1].word[w], thirds[1], high);
KVC_UNROLL
                    for (uint32_t i = 0; i < K::kPairs / 2; ++i) {
                        const uint32_t step = (j * Words::kRun + w) * (K::kPairs / 2) + i;
                        const uint32_t a[4] = {low[2 * i], high[2 * i], low[2 * i + 1],
                                               high[2 * i + 1]};
                        mma_f16(step % 2 == 0 ? even : odd, a, folded[step]);
                    }
                }
            }
            for (int i = 0; i < 4; ++i)
                s[strip][i] = (even[i] + odd[i] - constant[i % 2]) * factor[i % 2] + add[i % 2];
            if (plain) continue;
            int32_t tokens[2];
            bool readable[2];
KVC_UNROLL
            for (int i = 0; i < 2; ++i) {
                const uint32_t token = tile * p.tile_tokens + rows[i];
                tokens[i] = static_cast<int32_t>(token);
                readable[i] = token >= item.begin && token < item.end &&
                              token >= static_cast<uint32_t>(u.first_token);
            }
            make_scores(p.call, u, columns, tokens, readable, s[strip]);
        }
        float keep[2];
        state.weigh(s, keep);
        if (part == 0)
            for (int c = 0; c < 2; ++c) keep[c] *= same;
        state.rescale(keep);
        uint32_t weights[4][2];
        float sums[2] = {0.0f, 0.0f};
KVC_UNROLL
        for (uint32_t strip = 0; strip < 4; ++strip) {
            for (int i = 0; i < 4; ++i) {
                const float scale = widen_f16(v_scales[part + strip_token<V>(strip, g + i / 2 * 8)]);
                s[strip][i] *= scale * per_unit;
            }
            for (int half = 0; half < 2; ++half) {
                // The sum is that of what the products take, or it would not cancel.
                const uint32_t two = pack_f16(s[strip][2 * half], s[strip][2 * half + 1]);
                for (int c = 0; c < 2; ++c)
                    sums[c] += widen_f16(static_cast<uint16_t>(two >> 16 * c));
                weights[strip][half] = movmatrix_trans(two);
            }
        }
        for (int c = 0; c < 2; ++c) state.minima[c] = state.minima[c] * keep[c] + sums[c];

        const uint32_t row_bytes = p.tile_tokens / 8 * V::kBits;
KVC_UNROLL
        for (uint32_t i = 0; i < kSteps; ++i) {
            WordRun<kRun> run[2];
            uint32_t thirds[2] = {0, 0};
KVC_UNROLL
            for (uint32_t half = 0; half < 2; ++half) {
                const uint32_t channel = 16 * i + g + 8 * half;
                run[half] = *reinterpret_cast<const WordRun<kRun> *>(
                    record + p.v_codes_at + channel * row_bytes + part / 8 * V::kBits + t * 4 * kRun);
                if constexpr (kHasPlane<V>)
                    thirds[half] = *reinterpret_cast<const uint32_t *>(
                                       record + p.v_plane_at + channel * (p.tile_tokens / 8) +
                                       part / 8 + t / 2 * 4) >>
                                   t % 2 * 8;
            }
KVC_UNROLL
            for (uint32_t w = 0; w < kRun; ++w) {
                uint32_t low[V::kPairs], high[V::kPairs];
                unpack_whole<V>(run[0].word[w], thirds[0], low);
                unpack_whole<V>(run[1].word[w], thirds[1], high);
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
    // What lies before the tail is hidden all the same from a column whose own tile it is, and read raw
    // tiles from the others: for scores that are made one by one, nothing is plain.
    const int32_t plain_to = u.plain_to;
    u.plain_to = 0;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4, tokens = params.tile_tokens;
    const BlockTable table(p.table, p.table_indptr, p.table_stride, u.seq, tokens, p.num_blocks,
                           p.error_flag);

    // Sealed tiles are those before the own tile of the last row.
    const int32_t last = u.length > 0 ? (u.length - 1) / static_cast<int32_t>(tokens) : 0;
    const uint32_t seen = u.first_token > static_cast<int32_t>(item.begin)
                              ? static_cast<uint32_t>(u.first_token) : item.begin;
    const uint32_t first = seen / tokens + warp_id();
    const uint32_t past = (item.end + tokens - 1) / tokens;
    const uint32_t end = past < static_cast<uint32_t>(last) ? past : static_cast<uint32_t>(last);
    const uint32_t count = first < end ? (end - first + kDecodeWarps - 1) / kDecodeWarps : 0;
    ring.look_up(table, first, count != 0);

    const QueryRows<HeadDim> rows(KVC_SMEM(unsigned char) + params.query_at);
    rows.fill(p, u, false);
    sync_threads();
    CodeState<HeadDim> state;
    accumulate_raw<HeadDim>(params, item, u, table, Format::kStep, state);
    if (ring.bulk) fence_bulk();
    sync_threads();

    const Column all[2] = {find_column(p, u, 2 * t), find_column(p, u, 2 * t + 1)};
    int32_t own[2];
    for (uint32_t c = 0; c < 2; ++c) own[c] = own_tile(params, u, 2 * t + c);
    const uint32_t ahead = ring.stages - 1;
    for (uint32_t next = 0; next < count + ahead; ++next) {
        const uint32_t coming = first + next * kDecodeWarps;
        ring.issue(table, next < count, coming + kDecodeWarps, next + 1 < count, u.kv_head);
        if (next < ahead) continue;
        const uint32_t tile = first + (next - ahead) * kDecodeWarps;
        const unsigned char *record = ring.wait();
        if (record != nullptr && !is_sealed(params, record)) {
            // Read raw, where it is.
            if (!has_raw(params, u.seq, tile)) raise(p.error_flag, kFlagBlock);
            record = nullptr;
        }
        if (record != nullptr) {
            const Column columns[2] = {only_where(all[0], own[0] > static_cast<int32_t>(tile)),
                                       only_where(all[1], own[1] > static_cast<int32_t>(tile))};
            const uint32_t at = tile * tokens, after = at + tokens;
            const bool plain = at >= item.begin && after <= item.end &&
                               static_cast<int32_t>(at) >= u.plain_from &&
                               static_cast<int32_t>(after) <= plain_to;
            accumulate_tile<Format, HeadDim>(params, item, u, columns, rows, record, tile, plain, state);
        }
        ring.release();
    }
    ring.finish();
    sync_threads();

    const float factor = state.in_units() * Format::kStep;
    float middle[2];
    for (int c = 0; c < 2; ++c) middle[c] = sum_over_tokens(state.minima[c]) * Format::kValueMiddle;
    put_warp_sums<HeadDim>(state.m, state.l, [&](int i, int half, int c, uint32_t &channel) {
        channel = 16 * i + g + 8 * half;
        return (state.o[i][half * 2 + c] - middle[c]) * factor;
    });
    finish_unit<HeadDim>(p, item, unit, u, params.v_rotated != 0);
    if (ring.bulk) fence_bulk();
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
