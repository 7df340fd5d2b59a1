//! The Unix socket of the admin pages: root's only, from the moment it can be connected to.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::AdminError;
use crate::lifecycle::PrivateSocket;

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

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        self.0.listener()
    }
}
