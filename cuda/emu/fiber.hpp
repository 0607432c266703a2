// Fibers: one stack and one saved stack pointer for each emulated CUDA thread.
//
// Two ways to switch, chosen at run time so that one machine tests both: a few instructions of
// assembly on x86-64, and ucontext everywhere (ten times slower: it saves the signal mask). A fiber
// may be abandoned at any point; kernels own nothing that needs a destructor. This file knows
// nothing of CUDA.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__linux__)
#define KVC_EMU_ASM_SWITCH 1
// Saves the callee-saved registers and the stack pointer at *save, and takes up those at load.
extern "C" void kvc_emu_switch(void **save, void *load);
#else
#define KVC_EMU_ASM_SWITCH 0
#endif

namespace kvc::emu {

// A context that control can leave and come back to: a fiber, or the scheduler's own stack.
struct Context {
    void *sp = nullptr;
    ucontext_t uc;
    void *fake_stack = nullptr;
    const void *bottom = nullptr;
    size_t bytes = 0;
};

// A stack with unmapped memory below it, more than a frame of a kernel takes.
class Stack {
  public:
    static constexpr size_t kGuard = 64 << 10; // a multiple of any page

    // `bytes` is a multiple of 64 KiB.
    explicit Stack(size_t bytes) : bytes_(bytes) {
        void *base = mmap(nullptr, bytes_ + kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<char *>(base);
        if (mprotect(base_ + kGuard, bytes_, PROT_READ | PROT_WRITE) != 0) {
            munmap(base_, bytes_ + kGuard);
            throw std::bad_alloc();
        }
    }
    Stack(const Stack &) = delete;
    Stack &operator=(const Stack &) = delete;
    ~Stack() {
        unpoison();
        munmap(base_, bytes_ + kGuard);
    }
    // What an abandoned fiber left poisoned for AddressSanitizer.
    void unpoison() {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(bottom(), bytes_);
#endif
    }
    char *bottom() const { return base_ + kGuard; }
    char *top() const { return base_ + kGuard + bytes_; }
    size_t bytes() const { return bytes_; }
    bool guards(const void *address) const {
        const char *at = static_cast<const char *>(address);
        return at >= base_ && at < base_ + kGuard;
    }

  private:
    char *base_;
    size_t bytes_;
};

// Prepares `context` to run `entry` from its beginning on `stack`. `entry` must never return.
inline void prepare(Context &context, Stack &stack, void (*entry)(), bool assembly) {
    stack.unpoison();
    context.bottom = stack.bottom();
    context.bytes = stack.bytes();
    context.fake_stack = nullptr;
#if KVC_EMU_ASM_SWITCH
    if (assembly) {
        // Six registers, then the address `ret` takes, then a return address nobody uses: the
        // stack is aligned at the entry as after a call.
        void **sp = reinterpret_cast<void **>(stack.top());
        *--sp = nullptr;
        *--sp = reinterpret_cast<void *>(entry);
        for (int i = 0; i < 6; ++i) *--sp = nullptr;
        context.sp = sp;
        return;
    }
#endif
    (void)assembly;
    getcontext(&context.uc);
    context.uc.uc_stack.ss_sp = stack.bottom();
    context.uc.uc_stack.ss_size = stack.bytes();
    context.uc.uc_link = nullptr;
    makecontext(&context.uc, entry, 0);
}

// Leaves `from` and continues in `to`; returns when somebody switches back to `from`.
inline void switch_to(Context &from, Context &to, bool assembly) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#if KVC_EMU_ASM_SWITCH
    if (assembly)
        kvc_emu_switch(&from.sp, to.sp);
    else
#endif
        swapcontext(&from.uc, &to.uc);
    (void)assembly;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing a fresh fiber does: tells AddressSanitizer where it is, and learns where the
// scheduler's stack lies.
inline void first_entry(Context &scheduler) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.bytes);
#else
    (void)scheduler;
#endif
}

} // namespace kvc::emu
