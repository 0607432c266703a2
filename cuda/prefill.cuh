// Chunked prefill: attention of ragged query rows over paged keys and values, on tensor cores, in
// the manner of FlashAttention-2.
//
// A block of four warps works on a tile: rows of one sequence that read one KV head. The query
// heads of a group are packed into the rows (row = token * group + head in group), so that keys and
// values are read once for all of them. A warp has 32 rows, or 16 where the sums of a head do not
// leave room for more; every warp reads every key of a tile of 64:
//
//   S[rows x 64]  = Q K'      A = Q by ldmatrix, B = K by ldmatrix
//   O[rows x d]  += P V       A = P, the registers of S rounded, B = V by ldmatrix.trans
//
// K and V have one place each in shared memory. While the scores of a tile are computed its values
// are on their way, and while its values are summed the next keys are; another block of the same
// multiprocessor fills what is left.
//
// Tiles are found from the row offsets on the device: no plan, no workspace. No sum is split
// between blocks, and key tiles begin at multiples of 64, so a row has the same bits in any batch,
// under any schedule, and however its prompt is cut into chunks.
//
// A form for Hopper (wgmma, TMA) has its place beside this file as prefill_sm90.cuh, with the same
// parameters; src/kernels/prefill.rs is where a call gets its kernel by name.
#pragma once
#include "prefill_tile.cuh"
#include "state.cuh"

