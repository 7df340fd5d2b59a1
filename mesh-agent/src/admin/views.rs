//! What the admin pages say, as JSON: written by the agent, read by `meshctl`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// `/workloads`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadView {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub addresses: Vec<IpAddr>,
    pub node: String,
    /// On the node that answers.
    pub local: bool,
    pub identity: String,
    /// Name of the Deployment or the like.
    pub workload: String,
    /// `hbone` or `plain`.
    pub transport: String,
    /// Of local pods: `enrolled`, `refused`, `waiting` or `outside`; of others `remote`.
    pub state: String,
    /// Why it is refused.
    pub problem: Option<String>,
    pub legacy_connections: u64,
    /// `STRICT`, and `STRICT, 8080=PERMISSIVE` where ports differ. Empty for a pod that another node judges: ask that one.
    pub mtls: String,
    /// Of pods that are judged on the node that answers.
    pub policies: Vec<String>,
    pub region: String,
    pub zone: String,
}

/// `/services`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceView {
    pub namespace: String,
    pub name: String,
    pub hostname: String,
    /// Empty: headless.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<PortView>,
    pub algorithm: String,
    pub scope: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortView {
    pub port: u16,
    pub name: String,
    pub endpoints: Vec<EndpointView>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointView {
    pub address: String,
    pub ready: bool,
    pub workload: Option<String>,
}

/// `/policies`: each AuthorizationPolicy that holds for a workload that is judged on the node that answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PolicyView {
    pub namespace: String,
    pub name: String,
    /// `ALLOW`, `DENY` or `AUDIT`.
    pub action: String,
    pub dry_run: bool,
    /// As the mesh understood them.
    pub rules: Vec<serde_json::Value>,
    /// `namespace/name` of the workloads it holds for.
    pub workloads: Vec<String>,
}

/// `/status`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusView {
    pub node: String,
    /// The agent's own pod in Kubernetes; two of a node differ by it while one takes over from the other.
    #[serde(default)]
    pub pod: Option<String>,
    pub version: String,
    pub uptime_seconds: u64,
    pub ready: bool,
    pub waiting_for: Vec<String>,
    pub trust_domain: String,
    pub outbound_policy: String,
    pub certificate_authority: String,
    pub snapshot_generation: u64,
    pub workloads: usize,
    pub services: usize,
    pub enrolled_pods: usize,
    pub refused_pods: usize,
    pub legacy_connections: u64,
    pub open_connections: usize,
    pub certificates: usize,
    /// Of which are not `ready` or `renewing`.
    pub certificates_missing: usize,
    pub errors: usize,
    pub warnings: usize,
    pub log: String,
    pub kernel: Vec<KernelCounter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelCounter {
    pub event: String,
    pub reason: String,
    pub count: u64,
}

/// `/logging`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggingView {
    pub level: String,
}
