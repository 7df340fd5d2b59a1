//! A Unix socket that is root's only, from the moment it can be connected to.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A bound socket; its file goes when this is dropped, unless another agent has put its own there since, or serves this one.
#[derive(Debug)]
pub struct PrivateSocket {
    path: PathBuf,
    inode: u64,
    listener: UnixListener,
    kept: KeptFile,
}

/// Whether the socket's file stays, since another agent listens behind it.
#[derive(Debug, Clone, Default)]
pub struct KeptFile(Arc<AtomicBool>);

impl KeptFile {
    pub fn keep(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl PrivateSocket {
    /// Takes `path`, whoever has had it. Bound under another name, closed to others, and only then put in its place: with
    /// `bind` and `chmod` alone there is a moment in which anybody may connect, and umask belongs to all threads.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        if !directory.exists() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        // A file that is no socket is somebody's: not ours to replace.
        if let Ok(meta) = fs::symlink_metadata(path)
            && !meta.file_type().is_socket()
        {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
        }
        // Of this socket alone: two agents in containers may have the same process id.
        let draft = directory.join(format!(".{:08x}", rand::random::<u32>()));
        let bound = UnixListener::bind(&draft).and_then(|listener| {
            fs::set_permissions(&draft, Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            let inode = fs::symlink_metadata(&draft)?.ino();
            fs::rename(&draft, path)?;
            Ok(Self { path: path.to_owned(), inode, listener, kept: KeptFile::default() })
        });
        if bound.is_err() {
            let _ = fs::remove_file(&draft);
        }
        bound
    }

    /// The socket behind `path`, which an agent before has bound.
    pub fn handed_over(path: &Path, listener: UnixListener) -> io::Result<Self> {
        let inode = fs::symlink_metadata(path)?.ino();
        Ok(Self { path: path.to_owned(), inode, listener, kept: KeptFile::default() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn std(&self) -> &UnixListener {
        &self.listener
    }

    /// On a runtime.
    pub fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.listener.try_clone()?)
    }

    pub fn kept(&self) -> KeptFile {
        self.kept.clone()
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        let kept = self.kept.0.load(Ordering::Relaxed);
        if !kept && fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
