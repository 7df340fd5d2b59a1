//! The user side of eBPF: load, pin, attach, and the only reader and writer of the maps.
//!
//! In: pods to enrol, accepted sockets. Out: connections of those pods at the agent's listeners, and where each was
//! meant to go. What is pinned stays in force when the agent dies: enrolled pods are then refused, never let through.

mod attach;
mod enroll;
mod error;
mod host;
mod load;
mod log;
mod maps;
mod original_dst;
mod pins;
mod probe;
mod sys;

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use mesh_common::{ATTESTED_TTL_NANOS, COUNTERS, Event, ORIG_DST_ENTRIES, program};

pub use error::RedirectError;
pub use host::kubelet_cgroup;
pub use load::read_kernel_types;
pub use mesh_common::{HBONE_PORT, MESH_V6_PREFIX_LEN, OUTBOUND_PORT, PLAIN_PORT, SCHEMA};
pub use probe::{ForeignProgram, KernelFacts, look};

use enroll::Pods;
use host::Cgroup;
use load::{Globals, Loader};
use log::KernelLog;
use maps::Maps;
use pins::Pins;

/// A network namespace's cookie: unique since boot, never used again, not forgeable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsCookie(pub u64);

#[derive(Debug, Clone)]
pub struct Options {
    /// Where a bpffs is mounted; pins lie in `<bpffs>/nodemesh/<node>/v<schema>/`. Mounted here if there is none.
    pub bpffs: PathBuf,
    /// Set apart the pins of two agents on one machine.
    pub node: String,
    /// The cgroup2 mount; found in /proc/mounts when `None`.
    pub cgroup: Option<PathBuf>,
    /// A cgroup2 folder (kubelet's). TCP connections from its processes in the node's own netns reach pods directly.
    pub probe_cgroup: Option<PathBuf>,
    /// aya-log output of the kernel programs.
    pub kernel_log: bool,
    /// Room for connections between `connect` and `accept`; pinned maps keep the size that they have.
    pub original_dst_entries: u32,
}

impl Options {
    /// What suits most machines.
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            bpffs: "/sys/fs/bpf".into(),
            node: node.into(),
            cgroup: None,
            probe_cgroup: None,
            kernel_log: false,
            original_dst_entries: ORIG_DST_ENTRIES,
        }
    }
}

/// What the kernel needs to know of an enrolled pod. Listeners are file descriptors of listening sockets in its netns,
/// dual-stack (`[::]`, not v6-only): a v4 listener would not take v6 connections.
#[derive(Debug, Clone)]
pub struct PodEntry {
    pub cookie: NetnsCookie,
    /// All addresses of the pod; the first of each family is bound before redirecting.
    pub addresses: Vec<IpAddr>,
    pub hbone_listener: RawFd,
    pub plain_listener: RawFd,
}

/// The prefix that enrolment makes local to a pod (`ip -6 route add local <prefix> dev lo`), so that native IPv6
/// connections can be spread over it: IPv6 loopback is a single address.
pub fn v6_redirect_prefix() -> (std::net::Ipv6Addr, u8) {
    let [high, low] = mesh_common::MESH_V6_PREFIX;
    let IpAddr::V6(prefix) = IpAddr::from(mesh_common::Ip([high, low, 0, 0])) else {
        unreachable!("the prefix is not v4-mapped");
    };
    (prefix, MESH_V6_PREFIX_LEN)
}

/// The loaded and attached programs. `Send + Sync`; the methods of the path of a connection take no lock.
#[derive(Debug)]
pub struct Redirect {
    node_netns: NetnsCookie,
    pins: Pins,
    maps: Maps,
    /// Held while a pod joins or leaves.
    pods: Mutex<(Pods, Loader)>,
    orig_dst_missing: AtomicU64,
    _log: Option<KernelLog>,
}

/// Held by an agent for life. A second agent of the same node would take its pods over, and a clean-up would let them
/// speak in plaintext.
#[derive(Debug)]
pub struct NodeLock {
    pins: Pins,
    folder: File,
}

/// The lock of this process; see [`NodeLock::for_life`].
static HELD: Mutex<Vec<NodeLock>> = Mutex::new(Vec::new());

impl NodeLock {
    /// The lock as the agent before has handed it over.
    pub fn handed_over(options: &Options, folder: OwnedFd) -> Result<Self, RedirectError> {
        let pins = Pins::new(options, 0)?;
        match pins.take_lock(folder.into())? {
            Some(folder) => Ok(Self { pins, folder }),
            None => Err(RedirectError::NotTheLock { node: options.node.clone() }),
        }
    }

