//! Who may connect: authorization rules as data, and the mutual-TLS mode. `proxy::policy` judges by them.
//!
//! Istio's AuthorizationPolicy, cut down to what can be judged at layer 4. A rule that names something of layer 7 has
//! been *closed* by `translate` before it comes here: dropped from an ALLOW, widened to its L4 part in a DENY.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;

/// What holds for connections to one workload.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Rules {
    /// STRICT, PERMISSIVE or DISABLE, by port.
    pub mtls: MtlsModes,
    /// Root-namespace ones first, then its namespace's, then those that select it.
    pub policies: Vec<Arc<AuthorizationPolicy>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AuthorizationPolicy {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub action: Action,
    /// Annotation `istio.io/dry-run: "true"`: judged and reported, never enforced.
    pub dry_run: bool,
    /// One match is enough. No rule at all matches nothing: an ALLOW without rules allows nobody.
    pub rules: Vec<Rule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    Allow,
    Deny,
    /// Recorded in the access log, never enforced.
    Audit,
}

/// Matches when one of `from`, one of `to` and all of `when` match; an empty list is no condition.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Rule {
    pub from: Vec<Match>,
    pub to: Vec<Match>,
    pub when: Vec<Match>,
}

/// All fields that are set must match: for a list one of its values, for a `not_` list none of them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Match {
    /// Against `cluster.local/ns/default/sa/web`. Without mutual TLS the peer has none, and these match nothing.
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    /// `(namespace, name)`; exact, as Istio has it.
    pub service_accounts: Vec<(Arc<str>, Arc<str>)>,
    pub not_service_accounts: Vec<(Arc<str>, Arc<str>)>,
    pub source_ips: Vec<IpBlock>,
    pub not_source_ips: Vec<IpBlock>,
    pub destination_ips: Vec<IpBlock>,
    pub not_destination_ips: Vec<IpBlock>,
    pub destination_ports: Vec<PortMatch>,
    pub not_destination_ports: Vec<PortMatch>,
}

/// Istio's four forms of a text: `abc`, `abc*`, `*abc`, `*` (which means present).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    Present,
}

/// A block of addresses. IPv4 and its v4-mapped form are one address here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IpBlock {
    pub address: IpAddr,
    pub prefix_len: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct PortMatch(pub u16);

/// PeerAuthentication's mode for connections that come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum MtlsMode {
    /// Mutual TLS only.
    Strict,
    /// Mutual TLS or plaintext.
    #[default]
    Permissive,
    /// Plaintext is taken; mutual TLS is taken too, as in Istio ambient.
    Disable,
}

/// The mode of a workload, already resolved over mesh, namespace and workload.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
pub struct MtlsModes {
    pub default: MtlsMode,
    /// By port of the application.
    pub ports: BTreeMap<u16, MtlsMode>,
}

impl MtlsModes {
    pub fn of(&self, port: u16) -> MtlsMode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }
}

impl StringMatch {
    /// Reads Istio's notation. Never fails: every text has a meaning.
    pub fn parse(text: &str) -> Self {
        match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(""), _) => Self::Present,
            (Some(suffix), _) => Self::Suffix(suffix.into()),
            (None, Some(prefix)) => Self::Prefix(prefix.into()),
            (None, None) => Self::Exact(text.into()),
        }
    }

    pub fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(t) => value == &**t,
            Self::Prefix(t) => value.starts_with(&**t),
            Self::Suffix(t) => value.ends_with(&**t),
            Self::Present => !value.is_empty(),
        }
    }
}

impl IpBlock {
    /// Reads `10.0.0.0/8` or a single address. The error is a sentence without the object's name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is no IP address or CIDR block, such as 10.0.0.0/8");
        let (address, len) = match text.split_once('/') {
            Some((a, l)) => (a, Some(l.parse::<u8>().map_err(|_| bad())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let max = if address.is_ipv4() { 32 } else { 128 };
        let prefix_len = len.unwrap_or(max);
        if prefix_len > max {
            return Err(bad());
        }
        Ok(Self { address, prefix_len })
    }

    pub fn contains(&self, ip: IpAddr) -> bool {
        let shifted = |bits: u128, width: u8| match width - self.prefix_len {
            128 => 0,
            n => bits >> n,
        };
        match (self.address, ip.to_canonical()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => shifted(u32::from(a).into(), 32) == shifted(u32::from(b).into(), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => shifted(a.into(), 128) == shifted(b.into(), 128),
            _ => false,
        }
    }
}

impl Serialize for IpBlock {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{}/{}", self.address, self.prefix_len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_match_has_four_forms() {
        for (pattern, yes, no) in [("abc", "abc", "abcd"), ("ab*", "abc", "cab"), ("*bc", "abc", "bcd"), ("*", "x", "")]
        {
            assert!(StringMatch::parse(pattern).matches(yes), "{pattern} {yes}");
            assert!(!StringMatch::parse(pattern).matches(no), "{pattern} {no}");
        }
    }

    #[test]
    fn a_block_holds_its_addresses_and_no_others() {
        let block = IpBlock::parse("10.1.0.0/16").unwrap();
        assert!(block.contains("10.1.255.3".parse().unwrap()));
        assert!(block.contains("::ffff:10.1.2.3".parse().unwrap()));
        assert!(!block.contains("10.2.0.1".parse().unwrap()));
        assert!(!block.contains("::1".parse().unwrap()));
        assert!(IpBlock::parse("0.0.0.0/0").unwrap().contains("1.2.3.4".parse().unwrap()));
        assert!(IpBlock::parse("::/0").unwrap().contains("fd00::1".parse().unwrap()));
        for bad in ["10.0.0.0/33", "10.0.0", "x/8", "::/129", "10.0.0.0/"] {
            assert!(IpBlock::parse(bad).is_err(), "{bad} was taken");
        }
    }
}
