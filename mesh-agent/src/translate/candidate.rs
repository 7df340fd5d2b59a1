//! Who may have which identity, judged for one pod at a time and before it has an address: a certificate is asked for while
//! the pod's network is being made, and the model has only pods that can be reached.

use super::kubernetes::{self, Mode};
use super::report::Report;
use super::{Object, Settings};
use crate::model::SpiffeId;

/// A pod that is on a node, has a network of its own, and has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub namespace: String,
    pub node: String,
    pub identity: SpiffeId,
    mode: Mode,
}

/// What a namespace's labels say of its pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceMode(Mode);

/// Why there is no candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoCandidate {
    /// The pod cannot be read: what was known of it stays.
    Broken,
    /// It is on no node, in the host's network, or has ended.
    Outside,
}

impl Candidate {
    pub fn new(settings: &Settings, pod: &Object) -> Result<Self, NoCandidate> {
        let read = kubernetes::pod(pod, &mut Report::of(pod)).ok_or(NoCandidate::Broken)?;
        if read.node.is_empty() || read.host_network || read.ended {
            return Err(NoCandidate::Outside);
        }
        let identity = SpiffeId::new(&settings.trust_domain, &read.namespace, &read.service_account)
            .map_err(|_| NoCandidate::Broken)?;
        Ok(Self { namespace: read.namespace, node: read.node, identity, mode: read.mode })
    }

    /// Whether it is in the mesh; the pod's own label comes before its namespace's.
    pub fn is_enrolled(&self, settings: &Settings, namespace: Option<NamespaceMode>) -> bool {
        let istio = settings.istio_labels;
        self.mode.enabled(istio).or_else(|| namespace.and_then(|n| n.0.enabled(istio))).unwrap_or(false)
    }
}

impl NamespaceMode {
    /// `None`: its label has a wrong value, so what was known of it stays.
    pub fn new(namespace: &Object) -> Option<Self> {
        kubernetes::namespace(namespace, &mut Report::of(namespace)).map(|n| Self(n.mode))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::TrustDomain;

    fn object(value: Value) -> Object {
        Object::from_value("", value).unwrap().remove(0)
    }

    fn settings() -> Settings {
        Settings::new(TrustDomain::new("cluster.local").unwrap())
    }

    fn pod(spec: Value, phase: &str, labels: Value) -> Object {
        object(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "web", "namespace": "shop", "labels": labels},
            "spec": spec, "status": {"phase": phase},
        }))
    }

    fn namespace(labels: Value) -> Option<NamespaceMode> {
        let value = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": labels}});
        NamespaceMode::new(&object(value))
    }

    #[test]
    fn a_pod_counts_from_the_moment_it_is_scheduled_until_it_has_ended() {
        let spec = json!({"nodeName": "n1", "serviceAccountName": "web"});
        let found = Candidate::new(&settings(), &pod(spec.clone(), "Pending", json!({}))).unwrap();
        assert_eq!(
            (found.node.as_str(), found.identity.to_string().as_str()),
            ("n1", "spiffe://cluster.local/ns/shop/sa/web")
        );
        let host = json!({"nodeName": "n1", "hostNetwork": true});
        let nowhere = json!({"serviceAccountName": "web"});
        for (spec, phase) in [(spec.clone(), "Succeeded"), (spec, "Failed"), (host, "Running"), (nowhere, "Pending")] {
            let found = Candidate::new(&settings(), &pod(spec.clone(), phase, json!({})));
            assert_eq!(found, Err(NoCandidate::Outside), "{spec} {phase}");
        }
        let broken = pod(json!({"nodeName": 7}), "Running", json!({}));
        assert_eq!(Candidate::new(&settings(), &broken), Err(NoCandidate::Broken));
    }

    #[test]
    fn the_pods_label_comes_before_its_namespaces() {
        let (yes, no) = (json!({"nodemesh.io/mode": "enabled"}), json!({"nodemesh.io/mode": "disabled"}));
        let enrolled = |pod_labels: &Value, of_namespace: Option<NamespaceMode>| {
            let pod = pod(json!({"nodeName": "n1"}), "Pending", pod_labels.clone());
            Candidate::new(&settings(), &pod).unwrap().is_enrolled(&settings(), of_namespace)
        };
        let none = json!({});
        for (pod_labels, of_namespace, expected) in [
            (&none, namespace(none.clone()), false),
            (&none, namespace(yes.clone()), true),
            (&no, namespace(yes.clone()), false),
            (&yes, namespace(no.clone()), true),
            (&yes, None, true),
            (&none, None, false),
        ] {
            assert_eq!(enrolled(pod_labels, of_namespace), expected, "{pod_labels} {of_namespace:?}");
        }
        assert_eq!(namespace(json!({"nodemesh.io/mode": "on"})), None);
    }
}
