//! KL against bits as an SVG: one panel a mode, for the first context.

use std::fmt::Write as _;

use crate::measure::Figure;
use crate::modes::Mode;

const PANEL: f64 = 460.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 62.0;
const BOTTOM: f64 = 46.0;
const TOP: f64 = 34.0;
/// The axis of bits.
const BITS: (f64, f64) = (1.8, 9.4);
/// The axis of KL, in powers of ten.
const POWERS: (i32, i32) = (-6, 1);

/// The picture. Schemes off the axes (16 bits) are left out.
pub fn svg(figures: &[Figure]) -> String {
    let context = figures.first().map_or(0, |f| f.context);
    let modes: Vec<Mode> = Mode::ALL
        .into_iter()
        .filter(|mode| figures.iter().any(|f| f.context == context && f.mode == *mode))
        .collect();
    let width = PANEL * modes.len().max(1) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{width}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    for (n, &mode) in modes.iter().enumerate() {
        let here = figures.iter().filter(|f| f.context == context && f.mode == mode);
        let _ = writeln!(svg, "<g transform=\"translate({} 0)\">", PANEL * n as f64);
        panel(&mut svg, &format!("{}, {context} tokens", mode.name()), here);
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

fn x(bits: f64) -> f64 {
    LEFT + (bits - BITS.0) / (BITS.1 - BITS.0) * (PANEL - LEFT - 16.0)
}

fn y(kl: f64) -> f64 {
    let (low, high) = (f64::from(POWERS.0), f64::from(POWERS.1));
    TOP + (high - kl.log10().clamp(low, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)
}

fn panel<'a>(svg: &mut String, title: &str, figures: impl Iterator<Item = &'a Figure>) {
    let (right, floor) = (PANEL - 16.0, HEIGHT - BOTTOM);
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{title}</text>");
    for power in POWERS.0..=POWERS.1 {
        let at = y(10f64.powi(power));
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">1e{power}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for bits in 2..=9 {
        let at = x(f64::from(bits));
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {TOP}V{floor}\" stroke=\"#eee\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{bits}</text>",
            floor + 16.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">bits an element, scales included</text>\
         <text transform=\"translate(14 {}) rotate(-90)\" text-anchor=\"middle\">KL to f32, nats a \
         token</text>",
        (LEFT + right) / 2.0,
        HEIGHT - 10.0,
        (TOP + floor) / 2.0
    );
    let mut points: Vec<&Figure> =
        figures.filter(|f| (BITS.0..=BITS.1).contains(&f.bits)).collect();
    points.sort_by(|a, b| b.kl.0.total_cmp(&a.kl.0));
    // From the top down: a label that would touch an earlier one moves below it.
    let mut labels: Vec<(f64, f64)> = Vec::new();
    for figure in points {
        let (cx, cy) = (x(figure.bits), y(figure.kl.0));
        let mut at = cy + 3.0;
        while let Some((_, taken)) =
            labels.iter().find(|(lx, ly)| (lx - cx).abs() < 80.0 && (ly - at).abs() < 9.0)
        {
            at = taken + 9.5;
        }
        labels.push((cx, at));
        let (fill, colour) = if figure.own { ("#1565c0", "#1565c0") } else { ("white", "#b23c17") };
        let _ = writeln!(
            svg,
            "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"4\" fill=\"{fill}\" stroke=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{at:.1}\" fill=\"{colour}\" font-size=\"9\">{}</text>",
            cx + 6.0,
            figure.scheme
        );
    }
}
