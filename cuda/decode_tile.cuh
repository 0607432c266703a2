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
#include "query_rows.cuh"
#include "quant.cuh"
#include "tile_rows.cuh"

namespace kvc {

// The formats of src/quant/seal.rs; kLevels is n, kStep what a value's code counts in.
template <typename Key, typename Value> struct TileFormat {
    using K = Key;
    using V = Value;
};
struct Kt8v8 : TileFormat<Bytes<false>, Int8> {
    static constexpr uint32_t kLevels = 255;
    static constexpr float kValueMiddle = 128.0f, kStep = 1.0f; // the small form's middle
};
struct Kt4v4 : TileFormat<Nibbles, Nibbles> {
    static constexpr uint32_t kLevels = 15;
    static constexpr float kValueMiddle = 7.5f, kStep = 0.3352f;
};
struct Kt3v3 : TileFormat<Threes, Threes> {
    static constexpr uint32_t kLevels = 7;
    static constexpr float kValueMiddle = 3.5f, kStep = 0.5860f;
};
struct Kt4v2 : TileFormat<Nibbles, Twos> {
    static constexpr uint32_t kLevels = 15;
    static constexpr float kValueMiddle = 1.5f, kStep = 0.9957f;
};
struct Kt2v2 : TileFormat<Twos, Twos> {
    static constexpr uint32_t kLevels = 3;
    static constexpr float kValueMiddle = 1.5f, kStep = 0.9957f;
};

template <typename Codes>
KVC_DEVICE void unpack_small(uint32_t w, uint32_t thirds, uint32_t (&out)[Codes::kPairs]) {
    if constexpr (kHasPlane<Codes>)
        Codes::small(w, thirds, out);
    else
        Codes::small(w, out);
}

// Powers of two that keep small codes in range of the other operand. Queries are scaled up by 2^14,
// which with an element of at most 2 is in range of f16; their products with steps, bytes in the small
// form themselves, are at most 2^-1 and, to the last bit of f16, as good as those with whole steps.
// Scores are then in units of 2^(14 - 24 - 24). Weights, at most 1, are scaled up by 2^15.
constexpr uint32_t kQueryUp = 14, kWeightUp = 15;
constexpr float kScoreUnit = 17179869184.0f; // 2^34
constexpr float kSumUnit = 512.0f;           // 2^(24 - 15)

// What a unit works on, kept in shared memory: its loop has better use for registers.
struct TileWork {
    Unit u;
    Piece item;
    BlockTable table;
    uint32_t unit;
    // Tiles that lie in the piece, behind every window and before the tail.
    uint32_t plain_from, plain_to;
};
static_assert(sizeof(TileWork) <= 128, "src/kernels/decode_tile.rs has room for it");

// A warp's ring of records.
struct TileRing {
    const kvc_decode_tile_params &p;
    uint32_t to, from, from_phase;
    uint32_t valid; // a bit a stage: the tile has a record there
    int32_t entry;  // of the next tile

    KVC_DEVICE explicit TileRing(const kvc_decode_tile_params &params)
        : p(params), to(0), from(0), from_phase(0), valid(0), entry(-1) {
        if (bulk() && lane_id() == 0) {
            for (uint32_t at = 0; at < stages(); ++at) mbar_init(full(at), 1);
            mbar_fence_init();
        }
        if (bulk()) sync_threads();
    }

    KVC_DEVICE uint32_t stages() const { return p.call.stages; }
    // Whether records come by bulk copies: always where there are any, but in the emulator.
    KVC_DEVICE bool bulk() const {
#ifdef KVC_EMULATE
        return p.call.bulk != 0;
#elif __CUDA_ARCH__ >= 900
        return true;
#else
        return false;
#endif
    }

