// Append of 16-bit rows to a cache of the same type, nothing turned: the bits are copied. A thread has a
// column of its token's rows in some of the heads, as in append.cuh; what turns would take registers
// that here are loads under way. Those begin before the slot is known, and so also of a token that is
// skipped.
#pragma once
#include "append.cuh"

namespace kvc {

// A thread's column of the keys or of the values of a token.
KVC_DEVICE void copy_side(const kvc_append_params &p, uint32_t token, int64_t slot, bool is_key,
                          uint32_t thread, uint32_t threads) {
    constexpr uint32_t kBatch = 4; // chunks whose loads are under way together
    const Share share(thread, threads, (is_key ? p.k_dim : p.v_dim) / 8);
    const char *from = static_cast<const char *>(is_key ? p.k : p.v) +
                       (token * (is_key ? p.k_token : p.v_token) + share.column * 8) * 2;
    const int64_t from_head = (is_key ? p.k_head : p.v_head) * 2;
    char *to = nullptr;
    int64_t to_head = 0;
KVC_ROLL
    for (uint32_t head = share.head; head < p.kv_heads; head += kBatch * share.step) {
        Vec16 held[kBatch];
KVC_UNROLL
        for (uint32_t n = 0; n < kBatch; ++n) {
            const uint32_t own = head + n * share.step;
            if (own < p.kv_heads) held[n] = load_stream(from + own * from_head);
        }
        if (to == nullptr) {
            int64_t block;
            uint32_t place;
            if (!find_slot(p, slot, is_key && thread == 0, block, place)) return;
            to_head = (is_key ? p.k_cache_head : p.v_cache_head) * 2;
            to = static_cast<char *>(is_key ? p.k_cache : p.v_cache) +
                 (block * (is_key ? p.k_cache_block : p.v_cache_block) +
                  place * (is_key ? p.k_cache_token : p.v_cache_token) + share.column * 8) *
                     2;
        }
KVC_UNROLL
        for (uint32_t n = 0; n < kBatch; ++n) {
            const uint32_t own = head + n * share.step;
            if (own < p.kv_heads) store_16(to + own * to_head, held[n]);
        }
    }
}

KVC_DEVICE void append_plain(const kvc_append_params &p) {
    const Seat seat(p);
    if (seat.token >= p.tokens) return;
    const int64_t slot = p.slots[seat.token];
    // Half of the threads have keys and the others values, where a half has all columns.
    const uint32_t widest = (p.k_dim > p.v_dim ? p.k_dim : p.v_dim) / 8, half = seat.threads / 2;
    const bool apart = p.v_dim != 0 && half >= widest;
    const uint32_t threads = apart ? half : seat.threads, thread = seat.thread & (threads - 1);
    const uint32_t first = apart && seat.thread >= half ? 1 : 0;
    const uint32_t last = !apart && p.v_dim != 0 ? 1 : first;
KVC_ROLL
    for (uint32_t side = first; side <= last; ++side)
        copy_side(p, seat.token, slot, side == 0, thread, threads);
}

} // namespace kvc
