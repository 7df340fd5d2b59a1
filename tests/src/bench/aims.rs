//! What Nodemesh wants to be, against Envoy's L4 sidecars in the same run, and whether it is. Pure.

use crate::plan::{Figure, Mode, Row};
use crate::results::{Results, ratio};

#[derive(Debug, Clone, PartialEq)]
pub struct Aim {
    pub what: &'static str,
    /// Nodemesh's figure as times Envoy's.
    pub wanted: f64,
    pub at_least: bool,
    /// `None`: not measured.
    pub got: Option<f64>,
}

impl Aim {
    pub fn is_reached(&self) -> Option<bool> {
        self.got.map(|got| if self.at_least { got >= self.wanted } else { got <= self.wanted })
    }

    pub fn verdict(&self) -> &'static str {
        match self.is_reached() {
            Some(true) => "reached",
            Some(false) => "not reached",
            None => "not measured",
        }
    }
}

pub fn judge(results: &Results) -> Vec<Aim> {
    let of_row = |row, figure| ratio(results.median(Mode::Ours, row, figure), results.best_envoy(row, figure));
    let least_memory = results.modes.iter().filter(|mode| mode.is_envoy());
    let envoy = least_memory.filter_map(|mode| results.memory(*mode, 100)).map(|point| point.size.rss).reduce(f64::min);
    let ours = results.memory(Mode::Ours, 100).map(|point| point.size.rss);
    let aim = |what, wanted, at_least, got| Aim { what, wanted, at_least, got };
    vec![
        aim("requests/s at 16 connections", 1.7, true, of_row(Row::Http16, Figure::PerSecond)),
        aim("Gbit/s, 1 stream", 1.7, true, of_row(Row::Bulk1, Figure::Gbit)),
        aim("Gbit/s, 4 streams", 1.7, true, of_row(Row::Bulk4, Figure::Gbit)),
        aim("new connections/s", 5.0, true, of_row(Row::Connect, Figure::PerSecond)),
        aim("CPU per request at 16 connections", 0.5, false, of_row(Row::Http16, Figure::Cpu)),
        aim("memory of 100 pods' proxies", 0.02, false, ratio(ours, envoy)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::example;

    #[test]
    fn judges_both_ways() {
        let verdicts = |times| judge(&example(times)).iter().map(Aim::verdict).collect::<Vec<_>>();
        assert_eq!(verdicts(5.0), ["reached"; 6]);
        let half = verdicts(1.8);
        assert_eq!(half, ["reached", "reached", "reached", "not reached", "not reached", "reached"]);
    }

    #[test]
    fn what_was_not_measured_is_not_reached() {
        let mut results = example(5.0);
        results.samples.retain(|sample| sample.mode != Mode::Ours);
        results.memory.clear();
        assert!(judge(&results).iter().all(|aim| aim.verdict() == "not measured"));
    }
}
