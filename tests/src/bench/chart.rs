//! The chart of the report: a panel for each question, a bar for each mode. Plain SVG, in colours that can be read on
//! light and on dark. Pure.

use std::fmt::Write as _;

use crate::plan::{Figure, Mode, Row};
use crate::results::Results;
use crate::table::number;

const WIDTH: f64 = 760.0;
const COLUMN: f64 = WIDTH / 2.0;
const TITLES: f64 = 118.0;
const BAR: f64 = 18.0;
const GAP: f64 = 6.0;
const TOP: f64 = 56.0;
/// Room for a value behind the longest bar.
const VALUE: f64 = 78.0;

struct Panel {
    title: &'static str,
    bars: Vec<(Mode, f64)>,
}

fn panels(results: &Results) -> Vec<Panel> {
    let of_row = |title, row, figure| {
        let bar = |mode: &Mode| results.median(*mode, row, figure).map(|value| (*mode, value));
        Panel { title, bars: results.modes.iter().filter_map(bar).collect() }
    };
    let memory = |mode: &Mode| results.memory(*mode, 100).map(|point| (*mode, point.size.rss));
    let all = vec![
        of_row("Requests/s, 16 connections (more is better)", Row::Http16, Figure::PerSecond),
        of_row("CPU-s per 100k requests (less is better)", Row::Http16, Figure::Cpu),
        of_row("p99 in us at a fixed rate (less is better)", Row::Rate, Figure::P99),
        of_row("Gbit/s, 1 stream (more is better)", Row::Bulk1, Figure::Gbit),
        of_row("New connections/s (more is better)", Row::Connect, Figure::PerSecond),
        Panel {
            title: "MiB of proxies for 100 pods (less is better)",
            bars: results.modes.iter().filter_map(memory).collect(),
        },
    ];
    all.into_iter().filter(|panel| !panel.bars.is_empty()).collect()
}

/// Mid tones: at least 3 to 1 against white and against GitHub's dark background.
fn colour(mode: Mode) -> &'static str {
    match mode {
        Mode::NoMesh => "#808a94",
        Mode::EnvoyC1 => "#b8862e",
        Mode::EnvoyC2 => "#c0703a",
        Mode::Ours => "#2f8f83",
    }
}

pub fn render(results: &Results) -> String {
    let panels = panels(results);
    #[expect(clippy::cast_precision_loss, reason = "a handful of modes")]
    let panel_height = 34.0 + results.modes.len() as f64 * (BAR + GAP) + 16.0;
    #[expect(clippy::cast_precision_loss, reason = "a handful of panels")]
    let height = TOP + panels.len().div_ceil(2) as f64 * panel_height + 8.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" \
         font-family=\"system-ui, -apple-system, 'Segoe UI', sans-serif\" font-size=\"12\">\n\
         <title>TCP with mutual TLS: no mesh, Envoy sidecars, Nodemesh</title>\n\
         <style>text{{fill:#57606a}} .h{{fill:#24292f;font-weight:600}} \
         @media (prefers-color-scheme:dark){{text{{fill:#9ea7b0}} .h{{fill:#e6edf3}}}}</style>\n\
         <text class=\"h\" x=\"12\" y=\"22\" font-size=\"15\">TCP with mutual TLS, between pods of two nodes</text>\n\
         <text x=\"12\" y=\"40\">medians of {} rounds in one run on {} CPUs that load, server and proxies share</text>\n",
        results.rounds, results.facts.cpus
    );
    for (index, panel) in panels.iter().enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "a handful of panels")]
        let (x, y) = ((index % 2) as f64 * COLUMN, TOP + (index / 2) as f64 * panel_height);
        draw(&mut svg, panel, x, y);
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw(svg: &mut String, panel: &Panel, x: f64, y: f64) {
    let _ = writeln!(svg, "<text class=\"h\" x=\"{:.0}\" y=\"{:.0}\">{}</text>", x + 12.0, y + 20.0, panel.title);
    let most = panel.bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let room = COLUMN - 12.0 - TITLES * 0.6 - VALUE;
    let left = x + 12.0 + TITLES * 0.6;
    let mut top = y + 32.0;
    for (mode, value) in &panel.bars {
        // A bar of nothing would look like a missing one.
        let length = (value.max(0.0) / most * room).max(1.5);
        let middle = top + BAR - 5.0;
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{middle:.1}\">{}</text>\
             <rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{length:.1}\" height=\"{BAR}\" rx=\"2\" fill=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{middle:.1}\">{}</text>",
            x + 12.0,
            mode.title(),
            colour(*mode),
            left + length + 6.0,
            number(*value)
        );
        top += BAR + GAP;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    #[test]
    fn draws_every_panel_inside_the_picture() {
        let svg = render(&example(2.0));
        assert_eq!(svg.matches("<rect").count(), 5 * 3 + 2, "three modes in five panels, two in that of memory");
        assert!(svg.contains("prefers-color-scheme:dark"));
        for rect in svg.split("<rect").skip(1) {
            let attribute = |name: &str| {
                let (_, rest) = rect.split_once(&format!(" {name}=\"")).unwrap();
                rest.split('"').next().unwrap().parse::<f64>().unwrap()
            };
            assert!(attribute("width") > 0.0);
            assert!(attribute("x") + attribute("width") + VALUE <= WIDTH + 12.0, "{rect}");
        }
    }

    #[test]
    fn what_was_not_measured_has_no_panel() {
        let mut results = example(2.0);
        results.samples.retain(|sample| sample.row != Row::Bulk1);
        results.memory.clear();
        assert_eq!(panels(&results).len(), 4);
    }
}
