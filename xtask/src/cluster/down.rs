//! `cluster down`: ends what the cluster runs and removes what it has made, whatever state it is in.
//!
//! It goes by what is remembered (process ids with their start) and by the names that only this cluster has (cgroups,
//! namespaces, folder). Mounts and pods' namespaces are in the nodes' mount namespaces and go with their last process.

use std::fs;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::layout::{CONTROL, Cluster, NODES};
use super::process::{HOLDER, Recorded};
use super::{cgroups, components, lock, network};

pub fn run(cluster: &Cluster) -> Result<()> {
    let _lock = lock(cluster)?;
    remove(cluster)
}

/// Removes all of it, the folder last: an error before leaves what a second run needs.
pub fn remove(cluster: &Cluster) -> Result<()> {
    let start = Instant::now();
    let removed = clear(cluster)?;
    let folder = cluster.folder();
    fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    let took = start.elapsed().as_secs_f64();
    match removed.as_slice() {
        [] => println!("cluster {} was not there", cluster.name()),
        removed => println!("cluster {}: removed {} in {took:.1} s", cluster.name(), removed.join(", ")),
    }
    Ok(())
}

/// The same, but for the folder itself. Returns what there was.
pub fn clear(cluster: &Cluster) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let mut note = |count: usize, what: &str| {
        if count > 0 {
            removed.push(format!("{count} {what}"));
        }
    };
    // Those that start others first, so that nothing new is born meanwhile.
    let all = components::all(cluster);
    let programs = all.iter().rev().map(|component| (component.place, component.name));
    let holders = NODES.iter().map(|node| (node.name, HOLDER));
    note(
        programs.chain(holders).filter(|(place, name)| Recorded::new(cluster, place, name).kill()).count(),
        "programs",
    );
    // Shims and pods are in no record, but they were born in these cgroups.
    note(cgroups::kill(cluster.name())?, "more processes");
    note(cgroups::remove(cluster.name())?, "cgroups");
    note(network::remove(cluster)?, "network namespaces");
    for entry in fs::read_dir(cluster.folder()).into_iter().flatten().flatten() {
        let path = entry.path();
        let gone = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        gone.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    debug_assert!(!cluster.place(CONTROL).exists(), "all of the folder's content was removed");
    Ok(removed)
}
