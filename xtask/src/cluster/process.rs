//! The programs that a cluster runs: started in their place, remembered in a file, ended by what is remembered.
//!
//! They outlive the command that starts them. What is remembered is a process id and when that process began: an id that
//! the kernel has given to somebody else since is never taken for ours.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::layout::{CONTROL, Cluster};

/// Joins the cgroup in `$0` and becomes the program that follows.
const JOIN: &str = r#"echo $$ > "$0/cgroup.procs" && exec "$@""#;

/// Makes the file system of a node and then holds it: its mount namespace lives as long as this process. `$0` is the
/// cgroup, `$1` the node's folder.
///
/// The node sees `/run`, `/etc`, `/opt` and `/var` of its own, so that everything lies where it lies on any node
/// (`/etc/cni/net.d`, `/run/containerd`, `/var/lib/kubelet`, `/var/log/pods`), nothing is written to the machine's, and
/// all of it is gone with the process. Layers and volumes go to the cluster's folder, not to memory. Mounts are shared
/// inside the node, which volumes with bidirectional propagation need.
///
/// kubelet wants six settings of the kernel, which are the whole machine's: it is shown that they are as it wants them.
const NODE: &str = r#"set -e
echo $$ > "$0/cgroup.procs"
mount --make-rprivate /
mount --make-rshared /
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /run/netns /run/lock /run/node/state /run/node/sysctl
mount --bind "$1" /run/node/state
for top in etc opt var; do
    mkdir -p /run/node/$top/upper /run/node/$top/work
    mount -t overlay -o lowerdir=/$top,upperdir=/run/node/$top/upper,workdir=/run/node/$top/work overlay /$top
done
for data in containerd kubelet; do
    mkdir -p /run/node/state/$data /var/lib/$data
    mount --bind /run/node/state/$data /var/lib/$data
