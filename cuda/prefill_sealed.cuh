// Chunked prefill over sealed tiles and the raw ones of the same sequences, on tensor cores: the tiles
// of query rows, the warps and the products are those of the prefill of 16-bit rows (prefill.cuh).
//
// A row reads its own tile raw, and one before it as sealed, or raw where it could not be sealed. So a
// block first adds the raw tiles that one of its rows reads, in bf16, rotates what it has to where
// sealed values are rotated, and then goes through the sealed tiles, 64 tokens at a time. Codes come to
// shared memory by asynchronous copies, keys while the values before are summed and values while scores
// are computed, and become f16 there once for all rows:
//
//   K' = (code - n/2) us S/U + zi Z/U     U a power of two of the record, which goes to the scores
//   V' = (code - middle) r 2^-Down        the power of two and the step of a code go to the output
//
// K' and V' are in the range of f16 whatever the record says, V' exact to 2^-25. K' has a row a token
// and V' a row a channel, as the record does, so that neither is transposed.
//
// Every row adds its raw tiles in order and then its sealed ones, whatever rows lie beside it: it has
// the same bits however its prompt is cut and whatever else is in the batch. Output rows are rotated
// back at the end. One instance serves all formats: what differs, the unpacking, is a branch a tile.
//
// For each 64 keys of 128 channels a thread has some 1,290 instructions of KT4V4 where the 16-bit kernel has
// some 990, 256 of them products in both; unpacking takes 200 of keys and 157 of values (302 and 254 of 3
// bits). The latter's time is three times what its instructions take to issue, so most of it should hide.
#pragma once
#include "hadamard.cuh"
#include "prefill.cuh"
#include "raw_slots.cuh"
#include "sealed_stage.cuh"

