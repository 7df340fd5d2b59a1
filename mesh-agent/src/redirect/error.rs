//! What can go wrong with the kernel side, one sentence each: the object, and the next step.

use std::io;
use std::path::PathBuf;

use super::NetnsCookie;

#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    #[error(
        "no cgroup2 hierarchy is mounted (none in /proc/mounts); mount one: mount -t cgroup2 none /sys/fs/cgroup/unified"
    )]
    NoCgroup2,
    #[error("{path} is not in a cgroup2 hierarchy; name a folder below the cgroup2 mount, which is in /proc/mounts")]
    NotCgroup2 { path: PathBuf },
    #[error(
        "the agent is not in the cgroup {path}, so the kernel could not tell its connections from those of pods; name a cgroup that holds the agent and the pods, or none for the root"
    )]
    NotInCgroup { path: PathBuf },
    #[error(
        "the cgroup2 mount {path} is not the root of the hierarchy, so pods may be outside it; run the agent in the host's cgroup namespace, or name a cgroup that holds it and the pods with --cgroup"
    )]
    NotTheRoot { path: PathBuf },
    #[error("cannot open cgroup {path}: {source}; check the path in the settings")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error(
        "{path} belongs to user {owner}, who could then stop the agent; remove it, or name another bpffs with --bpffs"
    )]
    ForeignFolder { path: PathBuf, owner: u32 },
    #[error("no bpffs at {path} and it cannot be mounted: {source}; run: mount -t bpf bpf {path}")]
    Bpffs { path: PathBuf, source: io::Error },
    #[error(
        "{path} is a folder with other files and no bpffs; name an empty one, or where a bpffs is mounted (see /proc/mounts)"
    )]
    NotBpffs { path: PathBuf },
    #[error("an agent for node {node} is running already; stop it first, or give this one another --node-name")]
    Running { node: String },
    #[error("what the agent before has handed over is not the lock of node {node}; stop it, then start this one")]
    NotTheLock { node: String },
    #[error("the node name {node:?} is no folder name; use letters, digits, '-' and '_'")]
    NodeName { node: String },
    #[error(
        "the capability {missing} is missing, which eBPF needs; run the agent as root or grant it (CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN)"
    )]
    Capability { missing: &'static str },
    #[error(
        "the kernel {kernel} refuses the program {program}: {reason}; Nodemesh needs Linux 6.1 or later with CONFIG_CGROUP_BPF and CONFIG_BPF_JIT"
    )]
    Load { program: String, kernel: String, reason: String },
    #[error(
        "the embedded kernel programs cannot be prepared: {reason}; Nodemesh needs Linux 6.1 or later with CONFIG_DEBUG_INFO_BTF and CONFIG_NET_SOCK_MSG"
    )]
    Object { reason: String },
    #[error(
        "cannot attach {program} at {cgroup}: the program {foreign} holds it exclusively; stop its owner, or let it attach with BPF_F_ALLOW_MULTI"
    )]
    ForeignExclusive { program: &'static str, cgroup: PathBuf, foreign: String },
    #[error("cannot attach {program} at {target}: {source}; see `dmesg` and `bpftool cgroup tree`")]
    Attach { program: &'static str, target: String, source: io::Error },
    #[error(
        "cannot use the pin {path}: {source}; `mesh-agent node --cleanup` removes what is left of an earlier agent"
    )]
    Pin { path: PathBuf, source: io::Error },
    #[error("cannot {action} the map {map}: {source}; see the agent's log for what came before")]
    Map { map: &'static str, action: &'static str, source: io::Error },
    #[error("pod with netns cookie {} is in the node's own network namespace (hostNetwork); it cannot be enrolled: take the label away", cookie.0)]
    HostNetwork { cookie: NetnsCookie },
    #[error("{limit} pods are enrolled on this node, which is the most; move pods to another node")]
    TooManyPods { limit: u32 },
    #[error("cannot read this network namespace's cookie: {source}; Nodemesh needs Linux 5.14 or later")]
    NetnsCookie { source: io::Error },
}
