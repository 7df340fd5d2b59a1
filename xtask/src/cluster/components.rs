//! The programs of a cluster: with which settings each runs, and how one sees that it is ready.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::build::Programs;
use super::command::{self, SHORT};
use super::layout::{CONTROL, Cluster, DNS, NODES, Node, PODS, SERVICES, control_addresses};
use super::process;

/// The image that holds a pod's namespaces. No registry has it: it is imported on each node.
pub const PAUSE_IMAGE: &str = "nodemesh.invalid/pause:1";

const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// How one sees that a program is ready.
#[derive(Debug, Clone)]
pub enum Probe {
    /// It answers 200 there, asked from its own place.
    Url(&'static str),
    /// The API server says so to its administrator.
    ApiServer,
    /// It answers on its socket.
    Containerd,
}

pub struct Component {
    pub place: &'static str,
    pub name: &'static str,
    pub args: Vec<String>,
    pub probe: Probe,
}

/// In the order in which they start.
pub fn control_plane(cluster: &Cluster) -> Vec<Component> {
    let pki = |file: &str| cluster.pki().join(file).display().to_string();
    let component = |name, probe, args| Component { place: CONTROL, name, args, probe };
    let [v4, _] = control_addresses();
    vec![
        component(
            "etcd",
            Probe::Url("http://127.0.0.1:2379/health"),
            flags(&[
                ("data-dir", &cluster.place(CONTROL).join("etcd").display().to_string()),
                ("listen-client-urls", "http://127.0.0.1:2379"),
                ("advertise-client-urls", "http://127.0.0.1:2379"),
                ("listen-peer-urls", "http://127.0.0.1:2380"),
                ("initial-advertise-peer-urls", "http://127.0.0.1:2380"),
                ("initial-cluster", "default=http://127.0.0.1:2380"),
                // What is in it need not outlive the machine.
                ("unsafe-no-fsync", "true"),
            ]),
        ),
        component(
            "kube-apiserver",
            Probe::ApiServer,
            flags(&[
                ("etcd-servers", "http://127.0.0.1:2379"),
                ("advertise-address", &v4.to_string()),
                ("bind-address", "::"),
                ("secure-port", "6443"),
                ("service-cluster-ip-range", SERVICES),
                ("client-ca-file", &pki("ca.crt")),
                ("tls-cert-file", &pki("apiserver.crt")),
                ("tls-private-key-file", &pki("apiserver.key")),
                ("service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
                ("service-account-key-file", &pki("service-account.pub")),
                ("service-account-signing-key-file", &pki("service-account.key")),
                ("authorization-mode", "Node,RBAC"),
                ("enable-admission-plugins", "NodeRestriction"),
                ("allow-privileged", "true"),
                ("kubelet-preferred-address-types", "InternalIP"),
                ("kubelet-certificate-authority", &pki("ca.crt")),
                ("kubelet-client-certificate", &pki("apiserver-kubelet.crt")),
                ("kubelet-client-key", &pki("apiserver-kubelet.key")),
                // There is no kube-proxy where it runs: it calls webhooks at their pods, not at their Service.
                ("enable-aggregator-routing", "true"),
            ]),
        ),
        component(
            "kube-controller-manager",
            Probe::Url("https://127.0.0.1:10257/healthz"),
            flags(&[
                ("kubeconfig", &pki("controller-manager.conf")),
                ("bind-address", "127.0.0.1"),
                ("leader-elect", "false"),
                ("use-service-account-credentials", "true"),
                ("service-account-private-key-file", &pki("service-account.key")),
                ("root-ca-file", &pki("ca.crt")),
                ("cluster-signing-cert-file", &pki("ca.crt")),
                ("cluster-signing-key-file", &pki("ca.key")),
                // Its default is a folder of the machine, which it makes.
                ("flex-volume-plugin-dir", &cluster.place(CONTROL).join("volume-plugins").display().to_string()),
                // Each node's CNI settings hold its range.
                ("allocate-node-cidrs", "false"),
            ]),
        ),
        component(
            "kube-scheduler",
            Probe::Url("https://127.0.0.1:10259/healthz"),
            flags(&[("kubeconfig", &pki("scheduler.conf")), ("bind-address", "127.0.0.1"), ("leader-elect", "false")]),
        ),
    ]
}

pub fn containerd(node: Node) -> Component {
    let args = flags(&[("config", "/run/node/state/containerd.toml")]);
    Component { place: node.name, name: "containerd", args, probe: Probe::Containerd }
}

/// What comes after containerd has the pause image.
pub fn node_programs(cluster: &Cluster, node: Node) -> Vec<Component> {
    let pki = |file: &str| cluster.pki().join(file).display().to_string();
    let [v4, v6] = node.addresses();
    let kubelet = flags(&[
        ("config", "/run/node/state/kubelet.yaml"),
        ("kubeconfig", &pki(&format!("{}.conf", node.name))),
        ("hostname-override", node.name),
        ("node-ip", &format!("{v4},{v6}")),
        ("node-labels", &format!("topology.kubernetes.io/zone=zone-{}", node.number)),
        ("root-dir", "/var/lib/kubelet"),
        ("cert-dir", "/var/lib/kubelet/pki"),
    ]);
    let proxy = flags(&[
        ("kubeconfig", &pki("proxy.conf")),
        ("hostname-override", node.name),
        ("proxy-mode", "nftables"),
        ("cluster-cidr", PODS),
        // These are the whole machine's.
        ("conntrack-max-per-core", "0"),
        ("oom-score-adj", "0"),
    ]);
    vec![
        Component {
            place: node.name,
            name: "kubelet",
            args: kubelet,
            probe: Probe::Url("http://127.0.0.1:10248/healthz"),
        },
        Component {
            place: node.name,
            name: "kube-proxy",
            args: proxy,
            probe: Probe::Url("http://127.0.0.1:10256/healthz"),
        },
    ]
}

/// All of them, for a look at each.
pub fn all(cluster: &Cluster) -> Vec<Component> {
    let mut all = control_plane(cluster);
    for node in NODES {
        all.push(containerd(node));
        all.extend(node_programs(cluster, node));
    }
    all
}

fn flags(flags: &[(&str, &str)]) -> Vec<String> {
    flags.iter().map(|(name, value)| format!("--{name}={value}")).collect()
}

/// Whether the program is ready now. One that can't be asked is not.
pub fn is_ready(cluster: &Cluster, programs: &Programs, component: &Component) -> bool {
    let answer = match component.probe {
        Probe::Url(url) => {
            process::within(cluster, component.place).and_then(|mut command| {
                // What is asked for is health, on loopback: whose certificate it shows does not matter.
                command.args(["curl", "--silent", "--insecure", "--fail", "--noproxy", "*", "--max-time", "2", url]);
                command::output(command, SHORT)
            })
        }
        Probe::ApiServer => kubectl(cluster, programs, &["get", "--raw", "/readyz"]),
        Probe::Containerd => ctr(cluster, programs, component.place, &["version"]),
    };
    answer.is_ok()
}

/// `kubectl` as the cluster's administrator.
pub fn kubectl(cluster: &Cluster, programs: &Programs, args: &[&str]) -> Result<String> {
    let mut command = process::within(cluster, CONTROL)?;
    command.arg(programs.path("kubectl")).arg(format!("--kubeconfig={}", cluster.kubeconfig().display()));
    command.arg("--request-timeout=10s").args(args);
    command::output(command, SHORT)
}

/// `ctr` on a node, where kubelet's images and containers are.
pub fn ctr(cluster: &Cluster, programs: &Programs, node: &str, args: &[&str]) -> Result<String> {
    let mut command = process::within(cluster, node)?;
    command.arg(programs.path("ctr")).args(["--address", CONTAINERD_SOCKET, "--namespace", "k8s.io"]).args(args);
    command::output(command, 3 * SHORT)
}

/// The files that a node's programs read, below its folder.
pub fn write_settings(cluster: &Cluster, node: Node) -> Result<()> {
    let folder = cluster.place(node.name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    write("containerd.toml", &containerd_settings())?;
    write("kubelet.yaml", &kubelet_settings(cluster, node))?;
    write("cni.conflist", &cni_settings(node, bridges_are_filtered()))
}

fn containerd_settings() -> String {
    // restrict_oom_score_adj: without CAP_SYS_RESOURCE runc cannot lower it, and dies. disable_apparmor: a profile would
    // be loaded for the whole machine, and stay.
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "{CONTAINERD_SOCKET}"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE_IMAGE}"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
disable_apparmor = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/opt/cni/bin", "/usr/lib/cni"]
conf_dir = "/etc/cni/net.d"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = false
"#
    )
}

fn kubelet_settings(cluster: &Cluster, node: Node) -> String {
    let pki = |file: &str| cluster.pki().join(file).display().to_string();
    // A full disk or little memory of the developer's machine must not evict pods.
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1\n\
         kind: KubeletConfiguration\n\
         authentication:\n  anonymous: {{enabled: false}}\n  webhook: {{enabled: true}}\n  x509: {{clientCAFile: {ca}}}\n\
         authorization: {{mode: Webhook}}\n\
         tlsCertFile: {certificate}\n\
         tlsPrivateKeyFile: {key}\n\
         containerRuntimeEndpoint: unix://{CONTAINERD_SOCKET}\n\
         cgroupDriver: cgroupfs\n\
         cgroupRoot: /{cgroup}\n\
         failCgroupV1: false\n\
         failSwapOn: false\n\
         enforceNodeAllocatable: []\n\
         oomScoreAdj: 0\n\
         volumePluginDir: /var/lib/kubelet/volume-plugins\n\
         resolvConf: /dev/null\n\
         clusterDomain: cluster.local\n\
         clusterDNS: [{DNS}]\n\
         makeIPTablesUtilChains: false\n\
         imageGCHighThresholdPercent: 100\n\
         evictionHard:\n  memory.available: 0%\n  nodefs.available: 0%\n  nodefs.inodesFree: 0%\n  imagefs.available: 0%\n  \
         imagefs.inodesFree: 0%\n",
        ca = pki("ca.crt"),
        certificate = pki(&format!("{}.crt", node.name)),
        key = pki(&format!("{}.key", node.name)),
        cgroup = cluster.cgroup(node.name),
    )
}

