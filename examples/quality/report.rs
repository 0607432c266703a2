//! The figures as tables for people and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::measure::Figure;

/// One table a context and mode, by bits.
pub fn tables(figures: &[Figure]) -> String {
    let mut text = String::new();
    let mut at = 0;
    while let Some(first) = figures.get(at) {
        let same = |f: &&Figure| f.context == first.context && f.mode == first.mode;
        let mut rows: Vec<&Figure> = figures[at..].iter().take_while(same).collect();
        at += rows.len();
        rows.sort_by(|a, b| b.bits.total_cmp(&a.bits));
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{} tokens, {} sequences, {}\n{:<20}{:>6}{:>20}{:>9}{:>11}{:>18}{:>16}  raw tail",
            first.context,
            first.sequences,
            first.mode.name(),
            "format",
            "bits",
            "KL x 1e-3",
            "a byte",
            "perplexity",
            "change %",
            "top-1 %",
        );
        for f in rows {
            let _ = writeln!(
                text,
                "{:<20}{:>6.2}{:>12.4} +-{:>6.4}{:>9.4}{:>11.3}{:>10.3} +-{:>5.3}{:>8.2} +-{:>4.2}  {}",
                f.scheme,
                f.bits,
                1e3 * f.kl.0,
                1e3 * f.kl.1,
                1e3 * f.byte_kl(),
                f.perplexity,
                100.0 * f.perplexity_change.0,
                100.0 * f.perplexity_change.1,
                100.0 * f.top1.0,
                100.0 * f.top1.1,
                f.tail_policy,
            );
        }
        text.push('\n');
    }
    text
}

/// A list of objects, one a figure. An unknown error is null.
pub fn json(figures: &[Figure]) -> Value {
    figures
        .iter()
        .map(|f| {
            json!({
                "format": f.scheme,
                "published": !f.own,
                "bits": f.bits,
                "mode": f.mode.name(),
                "context": f.context,
                "sequences": f.sequences,
                "perplexity": f.perplexity,
                "perplexity_change": f.perplexity_change.0,
                "perplexity_change_error": f.perplexity_change.1,
                "kl": f.kl.0,
                "kl_error": f.kl.1,
                "kl_a_byte": f.byte_kl(),
                "perplexity_change_a_byte": f.byte_perplexity_change(),
                "top1": f.top1.0,
                "top1_error": f.top1.1,
                "tail_policy": f.tail_policy,
            })
        })
        .collect()
}
