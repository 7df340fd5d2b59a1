//! Every setting, once.

/// Which commands know a setting. One file may serve all of them, as the ConfigMap `nodemesh` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Node,
    Controller,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    One,
    /// May be given more than once; commas part the values of a variable.
    Many,
    /// `--name`, `--name=true`, `--name=false`.
    Switch,
}

#[derive(Debug)]
pub struct Setting {
    /// As the flag has it: `node-name`.
    pub name: &'static str,
    /// What stands for the value in `--help`.
    pub value: &'static str,
    pub help: &'static str,
    /// As `--help` shows it; empty where there is none.
    pub default: &'static str,
    pub heading: &'static str,
    pub kind: Kind,
    pub roles: &'static [Role],
    pub hidden: bool,
}

impl Setting {
    /// `NODEMESH_NODE_NAME`
    pub fn variable(&self) -> String {
        format!("NODEMESH_{}", self.name.replace('-', "_").to_uppercase())
    }

    /// `nodeName`, in the file.
    pub fn key(&self) -> String {
        let mut parts = self.name.split('-');
        let mut key = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let (head, tail) = part.split_at(1);
            key += &head.to_uppercase();
            key += tail;
        }
        key
    }

    pub fn named(name: &str) -> Option<&'static Setting> {
        SETTINGS.iter().find(|s| s.name == name)
    }
}

const NODE: &[Role] = &[Role::Node];
const CONTROLLER: &[Role] = &[Role::Controller];
const BOTH: &[Role] = &[Role::Node, Role::Controller];

const fn one(
    heading: &'static str,
    roles: &'static [Role],
    name: &'static str,
    value: &'static str,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting { name, value, help, default, heading, kind: Kind::One, roles, hidden: false }
}

const fn many(
    heading: &'static str,
    roles: &'static [Role],
    name: &'static str,
    value: &'static str,
    help: &'static str,
) -> Setting {
    Setting { name, value, help, default: "", heading, kind: Kind::Many, roles, hidden: false }
}

const fn switch(heading: &'static str, roles: &'static [Role], name: &'static str, help: &'static str) -> Setting {
    Setting { name, value: "BOOL", help, default: "", heading, kind: Kind::Switch, roles, hidden: false }
}

const PLACE: &str = "Place";
const CERTIFICATES: &str = "Certificates";
const MESH: &str = "Mesh";
const KERNEL: &str = "Kernel";
const OBSERVE: &str = "To be seen";

