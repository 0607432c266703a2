// A prefix index's copy on a device, merges and cascades. What needs no device works everywhere; the
// rest runs on the emulated device of a library that has it, and is refused by one that has not.
#include <stdlib.h>

#include "check.h"

enum { BLOCK = 4, GROUPS = 2, CAPACITY = 600, PROMPTS = 300, LONGEST = 40, REQUESTS = 24 };
enum { MOST = LONGEST / BLOCK, ROW = MOST * GROUPS };

static uint32_t state = 12345;

static uint32_t below(uint32_t n) {
    state = state * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)(state >> 8) * n) >> 24);
}

// A prompt of few different tokens, so that prefixes are shared and blocks differ late.
static uint32_t prompt(uint32_t *tokens, uint32_t most) {
    uint32_t count = below(most + 1), i;
    for (i = 0; i < count; i++) {
        tokens[i] = below(5) == 0 ? 1 + below(2) : 0;
    }
    return count;
}

static void insert(kvc_prefix *prefix) {
    static int32_t next = 0;
    uint32_t tokens[LONGEST];
    int32_t blocks[ROW];
    kvc_prefix_inserted inserted;
    uint32_t count = prompt(tokens, LONGEST) / BLOCK * BLOCK, i;
    for (i = 0; i < count / BLOCK * GROUPS; i++) {
        blocks[i] = next++;
    }
    OK(kvc_prefix_insert(prefix, below(3), tokens, count, blocks, count / BLOCK * GROUPS, NULL, 0,
                         &inserted));
}

static void *put(const kvc_device *device, const void *from, uint64_t bytes) {
    void *at = NULL;
    OK(kvc_device_alloc(device, bytes, &at));
    OK(kvc_device_upload(device, at, from, bytes, NULL));
    return at;
}

// Every request of a random batch has what kvc_prefix_lookup finds, and nothing is written past it.
static void lookups_agree(const kvc_device *device, const kvc_device_prefix *copy, kvc_prefix *prefix) {
    static uint32_t tokens[REQUESTS * LONGEST];
    int32_t indptr[REQUESTS + 1] = {0}, blocks[REQUESTS * ROW], tails[REQUESTS * GROUPS];
    uint64_t spaces[REQUESTS];
    uint32_t matched[REQUESTS], tail_tokens[REQUESTS], flag = 0, i, hits = 0;
    kvc_device_lookup_desc desc;

    for (i = 0; i < REQUESTS; i++) {
        spaces[i] = below(4);
        indptr[i + 1] = indptr[i] + (int32_t)prompt(tokens + indptr[i], LONGEST);
    }
    memset(blocks, 0xA5, sizeof blocks);
    OK(kvc_device_lookup_desc_init(&desc, sizeof desc));
    CHECK(desc.leave == 1);
    desc.requests = REQUESTS;
    desc.max_blocks = MOST;
    desc.tokens = put(device, tokens, sizeof tokens);
    desc.indptr = put(device, indptr, sizeof indptr);
    desc.name_spaces = put(device, spaces, sizeof spaces);
    desc.matched = put(device, blocks, sizeof matched);
    desc.blocks = put(device, blocks, sizeof blocks);
    desc.tail_tokens = put(device, blocks, sizeof tail_tokens);
    desc.tail_blocks = put(device, blocks, sizeof tails);
    desc.error_flag = put(device, &flag, sizeof flag);
    OK(kvc_device_prefix_lookup(copy, &desc, NULL));
    OK(kvc_device_download(device, matched, desc.matched, sizeof matched, NULL));
    OK(kvc_device_download(device, blocks, desc.blocks, sizeof blocks, NULL));
    OK(kvc_device_download(device, tail_tokens, desc.tail_tokens, sizeof tail_tokens, NULL));
    OK(kvc_device_download(device, tails, desc.tail_blocks, sizeof tails, NULL));
    OK(kvc_device_download(device, &flag, desc.error_flag, sizeof flag, NULL));
    CHECK(flag == 0);
    for (i = 0; i < REQUESTS; i++) {
        uint32_t count = (uint32_t)(indptr[i + 1] - indptr[i]), at;
        int32_t own[ROW], own_tail[GROUPS];
        kvc_prefix_hit hit;
        OK(kvc_prefix_lookup(prefix, spaces[i], tokens + indptr[i], count, count == 0 ? 0 : count - 1,
                             own, ROW, own_tail, &hit));
        hits += hit.tokens != 0;
        CHECK(matched[i] == hit.tokens && tail_tokens[i] == hit.tail_tokens);
        CHECK(memcmp(blocks + i * ROW, own, hit.block_ids * sizeof own[0]) == 0);
        for (at = (uint32_t)hit.block_ids; at < ROW; at++) {
            CHECK(blocks[i * ROW + at] == (int32_t)0xA5A5A5A5);
        }
        for (at = 0; at < GROUPS; at++) {
            CHECK(tails[i * GROUPS + at] == (hit.tail_tokens == 0 ? -1 : own_tail[at]));
        }
    }
    CHECK(hits > REQUESTS / 4);
    OK(kvc_device_free(device, (void *)desc.tokens));
    OK(kvc_device_free(device, (void *)desc.indptr));
    OK(kvc_device_free(device, (void *)desc.name_spaces));
    OK(kvc_device_free(device, desc.matched));
    OK(kvc_device_free(device, desc.blocks));
    OK(kvc_device_free(device, desc.tail_tokens));
    OK(kvc_device_free(device, desc.tail_blocks));
    OK(kvc_device_free(device, desc.error_flag));
}

