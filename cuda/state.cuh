// The softmax state of a row over a set of keys, with scores in powers of two: the largest score m
// and the sum l of 2^(score - m). States over disjoint sets merge to the state of their union; a
// state over no keys has m = -inf and l = 0, and merging it changes nothing.
#pragma once
#include "num.cuh"

namespace kvc {

// 2^(m - top), and 0 for a state over no keys, also where top is -inf.
KVC_DEVICE float weight(float m, float top) { return m == -infinity() ? 0.0f : exp2_approx(m - top); }

// What turns a row's sums into its output and LSE.
struct Finish {
    float factor; // of the weighted values
    float lse;    // natural logarithm
};

// Ends a row with state (m, l); `sink` joins the denominator where `has_sink`. A row that saw no
// key gives zeros and -inf, with or without a sink.
KVC_DEVICE Finish finish_row(float m, float l, bool has_sink, float sink) {
    if (m == -infinity()) return {0.0f, -infinity()};
    if (!has_sink) return {1.0f / l, kLn2 * (m + log2_approx(l))};
    const float top = max_f32(m, sink * kLog2e);
    const float scale = exp2_approx(m - top);
    const float sum = l * scale + exp2_approx(sink * kLog2e - top);
    return {scale / sum, kLn2 * (top + log2_approx(sum))};
}

} // namespace kvc
