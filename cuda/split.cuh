// What kernels share whose plan cut a context into pieces: where partial results lie, which block
// comes last, and the merge in the order of the pieces, so that a result does not depend on who was
// last. A partial result is normalised and has the logarithm to base two of its denominator. This
// file knows nothing of scores, rows or heads.
#pragma once
#include "state.cuh"

namespace kvc {

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

// A quad of all pieces of a row.
template <uint32_t Columns, uint32_t Dim>
KVC_DEVICE Quad merge_partials(const Partials<Columns, Dim> &from, uint32_t first_slot,
                               uint32_t pieces, uint32_t unit, uint32_t column, uint32_t channel) {
    Quad all = {-infinity(), 0.0f, {}};
    for (uint32_t piece = 0; piece < pieces; ++piece) {
        const float lse = load_fresh(from.logarithm(first_slot + piece, unit, column));
        const Vec16 v = load_fresh_16(from.values(first_slot + piece, unit, column) + channel);
        const float next = max_f32(all.top, lse);
        const float keep = weight(all.top, next), add = weight(lse, next);
        all.sum = all.sum * keep + add;
        for (int j = 0; j < 4; ++j) all.o[j] = all.o[j] * keep + as_float(v.word[j]) * add;
        all.top = next;
    }
    return all;
}

} // namespace kvc
