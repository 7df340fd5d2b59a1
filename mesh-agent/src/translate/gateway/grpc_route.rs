//! GRPCRoute: a method is the path of a request, and all else is as in an HTTPRoute.

use std::sync::Arc;

use serde::Deserialize;

use super::filters::{Allowed, SpecFilter, filters};
use super::http_route::{SpecBackend, backends, finish};
use super::matches::SpecGrpc;
use super::policy::SpecPersistence;
use super::{Route, RouteKind, Rule, empty_rule, route, shapes};
use crate::model::ObjectRef;
use crate::translate::Object;
use crate::translate::report::{Report, nullable};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecRule {
    name: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    matches: Vec<SpecGrpc>,
    #[serde(default, deserialize_with = "nullable")]
    filters: Vec<SpecFilter>,
    #[serde(default, deserialize_with = "nullable")]
    backend_refs: Vec<SpecBackend>,
    session_persistence: Option<SpecPersistence>,
}

pub(in crate::translate) fn grpc_route(object: &Object, report: &mut Report) -> Option<Route> {
    route(RouteKind::Grpc, object, &shapes::GRPC_ROUTE, report, |given: Option<Vec<SpecRule>>, at, report| {
        let given = given.unwrap_or_default();
        if given.is_empty() {
            report.warning("spec.rules", "without rules nothing matches, so that every request fails: write a rule");
        }
        given.into_iter().enumerate().map(|(i, rule)| rule.read(i, at, report)).collect()
    })
}

impl SpecRule {
    fn read(self, i: usize, at: &Arc<ObjectRef>, report: &mut Report) -> Rule {
        let field = format!("spec.rules[{i}]");
        let mut rule = empty_rule(at, i, self.name, report);
        let here = Arc::from(at.namespace.as_str());
        let mut given = self.matches;
        if given.is_empty() {
            given.push(SpecGrpc::default());
        }
        let matches = given.into_iter().enumerate();
        let matches = matches.filter_map(|(j, m)| m.read(&format!("{field}.matches[{j}]"), report)).collect();
        let found = filters(self.filters, &format!("{field}.filters"), Allowed::Grpc, false, &here, report);
        let persistence = self.session_persistence;
        rule.persistence = persistence.and_then(|p| p.read(&format!("{field}.sessionPersistence"), at, i, report));
        let closed = found.closed.is_some();
        let backends = backends(self.backend_refs, &field, Allowed::Grpc, false, closed, &here, report);
        finish(Rule { rule, matches, backends, mirrors: Vec::new() }, found)
    }
}
