//! ReferenceGrant: routes of which namespaces may send their requests to Services of its own.

use serde::Deserialize;

use super::{GROUP, RouteKind, shapes};
use crate::translate::Object;
use crate::translate::report::{Report, nullable};
use crate::translate::schema;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct Grant {
    from: Vec<From>,
    to: Vec<To>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(expecting = "an object")]
struct From {
    group: String,
    kind: String,
    namespace: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(expecting = "an object")]
struct To {
    group: String,
    kind: String,
    #[serde(default, deserialize_with = "nullable")]
    name: String,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Manifest {
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Spec {
    from: Vec<From>,
    to: Vec<To>,
}

/// Pairs that mean nothing to a mesh are no Problem: they are for gateways and their Secrets.
pub(in crate::translate) fn reference_grant(object: &Object, report: &mut Report) -> Option<Grant> {
    if !schema::check(object, &shapes::REFERENCE_GRANT, report) {
        return None;
    }
    let Manifest { spec: Spec { from, to } } = report.read(object)?;
    for (field, len) in [("spec.from", from.len()), ("spec.to", to.len())] {
        if len == 0 {
            report.error(field, "the list is empty, so nothing is granted: write at least one");
        }
    }
    report.unless_broken(Grant { from, to })
}

impl Grant {
    /// Whether a route of `namespace` may refer to the Service `name` beside the grant.
    pub fn allows(&self, kind: RouteKind, namespace: &str, name: &str) -> bool {
        let from = |f: &From| f.group == GROUP && f.kind == kind.name() && f.namespace == namespace;
        let to = |t: &To| {
            matches!(t.group.as_str(), "" | "core") && t.kind == "Service" && (t.name.is_empty() || t.name == name)
        };
        self.from.iter().any(from) && self.to.iter().any(to)
    }
}
