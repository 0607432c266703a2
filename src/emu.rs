//! The emulator of CUDA kernels (feature `emulate`): the sources of `cuda/`, compiled by the host's
//! compiler, with detectors for what a GPU does not show.
//!
//! Memory that a kernel may touch is a [`Buffer`], which ends at an unmapped page and starts as
//! NaNs. A launch runs to its end before it returns, or ends with the first [`Fault`]. Time and
//! weak memory order are not emulated. This file knows no kernel.

use std::ffi::{CString, c_char, c_void};
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};

use crate::error::{Error, Result};

/// In which order blocks, warps and lanes run between two synchronisations, and when asynchronous
/// copies happen. A kernel must compute the same under all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Schedule {
    /// In ascending order, copies as late as a wait allows.
    #[default]
    Forward,
    /// In descending order, copies at once.
    Reverse,
    /// In an order drawn from this seed, copies now and then.
    Seeded(u64),
}

impl Schedule {
    /// Forward, reverse and two seeds: what a test of a kernel runs under.
    pub const ALL: [Schedule; 4] =
        [Schedule::Forward, Schedule::Reverse, Schedule::Seeded(1), Schedule::Seeded(2)];
}

/// How threads are switched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fibers {
    /// By assembly on x86-64 Linux, by `ucontext` elsewhere.
    #[default]
    Native,
    /// By `ucontext` everywhere.
    Ucontext,
}

/// How a launch is emulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The order of execution.
    pub schedule: Schedule,
    /// How threads are switched.
    pub fibers: Fibers,
}

/// 0 until somebody asks.
static WORKERS: AtomicU64 = AtomicU64::new(0);

/// How many OS threads the blocks of a launch are spread over: at first what `KVCACHE_EMU_WORKERS`
/// says, or 1.
pub fn workers() -> usize {
    let set = WORKERS.load(Ordering::Relaxed);
    if set != 0 {
        return set as usize;
    }
    let asked = std::env::var("KVCACHE_EMU_WORKERS").ok().and_then(|n| n.parse().ok());
    let workers = asked.unwrap_or(1).clamp(1, MAX_WORKERS);
    WORKERS.store(workers as u64, Ordering::Relaxed);
    workers
}

/// Spreads the blocks of every later launch of the process over `workers` OS threads (1 to 256; taken
/// to the nearest). With one, a seeded schedule gives the same order every time; with several, the
/// order within a block is the same and that of blocks is the system's.
pub fn set_workers(workers: usize) {
    WORKERS.store(workers.clamp(1, MAX_WORKERS) as u64, Ordering::Relaxed);
}

const MAX_WORKERS: usize = 256;

/// What a detector found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// The launch is impossible: unknown kernel, wrong parameter size, grid, threads, memory.
    Launch = 1,
    /// Shared memory was accessed outside the block's.
    Shared = 2,
    /// Memory was accessed that no buffer holds.
    Global = 3,
    /// A warp primitive was called with a mask that cannot be right.
    Mask = 4,
    /// Threads of a block stand at different barriers, or have returned before one.
    Diverged = 5,
    /// No thread of a block can continue.
    Deadlock = 6,
    /// An address is not aligned to its access.
    Misaligned = 7,
    /// An asynchronous copy or its barrier was misused.
    Protocol = 8,
    /// A thread overflowed its stack.
    Stack = 9,
}

/// The first fault of a launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What kind it is.
    pub kind: FaultKind,
    /// The kernel, where in its source, which thread, and what.
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Fault {}

#[repr(C)]
struct RawOptions {
    schedule: u32,
    fibers: u32,
    seed: u64,
    workers: u64,
}

/// Room for the text of a fault, as block.hpp has it.
const TEXT_BYTES: usize = 1280;

unsafe extern "C" {
    fn kvc_emu_alloc(bytes: u64) -> *mut c_void;
    fn kvc_emu_free(at: *mut c_void);
    fn kvc_emu_launch(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared_bytes: u32,
        params: *const c_void,
        params_bytes: u32,
        options: *const RawOptions,
        text: *mut c_char,
    ) -> i32;
}

/// Runs a kernel with its parameter struct, to its end or to the first fault.
///
/// # Errors
/// The first fault that a detector finds.
///
/// # Safety
/// The addresses in `params` are those of live buffers, and nobody else uses these meanwhile.
/// Detectors catch most accesses past a buffer, not all.
pub unsafe fn launch<P: Copy>(
    kernel: &str,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    params: &P,
    options: Options,
) -> std::result::Result<(), Fault> {
    let (params, bytes) = (std::ptr::from_ref(params).cast(), size_of::<P>());
    // SAFETY: the caller's promise; the struct is as long as its type.
    unsafe { launch_raw(kernel, grid, threads, shared_bytes, params, bytes, options) }
}

