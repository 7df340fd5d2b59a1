//! sockops (netns cookie 5.15): the tuple of a redirected connection, with its ports, before its SYN leaves.
//!
//! Maps read: ENROLLED, POD_ADDRS, SOCKET_DST, OWN, PROBE_SOCK. Written: ORIG_DST, ATTESTED, COUNTS.
//! Verdict: none. An insert that fails is counted; the agent then finds no destination and resets the connection.

use aya_ebpf::bindings::{
    BPF_ANY, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, bpf_sock,
    bpf_sock_ops,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_sock_ops_cb_flags_set};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use mesh_common::{Addr, Attested, Event, Ip, SockTuple, SocketDst};

use crate::context::{field, field_ip6, storage};
use crate::enrolled;
use crate::maps::{ATTESTED, NODE_NETNS, ORIG_DST, PROBE_SOCK, SOCKET_DST, count};

const AF_INET6: u32 = 10;

#[sock_ops]
pub fn mesh_sockops(cx: SockOpsContext) -> u32 {
    let ctx = cx.ops;
    match field!(ctx, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        // Asked for below, on our own sockets only; other programs ask for it on theirs.
        BPF_SOCK_OPS_STATE_CB if field!(ctx, __bindgen_anon_1.args[1]) == BPF_TCP_CLOSE => closed(ctx),
        _ => {}
    }
    1
}

#[inline(always)]
fn connecting(ctx: *mut bpf_sock_ops) {
    // SAFETY: a plain helper on a valid context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    if let Some(pod) = enrolled::pod(netns) {
        let Some(sk) = socket(ctx) else { return };
        match storage::<SocketDst, _>(&SOCKET_DST, sk) {
            Some(known) => remember_destination(ctx, known, netns),
            None => attest_agent(ctx, sk, pod.index),
        }
    } else if netns == NODE_NETNS.load() {
        attest_probe(ctx);
    }
}

#[inline(always)]
fn remember_destination(ctx: *mut bpf_sock_ops, known: &SocketDst, netns: u64) {
    let tuple = tuple_of(ctx, netns);
    if !known.via.same(&Addr::new(tuple.remote_ip, tuple.remote_port)) {
        return;
    }
    let dst = known.dst;
    if ORIG_DST.insert(tuple, dst, u64::from(BPF_ANY)).is_err() {
        count(Event::OrigDstFull);
        return;
    }
    ask_for_close(ctx);
}

/// The agent's own connection to the app in this pod, with the client's address as its source. It does not leave the
/// pod, but sk_lookup cannot see that: for connections to an own address the kernel tells the address's device as the
/// ingress, not loopback.
#[inline(always)]
fn attest_agent(ctx: *mut bpf_sock_ops, sk: *mut bpf_sock, pod_index: u32) {
    if !enrolled::is_own(sk) {
        return;
    }
    let tuple = tuple_of(ctx, 0);
    // From an own address sk_lookup lets it pass anyway.
    if enrolled::is_address_of(pod_index, &tuple.remote_ip) && !enrolled::is_address_of(pod_index, &tuple.local_ip) {
        attest(ctx, &tuple, pod_index, Event::AgentAttested);
    }
}

#[inline(always)]
fn attest_probe(ctx: *mut bpf_sock_ops) {
    let Some(sk) = socket(ctx) else { return };
    let Some(index) = storage::<u32, _>(&PROBE_SOCK, sk) else { return };
    attest(ctx, &tuple_of(ctx, 0), *index, Event::ProbeAttested);
}

#[inline(always)]
fn attest(ctx: *mut bpf_sock_ops, tuple: &SockTuple, pod_index: u32, event: Event) {
    // SAFETY: a plain helper.
    let at_nanos = unsafe { bpf_ktime_get_ns() };
    let attested = Attested { at_nanos, pod_index, pad: 0 };
    if ATTESTED.insert(tuple, attested, u64::from(BPF_ANY)).is_err() {
        count(Event::AttestedFull);
        return;
    }
    count(event);
    ask_for_close(ctx);
}

#[inline(always)]
fn ask_for_close(ctx: *mut bpf_sock_ops) {
    let flags = field!(ctx, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    // SAFETY: a plain helper. Flags of other programs stay.
    unsafe { bpf_sock_ops_cb_flags_set(ctx, flags as i32) };
}

/// Takes back what nobody fetched. The pod may have left the mesh since: the socket's storage tells, not ENROLLED.
#[inline(always)]
fn closed(ctx: *mut bpf_sock_ops) {
    let Some(sk) = socket(ctx) else { return };
    // SAFETY: a plain helper on a valid context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    if storage::<SocketDst, _>(&SOCKET_DST, sk).is_some() {
        let _ = ORIG_DST.remove(tuple_of(ctx, netns));
    } else {
        // Asked for by another program's flag: there is none.
        let _ = ATTESTED.remove(tuple_of(ctx, 0));
    }
}

#[inline(always)]
fn socket(ctx: *mut bpf_sock_ops) -> Option<*mut bpf_sock> {
    // SAFETY: reads the pointer only; the verifier asks for the null check.
    let sk = unsafe { core::ptr::read_volatile(&raw const (*ctx).__bindgen_anon_2.sk) };
    (!sk.is_null()).then_some(sk)
}

/// As the client has it. `local_port` is in host order, `remote_port` in network order in the upper half of the word.
///
/// All fields are read before the family is looked at: of reads in two branches LLVM makes one with a variable offset,
/// which the verifier refuses.
#[inline(always)]
fn tuple_of(ctx: *mut bpf_sock_ops, netns: u64) -> SockTuple {
    let (local4, remote4) = (Ip::v4(field!(ctx, local_ip4)), Ip::v4(field!(ctx, remote_ip4)));
    let (local6, remote6) = (field_ip6!(ctx, local_ip6), field_ip6!(ctx, remote_ip6));
    let local_port = field!(ctx, local_port) as u16;
    let remote_port = u32::from_be(field!(ctx, remote_port)) as u16;
    let (local, remote) = if field!(ctx, family) == AF_INET6 { (local6, remote6) } else { (local4, remote4) };
    SockTuple::new(netns, Addr::new(local, local_port), Addr::new(remote, remote_port))
}
