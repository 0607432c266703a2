// How rows of codes that follow each other within a block come into shared memory for decode
// (sm_90), with their scales: tiles of 128 tokens, in runs of 16 that are one bulk copy each for keys,
// values and the scales of both. What a tile costs beside its products (addresses, table entries,
// barriers) is spent once for the block, by the warps in turn. Of rows of more than 128 bytes tiles and
// runs have half as many, so that two blocks of a multiprocessor have tiles under way.
//
// As in BulkPipeline for 16-bit rows a bulk copy cannot pad the rows that it writes, so the eight runs
// are padded, by 16 bytes, and a matrix load takes one row from each: of every run warp w works on the
// tokens 4w to 4w + 3, two strips of 16 rows, or on 2w and 2w + 1, one strip. Row m of strip s is token
// 4w + 2s + m / 8, or 2w + m / 8, of run m % 8.
//
// Codes that may not be read (past the end, behind the window, in no block) are never copied; what
// scales stand in the same 16 bytes as one that may is. Where `Zeros`, which is where codes or scales
// can be NaN, the warp that would multiply such values makes zeros of them; what keys hold does not
// matter.
//
// A tile goes where the one before the last was, or, where it comes `Early`, the one before that: all
// warps are done with it by then. Otherwise a warp whose turn it is to start copies, of 32 runs as long
// as its products of a tile, waits for the warp whose turn it was, and their tiles take turns too.
//
// It knows nothing of what codes mean.
#pragma once
#include "token_pipe.cuh"

namespace kvc {

template <uint32_t RowBytes, uint32_t ScaleBytes, bool Zeros, bool Early = false>
struct TokenBulkPipeline {
    static constexpr uint32_t kRun = RowBytes > 128 ? 8 : 16, kRuns = 8, kTokens = kRun * kRuns;
    static constexpr uint32_t kOwn = kRun / kDecodeWarps, kStrips = kOwn / 2; // tokens of a run, a warp
    static constexpr uint32_t kChunks = RowBytes / 16;
    static constexpr uint32_t kRunBytes = kRun * RowBytes + 16;
    // Loads of 16 bytes from two runs meet no bank twice either.
    static constexpr uint32_t kScaleRun = kRun * ScaleBytes + (ScaleBytes >= 8 ? 16 : 0);
    static constexpr uint32_t kWords = kScaleWords<ScaleBytes>;
    static constexpr uint32_t kSide = kRuns * kRunBytes, kScaleSide = kRuns * kScaleRun;
    static constexpr uint32_t kStage = 2 * (kSide + kScaleSide);
    static constexpr uint32_t kWholeBytes = 2 * kTokens * (RowBytes + ScaleBytes);

    // What each stage has behind the tiles: a barrier that it has come, one that all warps have used
    // it, and the runs with a block.
    struct alignas(8) Slot {
        uint64_t full, free;
        uint32_t runs, unused;
    };

    const kvc_decode_token_params &p;
    uint32_t stages, to, from;
    uint32_t to_phase, from_phase; // parities of the barriers; these go on from piece to piece
    uint32_t slots_at;             // byte of shared memory
    uint32_t own_row;              // where this lane's rows for matrix loads are, within a side
    uint32_t runs;                 // of the tile that has come
    int32_t entry;                 // of this lane's run in the next tile that this warp brings
    uint32_t slot;
    bool zeroed;                   // some values of the tile that has come, by this warp

    KVC_DEVICE TokenBulkPipeline(const kvc_decode_token_params &params, uint32_t behind)
        : p(params), stages(params.call.stages), to(0), from(0), to_phase(1), from_phase(0),
          slots_at(behind), runs(0), entry(-1), slot(0), zeroed(false) {
        const uint32_t lane = lane_id();
        own_row = lane % 8 * kRunBytes + (kOwn * warp_id() + lane / 8 % 2) * RowBytes + lane / 16 * 16;
        if (thread_x() == 0) {
            for (uint32_t at = 0; at < stages; ++at) {
                mbar_init(&of(at).full, 1);
                mbar_init(&of(at).free, kDecodeThreads);
            }
            mbar_fence_init();
        }
        sync_threads();
    }

    KVC_DEVICE Slot &of(uint32_t at) const {
        return reinterpret_cast<Slot *>(KVC_SMEM(unsigned char) + slots_at)[at];
    }
    KVC_DEVICE unsigned char *rows(uint32_t stage, uint32_t which) const {
        return KVC_SMEM(unsigned char) + stage * kStage + which * kSide;
    }
    KVC_DEVICE unsigned char *scales(uint32_t stage, uint32_t which) const {
        return KVC_SMEM(unsigned char) + stage * kStage + 2 * kSide + which * kScaleSide;
    }

