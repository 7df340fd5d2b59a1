//! The cluster's DNS: CoreDNS as a Deployment, as on any cluster. Services, headless ones and StatefulSets need it.
//!
//! It knows the cluster's names alone; whatever else is asked for does not exist, at once, so that no client waits.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::build::{self, Programs};
use super::command::wait_until;
use super::components::{import, kubectl};
use super::layout::{Cluster, DNS, NODES};
use super::up::READY;
use crate::image::oci;

/// Brings the image onto the nodes, the objects to the API server, and waits until one pod answers.
pub fn ensure(cluster: &Cluster, programs: &Programs) -> Result<()> {
    let image = format!("nodemesh.invalid/coredns:{}", build::COREDNS);
    let archive = cluster.folder().join("coredns.tar");
    let manifest = cluster.folder().join("coredns.yaml");
    // The archive is there when it was imported.
    if !archive.exists() {
        let unfinished: PathBuf = archive.with_extension("part");
        fs::write(&unfinished, oci::of_program(&image, &programs.path("coredns"))?)
            .context("cannot write the image")?;
        for node in NODES {
            import(cluster, programs, node, &unfinished)?;
        }
        fs::rename(&unfinished, &archive).context("cannot rename the image")?;
        fs::write(&manifest, objects(&image)).context("cannot write CoreDNS's objects")?;
        let path = manifest.to_str().context("the cluster's folder is not UTF-8")?;
        kubectl(cluster, programs, &["apply", "--server-side", "-f", path])?;
    }
    wait_until("a pod of CoreDNS is ready: see `kubectl -n kube-system describe pods`", READY, || {
        let path = "jsonpath={.status.readyReplicas}";
        let ready = kubectl(cluster, programs, &["-n", "kube-system", "get", "deployment", "coredns", "-o", path]);
        Ok(ready.is_ok_and(|count| !matches!(count.as_str(), "" | "0")))
    })?;
    Ok(())
}

fn objects(image: &str) -> String {
    OBJECTS.replace("IMAGE", image).replace("ADDRESS", DNS)
}

const OBJECTS: &str = r#"apiVersion: v1
kind: ServiceAccount
metadata: {name: coredns, namespace: kube-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: "system:coredns"}
rules:
- apiGroups: [""]
  resources: [endpoints, services, pods, namespaces]
  verbs: [list, watch]
- apiGroups: [discovery.k8s.io]
  resources: [endpointslices]
  verbs: [list, watch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: "system:coredns"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:coredns"}
subjects:
- {kind: ServiceAccount, name: coredns, namespace: kube-system}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: coredns, namespace: kube-system}
data:
  Corefile: |
    cluster.local:53 in-addr.arpa:53 ip6.arpa:53 {
        errors
        ready
        kubernetes cluster.local in-addr.arpa ip6.arpa {
            pods insecure
        }
        cache 5
    }
    .:53 {
        template ANY ANY {
            rcode NXDOMAIN
        }
    }
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: coredns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec:
  replicas: 1
  selector: {matchLabels: {k8s-app: kube-dns}}
  template:
    metadata: {labels: {k8s-app: kube-dns}}
    spec:
      serviceAccountName: coredns
      priorityClassName: system-cluster-critical
      dnsPolicy: Default
      containers:
      - name: coredns
        image: IMAGE
        imagePullPolicy: Never
        args: [-conf, /etc/coredns/Corefile]
        readinessProbe:
          httpGet: {path: /ready, port: 8181}
          periodSeconds: 1
        volumeMounts:
        - {name: settings, mountPath: /etc/coredns, readOnly: true}
      volumes:
      - name: settings
        configMap: {name: coredns}
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec:
  selector: {k8s-app: kube-dns}
  clusterIP: ADDRESS
  ports:
  - {name: dns, port: 53, protocol: UDP}
  - {name: dns-tcp, port: 53, protocol: TCP}
"#;
