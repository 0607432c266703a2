// Splits a batch for cascade attention: a shared prefix becomes one sequence whose queries are those
// of all that share it, and what follows stays a sequence each. Only tables, lengths and row offsets
// are made here; attention kernels then run on both halves, and a merge joins them.
//
// One block a segment. It trusts no claim: a prefix is used only as far as the tables agree, and
// only whole blocks before every query's own position, so that the prefix needs no causal mask.
// Tables are not copied: both halves index into the caller's, by offsets (a CSR view). What lies
// between one offset and the next may be more than a sequence has, never less.
#pragma once
#include "kvc_params.h"
#include "page.cuh"

namespace kvc {

constexpr uint32_t kCascadeThreads = 512;

// Where a sequence's table begins and how many entries it has.
struct TableSpan {
    int64_t begin, count;
};
KVC_DEVICE TableSpan table_span(const kvc_cascade_split_params &p, uint32_t seq) {
    if (p.table_indptr == nullptr) return {seq * p.table_stride, p.table_stride};
    const int64_t begin = p.table_indptr[seq];
    return {begin, p.table_indptr[seq + 1] - begin};
}
KVC_DEVICE int64_t table_begin(const kvc_cascade_split_params &p, uint32_t seq) {
    return p.table_indptr == nullptr ? seq * p.table_stride : p.table_indptr[seq];
}
KVC_DEVICE int32_t first_row(const kvc_cascade_split_params &p, uint32_t seq) {
    return p.q_indptr == nullptr ? static_cast<int32_t>(seq * p.q_len) : p.q_indptr[seq];
}

// The tokens of a sequence, as far as its table has blocks for them.
KVC_DEVICE int64_t length_of(const kvc_cascade_split_params &p, uint32_t seq) {
    const int64_t length = p.seq_lens[seq] > 0 ? p.seq_lens[seq] : 0;
    const int64_t room = table_span(p, seq).count * p.block_tokens;
    if (length <= room) return length;
    raise(p.error_flag, kFlagBlock);
    return room;
}

// The least of all threads' values.
KVC_DEVICE uint32_t block_min(uint32_t value) {
    uint32_t *warps = KVC_SMEM(uint32_t);
    for (uint32_t by = 16; by > 0; by /= 2) {
        const uint32_t other = shfl_xor(kFullMask, value, by);
        value = other < value ? other : value;
    }
    if (lane_id() == 0) warps[warp_id()] = value;
    sync_threads();
    value = warps[0];
    for (uint32_t warp = 1; warp < kCascadeThreads / 32; ++warp)
        value = warps[warp] < value ? warps[warp] : value;
    return value;
}

KVC_DEVICE void cascade_split(const kvc_cascade_split_params &p) {
    const uint32_t t = thread_x(), at = block_x();
    const kvc_cascade_segment s = p.segments[at];
    // A list that does not fit the batch gives nothing rather than another batch's memory.
    const uint32_t first = s.first_seq < p.batch ? s.first_seq : p.batch;
    const uint32_t seqs = s.seqs < p.batch - first ? s.seqs : p.batch - first;

    // The most blocks that every sequence allows: whole ones before its first query.
    uint32_t shared = seqs != 0 ? s.shared_blocks : 0;
    for (uint32_t seq = first + t; shared != 0 && seq < first + seqs; seq += kCascadeThreads) {
        const int64_t before = length_of(p, seq) - (first_row(p, seq + 1) - first_row(p, seq));
        const int64_t blocks = before > 0 ? before / p.block_tokens : 0;
        if (blocks < shared) shared = static_cast<uint32_t>(blocks);
    }
    shared = block_min(shared);
    sync_threads();
    // As far as the tables agree with the first: a warp a sequence, no load waits for a compare.
    uint32_t common = shared;
    const int32_t *entries = p.table + table_begin(p, first);
    for (uint32_t i = 1 + warp_id(); shared != 0 && i < seqs; i += kCascadeThreads / 32) {
        const int32_t *others = p.table + table_begin(p, first + i);
        for (uint32_t block = lane_id(); block < shared; block += 32) {
            const uint32_t differs = others[block] != entries[block] ? block : shared;
            common = differs < common ? differs : common;
        }
    }
    common = block_min(common);

    const int32_t tokens = static_cast<int32_t>(common * p.block_tokens);
    for (uint32_t seq = first + t; seq < first + seqs; seq += kCascadeThreads) {
        p.own_lens[seq] = static_cast<int32_t>(length_of(p, seq)) - tokens;
        p.own_indptr[seq] = static_cast<int32_t>(table_begin(p, seq) + common);
    }
    if (t != 0) return;
    if (common < s.shared_blocks) raise(p.error_flag, kFlagShared);
    p.shared_lens[at] = tokens;
    p.shared_indptr[at] = static_cast<int32_t>(table_begin(p, first));
    p.shared_rows[at] = first_row(p, first);
    if (at + 1 != p.count) return;
    const int32_t end = static_cast<int32_t>(table_begin(p, p.batch));
    p.own_indptr[p.batch] = end;
    p.shared_indptr[p.count] = end;
    p.shared_rows[p.count] = first_row(p, p.batch);
}

} // namespace kvc
