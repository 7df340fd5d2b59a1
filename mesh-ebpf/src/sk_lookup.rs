//! sk_lookup (5.9; ingress_ifindex 5.17), one instance per pod, in its netns: connections from outside go to the agent's
//! listener there.
//!
//! Maps read: LISTENERS, POD_ADDRS, ATTESTED. Written: COUNTS.
//! Verdict: SK_PASS with a listener assigned; SK_PASS without (the app itself) for loopback, the pod itself,
//! the agent and attested probes; SK_DROP
//! where the agent is not there: the client sees a reset, never the app.

use aya_ebpf::bindings::bpf_sk_lookup;
use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use aya_log_ebpf::info;
use mesh_common::{ATTESTED_TTL_NANOS, Addr, Event, HBONE_PORT, Ip, SockTuple, slot};

use crate::context::{field, field_ip6};
use crate::enrolled;
use crate::maps::{ATTESTED, LISTENERS, POD_INDEX, count};

const IPPROTO_TCP: u32 = 6;
const AF_INET6: u32 = 10;
/// In every netns.
const LOOPBACK_IFINDEX: u32 = 1;
const ENOENT: i32 = 2;

#[sk_lookup]
pub fn mesh_sk_lookup(cx: SkLookupContext) -> u32 {
    let ctx = cx.lookup;
    if field!(ctx, protocol) != IPPROTO_TCP || field!(ctx, ingress_ifindex) == LOOPBACK_IFINDEX {
        return SK_PASS;
    }
    if let Some(why) = goes_to_app(ctx) {
        count(why);
        return SK_PASS;
    }
    let (which, event) = if field!(ctx, local_port) == u32::from(HBONE_PORT) {
        (slot::HBONE, Event::SteeredHbone)
    } else {
        (slot::PLAIN, Event::SteeredPlain)
    };
    match LISTENERS.redirect_sk_lookup(&cx, POD_INDEX.load() * slot::PER_POD + which, 0) {
        Ok(()) => {
            count(event);
            SK_PASS
        }
        Err(error) => {
            count(if error == -ENOENT { Event::DroppedNoListener } else { Event::DroppedAssign });
            info!(&cx, "connection to pod {} dropped: {}", POD_INDEX.load(), error);
            SK_DROP
        }
    }
}

/// The pod calls itself; or sockops saw the agent, or a probe, open this very connection to this very pod.
///
/// A SYN from outside with the pod's own address as its source gets nobody in: the answer goes to the pod itself.
#[inline(always)]
fn goes_to_app(ctx: *mut bpf_sk_lookup) -> Option<Event> {
    // All fields are read before the family is looked at, see `sockops::tuple_of`.
    let (local4, remote4) = (Ip::v4(field!(ctx, local_ip4)), Ip::v4(field!(ctx, remote_ip4)));
    let (local6, remote6) = (field_ip6!(ctx, local_ip6), field_ip6!(ctx, remote_ip6));
    let (local, remote) = if field!(ctx, family) == AF_INET6 { (local6, remote6) } else { (local4, remote4) };
    let client = Addr::new(remote, u16::from_be(field!(ctx, remote_port)));
    let server = Addr::new(local, field!(ctx, local_port) as u16);
    let pod_index = POD_INDEX.load();
    if enrolled::is_address_of(pod_index, &client.ip) {
        return Some(Event::PassedSelf);
    }
    // SAFETY: NO_PREALLOC, see `enrolled::pod`.
    let attested = unsafe { ATTESTED.get(SockTuple::new(0, client, server)) }?;
    // SAFETY: a plain helper.
    let age = unsafe { bpf_ktime_get_ns() }.wrapping_sub(attested.at_nanos);
    (attested.pod_index == pod_index && age < ATTESTED_TTL_NANOS).then_some(Event::PassedAttested)
}
