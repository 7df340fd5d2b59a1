//! A cgroup of cgroup2 of our own: kubelet's, or one to attach foreign programs to.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::mesh::Mesh;

/// Made on `new`, removed on drop.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// A folder in the root of the cgroup2 hierarchy, named after the mesh.
    pub fn new(mesh: &Mesh, name: &str) -> Self {
        let path = cgroup2_mount().join(format!("{}-{name}", mesh.name()));
        fs::create_dir(&path).unwrap_or_else(|e| panic!("cannot make cgroup {}: {e}; run as root", path.display()));
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command that runs `program` in this cgroup, wherever `outer` (a pod's or node's command of `sh`) puts it.
    pub fn within(&self, outer: Command, program: &str, args: &[&str]) -> Command {
        let mut command = within(&self.path, outer, program);
        command.args(args);
        command
    }
}

pub(crate) fn within(cgroup: &Path, mut outer: Command, program: &str) -> Command {
    outer.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(cgroup).arg(program);
    outer
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was just reaped may be counted for a moment longer.
        let start = Instant::now();
        while fs::remove_dir(&self.path).is_err_and(|e| e.kind() != io::ErrorKind::NotFound) {
            if start.elapsed() > Duration::from_secs(2) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or on a hybrid machine `/sys/fs/cgroup/unified`.
pub fn cgroup2_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc/mounts can be read");
    let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|f| f.get(2) == Some(&"cgroup2"));
    let mount = mount.expect("a cgroup2 hierarchy is mounted; mount one with `mount -t cgroup2 none /sys/fs/cgroup`");
    PathBuf::from(mount[1])
}
