//! Rules for HTTP: which request goes where, and what is done to it on the way. Made of Gateway API routes and of Istio's
//! VirtualServices alike; `proxy/route` judges by them, the proxy carries out.
//!
//! Here lies only what can be known beforehand: patterns are compiled, names and values of headers are checked.

mod edits;
mod matching;
mod policy;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

pub use edits::{Authority, HeaderEdits, Name, PathRewrite, Rewrite, Value};
pub use matching::{HttpMatch, PathMatch, Pattern, PatternError, SourceMatch, ValueMatch};
pub use policy::{
    Abort, Cors, Fault, Fraction, Mirror, Persistence, PersistenceKind, Preflight, Retry, RetryOn, Timeouts,
};

use super::ObjectRef;

/// What holds for one port of a service, by who asks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct HttpRoutes {
    /// For clients of all namespaces that have no table of their own. `None`: nothing holds for them.
    pub general: Option<Arc<RouteTable>>,
    /// For clients of one namespace alone, in place of `general`.
    pub by_namespace: BTreeMap<Arc<str>, Arc<RouteTable>>,
}

/// Rules in the order in which they are asked. The first that matches counts; a request that none matches is answered
/// with 404, as both APIs have it. A rule of the Gateway API stands here once for each of its matches, since these have
/// their own places in the order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct RouteTable {
    pub rules: Vec<Arc<HttpRule>>,
}

/// What is done with a request that matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HttpRule {
    /// The object it was written in.
    pub object: Arc<ObjectRef>,
    /// Its place there, such as `spec.rules[2]`.
    pub place: Arc<str>,
    /// The name that its author gave it, for metrics and logs.
    pub name: Option<Arc<str>>,
    /// One of them is enough. Never empty: what matches everything has one match that asks for nothing.
    pub matches: Vec<HttpMatch>,
    pub action: Action,
    pub rewrite: Rewrite,
    pub request: HeaderEdits,
    /// Also of answers that the agent itself gives in this rule's name.
    pub response: HeaderEdits,
    pub mirrors: Vec<Mirror>,
    pub fault: Option<Fault>,
    pub cors: Option<Cors>,
    pub timeouts: Timeouts,
    pub retry: Option<Retry>,
    pub persistence: Option<Persistence>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// To one of them, by weight. Where all weights are zero, or there is none, the answer is 500, as the Gateway API has it.
    Forward(Vec<Backend>),
    Redirect(Redirect),
    Respond(Respond),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Backend {
    pub weight: u32,
    pub target: Target,
    /// After the rule's own.
    pub request: HeaderEdits,
    /// Before the rule's own.
    pub response: HeaderEdits,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    Service {
        namespace: Arc<str>,
        name: Arc<str>,
        port: u16,
        /// Of a DestinationRule: only some of the endpoints.
        subset: Option<Arc<str>>,
    },
    /// It cannot be reached by this rule, and its share of the requests is answered with 500. The Problem says why.
    Broken { reason: Arc<str> },
}

/// Absent parts are as in the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Redirect {
    pub status: u16,
    pub scheme: Option<Arc<str>>,
    /// A host without a port.
    pub host: Option<Arc<str>>,
    pub port: RedirectPort,
    pub path: Option<PathRewrite>,
}

/// The port in `Location`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RedirectPort {
    /// The Gateway API's rule: the well-known one of `scheme` where that is given, else the port the client asked.
    #[default]
    OfScheme,
    /// As in the request's authority.
    OfRequest,
    Number(u16),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Respond {
    pub status: u16,
    #[serde(skip)]
    pub body: bytes::Bytes,
}

impl HttpRoutes {
    /// What holds for clients of a namespace.
    pub fn of(&self, namespace: &str) -> Option<&Arc<RouteTable>> {
        self.by_namespace.get(namespace).or(self.general.as_ref())
    }

    pub fn is_empty(&self) -> bool {
        self.general.is_none() && self.by_namespace.is_empty()
    }
}
