// How keys and values come into shared memory: two pipelines of the same shape, in tiles of 64
// tokens of which each warp works on 16. Neither knows what is computed of them.
//
// CopyPipeline takes rows at any stride, by cp.async in chunks of 16 bytes. A warp copies its own 16
// tokens, next to each other in the sequence, so warps never wait for each other. Rows are eight
// elements longer than they need.
//
// BulkPipeline (sm_90) takes rows that follow each other within a block. One instruction brings a
// run of eight tokens, and no thread spends registers, shuffles or address arithmetic on its chunks.
// A bulk copy cannot pad the rows that it writes, and rows of 128 or 256 bytes under each other put
// all eight rows of a matrix load on the same banks. Copying each row by itself would pad them, but
// that is a copy of 256 bytes for the unit that wants 1 KB or more, and eight times as many. So
// the eight runs of a tile are padded instead, by eight elements each, and a matrix is made of one
// row from each run: warp w works on the tokens 2w and 2w + 1 of every run. The runs thus serve all
// warps, which wait for each other through mbarriers, at most a tile or two apart.
//
// In both, tokens that may not be read (past the end, behind the window, in no block) are never
// copied; their V rows are zero and what their K rows hold does not matter.
#pragma once
#include "decode_finish.cuh"

namespace kvc {

constexpr uint32_t kWarpTokens = kTileTokens / kDecodeWarps;
constexpr uint32_t kRun = 8, kRuns = kTileTokens / kRun;
constexpr uint32_t kMaxStages = 3;

// Elements of the K or V of a tile, and bytes of all stages.
KVC_DEVICE constexpr uint32_t tile_elements(uint32_t head_dim) {
    return kTileTokens * (head_dim + 8);
}
KVC_DEVICE uint32_t stages_bytes(uint32_t stages, uint32_t head_dim) {
    return stages * 2 * tile_elements(head_dim) * 2;
}

// What a warp takes from a tile. In the terms of the matrix instruction, lane l gives the address
// of row l % 16 of the keys, and has the scores of its rows l / 4 and l / 4 + 8.
struct Part {
    const uint16_t *k, *v; // row 0, and for V the row 0 of 16
    int32_t tokens[2];
    bool readable[2];
};

// The piece of a sequence that is copied.
struct Source {
    const uint16_t *k, *v;
    uint32_t begin, end, first_token, count; // count of tiles
};

template <int HeadDim> struct CopyPipeline {
    static constexpr uint32_t kRow = HeadDim + 8, kRowChunks = HeadDim / 8;
    // Lanes beside each other on a row: as many as divide its chunks, at most a line of 128 bytes.
    static constexpr uint32_t kAbreast = kRowChunks % 8 == 0 ? 8 : kRowChunks % 4 == 0 ? 4 : 2;
    static constexpr uint32_t kWarpElements = kWarpTokens * kRow;

    const kvc_decode_params &p;
    uint32_t stages, to, from; // slots that the next tile goes to and comes from
    uint64_t readable;         // 16 bits a slot
    int32_t entry;             // of this lane's token in the next tile
    uint32_t slot;

    KVC_DEVICE explicit CopyPipeline(const kvc_decode_params &params)
        : p(params), stages(params.stages), to(0), from(0), readable(0), entry(-1), slot(0) {}

    KVC_DEVICE uint16_t *tile(uint32_t at, uint32_t which) const {
        return KVC_SMEM(uint16_t) + (at * 2 + which) * tile_elements(HeadDim) +
               warp_id() * kWarpElements;
    }

    // This lane's token of tile `n`; blocks that the window has left behind may be gone, and not
    // even their ids are read.
    KVC_DEVICE bool wants(const Source &s, uint32_t n, uint32_t &token) const {
        token = s.begin + n * kTileTokens + warp_id() * kWarpTokens + lane_id();
        return n < s.count && lane_id() < kWarpTokens && token < s.end && token >= s.first_token;
    }
    KVC_DEVICE void look_up(const Source &s, const BlockTable &table, uint32_t n) {
        uint32_t token;
        if (wants(s, n, token)) entry = table.load(token, slot);
    }

    // Starts the copies of tile `n`, whose table entries were loaded before, and always closes a
    // group.
    KVC_DEVICE void issue(const Source &s, const BlockTable &table, uint32_t n) {
        if (n < s.count) {
            uint32_t token;
            const int32_t own = wants(s, n, token) ? table.checked(entry) : -1;
            const uint32_t own_slot = slot;
            look_up(s, table, n + 1);
            const uint32_t mask = ballot(kFullMask, own >= 0);
KVC_UNROLL
            for (uint32_t first = 0; first < kWarpTokens; first += 32 / kAbreast) {
                const uint32_t row = first + lane_id() / kAbreast;
                const uint32_t chunk = lane_id() % kAbreast;
                const int32_t block =
                    static_cast<int32_t>(shfl(kFullMask, static_cast<uint32_t>(own), row));
                const uint32_t place = shfl(kFullMask, own_slot, row);
                const bool valid = block >= 0;
                const int64_t k_at = valid ? block * p.k_block + place * p.k_token : 0;
                const int64_t v_at = valid ? block * p.v_block + place * p.v_token : 0;
                uint16_t *k_to = tile(to, 0) + row * kRow + chunk * 8;
                uint16_t *v_to = tile(to, 1) + row * kRow + chunk * 8;
                const uint16_t *k_from = s.k + k_at + chunk * 8, *v_from = s.v + v_at + chunk * 8;
KVC_UNROLL
                for (uint32_t i = 0; i < HeadDim; i += kAbreast * 8) {
                    cp_async_16(k_to + i, k_from + i, valid);
                    cp_async_16(v_to + i, v_from + i, valid);
                }
            }
            readable = (readable & ~(0xffffull << 16 * to)) | static_cast<uint64_t>(mask) << 16 * to;
            to = to + 1 == stages ? 0 : to + 1;
        }
        cp_async_commit();
    }

    // Waits for the oldest tile under way, for all of the warp.
    KVC_DEVICE void wait() {
        if (stages == 1) cp_async_wait<0>();
        if (stages == 2) cp_async_wait<1>();
        if (stages == 3) cp_async_wait<2>();
        sync_warp();
    }

    // This warp's part of tile `n`, which has come.
    KVC_DEVICE Part part(const Source &s, uint32_t n) const {
        const uint32_t lane = lane_id(), g = lane / 4;
        const uint32_t mask = static_cast<uint32_t>(readable >> 16 * from) & 0xffff;
        const int32_t token =
            static_cast<int32_t>(s.begin + n * kTileTokens + warp_id() * kWarpTokens + g);
        return {tile(from, 0) + lane % 16 * kRow + lane / 16 * 8,
                tile(from, 1) + (lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 8,
                {token, token + 8},
                {(mask >> g & 1) != 0, (mask >> (g + 8) & 1) != 0}};
    }

    // The tile is used, and its place is the next that is written.
    KVC_DEVICE void release() {
        from = from + 1 == stages ? 0 : from + 1;
        sync_warp();
    }
    // After the last tile of a piece, and after the last other use of the tiles' memory.
    KVC_DEVICE void finish() {
        to = from = 0;
        cp_async_wait<0>();
    }
    KVC_DEVICE void give_back() {}
};

template <int HeadDim> struct BulkPipeline {
    static constexpr uint32_t kRunElements = kRun * HeadDim + 8;
    static constexpr uint32_t kRowBytes = HeadDim * 2;

    const kvc_decode_params &p;
    uint32_t stages, to, from;
    uint32_t to_phase, from_phase; // parities of the barriers; these go on from piece to piece
    uint32_t valid;                // 8 bits a slot: the runs with a block
    int32_t entry;                 // of this lane's run in the next tile
    uint32_t slot;

    KVC_DEVICE explicit BulkPipeline(const kvc_decode_params &params)
        : p(params), stages(params.stages), to(0), from(0), to_phase(1), from_phase(0), valid(0),
          entry(-1), slot(0) {
        if (thread_x() == 0) {
            for (uint32_t at = 0; at < kMaxStages; ++at) {
                mbar_init(full(at), kDecodeWarps);
                mbar_init(free(at), kDecodeWarps);
            }
            mbar_fence_init();
        }
        sync_threads();
    }

    // The barriers of a stage, behind all tiles: it has come, and all warps have used it.
    KVC_DEVICE uint64_t *full(uint32_t at) const {
        return reinterpret_cast<uint64_t *>(KVC_SMEM(char) + stages_bytes(stages, HeadDim)) + 2 * at;
    }
    KVC_DEVICE uint64_t *free(uint32_t at) const { return full(at) + 1; }
    KVC_DEVICE uint16_t *tile(uint32_t at, uint32_t which) const {
        return KVC_SMEM(uint16_t) + (at * 2 + which) * tile_elements(HeadDim);
    }

    // The rows [low, high) of run `run` of tile `n` that may be read.
    struct Rows {
        uint32_t token, low, high; // token of row 0
        KVC_DEVICE bool any() const { return low < high; }
    };
    KVC_DEVICE static Rows rows_of(const Source &s, uint32_t n, uint32_t run) {
        Rows r;
        r.token = s.begin + n * kTileTokens + run * kRun;
        r.low = s.first_token > r.token ? s.first_token - r.token : 0;
        r.high = s.end > r.token ? s.end - r.token : 0;
        r.high = n >= s.count ? 0 : r.high < kRun ? r.high : kRun;
        return r;
    }
    // Lanes 0 to 7 of every warp look up the eight runs; a run lies in one block.
    KVC_DEVICE void look_up(const Source &s, const BlockTable &table, uint32_t n) {
        const Rows r = rows_of(s, n, lane_id());
        if (lane_id() < kRuns && r.any()) entry = table.load(r.token + r.low, slot);
    }

    // Starts the copies of tile `n`: each warp those of two runs.
    KVC_DEVICE void issue(const Source &s, const BlockTable &table, uint32_t n) {
        if (n >= s.count) return;
        const uint32_t lane = lane_id(), first = warp_id() * 2;
        const Rows own = rows_of(s, n, lane);
        const bool wanted = lane < kRuns && own.any();
        const int32_t block = wanted ? table.checked(entry) : -1;
        const uint32_t place = slot; // of the first row that may be read
        look_up(s, table, n + 1);
        const uint32_t mask = ballot(kFullMask, block >= 0);
        valid = (valid & ~(0xffu << 8 * to)) | mask << 8 * to;

        mbar_wait(free(to), to_phase);
        uint32_t rows = 2 * kRun;
        const uint32_t begin = s.begin + n * kTileTokens;
        if (mask != 0xff || begin < s.first_token || begin + kTileTokens > s.end) {
            rows = 0;
            for (uint32_t run = 0; run < kRuns; ++run) {
                Rows r = rows_of(s, n, run);
                if ((mask >> run & 1) == 0) r.low = r.high = 0;
                if (run / 2 == warp_id()) rows += r.any() ? r.high - r.low : 0;
                // Of the rows of V that this warp multiplies, those that nobody brings become zeros.
                uint16_t *v = tile(to, 1) + run * kRunElements + first * HeadDim;
                for (uint32_t i = lane; i < HeadDim / 4; i += 32) {
                    const uint32_t row = first + i / (HeadDim / 8);
                    if (row < r.low || row >= r.high) *reinterpret_cast<Vec16 *>(v + i * 8) = Vec16{};
                }
            }
            fence_bulk();
            sync_warp();
        }
        if (lane == 0) mbar_arrive_expect(full(to), rows * 2 * kRowBytes);
        if (lane / 2 == warp_id() && block >= 0) {
            const uint32_t bytes = (own.high - own.low) * kRowBytes;
            const uint32_t at = lane * kRunElements + own.low * HeadDim;
            const uint16_t *k = s.k + block * p.k_block + place * p.k_token;
            const uint16_t *v = s.v + block * p.v_block + place * p.v_token;
            bulk_copy(tile(to, 0) + at, k, bytes, full(to));
            bulk_copy(tile(to, 1) + at, v, bytes, full(to));
        }
        to = to + 1 == stages ? 0 : to + 1;
        to_phase ^= to == 0;
    }

    KVC_DEVICE void wait() { mbar_wait(full(from), from_phase); }

    KVC_DEVICE Part part(const Source &s, uint32_t n) const {
        const uint32_t lane = lane_id(), g = lane / 4, row = 2 * warp_id();
        // Row m of the matrix instruction is row `row + m / 8` of run m % 8.
        const uint16_t *k = tile(from, 0) + lane % 8 * kRunElements;
        const uint16_t *v = tile(from, 1) + lane % 8 * kRunElements;
        const uint32_t token = s.begin + n * kTileTokens + g * kRun + row;
        const bool in_block = (valid >> 8 * from >> g & 1) != 0;
        return {k + (row + lane / 8 % 2) * HeadDim + lane / 16 * 8,
                v + (row + lane / 16) * HeadDim + lane / 8 % 2 * 8,
                {static_cast<int32_t>(token), static_cast<int32_t>(token + 1)},
                {in_block && token < s.end, in_block && token + 1 < s.end}};
    }

    KVC_DEVICE void release() {
        sync_warp();
        if (lane_id() == 0) mbar_arrive(free(from));
        from = from + 1 == stages ? 0 : from + 1;
        from_phase ^= from == 0;
    }
    // After the last tile of a piece, and after the last other use of the tiles' memory.
    KVC_DEVICE void finish() {}
    KVC_DEVICE void give_back() { fence_bulk(); }
};

} // namespace kvc
