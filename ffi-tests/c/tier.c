// Tiers: blocks go to the host, to a disk and to a store of this program's own, and come back with
// the bytes that they had; what is damaged or refused is a miss.
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "toy_model.h"

#define STORED 64
#define PROMPT (8 * 16 + 3)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    uint8_t key[32];
    uint64_t length;
    uint8_t *bytes;
} stored[STORED];
static uint32_t stored_count, damage, wrong;

static uint32_t find(const uint8_t *key) {
    for (uint32_t i = 0; i < stored_count; i++) {
        if (memcmp(stored[i].key, key, 32) == 0) {
            return i;
        }
    }
    return STORED;
}

static int32_t exists(void *user, const uint8_t *keys, uint64_t count, uint8_t *found) {
    pthread_mutex_lock(&lock);
    wrong += user != &stored;
    for (uint64_t i = 0; i < count; i++) {
        found[i] = find(keys + 32 * i) != STORED;
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

static void put(void *user, const kvc_tier_object *objects, uint64_t count, kvc_status *outcomes) {
    pthread_mutex_lock(&lock);
    wrong += user != &stored;
    for (uint64_t i = 0; i < count; i++) {
        if (stored_count == STORED) {
            outcomes[i] = KVC_ERR_OUT_OF_MEMORY;
            continue;
        }
        memcpy(stored[stored_count].key, objects[i].key, 32);
        stored[stored_count].length = objects[i].length;
        stored[stored_count].bytes = malloc(objects[i].length);
        memcpy(stored[stored_count].bytes, objects[i].bytes, objects[i].length);
        stored_count += 1;
        outcomes[i] = KVC_OK;
    }
    pthread_mutex_unlock(&lock);
}

static void get(void *user, const kvc_tier_object *objects, uint64_t count, kvc_status *outcomes) {
    pthread_mutex_lock(&lock);
    wrong += user != &stored;
    for (uint64_t i = 0; i < count; i++) {
        uint32_t at = find(objects[i].key);
        if (at == STORED) {
            outcomes[i] = KVC_ERR_BAD_BLOCK;
            continue;
        }
        wrong += stored[at].length != objects[i].length;
        memcpy(objects[i].bytes, stored[at].bytes, objects[i].length);
        ((uint8_t *)objects[i].bytes)[4100] ^= (uint8_t)damage;
        outcomes[i] = KVC_OK;
    }
    pthread_mutex_unlock(&lock);
}

static void forget(void *user, const uint8_t *keys, uint64_t count) {
    pthread_mutex_lock(&lock);
    wrong += user != &stored;
    for (uint64_t i = 0; i < count; i++) {
        uint32_t at = find(keys + 32 * i);
        if (at != STORED) {
            free(stored[at].bytes);
            stored[at] = stored[--stored_count];
        }
    }
    pthread_mutex_unlock(&lock);
}

static kvc_cache *fresh(const char *dir, const kvc_tier_store *store, uint64_t host_blocks) {
    kvc_cache_options sizes;
    kvc_tier_options options;
    kvc_group_spec group = toy_group();
    kvc_cache *cache = NULL;
    OK(kvc_cache_options_init(&sizes, sizeof sizes));
    sizes.blocks = 12;
    sizes.threads = 1;
    OK(kvc_cache_create(&sizes, &group, 1, &cache));
    OK(kvc_tier_options_init(&options, sizeof options));
    options.model = "toy";
    options.host_blocks = host_blocks;
    options.disk_dir = dir;
    options.disk_bytes = 1 << 20;
    options.store = store;
    OK(kvc_tier_attach(cache, &options));
    FAILS(KVC_ERR_INVALID_STATE, "tiers already", kvc_tier_attach(cache, &options));
    return cache;
}

// Serves a prompt whose tokens begin at `first`; how much of it was cached.
static uint32_t serve(kvc_cache *cache, uint32_t first) {
    uint32_t prompt[PROMPT], cached = 0;
    kvc_step *step = NULL;
    kvc_seq seq;
    kvc_work work;
    for (uint32_t i = 0; i < PROMPT; i++) {
        prompt[i] = first + i;
    }
    OK(kvc_step_create(&step));
    OK(kvc_seq_start(cache, prompt, PROMPT, 0, &seq, &cached));
    work.seq = seq;
    work.token_count = PROMPT - cached;
    work.tokens = prompt + cached;
    OK(kvc_step_begin(cache, step, &work, 1));
    OK(kvc_step_commit(cache, step));
    OK(kvc_seq_release(cache, seq));
    OK(kvc_step_destroy(step));
    return cached;
}

// The same by an engine that starts before its blocks are there; 1 where a layer never comes. `cached` is
// what it needed not compute.
static int onboard(kvc_cache *cache, uint32_t first, uint32_t *cached) {
    uint32_t prompt[PROMPT], there = 0, tokens = 0, failed = 0;
    kvc_onboard_progress progress;
    kvc_step *step = NULL;
    kvc_seq seq, child;
    kvc_work work;
    for (uint32_t i = 0; i < PROMPT; i++) {
        prompt[i] = first + i;
    }
    OK(kvc_step_create(&step));
    OK(kvc_onboard_start(cache, prompt, PROMPT, NULL, 0, 0, &seq, cached));
    OK(kvc_onboard_state(cache, seq, &progress, sizeof progress));
    work.seq = seq;
    work.token_count = PROMPT - *cached;
    work.tokens = prompt + *cached;
    OK(kvc_step_begin(cache, step, &work, 1));
    if (progress.state == KVC_ONBOARD_LOADING) {
        CHECK(progress.device_tokens + progress.loading_tokens == *cached && progress.why == 0);
        FAILS(KVC_ERR_INVALID_STATE, "loaded", kvc_step_commit(cache, step));
        FAILS(KVC_ERR_INVALID_STATE, "step", kvc_seq_fork(cache, seq, &child));
        FAILS(KVC_ERR_INVALID_STATE, "step", kvc_onboard_cancel(cache, seq, &tokens));
    } else {
        CHECK(progress.state == KVC_ONBOARD_COMPLETE && progress.loading_tokens == 0);
    }
    FAILS(KVC_ERR_INVALID_ARGUMENT, "layer", kvc_onboard_wait(cache, seq, 0, 99, 0, &there));
    for (uint32_t layer = 0; layer < LAYERS && !failed; layer++) {
        const kvc_status status = kvc_onboard_wait_step(cache, step, 0, layer, 60000, &there);
        if (status == KVC_ERR_LAYER_MISSING) {
            failed = 1;
            FAILS(KVC_ERR_LAYER_MISSING, "is not there",
                  kvc_onboard_wait(cache, seq, 0, layer, 0, &there));
        } else {
            OK(status);
            CHECK(there == 1);
            OK(kvc_onboard_wait(cache, seq, 0, layer, 0, &there));
            CHECK(there == 1);
        }
    }
    if (failed) {
        OK(kvc_onboard_state(cache, seq, &progress, sizeof progress));
        CHECK(progress.state == KVC_ONBOARD_FAILED && progress.why != 0);
        FAILS(KVC_ERR_LAYER_MISSING, "", kvc_step_commit(cache, step));
        OK(kvc_step_cancel(cache, step));
        FAILS(KVC_ERR_LAYER_MISSING, "", kvc_step_begin(cache, step, &work, 1));
        OK(kvc_onboard_cancel(cache, seq, cached));
        work.token_count = PROMPT - *cached;
        work.tokens = prompt + *cached;
        OK(kvc_step_begin(cache, step, &work, 1));
    }
    OK(kvc_step_commit(cache, step));
    OK(kvc_onboard_cancel(cache, seq, &tokens));
    CHECK(tokens == PROMPT);
    OK(kvc_seq_release(cache, seq));
    OK(kvc_step_destroy(step));
    OK(kvc_cache_audit(cache));
    return (int)failed;
}

static kvc_tier_decision load(kvc_cache *cache, uint32_t first) {
    uint32_t prompt[PROMPT], done = 0;
    kvc_tier_decision decision;
    kvc_prefetch *prefetch = NULL;
    for (uint32_t i = 0; i < PROMPT; i++) {
        prompt[i] = first + i;
    }
    OK(kvc_prefetch_create(cache, prompt, PROMPT, 0, &prefetch, &decision));
    OK(kvc_prefetch_wait(cache, prefetch, 60000, &done));
    CHECK(done == 1);
    OK(kvc_prefetch_destroy(prefetch));
    FAILS(KVC_ERR_STALE_HANDLE, "", kvc_prefetch_destroy(prefetch));
    return decision;
}

static kvc_tier_counts counts(kvc_cache *cache, uint32_t index, uint32_t kind) {
    kvc_tier_counts counts;
    OK(kvc_tier_stats(cache, index, &counts, sizeof counts));
    CHECK(counts.kind == kind);
    return counts;
}

int main(void) {
    char dir[] = "/tmp/kvcache-tier-XXXXXX";
    char command[256];
    kvc_tier_store store;
    kvc_tier_options options;
    kvc_cache *cache;
    kvc_tier_counts seen;
    uint32_t done = 0;

    CHECK(mkdtemp(dir) != NULL);
    OK(kvc_tier_store_init(&store, sizeof store));
    store.user = &stored;
    store.exists = exists, store.put = put, store.get = get, store.remove = forget;

    // The host alone: what the second prompt pushes out comes back.
    cache = fresh(NULL, NULL, 32);
    CHECK(serve(cache, 0) == 0);
    CHECK(serve(cache, 1000) == 0);
    CHECK(serve(cache, 0) == 8 * 16);
    CHECK(onboard(cache, 1000, &done) == 0 && done == 8 * 16);
    seen = counts(cache, 0, KVC_TIER_HOST);
    CHECK(seen.stored > 0 && seen.loaded > 0 && seen.load_bandwidth > 0);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "index", kvc_tier_stats(cache, 1, &seen, sizeof seen));
    OK(kvc_cache_destroy(cache));

    // Disk and store: a second cache finds what the first left; while a third may not have the
    // directory.
    cache = fresh(dir, &store, 0);
    CHECK(serve(cache, 0) == 0);
    OK(kvc_tier_flush(cache, 60000, &done));
    CHECK(done == 1);
    CHECK(counts(cache, 1, KVC_TIER_DISK).objects == 8);
    CHECK(counts(cache, 2, KVC_TIER_STORE).stored == 8 && stored_count == 8);
    {
        kvc_cache *other = NULL;
        kvc_group_spec group = toy_group();
        OK(kvc_cache_create(NULL, &group, 1, &other));
        OK(kvc_tier_options_init(&options, sizeof options));
        FAILS(KVC_ERR_NULL_POINTER, "model", kvc_tier_attach(other, &options));
        options.model = "toy";
        options.disk_dir = dir;
        FAILS(KVC_ERR_INVALID_STATE, "another process", kvc_tier_attach(other, &options));
        options.disk_dir = "/proc/nothing";
        FAILS(KVC_ERR_TIER_FAILED, "directory", kvc_tier_attach(other, &options));
        options.disk_dir = NULL;
        options.readers = 0;
        store.get = NULL;
        options.store = &store;
        FAILS(KVC_ERR_NULL_POINTER, "function", kvc_tier_attach(other, &options));
        store.get = get;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "readers", kvc_tier_attach(other, &options));
        options.readers = 2;
        {
            // An address that is none, before anything is done about the other tiers.
            char info[512];
            kvc_build_info(info, sizeof info);
            options.remote = "nowhere";
            options.disk_dir = "/proc/nothing";
            if (strstr(info, "remote") != NULL) {
                FAILS(KVC_ERR_INVALID_ARGUMENT, "address", kvc_tier_attach(other, &options));
                options.remote = "redis://127.0.0.1:1";
                options.remote_timeout_ms = 0;
                FAILS(KVC_ERR_INVALID_ARGUMENT, "timeout", kvc_tier_attach(other, &options));
                options.remote_timeout_ms = 5000;
            } else {
                FAILS(KVC_ERR_UNSUPPORTED, "remote store", kvc_tier_attach(other, &options));
            }
            options.remote = NULL;
            options.disk_dir = NULL;
            options.reserved = 1;
            FAILS(KVC_ERR_INVALID_ARGUMENT, "reserved", kvc_tier_attach(other, &options));
            options.reserved = 0;
        }
        options.slice_count = 1;
        options.slices = &(kvc_tier_slice){0, 2};
        OK(kvc_tier_attach(other, &options));
        OK(kvc_cache_destroy(other));
    }
    OK(kvc_cache_destroy(cache));
    // Layer by layer, from the disk that was opened anew.
    cache = fresh(dir, NULL, 0);
    CHECK(onboard(cache, 0, &done) == 0 && done == 8 * 16);
    CHECK(counts(cache, 1, KVC_TIER_DISK).loaded == 8);
    OK(kvc_cache_destroy(cache));
    cache = fresh(dir, NULL, 0);
    {
        kvc_tier_decision decision = load(cache, 0);
        CHECK(decision.found_blocks == 8 && decision.load_blocks == 8);
        CHECK(decision.why == KVC_WHY_COST_UNKNOWN && decision.device_tokens == 0);
    }
    CHECK(serve(cache, 0) == 8 * 16);
    CHECK(load(cache, 5000).why == KVC_WHY_NOTHING_FOUND);
    OK(kvc_cache_destroy(cache));

    // A store that damages what it gives: misses, counted, and forgotten.
    cache = fresh(NULL, &store, 0);
    load(cache, 0);
    CHECK(serve(cache, 0) == 8 * 16);
    OK(kvc_cache_destroy(cache));
    damage = 1;
    cache = fresh(NULL, &store, 0);
    load(cache, 0);
    CHECK(serve(cache, 0) == 0);
    seen = counts(cache, 1, KVC_TIER_STORE);
    CHECK(seen.bad == 8 && seen.loaded == 0);
    OK(kvc_cache_destroy(cache));
    CHECK(stored_count == 0 && wrong == 0);

    // A file that was damaged while nobody looked: the engine is told, and computes.
    snprintf(command, sizeof command, "for f in %s/*/segment-*; do tr '\\000' '\\001' < $f > $f.x; mv $f.x $f; done", dir);
    CHECK(system(command) == 0);
    cache = fresh(dir, NULL, 0);
    CHECK(onboard(cache, 0, &done) == 1 && done == 0);
    CHECK(serve(cache, 0) == 8 * 16);
    CHECK(counts(cache, 1, KVC_TIER_DISK).bad > 0);
    OK(kvc_cache_destroy(cache));

    snprintf(command, sizeof command, "rm -r %s", dir);
    CHECK(system(command) == 0);
    return check_result();
}
