// Chunked prefill with 192 channels a head.
#include "prefill.cuh"

KVC_PREFILL(f16, F16, 192)
KVC_PREFILL(bf16, Bf16, 192)
