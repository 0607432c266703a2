//! The figures and answers as tables for people and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::measure::Figure;
use crate::recall::{self, Answers};

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
            "{} tokens, {} sequences, {}{}\n{:<20}{:>6}{:>20}{:>9}{:>11}{:>18}{:>16}  raw tail",
            first.context,
            first.sequences,
            first.mode.name(),
            if rows.iter().any(|f| f.cached) { "; the library's formats from a cache" } else { "" },
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

/// One table a mode: a row a format, the finest gap that passes at each length.
pub fn recall_tables(sweeps: &[Vec<Answers>]) -> String {
    let mut text = String::new();
    let all = || sweeps.iter().filter_map(|sweep| Some((sweep.first()?, recall::finest(sweep))));
    let (mut modes, mut lengths, mut formats) = (Vec::new(), Vec::new(), Vec::new());
    for (first, _) in all() {
        let note = |known: &mut Vec<_>, new| {
            if !known.contains(&new) {
                known.push(new)
            }
        };
        note(&mut lengths, first.context);
        if !modes.contains(&first.mode) {
            modes.push(first.mode);
        }
        if !formats.contains(&first.format) {
            formats.push(first.format);
        }
    }
    // Writing to a string cannot fail.
    for mode in modes {
        let _ =
            write!(text, "smallest gap recalled, {}\n{:<12}{:>6}", mode.name(), "format", "bits");
        lengths.iter().for_each(|tokens| text += &format!("{tokens:>10}"));
        text += "  raw tail\n";
        for &format in &formats {
            let of_row = || all().filter(|(a, _)| a.mode == mode && a.format == format);
            let Some((row, _)) = of_row().next() else { continue };
            let _ = write!(text, "{:<12}{:>6.2}", format.name(), row.bits);
            for &tokens in &lengths {
                let finest = of_row().find(|(a, _)| a.context == tokens).and_then(|(_, gap)| gap);
                text += &finest.map_or(format!("{:>10}", "none"), |gap| format!("{gap:>10.5}"));
            }
            let _ = writeln!(text, "  {}", row.tail_policy());
        }
        text.push('\n');
    }
    text
}

/// A list of objects, one a figure and one a recall. An unknown error is null.
pub fn json(figures: &[Figure], sweeps: &[Vec<Answers>]) -> Value {
    let answers = sweeps.iter().flatten().map(|a| {
        json!({
            "probe": "recall",
            "format": a.format.name(),
            "bits": a.bits,
            "mode": a.mode.name(),
            "context": a.context,
            "gap": a.gap,
            "recall": a.recall,
            "queries": recall::queries(),
            "passed": a.passed(),
            "tail_policy": a.tail_policy(),
        })
    });
    figures
        .iter()
        .map(|f| {
            json!({
                "format": f.scheme,
                "published": !f.own,
                "attention": if f.cached { "cache" } else { "rows" },
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
        .chain(answers)
        .collect()
}
