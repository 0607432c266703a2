// The cache from C++: a second sequence with the same prompt computes only what is new.
#include <memory>
#include <vector>

#include "../c/check.h"

struct End {
    void operator()(kvc_cache *cache) const { OK(kvc_cache_destroy(cache)); }
    void operator()(kvc_step *step) const { OK(kvc_step_destroy(step)); }
};

int main() {
    kvc_group_spec group;
    OK(kvc_group_spec_init(&group, sizeof group));
    group.layers = 1;
    group.kv_heads = 1;
    group.k_dim = group.v_dim = 8;
    kvc_cache_options options;
    OK(kvc_cache_options_init(&options, sizeof options));
    options.blocks = 16;
    options.threads = 1;
    kvc_cache *raw_cache = nullptr;
    kvc_step *raw_step = nullptr;
    OK(kvc_cache_create(&options, &group, 1, &raw_cache));
    OK(kvc_step_create(&raw_step));
    std::unique_ptr<kvc_cache, End> cache(raw_cache);
    std::unique_ptr<kvc_step, End> step(raw_step);

    std::vector<uint32_t> prompt(50, 3);
    for (uint32_t expected : {0u, 48u}) {
        kvc_seq seq = 0;
        uint32_t cached = 0;
        OK(kvc_seq_start(cache.get(), prompt.data(), prompt.size(), 0, &seq, &cached));
        CHECK(cached == expected);
        const uint32_t rows = 50 - cached;
        const kvc_work work{seq, rows, prompt.data() + cached};
        OK(kvc_step_begin(cache.get(), step.get(), &work, 1));
        std::vector<float> kv(rows * 8, 1.0f), q(rows * 16, 1.0f), out(rows * 16);
        OK(kvc_step_append(cache.get(), step.get(), 0, 0, kv.data(), kv.data(), KVC_DTYPE_F32,
                           nullptr));
        OK(kvc_step_attend(cache.get(), step.get(), 0, 0, 2, q.data(), KVC_DTYPE_F32, out.data(),
                           KVC_DTYPE_F32, nullptr, nullptr));
        // All values are 1, and so is their mean.
        for (float x : out) {
            CHECK(check_close(x, 1.0f, 1e-6f));
        }
        OK(kvc_step_commit(cache.get(), step.get()));
        OK(kvc_seq_release(cache.get(), seq));
    }
    return check_result();
}
