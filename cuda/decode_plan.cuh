// The plan of paged decode, made on the device from the lengths that stand there: the contexts of
// all sequences, one after another, cut into ranges. One block; see src/kernels/split.rs for what
// ranges are, and for the bounds that make their list fit whatever the lengths are.
//
// Lengths are counted in granules, rounded up. In the deterministic mode a granule is a piece, and
// each is a range, so that a sequence is cut alike in any batch. A sequence with nothing to read
// still has one granule: a piece that writes its zeros.
#pragma once
#include "kvc_params.h"
#include "page.cuh"

namespace kvc {

constexpr uint32_t kTileTokens = 64;
constexpr uint32_t kPlanThreads = 256;

// Tokens of a sequence that any of its queries can see: [begin, end), begin a multiple of 16.
struct Span {
    uint32_t begin, end;
};
KVC_DEVICE Span seen(const kvc_decode_plan_params &p, uint32_t seq) {
    const int32_t length = p.seq_lens[seq];
    if (length <= 0) return {0, 0};
    const uint32_t last = static_cast<uint32_t>(length) - 1;
    const int64_t row = p.row_span != 0 ? static_cast<int64_t>(last - last % p.row_span)
                                        : static_cast<int64_t>(length) - p.q_len;
    const int64_t hidden = row + 1 - p.window;
    const uint32_t begin = p.window == 0 || hidden <= 0 ? 0 : static_cast<uint32_t>(hidden) / 16 * 16;
    return {begin, static_cast<uint32_t>(length)};
}
KVC_DEVICE uint64_t granules_of(const Span &span, uint64_t granule) {
    const uint64_t tokens = span.end - span.begin;
    return tokens <= granule ? 1 : (tokens + granule - 1) / granule;
}

// Ranges of equal length, then others of another length.
struct Cuts {
    uint64_t total, each_long, each_short;
    uint32_t longs, count;

    KVC_DEVICE uint64_t begin_of(uint32_t range) const {
        return range <= longs ? range * each_long
                              : longs * each_long + (range - longs) * each_short;
    }
    KVC_DEVICE uint32_t range_of(uint64_t granule) const {
        const uint64_t in_longs = longs * each_long;
        return static_cast<uint32_t>(granule < in_longs ? granule / each_long
                                                        : longs + (granule - in_longs) / each_short);
    }
};

// Granules of a short range, at least: to begin and end one takes as long as a few.
constexpr uint64_t kShortest = 16;

// Long ranges for three quarters of the work where the rest is enough for short ones.
KVC_DEVICE Cuts balanced_cuts(uint64_t total, uint32_t longs, uint32_t shorts) {
    Cuts c = {total, 0, 1, longs, 0};
    uint64_t rest = 0;
    if (total < 4 * kShortest * shorts) {
        c.each_long = (total + longs - 1) / longs;
        c.longs = static_cast<uint32_t>((total + c.each_long - 1) / c.each_long);
    } else {
        c.each_long = total * 3 / 4 / longs;
        rest = total - longs * c.each_long;
        c.each_short = (rest + shorts - 1) / shorts;
    }
    c.count = c.longs + static_cast<uint32_t>((rest + c.each_short - 1) / c.each_short);
    return c;
}

// The sum of all threads' values up to this one's, in shared memory at this thread's place.
KVC_DEVICE uint64_t *block_scan(uint64_t value) {
    uint64_t *sums = KVC_SMEM(uint64_t);
    const uint32_t t = thread_x();
    sync_threads();
    sums[t] = value;
    sync_threads();
    for (uint32_t by = 1; by < kPlanThreads; by *= 2) {
        const uint64_t before = t >= by ? sums[t - by] : 0;
        sync_threads();
        sums[t] += before;
        sync_threads();
    }
    return sums;
}
KVC_DEVICE uint64_t all_granules(const kvc_decode_plan_params &p, uint64_t granule) {
    uint64_t own = 0;
    for (uint32_t seq = thread_x(); seq < p.batch; seq += kPlanThreads)
        own += granules_of(seen(p, seq), granule);
    return block_scan(own)[kPlanThreads - 1];
}

KVC_DEVICE void decode_plan(const kvc_decode_plan_params &p) {
    const uint32_t t = thread_x();
    const bool fixed = p.fixed_piece != 0;
    uint64_t granule = fixed ? p.fixed_piece : p.granule;
    uint64_t total = all_granules(p, granule);
    // Doubled until everything fits, at the latest when no sequence is cut.
    while (fixed && total > p.max_ranges) {
        granule *= 2;
        total = all_granules(p, granule);
        if (t == 0) raise(p.error_flag, kFlagPieces);
    }
    const Cuts cuts = fixed ? Cuts{total, 1, 1, static_cast<uint32_t>(total), static_cast<uint32_t>(total)}
                            : balanced_cuts(total, p.longs, p.max_ranges - p.longs);

    uint64_t first = 0; // granule of the first of these sequences
    for (uint32_t base = 0; base < p.batch; base += kPlanThreads) {
        const uint32_t seq = base + t;
        const bool live = seq < p.batch;
        const Span span = live ? seen(p, seq) : Span{0, 0};
        const uint64_t own = live ? granules_of(span, granule) : 0;
        const uint64_t *ends = block_scan(own);
        if (live) {
            const uint64_t begin = first + ends[t] - own;
            kvc_decode_span *to = p.spans + seq;
            to->begin = span.begin;
            to->end = span.end;
            to->first = cuts.range_of(begin);
            to->last = cuts.range_of(begin + own - 1);
        }
        // The ranges that begin in these sequences.
        const uint64_t past = first + ends[kPlanThreads - 1];
        const uint32_t from = first == 0 ? 0 : cuts.range_of(first - 1) + 1;
        const uint32_t to = cuts.range_of(past - 1) + 1;
        for (uint32_t range = from + t; range < to; range += kPlanThreads) {
            const uint64_t at = cuts.begin_of(range) - first;
            uint32_t low = 0, high = kPlanThreads - 1; // the first that ends past it
            while (low < high) {
                const uint32_t middle = (low + high) / 2;
                if (ends[middle] > at)
                    high = middle;
                else
                    low = middle + 1;
            }
            const uint64_t before = (at - (low == 0 ? 0 : ends[low - 1])) * granule;
            const Span whole = seen(p, base + low);
            kvc_decode_range *entry = p.ranges + range;
            entry->seq = base + low;
            entry->offset = static_cast<uint32_t>(before);
            entry->begin = whole.begin + static_cast<uint32_t>(before);
            entry->end = whole.end;
        }
        first = past;
    }
    for (uint64_t i = t; i < static_cast<uint64_t>(cuts.count) * p.units; i += kPlanThreads)
        p.tickets[i] = 0;
    if (t == 0) {
        p.ranges[cuts.count] = {p.batch, 0, 0, 0};
        p.head->ranges = cuts.count;
        p.head->slots = fixed ? 1 : 2;
        p.head->taken = 0;
        p.head->done = 0;
    }
}

} // namespace kvc
