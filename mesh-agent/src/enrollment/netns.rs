//! Enter a pod's network namespace and open sockets there.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::redirect::NetnsCookie;

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    cookie: NetnsCookie,
    path: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("cannot open network namespace {path}: {source}; check the annotation nodemesh.io/netns")]
    Open { path: PathBuf, source: io::Error },
}

impl Netns {
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let _ = path;
        unimplemented!()
    }

    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `f` with the calling thread inside this namespace, and comes back; aborts the process where it can't come
    /// back. `f` must not await and must be short: sockets are opened with it on the data path.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let _ = &self.fd;
        Ok(f())
    }
}
