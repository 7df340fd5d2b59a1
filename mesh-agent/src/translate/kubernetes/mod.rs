//! Objects of the Kubernetes core: just the fields that a mesh needs. Unknown fields are ignored, as Kubernetes's own
//! clients do; a field that is read and has a wrong type or value breaks the object.

mod endpoint_slice;
mod pod;
mod service;

pub(super) use endpoint_slice::{Backend, EndpointSlice, endpoint_slice};
pub(super) use pod::{Pod, pod};
pub(super) use service::{Kind, Port, Service, TargetPort, service};

use serde::Deserialize;

use super::Object;
use super::report::{Labels, Report, nullable};
use crate::model::Locality;

/// Where the label `nodemesh.io/mode` or `istio.io/dataplane-mode` says something, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::translate) struct Mode {
    pub nodemesh: Option<bool>,
    /// Counts only with the setting `istio_labels`, and after the other.
    pub istio: Option<bool>,
    /// A label has a value that is no mode: it must not let a pod out that was in.
    nodemesh_is_wrong: bool,
    istio_is_wrong: bool,
}

/// The label of ours.
pub(in crate::translate) const MODE: &str = "nodemesh.io/mode";

impl Mode {
    /// Whether the label of ours has a value that is no mode.
    pub fn is_wrong(self) -> bool {
        self.nodemesh_is_wrong
    }

    pub fn is_clear(self, istio_labels: bool) -> bool {
        let wrong = self.nodemesh_is_wrong || istio_labels && self.istio_is_wrong;
        !wrong
    }

    pub fn enabled(self, istio_labels: bool) -> Option<bool> {
        self.nodemesh.or(self.istio.filter(|_| istio_labels))
    }
}

#[derive(Debug)]
pub(in crate::translate) struct Namespace {
    pub mode: Mode,
}

#[derive(Debug)]
pub(in crate::translate) struct Node {
    pub locality: Locality,
}

/// How pods of a class are run.
#[derive(Debug)]
pub(in crate::translate) struct RuntimeClass {
    /// The container runtime's name of it.
    pub handler: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct Metadata {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    uid: String,
    #[serde(default, deserialize_with = "nullable")]
    labels: Labels,
    #[serde(default, deserialize_with = "nullable")]
    annotations: Labels,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    owner_references: Vec<OwnerReference>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct OwnerReference {
    kind: String,
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    controller: bool,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct OnlyMetadata {
    metadata: Metadata,
}

pub(in crate::translate) fn namespace(object: &Object, report: &mut Report) -> Option<Namespace> {
    let OnlyMetadata { metadata } = report.read(object)?;
    let mode = mode(&metadata.labels, None, report);
    report.unless_broken(Namespace { mode })
}

pub(in crate::translate) fn node(object: &Object, report: &mut Report) -> Option<Node> {
    let OnlyMetadata { metadata } = report.read(object)?;
    let label = |key: &str| metadata.labels.get(key).map(String::as_str).unwrap_or_default().into();
    let locality =
        Locality { region: label("topology.kubernetes.io/region"), zone: label("topology.kubernetes.io/zone") };
    report.unless_broken(Node { locality })
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WithHandler {
    metadata: Metadata,
    handler: String,
}

pub(in crate::translate) fn runtime_class(object: &Object, report: &mut Report) -> Option<RuntimeClass> {
    let WithHandler { metadata: Metadata { .. }, handler } = report.read(object)?;
    report.unless_broken(RuntimeClass { handler })
}

/// Nothing of a ServiceAccount is needed; a broken one is reported all the same.
pub(in crate::translate) fn service_account(object: &Object, report: &mut Report) -> Option<()> {
    let OnlyMetadata { .. } = report.read(object)?;
    Some(())
}

/// `otherwise` says what holds in place of a wrong label. Where nothing does, the object is broken: a slip of the pen must
/// not take a namespace out of the mesh.
fn mode(labels: &Labels, otherwise: Option<&str>, report: &mut Report) -> Mode {
    let mut read =
        |label: &str, yes: &str, no: &str, otherwise: Option<&str>| match labels.get(label).map(String::as_str) {
            None => (None, false),
            Some(value) if value == yes => (Some(true), false),
            Some(value) if value == no => (Some(false), false),
            Some(value) => {
                let field = format!("metadata.labels[{label}]");
                match otherwise {
                    Some(otherwise) => {
                        report.warning(&field, format!("`{value}` is no mode, so {otherwise}: use {yes} or {no}"));
                    }
                    None => report.error(&field, format!("`{value}` is no mode: use {yes} or {no}")),
                }
                (None, true)
            }
        };
    let (nodemesh, nodemesh_is_wrong) = read(MODE, "enabled", "disabled", otherwise);
    let passed_over = Some(otherwise.unwrap_or("the label is passed over"));
    let (istio, istio_is_wrong) = read("istio.io/dataplane-mode", "ambient", "none", passed_over);
    Mode { nodemesh, istio, nodemesh_is_wrong, istio_is_wrong }
}
