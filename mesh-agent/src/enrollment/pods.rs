//! The set of enrolled pods, kept equal to the snapshot's local, enabled pods.

use std::net::TcpListener;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Netns;
use crate::model::Workload;

/// A pod of this node with its listeners, all inside its own netns, non-blocking.
#[derive(Debug)]
pub struct EnrolledPod {
    /// As it was when enrolled; the data path looks the present one up in the snapshot by uid.
    pub workload: Arc<Workload>,
    pub netns: Arc<Netns>,
    /// Port 15001: the pod's own connections, redirected.
    pub outbound: TcpListener,
    /// Port 15006: plaintext from outside; the local address of an accepted socket is the one the client asked for.
    pub plain: TcpListener,
    /// Port 15008.
    pub hbone: TcpListener,
}

/// What the workers are told.
#[derive(Debug, Clone)]
pub enum PodEvent {
    Joined(Arc<EnrolledPod>),
    /// Stop accepting. Connections go on unless the pod is gone.
    Left {
        uid: Arc<str>,
    },
}

/// For `meshctl workloads` and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub addresses: Vec<std::net::IpAddr>,
    pub enrolled: bool,
    /// Why not, in one sentence.
    pub problem: Option<String>,
    /// Connections older than the enrolment that still run, untouched and outside the mesh.
    pub legacy_connections: u64,
}

/// Keeps pods enrolled as the snapshot says.
pub struct Enrollment {}