/// Whether nftables sees what crosses a bridge: the kernel's br_netfilter is there.
fn bridges_are_filtered() -> bool {
    Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables").exists()
}

/// Pods on a bridge, or routed one by one where `filtered` is false: an answer that crosses an unfiltered bridge from pod
/// to pod misses the translation of its Service. Loading br_netfilter would change every bridge of the machine. Always
/// routing would make each pod's start two seconds longer, in which `ptp` waits for IPv6 to find no duplicate address.
fn cni_settings(node: Node, filtered: bool) -> String {
    let [v4, v6] = node.pods();
    let mut plugin = if filtered {
        json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true})
    } else {
        json!({"type": "ptp"})
    };
    plugin["ipam"] = json!({
        "type": "host-local",
        "ranges": [[{"subnet": v4}], [{"subnet": v6}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    });
    let ports = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    json!({"cniVersion": "1.0.0", "name": "cluster", "plugins": [plugin, ports]}).to_string()
}

/// Brings an image onto a node.
pub fn import(cluster: &Cluster, programs: &Programs, node: Node, archive: &Path) -> Result<()> {
    let path = archive.to_str().context("the archive's name is not UTF-8")?;
    ctr(cluster, programs, node.name, &["images", "import", path]).map(drop)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn pods_are_bridged_only_where_services_work_so() {
        for (filtered, kind) in [(true, "bridge"), (false, "ptp")] {
            let settings: Value = serde_json::from_str(&cni_settings(NODES[0], filtered)).unwrap();
            assert_eq!(settings["plugins"][0]["type"], kind);
            assert_eq!(settings["plugins"][0]["ipam"]["ranges"][0][0]["subnet"], "10.244.1.0/24");
        }
        assert_ne!(cni_settings(NODES[0], true), cni_settings(NODES[1], true), "each node has a range of its own");
    }
}
