// The header from C++: it links, and its types are ordinary ones.
#include <string>
#include <type_traits>

#include "../c/check.h"

static_assert(std::is_same<kvc_status, int32_t>::value, "a status is an int32");

int main() {
    kvc_abi_0_1();
    CHECK(kvc_abi_version() == KVC_ABI_VERSION);
    std::string line(kvc_build_info(nullptr, 0), '\0');
    CHECK(kvc_build_info(&line[0], line.size() + 1) == line.size());
    CHECK(line.rfind("libkvcache ", 0) == 0);
    return check_result();
}
