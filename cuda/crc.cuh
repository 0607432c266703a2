// CRC-32C as arithmetic of polynomials modulo its own: the lowest power in the highest bit, so that the
// little-endian word of four bytes is a polynomial. A word of a message counts times x^32 for itself and
// for each word behind it. Tables multiply by a fixed power of x, a byte at a time.
#pragma once
#include "ptx.cuh"

namespace kvc {

// Times x.
KVC_DEVICE constexpr uint32_t crc_shift(uint32_t crc) {
    return (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0);
}
// The product of two.
KVC_DEVICE constexpr uint32_t crc_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t i = 0; i < 32; ++i) {
        if ((a >> (31 - i) & 1) != 0) product ^= b;
        b = crc_shift(b);
    }
    return product;
}

struct CrcTables {
    struct alignas(16) Table {
        uint32_t entries[4][256];
        KVC_DEVICE uint32_t shift(uint32_t crc) const {
            return entries[0][crc & 0xff] ^ entries[1][crc >> 8 & 0xff] ^
                   entries[2][crc >> 16 & 0xff] ^ entries[3][crc >> 24];
        }
    };
    Table far, near;   // times x^(32 * 256) and x^(32 * 32)
    uint32_t last[32]; // x^(32 * (32 - i))

    // x^(32 << doublings).
    static constexpr uint32_t power(uint32_t doublings) {
        uint32_t x = 0x40000000u;
        for (uint32_t i = 0; i < 5 + doublings; ++i) x = product(x, x);
        return x;
    }
    // crc_multiply, for the compiler of the host.
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
            table.entries[bit / 8][1u << bit % 8] = factor;
            factor = (factor >> 1) ^ ((factor & 1) != 0 ? 0x82f63b78u : 0);
        }
        for (uint32_t i = 1; i < 256; ++i)
            for (uint32_t byte = 0; byte < 4; ++byte)
                table.entries[byte][i] =
                    table.entries[byte][i & (i - 1)] ^ table.entries[byte][i & (0 - i)];
    }
    constexpr CrcTables() : far{}, near{}, last{} {
        fill(far, power(8));
        fill(near, power(5));
        uint32_t x = 0x80000000u;
        for (uint32_t i = 32; i-- > 0;) last[i] = x = product(x, power(0));
    }
};

KVC_TABLE CrcTables kCrcTables{};

} // namespace kvc