namespace kvc::prefill {

// Shared memory: the queries of the tile, then a tile of keys and one of values.
template <int HeadDim> KVC_DEVICE uint16_t *keys() {
    return KVC_SMEM(uint16_t) + Shape<HeadDim>::kRows * Shape<HeadDim>::kRow;
}
template <int HeadDim> KVC_DEVICE uint16_t *values() {
    return keys<HeadDim>() + kKeys * Shape<HeadDim>::kRow;
}

// What all lanes of a warp agree on, said so that the compiler knows that they do not diverge.
KVC_DEVICE bool uniform(bool value) { return ballot(kFullMask, value) != 0; }

// What the loop needs seldom lies in shared memory, where it takes no registers: in the eight
// elements that a row there has more than it needs, from `row` on 16 bytes a row. The first rows
// have the tile, the next ones the sight of each warp; one thread writes them, and after a barrier
// others read.
constexpr uint32_t kTileParts = sizeof(Tile) / sizeof(Vec16);

template <int HeadDim, typename Any> KVC_DEVICE void keep(uint32_t row, const Any &value) {
    Vec16 parts[sizeof(Any) / sizeof(Vec16)];
    memcpy(parts, &value, sizeof value);
    for (const Vec16 &part : parts) {
        uint16_t *at = KVC_SMEM(uint16_t) + row++ * Shape<HeadDim>::kRow + HeadDim;
        *reinterpret_cast<Vec16 *>(at) = part;
    }
}
template <int HeadDim, typename Any> KVC_DEVICE Any kept(uint32_t row) {
    Vec16 parts[sizeof(Any) / sizeof(Vec16)];
    for (Vec16 &part : parts) {
        const uint16_t *at = KVC_SMEM(uint16_t) + row++ * Shape<HeadDim>::kRow + HeadDim;
        part = *reinterpret_cast<const Vec16 *>(at);
    }
    Any value;
    memcpy(&value, parts, sizeof value);
    return value;
}
template <int HeadDim> KVC_DEVICE Tile kept_tile() { return kept<HeadDim, Tile>(0); }
template <int HeadDim> KVC_DEVICE Sight kept_sight() {
    return kept<HeadDim, Sight>(kTileParts + warp_id());
}

// Starts the copy of the tile's queries, rounded to T; rows that do not exist become zeros.
template <typename T, int HeadDim>
KVC_DEVICE void load_queries(const kvc_prefill_params &p, const Tile &u, uint16_t *to) {
    using S = Shape<HeadDim>;
    for (uint32_t i = thread_x(); i < S::kRows * S::kChunks; i += kThreads) {
        const uint32_t row = i / S::kChunks, chunk = i % S::kChunks;
        const bool exists = u.begin + row < u.rows;
        const int64_t from =
            exists ? row_start(u, u.begin + row, p.q_row, p.q_head) + chunk * 8 : 0;
        uint16_t *at = to + row * S::kRow + chunk * 8;
        if (p.q_dtype == T::id) {
            cp_async_16(at, static_cast<const uint16_t *>(p.q) + from, exists);
            continue;
        }
        Vec16 v = {};
        if (exists) {
            const Chunk c = load_chunk(p.q, from, p.q_dtype);
            for (int j = 0; j < 4; ++j) v.word[j] = T::pack(c.x[2 * j], c.x[2 * j + 1]);
        }
        *reinterpret_cast<Vec16 *>(at) = v;
    }
}

// Copies tiles of keys and values, 16 tokens a warp. Eight lanes copy a token's row at a time; lane
// 8a+b copies of tokens a, a+4, a+8 and a+12, and knows where one of them lies.
template <int HeadDim> struct Loader {
    static constexpr int kRow = Shape<HeadDim>::kRow, kChunks = Shape<HeadDim>::kChunks;
    static constexpr uint32_t kOwn = kKeys / kWarps;

    // What a thread knows of the tile looked up last: block and slot of token a + 4 (b mod 4) of
    // the warp's, and which of the tile's tokens exist and can be read.
    struct alignas(16) Places {
        uint32_t block, slot;
        uint64_t readable;
    };
    // They lie behind the thread's own row of the keys and values.
    KVC_DEVICE static Places places() {
        return kept<HeadDim, Places>(Shape<HeadDim>::kRows + thread_x());
    }

    // Looks up the tile that begins at `token`. Tokens that no row sees are not looked up: their
    // blocks may be gone.
    KVC_DEVICE static void look_up(const kvc_prefill_params &p, const Tile &u, int32_t token) {
        const BlockTable table(u.entries, u.count, u.shift, p.block_tokens, p.num_blocks,
                               p.error_flag);
        uint32_t slots[2] = {0, 0};
        int32_t blocks[2] = {-1, -1};
KVC_UNROLL
        for (int i = 0; i < 2; ++i) {
            const uint32_t own = static_cast<uint32_t>(token) + i * 32 + lane_id();
            if (own >= static_cast<uint32_t>(u.first) && own < static_cast<uint32_t>(u.end))
                blocks[i] = table.find(own, slots[i]);
        }
        const uint32_t low = ballot(kFullMask, blocks[0] >= 0);
        Places to;
        to.readable = static_cast<uint64_t>(ballot(kFullMask, blocks[1] >= 0)) << 32 | low;
        // The tokens of warps 0 and 1 are among the first 32, those of 2 and 3 among the others.
        const uint32_t from = warp_id() % 2 * kOwn + lane_id() / 8 + lane_id() % 4 * 4;
        const int32_t block = warp_id() < 2 ? blocks[0] : blocks[1];
        to.block = shfl(kFullMask, static_cast<uint32_t>(block), from);
        to.slot = shfl(kFullMask, warp_id() < 2 ? slots[0] : slots[1], from);
        keep<HeadDim>(Shape<HeadDim>::kRows + thread_x(), to);
    }

    KVC_DEVICE static void copy(uint16_t *to, const void *rows, int64_t head, int64_t block_stride,
                                int64_t token_stride) {
        const Places which = places();
        const uint32_t row = warp_id() * kOwn + lane_id() / 8, chunk = lane_id() % 8;
        const int64_t own =
            which.block == ~0u ? 0 : head + which.block * block_stride + which.slot * token_stride;
        const uint32_t valid = static_cast<uint32_t>(which.readable >> row);
        const uint16_t *base = static_cast<const uint16_t *>(rows) + chunk * 8;
        uint16_t *at = to + row * kRow + chunk * 8;
KVC_UNROLL
        for (uint32_t i = 0; i < kOwn / 4; ++i) {
            const uint16_t *from = base + shfl_of_8(kFullMask, own, i);
KVC_UNROLL
            for (uint32_t j = 0; j < kChunks; j += 8)
                if (j + 8 <= kChunks || j + chunk < kChunks)
                    cp_async_16(at + i * 4 * kRow + j * 8, from + j * 8, (valid >> i * 4 & 1) != 0);
        }
    }
    // Nothing is to be done to queries and output rows of floats.
    KVC_DEVICE void prepare(const Tile &, uint16_t *) const {}
    KVC_DEVICE void finish(const Tile &, float *) const {}

    KVC_DEVICE static void copy_keys(const kvc_prefill_params &p, const Tile &u) {
        copy(keys<HeadDim>(), p.k, u.kv_head * p.k_head, p.k_block, p.k_token);
    }
    KVC_DEVICE static void copy_values(const kvc_prefill_params &p, const Tile &u) {
        copy(values<HeadDim>(), p.v, u.kv_head * p.v_head, p.v_block, p.v_token);
    }
};

// The first `count` keys of a tile, as bits.
KVC_DEVICE uint64_t keys_before(int32_t count) {
    if (count <= 0) return 0;
    return count < kKeys ? (uint64_t{1} << count) - 1 : kAllKeys;
}

// The rows of a warp: lane 4g+t has rows g and g+8 of each strip, and of each eight keys or
// channels numbers 2t and 2t+1.
template <int HeadDim> struct Warp {
    using S = Shape<HeadDim>;
    static constexpr int kStrips = S::kStrips;

    // Dot products, then scores, then weights of a tile's keys.
    using Scores = float[kStrips][kKeys / 8][4];

    float m[kStrips][2], l[kStrips][2];
    float o[kStrips][HeadDim / 8][4];

    KVC_DEVICE Warp() {
KVC_UNROLL
        for (int i = 0; i < kStrips * 2; ++i) {
            m[i / 2][i % 2] = -infinity();
            l[i / 2][i % 2] = 0.0f;
        }
KVC_UNROLL
        for (int i = 0; i < kStrips; ++i)
            for (int j = 0; j < HeadDim / 8; ++j)
                for (int c = 0; c < 4; ++c) o[i][j][c] = 0.0f;
    }

    KVC_DEVICE static uint32_t first_row(const Tile &u) {
        return u.begin + warp_id() * S::kWarpRows;
    }
    // The packed row that this lane has in `half` of a strip.
    KVC_DEVICE static uint32_t row(const Tile &u, int strip, int half) {
        return first_row(u) + strip * 16 + half * 8 + lane_id() / 4;
    }
    KVC_DEVICE static Sight sight(const kvc_prefill_params &p, const Tile &u) {
        const uint32_t row = first_row(u), end = row + S::kWarpRows;
        const uint32_t last = (end < u.rows ? end : u.rows) - 1;
        const int32_t low = u.offset + static_cast<int32_t>(row / u.group);
        const int32_t high = u.offset + static_cast<int32_t>(last / u.group);
        Sight sight = {lowest(p, low), u.end, lowest(p, high), u.end};
        if (p.causal != 0) {
            sight.end = high + 1;
            sight.all_end = low + 1;
        }
        if (row >= u.rows) sight.end = 0;
        return sight;
    }
    // Adds the dot products of the tile's keys.
    template <typename T>
    KVC_DEVICE void multiply(Scores &s, const uint16_t *queries, const uint16_t *keys) const {
        const uint32_t lane = lane_id();
        const uint16_t *q_at = queries + (warp_id() * S::kWarpRows + lane % 16) * S::kRow +
                               lane / 16 * 8;
        const uint16_t *k_at = keys + (lane % 8 + lane / 16 * 8) * S::kRow + lane / 8 % 2 * 8;
KVC_UNROLL
        for (int step = 0; step < S::kSteps; ++step) {
            uint32_t a[kStrips][4];
KVC_UNROLL
            for (int i = 0; i < kStrips; ++i)
                ldmatrix_x4(a[i], q_at + i * 16 * S::kRow + step * 16);
KVC_UNROLL
            for (int j = 0; j < kKeys / 16; ++j) {
                uint32_t b[4];
                ldmatrix_x4(b, k_at + j * 16 * S::kRow + step * 16);
                const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
KVC_UNROLL
                for (int i = 0; i < kStrips; ++i) {
                    T::mma(s[i][2 * j], a[i], b0);
                    T::mma(s[i][2 * j + 1], a[i], b1);
                }
            }
        }
    }

    // Makes scores, in powers of two, of the dot products where they are more than these times a
    // positive factor.
    KVC_DEVICE void transform(Scores &s, const kvc_prefill_params &p, const Tile &u,
                              int32_t token) const {
        if (p.softcap != 0.0f) {
            const float in = p.scale * rcp_approx(p.softcap), out = p.softcap * kLog2e;
KVC_UNROLL
            for (int i = 0; i < kStrips * kKeys / 2; ++i) {
                float &x = s[i / (kKeys / 2)][i / 4 % (kKeys / 8)][i % 4];
                x = out * tanh_approx(x * in);
            }
        } else {
            const float factor = p.scale * kLog2e;
KVC_UNROLL
            for (int i = 0; i < kStrips * kKeys / 2; ++i)
                s[i / (kKeys / 2)][i / 4 % (kKeys / 8)][i % 4] *= factor;
        }
        if (p.slopes == nullptr) return;
KVC_UNROLL
        for (int i = 0; i < kStrips * 2; ++i) {
            const int strip = i / 2, half = i % 2;
            const uint32_t own = row(u, strip, half), at = own / u.group;
            const uint32_t head = u.kv_head * u.group + (own - at * u.group);
            const float slope = p.slopes[head] * kLog2e;
            const int32_t position = u.offset + static_cast<int32_t>(at);
            const int32_t distance = token - position + static_cast<int32_t>(lane_id() % 4 * 2);
KVC_UNROLL
            for (int j = 0; j < kKeys / 8 * 2; ++j)
                s[strip][j / 2][half * 2 + j % 2] +=
                    slope * static_cast<float>(distance + j / 2 * 8 + j % 2);
        }
    }

    // Takes away the keys that a row does not see or that cannot be read. `before` says of a position
    // which of the tile's keys come before what is hidden from it.
    template <typename Before>
    KVC_DEVICE void mask(Scores &s, const kvc_prefill_params &p, const Tile &u, int32_t token,
                         uint64_t readable, const Before &before) const {
        const uint32_t own = lane_id() % 4 * 2;
KVC_UNROLL
        for (int i = 0; i < kStrips * 2; ++i) {
            const int32_t at =
                u.offset + static_cast<int32_t>(row(u, i / 2, i % 2) / u.group);
            uint64_t seen = readable & ~keys_before(lowest(p, at) - token);
            seen &= before(at);
            seen >>= own;
KVC_UNROLL
            for (int j = 0; j < kKeys / 8 * 2; ++j)
                if ((seen >> (j / 2 * 8 + j % 2) & 1) == 0)
                    s[i / 2][j / 2][i % 2 * 2 + j % 2] = -infinity();
        }
    }

    // Turns the scores, which are `factor` times `s` in powers of two, into weights, and brings the
    // sums to the new largest score.
    KVC_DEVICE void weigh(Scores &s, float factor) {
        float keep[kStrips][2];
        bool moved = false;
KVC_UNROLL
        for (int i = 0; i < kStrips * 2; ++i) {
            const int strip = i / 2, half = i % 2;
            float top = -infinity();
KVC_UNROLL
            for (int j = 0; j < kKeys / 8 * 2; ++j)
                top = max_f32(top, s[strip][j / 2][half * 2 + j % 2]);
            top = max_f32(top, shfl_xor(kFullMask, top, 1));
            top = max_f32(top, shfl_xor(kFullMask, top, 2));
            const float before = m[strip][half], now = max_f32(before, top * factor);
            // A row that has seen no key has no largest score: its weights are 2^-inf.
            const float base = now == -infinity() ? 0.0f : now;
            float sum = 0.0f;
KVC_UNROLL
            for (int j = 0; j < kKeys / 8 * 2; ++j) {
                float &x = s[strip][j / 2][half * 2 + j % 2];
                x = exp2_approx(x * factor - base);
                sum += x;
            }
            keep[strip][half] = exp2_approx(before - base);
            l[strip][half] = l[strip][half] * keep[strip][half] + sum;
            m[strip][half] = now;
            moved = moved || before != now;
        }
        // Nothing to do once the largest scores of all rows have been met, as is soon so.
        if (ballot(kFullMask, moved) == 0) return;
KVC_UNROLL
        for (int i = 0; i < kStrips; ++i)
            for (int j = 0; j < HeadDim / 8; ++j)
                for (int c = 0; c < 4; ++c) o[i][j][c] *= keep[i][c / 2];
    }

    // Adds the tile's weighted values, which are rows of channels, or of tokens where `ByChannel`.
    template <typename T, bool ByChannel = false>
    KVC_DEVICE void add(const Scores &s, const uint16_t *values) {
        const uint32_t lane = lane_id();
        const uint16_t *v_at =
            ByChannel ? values + (lane % 8 + lane / 16 * 8) * kTokenRow + lane / 8 % 2 * 8
                      : values + lane % 16 * S::kRow + lane / 16 * 8;
KVC_UNROLL
        for (int k = 0; k < kKeys / 16; ++k) {
            uint32_t a[kStrips][4];
KVC_UNROLL
            for (int i = 0; i < kStrips; ++i)
                for (int j = 0; j < 4; ++j) {
                    const float(&x)[4] = s[i][2 * k + j / 2];
                    a[i][j] = T::pack(x[j % 2 * 2], x[j % 2 * 2 + 1]);
                }
KVC_UNROLL
            for (int step = 0; step < S::kSteps; ++step) {
                uint32_t b[4];
                if constexpr (ByChannel)
                    ldmatrix_x4(b, v_at + step * 16 * kTokenRow + k * 16);
                else
                    ldmatrix_x4_trans(b, v_at + k * 16 * S::kRow + step * 16);
                const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
KVC_UNROLL
                for (int i = 0; i < kStrips; ++i) {
                    T::mma(o[i][2 * step], a[i], b0);
                    T::mma(o[i][2 * step + 1], a[i], b1);
                }
            }
        }
    }

    // Writes outputs and LSE. The rows go through shared memory, all of which is free by now, so
    // that they leave in pieces of 16 bytes.
    template <typename Source>
    KVC_DEVICE void finish(const kvc_prefill_params &p, const Tile &u, const Source &source) {
        const uint32_t lane = lane_id(), g = lane / 4, t = lane % 4;
        const uint32_t first = first_row(u);
        float *rows = KVC_SMEM(float) + warp_id() * S::kWarpRows * S::kRow;
KVC_UNROLL
        for (int i = 0; i < kStrips * 2; ++i) {
            const int strip = i / 2, half = i % 2;
            float sum = l[strip][half];
            sum += shfl_xor(kFullMask, sum, 1);
            sum += shfl_xor(kFullMask, sum, 2);
            const uint32_t own = row(u, strip, half), token = own / u.group;
            const uint32_t head = u.kv_head * u.group + (own - token * u.group);
            const bool has_sink = p.sinks != nullptr;
            const Finish f =
                finish_row(m[strip][half], sum, has_sink, has_sink ? p.sinks[head] : 0.0f);
            if (t == 0 && own < u.rows && p.lse != nullptr)
                p.lse[static_cast<int64_t>(u.first_q + token) * p.q_heads + head] = f.lse;
            float *to = rows + (strip * 16 + half * 8 + g) * S::kRow + 2 * t;
KVC_UNROLL
            for (int j = 0; j < HeadDim / 8; ++j) {
                const float(&x)[4] = o[strip][j];
                const Pair pair = {x[half * 2] * f.factor, x[half * 2 + 1] * f.factor};
                *reinterpret_cast<Pair *>(to + j * 8) = pair;
            }
        }
        sync_warp();
        source.finish(u, rows);
        for (uint32_t i = lane; i < S::kWarpRows * S::kChunks; i += 32) {
            const uint32_t own = i / S::kChunks, channel = i % S::kChunks * 8;
            if (first + own >= u.rows) continue;
            const Vec16 *from = reinterpret_cast<const Vec16 *>(rows + own * S::kRow + channel);
            const Vec16 low = from[0], high = from[1];
            Chunk c;
            for (int j = 0; j < 4; ++j) {
                c.x[j] = as_float(low.word[j]);
                c.x[4 + j] = as_float(high.word[j]);
            }
            store_chunk(p.out, row_start(u, first + own, p.out_row, p.out_head) + channel,
                        p.out_dtype, c);
        }
    }

    struct alignas(8) Pair {
        float x, y;
    };
};

// `source` brings keys and values to shared memory, and may change queries and output rows there.
template <typename T, int HeadDim, typename Source>
KVC_DEVICE void attend(const kvc_prefill_params &p, const Source &source) {
    using S = Shape<HeadDim>;
    Tile u;
    if (!find_tile<S::kRows>(p, u)) return;
    using Loader = prefill::Loader<HeadDim>;
    Warp<HeadDim> warp;

    if (thread_x() == 0) keep<HeadDim>(0, u);
    if (lane_id() == 0) keep<HeadDim>(kTileParts + warp_id(), warp.sight(p, u));
    load_queries<T, HeadDim>(p, u, KVC_SMEM(uint16_t));
    source.prepare(u, KVC_SMEM(uint16_t));
    int32_t token = u.first / kKeys * kKeys;
    bool more = uniform(token < u.end);
    if (more) {
        Loader::look_up(p, u, token);
        source.copy_keys(p, u);
    }
    cp_async_commit();
    while (more) {
        // The keys are there, and all warps are done with the values of the tile before.
        cp_async_wait<0>();
        sync_threads();
        const bool sees = uniform(kept_sight<HeadDim>().some(token));
        source.copy_values(p, kept_tile<HeadDim>());
        cp_async_commit();
        // Zeros in either case, as otherwise the scores of the tile before would be kept.
        typename Warp<HeadDim>::Scores s = {};
        if (sees) {
            warp.template multiply<T>(s, KVC_SMEM(uint16_t), keys<HeadDim>());
            if (p.transform != 0) warp.transform(s, p, kept_tile<HeadDim>(), token);
            const uint64_t readable = Loader::places().readable;
            if (uniform(readable != kAllKeys || !kept_sight<HeadDim>().all(token)))
                warp.mask(s, p, kept_tile<HeadDim>(), token, readable, [&](int32_t at) {
                    return p.causal != 0 ? keys_before(at - token + 1) : kAllKeys;
                });
        }
        const Tile again = kept_tile<HeadDim>();
        more = uniform(again.end - token > kKeys);
        if (more) Loader::look_up(p, again, token + kKeys);
        // The values are there, and all warps are done with the keys.
        cp_async_wait<0>();
        sync_threads();
        if (more) source.copy_keys(p, kept_tile<HeadDim>());
        cp_async_commit();
        if (sees) {
            warp.weigh(s, p.factor);
            warp.template add<T>(s, values<HeadDim>());
        }
        if (more) token += kKeys;
    }
    cp_async_wait<0>();
    sync_threads();
    const Tile again = kept_tile<HeadDim>();
    sync_threads(); // before the rows of the first warp take its place
    warp.finish(p, again, source);
}

} // namespace kvc::prefill

// Defines the kernel for one cache type and head dimension.
#define KVC_PREFILL(type, Type, dim)                                                     \
    KVC_KERNEL(kvc_prefill_##type##_d##dim, kvc_prefill_params, 128, 2) {                \
        kvc::prefill::attend<kvc::Type, dim>(p, kvc::prefill::Loader<dim>());                                         \
    }
