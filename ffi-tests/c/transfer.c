// A sequence's blocks from one cache to another, through a file and through a socket.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"

enum { DIM = 16, HEADS = 2, PROMPT = 40, FULL = 32 };

static kvc_cache *fresh(uint32_t heads, uint32_t block_tokens) {
    kvc_cache *cache = NULL;
    kvc_cache_options sizes;
    kvc_group_spec group;
    OK(kvc_group_spec_init(&group, sizeof group));
    group.layers = 1;
    group.kv_heads = heads;
    group.k_dim = group.v_dim = DIM;
    group.format = KVC_FORMAT_F32;
    OK(kvc_cache_options_init(&sizes, sizeof sizes));
    sizes.blocks = 16;
    sizes.block_tokens = block_tokens;
    sizes.threads = 1;
    OK(kvc_cache_create(&sizes, &group, 1, &cache));
    return cache;
}

static float element(uint32_t token, uint32_t head, uint32_t channel) {
    return check_noise((token * HEADS + head) * DIM + channel);
}

// Serves the prompt, whose keys and values have `heads` heads from `first` on; how much of it was
// cached. The attention of its last token goes to `out`.
static uint32_t serve(kvc_cache *cache, uint32_t first, uint32_t heads, float *out, kvc_seq *kept) {
    static float rows[PROMPT * HEADS * DIM], q[PROMPT * HEADS * DIM], o[PROMPT * HEADS * DIM];
    uint32_t prompt[PROMPT], cached = 0;
    kvc_step *step = NULL;
    kvc_work work;
    for (uint32_t i = 0; i < PROMPT; i++) {
        prompt[i] = 7 * i;
    }
    OK(kvc_seq_start(cache, prompt, PROMPT, 0, kept, &cached));
    for (uint32_t t = cached; t < PROMPT; t++) {
        for (uint32_t h = 0; h < heads; h++) {
            for (uint32_t c = 0; c < DIM; c++) {
                uint32_t at = ((t - cached) * heads + h) * DIM + c;
                rows[at] = q[at] = element(t, first + h, c);
            }
        }
    }
    work.seq = *kept;
    work.token_count = PROMPT - cached;
    work.tokens = prompt + cached;
    OK(kvc_step_create(&step));
    OK(kvc_step_begin(cache, step, &work, 1));
    OK(kvc_step_append(cache, step, 0, 0, rows, rows, KVC_DTYPE_F32, NULL));
    OK(kvc_step_attend(cache, step, 0, 0, heads, q, KVC_DTYPE_F32, o, KVC_DTYPE_F32, NULL, NULL));
    memcpy(out, o + (PROMPT - 1 - cached) * heads * DIM, heads * DIM * sizeof *out);
    OK(kvc_step_commit(cache, step));
    OK(kvc_step_destroy(step));
    return cached;
}

// But for rounding: rows that were cached are computed by another kernel than those that were not.
static void same(const float *got, const float *expected, int count) {
    for (int i = 0; i < count; i++) {
        CHECK(check_close(got[i], expected[i], 1e-5f));
    }
}

struct sender {
    kvc_cache *cache;
    kvc_seq seq;
    int fd;
};

static void *send_blocks(void *of) {
    struct sender *sender = of;
    uint64_t tokens = 0;
    OK(kvc_transfer_export(sender->cache, sender->seq, "m", NULL, 0, sender->fd, &tokens));
    CHECK(tokens == FULL);
    return NULL;
}

