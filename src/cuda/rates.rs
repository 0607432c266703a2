//! What a GPU does in a microsecond, from what its driver says of it.
//!
//! For choices between ways to compute the same, not for reports: shares of the hardware's own rates
//! that the library's kernels were measured at (benches/results/gpu-h200.txt), and where nothing was
//! measured a rate that favours the plain way.

use crate::kernels::DeviceRates;

/// What the driver says of a device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hardware {
    /// Compute capability, times ten.
    pub capability: u32,
    pub multiprocessors: u32,
    pub clock_khz: u32,
    pub memory_clock_khz: u32,
    pub memory_bus_bits: u32,
    pub cache_bytes: u32,
}

/// Share of the memory's bandwidth that decode reaches: 4.27 of 4.92 TB/s.
const MEMORY_SHARE: f64 = 0.87;
/// Bytes from the second-level cache in a cycle of a multiprocessor: not measured; more than what is
/// published of any, so that reading from there again looks cheap.
const CACHE_BYTES: f64 = 32.0;
/// Operations in a cycle of a multiprocessor that has one block of chunked prefill: 226 TFLOP/s by 128
/// multiprocessors at 1,980 MHz.
const OPERATIONS: f64 = 890.0;
/// The same of the families whose tensor cores do a quarter per cycle: not measured.
const SMALL_OPERATIONS: f64 = 250.0;
/// Microseconds between dependent launches: what an append of one token takes, and some.
const LAUNCH: f64 = 2.5;

/// The rates; `None` where the driver does not say what they follow from.
pub(super) fn rates(of: Hardware) -> Option<DeviceRates> {
    let known = [of.multiprocessors, of.clock_khz, of.memory_clock_khz, of.memory_bus_bits];
    if known.contains(&0) {
        return None;
    }
    // Two transfers a clock.
    let peak = 2.0 * f64::from(of.memory_clock_khz) / 1e3 * f64::from(of.memory_bus_bits) / 8.0;
    let memory_bytes = peak * MEMORY_SHARE;
    let cycles = f64::from(of.multiprocessors) * f64::from(of.clock_khz) / 1e3;
    // Those for data centres.
    let large = matches!(of.capability, 80 | 90 | 100 | 103);
    let operations = if large { OPERATIONS } else { SMALL_OPERATIONS };
    Some(DeviceRates {
        memory_bytes,
        cache_bytes: (cycles * CACHE_BYTES).max(memory_bytes),
        cache_size: of.cache_bytes.into(),
        operations: cycles * operations,
        launch: LAUNCH,
        multiprocessors: of.multiprocessors,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the driver describes the one that was measured.
    const H200: Hardware = Hardware {
        capability: 90,
        multiprocessors: 132,
        clock_khz: 1_980_000,
        memory_clock_khz: 3_201_000,
        memory_bus_bits: 6144,
        cache_bytes: 60 << 20,
    };

    #[test]
    fn rates_are_near_what_was_measured() {
        let near = |got: f64, measured: f64| (got / measured - 1.0).abs() < 0.03;
        let r = rates(H200).unwrap();
        assert!(near(r.memory_bytes, 4.27e6), "{r:?}");
        // One block on each of 128 multiprocessors.
        assert!(near(r.operations * 128.0 / 132.0, 226e6), "{r:?}");
        assert!(r.cache_bytes > r.memory_bytes);
        let small = rates(Hardware { capability: 89, ..H200 }).unwrap();
        assert!(small.operations < r.operations / 3.0);
    }

    #[test]
    fn nothing_follows_from_nothing() {
        assert_eq!(rates(Hardware { clock_khz: 0, ..H200 }), None);
        assert_eq!(rates(Hardware { memory_bus_bits: 0, ..H200 }), None);
    }
}
