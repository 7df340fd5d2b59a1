//! What a pod's netns needs besides sockets: answers to a client whose address the agent bears must come back to the agent,
//! and IPv6 has to have room to spread redirected connections.
//!
//! The agent's packets to the application carry mark 0x111; `tcp_fwmark_accept` gives the accepted socket that mark, and
//! the rule sends what it answers to `lo`. Istio needs CONNMARK rules in iptables for this; a sysctl does it.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv6Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::Netns;
use super::sockets::SPOOF_MARK;
use crate::redirect::NetnsCookie;

const TABLE: u32 = 100;
/// Before the main table.
const PRIORITY: u32 = 15000;
const MARK_MASK: u32 = 0xfff;

/// Per network namespace; 0 is the kernel's default for each. The last two let a strict `rp_filter` look the client's
/// address up with the mark, where it is local, in place of weakening it.
const SYSCTLS: [(&str, bool); 6] = [
    ("net/ipv4/tcp_fwmark_accept", true),
    ("net/ipv4/fwmark_reflect", true),
    ("net/ipv6/fwmark_reflect", false),
    ("net/ipv4/conf/lo/accept_local", true),
    ("net/ipv4/conf/lo/src_valid_mark", true),
    ("net/ipv4/conf/lo/rp_filter", false),
];

