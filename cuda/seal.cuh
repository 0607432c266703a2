// Sealing: the raw rows of full tiles become records, as src/quant/seal.rs has it, bit for bit: one
// rounding an operation, nothing contracted, minima and maxima whose order does not matter, and sums
// over a row as a tree of neighbours. One block for each tile and KV head.
//
// A head whose rows cannot be sealed leaves a record whose header has no format, and sets its tile's
// entry of `refused`. The checksum is made of the checksums of 256 parts of the record, shifted by what
// follows them: a CRC is linear.
#pragma once
#include "append_token.cuh"

namespace kvc {

constexpr uint32_t kSealThreads = 256;

// Shared memory of a block: codes of the values by token, then what is known of the key channels.
template <int HeadDim> struct SealArea {
    unsigned char *codes;         // [tokens][HeadDim]
    float *low, *high;            // [kSealThreads]
    float *base, *step;           // [HeadDim]
    uint32_t *words;              // [kSealThreads]
    KVC_DEVICE explicit SealArea(uint32_t tokens)
        : codes(KVC_SMEM(unsigned char)),
          low(reinterpret_cast<float *>(codes + tokens * HeadDim)), high(low + kSealThreads),
          base(high + kSealThreads), step(base + HeadDim),
          words(reinterpret_cast<uint32_t *>(step + HeadDim)) {}
};

// The largest of all threads' values.
KVC_DEVICE float block_max(float *room, float x) {
    sync_threads();
    room[thread_x()] = x;
    sync_threads();
    for (uint32_t width = kSealThreads / 2; width > 0; width /= 2) {
        if (thread_x() < width) room[thread_x()] = max_f32(room[thread_x()], room[thread_x() + width]);
        sync_threads();
    }
    return room[0];
}

// 32 codes in the order of src/quant/pack.rs.
struct PackedCodes {
    uint32_t words[8], plane;
    KVC_DEVICE PackedCodes() : words{0, 0, 0, 0, 0, 0, 0, 0}, plane(0) {}

