/* ggml's flash attention, which llama.cpp runs on a CPU, as a peer of the bench `tiles`.
 *
 * Reads a line a command on stdin and answers each with one line:
 *
 *   kinds                       answers its name and the types of K and V that there are
 *   decode TYPE SEQS TOKENS     builds one query token for each sequence, 32 query and 8 KV heads of 128
 *                               channels, K and V of TYPE (f16, q8_0 or q4_0), rows head by head, which
 *                               is its fastest layout; answers the bytes of K and V of a token and the largest
 *                               difference from attention over f32 rows, of one head
 *   run INDEX THREADS           runs what the INDEX-th `decode` built; answers the seconds it took
 *
 * scripts/ggml.sh builds it. K and V lie in huge pages where the system has them, as ours do. */
#include <ggml-cpu.h>
#include <ggml.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { DIM = 128, Q_HEADS = 32, KV_HEADS = 8, GROUP = Q_HEADS / KV_HEADS, MOST = 8 };

struct decode {
    struct ggml_cgraph *graph;
    struct ggml_tensor *out;
};

static void stop(const char *why) {
    fprintf(stderr, "ggml.c: %s\n", why);
    exit(1);
}

static void *huge_pages(size_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) stop("no memory");
    madvise(at, bytes, MADV_HUGEPAGE);
    return at;
}

/* SplitMix64 of `i`: numbers in -1 to 1. */
static float number(uint64_t i) {
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    return (float)(x >> 40) / (float)(1 << 23) - 1.0f;
}

/* Rows of numbers from `seed` on in a tensor's type. */
static void fill(struct ggml_tensor *tensor, uint64_t seed) {
    float row[DIM];
    const int64_t rows = ggml_nrows(tensor);
    const size_t bytes = ggml_row_size(tensor->type, DIM);
    for (int64_t r = 0; r < rows; ++r) {
        for (int c = 0; c < DIM; ++c) row[c] = number(seed + (uint64_t)r * DIM + c);
        char *to = (char *)tensor->data + (size_t)r * bytes;
        if (tensor->type == GGML_TYPE_F32)
            memcpy(to, row, sizeof row);
        else
            ggml_quantize_chunk(tensor->type, row, to, 0, 1, DIM, NULL);
    }
}

/* The last head of the last sequence, in double precision over the rows before they were quantised. */
static double difference(const struct decode *d, uint64_t seqs, uint64_t tokens) {
    const uint64_t seq = seqs - 1, head = Q_HEADS - 1, kv = seq * KV_HEADS + head / GROUP;
    const float *got = (const float *)d->out->data + (seq * Q_HEADS + head) * DIM;
    double sum = 0, want[DIM] = {0}, worst = 0;
    for (uint64_t t = 0; t < tokens; ++t) {
        const uint64_t row = (kv * tokens + t) * DIM;
        double score = 0;
        for (uint64_t c = 0; c < DIM; ++c)
            score += (double)number((1u << 30) + (seq * Q_HEADS + head) * DIM + c) *
                     number((2ull << 40) + row + c);
        /* Scores are small: 128 products of numbers below 1, over the root of 128. */
        const double weight = exp(score / sqrt(DIM));
        sum += weight;
        for (uint64_t c = 0; c < DIM; ++c) want[c] += weight * number((3ull << 40) + row + c);
    }
    for (int c = 0; c < DIM; ++c) worst = fmax(worst, fabs(want[c] / sum - got[c]));
    return worst;
}

static double seconds(const struct decode *d, int threads) {
    struct ggml_cplan plan = ggml_graph_plan(d->graph, threads, NULL);
    uint8_t *work = plan.work_size ? malloc(plan.work_size) : NULL;
    if (plan.work_size && !work) stop("no memory");
    plan.work_data = work;
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    if (ggml_graph_compute(d->graph, &plan) != GGML_STATUS_SUCCESS) stop("ggml failed");
    clock_gettime(CLOCK_MONOTONIC, &to);
    free(work);
    return (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
}

static struct decode build(enum ggml_type type, int64_t seqs, int64_t tokens) {
    const size_t rows = ggml_row_size(type, DIM) * (size_t)(tokens * KV_HEADS * seqs);
    const size_t bytes = 2 * rows + (64u << 20);
    const struct ggml_init_params memory = {bytes, huge_pages(bytes), false};
    struct ggml_context *context = ggml_init(memory);
    if (!context) stop("no context");
    struct ggml_tensor *q = ggml_new_tensor_4d(context, GGML_TYPE_F32, DIM, 1, Q_HEADS, seqs);
    struct ggml_tensor *k = ggml_new_tensor_4d(context, type, DIM, tokens, KV_HEADS, seqs);
    struct ggml_tensor *v = ggml_new_tensor_4d(context, type, DIM, tokens, KV_HEADS, seqs);
    fill(q, 1u << 30);
    fill(k, 2ull << 40);
    fill(v, 3ull << 40);
    struct decode d;
    d.out = ggml_flash_attn_ext(context, q, k, v, NULL, 1.0f / sqrtf(DIM), 0.0f, 0.0f);
    d.graph = ggml_new_graph(context);
    ggml_build_forward_expand(d.graph, d.out);
    return d;
}

int main(void) {
    struct decode built[MOST];
    int count = 0;
    char line[128], name[16];
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (fgets(line, sizeof line, stdin)) {
        long long seqs, tokens;
        int index, threads;
        if (!strcmp(line, "kinds\n")) {
            puts("ggml f16 q8_0 q4_0");
        } else if (sscanf(line, "decode %15s %lld %lld", name, &seqs, &tokens) == 3) {
            const enum ggml_type type = !strcmp(name, "f16")    ? GGML_TYPE_F16
                                        : !strcmp(name, "q8_0") ? GGML_TYPE_Q8_0
                                        : !strcmp(name, "q4_0") ? GGML_TYPE_Q4_0
                                                                : GGML_TYPE_COUNT;
            if (type == GGML_TYPE_COUNT || count == MOST || seqs < 1 || tokens < 1) stop("bad case");
            built[count] = build(type, seqs, tokens);
            seconds(&built[count], 1);
            printf("%zu %g\n", 2 * KV_HEADS * ggml_row_size(type, DIM),
                   difference(&built[count], (uint64_t)seqs, (uint64_t)tokens));
            ++count;
        } else if (sscanf(line, "run %d %d", &index, &threads) == 2 && index >= 0 && index < count) {
            printf("%.9f\n", seconds(&built[index], threads));
        } else {
            stop("what is asked is `decode` or `run`");
        }
    }
    return 0;
}
