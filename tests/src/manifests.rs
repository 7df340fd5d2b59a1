//! The folder of ordinary Kubernetes manifests that agents and controller read.
//!
//! Every write is a file beside the folder, renamed into it: a reader sees the old object or the new one.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::mesh::lock;
use crate::pod::{Pod, split_name};

#[derive(Debug)]
pub struct Manifests {
    folder: PathBuf,
    next_cluster_ip: Mutex<u16>,
}

/// The cluster IPs of a service.
#[derive(Debug, Clone, Copy)]
pub struct ClusterIps {
    pub v4: IpAddr,
    pub v6: IpAddr,
}

/// What a namespace's label `nodemesh.io/mode` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeshMode {
    Enabled,
    Disabled,
    /// No label.
    Unset,
}

impl Manifests {
    pub(crate) fn new(folder: &Path) -> Self {
        fs::create_dir_all(folder).expect("the temporary folder is ours");
        Self { folder: folder.to_owned(), next_cluster_ip: Mutex::new(10) }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a namespace with its label.
    pub fn label(&self, namespace: &str, mode: MeshMode) {
        let labels = match mode {
            MeshMode::Enabled => "  labels: {nodemesh.io/mode: enabled}\n",
            MeshMode::Disabled => "  labels: {nodemesh.io/mode: disabled}\n",
            MeshMode::Unset => "",
        };
        let text = format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}\n{labels}");
        self.write("namespace", "", namespace, &text);
    }

    /// Writes a pod, running and ready, and its service account.
    pub fn pod(&self, pod: &Pod) {
        self.pod_with(pod, true, &[]);
    }

