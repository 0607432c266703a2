//! A program without `std` that uses the library: own panic handler, own allocator, `main` as C
//! knows it. It must link, and its exit code says whether the plan it made was right.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicUsize, Ordering};

use kvcache::dtype::KvFormat;
use kvcache::plan::{Budget, Workload, plan, presets::Preset};

// Only the C start-up code and `abort` come from outside.
#[link(name = "c")]
unsafe extern "C" {
    fn abort() -> !;
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: abort takes nothing and does not return.
    unsafe { abort() }
}

/// Named by the landing pads of the precompiled `alloc`; nothing unwinds, so nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

const ARENA_BYTES: usize = 1 << 20;

/// Hands out a static array once, front to back.
struct Bump {
    next: AtomicUsize,
}

#[repr(align(64))]
struct Arena(core::cell::UnsafeCell<[u8; ARENA_BYTES]>);
// SAFETY: every byte is handed out at most once, by an atomic counter.
unsafe impl Sync for Arena {}
static ARENA: Arena = Arena(core::cell::UnsafeCell::new([0; ARENA_BYTES]));

#[global_allocator]
static ALLOCATOR: Bump = Bump { next: AtomicUsize::new(0) };

// SAFETY: ranges are disjoint, aligned up to 64, and live as long as the program.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() > 64 {
            return core::ptr::null_mut();
        }
        let bytes = layout.size().next_multiple_of(64);
        let at = self.next.fetch_add(bytes, Ordering::Relaxed);
        if at.checked_add(bytes).is_none_or(|end| end > ARENA_BYTES) {
            return core::ptr::null_mut();
        }
        // SAFETY: at + bytes lies in the arena.
        unsafe { ARENA.0.get().cast::<u8>().add(at) }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[unsafe(no_mangle)]
extern "C" fn main() -> core::ffi::c_int {
    let Some(preset) = Preset::find("kimi-k2") else { return 1 };
    let budget = Budget { memory_bytes: 141 << 30, weight_bytes: 0, reserve_ppm: 0 };
    let workload = Workload { context_tokens: 4096, batch: 8 };
    let plans: Vec<_> = KvFormat::ALL
        .iter()
        .filter_map(|&format| plan(&preset.spec(format, 64), &budget, &workload).ok())
        .collect();
    let right = plans.len() == KvFormat::ALL.len()
        && plans.iter().any(|plan| plan.token_bytes == 70_272)
        && plans.iter().all(|plan| plan.fits);
    if right { 0 } else { 2 }
}
