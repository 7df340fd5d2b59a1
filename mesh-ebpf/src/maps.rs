//! Every map, once, and the read-only globals. No LRU: an evicted entry would open or break a connection.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{HashMap, PerCpuArray, SkStorage, SockMap};
use aya_ebpf::macros::btf_map;
use mesh_common::{
    ATTESTED_ENTRIES, Addr, Attested, COUNTERS, ENROLLED_ENTRIES, Event, Ip, ORIG_DST_ENTRIES, POD_ADDRS_ENTRIES,
    PROBE_CGROUPS_ENTRIES, PodEntry, SockTuple, SocketDst, slot,
};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// Written by the agent only.
#[btf_map]
pub static ENROLLED: HashMap<u64, PodEntry, { ENROLLED_ENTRIES as usize }, NO_PREALLOC> = HashMap::new();

/// Written by the agent only.
#[btf_map]
pub static POD_ADDRS: HashMap<Ip, u32, { POD_ADDRS_ENTRIES as usize }, NO_PREALLOC> = HashMap::new();

/// Preallocated: an insert must not fail for want of memory in the middle of a burst.
#[btf_map]
pub static ORIG_DST: HashMap<SockTuple, Addr, { ORIG_DST_ENTRIES as usize }> = HashMap::new();

#[btf_map]
pub static ATTESTED: HashMap<SockTuple, Attested, { ATTESTED_ENTRIES as usize }, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub static SOCKET_DST: SkStorage<SocketDst> = SkStorage::new();

/// Written by the agent only, through the socket's file descriptor: no process can forge it.
#[btf_map]
pub static OWN: SkStorage<u32> = SkStorage::new();

/// Written by the agent only. A map and not a global: the cgroup is another when kubelet has been restarted.
#[btf_map]
pub static PROBE_CGROUPS: HashMap<u64, u32, { PROBE_CGROUPS_ENTRIES as usize }, NO_PREALLOC> = HashMap::new();

/// Pod index of a probe's target.
#[btf_map]
pub static PROBE_SOCK: SkStorage<u32> = SkStorage::new();

#[btf_map]
pub static LISTENERS: SockMap<{ (ENROLLED_ENTRIES * slot::PER_POD) as usize }> = SockMap::new();

#[btf_map]
static COUNTS: PerCpuArray<u64, { COUNTERS.len() }> = PerCpuArray::new();

#[unsafe(no_mangle)]
pub static POD_INDEX: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static NODE_NETNS: Global<u64> = Global::new(0);

#[inline(always)]
pub fn count(event: Event) {
    if let Some(value) = COUNTS.get_ptr_mut(event as u32) {
        // SAFETY: this CPU's slot; the program does not migrate, and a nested run can at worst lose one count.
        unsafe { *value += 1 };
    }
}
