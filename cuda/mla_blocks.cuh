// How many blocks of a narrow kernel of latent attention a multiprocessor holds.
#pragma once

// Those with 100 KB of shared memory one, which may then have all registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
#define KVC_MLA_BLOCKS 1
#else
#define KVC_MLA_BLOCKS 2
#endif
