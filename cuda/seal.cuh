// Sealing: the raw rows of full tiles become records, as src/quant/seal.rs has it, bit for bit. One block
// for each tile and KV head.
//
// The record is made in shared memory and written at the end. While the warps that have a key channel a
// thread work out how each is coded, the others go on to the values. A head whose rows cannot be sealed
// leaves a record whose header has no format, and sets its tile's entry of `refused`; rows of scratch,
// which nobody keeps, are then copied to a spare slot of the staging pool, one for all heads and layers
// of a tile. A CRC is linear: every thread takes each 256th word, multiplied by what lies behind it.
#pragma once
#include "crc.cuh"
#include "page.cuh"
#include "seal_codes.cuh"

namespace kvc {

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

// The least and the largest of each key channel over a warp's tokens.
template <int HeadDim>
KVC_DEVICE void find_ranges(const SealArea<HeadDim> &area, const uint16_t *k, int64_t k_token,
                            uint32_t tokens) {
    constexpr uint32_t kGroups = HeadDim / kGroup, kStep = kSealThreads / kGroups;
    const uint32_t group = thread_x() % kGroups;
    constexpr uint32_t kBatch = 4; // rows whose loads are under way together
    const uint16_t *row = k + thread_x() / kGroups * k_token + group * kGroup;
    const Vec16 first = *reinterpret_cast<const Vec16 *>(row);
    Vec16 low = first, high = first;
KVC_ROLL
    for (uint32_t token = thread_x() / kGroups; token < tokens; token += kBatch * kStep) {
        Vec16 rows[kBatch];
KVC_UNROLL
        for (uint32_t n = 0; n < kBatch; ++n) {
            rows[n] = token + n * kStep < tokens ? *reinterpret_cast<const Vec16 *>(row) : first;
            row += kStep * k_token;
        }
KVC_UNROLL
        for (uint32_t n = 0; n < kBatch; ++n) {
KVC_UNROLL
            for (int i = 0; i < 4; ++i) {
                low.word[i] = min_nan_bf16x2(low.word[i], rows[n].word[i]);
                high.word[i] = max_nan_bf16x2(high.word[i], rows[n].word[i]);
            }
        }
    }
KVC_UNROLL
    for (int i = 0; i < 4; ++i) {
KVC_UNROLL
        for (uint32_t by = kGroups; by < 32; by *= 2) {
            low.word[i] = min_nan_bf16x2(low.word[i], shfl_xor(kFullMask, low.word[i], by));
            high.word[i] = max_nan_bf16x2(high.word[i], shfl_xor(kFullMask, high.word[i], by));
        }
    }
    if (lane_id() < kGroups) {
        uint32_t *range = area.ranges + warp_id() * HeadDim + group * 4;
        *reinterpret_cast<Vec16 *>(range) = low;
        *reinterpret_cast<Vec16 *>(range + HeadDim / 2) = high;
    }
}

// The largest over the threads that have a key channel, which meet here.
template <int HeadDim> KVC_DEVICE float largest_channel(float *room, float x) {
    x = over_lanes<32>(x, [](float a, float b) { return max_f32(a, b); });
    if (lane_id() == 0) room[warp_id()] = x;
    sync_named(1, HeadDim);
    float top = room[0];
KVC_UNROLL
    for (uint32_t i = 1; i < HeadDim / 32; ++i) top = max_f32(top, room[i]);
    return top;
}

// How a thread's key channel is coded, for the others and in the record; false where it cannot be.
template <int HeadDim>
KVC_DEVICE bool measure_channel(const kvc_seal_params &p, const SealArea<HeadDim> &area) {
    const uint32_t channel = thread_x();
    unsigned char *record = reinterpret_cast<unsigned char *>(area.record);
    const uint32_t *range = area.ranges + channel / 2;
    uint32_t low = range[0], high = range[HeadDim / 2];
KVC_UNROLL
    for (uint32_t warp = 1; warp < kSealWarps; ++warp) {
        low = min_nan_bf16x2(low, range[warp * HeadDim]);
        high = max_nan_bf16x2(high, range[warp * HeadDim + HeadDim / 2]);
    }
    low = channel % 2 == 0 ? low << 16 : low & 0xffff0000u;
    high = channel % 2 == 0 ? high << 16 : high & 0xffff0000u;
    const bool finite = (low & 0x7f800000u) != 0x7f800000u && (high & 0x7f800000u) != 0x7f800000u;
    const float least = finite ? as_float(low) : 0.0f, most = finite ? as_float(high) : 0.0f;

    const float n = static_cast<float>((1u << p.k_bits) - 1);
    const float clip = p.k_bits == 3 ? 0.9f : p.k_bits == 2 ? 0.8f : 1.0f;
    const float middle = mul_rn(add_rn(least, most), 0.5f);
    const float farthest =
        largest_channel<HeadDim>(area.room, as_float(as_bits(middle) & 0x7fffffffu));
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
    const float widest =
        add_rn(largest_channel<HeadDim>(area.room + kSealWarps, wanted), 0.0f);
    const uint32_t unit_bits = f16_up(div_rn(widest, 255.0f));
    const float unit = widen_f16(static_cast<uint16_t>(unit_bits));
    float units = unit == 0.0f ? 1.0f : ceil_f32(div_rn(wanted, unit));
    units = units < 1.0f ? 1.0f : units > 255.0f ? 255.0f : units;

    const Divisor step(mul_rn(units, unit));
    const float whole = static_cast<float>(1u << p.k_bits);
    area.step[channel] = mul_rn(step.by, whole);
    area.inverse[channel] = mul_rn(step.inverse, 1.0f / whole);
    area.base[channel] = add_rn(stored, -mul_rn(step.by, mul_rn(n, 0.5f)));
    record[p.k_steps_at + channel] = static_cast<unsigned char>(units);
    record[p.k_mids_at + channel] = static_cast<unsigned char>(static_cast<int32_t>(mid));
    if (channel == 0) {
        uint32_t *header = area.record + p.header_at / 4;
        header[0] = unit_bits | mid_bits << 16;
        header[1] = 0;
        header[2] = p.identity;
    }
    return finite && is_finite_f16(mid_bits) && is_finite_f16(unit_bits);
}

// The value rows, each in lanes beside each other: their codes by token, their scales into the record;
// false where one cannot be sealed.
template <int HeadDim>
KVC_DEVICE bool encode_values(const kvc_seal_params &p, const SealArea<HeadDim> &area,
                              const uint16_t *v, int64_t v_token) {
    constexpr uint32_t kLanes = HeadDim / kOwn, kStep = kSealThreads / kLanes;
    constexpr uint32_t kPitch = SealArea<HeadDim>::kPitch / 4;
    const uint32_t own = thread_x() % kLanes * kOwn;
    bool sound = true;
KVC_ROLL
    for (uint32_t token = thread_x() / kLanes; token < p.tile_tokens; token += kStep) {
        ValueRow row;
        row.load(v + token * v_token + own);
        Vec16 codes;
        uint32_t scale;
        sound = seal_value<HeadDim>(p.v_bits, row, own, codes, scale) && sound;
        for (uint32_t j = 0; j < 4; ++j) area.codes[token * kPitch + own / 4 + j] = codes.word[j];
        if (own == 0)
            reinterpret_cast<uint16_t *>(area.record)[p.v_scales_at / 2 + token] =
                static_cast<uint16_t>(scale);
    }
    return sound;
}

// The key rows into the record.
template <int HeadDim>
KVC_DEVICE void encode_keys(const kvc_seal_params &p, const SealArea<HeadDim> &area,
                            const uint16_t *k, int64_t k_token) {
    constexpr uint32_t kGroups = HeadDim / kGroup, kStep = kSealThreads / kGroups;
    constexpr int kBatch = 2; // rows whose loads are under way together
    const uint32_t group = thread_x() % kGroups;
    const KeyGroup keys(area, p.k_bits, group * kGroup);
    const uint16_t *at = k + thread_x() / kGroups * k_token + group * kGroup;
KVC_ROLL
    for (uint32_t token = thread_x() / kGroups; token < p.tile_tokens; token += kBatch * kStep) {
        Vec16 rows[kBatch];
KVC_UNROLL
        for (int n = 0; n < kBatch; ++n) {
            if (token + n * kStep < p.tile_tokens) rows[n] = *reinterpret_cast<const Vec16 *>(at);
            at += kStep * k_token;
        }
KVC_UNROLL
        for (int n = 0; n < kBatch; ++n) {
            if (token + n * kStep >= p.tile_tokens) break;
            uint32_t pairs[kGroup / 2];
            keys.encode(rows[n], pairs);
            write_key(p.k_bits, reinterpret_cast<unsigned char *>(area.record), p.k_plane_at,
                      (token + n * kStep) * kGroups + group, pairs);
        }
    }
}

// The checksum of two words, `before` and 0, and `words` of the record; thread 0 has it.
template <uint32_t Before>
KVC_DEVICE uint32_t block_crc(uint32_t *sums, const uint32_t *record, uint32_t words) {
    const CrcShift far(kCrcTables.far);
    const uint32_t rounds = (words + kSealThreads - 1) / kSealThreads;
    // Zeros before everything count for nothing.
    const uint32_t zeros = rounds * kSealThreads - words;
    const uint32_t *at = record + thread_x() - zeros;
    uint32_t crc = thread_x() < zeros ? 0 : *at ^ (thread_x() == zeros ? kCrcAfter<Before> : 0);
KVC_ROLL
    for (uint32_t round = 1; round < rounds; ++round) {
        at += kSealThreads;
        crc = far(crc) ^ *at;
    }
    sums[thread_x()] = crc;
    sync_threads();
    if (warp_id() != 0) return 0;
    const CrcShift near(kCrcTables.near);
    crc = sums[lane_id()];
KVC_UNROLL
    for (uint32_t i = 32; i < kSealThreads; i += 32) crc = near(crc) ^ sums[i + lane_id()];
    crc = crc_behind(crc);
KVC_UNROLL
    for (uint32_t by = 1; by < 32; by *= 2) crc ^= shfl_xor(kFullMask, crc, by);
    return ~crc;
}

template <int HeadDim> KVC_DEVICE void seal(const kvc_seal_params &p) {
    const uint32_t thread = thread_x(), tokens = p.tile_tokens;
    const uint32_t index = quotient_of(block_x(), p.kv_heads), head = block_x() - index * p.kv_heads;
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
    const SealArea<HeadDim> area(tokens, p.header_at + 16);
    find_ranges(area, k, k_token, tokens);
    sync_threads();
    bool sound = thread >= HeadDim || measure_channel(p, area);
    sound = encode_values(p, area, v, v_token) && sound;
    const uint32_t unsound = ballot(kFullMask, !sound);
    if (lane_id() == 0) area.unsound[warp_id()] = unsound;
    sync_threads();

    unsigned char *out =
        static_cast<unsigned char *>(p.records) + block * p.record_block + head * p.record_head;
    uint32_t refused = 0;
KVC_UNROLL
    for (uint32_t warp = 0; warp < kSealWarps; ++warp) refused |= area.unsound[warp];
    if (refused != 0) {
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

    encode_keys(p, area, k, k_token);
    if (p.v_bits == 8) {
        write_values<HeadDim, 8>(p, area);
    } else if (p.v_bits == 4) {
        write_values<HeadDim, 4>(p, area);
    } else {
        write_values<HeadDim, 2>(p, area);
    }
    sync_threads();
    const uint32_t *record = area.record, *header = record + p.header_at / 4;
    for (uint32_t at = thread * 16; at < p.header_at; at += kSealThreads * 16)
        store_16(out + at, *reinterpret_cast<const Vec16 *>(record + at / 4));
    constexpr uint32_t kDims = HeadDim | static_cast<uint32_t>(HeadDim) << 16;
    const uint32_t crc = block_crc<kDims>(area.sums, record, p.header_at / 4 + 3);
    if (thread == 0) store_16(out + p.header_at, {{header[0], header[1], header[2], crc}});
}

} // namespace kvc

#define KVC_SEAL(dim)                                                                    \
    KVC_KERNEL(kvc_seal_d##dim, kvc_seal_params, 256, 4) { kvc::seal<dim>(p); }
