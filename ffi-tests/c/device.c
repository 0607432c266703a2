// The device noun on a machine without one: what is missing is said, and what needs no device
// (options, workspace sizes, kernel names) works.
#include "check.h"

static void options_and_plans(void) {
    kvc_attend_desc desc;
    kvc_device_attend_options options;
    char name[64];
    uint64_t bytes = 0, longer = 0;

    OK(kvc_attend_desc_init(&desc, sizeof desc));
    OK(kvc_device_attend_options_init(&options, sizeof options));
    CHECK(options.struct_size == sizeof options && options.max_q_tokens == 1);
    desc.q_heads = 32;
    desc.kv_heads = 8;
    desc.k_dim = desc.v_dim = 128;
    desc.format = KVC_FORMAT_BF16;
    desc.q_dtype = desc.out_dtype = KVC_DTYPE_BF16;
    desc.block_tokens = 16;
    desc.seqs = 256;
    options.multiprocessors = 132;
    options.max_kv_tokens = 4096;
    OK(kvc_device_attend_workspace_size(NULL, &desc, &options, &bytes));
    CHECK(bytes > 0 && bytes % 256 == 0 && bytes < (12u << 20));
    // Balanced pieces are bounded by the device, fixed ones by the context.
    options.max_kv_tokens = 131072;
    OK(kvc_device_attend_workspace_size(NULL, &desc, &options, &longer));
    CHECK(longer == bytes);
    options.piece_tokens = 1024;
    OK(kvc_device_attend_workspace_size(NULL, &desc, &options, &longer));
    CHECK(longer > bytes);
    options.piece_tokens = 1000;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "pieces",
          kvc_device_attend_workspace_size(NULL, &desc, &options, &longer));
    options.piece_tokens = 0;

    OK(kvc_device_attend_kernel(NULL, &desc, &options, name, sizeof name));
    CHECK(strcmp(name, "kvc_decode_bf16_d128") == 0);
    FAILS(KVC_ERR_BUFFER_TOO_SMALL, "needed",
          kvc_device_attend_kernel(NULL, &desc, &options, name, 20));
    desc.k_dim = desc.v_dim = 72;
    FAILS(KVC_ERR_UNSUPPORTED, "", kvc_device_attend_kernel(NULL, &desc, &options, name, 64));
    desc.k_dim = desc.v_dim = 128;
    desc.format = KVC_FORMAT_F32;
    FAILS(KVC_ERR_UNSUPPORTED, "", kvc_device_attend_kernel(NULL, &desc, &options, name, 64));
    desc.format = KVC_FORMAT_INT8_T;
    OK(kvc_device_attend_kernel(NULL, &desc, &options, name, sizeof name));
    CHECK(strcmp(name, "kvc_decode_int8_t_d128") == 0);
    // As codes are stored, for the head dims that floats have; sealed tiles only in a cache.
    desc.k_dim = desc.v_dim = 256;
    OK(kvc_device_attend_kernel(NULL, &desc, &options, name, sizeof name));
    CHECK(strcmp(name, "kvc_decode_int8_t_d256") == 0);
    desc.k_dim = desc.v_dim = 160;
    FAILS(KVC_ERR_UNSUPPORTED, "format",
          kvc_device_attend_kernel(NULL, &desc, &options, name, 64));
    desc.k_dim = desc.v_dim = 128;
    desc.format = KVC_FORMAT_KT4V4;
    FAILS(KVC_ERR_UNSUPPORTED, "tiles",
          kvc_device_attend_kernel(NULL, &desc, &options, name, 64));
    desc.format = KVC_FORMAT_BF16;
    // More than eight query tokens are prefilled, without a workspace; the bound is that of smaller
    // calls, which are decoded.
    options.max_q_tokens = 512;
    OK(kvc_device_attend_kernel(NULL, &desc, &options, name, sizeof name));
    CHECK(strcmp(name, "kvc_prefill_bf16_d128") == 0);
    OK(kvc_device_attend_workspace_size(NULL, &desc, &options, &longer));
    CHECK(longer >= bytes);
    options.max_q_tokens = 0;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "q_len",
          kvc_device_attend_workspace_size(NULL, &desc, &options, &bytes));
    options.max_q_tokens = 1;
    // Without a number of multiprocessors there must be a device.
    options.multiprocessors = 0;
    FAILS(KVC_ERR_NULL_POINTER, "device",
          kvc_device_attend_workspace_size(NULL, &desc, &options, &bytes));
    FAILS(KVC_ERR_NULL_POINTER, "out_bytes",
          kvc_device_attend_workspace_size(NULL, &desc, &options, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "kvc_attend_desc",
          kvc_device_attend_workspace_size(NULL, NULL, &options, &bytes));
    options.struct_size = 4;
    FAILS(KVC_ERR_STRUCT_SIZE, "kvc_device_attend_options",
          kvc_device_attend_workspace_size(NULL, &desc, &options, &bytes));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_attend(NULL, &desc, NULL, NULL));
}

