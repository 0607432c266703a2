// Multi-head latent attention decode, for up to 16 and up to 32 query columns at a time.
#include "mla.cuh"

// Blocks of the narrow kernel that a multiprocessor holds: those with 100 KB of shared memory one, which
// may then have all registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
#define KVC_MLA_BLOCKS 1
#else
#define KVC_MLA_BLOCKS 2
#endif

KVC_MLA(f16, F16, 16, KVC_MLA_BLOCKS)
KVC_MLA(f16, F16, 32, 1)
KVC_MLA(bf16, Bf16, 16, KVC_MLA_BLOCKS)
KVC_MLA(bf16, Bf16, 32, 1)
