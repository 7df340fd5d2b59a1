//! Enter a pod's network namespace: open sockets there, and prepare it so that the application sees its clients.
#![expect(unsafe_code, reason = "getsockopt(SO_NETNS_COOKIE), which no library has")]

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Protocol, Socket, Type};

use super::sockets::{self, Use};
use crate::redirect::NetnsCookie;

/// The namespace that this process was started in; every thread of ours is at home there.
static HOME: OnceLock<OwnedFd> = OnceLock::new();

/// The node's /proc, whose sysctls can be written; a container's own is read-only.
static HOST_PROC: OnceLock<PathBuf> = OnceLock::new();

/// Sysctls are written below `proc`, from now on; to be called once, before any pod is enrolled.
pub fn see_host_proc(proc: &Path) {
    // A second call finds what the first has said.
    let _ = HOST_PROC.set(proc.into());
}

/// Where sysctls are written.
pub(super) fn host_proc() -> &'static Path {
    HOST_PROC.get().map_or(Path::new("/proc"), PathBuf::as_path)
}

/// Device and inode of a network namespace: a path may come to name another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetnsId(u64, u64);

impl NetnsId {
    /// Of the one that `path` names.
    pub fn of(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path).map(|m| Self(m.dev(), m.ino()))
    }
}

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    cookie: NetnsCookie,
    path: PathBuf,
    id: NetnsId,
}

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("cannot open network namespace {path}: {source}; is it the pod's?")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is no network namespace; is it the pod's?")]
    NotANetns { path: PathBuf },
    #[error("{path} is the node's own network namespace; a hostNetwork pod cannot be in the mesh")]
    HostNetwork { path: PathBuf },
    #[error("cannot enter network namespace {path}: {source}; the agent needs CAP_SYS_ADMIN")]
    Enter { path: PathBuf, source: io::Error },
    #[error("cannot listen on port {port} inside {path}: {source}; does the application use that port itself?")]
    Listen { path: PathBuf, port: u16, source: io::Error },
}

/// Brings the thread back, also when the closure panics.
struct Return;

impl Drop for Return {
    fn drop(&mut self) {
        let home = HOME.get().expect("a thread that left home knows the way");
        if move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network)).is_err() {
            // In a foreign namespace the next socket would be opened for the wrong pod.
            std::process::abort();
        }
    }
}

impl Netns {
    /// Opens the namespace that `path` names, such as `/run/netns/pod-a`.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let file = File::open(path).map_err(|source| NetnsError::Open { path: path.to_owned(), source })?;
        Self::of(file, path)
    }

    /// The namespace that `file` is, which another agent had opened by the name of `path`.
    pub fn of(file: File, path: &Path) -> Result<Self, NetnsError> {
        let open = |source| NetnsError::Open { path: path.to_owned(), source };
        home().map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        let id = NetnsId(metadata.dev(), metadata.ino());
        let mut netns = Self { fd: file.into(), cookie: NetnsCookie(0), path: path.to_owned(), id };
        let socket = netns.run(|| Socket::new(Domain::UNIX, Type::DGRAM, None)).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::EINVAL) => NetnsError::NotANetns { path: path.to_owned() },
                _ => NetnsError::Enter { path: path.to_owned(), source },
            }
        })?;
        netns.cookie = socket.and_then(|s| cookie_of(s.as_fd())).map_err(open)?;
        let own = Socket::new(Domain::UNIX, Type::DGRAM, None).and_then(|s| cookie_of(s.as_fd())).map_err(open)?;
        if netns.cookie == own {
            return Err(NetnsError::HostNetwork { path: path.to_owned() });
        }
        Ok(netns)
    }

    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    pub fn id(&self) -> NetnsId {
        self.id
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the path still names this namespace.
    pub fn is_there(&self) -> bool {
        NetnsId::of(&self.path).is_ok_and(|id| id == self.id)
    }

    /// Runs `f` with the calling thread inside this namespace, and comes back; aborts the process where it can't come
    /// back. `f` must be short: sockets are opened with it on the data path.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        home()?;
        move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))?;
        let _return = Return;
        Ok(f())
    }

    /// Listens on `port` of all addresses, both families where the pod has IPv6.
    pub fn listen(&self, port: u16) -> Result<TcpListener, NetnsError> {
        let enter = |source| NetnsError::Enter { path: self.path.clone(), source };
        let error = |source| NetnsError::Listen { path: self.path.clone(), port, source };
        self.run(|| listen(port)).map_err(enter)?.map_err(error)
    }
}

fn home() -> io::Result<()> {
    if HOME.get().is_none() {
        let file = File::open("/proc/self/ns/net")?;
        // Another thread may have been first; both hold the same.
        let _ = HOME.set(file.into());
    }
    Ok(())
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let v6 = Socket::new(Domain::IPV6, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
        .and_then(|s| s.set_only_v6(false).map(|()| s));
    let (socket, any): (Socket, SocketAddr) = match v6 {
        Ok(socket) => (socket, (Ipv6Addr::UNSPECIFIED, port).into()),
        // A kernel or pod without IPv6.
        Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let kind = Type::STREAM.nonblocking().cloexec();
            (Socket::new(Domain::IPV4, kind, Some(Protocol::TCP))?, (Ipv4Addr::UNSPECIFIED, port).into())
        }
        Err(e) => return Err(e),
    };
    // After a restart, connections of the agent before may linger on the port.
    socket.set_reuse_address(true)?;
    let what_for = match port {
        mesh_common::OUTBOUND_PORT => Use::Local,
        mesh_common::HBONE_PORT => Use::Tunnel,
        _ => Use::Plain,
    };
    sockets::prepare(&socket, what_for)?;
    socket.bind(&any.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

fn cookie_of(socket: BorrowedFd<'_>) -> io::Result<NetnsCookie> {
    /// asm-generic/socket.h, since Linux 5.14.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open; value and length point to live variables of the sizes that are said.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut len)
    };
    if result == 0 { Ok(NetnsCookie(cookie)) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_is_refused_by_name() {
        let missing = Netns::open(Path::new("/no/such/netns")).unwrap_err().to_string();
        assert!(missing.starts_with("cannot open network namespace /no/such/netns: "), "{missing}");
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Netns::open(file.path()).unwrap_err();
        assert!(matches!(error, NetnsError::NotANetns { .. }), "{error}");
    }

    #[test]
    fn the_nodes_own_namespace_is_no_pods() {
        let error = Netns::open(Path::new("/proc/self/ns/net")).unwrap_err();
        assert!(matches!(error, NetnsError::HostNetwork { .. } | NetnsError::Enter { .. }), "{error}");
    }
}
