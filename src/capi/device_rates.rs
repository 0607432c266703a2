//! What a device does in a microsecond: what its driver says, and what an engine measured instead.

use super::cache::{kvc_cache, open};
use super::device::{kvc_device, opened};
use super::pointer::{self, Plain, Sized32};
use super::status::{guard, kvc_status};
use crate::error::Error;
use crate::kernels::DeviceRates;

/// What a device does in a microsecond, by which ways to compute the same are chosen. The fields are
/// those that kvc_device_cascade_query has; none has a default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvc_device_rates {
    /// sizeof(kvc_device_rates); kvc_device_rates_init sets it.
    pub struct_size: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes from memory in a microsecond.
    pub memory_bytes: f64,
    /// Bytes from the second-level cache in a microsecond.
    pub cache_bytes: f64,
    /// Size of that cache, in bytes.
    pub cache_size: u64,
    /// Operations (two a multiplication and addition) of the prefill kernel in a microsecond.
    pub operations: f64,
    /// Microseconds from one launch's end to the next one's work.
    pub launch: f64,
}

// SAFETY: integers, floats.
unsafe impl Plain for kvc_device_rates {}
// SAFETY: the first field is the size.
unsafe impl Sized32 for kvc_device_rates {
    const NAME: &'static str = "kvc_device_rates";
    const FIRST_BYTES: usize = size_of::<Self>();
    fn initial() -> Self {
        // SAFETY: every bit pattern is a value of a Plain type.
        let zero: Self = unsafe { core::mem::zeroed() };
        Self { struct_size: size_of::<Self>() as u32, ..zero }
    }
}

/// Fills a kvc_device_rates of `struct_size` bytes with zeros, which are no rates yet.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `rates` is writable for `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_rates_init(
    rates: *mut kvc_device_rates,
    struct_size: u32,
) -> kvc_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { pointer::init(rates, struct_size) })
}

/// Writes the rates that caches on this device go by to `out`, `out_bytes` (its sizeof) at most. They
/// follow from clocks and widths that the driver names and from shares of those that an H200 was
/// measured at: of another GPU they are an estimate, which leans towards plain attention.
/// KVC_ERR_UNSUPPORTED where the driver does not name them, and nothing is chosen by rates.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `out` is writable for `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_device_rates_read(
    device: *const kvc_device,
    out: *mut kvc_device_rates,
    out_bytes: u64,
) -> kvc_status {
    guard(|| {
        let unknown = Error::Unsupported { what: "choosing by the device's rates" };
        let rates = opened(device)?.0.rates().ok_or(unknown)?;
        let rates = kvc_device_rates {
            struct_size: size_of::<kvc_device_rates>() as u32,
            multiprocessors: rates.multiprocessors,
            memory_bytes: rates.memory_bytes,
            cache_bytes: rates.cache_bytes,
            cache_size: rates.cache_size,
            operations: rates.operations,
            launch: rates.launch,
        };
        // SAFETY: the caller's promise.
        unsafe { pointer::write(out, out_bytes, rates, "out", kvc_device_rates::FIRST_BYTES) }
    })
}

/// Has the cache go by these rates from here on instead of by what its device says: whether a prefix
/// that sequences share is read once for all of them (kvc_cache_options.cascade).
/// KVC_ERR_INVALID_STATE where the cache is on the CPU.
///
/// Threads: thread-safe.
///
/// # Safety
/// The module's rules; `rates` is readable for its struct_size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvc_cache_set_device_rates(
    cache: *mut kvc_cache,
    rates: *const kvc_device_rates,
) -> kvc_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let rates = unsafe { pointer::read(rates) }?;
        open(cache)?.lock()?.set_device_rates(DeviceRates {
            memory_bytes: rates.memory_bytes,
            cache_bytes: rates.cache_bytes,
            cache_size: rates.cache_size,
            operations: rates.operations,
            launch: rates.launch,
            multiprocessors: rates.multiprocessors,
        })
    })
}
