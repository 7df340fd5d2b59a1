//! Certificate requests. On the node: a new key and a request for an identity. At the CA: the request is taken apart and
//! only its key and its identity are used; all else that it asks for is passed over.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType, SubjectPublicKeyInfo};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509CertificationRequest};

use crate::model::{IdentityError, SpiffeId};

/// A request with a P-256 key has about 600 bytes.
pub const MAX_CSR_BYTES: usize = 16 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    #[error("the certificate request has {0} bytes; at most {MAX_CSR_BYTES} are taken")]
    TooLarge(usize),
    #[error("the certificate request can't be read ({0}); send a PKCS#10 request in PEM")]
    Parse(String),
    #[error("the certificate request is not signed by the key that it holds; make it anew")]
    Signature,
    #[error("the certificate request has a key of type {0}; use ECDSA P-256 or P-384")]
    KeyType(String),
    #[error("the certificate request names {0} URIs; name exactly one SPIFFE id")]
    ManyUris(usize),
    #[error("the certificate request has a foreign name: {0}")]
    Shape(#[from] IdentityError),
}

/// A new key, which never leaves the node, and the request for it in PEM.
pub fn request(identity: &SpiffeId) -> Result<(KeyPair, String), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    let pem = params.serialize_request(&key)?.pem()?;
    Ok((key, pem))
}

/// A request whose signature and key type have been checked.
#[derive(Debug)]
pub struct VerifiedCsr {
    pub key: SubjectPublicKeyInfo,
    /// The identity that it names, if it names one: Istio's clients may leave that to the metadata.
    pub identity: Option<SpiffeId>,
}

impl VerifiedCsr {
    pub fn from_pem(pem: &str) -> Result<Self, CsrError> {
        if pem.len() > MAX_CSR_BYTES {
            return Err(CsrError::TooLarge(pem.len()));
        }
        let der =
            CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|e| CsrError::Parse(e.to_string()))?;
        let (rest, csr) = X509CertificationRequest::from_der(&der).map_err(|e| CsrError::Parse(e.to_string()))?;
        if !rest.is_empty() {
            return Err(CsrError::Parse("bytes follow its end".to_owned()));
        }
        let raw = csr.certification_request_info.subject_pki.raw;
        let foreign = || CsrError::KeyType(csr.certification_request_info.subject_pki.algorithm.algorithm.to_string());
        let key = SubjectPublicKeyInfo::from_der(raw).map_err(|_| foreign())?;
        let algorithm = rcgen::PublicKeyData::algorithm(&key);
        if *algorithm != PKCS_ECDSA_P256_SHA256 && *algorithm != rcgen::PKCS_ECDSA_P384_SHA384 {
            return Err(foreign());
        }
        csr.verify_signature().map_err(|_| CsrError::Signature)?;

        let mut uris = Vec::new();
        for extension in csr.requested_extensions().into_iter().flatten() {
            if let ParsedExtension::SubjectAlternativeName(names) = extension {
                uris.extend(names.general_names.iter().filter_map(|name| match name {
                    GeneralName::URI(uri) => Some(*uri),
                    _ => None,
                }));
            }
        }
        let identity = match uris.as_slice() {
            [] => None,
            [uri] => Some(uri.parse()?),
            many => return Err(CsrError::ManyUris(many.len())),
        };
        Ok(Self { key, identity })
    }
}
