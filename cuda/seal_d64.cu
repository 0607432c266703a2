// Sealing of tiles with 64 channels a head.
#include "seal.cuh"

KVC_SEAL(64)
