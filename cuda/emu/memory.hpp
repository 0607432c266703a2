// Memory whose end, up to alignment, is an unmapped page, with another before it, so that a kernel's
// read or write past it is caught at once. What alignment leaves over on either side holds a known
// pattern, which shows writes there. Fresh memory is all 0xff: NaN in every float format.
#pragma once
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace kvc::emu {

constexpr size_t kAlign = 128;
constexpr unsigned char kCanary = 0xc5;

inline size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

struct Guarded {
    char *map = nullptr;
    size_t map_bytes = 0;
    unsigned char *base = nullptr;
    size_t bytes = 0, room = 0;
    std::thread::id owner = std::this_thread::get_id();

    static Guarded make(size_t bytes) {
        Guarded g;
        const size_t page = page_bytes();
        g.bytes = bytes;
        g.room = (bytes + kAlign - 1) / kAlign * kAlign;
        const size_t body = (g.room + page - 1) / page * page;
        g.map_bytes = body + 2 * page;
        void *map = mmap(nullptr, g.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED) return {};
        g.map = static_cast<char *>(map);
        if (body != 0 && mprotect(g.map + page, body, PROT_READ | PROT_WRITE) != 0) {
            munmap(g.map, g.map_bytes);
            return {};
        }
        g.base = reinterpret_cast<unsigned char *>(g.map + page + body - g.room);
        memset(g.map + page, kCanary, body);
        memset(g.base, 0xff, bytes);
        g.asan(true);
        return g;
    }
    void free() {
        if (map == nullptr) return;
        asan(false);
        munmap(map, map_bytes);
        map = nullptr;
    }
    unsigned char *slack() const { return reinterpret_cast<unsigned char *>(map + page_bytes()); }
    // The first byte around the memory that somebody wrote, or null.
    const unsigned char *touched() const {
#if !defined(__SANITIZE_ADDRESS__)
        for (const unsigned char *at = slack(); at < base; ++at)
            if (*at != kCanary) return at;
        for (const unsigned char *at = base + bytes; at < base + room; ++at)
            if (*at != kCanary) return at;
#endif
        return nullptr;
    }
    void asan(bool poison) const {
#if defined(__SANITIZE_ADDRESS__)
        const size_t before = static_cast<size_t>(base - slack());
        if (poison) {
            __asan_poison_memory_region(slack(), before);
            __asan_poison_memory_region(base + bytes, room - bytes);
        } else {
            __asan_unpoison_memory_region(slack(), before + room);
        }
#else
        (void)poison;
#endif
    }
};

} // namespace kvc::emu
