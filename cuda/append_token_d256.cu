// Append to rows of codes with 256 channels a head.
#include "append_token.cuh"

KVC_APPEND_TOKEN(256)
