//! What a tier did, as numbers and as text for Prometheus, under the prefix of the cache's own.

use core::fmt::{self, Write};

use super::{TierCounters, TierKind};

/// What one tier counted, and how fast it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TierReport {
    /// Which.
    pub kind: TierKind,
    /// What it counted.
    pub counters: TierCounters,
    /// Its memory is page-locked: a GPU copies from and to it by itself. Of the host alone.
    pub page_locked: bool,
    /// Seconds before the first byte of a load, and bytes a second; `None` before the first load.
    pub load_rate: Option<(f64, f64)>,
    /// What fails since the store refuses whoever calls: [`Store::refusal`](super::Store::refusal).
    pub refusal: Option<&'static str>,
}

/// Writes the reports as Prometheus reads them (text format 0.0.4), each metric with the tier as
/// label. Nothing for no tiers.
///
/// # Errors
/// Those of `out`.
pub fn write_prometheus(reports: &[TierReport], out: &mut dyn Write) -> fmt::Result {
    type Value = fn(&TierReport) -> f64;
    let metrics: [(&str, &str, &str, Value); 16] = [
        ("stored_blocks_total", "counter", "Blocks demoted to the tier.", |r| {
            r.counters.stored as f64
        }),
        ("stored_bytes_total", "counter", "Bytes demoted to the tier.", |r| {
            r.counters.stored_bytes as f64
        }),
        ("present_blocks_total", "counter", "Demotions of what the tier had.", |r| {
            r.counters.present as f64
        }),
        ("dropped_blocks_total", "counter", "Demotions dropped.", |r| r.counters.dropped as f64),
        ("full_blocks_total", "counter", "Demotions without room.", |r| r.counters.full as f64),
        ("loaded_blocks_total", "counter", "Blocks loaded from the tier.", |r| {
            r.counters.loaded as f64
        }),
        ("loaded_bytes_total", "counter", "Bytes loaded from the tier.", |r| {
            r.counters.loaded_bytes as f64
        }),
        ("missed_blocks_total", "counter", "Blocks asked for in vain.", |r| {
            r.counters.missed as f64
        }),
        ("bad_blocks_total", "counter", "Objects that were damaged or foreign.", |r| {
            r.counters.bad as f64
        }),
        ("failures_total", "counter", "Calls of the store that failed.", |r| {
            r.counters.failures as f64
        }),
        ("timeouts_total", "counter", "Loads nobody waited for any more.", |r| {
            r.counters.timeouts as f64
        }),
        ("evicted_blocks_total", "counter", "Blocks evicted from the tier.", |r| {
            r.counters.evicted as f64
        }),
        ("objects", "gauge", "Blocks held, where known.", |r| r.counters.objects as f64),
        ("down", "gauge", "1 while the store is left alone after failing.", |r| {
            f64::from(u8::from(r.counters.down))
        }),
        ("page_locked", "gauge", "1 where a GPU copies from and to its memory by itself.", |r| {
            f64::from(u8::from(r.page_locked))
        }),
        ("load_bytes_per_second", "gauge", "Measured bandwidth of loads.", |r| {
            r.load_rate.map_or(0.0, |(_, bandwidth)| bandwidth)
        }),
    ];
    if reports.is_empty() {
        return Ok(());
    }
    for (name, kind, help, value) in metrics {
        writeln!(out, "# HELP kvcache:tier_{name} {help}\n# TYPE kvcache:tier_{name} {kind}")?;
        for report in reports {
            let tier = report.kind.name();
            writeln!(out, "kvcache:tier_{name}{{tier=\"{tier}\"}} {}", value(report))?;
        }
    }
    let refused = |r: &&TierReport| r.refusal.is_some();
    if reports.iter().any(|r| refused(&r)) {
        let name = "kvcache:tier_refused";
        writeln!(out, "# HELP {name} 1 while the store refuses its user.\n# TYPE {name} gauge")?;
    }
    for report in reports.iter().filter(refused) {
        let (tier, why) = (report.kind.name(), report.refusal.unwrap_or_default());
        let why = why.trim_end_matches(',');
        writeln!(out, "kvcache:tier_refused{{tier=\"{tier}\",while=\"{why}\"}} 1")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;

    #[test]
    fn every_metric_has_a_line_for_each_tier() {
        let counters = TierCounters { loaded: 7, down: true, ..TierCounters::default() };
        let disk = TierReport {
            kind: TierKind::Disk,
            counters,
            page_locked: false,
            load_rate: Some((0.1, 2e9)),
            refusal: None,
        };
        let host = TierReport { kind: TierKind::Host, page_locked: true, ..disk };
        let mut text = String::new();
        write_prometheus(&[host, disk], &mut text).unwrap();
        assert_eq!(text.lines().count(), 16 * 4);
        assert!(text.contains("\nkvcache:tier_loaded_blocks_total{tier=\"disk\"} 7\n"));
        assert!(text.contains("\nkvcache:tier_page_locked{tier=\"host\"} 1\n"));
        assert!(text.contains("kvcache:tier_load_bytes_per_second{tier=\"host\"} 2000000000\n"));
        text.clear();
        let refusal = Some("asking, which is refused,");
        write_prometheus(&[TierReport { kind: TierKind::Remote, refusal, ..disk }], &mut text)
            .unwrap();
        let last = "kvcache:tier_refused{tier=\"remote\",while=\"asking, which is refused\"} 1";
        assert_eq!(text.lines().last(), Some(last));
        text.clear();
        write_prometheus(&[], &mut text).unwrap();
        assert!(text.is_empty());
    }
}
