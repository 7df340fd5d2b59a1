//! The pods of one node as the mesh sees them, with or without an address: who is in it, who cannot be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

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
    /// What the node calls a static pod in place of its uid: in its cgroups, and towards the CNI plugin.
    pub static_uid: Option<Arc<str>>,
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

/// A pod that started while nobody could say whether it is in the mesh, as the container runtime has named it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unjudged {
    pub namespace: String,
    pub name: String,
    /// Empty where the runtime gives none.
    pub uid: String,
}

impl Unjudged {
    /// Whether it is this pod.
    pub fn is(&self, uid: &str, pod: &NodePod) -> bool {
        let same_uid = self.uid.is_empty() || self.uid == uid || pod.static_uid.as_deref() == Some(&self.uid);
        same_uid && self.namespace == *pod.namespace && self.name == *pod.name
    }
}
