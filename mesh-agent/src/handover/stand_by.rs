//! The agent whose place another one has, in a pod that kubelet has not ended yet: it is there for the case that the other
//! one dies. A container that simply ended would be started anew, and take the place back.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use crate::lifecycle::{PodDir, Signals};
use crate::redirect::{Options, Redirect, RedirectError};

/// How often it looks whether the other one lives.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum StandByError {
    #[error(transparent)]
    Note(#[from] io::Error),
    #[error(transparent)]
    Redirect(#[from] RedirectError),
}

/// To be called first. Where an agent of this pod has handed over, waits until nobody has the place; `false`: a signal came
/// before that.
pub async fn stand_by(pod: Option<&PodDir>, in_kernel: &Options, signals: &mut Signals) -> Result<bool, StandByError> {
    let Some(pod) = pod else { return Ok(true) };
    pod.set_ready(false)?;
    if !pod.is_handed_over() {
        return Ok(true);
    }
    tracing::info!("another agent has taken over from this pod's; this one stands by");
    loop {
        match Redirect::lock(in_kernel) {
            Ok(_) => break,
            Err(RedirectError::Running { .. }) => {}
            Err(e) => return Err(e.into()),
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = signals.recv() => return Ok(false),
        }
    }
    tracing::warn!("the agent that took over is gone; this one serves again");
    pod.set_handed_over(false)?;
    Ok(true)
}

/// Starts this program over, in this process, to stand by; returns only where that fails.
pub fn start_anew() -> io::Error {
    Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).exec()
}
