//! The process itself, under the names that every Prometheus client library uses.
//!
//! Not prometheus' own collector: it brings a second, older rustix along and counts CPU in whole seconds.

use std::collections::HashMap;
use std::fs;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::family::{About, counters_f64, gauges};

const CPU: About = ("process_cpu_seconds_total", "User and system CPU time spent, in seconds.");
const RSS: About = ("process_resident_memory_bytes", "Resident memory.");
const THREADS: About = ("process_threads", "Threads of the process.");
const FDS: About = ("process_open_fds", "Open file descriptors.");
const MAX_FDS: About = ("process_max_fds", "Most file descriptors the process may have open.");
const START: About = ("process_start_time_seconds", "When the process started, in seconds since 1970.");

/// `USER_HZ`: what /proc counts in, 100 on every architecture that Linux's ABI has today.
const TICKS_PER_SECOND: f64 = 100.0;

pub(super) struct Process {
    descs: Vec<Desc>,
}

impl Process {
    pub(super) fn new() -> Self {
        let desc = |(name, help): About| {
            Desc::new(name.to_owned(), help.to_owned(), Vec::new(), HashMap::new()).expect("the name is valid")
        };
        Self { descs: [CPU, RSS, THREADS, FDS, MAX_FDS, START].into_iter().map(desc).collect() }
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let status = read("/proc/self/status");
        let stat = Stat::parse(&read("/proc/self/stat"));
        let boot = number_after(&read("/proc/stat"), "btime");
        let max_fds = number_after(&read("/proc/self/limits"), "Max open files");
        let fds = fs::read_dir("/proc/self/fd").map(|dir| dir.count() as f64).ok();
        let gauge = |about, value: Option<f64>| value.map(|value| gauges(about, [(vec![], value)]));
        [
            stat.as_ref().map(|s| counters_f64(CPU, [(vec![], s.cpu_ticks / TICKS_PER_SECOND)])),
            gauge(RSS, number_after(&status, "VmRSS:").map(|kilobytes| kilobytes * 1024.0)),
            gauge(THREADS, number_after(&status, "Threads:")),
            gauge(FDS, fds),
            gauge(MAX_FDS, max_fds),
            gauge(START, stat.zip(boot).map(|(s, boot)| boot + s.start_ticks / TICKS_PER_SECOND)),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

struct Stat {
    cpu_ticks: f64,
    start_ticks: f64,
}

impl Stat {
    /// Of /proc/self/stat, proc(5). Fields are counted from the end of the command's name, which may hold anything.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self { cpu_ticks: field(14)? + field(15)?, start_ticks: field(22)? })
    }
}

/// The first number behind `name`, which begins a line.
fn number_after(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_spaces_and_brackets_does_not_shift_the_fields() {
        let stat = Stat::parse("7 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 4 0 900 1 2").unwrap();
        assert_eq!((stat.cpu_ticks, stat.start_ticks), (200.0, 900.0));
        assert!(Stat::parse("7 (a) S 1 2").is_none());
    }

    #[test]
    fn this_process_has_memory_descriptors_and_a_start() {
        let families = Process::new().collect();
        assert_eq!(families.len(), 6);
        for family in families {
            let metric = &family.get_metric()[0];
            let value = metric.get_counter().get_value() + metric.get_gauge().get_value();
            assert!(value > 0.0 || family.name() == CPU.0, "{} is {value}", family.name());
        }
    }
}
