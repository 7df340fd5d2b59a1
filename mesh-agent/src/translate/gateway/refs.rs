//! What a route refers to: its parents, and the backends that its requests go to.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::GROUP;
use crate::translate::report::{Report, nullable};
use crate::translate::texts::Name;

/// A Service whose requests the rules are about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct Parent {
    /// Its place, such as `spec.parentRefs[0]`.
    pub field: String,
    pub service: Name,
    pub section: Section,
}

/// Which ports of it: without either, all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(in crate::translate) struct Section {
    pub port: Option<u16>,
    /// The port's name.
    pub name: Option<String>,
}

/// What a reference names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::translate) struct Referent {
    /// Its place, such as `spec.rules[0].backendRefs[1]`.
    pub field: String,
    /// Where it is no Service: what it is.
    pub foreign: Option<String>,
    pub service: Name,
    pub port: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct ParentRef {
    group: Option<String>,
    kind: Option<String>,
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    namespace: String,
    #[serde(default, deserialize_with = "nullable")]
    section_name: String,
    port: Option<u16>,
}

/// What a reference to a backend says of it; more may stand beside it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct BackendRef {
    #[serde(default, deserialize_with = "nullable")]
    pub group: String,
    pub kind: Option<String>,
    pub name: String,
    #[serde(default, deserialize_with = "nullable")]
    pub namespace: String,
    pub port: Option<u16>,
}

/// Whose parent it is.
enum Owner {
    Mesh,
    /// A gateway's, or of an implementation that we know nothing of.
    Others,
    /// It is meant for a mesh, and this one can do nothing with it.
    Nobody(&'static str),
}

fn owner(group: Option<&str>, kind: Option<&str>) -> Owner {
    match (group.unwrap_or(GROUP), kind.unwrap_or("Gateway")) {
        ("", "Service") => Owner::Mesh,
        (GROUP | "core" | "v1", "Service") => {
            Owner::Nobody("a Service is of the core, so nothing is in force for it: write `group: \"\"`")
        }
        ("", _) => Owner::Nobody("the core has no such parent, so nothing is in force for it: use kind Service"),
        ("networking.istio.io", "ServiceEntry" | "Hostname") => {
            Owner::Nobody("ServiceEntries are not honoured yet as parents: nothing of the route is in force for it")
        }
        ("multicluster.x-k8s.io", "ServiceImport") => {
            Owner::Nobody("ServiceImports are not honoured yet as parents: nothing of the route is in force for it")
        }
        _ => Owner::Others,
    }
}

/// Whether a route is this mesh's to judge: `false` where every parent is another's. What cannot be read is.
pub(super) fn is_ours(value: &Value) -> bool {
    let parents = match value.pointer("/spec/parentRefs") {
        None | Some(Value::Null) => return value.get("spec").is_some_and(|spec| !spec.is_object() && !spec.is_null()),
        Some(Value::Array(parents)) => parents,
        Some(_) => return true,
    };
    parents.iter().any(|parent| {
        let text = |key: &str| match parent.get(key) {
            None | Some(Value::Null) => Some(None),
            Some(Value::String(text)) => Some(Some(text.as_str())),
            Some(_) => None,
        };
        match (text("group"), text("kind")) {
            (Some(group), Some(kind)) => !parent.is_object() || !matches!(owner(group, kind), Owner::Others),
            _ => true,
        }
    })
}

pub(super) fn parents(given: Vec<ParentRef>, here: &Arc<str>, report: &mut Report) -> Vec<Parent> {
    let mut parents: Vec<Parent> = Vec::new();
    for (i, parent) in given.into_iter().enumerate() {
        let field = format!("spec.parentRefs[{i}]");
        match owner(parent.group.as_deref(), parent.kind.as_deref()) {
            Owner::Mesh => {}
            Owner::Others => continue,
            Owner::Nobody(why) => {
                report.warning(&field, why);
                continue;
            }
        }
        if parent.name.is_empty() {
            report.error(&format!("{field}.name"), "the name is empty: write that of the Service");
        }
        if parent.port == Some(0) {
            report.error(&format!("{field}.port"), "0 is no port: use 1 to 65535");
        }
        let namespace = if parent.namespace.is_empty() { here.clone() } else { parent.namespace.into() };
        let section = Section { port: parent.port, name: Some(parent.section_name).filter(|name| !name.is_empty()) };
        let service = (namespace, parent.name.into());
        if let Some(first) = parents.iter().find(|p| p.service == service && p.section == section) {
            report.error(&field, format!("this parent stands in {} already: remove one of the two", first.field));
        }
        parents.push(Parent { field, service, section });
    }
    parents
}

impl BackendRef {
    /// `field` is where it stands.
    pub fn referent(self, field: String, here: &Arc<str>, report: &mut Report) -> Referent {
        let kind = self.kind.as_deref().unwrap_or("Service");
        let foreign = match (self.group.as_str(), kind) {
            ("" | "core", "Service") => None,
            ("", kind) => Some(kind.to_owned()),
            (group, kind) => Some(format!("{kind} of {group}")),
        };
        if self.name.is_empty() {
            report.error(&format!("{field}.name"), "the name is empty: write that of the Service");
        }
        if foreign.is_none() && self.port.is_none_or(|port| port == 0) {
            report.error(&format!("{field}.port"), "a Service is reached at one of its ports: write it, 1 to 65535");
        }
        let namespace = if self.namespace.is_empty() { here.clone() } else { self.namespace.as_str().into() };
        Referent { field, foreign, service: (namespace, self.name.into()), port: self.port.unwrap_or_default() }
    }
}