static void a_copy_follows_its_index(kvc_device *device) {
    kvc_prefix *prefix = NULL;
    kvc_device_prefix *copy = NULL, *second = NULL;
    static int32_t evicted[CAPACITY * GROUPS];
    uint64_t gone = 0, bytes = 0, all = 0;
    uint32_t windows[GROUPS] = {8, 0};
    int i, round;

    OK(kvc_prefix_create(BLOCK, GROUPS, CAPACITY, &prefix));
    OK(kvc_device_prefix_create(device, prefix, &copy));
    FAILS(KVC_ERR_INVALID_STATE, "a copy already", kvc_device_prefix_create(device, prefix, &second));
    CHECK(second == NULL);
    FAILS(KVC_ERR_INVALID_STATE, "in use", kvc_prefix_set_windows(prefix, windows, GROUPS));
    for (i = 0; i < PROMPTS; i++) {
        insert(prefix);
    }
    OK(kvc_device_prefix_sync(copy, NULL, &all));
    CHECK(all > 1000);
    for (round = 0; round < 6; round++) {
        lookups_agree(device, copy, prefix);
        OK(kvc_prefix_evict(prefix, 1 + below(60), evicted, CAPACITY * GROUPS, &gone));
        CHECK(gone > 0);
        for (i = 0; i < 20; i++) {
            insert(prefix);
        }
        OK(kvc_device_prefix_sync(copy, NULL, &bytes));
        // What changed went up, and nothing else.
        CHECK(bytes > 64 && bytes < all);
    }
    OK(kvc_device_prefix_sync(copy, NULL, &bytes));
    CHECK(bytes == 64 + 16);
    lookups_agree(device, copy, prefix);

    // The index may end first: the copy still answers, and is brought up no more.
    FAILS(KVC_ERR_STALE_HANDLE, "device", kvc_device_prefix_create((kvc_device *)prefix, prefix, &second));
    FAILS(KVC_ERR_STALE_HANDLE, "prefix",
          kvc_device_prefix_create(device, (kvc_prefix *)device, &second));
    OK(kvc_device_prefix_destroy(copy));
    FAILS(KVC_ERR_STALE_HANDLE, "device_prefix", kvc_device_prefix_sync(copy, NULL, NULL));
    FAILS(KVC_ERR_STALE_HANDLE, "device_prefix", kvc_device_prefix_destroy(copy));
    // Another copy can be made now, and gets everything.
    OK(kvc_device_prefix_create(device, prefix, &copy));
    OK(kvc_device_prefix_sync(copy, NULL, &bytes));
    CHECK(bytes > 1000);
    lookups_agree(device, copy, prefix);
    OK(kvc_prefix_destroy(prefix));
    FAILS(KVC_ERR_STALE_HANDLE, "prefix", kvc_device_prefix_sync(copy, NULL, NULL));
    OK(kvc_device_prefix_destroy(copy));

    // What a walk along the tree does not find.
    OK(kvc_prefix_create(BLOCK, GROUPS, CAPACITY, &prefix));
    OK(kvc_prefix_set_windows(prefix, windows, GROUPS));
    FAILS(KVC_ERR_UNSUPPORTED, "windows", kvc_device_prefix_create(device, prefix, &copy));
    OK(kvc_prefix_destroy(prefix));
}

