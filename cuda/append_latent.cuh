// Append to rows of codes of latents: 512 channels and 64 rotary ones, each part rotated and scaled on its
// own, as src/quant/row.rs has it, bit for bit. A warp has a token: a lane sixteen channels of the first
// part, and four of the lanes those of the other, which the rest of them hold too and do not write.
#pragma once
#include "append_token.cuh"

namespace kvc {

constexpr uint32_t kLatentDim = 512, kRotaryDim = 64;

// Turns a lane's channels of a key.
KVC_DEVICE void turn_own(const kvc_append_params &p, int64_t row, uint32_t channel, uint32_t position,
                         float (&x)[kOwn]) {
KVC_UNROLL
    for (int i = 0; i < kOwn; i += 4) {
        float quad[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
        turn_quad(p, row, channel + i, position, quad);
        for (int j = 0; j < 4; ++j) x[i + j] = quad[j];
    }
}

// Whether a format can hold a row that lies in its lanes, and the bits of the scales that it is given.
struct RowScales {
    bool fits;
    uint32_t scale, minimum;
};
template <uint32_t Lanes> KVC_DEVICE RowScales find_scales(uint32_t format, const float (&x)[kOwn]) {
    constexpr uint32_t kRow = ~0u >> (32 - Lanes);
    const uint32_t sound = ballot(kFullMask, all_finite(x)) >> (lane_id() & ~(Lanes - 1));
    const auto larger = [](float a, float b) { return max_f32(a, b); };
    RowScales found = {(sound & kRow) == kRow, 0, 0};
    if (format == kInt8T) {
        found.scale = f16_up(div_rn(over_lanes<Lanes>(largest_of(x), larger), 127.0f));
    } else if (format == kInt4T) {
        float low = x[0], high = x[0];
KVC_UNROLL
        for (int j = 1; j < kOwn; ++j) {
            low = min_f32(low, x[j]);
            high = max_f32(high, x[j]);
        }
        low = over_lanes<Lanes>(low, [](float a, float b) { return min_f32(a, b); });
        high = over_lanes<Lanes>(high, larger);
        // Which zero a minimum or maximum of both is must not reach the bits.
        found.minimum = f16_down(add_rn(low, 0.0f));
        const float minimum = widen_f16(static_cast<uint16_t>(found.minimum));
        found.scale = f16_up(div_rn(add_rn(add_rn(high, 0.0f), -minimum), 15.0f));
    }
    found.fits = found.fits && is_finite_f16(found.scale) && is_finite_f16(found.minimum);
    return found;
}

// Writes a lane's channels from `channel` on of a row that fits.
KVC_DEVICE void write_codes(uint32_t format, const RowScales &found, float head_scale,
                            float (&x)[kOwn], uint32_t channel, unsigned char *codes,
                            unsigned char *scales) {
    uint16_t *halves = reinterpret_cast<uint16_t *>(scales);
    const float scale = widen_f16(static_cast<uint16_t>(found.scale));
    if (format == kInt8T) {
        store_16(codes + channel, encode_int8(scale, x));
        if (channel == 0) halves[0] = static_cast<uint16_t>(found.scale);
    } else if (format == kInt4T) {
        *reinterpret_cast<TwoWords *>(codes + channel / 2) =
            encode_int4(widen_f16(static_cast<uint16_t>(found.minimum)), scale, x);
        if (channel == 0) {
            halves[0] = static_cast<uint16_t>(found.scale);
            halves[1] = static_cast<uint16_t>(found.minimum);
        }
    } else if (format == kNvfp4) {
        uint32_t block;
        *reinterpret_cast<TwoWords *>(codes + channel / 2) = encode_nvfp4(head_scale, x, block);
        scales[channel / kOwn] = static_cast<unsigned char>(block);
    } else {
        store_16(codes + channel, encode_fp8(format, head_scale, x));
    }
}

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
        const RowScales of_x = find_scales<kLatentDim / kOwn>(params.format, x);
        const RowScales of_y = find_scales<kRotaryDim / kOwn>(params.format, y);
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
