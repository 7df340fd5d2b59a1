//! The cluster's network: a namespace for the control plane with a bridge in it, one for each node, routes between pods.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::layout::{CONTROL, Cluster, NODES, PREFIX, control_addresses};

/// Written when all of it is there.
const WHOLE: &str = "network";

/// Whether all of it is there, and was finished.
pub fn is_whole(cluster: &Cluster) -> bool {
    let mut places = NODES.iter().map(|node| node.name).chain([CONTROL]);
    cluster.folder().join(WHOLE).exists() && places.all(|place| cluster.netns_path(place).exists())
}

/// Makes all of it, unless it is there.
pub fn ensure(cluster: &Cluster) -> Result<()> {
    if is_whole(cluster) {
        return Ok(());
    }
    remove(cluster)?;
    make(cluster)?;
    fs::write(cluster.folder().join(WHOLE), "").context("cannot write to the cluster's folder")
}

fn make(cluster: &Cluster) -> Result<()> {
    let control = cluster.netns(CONTROL);
    let mut host = format!("netns add {control}\n");
    for node in NODES {
        host.push_str(&format!("netns add {}\n", cluster.netns(node.name)));
    }
    ip(None, &host)?;
    let mut lines = String::from("link set lo up\nlink add br0 type bridge\nlink set br0 up\n");
    lines.push_str(&addresses(&control_addresses(), "br0"));
    sysctl(cluster, CONTROL)?;
    for node in NODES {
        let (name, netns) = (node.name, cluster.netns(node.name));
        lines.push_str(&format!(
            "link add {name} type veth peer name eth0 netns {netns}\nlink set {name} master br0\nlink set {name} up\n"
        ));
    }
    ip(Some(&control), &lines)?;
    for node in NODES {
        sysctl(cluster, node.name)?;
        let [v4, v6] = control_addresses();
        let mut lines = String::from("link set lo up\nlink set eth0 up\n");
        lines.push_str(&addresses(&node.addresses(), "eth0"));
        // Nothing lies behind it; but what has no route at all can't be told apart from what is refused.
        lines.push_str(&format!("route add default via {v4}\nroute add default via {v6}\n"));
        for other in NODES.iter().filter(|other| other.number != node.number) {
            lines.push_str(&routes(*other));
        }
        ip(Some(&cluster.netns(node.name)), &lines)?;
    }
    // The API server calls webhooks by the addresses of their pods.
    let lines: String = NODES.iter().map(|node| routes(*node)).collect();
    ip(Some(&control), &lines)
}

fn addresses(addresses: &[std::net::IpAddr; 2], link: &str) -> String {
    let [v4, v6] = addresses;
    format!("addr add {v4}/24 dev {link}\naddr add {v6}/64 dev {link} nodad\n")
}

/// To a node's pods.
fn routes(node: super::layout::Node) -> String {
    let ([v4, v6], [pods_v4, pods_v6]) = (node.addresses(), node.pods());
    format!("route add {pods_v4} via {v4}\nroute add {pods_v6} via {v6}\n")
}

/// Nodes forward for their pods; the control plane does not. Fresh IPv6 addresses are usable at once.
fn sysctl(cluster: &Cluster, place: &str) -> Result<()> {
    let forward = if place == CONTROL { "0" } else { "1" };
    let script = format!(
        "cd /proc/sys/net && echo {forward} > ipv4/ip_forward && echo {forward} > ipv6/conf/all/forwarding && \
         echo 0 > ipv6/conf/default/accept_dad && echo 0 > ipv6/conf/all/accept_dad"
    );
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", cluster.netns_path(place).display())).args(["sh", "-c", &script]);
    super::command::output(command, super::command::SHORT).map(drop)
}

/// Deletes the cluster's namespaces; their links go with them. Returns how many there were.
pub fn remove(cluster: &Cluster) -> Result<usize> {
    debug_assert!(cluster.name().starts_with(PREFIX), "others' namespaces are never deleted");
    let mut names = vec![cluster.netns(CONTROL)];
    names.extend(NODES.map(|node| cluster.netns(node.name)));
    names.retain(|name| std::path::Path::new("/run/netns").join(name).exists());
    let lines: String = names.iter().map(|name| format!("netns delete {name}\n")).collect();
    if !names.is_empty() {
        ip(None, &lines)?;
    }
    Ok(names.len())
}

/// Runs lines of iproute2's `ip`, in a namespace or where the caller is.
fn ip(netns: Option<&str>, lines: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot run `ip`: `cargo xtask setup` installs it")?;
    let written = child.stdin.take().expect("stdin is piped").write_all(lines.as_bytes());
    let output = child.wait_with_output().context("cannot wait for `ip`")?;
    if !output.status.success() || written.is_err() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`ip` failed in namespace {}: {}", netns.unwrap_or("of the host"), said.trim().replace('\n', "; "));
    }
    Ok(())
}
