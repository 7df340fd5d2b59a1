//! Where the network namespace of a pod is. In standalone mode its manifest says so; in Kubernetes the CNI plugin has told,
//! or a process of the pod leads there.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, io};

use tokio::sync::watch;

use super::netns::NetnsId;
use crate::model::{NodePods, Workload};

/// Where network namespaces are mounted by name: paths there outlive any process of the pod.
const NAMED: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// How network namespaces of pods are found.
#[derive(Debug)]
pub enum Places {
    /// The manifest of each pod names it.
    Manifests,
    /// By the processes of this node.
    Processes(Processes),
}

/// The processes of this node, seen through its /proc.
#[derive(Debug)]
pub struct Processes {
    proc: PathBuf,
    /// What the CNI plugin has told, by the pod's uid.
    told: Mutex<HashMap<Arc<str>, (PathBuf, NetnsId)>>,
    /// Knows which of them are static.
    pods: watch::Receiver<Arc<NodePods>>,
}

#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("its manifest names no network namespace; write the annotation nodemesh.io/netns")]
    NotNamed,
    #[error("no process of the pod is found in {}; is that the node's /proc?", .0.display())]
    NoProcess(PathBuf),
    #[error("the processes in {} cannot be read: {source}; mount the node's /proc there", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
}

impl Places {
    /// Whether `workload` may have a network namespace that can be found.
    pub fn may_know(&self, workload: &Workload) -> bool {
        match self {
            Self::Manifests => workload.netns.is_some(),
            Self::Processes(_) => true,
        }
    }

    /// The CNI plugin has been given this network namespace for the pod `uid`; it is the one that counts from now on.
    pub fn tell(&self, uid: &str, path: &Path) -> io::Result<NetnsId> {
        match self {
            Self::Manifests => NetnsId::of(path),
            Self::Processes(processes) => processes.tell(uid, path),
        }
    }

    /// The network namespace `id` of the pod `uid` is gone. Another that was told since stays.
    pub fn forget(&self, uid: &str, id: NetnsId) {
        if let Self::Processes(processes) = self {
            processes.forget(uid, id);
        }
    }

    /// Whether the pod `uid` was told to be in another network namespace than `id`.
    pub fn has_moved(&self, uid: &str, id: NetnsId) -> bool {
        match self {
            Self::Manifests => false,
            Self::Processes(processes) => processes.lock().get(uid).is_some_and(|(_, now)| *now != id),
        }
    }

    /// The path of the workload's network namespace. Reads files: not for a thread that must not wait.
    pub fn find(&self, workload: &Workload) -> Result<PathBuf, FindError> {
        match self {
            Self::Manifests => workload.netns.as_deref().map(PathBuf::from).ok_or(FindError::NotNamed),
            Self::Processes(processes) => processes.find(&workload.uid),
        }
    }
}

impl Processes {
    /// `proc` is where the node's /proc is mounted.
    pub fn new(proc: &Path, pods: watch::Receiver<Arc<NodePods>>) -> Self {
        Self { proc: proc.into(), told: Mutex::default(), pods }
    }

    fn tell(&self, uid: &str, path: &Path) -> io::Result<NetnsId> {
        let path = self.seen_from_here(path);
        let id = NetnsId::of(&path)?;
        self.lock().insert(uid.into(), (path, id));
        Ok(id)
    }

    fn forget(&self, uid: &str, id: NetnsId) {
        let mut told = self.lock();
        if told.get(uid).is_some_and(|(_, now)| *now == id) {
            told.remove(uid);
        }
    }

    /// The node's path: in the agent's image /var/run may be no link, and /proc is the container's own.
    fn seen_from_here(&self, path: &Path) -> PathBuf {
        if let Ok(rest) = path.strip_prefix("/proc") {
            return self.proc.join(rest);
        }
        path.strip_prefix("/var/run").map_or_else(|_| path.to_owned(), |rest| Path::new("/run").join(rest))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Arc<str>, (PathBuf, NetnsId)>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, uid: &str) -> Result<PathBuf, FindError> {
        let told = self.lock().get(uid).cloned();
        // A path may have come to name another one.
        if let Some((path, _)) = told.filter(|(path, id)| NetnsId::of(path).is_ok_and(|now| now == *id)) {
            return Ok(path);
        }
        let static_uid = self.pods.borrow().pods.get(uid).and_then(|pod| pod.static_uid.clone());
        let uid = static_uid.as_deref().unwrap_or(uid);
        let process = self.oldest(uid)?.ok_or_else(|| FindError::NoProcess(self.proc.clone()))?;
        let netns = process.join("ns/net");
        Ok(named_like(&netns).unwrap_or(netns))
    }

