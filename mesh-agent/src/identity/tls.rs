//! TLS between workloads: what both ends offer, and what they demand of the peer.
//! In: a leaf with its key, the trust bundle. Out: rustls configurations, built once per certificate and shared by all
//! connections; after the handshake, `peer_identity` says who the peer is.

use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig,
    SignatureScheme, version,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{Bundle, WorkloadTls};
use crate::model::{IdentityError, SpiffeId, TrustDomain};

/// The leaner tunnel between two agents of ours.
pub const ALPN_NODEMESH: &[u8] = b"nodemesh/1";
/// HBONE, the common language with Istio ambient.
pub const ALPN_H2: &[u8] = b"h2";

/// TLS 1.3 only. Post-quantum key exchange first. AES-128 first since it is faster and as strong as P-256 leaves;
/// ChaCha20 is not offered: the nodes have AES instructions, and Istio ambient has only these two.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ],
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
        ],
        ..aws_lc_rs::default_provider()
    })
});

pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

/// Why a peer's certificate names no identity of a mesh.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("the peer has shown no certificate; a workload in the mesh must present one")]
    NoCertificate,
    #[error("the peer's certificate can't be read ({0})")]
    Parse(String),
    #[error("the peer's certificate has no URI name; a workload certificate must have one SPIFFE id")]
    NoUri,
    #[error("the peer's certificate has {0} URI names; a workload certificate must have exactly one")]
    ManyUris(usize),
    #[error("the peer's certificate has a foreign name: {0}")]
    Shape(#[from] IdentityError),
    #[error("the peer `{0}` is of trust domain `{1}`, which is not trusted here; add it to the trust domains")]
    TrustDomain(SpiffeId, TrustDomain),
}

/// As `Display`: rustls prints a verifier's own error with `Debug`, and that text ends up in access logs.
impl fmt::Debug for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Who has proved itself with `chain`, the peer's certificates as rustls hands them out after the handshake.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| PeerError::Parse(e.to_string()))?;
    let names = leaf.subject_alternative_name().map_err(|e| PeerError::Parse(e.to_string()))?;
    let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    let uris: Vec<&str> =
        names.iter().filter_map(|n| if let GeneralName::URI(uri) = n { Some(*uri) } else { None }).collect();
    match uris.as_slice() {
        [] => Err(PeerError::NoUri),
        [uri] => Ok(uri.parse::<SpiffeId>()?),
        many => Err(PeerError::ManyUris(many.len())),
    }
}

/// What a node trusts: the roots, and the trust domains whose identities it lets in. Cheap to clone.
#[derive(Clone)]
pub struct Trust {
    pub bundle: Bundle,
    verifier: Arc<PeerVerifier>,
}

impl Trust {
    pub fn new(bundle: Bundle, trust_domains: Arc<[TrustDomain]>) -> Result<Self, rustls::Error> {
        let clients = WebPkiClientVerifier::builder_with_provider(bundle.store(), provider())
            // The names of our roots are nobody's business, and no client of a mesh chooses by them.
            .clear_root_hint_subjects()
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        let verifier = Arc::new(PeerVerifier { bundle: bundle.clone(), trust_domains, clients });
        Ok(Self { bundle, verifier })
    }

    /// Checks `chain` as a peer would at `now`. The caller compares the identity.
    pub fn verify(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<SpiffeId, rustls::Error> {
        let [leaf, intermediates @ ..] = chain else {
            return Err(rustls::Error::NoCertificatesPresented);
        };
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = UnixTime::since_unix_epoch(since);
        self.verifier.check_server(leaf, intermediates, now)?;
        self.verifier.clients.verify_client_cert(leaf, intermediates, now)?;
        self.verifier.check_identity(leaf)
    }
}

/// What rustls found wrong, in words: its own text wraps a refused identity in a debug print.
pub fn describe(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(reason))) => reason.to_string(),
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the certificate ends in no root that is trusted here".to_owned()
        }
        rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => format!(
            "the certificate is valid from {} on, and the clock here says {}: compare the clocks",
            at(*not_before),
            at(*time)
        ),
        rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => format!(
            "the certificate has expired at {}, and the clock here says {}: compare the clocks",
            at(*not_after),
            at(*time)
        ),
        other => other.to_string(),
    }
}

fn at(time: UnixTime) -> String {
    super::rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs()))
}

/// Builds both ends' configurations for one certificate.
pub fn workload_tls(
    identity: &SpiffeId,
    leaf: &Arc<CertifiedKey>,
    trust: &Trust,
    not_after: SystemTime,
) -> Result<WorkloadTls, rustls::Error> {
    let client = |alpn: &[&[u8]]| client_config(leaf, trust, alpn);
    Ok(WorkloadTls {
        identity: identity.clone(),
        client: Arc::new(client(&[ALPN_NODEMESH, ALPN_H2])?),
        client_h2: Arc::new(client(&[ALPN_H2])?),
        server: Arc::new(server_config(leaf, trust, &[ALPN_NODEMESH, ALPN_H2])?),
        not_after,
    })
}

/// The dialling end. The name that rustls asks for is not checked and not sent: any `ServerName` will do.
pub fn client_config(leaf: &Arc<CertifiedKey>, trust: &Trust, alpn: &[&[u8]]) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(trust.verifier.clone())
        .with_client_cert_resolver(Arc::new(single(leaf)));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.enable_sni = false;
    // A resumed session would outlive the certificate and the policy it was made under; tunnels are pooled instead.
    config.resumption = Resumption::disabled();
    // The lean tunnel takes the keys over after the handshake.
    config.enable_secret_extraction = true;
    Ok(config)
}

/// The accepting end. It prefers the protocols of `alpn` in their order.
pub fn server_config(leaf: &Arc<CertifiedKey>, trust: &Trust, alpn: &[&[u8]]) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(trust.verifier.clone())
        .with_cert_resolver(Arc::new(single(leaf)));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.enable_secret_extraction = true;
    Ok(config)
}

fn single(leaf: &Arc<CertifiedKey>) -> SingleCertAndKey {
    SingleCertAndKey::from(leaf.clone())
}

/// Checks peers in both directions: chain, validity and purpose by webpki, then the SPIFFE id. DNS names play no part.
struct PeerVerifier {
    bundle: Bundle,
    trust_domains: Arc<[TrustDomain]>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl PeerVerifier {
    fn check_server(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let algorithms = PROVIDER.signature_verification_algorithms.all;
        let leaf = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&leaf, &self.bundle.store(), intermediates, now, algorithms)
    }

    fn check_identity(&self, leaf: &CertificateDer<'_>) -> Result<SpiffeId, rustls::Error> {
        let refuse = |e: PeerError| CertificateError::Other(OtherError(Arc::new(e)));
        let identity = peer_identity(std::slice::from_ref(leaf)).map_err(refuse)?;
        let domain = identity.trust_domain();
        if self.trust_domains.contains(domain) {
            return Ok(identity);
        }
        Err(refuse(PeerError::TrustDomain(identity.clone(), domain.clone())).into())
    }

    fn check_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &PROVIDER.signature_verification_algorithms)
    }
}

/// TLS 1.2 is not among the offered versions, so rustls never asks; if it did, the answer is no.
pub(super) fn no_tls12() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOfferedOrEnabled)
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check_server(end_entity, intermediates, now)?;
        self.check_identity(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.clients.verify_client_cert(end_entity, intermediates, now)?;
        self.check_identity(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for PeerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerVerifier").field("roots", &self.bundle).field("domains", &self.trust_domains).finish()
    }
}

#[cfg(test)]
mod tests;