namespace kvc::prefill {

// Rounds the queries of a warp to f16.
template <int HeadDim> KVC_DEVICE void load_f16_queries(const kvc_prefill_params &p, const Tile &u) {
    using S = Shape<HeadDim>;
    for (uint32_t i = lane_id(); i < S::kWarpRows * S::kChunks; i += 32) {
        const uint32_t row = warp_id() * S::kWarpRows + i / S::kChunks, chunk = i % S::kChunks;
        Vec16 v = {};
        if (u.begin + row < u.rows) {
            const Chunk c =
                load_chunk(p.q, row_start(u, u.begin + row, p.q_row, p.q_head) + chunk * 8, p.q_dtype);
            for (int j = 0; j < 4; ++j)
                v.word[j] = pack_f16(c.x[2 * j] / kQueryUnit, c.x[2 * j + 1] / kQueryUnit);
        }
        *reinterpret_cast<Vec16 *>(KVC_SMEM(uint16_t) + row * S::kRow + chunk * 8) = v;
    }
    sync_warp();
}

// H x of the sums of a warp's rows, times `by`: lane 4g+t has channels 8j + 2t and the next.
template <int HeadDim> KVC_DEVICE void rotate_rows(Warp<HeadDim> &warp, float by) {
    constexpr uint32_t kBlock = hadamard_block(HeadDim);
    static_assert(kBlock == 64 || kBlock == 128, "whole rows");
    const uint32_t t = lane_id() % 4;
    const float root = by * (kBlock == 64 ? 0.125f : 0.08838834764831845f);
KVC_UNROLL
    for (int strip = 0; strip < Shape<HeadDim>::kStrips; ++strip) {
        auto &o = warp.o[strip];
KVC_UNROLL
        for (uint32_t j = 0; j < HeadDim / 8; ++j) {
            const uint32_t signs = static_cast<uint32_t>(sign_word(j / 8) >> j % 8 * 8) >> 2 * t;
KVC_UNROLL
            for (int c = 0; c < 4; c += 2) {
                const float low = (signs & 1) != 0 ? -o[j][c] : o[j][c];
                const float high = (signs & 2) != 0 ? -o[j][c + 1] : o[j][c + 1];
                o[j][c] = low + high;
                o[j][c + 1] = low - high;
            }
KVC_UNROLL
            for (uint32_t bit = 1; bit < 4; bit *= 2)
                for (int c = 0; c < 4; ++c) {
                    const float other = shfl_xor(kFullMask, o[j][c], bit);
                    o[j][c] = other + ((t & bit) != 0 ? -o[j][c] : o[j][c]);
                }
        }
KVC_UNROLL
        for (uint32_t bit = 1; bit < kBlock / 8; bit *= 2)
KVC_UNROLL
            for (uint32_t j = 0; j < HeadDim / 8; ++j) {
                if ((j & bit) != 0) continue;
                for (int c = 0; c < 4; ++c) {
                    const float low = o[j][c], high = o[j + bit][c];
                    o[j][c] = low + high;
                    o[j + bit][c] = low - high;
                }
            }
KVC_UNROLL
        for (uint32_t j = 0; j < HeadDim / 8; ++j)
            for (int c = 0; c < 4; ++c) o[j][c] *= root;
    }
}

// What output rows need in the end: the unit of sealed values, and to be rotated back.
template <int HeadDim> struct SealedRows {
    const kvc_prefill_sealed_params &params;

    KVC_DEVICE void finish(const Tile &, float *rows) const {
        using S = Shape<HeadDim>;
        const float unit = value_unit(params.v_bits);
        for (uint32_t i = lane_id(); i < S::kWarpRows * HeadDim / 4; i += 32) {
            const uint32_t channel = i % (HeadDim / 4) * 4;
            float *at = rows + i / (HeadDim / 4) * S::kRow + channel;
            float x[4];
            for (int j = 0; j < 4; ++j) x[j] = at[j] * unit;
            if (params.v_rotated != 0) unrotate_channels<HeadDim>(x, channel);
            for (int j = 0; j < 4; ++j) at[j] = x[j];
        }
        sync_warp();
    }
};

// Weighs scores. Between two calls a thread's sums of weights lie behind its row of the queries, where
// they take no registers.
template <int HeadDim>
KVC_DEVICE void weigh(Warp<HeadDim> &warp, typename Warp<HeadDim>::Scores &s, float factor) {
    using Sums = float[Shape<HeadDim>::kStrips][2];
    static_assert(sizeof(Sums) == sizeof(Vec16), "16 bytes");
    const Vec16 kept_sums = kept<HeadDim, Vec16>(opaque(thread_x()));
    memcpy(warp.l, &kept_sums, sizeof(Sums));
    warp.weigh(s, factor);
    Vec16 sums;
    memcpy(&sums, warp.l, sizeof(Sums));
    keep<HeadDim>(opaque(thread_x()), sums);
}

// Positions of the first and last row of a warp, or of the block: its own tiles follow.
struct Span {
    int32_t low, high;
};
KVC_DEVICE Span span_of(const Tile &u, uint32_t row, uint32_t count) {
    const uint32_t end = row + count, last = (end < u.rows ? end : u.rows) - 1;
    return {u.offset + static_cast<int32_t>(row / u.group),
            u.offset + static_cast<int32_t>(last / u.group)};
}

// Where the tile of a position begins: nothing behind it is sealed for the row there.
KVC_DEVICE int32_t own_begin(int32_t position, uint32_t tile_tokens) {
    return position & ~static_cast<int32_t>(tile_tokens - 1);
}

// Adds 64 tokens of a raw tile, the `part`-th of them.
template <int HeadDim>
KVC_DEVICE void add_raw_part(const kvc_prefill_sealed_params &params, uint32_t which, uint32_t part,
                             Warp<HeadDim> &warp) {
    using S = Shape<HeadDim>;
    const kvc_prefill_params &p = params.call;
    const auto &side = Room<HeadDim>::side();
    const Tile &u = side.tile;
    const int32_t token = side.raws[which].token + static_cast<int32_t>(part * kKeys);
    const uint64_t readable = keys_before(u.end - token) & ~keys_before(u.first - token);
    {
        const RawSlot raw =
            raw_slot(params, static_cast<uint32_t>(side.raws[which].slot), u.kv_head);
        const uint32_t thread = opaque(thread_x());
        const auto copy = [&](uint16_t *to, const uint16_t *rows, int64_t stride) {
            for (uint32_t i = thread; i < kKeys * S::kChunks; i += kThreads) {
                const uint32_t row = i / S::kChunks, chunk = i % S::kChunks;
                cp_async_16(to + row * S::kRow + chunk * 8,
                            rows + (part * kKeys + row) * stride + chunk * 8,
                            (readable >> row & 1) != 0);
            }
            cp_async_commit();
        };
        copy(keys<HeadDim>(), raw.k, raw.k_token);
        copy(values<HeadDim>(), raw.v, raw.v_token);
    }
    cp_async_wait<1>();
    sync_threads();
    bool sees = false;
    const uint32_t row = Warp<HeadDim>::first_row(u);
    if (row < u.rows) {
        const Span span = span_of(u, row, S::kWarpRows);
        sees = span.high >= token &&
               (side.raws[which].later != 0 || span.low >> u.shift <= token >> u.shift);
    }
    sees = uniform(sees);
    typename Warp<HeadDim>::Scores s = {};
    if (sees) {
        warp.template multiply<Bf16>(s, KVC_SMEM(uint16_t), keys<HeadDim>());
        if (p.transform != 0) warp.transform(s, p, u, token);
        const bool later = side.raws[which].later != 0;
        const uint32_t shift = u.shift;
        warp.mask(s, p, u, token, readable, [&](int32_t at) {
            return later || at >> shift == token >> shift ? keys_before(at - token + 1) : 0;
        });
    }
    cp_async_wait<0>();
    sync_threads();
    if (sees) {
        weigh(warp, s, p.factor);
        warp.template add<Bf16>(s, values<HeadDim>());
    }
    sync_threads(); // all warps are done with what is there
}

// Finds which of the up to 32 raw tiles from entry `first` of the second table on rows of the block
// read. A warp calls it.
template <int HeadDim>
KVC_DEVICE void find_raws(const kvc_prefill_sealed_params &params, int32_t first, int32_t end) {
    using S = Shape<HeadDim>;
    const kvc_prefill_params &p = params.call;
    auto &side = Room<HeadDim>::side();
    const Tile &u = side.tile;
    const uint32_t lane = opaque(lane_id());
    const int32_t mine = first + static_cast<int32_t>(lane);
    int32_t tile = -1, slot = -1;
    bool wanted = false, later = false;
    if (mine < end) {
        tile = params.raw_blocks[2 * static_cast<int64_t>(mine)];
        slot = params.raw_blocks[2 * static_cast<int64_t>(mine) + 1];
        const int64_t begin = static_cast<int64_t>(tile) * params.tile_tokens;
        if (tile >= 0 && begin < u.end && begin + params.tile_tokens > u.first) {
            wanted = is_slot(params, slot);
            if (!wanted) raise(p.error_flag, kFlagBlock);
        }
        // Rows further on read it only where it could not be sealed.
        const Span span = span_of(u, u.begin, S::kRows);
        if (wanted && tile < span.high >> u.shift) {
            const BlockTable table(u.entries, u.count, u.shift, params.tile_tokens, p.num_blocks,
                                   p.error_flag);
            const int32_t block = table.checked(table.entry(static_cast<uint32_t>(tile)));
            later = block < 0 || !is_sealed(params, record_at(params, block, u.kv_head));
            wanted = later || tile >= span.low >> u.shift;
        }
    }
    const uint32_t all = ballot(kFullMask, wanted);
    if (wanted) {
        auto &to = side.raws[population(all & ((1u << lane) - 1))];
        to.token = tile << u.shift;
        to.slot = slot;
        to.later = later ? 1 : 0;
    }
    if (lane == 0) side.raw_count = population(all);
}

// Adds the raw tiles that rows of the block read, in their order.
template <int HeadDim>
KVC_DEVICE void add_raw(const kvc_prefill_sealed_params &params, Warp<HeadDim> &warp) {
    const auto &side = Room<HeadDim>::side();
    for (int32_t first = params.raw_indptr[side.seq]; first < params.raw_indptr[side.seq + 1];
         first += 32) {
        if (warp_id() == 0) find_raws<HeadDim>(params, first, params.raw_indptr[side.seq + 1]);
        sync_threads();
        for (uint32_t i = 0; i < side.raw_count; ++i)
            for (uint32_t part = 0; part < params.tile_tokens / kKeys; ++part) {
                const int32_t token = side.raws[i].token + static_cast<int32_t>(part * kKeys);
                if (token < side.tile.end && side.tile.first - token < kKeys)
                    add_raw_part<HeadDim>(params, i, part, warp);
            }
        sync_threads(); // before the list is written anew
    }
}

// The sealed tiles of a block, found 32 at a time, which hides how long it takes.
template <int HeadDim> struct Records {
    const kvc_prefill_sealed_params &params;

    KVC_DEVICE int32_t block_of(uint32_t tile) const {
        return Room<HeadDim>::side().blocks[tile % 32];
    }

    // Finds those of the 32 tiles around `tile`; all threads of the block call it.
    KVC_DEVICE void find(uint32_t tile) const {
        sync_threads();
        if (warp_id() == 0) {
            auto &side = Room<HeadDim>::side();
            const Tile &u = side.tile;
            const kvc_prefill_params &p = params.call;
            const uint32_t lane = opaque(lane_id()), mine = tile / 32 * 32 + lane;
            int32_t block = -1;
            if (mine >= tile && mine < side.past / (params.tile_tokens / kKeys)) {
                const BlockTable table(u.entries, u.count, u.shift, params.tile_tokens, p.num_blocks,
                                       p.error_flag);
                block = table.checked(table.entry(mine));
                if (block >= 0 && !is_sealed(params, record_at(params, block, u.kv_head))) {
                    // Read raw, where it is.
                    block = -1;
                    if (!has_raw(mine)) raise(p.error_flag, kFlagBlock);
                }
            }
            side.blocks[lane] = block;
            if (lane == 0) side.known = tile / 32;
        }
        sync_threads();
    }
    KVC_DEVICE bool has_raw(uint32_t tile) const {
        const uint32_t seq = Room<HeadDim>::side().seq;
        for (int32_t i = params.raw_indptr[seq]; i < params.raw_indptr[seq + 1]; ++i)
            if (params.raw_blocks[2 * static_cast<int64_t>(i)] == static_cast<int32_t>(tile)) return true;
        return false;
    }

    // The first 64 tokens from the `part`-th on that lie in a sealed tile, the end where none do.
    KVC_DEVICE uint32_t next(uint32_t part) const {
        const auto &side = Room<HeadDim>::side();
        const uint32_t parts = params.tile_tokens / kKeys;
        while (part < side.past) {
            const uint32_t tile = part / parts;
            if (tile / 32 != side.known) find(tile);
            if (block_of(tile) >= 0) return part;
            part = (tile + 1) * parts;
        }
        return side.past;
    }
    KVC_DEVICE const unsigned char *record(uint32_t part) const {
        const uint32_t tile = part / (params.tile_tokens / kKeys);
        return record_at(params, block_of(tile), Room<HeadDim>::side().tile.kv_head);
    }
    KVC_DEVICE uint32_t part_of_tile(uint32_t part) const {
        return part % (params.tile_tokens / kKeys);
    }
};

// Adds the sealed tiles; the side says where they end, and that none is known.
template <int HeadDim>
KVC_DEVICE void add_sealed(const kvc_prefill_sealed_params &params, Warp<HeadDim> &warp) {
    using S = Shape<HeadDim>;
    using R = Room<HeadDim>;
    const kvc_prefill_params &p = params.call;
    auto &side = R::side();
    const Records<HeadDim> records = {params};
    uint32_t part = records.next(static_cast<uint32_t>(side.tile.first) / kKeys);
    if (part < side.past) {
        fetch_keys<HeadDim>(params, records.record(part), records.part_of_tile(part));
        fetch_values<HeadDim>(params, records.record(part), records.part_of_tile(part));
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();
    while (part < side.past) {
        // The codes of its keys are there, and all warps are done with the keys before.
        widen_keys<HeadDim>(params.k_bits);
        cp_async_wait<0>();
        sync_threads();
        // Those of its values are, the keys are f16, and all warps are done with the values before.
        {
            const uint32_t next = records.next(part + 1);
            if (next < side.past)
                fetch_keys<HeadDim>(params, records.record(next), records.part_of_tile(next));
            cp_async_commit();
            if (thread_x() == 0) side.next = next;
        }
        const Sight &sight = side.sights[warp_id()];
        const int32_t token = static_cast<int32_t>(part * kKeys);
        const bool sees = uniform(sight.some(token));
        typename Warp<HeadDim>::Scores s = {};
        if (sees) {
            warp.template multiply<F16>(s, KVC_SMEM(uint16_t), keys<HeadDim>());
            if (p.transform != 0) {
                const float unit = side.units[warp_id()];
KVC_UNROLL
                for (int i = 0; i < S::kStrips * kKeys / 2; ++i)
                    s[i / (kKeys / 2)][i / 4 % (kKeys / 8)][i % 4] *= unit;
                warp.transform(s, p, side.tile, token);
            }
            if (uniform(!sight.all(token))) {
                warp.mask(s, p, side.tile, token, kAllKeys, [&](int32_t at) {
                    return keys_before(own_begin(at, params.tile_tokens) - token);
                });
            }
        }
        widen_values<HeadDim>(params, records.part_of_tile(part));
        cp_async_wait<0>();
        sync_threads();
        // The values are f16, the codes of the next keys are there, and all warps are done with the keys.
        part = side.next;
        if (part < side.past)
            fetch_values<HeadDim>(params, records.record(part), records.part_of_tile(part));
        cp_async_commit();
        if (sees) {
            const float unit = p.transform != 0 ? 1.0f : side.units[warp_id()];
            weigh(warp, s, max_f32(unit * p.factor, kLeastFactor));
            warp.template add<F16, true>(s, values<HeadDim>());
        }
    }
}

template <int HeadDim> KVC_DEVICE void attend_sealed(const kvc_prefill_sealed_params &params) {
    using S = Shape<HeadDim>;
    const kvc_prefill_params &p = params.call;
    auto &side = Room<HeadDim>::side();
    Warp<HeadDim> warp;
    {
        Tile u;
        if (!find_tile<S::kRows>(p, u)) return;
        const uint32_t seq = find_sequence<S::kRows>(p, block_x() / p.kv_heads, u.group);
        if (thread_x() == 0) {
            side.tile = u;
            side.seq = seq;
            const Span span = span_of(u, u.begin, S::kRows);
            const uint32_t tiles = span.high < 0 ? 0 : static_cast<uint32_t>(span.high) >> u.shift;
            side.past = tiles * (params.tile_tokens / kKeys);
            side.known = ~0u;
        }
        if (lane_id() == 0) {
            const uint32_t row = Warp<HeadDim>::first_row(u);
            Sight sight = {0, 0, 0, 0};
            if (row < u.rows) {
                // Of sealed tiles, those before the own tile.
                const Span span = span_of(u, row, S::kWarpRows);
                sight = {lowest(p, span.low), own_begin(span.high, params.tile_tokens),
                         lowest(p, span.high), own_begin(span.low, params.tile_tokens)};
            }
            side.sights[warp_id()] = sight;
        }
        load_queries<Bf16, HeadDim>(p, u, KVC_SMEM(uint16_t));
        cp_async_commit();
        keep<HeadDim>(thread_x(), Vec16{});
    }
    sync_threads();
    add_raw<HeadDim>(params, warp);
    cp_async_wait<0>();
    sync_threads(); // all warps are done with queries, keys and values
    const float unit = 1.0f / value_unit(params.v_bits);
    if (params.v_rotated != 0) {
        rotate_rows<HeadDim>(warp, unit);
    } else {
KVC_UNROLL
        for (int i = 0; i < S::kStrips * HeadDim / 2; ++i)
            warp.o[i / (HeadDim / 2)][i / 4 % (HeadDim / 8)][i % 4] *= unit;
    }
    load_f16_queries<HeadDim>(p, side.tile);
    add_sealed<HeadDim>(params, warp);
    cp_async_wait<0>();
    sync_threads();
    const Tile u = side.tile;
    const Vec16 sums = kept<HeadDim, Vec16>(thread_x());
    memcpy(warp.l, &sums, sizeof sums);
    sync_threads(); // before output rows take their place
    warp.finish(p, u, SealedRows<HeadDim>{params});
}

} // namespace kvc::prefill

// Defines the kernel for one head dimension.
#define KVC_PREFILL_SEALED(dim)                                                          \
    KVC_KERNEL(kvc_prefill_sealed_d##dim, kvc_prefill_sealed_params, 128, 2) {           \
        kvc::prefill::attend_sealed<dim>(p);                                             \
    }
