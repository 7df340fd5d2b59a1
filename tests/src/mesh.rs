//! Two nodes, five pods, one link: a mesh on one machine, made of network namespaces.
//!
//! ```text
//!   pod  pod   pod            pod  pod
//!     \   |   /                 \   |        eth0: veth to the bridge, 10.244.<node>.<n>/24, fd00:10:244:<node>::<n>/64
//!    [bridge] n1               [bridge] n2   node: 10.244.<node>.1 on the bridge, routes to the other nodes' pods
//!        |                         |         link: 192.168.77.<node>
//!        +------- fabric ----------+         a bridge of its own, so that a capture sees what passes between nodes
//!                    |
//!                 control                    where the controller runs
//! ```

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;

use crate::capture::Capture;
use crate::manifests::Manifests;
use crate::netns::Netns;
use crate::pod::{Pod, PodSpec};

/// Namespaces and temporary folders of ours are called `nm-<process id>-<mesh>-...`: `cargo xtask sweep` finds by that
/// what a killed run left behind.
pub(crate) const PREFIX: &str = "nm-";

/// A node: a namespace with a bridge for its pods and a port on the link.
#[derive(Debug)]
pub struct Node {
    name: String,
    number: u8,
    netns: Netns,
    used: Mutex<HashSet<u16>>,
}

impl Node {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The node's address on its pods' bridge: where kubelet's probes come from.
    pub fn bridge_v4(&self) -> IpAddr {
        Ipv4Addr::new(10, 244, self.number, 1).into()
    }

    pub fn bridge_v6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, self.number.into(), 0, 0, 0, 1).into()
    }

    /// The node's address on the link between nodes.
    pub fn link_v4(&self) -> IpAddr {
        link_v4(self.number).into()
    }
}

/// A mesh under test. Everything in it is removed on drop, also when a test panics.
#[derive(Debug)]
pub struct Mesh {
    // Fields are dropped in this order: pods before their nodes, nodes before the fabric, folders last.
    nodes: Vec<Arc<Node>>,
    control: Arc<Netns>,
    fabric: Netns,
    manifests: Manifests,
    bpffs: Mutex<HashSet<PathBuf>>,
    name: String,
    dir: TempDir,
}

/// The number that the controller's namespace has on the link.
const CONTROL: u8 = 254;

impl Mesh {
    /// The fabric and an empty folder of manifests.
    #[expect(clippy::new_without_default, reason = "it makes namespaces: nothing that a default should do")]
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        assert!(rustix::process::geteuid().is_root(), "the test mesh makes network namespaces: run it as root");
        let name = format!("{PREFIX}{}-{}", process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir().expect("a temporary folder");
        let manifests = Manifests::new(&dir.path().join("manifests"));
        fs::create_dir(dir.path().join("logs")).expect("the temporary folder is ours");
        let fabric = Netns::create(&format!("{name}-fabric"));
        fabric.ip(&["link add br0 type bridge", "link set br0 up"]);
        let control = Netns::create(&format!("{name}-control"));
        attach_to_fabric(&fabric, &control, "control", CONTROL);
        Self { nodes: Vec::new(), control: Arc::new(control), fabric, manifests, bpffs: Mutex::default(), name, dir }
    }

