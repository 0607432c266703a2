// Chunked prefill with 64 channels a head.
#include "prefill.cuh"

KVC_PREFILL(f16, F16, 64)
KVC_PREFILL(bf16, Bf16, 64)
