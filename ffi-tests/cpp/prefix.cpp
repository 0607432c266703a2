// The prefix index from C++: what one tenant caches, another does not see.
#include <memory>
#include <numeric>
#include <vector>

#include "../c/check.h"

struct PrefixEnd {
    void operator()(kvc_prefix *prefix) const { OK(kvc_prefix_destroy(prefix)); }
};

int main() {
    kvc_prefix *raw = nullptr;
    OK(kvc_prefix_create(16, 1, 1000, &raw));
    std::unique_ptr<kvc_prefix, PrefixEnd> prefix(raw);
    std::vector<uint32_t> tokens(160);
    std::iota(tokens.begin(), tokens.end(), 5u);
    std::vector<int32_t> blocks(10), found(10, -7);
    std::iota(blocks.begin(), blocks.end(), 100);
    kvc_prefix_inserted inserted;
    OK(kvc_prefix_insert(prefix.get(), 1, tokens.data(), tokens.size(), blocks.data(),
                         blocks.size(), nullptr, 0, &inserted));
    CHECK(inserted.stored_blocks == 10);
    kvc_prefix_hit hit;
    for (uint64_t tenant = 0; tenant < 3; tenant++) {
        OK(kvc_prefix_lookup(prefix.get(), tenant, tokens.data(), tokens.size(), tokens.size() - 1,
                             found.data(), found.size(), nullptr, &hit));
        CHECK(hit.tokens == (tenant == 1 ? 144u : 0u));
    }
    CHECK(found[8] == 108 && found[9] == -7);
    return check_result();
}
