//! Hit rate against capacity as an SVG: one line a policy, and the optimum. Knows no replay.

use std::fmt::Write as _;

/// A line of the plot: hit rates in percent, one a capacity.
pub struct Line {
    pub name: String,
    pub rates: Vec<f64>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 56.0;
const COLOURS: [&str; 9] = [
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf",
    "#555555",
];

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Draws `lines` over `capacities`, which rise, on a logarithmic axis.
pub fn svg(title: &str, capacities: &[u32], lines: &[Line]) -> String {
    let log = |n: u32| f64::from(n.max(1)).log2();
    let first = capacities.first().map_or(0.0, |&n| log(n));
    let last = capacities.last().map_or(1.0, |&n| log(n)).max(first + 1e-9);
    let x = |n: u32| LEFT + (log(n) - first) / (last - first) * (WIDTH - LEFT - RIGHT);
    let highest = lines.iter().flat_map(|line| &line.rates).fold(0.0f64, |a, &b| a.max(b));
    let top = (highest / 10.0).ceil().max(1.0) * 10.0;
    let y = |rate: f64| HEIGHT - BOTTOM - rate / top * (HEIGHT - TOP - BOTTOM);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{}</text>\n",
        escape(title)
    );
    let mut line = |text: std::fmt::Arguments| {
        let _ = out.write_fmt(text);
        out.push('\n');
    };
    for step in 0..=5 {
        let rate = top * f64::from(step) / 5.0;
        let (at, end) = (y(rate), WIDTH - RIGHT);
        line(format_args!(
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{end}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{rate:.0} %</text>",
            LEFT - 6.0,
            at + 4.0
        ));
    }
    for &capacity in capacities {
        let (at, base) = (x(capacity), HEIGHT - BOTTOM);
        line(format_args!(
            "<line x1=\"{at:.1}\" y1=\"{base}\" x2=\"{at:.1}\" y2=\"{}\" stroke=\"#333333\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{capacity}</text>",
            base + 4.0,
            base + 18.0
        ));
    }
    line(format_args!(
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">capacity, blocks</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 14.0
    ));
    for (n, shown) in lines.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let point = |(&capacity, &rate): (&u32, &f64)| format!("{:.1},{:.1}", x(capacity), y(rate));
        let points: Vec<_> = capacities.iter().zip(&shown.rates).map(point).collect();
        let (legend, row) = (WIDTH - RIGHT + 16.0, TOP + 20.0 * n as f64);
        line(format_args!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>\
             <line x1=\"{legend}\" y1=\"{row}\" x2=\"{}\" y2=\"{row}\" stroke=\"{colour}\" \
             stroke-width=\"2\"/><text x=\"{}\" y=\"{}\">{}</text>",
            points.join(" "),
            legend + 22.0,
            legend + 28.0,
            row + 4.0,
            escape(&shown.name)
        ));
    }
    out + "</svg>\n"
}
