// What sums over codes are counted in: weights times the scales of values are kept in the range of f16 by
// a power of two, the largest scale met.
#pragma once
#include "num.cuh"

namespace kvc {

struct CodeUnit {
    uint32_t unit; // its biased exponent

    // That of the smallest scale.
    static constexpr uint32_t kLeast = 127 - 24;

    KVC_DEVICE CodeUnit() : unit(kLeast) {}
    // Counts in at least `largest`, a scale: the factor for what was counted before.
    KVC_DEVICE float count_in(float largest) {
        const uint32_t field = (as_bits(largest) >> 23 & 0xff) + 1, before = unit;
        unit = field > unit ? field : unit;
        return as_float((127 + before - unit) << 23);
    }
    // Turns a scale into the unit.
    KVC_DEVICE float per_unit() const { return as_float((254 - unit) << 23); }
    KVC_DEVICE float in_units() const { return as_float(unit << 23); }
};

} // namespace kvc
