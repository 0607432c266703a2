// CRC-32C as arithmetic of polynomials modulo its own: the lowest power in the highest bit, so that the
// little-endian word of four bytes is a polynomial. A word of a message counts times x^32 for itself and
// for each word behind it.
//
// To multiply by a fixed power of x is to look up five bits at a time. Such a table has an entry for
// each lane, and a shuffle looks up for all of them at once: in shared memory lanes would want words of
// one bank, three to four of them on average.
#pragma once
#include "ptx.cuh"

namespace kvc {

// Times x.
KVC_DEVICE constexpr uint32_t crc_shift(uint32_t crc) {
    return (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0);
}

struct CrcTables {
    static constexpr uint32_t kParts = 7; // of five bits, the last of two
    struct Table {
        uint32_t entries[kParts][32];
    };
    Table far, near; // times x^(32 * 256) and x^(32 * 32)
    // x^(32 * (32 - lane)), and that times x^8, x^16, x^24.
    uint32_t last[4][32];

    // x^(32 << doublings).
    static constexpr uint32_t power(uint32_t doublings) {
        uint32_t x = 0x40000000u;
        for (uint32_t i = 0; i < 5 + doublings; ++i) x = product(x, x);
        return x;
    }
    static constexpr uint32_t product(uint32_t a, uint32_t b) {
        uint32_t sum = 0;
        for (; a != 0; a <<= 1) {
            if ((a & 0x80000000u) != 0) sum ^= b;
            b = (b >> 1) ^ ((b & 1) != 0 ? 0x82f63b78u : 0);
        }
        return sum;
    }
    static constexpr void fill(Table &table, uint32_t factor) {
        for (uint32_t bit = 32; bit-- > 0;) {
            table.entries[bit / 5][1u << bit % 5] = factor;
            factor = (factor >> 1) ^ ((factor & 1) != 0 ? 0x82f63b78u : 0);
        }
        for (uint32_t part = 0; part < kParts; ++part)
            for (uint32_t i = 1; i < (part < 6 ? 32 : 4); ++i)
                table.entries[part][i] =
                    table.entries[part][i & (i - 1)] ^ table.entries[part][i & (0 - i)];
    }
    constexpr CrcTables() : far{}, near{}, last{} {
        fill(far, power(8));
        fill(near, power(5));
        uint32_t x = 0x80000000u;
        for (uint32_t i = 32; i-- > 0;) {
            x = product(x, power(0));
            last[0][i] = x;
            for (uint32_t byte = 1; byte < 4; ++byte)
                last[byte][i] = product(last[byte - 1][i], 0x00800000u);
        }
    }
};
// What a checksum that began with `Word` and a word of zeros adds to the word behind them.
template <uint32_t Word>
constexpr uint32_t kCrcAfter = CrcTables::product(~Word, CrcTables::power(1));

KVC_TABLE CrcTables kCrcTables{};

// A table in the registers of a warp, whose lanes all look up together.
struct CrcShift {
    uint32_t entries[CrcTables::kParts];
    KVC_DEVICE explicit CrcShift(const CrcTables::Table &table) {
KVC_UNROLL
        for (uint32_t part = 0; part < CrcTables::kParts; ++part)
            entries[part] = table.entries[part][lane_id()];
    }
    KVC_DEVICE uint32_t operator()(uint32_t crc) const {
        uint32_t sum = 0;
KVC_UNROLL
        for (uint32_t part = 0; part < CrcTables::kParts; ++part)
            sum ^= shfl(kFullMask, entries[part], crc >> 5 * part);
        return sum;
    }
};

// Times what lies behind the word of this lane; each byte for itself.
KVC_DEVICE uint32_t crc_behind(uint32_t crc) {
    uint32_t factor[4], product = 0;
KVC_UNROLL
    for (uint32_t byte = 0; byte < 4; ++byte) factor[byte] = kCrcTables.last[byte][lane_id()];
KVC_UNROLL
    for (uint32_t i = 0; i < 8; ++i) {
KVC_UNROLL
        for (uint32_t byte = 0; byte < 4; ++byte) {
            product ^= (crc >> (31 - 8 * byte - i) & 1) != 0 ? factor[byte] : 0;
            factor[byte] = crc_shift(factor[byte]);
        }
    }
    return product;
}

} // namespace kvc
