//! Programs that run to their end within a deadline, and Ctrl-C.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_tests::{Process, tail};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on, Ctrl-C and SIGTERM are seen by [`check`] and no longer end the process by themselves: what is up is
/// taken down first.
pub fn catch_interrupts() -> Result<()> {
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed)).context("cannot handle Ctrl-C")
}

/// An error once Ctrl-C was pressed.
pub fn check() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted; all namespaces and processes of this run are gone");
    }
    Ok(())
}

/// Sleeps; Ctrl-C ends it early, with an error.
pub fn pause(span: Duration) -> Result<()> {
    let end = Instant::now() + span;
    while Instant::now() < end {
        check()?;
        thread::sleep(Duration::from_millis(20).min(span));
    }
    check()
}

/// What a program has printed, and its exit code (`None`: a signal).
pub struct Ended {
    pub code: Option<i32>,
    pub text: String,
}

/// Runs a program to its end. It is killed at the deadline, and by Ctrl-C.
pub fn to_end(what: &str, command: Command, log: &Path, deadline: Duration) -> Result<Ended> {
    let mut process = Process::start(what, command, log);
    let end = Instant::now() + deadline;
    while process.is_running() {
        check()?;
        if Instant::now() > end {
            bail!("{what} did not end within {deadline:?}; it said: {}", last_line(&process.log()));
        }
        thread::sleep(Duration::from_millis(5));
    }
    check()?;
    let status = process.wait(Duration::from_secs(1));
    Ok(Ended { code: status.code(), text: process.log() })
}

/// The same, and a failure is an error.
pub fn success(what: &str, command: Command, log: &Path, deadline: Duration) -> Result<String> {
    let ended = to_end(what, command, log, deadline)?;
    if ended.code != Some(0) {
        bail!("{what} failed with exit code {:?}: {}", ended.code, tail(&ended.text, 4).replace('\n', " / "));
    }
    Ok(ended.text)
}

/// A short helper program: its output, or an error that says what it said.
pub fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}; `cargo xtask setup` installs it"))?;
    check()?;
    if !output.status.success() {
        bail!("{program} failed: {}", last_line(&String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn last_line(text: &str) -> &str {
    text.trim_end().lines().last().unwrap_or("nothing")
}
