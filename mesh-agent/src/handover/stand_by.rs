//! The agent whose place another one has, in a pod that kubelet has not ended yet. A container that ends is started anew
//! there, and would take the place back; so it stands by, for the case that the other one dies.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::lifecycle::Signals;
use crate::redirect::{Options, Redirect, RedirectError};

/// How often it looks whether the other one lives.
const LOOK: Duration = Duration::from_secs(1);

/// Whether the agent of this pod has had its turn: a file beside the sockets, which outlives the container.
#[derive(Debug)]
pub struct Turn(Option<PathBuf>);

#[derive(Debug, thiserror::Error)]
pub enum TurnError {
    #[error("cannot note at {} that another agent has taken over: {source}; see --admin-socket", path.display())]
    Note { path: PathBuf, source: io::Error },
    #[error("cannot start anew to serve the node's pods again: {0}")]
    StartAnew(io::Error),
    #[error(transparent)]
    Redirect(#[from] RedirectError),
}

impl Turn {
    /// `pod` is the agent's own, in Kubernetes. Elsewhere nobody starts what has ended in order.
    pub fn of(admin_socket: &Path, pod: Option<&str>) -> Self {
        Self(pod.map(|pod| admin_socket.with_file_name(format!("handed-over-{pod}"))))
    }

    /// To be called first. Where an agent of this pod has handed over, waits until nobody has the place; `false`: a signal
    /// came before that.
    pub async fn wait(&self, in_kernel: &Options, signals: &mut Signals) -> Result<bool, TurnError> {
        if !self.0.as_ref().is_some_and(|path| path.exists()) {
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
                _ = signals.recv() => {
                    self.forget();
                    return Ok(false);
                }
            }
        }
        tracing::warn!("the agent that took over is gone; this one serves again");
        self.forget();
        Ok(true)
    }

    /// Another agent has the place.
    pub fn is_over(&self) -> Result<(), TurnError> {
        let Some(path) = &self.0 else { return Ok(()) };
        fs::write(path, "").map_err(|source| TurnError::Note { path: path.clone(), source })
    }

    /// For a process whose place another has and that has nothing open any more; returns where it may end: in a pod, on a
    /// signal. Where the other agent is gone, this program starts over, in this process, with nothing of its first turn.
    pub async fn stand_by(&self, in_kernel: &Options, signals: &mut Signals) -> Result<(), TurnError> {
        if self.0.is_none() || !self.wait(in_kernel, signals).await? {
            return Ok(());
        }
        Err(TurnError::StartAnew(Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).exec()))
    }

    /// The pod goes.
    pub fn forget(&self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}