#[derive(Debug, thiserror::Error)]
pub enum RoutesError {
    #[error("cannot set {name} inside {netns}: {source}; the agent needs a writable /proc/sys/net")]
    Sysctl { name: &'static str, netns: String, source: io::Error },
    #[error("cannot set routes inside {netns}: {source}; the agent needs CAP_NET_ADMIN")]
    Netlink { netns: String, source: io::Error },
    #[error("cannot {what} inside {netns}: its `lo` is down; bring it up: `nsenter --net={netns} ip link set lo up`")]
    LoopbackDown { what: &'static str, netns: String },
    #[error("cannot {what} inside {netns}: {source}; see `ip route` and `ip rule` there for what is in the way")]
    Route { what: &'static str, netns: String, source: rtnetlink::Error },
}

/// Namespaces that are prepared and wanted so. Held while one is changed: a pod may come back while its routes are being
/// taken away.
static WANTED: Mutex<BTreeSet<NetnsCookie>> = Mutex::new(BTreeSet::new());

/// Prepares `netns`; done twice it changes nothing. Blocks: a thread of its own enters the namespace.
pub fn prepare(netns: &Netns) -> Result<(), RoutesError> {
    let mut wanted = wanted();
    wanted.insert(netns.cookie());
    inside(netns, |handle, v6| async move {
        for (what, family) in families(v6) {
            added(handle.route().add(local_default(family)).execute().await).map_err(|e| (what, e))?;
            let mut request = handle.rule().add();
            *request.message_mut() = rule(family);
            added(request.execute().await).map_err(|e| (what, e))?;
        }
        if v6 {
            added(handle.route().add(mesh_prefix()).execute().await).map_err(|e| ("add the mesh's IPv6 prefix", e))?;
        }
        Ok(())
    })?;
    for (name, needed) in SYSCTLS {
        match write_sysctl(netns, name, if name.ends_with("rp_filter") { "0" } else { "1" }) {
            Err(e) if needed || e.kind() != io::ErrorKind::NotFound => {
                return Err(RoutesError::Sysctl { name, netns: text(netns), source: e });
            }
            _ => {}
        }
    }
    Ok(())
}

/// The pod has left; its routes may go when its connections have ended.
pub fn unwanted(netns: &Netns) {
    wanted().remove(&netns.cookie());
}

/// `restore`, unless the pod has come back.
pub fn restore_unwanted(netns: &Netns) -> Result<(), RoutesError> {
    let wanted = wanted();
    if wanted.contains(&netns.cookie()) { Ok(()) } else { restore(netns) }
}

/// Takes back what an agent that is gone did in these pods. They are found by looking at every network namespace of the
/// machine: what else would know them may be gone too. Returns what was done, a line each.
pub fn restore_all(pods: &[NetnsCookie]) -> Vec<String> {
    let mut left: BTreeSet<NetnsCookie> = pods.iter().copied().collect();
    let named = ["/run/netns", "/run/docker/netns"].map(std::path::Path::new).map(children).into_iter().flatten();
    let of_processes = children(std::path::Path::new("/proc")).into_iter().map(|process| process.join("ns/net"));
    let mut lines = Vec::new();
    for path in named.chain(of_processes) {
        if left.is_empty() {
            break;
        }
        let Ok(netns) = Netns::open(&path) else { continue };
        if left.remove(&netns.cookie()) {
            lines.push(match restore(&netns) {
                Ok(()) => format!("took back routes and rules in {}", path.display()),
                Err(e) => e.to_string(),
            });
        }
    }
    lines
}

fn children(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn wanted() -> MutexGuard<'static, BTreeSet<NetnsCookie>> {
    WANTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes back what `prepare` did; what is gone already is no error.
fn restore(netns: &Netns) -> Result<(), RoutesError> {
    inside(netns, |handle, v6| async move {
        for (what, family) in families(v6) {
            deleted(handle.rule().del(rule(family)).execute().await).map_err(|e| (what, e))?;
            deleted(handle.route().del(local_default(family)).execute().await).map_err(|e| (what, e))?;
        }
        if v6 {
            let done = handle.route().del(mesh_prefix()).execute().await;
            deleted(done).map_err(|e| ("delete the mesh's IPv6 prefix", e))?;
        }
        Ok(())
    })?;
    for (name, _) in SYSCTLS {
        match write_sysctl(netns, name, "0") {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(RoutesError::Sysctl { name, netns: text(netns), source: e });
            }
            _ => {}
        }
    }
    Ok(())
}

fn families(v6: bool) -> impl Iterator<Item = (&'static str, AddressFamily)> {
    let all = [("set the IPv4 route", AddressFamily::Inet), ("set the IPv6 route", AddressFamily::Inet6)];
    all.into_iter().take(if v6 { 2 } else { 1 })
}

/// `local default dev lo table 100`
fn local_default(family: AddressFamily) -> RouteMessage {
    let mut route = match family {
        AddressFamily::Inet6 => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(Ipv6Addr::UNSPECIFIED, 0),
        _ => return v4_default(),
    };
    route = route.kind(RouteType::Local).scope(RouteScope::Host).table_id(TABLE).output_interface(LO);
    route.build()
}

fn v4_default() -> RouteMessage {
    RouteMessageBuilder::<std::net::Ipv4Addr>::new()
        .destination_prefix(std::net::Ipv4Addr::UNSPECIFIED, 0)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .table_id(TABLE)
        .output_interface(LO)
        .build()
}

/// `lo` is the first interface of every network namespace.
const LO: u32 = 1;

/// `local fd6e:6d73:68::/64 dev lo`
fn mesh_prefix() -> RouteMessage {
    let [high, low] = mesh_common::MESH_V6_PREFIX.map(u32::from_be);
    let address = Ipv6Addr::from((u128::from(high) << 96) | (u128::from(low) << 64));
    RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(address, mesh_common::MESH_V6_PREFIX_LEN)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        // The table of local addresses, which is looked at first.
        .table_id(255)
        .output_interface(LO)
        .build()
}

/// `fwmark 0x111/0xfff lookup 100`
fn rule(family: AddressFamily) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = RuleAction::ToTable;
    rule.header.table = TABLE as u8;
    rule.attributes.push(RuleAttribute::Priority(PRIORITY));
    rule.attributes.push(RuleAttribute::FwMark(SPOOF_MARK));
    rule.attributes.push(RuleAttribute::FwMask(MARK_MASK));
    rule
}

fn added(done: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    ignoring(done, &[libc::EEXIST])
}

fn deleted(done: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    ignoring(done, &[libc::ENOENT, libc::ESRCH])
}

fn ignoring(done: Result<(), rtnetlink::Error>, errors: &[i32]) -> Result<(), rtnetlink::Error> {
    match done {
        Err(rtnetlink::Error::NetlinkError(e)) if errors.contains(&-e.raw_code()) => Ok(()),
        done => done,
    }
}

/// Runs netlink requests on a thread of their own inside `netns`; `v6` says whether the pod has IPv6.
fn inside<F>(netns: &Netns, work: impl FnOnce(Handle, bool) -> F + Send) -> Result<(), RoutesError>
where
    F: Future<Output = Result<(), (&'static str, rtnetlink::Error)>>,
{
    let netlink = |source| RoutesError::Netlink { netns: text(netns), source };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            netns.run(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(netlink)?;
                runtime.block_on(async {
                    let (connection, handle, _) = rtnetlink::new_connection().map_err(netlink)?;
                    tokio::spawn(connection);
                    let v6 = std::path::Path::new("/proc/sys/net/ipv6").exists();
                    work(handle, v6).await.map_err(|(what, source)| match source {
                        rtnetlink::Error::NetlinkError(e) if -e.raw_code() == libc::ENETDOWN => {
                            RoutesError::LoopbackDown { what, netns: text(netns) }
                        }
                        source => RoutesError::Route { what, netns: text(netns), source },
                    })
                })
            })
        });
        let done = thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside it panicked")));
        done.map_err(netlink)?
    })
}

fn write_sysctl(netns: &Netns, name: &str, value: &str) -> io::Result<()> {
    // /proc/sys/net shows the namespace of the thread that opens it.
    netns.run(|| std::fs::write(super::netns::host_proc().join("sys").join(name), value))?
}

fn text(netns: &Netns) -> String {
    netns.path().display().to_string()
}
