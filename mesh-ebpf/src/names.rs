//! cgroup/getpeername4/6, getsockname4/6 (5.8): the app sees whom it meant to call, and its pod's address.
//!
//! Maps read: SOCKET_DST. Verdict: always 1; only the address told is changed.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::{Addr, Ip, SocketDst};

use crate::context::{field, set_user_ip4, set_user_ip6, set_user_port, socket, storage, user_addr4, user_addr6};
use crate::maps::SOCKET_DST;

#[cgroup_sock_addr(getpeername4)]
pub fn mesh_peername4(ctx: SockAddrContext) -> i32 {
    if let Some(dst) = asked_for(ctx.sock_addr, &user_addr4(ctx.sock_addr)) {
        set_user_ip4(ctx.sock_addr, &dst.ip);
        set_user_port(ctx.sock_addr, dst.port);
    }
    1
}

#[cgroup_sock_addr(getpeername6)]
pub fn mesh_peername6(ctx: SockAddrContext) -> i32 {
    if let Some(dst) = asked_for(ctx.sock_addr, &user_addr6(ctx.sock_addr)) {
        set_user_ip6(ctx.sock_addr, &dst.ip);
        set_user_port(ctx.sock_addr, dst.port);
    }
    1
}

#[cgroup_sock_addr(getsockname4)]
pub fn mesh_sockname4(ctx: SockAddrContext) -> i32 {
    if let Some(ip) = own_address(ctx.sock_addr, &user_addr4(ctx.sock_addr).ip) {
        set_user_ip4(ctx.sock_addr, &ip);
    }
    1
}

#[cgroup_sock_addr(getsockname6)]
pub fn mesh_sockname6(ctx: SockAddrContext) -> i32 {
    if let Some(ip) = own_address(ctx.sock_addr, &user_addr6(ctx.sock_addr).ip) {
        set_user_ip6(ctx.sock_addr, &ip);
    }
    1
}

/// The storage of an earlier connection of the same socket does not count: its peer is another now.
#[inline(always)]
fn asked_for(ctx: *mut bpf_sock_addr, peer: &Addr) -> Option<Addr> {
    let known = storage::<SocketDst, _>(&SOCKET_DST, socket(ctx))?;
    known.via.same(peer).then_some(known.dst)
}

/// Where the pod's address could not be bound, because the app had bound a port before, the kernel has chosen a loopback
/// address as the source of a redirected connection.
#[inline(always)]
fn own_address(ctx: *mut bpf_sock_addr, local: &Ip) -> Option<Ip> {
    let sk = socket(ctx);
    let known = storage::<SocketDst, _>(&SOCKET_DST, sk)?;
    let unknown = known.local.same(&Ip::UNSPECIFIED);
    let connected_to_agent = u16::from_be(field!(sk, dst_port)) == known.via.port;
    let loopback = local.is_v4() && local.0[3].to_ne_bytes()[0] == 127;
    (!unknown && connected_to_agent && (loopback || local.same(&known.via.ip))).then_some(known.local)
}
