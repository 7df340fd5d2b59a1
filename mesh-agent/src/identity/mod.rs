//! Workload certificates: made on this node, signed by the CA, renewed at half their life.
//! In: the identities of the pods here, a CA (in this process or at the controller). Out: TLS configurations.

mod authority;
mod bundle;
mod ca_client;
mod ca_server;
mod certificates;
mod csr;
mod document;
mod issuer;
mod join_token;
mod material;
mod root_rotation;
mod rotation;
mod rpc;
mod serving;
#[cfg(test)]
mod testing;
mod tls;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use x509_parser::time::ASN1Time;

use crate::model::SpiffeId;

pub use crate::lifecycle::files::FileError;
pub use authority::{Ca, CaError, CaOptions, DEFAULT_LIFETIME, MIN_LIFETIME, trusted_roots};
pub use bundle::{Bundle, BundleError, Validity, sha256_hex, validities};
pub use ca_client::{CA_ROOT, CA_ROOT_KEY, CaClient, CaClientError, CaClientOptions, Credential};
pub use ca_server::{
    Accounts, CONTROLLER_NAME, CaServerError, CaServerOptions, DEFAULT_PORT, Refusal, RunsOn, bind, serve,
};
pub use certificates::{CertificateOptions, Certificates};
pub use csr::{CsrError, VerifiedCsr};
pub use document::{Document, Next};
pub use issuer::IssuerError;
pub use join_token::{Claims, DEFAULT_TOKEN_LIFE, JoinTokens, TokenError};
pub use rotation::Clock;
pub use serving::server_tls;
/// Makes our cryptography the process's default, for what is configured elsewhere (gRPC).
pub fn install_provider() {
    // A second call finds the first's, which is the same.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

pub use tls::{
    ALPN_H2, ALPN_NODEMESH, PeerError, Trust, client_config, describe, peer_identity, provider, server_config,
};

/// What one identity needs for both ends of a TLS connection. Swapped whole at rotation.
pub struct WorkloadTls {
    pub identity: SpiffeId,
    /// Offers `nodemesh/1`, then `h2`.
    pub client: Arc<rustls::ClientConfig>,
    /// Offers `h2` alone, for peers that are no agents of ours or where the lean tunnel is switched off.
    pub client_h2: Arc<rustls::ClientConfig>,
    /// Takes `nodemesh/1` before `h2`, and refuses a client that offers neither.
    pub server: Arc<rustls::ServerConfig>,
    pub not_after: SystemTime,
}

/// For `meshctl certificates`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateInfo {
    pub identity: String,
    /// `ready`, `renewing`, `waiting` or `expired`.
    pub state: String,
    pub serial: String,
    pub not_before: String,
    pub not_after: String,
    /// SHA-256 of the roots that are trusted, short.
    pub roots: Vec<String>,
    /// Why the last renewal failed, with the next try.
    pub problem: Option<String>,
}

fn system_time(time: &ASN1Time) -> SystemTime {
    let seconds = time.timestamp();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { SystemTime::UNIX_EPOCH - distance } else { SystemTime::UNIX_EPOCH + distance }
}

fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let Ok(time) = ASN1Time::from_timestamp(seconds.try_into().unwrap_or(i64::MAX)) else {
        return format!("{seconds} s after 1970");
    };
    let t = time.to_datetime();
    let (month, hour, minute, second) = (u8::from(t.month()), t.hour(), t.minute(), t.second());
    format!("{:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", t.year(), t.day())
}