    // The rows [low, high) of run `run` of tile `n` that may be read.
    struct Rows {
        uint32_t token, low, high; // token of row 0
        KVC_DEVICE bool any() const { return low < high; }
    };
    KVC_DEVICE static Rows rows_of(const TokenSource &s, uint32_t n, uint32_t run) {
        Rows r;
        r.token = s.begin + n * kTokens + run * kRun;
        r.low = s.first_token > r.token ? s.first_token - r.token : 0;
        r.high = s.end > r.token ? s.end - r.token : 0;
        r.high = n >= s.count ? 0 : r.high < kRun ? r.high : kRun;
        return r;
    }
    KVC_DEVICE static bool inside(const TokenSource &s, uint32_t n) {
        const uint32_t begin = s.begin + n * kTokens;
        return begin >= s.first_token && begin + kTokens <= s.end;
    }

    // Lane 8i + r looks up run r; a run lies in one block.
    KVC_DEVICE void load_entry(const TokenSource &s, const BlockTable &table, uint32_t n) {
        const Rows r = rows_of(s, n, lane_id() % kRuns);
        if (r.any()) entry = table.load(r.token + r.low, slot);
    }
    // Before the first tile.
    KVC_DEVICE void look_up(const TokenSource &s, const BlockTable &table) {
        load_entry(s, table, warp_id());
    }

    // Starts the copies of tile `n`, in the warp whose turn it is.
    KVC_DEVICE void issue(const TokenSource &s, const BlockTable &table, uint32_t n) {
        if (n >= s.count) return;
        if (n % kDecodeWarps == warp_id()) bring(s, table, n);
        to = to + 1 == stages ? 0 : to + 1;
        to_phase ^= to == 0;
    }
    // Lanes 0 to 7 bring the keys of the eight runs, the next eight their values, then the scales of
    // keys and of values.
    KVC_DEVICE void bring(const TokenSource &s, const BlockTable &table, uint32_t n) {
        const uint32_t lane = lane_id(), run = lane % kRuns, which = lane / kRuns % 2;
        const bool of_scales = lane >= 2 * kRuns;
        const Rows own = rows_of(s, n, run);
        const int32_t block = own.any() ? table.checked(entry) : -1;
        const uint32_t place = slot - own.low; // of row 0
        load_entry(s, table, n + kDecodeWarps);
        const uint32_t mask = ballot(kFullMask, block >= 0) & 0xff;

        const unsigned char *base = which == 0 ? s.k : s.v;
        int64_t stride = which == 0 ? p.call.k_block : p.call.v_block;
        uint32_t row = RowBytes, low = own.low, high = own.high;
        uint32_t to_at = to * kStage + which * kSide + run * kRunBytes;
        if constexpr (ScaleBytes != 0) {
            // Tokens whose scales are whole units of 16 bytes.
            constexpr uint32_t kGrain = 16 / (ScaleBytes & (~ScaleBytes + 1));
            static_assert(kRun % kGrain == 0, "and so are those of a run");
            if (of_scales) {
                base = which == 0 ? s.k_scales : s.v_scales;
                stride = which == 0 ? p.k_scale_block : p.v_scale_block;
                row = ScaleBytes;
                low = low / kGrain * kGrain;
                high = (high + kGrain - 1) / kGrain * kGrain;
                to_at = to * kStage + 2 * kSide + which * kScaleSide + run * kScaleRun;
            }
        }
        uint32_t bytes = block < 0 || (ScaleBytes == 0 && of_scales) ? 0 : (high - low) * row;
        uint32_t all = kWholeBytes;
        if (mask != 0xff || !inside(s, n)) {
            all = bytes;
            for (uint32_t by = 1; by < 32; by *= 2) all += shfl_xor(kFullMask, all, by);
        }
        mbar_wait(&of(to).free, to_phase);
        if (lane == 0) {
            of(to).runs = mask;
            mbar_arrive_expect(&of(to).full, all);
        }
        if (bytes != 0)
            bulk_copy(KVC_SMEM(unsigned char) + to_at + low * row,
                      base + block * stride + (place + low) * row, bytes, &of(to).full);
    }

    // Tiles whose copies start before the first is waited for: as many as there are other stages, or,
    // where stages are enough and `Early`, one fewer.
    KVC_DEVICE uint32_t ahead() const { return stages - (Early && stages > 2 ? 2 : 1); }

    // Waits for tile `n`.
    KVC_DEVICE void wait(const TokenSource &s, uint32_t n) {
        mbar_wait(&of(from).full, from_phase);
        runs = of(from).runs;
        if (Zeros && !whole(s, n)) make_zeros(s, n);
    }
    KVC_DEVICE void make_zeros(const TokenSource &s, uint32_t n) {
        const uint32_t lane = lane_id(), run = lane % kRuns, at = kOwn * warp_id() + lane / kRuns;
        if (lane / kRuns < kOwn && !can_read_at(s, n, run, at)) {
            if constexpr (ScaleBytes == 0) {
                unsigned char *row = rows(from, 1) + run * kRunBytes + at * RowBytes;
                for (uint32_t i = 0; i < RowBytes; i += 16) *reinterpret_cast<Vec16 *>(row + i) = Vec16{};
            } else {
                unsigned char *row = scales(from, 1) + run * kScaleRun + at * ScaleBytes;
                if constexpr (ScaleBytes % 4 == 0)
                    for (uint32_t i = 0; i < ScaleBytes; i += 4) *reinterpret_cast<uint32_t *>(row + i) = 0;
                else
                    for (uint32_t i = 0; i < ScaleBytes; ++i) row[i] = 0;
            }
        }
        fence_bulk();
        sync_warp();
        zeroed = true;
    }

