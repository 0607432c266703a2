// What decode does with the tiles of a sequence that are not sealed: their raw bf16 rows, found
// through a second table of (tile, slot) pairs, ascending. A query reads its own tile raw, and an
// earlier one only where its record says that it is not sealed.
//
// Tiles are few: rows are copied strip by strip of 16 tokens, one a warp, without a pipeline. The sums
// come out in the state of a warp over codes, rotated where sealed values are.
#pragma once
#include "code_state.cuh"
#include "decode.cuh"
#include "raw_slots.cuh"

namespace kvc {

// The tile of a column's own token, below 0 for one before the sequence; past all tiles where there
// is no column.
KVC_DEVICE int32_t own_tile(const kvc_decode_tile_params &p, const Unit &u, uint32_t c) {
    const uint32_t group = p.call.q_heads / p.call.kv_heads, column = u.first_column + c;
    if (column >= u.columns) return kFar;
    const int32_t position = u.tail + static_cast<int32_t>(column / group);
    return position < 0 ? -1 : position / static_cast<int32_t>(p.tile_tokens);
}

// A column that sees nothing where `seen` is false.
KVC_DEVICE Column only_where(const Column &column, bool seen) {
    Column out = column;
    if (!seen) out.low = kFar;
    return out;
}

// The sequence whose tables a sequence of the call reads.
KVC_DEVICE uint32_t owner_of(const kvc_decode_tile_params &p, uint32_t seq) {
    return p.owners == nullptr ? seq : static_cast<uint32_t>(p.owners[seq]);
}

// The record of a tile; null where the table has no block for it.
KVC_DEVICE const unsigned char *record_of(const kvc_decode_tile_params &p, const BlockTable &table,
                                          uint32_t tile, uint32_t kv_head) {
    uint32_t slot;
    const int32_t block = table.find(tile * p.tile_tokens, slot);
    if (block < 0) return nullptr;
    return static_cast<const unsigned char *>(p.records) + block * p.record_block +
           kv_head * p.record_head;
}
// Whether the second table has a tile.
KVC_DEVICE bool has_raw(const kvc_decode_tile_params &p, uint32_t seq, uint32_t tile) {
    seq = owner_of(p, seq);
    for (int32_t i = p.raw_indptr[seq]; i < p.raw_indptr[seq + 1]; ++i)
        if (p.raw_blocks[2 * static_cast<int64_t>(i)] == static_cast<int32_t>(tile)) return true;
    return false;
}

// H x of the sums of a warp, whose lane 4g+t has channels 16i + g and 16i + g + 8.
template <int HeadDim> KVC_DEVICE void rotate_sums(float (&o)[HeadDim / 16][4]) {
    constexpr uint32_t kBlock = hadamard_block(HeadDim);
    static_assert(kBlock >= 16 && kBlock <= 128, "whole matrices");
    const uint32_t g = lane_id() / 4;
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i) {
        const uint32_t signs = static_cast<uint32_t>(sign_word(i / 4) >> i % 4 * 16);
        for (int j = 0; j < 4; ++j)
            if (signs >> (g + j / 2 * 8) & 1) o[i][j] = -o[i][j];
    }
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i)
        for (int j = 0; j < 4; ++j) {
KVC_UNROLL
            for (uint32_t by = 1; by < 8; by *= 2) {
                const float other = shfl_xor(kFullMask, o[i][j], by * 4);
                o[i][j] = other + ((g & by) != 0 ? -o[i][j] : o[i][j]);
            }
        }
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i)
        for (int c = 0; c < 2; ++c) {
            const float low = o[i][c], high = o[i][2 + c];
            o[i][c] = low + high;
            o[i][2 + c] = low - high;
        }
KVC_UNROLL
    for (uint32_t by = 1; by < kBlock / 16; by *= 2)
KVC_UNROLL
        for (uint32_t i = 0; i < HeadDim / 16; ++i) {
            if ((i & by) != 0) continue;
            for (int j = 0; j < 4; ++j) {
                const float low = o[i][j], high = o[i + by][j];
                o[i][j] = low + high;
                o[i + by][j] = low - high;
            }
        }
    const float root = kBlock == 16 ? 0.25f : kBlock == 32 ? 0.17677669529663687f
                       : kBlock == 64 ? 0.125f : 0.08838834764831845f;
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i)
        for (int j = 0; j < 4; ++j) o[i][j] *= root;
}

