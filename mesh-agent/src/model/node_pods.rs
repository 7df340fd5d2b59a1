//! The pods of one node as the mesh sees them, with or without an address: who is in it, who cannot be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What is known of the pods of this node. The data path has no use for it: it reads the `Snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodePods {
    /// The namespaces that are in the mesh, of the whole cluster.
    pub enabled_namespaces: BTreeSet<Arc<str>>,
    /// By uid, as a workload's. Those that have ended are not among them.
    pub pods: BTreeMap<Arc<str>, NodePod>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodePod {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub standing: Standing,
    /// What its annotation `nodemesh.io/status` says.
    pub shown: Option<String>,
    /// What is wrong with its label, which is passed over for that: one sentence.
    pub wrong_label: Option<String>,
}

/// Whether a pod is in the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Standing {
    Enabled,
    /// Neither its own label nor a Namespace says so, and none says the contrary: its Namespace is not known.
    #[default]
    Unclear,
    /// It is not.
    Outside,
    /// It should be and cannot: one sentence.
    Refused(String),
}
