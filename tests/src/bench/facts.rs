//! The machine that the figures are of.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::run::output;

#[derive(Debug, Clone)]
pub struct Facts {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub memory_gib: f64,
    pub envoy: Option<String>,
    /// Of the tree, when git knows.
    pub commit: Option<String>,
    pub load_at_start: String,
    pub load_at_end: String,
    /// Seconds since 1970.
    pub started: u64,
}

pub fn gather(envoy: Option<&Path>) -> Facts {
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
    let version = |path| output(Command::new(path).arg("--version")).ok();
    Facts {
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        cpu: cpu.trim_start_matches([' ', '\t', ':']).to_owned(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_gib: f64::from(meminfo_kib("MemTotal:")) / 1024.0 / 1024.0,
        envoy: envoy.and_then(version).and_then(|text| text.split('/').nth(1).map(str::to_owned)),
        commit: commit(),
        load_at_start: load(),
        load_at_end: String::new(),
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
    }
}

fn commit() -> Option<String> {
    let git = |args: &[&str]| output(Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(args)).ok();
    let commit = git(&["rev-parse", "--short", "HEAD"])?.trim().to_owned();
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.trim().is_empty());
    Some(if changed { format!("{commit} with changes") } else { commit })
}

/// Runnable and waiting, over 1, 5 and 15 minutes.
pub fn load() -> String {
    read("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// A line of /proc/meminfo.
pub fn meminfo_kib(name: &str) -> u32 {
    let text = read("/proc/meminfo");
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

/// YYYY-MM-DD, in UTC.
pub fn date(seconds: u64) -> String {
    // Howard Hinnant's civil_from_days, for days after 1970.
    let days = seconds / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(951_782_400), "2000-02-29");
        assert_eq!(date(1_709_251_200), "2024-03-01");
        assert_eq!(date(1_735_689_599), "2024-12-31");
    }

    #[test]
    fn this_machine_has_facts() {
        let facts = gather(None);
        assert!(facts.memory_gib > 0.0 && !facts.kernel.is_empty() && facts.cpus > 0);
    }
}
