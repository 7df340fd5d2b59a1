//! `cluster up`: each step makes what is missing and waits until it is ready, so that a second run does nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::build::{self, Programs};
use super::command::{self, check_interrupt, take_interrupt, wait_until};
use super::components::{self, Component, PAUSE_IMAGE};
use super::layout::{CONTROL, Cluster, NODES, Node};
use super::process::{self, HOLDER, Recorded};
use super::{certificates, cgroups, dns, down, lock, network};
use crate::image::oci;
use crate::setup;

/// For one program to become ready: a second or two on a free machine.
pub const READY: Duration = Duration::from_secs(120);

pub fn run(cluster: &Cluster, keep: bool) -> Result<()> {
    command::watch_interrupt()?;
    setup::run_for_cluster()?;
    let programs = build::ensure()?;
    let lock = lock(cluster)?;
    let start = Instant::now();
    let ran = network::is_whole(cluster) && runs(cluster);
    if !ran {
        // What a cluster that was killed has left would be in the way.
        down::clear(cluster)?;
    }
    if let Err(e) = bring_up(cluster, &programs) {
        let interrupted = take_interrupt();
        if ran || keep && !interrupted {
            // A cluster that was in use is not ended because a second `up` was.
            eprintln!("what runs is left as it is, its logs in {}/*/*.log", cluster.folder().display());
            return Err(e);
        }
        println!("removing what has started");
        down::remove(cluster)?;
        return Err(e);
    }
    drop(lock);
    println!("two nodes are Ready; {:.1} s in all. To use it, as root:", start.elapsed().as_secs_f64());
    println!("  export KUBECONFIG={} PATH={}:$PATH", cluster.kubeconfig().display(), cluster.bin().display());
    println!("  kubectl get nodes");
    println!("`cargo xtask cluster status` shows its programs, `cargo xtask cluster down` removes everything.");
    Ok(())
}

fn bring_up(cluster: &Cluster, programs: &Programs) -> Result<()> {
    step("network", || network::ensure(cluster))?;
    step("certificates", || certificates::ensure(cluster))?;
    write_kubectl(cluster, programs)?;
    fs::create_dir_all(cluster.place(CONTROL)).context("cannot write to the cluster's folder")?;
    cgroups::ensure(&format!("{}/system", cluster.cgroup(CONTROL)))?;
    for component in components::control_plane(cluster) {
        ensure(cluster, programs, &component)?;
    }
    let pause = cluster.folder().join("pause.tar");
    fs::write(&pause, oci::of_program(PAUSE_IMAGE, &programs.pause())?)
        .context("cannot write to the cluster's folder")?;
    for node in NODES {
        cgroups::ensure(&format!("{}/system", cluster.cgroup(node.name)))?;
        components::write_settings(cluster, node)?;
        ensure_holder(cluster, node)?;
        ensure(cluster, programs, &components::containerd(node))?;
        step(&format!("{} pause image", node.name), || components::import(cluster, programs, node, &pause))?;
        for component in components::node_programs(cluster, node) {
            ensure(cluster, programs, &component)?;
        }
    }
    for node in NODES {
        step(&format!("{} Ready", node.name), || {
            let what = format!(
                "node {} is Ready: its log is {}",
                node.name,
                cluster.place(node.name).join("kubelet.log").display()
            );
            wait_until(&what, READY, || Ok(is_node_ready(cluster, programs, node))).map(drop)
        })?;
    }
    step("DNS", || dns::ensure(cluster, programs))
}

/// Whether anything of it runs.
fn runs(cluster: &Cluster) -> bool {
    components::all(cluster).iter().any(|c| Recorded::new(cluster, c.place, c.name).pid().is_some())
}

pub fn is_node_ready(cluster: &Cluster, programs: &Programs, node: Node) -> bool {
    let path = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
    components::kubectl(cluster, programs, &["get", "node", node.name, "-o", path]).is_ok_and(|said| said == "True")
}

/// Does it, and says how long it took.
pub fn step(what: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
    check_interrupt()?;
    let start = Instant::now();
    act().with_context(|| format!("step {what:?} failed"))?;
    println!("  {what:32} {:6.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Starts it unless it runs, and waits until it is ready.
fn ensure(cluster: &Cluster, programs: &Programs, component: &Component) -> Result<()> {
    step(&format!("{} {}", component.place, component.name), || {
        let mut recorded = Recorded::new(cluster, component.place, component.name);
        if recorded.pid().is_none() {
            let program = programs.path(component.name);
            recorded = process::start(cluster, component.place, component.name, &program, &component.args)?;
        }
        let what = format!("it is ready; its log is {}", recorded.log().display());
        let ready = wait_until(&what, READY, || {
            if recorded.pid().is_none() {
                bail!("it ended; the end of {}:\n{}", recorded.log().display(), recorded.last_words());
            }
            Ok(components::is_ready(cluster, programs, component))
        });
        ready.map(drop)
    })
}

fn ensure_holder(cluster: &Cluster, node: Node) -> Result<()> {
    if Recorded::new(cluster, node.name, HOLDER).pid().is_some() {
        return Ok(());
    }
    step(&format!("{} file system", node.name), || {
        // Without the holder what still runs there sees mounts that nobody can enter any more.
        cgroups::kill(&cluster.cgroup(node.name))?;
        let holder = process::start_holder(cluster, node.name)?;
        let mounted = cluster.place(node.name).join("mounted");
        let ready = wait_until("its mounts are made", READY, || {
            if holder.pid().is_none() {
                bail!("they cannot be made: {}", holder.last_words());
            }
            Ok(mounted.exists())
        });
        ready.map(drop)
    })
}

/// A `kubectl` that enters the namespace where the API server is: no port is opened outside it.
fn write_kubectl(cluster: &Cluster, programs: &Programs) -> Result<()> {
    let path = cluster.bin().join("kubectl");
    let script = format!(
        "#!/bin/sh\nexec nsenter --net='{}' '{}' \"$@\"\n",
        cluster.netns_path(CONTROL).display(),
        programs.path("kubectl").display()
    );
    fs::create_dir_all(cluster.bin())
        .and_then(|()| fs::write(&path, script))
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("cannot write {}", path.display()))
}
