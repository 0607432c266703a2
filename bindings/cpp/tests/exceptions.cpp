// The wrapper with exceptions: values come as they are, failures are thrown with code and text, and
// what was open when one passed through is ended.
#define KVCACHE_EXCEPTIONS 1
#include <array>
#include <vector>

#include "../../../ffi-tests/c/check.h"
#include "kvcache.hpp"

template <class F>
static void throws(int line, kvc_status code, const char *part, F f) {
    try {
        f();
    } catch (const kvcache::error &error) {
        if (error.code() != code || std::string(error.what()).find(part) == std::string::npos) {
            check_fail(__FILE__, line, "thrown", error.what());
        }
        return;
    }
    check_fail(__FILE__, line, "nothing", "was thrown");
}
#define THROWS(code, part, call) throws(__LINE__, code, part, [&] { call; })

int main() {
    kvcache::group_spec group;
    group.layers = group.kv_heads = 1;
    group.k_dim = group.v_dim = 8;
    kvcache::cache_options options;
    options.blocks = 4;
    options.threads = 1;
    kvcache::cache cache = kvcache::cache::create(group, options);
    kvcache::step step = kvcache::step::create();

    std::vector<uint32_t> tokens(100, 5);
    try {
        kvcache::sequence seq = cache.start(tokens).seq;
        const kvcache::work work = seq.work(tokens);
        step.begin(cache, kvcache::span<const kvcache::work>(&work, 1));
        check_fail(__FILE__, __LINE__, "7 blocks", "of 4");
    } catch (const kvcache::error &error) {
        CHECK(error.code() == kvcache::status::out_of_blocks && error.missing_blocks() == 3);
        // The text is the error's own: a later failure does not change it.
        const std::string text = error.message();
        CHECK(kvc_pool_create(0, nullptr) != KVC_OK && text == error.what());
    }
    CHECK(cache.stats().sequences == 0 && cache.stats().free_blocks == 4);

    {
        kvcache::sequence seq = cache.start(kvcache::span<const uint32_t>(tokens.data(), 10)).seq;
        const kvcache::work work = seq.work(kvcache::span<const uint32_t>(tokens.data(), 10));
        step.begin(cache, kvcache::span<const kvcache::work>(&work, 1));
        const std::vector<float> kv(80, 2.0f), q(80, 1.0f);
        std::vector<float> out(80);
        step.append(0, kv, kv);
        step.attend(0, 1, q, out);
        for (const float x : out) CHECK(x == 2.0f);
        step.commit();
        CHECK(seq.tokens() == 10 && seq.blocks(0) == 1);
    }
    THROWS(kvcache::status::invalid_argument, "blocks", (void)kvcache::pool::create(0));
    THROWS(kvcache::status::invalid_argument, "head_dim", kvcache::rope().rotate({}, 1, 8, tokens));
    THROWS(kvcache::status::invalid_state, "", step.commit());
    cache.audit();
    CHECK(cache.metrics_text().find("kvcache:") != std::string::npos);
    CHECK(kvcache::pool::create(4).stats().free_blocks == 4);
    step.close();
    cache.close();
    THROWS(kvcache::status::null_pointer, "", cache.audit());
    return check_result();
}
