//! `mesh-bench`: what a connection costs with no mesh, with Envoy sidecars and with Nodemesh, side by side in one run.
//!
//! In comes a command line (`cargo xtask bench l4 ...` builds this program and passes it on), out go a table on the
//! terminal, the raw data as JSON and, with `--publish`, the report and its chart. The way of a run:
//! [`args`] -> [`tools`] -> for each round and mode: [`up`] (pods, proxies, [`checks`]) -> [`load`] under [`cpu`] ->
//! [`memory`], [`bpf`] -> [`results`] -> [`table`], [`markdown`], [`chart`], [`json`].

mod aims;
mod args;
mod bpf;
mod certs;
mod chart;
mod checks;
mod cpu;
mod envoy;
mod facts;
mod json;
mod load;
mod markdown;
mod memory;
mod ours;
mod parse;
mod plan;
mod rate;
mod results;
mod rounds;
mod run;
mod spin;
mod table;
mod tools;
mod up;

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::process::ExitCode;
use std::sync::Mutex;

use anyhow::{Result, anyhow};
use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::L4(options) => guarded(|| rounds::bench(&options)),
        Command::Rate(options) => rate::run(&options).map(|()| ExitCode::SUCCESS),
        Command::Spin { threads } => spin::run(threads),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// The harness panics where a test would fail. Here such a panic is one sentence like any other error; unwinding has
/// taken down by then what was up.
fn guarded(work: impl FnOnce() -> Result<ExitCode>) -> Result<ExitCode> {
    static SAID: Mutex<Option<String>> = Mutex::new(None);
    set_hook(Box::new(|info| {
        let text = info.payload_as_str().unwrap_or("a panic without words").to_owned();
        let place = info.location().map(|at| format!(" ({}:{})", at.file(), at.line())).unwrap_or_default();
        SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(text + &place);
    }));
    let result = catch_unwind(AssertUnwindSafe(work));
    let interrupted = run::check().err();
    match (result, interrupted) {
        (_, Some(interrupted)) => Err(interrupted),
        (Ok(result), None) => result,
        (Err(_), None) => {
            let said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            Err(anyhow!(said.unwrap_or_default()))
        }
    }
}
