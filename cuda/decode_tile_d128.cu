// Paged decode over sealed tiles with 128 channels a head.
#include "decode_tile.cuh"

KVC_DECODE_TILE(kt8v8, Kt8v8, 128, 2)
KVC_DECODE_TILE(kt4v4, Kt4v4, 128, 3)
KVC_DECODE_TILE(kt3v3, Kt3v3, 128, 3)
KVC_DECODE_TILE(kt4v2, Kt4v2, 128, 3)
KVC_DECODE_TILE(kt2v2, Kt2v2, 128, 3)
