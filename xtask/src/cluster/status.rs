//! `cluster status`: each program, where it runs, and whether it is ready.

use anyhow::{Result, bail};

use super::components;
use super::layout::{Cluster, NODES};
use super::process::{HOLDER, Recorded};
use super::{build, network, up};

pub fn run(cluster: &Cluster) -> Result<()> {
    if !network::is_whole(cluster) {
        bail!("cluster {} does not run: `cargo xtask cluster up` starts it", cluster.name());
    }
    let programs = build::cached()?;
    let mut broken = 0;
    let mut row = |name: &str, place: &str, pid: Option<u32>, ready: bool| {
        broken += usize::from(!ready);
        let pid = pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        println!("{name:24} {place:8} {pid:>8}  {}", if ready { "yes" } else { "no" });
    };
    println!("{:24} {:8} {:>8}  READY", "COMPONENT", "NODE", "PID");
    for component in components::all(cluster) {
        let pid = Recorded::new(cluster, component.place, component.name).pid();
        let ready = pid.is_some() && components::is_ready(cluster, &programs, &component);
        row(component.name, component.place, pid, ready);
    }
    for node in NODES {
        let pid = Recorded::new(cluster, node.name, HOLDER).pid();
        row("file system", node.name, pid, pid.is_some());
        row("node", node.name, None, up::is_node_ready(cluster, &programs, node));
    }
    if broken > 0 {
        bail!("{broken} of them not ready: `cargo xtask cluster up` starts what is missing");
    }
    Ok(())
}