    KVC_DEVICE void put(uint32_t bits, uint32_t at, uint32_t code) {
        if (bits == 8) words[at / 4] |= code << at % 4 * 8;
        if (bits == 4) words[at / 8] |= code << (at % 8 / 2 + at % 2 * 4) * 4;
        if (bits < 4) words[at / 16] |= (code & 3) << at % 16 * 2;
        const uint32_t bit = at / 8 == 1 ? at + 8 : at / 8 == 2 ? at - 8 : at;
        if (bits == 3) plane |= (code >> 2 & 1) << bit;
    }
    // Writes the words; `to` has those of 32 codes.
    KVC_DEVICE void write(uint32_t bits, unsigned char *to, unsigned char *plane_to) const {
        uint32_t *out = reinterpret_cast<uint32_t *>(to);
        const uint32_t count = bits == 3 ? 2 : bits;
KVC_UNROLL
        for (uint32_t i = 0; i < 8; ++i)
            if (i < count) out[i] = words[i];
        if (bits == 3) *reinterpret_cast<uint32_t *>(plane_to) = plane;
    }
};

KVC_DEVICE float raw_element(const uint16_t *row, uint32_t at) {
    return as_float(static_cast<uint32_t>(row[at]) << 16);
}
KVC_DEVICE bool is_finite(float x) { return (as_bits(x) & 0x7f800000u) != 0x7f800000u; }

// Codes and scale of a value row that lies in its lanes; false where the scale is past f16.
template <int HeadDim>
KVC_DEVICE bool seal_value(uint32_t bits, float (&x)[4], uint32_t channel, uint32_t &codes,
                           uint32_t &scale) {
    constexpr uint32_t kLanes = HeadDim / 4;
    const auto larger = [](float a, float b) { return max_f32(a, b); };
    const auto sum = [](float a, float b) { return add_rn(a, b); };
    codes = 0;
    if (bits == 8) {
        float top = 0.0f;
        for (int j = 0; j < 4; ++j) top = max_f32(top, as_float(as_bits(x[j]) & 0x7fffffffu));
        scale = f16_up(div_rn(over_lanes<kLanes>(top, larger), 127.0f));
        const float step = widen_f16(static_cast<uint16_t>(scale));
        for (int j = 0; j < 4; ++j) {
            const int32_t code = static_cast<int32_t>(code_of(x[j], step, -127.0f, 127.0f));
            codes |= (static_cast<uint32_t>(code) & 0xff) << 8 * j;
        }
        return is_finite_f16(scale);
    }
    const float count = bits == 4 ? 0.3352f : bits == 3 ? 0.5860f : 0.9957f;
    rotate_quads<HeadDim>(x, channel);
    float y[4];
    for (int j = 0; j < 4; ++j) y[j] = mul_rn(x[j], x[j]);
    const float squares =
        over_lanes<kLanes>(add_rn(add_rn(y[0], y[1]), add_rn(y[2], y[3])), sum);
    const float width = mul_rn(sqrt_rn(div_rn(squares, static_cast<float>(HeadDim))), count);
    const float middle = static_cast<float>(1u << (bits - 1));
    const float most = static_cast<float>((1u << bits) - 1);
    for (int j = 0; j < 4; ++j) {
        float code = add_rn(floor_f32(div_rn(x[j], width)), middle);
        code = width == 0.0f || code < 0.0f ? 0.0f : code > most ? most : code;
        codes |= static_cast<uint32_t>(code) << 8 * j;
        const float point = mul_rn(add_rn(add_rn(code, 0.5f), -middle), count);
        y[j] = mul_rn(x[j], point);
    }
    const float aligned =
        over_lanes<kLanes>(add_rn(add_rn(y[0], y[1]), add_rn(y[2], y[3])), sum);
    scale = width == 0.0f ? 0 : pack_f16(div_rn(squares, aligned), 0.0f) & 0xffff;
    return is_finite(squares) && is_finite_f16(scale);
}

// CRC-32C: a polynomial of 32 bits, the lowest power in the highest bit.
KVC_DEVICE uint32_t crc_shift(uint32_t crc) { return (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0); }
// The product of two, modulo the polynomial.
KVC_DEVICE uint32_t crc_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t i = 0; i < 32; ++i) {
        if ((a >> (31 - i) & 1) != 0) product ^= b;
        b = crc_shift(b);
    }
    return product;
}
// x to the power of 8 * bytes.
KVC_DEVICE uint32_t crc_power(uint32_t bytes) {
    uint32_t power = 0x80000000u, square = 0x00800000u; // x^0, x^8
    for (; bytes != 0; bytes >>= 1) {
        if ((bytes & 1) != 0) power = crc_multiply(power, square);
        square = crc_multiply(square, square);
    }
    return power;
}
// The checksum of 8 bytes and `bytes` of a record, by all threads; thread 0 has it.
KVC_DEVICE uint32_t block_crc(uint32_t *room, const uint32_t (&before)[2], const unsigned char *record,
                              uint32_t bytes) {
    const uint32_t all = bytes + 8, part = (all + kSealThreads - 1) / kSealThreads;
    // Zeros before everything count for nothing.
    const uint32_t zeros = part * kSealThreads - all, first = thread_x() * part;
    uint32_t crc = 0;
    for (uint32_t i = first; i < first + part; ++i) {
        if (i < zeros) continue;
        const uint32_t at = i - zeros;
        const uint32_t byte = at < 8 ? before[at / 4] >> at % 4 * 8 & 0xff : record[at - 8];
        crc ^= byte;
        for (int bit = 0; bit < 8; ++bit) crc = crc_shift(crc);
    }
    sync_threads();
    room[thread_x()] = crc;
    sync_threads();
    uint32_t power = crc_power(part);
    for (uint32_t width = 1; width < kSealThreads; width *= 2) {
        if (thread_x() % (2 * width) == 0)
            room[thread_x()] = crc_multiply(room[thread_x()], power) ^ room[thread_x() + width];
        power = crc_multiply(power, power);
        sync_threads();
    }
    return ~(room[0] ^ crc_multiply(0xffffffffu, crc_power(all)));
}

