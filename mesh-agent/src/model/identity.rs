//! SPIFFE identities in exactly the shape that Istio uses: `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The name of a mesh's root of trust, such as `cluster.local`: lower-case letters, digits, `.`, `-`, `_`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// The identity of a workload. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<Parts>);

#[derive(PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Parts {
    trust_domain: TrustDomain,
    namespace: Box<str>,
    service_account: Box<str>,
}

/// Why a text is no identity of this mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("`{0}` is no trust domain: use 1 to 255 lower-case letters, digits, `.`, `-` or `_`")]
    TrustDomain(String),
    #[error("`{0}` is no workload identity: expected spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Shape(String),
    #[error("`{0}` is no name of a namespace or service account: use 1 to 253 lower-case letters, digits, `.` or `-`")]
    Name(String),
}

impl TrustDomain {
    /// Checks `name` against the SPIFFE specification, section 2.1.
    pub fn new(name: &str) -> Result<Self, IdentityError> {
        let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > 255 || !name.bytes().all(good) {
            return Err(IdentityError::TrustDomain(name.to_owned()));
        }
        Ok(Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SpiffeId {
    /// The identity of service account `service_account` in `namespace`; both must be Kubernetes names.
    pub fn new(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, IdentityError> {
        for name in [namespace, service_account] {
            let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
            if name.is_empty() || name.len() > 253 || !name.bytes().all(good) {
                return Err(IdentityError::Name(name.to_owned()));
            }
        }
        Ok(Self(Arc::new(Parts {
            trust_domain: trust_domain.clone(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })))
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    pub fn service_account(&self) -> &str {
        &self.0.service_account
    }

    /// As Istio's `principals` field writes it: without the scheme, `cluster.local/ns/default/sa/web`.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.0.trust_domain.as_str(), self.0.namespace, self.0.service_account)
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shape = || IdentityError::Shape(text.to_owned());
        let rest = text.strip_prefix("spiffe://").ok_or_else(shape)?;
        let parts: Vec<&str> = rest.split('/').collect();
        let [domain, "ns", namespace, "sa", account] = parts.as_slice() else { return Err(shape()) };
        Self::new(&TrustDomain::new(domain)?, namespace, account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.0.trust_domain.as_str(), self.0.namespace, self.0.service_account)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl serde::Serialize for SpiffeId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl serde::Serialize for TrustDomain {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_identity_reads_back_as_written() {
        let text = "spiffe://cluster.local/ns/shop/sa/web";
        let id: SpiffeId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/web");
    }

    #[test]
    fn anything_but_the_exact_shape_is_refused() {
        for text in [
            "",
            "spiffe://",
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/sa/b/ns/a",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a%2Fb/sa/b",
            "spiffe://cluster.local:1/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b?x",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text} was taken");
        }
    }
}
