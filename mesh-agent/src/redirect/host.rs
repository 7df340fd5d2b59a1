//! What the machine must have: capabilities, a cgroup2 hierarchy, a bpffs. In: paths from the options. Out: open folders,
//! or one sentence.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::RedirectError;

const CGROUP2_MAGIC: i64 = 0x6367_7270;
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// A cgroup2 folder.
#[derive(Debug)]
pub struct Cgroup {
    pub path: PathBuf,
    pub file: File,
    /// As the kernel's helpers tell it: the folder's inode.
    pub id: u64,
}

impl Cgroup {
    pub fn open(path: &Path) -> Result<Self, RedirectError> {
        let failed = |source| RedirectError::Cgroup { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        if magic(&file).map_err(failed)? != CGROUP2_MAGIC {
            return Err(RedirectError::NotCgroup2 { path: path.to_owned() });
        }
        let id = file.metadata().map_err(failed)?.ino();
        Ok(Self { path: path.to_owned(), file, id })
    }

    /// Whether the kernel runs programs at this cgroup for what this process does.
    pub fn holds_this_process(&self) -> bool {
        // The root has no such file, and holds all.
        !self.path.join("cgroup.type").exists() || is_in_tree(&self.path, &std::process::id().to_string())
    }

    /// The settings' cgroup, or the root of the hierarchy.
    pub fn for_programs(wanted: Option<&Path>) -> Result<Self, RedirectError> {
        let found = match wanted {
            Some(path) => path.to_owned(),
            None => {
                let mounts = fs::read_to_string("/proc/mounts")
                    .map_err(|source| RedirectError::Cgroup { path: "/proc/mounts".into(), source })?;
                let mount = cgroup2_mount(&mounts).ok_or(RedirectError::NoCgroup2)?;
                // Only the root of the hierarchy has no type. What a container with a cgroup namespace of its own sees is
                // its own folder, and programs there would meet no pod.
                if mount.join("cgroup.type").exists() {
                    return Err(RedirectError::NotTheRoot { path: mount });
                }
                mount
            }
        };
        Self::open(&found)
    }
}

/// The cgroup in `root` (a whole cgroup2 hierarchy) of the kubelet that runs in this network namespace; `proc` is the
/// node's /proc. `None` where there is none, or more than one that may be it: any program can call itself so, and a pod in
/// the node's network must not be taken for it. Nor may kubelet be in one cgroup with its pods.
pub fn kubelet_cgroup(proc: &Path, root: &Path) -> Option<PathBuf> {
    let here = fs::metadata("/proc/self/ns/net").ok()?;
    let processes = fs::read_dir(proc).ok()?.flatten().map(|entry| entry.path());
    let kubelets = processes.filter(|process| {
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        KUBELETS.contains(&name.trim_end())
            && fs::metadata(process).is_ok_and(|m| m.uid() == 0)
            && fs::metadata(process.join("ns/net")).is_ok_and(|m| (m.dev(), m.ino()) == (here.dev(), here.ino()))
    });
    let mut folders: Vec<PathBuf> = kubelets.filter_map(|kubelet| cgroup_of(&kubelet, root)).collect();
    folders.retain(|folder| folder.join("cgroup.type").exists() && !is_of_pods(folder, root) && !holds_pods(folder));
    folders.sort();
    folders.dedup();
    match folders.as_slice() {
        [one] => Some(one.clone()),
        _ => None,
    }
}

fn cgroup_of(process: &Path, root: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(process.join("cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // In a cgroup namespace of our own it is told from where we are.
    let base = if path.starts_with("..") { own_folder(root)? } else { root.to_owned() };
    fs::canonicalize(base.join(path)).ok()
}

/// Whether a folder is below those of pods, whatever the hierarchy calls what is above.
fn is_of_pods(folder: &Path, root: &Path) -> bool {
    let below = folder.strip_prefix(root).unwrap_or(folder);
    below.components().any(|part| part.as_os_str().to_string_lossy().contains("kubepods"))
}

fn holds_pods(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().contains("kubepods"))
}

/// What the program that runs kubelet's code calls itself: kubelet, k3s, MicroK8s.
const KUBELETS: [&str; 4] = ["kubelet", "k3s-server", "k3s-agent", "kubelite"];

/// The folder below `root` that holds this process: asked for each second, on nodes with a thousand folders, so it is kept.
fn own_folder(root: &Path) -> Option<PathBuf> {
    static KNOWN: Mutex<Option<PathBuf>> = Mutex::new(None);
    let pid = std::process::id().to_string();
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if !known.as_ref().is_some_and(|folder| folder.starts_with(root) && holds(folder, &pid)) {
        *known = folder_of(root, &pid);
    }
    known.clone()
}

fn holds(folder: &Path, pid: &str) -> bool {
    fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines().any(|line| line == pid)
}

/// The folder in `folder` that holds the process.
fn folder_of(folder: &Path, pid: &str) -> Option<PathBuf> {
    if holds(folder, pid) {
        return Some(folder.to_owned());
    }
    let folders =
        fs::read_dir(folder).into_iter().flatten().flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    folders.into_iter().find_map(|entry| folder_of(&entry.path(), pid))
}

/// Looks for the process in the folder's tree. /proc/self/cgroup would say where it is, but in the terms of the process's
/// own cgroup namespace, which the folder may be above.
fn is_in_tree(folder: &Path, pid: &str) -> bool {
    folder_of(folder, pid).is_some()
}

/// The first cgroup2 mount in the text of /proc/mounts. Hybrid machines have it at /sys/fs/cgroup/unified.
fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    let mut lines = mounts.lines().map(|line| line.split(' '));
    lines.find_map(|mut words| {
        let (_, path, kind) = (words.next()?, words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

/// Mounts a bpffs where there is none.
pub fn ensure_bpffs(path: &Path) -> Result<(), RedirectError> {
    let failed = |source| RedirectError::Bpffs { path: path.to_owned(), source };
    fs::create_dir_all(path).map_err(failed)?;
    if is_bpffs(path) {
        return Ok(());
    }
    // A mount would hide what lies there: most likely the path is a slip.
    if fs::read_dir(path).map_err(failed)?.next().is_some() {
        return Err(RedirectError::NotBpffs { path: path.to_owned() });
    }
    let flags = rustix::mount::MountFlags::empty();
    // Without a mode every user might write in it.
    rustix::mount::mount("bpf", path, "bpf", flags, Some(c"mode=0700")).map_err(|error| failed(error.into()))
}

pub fn is_bpffs(path: &Path) -> bool {
    File::open(path).and_then(|file| magic(&file)).is_ok_and(|found| found == BPF_FS_MAGIC)
}

#[allow(clippy::unnecessary_cast, reason = "the field's type differs between architectures")]
fn magic(file: &File) -> io::Result<i64> {
    Ok(rustix::fs::fstatfs(file)?.f_type as i64 & 0xffff_ffff)
}

/// Linux's numbers.
const CAP_NET_ADMIN: (u32, &str) = (12, "CAP_NET_ADMIN");
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: (u32, &str) = (38, "CAP_PERFMON");
const CAP_BPF: (u32, &str) = (39, "CAP_BPF");

/// Says which capability is missing, rather than to let some system call fail with EPERM later.
pub fn check_capabilities() -> Result<(), RedirectError> {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    // Not readable: let the kernel decide.
    let Some(effective) = effective_capabilities(&status) else { return Ok(()) };
    match missing_capability(effective) {
        Some(missing) => Err(RedirectError::Capability { missing }),
        None => Ok(()),
    }
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn missing_capability(effective: u64) -> Option<&'static str> {
    let has = |number: u32| effective & (1 << number) != 0;
    if !has(CAP_NET_ADMIN.0) {
        return Some(CAP_NET_ADMIN.1);
    }
    // SYS_ADMIN holds both of the others.
    let wanted = [CAP_BPF, CAP_PERFMON];
    wanted.into_iter().find(|(number, _)| !has(*number) && !has(CAP_SYS_ADMIN)).map(|(_, name)| name)
}

/// The kernel's release, for messages.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_calls_itself_kubelet_is_none() {
        let (proc, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = fs::canonicalize(root.path()).unwrap();
        let process = |pid: &str, name: &str, cgroup: &str| {
            let process = proc.path().join(pid);
            fs::create_dir_all(process.join("ns")).unwrap();
            std::os::unix::fs::symlink("/proc/self/ns/net", process.join("ns/net")).unwrap();
            fs::write(process.join("comm"), format!("{name}\n")).unwrap();
            fs::write(process.join("cgroup"), format!("4:cpu:/x\n0::/{cgroup}\n")).unwrap();
            fs::create_dir_all(root.join(cgroup)).unwrap();
            fs::write(root.join(cgroup).join("cgroup.type"), "domain").unwrap();
        };
        process("7", "kubelet", "kubepods.slice/kubepods-pod1.slice/a");
        assert_eq!(kubelet_cgroup(proc.path(), &root), None);
        process("9", "kubelet", "system.slice/kubelet.service");
        assert_eq!(kubelet_cgroup(proc.path(), &root), Some(root.join("system.slice/kubelet.service")));
        // As cgroup2 alone shows it to the agent in its container.
        let own = root.join("kubepods/podx/agent");
        fs::create_dir_all(&own).unwrap();
        fs::write(own.join("cgroup.procs"), format!("0\n{}\n", std::process::id())).unwrap();
        fs::write(proc.path().join("9/cgroup"), "0::/../../../system.slice/kubelet.service\n").unwrap();
        assert_eq!(kubelet_cgroup(proc.path(), &root), Some(root.join("system.slice/kubelet.service")));
        process("11", "kubelet", "user.slice");
        assert_eq!(kubelet_cgroup(proc.path(), &root), None, "two may be it");
    }

    #[test]
    fn finds_the_cgroup2_mount() {
        let hybrid = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_mount("none /a\\040b cgroup2 rw 0 0"), Some("/a b".into()));
        assert_eq!(cgroup2_mount("tmpfs /tmp tmpfs rw 0 0\nshort"), None);
    }

    #[test]
    fn names_the_capability_that_is_missing() {
        assert_eq!(missing_capability(u64::MAX), None);
        assert_eq!(missing_capability(!(1 << 12)), Some("CAP_NET_ADMIN"));
        assert_eq!(missing_capability(!(1 << 39 | 1 << 21)), Some("CAP_BPF"));
        assert_eq!(missing_capability(!(1 << 38 | 1 << 21)), Some("CAP_PERFMON"));
        assert_eq!(missing_capability(1 << 12 | 1 << 21), None);
    }

    #[test]
    fn a_folder_that_is_no_cgroup_is_named() {
        let error = Cgroup::open(Path::new("/proc")).unwrap_err();
        assert!(matches!(error, RedirectError::NotCgroup2 { .. }), "{error}");
        let error = Cgroup::open(Path::new("/proc/nowhere")).unwrap_err();
        assert!(error.to_string().contains("/proc/nowhere"), "{error}");
    }
}
