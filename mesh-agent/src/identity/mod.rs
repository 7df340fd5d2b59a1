//! Workload certificates: made on this node, signed by the CA, renewed at half their life.

use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::model::SpiffeId;

/// What one identity needs for both ends of a TLS connection. Swapped whole at rotation.
pub struct WorkloadTls {
    pub identity: SpiffeId,
    /// ALPN not set: the transport clones and sets it once when it takes a new certificate into use.
    pub client: Arc<rustls::ClientConfig>,
    pub server: Arc<rustls::ServerConfig>,
    pub not_after: SystemTime,
}

/// The certificates of this node's workloads. Cheap to clone, `Send + Sync`.
#[derive(Clone)]
pub struct Certificates {}

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

impl Certificates {
    /// The present certificate of `identity`, if there is one that has not expired. Takes no lock.
    pub fn get(&self, _identity: &SpiffeId) -> Option<Arc<WorkloadTls>> {
        unimplemented!()
    }

    /// Asks for a certificate and waits until it is there. `Err` is a sentence: what failed, when it is tried again
    /// (in the background, for as long as the identity is wanted).
    pub async fn ensure(&self, _identity: &SpiffeId) -> Result<(), String> {
        unimplemented!()
    }

    /// The last pod with this identity has left: its key is dropped.
    pub fn release(&self, _identity: &SpiffeId) {
        unimplemented!()
    }

    pub fn list(&self) -> Vec<CertificateInfo> {
        unimplemented!()
    }
}
