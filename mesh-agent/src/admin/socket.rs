//! The Unix socket of the admin pages: root's only, from the moment it can be connected to.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::AdminError;
use crate::lifecycle::{KeptFile, PrivateSocket};

/// A bound socket; its file goes when this is dropped, unless another agent has put its own there since.
#[derive(Debug)]
pub struct AdminSocket(PrivateSocket);

impl AdminSocket {
    /// Takes `path`, also from an agent that was killed. One that still answers keeps it.
    pub fn bind(path: &Path) -> Result<Self, AdminError> {
        if UnixStream::connect(path).is_ok() {
            return Err(AdminError::new(
                io::ErrorKind::AddrInUse,
                format!(
                    "another agent answers on {}; stop it, or choose another socket with --admin-socket",
                    path.display()
                ),
            ));
        }
        Self::replace(path)
    }

    /// Takes `path`, also from one that answers: it will not for long.
    pub fn replace(path: &Path) -> Result<Self, AdminError> {
        PrivateSocket::bind(path).map(Self).map_err(|e| {
            let reason = match e.kind() {
                io::ErrorKind::PermissionDenied => "that needs root".to_owned(),
                _ => e.to_string(),
            };
            AdminError::new(
                e.kind(),
                format!(
                    "cannot make the admin socket {}: {reason}; choose another with --admin-socket",
                    path.display()
                ),
            )
        })
    }

    /// The socket behind `path`, which an agent before has bound.
    pub fn handed_over(path: &Path, listener: UnixListener) -> io::Result<Self> {
        PrivateSocket::handed_over(path, listener).map(Self)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn std(&self) -> &UnixListener {
        self.0.std()
    }

    /// To let the file stay when another agent serves the socket.
    pub fn kept(&self) -> KeptFile {
        self.0.kept()
    }

    pub(super) fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        self.0.listener()
    }
}
