// Block tables: from a token of a sequence to the block that holds it.
//
// An entry below 0 or at or past num_blocks, and a token past the table's end, is reported as no
// block and raises a bit of the error flag; nothing is read at such an id. Entries past the last
// token asked for are never read.
#pragma once
#include "ptx.cuh"

namespace kvc {

constexpr uint32_t kFlagBlock = 1;    // a block id outside the pool, a slot, or a short table
constexpr uint32_t kFlagPosition = 2; // a position past the rotation tables, or too many rows
constexpr uint32_t kFlagPieces = 4;   // fixed pieces that did not fit the workspace
constexpr uint32_t kFlagShared = 8;   // a shared prefix shorter than was claimed
constexpr uint32_t kFlagImage = 16;   // a mirrored prefix index that is not whole

KVC_DEVICE void raise(uint32_t *flag, uint32_t bit KVC_SITE) {
    if (flag != nullptr) atomic_or(flag, bit KVC_PASS_SITE);
}

struct BlockTable {
    const int32_t *entries;
    uint32_t count;
    uint32_t block_tokens, shift, num_blocks;
    bool power_of_two;
    uint32_t *error_flag;

    // The table of a sequence: dense where `indptr` is null.
    KVC_DEVICE BlockTable(const int32_t *table, const int32_t *indptr, int64_t stride, uint32_t seq,
                          uint32_t tokens, uint32_t blocks, uint32_t *flag)
        : block_tokens(tokens), shift(0), num_blocks(blocks),
          power_of_two((tokens & (tokens - 1)) == 0), error_flag(flag) {
        if (indptr != nullptr) {
            entries = table + indptr[seq];
            count = limit(static_cast<int64_t>(indptr[seq + 1]) - indptr[seq]);
        } else {
            entries = table + seq * stride;
            count = limit(stride);
        }
        while (power_of_two && tokens >> shift != 1) ++shift;
    }

    // A table whose first entry, entries and shift another one said.
    KVC_DEVICE BlockTable(const int32_t *first, uint32_t many, uint32_t by, uint32_t tokens,
                          uint32_t blocks, uint32_t *flag)
        : entries(first), count(many), block_tokens(tokens), shift(by), num_blocks(blocks),
          power_of_two((tokens & (tokens - 1)) == 0), error_flag(flag) {}

    KVC_DEVICE static uint32_t limit(int64_t entries) {
        return entries < 0 ? 0 : entries < 0xffffffff ? static_cast<uint32_t>(entries) : ~0u;
    }

    // What the table has for `token`, unchecked, and the token's place in its block; -1 past the
    // table's end. `checked` says what to make of it, which can wait until the load is there.
    KVC_DEVICE int32_t load(uint32_t token, uint32_t &slot) const {
        const uint32_t index = power_of_two ? token >> shift : token / block_tokens;
        slot = token - index * block_tokens;
        return entry(index);
    }
    KVC_DEVICE int32_t entry(uint32_t index) const { return index < count ? entries[index] : -1; }
    // The block of an entry, -1 where there is none.
    KVC_DEVICE int32_t checked(int32_t entry) const {
        if (static_cast<uint32_t>(entry) < num_blocks) return entry;
        raise(error_flag, kFlagBlock);
        return -1;
    }
    // The block of `token` and the token's place in it; -1 where there is none.
    KVC_DEVICE int32_t find(uint32_t token, uint32_t &slot) const {
        return checked(load(token, slot));
    }
};

} // namespace kvc
