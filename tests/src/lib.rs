//! The test mesh: nodes and pods made of network namespaces, real programs in them, and what is needed to judge them.
//!
//! ```no_run
//! use mesh_tests::{Mesh, MeshMode};
//!
//! let mesh = Mesh::new().node("n1").node("n2");
//! mesh.manifests().label("shop", MeshMode::Enabled);
//! let client = mesh.pod("n1", "shop/client");
//! let server = mesh.pod("n2", "shop/server");
//! let listener = server.listen();
//! let port = listener.local_addr().unwrap().port();
//! let stream = client.connect((server.v4(), port).into());
//! ```

mod agent;
mod capture;
mod cgroup;
mod foreign;
mod http;
mod kube;
mod manifests;
mod mesh;
mod netns;
mod pod;
mod process;
pub mod ring;
mod sweep;
pub mod traffic;
mod wait;

pub use agent::{Agent, Controller, agent_binary, meshctl_binary, peer_binary};
pub use capture::{Capture, Recording, Segment};
pub use cgroup::{Cgroup, cgroup2_mount};
pub use foreign::{Attachment, FOREIGN_NAME, attach_foreign};
pub use http::{get as http_get, metric};
pub use kube::{Kube, Said};
pub use manifests::{ClusterIps, Manifests, MeshMode};
pub use mesh::{Mesh, Node};
pub use netns::Netns;
pub use pod::{Output, Pod, PodSpec};
pub use process::{Process, tail};
pub use sweep::{sweep, sweep_own};
pub use wait::{eventually, throughout};
