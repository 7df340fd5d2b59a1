//! What a node's proxies hold in memory with 1, 10 and 100 pods, each pod with an identity of its own and a request made.
//!
//! Of the node where the clients are: with sidecars one for each pod, with Nodemesh one agent. 100 sidecars are reckoned
//! from 10.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};

use crate::facts::meminfo_kib;
use crate::plan::{Mode, name};
use crate::up;

/// More than an Envoy with two workers takes.
const ENVOY_MIB: u32 = 100;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Size {
    /// Resident, in MiB; pages that processes share (a binary's text) are in each.
    pub rss: f64,
    /// Proportional: a shared page counts for each its part.
    pub pss: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub mode: Mode,
    pub pods: usize,
    pub size: Size,
    /// Else reckoned.
    pub measured: bool,
    /// Of the controller, which serves the whole mesh and is in no node's sum.
    pub controller: Option<f64>,
}

/// Of a process; zero when it is gone.
pub fn of(pid: u32) -> Size {
    let kib = |file: &str, field: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0)
    };
    Size { rss: kib("status", "VmRSS:") / 1024.0, pss: kib("smaps_rollup", "Pss:") / 1024.0 }
}

/// All points of one mode.
pub fn measure(mode: Mode, envoy: Option<&Path>) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for pods in [1, 10, 100] {
        let reckoned = mode.is_envoy() && pods == 100;
        if mode.is_envoy() && meminfo_kib("MemAvailable:") / 1024 < ENVOY_MIB * 12 {
            bail!("less than {} MiB of memory are free: too little for ten sidecars", ENVOY_MIB * 12);
        }
        let point = if reckoned { points.last().map(hundred) } else { Some(at(mode, pods, envoy)?) };
        if let Some(point) = point {
            eprintln!("memory  {:<9} {:>3} pods  {:>7.1} MiB", name(mode), pods, point.size.rss);
            points.push(point);
        }
    }
    Ok(points)
}

fn at(mode: Mode, pods: usize, envoy: Option<&Path>) -> Result<Point> {
    // Bringing up checks that every client reaches the server.
    up::with(mode, pods, envoy, |up| {
        let of_clients = if mode.is_envoy() { pods } else { 1 };
        let sizes: Vec<Size> = up.proxy_pids().iter().take(of_clients).map(|pid| of(*pid)).collect();
        let size = Size { rss: sizes.iter().map(|s| s.rss).sum(), pss: sizes.iter().map(|s| s.pss).sum() };
        Ok(Point { mode, pods, size, measured: true, controller: up.controller_pid().map(|pid| of(pid).rss) })
    })
}

fn hundred(ten: &Point) -> Point {
    let size = Size { rss: ten.size.rss * 10.0, pss: ten.size.pss * 10.0 };
    Point { pods: 100, size, measured: false, ..*ten }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_size() {
        let size = of(std::process::id());
        assert!(size.rss > 0.5 && size.pss > 0.1 && size.pss <= size.rss * 1.1, "{size:?}");
        assert_eq!(of(0), Size { rss: 0.0, pss: 0.0 });
    }

    #[test]
    fn a_hundred_sidecars_are_ten_times_ten() {
        let ten = Point {
            mode: Mode::EnvoyC2,
            pods: 10,
            size: Size { rss: 660.0, pss: 400.0 },
            measured: true,
            controller: None,
        };
        let got = hundred(&ten);
        assert_eq!((got.pods, got.measured, got.size), (100, false, Size { rss: 6600.0, pss: 4000.0 }));
    }
}
