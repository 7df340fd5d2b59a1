//! Unix sockets that only the owner may use, from the moment they can be connected to.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A bound socket, non-blocking; its file goes when this is dropped, unless another process has put its own there since.
#[derive(Debug)]
pub struct PrivateSocket {
    path: PathBuf,
    inode: u64,
    listener: UnixListener,
}

impl PrivateSocket {
    /// Takes `path`, whoever had it before. Bound under another name, closed to others, and only then put in its place: with
    /// `bind` and `chmod` alone there is a moment in which anybody may connect, and umask belongs to all threads.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        if !directory.exists() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        // A file that is no socket is somebody's: not ours to replace.
        if fs::symlink_metadata(path).is_ok_and(|meta| !meta.file_type().is_socket()) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let draft = directory.join(format!(".{}.{name}", std::process::id()));
        let _ = fs::remove_file(&draft);
        let bound = UnixListener::bind(&draft).and_then(|listener| {
            fs::set_permissions(&draft, Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            let inode = fs::symlink_metadata(&draft)?.ino();
            fs::rename(&draft, path)?;
            Ok(Self { path: path.to_owned(), inode, listener })
        });
        if bound.is_err() {
            let _ = fs::remove_file(&draft);
        }
        bound
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// To be called on a runtime.
    pub fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.listener.try_clone()?)
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
