//! cgroup/connect4, connect6 (4.17; bpf_set_retval 6.1): remember where an enrolled pod's TCP socket wants to go, and
//! point it at the agent's listener in the pod's netns.
//!
//! Maps read: ENROLLED, OWN, POD_ADDRS. Written: SOCKET_DST, PROBE_SOCK, COUNTS.
//! Verdict: 1 goes on, with the address as it now stands; 0 refuses, the app sees ECONNREFUSED. Whatever goes wrong for
//! an enrolled pod refuses.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr, sockaddr};
use aya_ebpf::helpers::generated::{bpf_bind, bpf_get_socket_cookie, bpf_set_retval, bpf_setsockopt};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::{debug, info};
use mesh_common::{
    Addr, Event, HBONE_PORT, Ip, MESH_V6_PREFIX, OUTBOUND_PORT, PLAIN_PORT, PodEntry, SPREAD_V4, SPREAD_V4_MASK,
    SocketDst,
};

use crate::context::{
    drop_storage, field, set_user_ip4, set_user_ip6, set_user_port, socket, storage, storage_or_insert, user_addr4,
    user_addr6,
};
use crate::enrolled;
use crate::maps::{PROBE_SOCK, SOCKET_DST, count};

const ALLOW: i32 = 1;
const DENY: i32 = 0;

const ECONNREFUSED: i32 = 111;
const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;

/// The family of the hook, that is of the socket: an AF_INET6 socket reaches IPv4 through connect6.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    V4,
    V6,
}

#[cgroup_sock_addr(connect4)]
pub fn mesh_connect4(ctx: SockAddrContext) -> i32 {
    connect(&ctx, Family::V4)
}

#[cgroup_sock_addr(connect6)]
pub fn mesh_connect6(ctx: SockAddrContext) -> i32 {
    connect(&ctx, Family::V6)
}

#[inline(always)]
fn connect(cx: &SockAddrContext, family: Family) -> i32 {
    let ctx = cx.sock_addr;
    let netns = enrolled::netns_of(ctx);
    let Some(pod) = enrolled::pod(netns) else {
        mark_probe(ctx, netns, family);
        return ALLOW;
    };
    if field!(ctx, type_) != SOCK_STREAM || field!(ctx, protocol) != IPPROTO_TCP {
        return ALLOW;
    }
    let sk = socket(ctx);
    if enrolled::is_own(sk) {
        count(Event::OwnSocket);
        return ALLOW;
    }
    let dst = user_addr(ctx, family);
    // Two copies of what follows, each with the family known: one copy with both has more paths than the verifier walks.
    if family == Family::V4 || dst.ip.is_v4() {
        judge(cx, sk, pod, dst, family, true)
    } else {
        judge(cx, sk, pod, dst, family, false)
    }
}

/// `v4`: is the destination IPv4, whatever the socket's family?
#[inline(always)]
fn judge(cx: &SockAddrContext, sk: *mut bpf_sock, pod: &PodEntry, dst: Addr, family: Family, v4: bool) -> i32 {
    if in_redirect_range(&dst.ip, v4) {
        return redirected_before(sk, &dst);
    }
    if is_loopback(&dst.ip, v4) || enrolled::is_address_of(pod.index, &dst.ip) {
        if dst.port == OUTBOUND_PORT || dst.port == PLAIN_PORT || dst.port == HBONE_PORT {
            return deny(cx, Event::DeniedAgentPort);
        }
        return leave_alone(sk);
    }
    if is_link_local_or_multicast(&dst.ip, v4) {
        return leave_alone(sk);
    }
    redirect(cx, sk, pod, dst, family, v4)
}

#[inline(always)]
fn user_addr(ctx: *mut bpf_sock_addr, family: Family) -> Addr {
    match family {
        Family::V4 => user_addr4(ctx),
        Family::V6 => user_addr6(ctx),
    }
}

#[inline(always)]
fn redirect(cx: &SockAddrContext, sk: *mut bpf_sock, pod: &PodEntry, dst: Addr, family: Family, v4: bool) -> i32 {
    let ctx = cx.sock_addr;
    if !release_device(ctx, sk) {
        return deny(cx, Event::DeniedDevice);
    }
    let local = if v4 { pod.v4 } else { pod.v6 };
    let has_local = !local.same(&Ip::UNSPECIFIED);
    if has_local && is_unbound(sk, family) && !bind(ctx, &local, family) {
        return deny(cx, Event::DeniedBind);
    }
    // SAFETY: a plain helper on a valid context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let via = Addr::new(spread(cookie, v4), OUTBOUND_PORT);
    let mut value = SocketDst { dst, via, local };
    let Some(kept) = storage_or_insert(&SOCKET_DST, sk, &mut value) else {
        return deny(cx, Event::DeniedStorage);
    };
    // An older value: the socket was connected before (AF_UNSPEC takes it back).
    *kept = value;
    match family {
        Family::V4 => set_user_ip4(ctx, &via.ip),
        Family::V6 => set_user_ip6(ctx, &via.ip),
    }
    set_user_port(ctx, OUTBOUND_PORT);
    count(if v4 { Event::RedirectedV4 } else { Event::RedirectedV6 });
    debug!(cx, "pod {} redirected, port {}", pod.index, dst.port);
    ALLOW
}

/// The redirect range may not be called directly. During an upgrade two generations of this program run one after the
/// other on the same `connect`; the second one finds what the first one wrote.
#[inline(always)]
fn redirected_before(sk: *mut bpf_sock, dst: &Addr) -> i32 {
    match storage::<SocketDst, _>(&SOCKET_DST, sk) {
        Some(known) if known.via.same(dst) => ALLOW,
        _ => {
            refuse();
            count(Event::DeniedAgentPort);
            DENY
        }
    }
}

