//! One issuing certificate with its key: made by us, or brought by the user, and checked whole before it signs.
//! In: PEM texts named as in Istio's `cacerts`. Out: chains for workloads and for the controller's own port.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::bundle::{BundleError, certificate_pem, certificates_from_pem, sha256_hex};
use super::material::{self, Material, Pems};
use super::{Bundle, Trust, csr};
use crate::lifecycle::files::FileError;
use crate::model::{SpiffeId, TrustDomain};

pub const CA_CERT: &str = "ca-cert.pem";
pub const CA_KEY: &str = "ca-key.pem";
pub const CERT_CHAIN: &str = "cert-chain.pem";
pub const ROOT_CERT: &str = "root-cert.pem";
/// Only where the root is ours: it signs the next intermediate.
pub const ROOT_KEY: &str = "root-key.pem";

const DAY: Duration = Duration::from_secs(86_400);
pub const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
pub const INTERMEDIATE_LIFE: Duration = Duration::from_secs(2 * 365 * 86_400);
/// How far clocks of nodes may be apart. A leaf is dated back by it, but never by more than a tenth of its life.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Why an issuing certificate can't be used: one sentence that names the file.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{0} is not there; write it, or delete the Secret to have a CA made")]
    NoKey(String),
    #[error("{path}: {source}")]
    Certificates { path: String, source: BundleError },
    #[error("{path}: certificate {index} is no X.509 certificate ({problem}); write it again in PEM")]
    Parse { path: String, index: usize, problem: String },
    #[error("{path}: it holds no private key that can sign (ECDSA P-256 or P-384, RSA, Ed25519, in PEM): {problem}")]
    Key { path: String, problem: String },
    #[error("{key}: the key does not belong to the certificate in {cert}; bring the pair that was made together")]
    KeyMismatch { key: String, cert: String },
    #[error("{path}: `{subject}` may not sign certificates; bring one with the CA flag and the usage keyCertSign")]
    NoCa { path: String, subject: String },
    #[error("{path}: `{subject}` has expired at {at}; bring a new one")]
    Expired { path: String, subject: String, at: String },
    #[error("{path}: `{subject}` is valid only from {at} on; check this machine's clock")]
    NotYetValid { path: String, subject: String, at: String },
    #[error("{path}: `{subject}` allows {allowed} CA certificates below it, and {below} are; bring a chain that fits")]
    PathLength { path: String, subject: String, allowed: u32, below: usize },
    #[error("{0}: it must begin with the certificate of {CA_CERT}, then what signed it")]
    ChainStart(String),
    #[error("{path}: `{subject}` is not signed by `{issuer}`, which follows it; put the issuers in order")]
    ChainBroken { path: String, subject: String, issuer: String },
    #[error("{path}: no root in it has signed `{subject}`; add the root that has")]
    NoRoot { path: String, subject: String },
    #[error(
        "{path}: a workload certificate signed by it is refused by the roots of {ROOT_CERT} ({problem}); check its path length, usages and name constraints"
    )]
    Unusable { path: String, problem: String },
    #[error("can't make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// An issuing certificate that has passed every check.
pub struct SigningCa {
    issuer: Issuer<'static, KeyPair>,
    /// The issuing certificate and those above it, without the root; empty where the root itself signs.
    chain: Vec<CertificateDer<'static>>,
    pub roots: Vec<CertificateDer<'static>>,
    /// When the first of the intermediates expires.
    pub chain_not_after: SystemTime,
    /// When the last root that this chain ends in expires.
    pub root_not_after: SystemTime,
    pub(super) material: Material,
}

