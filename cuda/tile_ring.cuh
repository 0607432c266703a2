// How the records of sealed tiles come into shared memory for decode: a ring of stages for each warp,
// one bulk copy a record on sm_90, cp.async elsewhere. It knows nothing of what records hold, but where
// they say that they are sealed.
#pragma once
#include "decode_unit.cuh"

namespace kvc {

// What a unit works on, kept in shared memory: its loop has better use for registers.
struct TileWork {
    Unit u;
    Piece item;
    BlockTable table;
    const unsigned char *records; // of this KV head, that of block 0
    uint32_t unit;
    // Tiles that lie in the piece, behind every window and before the tail.
    uint32_t plain_from, plain_to;
};
static_assert(sizeof(TileWork) <= 128, "src/kernels/decode_tile.rs has room for it");

// A warp's ring of records.
struct TileRing {
    const kvc_decode_tile_params &p;
    uint32_t from, from_phase;
    int32_t entry; // of the next tile

    KVC_DEVICE explicit TileRing(const kvc_decode_tile_params &params)
        : p(params), from(0), from_phase(0), entry(-1) {
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
    // Starts the copy of a tile's record to a stage; `next` is the tile after it. In the place of one that is in no
    // block comes what is not sealed.
    KVC_DEVICE void issue(const TileWork &work, uint32_t to, bool wanted, uint32_t next,
                          bool next_wanted) {
        if (wanted) {
            const int32_t block = entry;
            const bool there = static_cast<uint32_t>(block) < p.call.num_blocks;
            look_up(work.table, next, next_wanted);
            if (!there && lane_id() == 0) raise(p.call.error_flag, kFlagBlock);
            const unsigned char *record = work.records + (there ? block : 0) * p.record_block;
            unsigned char *at = stage(to);
            if (bulk()) {
                if (lane_id() == 0 && there) {
                    mbar_arrive_expect(full(to), p.record_bytes);
                    bulk_copy(at, record, p.record_bytes, full(to));
                } else if (lane_id() == 0) {
                    *reinterpret_cast<uint32_t *>(at + p.header_at + 8) = 0;
                    fence_bulk();
                    mbar_arrive(full(to));
                }
            } else {
                for (uint32_t i = lane_id() * 16; i < p.record_bytes; i += 512)
                    cp_async_16(at + i, record + i, there);
            }
        }
        if (!bulk()) cp_async_commit();
    }
    // The stage `ahead`, below the number of stages, of that of the oldest record under way.
    KVC_DEVICE uint32_t stage_after(uint32_t ahead) const {
        const uint32_t at = from + ahead;
        return at < stages() ? at : at - stages();
    }
    // The oldest record under way, for all of the warp.
    KVC_DEVICE const unsigned char *wait() {
        if (bulk()) {
            mbar_wait(full(from), from_phase);
        } else {
            if (stages() == 1) cp_async_wait<0>();
            if (stages() == 2) cp_async_wait<1>();
            if (stages() == 3) cp_async_wait<2>();
        }
        sync_warp();
        return stage(from);
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

} // namespace kvc
