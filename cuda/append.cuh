// Append: the K and V rows of new tokens to their cache slots, converted, K and Q optionally
// rotated on the way (Q to a buffer of its own).
//
// A power of two of threads has a token. A thread has a column of its rows in some of the heads: eight
// channels, and where channels rotate with others half a row away those too, so that the angles of a
// column are loaded once for all heads and every element once. Loads of several heads are under way
// before the first is used. A negative slot skips the token's K and V.
#pragma once
#include "kvc_params.h"
#include "num.cuh"
#include "page.cuh"

namespace kvc {

constexpr uint32_t kAppendThreads = 256;

// The token of a thread, the threads that have it, and the thread's number among them.
struct Seat {
    uint32_t threads, thread, token;
    KVC_DEVICE explicit Seat(const kvc_append_params &p) {
        const uint32_t shift = find_first(kAppendThreads) - find_first(p.tokens_per_block);
        threads = 1u << shift;
        thread = thread_x() & (threads - 1);
        token = block_x() * p.tokens_per_block + (thread_x() >> shift);
    }
};

// The columns of a row that a thread has: one, in every `step`-th head from `head` on.
struct Share {
    uint32_t column, head, step;
    KVC_DEVICE Share(uint32_t thread, uint32_t threads, uint32_t columns)
        : column(thread % columns), head(thread / columns), step(threads / columns) {
        if (head >= step) head = ~0u; // threads that are left over have none
    }
};

// The rows of one kind of a token: where head 0 lies and goes, and the bytes between heads.
struct HeadRows {
    const char *from;
    char *to;
    int64_t from_head, to_head;
    uint32_t heads, from_dtype, to_dtype;
};

// Eight elements as they are loaded: the bits of 16-bit rows whose type is compiled in, else floats.
template <uint32_t Dtype> struct Held {
    Vec16 bits;
    KVC_DEVICE void load(const char *at, uint32_t) { bits = load_stream(at); }
    KVC_DEVICE void store(char *to, uint32_t) const { store_16(to, bits); }
    // The elements 2 * i and 2 * i + 1.
    KVC_DEVICE void get(int i, float (&x)[2]) const {
        x[0] = widen(static_cast<uint16_t>(bits.word[i]), Dtype);
        x[1] = widen(static_cast<uint16_t>(bits.word[i] >> 16), Dtype);
    }
    KVC_DEVICE void set(int i, const float (&x)[2]) { bits.word[i] = pack(x[0], x[1], Dtype); }
};
template <> struct Held<0> {
    Chunk elements;
    KVC_DEVICE void load(const char *at, uint32_t dtype) { elements = load_chunk(at, 0, dtype); }
    KVC_DEVICE void store(char *to, uint32_t dtype) const { store_chunk(to, 0, dtype, elements); }
    KVC_DEVICE void get(int i, float (&x)[2]) const {
        x[0] = elements.x[2 * i];
        x[1] = elements.x[2 * i + 1];
    }
    KVC_DEVICE void set(int i, const float (&x)[2]) {
        elements.x[2 * i] = x[0];
        elements.x[2 * i + 1] = x[1];
    }
};

// Copies the chunk of a column at `channel`, in all heads of the share.
template <uint32_t Dtype>
KVC_DEVICE void copy_column(const HeadRows &r, const Share &share, uint32_t channel) {
    constexpr int kBatch = Dtype != 0 ? 4 : 1; // chunks whose loads are under way together
    if (share.head >= r.heads) return;
    const char *from = element(static_cast<const void *>(r.from + share.head * r.from_head), channel,
                               r.from_dtype);
    char *to = element(static_cast<void *>(r.to + share.head * r.to_head), channel, r.to_dtype);
    const int64_t from_step = share.step * r.from_head, to_step = share.step * r.to_head;
KVC_ROLL
    for (uint32_t head = share.head; head < r.heads; head += kBatch * share.step) {
        Held<Dtype> held[kBatch];
KVC_UNROLL
        for (int n = 0; n < kBatch; ++n) {
            if (head + n * share.step < r.heads) held[n].load(from, r.from_dtype);
            from += from_step;
        }
KVC_UNROLL
        for (int n = 0; n < kBatch; ++n) {
            if (head + n * share.step < r.heads) held[n].store(to, r.to_dtype);
            to += to_step;
        }
    }
}

// How the columns of keys and queries turn, and what a thread needs for its own.
struct Turn {
    enum Kind { kCopy, kHalves, kNeighbours, kRagged } kind;
    Share share;
    uint32_t channel;           // of the column's first chunk
    uint32_t half;              // to the second, where halves turn
    float cosines[8], sines[8]; // of halves all, of neighbours the first four

