// Products of a warpgroup (wgmma), by their definition, warp by warp: each warp of the four has 16
// of the 64 rows and goes its own way, as no instruction here makes it wait for the others.
//
// A product may happen at any time between its start and the wait that covers it. Late ones (the
// forward schedule) leave NaN where the sums will be, take their operands when somebody waits, and
// see of shared memory only what bulk copies and fence_async made visible to them; early ones take
// their operands at once. So a missing wait, a missing fence_async and a buffer that is refilled too
// early show as wrong results, and what can be known for sure is a fault: no fence before the first
// product after a wait, products nobody waited for, warps that start different ones.
#include "block.hpp"

#include <algorithm>

namespace kvc::emu {

namespace {

// Where element (row of A or column of B, k) of an operand lies in shared memory.
struct Operand {
    uint32_t start, leading, stride, width;
    bool mn;

    Operand(uint64_t descriptor, bool mn_major, const Site &site)
        : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
          leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4), mn(mn_major) {
        static const uint32_t widths[] = {16, 128, 64, 32};
        width = widths[descriptor >> 62];
        if (descriptor >> 49 & 7)
            fault(Fault::protocol, &site, "a descriptor with a base offset, which is not emulated");
    }

    uint32_t offset(uint32_t row, uint32_t k) const {
        const uint32_t along = mn ? row : k, across = mn ? k : row;
        const uint32_t chunk = along / 8, per_width = width / 16;
        uint32_t at = start + across % 8 * width + along % 8 * 2;
        if (width == 16)
            at += mn ? across / 8 * leading + chunk * stride : across / 8 * stride + chunk * leading;
        else
            at += across / 8 * stride + chunk % per_width * 16 + chunk / per_width * leading;
        return at ^ (at >> 7 & (per_width - 1)) << 4;
    }