    /// The process of the pod that is there for longest: the one that holds its namespaces, where the runtime has one.
    fn oldest(&self, uid: &str) -> Result<Option<PathBuf>, FindError> {
        let entries =
            fs::read_dir(&self.proc).map_err(|source| FindError::Unreadable { path: self.proc.clone(), source })?;
        let processes = entries.flatten().filter_map(|entry| {
            entry.file_name().to_str()?.parse::<u32>().ok()?;
            let path = entry.path();
            // One that has ended meanwhile has no file.
            let cgroups = fs::read_to_string(path.join("cgroup")).ok()?;
            is_of(&cgroups, uid).then(|| Some((started(&fs::read_to_string(path.join("stat")).ok()?)?, path))).flatten()
        });
        Ok(processes.min().map(|(_, path)| path))
    }
}

/// Folders that kubelet makes between `kubepods` and those of pods.
const CLASSES: [&str; 2] = ["burstable", "besteffort"];

/// Whether a process whose /proc/PID/cgroup this is belongs to the pod. Kubelet's folders are called `pod<uid>`, where
/// systemd makes them `kubepods-...-pod<uid with underscores>.slice`.
/// The outermost folder counts: what is below it is the pod's own to name. Where cgroup2 is all there is, each container has a
/// cgroup namespace of its own, and paths are told from the agent's folder on: what two pods have in common is `..`.
fn is_of(cgroups: &str, uid: &str) -> bool {
    let (plain, slice) = (format!("pod{uid}"), format!("-pod{}.slice", uid.replace('-', "_")));
    let pod_of = |path: &str| {
        let below = path.trim_start_matches("/..");
        let first = below.trim_start_matches('/').split('/').next().unwrap_or_default();
        let among_pods = below.len() < path.len() && (first.starts_with("pod") || CLASSES.contains(&first));
        let mut parts = below.split('/').skip_while(|part| !among_pods && !part.contains("kubepods"));
        parts
            .find(|part| part.starts_with("pod") || part.contains("kubepods-") && part.contains("-pod"))
            .map(str::to_owned)
    };
    let mut paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).filter_map(pod_of);
    !uid.is_empty() && paths.any(|part| part == plain || part.ends_with(&slice))
}

