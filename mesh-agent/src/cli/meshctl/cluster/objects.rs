//! The kinds that an installation is made of, in the order in which they are made, and what is said of an object.

use std::borrow::Cow;

use anyhow::anyhow;
use serde_json::Value;

use crate::api_server::Kind;

/// On every object of ours, as the chart has it.
pub(super) const OURS: &str = "app.kubernetes.io/name=nodemesh,app.kubernetes.io/part-of=nodemesh";
pub(super) const AGENT: &str = "nodemesh-agent";
pub(super) const CONTROLLER: &str = "nodemesh-controller";
pub(super) const MODE: &str = "nodemesh.io/mode";
pub(super) const STATUS: &str = "nodemesh.io/status";

const RBAC: &str = "rbac.authorization.k8s.io";
const ADMISSION: &str = "admissionregistration.k8s.io";

pub(super) const CLUSTER_ROLE: Kind = kind(RBAC, "clusterroles", "ClusterRole", false);
pub(super) const CLUSTER_ROLE_BINDING: Kind = kind(RBAC, "clusterrolebindings", "ClusterRoleBinding", false);

/// What another object needs comes before it. The webhook is last: it is of no use before its controller.
pub(super) static KINDS: [Kind; 16] = [
    Kind::NAMESPACE,
    Kind::CUSTOM_RESOURCE_DEFINITION,
    Kind::SERVICE_ACCOUNT,
    // Before the rights that they narrow.
    kind(ADMISSION, "validatingadmissionpolicies", "ValidatingAdmissionPolicy", false),
    kind(ADMISSION, "validatingadmissionpolicybindings", "ValidatingAdmissionPolicyBinding", false),
    CLUSTER_ROLE,
    CLUSTER_ROLE_BINDING,
    kind(RBAC, "roles", "Role", true),
    kind(RBAC, "rolebindings", "RoleBinding", true),
    Kind::CONFIG_MAP,
    Kind::SERVICE,
    kind("policy", "poddisruptionbudgets", "PodDisruptionBudget", true),
    Kind::DEPLOYMENT,
    Kind::DAEMON_SET,
    Kind::VALIDATING_WEBHOOK,
    // Not of the chart: pods and Secrets come and go with the others.
    Kind::LEASE,
];

pub(super) const fn kind(group: &'static str, plural: &'static str, kind: &'static str, namespaced: bool) -> Kind {
    Kind {
        group: Cow::Borrowed(group),
        version: Cow::Borrowed("v1"),
        plural: Cow::Borrowed(plural),
        kind: Cow::Borrowed(kind),
        namespaced,
    }
}

pub(super) fn kind_of(object: &Value) -> anyhow::Result<&'static Kind> {
    KINDS.iter().find(|kind| object["kind"] == *kind.kind && object["apiVersion"] == *kind.api_version()).ok_or_else(
        || anyhow!("the chart has a {} ({}), which meshctl cannot apply", object["kind"], object["apiVersion"]),
    )
}

/// The place of an object in the order; those that are not known are told later.
pub(super) fn order(object: &Value) -> usize {
    KINDS.iter().position(|kind| object["kind"] == *kind.kind).unwrap_or(KINDS.len())
}

pub(super) fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

pub(super) fn namespace(object: &Value) -> &str {
    object["metadata"]["namespace"].as_str().unwrap_or_default()
}

/// `DaemonSet nodemesh-agent`
pub(super) fn title(object: &Value) -> String {
    format!("{} {}", object["kind"].as_str().unwrap_or_default(), name(object))
}

pub(super) fn is_ours(object: &Value) -> bool {
    let labels = &object["metadata"]["labels"];
    OURS.split(',').all(|pair| pair.split_once('=').is_some_and(|(key, value)| labels[key] == value))
}
