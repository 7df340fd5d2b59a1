//! Routes of the Gateway API, and who may be referred to from elsewhere. In: HTTPRoutes, GRPCRoutes, ReferenceGrants as
//! JSON. Out: what each says by itself, with compiled rules; whether its Services are there, `routes` finds out.
//!
//! The fields are those of the experimental channel up to v1.6. Every field is honoured or is a Problem. What the API server
//! would refuse is an error here too, for in standalone mode there is none. A route that has no Service for a parent belongs
//! to a gateway, and to whoever runs that: nothing of it is judged here.

mod cors;
mod filters;
mod grpc_route;
mod http_route;
mod matches;
mod policy;
mod reference_grant;
mod refs;
mod shapes;

use std::sync::Arc;

use serde::Deserialize;

pub(super) use grpc_route::grpc_route;
pub(super) use http_route::http_route;
pub(super) use matches::Rank;
pub(super) use reference_grant::{Grant, reference_grant};
pub(super) use refs::{Parent, Referent};

use super::report::{Report, nullable};
use super::schema::{self, Shape};
use super::{Broken, Object};
use crate::model::ObjectRef;
use crate::model::http::{HeaderEdits, HttpMatch, HttpRule, Mirror};
use refs::ParentRef;

pub(super) const GROUP: &str = "gateway.networking.k8s.io";

/// A route restricts nobody: who may speak to whom, policies say. So one that could never be read closes nothing, and
/// requests go on as without it: a slip of the pen in a route that splits one percent away must not take the service down.
pub(super) const GO_ON: Broken =
    Broken { outcome: "until it is mended, requests go on as without the route", stand_in: None };

/// Two routes of different kinds cannot hold for one port: a GRPCRoute comes first, as the more specific.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RouteKind {
    Grpc,
    Http,
}

impl RouteKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "GRPCRoute",
            Self::Http => "HTTPRoute",
        }
    }
}

/// A route by itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub kind: RouteKind,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub created: Option<String>,
    /// Empty where it is none of this mesh.
    pub parents: Vec<Parent>,
    pub rules: Vec<Rule>,
}

