//! Layer-4 authorization as Istio has it: DENY first, then ALLOW, and with no ALLOW policy all pass.

use std::net::SocketAddr;

use crate::model::{SpiffeId, Workload};

/// What is judged.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// Proved by mutual TLS or by the kernel; `None` for plaintext.
    pub identity: Option<&'a SpiffeId>,
    pub source: SocketAddr,
    /// Where the application is reached: pod address and port.
    pub destination: SocketAddr,
}

/// Proof that a connection was judged and may pass. Made only by `authorize`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permit {
    _private: (),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// mTLS mode STRICT and no mutual TLS.
    Plaintext,
    /// A DENY policy matched: `namespace/name`.
    ByPolicy(String),
    /// ALLOW policies exist and none matched.
    NotAllowed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub result: Result<Permit, Denied>,
    /// AUDIT and dry-run policies that matched, `namespace/name`.
    pub audited: Vec<String>,
}

/// Judges a connection to `workload` by its mTLS mode and policies.
pub fn authorize(_workload: &Workload, _connection: &Connection<'_>) -> Verdict {
    unimplemented!()
}
