// Chunked prefill over rows of codes with 256 channels a head.
#include "prefill_token.cuh"

KVC_PREFILL_TOKEN(fp8_e4m3, Fp8E4m3Rows, 256)
KVC_PREFILL_TOKEN(fp8_e5m2, Fp8E5m2Rows, 256)
KVC_PREFILL_TOKEN(int8_t, Int8Rows, 256)
KVC_PREFILL_TOKEN(int4_t, Int4Rows, 256)
KVC_PREFILL_TOKEN(nvfp4, Nvfp4Rows, 256)