/// A rule, but for where its requests go.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// Its matches, action and mirrors are filled in later. An action that is no `Forward` stays.
    pub rule: HttpRule,
    pub matches: Vec<(Rank, HttpMatch)>,
    pub backends: Vec<Backend>,
    /// Where copies go, with everything of them but the target.
    pub mirrors: Vec<(Referent, Mirror)>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Backend {
    pub referent: Referent,
    pub weight: u32,
    pub request: HeaderEdits,
    pub response: HeaderEdits,
    /// Why it answers 500 whatever there is behind it.
    pub closed: Option<Arc<str>>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object", bound = "R: Deserialize<'de>")]
struct Manifest<R> {
    metadata: Metadata,
    #[serde(default = "Spec::empty", deserialize_with = "spec")]
    spec: Spec<R>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Metadata {
    creation_timestamp: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object", bound = "R: Deserialize<'de>")]
struct Spec<R> {
    #[serde(default, deserialize_with = "nullable")]
    parent_refs: Vec<ParentRef>,
    #[serde(default, deserialize_with = "nullable")]
    hostnames: Vec<String>,
    rules: Option<Vec<R>>,
}

impl<R> Spec<R> {
    fn empty() -> Self {
        Self { parent_refs: Vec::new(), hostnames: Vec::new(), rules: None }
    }
}

fn spec<'de, D: serde::Deserializer<'de>, R: Deserialize<'de>>(d: D) -> Result<Spec<R>, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_else(Spec::empty))
}

/// Limits of the API, which bound what a route costs.
const MAX_RULES: usize = 16;
const MAX_MATCHES: usize = 128;
const MAX_ITEMS: usize = 16;
const MAX_PARENTS: usize = 32;

/// The rules of a route, read by `rule`.
fn route<R: serde::de::DeserializeOwned>(
    kind: RouteKind,
    object: &Object,
    shape: &Shape,
    report: &mut Report,
    rules: impl FnOnce(Option<Vec<R>>, &Arc<ObjectRef>, &mut Report) -> Vec<Rule>,
) -> Option<Route> {
    let at = object.reference();
    let mut route = Route {
        kind,
        namespace: at.namespace.as_str().into(),
        name: at.name.as_str().into(),
        created: None,
        parents: Vec::new(),
        rules: Vec::new(),
    };
    if !refs::is_ours(object.value()) {
        return Some(route);
    }
    if !schema::check(object, shape, report) {
        return None;
    }
    let Manifest { metadata, spec: Spec { parent_refs, hostnames, rules: given } } = report.read(object)?;
    route.created = metadata.creation_timestamp;
    at_most(MAX_PARENTS, parent_refs.len(), "spec.parentRefs", report);
    route.parents = refs::parents(parent_refs, &route.namespace, report);
    if !hostnames.is_empty() {
        let message =
            "hostnames mean nothing for a Service, whose rules hold for every host: match the header Host instead";
        report.warning("spec.hostnames", message);
    }
    if let Some(given) = &given {
        at_most(MAX_RULES, given.len(), "spec.rules", report);
        if given.is_empty() && kind == RouteKind::Http {
            report.error(
                "spec.rules",
                "the list is empty: write a rule, or leave `rules` away to answer everything with 500",
            );
        }
    }
    // Without a file: a rule is the same where its text has moved.
    let object = Arc::new(ObjectRef { file: String::new(), ..(**at).clone() });
    route.rules = rules(given, &object, report);
    let matches: usize = route.rules.iter().map(|rule| rule.matches.len()).sum();
    at_most(MAX_MATCHES, matches, "spec.rules", report);
    let mut names = std::collections::BTreeSet::new();
    for (i, rule) in route.rules.iter().enumerate() {
        if let Some(name) = rule.rule.name.as_deref().filter(|name| !names.insert(*name)) {
            let message = format!("the name `{name}` stands twice: give each rule one of its own");
            report.error(&format!("spec.rules[{i}].name"), message);
        }
    }
    report.unless_broken(route)
}

/// A route of a kind that comes later.
pub(super) fn not_honoured(object: &Object, report: &mut Report) {
    if refs::is_ours(object.value()) {
        let message = format!("{}s are not honoured yet: connections go on as without the route", object.kind());
        report.warning("", message);
    }
}

/// A rule that does nothing yet.
fn empty_rule(object: &Arc<ObjectRef>, i: usize, name: Option<String>, report: &mut Report) -> HttpRule {
    let name = name.filter(|name| {
        let good = is_name(name);
        if !good {
            let message = format!("`{name}` is no name: use lower-case letters, digits, `-` and `.`");
            report.error(&format!("spec.rules[{i}].name"), message);
        }
        good
    });
    HttpRule {
        object: object.clone(),
        place: format!("spec.rules[{i}]").into(),
        name: name.map(Into::into),
        matches: Vec::new(),
        action: crate::model::http::Action::Forward(Vec::new()),
        rewrite: Default::default(),
        request: HeaderEdits::default(),
        response: HeaderEdits::default(),
        mirrors: Vec::new(),
        fault: None,
        cors: None,
        timeouts: Default::default(),
        retry: None,
        persistence: None,
    }
}

fn at_most(limit: usize, found: usize, field: &str, report: &mut Report) {
    if found > limit {
        report.error(field, format!("{found} are too many, the API allows {limit}: use several routes"));
    }
}

/// A DNS subdomain: also what a host without a wildcard looks like.
fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        let letter = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        !label.is_empty()
            && label.bytes().all(|c| letter(c) || c == b'-')
            && label.bytes().next().is_some_and(letter)
            && label.bytes().next_back().is_some_and(letter)
    };
    text.len() <= 253 && text.split('.').all(label)
}