/// [`launch`] with a parameter struct of `params_bytes` bytes at `params`.
///
/// # Errors
/// The first fault that a detector finds.
///
/// # Safety
/// As for [`launch`]; `params` must be readable for that many bytes, and aligned to 8.
pub unsafe fn launch_raw(
    kernel: &str,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    params: *const c_void,
    params_bytes: usize,
    options: Options,
) -> std::result::Result<(), Fault> {
    let Ok(name) = CString::new(kernel) else {
        return Err(Fault { kind: FaultKind::Launch, text: "a name with a zero byte".into() });
    };
    let (schedule, seed) = match options.schedule {
        Schedule::Forward => (0, 0),
        Schedule::Reverse => (1, 0),
        Schedule::Seeded(seed) => (2, seed),
    };
    let fibers = u32::from(options.fibers == Fibers::Ucontext);
    let raw = RawOptions { schedule, fibers, seed, workers: workers() as u64 };
    let mut text = [0u8; TEXT_BYTES];
    // SAFETY: every pointer is to a live object of the type that the C++ side declares; `text` has
    // the size it writes at most; the caller answers for the addresses in `params`.
    let code = unsafe {
        kvc_emu_launch(
            name.as_ptr(),
            grid.as_ptr(),
            threads,
            shared_bytes,
            params,
            u32::try_from(params_bytes).unwrap_or(u32::MAX),
            &raw,
            text.as_mut_ptr().cast(),
        )
    };
    let kind = match code {
        0 => return Ok(()),
        2 => FaultKind::Shared,
        3 => FaultKind::Global,
        4 => FaultKind::Mask,
        5 => FaultKind::Diverged,
        6 => FaultKind::Deadlock,
        7 => FaultKind::Misaligned,
        8 => FaultKind::Protocol,
        9 => FaultKind::Stack,
        _ => FaultKind::Launch,
    };
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    Err(Fault { kind, text: String::from_utf8_lossy(&text[..end]).into_owned() })
}

/// Plain numbers that a buffer can hold: any bytes are a value.
///
/// # Safety
/// The type has no padding, no invalid bit pattern and no destructor.
pub unsafe trait Plain: Copy + 'static {}
macro_rules! plain {
    ($($type:ty),+) => {$(
        // SAFETY: a number, or a transparent wrapper of one.
        unsafe impl Plain for $type {}
    )+};
}
plain!(u8, u16, u32, u64, i32, i64, f32, f16, bf16);

/// Emulated device memory. Fresh bytes are all ones, which is NaN in every float format.
#[derive(Debug)]
pub struct Buffer {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory belongs to this object alone, and is only touched through `&mut`, through a
// launch whose caller answers for it, or read.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Allocates `bytes`, aligned to 128.
    ///
    /// # Errors
    /// `OutOfMemory` where the system refuses.
    pub fn new(bytes: usize) -> Result<Self> {
        // SAFETY: takes any size; the result is null or a fresh allocation of that size.
        let base = unsafe { kvc_emu_alloc(bytes as u64) };
        let base = NonNull::new(base.cast()).ok_or(Error::OutOfMemory { bytes: bytes as u64 })?;
        Ok(Self { base, bytes })
    }

    /// Allocates a copy of `values`.
    ///
    /// # Errors
    /// `OutOfMemory` where the system refuses.
    pub fn of<T: Plain>(values: &[T]) -> Result<Self> {
        let buffer = Self::new(size_of_val(values))?;
        // SAFETY: the buffer has just this many bytes and is fresh, so the two do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                values.as_ptr().cast(),
                buffer.base.as_ptr(),
                buffer.bytes,
            );
        }
        Ok(buffer)
    }

    /// The device address of the first byte.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes every byte all ones again, as a workspace is before a call.
    pub fn poison(&mut self) {
        // SAFETY: the allocation has this many bytes, and `&mut` says that nobody uses them.
        unsafe { std::ptr::write_bytes(self.base.as_ptr(), 0xff, self.bytes) }
    }

    /// Writes `values` from byte `at` on, as a copy from the host does.
    ///
    /// # Errors
    /// `InvalidArgument` where they do not fit.
    pub fn write<T: Plain>(&mut self, at: usize, values: &[T]) -> Result<()> {
        if at.checked_add(size_of_val(values)).is_none_or(|end| end > self.bytes) {
            return Err(Error::invalid("values", "must lie within the buffer"));
        }
        let bytes = size_of_val(values);
        // SAFETY: the bytes lie in the allocation, which nobody else uses (`&mut`), and `values`
        // lies outside it.
        unsafe {
            let to = self.base.as_ptr().add(at);
            std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), to, bytes);
        }
        Ok(())
    }

    /// The values it holds now; what does not fill a value at the end is left out.
    pub fn read<T: Plain>(&self) -> Vec<T> {
        let count = self.bytes / size_of::<T>();
        let mut values = Vec::with_capacity(count);
        // SAFETY: `count` values lie in the allocation, any bytes are values of a plain type, and
        // the vector has room for them.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base.as_ptr().cast(), values.as_mut_ptr(), count);
            values.set_len(count);
        }
        values
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, freed once.
        unsafe { kvc_emu_free(self.base.as_ptr().cast()) }
    }
}
