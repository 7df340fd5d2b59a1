#![no_std]
//! Types shared by the kernel programs (`mesh-ebpf`) and the node agent (`mesh-agent`): what lies in the maps, byte for
//! byte. In: nothing. Out: `#[repr(C)]` types without implicit padding, their sizes asserted, and the names and numbers
//! that both sides must agree on.
//!
//! A change to any type here is a change of the pinned maps' layout: raise [`SCHEMA`] with it.

mod addr;
mod maps;
mod settings;

pub use addr::{Addr, Ip, SockTuple};
pub use maps::{
    ATTESTED_ENTRIES, ATTESTED_TTL_NANOS, Attested, COUNTERS, ENROLLED_ENTRIES, Event, ORIG_DST_ENTRIES,
    POD_ADDRS_ENTRIES, PROBE_CGROUPS_ENTRIES, PodEntry, SCHEMA, SocketDst, map, slot,
};
pub use settings::{
    HBONE_PORT, MESH_V6_PREFIX, MESH_V6_PREFIX_LEN, OUTBOUND_PORT, PLAIN_PORT, SPREAD_V4, SPREAD_V4_MASK, global,
    program,
};