impl SigningCa {
    /// Makes a root and an intermediate and writes them to `dir`.
    pub fn create(dir: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<(), IssuerError> {
        Ok(material::write(dir, &new_root(trust_domain, now)?)?)
    }

    /// Makes a new intermediate in `dir` under the root of `old`.
    pub fn create_under(
        dir: &Path,
        old: &Material,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<(), IssuerError> {
        Ok(material::write(dir, &new_intermediate(old, trust_domain, now)?)?)
    }

    /// Reads `dir` and checks it whole.
    pub fn load(dir: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<Self, IssuerError> {
        Self::of(Material::Directory(dir.to_owned()), trust_domain, now)
    }

    /// Checks `material` whole.
    pub(super) fn of(material: Material, trust_domain: &TrustDomain, now: SystemTime) -> Result<Self, IssuerError> {
        let [cert_path, key_path, chain_path, root_path] =
            [CA_CERT, CA_KEY, CERT_CHAIN, ROOT_CERT].map(|name| material.place(name));
        let cert = read_certificates(&material, CA_CERT)?.swap_remove(0);
        let key = read_key(&material, CA_KEY)?;
        let roots = Bundle::new(read_certificates(&material, ROOT_CERT)?)
            .map_err(|source| IssuerError::Certificates { path: root_path.clone(), source })?;
        // Without a chain it is right where a root has signed it directly; anything else fails below.
        let mut chain = match material.find(CERT_CHAIN)? {
            Some(_) => read_certificates(&material, CERT_CHAIN)?,
            None => vec![cert.clone()],
        };
        if chain.first() != Some(&cert) {
            return Err(IssuerError::ChainStart(chain_path));
        }
        // Istio's cert-chain.pem often ends with the root, which peers have.
        chain.retain(|c| !roots.roots().contains(c));

        let parsed = parse(&cert_path, 0, &cert)?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
            return Err(IssuerError::KeyMismatch { key: key_path, cert: cert_path });
        }
        let mut chain_not_after = check_ca(&cert_path, &parsed, now)?;
        for (index, pair) in chain.windows(2).enumerate() {
            let (lower, upper) = (parse(&chain_path, index, &pair[0])?, parse(&chain_path, index + 1, &pair[1])?);
            chain_not_after = chain_not_after.min(check_ca(&chain_path, &upper, now)?);
            check_path_length(&chain_path, &upper, index + 1)?;
            if !signed(&lower, &upper) {
                let (subject, issuer) = (lower.subject().to_string(), upper.subject().to_string());
                return Err(IssuerError::ChainBroken { path: chain_path, subject, issuer });
            }
        }
        let last = parse(&chain_path, chain.len().saturating_sub(1), chain.last().unwrap_or(&cert))?;
        let mut root_not_after = None;
        for (index, root) in roots.roots().iter().enumerate() {
            let root = parse(&root_path, index, root)?;
            if signed(&last, &root) {
                root_not_after = root_not_after.max(Some(check_ca(&root_path, &root, now)?));
                check_path_length(&root_path, &root, chain.len())?;
            }
        }
        let Some(root_not_after) = root_not_after else {
            return Err(IssuerError::NoRoot { path: root_path, subject: last.subject().to_string() });
        };

        let ca = Self {
            issuer: Issuer::from_ca_cert_der(&cert, key)?,
            chain,
            roots: roots.roots().to_vec(),
            chain_not_after,
            root_not_after,
            material,
        };
        ca.try_out(roots, trust_domain, now).map_err(|problem| IssuerError::Unusable { path: cert_path, problem })?;
        Ok(ca)
    }

    /// What the checks above can't see (path lengths, constraints) shows when a leaf is signed and judged as a peer does.
    fn try_out(&self, roots: Bundle, trust_domain: &TrustDomain, now: SystemTime) -> Result<(), String> {
        let identity = SpiffeId::new(trust_domain, "nodemesh", "probe").map_err(|e| e.to_string())?;
        let (_, pem) = csr::request(&identity).map_err(|e| e.to_string())?;
        let request = csr::VerifiedCsr::from_pem(&pem).map_err(|e| e.to_string())?;
        let chain = self.sign_workload(&request.key, &identity, DAY, now).map_err(|e| e.to_string())?;
        let trust = Trust::new(roots, Arc::new([trust_domain.clone()])).map_err(|e| e.to_string())?;
        trust.verify(&chain, now).map(drop).map_err(|e| e.to_string())
    }

    /// A workload's certificate and the chain up to, without, the root.
    pub fn sign_workload(
        &self,
        key: &impl PublicKeyData,
        identity: &SpiffeId,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, rcgen::Error> {
        let name = SanType::URI(identity.to_string().try_into()?);
        let usages = [ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(key, vec![name], usages.to_vec(), lifetime, now)
    }

    /// The controller's serving certificate. It has no SPIFFE id, and a workload's has no DNS name: neither can pose as
    /// the other.
    pub fn sign_server(
        &self,
        key: &impl PublicKeyData,
        names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, rcgen::Error> {
        let name = |name: &String| match name.parse::<IpAddr>() {
            Ok(ip) => Ok(SanType::IpAddress(ip)),
            Err(_) => Ok(SanType::DnsName(name.as_str().try_into()?)),
        };
        let names = names.iter().map(name).collect::<Result<_, rcgen::Error>>()?;
        self.sign(key, names, vec![ExtendedKeyUsagePurpose::ServerAuth], lifetime, now)
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, rcgen::Error> {
        let mut params = CertificateParams::default();
        // Without a subject the SAN is critical (RFC 5280, 4.1.2.6).
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - CLOCK_SKEW.min(lifetime / 10)).into();
        // A leaf that outlives its issuer would be refused while its holder believes in it.
        params.not_after = (now + lifetime).min(self.not_after()).into();
        let mut chain = vec![params.signed_by(key, &self.issuer)?.into()];
        chain.extend(self.chain.iter().cloned());
        Ok(chain)
    }

    /// Nothing that it signs may live longer.
    pub fn not_after(&self) -> SystemTime {
        self.chain_not_after.min(self.root_not_after)
    }
}

/// A root and an intermediate.
pub(super) fn new_root(trust_domain: &TrustDomain, now: SystemTime) -> Result<Pems, IssuerError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let params = ca_params(trust_domain, "root", &key, BasicConstraints::Constrained(1), now, now + ROOT_LIFE);
    let root_key = key.serialize_pem();
    let root = CertifiedIssuer::self_signed(params, key)?;
    let mut pems = vec![(ROOT_KEY, root_key), (ROOT_CERT, root.pem())];
    pems.extend(intermediate(trust_domain, &root, now)?);
    Ok(pems)
}

/// The root of `old`, and a new intermediate under it.
pub(super) fn new_intermediate(
    old: &Material,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<Pems, IssuerError> {
    let root = read_certificates(old, ROOT_CERT)?.swap_remove(0);
    let issuer = Issuer::from_ca_cert_der(&root, read_key(old, ROOT_KEY)?)?;
    let mut pems = vec![(ROOT_KEY, old.read(ROOT_KEY)?), (ROOT_CERT, old.read(ROOT_CERT)?)];
    pems.extend(intermediate(trust_domain, &issuer, now)?);
    Ok(pems)
}

fn ca_params(
    trust_domain: &TrustDomain,
    role: &str,
    key: &KeyPair,
    depth: BasicConstraints,
    now: SystemTime,
    not_after: SystemTime,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    // Two roots of one name would be tried one for the other; the key tells them apart.
    let id: String = sha256_hex(key.der_bytes()).chars().take(8).collect();
    params.distinguished_name.push(DnType::CommonName, format!("Nodemesh {role} {id}"));
    params.is_ca = IsCa::Ca(depth);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = not_after.into();
    params
}

fn intermediate(trust_domain: &TrustDomain, root: &Issuer<'_, KeyPair>, now: SystemTime) -> Result<Pems, IssuerError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let params =
        ca_params(trust_domain, "intermediate", &key, BasicConstraints::Constrained(0), now, now + INTERMEDIATE_LIFE);
    let pem = certificate_pem(params.signed_by(&key, root)?.der());
    // The chain last: a directory that has it is whole.
    Ok(vec![(CA_KEY, key.serialize_pem()), (CA_CERT, pem.clone()), (CERT_CHAIN, pem)])
}

pub(super) fn read_certificates(material: &Material, name: &str) -> Result<Vec<CertificateDer<'static>>, IssuerError> {
    let failed = |source| IssuerError::Certificates { path: material.place(name), source };
    let found = certificates_from_pem(&material.read(name)?).map_err(failed)?;
    if found.is_empty() { Err(failed(BundleError::Empty)) } else { Ok(found) }
}

pub(super) fn read_key(material: &Material, name: &str) -> Result<KeyPair, IssuerError> {
    let failed = |problem: String| IssuerError::Key { path: material.place(name), problem };
    let der = PrivateKeyDer::from_pem_slice(material.read(name)?.as_bytes()).map_err(|e| failed(e.to_string()))?;
    KeyPair::try_from(&der).map_err(|e| failed(e.to_string()))
}

fn parse<'a>(path: &str, index: usize, der: &'a [u8]) -> Result<X509Certificate<'a>, IssuerError> {
    let failed = |problem: String| IssuerError::Parse { path: path.to_owned(), index: index + 1, problem };
    X509Certificate::from_der(der).map(|(_, parsed)| parsed).map_err(|e| failed(e.to_string()))
}

/// Checks the flag, the usage and the time; answers with the end of its life.
fn check_ca(path: &str, parsed: &X509Certificate<'_>, now: SystemTime) -> Result<SystemTime, IssuerError> {
    let (path, subject) = (path.to_owned(), parsed.subject().to_string());
    let usage = parsed.key_usage().ok().flatten().is_none_or(|usage| usage.value.key_cert_sign());
    if !parsed.is_ca() || !usage {
        return Err(IssuerError::NoCa { path, subject });
    }
    let (from, until) = (parsed.validity().not_before, parsed.validity().not_after);
    if super::system_time(&until) <= now {
        return Err(IssuerError::Expired { path, subject, at: super::rfc3339(super::system_time(&until)) });
    }
    if super::system_time(&from) > now {
        return Err(IssuerError::NotYetValid { path, subject, at: super::rfc3339(super::system_time(&from)) });
    }
    Ok(super::system_time(&until))
}

/// webpki does not look at a root's path length, but other peers of HBONE do.
fn check_path_length(path: &str, parsed: &X509Certificate<'_>, below: usize) -> Result<(), IssuerError> {
    let constraints = parsed.basic_constraints().ok().flatten();
    match constraints.and_then(|constraints| constraints.value.path_len_constraint) {
        Some(allowed) if below > allowed as usize => {
            let (path, subject) = (path.to_owned(), parsed.subject().to_string());
            Err(IssuerError::PathLength { path, subject, allowed, below })
        }
        _ => Ok(()),
    }
}

/// Whether `upper` has signed `lower`, or is the same certificate's key (a root that signs itself).
fn signed(lower: &X509Certificate<'_>, upper: &X509Certificate<'_>) -> bool {
    lower.issuer() == upper.subject() && lower.verify_signature(Some(upper.public_key())).is_ok()
}
