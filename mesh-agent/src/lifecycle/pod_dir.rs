//! What an agent in a pod of Kubernetes notes for kubelet, and for its own next container: a folder that lives as long as
//! the pod (an emptyDir). Two agents of a node share its ports and sockets, but not this.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDir(PathBuf);

/// There while this agent, and not another of the node, is ready.
const READY: &str = "ready";
/// There once another agent has taken over from this pod's.
const HANDED_OVER: &str = "handed-over";

impl PodDir {
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    pub fn is_ready(&self) -> bool {
        self.0.join(READY).exists()
    }

    pub fn set_ready(&self, ready: bool) -> io::Result<()> {
        self.set(READY, ready)
    }

    /// Whether this pod's agent has had its turn: another container of the pod must not take the place back.
    pub fn is_handed_over(&self) -> bool {
        self.0.join(HANDED_OVER).exists()
    }

    pub fn set_handed_over(&self, handed: bool) -> io::Result<()> {
        self.set(HANDED_OVER, handed)
    }

    fn set(&self, name: &str, there: bool) -> io::Result<()> {
        let path = self.0.join(name);
        let done = if there { fs::write(&path, "") } else { fs::remove_file(&path) };
        match done {
            Err(e) if there || e.kind() != io::ErrorKind::NotFound => {
                Err(io::Error::new(e.kind(), format!("cannot note it at {}: {e}; see --pod-dir", path.display())))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let pod = PodDir::new(dir.path());
        assert!(!pod.is_ready() && !pod.is_handed_over());
        pod.set_ready(false).unwrap();
        pod.set_ready(true).unwrap();
        pod.set_handed_over(true).unwrap();
        assert!(pod.is_ready() && pod.is_handed_over());
        pod.set_ready(false).unwrap();
        assert!(!pod.is_ready() && pod.is_handed_over());
        let error = PodDir::new(Path::new("/nonexistent")).set_ready(true).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ready"), "{error}");
    }
}
