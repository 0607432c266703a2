// Append to rows of codes of latents: 512 channels and 64 rotary ones, each part rotated and scaled on its
// own, as src/quant/row.rs has it, bit for bit. A warp has a token: a lane sixteen channels of the first
// part, and four of the lanes those of the other, which the rest of them hold too and do not write.
#pragma once
#include "append_token.cuh"

namespace kvc {

constexpr uint32_t kLatentDim = 512, kRotaryDim = 64;

// The bytes of a row's scales before those of its second part.
KVC_DEVICE uint32_t first_scale_bytes(uint32_t format) {
    return format == kInt8T ? 2 : format == kInt4T ? 4 : format == kNvfp4 ? kLatentDim / kOwn : 0;
}

KVC_DEVICE void append_latent(const kvc_append_token_params &params) {
    const kvc_append_params &p = params.call;
    const uint32_t first = block_x() * p.tokens_per_block, left = p.tokens - first;
    const uint32_t tokens = left < p.tokens_per_block ? left : p.tokens_per_block;
    const uint32_t lane = lane_id(), channel = lane * kOwn;
    const uint32_t rotary = lane % (kRotaryDim / kOwn) * kOwn;
    const bool four_bits = params.format == kInt4T || params.format == kNvfp4;
    const float head_scale = params.k_heads == nullptr ? 1.0f : params.k_heads[0];
KVC_ROLL
    for (uint32_t ahead = warp_id(); ahead < tokens; ahead += kAppendThreads / 32) {
        const uint32_t token = first + ahead;
        int64_t block;
        uint32_t place;
        if (!find_slot(p, p.slots[token], lane == 0, block, place)) continue;
        const uint32_t position = p.cosines != nullptr ? p.positions[token] : 0;
        if (p.cosines != nullptr && position >= p.rope_positions) {
            if (lane == 0) raise(p.error_flag, kFlagPosition);
            continue;
        }
        const int64_t row = token * p.k_token;
        float x[kOwn], y[kOwn];
        load_own(p.k, row + channel, p.row_dtype, x);
        load_own(p.k, row + kLatentDim + rotary, p.row_dtype, y);
        if (p.cosines != nullptr) {
            turn_own(p, row, channel, position, x);
            turn_own(p, row, kLatentDim + rotary, position, y);
        }
        if (params.k_rotated != 0) {
            rotate_channels<kLatentDim>(x, channel);
            rotate_channels<kRotaryDim>(y, rotary);
        }
        // All scales before the first byte: a row that cannot be held changes nothing.
        const RowScales of_x = find_scales<kLatentDim>(params.format, x);
        const RowScales of_y = find_scales<kRotaryDim>(params.format, y);
        if (!of_x.fits || !of_y.fits) {
            if (lane == 0) raise(p.error_flag, kFlagRow);
            continue;
        }
        unsigned char *codes = static_cast<unsigned char *>(p.k_cache) + block * p.k_cache_block +
                               place * p.k_cache_token;
        unsigned char *scales = static_cast<unsigned char *>(params.k_scales) +
                                block * params.k_scale_block + place * params.k_scale_token;
        write_codes(params.format, of_x, head_scale, x, channel, codes, scales);
        if (lane < kRotaryDim / kOwn)
            write_codes(params.format, of_y, head_scale, y, rotary,
                        codes + (four_bits ? kLatentDim / 2 : kLatentDim),
                        scales + first_scale_bytes(params.format));
    }
    if (p.q_heads != 0) turn_queries(p);
}

} // namespace kvc
