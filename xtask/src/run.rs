//! Running other programs: with their output passed on, their failure named, their tests counted.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_owned()
}

/// `cargo` of this tool chain, in the root.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(args);
    command
}

/// Whether a program is on PATH, or where system programs lie that a plain user's PATH leaves out.
pub fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.into_iter().any(|folder| folder.join(program).is_file())
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs it with its output shown; anything but success is an error that names it.
pub fn step(what: &str, mut command: Command) -> Result<()> {
    println!("==> {what}");
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot run {program}: `cargo xtask setup` installs it"))?;
    if !status.success() {
        bail!("{what}: {program} ended with {status}");
    }
    Ok(())
}

/// What one run of tests came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Runs a test command with its output shown, and adds up its closing lines. A run that fails without a failed test (it
/// does not compile, say) counts as one failure.
pub fn tests(what: &str, mut command: Command) -> Result<Tally> {
    println!("==> {what}");
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start: {what}"))?;
    let mut tally = Tally::default();
    let mut out = std::io::stdout();
    for line in BufReader::new(child.stdout.take().expect("stdout is piped")).lines() {
        let line = line.with_context(|| format!("cannot read the output of: {what}"))?;
        let _ = writeln!(out, "{line}");
        tally += closing_line(&line).unwrap_or_default();
    }
    let status = child.wait().with_context(|| format!("cannot wait for: {what}"))?;
    if !status.success() && tally.failed == 0 {
        tally.failed = 1;
    }
    Ok(tally)
}

/// `test result: ok. 12 passed; 0 failed; ...`
fn closing_line(line: &str) -> Option<Tally> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |word: &str| -> Option<u64> {
        let part = rest.split([';', '.']).find(|part| part.trim().ends_with(word))?;
        part.trim().split(' ').next()?.parse().ok()
    };
    Some(Tally { passed: number("passed")?, failed: number("failed")? })
}

/// Runs `f` and says how long it took.
pub fn timed<T>(f: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let value = f();
    (value, start.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_closing_lines() {
        let line = "test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.12s";
        assert_eq!(closing_line(line), Some(Tally { passed: 12, failed: 3 }));
        assert_eq!(closing_line("test foo ... ok"), None);
    }
}
