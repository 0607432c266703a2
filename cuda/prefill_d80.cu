// Chunked prefill with 80 channels a head.
#include "prefill.cuh"

KVC_PREFILL(f16, F16, 80)
KVC_PREFILL(bf16, Bf16, 80)
