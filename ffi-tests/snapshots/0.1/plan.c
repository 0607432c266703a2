// The memory planner, against published figures and by its own arithmetic.
#include "check.h"

#define GIB ((uint64_t)1 << 30)

static kvc_group_spec uniform(uint32_t layers, uint32_t kv_heads, uint32_t dim, uint32_t format) {
    kvc_group_spec group;
    OK(kvc_group_spec_init(&group, sizeof group));
    group.layers = layers;
    group.kv_heads = kv_heads;
    group.k_dim = group.v_dim = dim;
    group.format = format;
    return group;
}

int main(void) {
    kvc_plan_options options;
    kvc_plan_result result;
    kvc_plan_group parts[2];
    kvc_group_spec groups[2];

    OK(kvc_plan_options_init(&options, sizeof options));
    CHECK(options.block_tokens == 16 && options.batch == 1 && options.reserve_ppm == 100000);
    options.memory_bytes = 80 * GIB;
    options.weight_bytes = 14 * GIB;
    options.context_tokens = 4096;

    // Llama-2-7B at 4,096 tokens in fp16: 2.0 GiB.
    groups[0] = uniform(32, 32, 128, KVC_FORMAT_F16);
    OK(kvc_plan_compute(&options, groups, 1, &result, sizeof result, parts));
    CHECK(result.sequence_bytes == 2 * GIB && result.batch_bytes == 2 * GIB);
    CHECK(result.token_bytes == 524288 && result.fits == 1 && result.reserved == 0);
    CHECK(result.kv_bytes == 58 * GIB && result.max_batch == 29);
    CHECK(result.max_context_tokens == 29 * 4096);
    CHECK(parts[0].token_bytes == 524288 && parts[0].block_bytes == 16 * 524288);
    CHECK(parts[0].sequence_blocks == 256 && parts[0].blocks == 29 * 256);

    // Multi-head latent attention, 61 layers of 512 + 64: 70,272 bytes a token in bf16.
    OK(kvc_group_spec_init(&groups[0], sizeof groups[0]));
    CHECK(groups[0].format == KVC_FORMAT_BF16);
    groups[0].layers = 61;
    groups[0].kv_heads = 1;
    groups[0].k_dim = 576;
    groups[0].v_dim = 512;
    groups[0].v_in_k = 1;
    OK(kvc_plan_compute(&options, groups, 1, &result, sizeof result, NULL));
    CHECK(result.token_bytes == 70272);

    // Two groups, one with a window: whatever the context, it holds the window's blocks.
    groups[0] = uniform(6, 8, 128, KVC_FORMAT_BF16);
    groups[1] = uniform(30, 8, 128, KVC_FORMAT_BF16);
    groups[1].window = 1024;
    options.context_tokens = 131072;
    OK(kvc_plan_compute(&options, groups, 2, &result, sizeof result, parts));
    CHECK(parts[0].sequence_blocks == 8192 && parts[1].sequence_blocks == 65);
    CHECK(result.sequence_bytes ==
          8192 * parts[0].block_bytes + 65 * parts[1].block_bytes);
    groups[0].window = 1024;
    OK(kvc_plan_compute(&options, groups, 2, &result, sizeof result, parts));
    CHECK(result.max_context_tokens == UINT64_MAX);

    // Too much is an answer, not an error.
    groups[0] = uniform(80, 64, 128, KVC_FORMAT_F16);
    options.batch = 1000;
    OK(kvc_plan_compute(&options, groups, 1, &result, sizeof result, NULL));
    CHECK(result.fits == 0 && result.max_batch == 0);

    // Bad input changes nothing.
    {
        kvc_plan_result kept;
        kvc_plan_options bad = options;
        memset(&result, 0x5A, sizeof result);
        memset(&kept, 0x5A, sizeof kept);
        memset(parts, 0x5A, sizeof parts);
        FAILS(KVC_ERR_NULL_POINTER, "kvc_plan_options",
              kvc_plan_compute(NULL, groups, 1, &result, sizeof result, parts));
        FAILS(KVC_ERR_NULL_POINTER, "kvc_group_spec",
              kvc_plan_compute(&options, NULL, 1, &result, sizeof result, parts));
        FAILS(KVC_ERR_NULL_POINTER, "out",
              kvc_plan_compute(&options, groups, 1, NULL, sizeof result, parts));
        FAILS(KVC_ERR_INVALID_ARGUMENT, "group_count",
              kvc_plan_compute(&options, groups, 17, &result, sizeof result, parts));
        FAILS(KVC_ERR_STRUCT_SIZE, "out",
              kvc_plan_compute(&options, groups, 1, &result, 8, parts));
        groups[1] = groups[0];
        groups[1].struct_size = 4;
        FAILS(KVC_ERR_STRUCT_SIZE, "kvc_group_spec",
              kvc_plan_compute(&options, groups, 2, &result, sizeof result, parts));
        groups[0].k_dim = 20;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "k_dim",
              kvc_plan_compute(&options, groups, 1, &result, sizeof result, parts));
        groups[0].k_dim = 128;
        groups[0].format = 0;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "format",
              kvc_plan_compute(&options, groups, 1, &result, sizeof result, parts));
        groups[0].format = KVC_FORMAT_F32;
        bad.weight_bytes = 80 * GIB;
        FAILS(KVC_ERR_INVALID_ARGUMENT, "weight_bytes",
              kvc_plan_compute(&bad, groups, 1, &result, sizeof result, parts));
        bad = options;
        bad.context_tokens = UINT64_MAX;
        FAILS(KVC_ERR_OVERFLOW, "bytes",
              kvc_plan_compute(&bad, groups, 1, &result, sizeof result, parts));
        groups[0].layers = groups[0].kv_heads = UINT32_MAX;
        FAILS(KVC_ERR_OVERFLOW, "block_bytes",
              kvc_plan_compute(&options, groups, 1, &result, sizeof result, parts));
        CHECK(memcmp(&result, &kept, sizeof kept) == 0);
        CHECK(parts[0].blocks == 0x5A5A5A5A5A5A5A5A);
    }
    return check_result();
}
