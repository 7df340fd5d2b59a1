//! The Unix socket of the admin pages: root's only, from the moment it can be connected to.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::AdminError;

/// A bound socket; its file goes when this is dropped, unless another agent has put its own there since.
#[derive(Debug)]
pub struct AdminSocket {
    path: PathBuf,
    inode: u64,
    listener: UnixListener,
}

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
        bind_private(path).map_err(|e| {
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
        &self.path
    }

    pub(super) fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.listener.try_clone()?)
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Bound under another name, closed to others, and only then put in its place: with `bind` and `chmod` alone there is
/// a moment in which anybody may connect, and umask belongs to all threads.
fn bind_private(path: &Path) -> io::Result<AdminSocket> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.exists() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    // A file that is no socket is somebody's: not ours to replace.
    if let Ok(meta) = fs::symlink_metadata(path) {
        use std::os::unix::fs::FileTypeExt;
        if !meta.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
        }
    }
    let draft = directory.join(format!(".{}", std::process::id()));
    let _ = fs::remove_file(&draft);
    let bound = UnixListener::bind(&draft).and_then(|listener| {
        fs::set_permissions(&draft, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let inode = fs::symlink_metadata(&draft)?.ino();
        fs::rename(&draft, path)?;
        Ok(AdminSocket { path: path.to_owned(), inode, listener })
    });
    if bound.is_err() {
        let _ = fs::remove_file(&draft);
    }
    bound
}