    float read(uint32_t row, uint32_t k, bool bf16, const Site &site) const {
        const uint32_t at = offset(row, k);
        check_shared(block->shared + at, 2, 2, site);
        const bool late = block->schedule == Schedule::forward;
        uint16_t bits;
        memcpy(&bits, (late ? block->async_view.data() : block->shared) + at, 2);
        return bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
    }
};

// Calls f(register, row, column) for each sum that a lane has.
template <typename F> void each_sum(uint32_t lane, uint32_t columns, F f) {
    for (uint32_t i = 0; i < columns / 2; ++i)
        f(i, lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
}

bool same(const Product &a, const Product &b) {
    return a.columns == b.columns && a.bf16 == b.bf16 && a.a_shared == b.a_shared &&
           a.a_mn == b.a_mn && a.b_mn == b.b_mn && a.add == b.add && a.a_desc == b.a_desc &&
           a.b_desc == b.b_desc;
}

void save(Pending &p) {
    p.saved = true;
    p.start.resize(32 * p.product.columns / 2);
    for (uint32_t lane = 0; lane < 32; ++lane)
        memcpy(&p.start[lane * p.product.columns / 2], p.d[lane], p.product.columns * 2);
}

void poison(const Pending &p) {
    for (float *d : p.d) memset(d, 0xff, p.product.columns * 2);
}

void run(const Pending &p, uint32_t warp) {
    const Product &product = p.product;
    float a[16][16], b[256][16];
    if (product.a_shared) {
        const Operand from(product.a_desc, product.a_mn, p.site);
        for (uint32_t row = 0; row < 16; ++row)
            for (uint32_t k = 0; k < 16; ++k)
                a[row][k] = from.read(warp % 4 * 16 + row, k, product.bf16, p.site);
    } else {
        for (uint32_t lane = 0; lane < 32; ++lane)
            for (uint32_t i = 0; i < 8; ++i) {
                const auto bits = static_cast<uint16_t>(p.a[lane][i / 2] >> i % 2 * 16);
                a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
                    product.bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
            }
    }
    const Operand from(product.b_desc, product.b_mn, p.site);
    for (uint32_t column = 0; column < product.columns; ++column)
        for (uint32_t k = 0; k < 16; ++k)
            b[column][k] = from.read(column, k, product.bf16, p.site);
    for (uint32_t lane = 0; lane < 32; ++lane) {
        float *d = p.d[lane];
        const float *start = p.saved ? &p.start[lane * product.columns / 2] : d;
        each_sum(lane, product.columns, [&](uint32_t i, uint32_t row, uint32_t column) {
            double sum = product.add ? start[i] : 0.0;
            for (uint32_t k = 0; k < 16; ++k) sum += double(a[row][k]) * b[column][k];
            d[i] = static_cast<float>(sum);
        });
    }
}

// Runs the oldest `count` products; what later ones add to is out of reach again.
void run_oldest(WarpProducts &of, size_t count, uint32_t warp) {
    for (size_t i = 0; i < count; ++i) {
        run(of.queue[i], warp);
        const float *d = of.queue[i].d[0];
        const auto next = std::find_if(of.queue.begin() + static_cast<ptrdiff_t>(i) + 1,
                                       of.queue.end(), [d](const Pending &p) { return p.d[0] == d; });
        if (next == of.queue.end()) continue;
        save(*next);
        poison(*next);
    }
    of.queue.erase(of.queue.begin(), of.queue.begin() + static_cast<ptrdiff_t>(count));
}

const Product &product_of(const Thread &lane) {
    const Product *product;
    memcpy(&product, lane.words->in, sizeof product);
    return *product;
}

void start(WarpProducts &of, Thread *const (&lanes)[32], uint32_t warp) {
    const Site site = lanes[0]->site;
    const Product &first = product_of(*lanes[0]);
    if ((warp / 4 + 1) * 128 > block->threads.size())
        fault(Fault::diverged, &site, "a product of a warpgroup that is not whole");
    for (const Thread *lane : lanes)
        if (!same(first, product_of(*lane)))
            fault(Fault::diverged, &site, "lane %u starts another product than lane 0",
                  lane->id % 32);
    if (!of.fenced)
        fault(Fault::protocol, &site, "a product without wgmma_fence since the last wait");
    const uint64_t words[] = {first.a_shared ? first.a_desc : 0, first.b_desc, first.columns,
                              uint64_t(first.bf16) | uint64_t(first.a_shared) << 1 |
                                  uint64_t(first.a_mn) << 2 | uint64_t(first.b_mn) << 3 |
                                  uint64_t(first.add) << 4,
                              static_cast<uint64_t>(site.line)};
    for (uint64_t word : words) of.trace = (of.trace ^ word) * 0x100000001b3u + 1;

    const bool chained = std::any_of(of.queue.begin(), of.queue.end(),
                                     [&](const Pending &p) { return p.d[0] == first.d; });
    of.queue.emplace_back();
    Pending &p = of.queue.back();
    p.product = first;
    p.group = of.open;
    p.site = site;
    for (uint32_t i = 0; i < 32; ++i) {
        const Product &own = product_of(*lanes[i]);
        p.d[i] = own.d;
        memcpy(p.a[i], own.a, sizeof own.a);
    }
    of.last = p.group + 1;
    of.site = site;
    if (!chained) save(p);
    poison(p);
    if (eager()) run_oldest(of, of.queue.size(), warp);
}

} // namespace

void warpgroup_op(Op op, Thread *const (&lanes)[32]) {
    const uint32_t warp = lanes[0]->id / 32;
    WarpProducts &of = block->products[warp];
    const uint32_t left = lanes[0]->words->in[2];
    switch (op) {
    case Op::wgmma: return start(of, lanes, warp);
    case Op::wgmma_fence: of.fenced = true; return;
    case Op::wgmma_commit: ++of.open; return;
    case Op::wgmma_wait: {
        const uint64_t covered = of.open > left ? of.open - left : 0;
        const auto covers = [covered](const Pending &p) { return p.group < covered; };
        const auto count = std::count_if(of.queue.begin(), of.queue.end(), covers);
        run_oldest(of, static_cast<size_t>(count), warp);
        of.waited = std::max(of.waited, covered);
        of.fenced = false;
        return;
    }
    default: return;
    }
}

void warpgroup(Op op, const Product *product, uint32_t left, const Site &site) {
    Words w = {};
    memcpy(w.in, &product, sizeof product);
    w.in[2] = left;
    collective(op, 0xffffffffu, w, site);
}

void fence_async() {
    Block &b = *block;
    if (b.schedule == Schedule::forward) memcpy(b.async_view.data(), b.shared, b.shared_bytes);
}

void check_products(Block &b) {
    for (size_t warp = 0; warp < b.products.size(); ++warp) {
        const WarpProducts &of = b.products[warp], &first = b.products[warp / 4 * 4];
        if (of.last > of.waited)
            fault(Fault::protocol, &of.site, "warp %zu started a product that nobody waited for",
                  warp);
        if (of.trace != first.trace)
            fault(Fault::diverged, of.trace != 0 ? &of.site : &first.site,
                  "warps %zu and %zu of a warpgroup started different products", warp / 4 * 4, warp);
    }
}

} // namespace kvc::emu
