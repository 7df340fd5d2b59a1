//! AuthorizationPolicy: who may connect. The envelope stands here, its rules in `rules`.

use std::sync::Arc;

use serde::Deserialize;

use super::rules::{self, Source};
use super::schema::{self, Shape};
use super::{Metadata, Selector, readable_selector};
use crate::model::{self, Action, Rule};
use crate::translate::report::{Labels, Report, nullable};
use crate::translate::{Broken, Object, Parsed};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct AuthorizationPolicy {
    pub policy: Arc<model::AuthorizationPolicy>,
    pub scope: Scope,
}

/// For which pods of the namespace it holds; in the root namespace, of the whole mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) enum Scope {
    All,
    Selected(Labels),
    /// Pods behind these services of the namespace: the policy was written for a waypoint in front of them.
    Services(Vec<String>),
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
    selector: Option<Selector>,
    #[serde(default, deserialize_with = "nullable")]
    target_ref: Option<TargetRef>,
    #[serde(default, deserialize_with = "nullable")]
    target_refs: Vec<TargetRef>,
    #[serde(default, deserialize_with = "nullable")]
    rules: Vec<rules::SpecRule>,
    #[serde(default, deserialize_with = "nullable")]
    action: String,
    #[serde(default, deserialize_with = "nullable")]
    provider: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct TargetRef {
    #[serde(default, deserialize_with = "nullable")]
    group: String,
    kind: String,
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    namespace: String,
}

const TARGET_REF: Shape = Shape::Fields(&[
    ("group", Shape::Any),
    ("kind", Shape::Any),
    ("name", Shape::Any),
    ("namespace", Shape::Any),
    ("sectionName", Shape::Any),
]);
const FIELDS: &[(&str, Shape)] = &[
    ("selector", Shape::Fields(&[("matchLabels", Shape::Any)])),
    ("targetRef", TARGET_REF),
    ("targetRefs", Shape::ListOf(&TARGET_REF)),
    ("rules", Shape::ListOf(&rules::RULE)),
    ("action", Shape::Any),
    ("provider", Shape::Fields(&[("name", Shape::Any)])),
];
const SPEC: Shape = Shape::Fields(FIELDS);
const DRY_RUN: &str = "istio.io/dry-run";

pub(in crate::translate) fn authorization_policy(object: &Object, report: &mut Report) -> Option<AuthorizationPolicy> {
    if !schema::check(object, &SPEC, report) {
        return None;
    }
    let Manifest { metadata, spec } = report.read(object)?;
    let (action, source) = action(&spec, report);
    let dry_run = dry_run(&metadata.annotations, report);
    let rules = rules::read(spec.rules, source, &object.reference().namespace, report);
    let scope = scope(spec.selector, spec.target_ref, spec.target_refs, object, report);
    let namespace = object.reference().namespace.as_str().into();
    let policy = model::AuthorizationPolicy { name: metadata.name.into(), namespace, action, dry_run, rules };
    report.unless_broken(AuthorizationPolicy { policy: Arc::new(policy), scope })
}

fn action(spec: &Spec, report: &mut Report) -> (Action, Source) {
    let known = match spec.action.as_str() {
        "" | "ALLOW" => (Action::Allow, Source::Allow),
        "DENY" => (Action::Deny, Source::Deny),
        "AUDIT" => (Action::Audit, Source::Audit),
        "CUSTOM" => {
            if spec.rules.is_empty() {
                report.error("spec.rules", "CUSTOM without rules asks nothing: write the rules it is for");
            }
            let message = "CUSTOM is not honoured yet: what its rules match is denied, since nobody can be asked";
            report.warning("spec.action", message);
            (Action::Deny, Source::Deny)
        }
        other => {
            let message = format!("`{other}` is no action: use ALLOW, DENY, AUDIT or CUSTOM");
            report.error("spec.action", message);
            (Action::Deny, Source::Deny)
        }
    };
    if spec.rules.is_empty() && matches!(spec.action.as_str(), "DENY" | "AUDIT") {
        report
            .warning("spec.rules", format!("{} without rules matches nobody: write the rules it is for", spec.action));
    }
    if spec.provider.is_some() && spec.action != "CUSTOM" {
        report.warning("spec.provider", "a provider means nothing without the action CUSTOM: remove it");
    }
    known
}