static void bad_lookups(kvc_device *device) {
    kvc_prefix *prefix = NULL;
    kvc_device_prefix *copy = NULL;
    kvc_device_lookup_desc desc;
    uint32_t words[8] = {7, 7, 7, 7, 7, 7, 7, 7}, flag = 0, *at;
    int32_t indptr[3] = {0, 4, 2};

    OK(kvc_prefix_create(BLOCK, 1, 8, &prefix));
    OK(kvc_device_prefix_create(device, prefix, &copy));
    OK(kvc_device_lookup_desc_init(&desc, sizeof desc));
    // No requests, nothing to do.
    OK(kvc_device_prefix_lookup(copy, &desc, NULL));
    desc.requests = 2;
    desc.max_blocks = 1;
    FAILS(KVC_ERR_NULL_POINTER, "tokens", kvc_device_prefix_lookup(copy, &desc, NULL));
    at = put(device, words, sizeof words);
    desc.tokens = at;
    desc.indptr = put(device, indptr, sizeof indptr);
    desc.matched = at + 4;
    desc.blocks = (int32_t *)at + 6;
    desc.error_flag = put(device, &flag, sizeof flag);
    desc.indptr = (const int32_t *)((const char *)desc.indptr + 2);
    FAILS(KVC_ERR_MISALIGNED, "indptr", kvc_device_prefix_lookup(copy, &desc, NULL));
    desc.indptr = (const int32_t *)((const char *)desc.indptr - 2);
    desc.max_blocks = 2;
    desc.block_stride = 1;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "block_stride", kvc_device_prefix_lookup(copy, &desc, NULL));
    desc.max_blocks = UINT32_MAX;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "max_blocks", kvc_device_prefix_lookup(copy, &desc, NULL));
    desc.max_blocks = 1;
    desc.block_stride = 0;
    // A copy that was never brought up has nothing, and says so.
    OK(kvc_device_prefix_lookup(copy, &desc, NULL));
    OK(kvc_device_download(device, &flag, desc.error_flag, sizeof flag, NULL));
    OK(kvc_device_download(device, words, at, sizeof words, NULL));
    CHECK((flag & 16) != 0 && words[4] == 0 && words[5] == 0);
    // An empty index has nothing either; offsets that descend are told.
    OK(kvc_device_zero(device, desc.error_flag, sizeof flag, NULL));
    OK(kvc_device_prefix_sync(copy, NULL, NULL));
    OK(kvc_device_prefix_lookup(copy, &desc, NULL));
    OK(kvc_device_download(device, &flag, desc.error_flag, sizeof flag, NULL));
    CHECK(flag == 2);
    OK(kvc_device_free(device, at));
    OK(kvc_device_free(device, (void *)desc.indptr));
    OK(kvc_device_free(device, desc.error_flag));
    OK(kvc_device_prefix_destroy(copy));
    OK(kvc_prefix_destroy(prefix));
}

