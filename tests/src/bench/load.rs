//! Runs one load in the client pod and counts what it took.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cpu::{Role, Snapshot, Used};
use crate::parse::{self, Measured};
use crate::plan::{Figure, Row, name};
use crate::run::{success, to_end};
use crate::spin;
use crate::up::Up;

/// Beyond a load's own time, before it is given up.
const SLACK: Duration = Duration::from_secs(20);
const RATE_CONNECTIONS: &str = "16";

/// How long, and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Dose {
    pub seconds: u32,
    pub rate: u32,
}

/// Runs a row; its figures with what the processors did.
pub fn row(up: &Up<'_>, row: Row, dose: Dose) -> Result<Vec<(Figure, f64)>> {
    let spinner = if row.leaves_idle() { Some(spin::start(&up.mesh.logs())?) } else { None };
    let mut roles = up.roles();
    roles.extend(spinner.iter().map(|process| (process.id(), Role::Spinner)));
    let before = Snapshot::take()?;
    let measured = generate(up, row, dose).with_context(|| format!("{} of mode {}", name(row), name(up.mode)))?;
    let used = Snapshot::take()?.since(&before, std::process::id(), &roles);
    drop(spinner);
    let mut figures = measured.figures;
    figures.extend(cpu_figures(&used, up.idle, per(row, measured.amount)));
    figures.push((Figure::Rss, up.proxies_rss_mib()));
    Ok(figures)
}

/// In how many units of 100 000 requests or connections, or gigabytes.
fn per(row: Row, amount: f64) -> f64 {
    match row {
        Row::Http1 | Row::Http16 | Row::Http64 | Row::Rate | Row::Connect => amount / 1e5,
        Row::Bulk1 | Row::Bulk4 => amount,
    }
}

/// `idle` is what a second takes without load.
fn cpu_figures(used: &Used, idle: f64, units: f64) -> Vec<(Figure, f64)> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    #[expect(clippy::cast_precision_loss, reason = "a number of processors")]
    let machine = used.wall * cores as f64;
    vec![
        (Figure::Cpu, (used.all - idle * used.wall) / units),
        (Figure::CpuClient, used.client / units),
        (Figure::CpuServer, used.server / units),
        (Figure::CpuProxyUser, used.proxy_user / units),
        (Figure::CpuProxySystem, used.proxy_system / units),
        (Figure::CpuSoftirq, used.softirq / units),
        (Figure::Neighbours, used.neighbours / machine),
    ]
}

/// Seconds of processor that a second takes with everything up and no load.
pub fn idle(span: Duration) -> Result<f64> {
    let before = Snapshot::take()?;
    crate::run::pause(span)?;
    let used = Snapshot::take()?.since(&before, std::process::id(), &[]);
    Ok((used.all / used.wall).max(0.0))
}

/// Runs the load alone.
pub fn generate(up: &Up<'_>, row: Row, dose: Dose) -> Result<Measured> {
    match row {
        Row::Http1 => wrk(up, 1, dose),
        Row::Http16 => wrk(up, 16, dose),
        Row::Http64 => wrk(up, 64, dose),
        Row::Rate => rate(up, dose),
        Row::Bulk1 => iperf(up, 1, dose),
        Row::Bulk4 => iperf(up, 4, dose),
        Row::Connect => ab(up, dose),
    }
}

pub fn wrk(up: &Up<'_>, connections: u32, dose: Dose) -> Result<Measured> {
    let mut command = up.client.command("wrk");
    command.args(["-t1", "--latency", "--timeout", "5s", "-s"]).arg(up.wrk_script());
    command.args([format!("-c{connections}"), format!("-d{}s", dose.seconds), up.url()]);
    parse::wrk(&run(up, "wrk", command, dose)?)
}

fn rate(up: &Up<'_>, dose: Dose) -> Result<Measured> {
    let me = std::env::current_exe().context("a process knows its own file")?;
    let mut command = up.client.command(&me.display().to_string());
    command.args(["rate", "--to", &up.http().to_string(), "--connections", RATE_CONNECTIONS]);
    command.args(["--rate", &dose.rate.to_string(), "--seconds", &dose.seconds.to_string()]);
    parse::rate(&run(up, "the generator of constant rate", command, dose)?)
}

fn iperf(up: &Up<'_>, streams: u32, dose: Dose) -> Result<Measured> {
    let SocketAddr::V4(to) = up.bulk() else { unreachable!("the benchmark's addresses are IPv4") };
    let mut command = up.client.command("iperf3");
    command.args(["-J", "-C", "reno", "--connect-timeout", "5000", "-c", &to.ip().to_string()]);
    command.args(["-p", &to.port().to_string(), "-t", &dose.seconds.to_string(), "-P", &streams.to_string()]);
    // A failure is in its JSON, in better words than its exit code.
    let ended = to_end("iperf3", command, &up.log("iperf3"), deadline(dose))?;
    parse::iperf(&ended.text)
}

fn ab(up: &Up<'_>, dose: Dose) -> Result<Measured> {
    let mut command = up.client.command("ab");
    // -t sets -n to 50 000, so -n comes after it.
    command.args(["-q", "-c", "16", "-s", "5", "-t", &dose.seconds.to_string(), "-n", "2000000", &up.url()]);
    parse::ab(&run(up, "ab", command, dose)?)
}

fn run(up: &Up<'_>, what: &str, command: Command, dose: Dose) -> Result<String> {
    success(what, command, &up.log(what), deadline(dose))
}

fn deadline(dose: Dose) -> Duration {
    Duration::from_secs(dose.seconds.into()) + SLACK
}
