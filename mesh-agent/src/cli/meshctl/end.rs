//! `meshctl end`, hidden: in the container of an agent that drains, cuts what is still open, so that the container ends. For an
//! uninstallation, which removes what those connections run through.

use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::cli::exit::Failure;

/// A container's first process is the agent; that of a machine is not.
const AGENT: &str = "mesh-agent";
/// Signals that come too close together are one.
const PAUSE: Duration = Duration::from_millis(250);
/// The first lets it drain, the second cuts; the container ends with it, and this process too.
const TRIES: usize = 40;

pub(super) async fn end() -> anyhow::Result<()> {
    let program = std::fs::read_link("/proc/1/exe").unwrap_or_default();
    if program.file_name().is_none_or(|name| name != AGENT) {
        return Err(Failure::usage("this is not the container of an agent; end the agent with SIGTERM").into());
    }
    for _ in 0..TRIES {
        match kill_process(Pid::INIT, Signal::TERM) {
            Ok(()) => tokio::time::sleep(PAUSE).await,
            Err(Errno::SRCH) => return Ok(()),
            Err(e) => return Err(Failure::unavailable(format!("cannot signal the agent: {e}")).into()),
        }
    }
    Err(Failure::unavailable("the agent goes on though it was told to end; see its log").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_process_of_a_machine_is_left_alone() {
        let error = end().await.unwrap_err();
        assert!(error.to_string().contains("not the container of an agent"), "{error}");
    }
}
