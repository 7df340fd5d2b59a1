//! The facts of one connection: written once by the data path, read by metrics and access log.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::model::{Service, SpiffeId, Workload};

/// Which of Istio's two reporters speaks: the client's side or the server's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    Source,
    Destination,
}

/// How the bytes travelled between client's and server's node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    /// Mutual TLS, or, on one node, an identity that the kernel attests; label `mutual_tls`.
    MutualTls,
    /// Plaintext; label `unknown`, as Istio has it.
    None,
}

/// Istio's response flags, as ztunnel and Envoy write them for TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResponseFlag {
    /// `-`
    None,
    /// `DENY`: an authorization policy, or mTLS STRICT, refused it.
    Denied,
    /// `CONNECT`: the destination could not be reached.
    ConnectFailure,
    /// `TLS_FAILURE`: no mutual TLS could be agreed.
    TlsFailure,
    /// `H2_HANDSHAKE_FAILURE`: TLS stood, the tunnel did not.
    TunnelFailure,
    /// `IDENTITY_ERROR`: the peer's certificate is another workload's, or we have none of our own.
    IdentityError,
    /// `NR`: the destination is not in the mesh and the mesh is closed, or a service has no such port.
    NoRoute,
    /// `UH`: no endpoint of the service is ready.
    NoHealthyUpstream,
    /// `POLICY_CHANGED`: an open connection that a new policy no longer allows.
    PolicyChanged,
}

/// One end of a connection.
#[derive(Debug, Clone, Default)]
pub struct Party {
    pub address: Option<SocketAddr>,
    pub workload: Option<Arc<Workload>>,
    /// The identity that was proved, not the one that the workload claims.
    pub identity: Option<SpiffeId>,
}

/// What is known of a connection when it opens.
#[derive(Debug, Clone)]
pub struct Facts {
    pub reporter: Reporter,
    pub source: Party,
    /// `address` is where bytes are sent to: `ip:15008` for a tunnel.
    pub destination: Party,
    /// The real target inside a tunnel.
    pub hbone_address: Option<SocketAddr>,
    pub service: Option<Arc<Service>>,
    pub security: Security,
}

/// What is known when it ends.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub flag: ResponseFlag,
    /// From the client to the server.
    pub bytes_sent: u64,
    /// From the server to the client.
    pub bytes_received: u64,
    pub duration: Duration,
    /// One lower-case sentence, where it did not end well.
    pub error: Option<String>,
    /// Names (`namespace/name`) of AUDIT and dry-run policies that matched.
    pub audited: Vec<String>,
}

impl ResponseFlag {
    /// In the order of their declaration: `flag as usize` is the place of `flag`.
    pub const ALL: [Self; 9] = [
        Self::None,
        Self::Denied,
        Self::ConnectFailure,
        Self::TlsFailure,
        Self::TunnelFailure,
        Self::IdentityError,
        Self::NoRoute,
        Self::NoHealthyUpstream,
        Self::PolicyChanged,
    ];

    /// As the label `response_flags` and the access log have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Denied => "DENY",
            Self::ConnectFailure => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::TunnelFailure => "H2_HANDSHAKE_FAILURE",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::NoRoute => "NR",
            Self::NoHealthyUpstream => "UH",
            Self::PolicyChanged => "POLICY_CHANGED",
        }
    }
}
