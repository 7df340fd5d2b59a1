//! Names, sizes, keys and values of the maps, and the counters.

#![cfg_attr(
    feature = "user",
    expect(unsafe_code, reason = "the types of the maps are plain bytes: `aya::Pod` is an unsafe trait")
)]

use crate::{Addr, Ip};

/// The layout of the pinned maps. Part of the pin path: another schema never reads these maps.
pub const SCHEMA: u32 = 1;

/// Map names: also the names of their pins.
pub mod map {
    /// netns cookie (u64) -> [`super::PodEntry`]. The one lookup of every hook.
    pub const ENROLLED: &str = "ENROLLED";
    /// pod address ([`super::Ip`]) -> pod index (u32).
    pub const POD_ADDRS: &str = "POD_ADDRS";
    /// client socket's [`crate::SockTuple`] -> the [`super::Addr`] it asked for.
    pub const ORIG_DST: &str = "ORIG_DST";
    /// [`crate::SockTuple`] (netns: 0, since the server's side cannot know the client's) -> [`super::Attested`].
    pub const ATTESTED: &str = "ATTESTED";
    /// Socket storage: [`super::SocketDst`] of a redirected socket.
    pub const SOCKET_DST: &str = "SOCKET_DST";
    /// Socket storage: present on the agent's own sockets.
    pub const OWN: &str = "OWN";
    /// Id of a cgroup whose connections from the node's own network are probes -> 1.
    pub const PROBE_CGROUPS: &str = "PROBE_CGROUPS";
    /// Socket storage: present on sockets of a probe cgroup.
    pub const PROBE_SOCK: &str = "PROBE_SOCK";
    /// pod index * 2 + slot -> listening socket in the pod's netns.
    pub const LISTENERS: &str = "LISTENERS";
    /// [`super::Event`] -> u64, per CPU.
    pub const COUNTS: &str = "COUNTS";
    /// Ring buffer of aya-log.
    pub const LOGS: &str = "AYA_LOGS";

    pub const ALL: [&str; 11] =
        [ENROLLED, POD_ADDRS, ORIG_DST, ATTESTED, SOCKET_DST, OWN, PROBE_CGROUPS, PROBE_SOCK, LISTENERS, COUNTS, LOGS];
}

/// One kubelet, and one more while it is replaced by another.
pub const PROBE_CGROUPS_ENTRIES: u32 = 16;

/// Enrolled pods of one node.
pub const ENROLLED_ENTRIES: u32 = 4096;
/// Connections between `connect` and the agent's `accept`. An entry lives for microseconds.
pub const ORIG_DST_ENTRIES: u32 = 65_536;
pub const POD_ADDRS_ENTRIES: u32 = ENROLLED_ENTRIES * 4;
/// Connections to apps that the agent or a probe has open: an entry lives as long as its client's socket.
pub const ATTESTED_ENTRIES: u32 = 131_072;

/// Which listener of a pod.
pub mod slot {
    pub const PLAIN: u32 = 0;
    pub const HBONE: u32 = 1;
    pub const PER_POD: u32 = 2;
}

/// An enrolled pod.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PodEntry {
    pub index: u32,
    pub flags: u32,
    /// Bound before redirecting; v4-mapped. Unspecified: the pod has none. All its addresses are in [`map::POD_ADDRS`].
    pub v4: Ip,
    pub v6: Ip,
}

/// What the kernel remembers of a redirected socket.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SocketDst {
    /// What the app asked for.
    pub dst: Addr,
    /// Where the socket was pointed at instead. The storage counts only while the socket's peer is this.
    pub via: Addr,
    /// The pod's address, for `getsockname` where it could not be bound.
    pub local: Ip,
}

/// A connection that goes to the app itself: the kernel saw the agent, or a probe, open it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attested {
    /// `CLOCK_MONOTONIC` at `connect`.
    pub at_nanos: u64,
    pub pod_index: u32,
    pub pad: u32,
}

/// How long `connect` may take up to its last SYN retransmission, by far: entries older than that count no more.
pub const ATTESTED_TTL_NANOS: u64 = 150_000_000_000;

const _: () = assert!(size_of::<PodEntry>() == 40 && align_of::<PodEntry>() == 4);
const _: () = assert!(size_of::<SocketDst>() == 56 && align_of::<SocketDst>() == 4);
const _: () = assert!(size_of::<Attested>() == 16 && align_of::<Attested>() == 8);

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, integers only, no implicit padding (sizes asserted above).
    unsafe impl aya::Pod for super::PodEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::SocketDst {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Attested {}
}

macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident = ($name:literal, $reason:literal),)*) => {
        /// What the programs count. The index into [`map::COUNTS`].
        #[repr(u32)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Event {
            $($(#[$doc])* $variant,)*
        }

        /// Name and reason of each event, in the order of [`Event`].
        pub const COUNTERS: &[(&str, &str)] = &[$(($name, $reason),)*];
    };
}

events! {
    RedirectedV4 = ("redirected", "v4"),
    RedirectedV6 = ("redirected", "v6"),
    /// Loopback, link-local, multicast, own address.
    LeftAlone = ("left_alone", "local"),
    /// The agent's own socket, by its tag.
    OwnSocket = ("left_alone", "agent"),
    /// A socket that was bound to a device was let loose from it.
    DeviceCleared = ("device_cleared", "bindtodevice"),
    DeniedDevice = ("denied", "bound_device"),
    /// The agent's ports on loopback or on an address of the pod itself, or the redirect range.
    DeniedAgentPort = ("denied", "agent_port"),
    /// The pod's address could not be bound.
    DeniedBind = ("denied", "bind"),
    /// No memory for the socket's storage.
    DeniedStorage = ("denied", "storage"),
    /// No room for the original destination: the agent finds none and resets.
    OrigDstFull = ("map_full", "orig_dst"),
    /// No room for the attestation: the connection is steered to the agent instead of the app.
    AttestedFull = ("map_full", "attested"),
    ProbeAttested = ("attested", "probe"),
    AgentAttested = ("attested", "agent"),
    /// By sk_lookup, to the app.
    PassedAttested = ("passed", "attested"),
    /// A pod that calls itself by its own address.
    PassedSelf = ("passed", "self"),
    SteeredPlain = ("steered", "plain"),
    SteeredHbone = ("steered", "hbone"),
    /// The agent is not there.
    DroppedNoListener = ("dropped", "no_listener"),
    /// The kernel did not take the listener, e.g. an IPv4 listener for an IPv6 connection.
    DroppedAssign = ("dropped", "assign"),
    /// Counted by the agent: an accepted connection without an original destination.
    OrigDstMissing = ("orig_dst_missing", "agent"),
}

/// Per-CPU counters that exist.
const _: () = assert!(COUNTERS.len() == Event::OrigDstMissing as usize + 1);