    KVC_DEVICE static bool halves(const kvc_append_params &p) {
        return p.cosines != nullptr && p.rope_interleaved == 0 && p.rope_dim % 16 == 0;
    }
    // Halves or neighbours that do not fill chunks.
    KVC_DEVICE static bool ragged(const kvc_append_params &p) {
        return p.cosines != nullptr && p.rope_dim % (p.rope_interleaved != 0 ? 8 : 16) != 0;
    }
    KVC_DEVICE static uint32_t columns(const kvc_append_params &p) {
        return p.k_dim / 8 - (halves(p) ? p.rope_dim / 16 : 0);
    }
    KVC_DEVICE Turn(const kvc_append_params &p, uint32_t thread, uint32_t threads, uint32_t position)
        : kind(kCopy), share(thread, threads, columns(p)), channel(share.column * 8),
          half(p.rope_dim / 2) {
        if (p.cosines == nullptr) return;
        const int64_t row = static_cast<int64_t>(position) * half;
        if (halves(p)) {
            if (channel < half) {
                kind = kHalves;
                load_angles<8>(p, row + channel);
                channel += p.rope_first;
            } else {
                channel -= half;
                if (channel >= p.rope_first) channel += p.rope_dim;
            }
        } else if (channel >= p.rope_first && channel < p.rope_first + p.rope_dim) {
            kind = ragged(p) ? kRagged : kNeighbours;
            if (kind == kNeighbours) {
                load_angles<4>(p, row + (channel - p.rope_first) / 2);
            }
        }
    }
    template <int Count> KVC_DEVICE void load_angles(const kvc_append_params &p, int64_t at) {
        const uintptr_t both = reinterpret_cast<uintptr_t>(p.cosines) |
                               reinterpret_cast<uintptr_t>(p.sines);
        if (both % 16 != 0) {
KVC_UNROLL
            for (int i = 0; i < Count; ++i) {
                cosines[i] = p.cosines[at + i];
                sines[i] = p.sines[at + i];
            }
            return;
        }
KVC_UNROLL
        for (int i = 0; i < Count; i += 4) {
            const Vec16 c = *reinterpret_cast<const Vec16 *>(p.cosines + at + i);
            const Vec16 s = *reinterpret_cast<const Vec16 *>(p.sines + at + i);
KVC_UNROLL
            for (int j = 0; j < 4; ++j) {
                cosines[i + j] = as_float(c.word[j]);
                sines[i + j] = as_float(s.word[j]);
            }
        }
    }
    // Turns the first and the second of a pair of channels.
    KVC_DEVICE void pair(int angle, float &a, float &b) const {
        const float from_b = mul_rn(b, sines[angle]), from_a = mul_rn(a, sines[angle]);
        a = a * cosines[angle] + -from_b;
        b = b * cosines[angle] + from_a;
    }
    // Turns a chunk by its neighbours, or two chunks by each other.
    template <bool Halves, typename H> KVC_DEVICE void apply(H (&held)[1 + Halves]) const {
KVC_UNROLL
        for (int i = 0; i < 4; ++i) {
            float a[2], b[2];
            held[0].get(i, a);
            if constexpr (Halves) {
                held[1].get(i, b);
                pair(2 * i, a[0], b[0]);
                pair(2 * i + 1, a[1], b[1]);
                held[1].set(i, b);
            } else {
                pair(i, a[0], a[1]);
            }
            held[0].set(i, a);
        }
    }
};

// Where halves or neighbours do not fill chunks: element by element.
KVC_DEVICE void turn_ragged(const kvc_append_params &p, const HeadRows &r, const Turn &turn,
                            uint32_t position) {
    const uint32_t half = p.rope_dim / 2, base = turn.channel - p.rope_first;
    const bool neighbours = p.rope_interleaved != 0;
    const int64_t angles = static_cast<int64_t>(position) * half;
KVC_ROLL
    for (uint32_t head = turn.share.head; head < r.heads; head += turn.share.step) {
        const char *row = r.from + head * r.from_head;
        char *to = r.to + head * r.to_head;
KVC_ROLL
        for (uint32_t i = 0; i < 8; ++i) {
            const uint32_t own = turn.channel + i, at = base + i;
            float x = load_element(row, own, r.from_dtype);
            if (at < p.rope_dim) {
                const bool lower = neighbours ? at % 2 == 0 : at < half;
                const uint32_t pair = neighbours ? at / 2 : lower ? at : at - half;
                const uint32_t by = neighbours ? 1 : half;
                const float other = load_element(row, lower ? own + by : own - by, r.from_dtype);
                const float turned = mul_rn(other, p.sines[angles + pair]);
                x = x * p.cosines[angles + pair] + (lower ? -turned : turned);
            }
            store_element(to, own, r.to_dtype, x);
        }
    }
}

// Turns the chunk of a column, or its two, in all heads of the share.
template <uint32_t Dtype, bool Halves>
KVC_DEVICE void turn_chunks(const HeadRows &r, const Turn &turn) {
    constexpr int kBatch = Dtype != 0 ? 2 : 1;
    const Share &share = turn.share;
    const char *from = element(static_cast<const void *>(r.from + share.head * r.from_head),
                               turn.channel, r.from_dtype);
    char *to = element(static_cast<void *>(r.to + share.head * r.to_head), turn.channel, r.to_dtype);
    const int64_t from_step = share.step * r.from_head, to_step = share.step * r.to_head;
    const int64_t from_half = turn.half * element_bytes(r.from_dtype);
    const int64_t to_half = turn.half * element_bytes(r.to_dtype);
KVC_ROLL
    for (uint32_t head = share.head; head < r.heads; head += kBatch * share.step) {
        Held<Dtype> held[kBatch][1 + Halves];
KVC_UNROLL
        for (int n = 0; n < kBatch; ++n) {
            if (head + n * share.step < r.heads) {
                held[n][0].load(from, r.from_dtype);
                if constexpr (Halves) held[n][1].load(from + from_half, r.from_dtype);
            }
            from += from_step;
        }
KVC_UNROLL
        for (int n = 0; n < kBatch; ++n) {
            if (head + n * share.step < r.heads) {
                turn.template apply<Halves>(held[n]);
                held[n][0].store(to, r.to_dtype);
                if constexpr (Halves) held[n][1].store(to + to_half, r.to_dtype);
            }
            to += to_step;
        }
    }
}

// Moves a thread's column of keys or queries, turned as it is to be.
template <uint32_t Dtype>
KVC_DEVICE void turn_column(const kvc_append_params &p, const HeadRows &r, const Turn &turn,
                            uint32_t position) {
    if (turn.share.head >= r.heads) return;
    if (turn.kind == Turn::kHalves) return turn_chunks<Dtype, true>(r, turn);
    if (turn.kind == Turn::kNeighbours) return turn_chunks<Dtype, false>(r, turn);
    if constexpr (Dtype == 0) {
        if (turn.kind == Turn::kRagged) return turn_ragged(p, r, turn, position);
    }
    copy_column<Dtype>(r, turn.share, turn.channel);
}

// The queries of a token.
template <uint32_t Dtype>
KVC_DEVICE HeadRows query_rows_of(const kvc_append_params &p, uint32_t token) {
    const uint32_t dtype = Dtype != 0 ? Dtype : p.row_dtype;
    const int64_t bytes = element_bytes(dtype);
    return {static_cast<const char *>(p.q) + token * p.q_token * bytes,
            static_cast<char *>(p.q_out) + token * p.q_out_token * bytes,
            p.q_head * bytes, p.q_out_head * bytes, p.q_heads, dtype, dtype};
}

// The queries of a block's tokens alone.
template <uint32_t Dtype> KVC_DEVICE void turn_queries_as(const kvc_append_params &p) {
    const Seat seat(p);
    if (seat.token >= p.tokens) return;
    const uint32_t position = p.cosines != nullptr ? p.positions[seat.token] : 0;
    if (p.cosines != nullptr && position >= p.rope_positions) {
        if (seat.thread == 0) raise(p.error_flag, kFlagPosition);
        return;
    }
    const Turn turn(p, seat.thread, seat.threads, position);
    turn_column<Dtype>(p, query_rows_of<Dtype>(p, seat.token), turn, position);
}
KVC_DEVICE void turn_queries(const kvc_append_params &p) {
    if (p.row_dtype == kBf16 && !Turn::ragged(p)) {
        turn_queries_as<kBf16>(p);
    } else {
        turn_queries_as<0>(p);
    }
}

// The block of a slot and the place in it; false where there is none, which is reported.
KVC_DEVICE bool find_slot(const kvc_append_params &p, int64_t slot, bool reports, int64_t &block,
                          uint32_t &place) {
    block = 0;
    place = 0;
    if (slot < 0) return false;
    if (static_cast<uint64_t>(slot) >= static_cast<uint64_t>(p.num_blocks) * p.block_tokens) {
        if (reports) raise(p.error_flag, kFlagBlock);
        return false;
    }
    if (slot >> 32 == 0) {
        const uint32_t narrow = static_cast<uint32_t>(slot), index = quotient_of(narrow, p.block_tokens);
        block = index;
        place = narrow - index * p.block_tokens;
    } else {
        block = slot / p.block_tokens;
        place = static_cast<uint32_t>(slot - block * p.block_tokens);
    }
    return true;
}

template <uint32_t Dtype> KVC_DEVICE void append_as(const kvc_append_params &p) {
    const Seat seat(p);
    const uint32_t threads = seat.threads, thread = seat.thread, token = seat.token;
    if (token >= p.tokens) return;
    const int64_t slot = p.slots[token];
    uint32_t position = 0;
    if (p.cosines != nullptr) {
        position = p.positions[token];
        if (position >= p.rope_positions) {
            if (thread == 0) raise(p.error_flag, kFlagPosition);
            return;
        }
    }
    int64_t block;
    uint32_t place;
    const bool found = find_slot(p, slot, thread == 0, block, place);
    const uint32_t row_dtype = Dtype != 0 ? Dtype : p.row_dtype;
    const uint32_t cache_dtype = Dtype != 0 ? Dtype : p.cache_dtype;
    const int64_t row = element_bytes(row_dtype), cache = element_bytes(cache_dtype);
    // Where nothing turns half of the threads have keys and the others values.
    const uint32_t widest = (p.k_dim > p.v_dim ? p.k_dim : p.v_dim) / 8;
    const bool apart =
        p.cosines == nullptr && p.q_heads == 0 && p.v_dim != 0 && threads / 2 >= widest;
    const uint32_t sharing = apart ? threads / 2 : threads;
    const uint32_t own = thread & (sharing - 1);
    if (!apart || thread < sharing) {
        const Turn turn(p, own, sharing, position);
        if (found) {
            const HeadRows keys = {
                static_cast<const char *>(p.k) + token * p.k_token * row,
                static_cast<char *>(p.k_cache) +
                    (block * p.k_cache_block + place * p.k_cache_token) * cache,
                p.k_head * row, p.k_cache_head * cache, p.kv_heads, row_dtype, cache_dtype};
            turn_column<Dtype>(p, keys, turn, position);
        }
        turn_column<Dtype>(p, query_rows_of<Dtype>(p, token), turn, position);
    }
    if (found && p.v_dim != 0 && (!apart || thread >= sharing)) {
        const Share share(own, sharing, p.v_dim / 8);
        const HeadRows values = {
            static_cast<const char *>(p.v) + token * p.v_token * row,
            static_cast<char *>(p.v_cache) +
                (block * p.v_cache_block + place * p.v_cache_token) * cache,
            p.v_head * row, p.v_cache_head * cache, p.kv_heads, row_dtype, cache_dtype};
        copy_column<Dtype>(values, share, share.column * 8);
    }
}

KVC_DEVICE void append(const kvc_append_params &p) {
    const bool plain = p.row_dtype == p.cache_dtype && !Turn::ragged(p);
    if (plain && p.row_dtype == kBf16) {
        append_as<kBf16>(p);
    } else if (plain && p.row_dtype == kF16) {
        append_as<kF16>(p);
    } else {
        append_as<0>(p);
    }
}

} // namespace kvc
