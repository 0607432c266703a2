// The plan of paged decode, made on the device from the lengths that stand there: how long a piece
// of context is, and the list of pieces. One block; see src/kernels/decode.rs for the bounds that
// make the list fit whatever the lengths are.
//
// Balanced pieces are as long as total / target_pieces, rounded up to a tile; fixed ones have the
// length that the caller wants, so that a sequence is cut alike in any batch. A sequence with
// nothing to read still gets one empty piece, which writes its zeros.
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
    const int64_t hidden = static_cast<int64_t>(length) - p.q_len + 1 - p.window;
    const uint32_t begin = p.window == 0 || hidden <= 0 ? 0 : static_cast<uint32_t>(hidden) / 16 * 16;
    return {begin, static_cast<uint32_t>(length)};
}
KVC_DEVICE uint64_t pieces_of(const Span &span, uint64_t piece) {
    const uint64_t tokens = span.end - span.begin;
    return tokens <= piece ? 1 : (tokens + piece - 1) / piece;
}

// The sum of all threads' values.
KVC_DEVICE uint64_t block_sum(uint64_t value) {
    uint64_t *sums = KVC_SMEM(uint64_t);
    const uint32_t t = thread_x();
    sums[t] = value;
    sync_threads();
    for (uint32_t width = kPlanThreads / 2; width > 0; width /= 2) {
        if (t < width) sums[t] += sums[t + width];
        sync_threads();
    }
    const uint64_t total = sums[0];
    sync_threads();
    return total;
}

// The sum of the values of the threads before this one; `total` of all.
KVC_DEVICE uint32_t block_scan(uint32_t value, uint32_t &total) {
    uint32_t *warps = KVC_SMEM(uint32_t);
    uint32_t sum = value;
    for (uint32_t by = 1; by < 32; by *= 2) {
        const uint32_t before = shfl_up(kFullMask, sum, by);
        if (lane_id() >= by) sum += before;
    }
    if (lane_id() == 31) warps[warp_id()] = sum;
    sync_threads();
    uint32_t before = 0;
    total = 0;
    for (uint32_t warp = 0; warp < kPlanThreads / 32; ++warp) {
        if (warp < warp_id()) before += warps[warp];
        total += warps[warp];
    }
    sync_threads();
    return before + sum - value;
}

KVC_DEVICE void decode_plan(const kvc_decode_plan_params &p) {
    const uint32_t t = thread_x();
    uint64_t tokens = 0;
    for (uint32_t seq = t; seq < p.batch; seq += kPlanThreads) {
        const Span span = seen(p, seq);
        tokens += span.end - span.begin;
    }
    uint64_t piece = p.fixed_piece;
    const uint64_t total = block_sum(tokens);
    if (piece == 0) {
        const uint64_t even = (total + p.target_pieces - 1) / p.target_pieces;
        piece = (even + kTileTokens - 1) / kTileTokens * kTileTokens;
        if (piece < p.min_piece) piece = p.min_piece;
    }
    // Doubled until everything fits, at the latest when no sequence is cut.
    for (;;) {
        uint64_t items = 0, slots = 0, tickets = 0;
        for (uint32_t seq = t; seq < p.batch; seq += kPlanThreads) {
            const uint64_t n = pieces_of(seen(p, seq), piece);
            items += n;
            if (n > 1) {
                slots += n;
                tickets += 1;
            }
        }
        const bool fits = block_sum(items) <= p.max_items;
        const bool slots_fit = block_sum(slots) <= p.max_slots;
        const bool tickets_fit = block_sum(tickets) <= p.max_tickets;
        if (fits && slots_fit && tickets_fit) break;
        piece *= 2;
        if (t == 0) raise(p.error_flag, kFlagPieces);
    }

    uint32_t first_item = 0, first_slot = 0, first_ticket = 0;
    for (uint32_t base = 0; base < p.batch; base += kPlanThreads) {
        const uint32_t seq = base + t;
        const bool live = seq < p.batch;
        const Span span = live ? seen(p, seq) : Span{0, 0};
        const uint32_t n = live ? static_cast<uint32_t>(pieces_of(span, piece)) : 0;
        uint32_t items, slots, tickets;
        const uint32_t item = first_item + block_scan(n, items);
        const uint32_t slot = first_slot + block_scan(n > 1 ? n : 0, slots);
        const uint32_t ticket = first_ticket + block_scan(n > 1 ? 1 : 0, tickets);
        for (uint32_t i = 0; i < n; ++i) {
            const uint64_t begin = span.begin + i * piece, end = begin + piece;
            kvc_decode_item *to = p.items + item + i;
            to->seq = seq;
            to->begin = static_cast<uint32_t>(begin);
            to->end = end < span.end ? static_cast<uint32_t>(end) : span.end;
            to->pieces = n;
            to->piece = i;
            to->first_slot = slot;
            to->ticket = ticket;
            to->reserved = 0;
        }
        first_item += items;
        first_slot += slots;
        first_ticket += tickets;
    }
    for (uint64_t i = t; i < static_cast<uint64_t>(first_ticket) * p.units; i += kPlanThreads)
        p.tickets[i] = 0;
    if (t == 0) *p.item_count = first_item;
}

} // namespace kvc
