// Append to rows of codes: the K and V rows of new tokens, K optionally turned to its position on the
// way, encoded by row_codes.cuh.
//
// A lane has sixteen channels of a row and a warp several rows. Where a row has fewer channels the
// lanes that are over hold what its first ones do. A negative slot skips the token. A row that
// is not finite, or whose scale f16 does not hold, is not written and raises a bit of the error flag.
#pragma once
#include "append.cuh"
#include "hadamard.cuh"
#include "quant.cuh"
#include "row_codes.cuh"

namespace kvc {

constexpr uint32_t kFlagRow = 32; // a row that its format cannot hold

// Turns four channels of a key from `channel` on.
KVC_DEVICE void turn_quad(const kvc_append_params &p, int64_t row, uint32_t channel, uint32_t position,
                          float (&x)[4]) {
    if (channel < p.rope_first || channel >= p.rope_first + p.rope_dim) return;
    const uint32_t half = p.rope_dim / 2, base = channel - p.rope_first;
    const bool neighbours = p.rope_interleaved != 0;
    const float *cosines = p.cosines + static_cast<int64_t>(position) * half;
    const float *sines = p.sines + static_cast<int64_t>(position) * half;
    float other[4];
    if (neighbours) {
        for (int j = 0; j < 4; ++j) other[j] = x[j ^ 1];
    } else if (half % 4 == 0) {
        load_quad(p.k, row + (base < half ? channel + half : channel - half), p.row_dtype, other);
    } else {
        for (uint32_t j = 0; j < 4 && base + j < p.rope_dim; ++j) {
            const uint32_t own = channel + j, by = base + j < half ? own + half : own - half;
            other[j] = load_element(p.k, row + by, p.row_dtype);
        }
    }
KVC_UNROLL
    for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t at = base + j;
        if (at >= p.rope_dim) break;
        const bool lower = neighbours ? j % 2 == 0 : at < half;
        const uint32_t pair = neighbours ? at / 2 : lower ? at : at - half;
        const float turned = mul_rn(other[j], sines[pair]);
        x[j] = add_rn(mul_rn(x[j], cosines[pair]), lower ? -turned : turned);
    }
}

// The lanes of a row: those with channels of their own, and all.
template <int HeadDim> constexpr uint32_t kChannelLanes = HeadDim / kOwn;
template <int HeadDim> constexpr uint32_t kRowLanes =
    HeadDim <= 64 ? 4 : HeadDim <= 128 ? 8 : 16;

// Encodes a row that lies in its lanes, rotated where it is to be, and writes it where `write` is set;
// false where it cannot be. `Format` is that of the kernel: of FP8 both have one.
template <uint32_t Id> struct FormatId {
    static constexpr uint32_t value = Id;
};
template <int HeadDim, uint32_t Format>
KVC_DEVICE bool encode_row(uint32_t format, float head_scale, float (&x)[kOwn], uint32_t channel,
                           unsigned char *codes, unsigned char *scales, bool write) {
    constexpr uint32_t kLanes = kRowLanes<HeadDim>, kRow = (1u << kLanes) - 1;
    const auto larger = [](float a, float b) { return max_nan_f32(a, b); };
    uint16_t *halves = reinterpret_cast<uint16_t *>(scales);
    // Of a row that is not finite neither is its largest element, nor a scale made of that.
    if constexpr (Format == kInt8T) {
        const float top = over_lanes<kLanes>(largest_of(x), larger);
        const uint32_t bits = f16_up(div_rn(top, 127.0f));
        if (!is_finite_f16(bits)) return false;
        if (!write) return true;
        store_16(codes + channel, encode_int8(widen_f16(static_cast<uint16_t>(bits)), x));
        if (channel == 0) halves[0] = static_cast<uint16_t>(bits);
    } else if constexpr (Format == kInt4T) {
        float low = x[0], high = x[0];
KVC_UNROLL
        for (int j = 1; j < kOwn; ++j) {
            low = min_nan_f32(low, x[j]);
            high = max_nan_f32(high, x[j]);
        }
        low = over_lanes<kLanes>(low, [](float a, float b) { return min_nan_f32(a, b); });
        high = over_lanes<kLanes>(high, larger);
        // Which zero a minimum or maximum of both is must not reach the bits.
        const uint32_t minimum_bits = f16_down(add_rn(low, 0.0f));
        const float minimum = widen_f16(static_cast<uint16_t>(minimum_bits));
        const uint32_t bits = f16_up(div_rn(add_rn(add_rn(high, 0.0f), -minimum), 15.0f));
        if (!is_finite_f16(bits) || !is_finite_f16(minimum_bits)) return false;
        if (!write) return true;
        *reinterpret_cast<TwoWords *>(codes + channel / 2) =
            encode_int4(minimum, widen_f16(static_cast<uint16_t>(bits)), x);
        if (channel == 0) {
            halves[0] = static_cast<uint16_t>(bits);
            halves[1] = static_cast<uint16_t>(minimum_bits);
        }
    } else {
        const uint32_t sound = ballot(kFullMask, all_finite(x)) >> (lane_id() & ~(kLanes - 1));
        if ((sound & kRow) != kRow) return false;
        if (!write) return true;
        if constexpr (Format == kNvfp4) {
            uint32_t scale;
            *reinterpret_cast<TwoWords *>(codes + channel / 2) = encode_nvfp4(head_scale, x, scale);
            scales[channel / kOwn] = static_cast<unsigned char>(scale);
        } else {
            store_16(codes + channel, encode_fp8(format, head_scale, x));
        }
    }
    return true;
}

