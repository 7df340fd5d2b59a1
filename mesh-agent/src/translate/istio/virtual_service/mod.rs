//! VirtualService: what becomes of requests for a host. In: the object as JSON. Out: its rules, compiled; which services its
//! hosts and destinations are, `routes` finds out.
//!
//! It restricts nobody: who may speak to whom, policies say. So one that could never be read closes nothing.

mod actions;
mod delegate;
mod filters;
mod matches;
mod shapes;

use std::sync::Arc;

use serde::Deserialize;

use self::actions::{SpecDelegate, SpecDestination, SpecRedirect, SpecRespond, SpecWeighted};
use self::filters::{SpecCors, SpecFault, SpecMirror, SpecRetries, SpecRewrite};
use self::matches::SpecMatch;
use super::Metadata;
use super::values::{self, SpecHeaders, SpecPercent};
use super::visible::Visible;
use crate::model::ObjectRef;
use crate::model::http::{
    Cors, Fault, Fraction, HeaderEdits, HttpMatch, HttpRule, Mirror, Redirect, Respond, Retry, Rewrite, Target,
    Timeouts,
};
use crate::translate::Object;
use crate::translate::report::{Report, nullable};
use crate::translate::schema;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct VirtualService {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub created: Option<String>,
    /// As written. Empty for one that is only delegated to.
    pub hosts: Vec<Arc<str>>,
    /// Whether it is for the mesh, and not only for gateways.
    pub is_for_mesh: bool,
    pub visible: Visible,
    pub http: Vec<Route>,
}