static void nothing_is_a_device(void) {
    kvc_device *device = NULL;
    kvc_device_facts facts;
    kvc_append_desc append;
    kvc_device_append_options more;
    kvc_device_copy_desc copy;
    kvc_device_rates rates;
    void *memory = NULL;
    char byte = 0;

    FAILS(KVC_ERR_NULL_POINTER, "out", kvc_device_open(KVC_DEVICE_CUDA, 0, NULL));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "device", kvc_device_open(7, 0, &device));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "CPU", kvc_device_open(KVC_DEVICE_CPU, 0, &device));
    FAILS(KVC_ERR_INVALID_ARGUMENT, "ordinal", kvc_device_open(KVC_DEVICE_EMU, 1, &device));
    CHECK(device == NULL);
    OK(kvc_device_close(NULL));
    FAILS(KVC_ERR_STALE_HANDLE, "device", kvc_device_close((kvc_device *)&byte));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_info(NULL, &facts, sizeof facts));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_name(NULL, &byte, 1));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_rates_read(NULL, &rates, sizeof rates));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_alloc(NULL, 16, &memory));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_free(NULL, &byte));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_upload(NULL, &byte, &byte, 1, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_download(NULL, &byte, &byte, 1, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_zero(NULL, &byte, 1, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_sync(NULL, NULL));
    OK(kvc_append_desc_init(&append, sizeof append));
    OK(kvc_device_append_options_init(&more, sizeof more));
    CHECK(more.rope_style == KVC_ROPE_HALVES);
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_append(NULL, &append, &more, NULL));
    OK(kvc_device_copy_desc_init(&copy, sizeof copy));
    CHECK(copy.planes == 1 && copy.runs == 1 && copy.count == 0);
    FAILS(KVC_ERR_NULL_POINTER, "device", kvc_device_copy(NULL, &copy, NULL));
}

