// Append to rows of codes with 192 channels a head.
#include "append_token.cuh"

KVC_APPEND_TOKEN(192)
