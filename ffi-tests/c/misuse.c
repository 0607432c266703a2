// What no program should do: handles that are stale, foreign, invented or used by two threads at
// once, too many handles, garbage for structs. All are answered with a code and a text; nothing
// crashes, and under valgrind nothing touches memory that is not there.
#include <pthread.h>
#include <stdlib.h>

#include "toy_model.h"

static kvc_cache *shared_cache;
static kvc_pool *shared_pool;
static int wrong_codes[2];
static int successes[2];

// Two threads on one cache: all calls work. On one pool, which is per-handle: each call works or
// says that the handle is in use.
static void *hammer(void *which) {
    int me = *(int *)which;
    uint32_t prompt[30];
    for (uint32_t i = 0; i < 30; i++) {
        prompt[i] = i;
    }
    for (int round = 0; round < 300; round++) {
        kvc_seq seq;
        uint32_t cached;
        int32_t blocks[3];
        kvc_status status = kvc_seq_start(shared_cache, prompt, 30, (uint64_t)me, &seq, &cached);
        wrong_codes[me] += status != KVC_OK;
        if (status == KVC_OK) {
            wrong_codes[me] += kvc_seq_release(shared_cache, seq) != KVC_OK;
        }
        status = kvc_pool_allocate_n(shared_pool, 3, blocks);
        wrong_codes[me] += status != KVC_OK && status != KVC_ERR_INVALID_STATE;
        if (status == KVC_OK) {
            successes[me] += 1;
            do {
                status = kvc_pool_free_n(shared_pool, blocks, 3, NULL);
            } while (status == KVC_ERR_INVALID_STATE);
            wrong_codes[me] += status != KVC_OK;
        }
    }
    return NULL;
}

static void invented_handles(void) {
    uint64_t on_stack[4] = {0};
    void *on_heap = malloc(64);
    kvc_pool *pool = NULL;
    kvc_pool_counts counts;
    uintptr_t values[8];
    memset(&counts, 0x5A, sizeof counts);
    OK(kvc_pool_create(4, &pool));
    values[0] = 1;
    values[1] = (uintptr_t)on_stack;
    values[2] = (uintptr_t)on_heap;
    values[3] = UINTPTR_MAX;
    values[4] = (uintptr_t)pool + 1;
    values[5] = (uintptr_t)pool ^ ((uintptr_t)1 << 20);
    values[6] = (uintptr_t)pool ^ ((uintptr_t)1 << 60);
    values[7] = (uintptr_t)&counts;
    for (int i = 0; i < 8; i++) {
        FAILS(KVC_ERR_STALE_HANDLE, "pool",
              kvc_pool_stats((kvc_pool *)values[i], &counts, sizeof counts));
        FAILS(KVC_ERR_STALE_HANDLE, "pool", kvc_pool_destroy((kvc_pool *)values[i]));
        FAILS(KVC_ERR_STALE_HANDLE, "cache",
              kvc_cache_stats((kvc_cache *)values[i], (kvc_cache_counts *)(void *)&counts, 96));
        FAILS(KVC_ERR_STALE_HANDLE, "step", kvc_step_destroy((kvc_step *)values[i]));
    }
    // A live handle of another noun.
    FAILS(KVC_ERR_STALE_HANDLE, "prefix", kvc_prefix_destroy((kvc_prefix *)(void *)pool));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_cache_destroy((kvc_cache *)(void *)pool));
    CHECK(counts.blocks == 0x5A5A5A5A);
    OK(kvc_pool_destroy(pool));
    // A new handle in the place of the old one does not revive it.
    for (int i = 0; i < 5000; i++) {
        kvc_pool *next = NULL;
        OK(kvc_pool_create(1, &next));
        CHECK(next != pool);
        OK(kvc_pool_destroy(next));
    }
    FAILS(KVC_ERR_STALE_HANDLE, "pool", kvc_pool_destroy(pool));
    free(on_heap);
}

static void too_many_handles(void) {
    enum { LIMIT = 4096 };
    static kvc_step *steps[LIMIT + 1];
    int made = 0;
    kvc_status status = KVC_OK;
    while (made <= LIMIT) {
        status = kvc_step_create(&steps[made]);
        if (status != KVC_OK) {
            break;
        }
        made += 1;
    }
    CHECK(status == KVC_ERR_TOO_MANY_HANDLES && made == LIMIT && steps[LIMIT] == NULL);
    FAILS(KVC_ERR_TOO_MANY_HANDLES, "4096", kvc_step_create(&steps[LIMIT]));
    for (int i = 0; i < made; i++) {
        OK(kvc_step_destroy(steps[i]));
    }
}

// Structs of noise: whatever the answer, it is one of the codes, and what it says is not empty.
static void garbage(void) {
    for (uint32_t round = 0; round < 2000; round++) {
        kvc_attend_desc desc;
        kvc_append_desc append;
        kvc_plan_options plan;
        kvc_plan_result result;
        kvc_group_spec group;
        uint64_t bytes;
        char text[256];
        unsigned char *words[4];
        size_t sizes[4] = {sizeof desc, sizeof append, sizeof plan, sizeof group};
        words[0] = (unsigned char *)&desc;
        words[1] = (unsigned char *)&append;
        words[2] = (unsigned char *)&plan;
        words[3] = (unsigned char *)&group;
        for (int w = 0; w < 4; w++) {
            for (size_t i = 0; i < sizes[w]; i++) {
                float noise = check_noise(round * 4096 + (uint32_t)w * 1024 + (uint32_t)i);
                // Half of the bytes 0, so that some fields are in range.
                words[w][i] = noise < 0.0f ? 0 : (unsigned char)(noise * 255.0f);
            }
        }
        if (round % 2 == 0) {
            desc.struct_size = sizeof desc;
            append.struct_size = sizeof append;
            plan.struct_size = sizeof plan;
            group.struct_size = sizeof group;
        } else {
            // Sizes that a program of this size could have meant.
            desc.struct_size %= sizeof desc + 1;
            append.struct_size %= sizeof append + 1;
            plan.struct_size %= sizeof plan + 1;
            group.struct_size %= sizeof group + 1;
        }
        // Pointers that are followed must be NULL, misaligned or good: noise is none of these.
        desc.sinks = desc.alibi = NULL;
        desc.bad_block = NULL;
        desc.q_indptr = (const int32_t *)1;
        append.slots = (const int64_t *)1;
        append.rope = NULL;
        append.rows |= 1;
        if (kvc_attend(&desc) != KVC_OK) {
            CHECK(kvc_last_error(text, sizeof text) > 0 && text[0] != '\0');
        } else {
            CHECK(0 && "noise is no attention call");
        }
        CHECK(kvc_append(&append) != KVC_OK);
        kvc_attend_workspace_size(&desc, round, round, &bytes);
        kvc_plan_compute(&plan, &group, 1, &result, sizeof result, NULL);
    }
}

int main(void) {
    pthread_t threads[2];
    int names[2] = {0, 1};
    kvc_cache_counts counts;

    invented_handles();
    too_many_handles();
    garbage();

    shared_cache = toy_cache(64, 8);
    OK(kvc_pool_create(64, &shared_pool));
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_create(&threads[i], NULL, hammer, &names[i]) == 0);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(wrong_codes[i] == 0 && successes[i] > 0);
    }
    OK(kvc_cache_stats(shared_cache, &counts, sizeof counts));
    CHECK(counts.sequences == 0 && counts.looked_up_tokens == 2 * 300 * 30);
    OK(kvc_cache_destroy(shared_cache));
    OK(kvc_pool_destroy(shared_pool));
    return check_result();
}
