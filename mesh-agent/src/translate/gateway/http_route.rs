//! HTTPRoute.

use std::sync::Arc;

use serde::Deserialize;

use super::filters::{Allowed, Filters, SpecFilter, filters, refusal};
use super::matches::SpecHttp;
use super::policy::{SpecPersistence, SpecRetry, SpecTimeouts};
use super::refs::BackendRef;
use super::{Backend, MAX_ITEMS, Route, RouteKind, Rule, at_most, empty_rule, route, shapes};
use crate::model::ObjectRef;
use crate::translate::Object;
use crate::translate::report::{Report, nullable};

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct SpecRule {
    name: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    matches: Vec<SpecHttp>,
    #[serde(default, deserialize_with = "nullable")]
    filters: Vec<SpecFilter>,
    #[serde(default, deserialize_with = "nullable")]
    backend_refs: Vec<SpecBackend>,
    timeouts: Option<SpecTimeouts>,
    retry: Option<SpecRetry>,
    session_persistence: Option<SpecPersistence>,
}

/// Written out: flattened fields would lose their places in Problems.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct SpecBackend {
    #[serde(default, deserialize_with = "nullable")]
    group: String,
    kind: Option<String>,
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    namespace: String,
    port: Option<u16>,
    weight: Option<i64>,
    #[serde(default, deserialize_with = "nullable")]
    filters: Vec<SpecFilter>,
}

pub(in crate::translate) fn http_route(object: &Object, report: &mut Report) -> Option<Route> {
    route(RouteKind::Http, object, &shapes::HTTP_ROUTE, report, |given: Option<Vec<SpecRule>>, at, report| {
        // Without rules there is one, which matches everything and sends it nowhere.
        let given = given.unwrap_or_else(|| vec![SpecRule::default()]);
        given.into_iter().enumerate().map(|(i, rule)| rule.read(i, at, report)).collect()
    })
}

impl SpecRule {
    fn read(self, i: usize, at: &Arc<ObjectRef>, report: &mut Report) -> Rule {
        let field = format!("spec.rules[{i}]");
        let mut rule = empty_rule(at, i, self.name, report);
        let here = Arc::from(at.namespace.as_str());
        let has_prefix = match &self.matches[..] {
            [] => true,
            [one] => one.has_prefix(),
            _ => false,
        };
        let mut given = self.matches;
        if given.is_empty() {
            given.push(SpecHttp::default());
        }
        let matches = given.into_iter().enumerate();
        let matches = matches.filter_map(|(j, m)| m.read(&format!("{field}.matches[{j}]"), report)).collect();
        let found = filters(self.filters, &format!("{field}.filters"), Allowed::Http, has_prefix, &here, report);
        rule.timeouts = self.timeouts.map(|t| t.read(&format!("{field}.timeouts"), report)).unwrap_or_default();
        rule.retry = self.retry.map(|r| r.read(&format!("{field}.retry"), report));
        let persistence = self.session_persistence;
        rule.persistence = persistence.and_then(|p| p.read(&format!("{field}.sessionPersistence"), at, i, report));
        if found.answer.is_some() && !self.backend_refs.is_empty() {
            report
                .error(&format!("{field}.backendRefs"), "a rule that redirects sends nothing on: remove the backends");
        }
        let answers = found.answer.is_some() || found.closed.is_some();
        let backends = backends(self.backend_refs, &field, Allowed::Http, has_prefix, answers, &here, report);
        finish(Rule { rule, matches, backends, mirrors: Vec::new() }, found)
    }
}

/// What the filters of a rule do.
pub(super) fn finish(mut rule: Rule, found: Filters) -> Rule {
    let Filters { request, response, rewrite, mirrors, answer, cors, closed, of_rules: _ } = found;
    (rule.rule.request, rule.rule.response, rule.rule.rewrite, rule.rule.cors) = (request, response, rewrite, cors);
    if let Some(answer) = answer {
        rule.rule.action = answer;
    }
    match closed {
        // What was not looked at must not be copied either.
        Some((_, status)) => rule.rule.action = refusal(status),
        None => rule.mirrors = mirrors,
    }
    rule
}

const MAX_WEIGHT: i64 = 1_000_000;

/// `answers` says that the rule needs none.
pub(super) fn backends(
    given: Vec<SpecBackend>,
    field: &str,
    allowed: Allowed,
    has_prefix: bool,
    answers: bool,
    here: &Arc<str>,
    report: &mut Report,
) -> Vec<Backend> {
    let field = format!("{field}.backendRefs");
    at_most(MAX_ITEMS, given.len(), &field, report);
    if given.is_empty() && !answers {
        report.warning(&field, "the rule sends nothing on, so that its requests are answered with 500: write backends");
    }
    if !given.is_empty() && given.iter().all(|b| b.weight == Some(0)) {
        report.warning(&field, "all weights are 0, so that requests are answered with 500: give one a weight");
    }
    let mut backends = Vec::with_capacity(given.len());
    for (i, mut backend) in given.into_iter().enumerate() {
        let field = format!("{field}[{i}]");
        let weight = backend.weight.unwrap_or(1);
        if !(0..=MAX_WEIGHT).contains(&weight) {
            report.error(&format!("{field}.weight"), format!("{weight} is no weight: use 0 to {MAX_WEIGHT}"));
        }
        let found = filters(
            std::mem::take(&mut backend.filters),
            &format!("{field}.filters"),
            allowed,
            has_prefix,
            here,
            report,
        );
        let mut closed = found.closed.map(|(why, _)| why);
        for (at, name) in found.of_rules {
            // A copy that is not made hurts nobody, nor a permission that is not given; another path or host would.
            let harmless = matches!(name, "RequestMirror" | "CORS");
            let outcome = if harmless { "it is left out" } else { "the backend's share is answered with 500" };
            let message =
                format!("{name} is not honoured at a single backend, so that {outcome}: write it at the rule");
            report.warning(&at, message);
            if !harmless {
                closed.get_or_insert_with(|| format!("{name} at a backend is not honoured").into());
            }
        }
        let SpecBackend { group, kind, name, namespace, port, weight: _, filters: _ } = backend;
        let reference = BackendRef { group, kind, name, namespace, port };
        backends.push(Backend {
            referent: reference.referent(field, here, report),
            weight: u32::try_from(weight).unwrap_or_default(),
            request: found.request,
            response: found.response,
            closed,
        });
    }
    backends
}
