//! Settings that change while the agent runs: the ConfigMap `nodemesh`, read again under the same flags and variables.

use super::{ConfigError, Machine, Node, Written};

/// What takes effect at once; for all else the agent must be started again.
const LIVE: [&str; 11] = [
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

/// How the settings of this process came about, but for the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Live {
    /// Flags and variables, which stand above any file.
    laid: Written,
    machine: Machine,
    /// What is in force.
    written: Written,
}

/// What a text of settings would change.
#[derive(Debug)]
pub struct Changed {
    /// All that can be changed now is.
    pub node: Node,
    /// Names of settings that wait for a restart.
    pub waiting: Vec<&'static str>,
}

impl Live {
    /// `laid` are flags and variables, `written` the same with the file below.
    pub fn new(laid: Written, written: Written, machine: Machine) -> Self {
        Self { laid, machine, written }
    }

    /// Reads `text`, which stands in `file`; `node` is what is in force. An error leaves everything as it is.
    pub fn read(&mut self, file: &str, text: &str, node: &Node) -> Result<Changed, ConfigError> {
        let mut written = self.laid.clone();
        written.parse(file, text)?;
        let next = Node::check(&written, &self.machine)?;
        let waiting = self.written.differing(&written).filter(|name| !LIVE.contains(name)).collect();
        let node = Node {
            logging: super::Logging { filter: next.logging.filter, format: node.logging.format },
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
        Ok(Changed { node, waiting })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Origin, Setting};
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
        let Changed { node, waiting } = live.read("map", text, &node).unwrap();
        assert_eq!((node.logging.filter.as_str(), node.outbound_policy), ("debug", OutboundPolicy::RegistryOnly));
        assert_eq!((waiting, node.workers), (vec!["workers"], 2));
        assert!(node.istio_labels, "a flag stands above the file");
        let back = live.read("map", "workers: 2\n", &node).unwrap();
        assert_eq!((back.waiting, back.node.logging.filter.as_str()), (vec![], "info"));
    }

    #[test]
    fn a_wrong_text_is_one_sentence() {
        let (mut live, node) = live("");
        let error =
            |live: &mut Live, text: &str| live.read("ConfigMap x/nodemesh", text, &node).unwrap_err().to_string();
        assert!(error(&mut live, "workres: 3").starts_with("ConfigMap x/nodemesh: line 1: unknown setting `workres`"));
        assert!(
            error(&mut live, "log: loud").contains("log in ConfigMap x/nodemesh: `loud`"),
            "{}",
            error(&mut live, "log: loud")
        );
    }
}