fn dry_run(annotations: &Labels, report: &mut Report) -> bool {
    match annotations.get(DRY_RUN).map(String::as_str) {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            let message = format!("`{other}` is neither true nor false, so the policy is enforced: write one of them");
            report.warning(&format!("metadata.annotations[{DRY_RUN}]"), message);
            false
        }
    }
}

fn scope(
    selector: Option<Selector>,
    target_ref: Option<TargetRef>,
    mut target_refs: Vec<TargetRef>,
    object: &Object,
    report: &mut Report,
) -> Scope {
    let field = if target_ref.is_some() { "spec.targetRef" } else { "spec.targetRefs" };
    target_refs.extend(target_ref);
    if target_refs.is_empty() {
        return match selector.and_then(|s| s.labels(report)) {
            Some(labels) => Scope::Selected(labels),
            None => Scope::All,
        };
    }
    if selector.is_some() {
        report.error(field, "a policy has a selector or targets, not both: remove one");
    }
    let here = &object.reference().namespace;
    let is_service = |t: &TargetRef| {
        matches!((t.group.as_str(), t.kind.as_str()), ("" | "core", "Service"))
            && (t.namespace.is_empty() || t.namespace == *here)
    };
    if target_refs.iter().all(is_service) {
        let message = "targets need a waypoint, which is not there yet: until it is, \
                       the policy holds for all connections to the pods behind its services";
        report.warning(field, message);
        return Scope::Services(target_refs.into_iter().map(|t| t.name).collect());
    }
    // What goes through a Gateway or waypoint elsewhere goes straight to the pods here: hold it at every pod.
    let message = "targets that are no Service of the same namespace are not honoured yet: until they are, \
                   the policy holds for all pods of its namespace, use a selector to narrow it";
    report.warning(field, message);
    Scope::All
}

/// What stands in until the policy can be read. One that is surely ALLOW can only have let somebody in: it allows
/// nobody. Any other may have been meant to deny: it denies all.
pub(in crate::translate) fn closed_authorization_policy(object: &Object) -> Broken {
    let spec = object.value().get("spec");
    let text = |value: Option<&serde_json::Value>| value.and_then(serde_json::Value::as_str).map(str::to_owned);
    let allows = match spec.and_then(|s| s.get("action")) {
        Some(action) => action.as_str() == Some("ALLOW"),
        // Without an action it is ALLOW, unless the word itself is misspelt: then there is a field that nobody knows.
        None => {
            let known = |k: &String| FIELDS.iter().any(|(name, _)| name == k);
            spec.is_some_and(|s| s.as_object().is_some_and(|s| s.keys().all(known)))
        }
    };
    let dry_run = text(object.value().pointer("/metadata/annotations/istio.io~1dry-run"));
    let audits = text(spec.and_then(|s| s.get("action"))).as_deref() == Some("AUDIT");
    let (action, rules, outcome) = match (allows, audits) {
        (true, _) => (Action::Allow, vec![], "until it is mended it allows nobody"),
        (_, true) => (Action::Audit, vec![], "until it is mended it audits nothing"),
        _ => (
            Action::Deny,
            vec![Rule::default()],
            "until it is mended it denies every connection to the pods it holds for",
        ),
    };
    let policy = model::AuthorizationPolicy {
        name: object.reference().name.as_str().into(),
        namespace: object.reference().namespace.as_str().into(),
        action,
        dry_run: dry_run.as_deref() == Some("true"),
        rules,
    };
    let scope = match readable_selector(object) {
        Ok(Some(labels)) => Scope::Selected(labels),
        Ok(None) | Err(()) => Scope::All,
    };
    let stand_in = AuthorizationPolicy { policy: Arc::new(policy), scope };
    Broken { outcome, stand_in: Some(Parsed::AuthorizationPolicy(stand_in)) }
}
