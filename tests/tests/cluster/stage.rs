//! What the cases share: the cluster, the state of its nodes before anything was installed, and manifests.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use mesh_tests::{Kube, cgroup2_mount};

pub const NODES: [&str; 2] = ["n1", "n2"];
const PEER: &str = "nodemesh.invalid/peer:test";
const AGNHOST: &str = "nodemesh.invalid/agnhost:test";
pub const MESH: &str = "nodemesh-system";

pub struct Stage {
    pub kube: Kube,
    /// What was on each node before the mesh came.
    pub before: BTreeMap<&'static str, String>,
    installed: OnceLock<()>,
}

impl Stage {
    pub fn set() -> Self {
        let kube = Kube::of_this_run();
        // Something must have run on each node: a first pod leaves what every pod does.
        let before = NODES.iter().map(|node| (*node, node_state(&kube, node))).collect();
        Self { kube, before, installed: OnceLock::new() }
    }

    /// Installs the mesh, unless a case before has: any case can be run alone.
    pub fn installed(&self) -> &Kube {
        self.installed.get_or_init(|| {
            self.kube.meshctl(&self.install_with(&[])).success();
        });
        &self.kube
    }

    pub fn is_installed(&self) {
        let _ = self.installed.set(());
    }

    /// `meshctl install` with what this cluster needs, and more.
    pub fn install_with<'a>(&self, more: &[&'a str]) -> Vec<&'a str> {
        [&["install", "--timeout", "120s"], self.values().as_slice(), more].concat()
    }

    /// What this cluster needs.
    pub fn values(&self) -> Vec<&'static str> {
        static CGROUP: OnceLock<String> = OnceLock::new();
        let cgroup = CGROUP.get_or_init(|| format!("agent.cgroup={}", cgroup2_mount().display()));
        let mut args = vec!["--profile", "demo", "--set", "image.tag=test", "--set", "image.pullPolicy=Never"];
        args.extend(["--set", cgroup.as_str()]);
        args
    }

    /// A namespace, in the mesh or not said.
    #[track_caller]
    pub fn namespace(&self, name: &str, meshed: bool) {
        // What a run before has left, of a cluster that was kept.
        if !self.kube.get(&["namespace", name]).is_null() {
            self.kube
                .kubectl(&["delete", "namespace", name, "--wait", "--timeout=60s", "--request-timeout=0"])
                .success();
        }
        let label = if meshed { "{nodemesh.io/mode: enabled}" } else { "{}" };
        self.kube.apply(&format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {label}}}\n"));
        // Without it the pods of a new namespace are refused for a moment.
        self.kube.eventually("the namespace has its default account", || {
            self.kube.kubectl(&["-n", name, "get", "serviceaccount", "default"]).ok
        });
    }

    /// Ends the pods and forgets the namespace; its objects go in the background.
    pub fn forget(&self, namespace: &str) {
        self.kube.kubectl(&["delete", "namespace", namespace, "--wait=false"]).success();
    }

    /// Whether the pod says that it is in the mesh.
    pub fn is_in_mesh(&self, namespace: &str, pod: &str) -> bool {
        self.status(namespace, pod) == "enabled"
    }

    /// The annotation by which a pod shows whether it is in the mesh; empty where it has none.
    pub fn status(&self, namespace: &str, pod: &str) -> String {
        let path = r"jsonpath={.metadata.annotations.nodemesh\.io/status}";
        self.kube.kubectl(&["-n", namespace, "get", "pod", pod, "-o", path]).out
    }

    #[track_caller]
    pub fn wait_in_mesh(&self, namespace: &str, pods: &[&str]) {
        for pod in pods {
            self.kube.eventually(&format!("{namespace}/{pod} is in the mesh"), || self.is_in_mesh(namespace, pod));
        }
    }

    /// A kubeconfig that knows the API server and nobody's credentials.
    pub fn anonymous(&self) -> String {
        let path = self.kube.folder().join("anonymous.conf");
        let text = std::fs::read_to_string(self.kube.kubeconfig()).expect("the cluster has a kubeconfig");
        let secret = |line: &&str| !line.contains("client-certificate") && !line.contains("client-key");
        let text: String = text.lines().filter(secret).flat_map(|line| [line, "\n"]).collect();
        std::fs::write(&path, text).expect("the cluster's folder can be written to");
        path.display().to_string()
    }

    /// A kubeconfig of somebody who may see what the role `view` shows, and change nothing.
    pub fn viewer(&self, namespace: &str) -> String {
        let kube = &self.kube;
        kube.kubectl(&["-n", namespace, "create", "serviceaccount", "viewer"]).success();
        kube.apply(&format!(
            "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {{name: test-viewer}}\n\
             roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}}\n\
             subjects: [{{kind: ServiceAccount, name: viewer, namespace: {namespace}}}]\n"
        ));
        let token = kube.kubectl(&["-n", namespace, "create", "token", "viewer"]).success();
        let text = std::fs::read_to_string(self.anonymous()).expect("it was just written");
        let path = kube.folder().join("viewer.conf");
        let own = format!("    token: {}\n", token.trim());
        std::fs::write(&path, text + &own).expect("the cluster's folder can be written to");
        path.display().to_string()
    }

    pub fn pod_ip(&self, namespace: &str, pod: &str) -> String {
        self.kube.kubectl(&["-n", namespace, "get", "pod", pod, "-o", "jsonpath={.status.podIP}"]).success()
    }

    /// The names of the pods that `selector` selects.
    pub fn pods(&self, namespace: &str, selector: &str) -> Vec<String> {
        let path = "jsonpath={.items[*].metadata.name}";
        let names = self.kube.kubectl(&["-n", namespace, "get", "pods", "-l", selector, "-o", path]).success();
        names.split_whitespace().map(str::to_owned).collect()
    }
}

