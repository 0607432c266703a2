// Sealing: the raw rows of full tiles become records, as src/quant/seal.rs has it, bit for bit: one
// rounding an operation, nothing contracted, minima and maxima whose order does not matter, and sums
// over a row as a tree of neighbours. One block for each tile and KV head.
//
// The record is made in shared memory and written at the end. A head whose rows cannot be sealed leaves
// a record whose header has no format, and sets its tile's entry of `refused`; rows of scratch, which
// nobody keeps, are then copied to a spare slot of the staging pool, one for all heads and layers of a
// tile. A CRC is linear: every
// thread takes each 256th word, multiplied by what lies behind it.
#pragma once
#include "append_token.cuh"
#include "crc.cuh"

namespace kvc {

constexpr uint32_t kSealThreads = 256;

constexpr uint32_t kSealWarps = kSealThreads / 32;
constexpr int kGroup = 8; // key channels of a thread

// Shared memory of a block: the record, codes of the values by token, then what is known of the key
// channels, and the checksum's.
template <int HeadDim> struct SealArea {
    static constexpr uint32_t kPitch = HeadDim + 4; // of a token's codes: words of a column in many banks
    uint32_t *record;
    uint32_t *codes;            // [tokens][kPitch / 4]; before that the ranges of the channels, by warp
    CrcTables::Table *far;
    float *base, *step, *inverse; // [HeadDim]
    float *room;                // [2][kSealWarps]
    uint32_t *sums;             // [kSealThreads]
    KVC_DEVICE SealArea(uint32_t tokens, uint32_t record_bytes)
        : record(KVC_SMEM(uint32_t)), codes(record + record_bytes / 4),
          far(reinterpret_cast<CrcTables::Table *>(codes + tokens * kPitch / 4)),
          base(reinterpret_cast<float *>(far + 1)), step(base + HeadDim), inverse(step + HeadDim),
          room(inverse + HeadDim), sums(reinterpret_cast<uint32_t *>(room + 2 * kSealWarps)) {}
};

// The largest of all threads' values.
KVC_DEVICE float block_max(float *room, float x) {
    x = over_lanes<32>(x, [](float a, float b) { return max_f32(a, b); });
    if (lane_id() == 0) room[warp_id()] = x;
    sync_threads();
    float top = room[0];
KVC_UNROLL
    for (uint32_t i = 1; i < kSealWarps; ++i) top = max_f32(top, room[i]);
    return top;
}

KVC_DEVICE bool is_finite(float x) { return (as_bits(x) & 0x7f800000u) != 0x7f800000u; }

// Eight bf16 elements.
KVC_DEVICE void load_group(const uint16_t *at, float (&x)[kGroup]) {
    const Vec16 v = *reinterpret_cast<const Vec16 *>(at);
KVC_UNROLL
    for (int i = 0; i < kGroup; ++i)
        x[i] = as_float(i % 2 == 0 ? v.word[i / 2] << 16 : v.word[i / 2] & 0xffff0000u);
}

// Where the byte of the third bits of the `group`-th eight of 32 codes lies.
KVC_DEVICE uint32_t plane_byte(uint32_t group) {
    return (group & ~3u) | (group & 1) << 1 | (group >> 1 & 1);
}

// What the bits of `kInteger` add to a sum of words shifted by 0, `by`, 2 * `by`, ...
KVC_DEVICE constexpr uint32_t integers(uint32_t count, uint32_t by) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < count; ++i) sum += kInteger << i * by;
    return sum;
}

// The codes of eight channels of a key row into the record, in the order of src/quant/pack.rs. `at`
// counts such eights from the record's start.
KVC_DEVICE void write_key(uint32_t bits, unsigned char *record, uint32_t plane_at, uint32_t at,
                          const uint32_t (&code)[kGroup]) {
    if (bits == 8) {
        uint32_t low = 0 - integers(4, 8), high = low;
KVC_UNROLL
        for (int j = 0; j < 4; ++j) {
            low += code[j] << 8 * j;
            high += code[4 + j] << 8 * j;
        }
        *reinterpret_cast<TwoWords *>(record + 8 * at) = {{low, high}};
    } else if (bits == 4) {
        uint32_t word = 0 - integers(8, 4);
KVC_UNROLL
        for (int j = 0; j < kGroup; ++j) word += code[j] << (j / 2 + j % 2 * 4) * 4;
        *reinterpret_cast<uint32_t *>(record + 4 * at) = word;
    } else {
        uint32_t low = 0, third = 0;
KVC_UNROLL
        for (int j = 0; j < kGroup; ++j) {
            low |= (code[j] & 3) << 2 * j;
            third |= (code[j] >> 2 & 1) << j;
        }
        *reinterpret_cast<uint16_t *>(record + 2 * at) = static_cast<uint16_t>(low);
        if (bits == 3) record[plane_at + plane_byte(at)] = static_cast<unsigned char>(third);
    }
}

