//! Settings that change while agent or controller run: the ConfigMap `nodemesh`, read again under the same flags and
//! variables.

use super::{ConfigError, Controller, Logging, Machine, Node, Role, Setting, Written};

/// What takes effect at once in an agent; for all else it must be started again.
const NODE: [&str; 11] = [
    "log",
    "access-log",
    "drain-timeout",
    "upgrade-drain",
    "cert-lifetime",
    "cluster-domain",
    "cluster-id",
    "root-namespace",
    "istio-labels",
    "outbound-policy",
    "probe-cgroup",
];

/// And in a controller.
const CONTROLLER: [&str; 5] = ["log", "cert-lifetime", "cluster-domain", "root-namespace", "istio-labels"];

/// How the settings of this process came about, but for the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Live {
    /// Flags and variables, which stand above any file.
    laid: Written,
    machine: Machine,
    /// What is in force.
    written: Written,
}

/// What a text of settings would change of an agent's, or a controller's.
#[derive(Debug)]
pub struct Changed<C> {
    /// All that can be changed now is.
    pub now: C,
    /// Names of settings that wait for a restart.
    pub waiting: Vec<&'static str>,
}

impl Live {
    /// `laid` are flags and variables, `written` the same with the file below.
    pub fn new(laid: Written, written: Written, machine: Machine) -> Self {
        Self { laid, machine, written }
    }

    /// Reads `text`, which stands in `file`; `node` is what is in force. An error leaves everything as it is.
    pub fn node(&mut self, file: &str, text: &str, node: &Node) -> Result<Changed<Node>, ConfigError> {
        let written = self.written(file, text)?;
        let next = Node::check(&written, &self.machine)?;
        let now = Node {
            logging: Logging { filter: next.logging.filter, format: node.logging.format },
            access_log: next.access_log,
            drain_timeout: next.drain_timeout,
            upgrade_drain: next.upgrade_drain,
            cert_lifetime: next.cert_lifetime,
            cluster_domain: next.cluster_domain,
            cluster_id: next.cluster_id,
            root_namespace: next.root_namespace,
            istio_labels: next.istio_labels,
            outbound_policy: next.outbound_policy,
            probe_cgroup: next.probe_cgroup,
            ..node.clone()
        };
        Ok(Changed { now, waiting: self.waiting(&written, Role::Node, &NODE) })
    }

    /// The same of a controller.
    pub fn controller(
        &mut self,
        file: &str,
        text: &str,
        controller: &Controller,
    ) -> Result<Changed<Controller>, ConfigError> {
        let written = self.written(file, text)?;
        let next = Controller::check(&written)?;
        let now = Controller {
            logging: Logging { filter: next.logging.filter, format: controller.logging.format },
            cert_lifetime: next.cert_lifetime,
            cluster_domain: next.cluster_domain,
            root_namespace: next.root_namespace,
            istio_labels: next.istio_labels,
            ..controller.clone()
        };
        Ok(Changed { now, waiting: self.waiting(&written, Role::Controller, &CONTROLLER) })
    }

    fn written(&self, file: &str, text: &str) -> Result<Written, ConfigError> {
        let mut written = self.laid.clone();
        written.parse(file, text)?;
        Ok(written)
    }

    /// Settings of `role` that differ from those at the start, but for those that are `live`.
    fn waiting(&self, written: &Written, role: Role, live: &[&str]) -> Vec<&'static str> {
        let concerns = |name: &str| Setting::named(name).is_some_and(|setting| setting.roles.contains(&role));
        self.written.differing(written).filter(|name| concerns(name) && !live.contains(name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Origin;
    use crate::model::OutboundPolicy;

    fn live(file: &str) -> (Live, Node) {
        let machine = Machine { hostname: "n1".to_owned(), cores: 2 };
        let mut laid = Written::default();
        for (name, value) in [("embedded-ca", "true"), ("config-dir", "/"), ("istio-labels", "true")] {
            laid.set(Setting::named(name).unwrap(), Origin::Flag, vec![value.to_owned()]);
        }
        let mut written = laid.clone();
        written.parse("file", file).unwrap();
        let node = Node::check(&written, &machine).unwrap();
        (Live::new(laid, written, machine), node)
    }

    #[test]
    fn what_can_change_does_and_the_rest_waits() {
        let (mut live, node) = live("workers: 2\nlog: info\n");
        let text = "workers: 3\nlog: debug\noutboundPolicy: REGISTRY_ONLY\nistioLabels: false\n";
        let Changed { now, waiting } = live.node("map", text, &node).unwrap();
        assert_eq!((now.logging.filter.as_str(), now.outbound_policy), ("debug", OutboundPolicy::RegistryOnly));
        assert_eq!((waiting, now.workers), (vec!["workers"], 2));
        assert!(now.istio_labels, "a flag stands above the file");
        let back = live.node("map", "workers: 2\n", &now).unwrap();
        assert_eq!((back.waiting, back.now.logging.filter.as_str()), (vec![], "info"));
    }

    #[test]
    fn each_role_follows_what_concerns_it() {
        let (mut live, node) = live("trustDomain: a.example\n");
        let controller = Controller::check(&live.written).unwrap();
        let text = "trustDomain: b.example\nlisten: 127.0.0.1:1\nworkers: 3\ncertLifetime: 1h\nrootNamespace: mesh\n";
        let Changed { now, waiting } = live.controller("map", text, &controller).unwrap();
        assert_eq!((now.cert_lifetime.as_secs(), now.root_namespace.as_str()), (3600, "mesh"));
        assert_eq!((waiting, now.trust_domain.to_string().as_str()), (vec!["listen", "trust-domain"], "a.example"));
        assert_eq!(live.node("map", text, &node).unwrap().waiting, ["workers", "trust-domain"], "it listens nowhere");
    }

    #[test]
    fn a_wrong_text_is_one_sentence() {
        let (mut live, node) = live("");
        let error =
            |live: &mut Live, text: &str| live.node("ConfigMap x/nodemesh", text, &node).unwrap_err().to_string();
        assert!(error(&mut live, "workres: 3").starts_with("ConfigMap x/nodemesh: line 1: unknown setting `workres`"));
        assert!(
            error(&mut live, "log: loud").contains("log in ConfigMap x/nodemesh: `loud`"),
            "{}",
            error(&mut live, "log: loud")
        );
    }
}