#[inline(always)]
fn leave_alone(sk: *mut bpf_sock) -> i32 {
    drop_storage(&SOCKET_DST, sk);
    count(Event::LeftAlone);
    ALLOW
}

#[inline(always)]
fn deny(cx: &SockAddrContext, why: Event) -> i32 {
    refuse();
    count(why);
    info!(cx, "connect denied, reason {}", why as u32);
    DENY
}

#[inline(always)]
fn refuse() {
    // SAFETY: a plain helper. EPERM, the kernel's own choice, is an error that apps do not retry.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
}

/// A socket that is bound to a device cannot reach loopback: the connection would hang.
#[inline(always)]
fn release_device(ctx: *mut bpf_sock_addr, sk: *mut bpf_sock) -> bool {
    if field!(sk, bound_dev_if) == 0 {
        return true;
    }
    let mut none = [0u8; 16];
    // SAFETY: a plain helper with an initialised buffer of the length told.
    let done =
        unsafe { bpf_setsockopt(ctx.cast(), SOL_SOCKET, SO_BINDTODEVICE, none.as_mut_ptr().cast(), none.len() as i32) };
    if done == 0 {
        count(Event::DeviceCleared);
    }
    done == 0
}

#[inline(always)]
fn is_unbound(sk: *mut bpf_sock, family: Family) -> bool {
    let port = field!(sk, src_port);
    let ip = match family {
        Family::V4 => field!(sk, src_ip4),
        Family::V6 => field!(sk, src_ip6[0]) | field!(sk, src_ip6[1]) | field!(sk, src_ip6[2]) | field!(sk, src_ip6[3]),
    };
    port == 0 && ip == 0
}

#[repr(C)]
struct SockAddrIn {
    family: u16,
    port: u16,
    addr: u32,
    zero: [u32; 2],
}

#[repr(C)]
struct SockAddrIn6 {
    family: u16,
    port: u16,
    flow: u32,
    addr: [u32; 4],
    scope: u32,
}

/// Binds the pod's address, with the port left to `connect`: so `getsockname` is true, and the agent sees it as the peer.
#[inline(always)]
fn bind(ctx: *mut bpf_sock_addr, local: &Ip, family: Family) -> bool {
    match family {
        Family::V4 => {
            let mut addr = SockAddrIn { family: AF_INET, port: 0, addr: local.0[3], zero: [0; 2] };
            // SAFETY: a plain helper with an initialised address of the length told.
            unsafe { bpf_bind(ctx, (&raw mut addr).cast::<sockaddr>(), size_of::<SockAddrIn>() as i32) == 0 }
        }
        Family::V6 => {
            let mut addr = SockAddrIn6 { family: AF_INET6, port: 0, flow: 0, addr: local.0, scope: 0 };
            // SAFETY: as above.
            unsafe { bpf_bind(ctx, (&raw mut addr).cast::<sockaddr>(), size_of::<SockAddrIn6>() as i32) == 0 }
        }
    }
}

/// An address of the redirect range, chosen by the socket: each has its own ephemeral ports.
#[inline(always)]
fn spread(cookie: u64, v4: bool) -> Ip {
    let low = cookie as u32;
    if v4 {
        return Ip::v4((SPREAD_V4 | (low & SPREAD_V4_MASK)).to_be());
    }
    // Never zero: that is the subnet router's anycast address.
    Ip([MESH_V6_PREFIX[0], MESH_V6_PREFIX[1], ((cookie >> 32) as u32).to_be(), (low | 1).to_be()])
}

#[inline(always)]
fn in_redirect_range(ip: &Ip, v4: bool) -> bool {
    if v4 {
        return u32::from_be(ip.0[3]) & !SPREAD_V4_MASK == SPREAD_V4;
    }
    ip.0[0] == MESH_V6_PREFIX[0] && ip.0[1] == MESH_V6_PREFIX[1]
}

/// Loopback, or unspecified, which the kernel takes for loopback.
#[inline(always)]
fn is_loopback(ip: &Ip, v4: bool) -> bool {
    if v4 {
        return ip.0[3].to_ne_bytes()[0] == 127 || ip.0[3] == 0;
    }
    ip.0[0] == 0 && ip.0[1] == 0 && ip.0[2] == 0 && u32::from_be(ip.0[3]) <= 1
}

#[inline(always)]
fn is_link_local_or_multicast(ip: &Ip, v4: bool) -> bool {
    if v4 {
        let host = u32::from_be(ip.0[3]);
        return host >> 16 == 0xa9fe || host >> 28 == 0xe || host == u32::MAX;
    }
    let first = u32::from_be(ip.0[0]) >> 16;
    first & 0xffc0 == 0xfe80 || first >> 8 == 0xff
}

/// Notes on the socket that it is a probe; sockops knows its ports later.
#[inline(always)]
fn mark_probe(ctx: *mut bpf_sock_addr, netns: u64, family: Family) {
    let dst = user_addr(ctx, family);
    let Some(mut index) = enrolled::probed_pod(netns, &dst.ip) else { return };
    if field!(ctx, protocol) != IPPROTO_TCP {
        return;
    }
    if let Some(kept) = storage_or_insert(&PROBE_SOCK, socket(ctx), &mut index) {
        *kept = index;
    }
}

const _: () = assert!(size_of::<SockAddrIn>() == 16 && size_of::<SockAddrIn6>() == 28);
