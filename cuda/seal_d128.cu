// Sealing of tiles with 128 channels a head.
#include "seal.cuh"

KVC_SEAL(128)