done
mkdir -p /etc/cni/net.d /opt/cni/bin
rm -rf /etc/cni/net.d/*
cp /run/node/state/cni.conflist /etc/cni/net.d/10-nodemesh-cluster.conflist
mount -t bpf bpf /sys/fs/bpf
while read key value; do
    echo $value > /run/node/sysctl/value
    mv /run/node/sysctl/value /run/node/sysctl/$(echo $key | tr / .)
    mount --bind /run/node/sysctl/$(echo $key | tr / .) /proc/sys/$key
done <<KEYS
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
KEYS
touch /run/node/state/mounted
exec sleep infinity
"#;

/// The process that holds a node's file system.
pub const HOLDER: &str = "holder";

/// A process of a cluster, by what is remembered.
#[derive(Debug)]
pub struct Recorded {
    place: String,
    name: String,
    folder: PathBuf,
}

impl Recorded {
    pub fn new(cluster: &Cluster, place: &str, name: &str) -> Self {
        Self { place: place.to_owned(), name: name.to_owned(), folder: cluster.place(place) }
    }

    pub fn log(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.name))
    }

    fn file(&self) -> PathBuf {
        self.folder.join(format!("{}.pid", self.name))
    }

    /// The process id, while it is this process that runs.
    pub fn pid(&self) -> Option<u32> {
        alive(&fs::read_to_string(self.file()).ok()?)
    }

    /// Starts `command` with its output in the log, away from the terminal's Ctrl-C.
    fn start(&self, mut command: Command) -> Result<()> {
        let log = self.log();
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stderr(file.try_clone().context("cannot duplicate a file")?).stdout(file);
        let child = command.process_group(0).spawn();
        let child = child.with_context(|| format!("cannot start {} of {}", self.name, self.place))?;
        let begun = begun(child.id()).with_context(|| format!("{} of {} ended at once", self.name, self.place))?;
        let path = self.file();
        fs::write(&path, format!("{} {begun}\n", child.id()))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Ends it, if it is still the process that was started; says whether it was.
    pub fn kill(&self) -> bool {
        let Some(pid) = self.pid().and_then(|pid| Pid::from_raw(pid.cast_signed())) else { return false };
        kill_process(pid, Signal::KILL).is_ok()
    }

    /// The last lines of its log, for a sentence that says that it failed.
    pub fn last_words(&self) -> String {
        let text = fs::read(self.log()).unwrap_or_default();
        mesh_tests::tail(String::from_utf8_lossy(&text).trim_end(), 12)
    }
}

/// Starts a node's holder.
pub fn start_holder(cluster: &Cluster, node: &str) -> Result<Recorded> {
    let holder = Recorded::new(cluster, node, HOLDER);
    let _ = fs::remove_file(cluster.place(node).join("mounted"));
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", cluster.netns_path(node).display())).args(["unshare", "--mount", "sh", "-c", NODE]);
    command.arg(own_cgroup(cluster, node)).arg(cluster.place(node));
    holder.start(command)?;
    Ok(holder)
}

/// Starts a program in the control plane's or a node's namespaces.
pub fn start(cluster: &Cluster, place: &str, name: &str, program: &Path, args: &[String]) -> Result<Recorded> {
    let recorded = Recorded::new(cluster, place, name);
    let mut command = within(cluster, place)?;
    command.args(["sh", "-c", JOIN]).arg(own_cgroup(cluster, place)).arg(program).args(args);
    if let Some(folder) = program.parent() {
        // containerd finds its shim beside itself, and runc where system programs are.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", folder.display()));
    }
    recorded.start(command)?;
    Ok(recorded)
}

/// A command that enters the place; the program to run there is its next argument.
pub fn within(cluster: &Cluster, place: &str) -> Result<Command> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", cluster.netns_path(place).display()));
    if place != CONTROL {
        let holder = Recorded::new(cluster, place, HOLDER);
        let pid = holder.pid().with_context(|| {
            format!("node {place} of {} does not run: `cargo xtask cluster up` starts it", cluster.name())
        })?;
        command.arg(format!("--mount=/proc/{pid}/ns/mnt"));
    }
    Ok(command)
}

/// The cgroup of a place's own programs, in the hierarchy of cgroup2. Pods have theirs beside it.
fn own_cgroup(cluster: &Cluster, place: &str) -> PathBuf {
    mesh_tests::cgroup2_mount().join(cluster.cgroup(place)).join("system")
}

/// Reads "id start"; the id, if a process with both is there and has not ended.
fn alive(record: &str) -> Option<u32> {
    let (pid, start) = record.trim().split_once(' ')?;
    let pid = pid.parse().ok()?;
    (begun(pid)? == start.parse::<u64>().ok()?).then_some(pid)
}

/// When a process began, in ticks since the machine did; `None` when it is gone or a zombie.
fn begun(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold anything, brackets too. Behind it come the state and, nineteen fields on, the start.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (state != "Z" && state != "X").then(|| fields.nth(18)?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_counts_only_with_its_start() {
        let own = std::process::id();
        let begun = begun(own).expect("this process runs");
        assert_eq!(alive(&format!("{own} {begun}\n")), Some(own));
        assert_eq!(alive(&format!("{own} {}\n", begun + 1)), None, "another process has the id now");
        assert_eq!(alive("4194305 1"), None);
        assert_eq!(alive(""), None);
    }

    #[test]
    fn a_process_that_has_ended_is_not_alive() {
        let mut child = Command::new("sh").args(["-c", "read line"]).stdin(Stdio::piped()).spawn().unwrap();
        let record = format!("{} {}", child.id(), begun(child.id()).unwrap());
        assert_eq!(alive(&record), Some(child.id()));
        child.kill().unwrap();
        let deadline = std::time::Duration::from_secs(20);
        // Before anybody has asked for its end, too.
        mesh_tests::eventually(deadline, "a zombie is not alive", || alive(&record).is_none());
        child.wait().unwrap();
        assert_eq!(alive(&record), None);
    }
}
