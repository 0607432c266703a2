// Chunked prefill with 128 channels a head.
#include "prefill.cuh"

KVC_PREFILL(f16, F16, 128)
KVC_PREFILL(bf16, Bf16, 128)
