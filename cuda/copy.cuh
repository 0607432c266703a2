// Block copy and zero: entries of a list, all planes (layers) of the pools in one launch.
//
// A warp takes a slice of 4 KiB of one run of one plane of one entry at a time: eight loads of 16
// bytes a lane are under way before the first store. Consecutive warps take consecutive slices. The
// launch has no order among entries: what one entry writes no other may read or write. An id
// outside its pool is masked and raises a bit of the error flag; an entry of ids -1 alone is
// padding.
#pragma once
#include "kvc_params.h"
#include "page.cuh"

namespace kvc {

constexpr uint32_t kCopyThreads = 256, kLaneChunks = 8, kSliceChunks = 32 * kLaneChunks;

KVC_DEVICE int64_t list_id(const kvc_copy_params &p, uint64_t index) {
    return p.wide_ids != 0 ? static_cast<const int64_t *>(p.list)[index]
                           : static_cast<const int32_t *>(p.list)[index];
}
KVC_DEVICE bool in_pool(int64_t id, uint32_t blocks) {
    return static_cast<uint64_t>(id) < blocks;
}

// Block 0 of a plane.
KVC_DEVICE int64_t plane_base(const void *base, const uint64_t *planes, int64_t stride,
                              uint32_t plane) {
    if (planes != nullptr) return static_cast<int64_t>(planes[plane]);
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(base)) + plane * stride;
}

// A slice of one run: where it is read and written, and its chunks of 16 bytes.
struct Slice {
    const char *from;
    char *to;
    uint32_t chunks;
};

// The slice of `item`; without chunks where its entry is padding, or masked.
template <bool Zero> KVC_DEVICE Slice find_slice(const kvc_copy_params &p, uint32_t item) {
    const uint32_t slice = item % p.slices, runs = item / p.slices;
    const uint32_t run = runs % p.runs, planes = runs / p.runs;
    const uint32_t plane = planes % p.planes, entry = planes / p.planes;
    const uint64_t at = entry;
    const int64_t from = Zero ? -1 : list_id(p, 2 * at), to = list_id(p, Zero ? at : 2 * at + 1);
    Slice s = {nullptr, nullptr, 0};
    if (!in_pool(to, p.to_blocks) || (!Zero && !in_pool(from, p.from_blocks))) {
        const bool padding = from == -1 && to == -1;
        if (!padding && lane_id() == 0 && (slice | run | plane) == 0)
            raise(p.error_flag, kFlagBlock);
        return s;
    }
    uint32_t bytes = p.run_bytes;
    if (p.tokens != nullptr) {
        // Rounded up to whole chunks: what follows the last token of a block is not in use.
        const uint64_t wanted = static_cast<uint64_t>(p.tokens[entry]) * p.token_bytes + 15;
        if (wanted / 16 * 16 < bytes) bytes = static_cast<uint32_t>(wanted / 16 * 16);
    }
    const uint32_t chunks = bytes / 16, first = slice * kSliceChunks;
    if (first >= chunks) return s;
    s.chunks = chunks - first < kSliceChunks ? chunks - first : kSliceChunks;
    const int64_t skip = static_cast<int64_t>(first) * 16;
    if (!Zero)
        s.from = reinterpret_cast<const char *>(
            plane_base(p.from, p.from_planes, p.from_plane, plane) + from * p.from_block +
            run * p.from_run + skip);
    s.to = reinterpret_cast<char *>(plane_base(p.to, p.to_planes, p.to_plane, plane) +
                                    to * p.to_block + run * p.to_run + skip);
    return s;
}

// Moves a whole slice, or the part of one that exists.
template <bool Zero, bool Whole> KVC_DEVICE void move_slice(const Slice &s) {
    const char *from = Zero ? nullptr : s.from + lane_id() * 16;
    char *to = s.to + lane_id() * 16;
    Vec16 v[kLaneChunks];
KVC_UNROLL
    for (uint32_t i = 0; i < kLaneChunks; ++i) {
        v[i] = {{0, 0, 0, 0}};
        if (!Zero && (Whole || i * 32 + lane_id() < s.chunks)) v[i] = load_stream(from + i * 512);
    }
KVC_UNROLL
    for (uint32_t i = 0; i < kLaneChunks; ++i)
        if (Whole || i * 32 + lane_id() < s.chunks) store_16(to + i * 512, v[i]);
}

template <bool Zero> KVC_DEVICE void copy_blocks(const kvc_copy_params &p) {
    constexpr uint32_t kWarps = kCopyThreads / 32;
    const uint64_t step = static_cast<uint64_t>(grid_x()) * kWarps;
    for (uint64_t item = block_x() * kWarps + warp_id(); item < p.items; item += step) {
        const Slice s = find_slice<Zero>(p, static_cast<uint32_t>(item));
        if (s.chunks == kSliceChunks)
            move_slice<Zero, true>(s);
        else if (s.chunks != 0)
            move_slice<Zero, false>(s);
    }
}

} // namespace kvc