// Adds the raw tiles of a piece, in units of `step`, that of the sealed values' codes. Uses shared
// memory from its beginning: 16 rows of keys and of values a warp.
template <int HeadDim>
KVC_DEVICE void accumulate_raw(const kvc_decode_tile_params &params, const Piece &item,
                               const Unit &u, const BlockTable &table, float step,
                               CodeState<HeadDim> &state) {
    const kvc_decode_params &p = params.call;
    constexpr uint32_t kRow = HeadDim + 8, kChunks = HeadDim / 8, kStrip = 16;
    const uint32_t lane = lane_id(), g = lane / 4, t = lane % 4, tokens = params.tile_tokens;
    uint16_t *keys = KVC_SMEM(uint16_t) + warp_id() * 2 * kStrip * kRow;
    uint16_t *values = keys + kStrip * kRow;
    bool any = false;
    uint32_t q[HeadDim / 16][2];
    const uint32_t owner = owner_of(params, u.seq);
    for (int32_t e = params.raw_indptr[owner]; e < params.raw_indptr[owner + 1]; ++e) {
        const int32_t tile = params.raw_blocks[2 * static_cast<int64_t>(e)];
        const int32_t slot = params.raw_blocks[2 * static_cast<int64_t>(e) + 1];
        const int64_t first = static_cast<int64_t>(tile) * tokens;
        if (tile < 0 || first >= item.end || first + tokens <= item.begin) continue;
        if (!is_slot(params, slot)) {
            raise(p.error_flag, kFlagBlock);
            continue;
        }
        // Of columns further on, only where the record is not sealed.
        const int32_t own[2] = {own_tile(params, u, 2 * t), own_tile(params, u, 2 * t + 1)};
        bool later = false;
        if (ballot(kFullMask, (own[0] != kFar && own[0] > tile) || (own[1] != kFar && own[1] > tile)) != 0) {
            const unsigned char *record =
                record_of(params, table, static_cast<uint32_t>(tile), u.kv_head);
            later = record == nullptr || !is_sealed(params, record);
        }
        // Most tiles that a long call fills are sealed before it reads them.
        if (!later && ballot(kFullMask, own[0] == tile || own[1] == tile) == 0) continue;
        Column columns[2];
        for (uint32_t c = 0; c < 2; ++c)
            columns[c] = only_where(find_column(p, u, 2 * t + c),
                                    own[c] == tile || (later && own[c] != kFar && own[c] > tile));
        if (!any) {
            any = true;
            const Column mine = find_column(p, u, g);
            const int64_t at = mine.row * p.q_row + mine.head * p.q_head + 2 * t;
KVC_UNROLL
            for (int i = 0; i < HeadDim / 8; ++i)
                q[i / 2][i % 2] = mine.exists ? load_pair<Bf16>(p.q, at + i * 8, p.q_dtype) : 0;
        }
        const RawSlot raw = raw_slot(params, static_cast<uint32_t>(slot), u.kv_head);
        for (uint32_t strip = warp_id(); strip < tokens / kStrip; strip += kDecodeWarps) {
            const uint32_t begin = static_cast<uint32_t>(first) + strip * kStrip;
            if (begin >= item.end || begin + kStrip <= item.begin) continue;
            const auto readable = [&](uint32_t token) {
                return token >= item.begin && token < item.end &&
                       token >= static_cast<uint32_t>(u.first_token);
            };
            for (uint32_t i = lane; i < kStrip * kChunks; i += 32) {
                const uint32_t row = i / kChunks, chunk = i % kChunks, place = strip * kStrip + row;
                const bool valid = readable(begin + row);
                cp_async_16(keys + row * kRow + chunk * 8, raw.k + place * raw.k_token + chunk * 8, valid);
                cp_async_16(values + row * kRow + chunk * 8, raw.v + place * raw.v_token + chunk * 8, valid);
            }
            cp_async_commit();
            cp_async_wait<0>();
            sync_warp();
            const Part part = {keys + lane % 16 * kRow + lane / 16 * 8,
                               values + (lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 8,
                               {static_cast<int32_t>(begin + g), static_cast<int32_t>(begin + g + 8)},
                               {readable(begin + g), readable(begin + g + 8)}};
            accumulate<Bf16, HeadDim>(p, u, columns, q, part, state);
            sync_warp();
        }
    }
    if (!any) return;
    if (params.v_rotated != 0) rotate_sums<HeadDim>(state.o);
    // What was counted in ones is from here on counted in the state's unit.
    const float per_unit = state.per_unit() / step;
KVC_UNROLL
    for (int i = 0; i < HeadDim / 16; ++i)
        for (int j = 0; j < 4; ++j) state.o[i][j] *= per_unit;
}

} // namespace kvc
