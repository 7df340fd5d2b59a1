//! Commands with a deadline, and waiting for conditions: nothing of the cluster may stand still for ever.
//!
//! In come commands; out comes their output, or one sentence that names them. Ctrl-C ends every wait.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Set by Ctrl-C; what waits looks at it.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// For commands that only look or set something.
pub const SHORT: Duration = Duration::from_secs(20);

const POLL: Duration = Duration::from_millis(50);

/// From here on Ctrl-C makes the next wait fail, so that the caller can clean up in order.
pub fn watch_interrupt() -> Result<()> {
    match ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed)) {
        // Several steps of one command ask for it.
        Ok(()) | Err(ctrlc::Error::MultipleHandlers) => Ok(()),
        Err(e) => Err(e).context("cannot watch for Ctrl-C"),
    }
}

pub fn check_interrupt() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// Says whether there was a Ctrl-C and forgets it: what cleans up has to wait too.
pub fn take_interrupt() -> bool {
    INTERRUPTED.swap(false, Ordering::Relaxed)
}

/// Polls `condition`; fails with `what` after `deadline`, at once when it fails itself, and on Ctrl-C.
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let start = Instant::now();
    while !condition()? {
        check_interrupt()?;
        if start.elapsed() > deadline {
            bail!("waited {} s in vain until {what}", deadline.as_secs());
        }
        thread::sleep(POLL);
    }
    Ok(start.elapsed())
}

/// The standard output of a command that succeeds within `deadline`.
pub fn output(mut command: Command, deadline: Duration) -> Result<String> {
    let what = describe(&command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {what}: `cargo xtask setup` installs it"))?;
    let out = drain(child.stdout.take().expect("stdout is piped"));
    let err = drain(child.stderr.take().expect("stderr is piped"));
    let ended = wait_until(&format!("{what} ends"), deadline, || Ok(child.try_wait()?.is_some()));
    if let Err(e) = ended {
        end(&mut child);
        return Err(e);
    }
    let status = child.wait().with_context(|| format!("cannot wait for {what}"))?;
    let (out, err) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    if !status.success() {
        let said = err.trim().lines().last().or(out.trim().lines().last()).unwrap_or("it said nothing").to_owned();
        bail!("{what} failed ({status}): {said}");
    }
    Ok(out)
}

/// Runs it to its end and hands on every line of its standard error; the last lines are in the error when it fails.
pub fn watch_stderr(mut command: Command, deadline: Duration, mut on_line: impl FnMut(&str)) -> Result<()> {
    let what = describe(&command);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {what}"))?;
    let (send, lines) = channel();
    let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
    thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    let start = Instant::now();
    let mut last: Vec<String> = Vec::new();
    loop {
        match lines.recv_timeout(POLL) {
            Ok(line) => {
                on_line(&line);
                if last.len() == 5 {
                    last.remove(0);
                }
                last.push(line);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        let late = start.elapsed() > deadline;
        if late || check_interrupt().is_err() {
            end(&mut child);
            check_interrupt()?;
            bail!("{what} did not end within {} s", deadline.as_secs());
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for {what}"))?;
    if !status.success() {
        bail!("{what} failed ({status}): {}", last.join("; "));
    }
    Ok(())
}

fn end(child: &mut Child) {
    // It may have ended by itself in between.
    let _ = child.kill();
    let _ = child.wait();
}

/// Reads on a thread of its own, so that a full pipe cannot stop the writer.
fn drain(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The program and its first words, for a sentence.
fn describe(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    let name = program.rsplit('/').next().unwrap_or_default().to_owned();
    let words = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).take(4);
    let text = [name].into_iter().chain(words).collect::<Vec<_>>().join(" ");
    format!("`{text}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_is_what_it_says_or_why_not() {
        assert_eq!(output(shell("echo yes"), SHORT).expect("sh runs"), "yes\n");
        let failed = output(shell("echo first >&2; echo because >&2; exit 3"), SHORT).expect_err("it ends with 3");
        assert!(failed.to_string().ends_with(": because"), "{failed}");
    }

    #[test]
    fn a_command_that_hangs_is_ended() {
        let late = output(shell("exec sleep 1000"), Duration::from_millis(100)).expect_err("it never ends by itself");
        assert!(late.to_string().contains("in vain"), "{late}");
        let late = watch_stderr(shell("exec sleep 1000"), Duration::from_millis(100), |_| {}).expect_err("the same");
        assert!(late.to_string().contains("did not end"), "{late}");
    }

    #[test]
    fn every_line_of_stderr_is_handed_on() {
        let mut lines = Vec::new();
        watch_stderr(shell("echo a >&2; echo b >&2"), SHORT, |line| lines.push(line.to_owned())).expect("sh runs");
        assert_eq!(lines, ["a", "b"]);
    }
}
