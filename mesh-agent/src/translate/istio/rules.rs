//! The rules of an AuthorizationPolicy, at layer 4. A condition that cannot be judged here closes its rule: an ALLOW
//! rule is dropped, since it must not let in more than was written; a DENY rule stands without the condition, so that it
//! refuses more. This is what Istio ambient does.

use std::sync::Arc;

use serde::Deserialize;

use super::schema::Shape;
use crate::model::{IpBlock, Match, PortMatch, Rule, StringMatch};
use crate::translate::report::{Report, nullable};

/// What the policy does with a match, which decides what "to close" means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Allow,
    Deny,
    Audit,
}

type Texts = Option<Vec<String>>;

#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecRule {
    #[serde(default)]
    from: Option<Vec<From>>,
    #[serde(default)]
    to: Option<Vec<To>>,
    #[serde(default, deserialize_with = "nullable")]
    when: Vec<Condition>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct From {
    #[serde(default, deserialize_with = "nullable")]
    source: SpecSource,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct To {
    #[serde(default, deserialize_with = "nullable")]
    operation: Operation,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecSource {
    principals: Texts,
    not_principals: Texts,
    request_principals: Texts,
    not_request_principals: Texts,
    namespaces: Texts,
    not_namespaces: Texts,
    service_accounts: Texts,
    not_service_accounts: Texts,
    trust_domains: Texts,
    not_trust_domains: Texts,
    ip_blocks: Texts,
    not_ip_blocks: Texts,
    remote_ip_blocks: Texts,
    not_remote_ip_blocks: Texts,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Operation {
    hosts: Texts,
    not_hosts: Texts,
    ports: Texts,
    not_ports: Texts,
    methods: Texts,
    not_methods: Texts,
    paths: Texts,
    not_paths: Texts,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Condition {
    #[serde(default, deserialize_with = "nullable")]
    key: String,
    values: Texts,
    not_values: Texts,
}

pub(super) const RULE: Shape = Shape::Fields(&[
    ("from", Shape::ListOf(&Shape::Fields(&[("source", SOURCE)]))),
    ("to", Shape::ListOf(&Shape::Fields(&[("operation", OPERATION)]))),
    ("when", Shape::ListOf(&Shape::Fields(&[("key", Shape::Any), ("values", Shape::Any), ("notValues", Shape::Any)]))),
]);
const SOURCE: Shape = Shape::Fields(&[
    ("principals", Shape::Any),
    ("notPrincipals", Shape::Any),
    ("requestPrincipals", Shape::Any),
    ("notRequestPrincipals", Shape::Any),
    ("namespaces", Shape::Any),
    ("notNamespaces", Shape::Any),
    ("serviceAccounts", Shape::Any),
    ("notServiceAccounts", Shape::Any),
    ("trustDomains", Shape::Any),
    ("notTrustDomains", Shape::Any),
    ("ipBlocks", Shape::Any),
    ("notIpBlocks", Shape::Any),
    ("remoteIpBlocks", Shape::Any),
    ("notRemoteIpBlocks", Shape::Any),
]);
const OPERATION: Shape = Shape::Fields(&[
    ("hosts", Shape::Any),
    ("notHosts", Shape::Any),
    ("ports", Shape::Any),
    ("notPorts", Shape::Any),
    ("methods", Shape::Any),
    ("notMethods", Shape::Any),
    ("paths", Shape::Any),
    ("notPaths", Shape::Any),
]);

/// Reads the rules of a policy in `namespace`.
pub(super) fn read(rules: Vec<SpecRule>, action: Source, namespace: &str, report: &mut Report) -> Vec<Rule> {
    let read = |(i, rule)| Reader { action, namespace, report: &mut *report, closed: false }.rule(i, rule);
    rules.into_iter().enumerate().filter_map(read).collect()
}

/// Reads one rule.
struct Reader<'a> {
    action: Source,
    namespace: &'a str,
    report: &'a mut Report,
    /// Something of this rule cannot be judged.
    closed: bool,
}

/// Which fields of `Match` a condition goes to, and how its texts are read.
type Place<T> = fn(&mut Match) -> &mut Vec<T>;

impl Reader<'_> {
    fn rule(mut self, index: usize, rule: SpecRule) -> Option<Rule> {
        let path = format!("spec.rules[{index}]");
        let SpecRule { from, to, when } = rule;
        for (name, empty) in
            [("from", from.as_ref().is_some_and(Vec::is_empty)), ("to", to.as_ref().is_some_and(Vec::is_empty))]
        {
            if empty {
                self.report
                    .error(&format!("{path}.{name}"), "the list is empty: remove it, or write what it is to match");
            }
        }
        let from = from.unwrap_or_default().into_iter().enumerate();
        let from = from.map(|(i, f)| self.source(&format!("{path}.from[{i}].source"), f.source)).collect();
        let to = to.unwrap_or_default().into_iter().enumerate();
        let to = to.map(|(i, t)| self.operation(&format!("{path}.to[{i}].operation"), t.operation)).collect();
        let when = when.into_iter().enumerate();
        let when = when.map(|(i, c)| self.condition(&format!("{path}.when[{i}]"), c)).collect();
        match (self.closed, self.action) {
            (true, Source::Allow | Source::Audit) => None,
            (true, Source::Deny) | (false, _) => Some(Rule { from, to, when }),
        }
    }

    fn source(&mut self, path: &str, source: SpecSource) -> Match {
        // Destructured whole, so that a field that is added cannot be forgotten.
        let SpecSource {
            principals,
            not_principals,
            request_principals,
            not_request_principals,
            namespaces,
            not_namespaces,
            service_accounts,
            not_service_accounts,
            trust_domains,
            not_trust_domains,
            ip_blocks,
            not_ip_blocks,
            remote_ip_blocks,
            not_remote_ip_blocks,
        } = source;
        let mut m = Match::default();
        let at = |name: &str| format!("{path}.{name}");
        let mut any = false;
        any |= self.fill(&at("principals"), principals, &mut m, |m| &mut m.principals, Self::principal);
        any |= self.fill(&at("notPrincipals"), not_principals, &mut m, |m| &mut m.not_principals, Self::principal);
        any |= self.fill(&at("namespaces"), namespaces, &mut m, |m| &mut m.namespaces, Self::text);
        any |= self.fill(&at("notNamespaces"), not_namespaces, &mut m, |m| &mut m.not_namespaces, Self::text);
        any |= self.fill(&at("serviceAccounts"), service_accounts, &mut m, |m| &mut m.service_accounts, Self::account);
        let place: Place<_> = |m| &mut m.not_service_accounts;
        any |= self.fill(&at("notServiceAccounts"), not_service_accounts, &mut m, place, Self::account);
        any |= self.fill(&at("ipBlocks"), ip_blocks, &mut m, |m| &mut m.source_ips, Self::block);
        any |= self.fill(&at("notIpBlocks"), not_ip_blocks, &mut m, |m| &mut m.not_source_ips, Self::block);
        for (name, texts, why) in [
            ("requestPrincipals", request_principals, LAYER_7),
            ("notRequestPrincipals", not_request_principals, LAYER_7),
            ("remoteIpBlocks", remote_ip_blocks, LAYER_7),
            ("notRemoteIpBlocks", not_remote_ip_blocks, LAYER_7),
            ("trustDomains", trust_domains, NOT_YET),
            ("notTrustDomains", not_trust_domains, NOT_YET),
        ] {
            any |= self.cannot_judge(&at(name), texts.as_deref(), why);
        }
        self.not_empty(path, any);
        m
    }

    fn operation(&mut self, path: &str, operation: Operation) -> Match {
        let Operation { hosts, not_hosts, ports, not_ports, methods, not_methods, paths, not_paths } = operation;
        let mut m = Match::default();
        let at = |name: &str| format!("{path}.{name}");
        let mut any = self.fill(&at("ports"), ports, &mut m, |m| &mut m.destination_ports, Self::port);
        any |= self.fill(&at("notPorts"), not_ports, &mut m, |m| &mut m.not_destination_ports, Self::port);
        for (name, texts) in [
            ("hosts", hosts),
            ("notHosts", not_hosts),
            ("methods", methods),
            ("notMethods", not_methods),
            ("paths", paths),
            ("notPaths", not_paths),
        ] {
            any |= self.cannot_judge(&at(name), texts.as_deref(), LAYER_7);
        }
        self.not_empty(path, any);
        m
    }

    fn condition(&mut self, path: &str, condition: Condition) -> Match {
        let Condition { key, values, not_values } = condition;
        let mut m = Match::default();
        let (field, not_field) = (format!("{path}.values"), format!("{path}.notValues"));
        if values.as_ref().is_none_or(Vec::is_empty) && not_values.as_ref().is_none_or(Vec::is_empty) {
            self.report.error(path, "the condition has no values: write values or notValues");
        }
        macro_rules! both {
            ($yes:ident, $no:ident, $read:expr) => {{
                self.fill(&field, values, &mut m, |m| &mut m.$yes, $read);
                self.fill(&not_field, not_values, &mut m, |m| &mut m.$no, $read);
            }};
        }
        match key.as_str() {
            "source.ip" => both!(source_ips, not_source_ips, Self::block),
            "source.namespace" => both!(namespaces, not_namespaces, Self::text),
            "source.principal" => both!(principals, not_principals, Self::principal),
            "source.serviceAccount" => both!(service_accounts, not_service_accounts, Self::account),
            "destination.ip" => both!(destination_ips, not_destination_ips, Self::block),
            "destination.port" => both!(destination_ports, not_destination_ports, Self::port),
            "" => self.report.error(&format!("{path}.key"), "the condition has no key: write what it compares"),
            key => {
                let layer_7 = key.starts_with("request.") || matches!(key, "remote.ip" | "connection.sni");
                let why = if layer_7 { LAYER_7 } else { "is no condition that is known here" };
                self.close(&format!("{path}.key"), &format!("`{key}` {why}"));
            }
        }
        m
    }

    /// Reads `texts` into a field of `m`; says whether there was anything.
    fn fill<T>(
        &mut self,
        field: &str,
        texts: Texts,
        m: &mut Match,
        place: Place<T>,
        read: fn(&mut Self, &str, &str) -> Option<T>,
    ) -> bool {
        let texts = texts.unwrap_or_default();
        let mut values = Vec::with_capacity(texts.len());
        let mut judged = true;
        for (i, text) in texts.iter().enumerate() {
            match read(self, &format!("{field}[{i}]"), text) {
                Some(value) => values.push(value),
                None => judged = false,
            }
        }
        // With one value missing the list would say something else: it is no condition then, and the rule is closed.
        if judged {
            *place(m) = values;
        }
        !texts.is_empty()
    }

    fn text(&mut self, field: &str, text: &str) -> Option<StringMatch> {
        if text.is_empty() {
            self.report.error(field, "the text is empty: remove it, or write `*` for any");
            return None;
        }
        let inner = text.strip_prefix('*').or_else(|| text.strip_suffix('*')).unwrap_or(text);
        if inner.contains('*') {
            self.close(
                field,
                &format!("`{text}` has a `*` that is not its only first or last character, which no name matches"),
            );
            return None;
        }
        Some(StringMatch::parse(text))
    }

    fn principal(&mut self, field: &str, text: &str) -> Option<StringMatch> {
        if text.starts_with("spiffe://") {
            self.close(field, "a principal is written without `spiffe://`, so this one matches nobody");
            return None;
        }
        self.text(field, text)
    }

    /// `namespace/name`, or `name` in the policy's own namespace.
    fn account(&mut self, field: &str, text: &str) -> Option<(Arc<str>, Arc<str>)> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (namespace, name),
            None => (self.namespace, text),
        };
        let bad = |part: &str| part.is_empty() || part.contains(['/', '*']);
        if bad(name) || bad(namespace) {
            self.report.error(field, format!("`{text}` is no service account: write namespace/name, without `*`"));
            return None;
        }
        Some((namespace.into(), name.into()))
    }

    fn block(&mut self, field: &str, text: &str) -> Option<IpBlock> {
        IpBlock::parse(text).map_err(|message| self.report.error(field, message)).ok()
    }

    fn port(&mut self, field: &str, text: &str) -> Option<PortMatch> {
        match text.parse::<u16>() {
            Ok(port) if port > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Some(PortMatch(port)),
            _ => {
                self.report.error(field, format!("`{text}` is no port: use 1 to 65535"));
                None
            }
        }
    }

    fn cannot_judge(&mut self, field: &str, texts: Option<&[String]>, why: &str) -> bool {
        let any = texts.is_some_and(|t| !t.is_empty());
        if any {
            self.close(field, why);
        }
        any
    }

    fn close(&mut self, field: &str, why: &str) {
        self.closed = true;
        let outcome = match self.action {
            Source::Allow => "the rule allows nobody as long as it is there",
            Source::Deny => "the rule denies as if it were not there",
            Source::Audit => "the rule audits nothing as long as it is there",
        };
        self.report.warning(field, format!("{why}: {outcome}"));
    }

    fn not_empty(&mut self, path: &str, any: bool) {
        if !any {
            self.report.error(path, "it says nothing, which would match everybody: write what it is to match");
        }
    }
}

const LAYER_7: &str = "needs layer 7, which is not judged yet";
const NOT_YET: &str = "is not judged yet";
