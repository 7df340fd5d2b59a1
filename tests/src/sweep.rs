//! Removes what runs that were killed have left behind, by the prefix of our names and the dead process in them.

use std::fs;
use std::path::Path;
use std::process;

use crate::cgroup::cgroup2_mount;
use crate::mesh::PREFIX;
use crate::netns;

/// Removes leftovers of dead runs; returns a line for each.
pub fn sweep() -> Vec<String> {
    remove(left_behind)
}

/// Removes what this process has made, for a process that must end at once: its children die with it.
pub fn sweep_own() {
    let own = format!("{PREFIX}{}-", process::id());
    remove(|name| name.starts_with(&own));
}

fn remove(is_ours: impl Fn(&str) -> bool) -> Vec<String> {
    let mut removed = Vec::new();
    for name in names(Path::new("/run/netns")).filter(|name| is_ours(name)) {
        netns::delete(&name);
        removed.push(format!("network namespace {name}"));
    }
    for name in names(&cgroup2_mount()).filter(|name| is_ours(name)) {
        let path = cgroup2_mount().join(&name);
        if fs::remove_dir(&path).is_ok() {
            removed.push(format!("cgroup {}", path.display()));
        }
    }
    let temporary = std::env::temp_dir();
    for name in names(&temporary).filter(|name| is_ours(name)) {
        let folder = temporary.join(&name);
        for mount in names(&folder).filter(|inner| inner.starts_with("bpf-")) {
            let _ = rustix::mount::unmount(folder.join(mount), rustix::mount::UnmountFlags::DETACH);
        }
        if fs::remove_dir_all(&folder).is_ok() {
            removed.push(format!("folder {}", folder.display()));
        }
    }
    removed
}

fn names(folder: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// Whether a name is ours (`nm-<process id>-...`) and its process is gone.
fn left_behind(name: &str) -> bool {
    let Some(pid) = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()) else { return false };
    let Ok(pid) = pid.parse::<u32>() else { return false };
    pid != process::id() && !Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_runs_are_ours() {
        assert!(left_behind("nm-4194305-0-n1"), "no process has an id beyond the kernel's limit");
        assert!(!left_behind(&format!("nm-{}-0-n1", process::id())));
        assert!(!left_behind("nm-1-0-n1"));
        assert!(!left_behind("nm-node-1"));
        assert!(!left_behind("cni-4194305-0"));
    }
}