/// One of its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct Route {
    /// Its matches, action and mirrors are filled in by `rule`.
    template: HttpRule,
    /// With the port that each is for. Empty means that all requests match.
    matches: Vec<(Option<u16>, HttpMatch)>,
    pub to: To,
    mirrors: Vec<(Destination, Fraction)>,
    says_retries: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) enum To {
    Destinations(Vec<Weighted>),
    Redirect(Redirect),
    Respond(Respond),
    /// To another VirtualService, by namespace and name.
    Delegate(Arc<str>, Arc<str>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct Weighted {
    pub weight: u32,
    pub destination: Destination,
    pub request: HeaderEdits,
    pub response: HeaderEdits,
}

/// As written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct Destination {
    pub field: Arc<str>,
    /// A host without a dot is a service of this one.
    pub namespace: Arc<str>,
    pub host: Arc<str>,
    pub subset: Option<Arc<str>>,
    /// `None`: the only port that the host has, else the one that was asked.
    pub port: Option<u16>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Manifest {
    metadata: Metadata,
    #[serde(default, deserialize_with = "nullable")]
    spec: Spec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Spec {
    #[serde(default, deserialize_with = "nullable")]
    hosts: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    gateways: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    export_to: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    http: Vec<SpecRoute>,
    #[serde(default, deserialize_with = "nullable")]
    tls: Vec<serde_json::Value>,
    #[serde(default, deserialize_with = "nullable")]
    tcp: Vec<serde_json::Value>,
}

/// Flat as it is written: serde tells no path of a field that it flattens.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecRoute {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    #[serde(default, deserialize_with = "nullable", rename = "match")]
    matches: Vec<SpecMatch>,
    #[serde(default, deserialize_with = "nullable")]
    route: Vec<SpecWeighted>,
    redirect: Option<SpecRedirect>,
    direct_response: Option<SpecRespond>,
    delegate: Option<SpecDelegate>,
    rewrite: Option<SpecRewrite>,
    timeout: Option<String>,
    retries: Option<SpecRetries>,
    fault: Option<SpecFault>,
    mirror: Option<SpecDestination>,
    #[serde(alias = "mirror_percent")]
    mirror_percent: Option<u32>,
    mirror_percentage: Option<SpecPercent>,
    #[serde(default, deserialize_with = "nullable")]
    mirrors: Vec<SpecMirror>,
    cors_policy: Option<SpecCors>,
    #[serde(default, deserialize_with = "nullable")]
    headers: SpecHeaders,
}

/// What rules of all gateways are called among `gateways`, where it means the pods.
const MESH: &str = "mesh";

pub(in crate::translate) fn virtual_service(object: &Object, report: &mut Report) -> Option<VirtualService> {
    if !schema::check(object, &shapes::SPEC, report) {
        return None;
    }
    let Manifest { metadata, spec } = report.read(object)?;
    let at = object.reference();
    let namespace: Arc<str> = at.namespace.as_str().into();
    let hosts = hosts(spec.hosts, report);
    let is_for_mesh = spec.gateways.is_empty() || spec.gateways.iter().any(|g| g == MESH);
    for (field, list) in [("spec.tls", &spec.tls), ("spec.tcp", &spec.tcp)] {
        if !list.is_empty() && is_for_mesh {
            report.warning(field, "routes for TLS and TCP are not honoured yet: connections go on as without them");
        }
    }
    if spec.http.is_empty() && spec.tls.is_empty() && spec.tcp.is_empty() {
        report.error("spec.http", "there is no route at all: write one");
    }
    // Without a file: a rule is the same where its text has moved.
    let reference = Arc::new(ObjectRef { file: String::new(), ..(**at).clone() });
    let mut http = Vec::with_capacity(spec.http.len());
    for (i, route) in spec.http.into_iter().enumerate() {
        http.extend(self::route(route, i, &reference, report));
    }
    // What comes after a rule that takes everything is never asked.
    let takes_all = |r: &Route| {
        r.matches.is_empty() || r.matches.iter().any(|(port, m)| port.is_none() && *m == HttpMatch::default())
    };
    if let Some(i) = http.iter().position(takes_all)
        && i + 1 < http.len()
    {
        let message = format!("http[{i}] takes every request, so this route is never asked: put it before that one");
        report.warning(&format!("spec.http[{}]", i + 1), message);
    }
    let visible = Visible::read(&spec.export_to, &namespace, "spec.exportTo", report);
    report.unless_broken(VirtualService {
        name: at.name.as_str().into(),
        created: metadata.creation_timestamp,
        hosts,
        is_for_mesh,
        visible,
        http,
        namespace,
    })
}

fn hosts(given: Vec<String>, report: &mut Report) -> Vec<Arc<str>> {
    for (i, host) in given.iter().enumerate() {
        let field = format!("spec.hosts[{i}]");
        if host.contains('*') {
            let message = "hosts with `*` are not honoured yet: name each service, this entry is left out";
            report.warning(&field, message);
        } else if !values::is_host(host) {
            report.error(&field, format!("`{host}` is no host: write a name such as reviews.shop.svc.cluster.local"));
        }
    }
    given.into_iter().filter(|host| !host.contains('*')).map(Into::into).collect()
}

fn route(mut given: SpecRoute, i: usize, object: &Arc<ObjectRef>, report: &mut Report) -> Option<Route> {
    let field = format!("spec.http[{i}]");
    let has_matches = !given.matches.is_empty();
    let matches: Vec<_> = std::mem::take(&mut given.matches)
        .into_iter()
        .enumerate()
        .filter_map(|(i, m)| m.read(&format!("{field}.match[{i}]"), report))
        .collect();
    let to = actions::read(&mut given, &field, object, report)?;
    if has_matches && matches.is_empty() {
        // For gateways alone.
        return None;
    }
    let name = std::mem::take(&mut given.name);
    let says_retries = given.retries.is_some();
    let read = filters::read(given, &field, &object.namespace, &to, report);
    let template = HttpRule {
        object: object.clone(),
        place: field.into(),
        name: (!name.is_empty()).then(|| name.into()),
        matches: Vec::new(),
        action: crate::model::http::Action::Forward(Vec::new()),
        rewrite: read.rewrite,
        request: read.request,
        response: read.response,
        mirrors: Vec::new(),
        fault: read.fault,
        cors: read.cors,
        timeouts: read.timeouts,
        retry: read.retry,
        persistence: None,
    };
    Some(Route { template, matches, to, mirrors: read.mirrors, says_retries })
}

/// What `filters` has read of a route.
struct Filters {
    rewrite: Rewrite,
    request: HeaderEdits,
    response: HeaderEdits,
    mirrors: Vec<(Destination, Fraction)>,
    fault: Option<Fault>,
    cors: Option<Cors>,
    timeouts: Timeouts,
    retry: Option<Retry>,
}

impl Route {
    /// Its place in its object.
    pub fn place(&self) -> &Arc<str> {
        &self.template.place
    }

    /// All that it may send requests or copies to.
    pub fn destinations(&self) -> impl Iterator<Item = &Destination> {
        let to = if let To::Destinations(all) = &self.to { all.as_slice() } else { &[] };
        to.iter().map(|w| &w.destination).chain(self.mirrors.iter().map(|(to, _)| to))
    }

    /// The rule for requests that ask this port; `None` where it is for other ports. `target` says what a destination is.
    pub fn rule(&self, port: u16, mut target: impl FnMut(&Destination) -> Target) -> Option<HttpRule> {
        use crate::model::http::{Action, Backend};
        let mut matches: Vec<_> =
            self.matches.iter().filter(|(p, _)| p.is_none_or(|p| p == port)).map(|(_, m)| m.clone()).collect();
        match (self.matches.is_empty(), matches.is_empty()) {
            (true, _) => matches.push(HttpMatch::default()),
            (false, true) => return None,
            (false, false) => {}
        }
        let action = match &self.to {
            To::Redirect(redirect) => Action::Redirect(redirect.clone()),
            To::Respond(respond) => Action::Respond(respond.clone()),
            To::Delegate(..) => return None,
            To::Destinations(all) => Action::Forward(
                all.iter()
                    .map(|w| Backend {
                        weight: w.weight,
                        target: target(&w.destination),
                        request: w.request.clone(),
                        response: w.response.clone(),
                    })
                    .collect(),
            ),
        };
        let mirrors = self.mirrors.iter().map(|(to, share)| Mirror { target: target(to), share: *share }).collect();
        Some(HttpRule { matches, action, mirrors, ..self.template.clone() })
    }
}
