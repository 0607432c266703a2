// How rows of codes and their scales, at any stride, come into shared memory for decode: tiles of 64
// tokens of which each warp copies and works on 16, as CopyPipeline does for 16-bit rows. Codes come by
// cp.async in chunks of 16 bytes. Rows have no gaps: chunks change places within a row instead, so that
// the matrix loads of eight rows meet no bank twice. token_bulk.cuh has the other pipeline, for rows
// that follow each other.
//
// The scales of a row are 2 to 16 bytes at any address that suits one of them, too few for cp.async.
// Each lane loads those of one key or value a tile ahead and puts them into shared memory when it comes
// to the next tile, so that it never waits for them: at least two stages.
//
// It knows nothing of what codes mean.
#pragma once
#include "decode_finish.cuh"
#include "query_rows.cuh"

namespace kvc {

constexpr uint32_t kTokenWarpTokens = kTileTokens / kDecodeWarps;
// Words for the scales of a row.
template <uint32_t ScaleBytes> constexpr uint32_t kScaleWords = ScaleBytes <= 8 ? 2 : 4;

// The piece of a sequence that is copied, for one KV head.
struct TokenSource {
    const unsigned char *k, *v;
    const unsigned char *k_scales, *v_scales;
    uint32_t begin, end, first_token, count;
};

template <uint32_t RowBytes, uint32_t ScaleBytes> struct TokenPipeline {
    static constexpr uint32_t kTokens = kTileTokens, kStrips = 1; // strips of 16 tokens of a warp
    static constexpr uint32_t kChunks = RowBytes / 16;
    // The largest power of two, to 8, that divides the chunks of a row.
    static constexpr uint32_t kPower =
        kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
    // Lanes beside each other on a row, and the rows that they are on at once.
    static constexpr uint32_t kAbreast = kPower == 1 ? kChunks : kPower, kAtOnce = 32 / kAbreast;
    static constexpr uint32_t kWords = kScaleWords<ScaleBytes>, kScaleSlot = 4 * kWords;
    static constexpr uint32_t kSide = kTileTokens * RowBytes;
    static constexpr uint32_t kStage = 2 * (kSide + (ScaleBytes == 0 ? 0 : kTileTokens * kScaleSlot));

    const kvc_decode_token_params &p;
    uint32_t stages, to, from;
    uint64_t readable;  // 16 bits a slot
    int32_t entry;      // of this lane's token in the next tile
    uint32_t slot;
    uint32_t pending[kWords]; // scales that are still to be put into stage `pending_to`
    uint32_t pending_to;

    KVC_DEVICE explicit TokenPipeline(const kvc_decode_token_params &params)
        : p(params), stages(params.copy_stages), to(0), from(0), readable(0), entry(-1), slot(0),
          pending{}, pending_to(~0u) {}

    // This warp's rows of keys (0) or values (1) of a stage, and their scales.
    KVC_DEVICE unsigned char *rows(uint32_t stage, uint32_t which) const {
        return KVC_SMEM(unsigned char) + stage * kStage + which * kSide +
               warp_id() * kTokenWarpTokens * RowBytes;
    }
    KVC_DEVICE unsigned char *scales(uint32_t stage, uint32_t which) const {
        return KVC_SMEM(unsigned char) + stage * kStage + 2 * kSide +
               (which * kTileTokens + warp_id() * kTokenWarpTokens) * kScaleSlot;
    }
    // Where a chunk of a row stands: eight rows have it on as many places of 16 bytes of 128. Rows of an
    // odd count of chunks have it so where it is.
    KVC_DEVICE static uint32_t chunk_place(uint32_t row, uint32_t chunk) {
        return chunk ^ (row / (8 / kPower) & (kPower - 1));
    }

    KVC_DEVICE bool wants(const TokenSource &s, uint32_t n, uint32_t &token) const {
        const uint32_t own = lane_id() % kTokenWarpTokens;
        token = s.begin + n * kTileTokens + warp_id() * kTokenWarpTokens + own;
        return n < s.count && token < s.end && token >= s.first_token;
    }
    KVC_DEVICE void load_entry(const TokenSource &s, const BlockTable &table, uint32_t n) {
        uint32_t token;
        if (wants(s, n, token)) entry = table.load(token, slot);
    }
    // Before the first tile.
    KVC_DEVICE void look_up(const TokenSource &s, const BlockTable &table) { load_entry(s, table, 0); }

    KVC_DEVICE void put_pending() {
        if constexpr (ScaleBytes != 0) {
            if (pending_to == ~0u) return;
            unsigned char *at = scales(pending_to, lane_id() / 16) + lane_id() % 16 * kScaleSlot;
KVC_UNROLL
            for (uint32_t i = 0; i < kWords; i += 2) {
                reinterpret_cast<uint32_t *>(at)[i] = pending[i];
                reinterpret_cast<uint32_t *>(at)[i + 1] = pending[i + 1];
            }
            pending_to = ~0u;
        }
    }
    // Lanes 0 to 15 load the scales of the warp's keys, the others those of its values.
    KVC_DEVICE void load_scales(const TokenSource &s, int32_t block, uint32_t place) {
        if constexpr (ScaleBytes != 0) {
KVC_UNROLL
            for (uint32_t i = 0; i < kWords; i += 2) pending[i] = pending[i + 1] = 0;
            pending_to = to;
            if (block < 0) return;
            const unsigned char *at =
                lane_id() < 16 ? s.k_scales + block * p.k_scale_block + place * p.k_scale_token
                               : s.v_scales + block * p.v_scale_block + place * p.v_scale_token;
            if constexpr (ScaleBytes == 2 || ScaleBytes == 4) {
                const uint16_t *half = reinterpret_cast<const uint16_t *>(at);
                pending[0] = half[0];
                if constexpr (ScaleBytes == 4) pending[0] |= static_cast<uint32_t>(half[1]) << 16;
            } else {
                for (uint32_t i = 0; i < ScaleBytes; ++i)
                    pending[i / 4] |= static_cast<uint32_t>(at[i]) << i % 4 * 8;
            }
        }
    }

    KVC_DEVICE void issue(const TokenSource &s, const BlockTable &table, uint32_t n) {
        put_pending();
        if (n < s.count) {
            uint32_t token;
            const int32_t own = wants(s, n, token) ? table.checked(entry) : -1;
            const uint32_t own_slot = slot;
            load_entry(s, table, n + 1);
            const uint32_t mask = ballot(kFullMask, own >= 0) & 0xffff;
            load_scales(s, own, own_slot);
KVC_UNROLL
            for (uint32_t first = 0; first < kTokenWarpTokens; first += kAtOnce) {
                const uint32_t row = first + lane_id() / kAbreast;
                const uint32_t chunk = lane_id() % kAbreast;
                const int32_t block =
                    static_cast<int32_t>(shfl(kFullMask, static_cast<uint32_t>(own), row));
                const uint32_t place = shfl(kFullMask, own_slot, row);
                // Lanes and rows that a count that is no power of two leaves over.
                if (kPower == 1 && (lane_id() / kAbreast == kAtOnce || row >= kTokenWarpTokens)) continue;
                const bool valid = block >= 0;
                const unsigned char *k_from =
                    s.k + (valid ? block * p.call.k_block + place * p.call.k_token : 0);
                const unsigned char *v_from =
                    s.v + (valid ? block * p.call.v_block + place * p.call.v_token : 0);
                unsigned char *k_to = rows(to, 0) + row * RowBytes;
                unsigned char *v_to = rows(to, 1) + row * RowBytes;
KVC_UNROLL
                for (uint32_t i = chunk; i < kChunks; i += kAbreast) {
                    cp_async_16(k_to + chunk_place(row, i) * 16, k_from + i * 16, valid);
                    cp_async_16(v_to + chunk_place(row, i) * 16, v_from + i * 16, valid);
                }
            }
            readable = (readable & ~(0xffffull << 16 * to)) | static_cast<uint64_t>(mask) << 16 * to;
            to = to + 1 == stages ? 0 : to + 1;
        }
        cp_async_commit();
    }

    // Tiles whose copies start before the first is waited for.
    KVC_DEVICE uint32_t ahead() const { return stages - 1; }

    // Waits for tile `n`.
    KVC_DEVICE void wait(const TokenSource &, uint32_t) {
        if (stages == 2) cp_async_wait<1>();
        if (stages == 3) cp_async_wait<2>();
        if (stages == 4) cp_async_wait<3>();
        sync_warp();
    }
    // Whether all tokens of this warp can be read.
    KVC_DEVICE bool whole(const TokenSource &, uint32_t) const { return mask() == 0xffff; }
    KVC_DEVICE uint32_t mask() const {
        return static_cast<uint32_t>(readable >> 16 * from) & 0xffff;
    }
    // The token that row `row` of a strip is, and whether it can be read.
    KVC_DEVICE uint32_t token(const TokenSource &s, uint32_t n, uint32_t, uint32_t row) const {
        return s.begin + n * kTileTokens + warp_id() * kTokenWarpTokens + row;
    }
    KVC_DEVICE bool can_read(const TokenSource &, uint32_t, uint32_t, uint32_t row) const {
        return (mask() >> row & 1) != 0;
    }
    // What this lane gives a matrix load of chunks `chunk` and `chunk + 1` of all rows of a strip; of
    // the last where there is no other.
    KVC_DEVICE const unsigned char *at(uint32_t which, uint32_t, uint32_t chunk) const {
        const uint32_t row = lane_id() % 16, next = chunk + 1 < kChunks ? lane_id() / 16 : 0;
        return rows(from, which) + row * RowBytes + chunk_place(row, chunk + next) * 16;
    }
    // The scales of rows `row` and `row + 8` of each strip.
    KVC_DEVICE void row_scales(uint32_t which, uint32_t row,
                               uint32_t (&words)[kStrips][2][kWords]) const {
KVC_UNROLL
        for (uint32_t i = 0; i < 2; ++i)
KVC_UNROLL
            for (uint32_t j = 0; j < kWords; j += 2) {
                const TwoWords two = *reinterpret_cast<const TwoWords *>(
                    scales(from, which) + (row + 8 * i) * kScaleSlot + 4 * j);
                words[0][i][j] = two.word[0];
                words[0][i][j + 1] = two.word[1];
            }
    }
    KVC_DEVICE void release() {
        from = from + 1 == stages ? 0 : from + 1;
        sync_warp();
    }
    KVC_DEVICE void finish() {
        to = from = 0;
        pending_to = ~0u;
        cp_async_wait<0>();
    }
    KVC_DEVICE void give_back() {}
};

} // namespace kvc
