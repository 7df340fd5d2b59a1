//! The table on the terminal, 80 columns wide. Pure.

use std::fmt::Write as _;

use crate::aims::Aim;
use crate::facts::date;
use crate::plan::{Figure, LINES, Mode, Row, name};
use crate::results::{Results, Sample, ratio};

pub const WIDTH: usize = 80;
const LABEL: usize = 22;
const CELL: usize = 10;
const RATIO: usize = 9;

/// Three digits that count, thousands set apart.
pub fn number(value: f64) -> String {
    if value.abs() >= 1000.0 {
        let whole = format!("{value:.0}");
        let (sign, digits) = whole.strip_prefix('-').map_or(("", whole.as_str()), |digits| ("-", digits));
        let groups: Vec<&str> = digits
            .as_bytes()
            .rchunks(3)
            .rev()
            .map(|group| std::str::from_utf8(group).expect("digits are text"))
            .collect();
        return format!("{sign}{}", groups.join(","));
    }
    let decimals = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

pub fn times(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{}x", number(value)))
}

/// One line of progress.
pub fn gist(sample: &Sample) -> String {
    let value = |figure: Figure| sample.figures.get(&figure).copied();
    let mut text = String::new();
    let parts = [
        (Figure::PerSecond, "/s"),
        (Figure::Gbit, " Gbit/s"),
        (Figure::P50, " us p50"),
        (Figure::P99, " us p99"),
        (Figure::Cpu, " CPU-s"),
    ];
    for (figure, unit) in parts {
        if let Some(value) = value(figure) {
            let _ = write!(text, "  {:>9}{unit}", number(value));
        }
    }
    if let Some(share) = value(Figure::Neighbours).filter(|share| *share > 0.1) {
        let _ = write!(text, "  (neighbours took {:.0} %)", share * 100.0);
    }
    text
}

/// Whether Nodemesh is compared, or for want of it an Envoy.
pub fn compared(results: &Results) -> Option<Mode> {
    results.modes.iter().rev().copied().find(|mode| *mode != Mode::NoMesh)
}

pub fn render(results: &Results, aims: &[Aim]) -> String {
    let mut text = String::new();
    header(&mut text, results);
    let compared = compared(results);
    let _ = write!(text, "\n{:<LABEL$}", "median of all rounds");
    for mode in &results.modes {
        let _ = write!(text, "{:>CELL$}", mode.title());
    }
    let _ = writeln!(text, "{:>RATIO$}{:>RATIO$}", "of Envoy", "of none");
    let rule = LABEL + results.modes.len() * CELL + 2 * RATIO;
    let _ = writeln!(text, "{}", "-".repeat(rule));
    for line in LINES {
        let medians: Vec<_> = results.modes.iter().map(|mode| results.median(*mode, line.row, line.figure)).collect();
        if medians.iter().all(Option::is_none) && results.modes.iter().all(|mode| results.failed(*mode, line.row) == 0)
        {
            continue;
        }
        let _ = write!(text, "{:<LABEL$}", line.label);
        for (mode, median) in results.modes.iter().zip(&medians) {
            let failed = if results.failed(*mode, line.row) > 0 { "failed" } else { "-" };
            let _ = write!(text, "{:>CELL$}", median.map_or_else(|| failed.to_owned(), number));
        }
        let value = compared.and_then(|mode| results.median(mode, line.row, line.figure));
        let of_envoy = compared.filter(|mode| !mode.is_envoy()).and(results.best_envoy(line.row, line.figure));
        let of_none = results.median(Mode::NoMesh, line.row, line.figure);
        let _ = writeln!(text, "{:>RATIO$}{:>RATIO$}", times(ratio(value, of_envoy)), times(ratio(value, of_none)));
    }
    memory(&mut text, results);
    programs(&mut text, results);
    if results.modes.contains(&Mode::Ours) && results.modes.iter().any(|mode| mode.is_envoy()) {
        verdicts(&mut text, aims);
    }
    footer(&mut text, results);
    text
}

fn header(text: &mut String, results: &Results) {
    let facts = &results.facts;
    let _ = writeln!(text, "\nL4, mutual TLS, between pods of two nodes on one machine   {}", date(facts.started));
    let _ = writeln!(
        text,
        "{}, {} CPUs, {:.0} GiB, kernel {}",
        clip(&facts.cpu, 30),
        facts.cpus,
        facts.memory_gib,
        clip(&facts.kernel, 24)
    );
    let _ = writeln!(
        text,
        "{} rounds of {} s in turns; load average {} before, {} after",
        results.rounds, results.seconds, facts.load_at_start, facts.load_at_end
    );
}

fn memory(text: &mut String, results: &Results) {
    for pods in [1, 10, 100] {
        let rss: Vec<_> = results.modes.iter().map(|mode| results.memory(*mode, pods)).collect();
        if rss.iter().all(Option::is_none) {
            continue;
        }
        let _ = write!(text, "{:<LABEL$}", format!("MiB RSS, {pods} pods"));
        for point in &rss {
            let cell = point.map_or_else(
                || "-".to_owned(),
                |point| format!("{}{}", if point.measured { "" } else { "~" }, number(point.size.rss)),
            );
            let _ = write!(text, "{cell:>CELL$}");
        }
        let ours = results.memory(Mode::Ours, pods).map(|point| point.size.rss);
        let envoys = results.modes.iter().filter(|mode| mode.is_envoy());
        let envoy = envoys.filter_map(|mode| results.memory(*mode, pods)).map(|point| point.size.rss).reduce(f64::min);
        let _ = writeln!(text, "{:>RATIO$}{:>RATIO$}", times(ratio(ours, envoy)), "-");
    }
}

fn programs(text: &mut String, results: &Results) {
    if results.bpf.is_empty() {
        return;
    }
    let _ = writeln!(text, "\nkernel programs, in a round of their own");
    for program in &results.bpf {
        let unit = match program.row {
            Row::Http1 | Row::Http16 | Row::Http64 | Row::Rate => "request",
            Row::Connect => "connection",
            Row::Bulk1 | Row::Bulk4 => "GB",
        };
        let _ = writeln!(
            text,
            "  {:<8}{:<18}{:>10} runs per {:<10}{:>8} ns each",
            name(program.row),
            clip(&program.name, 17),
            number(program.runs),
            unit,
            number(program.ns)
        );
    }
}

fn verdicts(text: &mut String, aims: &[Aim]) {
    let _ = writeln!(text, "\naims, against Envoy's L4 sidecars in this run");
    for aim in aims {
        let wanted = format!("{} {}x", if aim.at_least { ">=" } else { "<=" }, aim.wanted);
        let _ = writeln!(text, "  {:<36}{:>9}{:>11}   {}", aim.what, wanted, fine(aim.got), aim.verdict());
    }
}

/// Ratios far below one need their digits.
pub fn fine(value: Option<f64>) -> String {
    value.filter(|value| *value < 0.1).map_or_else(|| times(value), |value| format!("{value:.4}x"))
}

fn footer(text: &mut String, results: &Results) {
    let _ = writeln!(text);
    if let Some((mode, row, widest)) = results.widest() {
        let _ = writeln!(text, "rounds differ by {widest:.2} times at most ({}, {})", mode.title(), name(row));
    }
    let share = results.neighbours();
    if share > 0.05 {
        let _ = writeln!(
            text,
            "neighbours took up to {:.0} % of the machine: trust the ratios, not the figures",
            share * 100.0
        );
    }
    for failure in &results.failures {
        let sentence = format!("failed in round {}: {}", failure.round, failure.error);
        let _ = writeln!(text, "{}", clip(&sentence, WIDTH));
    }
}

fn clip(text: &str, width: usize) -> String {
    if text.chars().count() <= width { text.to_owned() } else { text.chars().take(width - 1).chain(['~']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aims::judge;
    use crate::results::Failure;
    use crate::results::tests::example;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0.00"),
            (2.516, "2.52"),
            (29.94, "29.9"),
            (812.4, "812"),
            (65_006.2, "65,006"),
            (-1234.0, "-1,234"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
        assert_eq!(times(None), "-");
        assert_eq!(fine(Some(0.0143)), "0.0143x");
    }

    #[test]
    fn fits_the_terminal() {
        let mut results = example(1.8);
        results.facts.cpu = "a processor with a name that goes on for very long".to_owned();
        results.modes.insert(1, Mode::EnvoyC1);
        results.failures.push(Failure { round: 1, mode: Mode::EnvoyC1, row: Row::Bulk1, error: "x".repeat(200) });
        results.bpf.push(crate::bpf::Program {
            row: Row::Connect,
            name: "n".repeat(30),
            runs: 123_456.0,
            ns: 12_345.0,
        });
        let text = render(&results, &judge(&results));
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{} columns: {line}", line.chars().count());
        }
        assert!(text.contains("failed"));
        assert!(text.contains("not reached"));
    }

    #[test]
    fn compares_ours_with_both() {
        let text = render(&example(1.8), &[]);
        let line = text.lines().find(|line| line.starts_with("requests/s, 16")).unwrap();
        assert_eq!(line.split_whitespace().collect::<Vec<_>>()[3..], ["40,000", "10,000", "18,000", "1.80x", "0.45x"]);
    }

    #[test]
    fn without_ours_an_envoy_is_compared_with_none() {
        let mut results = example(1.8);
        results.modes.pop();
        let text = render(&results, &[]);
        let line = text.lines().find(|line| line.starts_with("requests/s, 16")).unwrap();
        assert_eq!(line.split_whitespace().collect::<Vec<_>>()[3..], ["40,000", "10,000", "-", "0.25x"]);
        assert!(!text.contains("aims"));
    }
}