    /// Adds a node and routes between it and those that are there.
    pub fn node(mut self, name: &str) -> Self {
        assert!(self.nodes.iter().all(|node| node.name != name), "node {name} is there already");
        let number = u8::try_from(self.nodes.len() + 1).expect("fewer than 250 nodes");
        let netns = Netns::create(&format!("{}-{name}", self.name));
        for key in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            netns.sysctl(key, "1");
        }
        attach_to_fabric(&self.fabric, &netns, name, number);
        netns.ip(&[
            // A fixed address: a bridge without one takes that of a port, and changes it when pods come and go.
            &format!("link add pods address 02:00:0a:f4:{number:02x}:01 type bridge"),
            "link set pods up",
            &format!("addr add 10.244.{number}.1/24 dev pods"),
            &format!("addr add fd00:10:244:{number}::1/64 dev pods nodad"),
        ]);
        for other in &self.nodes {
            route_to(&netns, other.number);
            route_to(&other.netns, number);
        }
        self.nodes.push(Arc::new(Node { name: name.to_owned(), number, netns, used: Mutex::default() }));
        self
    }

    /// A pod called `namespace/name` on a node, with a service account and a label `app` of its own name. Its manifest is
    /// written too.
    pub fn pod(&self, node: &str, name: &str) -> Arc<Pod> {
        self.add(PodSpec::new(node, name))
    }

    /// A pod as `spec` says.
    pub fn add(&self, spec: PodSpec) -> Arc<Pod> {
        let node = self.get_node(&spec.node);
        let host_number = node.claim(spec.host_number);
        let n = node.number;
        let netns = Netns::create(&format!("{}-{}-{}", self.name, spec.namespace, spec.name));
        let port = format!("pod{host_number}");
        let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 244, n, 0)) + u32::from(host_number));
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, n.into(), 0, 0, 0, host_number);
        netns.ip(&[
            // The hardware address follows from the IP, as with many CNIs: neighbours that remember a pod which is gone
            // reach the next one that has its address.
            &format!(
                "link add eth0 address 02:00:0a:f4:{n:02x}:{host_number:02x} type veth peer name {port} netns {}",
                node.netns.name()
            ),
            "link set eth0 up",
            &format!("addr add {v4}/24 dev eth0"),
            &format!("addr add {v6}/64 dev eth0 nodad"),
            &format!("route add default via {}", node.bridge_v4()),
            &format!("route add default via {}", node.bridge_v6()),
        ]);
        node.netns.ip(&[&format!("link set {port} master pods up")]);
        let pod = Arc::new(Pod { spec, netns, host_number, v4, v6, logs: self.logs() });
        self.manifests.pod(&pod);
        pod
    }

    /// Deletes a pod as Kubernetes does: its manifest, then its namespace with all that runs in it. Its addresses are
    /// free again. Others that still hold the pod keep its namespace.
    pub fn delete(&self, pod: Arc<Pod>) {
        self.manifests.delete("pod", pod.namespace(), pod.name());
        let node = self.get_node(pod.node());
        lock(&node.used).remove(&pod.host_number);
        // The veth pair lives until the namespace dies, which processes and sockets in it may delay; its address must
        // be free at once.
        node.netns.ip(&[&format!("link delete pod{}", pod.host_number)]);
    }

    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    pub fn get_node(&self, name: &str) -> &Arc<Node> {
        self.nodes.iter().find(|node| node.name == name).unwrap_or_else(|| panic!("there is no node {name}"))
    }

    /// The folder of Kubernetes manifests that the agents read.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// The namespace of the controller, on the link at [`Mesh::control_v4`].
    pub fn control(&self) -> &Arc<Netns> {
        &self.control
    }

    pub fn control_v4(&self) -> IpAddr {
        link_v4(CONTROL).into()
    }

    /// The namespace that joins the nodes; its ports are called like the nodes.
    pub fn fabric(&self) -> &Netns {
        &self.fabric
    }

    /// Starts to capture all that passes between `node` and the others.
    pub fn capture(&self, node: &str) -> Capture {
        Capture::start(self, node)
    }

    /// A folder of this mesh, removed with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn logs(&self) -> PathBuf {
        self.dir.path().join("logs")
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// A bpffs of this mesh's own for one node, so that its pins are nobody else's.
    pub fn bpffs(&self, node: &str) -> PathBuf {
        let path = self.dir.path().join(format!("bpf-{node}"));
        if lock(&self.bpffs).insert(path.clone()) {
            fs::create_dir(&path).expect("the temporary folder is ours");
            rustix::mount::mount("bpf", &path, "bpf", rustix::mount::MountFlags::empty(), None)
                .unwrap_or_else(|e| panic!("cannot mount a bpffs at {}: {e}; run as root", path.display()));
        }
        path
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        for path in lock(&self.bpffs).drain() {
            // Lazily: an agent that is being reaped may still look into it. Pins go with the last user.
            let _ = rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

impl Node {
    fn claim(&self, wanted: Option<u16>) -> u16 {
        let mut used = lock(&self.used);
        let number =
            wanted.unwrap_or_else(|| (10..254).find(|n| !used.contains(n)).expect("a node has 244 pods at most"));
        assert!(used.insert(number), "address {number} of node {} is in use", self.name);
        number
    }
}

fn link_v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, number)
}

fn attach_to_fabric(fabric: &Netns, netns: &Netns, name: &str, number: u8) {
    netns.ip(&[
        &format!("link add name uplink type veth peer name {name} netns {}", fabric.name()),
        "link set uplink up",
        &format!("addr add {}/24 dev uplink", link_v4(number)),
        &format!("addr add fd00:10:77::{number:x}/64 dev uplink nodad"),
    ]);
    fabric.ip(&[&format!("link set {name} master br0 up")]);
}

fn route_to(netns: &Netns, number: u8) {
    netns.ip(&[
        &format!("route add 10.244.{number}.0/24 via {}", link_v4(number)),
        &format!("route add fd00:10:244:{number}::/64 via fd00:10:77::{number:x}"),
    ]);
}

/// A log file that is not there yet: `name.log`, `name-2.log`, ...
pub(crate) fn fresh_log(folder: &Path, name: &str) -> PathBuf {
    let first = std::iter::once(format!("{name}.log"));
    let names = first.chain((2u32..).map(|n| format!("{name}-{n}.log")));
    let mut paths = names.map(|file| folder.join(file));
    paths.find(|path| fs::File::create_new(path).is_ok()).expect("a fresh file name is found")
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
