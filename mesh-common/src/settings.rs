//! Ports (a pod may not call these on itself: the agent would call itself), the redirect range, and the read-only globals that the agent sets before it loads the programs.

/// The agent's listener for connections of the pod itself.
pub const OUTBOUND_PORT: u16 = 15001;
/// The agent's listener for plaintext from outside.
pub const PLAIN_PORT: u16 = 15006;
/// The agent's listener for HBONE.
pub const HBONE_PORT: u16 = 15008;

/// 127.64.0.0/10 (host byte order): redirected sockets are spread over it, so that a pod has 4 million times its
/// ephemeral ports and not one time.
pub const SPREAD_V4: u32 = 0x7f40_0000;
/// Bits of the address within the range.
pub const SPREAD_V4_MASK: u32 = 0x003f_ffff;

/// fd6e:6d73:68::/64, the same for IPv6, where loopback is a single address. Enrolment makes it local to the pod:
/// `ip -6 route add local fd6e:6d73:68::/64 dev lo`. Words in network byte order.
pub const MESH_V6_PREFIX: [u32; 2] = [0xfd6e_6d73_u32.to_be(), 0x0068_0000_u32.to_be()];
pub const MESH_V6_PREFIX_LEN: u8 = 64;

/// Names of the read-only globals.
pub mod global {
    /// u32: which pod this instance of `sk_lookup` serves.
    pub const POD_INDEX: &str = "POD_INDEX";
    /// u64: netns cookie of the node.
    pub const NODE_NETNS: &str = "NODE_NETNS";
    /// u8: aya-log's level; 0: no output, and the verifier removes the code.
    pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
}

/// Names of the programs.
pub mod program {
    pub const CONNECT4: &str = "mesh_connect4";
    pub const CONNECT6: &str = "mesh_connect6";
    pub const PEERNAME4: &str = "mesh_peername4";
    pub const PEERNAME6: &str = "mesh_peername6";
    pub const SOCKNAME4: &str = "mesh_sockname4";
    pub const SOCKNAME6: &str = "mesh_sockname6";
    pub const SOCKOPS: &str = "mesh_sockops";
    pub const SK_LOOKUP: &str = "mesh_sk_lookup";

    /// Those at the cgroup root, in the order in which they are attached: what writes the original destination is there
    /// before what relies on it.
    pub const CGROUP: [&str; 7] = [SOCKOPS, PEERNAME4, PEERNAME6, SOCKNAME4, SOCKNAME6, CONNECT4, CONNECT6];
}
