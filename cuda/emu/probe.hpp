// What every kernel that tests the emulator takes.
#pragma once
#include <stdint.h>

// Words in, words out, a mode, and a number.
struct kvc_probe_params {
    const uint32_t *in;
    uint32_t *out;
    uint32_t mode;
    uint32_t n;
};