// The same for any format.
template <int HeadDim>
KVC_DEVICE bool encode_any(uint32_t format, float head_scale, float (&x)[kOwn], uint32_t channel,
                           unsigned char *codes, unsigned char *scales, bool write) {
    const auto encode = [&](auto of) {
        return encode_row<HeadDim, of.value>(format, head_scale, x, channel, codes, scales, write);
    };
    switch (format) {
    case kInt8T: return encode(FormatId<kInt8T>{});
    case kInt4T: return encode(FormatId<kInt4T>{});
    case kNvfp4: return encode(FormatId<kNvfp4>{});
    default: return encode(FormatId<kFp8E4m3>{});
    }
}

// Rotates rows where `rotated` is set, which all lanes of a row agree on.
template <int HeadDim>
KVC_DEVICE void rotate_where(bool rotated, float (&x)[kOwn], uint32_t channel) {
    if (ballot(kFullMask, rotated) == 0) return;
    float y[kOwn];
    for (int j = 0; j < kOwn; ++j) y[j] = x[j];
    negate_sixteen<HeadDim>(y, channel);
    transform_channels<HeadDim>(y);
    // What is not meant to be stays as it was.
    for (int j = 0; j < kOwn; ++j) x[j] = rotated ? y[j] : x[j];
}

// The keys or the values of a head: where token 0 of the call lies, and where block 0 goes.
struct RowSide {
    const void *from;
    unsigned char *codes, *scales;
    int64_t from_token, from_head; // elements
    int64_t codes_block, codes_token, scales_block, scales_token;
    float head_scale;
    KVC_DEVICE RowSide(const kvc_append_token_params &params, bool key, uint32_t head) {
        const kvc_append_params &p = params.call;
        from = key ? p.k : p.v;
        from_token = key ? p.k_token : p.v_token;
        from_head = head * (key ? p.k_head : p.v_head);
        codes = static_cast<unsigned char *>(key ? p.k_cache : p.v_cache) +
                head * (key ? p.k_cache_head : p.v_cache_head);
        codes_block = key ? p.k_cache_block : p.v_cache_block;
        codes_token = key ? p.k_cache_token : p.v_cache_token;
        scales = static_cast<unsigned char *>(key ? params.k_scales : params.v_scales) +
                 head * (key ? params.k_scale_head : params.v_scale_head);
        scales_block = key ? params.k_scale_block : params.v_scale_block;
        scales_token = key ? params.k_scale_token : params.v_scale_token;
        const float *heads = key ? params.k_heads : params.v_heads;
        head_scale = heads == nullptr ? 1.0f : heads[head];
    }
};

constexpr uint32_t kAnyFormat = 0;