// A sum over the channels of a row as a tree of neighbours.
template <uint32_t Lanes> KVC_DEVICE float row_sum(float (&x)[kOwn]) {
KVC_UNROLL
    for (int count = kOwn / 2; count > 0; count /= 2) {
KVC_UNROLL
        for (int i = 0; i < count; ++i) x[i] = add_rn(x[2 * i], x[2 * i + 1]);
    }
    return over_lanes<Lanes>(x[0], [](float a, float b) { return add_rn(a, b); });
}

// Codes and scale of a value row that lies in its lanes; false where the scale is past f16.
template <int HeadDim>
KVC_DEVICE bool seal_value(uint32_t bits, float (&x)[kOwn], uint32_t channel, Vec16 &codes,
                           uint32_t &scale) {
    constexpr uint32_t kLanes = HeadDim / kOwn;
    if (bits == 8) {
        const float top =
            over_lanes<kLanes>(largest_of(x), [](float a, float b) { return max_f32(a, b); });
        scale = f16_up(div_rn(top, 127.0f));
        codes = encode_int8(widen_f16(static_cast<uint16_t>(scale)), x);
        return is_finite_f16(scale);
    }
    const float count = bits == 4 ? 0.3352f : bits == 3 ? 0.5860f : 0.9957f;
    rotate_channels<HeadDim>(x, channel);
    float y[kOwn];
    float least = infinity();
KVC_UNROLL
    for (int j = 0; j < kOwn; ++j) {
        y[j] = mul_rn(x[j], x[j]);
        least = min_f32(least, as_float(as_bits(x[j]) & 0x7fffffffu));
    }
    const float squares = row_sum<kLanes>(y);
    const float width = mul_rn(sqrt_rn(div_rn(squares, static_cast<float>(HeadDim))), count);
    // A quotient that underflows may be a zero of either sign, of which the floor would tell.
    if (Divisor::covers(width) && least > 0x1p-100f) {
        const Divisor by(width);
KVC_UNROLL
        for (int j = 0; j < kOwn; ++j) y[j] = by.quotient(x[j]);
    } else {
KVC_UNROLL
        for (int j = 0; j < kOwn; ++j) y[j] = width == 0.0f ? -256.0f : div_rn(x[j], width);
    }
    const float zero = as_float(kInteger), middle = static_cast<float>(1u << (bits - 1));
    const float most = as_float(kInteger + (1u << bits) - 1);
KVC_UNROLL
    for (int i = 0; i < 4; ++i) {
        uint32_t word = 0 - integers(4, 8);
KVC_UNROLL
        for (int j = 4 * i; j < 4 * i + 4; ++j) {
            const float code = min_f32(max_f32(add_floor(y[j], add_rn(zero, middle)), zero), most);
            word += as_bits(code) << j % 4 * 8;
            // The code's point less half a step, and that exactly.
            const float point = add_rn(add_rn(code, -zero), add_rn(0.5f, -middle));
            y[j] = mul_rn(x[j], mul_rn(point, count));
        }
        codes.word[i] = word;
    }
    const float aligned = row_sum<kLanes>(y);
    scale = width == 0.0f ? 0 : pack_f16(div_rn(squares, aligned), 0.0f) & 0xffff;
    return is_finite(squares) && is_finite_f16(scale);
}

constexpr uint32_t kRefused = 1, kFirstSpare = 2, kTaken = 1u << 31;

// The spare slot of a tile, which the first of its heads takes; none is left from `spare_count` on.
KVC_DEVICE uint32_t take_spare(const kvc_seal_params &p, uint32_t index) {
    uint32_t *word = p.refused + index;
    if (atomic_or(word, kTaken) == 0) {
        const uint32_t taken = atomic_add(p.spares_taken, 1);
        atomic_or(word, taken < p.spare_count ? kFirstSpare + taken : kRefused);
    }
    // Whoever came first runs and waits for nobody.
    uint32_t seen;
    do {
        seen = atomic_or(word, kTaken) & ~kTaken;
    } while (seen == 0);
    return seen - kFirstSpare;
}

