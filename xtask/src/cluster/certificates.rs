//! The cluster's own CA, a certificate for each of its programs, and kubeconfigs that hold them.
//!
//! In comes a folder; out come files in it. They live as long as the cluster, on this machine: no rotation, one CA.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::layout::{Cluster, NODES, SERVICE_IP, control_addresses};

/// A leaf: its file name, the user and group that Kubernetes reads from it, and where it serves.
struct Leaf {
    file: String,
    user: String,
    group: Option<&'static str>,
    /// As openssl writes them: `DNS:localhost`, `IP:10.0.0.1`.
    names: Vec<String>,
}

/// Makes what is missing; a cluster that runs keeps what it has.
pub fn ensure(cluster: &Cluster) -> Result<()> {
    let folder = cluster.pki();
    if folder.join("done").exists() {
        return Ok(());
    }
    make(cluster, &folder).with_context(|| format!("cannot make certificates in {}", folder.display()))
}

fn make(cluster: &Cluster, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    // A configuration of our own: that of the machine may add extensions.
    fs::write(folder.join("openssl.cnf"), "[req]\ndistinguished_name = name\n[name]\n")?;
    let usage = "keyUsage=critical,keyCertSign,cRLSign,digitalSignature";
    let ca = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", usage];
    certificate(folder, "ca", &format!("/CN={}", cluster.name()), &ca)?;
    // For the tokens of ServiceAccounts. In two files: Kubernetes finds no public key in a private one of PKCS #8.
    let curve = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];
    openssl(folder, &[&["genpkey"], &curve[..], &["-out", "service-account.key"]].concat())?;
    openssl(folder, &["pkey", "-in", "service-account.key", "-pubout", "-out", "service-account.pub"])?;
    for leaf in leaves() {
        let subject = match leaf.group {
            Some(group) => format!("/O={group}/CN={}", leaf.user),
            None => format!("/CN={}", leaf.user),
        };
        let names = format!("subjectAltName={}", leaf.names.join(","));
        let mut extensions = vec!["-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "keyUsage=critical,digitalSignature"];
        extensions.extend(["-addext", "extendedKeyUsage=clientAuth,serverAuth"]);
        if !leaf.names.is_empty() {
            extensions.extend(["-addext", &names]);
        }
        certificate(folder, &leaf.file, &subject, &extensions)?;
        fs::write(folder.join(format!("{}.conf", leaf.file)), kubeconfig(folder, &leaf.file))?;
    }
    fs::write(folder.join("done"), "")?;
    Ok(())
}

/// A new key and its certificate, FILE.key and FILE.crt.
fn certificate(folder: &Path, file: &str, subject: &str, more: &[&str]) -> Result<()> {
    let (key, out) = (format!("{file}.key"), format!("{file}.crt"));
    let new = ["req", "-x509", "-config", "openssl.cnf", "-days", "3650", "-nodes", "-newkey", "ec", "-pkeyopt"];
    let named = ["ec_paramgen_curve:P-256", "-subj", subject, "-keyout", &key, "-out", &out];
    openssl(folder, &[&new[..], &named, more].concat())
}

fn openssl(folder: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl").args(arguments).current_dir(folder).output();
    let output = output.context("cannot run openssl; `cargo xtask setup` installs it")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "openssl {}: {}", arguments[0], said.lines().last().unwrap_or("no reason given"));
    Ok(())
}

fn leaves() -> Vec<Leaf> {
    let address = |ip: IpAddr| format!("IP:{ip}");
    let mut serving = vec!["DNS:localhost".to_owned()];
    for domain in ["", ".default", ".default.svc", ".default.svc.cluster.local"] {
        serving.push(format!("DNS:kubernetes{domain}"));
    }
    let addresses: [IpAddr; 2] = [SERVICE_IP.into(), IpAddr::from([127, 0, 0, 1])];
    serving.extend(addresses.into_iter().chain(control_addresses()).map(address));
    let client =
        |file: &str, user: &str, group| Leaf { file: file.into(), user: user.into(), group, names: Vec::new() };
    let mut leaves = vec![
        Leaf { file: "apiserver".into(), user: "kube-apiserver".into(), group: None, names: serving },
        client("apiserver-kubelet", "kube-apiserver-kubelet-client", Some("system:masters")),
        client("admin", "admin", Some("system:masters")),
        client("controller-manager", "system:kube-controller-manager", None),
        client("scheduler", "system:kube-scheduler", None),
        client("proxy", "system:kube-proxy", None),
    ];
    for node in NODES {
        // What the node authorizer reads a node's name from.
        leaves.push(Leaf {
            file: node.name.into(),
            user: format!("system:node:{}", node.name),
            group: Some("system:nodes"),
            names: node.addresses().into_iter().map(address).collect(),
        });
    }
    leaves
}

fn kubeconfig(folder: &Path, file: &str) -> String {
    let path = |name: String| folder.join(name).display().to_string();
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: cluster\n\
         clusters:\n- name: cluster\n  cluster:\n    server: https://{server}:6443\n    certificate-authority: {ca}\n\
         contexts:\n- name: cluster\n  context: {{cluster: cluster, user: user}}\n\
         users:\n- name: user\n  user:\n    client-certificate: {certificate}\n    client-key: {key}\n",
        server = control_addresses()[0],
        ca = path("ca.crt".into()),
        certificate = path(format!("{file}.crt")),
        key = path(format!("{file}.key")),
    )
}