// The rows of a block's tokens, in one format; or in any, which may turn.
template <int HeadDim, uint32_t Format>
KVC_DEVICE void append_rows(const kvc_append_token_params &params) {
    const kvc_append_params &p = params.call;
    constexpr uint32_t kLanes = kRowLanes<HeadDim>, kRows = kAppendThreads / kLanes;
    const uint32_t first = block_x() * p.tokens_per_block, left = p.tokens - first;
    const uint32_t tokens = left < p.tokens_per_block ? left : p.tokens_per_block;
    const uint32_t own_lane = lane_id() % kLanes;
    const bool spare = kChannelLanes<HeadDim> < kLanes && own_lane >= kChannelLanes<HeadDim>;
    const uint32_t channel = (spare ? own_lane - kChannelLanes<HeadDim> : own_lane) * kOwn;
    const bool turning = Format == kAnyFormat && p.cosines != nullptr;
    const uint32_t format = Format == kAnyFormat ? params.format : Format;
    // A thread has a row of each of some tokens, or several where a token has more than there are at once.
    const uint32_t per_token = 2 * p.kv_heads, own = thread_x() / kLanes;
    const uint32_t step = per_token < kRows ? quotient_of(kRows, per_token) : 1;
    const uint32_t ahead = per_token < kRows ? quotient_of(own, per_token) : 0;
KVC_ROLL
    for (uint32_t base = 0; base < per_token; base += kRows) {
        const uint32_t index = base + own - ahead * per_token;
        const bool exists = index < per_token && ahead < step;
        // All lanes of a warp take part in its shuffles.
KVC_ROLL
        for (uint32_t at = 0; at < tokens; at += step) {
            // What every format takes leaves no registers for what the rows of a head have in common.
            const uint32_t which = Format == kAnyFormat ? opaque(index) : index;
            const bool is_key = which < p.kv_heads;
            const RowSide side(params, is_key, exists ? is_key ? which : which - p.kv_heads : 0);
            const uint32_t token = first + at + ahead;
            const int64_t row = side.from_head + token * side.from_token;
            const bool has = exists && at + ahead < tokens;
            // Loads are under way together; the row of a token that is skipped is loaded for nothing.
            const int64_t slot = has ? p.slots[token] : -1;
            const uint32_t position = turning && has ? p.positions[token] : 0;
            float x[kOwn] = {};
            if (has) load_own(side.from, row + channel, p.row_dtype, x);

            int64_t block;
            uint32_t place;
            bool wanted = find_slot(p, slot, channel == 0, block, place);
            if (turning && wanted) {
                if (position >= p.rope_positions) {
                    if (channel == 0) raise(p.error_flag, kFlagPosition);
                    wanted = false;
                } else if (is_key) {
KVC_UNROLL
                    for (int i = 0; i < kOwn; i += 4) {
                        float quad[4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
                        turn_quad(p, row, channel + i, position, quad);
                        for (int j = 0; j < 4; ++j) x[i + j] = quad[j];
                    }
                }
            }
            if (format == kInt4T || format == kInt8T) {
                const bool rotated = format == kInt4T || (is_key && params.k_rotated != 0);
                rotate_where<HeadDim>(rotated, x, channel);
            }
            unsigned char *codes = side.codes + block * side.codes_block + place * side.codes_token;
            unsigned char *scales =
                side.scales + block * side.scales_block + place * side.scales_token;
            bool fits;
            if constexpr (Format == kAnyFormat) {
                fits = encode_any<HeadDim>(format, side.head_scale, x, channel, codes, scales,
                                           wanted && !spare);
            } else {
                fits = encode_row<HeadDim, Format>(params.format, side.head_scale, x, channel, codes,
                                                   scales, wanted && !spare);
            }
            if (wanted && !fits && channel == 0) raise(p.error_flag, kFlagRow);
            // Codes of 4 bits of 80 channels end in the middle of 16 bytes: the first lane that is over
            // has the rest, which is zero.
            if constexpr (HeadDim % 32 != 0)
                if (wanted && fits && own_lane == kChannelLanes<HeadDim> &&
                    (format == kInt4T || format == kNvfp4))
                    *reinterpret_cast<TwoWords *>(codes + HeadDim / 2) = {};
        }
    }
}

} // namespace kvc

// What turns, or has queries, is one kernel for every format; without that each encoding has its own, so
// that none takes the registers of another.
#define KVC_APPEND_TOKEN_OF(name, dim, format, blocks)                                   \
    KVC_KERNEL(kvc_append_##name##_d##dim, kvc_append_token_params, 256, blocks) {       \
        kvc::append_rows<dim, kvc::format>(p);                                           \
    }
#define KVC_APPEND_TOKEN(dim)                                                            \
    KVC_APPEND_TOKEN_OF(fp8, dim, kFp8E4m3, 5)                                           \
    KVC_APPEND_TOKEN_OF(int8, dim, kInt8T, 4)                                            \
    KVC_APPEND_TOKEN_OF(int4, dim, kInt4T, 4)                                            \
    KVC_APPEND_TOKEN_OF(nvfp4, dim, kNvfp4, 3)                                           \
    KVC_KERNEL(kvc_append_token_d##dim, kvc_append_token_params, 256, 3) {               \
        kvc::append_rows<dim, kvc::kAnyFormat>(p);                                       \
        if (p.call.q_heads != 0) kvc::turn_queries(p.call);                              \
    }
