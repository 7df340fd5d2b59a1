//! The Container Network Interface, versions 0.3.0 to 1.1.0: what the runtime hands to a plugin, and how it is answered.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::json::member;

/// The versions that this plugin speaks. What it hands on is the result of the plugin before it, whose form it need not know
/// but for the addresses, and those look the same in all of these.
pub(super) const VERSIONS: &[&str] = &["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

pub(super) const DEFAULT_SOCKET: &str = "/run/nodemesh/cni.sock";
pub(super) const DEFAULT_MEMBERS: &str = "/var/lib/nodemesh/cni-members.json";
/// Kubelet gives up on a pod's sandbox after two minutes.
pub(super) const DEFAULT_TIMEOUT: u64 = 30;
const MAX_TIMEOUT: u64 = 110;

/// The variables of a call that count.
#[derive(Debug, Clone, Default)]
pub(super) struct Environment {
    pub command: String,
    pub container: String,
    pub netns: String,
    pub interface: String,
    pub args: String,
}

impl Environment {
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name| get(name).unwrap_or_default();
        Self {
            command: get("CNI_COMMAND"),
            container: get("CNI_CONTAINERID"),
            netns: get("CNI_NETNS"),
            interface: get("CNI_IFNAME"),
            args: get("CNI_ARGS"),
        }
    }

    /// Of CNI_ARGS, `K8S_POD_NAME=web;K8S_POD_UID=...`.
    fn arg(&self, name: &str) -> &str {
        let mut pairs = self.args.split(';').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value).unwrap_or_default()
    }

    /// `None` for what is no pod of Kubernetes.
    pub fn pod(&self) -> Option<Pod> {
        let of = |name: &str| self.arg(name).to_owned();
        let pod = Pod { namespace: of("K8S_POD_NAMESPACE"), name: of("K8S_POD_NAME"), uid: of("K8S_POD_UID") };
        (!pod.namespace.is_empty() && !pod.name.is_empty()).then_some(pod)
    }

    /// The variable must be there.
    pub fn need(&self, name: &str, value: &str) -> Result<(), Fault> {
        match value {
            "" => Err(Fault::new(
                Fault::ENVIRONMENT,
                format!("{name} is not set: {} is to be called by a container runtime", super::PLUGIN),
            )),
            _ => Ok(()),
        }
    }
}

/// Whom the runtime calls for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pod {
    pub namespace: String,
    pub name: String,
    /// Empty where the runtime does not give it.
    pub uid: String,
}

impl std::fmt::Display for Pod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pod {}/{}", self.namespace, self.name)
    }
}

/// Our entry of the list of plugins, as the runtime hands it over.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(super) struct Network {
    #[serde(default)]
    cni_version: String,
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    #[serde(default = "default_members")]
    pub members: PathBuf,
    /// Anything else than a number that can be used is passed over: the agent puts it right, and a slip of the pen must not
    /// keep all pods of the node from starting.
    #[serde(default)]
    timeout_seconds: Value,
    #[serde(default)]
    prev_result: Option<PrevResult>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<ValidAttachment>>,
}

#[derive(Debug, Clone, Deserialize)]
struct ValidAttachment {
    #[serde(default, rename = "containerID")]
    container: String,
}

/// The result of the plugins before, as far as it is read.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(expecting = "an object")]
struct PrevResult {
    #[serde(default)]
    interfaces: Option<Vec<Interface>>,
    #[serde(default)]
    ips: Option<Vec<Ip>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Interface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Ip {
    address: String,
    interface: Option<i64>,
}

fn default_socket() -> PathBuf {
    DEFAULT_SOCKET.into()
}

fn default_members() -> PathBuf {
    DEFAULT_MEMBERS.into()
}

impl Network {
    pub fn read(text: &str) -> Result<Self, Fault> {
        let unreadable = |why: String| {
            let message =
                format!("the network configuration cannot be read: {why}; correct the entry {}", super::PLUGIN);
            Fault::new(Fault::DECODE, message)
        };
        // An array would do for a struct of defaults.
        if !text.trim_start().starts_with('{') {
            return Err(unreadable("it is no object".to_owned()));
        }
        let network: Self = serde_json::from_str(text).map_err(|e| unreadable(e.to_string()))?;
        if !VERSIONS.contains(&network.cni_version.as_str()) {
            let message = format!(
                "cniVersion `{}` is not known; write one of {} into the network configuration",
                network.cni_version,
                VERSIONS.join(", ")
            );
            return Err(Fault::new(Fault::VERSION, message));
        }
        Ok(network)
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_secs(timeout(&self.timeout_seconds).unwrap_or(DEFAULT_TIMEOUT))
    }

