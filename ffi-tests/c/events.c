// Events: a callback that keeps what it is told knows what the cache holds; what is refused.
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "toy_model.h"

#define MAX_BLOCKS 256

// What the callback knows. The lock is also what publishes it to the main thread.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    uint8_t digest[32];
    uint32_t first_token;
} known[MAX_BLOCKS];
static uint32_t known_count, cleared, events_seen, wrong;
static uint64_t last_seq;
static kvc_cache *cache;
static kvc_events *publishing;

static uint32_t find(const uint8_t *digest) {
    for (uint32_t i = 0; i < known_count; i++) {
        if (memcmp(known[i].digest, digest, 32) == 0) {
            return i;
        }
    }
    return MAX_BLOCKS;
}

static void take(void *user, const kvc_event *event) {
    kvc_cache_counts counts;
    kvc_events *own;
    pthread_mutex_lock(&lock);
    own = publishing;
    wrong += user != &known_count || event->struct_size < sizeof *event || event->seq < last_seq;
    last_seq = event->seq;
    events_seen += 1;
    if (event->kind == KVC_EVENT_CLEARED) {
        wrong += event->block_count != 0 || event->digests != NULL;
        known_count = 0;
        cleared += 1;
    }
    if (event->kind != KVC_EVENT_CLEARED) {
        wrong += event->medium != KVC_MEDIUM_GPU || event->group != 0;
    }
    if (event->kind == KVC_EVENT_STORED) {
        wrong += event->token_count != 16 * event->block_count || event->name_space != 7;
        wrong += event->parent != NULL && find(event->parent) == MAX_BLOCKS;
        for (uint64_t i = 0; i < event->block_count && known_count < MAX_BLOCKS; i++) {
            wrong += find(event->digests + 32 * i) != MAX_BLOCKS;
            memcpy(known[known_count].digest, event->digests + 32 * i, 32);
            known[known_count].first_token = event->tokens[16 * i];
            known_count += 1;
        }
    }
    if (event->kind == KVC_EVENT_REMOVED) {
        for (uint64_t i = 0; i < event->block_count; i++) {
            uint32_t at = find(event->digests + 32 * i);
            wrong += at == MAX_BLOCKS;
            if (at != MAX_BLOCKS) {
                known[at] = known[--known_count];
            }
        }
    }
    pthread_mutex_unlock(&lock);
    // The cache may be called from here, the publisher not ended.
    if (event->kind != KVC_EVENT_CLEARED) {
        wrong += kvc_cache_stats(cache, &counts, sizeof counts) != KVC_OK;
        wrong += own != NULL && kvc_events_destroy(own) != KVC_ERR_INVALID_STATE;
    }
}

// Waits until everything that was queued has been published.
static void settle(void) {
    kvc_events_counts counts;
    struct timespec pause = {0, 1000000};
    for (int i = 0; i < 20000; i++) {
        OK(kvc_events_stats(publishing, &counts, sizeof counts));
        if (counts.queued_events == 0 && counts.publishing == 0) {
            return;
        }
        nanosleep(&pause, NULL);
    }
    CHECK(!"published in time");
}

// Caches a prompt of `count` tokens that begins with `first`; its sequence is ended.
static void serve(kvc_step *step, uint32_t first, uint32_t count) {
    uint32_t prompt[512];
    uint32_t cached;
    kvc_seq seq;
    kvc_work work;
    for (uint32_t i = 0; i < count; i++) {
        prompt[i] = first + i / 16;
    }
    OK(kvc_seq_start(cache, prompt, count, 7, &seq, &cached));
    work.seq = seq;
    work.token_count = count - cached;
    work.tokens = prompt + cached;
    OK(kvc_step_begin(cache, step, &work, 1));
    OK(kvc_step_commit(cache, step));
    OK(kvc_seq_release(cache, seq));
    OK(kvc_cache_audit(cache));
}

