// Warp primitives by their definitions: shuffles, ballot, matrix loads and products.
//
// Fragment layouts are those of the PTX manual (mma.m16n8k16): with g = lane / 4 and t = lane % 4,
//   A (16x16): word 0 row g, word 1 row g+8, words 2 and 3 the same rows with columns +8; columns
//              2t and 2t+1 in one word;
//   B (16x8):  word 0 rows 2t, 2t+1 of column g, word 1 the same with rows +8;
//   C (16x8):  row g columns 2t, 2t+1, then row g+8.
// Sums of a product are made in double: the hardware's order of summation is not specified.
#include "block.hpp"

namespace kvc::emu {

namespace {

bool is_aligned_op(Op op) { return op >= Op::ldmatrix; }

const char *op_name(Op op) {
    static const char *const names[] = {"sync_warp", "ballot",   "shfl",          "shfl_up",
                                        "shfl_down", "shfl_xor", "ldmatrix",      "ldmatrix_trans",
                                        "movmatrix", "mma_f16",  "mma_bf16",      "wgmma",
                                        "wgmma_fence", "wgmma_commit", "wgmma_wait"};
    return names[static_cast<int>(op)];
}

// The lanes of one warp, by lane number; null where a block ends before its last warp does.
struct Warp {
    Thread *lane[32] = {};
};

void shuffle(Warp &warp, uint32_t mask, Op op) {
    for (uint32_t i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        Words &w = *warp.lane[i]->words;
        const uint32_t by = w.in[1];
        uint32_t from = i;
        if (op == Op::shfl) from = by % 32;
        if (op == Op::shfl_up && by <= i) from = i - by;
        if (op == Op::shfl_down && by < 32 - i) from = i + by;
        if (op == Op::shfl_xor) from = (i ^ by) % 32;
        if (!(mask >> from & 1))
            fault(Fault::mask, &warp.lane[i]->site, "lane %u reads lane %u, not in mask %08x", i,
                  from, mask);
        w.out[0] = warp.lane[from]->words->in[0];
    }
}

void ldmatrix(Warp &warp, bool transposed) {
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        uint16_t m[8][8];
        for (uint32_t row = 0; row < 8; ++row) {
            const Thread &owner = *warp.lane[matrix * 8 + row];
            const void *at;
            memcpy(&at, owner.words->in, sizeof at);
            check_shared(at, 16, 16, owner.site);
            memcpy(m[row], at, 16);
        }
        for (uint32_t i = 0; i < 32; ++i) {
            const uint32_t g = i / 4, t = i % 4;
            const uint32_t low = transposed ? m[2 * t][g] : m[g][2 * t];
            const uint32_t high = transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
            warp.lane[i]->words->out[matrix] = low | high << 16;
        }
    }
}

void movmatrix(Warp &warp) {
    uint32_t m[8][8];
    for (uint32_t i = 0; i < 32; ++i) {
        const uint32_t word = warp.lane[i]->words->in[0];
        m[i / 4][i % 4 * 2] = word & 0xffff;
        m[i / 4][i % 4 * 2 + 1] = word >> 16;
    }
    for (uint32_t i = 0; i < 32; ++i)
        warp.lane[i]->words->out[0] = m[i % 4 * 2][i / 4] | m[i % 4 * 2 + 1][i / 4] << 16;
}

void mma(Warp &warp, bool bf16) {
    const auto widen = [bf16](uint32_t word, uint32_t half) -> double {
        const auto bits = static_cast<uint16_t>(word >> (16 * half));
        return bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
    };
    double a[16][16], b[16][8];
    for (uint32_t i = 0; i < 32; ++i) {
        const uint32_t g = i / 4, t = i % 4;
        const uint32_t *in = warp.lane[i]->words->in;
        for (uint32_t word = 0; word < 4; ++word)
            for (uint32_t half = 0; half < 2; ++half)
                a[g + word % 2 * 8][2 * t + half + word / 2 * 8] = widen(in[word], half);
        for (uint32_t word = 0; word < 2; ++word)
            for (uint32_t half = 0; half < 2; ++half)
                b[2 * t + half + word * 8][g] = widen(in[4 + word], half);
    }
    for (uint32_t i = 0; i < 32; ++i) {
        const uint32_t g = i / 4, t = i % 4;
        Words &w = *warp.lane[i]->words;
        for (uint32_t c = 0; c < 4; ++c) {
            const uint32_t row = g + c / 2 * 8, column = 2 * t + c % 2;
            float start;
            memcpy(&start, &w.in[6 + c], 4);
            double sum = start;
            for (uint32_t k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            const float rounded = static_cast<float>(sum);
            memcpy(&w.out[c], &rounded, 4);
        }
    }
}

void compute(Warp &warp, uint32_t mask, Op op) {
    switch (op) {
    case Op::sync: return;
    case Op::ballot: {
        uint32_t votes = 0;
        for (uint32_t i = 0; i < 32; ++i)
            if (mask >> i & 1) votes |= (warp.lane[i]->words->in[0] != 0 ? 1u : 0u) << i;
        for (uint32_t i = 0; i < 32; ++i)
            if (mask >> i & 1) warp.lane[i]->words->out[0] = votes;
        return;
    }
    case Op::shfl:
    case Op::shfl_up:
    case Op::shfl_down:
    case Op::shfl_xor: return shuffle(warp, mask, op);
    case Op::ldmatrix: return ldmatrix(warp, false);
    case Op::ldmatrix_trans: return ldmatrix(warp, true);
    case Op::movmatrix_trans: return movmatrix(warp);
    case Op::mma_f16: return mma(warp, false);
    case Op::mma_bf16: return mma(warp, true);
    case Op::wgmma:
    case Op::wgmma_fence:
    case Op::wgmma_commit:
    case Op::wgmma_wait: return warpgroup_op(op, warp.lane);
    }
}

} // namespace

void collective(Op op, uint32_t mask, Words &words, const Site &site) {
    const uint32_t own = self->id % 32, first = self->id - own;
    if (!(mask >> own & 1))
        fault(Fault::mask, &site, "%s: mask %08x of lane %u does not name it", op_name(op), mask,
              own);
    self->op = op;
    self->mask = mask;
    self->words = &words;
    Warp warp;
    bool complete = true;
    for (uint32_t i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        if (first + i >= block->threads.size())
            fault(Fault::mask, &site, "%s: mask %08x names lane %u, which the block has not",
                  op_name(op), mask, i);
        Thread &other = block->threads[first + i];
        warp.lane[i] = &other;
        if (i == own) continue;
        if (other.wait == Wait::done)
            fault(Fault::mask, &site, "%s: mask %08x names lane %u, which has returned",
                  op_name(op), mask, i);
        if (other.wait != Wait::warp) {
            complete = false;
            continue;
        }
        if (!(other.mask >> own & 1)) {
            complete = false;
            continue;
        }
        const bool same_place = other.site.line == site.line && !strcmp(other.site.file, site.file);
        if (other.mask != mask || other.op != op || (is_aligned_op(op) && !same_place))
            fault(Fault::mask, &site, "lane %u calls %s with mask %08x, lane %u %s with %08x (line %d)",
                  own, op_name(op), mask, i, op_name(other.op), other.mask, other.site.line);
    }
    if (!complete) {
        wait_here(Wait::warp, site);
        return;
    }
    self->site = site;
    compute(warp, mask, op);
    for (Thread *lane : warp.lane)
        if (lane != nullptr) lane->wait = Wait::none;
}

// ---- Conversions ----

float f16_to_f32(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31;
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) {
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t wide =
        exponent == 31 ? sign | 0x7f800000u | fraction << 13 : sign | (exponent + 112) << 23 | fraction << 13;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

uint16_t f32_to_f16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff; // the canonical NaN of cvt
    if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Below the smallest normal: count in units of 2^-24, ties to even as rint does.
        float absolute;
        memcpy(&absolute, &magnitude, 4);
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(rintf(absolute * 0x1p24f)));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

uint16_t f32_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

} // namespace kvc::emu
