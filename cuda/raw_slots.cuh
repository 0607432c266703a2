// What every kernel over sealed tiles needs of a tile that is not sealed: whether a record is, and where
// the raw rows of a slot lie. Slots are those of the staging pool, and behind them those of scratch.
// `Params` is a struct of parameters that has both, and the call to which the staged rows belong.
#pragma once
#include "kvc_params.h"
#include "ptx.cuh"

namespace kvc {

template <typename Params>
KVC_DEVICE bool is_sealed(const Params &p, const unsigned char *record) {
    return *reinterpret_cast<const uint32_t *>(record + p.header_at + 8) == p.identity;
}

template <typename Params> KVC_DEVICE bool is_slot(const Params &p, int32_t slot) {
    return slot >= 0 && static_cast<uint32_t>(slot) < p.staging_blocks + p.scratch_blocks;
}

// The rows of one KV head in a slot, bf16, and the elements from a row to the next.
struct RawSlot {
    const uint16_t *k, *v;
    int64_t k_token, v_token;
};

template <typename Params>
KVC_DEVICE RawSlot raw_slot(const Params &p, uint32_t slot, uint32_t kv_head) {
    const bool scratch = slot >= p.staging_blocks;
    const uint32_t block = scratch ? slot - p.staging_blocks : slot;
    RawSlot out;
    out.k = scratch ? static_cast<const uint16_t *>(p.scratch_k) + block * p.scratch_k_block +
                          kv_head * p.scratch_k_head
                    : static_cast<const uint16_t *>(p.call.k) + block * p.call.k_block +
                          kv_head * p.call.k_head;
    out.v = scratch ? static_cast<const uint16_t *>(p.scratch_v) + block * p.scratch_v_block +
                          kv_head * p.scratch_v_head
                    : static_cast<const uint16_t *>(p.call.v) + block * p.call.v_block +
                          kv_head * p.call.v_head;
    out.k_token = scratch ? p.scratch_k_token : p.call.k_token;
    out.v_token = scratch ? p.scratch_v_token : p.call.v_token;
    return out;
}

} // namespace kvc
