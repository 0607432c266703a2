// The softmax state of a warp over codes. Weights times the scales of values are kept in the range of
// f16 by a power of two, the largest scale met, that the sums are counted in; what every channel of a
// value has in common, times its weight, is a sum of its own.
#pragma once
#include "code_unit.cuh"
#include "decode_finish.cuh"

namespace kvc {

// Sums of a warp over its tokens, and what they are counted in.
template <int HeadDim> struct CodeState : CodeUnit {
    float m[2], l[2];
    float o[HeadDim / 16][4];
    float minima[2]; // of values, weighted

    KVC_DEVICE CodeState() {
        for (int c = 0; c < 2; ++c) {
            m[c] = -infinity();
            l[c] = minima[c] = 0.0f;
        }
        for (int i = 0; i < HeadDim / 16; ++i)
            for (int j = 0; j < 4; ++j) o[i][j] = 0.0f;
    }

    // Takes scores of two tokens, or of two of each of several strips, for two columns and makes
    // weights of them; `keep` brings the sums to the new largest scores.
    template <int Strips> KVC_DEVICE void weigh(float (&s)[Strips][4], float (&keep)[2]) {
KVC_UNROLL
        for (int c = 0; c < 2; ++c) {
            float top = max_f32(s[0][c], s[0][2 + c]);
            for (int i = 1; i < Strips; ++i)
                top = max_f32(top, max_f32(s[i][c], s[i][2 + c]));
            top = max_f32(m[c], max_over_tokens(top));
            keep[c] = weight(m[c], top);
            // As `weight` does, with one look at -inf for all: 2^-inf is 0.
            const float base = top == -infinity() ? 0.0f : top;
            float sum = 0.0f;
            for (int i = 0; i < Strips; ++i) {
                s[i][c] = exp2_approx(s[i][c] - base);
                s[i][2 + c] = exp2_approx(s[i][2 + c] - base);
                sum += s[i][c] + s[i][2 + c];
            }
            l[c] = l[c] * keep[c] + sum;
            m[c] = top;
        }
    }
    KVC_DEVICE void rescale(const float (&keep)[2]) {
        // Most often nothing is larger than what was met before.
        if (ballot(kFullMask, keep[0] != 1.0f || keep[1] != 1.0f) == 0) return;
KVC_UNROLL
        for (int i = 0; i < HeadDim / 16; ++i)
            for (int j = 0; j < 4; ++j) o[i][j] *= keep[j % 2];
    }
};

} // namespace kvc
