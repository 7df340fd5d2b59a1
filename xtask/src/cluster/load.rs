//! `cluster load`: brings images onto every node, where no registry is.

use std::fs;
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result, bail};

use super::build::{self, Programs};
use super::layout::{Cluster, NODES};
use super::up::step;
use super::{command, components, lock, network};
use crate::image::oci;

/// A static program as the image `name`.
pub fn program(cluster: &Cluster, name: &str, program: &Path) -> Result<()> {
    let programs = prepare(cluster)?;
    let _lock = lock(cluster)?;
    let archive = cluster.folder().join("load.tar");
    fs::write(&archive, oci::of_program(name, program)?).context("cannot write to the cluster's folder")?;
    let imported = import(cluster, &programs, &archive, name);
    fs::remove_file(&archive).context("cannot remove the archive from the cluster's folder")?;
    imported
}

/// An image that is an OCI archive already.
pub fn archive(cluster: &Cluster, archive: &Path) -> Result<()> {
    let programs = prepare(cluster)?;
    let _lock = lock(cluster)?;
    let name = archive.file_name().unwrap_or_default().to_string_lossy();
    // A node has folders of its own in some of the machine's places, and does not see what lies there.
    let copy = cluster.folder().join("load.tar");
    fs::copy(archive, &copy).with_context(|| format!("cannot copy {}", archive.display()))?;
    let imported = import(cluster, &programs, &copy, &name);
    fs::remove_file(&copy).context("cannot remove the archive from the cluster's folder")?;
    imported
}

fn prepare(cluster: &Cluster) -> Result<Programs> {
    command::watch_interrupt()?;
    if !network::is_whole(cluster) {
        bail!("cluster {} does not run: `cargo xtask cluster up` starts it", cluster.name());
    }
    build::cached()
}

/// Onto all nodes at once.
fn import(cluster: &Cluster, programs: &Programs, archive: &Path, what: &str) -> Result<()> {
    step(what, || {
        thread::scope(|scope| {
            let nodes = NODES.map(|node| scope.spawn(move || components::import(cluster, programs, node, archive)));
            for (node, import) in NODES.iter().zip(nodes) {
                let done = import.join().unwrap_or_else(|_| bail!("the import panicked"));
                done.with_context(|| format!("node {}", node.name))?;
            }
            Ok(())
        })
    })
}
