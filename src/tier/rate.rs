//! How fast a tier is: latency and bandwidth, learned from what it does.
//!
//! A transfer takes `latency + bytes / bandwidth`. Both are fitted by least squares over the
//! transfers so far, each weighted by how long ago it was (an exponentially weighted moving average
//! of the five sums that the fit needs). Where transfers are all of one size the two cannot be told
//! apart; then all of the time counts as bandwidth, which is right for transfers of that size.

use core::time::Duration;

/// The weight of the newest transfer.
const ALPHA: f64 = 0.05;
/// Sizes that differ by less than this fraction (as standard deviation) are one size.
const LEAST_SPREAD: f64 = 0.1;

/// What was learned.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rate {
    transfers: u64,
    /// Weighted sums: of 1, bytes, seconds, bytes squared, bytes times seconds.
    sums: [f64; 5],
}

impl Rate {
    /// Nothing known yet.
    pub const fn new() -> Self {
        Rate { transfers: 0, sums: [0.0; 5] }
    }

    /// Learns from a transfer.
    pub fn observe(&mut self, bytes: u64, time: Duration) {
        let (bytes, seconds) = (bytes as f64, time.as_secs_f64());
        let sample = [1.0, bytes, seconds, bytes * bytes, bytes * seconds];
        for (sum, value) in self.sums.iter_mut().zip(sample) {
            *sum = *sum * (1.0 - ALPHA) + value * ALPHA;
        }
        self.transfers += 1;
    }

    /// Transfers it was learned from.
    pub fn transfers(&self) -> u64 {
        self.transfers
    }

    /// Seconds before the first byte, and seconds a byte. `None` before the first transfer.
    fn line(&self) -> Option<(f64, f64)> {
        let [weight, bytes, seconds, squares, products] = self.sums;
        if self.transfers == 0 || !(bytes > 0.0) {
            return None;
        }
        let (x, y) = (bytes / weight, seconds / weight);
        let variance = squares / weight - x * x;
        let slope = (products / weight - x * y) / variance;
        let spread = variance > (LEAST_SPREAD * x).powi(2);
        // A negative slope or intercept is noise.
        if spread && slope > 0.0 && y - slope * x >= 0.0 {
            Some((y - slope * x, slope))
        } else {
            Some((0.0, y / x))
        }
    }

    /// Bytes a second; `None` before the first transfer.
    pub fn bandwidth(&self) -> Option<f64> {
        self.line().map(|(_, slope)| 1.0 / slope.max(f64::MIN_POSITIVE))
    }

    /// Seconds before the first byte comes; `None` before the first transfer.
    pub fn latency(&self) -> Option<f64> {
        self.line().map(|(latency, _)| latency)
    }

    /// How long a transfer of `bytes` takes, in seconds; `None` before the first transfer.
    pub fn seconds(&self, bytes: u64) -> Option<f64> {
        self.line().map(|(latency, slope)| latency + slope * bytes as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(bytes: u64) -> Duration {
        Duration::from_secs_f64(0.002 + bytes as f64 / 1e9)
    }

    #[test]
    fn latency_and_bandwidth_are_told_apart_where_sizes_differ() {
        let mut rate = Rate::new();
        assert!(rate.seconds(1).is_none() && rate.bandwidth().is_none());
        for n in 0..200u64 {
            let bytes = (n % 7 + 1) * 1_000_000;
            rate.observe(bytes, time(bytes));
        }
        assert!((rate.latency().unwrap() - 0.002).abs() < 1e-6, "{:?}", rate.latency());
        assert!((rate.bandwidth().unwrap() / 1e9 - 1.0).abs() < 1e-6);
        assert!((rate.seconds(3_000_000).unwrap() - 0.005).abs() < 1e-6);
    }

    #[test]
    fn one_size_is_predicted_right_and_change_is_followed() {
        let mut rate = Rate::new();
        for _ in 0..10 {
            rate.observe(2_000_000, time(2_000_000));
        }
        assert!((rate.seconds(2_000_000).unwrap() - 0.004).abs() < 1e-9);
        for _ in 0..200 {
            rate.observe(2_000_000, Duration::from_millis(40));
        }
        assert!((rate.seconds(2_000_000).unwrap() - 0.04).abs() < 1e-4);
    }

    #[test]
    fn nonsense_gives_no_nonsense() {
        let mut rate = Rate::new();
        rate.observe(0, Duration::ZERO);
        assert!(rate.seconds(1).is_none());
        for _ in 0..50 {
            // The more bytes the faster: noise, for which one number is the better guess.
            rate.observe(1_000, Duration::from_secs(2));
            rate.observe(1_000_000, Duration::from_secs(1));
        }
        assert_eq!(rate.latency(), Some(0.0));
        assert!(rate.seconds(1_000).unwrap() > 0.0);
    }
}