/// A pod with the test peer in it.
pub fn peer(namespace: &str, name: &str, node: &str, args: &[&str]) -> String {
    pod(namespace, name, node, PEER, args, "")
}

/// A pod with Kubernetes's test server in it; `more` are fields of its container.
pub fn agnhost(namespace: &str, name: &str, node: &str, args: &[&str], more: &str) -> String {
    pod(namespace, name, node, AGNHOST, args, more)
}

fn pod(namespace: &str, name: &str, node: &str, image: &str, args: &[&str], more: &str) -> String {
    let args = serde_json::to_string(args).expect("words are plain data");
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
         spec:\n  nodeName: {node}\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: main\n    image: {image}\n    \
         imagePullPolicy: Never\n    args: {args}\n{more}"
    )
}

/// A Deployment of test peers that serve on 8080, one pod after the other replaced when it changes; ready when it listens,
/// and serving on for a moment after it is told to end, as any server that is to be rolled must.
pub fn servers(namespace: &str, name: &str, replicas: u32) -> String {
    format!(
        "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  replicas: {replicas}\n  \
         selector: {{matchLabels: {{app: {name}}}}}\n  strategy: {{rollingUpdate: {{maxUnavailable: 0, maxSurge: 1}}}}\n  \
         template:\n    metadata: {{labels: {{app: {name}}}}}\n    spec:\n      terminationGracePeriodSeconds: 10\n      \
         containers:\n      - name: main\n        image: {PEER}\n        imagePullPolicy: Never\n        \
         args: [echo, \"[::]:8080\"]\n        readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}\n        \
         lifecycle: {{preStop: {{sleep: {{seconds: 3}}}}}}\n{}",
        service(namespace, name, "")
    )
}

/// A Service of the pods with this name, port 80 to 8080; `more` are fields of its spec.
pub fn service(namespace: &str, name: &str, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec:\n  selector: {{app: {name}}}\n  ports: [{{port: 80, targetPort: 8080}}]\n{more}"
    )
}

/// Nobody without an identity gets in.
pub fn strict(namespace: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {namespace}}}\n\
         spec: {{mtls: {{mode: STRICT}}}}\n"
    )
}

/// What a mesh could leave on a node.
pub fn node_state(kube: &Kube, node: &str) -> String {
    let script = "for f in /etc/cni/net.d/*; do echo \"== $f\"; cat \"$f\"; done; ls /opt/cni/bin; ls -R /sys/fs/bpf; \
                  ls -d /run/nodemesh* /var/lib/nodemesh* 2>/dev/null; \
                  ip route; ip -6 route; ip rule; ip -6 rule; nft list tables";
    let output = kube.on_node(node, "sh").args(["-c", script]).output().expect("a node runs sh");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
