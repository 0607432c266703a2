// The prefix index on the program's own block ids: insert, match, pin, evict, misuse.
#include "check.h"

enum { BLOCK = 4, GROUPS = 2 };

int main(void) {
    kvc_prefix *prefix = NULL;
    kvc_prefix_hit hit;
    kvc_prefix_inserted inserted;
    kvc_prefix_counts counts;
    uint32_t tokens[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    uint32_t other[12] = {1, 2, 3, 4, 5, 6, 7, 99, 9, 10, 11, 12};
    // [block][group]; -1: the second group's window has passed.
    int32_t blocks[6] = {10, 20, 11, 21, 12, -1};
    int32_t duplicates[6] = {30, 40, 31, 41, 32, 42};
    int32_t out[6] = {-7, -7, -7, -7, -7, -7};
    int32_t tail[GROUPS] = {-7, -7};
    uint64_t pin = 0;
    uint64_t second_pin = 0;
    uint64_t evicted = 99;

    FAILS(KVC_ERR_INVALID_ARGUMENT, "block_tokens", kvc_prefix_create(0, GROUPS, 8, &prefix));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "capacity", kvc_prefix_create(BLOCK, GROUPS, 0, &prefix));
    FAILS(KVC_ERR_NULL_POINTER, "out", kvc_prefix_create(BLOCK, GROUPS, 8, NULL));
    CHECK(prefix == NULL);
    OK(kvc_prefix_create(BLOCK, GROUPS, 8, &prefix));

    OK(kvc_prefix_insert(prefix, 7, tokens, 12, blocks, 6, out, 6, &inserted));
    CHECK(inserted.present_blocks == 0 && inserted.stored_blocks == 3 && out[0] == -7);

    // The whole blocks that match, and how far the next one does.
    OK(kvc_prefix_lookup(prefix, 7, other, 12, 11, out, 6, tail, &hit));
    CHECK(hit.tokens == 4 && hit.block_ids == 2 && out[0] == 10 && out[1] == 20 && out[2] == -7);
    CHECK(hit.tail_tokens == 3 && tail[0] == 11 && tail[1] == 21);
    OK(kvc_prefix_lookup(prefix, 7, tokens, 12, 12, out, 6, NULL, &hit));
    CHECK(hit.tokens == 12 && out[4] == 12 && out[5] == -1);
    // At most what was asked for: the last token is left to compute.
    OK(kvc_prefix_lookup(prefix, 7, tokens, 12, 11, out, 6, tail, &hit));
    CHECK(hit.tokens == 8 && hit.tail_tokens == 3);
    // Another tenant sees nothing.
    OK(kvc_prefix_lookup(prefix, 8, tokens, 12, 12, out, 6, tail, &hit));
    CHECK(hit.tokens == 0 && hit.tail_tokens == 0 && hit.block_ids == 0);
    FAILS(KVC_ERR_BUFFER_TOO_SMALL, "6 needed",
          kvc_prefix_lookup(prefix, 7, tokens, 12, 12, out, 5, tail, &hit));
    CHECK(hit.tokens == 0);

    // What is there already keeps its ids.
    memset(out, 0xFF, sizeof out);
    OK(kvc_prefix_insert(prefix, 7, tokens, 8, duplicates, 4, out, 4, &inserted));
    CHECK(inserted.present_blocks == 2 && inserted.stored_blocks == 0);
    CHECK(out[0] == 10 && out[3] == 21 && out[4] == -1);
    FAILS(KVC_ERR_BUFFER_TOO_SMALL, "out_present",
          kvc_prefix_insert(prefix, 7, tokens, 8, duplicates, 4, out, 3, &inserted));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "whole blocks",
          kvc_prefix_insert(prefix, 7, tokens, 7, blocks, 4, NULL, 0, &inserted));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "blocks",
          kvc_prefix_insert(prefix, 7, tokens, 8, blocks, 3, NULL, 0, &inserted));

    // A pin keeps its prefix and nothing after it.
    OK(kvc_prefix_lock(prefix, &inserted.at, &pin));
    FAILS(KVC_ERR_BUFFER_TOO_SMALL, "out_blocks", kvc_prefix_evict(prefix, 3, out, 5, &evicted));
    CHECK(evicted == 99);
    OK(kvc_prefix_evict(prefix, 3, out, 6, &evicted));
    CHECK(evicted == 1 && out[0] == 12 && out[1] == -1);
    OK(kvc_prefix_stats(prefix, &counts, sizeof counts));
    CHECK(counts.blocks == 2 && counts.capacity_blocks == 8 && counts.pins == 1);
    CHECK(counts.name_spaces == 1 && counts.bytes > 0);

    OK(kvc_prefix_unlock(prefix, pin));
    FAILS(KVC_ERR_STALE_HANDLE, "", kvc_prefix_unlock(prefix, pin));
    OK(kvc_prefix_evict(prefix, UINT64_MAX, out, 6, &evicted));
    CHECK(evicted == 2);
    // The position is gone with its blocks; an invented one never was.
    FAILS(KVC_ERR_STALE_HANDLE, "position", kvc_prefix_lock(prefix, &inserted.at, &second_pin));
    memset(&inserted.at, 0xAB, sizeof inserted.at);
    FAILS(KVC_ERR_STALE_HANDLE, "position", kvc_prefix_lock(prefix, &inserted.at, &second_pin));
    FAILS(KVC_ERR_NULL_POINTER, "at", kvc_prefix_lock(prefix, NULL, &second_pin));
    CHECK(second_pin == 0);

    // An index with a policy, priorities and hints.
    kvc_prefix_options options;
    kvc_prefix *steered = NULL;
    FAILS(KVC_ERR_STRUCT_SIZE, "kvc_prefix_options", kvc_prefix_options_init(&options, 8));
    OK(kvc_prefix_options_init(&options, sizeof options));
    CHECK(options.block_tokens == 16 && options.groups == 1 && options.capacity_blocks == 1024);
    CHECK(options.eviction == KVC_EVICTION_LRU && options.reserved == 0);
    options.block_tokens = BLOCK;
    options.eviction = 5;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "eviction", kvc_prefix_create_with(&options, &steered));
    options.eviction = KVC_EVICTION_LRU;
    options.reserved = 1;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "reserved", kvc_prefix_create_with(&options, &steered));
    options.reserved = 0;
    CHECK(steered == NULL);
    OK(kvc_prefix_create_with(NULL, &steered));
    OK(kvc_prefix_destroy(steered));
    OK(kvc_prefix_create_with(&options, &steered));
    {
        kvc_prefix_inserted first, second;
        kvc_retention keep = {0, UINT64_MAX, 80, 100};
        kvc_retention wrong = {4, 4, 80, 0};
        kvc_retention high = {0, 4, 101, 0};
        OK(kvc_prefix_advance(steered, 1000));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "now_ms", kvc_prefix_advance(steered, UINT64_MAX));
        // {1, 2, 3, 4}, the older, and {5, 6, 7, 8}.
        OK(kvc_prefix_insert(steered, 0, tokens, 4, blocks, 1, NULL, 0, &first));
        OK(kvc_prefix_insert(steered, 0, tokens + 4, 4, blocks + 1, 1, NULL, 0, &second));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "range",
              kvc_prefix_prioritize(steered, &first.at, &wrong, 1));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "priority",
              kvc_prefix_prioritize(steered, &first.at, &high, 1));
        FAILS(KVC_ERR_NULL_POINTER, "ranges",
              kvc_prefix_prioritize(steered, &first.at, NULL, 1));
        OK(kvc_prefix_prioritize(steered, &first.at, &keep, 1));
        OK(kvc_prefix_touch(steered, &second.at));
        // The priority keeps the older one ...
        OK(kvc_prefix_evict(steered, 1, out, 1, &evicted));
        CHECK(evicted == 1 && out[0] == 20);
        // ... for 100 ms.
        OK(kvc_prefix_insert(steered, 0, tokens + 4, 4, blocks + 1, 1, NULL, 0, &second));
        OK(kvc_prefix_advance(steered, 1099));
        OK(kvc_prefix_touch(steered, &second.at));
        OK(kvc_prefix_advance(steered, 1100));
        OK(kvc_prefix_lock(steered, &second.at, &pin));
        OK(kvc_prefix_release(steered, pin));
        FAILS(KVC_ERR_STALE_HANDLE, "pin", kvc_prefix_release(steered, pin));
        OK(kvc_prefix_evict(steered, 1, out, 1, &evicted));
        CHECK(evicted == 1 && out[0] == 10);
        // A hint that it is not needed again.
        OK(kvc_prefix_insert(steered, 0, tokens, 4, blocks, 1, NULL, 0, &first));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "hint", kvc_prefix_hint(steered, &first.at, 0, 4, 0));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "ms",
              kvc_prefix_hint(steered, &first.at, 0, KVC_HINT_EXPECTED, UINT64_MAX));
        OK(kvc_prefix_hint(steered, &second.at, 0, KVC_HINT_WAITED, 0));
        OK(kvc_prefix_hint(steered, &second.at, 0, KVC_HINT_NONE, 0));
        OK(kvc_prefix_hint(steered, &second.at, 0, KVC_HINT_EXPECTED, 1200));
        OK(kvc_prefix_hint(steered, &first.at, 0, KVC_HINT_ENDED, 0));
        OK(kvc_prefix_evict(steered, 1, out, 1, &evicted));
        CHECK(evicted == 1 && out[0] == 10);
        FAILS(KVC_ERR_STALE_HANDLE, "position",
              kvc_prefix_hint(steered, &first.at, 0, KVC_HINT_ENDED, 0));
        FAILS(KVC_ERR_STALE_HANDLE, "position", kvc_prefix_touch(steered, &first.at));
    }
    OK(kvc_prefix_destroy(steered));

    // Two groups, one with a window of two blocks: what it has left is free for others.
    {
        kvc_prefix *hybrid = NULL;
        kvc_prefix_inserted stored;
        kvc_prefix_hit found;
        const uint32_t windows[3] = {0, BLOCK + 1, 0};
        const int32_t given[6] = {10, 20, 11, 21, 12, 22};
        int32_t gone[4] = {99, 21, 22, 21};
        int32_t ids[6];
        uint64_t forgotten = 77;
        OK(kvc_prefix_create(BLOCK, 2, 8, &hybrid));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "windows", kvc_prefix_set_windows(hybrid, windows, 3));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "windows", kvc_prefix_set_windows(hybrid, windows, 17));
        FAILS(KVC_ERR_NULL_POINTER, "windows", kvc_prefix_set_windows(hybrid, NULL, 2));
        OK(kvc_prefix_set_windows(hybrid, windows, 2));
        OK(kvc_prefix_insert(hybrid, 0, tokens, 3 * BLOCK, given, 6, NULL, 0, &stored));
        CHECK(stored.stored_blocks == 3);
        FAILS(KVC_ERR_INVALID_STATE, "in use", kvc_prefix_set_windows(hybrid, windows, 2));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "group", kvc_prefix_forget(hybrid, 2, gone, 4, &forgotten));
        FAILS(KVC_ERR_NULL_POINTER, "blocks", kvc_prefix_forget(hybrid, 1, NULL, 4, &forgotten));
        CHECK(forgotten == 77);
        OK(kvc_prefix_forget(hybrid, 0, gone, 4, &forgotten));
        CHECK(forgotten == 0);
        OK(kvc_prefix_forget(hybrid, 1, gone, 2, &forgotten));
        CHECK(forgotten == 1 && gone[0] == 21 && gone[1] == 99);
        // Three blocks need the window's last one; two would need the one that is gone.
        OK(kvc_prefix_lookup(hybrid, 0, tokens, 3 * BLOCK, 3 * BLOCK, ids, 6, NULL, &found));
        CHECK(found.tokens == 3 * BLOCK && ids[2] == 11 && ids[3] == -1 && ids[5] == 22);
        OK(kvc_prefix_lookup(hybrid, 0, tokens, 2 * BLOCK, 2 * BLOCK, ids, 6, NULL, &found));
        CHECK(found.tokens == BLOCK && ids[0] == 10 && ids[1] == 20);
        OK(kvc_prefix_destroy(hybrid));
    }

    FAILS(KVC_ERR_NULL_POINTER, "tokens",
          kvc_prefix_lookup(prefix, 7, NULL, 12, 12, out, 6, tail, &hit));
    FAILS(KVC_ERR_OVERFLOW, "tokens",
          kvc_prefix_lookup(prefix, 7, tokens, UINT64_MAX, 12, out, 6, tail, &hit));
    FAILS(KVC_ERR_STALE_HANDLE, "pool", kvc_pool_destroy((kvc_pool *)(void *)prefix));
    OK(kvc_prefix_destroy(prefix));
    FAILS(KVC_ERR_STALE_HANDLE, "prefix", kvc_prefix_evict(prefix, 1, out, 6, &evicted));
    OK(kvc_prefix_destroy(NULL));
    return check_result();
}