int main(void) {
    kvc_cache_options sizes;
    kvc_events_options options;
    kvc_events_counts counts;
    kvc_cache_counts held;
    kvc_group_spec group = toy_group();
    kvc_step *step = NULL;
    kvc_events *second = NULL;
    char text[64];
    uint64_t length = 99;

    OK(kvc_cache_options_init(&sizes, sizeof sizes));
    sizes.blocks = 32;
    sizes.threads = 1;
    OK(kvc_cache_create(&sizes, &group, 1, &cache));
    OK(kvc_step_create(&step));
    FAILS(KVC_ERR_NULL_POINTER, "cache", kvc_events_describe(NULL, 7, "tenant", NULL));
    OK(kvc_events_describe(cache, 7, "tenant", "adapter"));
    OK(kvc_events_describe(cache, 7, NULL, NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "salt", kvc_events_describe(cache, 7, "\xff", NULL));
    {
        char longer[300];
        memset(longer, 'x', sizeof longer);
        FAILS(KVC_ERR_INVALID_ARGUMENT, "lora", kvc_events_describe(cache, 7, NULL, longer));
    }
    serve(step, 100, 100); // resident before anybody looks

    FAILS(KVC_ERR_INVALID_STATE, "cached", kvc_events_describe(cache, 7, "late", NULL));

    OK(kvc_events_options_init(&options, sizeof options));
    CHECK(options.encoding == KVC_ENCODING_MAP && options.keep_messages == 10000);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "options", kvc_events_create(cache, &options, &second));
    options.callback = take;
    options.user = &known_count;
    options.capacity_blocks = 31;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "capacity_blocks", kvc_events_create(cache, &options, &second));
    options.capacity_blocks = 0;
    options.remote = 2;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "remote", kvc_events_create(cache, &options, &second));
    options.remote = 0;
    options.encoding = 2;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "encoding", kvc_events_create(cache, &options, &second));
    options.encoding = KVC_ENCODING_ARRAY;
    FAILS(KVC_ERR_NULL_POINTER, "out", kvc_events_create(cache, &options, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "kvc_events_options", kvc_events_create(cache, NULL, &second));
    FAILS(KVC_ERR_NULL_POINTER, "cache", kvc_events_create(NULL, &options, &second));
    CHECK(second == NULL);

    // Where the library has sockets they bind; where it has none it says so.
    options.endpoint = "tcp://127.0.0.1:0";
    kvc_build_info(text, sizeof text);
    if (strstr(text, "zmq") != NULL) {
        options.replay_endpoint = "nonsense";
        FAILS(KVC_ERR_INVALID_ARGUMENT, "replay_endpoint",
              kvc_events_create(cache, &options, &second));
        options.replay_endpoint = "tcp://127.0.0.1:0";
    } else {
        FAILS(KVC_ERR_UNSUPPORTED, "zmq", kvc_events_create(cache, &options, &second));
        options.endpoint = NULL;
    }
    {
        kvc_events *made = NULL;
        OK(kvc_events_create(cache, &options, &made));
        pthread_mutex_lock(&lock);
        publishing = made;
        pthread_mutex_unlock(&lock);
    }
    FAILS(KVC_ERR_INVALID_STATE, "", kvc_events_create(cache, &options, &second));
    FAILS(KVC_ERR_NULL_POINTER, "out_len", kvc_events_endpoint(publishing, 0, text, 64, NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "replay", kvc_events_endpoint(publishing, 2, text, 64, &length));
    OK(kvc_events_endpoint(publishing, 1, text, sizeof text, &length));
    CHECK(length == strlen(text) && (length > 0) == (options.endpoint != NULL));

    // Many prompts, more than fit: blocks come and go.
    for (uint32_t round = 0; round < 40; round++) {
        serve(step, 100 + round % 7 * 1000, 60 + 16 * (round % 5));
    }
    settle();
    OK(kvc_cache_stats(cache, &held, sizeof held));
    pthread_mutex_lock(&lock);
    CHECK(known_count == held.cached_blocks && held.evicted_blocks > 0);
    CHECK(cleared == 1 && wrong == 0);
    pthread_mutex_unlock(&lock);

    // Everything again.
    OK(kvc_events_snapshot(publishing));
    settle();
    pthread_mutex_lock(&lock);
    CHECK(known_count == held.cached_blocks && cleared == 2 && wrong == 0);
    pthread_mutex_unlock(&lock);
    memset(&counts, 0x5A, sizeof counts);
    FAILS(KVC_ERR_STRUCT_SIZE, "out", kvc_events_stats(publishing, &counts, 8));
    OK(kvc_events_stats(publishing, &counts, sizeof counts));
    CHECK(counts.next_seq == last_seq + 1 && counts.queued_blocks == 0);
    CHECK(counts.capacity_blocks == 65536 && counts.dropped_events == 0 && counts.losses == 0);

    {
        kvc_events *ending = publishing;
        pthread_mutex_lock(&lock);
        publishing = NULL;
        pthread_mutex_unlock(&lock);
        OK(kvc_events_destroy(ending));
        FAILS(KVC_ERR_STALE_HANDLE, "events", kvc_events_destroy(ending));
        FAILS(KVC_ERR_STALE_HANDLE, "events", kvc_events_snapshot(ending));
        FAILS(KVC_ERR_STALE_HANDLE, "events", kvc_events_stats(ending, &counts, sizeof counts));
    }
    CHECK(known_count == 0 && cleared == 3 && wrong == 0);
    OK(kvc_events_destroy(NULL));

    // Another publisher of the same cache, which outlives it.
    OK(kvc_events_create(cache, &options, &second));
    OK(kvc_cache_destroy(cache));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_events_snapshot(second));
    OK(kvc_events_destroy(second));
    CHECK(known_count == 0 && cleared >= 4);
    OK(kvc_step_destroy(step));
    return check_result();
}
