//! Layer-4 authorization as Istio has it: the mTLS mode first, then DENY, then ALLOW; with no ALLOW policy all pass.
//!
//! Comes in: a workload's policies (already resolved by `translate`) and what is known of one connection. Goes out: a
//! `Permit`, without which no stage behind this one can go on, or the reason of the refusal. No lock and no I/O; a
//! connection that is allowed and audited by nothing costs no allocation.

use std::net::SocketAddr;

use crate::model::{Action, AuthorizationPolicy, IpBlock, Match, MtlsMode, Rule, SpiffeId, StringMatch, Workload};

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
    /// The workload is judged on another node, and its rules are not known here.
    Elsewhere,
    /// mTLS mode STRICT and no mutual TLS.
    Plaintext,
    /// A DENY policy matched: `namespace/name`.
    ByPolicy(String),
    /// ALLOW policies exist and none matched.
    NotAllowed,
}

impl std::fmt::Display for Denied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Elsewhere => f.write_str("the workload is on another node, which alone knows its policies"),
            Self::Plaintext => f.write_str("PeerAuthentication: mutual TLS is STRICT and the client came in plaintext"),
            Self::ByPolicy(name) => write!(f, "AuthorizationPolicy {name} (DENY)"),
            Self::NotAllowed => f.write_str("AuthorizationPolicy: no ALLOW policy of the workload matches"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub result: Result<Permit, Denied>,
    /// AUDIT and dry-run policies that matched, `namespace/name`. Filled for refused connections too.
    pub audited: Vec<String>,
}

/// Judges a connection to `workload` by its mTLS mode and policies.
pub fn authorize(workload: &Workload, connection: &Connection<'_>) -> Verdict {
    let Some(rules) = &workload.rules else {
        return Verdict { result: Err(Denied::Elsewhere), audited: Vec::new() };
    };
    let mut audited = Vec::new();
    let mut denied_by: Option<&AuthorizationPolicy> = None;
    let mut allow_exists = false;
    let mut allowed = false;
    for policy in &rules.policies {
        // One pass over all: an audited policy is reported whatever the others say. A decision already made is not
        // looked for twice.
        let reported_only = policy.dry_run || policy.action == Action::Audit;
        if reported_only {
            if matches_policy(policy, connection) {
                audited.push(full_name(policy));
            }
            continue;
        }
        match policy.action {
            Action::Deny if denied_by.is_none() && matches_policy(policy, connection) => denied_by = Some(policy),
            Action::Allow => {
                allow_exists = true;
                allowed = allowed || matches_policy(policy, connection);
            }
            Action::Deny | Action::Audit => {}
        }
    }
    let strict = rules.mtls.of(connection.destination.port()) == MtlsMode::Strict;
    let result = if strict && connection.identity.is_none() {
        Err(Denied::Plaintext)
    } else if let Some(policy) = denied_by {
        Err(Denied::ByPolicy(full_name(policy)))
    } else if allow_exists && !allowed {
        Err(Denied::NotAllowed)
    } else {
        Ok(Permit { _private: () })
    };
    Verdict { result, audited }
}

fn full_name(policy: &AuthorizationPolicy) -> String {
    format!("{}/{}", policy.namespace, policy.name)
}

fn matches_policy(policy: &AuthorizationPolicy, connection: &Connection<'_>) -> bool {
    policy.rules.iter().any(|rule| matches_rule(rule, connection))
}

fn matches_rule(rule: &Rule, connection: &Connection<'_>) -> bool {
    let Rule { from, to, when } = rule;
    let one_of = |list: &[Match]| list.is_empty() || list.iter().any(|m| matches(m, connection));
    one_of(from) && one_of(to) && when.iter().all(|m| matches(m, connection))
}

fn matches(m: &Match, connection: &Connection<'_>) -> bool {
    // Destructured whole, so that a field added to the model cannot be forgotten here.
    let Match {
        principals,
        not_principals,
        namespaces,
        not_namespaces,
        service_accounts,
        not_service_accounts,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
    } = m;
    let identity = connection.identity;
    // A peer without an identity satisfies no positive condition on identity and every negative one, as in Istio.
    let principal = |p: &StringMatch| identity.is_some_and(|id| matches_principal(p, id));
    let namespace = |n: &StringMatch| identity.is_some_and(|id| n.matches(id.namespace()));
    let account = |(ns, name): &(_, _)| {
        let (ns, name): (&std::sync::Arc<str>, &std::sync::Arc<str>) = (ns, name);
        identity.is_some_and(|id| id.namespace() == &**ns && id.service_account() == &**name)
    };
    let source = |b: &IpBlock| b.contains(connection.source.ip());
    let destination = |b: &IpBlock| b.contains(connection.destination.ip());
    let port = |p: &crate::model::PortMatch| p.0 == connection.destination.port();

    satisfied(principals, not_principals, principal)
        && satisfied(namespaces, not_namespaces, namespace)
        && satisfied(service_accounts, not_service_accounts, account)
        && satisfied(source_ips, not_source_ips, source)
        && satisfied(destination_ips, not_destination_ips, destination)
        && satisfied(destination_ports, not_destination_ports, port)
}

/// One of `wanted` holds, if any is asked for, and none of `unwanted`.
fn satisfied<T>(wanted: &[T], unwanted: &[T], holds: impl Fn(&T) -> bool) -> bool {
    (wanted.is_empty() || wanted.iter().any(&holds)) && !unwanted.iter().any(&holds)
}

/// Compares with `<trust domain>/ns/<namespace>/sa/<account>` piece by piece: the text is never put together.
fn matches_principal(pattern: &StringMatch, id: &SpiffeId) -> bool {
    let pieces = [id.trust_domain().as_str(), "/ns/", id.namespace(), "/sa/", id.service_account()];
    match pattern {
        StringMatch::Present => true,
        StringMatch::Exact(text) => {
            text.len() == pieces.iter().map(|p| p.len()).sum::<usize>() && starts(&pieces, text)
        }
        StringMatch::Prefix(text) => starts(&pieces, text),
        StringMatch::Suffix(text) => ends(&pieces, text),
    }
}

/// The text that `pieces` make begins with `text`. Bytes are compared, so that no cut falls inside a character.
fn starts(pieces: &[&str], text: &str) -> bool {
    let mut rest = text.as_bytes();
    for piece in pieces {
        let n = piece.len().min(rest.len());
        if piece.as_bytes()[..n] != rest[..n] {
            return false;
        }
        rest = &rest[n..];
    }
    rest.is_empty()
}

fn ends(pieces: &[&str], text: &str) -> bool {
    let mut rest = text.as_bytes();
    for piece in pieces.iter().rev() {
        let n = piece.len().min(rest.len());
        if piece.as_bytes()[piece.len() - n..] != rest[rest.len() - n..] {
            return false;
        }
        rest = &rest[..rest.len() - n];
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests;