// Two halves of a softmax make the whole, as kvc_merge_states has it.
static void halves_are_merged(kvc_device *device) {
    enum { ROWS = 3, HEADS = 2, DIM = 16, LINES = ROWS * HEADS };
    float parts[2 * LINES * DIM], lse[2 * LINES], out[LINES * DIM], out_lse[LINES];
    kvc_device_merge_desc desc;
    int i;

    for (i = 0; i < 2 * LINES * DIM; i++) {
        parts[i] = check_noise((uint32_t)i);
    }
    for (i = 0; i < 2 * LINES; i++) {
        lse[i] = 3.0f * check_noise((uint32_t)(i + 5000));
    }
    lse[1] = -INFINITY;
    lse[2] = lse[LINES + 2] = -INFINITY;
    OK(kvc_device_merge_desc_init(&desc, sizeof desc));
    CHECK(desc.part_dtype == KVC_DTYPE_F32 && desc.out_dtype == KVC_DTYPE_F32);
    desc.count = 2;
    desc.rows = ROWS;
    desc.heads = HEADS;
    desc.dim = DIM;
    desc.parts = put(device, parts, sizeof parts);
    desc.lse = put(device, lse, sizeof lse);
    desc.out = put(device, parts, sizeof out);
    desc.out_lse = put(device, lse, sizeof out_lse);
    OK(kvc_device_merge(device, &desc, NULL));
    OK(kvc_device_download(device, out, desc.out, sizeof out, NULL));
    OK(kvc_device_download(device, out_lse, desc.out_lse, sizeof out_lse, NULL));
    OK(kvc_merge_states(parts, lse, parts + LINES * DIM, lse + LINES, LINES, DIM));
    for (i = 0; i < LINES * DIM; i++) {
        CHECK(check_close(out[i], i / DIM == 2 ? 0.0f : parts[i], 1e-5f));
    }
    for (i = 0; i < LINES; i++) {
        CHECK(i == 2 ? out_lse[i] == -INFINITY : check_close(out_lse[i], lse[i], 1e-5f));
    }
    desc.dim = 12;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "dim", kvc_device_merge(device, &desc, NULL));
    desc.dim = DIM;
    desc.out = (char *)desc.out + 4;
    FAILS(KVC_ERR_MISALIGNED, "out", kvc_device_merge(device, &desc, NULL));
    desc.out = (char *)desc.out - 4;
    desc.reserved = 1;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "reserved", kvc_device_merge(device, &desc, NULL));
    OK(kvc_device_free(device, (void *)desc.parts));
    OK(kvc_device_free(device, (void *)desc.lse));
    OK(kvc_device_free(device, desc.out));
    OK(kvc_device_free(device, desc.out_lse));
}