// Copies the rows of a head.
template <int HeadDim>
KVC_DEVICE void copy_rows(const uint16_t *from, int64_t from_token, uint16_t *to, int64_t to_token,
                          uint32_t tokens) {
    constexpr uint32_t kChunks = HeadDim / 8;
    for (uint32_t i = thread_x(); i < tokens * kChunks; i += kSealThreads) {
        const uint32_t token = i / kChunks, channel = i % kChunks * 8;
        store_16(to + token * to_token + channel,
                 *reinterpret_cast<const Vec16 *>(from + token * from_token + channel));
    }
}

// Bytes of four words as words of their first, second, third and fourth bytes.
KVC_DEVICE void transpose_bytes(uint32_t (&w)[4]) {
    const uint32_t a = permute(w[0], w[1], 0x5140), b = permute(w[2], w[3], 0x5140);
    const uint32_t c = permute(w[0], w[1], 0x7362), d = permute(w[2], w[3], 0x7362);
    w[0] = permute(a, b, 0x5410);
    w[1] = permute(a, b, 0x7632);
    w[2] = permute(c, d, 0x5410);
    w[3] = permute(c, d, 0x7632);
}

// The words of four value channels from `at` on: `Main` bits of the codes of 32 / Main tokens, and
// third bits where codes have three.
template <int HeadDim, uint32_t Main>
KVC_DEVICE void write_values(const kvc_seal_params &p, const SealArea<HeadDim> &area) {
    constexpr uint32_t kTokens = 32 / Main, kPitch = SealArea<HeadDim>::kPitch / 4;
    const uint32_t groups = p.tile_tokens / kTokens;
    unsigned char *plane = reinterpret_cast<unsigned char *>(area.record) + p.v_plane_at;
    for (uint32_t i = thread_x(); i < HeadDim / 4 * groups; i += kSealThreads) {
        const uint32_t four = i / groups, group = i % groups;
        const uint32_t *from = area.codes + group * kTokens * kPitch + four;
        uint32_t code[kTokens], words[4];
KVC_UNROLL
        for (uint32_t t = 0; t < kTokens; ++t) code[t] = from[t * kPitch];
        if constexpr (Main == 8) {
            for (int b = 0; b < 4; ++b) words[b] = code[b];
        } else if constexpr (Main == 4) {
            for (uint32_t b = 0; b < 4; ++b) {
                const uint32_t first = b % 2 * 4 + b / 2;
                words[b] = code[first] + (code[first + 2] << 4);
            }
        } else {
            const uint32_t two = p.v_bits == 3 ? 0x03030303u : 0xffffffffu;
            for (uint32_t b = 0; b < 4; ++b) {
                words[b] = 0;
                for (uint32_t j = 0; j < 4; ++j) words[b] += (code[4 * b + j] & two) << 2 * j;
            }
        }
        transpose_bytes(words);
        uint32_t *to = area.record + p.v_codes_at / 4 + 4 * four * groups + group;
KVC_UNROLL
        for (uint32_t c = 0; c < 4; ++c) to[c * groups] = words[c];
        if constexpr (Main == 2) {
            if (p.v_bits != 3) continue;
KVC_UNROLL
            for (uint32_t h = 0; h < 2; ++h) {
                uint32_t thirds = 0;
                for (uint32_t j = 0; j < 8; ++j)
                    thirds += (code[8 * h + j] >> 2 & 0x01010101u) << j;
                const uint32_t eights = p.tile_tokens / 8, byte = plane_byte(2 * group + h);
                for (uint32_t c = 0; c < 4; ++c)
                    plane[(4 * four + c) * eights + byte] =
                        static_cast<unsigned char>(thirds >> 8 * c);
            }
        }
    }
}

// The checksum of two words and `words` of the record; thread 0 has it.
KVC_DEVICE uint32_t block_crc(const CrcTables::Table &far, uint32_t *sums, uint32_t before,
                              const uint32_t *record, uint32_t words) {
    const uint32_t all = words + 2, rounds = (all + kSealThreads - 1) / kSealThreads;
    // Zeros before everything count for nothing.
    const uint32_t zeros = rounds * kSealThreads - all;
    uint32_t crc = 0;
KVC_ROLL
    for (uint32_t i = thread_x(); i < rounds * kSealThreads; i += kSealThreads) {
        const uint32_t at = i - zeros; // past everything where there are none
        crc = far.shift(crc) ^
              (i < zeros || at == 1 ? 0 : at == 0 ? ~before : record[at - 2]);
    }
    sums[thread_x()] = crc;
    sync_threads();
    if (warp_id() != 0) return 0;
    crc = 0;
KVC_ROLL
    for (uint32_t i = lane_id(); i < kSealThreads; i += 32) crc = kCrcTables.near.shift(crc) ^ sums[i];
    crc = crc_multiply(crc, kCrcTables.last[lane_id()]);
KVC_UNROLL
    for (uint32_t by = 1; by < 32; by *= 2) crc ^= shfl_xor(kFullMask, crc, by);
    return ~crc;
}