    /// Writes a pod with its readiness and with labels beyond those of its spec.
    pub fn pod_with(&self, pod: &Pod, ready: bool, more_labels: &[(&str, &str)]) {
        let (namespace, name, account) = (pod.namespace(), pod.name(), &pod.spec.service_account);
        let labels = pod.spec.labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).chain(more_labels.iter().copied());
        let labels: String = labels.map(|(key, value)| format!("    {key}: \"{value}\"\n")).collect();
        let annotations = &pod.spec.annotations;
        let annotations: String = annotations.iter().map(|(k, v)| format!("    {k}: \"{v}\"\n")).collect();
        let account_text =
            format!("apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: {account}\n  namespace: {namespace}\n");
        self.write("serviceaccount", namespace, account, &account_text);
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {uid}\n  labels:\n{labels}\
             \x20 annotations:\n    nodemesh.io/netns: {netns}\n{annotations}\
             spec:\n  nodeName: {node}\n  serviceAccountName: {account}\n  containers:\n  - name: app\n    image: app\n\
             status:\n  phase: Running\n  podIP: {v4}\n  podIPs:\n  - ip: {v4}\n  - ip: \"{v6}\"\n\
             \x20 conditions:\n  - type: Ready\n    status: \"{ready}\"\n",
            uid = pod.netns().name(),
            netns = pod.netns().path().display(),
            node = pod.node(),
            v4 = pod.v4(),
            v6 = pod.v6(),
            ready = if ready { "True" } else { "False" },
        );
        self.write("pod", namespace, name, &text);
    }

    /// Writes a dual-stack Service called `namespace/name` and its EndpointSlices. A port is (port, target port).
    pub fn service(&self, name: &str, ports: &[(u16, u16)], endpoints: &[&Pod]) -> ClusterIps {
        let number = {
            let mut next = lock(&self.next_cluster_ip);
            *next += 1;
            *next
        };
        let ips = ClusterIps {
            v4: format!("10.96.{}.{}", number >> 8, number & 0xff).parse().expect("an address"),
            v6: format!("fd00:10:96::{number:x}").parse().expect("an address"),
        };
        self.service_at(name, Some(ips), ports, endpoints);
        ips
    }

    /// The same at addresses that are known; `None` makes it headless.
    pub fn service_at(&self, name: &str, ips: Option<ClusterIps>, ports: &[(u16, u16)], endpoints: &[&Pod]) {
        let (namespace, name) = split_name(name);
        let (v4, v6) = match ips {
            Some(ips) => (ips.v4.to_string(), ips.v6.to_string()),
            None => ("None".to_owned(), "None".to_owned()),
        };
        let cluster_ips =
            if ips.is_some() { format!("  - \"{v4}\"\n  - \"{v6}\"\n") } else { "  - \"None\"\n".to_owned() };
        let service_ports: String = ports
            .iter()
            .map(|(port, target)| {
                format!("  - name: p{port}\n    port: {port}\n    targetPort: {target}\n    protocol: TCP\n")
            })
            .collect();
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {namespace}\nspec:\n  type: ClusterIP\n\
             \x20 clusterIP: \"{v4}\"\n  clusterIPs:\n{cluster_ips}  ipFamilies: [IPv4, IPv6]\n\
             \x20 ipFamilyPolicy: PreferDualStack\n  selector:\n    app: {name}\n  ports:\n{service_ports}",
        );
        self.write("service", namespace, name, &text);
        self.endpoints(namespace, name, ports, endpoints.iter().map(|pod| (*pod, true)));
    }

    /// Writes the EndpointSlices of a service, a slice for each family; each endpoint with its readiness.
    pub fn endpoints<'a>(
        &self,
        namespace: &str,
        service: &str,
        ports: &[(u16, u16)],
        endpoints: impl Iterator<Item = (&'a Pod, bool)> + Clone,
    ) {
        let slice_ports: String = ports
            .iter()
            .map(|(port, target)| format!("- name: p{port}\n  port: {target}\n  protocol: TCP\n"))
            .collect();
        for family in ["IPv4", "IPv6"] {
            let items: String = endpoints
                .clone()
                .map(|(pod, ready)| {
                    let address = if family == "IPv4" { pod.v4() } else { pod.v6() };
                    format!(
                        "- addresses: [\"{address}\"]\n  conditions: {{ready: {ready}}}\n  nodeName: {}\n\
                         \x20 targetRef: {{kind: Pod, namespace: {}, name: {}}}\n",
                        pod.node(),
                        pod.namespace(),
                        pod.name(),
                    )
                })
                .collect();
            let items = if items.is_empty() { "endpoints: []\n".to_owned() } else { format!("endpoints:\n{items}") };
            let slice = format!("{service}-{}", family.to_lowercase());
            let text = format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {slice}\n  namespace: {namespace}\n\
                 \x20 labels:\n    kubernetes.io/service-name: {service}\naddressType: {family}\nports:\n{slice_ports}{items}",
            );
            self.write("endpointslice", namespace, &slice, &text);
        }
    }

    /// Writes any manifest under a name that [`Manifests::remove`] knows it by.
    pub fn apply(&self, file: &str, yaml: &str) {
        let path = self.folder.join(format!("{file}.yaml"));
        // Hidden and of another extension until the rename, so that a reader which lists the folder passes it by.
        let draft = self.folder.join(format!(".{file}.tmp"));
        fs::write(&draft, yaml).unwrap_or_else(|e| panic!("cannot write {}: {e}", draft.display()));
        fs::rename(&draft, &path).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
    }

    /// Removes what [`Manifests::apply`] wrote. One that is not there is no error.
    pub fn remove(&self, file: &str) {
        let _ = fs::remove_file(self.folder.join(format!("{file}.yaml")));
    }

    pub fn delete(&self, kind: &str, namespace: &str, name: &str) {
        self.remove(&file_name(kind, namespace, name));
    }

    fn write(&self, kind: &str, namespace: &str, name: &str, yaml: &str) {
        self.apply(&file_name(kind, namespace, name), yaml);
    }
}

fn file_name(kind: &str, namespace: &str, name: &str) -> String {
    if namespace.is_empty() { format!("{kind}-{name}") } else { format!("{kind}-{namespace}-{name}") }
}