// Without a device: what a handle that is none is answered, and the cost model.
static void without_a_device(void) {
    kvc_prefix *prefix = NULL;
    kvc_device_prefix *copy = NULL;
    kvc_device_lookup_desc lookup;
    kvc_device_merge_desc merge;
    kvc_device_cascade_query query;
    kvc_device_cascade_prefix shared = {0, 128, 256, 0};
    kvc_device_cascade_segment list[3];
    kvc_device_cascade_estimate said;
    kvc_attend_desc desc;
    kvc_device_attend_options options;
    uint64_t bytes = 0, plain = 0;
    char byte = 0;

    OK(kvc_prefix_create(BLOCK, GROUPS, CAPACITY, &prefix));
    OK(kvc_device_prefix_size(prefix, &bytes));
    // Tokens and ids of every entry at least.
    CHECK(bytes > CAPACITY * (BLOCK + GROUPS) * 4);
    FAILS(KVC_ERR_NULL_POINTER, "out_bytes", kvc_device_prefix_size(prefix, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "prefix", kvc_device_prefix_size(NULL, &bytes));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_prefix_create(NULL, prefix, &copy));
    FAILS(KVC_ERR_NULL_POINTER, "out", kvc_device_prefix_create(NULL, prefix, NULL));
    OK(kvc_prefix_destroy(prefix));
    CHECK(copy == NULL);
    OK(kvc_device_prefix_destroy(NULL));
    OK(kvc_device_lookup_desc_init(&lookup, sizeof lookup));
    copy = (kvc_device_prefix *)&byte;
    FAILS(KVC_ERR_STALE_HANDLE, "device_prefix", kvc_device_prefix_destroy(copy));
    FAILS(KVC_ERR_STALE_HANDLE, "device_prefix", kvc_device_prefix_sync(copy, NULL, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "device_prefix", kvc_device_prefix_lookup(NULL, &lookup, NULL));
    OK(kvc_device_merge_desc_init(&merge, sizeof merge));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_merge(NULL, &merge, NULL));

    // A long prefix of many sequences is worth a cascade by these rates, a short one is not.
    OK(kvc_device_cascade_query_init(&query, sizeof query));
    CHECK(query.q_tokens == 1 && query.launch == 0.0);
    query.q_heads = 32;
    query.kv_heads = 8;
    query.head_dim = 128;
    query.block_tokens = 16;
    query.token_bytes = 4096;
    query.seqs = 128;
    query.kv_tokens = 128 * (4096 + 256);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "rates",
          kvc_device_cascade_choose(&query, &shared, 1, list, 3, &said, sizeof said));
    query.memory_bytes = 3e6;
    query.cache_bytes = 6e6;
    query.cache_size = 50 << 20;
    query.operations = 3e8;
    query.launch = 2.5;
    query.multiprocessors = 132;
    OK(kvc_device_cascade_choose(&query, &shared, 1, list, 3, &said, sizeof said));
    CHECK(said.pays == 1 && said.plain > said.cascade);
    CHECK(list[0].first_seq == 0 && list[0].seqs == 128 && list[0].shared_blocks == 256);
    CHECK(list[2].first_seq == 128 && list[2].seqs == 0 && list[2].shared_blocks == 0);
    shared.blocks = 2;
    OK(kvc_device_cascade_choose(&query, &shared, 1, list, 3, &said, sizeof said));
    CHECK(said.pays == 0 && list[0].seqs == 128 && list[0].shared_blocks == 0);
    CHECK(list[1].first_seq == 128 && list[1].seqs == 0);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "segments",
          kvc_device_cascade_choose(&query, &shared, 1, NULL, 0, &said, sizeof said));
    FAILS(KVC_ERR_NULL_POINTER, "out_segments",
          kvc_device_cascade_choose(&query, &shared, 1, NULL, 3, &said, sizeof said));
    shared.seqs = 129;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "prefixes",
          kvc_device_cascade_choose(&query, &shared, 1, list, 3, &said, sizeof said));

    OK(kvc_attend_desc_init(&desc, sizeof desc));
    OK(kvc_device_attend_options_init(&options, sizeof options));
    desc.q_heads = 32;
    desc.kv_heads = 8;
    desc.k_dim = desc.v_dim = 128;
    desc.format = KVC_FORMAT_BF16;
    desc.q_dtype = desc.out_dtype = KVC_DTYPE_BF16;
    desc.block_tokens = 16;
    desc.seqs = 128;
    options.multiprocessors = 132;
    options.max_kv_tokens = 8192;
    OK(kvc_device_attend_workspace_size(NULL, &desc, &options, &plain));
    OK(kvc_device_cascade_workspace_size(NULL, &desc, &options, 3, &bytes));
    // Partial results of both halves in f32, beside what plain attention takes.
    CHECK(bytes >= plain + 2u * 128 * 32 * 128 * 4);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "segments",
          kvc_device_cascade_workspace_size(NULL, &desc, &options, 0, &bytes));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_cascade(NULL, &desc, &options, NULL, 3, NULL));
}

int main(void) {
    kvc_device *device = NULL;
    kvc_status opened = kvc_device_open(KVC_DEVICE_EMU, 0, &device);

    without_a_device();
    if (opened == KVC_OK) {
        a_copy_follows_its_index(device);
        bad_lookups(device);
        halves_are_merged(device);
        OK(kvc_device_close(device));
        printf("ran on the emulated device\n");
    } else {
        CHECK(opened == KVC_ERR_NO_KERNELS);
    }
    return check_result();
}