template <int HeadDim> KVC_DEVICE void seal(const kvc_seal_params &p) {
    constexpr uint32_t kGroups = HeadDim / kGroup, kLanes = HeadDim / kOwn;
    constexpr uint32_t kPitch = SealArea<HeadDim>::kPitch / 4;
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
    const uint32_t record_bytes = p.header_at + 16;
    const SealArea<HeadDim> area(tokens, record_bytes);
    unsigned char *record = reinterpret_cast<unsigned char *>(area.record);
    reinterpret_cast<Vec16 *>(area.far)[thread] =
        reinterpret_cast<const Vec16 *>(&kCrcTables.far)[thread];

    // Ranges of the key channels: of a thread's tokens, a warp's, all.
    const uint32_t group = thread % kGroups, first = group * kGroup;
    float low[kGroup], high[kGroup], x[kGroup], zero = 0.0f;
KVC_UNROLL
    for (int j = 0; j < kGroup; ++j) {
        low[j] = infinity();
        high[j] = -infinity();
    }
    for (uint32_t token = thread / kGroups; token < tokens; token += kSealThreads / kGroups) {
        load_group(k + token * k_token + first, x);
KVC_UNROLL
        for (int j = 0; j < kGroup; ++j) {
            zero = fma_rn(x[j], 0.0f, zero);
            low[j] = min_f32(low[j], x[j]);
            high[j] = max_f32(high[j], x[j]);
        }
    }
    bool sound = zero == 0.0f;
KVC_UNROLL
    for (int j = 0; j < kGroup; ++j) {
KVC_UNROLL
        for (uint32_t by = kGroups; by < 32; by *= 2) {
            low[j] = min_f32(low[j], shfl_xor(kFullMask, low[j], by));
            high[j] = max_f32(high[j], shfl_xor(kFullMask, high[j], by));
        }
        // All of them are bf16.
        if (lane_id() < kGroups)
            area.codes[warp_id() * HeadDim + first + j] =
                as_bits(low[j]) >> 16 | (as_bits(high[j]) & 0xffff0000u);
    }
    sync_threads();
    const uint32_t channel = thread % HeadDim;
    float least = infinity(), most = -infinity();
KVC_UNROLL
    for (uint32_t warp = 0; warp < kSealWarps; ++warp) {
        const uint32_t range = area.codes[warp * HeadDim + channel];
        least = min_f32(least, as_float(range << 16));
        most = max_f32(most, as_float(range & 0xffff0000u));
    }
    const float n = static_cast<float>((1u << p.k_bits) - 1);
    const float clip = p.k_bits == 3 ? 0.9f : p.k_bits == 2 ? 0.8f : 1.0f;
    const float middle = mul_rn(add_rn(least, most), 0.5f);
    const float farthest = block_max(area.room, as_float(as_bits(middle) & 0x7fffffffu));
    const uint32_t mid_bits = f16_up(div_rn(farthest, 127.0f));
    const float mid_unit = widen_f16(static_cast<uint16_t>(mid_bits));
    const float mid = code_of(middle, mid_unit, -127.0f, 127.0f);
    const float stored = mul_rn(mid, mid_unit);
    float half;
    if (p.k_bits == 8) {
        half = max_f32(add_rn(most, -stored), add_rn(stored, -least));
    } else {
        const float shift = as_float(as_bits(add_rn(middle, -stored)) & 0x7fffffffu);
        half = max_f32(mul_rn(mul_rn(add_rn(most, -least), 0.5f), clip), shift);
    }
    const float wanted = div_rn(mul_rn(2.0f, half), n);
    // Which zero the largest of zeros is must not reach the bits.
    const float widest = add_rn(block_max(area.room + kSealWarps, wanted), 0.0f);
    const uint32_t unit_bits = f16_up(div_rn(widest, 255.0f));
    const float unit = widen_f16(static_cast<uint16_t>(unit_bits));
    float units = unit == 0.0f ? 1.0f : ceil_f32(div_rn(wanted, unit));
    units = units < 1.0f ? 1.0f : units > 255.0f ? 255.0f : units;
    sound = sound && is_finite_f16(mid_bits) && is_finite_f16(unit_bits);
    if (thread < HeadDim) {
        const Divisor step(mul_rn(units, unit));
        area.step[channel] = step.by;
        area.inverse[channel] = step.inverse;
        area.base[channel] = add_rn(stored, -mul_rn(step.by, mul_rn(n, 0.5f)));
        record[p.k_steps_at + channel] = static_cast<unsigned char>(units);
        record[p.k_mids_at + channel] = static_cast<unsigned char>(static_cast<int32_t>(mid));
    }
    sync_threads();

    // Key rows: a step is at most 8 bits times 11.
    float base[kGroup], step[kGroup], inverse[kGroup];
KVC_UNROLL
    for (int j = 0; j < kGroup; ++j) {
        base[j] = area.base[first + j];
        step[j] = area.step[first + j];
        inverse[j] = area.inverse[first + j];
    }
KVC_ROLL
    for (uint32_t token = thread / kGroups; token < tokens; token += kSealThreads / kGroups) {
        load_group(k + token * k_token + first, x);
        uint32_t code[kGroup];
KVC_UNROLL
        for (int j = 0; j < kGroup; ++j) {
            const float offset = add_rn(x[j], -base[j]), near = mul_rn(offset, inverse[j]);
            const float exact = fma_rn(fma_rn(-near, step[j], offset), inverse[j], near);
            code[j] = integer_bits<0>(min_f32(max_f32(exact, 0.0f), n));
        }
        write_key(p.k_bits, record, p.k_plane_at, token * kGroups + group, code);
    }

    // Value rows: each in lanes beside each other.
    const uint32_t own = thread % kLanes * kOwn;
KVC_ROLL
    for (uint32_t token = thread / kLanes; token < tokens; token += kSealThreads / kLanes) {
        float row[kOwn];
        load_own(v + token * v_token, own, kBf16, row);
        sound = all_finite(row) && sound;
        Vec16 codes;
        uint32_t scale;
        sound = seal_value<HeadDim>(p.v_bits, row, own, codes, scale) && sound;
        for (uint32_t j = 0; j < 4; ++j) area.codes[token * kPitch + own / 4 + j] = codes.word[j];
        if (own == 0)
            *reinterpret_cast<uint16_t *>(record + p.v_scales_at + 2 * token) =
                static_cast<uint16_t>(scale);
    }
    unsigned char *out =
        static_cast<unsigned char *>(p.records) + block * p.record_block + head * p.record_head;
    if (block_max(area.room, sound ? 0.0f : 1.0f) != 0.0f) {
        const bool keep = scratch && p.spare_count != 0;
        if (thread == 0) {
            reinterpret_cast<uint32_t *>(out + p.header_at)[2] = 0;
            if (keep)
                area.sums[0] = take_spare(p, index);
            else
                p.refused[index] = kRefused;
        }
        if (!keep) return;
        sync_threads();
        if (area.sums[0] >= p.spare_count) return;
        const int32_t spare = p.spares[area.sums[0]];
        if (static_cast<uint32_t>(spare) >= p.staging_blocks) {
            if (thread == 0) raise(p.error_flag, kFlagBlock);
            return;
        }
        copy_rows<HeadDim>(k, k_token, static_cast<uint16_t *>(p.k) + spare * p.k_block + head * p.k_head,
                           p.k_token, tokens);
        copy_rows<HeadDim>(v, v_token, static_cast<uint16_t *>(p.v) + spare * p.v_block + head * p.v_head,
                           p.v_token, tokens);
        return;
    }

    // Value channels.
    if (p.v_bits == 8) {
        write_values<HeadDim, 8>(p, area);
    } else if (p.v_bits == 4) {
        write_values<HeadDim, 4>(p, area);
    } else {
        write_values<HeadDim, 2>(p, area);
    }
    uint32_t *header = area.record + p.header_at / 4;
    if (thread == 0) {
        header[0] = unit_bits | mid_bits << 16;
        header[1] = 0;
        header[2] = p.identity;
    }
    sync_threads();
    for (uint32_t at = thread * 16; at < p.header_at; at += kSealThreads * 16)
        store_16(out + at, *reinterpret_cast<const Vec16 *>(record + at));
    const uint32_t crc = block_crc(*area.far, area.sums, HeadDim | static_cast<uint32_t>(HeadDim) << 16,
                                   area.record, p.header_at / 4 + 3);
    if (thread == 0) store_16(out + p.header_at, {{header[0], header[1], header[2], crc}});
}

} // namespace kvc

#define KVC_SEAL(dim)                                                                    \
    KVC_KERNEL(kvc_seal_d##dim, kvc_seal_params, 256, 3) { kvc::seal<dim>(p); }
