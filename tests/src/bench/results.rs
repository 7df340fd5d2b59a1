//! All that was measured, and medians of it. Pure.

use std::collections::BTreeMap;

use crate::bpf::Program;
use crate::facts::Facts;
use crate::memory::Point;
use crate::plan::{Figure, Mode, Row};

#[derive(Debug)]
pub struct Sample {
    pub round: u32,
    pub mode: Mode,
    pub row: Row,
    pub figures: BTreeMap<Figure, f64>,
}

#[derive(Debug)]
pub struct Failure {
    pub round: u32,
    pub mode: Mode,
    pub row: Row,
    pub error: String,
}

#[derive(Debug)]
pub struct Results {
    pub facts: Facts,
    pub modes: Vec<Mode>,
    pub rounds: u32,
    pub seconds: u32,
    pub rate: u32,
    pub samples: Vec<Sample>,
    pub failures: Vec<Failure>,
    pub memory: Vec<Point>,
    pub bpf: Vec<Program>,
}

/// Over the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Results {
    pub fn spread(&self, mode: Mode, row: Row, figure: Figure) -> Option<Spread> {
        let of = |sample: &&Sample| sample.mode == mode && sample.row == row;
        spread(self.samples.iter().filter(of).filter_map(|sample| sample.figures.get(&figure).copied()).collect())
    }

    pub fn median(&self, mode: Mode, row: Row, figure: Figure) -> Option<f64> {
        self.spread(mode, row, figure).map(|spread| spread.median)
    }

    pub fn memory(&self, mode: Mode, pods: usize) -> Option<&Point> {
        self.memory.iter().find(|point| point.mode == mode && point.pods == pods)
    }

    /// The Envoy to compare with: of those measured, the one that is best in this figure.
    pub fn best_envoy(&self, row: Row, figure: Figure) -> Option<f64> {
        let medians =
            self.modes.iter().filter(|mode| mode.is_envoy()).filter_map(|mode| self.median(*mode, row, figure));
        let better = if figure.higher_is_better() { f64::max } else { f64::min };
        medians.reduce(better)
    }

    pub fn failed(&self, mode: Mode, row: Row) -> usize {
        self.failures.iter().filter(|failure| failure.mode == mode && failure.row == row).count()
    }

    /// The largest share of the machine that neighbours took during any load.
    pub fn neighbours(&self) -> f64 {
        let shares = self.samples.iter().filter_map(|sample| sample.figures.get(&Figure::Neighbours));
        shares.copied().fold(0.0, f64::max)
    }

    /// Where the rounds differ most among requests, connections and bits per second: (mode, row, max / min).
    pub fn widest(&self) -> Option<(Mode, Row, f64)> {
        let mut widest: Option<(Mode, Row, f64)> = None;
        for sample in &self.samples {
            let figure = match sample.row {
                Row::Http1 | Row::Http16 | Row::Http64 | Row::Connect => Figure::PerSecond,
                Row::Bulk1 | Row::Bulk4 => Figure::Gbit,
                Row::Rate => continue,
            };
            let Some(spread) = self.spread(sample.mode, sample.row, figure) else { continue };
            let ratio = spread.max / spread.min;
            if ratio.is_finite() && widest.is_none_or(|(_, _, most)| ratio > most) {
                widest = Some((sample.mode, sample.row, ratio));
            }
        }
        widest
    }
}

pub fn spread(mut values: Vec<f64>) -> Option<Spread> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    let (min, max) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let median = if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
    Some(Spread { median, min, max })
}

/// `None` where either is missing or there is nothing to divide by.
pub fn ratio(ours: Option<f64>, theirs: Option<f64>) -> Option<f64> {
    let ratio = ours? / theirs?;
    ratio.is_finite().then_some(ratio)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Three modes, one round; Nodemesh has `times` Envoy's figures.
    pub fn example(times: f64) -> Results {
        use clap::ValueEnum;

        let modes = vec![Mode::NoMesh, Mode::EnvoyC2, Mode::Ours];
        let mut samples = Vec::new();
        for &mode in &modes {
            let scale = match mode {
                Mode::NoMesh => 4.0,
                Mode::EnvoyC1 | Mode::EnvoyC2 => 1.0,
                Mode::Ours => times,
            };
            for &row in Row::value_variants() {
                let figures = crate::plan::LINES.iter().filter(|line| line.row == row).map(|line| {
                    let better = line.figure.higher_is_better();
                    (line.figure, 10_000.0 * if better { scale } else { 1.0 / scale })
                });
                samples.push(Sample { round: 1, mode, row, figures: figures.collect() });
            }
        }
        let point = |mode, pods, rss| Point {
            mode,
            pods,
            size: crate::memory::Size { rss, pss: rss / 2.0 },
            measured: true,
            controller: None,
        };
        let memory = vec![point(Mode::EnvoyC2, 100, 7000.0), point(Mode::Ours, 100, 100.0)];
        let facts = Facts {
            kernel: "6.18".to_owned(),
            cpu: "a processor".to_owned(),
            cpus: 2,
            memory_gib: 24.0,
            envoy: None,
            commit: None,
            load_at_start: "0.1 0.1 0.1".to_owned(),
            load_at_end: "2.0 1.0 0.5".to_owned(),
            started: 0,
        };
        Results { facts, modes, rounds: 1, seconds: 5, rate: 7000, samples, failures: vec![], memory, bpf: vec![] }
    }

    #[test]
    fn medians_of_odd_and_even_numbers_of_rounds() {
        assert_eq!(spread(vec![3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(spread(vec![4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(spread(vec![f64::NAN]), None);
    }

    #[test]
    fn nothing_is_compared_to_nothing() {
        assert_eq!(ratio(Some(1.0), Some(0.0)), None);
        assert_eq!(ratio(None, Some(1.0)), None);
        assert_eq!(ratio(Some(3.0), Some(2.0)), Some(1.5));
    }

    #[test]
    fn of_two_envoys_the_better_counts() {
        let mut results = example(2.0);
        results.modes.push(Mode::EnvoyC1);
        for (figure, value) in [(Figure::PerSecond, 12_000.0), (Figure::Cpu, 12_000.0)] {
            let figures = BTreeMap::from([(figure, value)]);
            results.samples.push(Sample { round: 1, mode: Mode::EnvoyC1, row: Row::Http16, figures });
        }
        assert_eq!(results.best_envoy(Row::Http16, Figure::PerSecond), Some(12_000.0));
        assert_eq!(results.best_envoy(Row::Http16, Figure::Cpu), Some(10_000.0));
    }

    #[test]
    fn the_widest_spread_is_found() {
        let mut results = example(2.0);
        let figures = BTreeMap::from([(Figure::Gbit, 5_000.0)]);
        results.samples.push(Sample { round: 2, mode: Mode::EnvoyC2, row: Row::Bulk4, figures });
        assert_eq!(results.widest(), Some((Mode::EnvoyC2, Row::Bulk4, 2.0)));
    }
}
