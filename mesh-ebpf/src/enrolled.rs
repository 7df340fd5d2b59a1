//! Who owns this socket: an enrolled pod, the agent itself, a probe of the node, or nobody of ours? Used by all hooks.
//!
//! Maps read: ENROLLED, OWN, POD_ADDRS. Helpers: netns cookie (5.7), ancestor cgroup id in sock_addr (5.7).

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie};
use mesh_common::{Ip, PodEntry};

use crate::context::storage;
use crate::maps::{ENROLLED, NODE_NETNS, OWN, POD_ADDRS, PROBE_CGROUPS};

/// Deeper cgroups than this are not recognised as probes: their connections go through the agent.
const CGROUP_DEPTH: i32 = 16;

/// The enrolled pod that a netns belongs to.
#[inline(always)]
pub fn pod(netns: u64) -> Option<&'static PodEntry> {
    // SAFETY: NO_PREALLOC, so an element is not reused before an RCU grace period; the program is an RCU reader.
    unsafe { ENROLLED.get(netns) }
}

/// The socket's netns, not the process's.
#[inline(always)]
pub fn netns_of(ctx: *mut bpf_sock_addr) -> u64 {
    // SAFETY: a plain helper on a valid context.
    unsafe { bpf_get_netns_cookie(ctx.cast()) }
}

/// Is it a socket of the agent's, opened in a pod's netns? The mark is not looked at: a pod with NET_RAW can set any.
#[inline(always)]
pub fn is_own(sk: *mut bpf_sock) -> bool {
    storage::<u32, _>(&OWN, sk).is_some()
}

/// Is it one of the pod's own addresses? A second lookup rather than a loop over a list in the entry: that loop makes
/// more paths than the verifier walks.
#[inline(always)]
pub fn is_address_of(pod_index: u32, ip: &Ip) -> bool {
    // SAFETY: as in `pod`.
    unsafe { POD_ADDRS.get(ip) }.is_some_and(|index| *index == pod_index)
}

/// A connection from the node's own netns, by a process of a probe cgroup (or of one below), to a pod's address: the
/// pod's index. The cgroup is asked for at `connect`, in the process that calls; sockops has no such helper on 6.1.
#[inline(always)]
pub fn probed_pod(netns: u64, ip: &Ip) -> Option<u32> {
    if netns != NODE_NETNS.load() {
        return None;
    }
    // SAFETY: as in `pod`.
    let index = unsafe { POD_ADDRS.get(ip) }?;
    for level in 0..CGROUP_DEPTH {
        // SAFETY: a plain helper.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        // SAFETY: as in `pod`.
        if unsafe { PROBE_CGROUPS.get(cgroup) }.is_some() {
            return Some(*index);
        }
    }
    None
}