/// Field 22 of /proc/PID/stat; the name in field 2 may hold anything, also blanks and brackets.
fn started(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The named mount of the namespace that `netns` leads to.
fn named_like(netns: &Path) -> Option<PathBuf> {
    let wanted = fs::metadata(netns).ok()?;
    let entries = NAMED.iter().flat_map(|folder| fs::read_dir(folder).into_iter().flatten().flatten());
    entries
        .map(|entry| entry.path())
        .find(|path| fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (wanted.dev(), wanted.ino())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodePod;

    const UID: &str = "3c1b8a52-1f0e-4a0d-9d3e-6d1f0c0a7b11";

    fn process(proc: &Path, pid: u32, cgroup: &str, started: u64) {
        let folder = proc.join(pid.to_string());
        fs::create_dir_all(folder.join("ns")).unwrap();
        fs::write(folder.join("ns/net"), "").unwrap();
        fs::write(folder.join("cgroup"), cgroup).unwrap();
        fs::write(folder.join("stat"), format!("{pid} (a ) b) S {}{started} 0", "0 ".repeat(18))).unwrap();
    }

    #[test]
    fn a_pod_is_found_by_its_oldest_process() {
        let proc = tempfile::tempdir().unwrap();
        let systemd = format!("0::/kubepods.slice/kubepods-pod{}.slice/cri-x.scope\n", UID.replace('-', "_"));
        process(proc.path(), 50, &format!("12:cpu:/kubepods/besteffort/pod{UID}/abc\n0::/x\n"), 900);
        process(proc.path(), 70, &systemd, 800);
        process(proc.path(), 3, "0::/init.scope\n", 1);
        let processes = Processes::new(proc.path(), watch::channel(Arc::default()).1);
        assert_eq!(processes.find(UID).unwrap(), proc.path().join("70/ns/net"));
        assert!(matches!(processes.find("other"), Err(FindError::NoProcess(_))));
        assert!(matches!(processes.find(""), Err(FindError::NoProcess(_))), "an empty uid is nobody's");
    }

    #[test]
    fn a_pod_is_found_wherever_the_agent_looks_from() {
        let slice = format!("kubepods-burstable-pod{}.slice", UID.replace('-', "_"));
        let its = [
            format!("/kubepods/burstable/pod{UID}/c"),
            format!("/n1/kubepods/pod{UID}/c"),
            format!("/kubepods.slice/kubepods-burstable.slice/{slice}/cri-c.scope"),
            // From another container, as cgroup2 alone shows it.
            format!("/../../pod{UID}/c"),
            format!("/../../../besteffort/pod{UID}/c"),
            format!("/../../../pod{UID}/c"),
            format!("/../../{slice}/cri-c.scope"),
            format!("/../../../kubepods-besteffort.slice/{slice}/cri-c.scope"),
        ];
        for path in its {
            assert!(is_of(&format!("0::{path}\n"), UID), "{path}");
        }
        let others = [
            format!("/pod{UID}"),
            format!("/../../podother/c/pod{UID}"),
            format!("/../../../burstable/podother/kubepods/pod{UID}"),
            format!("/../../../../system.slice/x/pod{UID}"),
            format!("/../../system.slice/burstable/pod{UID}"),
        ];
        for path in others {
            assert!(!is_of(&format!("0::{path}\n"), UID), "{path}");
        }
    }

    #[test]
    fn a_static_pod_is_found_by_the_uid_that_the_kubelet_gives_it() {
        const HASH: &str = "0123456789abcdef0123456789abcdef";
        let proc = tempfile::tempdir().unwrap();
        process(proc.path(), 50, &format!("0::/kubepods/pod{HASH}/abc\n"), 900);
        let (tell, pods) = watch::channel(Arc::default());
        let processes = Processes::new(proc.path(), pods);
        assert!(matches!(processes.find(UID), Err(FindError::NoProcess(_))));
        let pod = NodePod { static_uid: Some(HASH.into()), ..NodePod::default() };
        tell.send_replace(Arc::new(NodePods { pods: [(UID.into(), pod)].into(), ..NodePods::default() }));
        assert_eq!(processes.find(UID).unwrap(), proc.path().join("50/ns/net"));
    }

    #[test]
    fn a_path_of_the_node_is_seen_from_the_agents_container() {
        let processes = Processes::new(Path::new("/host/proc"), watch::channel(Arc::default()).1);
        for (path, seen) in [
            ("/var/run/netns/cni-1", "/run/netns/cni-1"),
            ("/run/netns/cni-1", "/run/netns/cni-1"),
            ("/proc/7/ns/net", "/host/proc/7/ns/net"),
        ] {
            assert_eq!(processes.seen_from_here(Path::new(path)), Path::new(seen));
        }
    }

    #[test]
    fn what_the_plugin_told_counts_while_it_is_there() {
        let proc = tempfile::tempdir().unwrap();
        let told = proc.path().join("netns");
        fs::write(&told, "").unwrap();
        let processes = Processes::new(proc.path(), watch::channel(Arc::default()).1);
        let id = processes.tell(UID, &told).unwrap();
        assert_eq!(processes.find(UID).unwrap(), told);
        let other = proc.path().join("other");
        fs::write(&other, "").unwrap();
        let places = Places::Processes(processes);
        assert!(!places.has_moved(UID, id));
        let new = places.tell(UID, &other).unwrap();
        assert!(places.has_moved(UID, id), "a new sandbox counts");
        places.forget(UID, id);
        assert!(places.has_moved(UID, id), "the end of the old one changes nothing");
        places.forget(UID, new);
        assert!(!places.has_moved(UID, id));
        let Places::Processes(processes) = places else { unreachable!() };
        processes.tell(UID, &told).unwrap();
        fs::remove_file(&told).unwrap();
        assert!(processes.find(UID).is_err());
    }
}
