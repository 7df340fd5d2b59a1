//! The trust bundle: the root certificates that peers' chains must end in.
//! In: PEM from a file, a join or the CA. Out: a checked set of roots, compared by fingerprint, swapped whole.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::system_time;

/// More roots than this is no bundle of a mesh but a mistake (such as a distribution's list of public CAs).
const MAX_ROOTS: usize = 64;

/// Why something is no trust bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    #[error("it holds no certificate; it must hold at least one root in PEM")]
    Empty,
    #[error("it is not PEM that can be read ({0})")]
    Pem(String),
    #[error("it holds {0} certificates; a mesh has at most {MAX_ROOTS} roots")]
    TooMany(usize),
    #[error("certificate {0} in it is no X.509 certificate ({1})")]
    Parse(usize, String),
    #[error("certificate {0} in it (`{1}`) is no CA certificate; only roots belong there")]
    NoCa(usize, String),
}

/// A set of trusted roots, the one that signs now first. Cheap to clone; equal if the same roots are trusted.
#[derive(Clone)]
pub struct Bundle {
    roots: Arc<[CertificateDer<'static>]>,
    /// SHA-256 of each root, in hex, in the order of `roots`.
    fingerprints: Arc<[String]>,
    store: Arc<RootCertStore>,
}

impl Bundle {
    /// Checks that each of `roots` is a CA certificate; duplicates are dropped.
    pub fn new(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Result<Self, BundleError> {
        let (mut kept, mut fingerprints, mut store) = (Vec::new(), Vec::new(), RootCertStore::empty());
        for (index, root) in roots.into_iter().enumerate() {
            let fingerprint = sha256_hex(&root);
            if fingerprints.contains(&fingerprint) {
                continue;
            }
            let parse = |problem: String| BundleError::Parse(index + 1, problem);
            let (_, parsed) = X509Certificate::from_der(&root).map_err(|e| parse(e.to_string()))?;
            if !parsed.is_ca() {
                return Err(BundleError::NoCa(index + 1, parsed.subject().to_string()));
            }
            store.add(root.clone()).map_err(|e| parse(e.to_string()))?;
            kept.push(root);
            fingerprints.push(fingerprint);
        }
        match kept.len() {
            0 => Err(BundleError::Empty),
            n if n > MAX_ROOTS => Err(BundleError::TooMany(n)),
            _ => Ok(Self { roots: kept.into(), fingerprints: fingerprints.into(), store: Arc::new(store) }),
        }
    }

    pub fn from_pem(text: &str) -> Result<Self, BundleError> {
        Self::new(certificates_from_pem(text)?)
    }

    pub fn pem(&self) -> String {
        self.roots.iter().map(|root| certificate_pem(root)).collect()
    }

    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    pub fn store(&self) -> Arc<RootCertStore> {
        self.store.clone()
    }

    /// SHA-256 of each root, in hex.
    pub fn fingerprints(&self) -> &[String] {
        &self.fingerprints
    }

    pub fn contains(&self, fingerprint: &str) -> bool {
        self.fingerprints.iter().any(|known| known == fingerprint)
    }
}

impl PartialEq for Bundle {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprints.len() == other.fingerprints.len() && self.fingerprints.iter().all(|f| other.contains(f))
    }
}

impl Eq for Bundle {}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.fingerprints.iter().map(|full| short(full))).finish()
    }
}

/// All certificates of a PEM text, in their order.
pub fn certificates_from_pem(text: &str) -> Result<Vec<CertificateDer<'static>>, BundleError> {
    CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| BundleError::Pem(e.to_string()))
}

/// From when until when a certificate is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

/// Of each certificate of a PEM text, in their order.
pub fn validities(text: &str) -> Result<Vec<Validity>, BundleError> {
    let one = |(index, der): (usize, CertificateDer<'static>)| {
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|e| BundleError::Parse(index + 1, e.to_string()))?;
        let validity = parsed.validity();
        Ok(Validity { not_before: system_time(&validity.not_before), not_after: system_time(&validity.not_after) })
    };
    certificates_from_pem(text)?.into_iter().enumerate().map(one).collect()
}

pub fn certificate_pem(der: &[u8]) -> String {
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    let text = STANDARD.encode(der);
    let mut rest = text.as_str();
    while !rest.is_empty() {
        // Base64 is ASCII, so any index is a boundary.
        let (line, tail) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = tail;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

pub fn sha256_hex(der: &[u8]) -> String {
    digest(&SHA256, der).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The first 16 hex digits, for people to compare.
pub fn short(fingerprint: &str) -> &str {
    fingerprint.get(..16).unwrap_or(fingerprint)
}
