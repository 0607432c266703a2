// The decode kernels: the plan, and one instance for each cache type and head dimension.
#include "decode.cuh"

KVC_KERNEL(kvc_decode_plan, kvc_decode_plan_params, 256, 1) { kvc::decode_plan(p); }

#define KVC_DECODE(type, Type, dim, blocks)                                              \
    KVC_KERNEL(kvc_decode_##type##_d##dim, kvc_decode_params, 128, blocks) {             \
        kvc::decode<kvc::Type, dim>(p);                                                  \
    }
KVC_DECODE(f16, F16, 64, 3)
KVC_DECODE(f16, F16, 128, 2)
KVC_DECODE(bf16, Bf16, 64, 3)
KVC_DECODE(bf16, Bf16, 128, 2)