    /// The result of the plugin before, byte by byte: what is handed on.
    pub fn prev_result<'a>(&self, text: &'a str) -> Result<&'a str, Fault> {
        let missing = || {
            let message =
                format!("prevResult is missing: {} must come after the plugin that makes the network", super::PLUGIN);
            Fault::new(Fault::NETWORK, message)
        };
        self.prev_result.as_ref().ok_or_else(missing)?;
        member(text, "prevResult").and_then(|place| text.get(place)).ok_or_else(missing)
    }

    /// The pod's addresses: those of the interface `name` inside the sandbox, IPv4 first as in the pod's status.
    pub fn addresses(&self, name: &str) -> Vec<IpAddr> {
        let Some(result) = &self.prev_result else { return Vec::new() };
        let interfaces = result.interfaces.as_deref().unwrap_or_default();
        let is_the_pods =
            |ip: &Ip| match ip.interface.and_then(|i| usize::try_from(i).ok()).and_then(|i| interfaces.get(i)) {
                Some(interface) => !interface.sandbox.is_empty() && interface.name == name,
                None => true,
            };
        let ips = result.ips.as_deref().unwrap_or_default().iter().filter(|ip| is_the_pods(ip));
        let mut addresses: Vec<IpAddr> = ips.filter_map(|ip| ip.address.split('/').next()?.parse().ok()).collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        addresses.dedup_by_key(|ip| ip.is_ipv6());
        addresses
    }

    /// For GC: the containers that are still there; `None` where the runtime does not say.
    pub fn valid_containers(&self) -> Option<Vec<String>> {
        Some(self.valid_attachments.as_ref()?.iter().map(|a| a.container.clone()).collect())
    }
}

/// The seconds of an entry's `timeoutSeconds`, if they can be used.
pub(super) fn timeout(value: &Value) -> Option<u64> {
    value.as_u64().filter(|seconds| (1..=MAX_TIMEOUT).contains(seconds))
}

/// What the runtime gets in place of a result: a code of the specification, and one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub code: u32,
    pub message: String,
}

impl Fault {
    pub const VERSION: u32 = 1;
    pub const ENVIRONMENT: u32 = 4;
    pub const INPUT: u32 = 5;
    pub const DECODE: u32 = 6;
    pub const NETWORK: u32 = 7;
    pub const TRY_AGAIN_LATER: u32 = 11;

    pub fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub fn in_json(&self, network: &str) -> Value {
        json!({"cniVersion": answer_version(network), "code": self.code, "msg": self.message})
    }
}

/// The answer to VERSION.
pub(super) fn versions(network: &str) -> Value {
    json!({"cniVersion": answer_version(network), "supportedVersions": VERSIONS})
}

/// The version that was asked in, if it is one of ours.
fn answer_version(network: &str) -> String {
    let asked: Option<Value> = serde_json::from_str(network).ok();
    let asked = asked.as_ref().and_then(|v| v["cniVersion"].as_str()).filter(|v| VERSIONS.contains(v));
    asked.unwrap_or(VERSIONS[VERSIONS.len() - 1]).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_named_by_the_arguments() {
        let environment = |args: &str| Environment { args: args.into(), ..Environment::default() };
        let pod = environment("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1").pod().unwrap();
        assert_eq!(pod, Pod { namespace: "shop".into(), name: "web".into(), uid: "u1".into() });
        let without_uid = environment("K8S_POD_NAME=web;;K8S_POD_NAMESPACE=shop;x").pod().unwrap();
        assert_eq!(without_uid.uid, "");
        assert_eq!(environment("K8S_POD_NAME=web").pod(), None, "podman and others have no namespace");
        assert_eq!(environment("").pod(), None);
    }

    #[test]
    fn addresses_are_those_of_the_pods_own_interface() {
        let text = r#"{"cniVersion":"1.0.0","prevResult":{"interfaces":[{"name":"br0"},
            {"name":"eth0","sandbox":"/run/netns/x"},{"name":"net1","sandbox":"/run/netns/x"}],
            "ips":[{"address":"fd00::5/64","interface":1},{"address":"10.1.0.5/24","interface":1},
            {"address":"10.1.0.9/24","interface":1},{"address":"10.9.0.5/24","interface":2},{"address":"10.0.0.1/24","interface":0}]}}"#;
        let network = Network::read(text).unwrap();
        let expected: Vec<IpAddr> = vec!["10.1.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
        assert_eq!(network.addresses("eth0"), expected);
        let bare = r#"{"cniVersion":"0.3.1","prevResult":{"ips":[{"version":"4","address":"10.1.0.5/24"}]}}"#;
        assert_eq!(Network::read(bare).unwrap().addresses("eth0"), expected[..1]);
    }

    #[test]
    fn a_configuration_that_cannot_be_used_is_one_sentence_with_the_codes_of_the_specification() {
        for (text, code, message) in [
            ("", Fault::DECODE, "the network configuration cannot be read: "),
            ("[]", Fault::DECODE, "the network configuration cannot be read: "),
            (r#"{"cniVersion":"1.1.0","socket":7}"#, Fault::DECODE, "the network configuration cannot be read: "),
            (r#"{"cniVersion":"0.2.0"}"#, Fault::VERSION, "cniVersion `0.2.0` is not known; write one of 0.3.0, "),
            ("{}", Fault::VERSION, "cniVersion `` is not known"),
        ] {
            let fault = Network::read(text).unwrap_err();
            assert_eq!(fault.code, code, "{text}");
            assert!(fault.message.starts_with(message), "{}", fault.message);
        }
        for (written, seconds) in [("7", 7), ("0", 30), ("600", 30), ("\"5\"", 30), ("-1", 30), ("null", 30)] {
            let text = format!(r#"{{"cniVersion":"1.1.0","timeoutSeconds":{written}}}"#);
            assert_eq!(Network::read(&text).unwrap().timeout().as_secs(), seconds, "{written}");
        }
        let first = r#"{"cniVersion":"1.1.0"}"#;
        let fault = Network::read(first).unwrap().prev_result(first).unwrap_err();
        assert_eq!(fault.code, Fault::NETWORK);
    }
}
