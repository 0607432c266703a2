// The planner from C++, and published figures of Llama-2-70B.
#include <vector>

#include "../c/check.h"

static uint64_t bytes_of(uint32_t kv_heads) {
    kvc_plan_options options;
    OK(kvc_plan_options_init(&options, sizeof options));
    options.memory_bytes = uint64_t(80) << 30;
    options.context_tokens = 4096;
    std::vector<kvc_group_spec> groups(1);
    OK(kvc_group_spec_init(groups.data(), sizeof(kvc_group_spec)));
    groups[0].layers = 80;
    groups[0].kv_heads = kv_heads;
    groups[0].k_dim = groups[0].v_dim = 128;
    groups[0].format = KVC_FORMAT_F16;
    kvc_plan_result result;
    OK(kvc_plan_compute(&options, groups.data(), 1, &result, sizeof result, nullptr));
    return result.sequence_bytes;
}

int main() {
    CHECK(bytes_of(64) == uint64_t(10) << 30);
    CHECK(bytes_of(8) == uint64_t(5) << 28);
    return check_result();
}
