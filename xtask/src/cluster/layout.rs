//! What belongs to a cluster and what it is called: namespaces, addresses, files. No program runs here.
//!
//! ```text
//!   nmk-NAME-control   etcd, kube-apiserver, kube-controller-manager, kube-scheduler       10.79.0.1
//!        |  br0
//!        +---- nmk-NAME-n1   containerd, kubelet, kube-proxy    10.79.0.11   pods 10.244.1.0/24
//!        +---- nmk-NAME-n2                                      10.79.0.12   pods 10.244.2.0/24
//! ```
//!
//! All of it lies in network namespaces of the cluster's own, so that the same addresses serve every cluster.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Begins the name of whatever a cluster makes outside its folder. Demo and tests use `nm-`.
pub const PREFIX: &str = "nmk-";

/// The first address of the Services' range, which Kubernetes gives to its API server.
pub const SERVICE_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub const SERVICES: &str = "10.96.0.0/16,fd00:10:96::/112";
pub const PODS: &str = "10.244.0.0/16,fd00:10:244::/48";
/// Where the cluster's DNS is.
pub const DNS: &str = "10.96.0.10";

pub const CONTROL: &str = "control";
pub const NODES: [Node; 2] = [Node { name: "n1", number: 1 }, Node { name: "n2", number: 2 }];

#[derive(Debug, Clone, Copy)]
pub struct Node {
    pub name: &'static str,
    pub number: u8,
}

impl Node {
    pub fn addresses(self) -> [IpAddr; 2] {
        let host = 10 + self.number;
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x79, 0, 0, 0, 0, 0x10 + u16::from(self.number));
        [Ipv4Addr::new(10, 79, 0, host).into(), v6.into()]
    }

    pub fn pods(self) -> [String; 2] {
        [format!("10.244.{}.0/24", self.number), format!("fd00:10:244:{}::/64", self.number)]
    }
}

/// Where the API server is reached.
pub fn control_addresses() -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 79, 0, 1).into(), Ipv6Addr::new(0xfd00, 0x10, 0x79, 0, 0, 0, 0, 1).into()]
}

/// A cluster by its name. It may run or not: what it is called does not depend on it.
#[derive(Debug, Clone)]
pub struct Cluster {
    name: String,
    folder: PathBuf,
}

impl Cluster {
    /// `name` goes into names of namespaces, cgroups and a folder.
    pub fn new(name: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        if name.is_empty() || name.len() > 20 || !name.chars().all(plain) {
            bail!("cluster name {name:?}: give up to 20 lower-case letters and digits");
        }
        let name = format!("{PREFIX}{name}");
        let folder = std::env::temp_dir().join(&name);
        Ok(Self { name, folder })
    }

    /// With the prefix.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Everything that the cluster writes.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Certificates, keys, kubeconfigs.
    pub fn pki(&self) -> PathBuf {
        self.folder.join("pki")
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.pki().join("admin.conf")
    }

    /// A folder with a `kubectl` that finds the API server from outside.
    pub fn bin(&self) -> PathBuf {
        self.folder.join("bin")
    }

    /// The network namespace of a node or of the control plane.
    pub fn netns(&self, place: &str) -> String {
        format!("{}-{place}", self.name)
    }

    pub fn netns_path(&self, place: &str) -> PathBuf {
        Path::new("/run/netns").join(self.netns(place))
    }

    /// The cgroup of a node or of the control plane, below the root of each hierarchy.
    pub fn cgroup(&self, place: &str) -> String {
        format!("{}/{place}", self.name)
    }

    /// Where a place keeps process ids, logs and settings.
    pub fn place(&self, place: &str) -> PathBuf {
        self.folder.join(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_a_name() {
        assert_eq!(Cluster::new("dev").expect("plain").netns("n1"), "nmk-dev-n1");
        for bad in ["", "a/b", "..", "A", "a-b", "abcdefghijklmnopqrstu"] {
            assert!(Cluster::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sweep_leaves_clusters_alone() {
        assert!(!PREFIX.starts_with("nm-"), "names with nm- are swept when their process is gone");
    }
}