    KVC_DEVICE bool whole(const TokenSource &s, uint32_t n) const {
        return runs == 0xff && inside(s, n);
    }
    KVC_DEVICE bool can_read_at(const TokenSource &s, uint32_t n, uint32_t run, uint32_t at) const {
        const uint32_t token = s.begin + n * kTokens + run * kRun + at;
        return (runs >> run & 1) != 0 && token >= s.first_token && token < s.end;
    }
    KVC_DEVICE static uint32_t at_of(uint32_t strip, uint32_t row) {
        return kOwn * warp_id() + 2 * strip + row / kRuns;
    }
    // The token that row `row` of a strip is, and whether it can be read.
    KVC_DEVICE uint32_t token(const TokenSource &s, uint32_t n, uint32_t strip, uint32_t row) const {
        return s.begin + n * kTokens + row % kRuns * kRun + at_of(strip, row);
    }
    KVC_DEVICE bool can_read(const TokenSource &s, uint32_t n, uint32_t strip, uint32_t row) const {
        return can_read_at(s, n, row % kRuns, at_of(strip, row));
    }
    // What this lane gives a matrix load of chunks `chunk` and `chunk + 1` of all rows of a strip; of
    // the last where there is no other.
    KVC_DEVICE const unsigned char *at(uint32_t which, uint32_t strip, uint32_t chunk) const {
        const uint32_t back = chunk + 1 < kChunks ? 0 : lane_id() / 16 * 16;
        return rows(from, which) + own_row + strip * 2 * RowBytes + chunk * 16 - back;
    }
    // The scales of rows `row`, below 8, and `row + 8` of each strip: of tokens that lie side by side.
    KVC_DEVICE void row_scales(uint32_t which, uint32_t row,
                               uint32_t (&words)[kStrips][2][kWords]) const {
        constexpr uint32_t kBytes = kOwn * ScaleBytes;
        constexpr uint32_t kLoad = kBytes % 16 == 0 ? 16 : kBytes % 8 == 0 ? 8 : 4;
        static_assert(kBytes % 4 == 0, "whole words");
        const unsigned char *from_row = scales(from, which) + row * kScaleRun + warp_id() * kBytes;
        if constexpr (ScaleBytes == 2) {
            const auto v = *reinterpret_cast<const WordRun<kOwn / 2> *>(from_row);
            for (uint32_t i = 0; i < kOwn; ++i)
                words[i / 2][i % 2][0] = v.word[i / 2] >> 16 * (i % 2) & 0xffff;
            return;
        }
        uint32_t all[kBytes / 4 + 1];
        all[kBytes / 4] = 0; // beside the last
KVC_UNROLL
        for (uint32_t i = 0; i < kBytes; i += kLoad) {
            const auto v = *reinterpret_cast<const WordRun<kLoad / 4> *>(from_row + i);
            for (uint32_t j = 0; j < kLoad / 4; ++j) all[i / 4 + j] = v.word[j];
        }
KVC_UNROLL
        for (uint32_t token = 0; token < kOwn; ++token)
KVC_UNROLL
            for (uint32_t i = 0; i < kWords; ++i)
                words[token / 2][token % 2][i] = bytes_at(all, token * ScaleBytes + 4 * i,
                                                          ScaleBytes > 4 * i ? ScaleBytes - 4 * i : 0);
    }
    // Up to `count` bytes, at most four, from byte `at` on; the others are 0.
    template <uint32_t N>
    KVC_DEVICE static uint32_t bytes_at(const uint32_t (&all)[N], uint32_t at, uint32_t count) {
        if (count == 0) return 0;
        const bool within = at % 4 + (count < 4 ? count : 4) <= 4;
        const uint32_t word = within ? all[at / 4] >> at % 4 * 8
                                     : permute(all[at / 4], all[at / 4 + 1], 0x3210 + at % 4 * 0x1111);
        return count >= 4 ? word : word & ((1u << 8 * count) - 1);
    }

    KVC_DEVICE void release() {
        // Whoever wrote arrives himself.
        sync_warp();
        if (zeroed)
            mbar_arrive(&of(from).free);
        else if (lane_id() == 0)
            mbar_arrive_many(&of(from).free, 32);
        zeroed = false;
        from = from + 1 == stages ? 0 : from + 1;
        from_phase ^= from == 0;
    }
    // After the last tile of a piece, and after the last other use of the tiles' memory.
    KVC_DEVICE void finish() {}
    KVC_DEVICE void give_back() { fence_bulk(); }
};

} // namespace kvc