    /// Keeps the lock until the process ends, and not only its main function: tasks may go on for a moment.
    pub fn for_life(self) {
        HELD.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// The lock that was taken for life, for another agent: a lock belongs to what was opened, not to who opened it.
    pub fn of_this_process() -> io::Result<Option<OwnedFd>> {
        let held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        held.first().map(|lock| lock.folder.try_clone().map(OwnedFd::from)).transpose()
    }

    /// Lets go of the lock that was taken for life: who has got a descriptor of it has it alone.
    pub fn give_up() {
        HELD.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for NodeLock {
    fn drop(&mut self) {
        // Goes only where nothing was pinned in it.
        self.pins.remove_empty(&self.folder);
    }
}

/// Programs that are attached, beside those of an agent that still runs.
#[derive(Debug)]
pub struct Prepared {
    node_netns: NetnsCookie,
    pins: Pins,
    maps: Maps,
    loader: Loader,
    log: Option<KernelLog>,
}

impl Prepared {
    fn bring_up(options: &Options, globals: Globals, pins: Pins, cgroup: &Cgroup) -> Result<Self, RedirectError> {
        pins.create_folders()?;
        // Always: it makes the maps that are missing. Programs are loaded only where their link is.
        let mut loader = Loader::new(options, &pins, &globals);
        let mut object = loader.prepare(0)?;
        let log = if globals.kernel_log { KernelLog::start(&mut object) } else { None };
        for name in program::CGROUP {
            let pin = pins.program(name);
            if attach::is_pinned(&pin) {
                tracing::debug!(program = name, "taken over");
            } else {
                attach::to_cgroup(&mut object, name, cgroup, &pin)?;
            }
        }
        if !cgroup.holds_this_process() {
            return Err(RedirectError::NotInCgroup { path: cgroup.path.clone() });
        }
        let maps = Maps::open(&pins)?;
        Ok(Self { node_netns: NetnsCookie(globals.node_netns), pins, maps, loader, log })
    }

    /// From now on these programs serve alone, and this process writes the maps.
    pub fn begin(self) -> Result<Redirect, RedirectError> {
        let Self { node_netns, pins, maps, loader, log } = self;
        // Only now: enrolled pods were redirected by the older programs up to here. Both together do no harm.
        remove_others(&pins)?;
        let pods = Mutex::new((enroll::restore(&maps)?, loader));
        Ok(Redirect { node_netns, pins, maps, pods, orig_dst_missing: AtomicU64::new(0), _log: log })
    }
}

/// Removes the links of other objects than this one's.
fn remove_others(pins: &Pins) -> Result<(), RedirectError> {
    for folder in pins.older_programs()? {
        pins::remove_links(&folder)?;
    }
    Ok(())
}

impl Redirect {
    /// Makes this process the only one that may start, or clean up, for the node; to be called before either. Until the
    /// lock is dropped or the process ends.
    pub fn lock(options: &Options) -> Result<NodeLock, RedirectError> {
        host::check_capabilities()?;
        let pins = Pins::new(options, 0)?;
        host::ensure_bpffs(&options.bpffs)?;
        match pins.lock()? {
            Some(folder) => Ok(NodeLock { pins, folder }),
            None => Err(RedirectError::Running { node: options.node.clone() }),
        }
    }

    /// Loads, pins and attaches the programs, or takes over what an earlier agent of this node pinned. To be called in
    /// the node's own network namespace.
    pub fn start(options: &Options) -> Result<Self, RedirectError> {
        let redirect = Self::prepare(options)?.begin()?;
        redirect.let_probe(options.probe_cgroup.as_deref())?;
        Ok(redirect)
    }

    /// The first half of `start`, which another agent of this node may still be running by: its programs and what is in the
    /// maps stay as they are.
    pub fn prepare(options: &Options) -> Result<Prepared, RedirectError> {
        host::check_capabilities()?;
        let cgroup = Cgroup::for_programs(options.cgroup.as_deref())?;
        let node_netns = sys::current_netns_cookie().map_err(|source| RedirectError::NetnsCookie { source })?;
        let globals = Globals { node_netns, kernel_log: options.kernel_log };
        let pins = Pins::new(options, load::fingerprint(&globals, cgroup.id))?;
        host::ensure_bpffs(&options.bpffs)?;
        let is_first = !pins.exist()?;
        Prepared::bring_up(options, globals, pins.clone(), &cgroup).inspect_err(|_| {
            // Half of a first start is of no use to anybody; a later one leaves in force what was.
            if is_first && let Err(error) = pins.remove_all() {
                tracing::warn!(%error, "pins of the failed start stay behind");
            }
        })
    }

    /// Takes away programs of other agents: one that was to take this one's place has not come about.
    pub fn stay(&self) -> Result<(), RedirectError> {
        remove_others(&self.pins)
    }

    /// From now on the processes in this cgroup, and in none else, may probe pods; to be called again when the folder may
    /// be another under the same name, as after a restart of kubelet. Changes nothing where it is the same.
    pub fn let_probe(&self, cgroup: Option<&Path>) -> Result<(), RedirectError> {
        let wanted = cgroup.map(Cgroup::open).transpose()?.map(|cgroup| cgroup.id);
        let known = self.maps.probe_cgroups.keys()?;
        for id in wanted.iter().filter(|id| !known.contains(id)) {
            self.maps.probe_cgroups.set(id, &1)?;
        }
        for id in known.iter().filter(|id| wanted != Some(**id)) {
            self.maps.probe_cgroups.remove(id)?;
        }
        Ok(())
    }

    /// Takes a pod in: sk_lookup first, the ENROLLED entry last. Calling it again replaces listeners (after a restart).
    pub fn enroll(&self, pod: &PodEntry, netns: BorrowedFd<'_>) -> Result<(), RedirectError> {
        enroll::join(self, pod, netns)
    }

    /// Lets a pod go, in reverse order. A pod that is not enrolled is no error.
    pub fn unenroll(&self, cookie: NetnsCookie) -> Result<(), RedirectError> {
        enroll::leave(self, cookie)
    }

    /// Pods that the kernel has as enrolled, e.g. from before a restart; also those whose enrolment did not come to its
    /// end, which are closed and wait for [`Self::enroll`] or [`Self::unenroll`].
    pub fn enrolled(&self) -> Result<Vec<NetnsCookie>, RedirectError> {
        let mut pods: Vec<_> = self.maps.enrolled.keys()?.into_iter().map(NetnsCookie).collect();
        pods.extend(self.pins.pod_pins()?.into_iter().map(|pin| pin.cookie));
        pods.sort_unstable();
        pods.dedup();
        Ok(pods)
    }

    /// Where the connection that the agent accepted was meant to go; takes the entry out of the map. `local` and `peer`
    /// are those of the accepted socket, v4-mapped or not. `None`: reset the connection, never guess.
    pub fn original_dst(&self, cookie: NetnsCookie, local: SocketAddr, peer: SocketAddr) -> Option<SocketAddr> {
        let found = original_dst::take(&self.maps.orig_dst, cookie, local, peer);
        if found.is_none() {
            self.orig_dst_missing.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    /// Marks a socket as the agent's own, so that no hook redirects it. Before `connect`.
    pub fn tag_own(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.maps.tag_own(socket)
    }

    /// Kernel counters, by name and reason, for metrics: e.g. ("redirected", "v4", 12).
    pub fn counters(&self) -> Result<Vec<(&'static str, &'static str, u64)>, RedirectError> {
        let mut counters = Vec::with_capacity(COUNTERS.len());
        for (index, (name, reason)) in COUNTERS.iter().enumerate() {
            let mut value = self.maps.count(index as u32)?;
            if index == Event::OrigDstMissing as usize {
                value += self.orig_dst_missing.load(Ordering::Relaxed);
            }
            counters.push((*name, *reason, value));
        }
        Ok(counters)
    }

    /// Takes out attested connections that are older than any `connect` lasts: their SYN is through, or never will be.
    /// A second net under sockops, which takes each out when its socket closes; once a minute is enough. Returns how many.
    pub fn sweep(&self) -> Result<usize, RedirectError> {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        let mut swept = 0;
        for key in self.maps.attested.keys()? {
            let is_old = |value: mesh_common::Attested| now.saturating_sub(value.at_nanos) > ATTESTED_TTL_NANOS;
            let old = self.maps.attested.get(&key)?.is_some_and(is_old);
            swept += usize::from(old && self.maps.attested.remove(&key)?);
        }
        Ok(swept)
    }

    /// Whether a bpffs is mounted there.
    pub fn is_bpffs(path: &Path) -> bool {
        host::is_bpffs(path)
    }

    /// Removes every link, map and pin of this node's agent. Returns what was removed, a line each.
    pub fn cleanup(options: &Options) -> Result<Vec<String>, RedirectError> {
        Self::cleanup_with(options, |_| ())
    }

    /// The same; the pods that were enrolled come to `pods`, for what else must be undone in them.
    pub fn cleanup_with(options: &Options, pods: impl FnOnce(&[NetnsCookie])) -> Result<Vec<String>, RedirectError> {
        let pins = Pins::new(options, 0)?;
        if !host::is_bpffs(&options.bpffs) {
            return Ok(Vec::new());
        }
        host::check_capabilities()?;
        if !pins.are_there() {
            return Ok(Vec::new());
        }
        // Under a running agent it would open a hole: its pods' traffic would go on past the mesh, in plaintext.
        let _lock = Self::lock(options)?;
        // A pod that is enrolled and no longer redirected speaks in plaintext: that is what removing the mesh means. Entries
        // go first, so that no connection is caught between two links.
        if let Ok(maps) = Maps::open(&pins) {
            let enrolled = maps.enrolled.keys()?;
            for cookie in &enrolled {
                maps.enrolled.remove(cookie)?;
            }
            pods(&enrolled.into_iter().map(NetnsCookie).collect::<Vec<_>>());
        }
        pins.remove_all()
    }
}