/// In the order in which `--help` shows them.
pub const SETTINGS: &[Setting] = &[
    one(PLACE, NODE, "node-name", "NAME", "the hostname", "This node, as spec.nodeName of its pods has it"),
    one(PLACE, BOTH, "source", "KIND", "directory", "Where objects are read: directory or kubernetes"),
    one(PLACE, BOTH, "config-dir", "DIR", "/etc/nodemesh/manifests", "Directory of manifests, watched"),
    one(PLACE, BOTH, "kubeconfig", "FILE", "the pod's account", "How to reach the Kubernetes API"),
    one(PLACE, BOTH, "namespace", "NAME", "nodemesh-system", "Where the mesh is installed in Kubernetes"),
    one(PLACE, BOTH, "state-dir", "DIR", "/var/lib/nodemesh", "Where keys and state survive a restart"),
    one(PLACE, NODE, "admin-socket", "PATH", "/run/nodemesh/admin.sock", "Unix socket that meshctl asks"),
    one(PLACE, NODE, "cni-conf-dir", "DIR", "", "The node's CNI configurations; pods that start wait for the mesh"),
    one(PLACE, NODE, "cni-bin-dir", "DIR", "", "The node's CNI plugins, where mesh-cni is installed"),
    one(PLACE, NODE, "cni-socket", "PATH", "/run/nodemesh/cni.sock", "Unix socket that mesh-cni asks"),
    one(PLACE, NODE, "workers", "N", "0", "Threads that carry traffic; 0 is one for each core"),
    one(PLACE, NODE, "drain-timeout", "TIME", "5s", "How long open connections may go on after SIGTERM"),
    one(PLACE, NODE, "upgrade-drain", "TIME", "1h", "How long they may after another agent took over"),
    switch(PLACE, NODE, "take-over", "Take over from an agent of this node that runs"),
    one(PLACE, CONTROLLER, "listen", "IP:PORT", "0.0.0.0:15012", "Where nodes ask for certificates"),
    one(
        PLACE,
        CONTROLLER,
        "webhook-address",
        "IP:PORT",
        "0.0.0.0:15017",
        "Where the Kubernetes API asks about objects",
    ),
    switch(CERTIFICATES, NODE, "embedded-ca", "Run the certificate authority inside this agent"),
    many(CERTIFICATES, NODE, "ca-address", "HOST:PORT", "A controller that signs certificates; may be repeated"),
    one(CERTIFICATES, NODE, "join-token-file", "FILE", "", "Token from `mesh-agent controller token`"),
    one(CERTIFICATES, NODE, "ca-token-file", "FILE", "", "Token of a service account, in place of a join token"),
    one(CERTIFICATES, CONTROLLER, "ca-dir", "DIR", "", "Your own CA as PEM files, in place of one made at first start"),
    many(CERTIFICATES, CONTROLLER, "san", "NAME", "A name or address nodes reach this controller by; may be repeated"),
    one(CERTIFICATES, BOTH, "cert-lifetime", "TIME", "24h", "How long a workload's certificate is good for"),
    one(MESH, BOTH, "trust-domain", "NAME", "cluster.local", "Trust domain of the mesh's identities"),
    one(MESH, BOTH, "cluster-domain", "NAME", "cluster.local", "DNS suffix of services"),
    one(MESH, NODE, "cluster-id", "NAME", "Kubernetes", "Name of this cluster in metrics"),
    one(MESH, BOTH, "root-namespace", "NAME", "istio-system", "Namespace whose policies hold for the whole mesh"),
    switch(MESH, BOTH, "istio-labels", "Read Istio's enrolment labels too"),
    one(MESH, NODE, "outbound-policy", "POLICY", "ALLOW_ANY", "Outside destinations: ALLOW_ANY or REGISTRY_ONLY"),
    one(KERNEL, NODE, "bpffs", "DIR", "/sys/fs/bpf", "Where a bpffs is mounted"),
    one(KERNEL, NODE, "cgroup", "DIR", "found in /proc/mounts", "The cgroup2 mount"),
    one(KERNEL, NODE, "probe-cgroup", "DIR", "", "Cgroup whose processes may probe pods (kubelet's)"),
    one(KERNEL, NODE, "host-proc", "DIR", "/proc", "Where the node's /proc is, to find pods in"),
    switch(KERNEL, NODE, "kernel-log", "Log what the kernel programs do (slow)"),
    Setting {
        name: "orig-dst-entries",
        value: "N",
        help: "Size of the kernel's map of original destinations",
        default: "65536",
        heading: KERNEL,
        kind: Kind::One,
        roles: NODE,
        hidden: true,
    },
    one(OBSERVE, BOTH, "metrics-address", "IP:PORT", "0.0.0.0:15020", "Prometheus metrics, at /metrics"),
    one(
        OBSERVE,
        BOTH,
        "readiness-address",
        "IP:PORT",
        "0.0.0.0:15021",
        "Readiness and liveness, at /healthz/ready and /healthz/live",
    ),
    one(OBSERVE, NODE, "access-log", "FORMAT", "text", "A line for each connection, on stdout: text, json or off"),
    one(OBSERVE, BOTH, "log", "FILTER", "info", "The agent's log, on stderr: a level, or target=level,..."),
    one(OBSERVE, BOTH, "log-format", "FORMAT", "text", "Form of the agent's log: text or json"),
];