// A GPU there may be or not; a library without its kernels, or a machine without it, says so.
static void a_gpu_if_there_is_one(void) {
    kvc_device *device = NULL;
    kvc_device_facts facts;
    kvc_cache_options options;
    kvc_device_rates rates;
    kvc_group_spec group;
    kvc_cache *cache = NULL;
    char name[128];
    kvc_status opened = kvc_device_open(KVC_DEVICE_CUDA, 0, &device);

    OK(kvc_cache_options_init(&options, sizeof options));
    CHECK(options.device == KVC_DEVICE_CPU && options.stream == NULL);
    OK(kvc_group_spec_init(&group, sizeof group));
    group.layers = 1;
    group.kv_heads = 1;
    group.k_dim = group.v_dim = 128;
    group.format = KVC_FORMAT_BF16;
    options.device = KVC_DEVICE_CUDA;
    if (opened == KVC_OK) {
        OK(kvc_device_info(device, &facts, sizeof facts));
        CHECK(facts.kind == KVC_DEVICE_CUDA && facts.multiprocessors > 0);
        OK(kvc_device_name(device, name, sizeof name));
        OK(kvc_cache_create(&options, &group, 1, &cache));
        OK(kvc_device_rates_read(device, &rates, sizeof rates));
        CHECK(rates.struct_size == sizeof rates && rates.memory_bytes > 0);
        OK(kvc_cache_set_device_rates(cache, &rates));
        OK(kvc_cache_sync(cache));
        OK(kvc_cache_destroy(cache));
        OK(kvc_device_close(device));
        FAILS(KVC_ERR_STALE_HANDLE, "device", kvc_device_info(device, &facts, sizeof facts));
    } else {
        CHECK(opened == KVC_ERR_NO_KERNELS || opened == KVC_ERR_NO_DEVICE);
        CHECK(device == NULL);
        CHECK(kvc_cache_create(&options, &group, 1, &cache) == opened && cache == NULL);
    }
    options.device = 9;
    FAILS(KVC_ERR_INVALID_ARGUMENT, "device", kvc_cache_create(&options, &group, 1, &cache));
    // A header of before the devices.
    options.device = 0;
    options.struct_size = 24;
    OK(kvc_cache_create(&options, &group, 1, &cache));
    OK(kvc_cache_sync(cache));
    // The CPU goes by no rates.
    OK(kvc_device_rates_init(&rates, sizeof rates));
    CHECK(rates.struct_size == sizeof rates && rates.multiprocessors == 0);
    FAILS(KVC_ERR_INVALID_STATE, "", kvc_cache_set_device_rates(cache, &rates));
    FAILS(KVC_ERR_NULL_POINTER, "kvc_device_rates", kvc_cache_set_device_rates(cache, NULL));
    rates.struct_size = 8;
    FAILS(KVC_ERR_STRUCT_SIZE, "kvc_device_rates", kvc_cache_set_device_rates(cache, &rates));
    rates.struct_size = sizeof rates;
    OK(kvc_cache_destroy(cache));
    FAILS(KVC_ERR_STALE_HANDLE, "cache", kvc_cache_set_device_rates(cache, &rates));
}

// Rows in device memory need a cache that is there.
static void a_cache_on_the_cpu_takes_no_device_rows(void) {
    kvc_group_spec group;
    kvc_cache *cache = NULL;
    kvc_step *step = NULL;
    kvc_seq seq = 0;
    uint32_t cached = 0, token = 1;
    kvc_work work;
    void *row = (void *)(uintptr_t)4096;

    OK(kvc_group_spec_init(&group, sizeof group));
    group.layers = 1;
    group.kv_heads = 1;
    group.k_dim = group.v_dim = 64;
    OK(kvc_cache_create(NULL, &group, 1, &cache));
    OK(kvc_step_create(&step));
    OK(kvc_seq_start(cache, &token, 1, 0, &seq, &cached));
    work.seq = seq;
    work.token_count = 1;
    work.tokens = &token;
    OK(kvc_step_begin(cache, step, &work, 1));
    FAILS(KVC_ERR_INVALID_STATE, "not on a device",
          kvc_step_append_device(cache, step, 0, 0, row, row, KVC_DTYPE_F16, NULL));
    FAILS(KVC_ERR_INVALID_STATE, "not on a device",
          kvc_step_attend_device(cache, step, 0, 0, 1, row, KVC_DTYPE_F16, row, KVC_DTYPE_F16,
                                 NULL, NULL));
    FAILS(KVC_ERR_NULL_POINTER, "k",
          kvc_step_append_device(cache, step, 0, 0, NULL, row, KVC_DTYPE_F16, NULL));
    FAILS(KVC_ERR_MISALIGNED, "q",
          kvc_step_attend_device(cache, step, 0, 0, 1, (char *)row + 2, KVC_DTYPE_F16, row,
                                 KVC_DTYPE_F16, NULL, NULL));
    OK(kvc_step_destroy(step));
    OK(kvc_cache_destroy(cache));
}

int main(void) {
    options_and_plans();
    nothing_is_a_device();
    a_gpu_if_there_is_one();
    a_cache_on_the_cpu_takes_no_device_rows();
    return check_result();
}
