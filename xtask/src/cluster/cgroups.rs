//! A cluster's cgroups, in every hierarchy that is mounted: made, emptied, removed.
//!
//! Whatever a cluster starts is born in them, its pods and their shims too. So they also say what is to be ended.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::command::wait_until;

const PATIENCE: Duration = Duration::from_secs(20);

/// Makes the cgroup `path` in every hierarchy.
pub fn ensure(path: &str) -> Result<()> {
    for root in hierarchies() {
        let mut at = root.clone();
        for part in Path::new(path) {
            let parent = at.clone();
            at.push(part);
            match fs::create_dir(&at) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(|| format!("cannot make cgroup {}: run as root", at.display())),
            }
            prepare(&parent, &at)?;
        }
    }
    Ok(())
}

/// What a new cgroup lacks before a kubelet can use it.
fn prepare(parent: &Path, child: &Path) -> Result<()> {
    // In version 1 no process may enter a cpuset that has no processors and no memory.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if parent.join("cgroup.clone_children").exists() && child.join(file).exists() {
            let value = fs::read_to_string(parent.join(file)).unwrap_or_default();
            fs::write(child.join(file), value.trim())
                .with_context(|| format!("cannot fill {} of cgroup {}", file, child.display()))?;
        }
    }
    // In version 2 a cgroup has those controllers that its parent hands down.
    if let Ok(controllers) = fs::read_to_string(parent.join("cgroup.controllers")) {
        for controller in controllers.split_whitespace() {
            // One that cannot be handed down is one that kubelet will name if it misses it.
            let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    Ok(())
}

/// Ends every process in `path` and below, and waits until none is left. Returns how many it has ended.
pub fn kill(path: &str) -> Result<usize> {
    let mut ended = BTreeSet::new();
    wait_until(&format!("the processes of cgroup {path} have ended"), PATIENCE, || {
        let members = members(path);
        for pid in &members {
            // SIGKILL: nothing that they hold outlives the cluster. One that has gone in between is no error.
            if let Some(id) = Pid::from_raw(*pid) {
                let _ = kill_process(id, Signal::KILL);
            }
        }
        ended.extend(members.iter().copied());
        Ok(members.is_empty())
    })?;
    Ok(ended.len())
}

/// The processes in `path` and below, in any hierarchy.
fn members(path: &str) -> BTreeSet<i32> {
    let mut found = BTreeSet::new();
    for folder in folders(path) {
        let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| !is_zombie(*pid)));
    }
    found
}

/// Ended, and waiting for a parent that will not ask: there is nothing more to end.
fn is_zombie(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
}

/// Removes `path` and all below it from every hierarchy. Returns how many were there.
pub fn remove(path: &str) -> Result<usize> {
    let before = folders(path).len();
    let mut left = Vec::new();
    let removed = wait_until(&format!("cgroup {path} is removed"), PATIENCE, || {
        // The deepest first. A process that has just ended may be counted for a moment longer.
        for folder in folders(path) {
            let _ = fs::remove_dir(folder);
        }
        left = folders(path);
        Ok(left.is_empty())
    });
    let first = left.first().map(|folder| folder.display().to_string()).unwrap_or_default();
    removed.with_context(|| format!("something still uses {first}"))?;
    Ok(before)
}

/// `path` in every hierarchy and what is below, the deepest first.
fn folders(path: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = hierarchies().into_iter().map(|root| root.join(path)).collect();
    found.retain(|folder| folder.is_dir());
    let mut next = 0;
    while next < found.len() {
        let below = fs::read_dir(&found[next]).into_iter().flatten().flatten();
        let folders: Vec<PathBuf> =
            below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect();
        found.extend(folders);
        next += 1;
    }
    found.reverse();
    found
}

/// Where cgroups are mounted: one hierarchy in version 2, several in version 1, or both.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mount_points(&mounts)
}

fn mount_points(mounts: &str) -> Vec<PathBuf> {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mut found: Vec<PathBuf> = Vec::new();
    for field in fields {
        if let [_, point, "cgroup" | "cgroup2", ..] = field[..]
            && !found.iter().any(|known| known == Path::new(point))
        {
            found.push(point.into());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hierarchy_is_found_once() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let expected = [PathBuf::from("/sys/fs/cgroup/cpu"), PathBuf::from("/sys/fs/cgroup/unified")];
        assert_eq!(mount_points(mounts), expected);
    }

    #[test]
    fn a_zombie_is_told_by_its_state() {
        let mut child = std::process::Command::new("true").spawn().expect("`true` runs");
        let pid = child.id().cast_signed();
        wait_until("the child has ended", PATIENCE, || Ok(is_zombie(pid))).expect("it ends at once");
        child.wait().expect("it was not waited for before");
        assert!(!is_zombie(pid), "gone");
        assert!(!is_zombie(std::process::id().cast_signed()), "alive");
    }
}
