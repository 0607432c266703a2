// What a unit of paged decode is: one sequence, one KV head and up to eight of its query columns (a
// column is a query row and a query head that reads this KV head); which tokens a column sees, and
// its scores. This file knows nothing of how keys and values come into shared memory.
//
// The last tokens of a sequence are those of its query rows: its tail. Every row sees all that lie
// before the tail, as far as the window goes; of the tail it sees what its bits say, which are given
// (a tree of drafts), or those up to its own (causal), or all.
#pragma once
#include "decode_plan.cuh"
#include "split.cuh"

namespace kvc {

constexpr uint32_t kColumns = 8;
constexpr int32_t kFar = 0x7fffffff; // past every position

// The part of a call that a unit works on.
struct Unit {
    uint32_t seq, kv_head, first_column, columns, first_row, rows;
    int32_t length;
    int32_t tail;        // where the tail begins, below 0 where it is longer than the sequence
    int32_t first_token; // no row sees an earlier one
    // Every column sees the tokens from the first of these to before the second, and their scores want
    // nothing but their factor: none where the call has a soft-cap or slopes.
    int32_t plain_from, plain_to;
    bool empty;          // no column of this tile belongs to the sequence
};

KVC_DEVICE Unit find_unit(const kvc_decode_params &p, uint32_t seq, uint32_t unit) {
    const uint32_t group = p.q_heads / p.kv_heads, tiles = p.units / p.kv_heads;
    Unit u;
    u.seq = seq;
    u.kv_head = unit / tiles;
    u.first_column = unit % tiles * kColumns;
    u.first_row = seq * p.q_len;
    u.rows = p.q_len;
    if (p.q_indptr != nullptr) {
        u.first_row = static_cast<uint32_t>(p.q_indptr[seq]);
        u.rows = static_cast<uint32_t>(p.q_indptr[seq + 1]) - u.first_row;
        if (u.rows > p.q_len) {
            if (thread_x() == 0) raise(p.error_flag, kFlagPosition);
            u.rows = 0;
        }
    }
    u.columns = group * u.rows;
    const int32_t length = p.seq_lens[seq];
    u.length = length > 0 ? length : 0;
    u.tail = u.length - static_cast<int32_t>(u.rows);
    const int64_t low = static_cast<int64_t>(u.tail) + 1 - p.window;
    u.first_token = p.window != 0 && low > 0 ? static_cast<int32_t>(low) : 0;
    // No row stands further on than the last token, in a tree of drafts neither.
    const int64_t all_see = static_cast<int64_t>(u.length) - p.window;
    u.plain_from = p.window != 0 && all_see > 0 ? static_cast<int32_t>(all_see) : 0;
    u.plain_to = p.softcap == 0.0f && p.slopes == nullptr ? u.tail : 0;
    u.empty = u.first_column >= u.columns;
    return u;
}

// Sees the positions from `low` on, of the tail those with their bit set.
struct Column {
    int32_t low;
    uint32_t tail;
    uint32_t row, head;
    bool exists;
    float slope, position;
};

// How far into the tail a row of a tree stands: behind all others of the tail that it sees, where
// one of them is itself.
KVC_DEVICE int32_t depth(uint32_t bits) {
    return bits == 0 ? 0 : static_cast<int32_t>(population(bits)) - 1;
}

// The bits of a row of the tail.
KVC_DEVICE uint32_t tail_bits(const kvc_decode_params &p, const Unit &u, uint32_t row) {
    return p.tail_mask[u.first_row + row] & ((1u << u.rows) - 1);
}

KVC_DEVICE Column find_column(const kvc_decode_params &p, const Unit &u, uint32_t c) {
    const uint32_t group = p.q_heads / p.kv_heads, column = u.first_column + c;
    const uint32_t row = column / group;
    Column out;
    out.exists = column < u.columns;
    out.row = u.first_row + row;
    out.head = u.kv_head * group + column % group;
    out.tail = 0;
    out.slope = out.position = 0.0f;
    out.low = kFar;
    if (!out.exists) return out;
    int32_t position = u.tail + static_cast<int32_t>(row);
    out.tail = p.causal != 0 ? (2u << row) - 1 : ~0u;
    if (p.tail_mask != nullptr) {
        out.tail = tail_bits(p, u, row);
        position = u.tail + depth(out.tail);
    }
    // Positions are below 0 in a tail that is longer than the sequence.
    const int64_t low = static_cast<int64_t>(position) - p.window + 1;
    out.low = p.window != 0 && low > -kFar ? static_cast<int32_t>(low) : -kFar;
    if (p.slopes != nullptr) out.slope = p.slopes[out.head];
    out.position = static_cast<float>(position);
    return out;
}

// What dot products are multiplied with before they are turned into scores: with the scale, and where
// scores are no more than that, also with what makes them powers of two.
KVC_DEVICE float score_factor(const kvc_decode_params &p) {
    return p.softcap == 0.0f && p.slopes == nullptr ? p.scale * kLog2e : p.scale;
}

// Turns dot products times `score_factor` into scores in powers of two, -inf where a token is not seen:
// s[2 * i + c] is token i for column c. A token that can be read is one of the sequence. What a lane's
// scores are does not depend on whether it returns early.
KVC_DEVICE void make_scores(const kvc_decode_params &p, const Unit &u, const Column (&columns)[2],
                            const int32_t (&tokens)[2], const bool (&readable)[2], float (&s)[4]) {
    const int32_t first = tokens[0] < tokens[1] ? tokens[0] : tokens[1];
    const int32_t last = tokens[0] < tokens[1] ? tokens[1] : tokens[0];
    if (readable[0] && readable[1] && first >= u.plain_from && last < u.plain_to) return;
    if (p.softcap != 0.0f) {
        const float inverse = 1.0f / p.softcap;
        for (int i = 0; i < 4; ++i) s[i] = p.softcap * tanh_approx(s[i] * inverse);
    }
    int32_t positions[2] = {tokens[0], tokens[1]};
    if (p.tail_mask != nullptr) {
        for (int i = 0; i < 2; ++i)
            if (readable[i] && tokens[i] >= u.tail)
                positions[i] =
                    u.tail + depth(tail_bits(p, u, static_cast<uint32_t>(tokens[i] - u.tail)));
    }
    if (p.slopes != nullptr) {
        for (int i = 0; i < 4; ++i) {
            const Column &c = columns[i % 2];
            s[i] += c.slope * (static_cast<float>(positions[i / 2]) - c.position);
        }
    }
    const float rest = p.softcap == 0.0f && p.slopes == nullptr ? 1.0f : kLog2e;
    for (int i = 0; i < 4; ++i) {
        const Column &c = columns[i % 2];
        const int32_t place = tokens[i / 2] - u.tail;
        const bool seen = place < 0 || (c.tail >> (place & 31) & 1) != 0;
        const bool hidden = !readable[i / 2] || !seen || positions[i / 2] < c.low;
        s[i] = hidden ? -infinity() : s[i] * rest;
    }
}

// Writes four channels of a finished row; the thread with the first of them writes its LSE.
KVC_DEVICE void write_row(const kvc_decode_params &p, const Column &c, uint32_t channel,
                          const Quad &q) {
    const bool has_sink = p.sinks != nullptr;
    const Finish f = finish_row(q.top, q.sum, has_sink, has_sink ? p.sinks[c.head] : 0.0f);
    const float x[4] = {q.o[0] * f.factor, q.o[1] * f.factor, q.o[2] * f.factor, q.o[3] * f.factor};
    store_four(p.out, c.row * p.out_row + c.head * p.out_head + channel, p.out_dtype, x);
    if (channel == 0 && p.lse != nullptr)
        p.lse[static_cast<int64_t>(c.row) * p.q_heads + c.head] = f.lse;
}

} // namespace kvc
