//! Open connections: judged again when policy changes, listed for `meshctl connections`.

use serde::{Deserialize, Serialize};

/// One open connection, for `meshctl connections`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionInfo {
    /// `outbound` or `inbound`.
    pub direction: String,
    /// The pod of this node, `namespace/name`.
    pub pod: String,
    pub source: String,
    pub destination: String,
    pub service: Option<String>,
    /// The peer's proved identity.
    pub peer_identity: Option<String>,
    /// `hbone`, `nodemesh`, `local` (same node, in the agent) or `plain`.
    pub transport: String,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub age_seconds: u64,
}
