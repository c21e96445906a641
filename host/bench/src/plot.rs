//! Drawings of results as SVG, written by hand: charts of lines and marked points, side by side.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::Context;

use crate::stats::Summary;

const WIDTH: f64 = 620.0;
const HEIGHT: f64 = 420.0;
/// Of a chart's frame from its edges.
const LEFT: f64 = 80.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 72.0;
const BOTTOM: f64 = 60.0;
const CHARTS_PER_ROW: usize = 2;
/// Told apart also by those who see few colours.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56606b"];

/// What is drawn in one frame.
pub struct Chart {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
}

pub struct Axis {
    /// With its unit.
    pub title: &'static str,
    pub scale: Scale,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// From 0.
    Linear,
    Logarithmic,
}

/// Points in the order in which a line connects them.
pub struct Series {
    name: String,
    points: Vec<Point>,
    marked: bool,
}

struct Point {
    x: f64,
    y: f64,
    label: String,
}

impl Series {
    /// A line whose points are marked and labelled.
    pub fn line(name: &str) -> Self {
        Self { name: name.to_owned(), points: Vec::new(), marked: true }
    }

    pub fn push(&mut self, x: f64, y: f64, label: String) {
        self.points.push(Point { x, y, label });
    }

    /// The share of samples (in percent) up to each value.
    fn distribution(name: &str, samples: &Summary) -> Self {
        let points = (0..=200).map(|step| f64::from(step) / 2.0);
        let points = points.map(|percent| Point { x: samples.percentile(percent), y: percent, label: String::new() });
        Self { name: name.to_owned(), points: points.collect(), marked: false }
    }
}

/// Output tokens a second over the median time of a request.
pub fn throughput_against_latency(title: &str, series: Vec<Series>) -> Chart {
    Chart {
        title: title.to_owned(),
        x: Axis { title: "Median latency of a request (ms)", scale: Scale::Linear },
        y: Axis { title: "Output throughput (tokens/s)", scale: Scale::Linear },
        series,
    }
}

/// The distributions of times between tokens, in milliseconds; those without samples are left out.
pub fn token_gaps<'a>(title: &str, gaps: impl IntoIterator<Item = (String, &'a Summary)>) -> Chart {
    let gaps = gaps.into_iter().filter(|(_, gaps)| !gaps.is_empty());
    Chart {
        title: title.to_owned(),
        x: Axis { title: "Time between tokens (ms)", scale: Scale::Logarithmic },
        y: Axis { title: "Share of tokens (%)", scale: Scale::Linear },
        series: gaps.map(|(name, gaps)| Series::distribution(&name, gaps)).collect(),
    }
}

/// Lines over axes that both grow by factors.
pub fn logarithmic(title: &str, x: &'static str, y: &'static str, series: Vec<Series>) -> Chart {
    let axis = |title| Axis { title, scale: Scale::Logarithmic };
    Chart { title: title.to_owned(), x: axis(x), y: axis(y), series }
}

/// Writes charts into a file.
pub fn write(path: &Path, charts: &[Chart]) -> anyhow::Result<()> {
    fs::write(path, svg(charts)).with_context(|| format!("--plot {}: the drawing cannot be written", path.display()))
}

