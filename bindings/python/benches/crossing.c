// The calls of crossing.py in C loops: what they cost without Python. Functions and handles come as
// arguments, so this is compiled without the library.
#include <kvcache.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

double refs(kvc_status (*call)(const kvc_pool *, int32_t, uint32_t *), kvc_pool *pool, int32_t block,
            uint32_t turns) {
    uint32_t count;
    double start = now();
    for (uint32_t i = 0; i < turns; i++)
        if (call(pool, block, &count)) return -1;
    return (now() - start) / turns;
}

double step(kvc_status (*begin)(kvc_cache *, kvc_step *, const kvc_work *, uint32_t),
            kvc_status (*cancel)(kvc_cache *, kvc_step *), kvc_cache *cache, kvc_step *step,
            const kvc_work *work, uint32_t count, uint32_t turns) {
    double start = now();
    for (uint32_t i = 0; i < turns; i++)
        if (begin(cache, step, work, count) || cancel(cache, step)) return -1;
    return (now() - start) / turns;
}

double append(kvc_status (*call)(kvc_cache *, const kvc_step *, uint32_t, uint32_t, const void *,
                                 const void *, uint32_t, const kvc_rope *),
              kvc_cache *cache, kvc_step *step, const void *k, const void *v, uint32_t turns) {
    double start = now();
    for (uint32_t i = 0; i < turns; i++)
        if (call(cache, step, 0, 0, k, v, KVC_DTYPE_F32, NULL)) return -1;
    return (now() - start) / turns;
}

double attend(kvc_status (*call)(kvc_cache *, const kvc_step *, uint32_t, uint32_t, uint32_t,
                                 const void *, uint32_t, void *, uint32_t, const kvc_scoring *, float *),
              kvc_cache *cache, kvc_step *step, const void *q, void *out, uint32_t turns) {
    double start = now();
    for (uint32_t i = 0; i < turns; i++)
        if (call(cache, step, 0, 0, 1, q, KVC_DTYPE_F32, out, KVC_DTYPE_F32, NULL, NULL)) return -1;
    return (now() - start) / turns;
}
