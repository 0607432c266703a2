// Structs that grow: a program of the past gives fewer bytes, one of the future more. For each of
// them: sizes that the library accepts, what it writes and what it leaves alone, and what it says of
// bytes that it does not know.
#include <stdlib.h>

#include "check.h"

enum { MORE = 48, GUARD = 0xA5 };

typedef kvc_status (*init_fn)(void *, uint32_t);

#define GROWING(type)                                                       \
    static kvc_status init_##type(void *at, uint32_t size) {                \
        return type##_init((type *)at, size);                               \
    }
GROWING(kvc_group_spec)
GROWING(kvc_plan_options)
GROWING(kvc_attend_desc)
GROWING(kvc_append_desc)
GROWING(kvc_rope)
GROWING(kvc_prefix_batch)
GROWING(kvc_prefix_options)
GROWING(kvc_cache_options)
GROWING(kvc_scoring)
GROWING(kvc_device_attend_options)
GROWING(kvc_device_append_options)
GROWING(kvc_device_merge_desc)
GROWING(kvc_device_lookup_desc)
GROWING(kvc_device_cascade_query)
GROWING(kvc_device_copy_desc)
GROWING(kvc_events_options)
GROWING(kvc_scales)
GROWING(kvc_tile_view)
GROWING(kvc_seal_desc)
GROWING(kvc_tier_store)
GROWING(kvc_tier_options)

#define ENTRY(type) {#type, sizeof(type), init_##type}
static const struct {
    const char *name;
    uint32_t size;
    init_fn init;
} STRUCTS[] = {
    ENTRY(kvc_group_spec),
    ENTRY(kvc_plan_options),
    ENTRY(kvc_attend_desc),
    ENTRY(kvc_append_desc),
    ENTRY(kvc_rope),
    ENTRY(kvc_prefix_batch),
    ENTRY(kvc_prefix_options),
    ENTRY(kvc_cache_options),
    ENTRY(kvc_scoring),
    ENTRY(kvc_device_attend_options),
    ENTRY(kvc_device_append_options),
    ENTRY(kvc_device_merge_desc),
    ENTRY(kvc_device_lookup_desc),
    ENTRY(kvc_device_cascade_query),
    ENTRY(kvc_device_copy_desc),
    ENTRY(kvc_events_options),
    ENTRY(kvc_scales),
    ENTRY(kvc_tile_view),
    ENTRY(kvc_seal_desc),
    ENTRY(kvc_tier_store),
    ENTRY(kvc_tier_options),
};

// Whether `n` bytes at `at` are all `value`.
static int all(const unsigned char *at, size_t n, unsigned char value) {
    size_t i;
    for (i = 0; i < n; i++) {
        if (at[i] != value) {
            return 0;
        }
    }
    return 1;
}

static void sizes(const char *name, uint32_t size, init_fn init) {
    const uint32_t room = size + MORE;
    unsigned char *now = malloc(size);
    unsigned char *other = malloc(room);
    uint32_t given;
    int accepted = 0;
    if (now == NULL || other == NULL) {
        exit(2);
    }
    OK(init(now, size));
    for (given = 0; given <= room; given++) {
        kvc_status status;
        uint32_t said;
        memset(other, GUARD, room);
        status = init(other, given);
        // Once a size is accepted, so is every larger one that is aligned.
        if (status != KVC_OK) {
            CHECK(status == KVC_ERR_STRUCT_SIZE);
            CHECK(all(other, room, GUARD));
            CHECK(!accepted || given % 8 != 0);
            continue;
        }
        accepted = 1;
        memcpy(&said, other, sizeof said);
        CHECK(said == given);
        // The defaults are those of today, as far as the program knows the fields.
        CHECK(memcmp(other + 4, now + 4, (given < size ? given : size) - 4) == 0);
        CHECK(given <= size || all(other + size, given - size, 0));
        CHECK(all(other + given, room - given, GUARD));
    }
    if (!accepted) {
        check_fail(__FILE__, __LINE__, name, "was accepted with no size");
    }
    free(now);
    free(other);
}

// A struct of the next version, which has one more field.
typedef struct {
    kvc_group_spec known;
    uint64_t later;
} next_group_spec;
typedef struct {
    kvc_cache_options known;
    uint64_t later;
} next_cache_options;
typedef struct {
    kvc_prefix_options known;
    uint64_t later;
} next_prefix_options;

static void used(void) {
    next_group_spec groups[2];
    next_cache_options options;
    next_prefix_options index;
    kvc_plan_options plan;
    kvc_plan_result result;
    kvc_cache *cache = NULL;
    kvc_prefix *prefix = NULL;
    uint32_t i;
    for (i = 0; i < 2; i++) {
        OK(kvc_group_spec_init(&groups[i].known, sizeof groups[i]));
        groups[i].known.layers = groups[i].known.kv_heads = 1;
        groups[i].known.k_dim = groups[i].known.v_dim = 8;
    }
    // Two of the larger structs lie as far apart as they say.
    OK(kvc_plan_options_init(&plan, sizeof plan));
    plan.memory_bytes = 1 << 20;
    plan.context_tokens = 16;
    OK(kvc_plan_compute(&plan, &groups[0].known, 2, &result, sizeof result, NULL));
    CHECK(result.token_bytes == 2 * 2 * 8 * 2);
    groups[1].later = 1;
    FAILS(KVC_ERR_STRUCT_SIZE, "",
          kvc_plan_compute(&plan, &groups[0].known, 2, &result, sizeof result, NULL));
    groups[1].later = 0;

    OK(kvc_cache_options_init(&options.known, sizeof options));
    options.known.blocks = 4;
    OK(kvc_cache_create(&options.known, &groups[0].known, 2, &cache));
    OK(kvc_cache_destroy(cache));
    // What this library does not know, it does not ignore.
    options.later = 1;
    FAILS(KVC_ERR_STRUCT_SIZE, "", kvc_cache_create(&options.known, &groups[0].known, 2, &cache));

    OK(kvc_prefix_options_init(&index.known, sizeof index));
    OK(kvc_prefix_create_with(&index.known, &prefix));
    OK(kvc_prefix_destroy(prefix));
    index.later = 1;
    FAILS(KVC_ERR_STRUCT_SIZE, "", kvc_prefix_create_with(&index.known, &prefix));
}

// Structs that the library writes: as much as it knows, and nothing past it.
static void written(void) {
    struct {
        kvc_pool_counts counts;
        unsigned char later[MORE];
    } out;
    kvc_pool *pool = NULL;
    OK(kvc_pool_create(7, &pool));
    memset(&out, GUARD, sizeof out);
    // Fewer than the first version had are too few, and nothing is written.
    FAILS(KVC_ERR_STRUCT_SIZE, "too small", kvc_pool_stats(pool, &out.counts, 8));
    CHECK(all((const unsigned char *)&out, sizeof out, GUARD));
    OK(kvc_pool_stats(pool, &out.counts, sizeof out));
    CHECK(out.counts.blocks == 7 && out.counts.free_blocks == 7);
    CHECK(all(out.later, MORE, 0) || all(out.later, MORE, GUARD));
    OK(kvc_pool_destroy(pool));
}

int main(void) {
    size_t i;
    for (i = 0; i < sizeof STRUCTS / sizeof *STRUCTS; i++) {
        sizes(STRUCTS[i].name, STRUCTS[i].size, STRUCTS[i].init);
    }
    used();
    written();
    return check_result();
}
