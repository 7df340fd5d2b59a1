//! The one internal model: what the data path reads, and nothing else. Immutable, compared, printed; no I/O, no clock,
//! no Kubernetes or Istio type. `translate` makes it, the proxy reads it through one atomic swap.

mod authorization;
mod few;
pub mod http;
mod identity;
mod node_pods;
mod problem;
mod service;
mod shared_map;
mod snapshot;
pub mod traffic;
mod workload;

pub use authorization::{
    Action, AuthorizationPolicy, IpBlock, Match, MtlsMode, MtlsModes, PortMatch, Rule, Rules, StringMatch,
};
pub use few::Few;
pub use identity::{IdentityError, SpiffeId, TrustDomain};
pub use node_pods::{NodePod, NodePods, Standing, Unjudged};
pub use problem::{ObjectRef, Problem, Severity};
pub use service::{Algorithm, Endpoint, Scope, Service, ServicePort};
pub use shared_map::SharedMap;
pub use snapshot::{MeshSettings, OutboundPolicy, ServiceKey, Snapshot, SnapshotParts, Target};
pub use workload::{Labels, Locality, Names, Transport, Workload};
