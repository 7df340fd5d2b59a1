//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::plan::{Mode, Row};

#[derive(Debug, Parser)]
#[command(name = "mesh-bench", about = "Measures Nodemesh beside no mesh and Envoy sidecars")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// TCP with mutual TLS and L4 policy, between pods of two nodes.
    L4(Options),
    /// A load generator of constant rate, used by the benchmark itself.
    #[command(hide = true)]
    Rate(Rate),
    /// Keeps the processors awake, used by the benchmark itself.
    #[command(hide = true)]
    Spin { threads: usize },
}

#[derive(Debug, Clone, Args)]
pub struct Options {
    /// How often each mode is brought up and measured, in turns [default: 5]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: Option<u32>,
    /// Seconds of load for each row [default: 5]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=120))]
    pub seconds: Option<u32>,
    /// Two rounds of two seconds: shows that all works, says little
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    pub quick: bool,
    /// Modes to measure
    #[arg(long, value_enum, value_delimiter = ',', default_value = "none,envoy-c2,ours")]
    pub only: Vec<Mode>,
    /// Loads to run [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub rows: Vec<Row>,
    /// Requests per second of the fixed-rate load [default: half of what Envoy reaches at 16 connections]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub rate: Option<u32>,
    /// Leave out the measurement of memory
    #[arg(long)]
    pub no_memory: bool,
    /// Also write the report, the data and the chart into docs/bench
    #[arg(long)]
    pub publish: bool,
    /// Bring each mode up once, print the `perf record` line for its proxies and keep 16 connections busy
    #[arg(long, conflicts_with_all = ["quick", "rounds", "publish"])]
    pub profile: bool,
    /// Where the raw data goes [default: bench/l4.json in cargo's target folder]
    #[arg(long)]
    pub json: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub struct Rate {
    #[arg(long)]
    pub to: SocketAddr,
    #[arg(long)]
    pub rate: u32,
    #[arg(long)]
    pub connections: usize,
    #[arg(long)]
    pub seconds: u32,
}

impl Options {
    pub fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 })
    }

    pub fn seconds(&self) -> u32 {
        self.seconds.unwrap_or(match (self.quick, self.profile) {
            (true, _) => 2,
            (false, true) => 30,
            (false, false) => 5,
        })
    }

    /// In the order of their declaration, each once.
    pub fn modes(&self) -> Vec<Mode> {
        Mode::value_variants().iter().copied().filter(|mode| self.only.contains(mode)).collect()
    }

    pub fn rows(&self) -> Vec<Row> {
        let all = Row::value_variants().iter().copied();
        all.filter(|row| self.rows.is_empty() || self.rows.contains(row)).collect()
    }

    /// What the parser cannot see.
    pub fn check(&self) -> Result<()> {
        let whole = self.modes().contains(&Mode::NoMesh)
            && self.modes().contains(&Mode::Ours)
            && self.modes().iter().any(|mode| mode.is_envoy());
        ensure!(
            !self.publish || (whole && self.rows.is_empty() && !self.no_memory && !self.quick),
            "--publish writes the report that the documentation shows: it needs all rows, memory, and the modes none, an Envoy and ours; leave out --only, --rows, --no-memory and --quick"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, clap::Error> {
        let Command::L4(options) = Cli::try_parse_from([&["mesh-bench", "l4"], args].concat())?.command else {
            unreachable!("l4 was given")
        };
        Ok(options)
    }

    #[test]
    fn defaults_are_a_whole_run() {
        let options = parse(&[]).unwrap();
        assert_eq!((options.rounds(), options.seconds()), (5, 5));
        assert_eq!(options.modes(), [Mode::NoMesh, Mode::EnvoyC2, Mode::Ours]);
        assert_eq!(options.rows().len(), Row::value_variants().len());
        options.check().unwrap();
    }

    #[test]
    fn wrong_lines_are_refused() {
        for args in [
            &["--only", "linkerd"][..],
            &["--rows", "http2"],
            &["--rounds", "0"],
            &["--seconds", "10000"],
            &["--quick", "--rounds", "3"],
            &["--profile", "--publish"],
        ] {
            assert!(parse(args).is_err(), "{args:?}");
        }
    }

    #[test]
    fn a_partial_run_is_not_published() {
        for args in [&["--only", "none,ours"][..], &["--rows", "http16"], &["--no-memory"], &["--quick"]] {
            let options = parse(&[args, &["--publish"]].concat()).unwrap();
            assert!(options.check().is_err(), "{args:?}");
        }
        assert!(parse(&["--only", "ours,none,envoy-c1", "--publish"]).unwrap().check().is_ok());
    }
}