int main(void) {
    float whole[HEADS * DIM], out[HEADS * DIM];
    uint64_t tokens = 0;
    kvc_seq seq, other;
    int ends[2], files[2];
    FILE *kept[2];
    kvc_cache *cache = fresh(HEADS, 16);
    CHECK(serve(cache, 0, HEADS, whole, &seq) == 0);

    // Over a socket, to a cache of other blocks.
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    struct sender sender = {cache, seq, ends[0]};
    pthread_t thread;
    pthread_create(&thread, NULL, send_blocks, &sender);
    kvc_cache *next = fresh(HEADS, 32);
    OK(kvc_transfer_import(next, 0, "m", NULL, 0, &ends[1], 1, &tokens));
    pthread_join(thread, NULL);
    CHECK(tokens == FULL);
    CHECK(serve(next, 0, HEADS, out, &other) == FULL);
    same(out, whole, HEADS * DIM);
    OK(kvc_cache_destroy(next));

    // A peer that has gone is an error, and no signal that ends the program.
    close(ends[1]);
    FAILS(KVC_ERR_TIER_FAILED, "stream", kvc_transfer_export(cache, seq, "m", NULL, 0, ends[0], &tokens));
    close(ends[0]);

    // Through files: one head each, put together again.
    for (int i = 0; i < 2; i++) {
        kept[i] = tmpfile();
        CHECK(kept[i] != NULL);
        files[i] = fileno(kept[i]);
        kvc_tier_slice part = {0, (uint32_t)i};
        kvc_cache *half = fresh(1, 16);
        CHECK(serve(half, (uint32_t)i, 1, out, &other) == 0);
        same(out, whole + i * DIM, DIM);
        OK(kvc_transfer_export(half, other, "m", &part, 1, files[i], &tokens));
        CHECK(tokens == FULL && lseek(files[i], 0, SEEK_SET) == 0);
        OK(kvc_cache_destroy(half));
    }
    next = fresh(HEADS, 16);
    tokens = 99;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "all layers and heads",
          kvc_transfer_import(next, 0, "m", NULL, 0, files, 1, &tokens));
    lseek(files[0], 0, SEEK_SET);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "model", kvc_transfer_import(next, 0, "n", NULL, 0, files, 2, &tokens));
    lseek(files[0], 0, SEEK_SET);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "namespace",
          kvc_transfer_import(next, 5, "m", NULL, 0, files, 2, &tokens));
    lseek(files[0], 0, SEEK_SET), lseek(files[1], 0, SEEK_SET);
    OK(kvc_transfer_import(next, 0, "m", NULL, 0, files, 2, &tokens));
    CHECK(tokens == FULL);
    CHECK(serve(next, 0, HEADS, out, &other) == FULL);
    same(out, whole, HEADS * DIM);

    // Read to the end, so that there is no more; cut off; damaged.
    FAILS(KVC_ERR_TIER_FAILED, "stream", kvc_transfer_import(next, 0, "m", NULL, 0, files, 2, &tokens));
    off_t length = lseek(files[1], 0, SEEK_END);
    CHECK(ftruncate(files[1], length - 1) == 0);
    lseek(files[0], 0, SEEK_SET), lseek(files[1], 0, SEEK_SET);
    OK(kvc_cache_clear_prefix(next));
    FAILS(KVC_ERR_TIER_FAILED, "stream", kvc_transfer_import(next, 0, "m", NULL, 0, files, 2, &tokens));
    char wrong = 77;
    CHECK(pwrite(files[0], &wrong, 1, 900) == 1);
    lseek(files[0], 0, SEEK_SET), lseek(files[1], 0, SEEK_SET);
    FAILS(KVC_ERR_INVALID_ARGUMENT, "stream", kvc_transfer_import(next, 0, "m", NULL, 0, files, 2, &tokens));
    OK(kvc_cache_audit(next));
    CHECK(tokens == FULL);

    // Bad input.
    FAILS(KVC_ERR_NULL_POINTER, "model", kvc_transfer_export(cache, seq, NULL, NULL, 0, 1, &tokens));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "fd", kvc_transfer_export(cache, seq, "m", NULL, 0, -1, &tokens));
    FAILS(KVC_ERR_TIER_FAILED, "stream", kvc_transfer_export(cache, seq, "m", NULL, 0, 1000000, &tokens));
    FAILS(KVC_ERR_NULL_POINTER, "out_tokens", kvc_transfer_export(cache, seq, "m", NULL, 0, 1, NULL));
    FAILS(KVC_ERR_STALE_HANDLE, "", kvc_transfer_export(cache, seq + 1000, "m", NULL, 0, files[0], &tokens));
    kvc_tier_slice parts[2] = {{0, 0}, {0, 0}};
    FAILS(KVC_ERR_INVALID_ARGUMENT, "slice_count",
          kvc_transfer_export(cache, seq, "m", parts, 2, files[0], &tokens));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "streams", kvc_transfer_import(next, 0, "m", NULL, 0, NULL, 0, &tokens));
    FAILS(KVC_ERR_NULL_POINTER, "fds", kvc_transfer_import(next, 0, "m", NULL, 0, NULL, 1, &tokens));
    int bad[1] = {-1};
    FAILS(KVC_ERR_INVALID_ARGUMENT, "fd", kvc_transfer_import(next, 0, "m", NULL, 0, bad, 1, &tokens));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "fd_count",
          kvc_transfer_import(next, 0, "m", NULL, 0, bad, 5000, &tokens));
    FAILS(KVC_ERR_NULL_POINTER, "cache", kvc_transfer_import(NULL, 0, "m", NULL, 0, files, 1, &tokens));

    fclose(kept[0]);
    fclose(kept[1]);
    OK(kvc_cache_destroy(next));
    OK(kvc_cache_destroy(cache));
    return check_result();
}
