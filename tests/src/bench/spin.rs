//! Keeps the processors awake: a row that leaves them idle would otherwise measure how fast an idle one wakes up, which
//! differs with every neighbour. Runs in the scheduling class that every other process displaces at once.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;

use anyhow::{Context, Result};
use mesh_tests::Process;

/// The hidden subcommand: a thread for each processor. Whoever started it kills it.
pub fn run(threads: usize) -> Result<ExitCode> {
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    std::hint::spin_loop();
                }
            });
        }
    });
    Ok(ExitCode::SUCCESS)
}

/// Starts it; it ends when the returned process is dropped.
pub fn start(logs: &Path) -> Result<Process> {
    let me = std::env::current_exe().context("a process knows its own file")?;
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut command = Command::new("chrt");
    command.args(["--idle", "0"]).arg(me).args(["spin", &threads.to_string()]);
    Ok(Process::start("spinner", command, &logs.join("spinner.log")))
}
