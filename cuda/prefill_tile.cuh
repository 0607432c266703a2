// A tile of chunked prefill: which rows of which sequence a block computes, and which keys they
// see.
//
// Sequence i has the tiles from q_indptr[i] * group / R + i on, rounded down, where a tile has R
// packed rows. These are always enough, so a block finds its tile by a search in the row offsets:
// nothing is planned. src/kernels/prefill.rs makes the grid by the same rule. Row offsets that do
// not ascend or end past what the launch was made for raise the error flag, and their rows are left
// alone. Nothing here reads keys, values or the entries of a block table.
#pragma once
#include "kvc_params.h"
#include "page.cuh"

namespace kvc::prefill {

constexpr uint32_t kWarps = 4, kThreads = 128;
constexpr int kKeys = 64; // of a tile
constexpr uint64_t kAllKeys = ~uint64_t{0};
constexpr int kTokenRow = kKeys + 8; // elements of a channel's tokens in shared memory

// What follows from the head dimension. A row in shared memory has eight elements more than it
// needs, which spreads the rows of a matrix load over all banks.
template <int HeadDim> struct Shape {
    static constexpr int kStrips = HeadDim <= 128 ? 2 : 1; // of 16 rows, a warp
    static constexpr int kWarpRows = 16 * kStrips, kRows = kWarps * kWarpRows;
    static constexpr int kRow = HeadDim + 8, kChunks = HeadDim / 8, kSteps = HeadDim / 16;
};

// The part of a call that a block works on: what is the same for all its threads.
struct alignas(16) Tile {
    uint32_t kv_head, group;
    uint32_t first_q; // row of the sequence's first token in q and out
    uint32_t rows;    // of the sequence, packed
    uint32_t begin;   // first packed row of the tile
    int32_t offset;   // position of the sequence's first query token
    int32_t first, end; // tokens that the rows of the tile can see
    // The sequence's block table.
    const int32_t *entries;
    uint32_t count, shift;
};

// The tokens that some row of a warp sees, and those that every row sees if they can be read.
struct alignas(16) Sight {
    int32_t first, end, all_first, all_end;

    KVC_DEVICE bool some(int32_t token) const { return token < end && first - token < kKeys; }
    KVC_DEVICE bool all(int32_t token) const {
        return token >= all_first && all_end - token >= kKeys;
    }
};

// The first token that a query at `position` can see, if the window is all that hides. Tokens and
// what is between a token and a position fit 32 bits; a sum of two such need not.
KVC_DEVICE int32_t lowest(const kvc_prefill_params &p, int32_t position) {
    const int32_t window = static_cast<int32_t>(p.window);
    return position < window ? 0 : position - window + 1;
}

// Tiles that are set aside for the sequences before `seq`. Each has room for its own: with r rows
// from row a on, (a + r) / R + 1 - a / R >= ceil(r / R), all quotients rounded down.
template <int Rows>
KVC_DEVICE uint64_t tiles_before(const kvc_prefill_params &p, uint32_t seq, uint32_t group) {
    return static_cast<uint64_t>(static_cast<uint32_t>(p.q_indptr[seq])) * group / Rows + seq;
}

// The last sequence whose tiles begin at or before `tile`; the lanes of a warp search together.
template <int Rows>
KVC_DEVICE uint32_t find_sequence(const kvc_prefill_params &p, uint32_t tile, uint32_t group) {
    uint32_t first = 0, count = p.batch;
    while (count > 1) {
        const uint32_t step = (count + 31) / 32, at = lane_id() * step;
        const bool before = at < count && tiles_before<Rows>(p, first + at, group) <= tile;
        const uint32_t votes = ballot(kFullMask, before);
        uint32_t last = 0;
        while (votes >> last > 1) ++last;
        first += last * step;
        count = count - last * step < step ? count - last * step : step;
    }
    return first;
}

// The tile of a block; false where there is none. The last rows of a sequence, which see the most
// keys, come first.
template <int Rows>
KVC_DEVICE bool find_tile(const kvc_prefill_params &p, Tile &u) {
    u.group = p.q_heads / p.kv_heads;
    u.kv_head = block_x() % p.kv_heads;
    const uint32_t tile = block_x() / p.kv_heads;
    const uint32_t seq = find_sequence<Rows>(p, tile, u.group);
    const int32_t begin = p.q_indptr[seq], end = p.q_indptr[seq + 1];
    const bool sound = begin >= 0 && end >= begin && static_cast<uint32_t>(end) <= p.q_tokens;
    if (block_x() == 0 && thread_x() == 0 &&
        static_cast<uint32_t>(p.q_indptr[p.batch]) > p.q_tokens)
        raise(p.error_flag, kFlagPosition);
    if (!sound) {
        if (thread_x() == 0) raise(p.error_flag, kFlagPosition);
        return false;
    }
    const uint32_t tokens = static_cast<uint32_t>(end - begin);
    u.first_q = static_cast<uint32_t>(begin);
    u.rows = tokens * u.group;
    const uint64_t before = tiles_before<Rows>(p, seq, u.group);
    const uint32_t count = (u.rows + Rows - 1) / Rows;
    if (tile < before || tile - before >= count) return false;
    u.begin = (count - 1 - static_cast<uint32_t>(tile - before)) * Rows;
    const int32_t given = p.seq_lens[seq], length = given > 0 ? given : 0;
    u.offset = length - static_cast<int32_t>(tokens);
    const uint32_t last = u.begin + Rows < u.rows ? u.begin + Rows - 1 : u.rows - 1;
    u.end = p.causal != 0 ? u.offset + static_cast<int32_t>(last / u.group) + 1 : length;
    u.first = lowest(p, u.offset + static_cast<int32_t>(u.begin / u.group));
    const BlockTable table(p.table, p.table_indptr, p.table_stride, seq, p.block_tokens,
                           p.num_blocks, p.error_flag);
    u.entries = table.entries;
    u.count = table.count;
    u.shift = table.shift;
    return true;
}

// Where row `row` (packed) begins in a tensor of query rows, in elements.
KVC_DEVICE int64_t row_start(const Tile &u, uint32_t row, int64_t row_stride, int64_t head_stride) {
    const uint32_t token = row / u.group, head = row - token * u.group;
    return static_cast<int64_t>(u.first_q + token) * row_stride +
           static_cast<int64_t>(u.kv_head * u.group + head) * head_stride;
}

} // namespace kvc::prefill