template <int HeadDim> KVC_DEVICE void seal(const kvc_seal_params &p) {
    constexpr uint32_t kGroups = kSealThreads / HeadDim, kLanes = HeadDim / 4;
    const uint32_t thread = thread_x(), tokens = p.tile_tokens;
    const uint32_t index = block_x() / p.kv_heads, head = block_x() % p.kv_heads;
    const int32_t slot = p.list[2 * index], block = p.list[2 * index + 1];
    if (static_cast<uint32_t>(slot) >= p.staging_blocks + p.scratch_blocks ||
        static_cast<uint32_t>(block) >= p.num_blocks) {
        if (thread == 0) raise(p.error_flag, kFlagBlock);
        return;
    }
    const bool scratch = static_cast<uint32_t>(slot) >= p.staging_blocks;
    const int64_t from = scratch ? slot - static_cast<int64_t>(p.staging_blocks) : slot;
    const uint16_t *k =
        scratch ? static_cast<const uint16_t *>(p.scratch_k) + from * p.scratch_k_block +
                      head * p.scratch_k_head
                : static_cast<const uint16_t *>(p.k) + from * p.k_block + head * p.k_head;
    const uint16_t *v =
        scratch ? static_cast<const uint16_t *>(p.scratch_v) + from * p.scratch_v_block +
                      head * p.scratch_v_head
                : static_cast<const uint16_t *>(p.v) + from * p.v_block + head * p.v_head;
    const int64_t k_token = scratch ? p.scratch_k_token : p.k_token;
    const int64_t v_token = scratch ? p.scratch_v_token : p.v_token;
    unsigned char *record =
        static_cast<unsigned char *>(p.records) + block * p.record_block + head * p.record_head;
    uint32_t *header = reinterpret_cast<uint32_t *>(record + p.header_at);
    const SealArea<HeadDim> area(tokens);

    // Ranges of the key channels.
    float low = infinity(), high = -infinity();
    bool sound = true;
    const uint32_t channel = thread % HeadDim;
    for (uint32_t token = thread / HeadDim; token < tokens; token += kGroups) {
        const float x = raw_element(k + token * k_token, channel);
        sound = sound && is_finite(x);
        low = min_f32(low, x);
        high = max_f32(high, x);
    }
    area.low[thread] = low;
    area.high[thread] = high;
    sync_threads();
    for (uint32_t group = 0; group < kGroups; ++group) {
        low = min_f32(low, area.low[group * HeadDim + channel]);
        high = max_f32(high, area.high[group * HeadDim + channel]);
    }
    const float n = static_cast<float>((1u << p.k_bits) - 1);
    const float clip = p.k_bits == 3 ? 0.9f : p.k_bits == 2 ? 0.8f : 1.0f;
    const float middle = mul_rn(add_rn(low, high), 0.5f);
    const float farthest = block_max(area.low, as_float(as_bits(middle) & 0x7fffffffu));
    const uint32_t mid_bits = f16_up(div_rn(farthest, 127.0f));
    const float mid_unit = widen_f16(static_cast<uint16_t>(mid_bits));
    const float mid = code_of(middle, mid_unit, -127.0f, 127.0f);
    const float stored = mul_rn(mid, mid_unit);
    float half;
    if (p.k_bits == 8) {
        half = max_f32(add_rn(high, -stored), add_rn(stored, -low));
    } else {
        const float shift = as_float(as_bits(add_rn(middle, -stored)) & 0x7fffffffu);
        half = max_f32(mul_rn(mul_rn(add_rn(high, -low), 0.5f), clip), shift);
    }
    const float wanted = div_rn(mul_rn(2.0f, half), n);
    // Which zero the largest of zeros is must not reach the bits.
    const float widest = add_rn(block_max(area.low, wanted), 0.0f);
    const uint32_t unit_bits = f16_up(div_rn(widest, 255.0f));
    const float unit = widen_f16(static_cast<uint16_t>(unit_bits));
    float units = unit == 0.0f ? 1.0f : ceil_f32(div_rn(wanted, unit));
    units = units < 1.0f ? 1.0f : units > 255.0f ? 255.0f : units;
    if (thread < HeadDim) {
        const float step = mul_rn(units, unit);
        area.step[channel] = step;
        area.base[channel] = add_rn(stored, -mul_rn(step, mul_rn(n, 0.5f)));
        record[p.k_steps_at + channel] = static_cast<unsigned char>(units);
        record[p.k_mids_at + channel] = static_cast<unsigned char>(static_cast<int32_t>(mid));
    }
    sound = sound && is_finite_f16(mid_bits) && is_finite_f16(unit_bits);
    sync_threads();

    // Key rows, 32 channels at a time.
    const uint32_t k_main = p.k_bits == 3 ? 2 : p.k_bits;
    for (uint32_t i = thread; i < tokens * (HeadDim / 32); i += kSealThreads) {
        const uint32_t token = i / (HeadDim / 32), first = i % (HeadDim / 32) * 32;
        PackedCodes packed;
KVC_UNROLL
        for (uint32_t j = 0; j < 32; ++j) {
            const float x = raw_element(k + token * k_token, first + j);
            const float offset = add_rn(x, -area.base[first + j]);
            packed.put(p.k_bits, j, static_cast<uint32_t>(code_of(offset, area.step[first + j], 0.0f, n)));
        }
        packed.write(p.k_bits, record + token * (HeadDim * k_main / 8) + first * k_main / 8,
                     record + p.k_plane_at + token * (HeadDim / 8) + first / 8);
    }

    // Value rows: each in lanes beside each other.
    const uint32_t own = thread % kLanes * 4;
    for (uint32_t token = thread / kLanes; token < tokens; token += kSealThreads / kLanes) {
        float x[4];
        for (int j = 0; j < 4; ++j) {
            x[j] = raw_element(v + token * v_token, own + j);
            sound = sound && is_finite(x[j]);
        }
        uint32_t codes, scale;
        sound = seal_value<HeadDim>(p.v_bits, x, own, codes, scale) && sound;
        *reinterpret_cast<uint32_t *>(area.codes + token * HeadDim + own) = codes;
        if (own == 0)
            *reinterpret_cast<uint16_t *>(record + p.v_scales_at + 2 * token) =
                static_cast<uint16_t>(scale);
    }
    const bool refused = block_max(area.low, sound ? 0.0f : 1.0f) != 0.0f;
    if (refused) {
        if (thread == 0) {
            header[2] = 0;
            p.refused[index] = 1;
        }
        return;
    }

    // Value channels, 32 tokens at a time.
    const uint32_t v_main = p.v_bits == 3 ? 2 : p.v_bits;
    for (uint32_t i = thread; i < HeadDim * (tokens / 32); i += kSealThreads) {
        const uint32_t at = i % HeadDim, first = i / HeadDim * 32;
        PackedCodes packed;
KVC_UNROLL
        for (uint32_t j = 0; j < 32; ++j)
            packed.put(p.v_bits, j, area.codes[(first + j) * HeadDim + at]);
        packed.write(p.v_bits, record + p.v_codes_at + at * (tokens * v_main / 8) + first * v_main / 8,
                     record + p.v_plane_at + at * (tokens / 8) + first / 8);
    }
    if (thread == 0) {
        header[0] = unit_bits | mid_bits << 16;
        header[1] = 0;
        header[2] = p.identity;
    }
    sync_threads();
    const uint32_t before[2] = {HeadDim | static_cast<uint32_t>(HeadDim) << 16, 0};
    const uint32_t crc = block_crc(area.words, before, record, p.header_at + 12);
    if (thread == 0) header[3] = crc;
}

} // namespace kvc

#define KVC_SEAL(dim)                                                                    \
    KVC_KERNEL(kvc_seal_d##dim, kvc_seal_params, 256, 2) { kvc::seal<dim>(p); }