fn svg(charts: &[Chart]) -> String {
    let (columns, rows) = (charts.len().min(CHARTS_PER_ROW), charts.len().div_ceil(CHARTS_PER_ROW));
    let (width, height) = (WIDTH * columns as f64, HEIGHT * rows as f64);
    let mut svg = String::new();
    // Writing to a string never fails, here and below.
    let _ = writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12" fill="#222">
<rect width="100%" height="100%" fill="#fff"/>"##
    );
    for (index, chart) in charts.iter().enumerate() {
        let (x, y) = ((index % CHARTS_PER_ROW) as f64 * WIDTH, (index / CHARTS_PER_ROW) as f64 * HEIGHT);
        let _ = writeln!(svg, r#"<g transform="translate({x} {y})">"#);
        draw(&mut svg, chart);
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw(svg: &mut String, chart: &Chart) {
    let points = || chart.series.iter().flat_map(|series| &series.points);
    let x = Span::over(chart.x.scale, points().map(|point| point.x), LEFT, WIDTH - RIGHT);
    let y = Span::over(chart.y.scale, points().map(|point| point.y), HEIGHT - BOTTOM, TOP);
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let _ =
        writeln!(svg, r#"<text x="{LEFT}" y="28" font-size="14" font-weight="600">{}</text>"#, escape(&chart.title));
    for (value, at) in x.ticks() {
        let _ = writeln!(svg, r##"<path d="M{at:.1} {TOP}V{bottom}" stroke="#e4e4e4"/>"##);
        let _ = writeln!(svg, r#"<text x="{at:.1}" y="{}" text-anchor="middle">{value}</text>"#, bottom + 18.0);
    }
    for (value, at) in y.ticks() {
        let _ = writeln!(svg, r##"<path d="M{LEFT} {at:.1}H{right}" stroke="#e4e4e4"/>"##);
        let _ = writeln!(svg, r#"<text x="{}" y="{:.1}" text-anchor="end">{value}</text>"#, LEFT - 8.0, at + 4.0);
    }
    let _ = writeln!(svg, r##"<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#222"/>"##);
    let (middle_x, middle_y) = ((LEFT + right) / 2.0, (TOP + bottom) / 2.0);
    let _ = writeln!(
        svg,
        r#"<text x="{middle_x}" y="{}" text-anchor="middle">{}</text>
<text transform="translate(20 {middle_y}) rotate(-90)" text-anchor="middle">{}</text>"#,
        bottom + 44.0,
        chart.x.title,
        chart.y.title
    );
    // Names flow in one line above the frame, where they cover no point.
    let _ = write!(svg, r#"<text x="{LEFT}" y="{}" font-weight="600">"#, TOP - 14.0);
    for (index, series) in chart.series.iter().enumerate() {
        let (colour, gap) = (COLOURS[index % COLOURS.len()], if index == 0 { 0 } else { 18 });
        let _ = write!(svg, r#"<tspan fill="{colour}" dx="{gap}">{}</tspan>"#, escape(&series.name));
    }
    svg.push_str("</text>\n");
    for (index, series) in chart.series.iter().enumerate() {
        draw_series(svg, series, &x, &y, COLOURS[index % COLOURS.len()]);
    }
}

fn draw_series(svg: &mut String, series: &Series, x: &Span, y: &Span, colour: &str) {
    let places: Vec<_> = series.points.iter().map(|point| (x.place(point.x), y.place(point.y))).collect();
    let path: Vec<_> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(svg, r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#, path.join(" "));
    if !series.marked {
        return;
    }
    for (point, (at_x, at_y)) in series.points.iter().zip(places) {
        let label = escape(&point.label);
        // On the side where there is more room.
        let (offset, anchor) = if at_x > WIDTH * 0.5 { (-8.0, "end") } else { (8.0, "start") };
        let _ = writeln!(
            svg,
            r#"<circle cx="{at_x:.1}" cy="{at_y:.1}" r="4" fill="{colour}"><title>{label}: {}, {}</title></circle>
<text x="{:.1}" y="{:.1}" text-anchor="{anchor}" font-size="11">{label}</text>"#,
            number(point.x),
            number(point.y),
            at_x + offset,
            at_y - 6.0
        );
    }
}

/// The values an axis shows and where they lie on it.
struct Span {
    scale: Scale,
    low: f64,
    high: f64,
    start: f64,
    end: f64,
}

impl Span {
    fn over(scale: Scale, values: impl Iterator<Item = f64>, start: f64, end: f64) -> Self {
        let usable = values.filter(|value| value.is_finite() && (*value > 0.0 || scale == Scale::Linear));
        let (low, high) = usable.fold((f64::INFINITY, 0.0f64), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = match scale {
            Scale::Linear if high > 0.0 => (0.0, (high / step(high)).ceil() * step(high)),
            Scale::Linear => (0.0, 1.0),
            Scale::Logarithmic if low.is_finite() => round_outwards(low, high),
            Scale::Logarithmic => (1.0, 10.0),
        };
        Self { scale, low, high, start, end }
    }

    fn place(&self, value: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => value / self.high,
            Scale::Logarithmic => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
        };
        self.start + (self.end - self.start) * share
    }

    /// Labels and places.
    fn ticks(&self) -> Vec<(String, f64)> {
        let values: Vec<f64> = match self.scale {
            Scale::Linear => {
                let step = step(self.high);
                (0..=(self.high / step).round() as usize).map(|index| index as f64 * step).collect()
            }
            Scale::Logarithmic => one_two_five(self.low, self.high),
        };
        values.into_iter().map(|value| (number(value), self.place(value))).collect()
    }
}

/// 1, 2 or 5 times a power of ten, so that about five steps reach `high`.
fn step(high: f64) -> f64 {
    let rough = high / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= rough * 0.999).unwrap_or(10.0);
    factor * power
}

/// 1, 2 and 5 times the powers of ten within the bounds.
fn one_two_five(low: f64, high: f64) -> Vec<f64> {
    let powers = low.log10().floor() as i32 - 1..=high.log10().ceil() as i32;
    let values = powers.flat_map(|power| [1.0, 2.0, 5.0].map(|factor| factor * 10f64.powi(power)));
    values.filter(|value| (low * 0.999..=high * 1.001).contains(value)).collect()
}

/// The nearest such values that enclose the bounds and differ.
fn round_outwards(low: f64, high: f64) -> (f64, f64) {
    let values = one_two_five(low / 10.0, high * 10.0);
    let below = values.iter().copied().filter(|value| *value <= low).fold(low / 10.0, f64::max);
    let above = values.iter().copied().filter(|value| *value >= high && *value > below).fold(high * 10.0, f64::min);
    (below, above)
}

fn number(value: f64) -> String {
    let decimals = match value.abs() {
        value if value == 0.0 || value >= 100.0 => 0,
        // As many as the first digit that counts needs.
        value if value < 0.01 => (-value.log10()).ceil() as usize,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_where_the_axes_say() {
        let mut series = Series::line("a<b");
        series.push(0.0, 0.0, "first".into());
        series.push(100.0, 50.0, "second".into());
        let svg = svg(&[throughput_against_latency("Both", vec![series])]);
        assert!(
            svg.contains(&format!("points=\"{LEFT:.1},{:.1} {:.1},{TOP:.1}\"", HEIGHT - BOTTOM, WIDTH - RIGHT)),
            "{svg}"
        );
        assert_eq!((svg.matches("<circle").count(), svg.matches("a&lt;b").count()), (2, 1));
        assert!(svg.contains("(tokens/s)") && svg.contains("(ms)") && svg.contains("second: 100, 50"), "{svg}");
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!([step(100.0), step(47.0), step(0.9), step(3000.0)], [20.0, 10.0, 0.2, 1000.0]);
        let axis = Span::over(Scale::Logarithmic, [3.0, 40.0].into_iter(), 0.0, 100.0);
        assert_eq!((axis.low, axis.high), (2.0, 50.0));
        let labels: Vec<_> = axis.ticks().into_iter().map(|(label, _)| label).collect();
        assert_eq!(labels, ["2", "5", "10", "20", "50"]);
        assert!((axis.place(10.0) - 50.0).abs() < 1e-9, "the middle of 2 and 50 is 10");
    }

    #[test]
    fn numbers_keep_the_digits_that_count() {
        let texts = [0.0, 0.002, 0.01, 0.25, 20.0, 1234.5].map(number);
        assert_eq!(texts, ["0", "0.002", "0.01", "0.25", "20", "1234"]);
    }

    #[test]
    fn a_distribution_ends_at_its_largest_sample() {
        let (few, none) = (Summary::new([1.0, 2.0, 4.0]), Summary::new([]));
        let chart = token_gaps("Gaps", [("few".to_owned(), &few), ("none".to_owned(), &none)]);
        assert_eq!(chart.series.len(), 1);
        let points: Vec<_> = chart.series[0].points.iter().map(|point| (point.x, point.y)).collect();
        assert_eq!((points[0], points[100], points[200]), ((1.0, 0.0), (2.0, 50.0), (4.0, 100.0)));
    }

    #[test]
    fn nothing_measured_is_an_empty_frame() {
        let svg = svg(&[token_gaps("Gaps", [])]);
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
