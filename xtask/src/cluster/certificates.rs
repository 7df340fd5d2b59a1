//! The cluster's own CA, a certificate for each of its programs, and kubeconfigs that hold them.
//!
//! In comes a folder; out come files in it. They live as long as the cluster, on this machine: no rotation, one CA.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};

use super::layout::{Cluster, NODES, SERVICE_IP, control_addresses};

/// A leaf: its file name, the user and group that Kubernetes reads from it, and where it serves.
struct Leaf {
    file: String,
    user: String,
    group: Option<&'static str>,
    names: Vec<SanType>,
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
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, cluster.name());
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    fs::write(folder.join("ca.key"), key.serialize_pem())?;
    let ca = CertifiedIssuer::self_signed(params, key)?;
    fs::write(folder.join("ca.crt"), ca.pem())?;
    // For the tokens of ServiceAccounts. In two files: Kubernetes finds no public key in a private one of PKCS #8.
    let tokens = KeyPair::generate()?;
    fs::write(folder.join("service-account.key"), tokens.serialize_pem())?;
    fs::write(folder.join("service-account.pub"), tokens.public_key_pem())?;
    for leaf in leaves()? {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, leaf.user.as_str());
        if let Some(group) = leaf.group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.subject_alt_names = leaf.names;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &ca)?;
        fs::write(folder.join(format!("{}.crt", leaf.file)), certificate.pem())?;
        fs::write(folder.join(format!("{}.key", leaf.file)), key.serialize_pem())?;
        fs::write(folder.join(format!("{}.conf", leaf.file)), kubeconfig(folder, &leaf.file))?;
    }
    fs::write(folder.join("done"), "")?;
    Ok(())
}

fn leaves() -> Result<Vec<Leaf>> {
    let mut serving: Vec<SanType> = Vec::new();
    for name in [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ] {
        serving.push(SanType::DnsName(name.try_into()?));
    }
    let addresses: [IpAddr; 2] = [SERVICE_IP.into(), IpAddr::from([127, 0, 0, 1])];
    serving.extend(addresses.into_iter().chain(control_addresses()).map(SanType::IpAddress));
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
            names: node.addresses().into_iter().map(SanType::IpAddress).collect(),
        });
    }
    Ok(leaves)
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
