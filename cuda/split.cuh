// What kernels share whose plan cut contexts into ranges: which pieces of which sequences a block
// works on, where partial results lie, which block comes last, and the merge in the order of the
// pieces, so that a result depends neither on who was last nor on who took which range. A partial
// result is normalised and has the logarithm to base two of its denominator. This file knows nothing
// of scores, rows or heads.
#pragma once
#include "state.cuh"

namespace kvc {

// The part of a sequence that lies in a range: its tokens.
struct Piece {
    uint32_t seq, begin, end, range;
};
// Where a piece stands among those of its sequence. Read when its sums are there, not held meanwhile.
struct Place {
    uint32_t first;         // range of the first
    uint32_t pieces, piece; // how many, and which this is
    uint32_t slots;         // of a range

    template <typename Params>
    KVC_DEVICE Place(const Params &p, const Piece &of) : slots(p.head->slots) {
        const kvc_decode_span span = p.spans[of.seq];
        first = span.first;
        pieces = span.last - span.first + 1;
        piece = of.range - span.first;
    }
    // Where the partial result of piece `i` lies: a range that the sequence does not begin in can
    // have another's beginning too.
    KVC_DEVICE uint32_t slot(uint32_t i) const {
        return (first + i) * slots + (slots > 1 && i == 0 ? 1 : 0);
    }
};

// Calls `each(piece, unit)` for what this block works on. A block begins with its own range; where
// there are more than blocks, the next are taken one by one. All threads call this, with `shared` a
// word that `each` may use as well. Ahead: a block asks for its next range when it begins one, and
// does not wait for the answer; without, nothing is held in registers that can be read again, and `each`
// returns range * units + unit.
template <bool Ahead, typename Params, typename Each>
KVC_DEVICE void for_each_piece(const Params &p, uint32_t *shared, Each each) {
    // The first range is read beside the summary, not after it.
    const uint32_t own = block_x() / p.units;
    const kvc_decode_range *at = p.ranges + (own < p.max_slots ? own : p.max_slots - 1);
    kvc_decode_range from = at[0], to = at[1];
    const uint32_t held = p.head->ranges * p.units; // below 2^32, as the host sees to
    const auto total = [&] { return Ahead ? held : p.head->ranges * p.units; };
    for (uint32_t work = block_x(); work < total();) {
        uint32_t next = 0;
        if (Ahead && total() > grid_x() && thread_x() == 0) next = atomic_add(&p.head->taken, 1);
        for (;;) {
            const uint32_t range = work / p.units, unit = work % p.units;
            const Piece piece = {from.seq, from.begin, from.seq == to.seq ? to.begin : from.end, range};
            if constexpr (Ahead)
                each(piece, unit);
            else
                work = each(piece, unit);
            sync_threads();
            const uint32_t seq = piece.seq + 1;
            to = p.ranges[(Ahead ? range : work / p.units) + 1];
            if (seq > to.seq || (seq == to.seq && to.offset == 0)) break;
            const kvc_decode_span span = p.spans[seq];
            from = {seq, 0, span.begin, span.end};
        }
        if (total() <= grid_x()) return;
        if (thread_x() == 0) *shared = Ahead ? next : atomic_add(&p.head->taken, 1);
        sync_threads();
        work = grid_x() + *shared;
        // Bulk copies may write there next.
        fence_bulk();
        sync_threads();
        if (work >= total()) break;
        from = p.ranges[work / p.units];
        to = p.ranges[work / p.units + 1];
    }
    if (total() > grid_x() && thread_x() == 0 && atomic_add(&p.head->done, 1) + 1 == grid_x()) {
        p.head->taken = 0;
        p.head->done = 0;
    }
}

// The partial results of a call: `[slot][unit][Columns][Dim]`, then `[slot][unit][Columns]` of
// their logarithms.
template <uint32_t Columns, uint32_t Dim> struct Partials {
    float *base;
    uint32_t max_slots, units;

    KVC_DEVICE int64_t row(uint32_t slot, uint32_t unit, uint32_t column) const {
        return (static_cast<int64_t>(slot) * units + unit) * Columns + column;
    }
    KVC_DEVICE float *values(uint32_t slot, uint32_t unit, uint32_t column) const {
        return base + row(slot, unit, column) * Dim;
    }
    KVC_DEVICE float *logarithm(uint32_t slot, uint32_t unit, uint32_t column) const {
        const int64_t rows = static_cast<int64_t>(max_slots) * units * Columns;
        return base + rows * Dim + row(slot, unit, column);
    }
};

// Four channels of a row, weighted, with the row's state.
struct Quad {
    float top, sum, o[4];
};

// Stores a quad as part of a partial result; the one with channel 0 stores the logarithm.
template <uint32_t Columns, uint32_t Dim>
KVC_DEVICE void store_partial(const Partials<Columns, Dim> &to, uint32_t slot, uint32_t unit,
                              uint32_t column, uint32_t channel, const Quad &q) {
    const bool none = q.top == -infinity();
    const float factor = none ? 0.0f : 1.0f / q.sum;
    Vec16 v;
    for (int j = 0; j < 4; ++j) v.word[j] = as_bits(q.o[j] * factor);
    store_16(to.values(slot, unit, column) + channel, v);
    if (channel == 0)
        *to.logarithm(slot, unit, column) = none ? -infinity() : q.top + log2_approx(q.sum);
}

// Whether this block is the last of `pieces` to come here; its ticket is 0 again then. All threads
// call it, with `shared` a word that nobody else uses meanwhile.
KVC_DEVICE bool last_to_arrive(uint32_t *ticket, uint32_t pieces, uint32_t *shared) {
    // Every thread's partial results are visible to the device before its block takes a ticket.
    fence_device();
    sync_threads();
    if (thread_x() == 0) {
        *shared = atomic_add(ticket, 1);
        fence_device();
    }
    sync_threads();
    if (*shared + 1 != pieces) return false;
    if (thread_x() == 0) *ticket = 0;
    return true;
}

// A quad of all pieces of a row. Several are loaded before the first is used: each comes from
// another multiprocessor, which takes as long as hundreds of instructions.
template <uint32_t Columns, uint32_t Dim>
KVC_DEVICE Quad merge_partials(const Partials<Columns, Dim> &from, const Place &of, uint32_t unit,
                               uint32_t column, uint32_t channel) {
    constexpr uint32_t kAtOnce = Dim > 256 ? 1 : 8;
    Quad all = {-infinity(), 0.0f, {}};
    for (uint32_t first = 0; first < of.pieces; first += kAtOnce) {
        float lse[kAtOnce];
        Vec16 v[kAtOnce];
KVC_UNROLL
        for (uint32_t i = 0; i < kAtOnce; ++i) {
            const uint32_t piece = first + i < of.pieces ? first + i : of.pieces - 1;
            const uint32_t slot = of.slot(piece);
            lse[i] = load_fresh(from.logarithm(slot, unit, column));
            v[i] = load_fresh_16(from.values(slot, unit, column) + channel);
        }
        // No branch between loads and uses, or the compiler brings them together.
KVC_UNROLL
        for (uint32_t i = 0; i < kAtOnce; ++i) {
            if (first + i >= of.pieces) lse[i] = -infinity();
            const float next = max_f32(all.top, lse[i]);
            const float keep = weight(all.top, next), add = weight(lse[i], next);
            all.sum = all.sum * keep + add;
            for (int j = 0; j < 4; ++j) all.o[j] = all.o[j] * keep + as_float(v[i].word[j]) * add;
            all.top = next;
        }
    }
    return all;
}

} // namespace kvc
