//! The user side of eBPF: load, pin, attach, and the only reader and writer of the maps.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;

/// A network namespace's cookie: unique since boot, never used again, not forgeable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsCookie(pub u64);

#[derive(Debug, Clone)]
pub struct Options {
    /// Where a bpffs is mounted; pins lie in `<bpffs>/nodemesh/<node>/v<schema>/`.
    pub bpffs: PathBuf,
    /// Set apart the pins of two agents on one machine.
    pub node: String,
    /// The cgroup2 mount; found in /proc/mounts when `None`.
    pub cgroup: Option<PathBuf>,
    /// A cgroup2 folder (kubelet's). TCP connections from its processes in the node's own netns reach pods directly.
    pub probe_cgroup: Option<PathBuf>,
    /// aya-log output of the kernel programs.
    pub kernel_log: bool,
}

/// What the kernel needs to know of an enrolled pod. Listeners are file descriptors of listening sockets in its netns.
#[derive(Debug, Clone)]
pub struct PodEntry {
    pub cookie: NetnsCookie,
    /// All addresses of the pod; the first of each family is bound before redirecting.
    pub addresses: Vec<IpAddr>,
    pub hbone_listener: RawFd,
    pub plain_listener: RawFd,
}

#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    #[error("{0}")]
    Todo(String),
}

/// The loaded and attached programs. `Send + Sync`; the methods of the path of a connection take no lock.
pub struct Redirect {}

impl Redirect {
    /// Loads, pins and attaches the programs, or takes over what an earlier agent of this node pinned.
    pub fn start(_options: &Options) -> Result<Self, RedirectError> {
        unimplemented!()
    }

    /// Takes a pod in: sk_lookup first, the ENROLLED entry last. Calling it again replaces listeners (after a restart).
    pub fn enroll(&self, _pod: &PodEntry, _netns: BorrowedFd<'_>) -> Result<(), RedirectError> {
        unimplemented!()
    }

    /// Lets a pod go, in reverse order. A pod that is not enrolled is no error.
    pub fn unenroll(&self, _cookie: NetnsCookie) -> Result<(), RedirectError> {
        unimplemented!()
    }

    /// Pods that the kernel has as enrolled, e.g. from before a restart.
    pub fn enrolled(&self) -> Result<Vec<NetnsCookie>, RedirectError> {
        unimplemented!()
    }

    /// Where the connection that the agent accepted was meant to go; takes the entry out of the map. `local` and `peer`
    /// are those of the accepted socket, v4-mapped or not. `None`: reset the connection, never guess.
    pub fn original_dst(&self, _cookie: NetnsCookie, _local: SocketAddr, _peer: SocketAddr) -> Option<SocketAddr> {
        unimplemented!()
    }

    /// Marks a socket as the agent's own, so that no hook redirects it. Before `connect`.
    pub fn tag_own(&self, _socket: BorrowedFd<'_>) -> io::Result<()> {
        unimplemented!()
    }

    /// Kernel counters, by name and reason, for metrics: e.g. ("redirected", "v4", 12).
    pub fn counters(&self) -> Result<Vec<(&'static str, &'static str, u64)>, RedirectError> {
        unimplemented!()
    }

    /// Removes every link, map and pin of this node's agent. Returns what was removed, a line each.
    pub fn cleanup(_options: &Options) -> Result<Vec<String>, RedirectError> {
        unimplemented!()
    }
}