    KVC_DEVICE unsigned char *stage(uint32_t at) const {
        return KVC_SMEM(unsigned char) + (warp_id() * stages() + at) * p.record_bytes;
    }
    KVC_DEVICE uint64_t *full(uint32_t at) const {
        unsigned char *bars = KVC_SMEM(unsigned char) + p.barriers_at;
        return reinterpret_cast<uint64_t *>(bars) + warp_id() * stages() + at;
    }

    KVC_DEVICE void look_up(const BlockTable &table, uint32_t tile, bool wanted) {
        if (wanted) entry = table.entry(tile);
    }
    // Starts the copy of a tile's record; `next` is the tile after it.
    KVC_DEVICE void issue(const TileWork &work, bool wanted, uint32_t next, bool next_wanted) {
        if (wanted) {
            const int32_t block = work.table.checked(entry);
            look_up(work.table, next, next_wanted);
            valid = (valid & ~(1u << to)) | static_cast<uint32_t>(block >= 0) << to;
            const unsigned char *record = static_cast<const unsigned char *>(p.records) +
                                          (block < 0 ? 0 : block) * p.record_block +
                                          work.u.kv_head * p.record_head;
            if (bulk()) {
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
            to = to + 1 == stages() ? 0 : to + 1;
        }
        if (!bulk()) cp_async_commit();
    }
    // The oldest record under way, for all of the warp; null for a tile without one.
    KVC_DEVICE const unsigned char *wait() {
        if (bulk()) {
            mbar_wait(full(from), from_phase);
        } else {
            if (stages() == 1) cp_async_wait<0>();
            if (stages() == 2) cp_async_wait<1>();
            if (stages() == 3) cp_async_wait<2>();
        }
        sync_warp();
        return (valid >> from & 1) != 0 ? stage(from) : nullptr;
    }
    KVC_DEVICE void release() {
        sync_warp();
        from = from + 1 == stages() ? 0 : from + 1;
        from_phase ^= from == 0;
    }
    // After the last tile of a piece: barriers go on from piece to piece.
    KVC_DEVICE void finish() {
        if (!bulk()) cp_async_wait<0>();
    }
};

// Pairs of bytes in the small form, one for each channel of a word of codes, in the order of its pairs.
template <typename Codes>
KVC_DEVICE void channel_pairs(const unsigned char *bytes, uint32_t first,
                              uint32_t (&out)[Codes::kPairs]) {
KVC_UNROLL
    for (uint32_t i = 0; i < Codes::kPairs; i += 2) {
        const uint32_t *words = reinterpret_cast<const uint32_t *>(bytes + first);
        if constexpr (Codes::kPairs < 8) {
            // Neighbours.
            out[i] = permute(words[i / 2], 0, 0x4140);
            out[i + 1] = permute(words[i / 2], 0, 0x4342);
        } else {
            const uint32_t two = permute(words[i / 4], words[i / 4 + 2], i % 4 == 0 ? 0x5410 : 0x7632);
            out[i] = two & 0x00ff00ffu;
            out[i + 1] = permute(two, 0, 0x4341);
        }
    }
}

// Queries in the order of a lane's words of codes and made up for their places, 16 bytes a lane, so that
// a tile has them in few loads.
template <typename Codes, int HeadDim> struct FoldRows {
    using Words = RowWords<Codes, HeadDim>;
    static constexpr uint32_t kLoads = HeadDim / 32;
    unsigned char *at;

    KVC_DEVICE explicit FoldRows(const QueryRows<HeadDim> &rows)
        : at(reinterpret_cast<unsigned char *>(rows.rows) + QueryRows<HeadDim>::kBytes) {}

    // All threads of the block call it, behind a barrier after the rows are filled.
    KVC_DEVICE void fill(const QueryRows<HeadDim> &rows) const {
        for (uint32_t i = thread_x(); i < 32 * kLoads * 4; i += kDecodeThreads) {
            const uint32_t lane = i / 4 % 32, n = i / 128 * 4 + i % 4;
            const uint32_t word = n / Codes::kPairs, pair = n % Codes::kPairs;
            const uint16_t *row =
                rows.rows + lane / 4 * rows.kRow +
                Words::word(lane % 4, word / Words::kRun, word % Words::kRun) * Words::kPerWord;
            const uint32_t two = row[Codes::element(pair, 0)] |
                                 static_cast<uint32_t>(row[Codes::element(pair, 1)]) << 16;
            reinterpret_cast<uint32_t *>(at)[i] =
                mul_f16x2(two, twice((15 + kQueryUp - Codes::place(pair)) << 10));
        }
    }
    KVC_DEVICE TileWork *work() const { return reinterpret_cast<TileWork *>(at + HeadDim * 16); }
    // Pairs 4i to 4i + 3 of this lane.
    KVC_DEVICE WordRun<4> load(uint32_t i) const {
        return reinterpret_cast<const WordRun<4> *>(at)[i * 32 + lane_id()];
    }
};

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

// The sums of a warp, which has also that of the weights as the products take them, in each row.
template <int HeadDim> struct TileState : CodeState<HeadDim> {
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
};

// What of a tile's scores does not depend on the token.
template <typename K, int HeadDim> struct TileQueries {
    uint32_t folded[HeadDim / 16][2]; // steps in the queries
    float less[2];                    // what sums of products begin with
    float factor[2], add[2];
};

template <typename Format, int HeadDim>
KVC_DEVICE void fold_steps(const kvc_decode_tile_params &p, const QueryRows<HeadDim> &queries,
                           const unsigned char *record, TileQueries<typename Format::K, HeadDim> &out) {
    using K = typename Format::K;
    using Words = RowWords<K, HeadDim>;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const FoldRows<K, HeadDim> fold(queries);
    uint32_t pairs[HeadDim / 8];
KVC_UNROLL
    for (uint32_t i = 0; i < HeadDim / 32; ++i) {
        const WordRun<4> run = fold.load(i);
        for (uint32_t j = 0; j < 4; ++j) pairs[4 * i + j] = run.word[j];
    }
    float levels[4] = {0.0f, 0.0f, 0.0f, 0.0f};
KVC_UNROLL
    for (uint32_t n = 0; n < Words::kWords; ++n) {
        const uint32_t first = Words::word(t, n / Words::kRun, n % Words::kRun) * Words::kPerWord;
        uint32_t steps[K::kPairs];
        channel_pairs<K>(record + p.k_steps_at, first, steps);
KVC_UNROLL
        for (uint32_t i = 0; i < K::kPairs; ++i) {
            const uint32_t at = n * K::kPairs + i;
            out.folded[at / 2][at % 2] = mul_f16x2(pairs[at], steps[i]);
        }
KVC_UNROLL
        for (uint32_t i = 0; i < K::kPairs; i += 2) {
            const uint32_t low = twice(Format::kLevels << K::place(i));
            const uint32_t high = twice(Format::kLevels << K::place(i + 1));
            const uint32_t a[4] = {low, low, high, high};
            mma_f16(levels, a, out.folded[(n * K::kPairs + i) / 2]);
        }
    }
    for (int i = 0; i < 2; ++i) out.less[i] = -0.5f * levels[i];

    // Queries times middles, of channels in their order: a byte with its sign flipped is 128 more.
    float middle[4] = {0.0f, 0.0f, 0.0f, 0.0f};
KVC_UNROLL
    for (uint32_t i = 0; i < HeadDim / 32; ++i) {
        const uint32_t first = (4 * i + t) * 8;
        const WordRun<4> q =
            *reinterpret_cast<const WordRun<4> *>(queries.rows + g * queries.kRow + first);
        const WordRun<2> mids =
            *reinterpret_cast<const WordRun<2> *>(record + p.k_mids_at + first);
KVC_UNROLL
        for (uint32_t j = 0; j < 2; ++j) {
            uint32_t m[2];
            Int8::small(mids.word[j], m);
            const uint32_t a[4] = {m[0], m[0], m[1], m[1]};
            const uint32_t b[2] = {q.word[2 * j], q.word[2 * j + 1]};
            mma_f16(middle, a, b);
        }
    }
    const uint32_t units = *reinterpret_cast<const uint32_t *>(record + p.header_at);
    const float unit = widen_f16(static_cast<uint16_t>(units)) * kScoreUnit;
    const float mid_unit = widen_f16(static_cast<uint16_t>(units >> 16));
    for (int c = 0; c < 2; ++c) {
        const float q_factor = queries.factors[2 * t + c];
        out.factor[c] = unit * q_factor;
        out.add[c] = mid_unit * (middle[c] * 16777216.0f - 128.0f * queries.sums[2 * t + c]) * q_factor;
    }
}

// The products of a strip of the 64 tokens that begin at row `part` of the keys.
template <typename Format, int HeadDim>
KVC_DEVICE void multiply_keys(const kvc_decode_tile_params &p, const unsigned char *record,
                              uint32_t part, uint32_t strip,
                              const TileQueries<typename Format::K, HeadDim> &q, float (&s)[4]) {
    using K = typename Format::K;
    using V = typename Format::V;
    using Words = RowWords<K, HeadDim>;
    constexpr uint32_t kPlaneRow = HeadDim / 8;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const uint32_t rows[2] = {part + strip_token<V>(strip, g), part + strip_token<V>(strip, g + 8)};
    // Two sums, so that a product waits for the one before the last.
    float odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = 0; i < 4; ++i) s[i] = q.less[i % 2];
KVC_UNROLL
    for (uint32_t j = 0; j < Words::kRuns; ++j) {
        WordRun<Words::kRun> run[2];
KVC_UNROLL
        for (int i = 0; i < 2; ++i)
            run[i] = *reinterpret_cast<const WordRun<Words::kRun> *>(
                record + rows[i] * Words::kBytes + Words::word(t, j, 0) * 4);
KVC_UNROLL
        for (uint32_t w = 0; w < Words::kRun; ++w) {
            uint32_t pairs[2][K::kPairs];
KVC_UNROLL
            for (int i = 0; i < 2; ++i) {
                uint32_t thirds = 0;
                if constexpr (kHasPlane<K>) {
                    const uint32_t word = Words::word(t, j, w);
                    thirds = *reinterpret_cast<const uint32_t *>(
                                 record + p.k_plane_at + rows[i] * kPlaneRow + word / 2 * 4) >>
                             word % 2 * 8;
                }
                unpack_small<K>(run[i].word[w], thirds, pairs[i]);
            }
KVC_UNROLL
            for (uint32_t i = 0; i < K::kPairs; i += 2) {
                const uint32_t step = ((j * Words::kRun + w) * K::kPairs + i) / 2;
                const uint32_t a[4] = {pairs[0][i], pairs[1][i], pairs[0][i + 1], pairs[1][i + 1]};
                mma_f16(step % 2 == 0 ? s : odd, a, q.folded[step]);
            }
        }
    }
    for (int i = 0; i < 4; ++i) s[i] += odd[i];
}

// Adds a tile; a `plain` one lies before the tail and in the piece, and every column sees all of it.
template <typename Format, int HeadDim>
KVC_DEVICE void accumulate_tile(const kvc_decode_tile_params &p, const QueryRows<HeadDim> &queries,
                                const unsigned char *record, uint32_t tile, bool plain, TileState<HeadDim> &state) {
    using V = typename Format::V;
    constexpr int kSteps = HeadDim / 16;
    constexpr uint32_t kRun = V::kBits / 2; // words of a channel's 16 tokens
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    TileQueries<typename Format::K, HeadDim> q;
    fold_steps<Format, HeadDim>(p, queries, record, q);

    for (uint32_t part = 0; part < p.tile_tokens; part += 64) {
        float s[4][4];
KVC_UNROLL
        for (uint32_t strip = 0; strip < 4; ++strip) {
            multiply_keys<Format, HeadDim>(p, record, part, strip, q, s[strip]);
            for (int i = 0; i < 4; ++i)
                s[strip][i] = s[strip][i] * q.factor[i % 2] + q.add[i % 2];
        }
        if (!plain) {
            // Rare, so columns are found anew, which saves the others their registers, and the strips take
            // turns in one place.
            const TileWork &work = *FoldRows<typename Format::K, HeadDim>(queries).work();
            const Unit &u = work.u;
            const Piece &item = work.item;
            Column columns[2];
            for (uint32_t c = 0; c < 2; ++c)
                columns[c] = only_where(find_column(p.call, u, 2 * t + c),
                                        own_tile(p, u, 2 * t + c) > static_cast<int32_t>(tile));
KVC_ROLL
            for (uint32_t strip = 0; strip < 4; ++strip) {
                int32_t tokens[2];
                bool readable[2];
KVC_UNROLL
                for (uint32_t i = 0; i < 2; ++i) {
                    const uint32_t token =
                        tile * p.tile_tokens + part + strip_token<V>(strip, g + 8 * i);
                    tokens[i] = static_cast<int32_t>(token);
                    readable[i] = token >= item.begin && token < item.end &&
                                  token >= static_cast<uint32_t>(u.first_token);
                }
                make_scores(p.call, u, columns, tokens, readable, s[0]);
KVC_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float first = s[0][i];
                    s[0][i] = s[1][i];
                    s[1][i] = s[2][i];
                    s[2][i] = s[3][i];
                    s[3][i] = first;
                }
            }
        }
        const WordRun<4> scales =
            strip_scales<V>(record + p.v_scales_at + part * 2, g);
        const uint32_t most = max_f16x2(max_f16x2(scales.word[0], scales.word[1]),
                                        max_f16x2(scales.word[2], scales.word[3]));
        const uint32_t low = most & 0xffff, high = most >> 16;
        const uint32_t largest = max_of_warp(low > high ? low : high);
        const float same = state.count_in(widen_f16(static_cast<uint16_t>(largest)));
        const float per_unit = state.per_unit();

        float keep[2];
        state.weigh(s, keep);
        for (int c = 0; c < 2; ++c) keep[c] *= same;
        state.rescale(keep);
        for (int i = 0; i < 4; ++i) state.total[i] *= keep[i % 2];
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
    rows.fill(p, u, false);
    sync_threads();
    const FoldRows<typename Format::K, HeadDim> fold(rows);
    fold.fill(rows);
    if (thread_x() == 0) *fold.work() = {u, item, table, unit, plain_from, plain_to};
    TileState<HeadDim> state;
    accumulate_raw<HeadDim>(params, item, u, table, Format::kStep * kSumUnit, state);
    if (ring.bulk()) fence_bulk();
    sync_threads();

    // `coming` is the tile whose copy starts next, past the end when all have.
    const uint32_t ahead = (ring.stages() - 1) * kDecodeWarps;
    for (uint32_t coming = first; coming < end + ahead; coming += kDecodeWarps) {
        ring.issue(*fold.work(), coming < end, coming + kDecodeWarps, coming + kDecodeWarps < end);
        if (coming < first + ahead) continue;
        const uint32_t tile = coming - ahead;
        const unsigned char *record = ring.wait();
        if (record != nullptr && !is_sealed(params, record)) {
            // Read raw, where it is.
            if (!has_raw(params, fold.work()->u.seq, tile)) raise(p.error_flag, kFlagBlock);
            record = nullptr;
        }
        if (record != nullptr) {
            const bool plain = tile >= fold.work()->plain_from && tile < fold.work()->plain_to;
            accumulate_tile<Format, HeadDim>(params, rows, record, tile, plain, state);
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
