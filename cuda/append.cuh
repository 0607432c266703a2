// Append: the K and V rows of new tokens to their cache slots, converted, K and Q optionally
// rotated on the way (Q to a buffer of its own).
//
// A block takes a few tokens; a thread makes chunks of eight output channels, reading the chunk it
// pairs with a second time where channels rotate with others half a row away: those bytes come from
// L1, and no thread waits for another. A negative slot skips the token's K and V.
#pragma once
#include "kvc_params.h"
#include "num.cuh"
#include "page.cuh"

namespace kvc {

// Turns the channels of a chunk of a row. `row` is the index of the row's first element, `first`
// the channel of the chunk's.
KVC_DEVICE void rotate(const kvc_append_params &p, const void *rows, int64_t row, uint32_t first,
                       uint32_t position, Chunk &c) {
    const uint32_t half = p.rope_dim / 2;
    if (first < p.rope_first || first >= p.rope_first + p.rope_dim) return;
    const uint32_t base = first - p.rope_first;
    const float *cosines = p.cosines + static_cast<int64_t>(position) * half;
    const float *sines = p.sines + static_cast<int64_t>(position) * half;
    Chunk partner;
    if (p.rope_interleaved != 0) {
        for (int i = 0; i < 8; ++i) partner.x[i] = c.x[i ^ 1];
    } else if (half % 8 == 0) {
        const uint32_t other = base < half ? first + half : first - half;
        partner = load_chunk(rows, row + other, p.row_dtype);
    } else {
        for (uint32_t i = 0; i < 8 && base + i < p.rope_dim; ++i) {
            const uint32_t other = base + i < half ? first + i + half : first + i - half;
            partner.x[i] = load_element(rows, row + other, p.row_dtype);
        }
    }
    for (uint32_t i = 0; i < 8 && base + i < p.rope_dim; ++i) {
        const uint32_t channel = base + i;
        const bool lower = p.rope_interleaved != 0 ? i % 2 == 0 : channel < half;
        const uint32_t pair =
            p.rope_interleaved != 0 ? channel / 2 : (lower ? channel : channel - half);
        const float turned = partner.x[i] * sines[pair];
        c.x[i] = c.x[i] * cosines[pair] + (lower ? -turned : turned);
    }
}

// Makes one chunk of a token: the item counts through the rows of Q, then K, then V.
KVC_DEVICE void append_chunk(const kvc_append_params &p, uint32_t token, uint32_t item) {
    const uint32_t k_chunks = p.k_dim / 8, v_chunks = p.v_dim / 8;
    const uint32_t q_items = p.q_heads * k_chunks, k_items = p.kv_heads * k_chunks;
    const bool rotates = p.cosines != nullptr;
    const uint32_t position = rotates ? p.positions[token] : 0;
    const bool known = !rotates || position < p.rope_positions;

    if (item < q_items + k_items) {
        const bool is_q = item < q_items;
        const uint32_t at = is_q ? item : item - q_items;
        const uint32_t head = at / k_chunks, channel = at % k_chunks * 8;
        if (!known) {
            raise(p.error_flag, kFlagPosition);
            return;
        }
        const void *rows = is_q ? p.q : p.k;
        const int64_t row = is_q ? token * p.q_token + head * p.q_head
                                 : token * p.k_token + head * p.k_head;
        int64_t to = token * p.q_out_token + head * p.q_out_head;
        if (!is_q) {
            const int64_t slot = p.slots[token];
            if (slot < 0) return;
            const int64_t block = slot / p.block_tokens;
            if (block >= p.num_blocks) {
                raise(p.error_flag, kFlagBlock);
                return;
            }
            to = block * p.k_cache_block + head * p.k_cache_head +
                 slot % p.block_tokens * p.k_cache_token;
        }
        Chunk c = load_chunk(rows, row + channel, p.row_dtype);
        if (rotates) rotate(p, rows, row, channel, position, c);
        store_chunk(is_q ? p.q_out : p.k_cache, to + channel, is_q ? p.row_dtype : p.cache_dtype, c);
        return;
    }

    const uint32_t at = item - q_items - k_items;
    const uint32_t head = at / v_chunks, channel = at % v_chunks * 8;
    const int64_t slot = p.slots[token];
    // A token whose key was refused gets no value either.
    if (slot < 0 || slot / p.block_tokens >= p.num_blocks || !known) return;
    const int64_t to = slot / p.block_tokens * p.v_cache_block + head * p.v_cache_head +
                       slot % p.block_tokens * p.v_cache_token;
    const int64_t row = token * p.v_token + head * p.v_head;
    store_chunk(p.v_cache, to + channel, p.cache_dtype, load_chunk(p.v, row + channel, p.row_dtype));
}

KVC_DEVICE void append(const kvc_append_params &p) {
    const uint32_t per_token =
        (p.q_heads + p.kv_heads) * (p.k_dim / 8) + p.kv_heads * (p.v_dim / 8);
    const uint32_t first = block_x() * p.tokens_per_block;
    const uint32_t left = p.tokens - first;
    const uint32_t tokens = left < p.tokens_per_block ? left : p.tokens_per_block;
    for (uint32_t i = thread_x(); i < tokens * per_token; i += block_threads())
        append_chunk(p, first + i / per_token, i % per_token);
}

} // namespace kvc
